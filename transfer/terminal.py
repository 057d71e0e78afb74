"""What a run shows: its messages, live progress bars on a terminal, a live table in a notebook, and run.log.

Where the output goes to a file, a pipe or CI, it is plain lines without control codes: one per epoch, and one every
ten minutes in between. `runtime.say` prints a message from the main process; `log_only` writes one to run.log alone.
"""

import html
import logging
import math
import os
import sys
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Column
from rich.text import Text
from transformers import TrainerCallback

from transfer.errors import at_end

T = TypeVar("T")

LOG_NAME = "run.log"
LABEL_WIDTH = 12  # of the word that a message starts with
BAR_WIDTH = 18  # leaves room for the text beside the bar in 80 columns
SECONDS_BETWEEN_LINES = 600.0  # without a terminal
FORESEEN_AFTER = 5, 3.0  # steps and seconds of training, after which the expected time is said
STYLES = {"warning": "yellow", "accuracy": "bold green", "error": "bold red"}

_lines = logging.getLogger("transfer.run_log")  # every message; run.log is its only handler
_lines.propagate = False
_lines.setLevel(logging.INFO)
_lines.addHandler(logging.NullHandler())


def format_duration(seconds: float) -> str:
    """A duration as people say it: 9 s, 2 min 5 s, 1 h 20 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s" if whole < 600 else f"{round(whole / 60)} min"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def is_terminal() -> bool:
    """Whether a person watches: standard output is a terminal that can move its cursor, and not that of a CI job."""
    return sys.stdout.isatty() and os.environ.get("TERM") != "dumb" and not os.environ.get("CI")


def is_notebook() -> bool:
    """Whether the code runs in the kernel of a notebook."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    return shell is not None and hasattr(shell, "kernel")


# Messages


def open_log(folder: Path) -> None:
    """Write every message and warning to run.log in a folder as well, until the command ends with or without an error.

    A resumed run appends to its log.
    """
    close_log()
    file = logging.FileHandler(folder / LOG_NAME, encoding="utf-8")
    file.setFormatter(logging.Formatter("%(asctime)s  %(message)s", "%Y-%m-%d %H:%M:%S"))
    for logger in (_lines, logging.getLogger()):
        logger.addHandler(file)
    at_end(close_log, after_error=True)


def close_log() -> None:
    """Close run.log: a later run in the same process has its own."""
    for logger in (_lines, logging.getLogger()):
        for handler in [h for h in logger.handlers if Path(getattr(h, "baseFilename", "")).name == LOG_NAME]:
            logger.removeHandler(handler)
            handler.close()


def log_only(*lines: str) -> None:
    """Write messages to run.log, and not to the screen."""
    for line in lines:
        _lines.info(line)


def show(*lines: str) -> None:
    """Print messages and write them to run.log.

    A message is a word of up to 11 characters, padded to 12, and text; on a terminal long text is wrapped beside it.
    """
    log_only(*lines)
    for line in lines:
        if is_terminal():
            _console().print(_wrap(line), soft_wrap=True)
        else:
            print(line, flush=True)


def _wrap(line: str) -> Text:
    label, text = line[:LABEL_WIDTH], line[LABEL_WIDTH:]
    if not text or not label.endswith(" ") or "\n" in line:
        return Text(line)
    width = max(40, _console().width - LABEL_WIDTH)
    cells = text.split("  ")  # of an epoch's line: "loss 1.234" stays in one piece
    if len(cells) > 1 and max(map(len, cells)) <= width:
        text = "  ".join(cell.replace(" ", "\N{NO-BREAK SPACE}") for cell in cells)
    parts = textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False) or [""]
    parts = [part.replace("\N{NO-BREAK SPACE}", " ") for part in parts]
    style = STYLES.get(label.strip(), "green" if "(best" in text else "")
    return Text.assemble((label, STYLES.get(label.strip(), "cyan")), (f"\n{' ' * LABEL_WIDTH}".join(parts), style))


