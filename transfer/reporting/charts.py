"""Charts as inline SVG: confusion matrix, curves of a training, reliability, a histogram; every name is escaped.

Shapes have classes (`line-0`, `bar`, `grid` ...); their colors and fonts are in page.css.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from markupsafe import Markup

from transfer.evaluation.metrics import RunMetrics, Speed, SplitScores
from transfer.evaluation.predictions import Reliability

# The confusion matrix.
NUMBERED_CLASSES = 20  # up to so many classes it is a table with a number in each cell
WIDEST_CELL, NARROWEST_CELL, TABLE_WIDTH = 96, 36, 860  # CSS pixels of that table, without its names
UPRIGHT_FROM = 6  # classes: the names above the columns are then turned upright
MOST_CLASSES = 120  # more names could not be read
CELL, MARGIN = 10, 118
# CSS pixels per unit: a small matrix is not stretched to the page's width, and a large one does not shrink on a phone.
LARGEST_SCALE, SMALLEST_SCALE = 2.0, 0.85
LONGEST_NAME = 22
LEVELS = np.array([0.05, 0.1, 0.2, 0.4, 0.7])  # shares of a class's images at which the color of a cell darkens

# All other charts.
WIDTH, HEIGHT = 440, 270
LEFT, RIGHT, TOP, BOTTOM = 62, 22, 12, 42
LONGEST_TICK = 6  # characters that fit to the left of an axis on a phone


def percent(share: float) -> str:
    """A share with one decimal, for text."""
    return f"{100 * share:.1f}%"


def choose_classes(confusions: np.ndarray, order: Sequence[int]) -> list[int]:
    """The classes to show, in the given order: all of them, or those with the most mistakes if there are too many."""
    if len(order) <= MOST_CLASSES:
        return list(order)
    mistakes = confusions.sum(0) + confusions.sum(1) - 2 * confusions.diagonal()
    shown = set(np.argsort(-mistakes, kind="stable")[:MOST_CLASSES].tolist())
    return [label for label in order if label in shown]


def _shorten(name: str) -> str:
    return name if len(name) <= LONGEST_NAME else name[: LONGEST_NAME - 1] + "…"


def _row_names(names: Sequence[str]) -> Markup:
    text = Markup('<text class="name end" x="{}" y="{}">{}</text>')
    return Markup("").join(text.format(MARGIN - 4, MARGIN + CELL * i + 8, _shorten(n)) for i, n in enumerate(names))


def _column_names(names: Sequence[str]) -> Markup:
    text = Markup('<text class="name" transform="translate({} {}) rotate(-90)">{}</text>')
    return Markup("").join(text.format(MARGIN + CELL * i + 8, MARGIN - 4, _shorten(n)) for i, n in enumerate(names))


def _count_shown(confusions: np.ndarray, order: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Counts of the shown classes, and the level of color of each, by its share of the label's images."""
    counts = confusions[np.ix_(order, order)]
    shares = counts / np.maximum(1, confusions.sum(1)[list(order)])[:, None]
    return counts, np.searchsorted(LEVELS, shares, side="right")


