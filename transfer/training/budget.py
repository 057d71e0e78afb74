"""The time that a run may take: `--max_minutes`, from the start of the process to the csv."""

import bisect
import functools
import logging
import math
import os
import statistics
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import datasets
from accelerate.utils import broadcast_object_list
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback
from transformers.trainer_utils import IntervalStrategy

from transfer.data.pixels import PixelDataset, PixelStore
from transfer.data.splits import take_evenly
from transfer.estimate import time_evaluation
from transfer.task import Task
from transfer.training.processes import say
from transfer.training.trainer import FinetuningTrainer

logger = logging.getLogger(__name__)

TIMED_STEPS = 20  # the steps whose mean time is taken for that of the next ones
SAID_AFTER = 5  # timed steps, before the first estimate is shown
FIXED_SECONDS = 10.0  # for loading the best epoch, drawing the report, writing the results and leaving
SLACK = 1.15  # evaluation is not always as fast as when it was timed
IMAGES_TIMED = 128  # to foresee how long evaluations take
EVALUATED_SHARE = 2 / 3  # at most, of the time that predicting the test images leaves


def process_start() -> float:
    """When this process was started, in seconds since the epoch: before its imports."""
    try:
        started = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])  # ticks since the boot
        return time.time() - (time.clock_gettime(time.CLOCK_BOOTTIME) - started / os.sysconf("SC_CLK_TCK"))
    except (OSError, AttributeError):
        return time.time() - time.process_time()  # elsewhere than on Linux: what it has computed so far


def share_of_time(ends_by: float | None, trainings: int) -> float | None:
    """When the first of so many trainings must end, if all get the same time and their combination half of that."""
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
    """How many held-out images may be evaluated, so many times, where predicting the test images leaves `seconds`."""
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
    """Ends training in time, with the learning rate brought to its end by then.

    After every step the schedule moves on by as much as spreads what is left of it over the steps that still fit
    (Li et al. 2020, Budgeted Training); where all of them fit it is the recipe's, bit for bit. `seconds_left()` is
    what remains for training; `pause` is the first guess of the seconds of an evaluation with its checkpoint.
    """

    def __init__(self, seconds_left: Callable[[], float], pause: float):
        self.seconds_left, self.pause = seconds_left, pause
        self.steps: deque[float] = deque(maxlen=TIMED_STEPS)
        self.mark: float | None = None  # when the last step ended
        self.said = False

    def on_step_end(self, args, state, control, lr_scheduler=None, train_dataloader=None, **kwargs):
        now = time.perf_counter()
        if self.mark is not None:
            self.steps.append(now - self.mark)
        self.mark = now
        if not self.steps or state.global_step >= state.max_steps:
            return
        fit = self._count_steps(args, state, len(train_dataloader))
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

    def _count_steps(self, args, state, batches: int) -> int:
        remaining = state.max_steps - state.global_step
        interval = max(1, math.ceil(batches / args.gradient_accumulation_steps))
        if args.eval_strategy == IntervalStrategy.STEPS:
            interval = max(1, int(state.eval_steps))
        until_pause = interval - state.global_step % interval
        step = statistics.mean(self.steps)
        return steps_that_fit(self.seconds_left(), remaining, step, self.pause, until_pause, interval)

    def _move_schedule(self, schedule: LambdaLR, fit: int, state) -> None:
        """Let the step that the Trainer has just taken in the schedule be as long as the time wants it."""
        before = schedule.last_epoch - 1
        stride = (state.max_steps - before) / (fit + 1)
        if not math.isclose(stride, 1):
            schedule.last_epoch = before + stride - 1
            schedule.step()

    def _say(self, fit: int, state) -> None:
        total = state.global_step + fit
        if not self.said and len(self.steps) >= SAID_AFTER and total < state.max_steps:
            self.said = True
            logger.warning(
                "--max_minutes: about %d of %d steps fit; the learning rate is brought to its end by then",
                total,
                state.max_steps,
            )


def limit_training(task: Task, trainer: FinetuningTrainer, seconds: float) -> None:
    """Let training end in time for the csv; evaluating the validation images once takes so many seconds."""
    held_out = len(task.dataset["validation"])
    afterwards = held_out + task.views * (held_out + task.test_images)  # as many training images, once
    deadline = Deadline(task.ends_by, afterwards)
    left = functools.partial(deadline.seconds_to_train, seconds / held_out)
    trainer.add_callback(TimeBudget(left, pause=seconds if trainer.average is None else 2 * seconds))


def limit_evaluation(task: Task, trainer: FinetuningTrainer, store: PixelStore) -> Task:
    """Where `--max_minutes` is too short to evaluate all held-out images, hold out some, evenly over the classes."""
    run, held_out, views = task.run, task.dataset["validation"], task.views
    seconds = time_evaluation(trainer, trainer.eval_dataset, IMAGES_TIMED)
    passes = 3 + views + (run.ema_decay > 0) + (run.probe or run.probe_only)  # before, after an epoch, in the end
    left = Deadline(task.ends_by, views * task.test_images).seconds_to_train(seconds)
    if left < 0:
        late = f"about {-left:.0f} s late: predicting takes longer than --max_minutes"
        say(trainer.args, f"time        the csv comes {late}")
    count = max(trainer.model.num_labels, images_that_fit(left, seconds, passes))
    if trainer.args.world_size > 1:
        [count] = broadcast_object_list([count])
    if count >= len(held_out):
        return task
    taken = take_evenly(range(len(held_out)), held_out["file"][:], held_out["label"][:], count)
    dataset = datasets.DatasetDict(task.dataset | {"validation": held_out.select(taken)})
    trainer.eval_dataset = PixelDataset(store, dataset["validation"])
    say(trainer.args, f"validation  on {count} of {len(held_out)} images: --max_minutes leaves no time for more")
    return replace(task, dataset=dataset)
