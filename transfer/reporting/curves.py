"""How a run reached its accuracy: its stages, its repeats, and curves from the Trainer's logs."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from transfer.evaluation.metrics import RunMetrics, Speed, SplitScores
from transfer.reporting.charts import Series, draw_lines

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
    if metrics.ensemble:
        stages[ENSEMBLE] = metrics.ensemble.accuracy
    return stages


def _name_final(metrics: RunMetrics, arguments: Mapping) -> str:
    """The stage that made the final model."""
    if metrics.soup:
        return SOUP
    if metrics.folds:
        return "cross-validation"
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
