"""What a run would take on this machine, from a few real steps of it: `--estimate`."""

import math
import os
import resource
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass

import torch
from transformers import PrinterCallback, TrainerCallback, TrainingArguments

from transfer import UserError
from transfer.data.pixels import PixelDataset
from transfer.training.trainer import FinetuningTrainer

WARM_UP_STEPS, TIMED_STEPS = 5, 15
EVALUATION_BATCHES = 6


class StepTimer(TrainerCallback):
    """Seconds from the start of each optimizer step to the start of the next: data, views and everything between."""

    def __init__(self):
        self.starts: list[float] = []

    def on_step_begin(self, args, state, control, **kwargs):
        self.starts.append(time.perf_counter())

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == state.max_steps:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.starts.append(time.perf_counter())

    def seconds(self, warm_up: int = WARM_UP_STEPS) -> list[float]:
        """The steps' times after the first `warm_up`."""
        return [end - start for start, end in zip(self.starts, self.starts[1:], strict=False)][warm_up:]


@dataclass(frozen=True)
class Estimate:
    """What a run would take; times in seconds, memory in bytes."""

    images_per_second: float  # in training
    evaluation_images_per_second: float
    epoch: float  # training alone
    run: float  # everything after the images are decoded
    prediction: float
    peak_memory: int
    memory: int
    largest_batch: int | None  # images a device, extrapolated from two batch sizes; None where they differ too little


def leave_no_traces(args: TrainingArguments) -> None:
    """Switch off what a Trainer evaluates, writes and prints on its own; before the Trainer is made."""
    args.eval_strategy = args.save_strategy = args.logging_strategy = "no"
    args.load_best_model_at_end, args.disable_tqdm, args.report_to = False, True, []
    args.output_dir = tempfile.gettempdir()  # a Trainer makes its folder in any case


def _peak_memory(device: torch.device) -> int:
    """Peak bytes of the GPU, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _memory(device: torch.device) -> int:
    """Bytes of the GPU, or of this machine."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _time_steps(trainer: FinetuningTrainer, batch_size: int, steps: int) -> list[float]:
    """Seconds of each of `steps` training steps at a batch size. The model changes: it is of no use afterwards."""
    timer = StepTimer()
    trainer.add_callback(timer)
    trainer.args.max_steps, trainer.args.per_device_train_batch_size = steps, batch_size
    trainer.optimizer = trainer.lr_scheduler = None
    trainer.train()
    trainer.pop_callback(timer)
    return timer.seconds(min(WARM_UP_STEPS, steps // 2))


def time_evaluation(trainer: FinetuningTrainer, split: PixelDataset, images: int) -> float:
    """Seconds an image of the evaluation view, from that many images."""
    few = torch.utils.data.Subset(split, range(min(len(split), images)))
    trainer.predict(few)  # the first call is slower
    start = time.perf_counter()
    trainer.predict(few)
    return (time.perf_counter() - start) / len(few)


def estimate(trainer: FinetuningTrainer, epochs: float, test_images: int, views: int = 1) -> Estimate:
    """Run a few real steps and a few evaluation batches, and say what the whole run would take.

    In the end every validation and test image is seen in so many `views`. The trainer's arguments went through
    `leave_no_traces`. Raises `UserError` where the batch does not fit.
    """
    args, device = trainer.args, trainer.args.device
    trainer.adapts_to_memory = False
    trainer.remove_callback(PrinterCallback)  # of steps that train nothing
    batch, accumulation = args.per_device_train_batch_size, args.gradient_accumulation_steps
    try:
        _time_steps(trainer, max(1, batch // 2), 3)
        half = _peak_memory(device)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        step = statistics.median(_time_steps(trainer, batch, WARM_UP_STEPS + TIMED_STEPS))
    except torch.OutOfMemoryError:
        quarter, step_images = max(1, batch // 4), batch * accumulation * args.world_size
        raise UserError(
            f"a batch of {batch} does not fit into {_memory(device) / 2**30:.1f} GiB: try "
            f"--per_device_train_batch_size {quarter} --gradient_accumulation_steps {step_images // quarter}, "
            "which trains alike, or a smaller --train_image_size"
        ) from None
    peak = _peak_memory(device)
    per_image = time_evaluation(trainer, trainer.eval_dataset, EVALUATION_BATCHES * args.eval_batch_size)
    growth = (peak - half) / max(1, batch - batch // 2)  # bytes an image
    room = 0.9 * _memory(device) - peak  # a tenth is left for fragmentation and for what else the machine does
    images, validated = len(trainer.train_dataset), len(trainer.eval_dataset)
    epoch = math.ceil(images / (batch * accumulation * args.world_size)) * step
    # Before training, after each epoch, at the end, and as many training images.
    each_epoch = 1 if trainer.average is None else 2
    evaluated = validated * (1 + each_epoch * math.ceil(epochs) + views) + min(validated, images)
    return Estimate(
        images_per_second=batch * accumulation * args.world_size / step,
        evaluation_images_per_second=1 / per_image,
        epoch=epoch,
        run=epochs * epoch + (evaluated + views * test_images) * per_image,
        prediction=views * test_images * per_image,
        peak_memory=peak,
        memory=_memory(device),
        largest_batch=max(1, batch + int(room / growth)) if growth > 2**16 else None,
    )


def _clock(seconds: float) -> str:
    return f"{seconds / 60:.1f} min" if seconds >= 60 else f"{seconds:.1f} s"


def describe_estimate(e: Estimate, batch: int, images: int, test_images: int) -> list[str]:
    """The estimate in words, a line each, with advice where memory is short."""
    share = e.peak_memory / e.memory
    lines = [
        f"training    {e.images_per_second:.0f} images/s: {_clock(e.epoch)} an epoch of {images} images",
        f"prediction  {e.evaluation_images_per_second:.0f} images/s: {_clock(e.prediction)} for {test_images} images",
        f"whole run   {_clock(e.run)}, with every evaluation",
        f"memory      {e.peak_memory / 2**30:.1f} of {e.memory / 2**30:.1f} GiB at batch {batch}"
        + (f"; up to about {e.largest_batch} images a batch would fit" if e.largest_batch else ""),
    ]
    if share > 0.9:
        lines.append(
            "advice      this is close to the limit: halve --per_device_train_batch_size and double "
            "--gradient_accumulation_steps, which trains alike"
        )
    return lines
