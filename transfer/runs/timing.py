"""How long a run takes: --estimate says it beforehand, --max_minutes ends the run in time."""

import bisect
import functools
import logging
import math
import os
import resource
import statistics
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_utils import IntervalStrategy

from transfer.config import FinetuningArguments
from transfer.data.images.store import PixelDataset
from transfer.errors import UserError
from transfer.models.build import prepare_model
from transfer.reporting.page import format_seconds
from transfer.runs import FEW_VALIDATION_IMAGES, MEASURED_IMAGES, RunContext, list_parts
from transfer.runtime import say
from transfer.training.trainer import FinetuningTrainer

logger = logging.getLogger(__name__)

WARM_UP_STEPS, ESTIMATE_STEPS = 5, 15  # of --estimate; the first steps are slower
ESTIMATE_BATCHES = 6  # of evaluation
HALF_SECONDS, STEPS_SECONDS, EVALUATION_SECONDS = 5.0, 20.0, 10.0  # --estimate ends within a minute
PACE_STEPS = 20  # of --max_minutes: the next steps are expected to take the mean time of so many last ones
SAID_AFTER = 5  # timed steps, before the number of steps that fit is first printed
SLOW_STEP = 3.0  # times the median: slower steps do not count
SAID_AGAIN = 0.75  # it is printed again when it and the last printed one differ by more than this ratio
FIXED_SECONDS = 10.0  # to load the best epoch, draw the report, write the results and exit
REPORT_SECONDS = 4.0  # to draw the report and write the results
SLACK = 1.15  # evaluation is not always as fast as when it was timed
IMAGES_TIMED = 128  # to foresee how long evaluations take
EVALUATED_SHARE = 2 / 3  # at most, of the time that predicting the test images leaves


def time_evaluation(trainer: FinetuningTrainer, split: PixelDataset, images: int) -> float:
    """Seconds to predict an image of a split, measured on that many of its images."""

    def predict(count: int) -> float:
        few = torch.utils.data.Subset(split, range(min(len(split), count)))
        start = time.perf_counter()
        trainer.predict_logits(few)
        return (time.perf_counter() - start) / len(few)

    predict(1)  # the first call is slower
    count = min(images, max(1, int(EVALUATION_SECONDS / 2 / predict(16))))
    predict(count)  # so is the first of a size
    return predict(count)


def evaluation_passes(context: RunContext) -> int:
    """How often every validation image is predicted around the epochs: by a linear probe, and at the end."""
    return context.views + (context.run.linear_probe or context.run.linear_probe_only)


def count_sampled(context: RunContext) -> int:
    """How many images are predicted only to compare: validation images before training, and training images after."""
    return 2 * min(MEASURED_IMAGES, len(context.dataset["validation"]))


# --estimate


