"""What the report shows of a run's predictions: classes, pairs, mistakes and test images, with small pictures."""

import base64
import io
import os
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image
from scipy.special import softmax

from transfer.data.images import read_image
from transfer.data.layouts import ROOT_DEPTH
from transfer.data.listing import IMAGE_SUFFIXES, list_visible_folders
from transfer.data.sources import extract_zip
from transfer.data.tiny_imagenet import sample_data
from transfer.errors import UserError
from transfer.evaluation.predictions import (
    balance_warning,
    expect_counts,
    find_confused_pairs,
    find_label_issues,
    score_classes,
    sort_by_confidence,
)
from transfer.reporting import RunResults
from transfer.reporting.charts import draw_histogram

PICTURE_SIZE = 96  # pixels of the longer side
JPEG_QUALITY = 80

# How many of each are shown, so that the page stays below 5 MB.
CLASSES_SHOWN = 10
PAIRS_SHOWN, PICTURES_PER_PAIR = 8, 4
MISTAKES_SHOWN, LABEL_ISSUES_LISTED = 24, 60
UNCERTAIN_SHOWN = 24
DEVIATIONS_SHOWN = 8


def find_data_root(data_dir: str, known_file: str) -> Path:
    """The root of a dataset, given as a folder, a zip or `sample`: the folder below which `known_file` lies.

    Raises `UserError` if the dataset does not hold that file.
    """
    path = Path(data_dir).expanduser()
    if data_dir == "sample":
        path = sample_data()
    elif path.is_file():
        path = extract_zip(path)
    if not path.is_dir():
        raise UserError(f"{data_dir}: no such folder or zip; give the dataset of this run with --data_dir")
    folders = [path]
    for _ in range(ROOT_DEPTH + 1):
        for root in folders:
            if (root / known_file).is_file():
                return root
        folders = [folder / name for folder in folders for name in list_visible_folders(folder)]
    raise UserError(f"{data_dir}: is not this run's dataset: it does not hold {known_file}")


def find_test_files(root: Path, ids: Iterable[str], labeled_files: Iterable[str]) -> dict[str, str]:
    """Files of test images by id: the file name with or without its suffix. An id without a file is left out."""
    wanted = set(ids)
    found: dict[str, str] = {}
    # A labeled image may have the same name as a test image, so the folders of labeled images are skipped.
    labeled = {PurePosixPath(file).parts[0] for file in labeled_files}
    for folder, folders, files in os.walk(root):
        if Path(folder) == root:
            folders[:] = [name for name in folders if name not in labeled]
        for name in files:
            stem, suffix = os.path.splitext(name)  # noqa: PTH122 - much faster than Path
            if suffix.lower() in IMAGE_SUFFIXES:
                place = (Path(folder) / name).relative_to(root).as_posix() if {stem, name} & wanted else ""
                found |= {image_id: place for image_id in (stem, name) if image_id in wanted}
    return found


def encode_thumbnail(image: Image.Image, size: int = PICTURE_SIZE) -> str:
    """A small copy of an RGB image, with a longer side of at most `size` pixels, as a data URI."""
    image = image.copy()
    image.thumbnail((size, size), Image.Resampling.LANCZOS)
    content = io.BytesIO()
    image.save(content, "JPEG", quality=JPEG_QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(content.getvalue()).decode()}"


class Album:
    """Small pictures of the images below a root; without a root there are none."""

    def __init__(self, root: Path | None, test_files: Mapping[str, str] | None = None):
        self.root, self.test_files = root, test_files or {}

    def show(self, file: str) -> str | None:
        """The image as a data URI of a few kilobytes; None if it cannot be read."""
        if self.root is None or ".." in PurePosixPath(file).parts or PurePosixPath(file).is_absolute():
            return None
        _, image = read_image(self.root, file)
        if image is None:
            return None
        return encode_thumbnail(image.convert("RGB"))

    def show_test(self, image_id: str) -> str | None:
        """The test image with this id, as a data URI; None if it cannot be read."""
        return self.show(self.test_files[image_id]) if image_id in self.test_files else None


class Findings:
    """A run's predictions with what is computed from them once for the whole report."""

    def __init__(self, run: RunResults):
        self.run, predictions = run, run.predictions
        self.labels, self.names = predictions.validation_labels, run.class_names
        self.probabilities = softmax(predictions.validation_logits.astype(np.float64), axis=1)
        self.predicted = self.probabilities.argmax(1)
        self.confusions = predictions.count_confusions()
        self.test_probabilities = softmax(predictions.test_logits.astype(np.float64), axis=1)


def describe_image(found: Findings, position: int) -> dict:
    """The caption of a validation image."""
    label, predicted = found.labels[position], found.predicted[position]
    return {
        "file": str(found.run.predictions.validation_files[position]),
        "label": found.names[label],
        "predicted": found.names[predicted],
        "confidence": found.probabilities[position, predicted],
        "label_probability": found.probabilities[position, label],
    }


