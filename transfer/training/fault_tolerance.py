"""A Trainer whose processes hold one model, whole in each or sharded among them.

A Trainer that goes on where memory runs out, and loses nothing where the disk does.
"""

import contextlib
import functools
import logging
import pickle
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from accelerate.utils import broadcast
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from safetensors import SafetensorError
from torch.distributed.fsdp import FSDPModule
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer
from transformers.trainer_callback import ExportableState
from transformers.trainer_pt_utils import nested_concat

from transfer.errors import UserError
from transfer.models.layers import find_blocks
from transfer.models.load import load_complete
from transfer.training.checkpoints import describe_resume, discard_checkpoint, make_room

logger = logging.getLogger(__name__)

Batch = dict[str, torch.Tensor]


def split_batch(batch: Batch, limit: int | None) -> Iterator[Batch]:
    """Parts of at most `limit` images, in order; the batch itself where there is no limit."""
    if limit is None:
        yield batch
        return
    for start in range(0, len(next(iter(batch.values()))), limit):
        yield {name: values[start : start + limit] for name, values in batch.items()}


def is_out_of_memory(fault: RuntimeError) -> bool:
    """Whether an error says that an accelerator, or torch on a CPU, could not get the memory it asked for."""
    return isinstance(fault, torch.OutOfMemoryError) or should_reduce_batch_size(fault)


def join_outcomes(counts: Sequence[int], outcomes: Sequence[tuple]) -> tuple:
    """One (loss, logits, labels) of several, each of so many images."""
    losses, logits, labels = zip(*outcomes, strict=True)
    loss = None
    if losses[0] is not None:
        loss = sum(count * part for count, part in zip(counts, losses, strict=True)) / sum(counts)
    return loss, *(None if parts[0] is None else functools.reduce(nested_concat, parts) for parts in (logits, labels))


def _randomness(device: torch.device) -> list[torch.Tensor]:
    """What torch's generators will draw, on the CPU and on the device."""
    states = [torch.random.get_rng_state()]
    return states if device.type == "cpu" else [*states, torch.get_device_module(device).get_rng_state(device)]


def _restore_randomness(device: torch.device, states: Sequence[torch.Tensor]) -> None:
    torch.random.set_rng_state(states[0])
    if len(states) > 1:
        torch.get_device_module(device).set_rng_state(states[1], device)


