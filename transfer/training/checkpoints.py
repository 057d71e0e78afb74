"""Checkpoints: which of them are complete, from which one a run resumes, and what they were made from."""

import json
import logging
import math
import pickle
import secrets
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.trainer_pt_utils import safe_globals
from transformers.trainer_utils import rotate_checkpoints

from transfer.errors import Terminated, UserError
from transfer.runtime import end_signals, launched_processes, say

if TYPE_CHECKING:
    from transfer.training.trainer import FinetuningTrainer

logger = logging.getLogger(__name__)

STATE = "trainer_state.json"  # the Trainer writes it last

STEPS_BETWEEN_QUESTIONS = 8  # whether a process of several got a signal

# A run may also be killed while it deletes a checkpoint, whose files go in any order.
PARTS = ("*.safetensors", "optimizer*", "scheduler.pt", "rng_state*.pth")

# Arguments that do not decide the weights: they may change where a run is resumed.
WITHOUT_EFFECT_ON_WEIGHTS = {
    "data_dir",
    "output_dir",
    "resume_from_checkpoint",
    "reproduce",
    "estimate",
    "max_minutes",
    "do_train",
    "do_eval",
    "do_predict",
    "cache_images",
    "dataloader_num_workers",
    "dataloader_prefetch_factor",
    "dataloader_persistent_workers",
    "dataloader_pin_memory",
    "per_device_eval_batch_size",
    "eval_accumulation_steps",
    "save_total_limit",
    "report_to",
    "disable_tqdm",
    "run_name",
    "project",
    "push_to_hub",
}
PREFIXES_WITHOUT_EFFECT = ("hub_", "log", "trackio_", "local_rank", "skip_memory")

