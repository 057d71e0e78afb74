"""An exponential moving average (EMA) of the weights, kept where it is better than the weights themselves.

Optional: `--ema_decay` adds it to the Trainer as a callback.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import cast

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import PreTrainedModel, TrainerCallback

from transfer.training.checkpoints import read_state
from transfer.training.trainer import FinetuningTrainer

# In a checkpoint. Two levels deep: the Trainer takes a folder of LoRA weights beside its own for another adapter.
AVERAGE_FOLDER = "average/weights"


def _warming_average(decay: float) -> Callable:
    """multi_avg_fn of `AveragedModel`: after n updates at most n / (n + 9) of the average is kept.

    So the average forgets the initial weights even in a short training, as in TensorFlow and timm.
    """

    @torch.no_grad()
    def average(averages: list[torch.Tensor], current: list[torch.Tensor], updates: torch.Tensor) -> None:
        count = int(updates)
        kept = min(decay, (1 + count) / (10 + count))
        if averages[0].is_floating_point():
            get_ema_multi_avg_fn(kept)(averages, current, updates)
        else:  # how many batches a batch norm has seen
            for counter, seen in zip(averages, current, strict=True):
                counter.copy_(seen)

    return average


def average_weights(model: nn.Module, decay: float) -> AveragedModel:
    """An exponential moving average of a model's parameters and batch-norm statistics, to be updated every step."""
    return AveragedModel(model, multi_avg_fn=_warming_average(decay), use_buffers=True)


@contextlib.contextmanager
def weights_of(source: nn.Module, model: nn.Module) -> Iterator[None]:
    """Let `model` hold the weights of `source` for a while."""
    own = {name: values.clone() for name, values in model.state_dict().items()}
    model.load_state_dict(source.state_dict())
    try:
        yield
    finally:
        model.load_state_dict(own)


class WeightAveraging(TrainerCallback):
    """Updates the average every step, evaluates it beside the weights and saves it with every checkpoint.

    An epoch is judged by the better of the two, and training ends with the better of the two.
    """

    def __init__(self, trainer: FinetuningTrainer, decay: float):
        self.trainer, self.average = trainer, average_weights(trainer.model, decay)
        self.metric = trainer.args.metric_for_best_model
        trainer.args.metric_for_best_model = f"best_{self.metric}"
        self.averaged = cast(PreTrainedModel, self.average.module)
        trainer.saved_beside[AVERAGE_FOLDER] = self.averaged.save_pretrained

    def on_train_begin(self, args, state, control, **kwargs):
        if checkpoint := self.trainer.resumed_from:
            self.trainer.load_weights(checkpoint / AVERAGE_FOLDER, self.averaged)
            self.average.n_averaged.fill_(read_state(checkpoint)["global_step"])

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.average.update_parameters(model)

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        own, averaged, best = f"eval_{self.metric}", f"eval_ema_{self.metric}", f"eval_best_{self.metric}"
        if own not in metrics:  # the evaluation of the average below
            return
        with weights_of(self.averaged, self.trainer.model):
            metrics |= self.trainer.evaluate(metric_key_prefix="eval_ema")
        metrics[best] = (max if args.greater_is_better else min)(metrics[own], metrics[averaged])

    def on_train_end(self, args, state, control, **kwargs):
        logged = [entry for entry in state.log_history if entry["step"] == state.best_global_step]
        better = any(entry.get(f"eval_ema_{self.metric}") == state.best_metric for entry in logged)
        if better and self.trainer.chosen_weights:
            self.trainer.choose_weights(self.trainer.chosen_weights / AVERAGE_FOLDER)
