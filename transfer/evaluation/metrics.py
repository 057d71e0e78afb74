"""Metrics of labeled images: accuracy with its intervals, and metrics.json."""

import json
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import datasets
import evaluate
import numpy as np
from scipy.special import log_softmax
from scipy.stats import betabinom, binomtest
from sklearn.metrics import f1_score, top_k_accuracy_score

from transfer.data.splits import CopyCounts
from transfer.errors import UserError
from transfer.files import read_json, write_atomically

FILE_NAME = "metrics.json"


def find_hits(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """(N,) bool: whether the highest logit of each image, of (N, classes), is that of its label (N,)."""
    return logits.argmax(-1) == labels


def macro_f1(logits: np.ndarray, labels: np.ndarray) -> float:
    """Mean F1 score over the classes that labels (N,) have, of logits (N, classes)."""
    return float(f1_score(labels, logits.argmax(-1), labels=np.unique(labels), average="macro"))


def accuracy_interval(hits: int, images: int) -> tuple[float, float]:
    """95% interval of an accuracy over the choice of images (Wilson 1927)."""
    interval = binomtest(hits, images).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)


def score_interval(hits: int, images: int, scored: int) -> tuple[float, float]:
    """95% interval of the accuracy on `scored` other images, given `hits` of `images`.

    Beta-binomial with Jeffreys' prior: it covers the choice of both sets of images. A public leaderboard scores such
    another set.
    """
    seen = betabinom(scored, hits + 0.5, images - hits + 0.5)
    return float(seen.ppf(0.025) / scored), float(seen.ppf(0.975) / scored)


@dataclass(frozen=True)
class ClassificationMetrics:
    """Metrics of one set of labeled images."""

    accuracy: float
    accuracy_ci95: list[float]  # low and high end of its 95% interval, without the spread over training seeds
    top5_accuracy: float  # 1 with five classes or fewer
    macro_f1: float
    loss: float  # cross-entropy
    n: int  # images


class ImageClassificationMetric(evaluate.Metric):
    """The values of `ClassificationMetrics`, from logits.

    `evaluate.load` would download its scripts from the Hub; this class also works offline.
    """

    def _info(self):
        return evaluate.MetricInfo(
            description=self.__doc__,
            citation="",
            inputs_description="predictions: logits, (N, classes); references: labels, (N,)",
            features=datasets.Features(
                predictions=datasets.Sequence(datasets.Value("float32")), references=datasets.Value("int64")
            ),
        )

    def _compute(self, predictions, references):
        logits, labels = np.asarray(predictions, dtype=np.float64), np.asarray(references)
        images, classes = logits.shape
        hits = int(find_hits(logits, labels).sum())
        top5 = top_k_accuracy_score(labels, logits, k=5, labels=np.arange(classes)) if classes > 5 else 1.0
        return {
            "accuracy": hits / images,
            "accuracy_ci95": list(accuracy_interval(hits, images)),
            "top5_accuracy": float(top5),
            "macro_f1": macro_f1(logits, labels),
            "loss": float(-log_softmax(logits, axis=-1)[np.arange(images), labels].mean()),
            "n": images,
        }


def measure(logits: np.ndarray, labels: np.ndarray) -> ClassificationMetrics:
    """Metrics of logits (N, classes) against labels (N,)."""
    metric = ImageClassificationMetric(keep_in_memory=True)
    return ClassificationMetrics(**metric.compute(predictions=logits.astype(np.float32), references=labels))


@dataclass(frozen=True)
class Calibration:
    """Temperature, and the expected calibration error before and after scaling with it."""

    temperature: float
    ece: float
    ece_scaled: float | None = None


@dataclass(frozen=True)
class Speed:
    """How fast images were trained on or predicted."""

    samples_per_second: float
    seconds: float


@dataclass(frozen=True)
class Scores:
    """Mean or standard deviation over repeated runs."""

    accuracy: float
    loss: float