class _WarningHandler(logging.Handler):
    """Prints log messages to what is standard error now, which a live bar replaces to stay in one piece."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr, flush=True)


def set_up_logging(level: int) -> None:
    """Print log messages from a level on as `warning` lines; another call changes the level."""
    root = logging.getLogger()
    for handler in [handler for handler in root.handlers if isinstance(handler, _WarningHandler)]:
        root.removeHandler(handler)
    handler = _WarningHandler(level)
    handler.setFormatter(logging.Formatter(f"{'warning':<{LABEL_WIDTH}}%(message)s"))
    root.addHandler(handler)


# Bars


class _Screen:
    """The one live display: several bars share it, since a terminal has one cursor."""

    def __init__(self) -> None:
        self.console: Console | None = None
        self.progress: Progress | None = None

    def get_console(self) -> Console:
        if self.console is None or self.progress is None:  # standard output may have been replaced since
            self.console = Console(force_terminal=is_terminal(), highlight=False, markup=False, emoji=False)
        return self.console

    def add(self, name: str, total: int) -> TaskID:
        if self.progress is None:
            console = self.get_console()
            one_line = Column(no_wrap=True)
            columns = (
                TextColumn(f"{{task.description:<{LABEL_WIDTH - 1}}}", style="cyan", markup=False),
                BarColumn(BAR_WIDTH),
                TextColumn("{task.fields[detail]}", markup=False, table_column=one_line),
            )
            self.progress = Progress(
                *columns,
                console=console,
                transient=True,
                refresh_per_second=4,
                redirect_stderr=sys.stderr.isatty(),  # what goes to a file stays there
            )
            self.progress.start()
            at_end(self.close)  # or a bar would be drawn below an error
        return self.progress.add_task(name, total=total, detail="")

    def update(self, task: TaskID, done: int, detail: str) -> None:
        if self.progress is not None:
            self.progress.update(task, completed=done, detail=detail)

    def remove(self, task: TaskID) -> None:
        if self.progress is not None and task in self.progress.task_ids:
            self.progress.remove_task(task)
            if not self.progress.tasks:
                self.close()

    def close(self) -> None:
        if self.progress is not None:
            progress, self.progress = self.progress, None
            progress.stop()


_screen = _Screen()
_console = _screen.get_console


class Bar:
    """A named, timed progress bar, as a context manager; `hidden` where another process or nobody shows it.

    Without a terminal it is a line every ten minutes. Its time goes to run.log.
    """

    def __init__(self, name: str, total: int, unit: str = "images", hidden: bool = False, is_logged: bool = True):
        self.name, self.total, self.unit, self.hidden, self.is_logged = name, total, unit, hidden, is_logged
        self.done, self.task = 0, None if hidden or not is_terminal() else _screen.add(name, total)
        self.start = self.last_line = time.perf_counter()

    def __enter__(self) -> "Bar":
        return self

    def __exit__(self, kind, *details) -> None:
        if self.task is not None:
            _screen.remove(self.task)
        seconds = time.perf_counter() - self.start
        if kind is None and not self.hidden and self.is_logged:
            log_only(f"{self.name:<{LABEL_WIDTH - 1}} {self.done:,} {self.unit} in {format_duration(seconds)}")

    def advance(self, count: int, detail: str | None = None) -> None:
        """Move on by so many images; `detail` replaces the count, the speed and the time left beside the bar."""
        self.done += count
        if self.hidden:
            return
        now = time.perf_counter()
        if detail is None:
            speed = self.done / max(1e-9, now - self.start)
            left = format_duration((self.total - self.done) / max(1e-9, speed))
            detail = f"{self.done:,}/{self.total:,} {self.unit}  {speed:,.0f}/s  {left} left"
        if self.task is not None:
            _screen.update(self.task, self.done, detail)
        elif not is_terminal() and now - self.last_line >= SECONDS_BETWEEN_LINES:
            self.last_line = now
            show(f"{self.name:<{LABEL_WIDTH - 1}} {detail}")


def track(items: Iterable[T], total: int, name: str, unit: str = "images") -> Iterator[T]:
    """The items, one after the other, behind a bar."""
    with Bar(name, total, unit) as bar:
        for item in items:
            yield item
            bar.advance(1)


# Training


class _NotebookTable:
    """The epochs of one training as a table that is redrawn in place; a cell that runs again gets a new one."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, ...]] = []
        self.output = None
        self.drawn = -math.inf

    def draw(self, status: str, is_urgent: bool = True) -> None:
        now = time.perf_counter()
        if not is_urgent and now - self.drawn < 1.0:
            return
        from IPython.display import HTML, display  # only a notebook has it

        self.drawn = now
        head = "".join(f"<th>{name}</th>" for name in ("", "validation accuracy", "loss", "images/s", "time"))
        body = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in cells)}</tr>" for cells in self.rows)
        page = HTML(f"<table><tr>{head}</tr>{body}</table><p>{html.escape(status)}</p>")
        if self.output is None:
            self.output = display(page, display_id=True)
        else:
            self.output.update(page)


