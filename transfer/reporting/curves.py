"""How a run came to its accuracy: curves from the Trainer's logs, stages, repeats."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from transfer.evaluation.comparison import look_up
from transfer.reporting.charts import Series, draw_lines

# Stages in the order in which a run goes through them; those that metrics.json does not have are passed over.
STAGES = {
    "zero_epoch": "before any training",
    "linear_probe": "linear probe",
    "fine_tuned": "fine-tuned",
    "ema": "averaged weights (EMA)",
    "mean": "mean of the seeds",
    "soup": "soup of the seeds",
    "ensemble": "ensemble of the seeds",
}

# Columns of the table of repeated runs: where the number stands, and how it is written.
REPEAT_COLUMNS = {
    "validation accuracy": (("validation", "accuracy"), 100, "{:.2f}%"),
    "validation loss": (("validation", "loss"), 1, "{:.4f}"),
    "train accuracy": (("train", "accuracy"), 100, "{:.2f}%"),
    "train loss": (("train", "loss"), 1, "{:.4f}"),
    "minutes": (("train", "seconds"), 1 / 60, "{:.1f}"),
}


def read_accuracy(entry) -> float | None:
    """The accuracy of a part of metrics.json, which may hold it for validation or at once."""
    found = look_up(entry, "validation", "accuracy")
    return look_up(entry, "accuracy") if found is None else found


@dataclass(frozen=True)
class Step:
    """One stage's accuracy and what it gained over the best stage before it; None for the first."""

    name: str
    accuracy: float
    gain: float | None
    kept: bool = False


def _name_kept(metrics: Mapping, arguments: Mapping) -> str:
    """What the model that is kept was made by."""
    views = (metrics.get("tta") or {}).get("kept", ["plain"])
    if len(views) > 1:
        return f"kept, with views {', '.join(views)}"
    later = {"fine_tuned", "ema", "mean", "tta"} & metrics.keys() or arguments.get("linear_probe_only")
    return f"{STAGES['fine_tuned']}, kept" if "train" in metrics and not later else "kept"


def _read_stages(metrics: Mapping) -> dict[str, float]:
    """Accuracy by stage, as far as metrics.json has them."""
    found = {key: read_accuracy(metrics.get(key)) for key in STAGES}
    if "fine_tuned" in metrics or "folds" in metrics:
        found.pop("mean")  # it is that of the fine-tunings, not a stage after them
    return {STAGES[key]: accuracy for key, accuracy in found.items() if accuracy is not None}


def list_steps(metrics: Mapping, arguments: Mapping) -> list[Step]:
    """The stages that metrics.json knows and what was kept of them: of seeds their soup, else what came last."""
    found, name = _read_stages(metrics), _name_kept(metrics, arguments)
    soup, ensemble = STAGES["soup"], STAGES["ensemble"]
    after = [(ensemble, found.pop(ensemble))] if ensemble in found else []
    kept = (f"{soup}, {name}", found.pop(soup)) if soup in found else (name, metrics["validation"]["accuracy"])
    plain = look_up(metrics, "tta", "accuracy", "plain")
    if plain is not None and len(metrics["tta"].get("kept", ())) > 1:
        found[f"{soup}, one plain view" if "soup" in metrics else "one plain view"] = plain
    steps = []
    for stage, accuracy in [*found.items(), kept, *after]:
        gain = accuracy - max(s.accuracy for s in steps) if steps else None
        steps.append(Step(stage, accuracy, gain, kept=stage == kept[0]))
    return steps


def list_repeats(metrics: Mapping, seeds: Sequence[int] | None) -> dict | None:
    """The table of repeated runs: their kind, columns, and rows of texts with mean and standard deviation; or None."""
    kind = "fold" if "folds" in metrics else "seed"
    runs = metrics.get(f"{kind}s")
    if not isinstance(runs, Sequence) or not runs:
        return None
    names = seeds if kind == "seed" and seeds and len(seeds) == len(runs) else range(1, len(runs) + 1)
    entries = {str(name): entry for name, entry in zip(names, runs, strict=True)}
    tails = {"mean": metrics.get("mean"), "standard deviation": metrics.get("std")}
    entries |= {name: entry for name, entry in tails.items() if entry is not None}
    columns = {
        name: column
        for name, column in REPEAT_COLUMNS.items()
        if any(_read(entry, column[0]) is not None for entry in entries.values())
    }
    rows = [(name, [_write(entry, column) for column in columns.values()]) for name, entry in entries.items()]
    return {"kind": kind, "columns": list(columns), "rows": rows}


