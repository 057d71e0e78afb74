"""Batches that shrink to what fits into memory."""

import functools
import logging
from collections.abc import Iterator, Sequence

import torch
from accelerate.utils.memory import should_reduce_batch_size
from transformers import TrainingArguments
from transformers.trainer_pt_utils import nested_concat

from transfer.errors import UserError

logger = logging.getLogger(__name__)

Batch = dict[str, torch.Tensor]


def split_batch(batch: Batch, limit: int | None) -> Iterator[Batch]:
    """Parts of at most `limit` images, in order; the batch itself where there is no limit."""
    if limit is None:
        yield batch
        return
    for start in range(0, len(next(iter(batch.values()))), limit):
        yield {name: values[start : start + limit] for name, values in batch.items()}


def join_outcomes(counts: Sequence[int], outcomes: Sequence[tuple]) -> tuple:
    """Join the (loss, logits, labels) of the parts of a batch; `counts` are their numbers of images."""
    if len(outcomes) == 1:
        return outcomes[0]
    losses, logits, labels = zip(*outcomes, strict=True)
    loss = None
    if losses[0] is not None:
        loss = sum(count * part for count, part in zip(counts, losses, strict=True)) / sum(counts)
    return loss, *(None if parts[0] is None else functools.reduce(nested_concat, parts) for parts in (logits, labels))


def is_out_of_memory(fault: RuntimeError) -> bool:
    """Whether an error says that an accelerator, or torch on a CPU, could not get the memory it asked for."""
    return isinstance(fault, torch.OutOfMemoryError) or should_reduce_batch_size(fault)


def get_random_state(device: torch.device) -> list[torch.Tensor]:
    """The state of torch's generators, on the CPU and on the device."""
    states = [torch.random.get_rng_state()]
    return states if device.type == "cpu" else [*states, torch.get_device_module(device).get_rng_state(device)]


def set_random_state(device: torch.device, states: Sequence[torch.Tensor]) -> None:
    """Bring torch's generators back to what `get_random_state` gave."""
    torch.random.set_rng_state(states[0])
    if len(states) > 1:
        torch.get_device_module(device).set_rng_state(states[1], device)


class BatchLimit:
    """How many images a device gets at once: all of a batch, and half as many whenever memory runs out.

    `flag` is the argument that sets a batch's size and `doing` says what the memory was for.
    """

    def __init__(self, flag: str, doing: str, args: TrainingArguments):
        self.flag, self.doing, self.args = flag, doing, args
        self.images: int | None = None  # None: whole batches

    def halve(self, fault: RuntimeError, adapts: bool, step: int) -> None:
        """Halve the limit, with a warning; any fault but a lack of memory is raised again."""
        if not adapts or not is_out_of_memory(fault):
            raise fault
        limit = self.images or getattr(self.args, self.flag.removeprefix("--"))
        if limit == 1 or self.args.world_size > 1:
            raise UserError(
                f"out of memory in {self.doing} by step {step}: {limit} images do not fit; set "
                f"{f'{self.flag} {self._advise(limit // 2)}' if limit > 1 else '--lora_r 8'} or a smaller --image_size"
            ) from None
        self.images = (limit + 1) // 2
        logger.warning(
            "out of memory in %s at step %d: continuing with %d images at once instead of %d; optimizer steps and "
            "learning rates stay the same",
            self.doing,
            step,
            self.images,
            limit,
        )

    def _advise(self, half: int) -> str:
        """The value to set; with several processes the accumulation that keeps the optimizer step as large."""
        if self.args.world_size == 1 or "train" not in self.flag:
            return str(half)
        step = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        return f"{half} --gradient_accumulation_steps {step // half}"
