"""What predictions tell about classes, mistakes, labels and confidence: numbers alone, no pictures.

What the page shows of a run's predictions: classes, pairs, mistakes and test images, with their pictures.
"""

import base64
import io
import os
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image
from scipy.special import softmax

from transfer.data.images import read_image
from transfer.data.layouts import IMAGE_SUFFIXES
from transfer.data.sources import extract_zip
from transfer.data.tiny_imagenet import sample_data
from transfer.errors import UserError
from transfer.evaluation.comparison import RunResults
from transfer.evaluation.metrics import (
    count_confusions,
    doubt_labels,
    expect_counts,
    find_confused_pairs,
    most_confident,
    score_classes,
)
from transfer.reporting.charts import draw_histogram
from transfer.submission import balance_warning

SIDE = 96  # pixels of the longer side


JPEG_QUALITY = 80


def find_data_root(data_dir: str, known_file: str) -> Path:
    """Where a data set's files lie: the folder, the zip unpacked, or `sample`, that holds `known_file`.

    Raises `UserError` where it does not.
    """
    path = Path(data_dir).expanduser()
    if data_dir == "sample":
        path = sample_data()
    elif path.is_file():
        path = extract_zip(path)
    if not path.is_dir():
        raise UserError(f"{data_dir}: no such folder or zip; --data_dir names the data set of this run")
    inside = [folder for folder in sorted(path.iterdir()) if folder.is_dir()]
    for root in (path, *inside):
        if (root / known_file).is_file():
            return root
    raise UserError(f"{data_dir}: is not this run's data set: {known_file} is not there")


def find_test_files(root: Path, ids: Iterable[str], labelled_files: Iterable[str]) -> dict[str, str]:
    """Files of test images by id, which is a file's name with or without its ending; absent where there is none."""
    wanted, found = set(ids), {}
    # A labelled image may bear the same name as a test image.
    labelled = {PurePosixPath(file).parts[0] for file in labelled_files}
    for folder, folders, files in os.walk(root):
        if Path(folder) == root:
            folders[:] = [name for name in folders if name not in labelled]
        for name in files:
            stem, suffix = os.path.splitext(name)  # noqa: PTH122 - of every test image
            if suffix.lower() in IMAGE_SUFFIXES:
                place = (Path(folder) / name).relative_to(root).as_posix() if {stem, name} & wanted else ""
                found |= {image_id: place for image_id in (stem, name) if image_id in wanted}
    return found


class Album:
    """Pictures of files below a root; of nothing where the root is None."""

    def __init__(self, root: Path | None, test_files: Mapping[str, str] | None = None):
        self.root, self.test_files = root, test_files or {}

    def show(self, file: str) -> str | None:
        """The image as a data URI of a few kilobytes; None where it cannot be shown."""
        if self.root is None or ".." in PurePosixPath(file).parts or PurePosixPath(file).is_absolute():
            return None
        _, image = read_image(self.root, file)
        if image is None:
            return None
        image = image.convert("RGB")
        image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
        content = io.BytesIO()
        image.save(content, "JPEG", quality=JPEG_QUALITY)
        return f"data:image/jpeg;base64,{base64.b64encode(content.getvalue()).decode()}"

    def show_test(self, image_id: str) -> str | None:
        """The test image of that id, as `show` gives it."""
        return self.show(self.test_files[image_id]) if image_id in self.test_files else None


# How much of each is shown: the page stays under 5 MB, and readable.
CLASSES_SHOWN = 10
PAIRS_SHOWN, PICTURES_A_PAIR = 8, 4
MISTAKES_SHOWN, DOUBTED_FILES_LISTED = 24, 60
UNSURE_SHOWN = 24
DEVIATIONS_SHOWN = 8


class Findings:
    """A run's predictions, seen from every side that the page shows."""

    def __init__(self, run: RunResults):
        self.run, predictions = run, run.predictions
        self.labels, self.names = predictions.validation_labels, run.class_names
        self.probabilities = softmax(predictions.validation_logits.astype(np.float64), axis=1)
        self.said = self.probabilities.argmax(1)
        self.confusions = count_confusions(self.labels, self.said, len(self.names))
        self.test_probabilities = softmax(predictions.test_logits.astype(np.float64), axis=1)