# fmt: off
# Why a training cannot be resumed with another value. The optimizer and the schedule are loaded from the checkpoint,
# so another learning rate, for example, would be ignored.
FIXED = {
    **dict.fromkeys(
        ["learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "optim", "optim_args",
         "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "layer_decay", "freeze_layers", "lora_r"],
        "its optimizer and learning-rate schedule were made with it",
    ),
    **dict.fromkeys(["seed", "data_seed"], "the order of the images follows from it"),
    **dict.fromkeys(
        ["max_train_samples", "validation_fraction", "split_seed", "seeds", "kfold", "fold"],
        "it decides which images are trained on",
    ),
    **dict.fromkeys(["image_size"], "its weights were trained at that size"),
    **dict.fromkeys(["linear_probe", "linear_probe_only"], "the head that it started from follows from it"),
    **dict.fromkeys(["ema_decay"], "its average of the weights was made with it"),
    **dict.fromkeys(["metric_for_best_model"], "the best epoch so far was chosen by it"),
}
# What another value means for the rest of a training.
CONTINUES = {
    **dict.fromkeys(
        ["train_image_size", "min_crop_scale", "decoded_side", "drop_path_rate", "freeze_batch_norm_stats",
         "class_weights", "mixup_alpha", "cutmix_alpha", "trivial_augment", "erasing_probability", "augment_until",
         "max_grad_norm", "label_smoothing_factor", "eval_strategy", "eval_steps", "eval_delay", "eval_on_start",
         "save_strategy", "save_steps", "load_best_model_at_end", "debug"],
        "it applies to the steps from here on",
    ),
    **dict.fromkeys(
        ["model_name_or_path", "model_revision", "trust_remote_code", "head_warm_start"],
        "the weights are those of the checkpoint",
    ),
    **dict.fromkeys(
        ["dataset_name", "dataset_config_name", "label_column_name", "classes_file", "labels_csv", "image_column",
         "label_column", "group_column", "label_pattern", "skip_unreadable"],
        "the images and their labels must be the same",
    ),
    **dict.fromkeys(
        ["template", "submission_labels", "tta", "max_eval_samples", "search", "search_space", "export", "hand_in"],
        "it does not concern the training",
    ),
    **dict.fromkeys(
        ["tf32", "activation_checkpointing", "activation_checkpointing_kwargs", "gradient_checkpointing",
         "gradient_checkpointing_kwargs", "torch_compile", "torch_compile_backend", "torch_compile_mode",
         "torch_empty_cache_steps", "full_determinism", "use_cpu", "dataloader_multiprocessing_context",
         "save_on_each_node", "ddp_find_unused_parameters", "ddp_bucket_cap_mb", "ddp_broadcast_buffers",
         "ddp_static_graph", "ddp_timeout"],
        "the training stays the same up to rounding",
    ),
    **dict.fromkeys(["num_train_epochs", "max_steps"], "the learning rate goes on as in a training of that length"),
    **dict.fromkeys(
        ["per_device_train_batch_size", "gradient_accumulation_steps"],
        "an optimizer step has as many images as before, with other random views",
    ),
    "processes": "an optimizer step has as many images as before, with other random views",
}
# fmt: on


def decides_weights(argument: str) -> bool:
    """Whether another value of an argument may train to other weights."""
    return argument not in WITHOUT_EFFECT_ON_WEIGHTS and not argument.startswith(PREFIXES_WITHOUT_EFFECT)


def read_state(checkpoint: Path) -> dict:
    """What the Trainer wrote into a checkpoint last; empty if it did not get there."""
    try:
        state = json.loads((checkpoint / STATE).read_text())
        return state if isinstance(state, dict) else {}
    except (OSError, ValueError):
        return {}


def is_complete(checkpoint: Path) -> bool:
    """Whether a checkpoint was written to its end and is not partly deleted."""
    return "global_step" in read_state(checkpoint) and all(any(checkpoint.glob(part)) for part in PARTS)


def step_of(checkpoint: Path) -> int:
    """The optimizer step in a checkpoint's name, -1 if there is none."""
    number = checkpoint.name.rpartition("-")[2]
    return int(number) if number.isdecimal() else -1


def last_checkpoint(output_dir: Path) -> Path | None:
    """The newest complete checkpoint; incomplete ones, which a killed run can leave, are skipped."""
    return max(filter(is_complete, output_dir.glob("checkpoint-*")), key=step_of, default=None)


def find_checkpoint(output_dir: Path, resume: str | None) -> str | None:
    """The checkpoint that `--resume_from_checkpoint` means: `true` for the last in output_dir, or a folder."""
    if resume is None:
        return None
    if resume.lower() != "true":
        if not is_complete(Path(resume)):
            raise UserError(
                f"--resume_from_checkpoint {resume}: is not a complete checkpoint; give `true` or a checkpoint folder"
            )
        return resume
    last = last_checkpoint(output_dir)
    if last is None and any(output_dir.glob(f"checkpoint-*/{STATE}")):  # which counts as an unfinished run
        raise UserError(
            f"--resume_from_checkpoint true: {output_dir} holds no complete checkpoint, only parts; remove the folder "
            "to start again"
        )
    if last is None:
        raise UserError(f"--resume_from_checkpoint true: {output_dir} holds no checkpoint; run the command without it")
    return str(last)


def discard_checkpoint(checkpoint: Path) -> None:
    """Delete a checkpoint so that it never looks complete in between."""
    (checkpoint / STATE).unlink(missing_ok=True)
    shutil.rmtree(checkpoint, ignore_errors=True)


def describe_resume(output_dir: Path) -> str:
    """What to do after a run was interrupted."""
    last = last_checkpoint(output_dir)
    if last is None and any(output_dir.glob(f"checkpoint-*/{STATE}")):
        return "no checkpoint is complete; remove the folder to start again"
    if last is None:
        return "no epoch was finished; run the same command again: it starts over, or tells you how to resume"
    return f"resume with --resume_from_checkpoint true, from {last.name}"


def make_room(output_dir: Path, needed: int, best: str | None) -> None:
    """See that `needed` bytes are free, deleting checkpoints that are neither the best nor the last if they are not.

    Raises `UserError`, with those two left as they are, where that is not enough.
    """
    if shutil.disk_usage(output_dir).free < needed:
        rotate_checkpoints(str(output_dir), save_total_limit=1, best_model_checkpoint=best)
    free = shutil.disk_usage(output_dir).free
    if free < needed:
        raise UserError(
            f"{output_dir}: the next checkpoint needs {needed / 2**20:.0f} MiB, but {free / 2**20:.0f} MiB are free; "
            f"free some space, then {describe_resume(output_dir)}"
        )


def checkpoint_bytes(model: nn.Module) -> int:
    """How large a checkpoint gets: the weights, and the optimizer's two moments of what is trained."""
    parameters = list(model.parameters())
    trained = sum(p.numel() * p.element_size() for p in parameters if p.requires_grad)
    return sum(p.numel() * p.element_size() for p in parameters) + 2 * trained


def _load_state(path: Path) -> dict:
    """One of a checkpoint's torch files, of tensors and numbers alone. Raises `UserError`."""
    try:
        with safe_globals():
            return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, ValueError, KeyError, RuntimeError, EOFError, pickle.UnpicklingError) as fault:
        reason = " ".join(str(fault).split())[:200]
        raise UserError(f"{path.parent}: cannot be loaded ({reason}); resume from another checkpoint") from None


def check_training_state(checkpoint: Path, args: TrainingArguments) -> None:
    """Refuse a checkpoint whose optimizer, schedule or random state is damaged, or holds code. Raises `UserError`."""
    random_state = f"rng_state_{args.process_index}.pth" if args.world_size > 1 else "rng_state.pth"
    for name in ("optimizer.pt", "scheduler.pt", random_state):
        if (checkpoint / name).is_file():
            _load_state(checkpoint / name)