def tabulate_matrix(confusions: np.ndarray, names: Sequence[str], order: Sequence[int]) -> dict:
    """The matrix of few classes as a table: its names, the width of a cell, and the cells of each row."""
    counts, levels = _count_shown(confusions, order)
    shown, images = [names[label] for label in order], confusions.sum(1)[list(order)].tolist()

    def describe(row: int, column: int) -> dict:
        outcome = "correct" if row == column else f"predicted as {shown[column]}"
        kind = f"{'right' if row == column else 'wrong'}-{levels[row, column]}"
        count = int(counts[row, column])
        note = f"{shown[row]}: {count} of {images[row]} {outcome}"
        return {"count": count, "kind": kind if count else "", "note": note}

    places = range(len(order))
    return {
        "names": shown,
        "upright": len(order) >= UPRIGHT_FROM,
        "cell": max(NARROWEST_CELL, min(WIDEST_CELL, TABLE_WIDTH // len(order))),
        "rows": [(shown[row], [describe(row, column) for column in places]) for row in places],
    }


def _guides(count: int) -> Markup:
    """A thin line every five classes, which helps to follow a row or a column."""
    end = MARGIN + CELL * count
    places = [MARGIN + CELL * i for i in range(0, count + 1, 5)]
    path = "".join(f"M{MARGIN} {p}H{end}M{p} {MARGIN}V{end}" for p in places)
    return Markup('<path class="guide" d="{}"/>').format(path)


def draw_matrix(confusions: np.ndarray, names: Sequence[str], order: Sequence[int]) -> tuple[Markup, dict]:
    """The picture, with a row for each label and a column for each prediction, and the data that page.js reads.

    The names of the rows are a picture of their own, which stays in place while the other one is scrolled sideways.
    All cells of one color are one path, so a matrix of a hundred classes takes about 20 kB.
    """
    counts, levels = _count_shown(confusions, order)
    paths = defaultdict(list)
    for row, column in zip(*np.nonzero(counts), strict=True):
        kind = ("right" if row == column else "wrong", int(levels[row, column]))
        paths[kind].append(f"M{MARGIN + CELL * column} {MARGIN + CELL * row}h{CELL}v{CELL}h-{CELL}z")
    cells = [
        Markup('<path class="{}-{}" d="{}"/>').format(kind, level, "".join(parts))
        for (kind, level), parts in sorted(paths.items())
    ]
    shown, width = [names[label] for label in order], CELL * len(order) + 2
    height = MARGIN + width
    row_names = Markup(
        '<svg class="names" style="flex:{0} 1 0;min-width:{1:.0f}px" viewBox="0 0 {0} {2}" aria-hidden="true">{3}'
        '<rect class="cross" id="row-name"/></svg>'
    ).format(MARGIN, SMALLEST_SCALE * MARGIN, height, _row_names(shown))
    head = Markup(
        '<svg class="matrix" id="matrix" style="flex:{1} 1 0;min-width:{2:.0f}px" viewBox="{0} 0 {1} {3}" role="img" '
        'aria-label="confusion matrix">'
    ).format(MARGIN, width, SMALLEST_SCALE * width, height)
    picture = head + _guides(len(order)) + Markup("").join(cells) + _column_names(shown)
    picture += Markup('<rect class="cross" id="row"/><rect class="cross" id="column"/></svg>')
    frame = Markup('<div class="frame" style="max-width:{:.0f}px">').format(LARGEST_SCALE * height)
    reading = {
        "names": shown,
        "images": confusions.sum(1)[list(order)].tolist(),
        "cells": [[int(r), int(c), int(counts[r, c])] for r, c in zip(*np.nonzero(counts), strict=True)],
        "cell": CELL,
        "margin": MARGIN,
    }
    return frame + row_names + picture + Markup("</div>"), reading


@dataclass(frozen=True)
class Series:
    """One line of a chart, with its points in the order of x."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    color: int = 0
    dots: bool = field(default=False, kw_only=True)


def percent_tick(share: float) -> str:
    """A share as a tick of an axis, without trailing zeros."""
    return f"{100 * share:.6g}%"


def plain_tick(value: float) -> str:
    """A number as a tick of an axis, without trailing zeros."""
    return f"{value:.6g}"


def short_tick(value: float) -> str:
    """A very small or large number as a tick of an axis, in scientific notation."""
    digits, _, power = f"{value:.3e}".partition("e")
    return f"{float(digits):g}e{int(power)}" if value else "0"


def find_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers, at least two, from at most `low` to at least `high`."""
    if high - low < 1e-9:
        low, high = low - max(0.05 * abs(low), 1e-3), high + max(0.05 * abs(high), 1e-3)
    span = high - low
    magnitude = 10 ** math.floor(math.log10(span / count))
    step = next(s * magnitude for s in (1, 2, 2.5, 5, 10) if span / (s * magnitude) <= count)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


class Plane:
    """The axes of a chart, which map values to places in the picture, and the shapes drawn so far."""

    def __init__(
        self,
        x_ticks: Sequence[float],
        y_ticks: Sequence[float],
        x_label: str,
        y_label: str,
        y_text=plain_tick,
        x_text=plain_tick,
    ):
        self.x_ends, self.y_ends = (x_ticks[0], x_ticks[-1]), (y_ticks[0], y_ticks[-1])
        self.marks: list[Markup] = []
        for tick in y_ticks:
            y = self.y(tick)
            self.mark('<line class="grid" x1="{}" x2="{}" y1="{}" y2="{}"/>', LEFT, WIDTH - RIGHT, y, y)
            self.mark('<text class="tick end" x="{}" y="{}">{}</text>', LEFT - 7, y + 4, y_text(tick))
        for tick in x_ticks:
            self.mark('<text class="tick mid" x="{}" y="{}">{}</text>', self.x(tick), HEIGHT - 23, x_text(tick))
        self.mark('<text class="label mid" x="{}" y="{}">{}</text>', (LEFT + WIDTH) / 2, HEIGHT - 5, x_label)
        self.description = f"{y_label} against {x_label}"

    def x(self, value: float) -> float:
        low, high = self.x_ends
        return round(LEFT + (value - low) / (high - low) * (WIDTH - LEFT - RIGHT), 1)

    def y(self, value: float) -> float:
        low, high = self.y_ends
        return round(HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - TOP - BOTTOM), 1)

    def mark(self, template: str, *values) -> None:
        """Add a shape; its values are escaped."""
        self.marks.append(Markup(template).format(*values))

    def draw(self) -> Markup:
        head = '<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}">'
        return Markup(head).format(WIDTH, HEIGHT, self.description) + Markup("").join(self.marks) + Markup("</svg>")


def draw_lines(series: Sequence[Series], x_label: str, y_label: str, shares: bool = False) -> Markup:
    """A chart of lines; a series with dots also marks its points and shows their values on hover."""
    xs, ys = [x for s in series for x in s.x], [y for s in series for y in s.y]
    y_text, note_text = (percent_tick, percent) if shares else (plain_tick, plain_tick)
    y_ticks = find_ticks(min(ys), max(ys))
    if not shares and max(len(y_text(tick)) for tick in y_ticks) > LONGEST_TICK:
        y_text = short_tick
    plane = Plane(find_ticks(min(0, *xs), max(xs)), y_ticks, x_label, y_label, y_text=y_text)
    for s in series:
        points = list(zip(map(plane.x, s.x), map(plane.y, s.y), s.x, s.y, strict=True))
        path = "M" + "L".join(f"{x} {y}" for x, y, _, _ in points)
        plane.mark('<path class="line line-{}" d="{}"><title>{}</title></path>', s.color, path, s.name)
        for x, y, at, value in points if s.dots else []:
            note = f"{s.name}: {note_text(value)} at {plain_tick(round(at, 2))} {x_label}"
            dot = '<circle class="dot dot-{}" cx="{}" cy="{}" r="3.2"><title>{}</title></circle>'
            plane.mark(dot, s.color, x, y, note)
    return plane.draw()


def draw_reliability(reliability: Reliability) -> Markup:
    """A chart of accuracy against confidence; the area of a dot is its share of the images."""
    ticks = [0, 0.2, 0.4, 0.6, 0.8, 1]
    plane = Plane(ticks, ticks, "confidence", "accuracy", percent_tick, percent_tick)
    ideal = '<line class="ideal" x1="{}" y1="{}" x2="{}" y2="{}"/>'
    plane.mark(ideal, plane.x(0), plane.y(0), plane.x(1), plane.y(1))
    points = list(zip(reliability.confidence, reliability.accuracy, reliability.images.tolist(), strict=True))
    path = "M" + "L".join(f"{plane.x(c)} {plane.y(a)}" for c, a, _ in points)
    plane.mark('<path class="line line-0" d="{}"/>', path)
    for confidence, accuracy, images in points:
        radius = round(2.5 + 11 * math.sqrt(images / reliability.images.sum()), 1)
        note = f"{images} images: confidence {percent(confidence)}, accuracy {percent(accuracy)}"
        dot = '<circle class="bubble" cx="{}" cy="{}" r="{}"><title>{}</title></circle>'
        plane.mark(dot, plane.x(confidence), plane.y(accuracy), radius, note)
    return plane.draw()


def draw_histogram(counts: Sequence[int], names: Sequence[str], expected: Sequence[float]) -> Markup:
    """A chart of how often each class was predicted, in label order, with a dashed line at the expected counts."""
    classes = len(counts)
    most = max(*counts, *expected)
    plane = Plane([0, classes], find_ticks(0, most, 4), f"{classes} labels, in order", "predictions")
    width = max(0.5, (plane.x(1) - plane.x(0)) * 0.8)
    for label, (count, name) in enumerate(zip(counts, names, strict=True)):
        top = plane.y(count)
        bar = '<rect class="bar" x="{}" y="{}" width="{:.2f}" height="{:.1f}"><title>{}: {}</title></rect>'
        plane.mark(bar, plane.x(label + 0.1), top, width, plane.y(0) - top, name, count)
    steps = [f"{plane.x(label)} {plane.y(e)}H{plane.x(label + 1)}" for label, e in enumerate(expected)]
    plane.mark('<path class="ideal" fill="none" d="M{}"/>', "L".join(steps))
    return plane.draw()


# How a run reached its accuracy: its stages, its repeats, and curves from the Trainer's logs

MEAN, SOUP, ENSEMBLE = "mean of the seeds", "soup of the seeds", "ensemble of the seeds"
REPEAT_COLUMNS = ["validation accuracy", "validation loss", "train accuracy", "train loss", "minutes"]


@dataclass(frozen=True)
class Step:
    """The validation accuracy of one stage, and its gain over the best stage before it; None for the first one."""

    name: str
    accuracy: float
    gain: float | None
    final: bool = False  # whether it is the model that the run saves


@dataclass(frozen=True)
class Curve:
    """A chart with its heading, and the meaning of each of its colors."""

    title: str
    picture: Markup
    legend: list[tuple[int, str]]


def list_stages(metrics: RunMetrics) -> dict[str, float]:
    """Validation accuracy of each stage that has metrics of its own, by name and in order."""
    stages: dict[str, float] = {}
    if metrics.zero_epoch:
        stages["before training"] = metrics.zero_epoch.accuracy
    if metrics.linear_probe:
        stages["linear probe"] = metrics.linear_probe.accuracy
    if metrics.mean and metrics.seeds:  # the mean of the folds is the accuracy of the run
        stages[MEAN] = metrics.mean.validation.accuracy
    if metrics.soup:
        stages[SOUP] = metrics.soup.accuracy
    if metrics.members:
        kept = metrics.members.kept
        stages |= {n + " (left out)" * (n not in kept): a for n, a in metrics.members.accuracy.items()}
        stages["mean of all runs"] = metrics.members.mean_of_all
    if metrics.ensemble:
        stages[ENSEMBLE] = metrics.ensemble.accuracy
    return stages


def _name_final(metrics: RunMetrics, arguments: Mapping) -> str:
    """The stage that made the final model."""
    if metrics.soup:
        return SOUP
    if metrics.folds:
        return "cross-validation"
    if metrics.members:
        return "ensemble"
    if arguments.get("linear_probe_only"):
        return "linear probe"
    return "fine-tuned" if metrics.train else "existing model"


def list_steps(metrics: RunMetrics, arguments: Mapping) -> list[Step]:
    """The stages of a run up to its final model, with their gains; the ensemble of the seeds comes last."""
    stages, final = list_stages(metrics), _name_final(metrics, arguments)
    stages.pop(final, None)
    after = {ENSEMBLE: stages.pop(ENSEMBLE)} if ENSEMBLE in stages else {}
    if metrics.tta and len(metrics.tta.kept) > 1:
        stages[f"{final} without TTA"] = metrics.tta.accuracy["plain"]
        final = f"{final} with TTA ({', '.join(metrics.tta.kept)})"
    stages[final] = (metrics.soup or metrics.validation).accuracy
    steps: list[Step] = []
    for stage, accuracy in (stages | after).items():
        gain = accuracy - max(s.accuracy for s in steps) if steps else None
        steps.append(Step(stage, accuracy, gain, final=stage == final))
    return steps


def _name_repeats(metrics: RunMetrics, seeds: Sequence[int] | None) -> list[tuple[str, RunMetrics]]:
    """The metrics of each seed or fold with its number."""
    runs = metrics.repeats
    numbers = seeds if metrics.seeds and seeds and len(seeds) == len(runs) else range(1, len(runs) + 1)
    return [(str(number), run) for number, run in zip(numbers, runs, strict=True)]


def _write_row(scores: RunMetrics | SplitScores) -> list[str]:
    """The cells of a run, a mean or a standard deviation, below `REPEAT_COLUMNS`."""
    cells, train = [f"{scores.validation.accuracy:.2%}", f"{scores.validation.loss:.4f}"], scores.train
    cells += [f"{train.accuracy:.2%}", f"{train.loss:.4f}"] if train else ["–", "–"]
    return [*cells, f"{train.seconds / 60:.1f}" if isinstance(train, Speed) else "–"]


def list_repeats(metrics: RunMetrics, seeds: Sequence[int] | None) -> dict | None:
    """The table of repeated runs: their kind, the columns, and rows of text; None for a single run."""
    if not metrics.repeats:
        return None
    rows: list[tuple[str, RunMetrics | SplitScores | None]] = [*_name_repeats(metrics, seeds)]
    rows += [("mean", metrics.mean), ("standard deviation", metrics.std)]
    return {
        "kind": "seed" if metrics.seeds else "fold",
        "columns": REPEAT_COLUMNS,
        "rows": [(name, _write_row(scores)) for name, scores in rows if scores],
    }


def _accuracy_at_start(metrics: RunMetrics | None) -> float | None:
    """Validation accuracy before the first step: of the linear probe, else of the checkpoint."""
    stage = metrics and (metrics.linear_probe or metrics.zero_epoch)
    return stage.accuracy if stage else None


def start_histories(
    histories: Mapping[str, Sequence[Mapping]], metrics: RunMetrics, arguments: Mapping
) -> dict[str, Sequence[Mapping]]:
    """The logs of all seeds or folds, each with the accuracy before its first step as its first entry."""
    kind = "fold" if metrics.folds else "seed"
    measured = {f"{kind} {number}": run for number, run in _name_repeats(metrics, arguments.get("seeds"))}
    measured[""] = metrics
    begun: dict[str, Sequence[Mapping]] = {}
    for name, history in histories.items():
        accuracy = _accuracy_at_start(measured.get(name))
        first = [] if accuracy is None else [{"epoch": 0, "seconds": 0, "eval_accuracy": accuracy}]
        begun[name] = [*first, *history] if history else []
    return begun


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _series(histories: Mapping[str, Sequence[Mapping]], x: str, names: Mapping[str, str], scale=1.0) -> list[Series]:
    """One line for each log and each name in it that has finite values; x is multiplied by `scale`."""
    lines = []
    for number, (seed, history) in enumerate(histories.items()):
        for color, (y, name) in enumerate(names.items()):
            entries = [entry for entry in history if _is_number(entry.get(x)) and _is_number(entry.get(y))]
            if entries:
                line = f"{name}, {seed}" if seed else name
                shade = color if len(names) > 1 else number % 4
                xs, ys = [entry[x] * scale for entry in entries], [entry[y] for entry in entries]
                lines.append(Series(line, xs, ys, shade, dots=y.startswith("eval_")))
    return lines


def _curve(title: str, series: Sequence[Series], x_label: str, y_label: str, **options) -> Curve:
    legend = {s.color: s.name.partition(",")[0] for s in series}
    if len({s.name.partition(",")[0] for s in series}) == 1 and len(series) > 1:
        legend = {s.color: s.name.partition(", ")[2] for s in series}
    entries = list(legend.items()) if len(legend) > 1 else []
    return Curve(title, draw_lines(series, x_label, y_label, **options), entries)


def draw_curves(histories: Mapping[str, Sequence[Mapping]]) -> list[Curve]:
    """Charts of loss, validation accuracy and learning rate, each if it was logged."""
    measured = {"eval_accuracy": "validation accuracy"}
    if any("eval_ema_accuracy" in entry for history in histories.values() for entry in history):
        measured = {"eval_accuracy": "weights", "eval_ema_accuracy": "averaged weights (EMA)"}
    loss = _series(histories, "epoch", {"loss": "training", "eval_loss": "validation"})
    accuracy = _series(histories, "epoch", measured)
    timed = _series(histories, "seconds", measured, 1 / 60)
    rate = _series(histories, "epoch", {"learning_rate": "learning rate"})
    curves = []
    if loss:
        curves.append(_curve("Loss", loss, "epoch", "loss"))
    if accuracy:
        curves.append(_curve("Validation accuracy", accuracy, "epoch", "accuracy", shares=True))
    if timed:
        curves.append(_curve("Validation accuracy over time", timed, "minutes", "accuracy", shares=True))
    if rate:
        curves.append(_curve("Learning rate of the head", rate[:1], "epoch", "learning rate"))
    return curves