def describe_image(found: Findings, position: int) -> dict:
    """Words below the picture of a validation image."""
    label, said = found.labels[position], found.said[position]
    return {
        "file": str(found.run.predictions.validation_files[position]),
        "label": found.names[label],
        "said": found.names[said],
        "confidence": found.probabilities[position, said],
        "label_probability": found.probabilities[position, label],
    }


def show_mistakes(found: Findings, album: Album) -> dict:
    """The most confident mistakes with their pictures, and the files whose label is in doubt."""
    wrong = most_confident(found.probabilities, np.flatnonzero(found.said != found.labels))
    doubted = doubt_labels(found.probabilities, found.labels)
    shown = [describe_image(found, p) | {"doubted": bool(doubted[p])} for p in wrong[:MISTAKES_SHOWN]]
    listed = [describe_image(found, p) for p in wrong if doubted[p]]
    return {
        "count": len(wrong),
        "shown": [image | {"picture": album.show(image["file"])} for image in shown],
        "doubted": listed[:DOUBTED_FILES_LISTED],
        "doubted_count": len(listed),
    }


def _typical(found: Findings, label: int) -> list[int]:
    """The image of a class that was recognised most surely, if any was."""
    right = np.flatnonzero((found.labels == label) & (found.said == label))
    return most_confident(found.probabilities, right)[:1]


def show_pairs(found: Findings, album: Album) -> list[dict]:
    """The most confused pairs of classes, each with a typical image of both and with images taken wrongly."""
    shown = []
    for pair in find_confused_pairs(found.confusions, PAIRS_SHOWN):
        there = (found.labels == pair.first) & (found.said == pair.second)
        back = (found.labels == pair.second) & (found.said == pair.first)
        taken = most_confident(found.probabilities, np.flatnonzero(there | back))[:PICTURES_A_PAIR]
        typical = [*_typical(found, pair.first), *_typical(found, pair.second)]
        images = [describe_image(found, p) | {"typical": p in typical} for p in [*typical, *taken]]
        shown.append(
            {
                "first": found.names[pair.first],
                "second": found.names[pair.second],
                "there": pair.first_as_second,
                "back": pair.second_as_first,
                "images": [image | {"picture": album.show(image["file"])} for image in images],
            }
        )
    return shown


def list_classes(found: Findings) -> dict:
    """The worst and the best classes; of few classes all, the worst first."""
    scores = score_classes(found.confusions)
    rows = [
        {
            "name": found.names[s.label],
            "right": s.right,
            "images": s.images,
            "recall": s.recall,
            "taken_for": None if s.taken_for is None else found.names[s.taken_for],
            "times": s.times,
        }
        for s in scores
    ]
    if len(rows) <= 2 * CLASSES_SHOWN:
        return {"All classes, the worst first": rows}
    return {"Worst classes": rows[:CLASSES_SHOWN], "Best classes": rows[::-1][:CLASSES_SHOWN]}


def show_test(found: Findings, album: Album) -> dict | None:
    """Predictions of the test images: their balance, and the least confident ones; None without test images."""
    probabilities, ids = found.test_probabilities, found.run.predictions.test_ids
    if not len(ids):
        return None
    said, classes = probabilities.argmax(1), len(found.names)
    counts, expected = (
        np.bincount(said, minlength=classes),
        expect_counts(found.confusions, len(ids)),
    )
    surprise = np.abs(counts - expected) / np.sqrt(expected + 1)
    deviating = np.argsort(-surprise, kind="stable")[:DEVIATIONS_SHOWN].tolist()
    unsure = np.argsort(probabilities.max(1), kind="stable")[:UNSURE_SHOWN].tolist()
    return {
        "images": len(ids),
        "histogram": draw_histogram(counts.tolist(), found.names, len(ids) / classes),
        "equal": len(ids) / classes,
        "never": [found.names[label] for label in np.flatnonzero(counts == 0)],
        "warning": balance_warning(said, classes),
        "deviating": [
            {"name": found.names[d], "count": int(counts[d]), "expected": float(expected[d])} for d in deviating
        ],
        "confidence": float(probabilities.max(1).mean()),
        "validation_confidence": float(found.probabilities.max(1).mean()),
        "unsure": [
            {
                "id": str(ids[p]),
                "guesses": [(found.names[c], probabilities[p, c]) for c in np.argsort(-probabilities[p])[:2]],
                "picture": album.show_test(str(ids[p])),
            }
            for p in unsure
        ],
    }
