"""Whether probabilities mean what they say, and the one number that makes them (Guo et al. 2017).

What predictions tell about classes, mistakes, labels and confidence: numbers alone, no pictures.

What is measured on labelled images, and metrics.json.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets
import evaluate
import numpy as np
from scipy.cluster.hierarchy import leaves_list, linkage
from scipy.optimize import minimize_scalar
from scipy.spatial.distance import squareform
from scipy.special import log_softmax, softmax
from scipy.stats import betabinom, binomtest
from sklearn.metrics import f1_score, top_k_accuracy_score

from transfer.files import write_atomically

HIGHEST = 20.0  # temperature; the lowest is its inverse


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """The number by which logits (N, classes) are divided for the least cross-entropy against labels (N,)."""
    rows = np.arange(len(labels))

    def loss(log_temperature: float) -> float:
        return -log_softmax(logits / np.exp(log_temperature), axis=-1)[rows, labels].mean()

    bound = np.log(HIGHEST)
    return float(np.exp(minimize_scalar(loss, bounds=(-bound, bound), method="bounded").x))


def measure_calibration(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Temperature, and the expected calibration error without and with it.

    Each half of the images is scaled by the temperature of the other half, so that the error is not measured where
    the temperature was fitted. Scaling changes no label: the submission is the same.
    """
    logits = np.asarray(logits, dtype=np.float64)
    scaled, first = np.empty_like(logits), np.arange(len(labels)) % 2 == 0
    for half in (first, ~first):
        other = ~half if (~half).any() else half
        scaled[half] = logits[half] / fit_temperature(logits[other], labels[other])
    return {
        "temperature": fit_temperature(logits, labels),
        "ece": judge_confidence(softmax(logits, axis=-1), labels).ece,
        "ece_scaled": judge_confidence(softmax(scaled, axis=-1), labels).ece,
    }


CALIBRATION_BINS = 15  # as Guo et al. 2017


@dataclass(frozen=True)
class Reliability:
    """Confidence against accuracy in equal bins of confidence that hold images; `ece` weighs their gaps by images."""

    confidence: np.ndarray
    accuracy: np.ndarray
    images: np.ndarray
    ece: float


def judge_confidence(probabilities: np.ndarray, labels: np.ndarray) -> Reliability:
    """Whether the top probability means what it says; the expected calibration error of Guo et al. 2017."""
    confidence, hits = probabilities.max(1), probabilities.argmax(1) == labels
    bins = np.minimum((confidence * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)
    images = np.bincount(bins, minlength=CALIBRATION_BINS)
    kept = images > 0
    sums = np.bincount(bins, confidence, CALIBRATION_BINS)[kept], np.bincount(bins, hits, CALIBRATION_BINS)[kept]
    mean_confidence, accuracy = sums[0] / images[kept], sums[1] / images[kept]
    ece = float(np.abs(mean_confidence - accuracy) @ images[kept] / len(labels))
    return Reliability(mean_confidence, accuracy, images[kept], ece)


def accuracy_interval(hits: int, images: int) -> tuple[float, float]:
    """95% interval of an accuracy (Wilson 1927): what other images of the same kind would give."""
    interval = binomtest(hits, images).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)


def score_interval(hits: int, images: int, scored: int) -> tuple[float, float]:
    """Where the accuracy on `scored` other images lies in 95% of cases, after `hits` of `images` were right.

    Beta-binomial under Jeffreys' prior: covers the luck of both draws, as a leaderboard's public part has it.
    """
    seen = betabinom(scored, hits + 0.5, images - hits + 0.5)
    return float(seen.ppf(0.025) / scored), float(seen.ppf(0.975) / scored)


class ClassificationMetrics(evaluate.Metric):
    """Accuracy with its 95% interval, top-5 accuracy, macro F1 and cross-entropy, from logits.

    A metric of our own: `evaluate.load` fetches its scripts from the Hub. The interval does not cover the spread over
    training seeds.
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
        chosen, classes = logits.argmax(-1), np.arange(logits.shape[1])
        hits = int((chosen == labels).sum())
        many = logits.shape[1] > 5
        return {
            "accuracy": hits / len(labels),
            "accuracy_ci95": list(accuracy_interval(hits, len(labels))),
            "top5_accuracy": float(top_k_accuracy_score(labels, logits, k=5, labels=classes)) if many else 1.0,
            "macro_f1": float(f1_score(labels, chosen, labels=np.unique(labels), average="macro")),
            "loss": float(-log_softmax(logits, axis=-1)[np.arange(len(labels)), labels].mean()),
            "n": len(labels),
        }


def measure(logits: np.ndarray, labels: np.ndarray) -> dict:
    """Metrics of logits (N, classes) against labels (N,)."""
    metric = ClassificationMetrics(keep_in_memory=True)
    return metric.compute(predictions=logits.astype(np.float32), references=labels)


def write_metrics(folder: Path, metrics: Mapping) -> None:
    """metrics.json, whole or not at all."""
    write_atomically(folder / "metrics.json", json.dumps(metrics, indent=2, allow_nan=False) + "\n")


def read_metrics(folder: Path) -> dict:
    """A run's metrics.json."""
    return json.loads((folder / "metrics.json").read_text())