def show_mistakes(found: Findings, album: Album) -> dict:
    """The most confident mistakes with their pictures, and the files with a suspected wrong label."""
    mistakes = sort_by_confidence(found.probabilities, np.flatnonzero(found.predicted != found.labels))
    issues = find_label_issues(found.probabilities, found.labels)
    shown = [describe_image(found, p) | {"label_issue": bool(issues[p])} for p in mistakes[:MISTAKES_SHOWN]]
    listed = [describe_image(found, p) for p in mistakes if issues[p]]
    return {
        "count": len(mistakes),
        "shown": [image | {"picture": album.show(image["file"])} for image in shown],
        "label_issues": listed[:LABEL_ISSUES_LISTED],
        "label_issue_count": len(listed),
    }


def _typical(found: Findings, label: int) -> list[int]:
    """The most confident of a class's correctly classified images, if there is one."""
    correct = np.flatnonzero((found.labels == label) & (found.predicted == label))
    return sort_by_confidence(found.probabilities, correct)[:1]


def show_pairs(found: Findings, album: Album) -> list[dict]:
    """The most confused pairs of classes, each with a typical image of both classes and the images confused."""
    shown = []
    for pair in find_confused_pairs(found.confusions, PAIRS_SHOWN):
        first_as_second = (found.labels == pair.first) & (found.predicted == pair.second)
        second_as_first = (found.labels == pair.second) & (found.predicted == pair.first)
        confused = sort_by_confidence(found.probabilities, np.flatnonzero(first_as_second | second_as_first))
        typical = [*_typical(found, pair.first), *_typical(found, pair.second)]
        positions = [*typical, *confused[:PICTURES_PER_PAIR]]
        images = [describe_image(found, p) | {"typical": p in typical} for p in positions]
        shown.append(
            {
                "first": found.names[pair.first],
                "second": found.names[pair.second],
                "first_as_second": pair.first_as_second,
                "second_as_first": pair.second_as_first,
                "images": [image | {"picture": album.show(image["file"])} for image in images],
            }
        )
    return shown


def list_classes(found: Findings) -> dict:
    """Tables of the worst and the best classes by their heading; a single table if there are few classes."""
    rows = [
        {
            "name": found.names[s.label],
            "correct": s.correct,
            "images": s.images,
            "recall": s.recall,
            "confused_with": None if s.confused_with is None else found.names[s.confused_with],
            "times": s.times,
        }
        for s in score_classes(found.confusions)
    ]
    if len(rows) <= 2 * CLASSES_SHOWN:
        return {"All classes, worst first": rows}
    return {"Worst classes": rows[:CLASSES_SHOWN], "Best classes": rows[::-1][:CLASSES_SHOWN]}


def _list_deviations(found: Findings, counts: np.ndarray) -> list[dict]:
    """The classes whose number of test predictions is farthest from the expected one."""
    expected = expect_counts(found.confusions, int(counts.sum()))
    surprise = np.abs(counts - expected) / np.sqrt(expected + 1)
    return [
        {"name": found.names[label], "count": int(counts[label]), "expected": float(expected[label])}
        for label in np.argsort(-surprise, kind="stable")[:DEVIATIONS_SHOWN].tolist()
    ]


def _show_uncertain(found: Findings, album: Album) -> list[dict]:
    """The least confident test predictions, each with its two likeliest classes."""
    probabilities, ids = found.test_probabilities, found.run.predictions.test_ids
    return [
        {
            "id": str(ids[p]),
            "guesses": [(found.names[c], probabilities[p, c]) for c in np.argsort(-probabilities[p])[:2]],
            "picture": album.show_test(str(ids[p])),
        }
        for p in np.argsort(probabilities.max(1), kind="stable")[:UNCERTAIN_SHOWN].tolist()
    ]


def show_test(found: Findings, album: Album) -> dict | None:
    """The balance and confidence of the test predictions, and the least confident ones; None without test images."""
    probabilities, images = found.test_probabilities, len(found.run.predictions.test_ids)
    if not images:
        return None
    predicted, classes = probabilities.argmax(1), len(found.names)
    counts = np.bincount(predicted, minlength=classes)
    return {
        "images": images,
        "histogram": draw_histogram(counts.tolist(), found.names, images / classes),
        "balanced": images / classes,
        "never": [found.names[label] for label in np.flatnonzero(counts == 0)],
        "warning": balance_warning(predicted, classes),
        "deviating": _list_deviations(found, counts),
        "confidence": float(probabilities.max(1).mean()),
        "validation_confidence": float(found.probabilities.max(1).mean()),
        "uncertain": _show_uncertain(found, album),
    }
