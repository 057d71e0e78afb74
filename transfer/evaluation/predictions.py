"""The logits that a run keeps in predictions.npz: their ensembles, calibration, confusions and label issues."""

import dataclasses
import io
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.cluster.hierarchy import leaves_list, linkage
from scipy.optimize import minimize_scalar
from scipy.spatial.distance import squareform
from scipy.special import log_softmax, logsumexp, softmax
from sklearn.metrics import confusion_matrix

from transfer.errors import UserError
from transfer.evaluation.metrics import Calibration, find_hits
from transfer.files import write_atomically

FILE_NAME = "predictions.npz"
CALIBRATION_BINS = 15  # as in Guo et al. 2017
HIGHEST_TEMPERATURE = 20.0  # the lowest one is its inverse
# Fraction of predictions above an equal share per class. A classifier with accuracy 0.8 on 5,000 images of 100
# classes has about 0.08; one that never predicts a quarter of the classes has at least 0.25.
IMBALANCE_LIMIT = 0.2
MAX_LABEL_ISSUES = 0.1  # share of the images; ImageNet has about 6% wrong labels (Northcutt et al. 2021)


def average_probabilities(logits: Sequence[np.ndarray]) -> np.ndarray:
    """The ensemble's log-probabilities (N, classes), from the logits (N, classes) of each member."""
    members = np.stack([log_softmax(np.asarray(member, dtype=np.float64), axis=-1) for member in logits])
    return logsumexp(members, axis=0) - np.log(len(members))


def average_views(logits: Sequence[np.ndarray]) -> np.ndarray:
    """The logits (N, classes) of a single view as they are; of several views the log of their mean probabilities."""
    return logits[0] if len(logits) == 1 else average_probabilities(logits)


def choose_views(tried: Mapping[str, np.ndarray], labels: np.ndarray) -> list[str]:
    """Names of the views whose logits to average: the first, and each later one that raises the accuracy."""
    names = list(tried)
    kept, best = names[:1], find_hits(tried[names[0]], labels).mean()
    for name in names[1:]:
        together = average_views([tried[k] for k in [*kept, name]])
        accuracy = find_hits(together, labels).mean()
        if accuracy > best:
            kept, best = [*kept, name], accuracy
    return kept


@dataclass(frozen=True)
class Predictions:
    """Logits of a run's final model; the test arrays are empty if there are no test images."""

    validation_files: np.ndarray  # (N,) str, relative to the dataset's root
    validation_labels: np.ndarray  # (N,) int64
    validation_logits: np.ndarray  # (N, classes) float32
    test_ids: np.ndarray  # (M,) str
    test_logits: np.ndarray  # (M, classes) float32

    def __post_init__(self):
        kinds = {"files": np.str_, "ids": np.str_, "labels": np.int64, "logits": np.float32}
        for field in dataclasses.fields(self):
            kind = kinds[field.name.rpartition("_")[2]]
            object.__setattr__(self, field.name, np.asarray(getattr(self, field.name), dtype=kind))
        n, m, classes = len(self.validation_files), len(self.test_ids), self.validation_logits.shape[-1]
        shapes = [self.validation_labels.shape, self.validation_logits.shape, self.test_logits.shape]
        if shapes != [(n,), (n, classes), (m, classes)]:
            raise ValueError(f"{n} validation and {m} test images do not go with arrays of shapes {shapes}")

    @property
    def hits(self) -> np.ndarray:
        """(N,) bool: which validation images are classified correctly."""
        return find_hits(self.validation_logits, self.validation_labels)

    def count_confusions(self) -> np.ndarray:
        """(classes, classes) counts of validation images: row = label, column = predicted label."""
        classes = range(self.validation_logits.shape[1])
        return confusion_matrix(self.validation_labels, self.validation_logits.argmax(-1), labels=classes)

    def save(self, folder: Path) -> None:
        """Write predictions.npz into a run's folder, atomically."""
        content = io.BytesIO()
        np.savez_compressed(content, **{field.name: getattr(self, field.name) for field in dataclasses.fields(self)})
        write_atomically(folder / FILE_NAME, content.getvalue())

    @classmethod
    def load(cls, folder: Path) -> "Predictions":
        """Read a run's predictions.npz, unpickling nothing. Raises `UserError` if it is missing or damaged."""
        path = folder / FILE_NAME
        try:
            with np.load(path, allow_pickle=False) as arrays:
                return cls(**{field.name: arrays[field.name] for field in dataclasses.fields(cls)})
        except FileNotFoundError:
            raise UserError(f"{path}: does not exist; the run was not finished") from None
        except (OSError, ValueError, KeyError, EOFError, AttributeError, TypeError, zipfile.BadZipFile) as fault:
            raise UserError(f"{path}: is not a run's predictions ({' '.join(str(fault).split())})") from None


