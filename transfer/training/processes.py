"""What changes where several processes train together: nothing that a recipe says."""

import os

import torch
from transformers import TrainingArguments

from transfer import UserError


def launched_processes() -> int:
    """How many processes the launcher started, on all machines."""
    return int(os.environ.get("WORLD_SIZE", 1))


def must_use_cpu() -> bool:
    """Whether several processes were started where there is no accelerator: accelerate then wants to be told."""
    return launched_processes() > 1 and not torch.accelerator.is_available()


def shards_model() -> bool:
    """Whether the launcher asks for FSDP."""
    return os.environ.get("ACCELERATE_USE_FSDP") == "true"


def can_shard() -> bool:
    """Whether accelerate would do it: on CPUs it trains without a word as if it had not been asked."""
    return torch.accelerator.is_available()


def say(args: TrainingArguments, *lines: str) -> None:
    """Print from the main process alone."""
    if args.process_index == 0:
        print(*lines, sep="\n", flush=True)


def share_batch(images: int, accumulation: int, processes: int) -> tuple[int, int]:
    """What each of several processes does of an optimizer step: (images at once, accumulation).

    `images` and `accumulation` are those of one process. No process gets more at once than that, so that what fits one
    device fits each. Raises `UserError` where the step cannot be shared equally.
    """
    step = images * accumulation
    if step % processes:
        raise UserError(
            f"--per_device_train_batch_size {images}: {step} images a step cannot be shared equally by {processes} "
            f"processes; take {max(1, round(images / processes)) * processes}"
        )
    share = step // processes
    at_once = max(size for size in range(1, min(images, share) + 1) if share % size == 0)
    return at_once, share // at_once


def share_steps(args: TrainingArguments) -> list[str]:
    """Let several processes do together what the arguments ask of one; returns a line that says so."""
    processes = args.world_size
    if processes == 1:
        return []
    step = args.per_device_train_batch_size * args.gradient_accumulation_steps
    images, times = share_batch(args.per_device_train_batch_size, args.gradient_accumulation_steps, processes)
    args.per_device_train_batch_size, args.gradient_accumulation_steps = images, times
    accumulated = f", {times} times accumulated" if times > 1 else ""
    return [f"processes   a step of {step} images = {processes} processes x {images}{accumulated}"]
