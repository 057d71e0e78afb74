"""The report page with its charts and findings, the model card, and the comparison of two runs.

python -m transfer.reporting outputs/x                # write report.html of a finished run again
python -m transfer.reporting outputs/x outputs/y      # compare two runs: is one better, or is it noise?
python -m transfer.reporting outputs/x outputs/y --html comparison.html    # the same as a page

`RunResults` holds the results of a finished run, read from its folder.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import binomtest

from transfer.errors import UserError
from transfer.evaluation.metrics import RunMetrics
from transfer.evaluation.predictions import Predictions
from transfer.files import name_of, read_json
from transfer.models.offline import BACKBONES

SIGNIFICANCE = 0.05  # p-value below which a difference is not called noise
CACHED = re.compile(r"models--([^/]+)--([^/]+)/snapshots/")  # a folder of the Hub's cache
TOP5_FROM = 11  # classes: of fewer, being among the five likeliest says little


def _require(content, names: Sequence[str], path: Path) -> None:
    """Refuse json without a key that every run writes. Raises `UserError`."""
    missing = [name for name in names if not isinstance(content, Mapping) or name not in content]
    if missing:
        raise UserError(f"{path}: {missing[0]!r} is missing; every run of this project writes it")


def read_classes(folder: Path) -> tuple[list[str], list[str]]:
    """(names, ids) of the classes in label order, from the saved model's config. Raises `UserError`."""
    path = folder / "model" / "config.json"
    config = read_json(path, f"is {folder} a finished run?")
    names: Any = config.get("id2label", config.get("label_names"))  # timm's configs have a list
    try:
        named = [str(names[str(label) if isinstance(names, Mapping) else label]) for label in range(len(names))]
    except (TypeError, KeyError):
        raise UserError(f"{path}: its id2label does not name the classes 0, 1, 2 ...") from None
    return named, list(map(str, config.get("class_ids") or config.get("wnids") or []))


def read_histories(folder: Path) -> dict[str, list[dict]]:
    """The Trainer's log of each seed or fold by its name, or of a single run by ""; empty if nothing was trained."""
    states = [path for kind in ("seed", "fold") for path in folder.glob(f"{kind}-*/trainer_state.json")]
    states.sort(key=lambda path: (len(path.parent.name), path))
    if not states and (folder / "trainer_state.json").is_file():
        states = [folder / "trainer_state.json"]
    names = ["" if path.parent == folder else path.parent.name.replace("-", " ") for path in states]
    return dict(zip(names, (read_json(path).get("log_history", []) for path in states), strict=True))


def find_cached_id(folder: Path) -> str | None:
    """The Hub id of a folder in the Hub's cache; None for all others."""
    found = CACHED.search(folder.as_posix())
    return f"{found[1]}/{found[2]}" if found else None


def data_name(arguments: Mapping) -> str:
    """The dataset of a run: a Hub id, or the last part of the path of its folder or zip."""
    return arguments.get("dataset_name") or name_of(str(arguments.get("data_dir"))).removesuffix(".zip")


def base_model_name(record: Mapping) -> str:
    """The checkpoint that a run started from: a Hub id, or the last part of a local path."""
    name = str(record["arguments"]["model_name_or_path"])
    if name in BACKBONES:
        return BACKBONES[name].title
    path = Path(name)
    if record["local_model"] and (cached := find_cached_id(path)):
        return cached
    if record["local_model"] and path.name == "model" and path.parent.name:  # of a run
        return f"{path.parent.name}/model"
    return path.name if record["local_model"] else name


@dataclass(frozen=True)
class RunResults:
    """The content of a finished run's folder, from which reports and comparisons are made."""

    folder: Path
    metrics: RunMetrics
    record: Mapping  # run.json
    predictions: Predictions
    class_names: list[str]
    class_ids: list[str]  # of the dataset; empty where the model does not name them
    histories: Mapping[str, list[dict]]

    @classmethod
    def read(cls, folder: Path, record: Mapping | None = None) -> "RunResults":
        """Read a run's folder, with `record` in place of a run.json that is not written yet. Raises `UserError`."""
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder; name a run's output folder, for example outputs/sample")
        if record is None:
            record = read_json(folder / "run.json", f"is {folder} a finished run?")
        _require(record, ["arguments", "local_model"], folder / "run.json")
        _require(record["arguments"], ["model_name_or_path"], folder / "run.json")
        if "class_names" in record:  # an ensemble has no model
            names, ids = record["class_names"], record["class_ids"]
        else:
            names, ids = read_classes(folder)
        predictions = Predictions.load(folder)
        if predictions.validation_logits.shape[1] != len(names):
            raise UserError(
                f"{folder}: predictions.npz has {predictions.validation_logits.shape[1]} classes, but model/ has "
                f"{len(names)}; they do not belong to the same run"
            )
        return cls(folder, RunMetrics.read(folder), record, predictions, names, ids, read_histories(folder))

    @property
    def name(self) -> str:
        return self.folder.resolve().name


