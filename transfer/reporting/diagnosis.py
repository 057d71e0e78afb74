"""What predictions tell about classes, mistakes, labels and confidence: numbers alone, no pictures."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.cluster.hierarchy import leaves_list, linkage
from scipy.spatial.distance import squareform

CALIBRATION_BINS = 15  # as Guo et al. 2017
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


def expect_counts(confusions: np.ndarray, images: int) -> np.ndarray:
    """(classes,) predictions of each label to expect of `images` with equal classes, confused as on validation."""
    sizes = confusions.sum(1, keepdims=True)
    shares = np.divide(confusions, sizes, where=sizes > 0, out=np.zeros(confusions.shape))
    return shares.sum(0) / max(1, int((sizes > 0).sum())) * images


def most_confident(probabilities: np.ndarray, positions: Sequence[int]) -> list[int]:
    """The positions, those with the highest top probability first."""
    return sorted(map(int, positions), key=lambda p: (-probabilities[p].max(), p))