class TrainingProgress(TrainerCallback):
    """Shows a training: a live bar per epoch, and a line with its validation accuracy when it ends.

    It takes the place of the Trainer's own bars and dicts. With `--disable_tqdm` it shows the lines alone; `tells` is
    False where another callback says what was measured. `step_costs()` is proportional to the time of a step: now, and
    on average in the rest of the training.
    """

    tells = True

    def __init__(self, step_costs: Callable[[], tuple[float, float]] = lambda: (1.0, 1.0)) -> None:
        self.step_costs = step_costs
        self.seconds_per_evaluation = self.seconds_afterwards = 0.0
        self.ends_by: float | None = None

    def foresee(self, seconds_per_evaluation: float, seconds_afterwards: float, ends_by: float | None) -> None:
        """What an evaluation and what follows the training take, for the expected time; `ends_by` limits it."""
        self.seconds_per_evaluation, self.seconds_afterwards = seconds_per_evaluation, seconds_afterwards
        self.ends_by = ends_by

    def on_train_begin(self, args, state, control, train_dataloader=None, **kwargs):
        self.bar: Bar | None = None
        self.evaluation: Bar | None = None
        self.measured: dict[str, float] = {}
        self.losses: list[float] = []
        self.name, self.speed, self.best = "epoch", 0.0, state.best_metric
        self.images_per_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        self.steps_per_epoch = max(1, math.ceil(len(train_dataloader) / args.gradient_accumulation_steps))
        self.steps, self.cost, self.paused, self.foreseen = 0, 0.0, 0.0, False
        self.next_cost, _ = self.step_costs()
        has_table = is_notebook() and state.is_world_process_zero and self.tells and not args.disable_tqdm
        self.table = _NotebookTable() if has_table else None
        self.start = self.epoch_start = self.warm = time.perf_counter()

    def on_epoch_begin(self, args, state, control, **kwargs):
        self._tell(args, state)
        done = state.global_step % self.steps_per_epoch  # of a resumed epoch
        epochs = math.ceil(state.max_steps / self.steps_per_epoch)
        self.name = f"epoch {state.global_step // self.steps_per_epoch + 1}/{epochs}"
        total = min(self.steps_per_epoch, state.max_steps - state.global_step + done)
        hidden = not state.is_world_process_zero or bool(args.disable_tqdm) or self.table is not None
        self._close_bar()  # of an epoch that no evaluation ended
        self.bar = Bar(self.name, total, "steps", hidden, is_logged=False)
        self.bar.done = done
        self.epoch_start = time.perf_counter()
        self.epoch_steps = 0

    def on_step_begin(self, args, state, control, **kwargs):
        self._tell(args, state)  # after an evaluation in mid-epoch

    def on_step_end(self, args, state, control, **kwargs):
        now = time.perf_counter()
        self.steps, self.epoch_steps = self.steps + 1, self.epoch_steps + 1
        self.speed = self.images_per_step * self.epoch_steps / max(1e-9, now - self.epoch_start)
        self.cost += self.next_cost
        self.next_cost, cost_ahead = self.step_costs()
        left = self._seconds_left(args, state, now, cost_ahead)
        if self.steps == 2:  # the first ones are slower
            self.warm, self.cost, self.paused = now, 0.0, 0.0
        self._say_expected_time(args, state, now, left)
        if self.bar is not None:
            loss = f"loss {self.losses[-1]:.3f}  " if self.losses else ""
            share = 100 * (self.bar.done + 1) // max(1, self.bar.total)
            detail = f"{share:>3}%  {loss}{self.speed:,.0f} images/s  {format_duration(left)} left"
            self.bar.advance(1, detail)
            if self.table:
                self.table.draw(f"{self.name}: {detail}", is_urgent=False)

    def _seconds_left(self, args, state, now: float, cost_ahead: float) -> float:
        """Of the training, its evaluations included."""
        remaining = state.max_steps - state.global_step
        step = (now - self.warm - self.paused) / self.cost * cost_ahead
        left = remaining * step + math.ceil(remaining / self.steps_per_epoch) * self.seconds_per_evaluation
        return left if self.ends_by is None else max(0.0, min(left, self.ends_by - time.time()))

    def _say_expected_time(self, args, state, now: float, left: float) -> None:
        steps, seconds = FORESEEN_AFTER
        if self.foreseen or self.steps < steps or now - self.start < seconds:
            return
        self.foreseen = True
        if state.is_world_process_zero and self.ends_by is None and left > 1:
            total = now - self.start + left + self.seconds_afterwards
            after = f", including {format_duration(self.seconds_afterwards)} to evaluate and predict at the end"
            show(f"time        about {format_duration(total)}{after if self.seconds_afterwards >= 1 else ''}")

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and "loss" in logs and hasattr(self, "losses"):
            self.losses.append(logs["loss"])

    def on_prediction_step(self, args, state, control, eval_dataloader=None, **kwargs):
        if getattr(self, "bar", None) is None:  # an evaluation outside of a training
            return
        if self.evaluation is None:
            self.evaluation_start = time.perf_counter()
            self._close_finished_bar()
            hidden = not state.is_world_process_zero or bool(args.disable_tqdm) or self.table is not None
            images = len(eval_dataloader.dataset)
            self.evaluation = Bar("validating", images, hidden=hidden, is_logged=False)
        batch = min(args.eval_batch_size * args.world_size, self.evaluation.total - self.evaluation.done)
        self.evaluation.advance(batch)

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        if getattr(self, "bar", None) is None or metrics is None:
            return
        if self.evaluation is not None:
            self.evaluation.__exit__(None)
            self.evaluation = None
            self.seconds_per_evaluation = time.perf_counter() - self.evaluation_start
            self.paused += self.seconds_per_evaluation
        self.measured |= metrics

    def on_save(self, args, state, control, **kwargs):
        self._tell(args, state)

    def on_train_end(self, args, state, control, **kwargs):
        self._tell(args, state)
        self._close_bar()
        if self.table:
            self.table.draw("")
        self.bar = None

    def _close_bar(self) -> None:
        if self.bar is not None and self.bar.task is not None:
            _screen.remove(self.bar.task)
            self.bar.task = None

    def _close_finished_bar(self) -> None:
        if self.bar is not None and self.bar.done >= self.bar.total:
            self._close_bar()

    def _tell(self, args, state) -> None:
        """The line of the last evaluation; only now the Trainer has decided whether it is the best one."""
        metrics, self.measured = self.measured, {}
        if "eval_accuracy" not in metrics:
            return
        self._close_finished_bar()
        is_best, self.best = state.best_metric != self.best, state.best_metric
        if not state.is_world_process_zero or not self.tells:
            return
        name = self.name if args.eval_strategy == "epoch" else f"step {state.global_step:,}"
        metric = (args.metric_for_best_model or "accuracy").removeprefix("best_")
        mark = ("best" if metric == "accuracy" else f"best {metric}") if is_best else ""
        accuracy = f"{metrics['eval_accuracy']:.4f}"
        if "eval_ema_accuracy" in metrics:
            accuracy += f", of averaged weights {metrics['eval_ema_accuracy']:.4f}"
        accuracy += f" ({mark})" if mark else ""
        loss = f"{sum(self.losses) / len(self.losses):.3f}" if self.losses else ""
        seconds, speed = format_duration(time.perf_counter() - self.epoch_start), f"{self.speed:,.0f}"
        self.losses = []
        parts = [f"validation accuracy {accuracy}", f"loss {loss}" if loss else "", f"{speed} images/s", seconds]
        line = f"{name:<{LABEL_WIDTH - 1}} {'  '.join(filter(None, parts))}"
        if self.table:
            log_only(line)
            self.table.rows.append((name, accuracy, loss, speed, seconds))
            self.table.draw("")
        else:
            show(line)
