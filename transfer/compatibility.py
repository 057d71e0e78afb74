"""A guard on the methods of other libraries that this project overrides or that are private there.

If a library renames one of them, an override becomes dead code and nothing says so: the run would end with silently
wrong results. So every run checks this list before it does anything else.
"""

import importlib
import importlib.metadata
import inspect

from transfer.errors import UserError

# The versions that the list below was written for; constraints.txt pins them.
TESTED = {"transformers": "5.23.0", "accelerate": "1.15.0", "torch": "2.13.0", "evaluate": "0.4.6"}

# Class -> method that we override -> the parameters that we rely on.
OVERRIDDEN: dict[str, dict[str, tuple[str, ...]]] = {
    "transformers:Trainer": {
        "train": ("resume_from_checkpoint", "trial", "ignore_keys_for_eval"),
        "training_step": ("model", "inputs", "num_items_in_batch"),
        "prediction_step": ("model", "inputs", "prediction_loss_only", "ignore_keys"),
        "evaluate": ("eval_dataset", "ignore_keys", "metric_key_prefix"),
        "create_optimizer": ("model",),
        "save_model": ("output_dir", "_internal_call"),
        "floating_point_ops": ("inputs",),
        # Private: without it, the norm of all gradients is computed at every step, only to be logged.
        "_get_grad_norm": ("model", "grad_norm"),
    },
    "evaluate:Metric": {"_info": (), "_compute": ()},  # both are meant to be overridden
    # The hooks of the callbacks: without on_train_end, a run would end with the last epoch instead of the best.
    "transformers:TrainerCallback": dict.fromkeys(
        (
            "on_train_begin",
            "on_train_end",
            "on_epoch_end",
            "on_step_begin",
            "on_step_end",
            "on_evaluate",
            "on_save",
            "on_log",
        ),
        ("args", "state", "control"),
    ),
}

# Private function that we call -> its parameters. Where torch emulates bf16 on a CPU, fp32 is faster.
CALLED: dict[str, tuple[str, ...]] = {"torch.cpu:_is_avx512_bf16_supported": ()}


def _find(name: str):
    """What `module:attribute` names, or None."""
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute, None)


def _misses(function, parameters: tuple[str, ...]) -> bool:
    """Whether a function is missing or lacks one of the parameters."""
    return function is None or not set(parameters) <= inspect.signature(function).parameters.keys()


def check_libraries() -> None:
    """Raise `UserError` unless the installed libraries have all that we override and call."""
    for name, methods in OVERRIDDEN.items():
        for method, parameters in methods.items():
            if _misses(getattr(_find(name), method, None), parameters):
                _refuse(name, method, parameters)
    for name, parameters in CALLED.items():
        if _misses(_find(name), parameters):
            _refuse(name, name.partition(":")[2], parameters)


def _refuse(name: str, method: str, parameters: tuple[str, ...]) -> None:
    package = name.partition(":")[0].partition(".")[0]
    raise UserError(
        f"{package} {importlib.metadata.version(package)} has no {method}({', '.join(parameters)}) in "
        f"{name.partition(':')[0]}, which this project needs; it was tested with {package} {TESTED[package]}: "
        "pip install -r requirements.txt"
    )