MOST_DOUBTED = 0.1  # ImageNet has some 6% of wrong labels (Northcutt et al. 2021)


def count_confusions(labels: np.ndarray, said: np.ndarray, classes: int) -> np.ndarray:
    """(classes, classes) counts: row = label, column = prediction."""
    counts = np.zeros((classes, classes), dtype=np.int64)
    np.add.at(counts, (labels, said), 1)
    return counts


def order_classes(probabilities: np.ndarray, labels: np.ndarray) -> list[int]:
    """Labels in an order that puts classes side by side which the model takes for each other.

    Leaves of an average-linkage tree over the mean probabilities that images of one class give to another.
    """
    classes = probabilities.shape[1]
    if classes < 3:
        return list(range(classes))
    shares = np.stack([probabilities[labels == c].sum(0) / max(1, (labels == c).sum()) for c in range(classes)])
    likeness = shares + shares.T
    np.fill_diagonal(likeness, 0)
    # Roots spread out the many small likenesses, so that far classes are ordered too.
    distance = 1 - np.sqrt(likeness / max(likeness.max(), 1e-12))
    np.fill_diagonal(distance, 0)
    return leaves_list(linkage(squareform(distance, checks=False), "average", optimal_ordering=True)).tolist()


@dataclass(frozen=True)
class ClassScore:
    """How one class fared: `right` of its `images`; `taken_for` is the class its mistakes name most, `times` often."""

    label: int
    images: int
    right: int
    taken_for: int | None
    times: int

    @property
    def recall(self) -> float:
        return self.right / self.images


def score_classes(confusions: np.ndarray) -> list[ClassScore]:
    """Every class that has images, the worst first."""
    wrong = confusions.copy()
    np.fill_diagonal(wrong, 0)
    scores = []
    for label in np.flatnonzero(confusions.sum(1)).tolist():
        other = int(wrong[label].argmax())
        times = int(wrong[label, other])
        right, images = int(confusions[label, label]), int(confusions[label].sum())
        scores.append(ClassScore(label, images, right, other if times else None, times))
    return sorted(scores, key=lambda s: (s.recall, -s.images, s.label))


@dataclass(frozen=True)
class ConfusedPair:
    """Two classes and how often images of each were taken for the other."""

    first: int
    second: int
    first_as_second: int
    second_as_first: int

    @property
    def times(self) -> int:
        return self.first_as_second + self.second_as_first


def find_confused_pairs(confusions: np.ndarray, most: int) -> list[ConfusedPair]:
    """The pairs of classes that are confused most, in either direction."""
    rows, columns = np.nonzero(np.triu(confusions + confusions.T, k=1))
    pairs = [
        ConfusedPair(a, b, int(confusions[a, b]), int(confusions[b, a]))
        for a, b in zip(rows.tolist(), columns.tolist(), strict=True)
    ]
    # Of the first class as of the one whose images are lost more often.
    pairs = [
        p
        if p.first_as_second >= p.second_as_first
        else ConfusedPair(p.second, p.first, p.second_as_first, p.first_as_second)
        for p in pairs
    ]
    return sorted(pairs, key=lambda p: (-p.times, -p.first_as_second, p.first, p.second))[:most]


def doubt_labels(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """(N,) bool: images whose label is likely wrong, by confident learning (Northcutt et al. 2021).

    An image is one if another class is likelier for it than that class is, on average, for the images that bear its
    label, while its own label is not among the five likeliest (the two likeliest of few classes). No label is doubted
    where that holds for more than a tenth of the images: a model that weak cannot judge labels.
    """
    classes = probabilities.shape[1]
    usual = np.array([probabilities[labels == c, c].mean() if (labels == c).any() else 2.0 for c in range(classes)])
    said = probabilities.argmax(1)
    own = probabilities[np.arange(len(labels)), labels]
    rank = (probabilities > own[:, None]).sum(1)
    confident = probabilities[np.arange(len(labels)), said] >= usual[said]
    doubted = confident & (said != labels) & (rank >= (5 if classes > 10 else 2))
    return doubted & (doubted.mean() <= MOST_DOUBTED)


def expect_counts(confusions: np.ndarray, images: int) -> np.ndarray:
    """(classes,) predictions of each label to expect of `images` with equal classes, confused as on validation."""
    sizes = confusions.sum(1, keepdims=True)
    shares = np.divide(confusions, sizes, where=sizes > 0, out=np.zeros(confusions.shape))
    return shares.sum(0) / max(1, int((sizes > 0).sum())) * images


def most_confident(probabilities: np.ndarray, positions: Sequence[int]) -> list[int]:
    """The positions, those with the highest top probability first."""
    return sorted(map(int, positions), key=lambda p: (-probabilities[p].max(), p))