@dataclass(frozen=True)
class SplitScores:
    """Scores on validation and on training images."""

    validation: Scores
    train: Scores


@dataclass(frozen=True)
class TrainMetrics(Speed, ClassificationMetrics):
    """Metrics of unaugmented training images, and the speed of the training with its evaluations."""


@dataclass(frozen=True)
class MeanTrainMetrics(Speed, Scores):
    """The same of a cross-validation: mean scores over its folds."""


@dataclass(frozen=True)
class ZeroEpoch:
    """Validation accuracy before training."""

    accuracy: float


@dataclass(frozen=True)
class LinearProbe:
    """Validation accuracy of a linear probe; of repeated runs only their mean accuracy."""

    accuracy: float
    penalty: float | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class TtaMetrics:
    """Test-time augmentation: the views that are averaged, and the validation accuracy of each view alone."""

    kept: list[str]
    accuracy: dict[str, float]


@dataclass(frozen=True)
class SoupMetrics(ClassificationMetrics):
    """Validation metrics of averaged weights, and the seeds that they are averaged over."""

    members: list[int]


@dataclass(frozen=True)
class EnsembleMembers:
    """The finished runs that an ensemble was made from."""

    kept: list[str]  # the runs that are averaged, the most accurate first
    accuracy: dict[str, float]  # validation accuracy of each run that was tried
    mean_of_all: float  # validation accuracy of the mean of all of them
    note: str = "slightly optimistic: the members were chosen on these images"  # about the validation accuracy


@dataclass(frozen=True)
class SubmissionSource:
    """What the submission of repeated runs is made from."""

    from_: str
    validation_accuracy: float | None = None


def _drop_none(items: list[tuple[str, Any]]) -> dict[str, Any]:
    return {name.rstrip("_"): value for name, value in items if value is not None}  # `from` is a keyword of Python


def _parse(kind: Any, content: Any, stage: str) -> Any:
    """A dataclass from json. Raises `ValueError` if a key is missing; ignores keys that are not fields."""
    if not isinstance(content, Mapping):
        raise ValueError(f"{stage!r} is missing")
    values = {}
    for field in fields(kind):
        key = field.name.rstrip("_")
        if key in content:
            nested = is_dataclass(field.type)
            values[field.name] = _parse(field.type, content[key], f"{stage}.{key}") if nested else content[key]
        elif field.default is MISSING:
            raise ValueError(f"'{stage}.{key}' is missing")
    return kind(**values)