@dataclass(frozen=True)
class Reliability:
    """Mean confidence and accuracy in bins of equal width that hold images, and the expected calibration error."""

    confidence: np.ndarray
    accuracy: np.ndarray
    images: np.ndarray
    ece: float


def measure_reliability(probabilities: np.ndarray, labels: np.ndarray) -> Reliability:
    """Compare the top probability of each image, of (N, classes), with its accuracy (Guo et al. 2017)."""
    confidence, hits = probabilities.max(1), find_hits(probabilities, labels)
    bins = np.minimum((confidence * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)
    images = np.bincount(bins, minlength=CALIBRATION_BINS)
    kept = images > 0
    sums = np.bincount(bins, confidence, CALIBRATION_BINS)[kept], np.bincount(bins, hits, CALIBRATION_BINS)[kept]
    mean_confidence, accuracy = sums[0] / images[kept], sums[1] / images[kept]
    ece = float(np.abs(mean_confidence - accuracy) @ images[kept] / len(labels))
    return Reliability(mean_confidence, accuracy, images[kept], ece)


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """The temperature that minimizes the cross-entropy of logits (N, classes) / temperature against labels (N,)."""
    rows = np.arange(len(labels))

    def loss(log_temperature: float) -> float:
        return -log_softmax(logits / np.exp(log_temperature), axis=-1)[rows, labels].mean()

    bound = np.log(HIGHEST_TEMPERATURE)
    return float(np.exp(minimize_scalar(loss, bounds=(-bound, bound), method="bounded").x))


def measure_calibration(logits: np.ndarray, labels: np.ndarray) -> Calibration:
    """Calibration of logits (N, classes) against labels (N,) with temperature scaling (Guo et al. 2017).

    Scaling changes no predicted label, so the submission stays the same.
    """
    logits = np.asarray(logits, dtype=np.float64)
    scaled, first = np.empty_like(logits), np.arange(len(labels)) % 2 == 0
    # Each half is scaled with the temperature of the other, so the error is not measured where it was fitted.
    for half in (first, ~first):
        other = ~half if (~half).any() else half
        scaled[half] = logits[half] / fit_temperature(logits[other], labels[other])
    return Calibration(
        temperature=fit_temperature(logits, labels),
        ece=measure_reliability(softmax(logits, axis=-1), labels).ece,
        ece_scaled=measure_reliability(softmax(scaled, axis=-1), labels).ece,
    )


def order_classes(probabilities: np.ndarray, labels: np.ndarray) -> list[int]:
    """Labels in an order that puts classes which are confused with each other side by side.

    Leaves of an average-linkage tree over the mean probabilities (N, classes) of each class for the others.
    """
    classes = probabilities.shape[1]
    if classes < 3:
        return list(range(classes))
    shares = np.stack([probabilities[labels == c].sum(0) / max(1, (labels == c).sum()) for c in range(classes)])
    similarity = shares + shares.T
    np.fill_diagonal(similarity, 0)
    # The root spreads out the many small similarities, so that classes that are rarely confused are ordered too.
    distance = 1 - np.sqrt(similarity / max(similarity.max(), 1e-12))
    np.fill_diagonal(distance, 0)
    return leaves_list(linkage(squareform(distance, checks=False), "average", optimal_ordering=True)).tolist()


@dataclass(frozen=True)
class ClassScore:
    """Correct predictions of one class, and the class that it is confused with most, if any, with its count."""

    label: int
    images: int
    correct: int
    confused_with: int | None
    times: int

    @property
    def recall(self) -> float:
        return self.correct / self.images


def score_classes(confusions: np.ndarray) -> list[ClassScore]:
    """The score of every class that has images, from confusions (classes, classes); the lowest recall first."""
    wrong = confusions.copy()
    np.fill_diagonal(wrong, 0)
    scores = []
    for label in np.flatnonzero(confusions.sum(1)).tolist():
        other = int(wrong[label].argmax())
        times = int(wrong[label, other])
        correct, images = int(confusions[label, label]), int(confusions[label].sum())
        scores.append(ClassScore(label, images, correct, other if times else None, times))
    return sorted(scores, key=lambda s: (s.recall, -s.images, s.label))


@dataclass(frozen=True)
class ConfusedPair:
    """Two classes and how often images of each were predicted as the other."""

    first: int
    second: int
    first_as_second: int
    second_as_first: int

    @property
    def times(self) -> int:
        return self.first_as_second + self.second_as_first


def find_confused_pairs(confusions: np.ndarray, most: int) -> list[ConfusedPair]:
    """The pairs of classes that are confused most, in either direction; the first class has more of the mistakes."""
    rows, columns = np.nonzero(np.triu(confusions + confusions.T, k=1))
    pairs = []
    for a, b in zip(rows.tolist(), columns.tolist(), strict=True):
        first, second = (a, b) if confusions[a, b] >= confusions[b, a] else (b, a)
        pairs.append(ConfusedPair(first, second, int(confusions[first, second]), int(confusions[second, first])))
    return sorted(pairs, key=lambda p: (-p.times, -p.first_as_second, p.first, p.second))[:most]


def expect_counts(confusions: np.ndarray, images: int, shares: np.ndarray | None = None) -> np.ndarray:
    """(classes,) expected predictions of each label for `images` images, confused as the validation images are.

    `shares` are those of the classes (classes,); without them the classes are balanced.
    """
    sizes = confusions.sum(1)
    rates = np.divide(confusions, sizes[:, None], where=sizes[:, None] > 0, out=np.zeros(confusions.shape))
    weights = (sizes > 0) * (np.ones(len(sizes)) if shares is None else shares)
    return weights @ rates / max(weights.sum(), 1e-12) * images


def find_label_issues(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """(N,) bool: images whose label is likely wrong, by confident learning (Northcutt et al. 2021).

    The model predicts another class with at least the mean confidence that it has for images of that class, and the
    label is not among the five likeliest classes (the two likeliest of ten classes or fewer). If that holds for more
    than a tenth of the images, no label is an issue: a model that weak cannot judge labels.
    """
    classes = probabilities.shape[1]
    usual = np.array([probabilities[labels == c, c].mean() if (labels == c).any() else 2.0 for c in range(classes)])
    predicted = probabilities.argmax(1)
    own = probabilities[np.arange(len(labels)), labels]
    rank = (probabilities > own[:, None]).sum(1)
    confident = probabilities[np.arange(len(labels)), predicted] >= usual[predicted]
    issues = confident & (predicted != labels) & (rank >= (5 if classes > 10 else 2))
    return issues & (issues.mean() <= MAX_LABEL_ISSUES)


def sort_by_confidence(probabilities: np.ndarray, positions: np.ndarray) -> list[int]:
    """The positions, the highest top probability first."""
    return sorted(positions.tolist(), key=lambda p: (-probabilities[p].max(), p))


def balance_warning(labels: Sequence[int], num_classes: int) -> str | None:
    """A warning if the predictions are far from equally many per class, as the competition's test images are."""
    if not len(labels):
        return None
    counts = np.bincount(labels, minlength=num_classes)
    excess = np.clip(counts / counts.sum() - 1 / num_classes, 0, None).sum()
    # With few images, chance alone makes the classes unequal.
    if excess <= IMBALANCE_LIMIT + np.sqrt(num_classes / (2 * np.pi * counts.sum())):
        return None
    return (
        f"predictions are far from balanced: label {counts.argmax()} occurs {counts.max()} times "
        f"(expected about {counts.sum() / num_classes:.0f}), {(counts == 0).sum()} of {num_classes} labels never; "
        "are classes mixed up, or is this the unchanged template?"
    )