def check_optimizer_fits(optimizer: torch.optim.Optimizer, checkpoint: Path) -> None:
    """Refuse a checkpoint whose optimizer trained other parameters. Raises `UserError`."""
    if not (checkpoint / "optimizer.pt").is_file():  # FSDP's lie in another form
        return
    then = [len(group["params"]) for group in _load_state(checkpoint / "optimizer.pt")["param_groups"]]
    now = [len(group["params"]) for group in optimizer.param_groups]
    if then != now:
        raise UserError(
            f"{checkpoint}: cannot be resumed: its optimizer trained {sum(then)} tensors in {len(then)} groups, this "
            f"run's trains {sum(now)} in {len(now)}; use the same --freeze_layers, --layer_decay and --lora_r"
        )


def _provenance_of(checkpoint: Path) -> dict | None:
    """What a `RunProvenance` kept in a checkpoint; None in one from before there was any."""
    return read_state(checkpoint).get("stateful_callbacks", {}).get(RunProvenance.__name__, {}).get("args")


def check_own(checkpoint: Path, provenance: "RunProvenance") -> None:
    """Refuse a checkpoint that neither this run nor one that it resumes wrote. Raises `UserError`."""
    runs = (_provenance_of(checkpoint) or {}).get("runs", provenance.runs)
    if not set(runs) & set(provenance.runs):
        raise UserError(
            f"{checkpoint}: was written by another run, so this run's weights are lost; start again in another "
            "--output_dir"
        )


def _check_step_size(place: Path, then: Mapping, now: Mapping) -> None:
    """Refuse optimizer steps of another number of images, which the count of steps and the schedule rest on."""
    images, times = "per_device_train_batch_size", "gradient_accumulation_steps"
    if not {images, times} <= then.keys() & now.keys():
        return
    step = then[images] * then[times]
    if now[images] * now[times] == step:
        return
    if step % now[images] == 0:
        keeps = f"--{times} {step // now[images]}"
    elif step % now[times] == 0:
        keeps = f"--{images} {step // now[times]}"
    else:
        keeps = f"--{images} {then[images]} --{times} {then[times]}"
    raise UserError(
        f"{place}: was trained with {step} images per optimizer step, and this would be {now[images] * now[times]}; "
        f"{keeps} keeps the step"
    )


def _check_length(place: Path, now: Mapping) -> None:
    """Refuse a length that the training has already passed."""
    state, steps, epochs = read_state(place), now.get("max_steps", -1), now.get("num_train_epochs", math.inf)
    done, trained = state.get("global_step", 0), state.get("epoch") or 0
    advice = "give more, or take its weights with --model_name_or_path in another --output_dir"
    if 0 < steps < done:
        raise UserError(f"{place}: --max_steps {steps}: {done} steps are done already; {advice}")
    if steps <= 0 and epochs < trained - 1e-6:
        raise UserError(f"{place}: --num_train_epochs {epochs:g}: {trained:.2f} epochs are done already; {advice}")


def judge_changes(place: Path, then: Mapping, now: Mapping) -> list[str]:
    """What the changes from the arguments `then` to those of `now` mean for a training that is resumed, one line each.

    Raises `UserError` for the first with which it cannot go on.
    """
    changed = [name for name in now if name in then and then[name] != now[name]]
    for name in changed:
        if name in FIXED:
            raise UserError(
                f"{place}: --{name} was {then[name]} and is now {now[name]}, but {FIXED[name]}; use the earlier "
                "value, or start again in another --output_dir"
            )
    _check_step_size(place, then, now)
    _check_length(place, now)
    return [f"{name} {then[name]} -> {now[name]}: {CONTINUES[name]}" for name in changed if name in CONTINUES]


def refuse_changes(checkpoint: Path, arguments: Mapping) -> None:
    """Raise `UserError` if a checkpoint cannot be resumed with these arguments."""
    if then := _provenance_of(checkpoint):
        now = {name: value for name, value in arguments.items() if decides_weights(name)}
        judge_changes(checkpoint, then["arguments"], now)