class EnduringTrainer(Trainer):
    """Trainer whose batches shrink to what fits, and whose checkpoints are whole or not there.

    Where memory runs out, the optimizer step is begun again with the same batches in halves, and so is every later
    one: just as with half of --per_device_train_batch_size and twice the --gradient_accumulation_steps from then on.
    """

    adapts_to_memory = True  # False: running out of memory is an error

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.training_limit = self.evaluation_limit = None  # images a device gets at once, after memory ran out
        self.micro_step = 0  # forward passes since the optimizer's last step
        self._step, self._batches, self._randomness = -1, [], None

    def progress(self) -> float:
        """How much of the schedule is behind, 0 to 1: `--max_minutes` moves on faster than by steps."""
        moved = isinstance(self.lr_scheduler, LambdaLR)
        return (self.lr_scheduler.last_epoch if moved else self.state.global_step) / self.state.max_steps

    def training_step(self, model, inputs, num_items_in_batch=None):
        """Loss of one batch; on the way every gradient of the optimizer step so far, whatever it takes."""
        if self._step != self.state.global_step:
            self._step, self._batches, self.micro_step = self.state.global_step, [], 0
            self._randomness = _randomness(self.args.device)
        self._batches.append(inputs)
        try:
            return self._train_in_parts(model, inputs, num_items_in_batch)
        except RuntimeError as fault:
            limit = self.training_limit or self.args.per_device_train_batch_size
            self.training_limit = self._halve(fault, limit, "a training step", "--per_device_train_batch_size")
        return self._begin_step_again(model, num_items_in_batch)

    def _train_in_parts(self, model, inputs: Batch, num_items_in_batch) -> torch.Tensor:
        loss = 0
        for part in split_batch(inputs, self.training_limit):
            loss = loss + super().training_step(model, part, num_items_in_batch)
            self.micro_step += 1
        return loss

    def _begin_step_again(self, model, num_items_in_batch) -> torch.Tensor:
        """Repeat the optimizer step's batches, the last one included: their gradients are in an unknown state."""
        clear_device_cache(garbage_collection=True)
        batches, self._step = self._batches, -1
        model.zero_grad()
        _restore_randomness(self.args.device, self._randomness)
        for batch in batches:
            loss = self.training_step(model, batch, num_items_in_batch)
        return loss

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """The parent's (loss, logits, labels), over as many images at once as fit."""
        while True:
            try:
                return self._predict_in_parts(model, inputs, prediction_loss_only, ignore_keys)
            except RuntimeError as fault:
                limit = self.evaluation_limit or self.args.per_device_eval_batch_size
                self.evaluation_limit = self._halve(fault, limit, "evaluation", "--per_device_eval_batch_size")
            clear_device_cache(garbage_collection=True)

    def _predict_in_parts(self, model, inputs: Batch, prediction_loss_only: bool, ignore_keys) -> tuple:
        counts, outcomes = [], []
        for part in split_batch(inputs, self.evaluation_limit):
            counts.append(len(part["pixel_values"]))
            outcomes.append(super().prediction_step(model, part, prediction_loss_only, ignore_keys))
        return outcomes[0] if len(outcomes) == 1 else join_outcomes(counts, outcomes)

    def _halve(self, fault: RuntimeError, limit: int, doing: str, flag: str) -> int:
        """Half the images at once, with a warning; any other fault is raised again."""
        if not self.adapts_to_memory or not is_out_of_memory(fault):
            raise fault
        if limit == 1 or self.args.world_size > 1:
            half, advice = max(1, limit // 2), ""
            if flag == "--per_device_train_batch_size" and self.args.world_size > 1:  # the step stays as large
                advice = f" --gradient_accumulation_steps {self.get_total_train_batch_size(self.args) // half}"
            raise UserError(
                f"out of memory in {doing} by step {self.state.global_step}: {limit} images do not fit; set {flag} "
                f"{half}{advice} or a smaller --image_size"
            ) from None
        logger.warning(
            "out of memory in %s at step %d: going on with %d images at once instead of %d; optimizer steps and "
            "learning rates stay the same",
            doing,
            self.state.global_step,
            (limit + 1) // 2,
            limit,
        )
        return (limit + 1) // 2

    def _save_checkpoint(self, model, trial):
        """The parent's, after making sure that there is room; a checkpoint that cannot be written is not left."""
        out = Path(self.args.output_dir)
        checkpoint = out / f"checkpoint-{self.state.global_step}"
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, ExportableState):  # a checkpoint from before the callback lacks its name
                self.state.stateful_callbacks.setdefault(type(callback).__name__, {})
        try:
            if self.args.should_save:
                discard_checkpoint(checkpoint)  # half of one, from a run that was killed
                make_room(out, self._checkpoint_bytes(), self.state.best_model_checkpoint)
            super()._save_checkpoint(model, trial)
        except (OSError, RuntimeError, SafetensorError) as fault:
            discard_checkpoint(checkpoint)
            reason = " ".join(str(fault).split())[:200]
            raise UserError(
                f"{checkpoint}: cannot be written ({reason}); mend that, then {describe_resume(out)}"
            ) from None

    def _checkpoint_bytes(self) -> int:
        """Weights, and the optimizer's two moments of what is trained."""
        parameters = list(self.model.parameters())
        trained = sum(p.numel() * p.element_size() for p in parameters if p.requires_grad)
        return sum(p.numel() * p.element_size() for p in parameters) + 2 * trained

    def _load_optimizer_and_scheduler(self, checkpoint):
        with self._naming(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint):
        with self._naming(checkpoint):
            super()._load_rng_state(checkpoint)

    @contextlib.contextmanager
    def _naming(self, checkpoint):
        """Make a `UserError` of a file that is damaged or holds more than tensors and numbers; none of it is run."""
        try:
            yield
        except (OSError, ValueError, KeyError, RuntimeError, EOFError, pickle.UnpicklingError) as fault:
            reason = " ".join(str(fault).split())[:200]
            raise UserError(f"{checkpoint}: cannot be loaded ({reason}); go on from another checkpoint") from None

    def _init_training_state(self, *args, **kwargs):
        """The parent forgets the best checkpoint where the output folder was moved since."""
        self._step = -1
        progress = super()._init_training_state(*args, **kwargs)
        best = Path(self.args.output_dir) / f"checkpoint-{self.state.best_global_step}"
        if self.state.best_model_checkpoint is None and best.is_dir():
            self.state.best_model_checkpoint = str(best)
        return progress


class ParallelTrainer(EnduringTrainer):
    """Trainer in which several processes evaluate the same model, and which shards it for training alone.

    With FSDP (fsdp.yaml) gradients and the optimizer's moments are sharded with the weights while training lasts.
    Before it and after it every process holds the whole model, so that all else is as with one process.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.plain_class = type(self.model)  # sharding makes another one of it
        if self.is_fsdp_enabled:  # what the model itself names overlaps for some backbones, which accelerate cannot do
            blocks = {type(self.model.get_submodule(name)).__name__ for name in find_blocks(self.model)}
            self.accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap = sorted(blocks)

    def is_sharded(self) -> bool:
        """Whether each process holds a part of the weights at the moment."""
        return isinstance(self.model, FSDPModule)

    def evaluation_loop(self, *args, **kwargs):
        """The parent's. Batch norms that follow the images have seen others in each process: the first one's count."""
        sharding, self.is_fsdp_enabled = self.is_fsdp_enabled, self.is_sharded()
        if sharding and not self.is_sharded():
            self.model.to(self.args.device)  # the parent leaves that to the sharding
        if self.args.world_size > 1:
            broadcast(list(self.model.buffers()))
        try:
            return super().evaluation_loop(*args, **kwargs)
        finally:
            self.is_fsdp_enabled = sharding

    def load_gathered_model(self, folder: Path) -> None:
        """In place of its shards, let every process hold the model that was saved in a folder."""
        model = load_complete(self.plain_class, folder)
        self.accelerator.free_memory()
        self.model = self.model_wrapped = model.to(self.args.device)