@dataclass(frozen=True)
class RunMetrics:
    """Everything that a run measured: metrics.json. Stages that a run does not have are None."""

    validation: ClassificationMetrics
    calibration: Calibration | None = None
    tta: TtaMetrics | None = None
    prediction: Speed | None = None  # of the test images
    zero_epoch: ZeroEpoch | None = None
    linear_probe: LinearProbe | None = None
    train: TrainMetrics | MeanTrainMetrics | None = None  # None where nothing was trained
    seeds: "list[RunMetrics] | None" = None
    folds: "list[RunMetrics] | None" = None
    mean: SplitScores | None = None
    std: SplitScores | None = None
    soup: SoupMetrics | None = None
    ensemble: ClassificationMetrics | None = None
    members: EnsembleMembers | None = None  # of an ensemble of runs
    submission: SubmissionSource | None = None
    test: ClassificationMetrics | None = None  # of labeled test images, which choose nothing
    copies: CopyCounts | None = None  # None where no image is byte-identical to another

    @property
    def repeats(self) -> "list[RunMetrics]":
        """Metrics of each seed or fold; empty for a single run."""
        return self.seeds or self.folds or []

    def to_json(self) -> dict[str, Any]:
        """The content of metrics.json."""
        return asdict(self, dict_factory=_drop_none)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "RunMetrics":
        """Metrics from the content of metrics.json. Raises `ValueError` if a key is missing; ignores unknown keys."""

        def stage(name: str, kind: type) -> Any:
            return None if content.get(name) is None else _parse(kind, content[name], name)

        def repeats(name: str) -> list[RunMetrics] | None:
            return None if content.get(name) is None else [cls.from_json(run) for run in content[name]]

        means = "accuracy_ci95" not in (content.get("train") or {})
        return cls(
            validation=_parse(ClassificationMetrics, content.get("validation"), "validation"),
            calibration=stage("calibration", Calibration),
            tta=stage("tta", TtaMetrics),
            prediction=stage("prediction", Speed),
            zero_epoch=stage("zero_epoch", ZeroEpoch),
            linear_probe=stage("linear_probe", LinearProbe),
            train=stage("train", MeanTrainMetrics if means else TrainMetrics),
            seeds=repeats("seeds"),
            folds=repeats("folds"),
            mean=stage("mean", SplitScores),
            std=stage("std", SplitScores),
            soup=stage("soup", SoupMetrics),
            ensemble=stage("ensemble", ClassificationMetrics),
            members=stage("members", EnsembleMembers),
            submission=stage("submission", SubmissionSource),
            test=stage("test", ClassificationMetrics),
            copies=stage("copies", CopyCounts),
        )

    def write(self, folder: Path) -> None:
        """Write metrics.json into a run's folder, atomically."""
        write_atomically(folder / FILE_NAME, json.dumps(self.to_json(), indent=2, allow_nan=False) + "\n")

    @classmethod
    def read(cls, folder: Path) -> "RunMetrics":
        """Read a run's metrics.json. Raises `UserError` if it is missing or incomplete."""
        path = folder / FILE_NAME
        content = read_json(path, f"is {folder} a finished run?")
        try:
            return cls.from_json(content)
        except ValueError as fault:
            raise UserError(f"{path}: {fault}; every run of this project writes it") from None


def describe_metrics(metrics: RunMetrics) -> list[str]:
    """The main results in words, one line each."""
    lines, label = [], "validation accuracy"
    if metrics.mean and metrics.std:
        kind, mean, std = "folds" if metrics.folds else "seeds", metrics.mean.validation, metrics.std.validation
        spread = f"{mean.accuracy:.4f}, standard deviation {std.accuracy:.4f}"
        lines.append(f"{f'{len(metrics.repeats)} {kind}':<11} mean validation accuracy {spread}")
    if metrics.soup:
        members = ", ".join(map(str, metrics.soup.members))
        lines.append(
            f"soup        validation accuracy {metrics.soup.accuracy:.4f}, weights of seeds {members} averaged"
        )
    if metrics.ensemble:
        lines.append(f"ensemble    validation accuracy {metrics.ensemble.accuracy:.4f}")
    if metrics.members:
        for run, accuracy in metrics.members.accuracy.items():
            lines.append(f"{'member' if run in metrics.members.kept else 'left out':<11} {accuracy:.4f}  {run}")
        of_all, runs = metrics.members.mean_of_all, len(metrics.members.accuracy)
        lines.append(f"mean        validation accuracy {of_all:.4f} of the mean of all {runs} runs")
    if metrics.submission:
        best = "" if metrics.folds else ", the best on validation"
        lines.append(f"submission  from {metrics.submission.from_}{best}")
    if metrics.folds:
        label = "validation accuracy of all images, each predicted by the fold that left it out:"
    validation = metrics.validation
    low, high = validation.accuracy_ci95
    lines.append(
        f"accuracy    {label} {validation.accuracy:.4f} (95% interval {low:.4f} to {high:.4f}, n={validation.n})"
    )
    if metrics.members:
        lines.append(f"            {metrics.members.note}")
    if metrics.test:
        low, high = metrics.test.accuracy_ci95
        interval = f"(95% interval {low:.4f} to {high:.4f}, n={metrics.test.n})"
        lines.append(f"accuracy    test accuracy {metrics.test.accuracy:.4f} {interval}")
    return lines
