"""A run's results as its output folder holds them.

Two runs on the same held-out images: is one better, or is the difference noise?
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.stats import binomtest

from transfer.errors import UserError
from transfer.evaluation.predictions import Predictions


def read_json(path: Path) -> dict:
    """A json object that a run wrote. Raises `UserError`."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as fault:
        raise UserError(f"{path}: cannot be read ({fault.strerror}); is {path.parent} a finished run?") from None
    except ValueError as fault:
        raise UserError(f"{path}: is not valid json ({fault})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}, where a run writes an object")
    return content


def _require(content, names: Sequence[str], path: Path) -> None:
    """Refuse a file in which a run would have written more. Raises `UserError`."""
    missing = [name for name in names if not isinstance(content, Mapping) or name not in content]
    if missing:
        raise UserError(f"{path}: lacks {missing[0]!r}, which every run writes; is it of this project?")


def read_class_names(folder: Path) -> list[str]:
    """Names of the classes in label order, as the saved model has them. Raises `UserError`."""
    path = folder / "model" / "config.json"
    config = read_json(path)
    names = config.get("id2label", config.get("label_names"))  # timm's configs have a list
    try:
        return [str(names[str(label) if isinstance(names, Mapping) else label]) for label in range(len(names))]
    except (TypeError, KeyError):
        raise UserError(f"{path}: its id2label does not name the classes from 0 on") from None


def read_histories(folder: Path) -> dict[str, list[dict]]:
    """The Trainer's log of each seed or fold, or the one log of a run; empty where nothing was trained."""
    states = [path for kind in ("seed", "fold") for path in folder.glob(f"{kind}-*/trainer_state.json")]
    states.sort(key=lambda path: (len(path.parent.name), path))
    if not states and (folder / "trainer_state.json").is_file():
        states = [folder / "trainer_state.json"]
    names = ["" if path.parent == folder else path.parent.name.replace("-", " ") for path in states]
    return dict(zip(names, (read_json(path).get("log_history", []) for path in states), strict=True))


def look_up(entry, *keys: str):
    """A finite number deep in metrics.json, or None where a run has none of that name."""
    for key in keys:
        entry = entry.get(key) if isinstance(entry, Mapping) else None
    return entry if isinstance(entry, (int, float)) and math.isfinite(entry) else None


def name_base(record: Mapping) -> str:
    """The checkpoint that a run started from: a Hub id, or a folder's name without its place."""
    name = str(record["arguments"]["model_name_or_path"])
    if name == "offline":
        return "EfficientNet-Lite0 (ImageNet-1k)"
    return Path(name).name if record["local_model"] else name


@dataclass(frozen=True)
class RunResults:
    """What a finished run's folder says; everything a report or a comparison is made from."""

    folder: Path
    metrics: Mapping
    record: Mapping
    predictions: Predictions
    class_names: list[str]
    histories: Mapping[str, list[dict]]

    @classmethod
    def read(cls, folder: Path, record: Mapping | None = None) -> "RunResults":
        """Read a run's folder; `record` stands for a run.json that is not written yet. Raises `UserError`."""
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder; name a run's output folder, for example outputs/sample")
        record = read_json(folder / "run.json") if record is None else record
        _require(record, ["arguments", "local_model"], folder / "run.json")
        _require(record["arguments"], ["model_name_or_path"], folder / "run.json")
        names, predictions = read_class_names(folder), Predictions.load(folder)
        if predictions.validation_logits.shape[1] != len(names):
            raise UserError(
                f"{folder}: predictions.npz has {predictions.validation_logits.shape[1]} classes and model/ "
                f"{len(names)}; they are not of one run"
            )
        metrics = read_json(folder / "metrics.json")
        kept = ["accuracy", "accuracy_ci95", "top5_accuracy", "macro_f1", "loss", "n"]
        _require(metrics.get("validation"), kept, folder / "metrics.json")
        return cls(folder, metrics, record, predictions, names, read_histories(folder))

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def hits(self) -> np.ndarray:
        """(N,) bool: which validation images were right."""
        return self.predictions.validation_logits.argmax(-1) == self.predictions.validation_labels


SIGNIFICANCE = 0.05


@dataclass(frozen=True)
class Comparison:
    """McNemar's test (1947), exact: of the images that one run alone gets right, is one run's share above a half?"""

    images: int
    first_right: int
    second_right: int
    first_alone: int  # images that only the first run gets right
    second_alone: int
    p_value: float
    interval: tuple[float, float]  # 95%, of the second run's accuracy less the first's

    @property
    def difference(self) -> float:
        return (self.second_right - self.first_right) / self.images


def align_hits(first: RunResults, second: RunResults) -> tuple[np.ndarray, np.ndarray]:
    """(N,) bool each: which images the two runs got right, in one order. Raises `UserError` if these differ."""
    files = [run.predictions.validation_files for run in (first, second)]
    orders = [np.argsort(names, kind="stable") for names in files]
    named = [names[order] for names, order in zip(files, orders, strict=True)]
    if not np.array_equal(*named):
        only = set(named[0]) ^ set(named[1])
        raise UserError(
            f"{first.folder} and {second.folder} held out other images ({len(only)} are in one of them alone, for "
            f"example {min(only)}); only runs with the same data, --validation_fraction and --split_seed compare"
        )
    labels = [run.predictions.validation_labels[order] for run, order in zip((first, second), orders, strict=True)]
    if not np.array_equal(*labels):
        file = named[0][np.flatnonzero(labels[0] != labels[1])[0]]
        raise UserError(f"{first.folder} and {second.folder} give {file} other labels; their classes are not the same")
    return first.hits[orders[0]], second.hits[orders[1]]


def compare_hits(first: np.ndarray, second: np.ndarray) -> Comparison:
    """The paired comparison of which images two classifiers got right, (N,) bool each in one order."""
    alone = int((first & ~second).sum()), int((second & ~first).sum())
    discordant, images = sum(alone), len(first)
    test = binomtest(alone[1], discordant) if discordant else None
    # What is uncertain is how the images that they disagree on split; the others cancel out.
    interval = (0.0, 0.0)
    if test is not None:
        share = test.proportion_ci(method="exact")
        interval = tuple((2 * bound - 1) * discordant / images for bound in (share.low, share.high))
    p_value = 1.0 if test is None else float(test.pvalue)
    return Comparison(images, int(first.sum()), int(second.sum()), *alone, p_value, interval)


def compare_runs(first: RunResults, second: RunResults) -> Comparison:
    """The paired comparison of two runs. Raises `UserError` where their held-out images differ."""
    return compare_hits(*align_hits(first, second))


def describe_comparison(c: Comparison, first: str, second: str) -> list[str]:
    """The comparison in words, a line each; the last one is the answer."""
    width = max(len(first), len(second))
    low, high = (100 * bound for bound in c.interval)
    lines = [
        f"{name:<{width}}  {right / c.images:.4f}  {right} of {c.images} right, {alone} of them it alone"
        for name, right, alone in ((first, c.first_right, c.first_alone), (second, c.second_right, c.second_alone))
    ]
    lines.append(f"difference {100 * c.difference:+.2f} points (95% interval {low:+.2f} to {high:+.2f})")
    lines.append(f"McNemar's exact test on {c.first_alone + c.second_alone} images: p = {c.p_value:.3g}")
    if c.p_value < SIGNIFICANCE:
        better = second if c.difference > 0 else first
        lines.append(f"{better} is better: such a difference is rarely noise. Other seeds may still differ more.")
    else:
        lines.append("This is within noise: these images cannot tell the two runs apart.")
    return lines