def _read(entry, path: Sequence[str]) -> float | None:
    found = look_up(entry, *path)
    return look_up(entry, path[-1]) if found is None and path[0] == "validation" else found


def _write(entry, column: tuple) -> str:
    path, scale, form = column
    found = _read(entry, path)
    return "–" if found is None else form.format(found * scale)


def _pick(history: Sequence[Mapping], x: str, y: str, scale: float = 1.0) -> tuple[list[float], list[float]]:
    """Points of a log that have both values."""
    entries = [e for e in history if isinstance(look_up(e, x), (int, float)) and look_up(e, y) is not None]
    return [e[x] * scale for e in entries], [e[y] for e in entries]


def _series(histories: Mapping[str, Sequence[Mapping]], x: str, names: Mapping[str, str], scale=1.0) -> list[Series]:
    """One line for every seed and every name that was logged; a log without any point gives none."""
    lines = []
    for number, (seed, history) in enumerate(histories.items()):
        for colour, (key, name) in enumerate(names.items()):
            xs, ys = _pick(history, x, key, scale)
            if xs:
                line = f"{name}, {seed}" if seed else name
                shade = colour if len(names) > 1 else number % 4
                lines.append(Series(line, xs, ys, shade, dots=key.startswith("eval_")))
    return lines


@dataclass(frozen=True)
class Curve:
    """A chart with its heading and, for each colour, what it means."""

    title: str
    picture: Markup
    legend: list[tuple[int, str]]


def _curve(title: str, series: Sequence[Series], x_label: str, y_label: str, **options) -> Curve:
    legend = {s.colour: s.name.partition(",")[0] for s in series}
    if len({s.name.partition(",")[0] for s in series}) == 1 and len(series) > 1:
        legend = {s.colour: s.name.partition(", ")[2] for s in series}
    entries = list(legend.items()) if len(legend) > 1 else []
    return Curve(title, draw_lines(series, x_label, y_label, **options), entries)


def from_the_start(
    histories: Mapping[str, Sequence[Mapping]], metrics: Mapping, arguments: Mapping
) -> dict[str, Sequence[Mapping]]:
    """The logs, each after the accuracy that was measured before its first step: the checkpoint's, or its probe's."""
    kind = "fold" if "folds" in metrics else "seed"
    runs = metrics.get(f"{kind}s") or []
    numbers = (arguments.get("seeds") if kind == "seed" else None) or range(1, len(runs) + 1)
    measured = {"": metrics} | {f"{kind} {n}": run for n, run in zip(numbers, runs, strict=False)}
    begun = {}
    for name, history in histories.items():
        before = [read_accuracy(measured.get(name, {}).get(stage)) for stage in ("linear_probe", "zero_epoch")]
        first = [{"epoch": 0, "seconds": 0, "eval_accuracy": a} for a in before if a is not None][:1]
        begun[name] = [*first, *history] if history else []
    return begun


def draw_curves(histories: Mapping[str, Sequence[Mapping]]) -> list[Curve]:
    """Loss by epoch, validation accuracy by epoch and by minutes of training, as far as they were logged."""
    loss = _series(histories, "epoch", {"loss": "training", "eval_loss": "validation"})
    measured = {"eval_accuracy": "the weights", "eval_ema_accuracy": "their average"}
    if not any("eval_ema_accuracy" in entry for history in histories.values() for entry in history):
        measured = {"eval_accuracy": "validation accuracy"}
    accuracy = _series(histories, "epoch", measured)
    timed = _series(histories, "seconds", measured, 1 / 60)
    rate = _series(histories, "epoch", {"learning_rate": "learning rate"})
    curves = []
    if loss:
        curves.append(_curve("Loss", loss, "epoch", "loss"))
    if accuracy:
        curves.append(_curve("Validation accuracy", accuracy, "epoch", "accuracy", shares=True))
    if timed:
        curves.append(_curve("Validation accuracy against time", timed, "minutes", "accuracy", shares=True))
    if rate:
        curves.append(_curve("Learning rate of the head", rate[:1], "epoch", "learning rate"))
    return curves