class StepTimer(TrainerCallback):
    """Seconds from the start of each optimizer step to the start of the next: data, transforms and all between.

    It ends the training after `most_seconds`, but not before `least` steps.
    """

    def __init__(self, most_seconds: float = math.inf, least: int = 1):
        self.starts: list[float] = []
        self.most_seconds, self.least = most_seconds, least

    def on_step_begin(self, args, state, control, **kwargs):
        self.starts.append(time.perf_counter())

    def on_step_end(self, args, state, control, **kwargs):
        late = len(self.starts) >= self.least and time.perf_counter() - self.starts[0] > self.most_seconds
        if late or state.global_step == state.max_steps:
            control.should_training_stop = True
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.starts.append(time.perf_counter())

    def seconds(self, warm_up: int = WARM_UP_STEPS) -> list[float]:
        """The steps' times after the first `warm_up`, or after half of them if they are few."""
        times = [end - start for start, end in zip(self.starts, self.starts[1:], strict=False)]
        return times[min(warm_up, len(times) // 2) :]


@dataclass(frozen=True)
class Estimate:
    """What a run would take; times in seconds, memory in bytes."""

    images_per_second: float  # in training
    evaluation_images_per_second: float
    epoch: float  # training alone
    run: float  # everything after the images are decoded, in all trainings of a repeated run
    prediction: float
    peak_memory: int
    memory: int
    largest_batch: int | None  # images per device, extrapolated from two sizes; None if they differ too little


def leave_no_traces(args: TrainingArguments) -> None:
    """Turn off what a Trainer evaluates, writes and prints on its own; call it before the Trainer is made."""
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


def _time_steps(trainer: FinetuningTrainer, steps: int, most_seconds: float, least: int) -> float:
    """Mean seconds of a step of the training, from at most `steps` of them. Do not use the model afterwards."""
    timer = StepTimer(most_seconds, least)
    trainer.add_callback(timer)
    trainer.args.max_steps = steps
    trainer.optimizer = trainer.lr_scheduler = None
    trainer.train()
    trainer.pop_callback(timer)
    seconds = timer.seconds()
    done, transform = len(timer.starts) - 1, trainer.train_transform
    costs = [transform.size_at(step / steps) ** 2 for step in range(done - len(seconds), done)]
    per_cost = statistics.median(time / cost for time, cost in zip(seconds, costs, strict=True))
    return per_cost * transform.pixels_ahead(0)


def estimate(context: RunContext, trainer: FinetuningTrainer) -> Estimate:
    """Run a few real steps and evaluation batches; returns what the complete run would take.

    The trainer's arguments went through `leave_no_traces`. Raises `UserError` where the batch does not fit.
    """
    args, device = trainer.args, trainer.args.device
    trainer.adapts_to_memory = False
    most_steps = args.max_steps  # timing sets its own
    trainer.remove_callback(trainer.shown)  # of steps that train nothing
    batch, accumulation = args.per_device_train_batch_size, args.gradient_accumulation_steps
    try:
        trainer.train_limit.images = max(1, batch // 2)
        _time_steps(trainer, 3, HALF_SECONDS, 1)
        half, trainer.train_limit.images = _peak_memory(device), None
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        step = _time_steps(trainer, WARM_UP_STEPS + ESTIMATE_STEPS, STEPS_SECONDS, 2)
    except torch.OutOfMemoryError:
        quarter, step_images = max(1, batch // 4), batch * accumulation * args.world_size
        raise UserError(
            f"a batch of {batch} does not fit into {_memory(device) / 2**30:.1f} GiB: try "
            f"--per_device_train_batch_size {quarter} --gradient_accumulation_steps {step_images // quarter}, "
            "which keeps the optimizer step as it is, or a smaller --train_image_size"
        ) from None
    peak = _peak_memory(device)
    trainer.adapts_to_memory = True  # as a run does, which halves an evaluation batch that does not fit
    per_image = time_evaluation(trainer, trainer.eval_dataset, ESTIMATE_BATCHES * args.eval_batch_size)
    growth = (peak - half) / max(1, batch - batch // 2)  # bytes per image
    room = 0.9 * _memory(device) - peak  # a tenth is left for fragmentation and for what else the machine does
    images, validated, tested = len(trainer.train_dataset), len(trainer.eval_dataset), context.test_images
    if context.run.kfold and not context.run.fold:  # the split is not that of a fold
        images, validated = (
            round((images + validated) * share / context.run.kfold) for share in (context.run.kfold - 1, 1)
        )
    steps = math.ceil(images / (batch * accumulation * args.world_size))
    epoch, epochs = steps * step, most_steps / steps if most_steps > 0 else args.num_train_epochs
    each_epoch = 2 if context.run.ema_decay else 1
    evaluated = validated * (each_epoch * math.ceil(epochs) + evaluation_passes(context)) + count_sampled(context)
    one = epochs * epoch + (evaluated + context.views * tested) * per_image
    return Estimate(
        images_per_second=batch * accumulation * args.world_size / step,
        evaluation_images_per_second=1 / per_image,
        epoch=epoch,
        run=(len(list_parts(context.run)) or 1) * one,
        prediction=context.views * tested * per_image,
        peak_memory=peak,
        memory=_memory(device),
        largest_batch=min(images, max(1, batch + int(room / growth))) if growth > 2**16 else None,
    )


def describe_estimate(e: Estimate, batch: int, images: int, test_images: int) -> list[str]:
    """The estimate in words, a line each, with advice where memory is short."""
    lines = [
        f"training    {e.images_per_second:.0f} images/s: {format_seconds(e.epoch)} per epoch of {images} images",
        f"prediction  {e.evaluation_images_per_second:.0f} images/s: {format_seconds(e.prediction)} for {test_images} "
        "images",
        f"whole run   {format_seconds(e.run)}, with every evaluation",
        f"memory      {e.peak_memory / 2**30:.1f} of {e.memory / 2**30:.1f} GiB at batch {batch}"
        + (f"; up to about {e.largest_batch} images per batch would fit" if e.largest_batch else ""),
    ]
    if e.peak_memory > 0.9 * e.memory:
        lines.append(
            "advice      this is close to the limit: halve --per_device_train_batch_size and double "
            "--gradient_accumulation_steps, which keeps the optimizer step as it is"
        )
    return lines


def estimate_run(context: RunContext, args: FinetuningArguments, make_trainer: Callable) -> None:
    """Print what the run would take; nothing is written."""
    leave_no_traces(args)
    trainer = make_trainer(context, args, prepare_model(context.run, args, context.data))
    context = limit_validation(context, trainer)
    found = estimate(context, trainer)
    images, tested = len(context.dataset["train"]), context.test_images
    say(*describe_estimate(found, args.per_device_train_batch_size, images, tested))


# --max_minutes


def process_start() -> float:
    """When this process was started, in seconds since the epoch: before its imports."""
    try:
        started = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])  # ticks since the boot
        return time.time() - (time.clock_gettime(time.CLOCK_BOOTTIME) - started / os.sysconf("SC_CLK_TCK"))
    except (OSError, AttributeError):
        return time.time() - time.process_time()  # elsewhere than on Linux: what it has computed so far


def share_of_time(ends_by: float | None, trainings: int) -> float | None:
    """When the first of so many trainings must end: all get the same time, and combining them half of that."""
    return None if ends_by is None else time.time() + (ends_by - time.time()) / (trainings + 0.5)


@dataclass(frozen=True)
class Deadline:
    """When the csv must be there, and what has to be done for it after training."""

    time: float  # seconds since the epoch
    images_afterwards: int  # to evaluate and predict after training

    def seconds_to_train(self, seconds_an_image: float) -> float:
        """What is left for training, its evaluations included."""
        afterwards = SLACK * seconds_an_image * self.images_afterwards + FIXED_SECONDS
        return self.time - time.time() - afterwards


def images_that_fit(seconds: float, seconds_an_image: float, passes: int) -> int:
    """How many held-out images may be evaluated `passes` times, if predicting the test images leaves `seconds`."""
    return max(0, int(EVALUATED_SHARE * seconds / (SLACK * seconds_an_image * passes)))


def steps_that_fit(seconds: float, remaining: int, step: float, pause: float, until_pause: int, interval: int) -> int:
    """How many of the remaining steps fit into so many seconds, with every pause (evaluation, checkpoint) on the way.

    The next pause comes `until_pause` steps from now and then every `interval` steps; training ends with one.
    """

    def seconds_for(steps: int) -> float:
        pauses = 0 if steps <= until_pause else math.ceil((steps - until_pause) / interval)
        return steps * step + (pauses + 1) * pause

    return max(0, bisect.bisect_right(range(remaining + 1), seconds, key=seconds_for) - 1)


class TimeBudget(TrainerCallback):
    """Ends training in time, with the learning rate at the end of its schedule by then.

    After every step, the rest of the schedule is spread evenly over the steps that still fit (Li et al. 2020, Budgeted
    Training). If all of them fit, the schedule is the recipe's, bit for bit. `seconds_left()` is
    what remains for training; `pause` is the first guess of the seconds of an evaluation with its checkpoint.
    `step_costs()` is proportional to the time of a step: now, and on average in the rest of the training.
    """

    def __init__(
        self,
        seconds_left: Callable[[], float],
        pause: float,
        step_costs: Callable[[], tuple[float, float]] = lambda: (1.0, 1.0),
    ):
        self.seconds_left, self.pause, self.step_costs = seconds_left, pause, step_costs
        self.steps: deque[float] = deque(maxlen=PACE_STEPS)  # seconds per cost
        self.mark: float | None = None  # when the last step ended
        self.next_cost = 1.0  # of the first step, which is not timed
        self.said: int | None = None  # how many steps were last said to fit

    def on_step_end(self, args, state, control, lr_scheduler=None, train_dataloader=None, **kwargs):
        now, made = time.perf_counter(), self.next_cost
        self.next_cost, ahead = self.step_costs()
        if self.mark is not None:
            self.steps.append((now - self.mark) / made)
        self.mark = now
        if not self.steps or state.global_step >= state.max_steps:
            return
        fit = self._count_steps(args, state, len(train_dataloader), ahead)
        if args.world_size > 1:  # all stop together, when the first process says
            [fit] = broadcast_object_list([fit])
        self._say(fit, state)
        if isinstance(lr_scheduler, LambdaLR):
            self._move_schedule(lr_scheduler, fit, state)
        if fit == 0:
            control.should_training_stop = True
            if args.eval_strategy == IntervalStrategy.STEPS:  # by epochs it is done in any case
                control.should_evaluate = control.should_save = True

    def on_epoch_end(self, args, state, control, **kwargs):
        self.mark = time.perf_counter()

    def on_save(self, args, state, control, **kwargs):
        """A checkpoint follows each evaluation: both took the time since the step, or the epoch, ended."""
        if self.mark is not None:
            self.pause = time.perf_counter() - self.mark
        self.mark = None

    def _count_steps(self, args, state, batches: int, cost_ahead: float) -> int:
        remaining = state.max_steps - state.global_step
        interval = max(1, math.ceil(batches / args.gradient_accumulation_steps))
        if args.eval_strategy == IntervalStrategy.STEPS:
            interval = max(1, int(state.eval_steps))
        until_pause = interval - state.global_step % interval
        step = self._pace() * cost_ahead
        return steps_that_fit(self.seconds_left(), remaining, step, self.pause, until_pause, interval)

    def _pace(self) -> float:
        """Seconds per cost, from the last steps. A few slow ones must not shorten a schedule that cannot get back."""
        if len(self.steps) < SAID_AFTER:
            return min(self.steps)
        usual = SLOW_STEP * statistics.median(self.steps)
        return statistics.mean(step for step in self.steps if step <= usual)

    def _move_schedule(self, schedule: LambdaLR, fit: int, state) -> None:
        """Replace the schedule step that the Trainer has just taken by one that fits the time left."""
        before = schedule.last_epoch - 1
        stride = (state.max_steps - before) / (fit + 1)
        if not math.isclose(stride, 1):
            schedule.load_state_dict(schedule.state_dict() | {"last_epoch": before + stride - 1})
            schedule.step()

    def _say(self, fit: int, state) -> None:
        total, said = state.global_step + fit, self.said or state.max_steps
        if len(self.steps) < SAID_AFTER or SAID_AGAIN * said <= total <= said / SAID_AGAIN:
            return
        again = f", not {said}" if self.said else ""
        self.said = total
        logger.warning(
            "--max_minutes: about %d of %d steps fit%s; the learning-rate schedule is shortened to them",
            total,
            state.max_steps,
            again,
        )


def limit_training(context: RunContext, trainer: FinetuningTrainer, seconds: float) -> None:
    """Prepare the expected time that is printed and, with `--max_minutes`, end training in time for the csv.

    `seconds` is what evaluating an image takes.
    """
    held_out = len(context.dataset["validation"])
    afterwards = min(MEASURED_IMAGES, held_out) + context.views * (held_out + context.test_images)
    pause = seconds * held_out * (2 if context.run.ema_decay else 1)
    trainer.shown.foresee(pause, seconds * afterwards + REPORT_SECONDS, context.ends_by)
    if context.ends_by is not None:
        left = functools.partial(Deadline(context.ends_by, afterwards).seconds_to_train, seconds)
        trainer.add_callback(TimeBudget(left, pause, trainer.step_costs))


def limit_validation(context: RunContext, trainer: FinetuningTrainer) -> RunContext:
    """With `--max_train_samples`, validate on the same fraction of the validation images, so that a trial stays small.

    The trainings of a repeated run are measured on the same images, so theirs stay.
    """
    run, train, held_out = context.run, len(context.dataset["train"]), len(context.dataset["validation"])
    if context.parent_split is not None:
        return context
    complete = len(context.data.train_files) - (0 if context.data.validation_files else held_out)
    share = math.ceil(held_out * train / complete)
    count = run.max_eval_samples or max(len(context.data.class_ids), FEW_VALIDATION_IMAGES, share)
    if count >= held_out or not (run.max_eval_samples or run.max_train_samples):
        return context
    why = "--max_eval_samples" if run.max_eval_samples else "--max_train_samples"
    say(f"validation  on {count:,} of {held_out:,} images, because of {why}")
    if not run.max_eval_samples:
        say(f"            --max_eval_samples changes this; all {context.test_images:,} test images are predicted")
    return context.validate_on(trainer, count)


def limit_evaluation(context: RunContext, trainer: FinetuningTrainer) -> RunContext:
    """The context with as many validation images as a trial needs and as `--max_minutes` leaves time for.

    The trainings of a repeated run are measured on the same images, so theirs stay.
    """
    context = limit_validation(context, trainer)
    if context.ends_by is None or context.parent_split is not None:
        return context
    held_out, views = context.dataset["validation"], context.views
    seconds = time_evaluation(trainer, trainer.eval_dataset, IMAGES_TIMED)
    # Before training, as training images, and after an epoch.
    passes = 3 + evaluation_passes(context) + (context.run.ema_decay > 0)
    left = Deadline(context.ends_by, views * context.test_images).seconds_to_train(seconds)
    if left < 0:
        say(f"time        the csv will be about {-left:.0f} s late: predicting takes longer than --max_minutes")
    count = max(len(context.data.class_ids), images_that_fit(left, seconds, passes))
    if trainer.args.world_size > 1:
        [count] = broadcast_object_list([count])
    if count >= len(held_out):
        return context
    say(f"validation  on {count} of {len(held_out)} images: --max_minutes leaves no time for more")
    return context.validate_on(trainer, count)