class RunProvenance(TrainerCallback, ExportableState):
    """What a run is made from, kept in its checkpoints so that resuming notices what has changed since."""

    def __init__(self, data_fingerprint: str, split_fingerprint: str, arguments: Mapping):
        self.data_fingerprint, self.split_fingerprint = data_fingerprint, split_fingerprint
        self.arguments = {name: value for name, value in arguments.items() if decides_weights(name)}
        self.arguments["processes"] = launched_processes()
        self.runs = [secrets.token_hex(8)]  # this run, and those that it resumes

    def state(self) -> dict:
        return {"args": vars(self).copy(), "attributes": {}}

    def check(self, checkpoint: Path) -> None:
        """Refuse a checkpoint of other data; warn of arguments that differ. Raises `UserError`."""
        then = _provenance_of(checkpoint)
        if then is not None:
            self.compare(checkpoint, then)
            self.runs += then.get("runs", [])

    def compare(self, place: Path, then: Mapping) -> None:
        """Check a checkpoint or a finished run against `then`, what was recorded for it. Raises `UserError`."""
        for name, what in (("data_fingerprint", "images"), ("split_fingerprint", "validation images")):
            if then[name] != getattr(self, name):
                raise UserError(
                    f"{place}: was made with other {what}; restore the data and the split, or start again in another "
                    "--output_dir"
                )
        changes = judge_changes(place, then["arguments"], self.arguments)
        if changes:
            listed = ", ".join(line.partition(": ")[0] for line in changes)
            logger.warning("arguments have changed since %s: %s", place, listed)
            say(*(f"resume      {line}" for line in changes))


class StampSeconds(TrainerCallback):
    """Adds to every entry of the log how many seconds of training led to it; a resumed run counts on."""

    def on_train_begin(self, args, state, control, **kwargs):
        spent = max((entry.get("seconds", 0.0) for entry in state.log_history), default=0.0)
        self.start = time.perf_counter() - spent

    def on_log(self, args, state, control, **kwargs):
        if state.log_history and hasattr(self, "start"):
            state.log_history[-1].setdefault("seconds", round(time.perf_counter() - self.start, 2))


class KeepBestEpoch(TrainerCallback):
    """Loads the best epoch's weights when training ends, where --load_best_model_at_end asks for it.

    The Trainer's own way reads a file's raw names with strict=False, which leaves the encoder of ViT, DeiT, BEiT, Swin
    and DINOv2 at the last epoch and only logs a warning.
    """

    def __init__(self, trainer: "FinetuningTrainer"):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        best = Path(args.output_dir) / f"checkpoint-{state.best_global_step}"
        if state.best_model_checkpoint is None and best.is_dir():  # the Trainer forgets it if the folder was moved
            state.best_model_checkpoint = str(best)
        for callback in self.trainer.callback_handler.callbacks:
            if isinstance(callback, ExportableState):  # a checkpoint from before the callback lacks its name
                state.stateful_callbacks.setdefault(type(callback).__name__, {})

    def on_save(self, args, state, control, **kwargs):
        self.trainer.writing = None

    def on_train_end(self, args, state, control, **kwargs):
        if not self.trainer.keeps_best or state.best_model_checkpoint is None:
            return
        best = Path(state.best_model_checkpoint)
        if not best.is_dir():  # the output folder was moved since
            best = Path(args.output_dir) / best.name
            state.best_model_checkpoint = str(best)
        for callback in self.trainer.callback_handler.callbacks:
            if isinstance(callback, RunProvenance) and self.trainer.is_world_process_zero():
                check_own(best, callback)
        self.trainer.choose_weights(best)


class SaveBeforeEnd(TrainerCallback):
    """Writes a last checkpoint when SIGTERM or SIGHUP came, and ends the run.

    Within an epoch, the checkpoint follows the step. After the last step of an epoch, it follows the evaluation, which
    a resumed run would not do any more.
    """

    def __init__(self) -> None:
        self.number: int | None = None

    def on_step_end(self, args, state, control, **kwargs):
        # On an accelerator, asking the other processes waits for the step, which is computed in the background.
        seldom = args.world_size > 1 and args.device.type != "cpu"
        if seldom and state.global_step % STEPS_BETWEEN_QUESTIONS:
            return
        self.number = _signal_of_any(args)
        is_last = state.global_step >= state.max_steps or abs(state.epoch - round(state.epoch)) < 1e-9
        if self.number is not None and not is_last:
            self._save(args, state, control)

    def on_epoch_end(self, args, state, control, **kwargs):
        self.number = _signal_of_any(args)
        if self.number is not None:
            self._save(args, state, control)

    def on_save(self, args, state, control, **kwargs):
        if self.number is not None:
            raise Terminated(self.number, f"after {state.epoch:.2f} epochs", describe_resume(Path(args.output_dir)))

    def _save(self, args, state, control) -> None:
        if args.save_strategy == "no":
            self.on_save(args, state, control)
        control.should_save = True


def _signal_of_any(args: TrainingArguments) -> int | None:
    """The signal that any of the processes got: all must stop after the same step."""
    if args.world_size == 1:
        return end_signals.received
    received = torch.tensor([end_signals.received or 0], device=args.device)
    torch.distributed.all_reduce(received, torch.distributed.ReduceOp.MAX)
    return int(received) or None