@dataclass(frozen=True)
class PairedComparison:
    """McNemar's test (1947), exact, over the images that only one of two runs classifies correctly."""

    images: int
    first_correct: int
    second_correct: int
    first_only: int  # images that only the first run classifies correctly
    second_only: int
    p_value: float
    interval: tuple[float, float]  # 95%, of the second run's accuracy minus the first's

    @property
    def difference(self) -> float:
        return (self.second_correct - self.first_correct) / self.images


def compare_hits(first: np.ndarray, second: np.ndarray) -> PairedComparison:
    """Compare two classifiers by which images each classifies correctly, (N,) bool in the same order."""
    first_only, second_only = int((first & ~second).sum()), int((second & ~first).sum())
    discordant, images = first_only + second_only, len(first)
    p_value, interval = 1.0, (0.0, 0.0)
    if discordant:
        test = binomtest(second_only, discordant)
        # Only the split of the discordant images is uncertain; the others cancel out.
        share = test.proportion_ci(method="exact")
        p_value = float(test.pvalue)
        interval = (2 * share.low - 1) * discordant / images, (2 * share.high - 1) * discordant / images
    return PairedComparison(images, int(first.sum()), int(second.sum()), first_only, second_only, p_value, interval)


def align_runs(first: RunResults, second: RunResults) -> tuple[np.ndarray, np.ndarray]:
    """(N,) int each: the positions of the validation images in each run, in the same order of files.

    Raises `UserError` if the runs have different images or labels.
    """
    ours, theirs = first.predictions, second.predictions
    order, other = (np.argsort(p.validation_files, kind="stable") for p in (ours, theirs))
    files, other_files = ours.validation_files[order], theirs.validation_files[other]
    if not np.array_equal(files, other_files):
        only = set(files) ^ set(other_files)
        raise UserError(
            f"{first.folder} and {second.folder} have different validation images ({len(only)} are in only one of "
            f"them, for example {min(only)}); use runs with the same data, --validation_fraction and --split_seed"
        )
    differing = np.flatnonzero(ours.validation_labels[order] != theirs.validation_labels[other])
    if len(differing):
        file = files[differing[0]]
        raise UserError(f"{first.folder} and {second.folder} have different labels for {file}; their classes differ")
    return order, other


def compare_runs(first: RunResults, second: RunResults) -> PairedComparison:
    """The paired comparison of two runs. Raises `UserError` if their validation images differ."""
    order, other = align_runs(first, second)
    return compare_hits(first.predictions.hits[order], second.predictions.hits[other])


def describe_comparison(c: PairedComparison, first: str, second: str) -> list[str]:
    """The comparison in words, one line each; the last line is the answer."""
    width = max(len(first), len(second))
    low, high = (100 * bound for bound in c.interval)
    lines = [
        f"{name:<{width}}  {correct / c.images:.4f}  {correct} of {c.images} correct, {only} of them only by this run"
        for name, correct, only in ((first, c.first_correct, c.first_only), (second, c.second_correct, c.second_only))
    ]
    lines.append(f"difference {100 * c.difference:+.2f} points (95% interval {low:+.2f} to {high:+.2f})")
    lines.append(f"McNemar's exact test on {c.first_only + c.second_only} images: p = {c.p_value:.3g}")
    if c.p_value < SIGNIFICANCE:
        better = second if c.difference > 0 else first
        lines.append(f"{better} is better: chance rarely makes such a difference, but other seeds may change it.")
    else:
        lines.append("The difference is within noise: these images do not show which run is better.")
    return lines
