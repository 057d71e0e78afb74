"""The Trainer subclass: uint8 batches, views made on the device, weights that are loaded for certain.

What changes where several processes train together: nothing that a recipe says.
"""

import ctypes
import os
import platform

import torch
from transformers import TrainingArguments

from transfer.errors import UserError

PRECISION_VARIABLE = "ACCELERATE_MIXED_PRECISION"  # how accelerate launch tells the script


def _has_bf16_units() -> bool:
    """Whether the device multiplies bf16 in hardware; torch emulates it elsewhere, slower than fp32."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_capability() >= (8, 0)
    if torch.accelerator.is_available():
        return True
    return torch.backends.cpu.get_cpu_capability() == "AVX512" and torch.cpu._is_avx512_bf16_supported()


def resolve_mixed_precision() -> str:
    """Decide the mixed precision before the Trainer reads it; returns one line that says what and why.

    accelerate_config.yaml states it; the launcher passes it on in the environment. What the device cannot do fast is
    replaced: bf16 by fp16 on a GPU without bf16 units and by fp32 on such a CPU, fp16 by fp32 on any CPU.
    """
    asked = os.environ.get(PRECISION_VARIABLE)
    if asked is None:
        return (
            "precision: fp32, because the script was not started by `accelerate launch --config_file "
            "accelerate_config.yaml`"
        )
    if asked == "no":
        return "precision: fp32 (mixed_precision in the accelerate config)"
    settled = asked
    if asked == "bf16" and not _has_bf16_units():
        settled = "fp16" if torch.cuda.is_available() else "no"
    elif asked == "fp16" and not torch.accelerator.is_available():
        settled = "no"
    os.environ[PRECISION_VARIABLE] = settled
    shown = "fp32" if settled == "no" else settled
    if settled == asked:
        return f"precision: {shown} (mixed_precision in the accelerate config)"
    return f"precision: {shown}, not the accelerate config's {asked}, which this device has no fast units for"


def use_all_cores() -> None:
    """Let torch compute on every core that this process may use.

    accelerate launch sets OMP_NUM_THREADS=1 where nobody has set it, which halves the speed of two cores. Several
    processes share the cores; `taskset` gives a run fewer.
    """
    if os.environ.get("OMP_NUM_THREADS") == "1" and PRECISION_VARIABLE in os.environ:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


def tune_malloc() -> None:
    """Let glibc keep the memory of freed tensors for the next ones instead of returning it to the system.

    By default every large tensor is mapped anew and its pages are zeroed at first touch, on a CPU a third of the time
    of a forward pass. Elsewhere than on Linux with glibc nothing is changed.
    """
    if torch.accelerator.is_available() or platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(-4, 0)  # M_MMAP_MAX: no block is mapped on its own
    libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: the heap's end is kept


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
