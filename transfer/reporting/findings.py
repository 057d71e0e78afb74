"""What the report shows of a run's predictions: classes, pairs, mistakes and test images, with small pictures."""

import base64
import dataclasses
import io
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from PIL import Image
from scipy.special import softmax
from transformers import AutoImageProcessor

from transfer.config import RunArguments, card_names
from transfer.data.images import ImageGeometry, read_image, to_rgb, whole_pixels
from transfer.data.images.store import LARGEST_KEPT_SIDE
from transfer.data.layouts import ROOT_DEPTH
from transfer.data.listing import IMAGE_SUFFIXES, list_visible_folders
from transfer.data.sources import extract_zip
from transfer.data.tiny_imagenet import sample_data
from transfer.errors import UserError
from transfer.evaluation.metrics import measure
from transfer.evaluation.predictions import (
    average_probabilities,
    balance_warning,
    expect_counts,
    find_confused_pairs,
    find_label_issues,
    score_classes,
    sort_by_confidence,
)
from transfer.files import anonymize
from transfer.models.load import read_geometry
from transfer.reporting import RunResults
from transfer.reporting.charts import draw_histogram, percent
from transfer.transforms.evaluation import EvaluationTransform
from transfer.transforms.training import enough_pixels, make_train_transform, seeded_generator

PICTURE_SIZE = 128  # pixels of the longer side
JPEG_QUALITY = 80

# How many of each are shown, so that the page stays below 5 MB, and so that they fill the rows of a gallery.
PAIRS_SHOWN, CONFUSED_PER_PAIR, PICTURES_PER_PAIR = 8, 4, 6
MISTAKES_SHOWN, LABEL_ISSUES_LISTED = 24, 60
UNCERTAIN_SHOWN = 24
DIFFERENCES_SHOWN = 16
DEVIATIONS_SHOWN = 8
SMALLEST_SHARE = 0.05  # of a mixed image's label, to be named

# What numbers of images mean anything.
FEWEST_PER_CLASS = 5  # test images, on average: a rule of thumb for expected counts
FEWEST_OF_A_MEAN = 100  # images behind each of two mean confidences that are compared
UNLIKE = 0.05  # mean confidence below that of the validation images, from which on the page says so
BALANCED = 1.5  # most images of a class by fewest, up to which the classes are taken for balanced


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
    # A labeled image may have the same name as a test image, so the folders of labeled images are searched only for
    # what is nowhere else.
    labeled = {PurePosixPath(file).parts[0] for file in labeled_files}
    for skipped in (labeled, set()):
        for folder, folders, files in os.walk(root):
            if Path(folder) == root:
                folders[:] = [name for name in folders if name not in skipped]
            for name in files:
                stem, suffix = os.path.splitext(name)  # noqa: PTH122 - much faster than Path
                if suffix.lower() in IMAGE_SUFFIXES and {stem, name} & wanted:
                    place = (Path(folder) / name).relative_to(root).as_posix()
                    found |= {image_id: place for image_id in (stem, name) if image_id in wanted}
        wanted -= found.keys()
        if not wanted:
            break
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

    def read(self, file: str) -> Image.Image | None:
        """The RGB image; None if it cannot be read."""
        if self.root is None or ".." in PurePosixPath(file).parts or PurePosixPath(file).is_absolute():
            return None
        _, image = read_image(self.root, file)
        return None if image is None else image.convert("RGB")

    def show(self, file: str) -> str | None:
        """The image as a data URI of a few kilobytes; None if it cannot be read."""
        image = self.read(file)
        return None if image is None else encode_thumbnail(image)

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
        counts = run.record.get("train_counts")
        self.train_counts = None if counts is None else np.array(counts)  # (classes,) training images

    @property
    def is_balanced(self) -> bool:
        """Whether the classes have about equally many training images, as far as is known."""
        counts = self.train_counts
        return counts is None or counts.max() <= BALANCED * max(1, counts.min())


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
    """The class's correctly classified images, the most confident first."""
    return sort_by_confidence(
        found.probabilities, np.flatnonzero((found.labels == label) & (found.predicted == label))
    )


def _choose_for_pair(found: Findings, first: int, second: int) -> tuple[list[int], list[int]]:
    """(typical images of both classes, images confused); further typical ones take the place of missing others."""
    first_as_second = (found.labels == first) & (found.predicted == second)
    second_as_first = (found.labels == second) & (found.predicted == first)
    confused = sort_by_confidence(found.probabilities, np.flatnonzero(first_as_second | second_as_first))
    confused = confused[:CONFUSED_PER_PAIR]
    both = _typical(found, first), _typical(found, second)
    in_turn = [positions[i] for i in range(PICTURES_PER_PAIR) for positions in both if i < len(positions)]
    return in_turn[: PICTURES_PER_PAIR - len(confused)], confused


def show_pairs(found: Findings, album: Album) -> list[dict]:
    """The most confused pairs of classes, each with typical images of both classes and the images confused."""
    shown = []
    for pair in find_confused_pairs(found.confusions, PAIRS_SHOWN):
        typical, confused = _choose_for_pair(found, pair.first, pair.second)
        images = [describe_image(found, p) | {"typical": p in typical} for p in [*typical, *confused]]
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


def list_classes(found: Findings) -> list[dict]:
    """A row for every class, the lowest share of correct images first; classes without validation images come last."""
    predicted, rows = found.confusions.sum(0), []
    scores = {score.label: score for score in score_classes(found.confusions)}
    for label in [*scores, *(label for label in range(len(found.names)) if label not in scores)]:
        score = scores.get(label)
        other = score.confused_with if score else None
        rows.append(
            {
                "name": found.names[label],
                "train": None if found.train_counts is None else int(found.train_counts[label]),
                "images": score.images if score else 0,
                "correct": score.correct if score else 0,
                "recall": score.recall if score else None,
                "precision": found.confusions[label, label] / predicted[label] if predicted[label] else None,
                "confused_with": None if other is None else found.names[other],
                "times": score.times if score else 0,
            }
        )
    return rows


# Training images as the model saw them


def _prepare(
    images: Sequence[Image.Image], geometry: ImageGeometry, run: RunArguments
) -> torch.Tensor | list[torch.Tensor]:
    """The images as a training gets them: (N, 3, H, W) if small and of one size, else a list of whole ones."""
    if len({image.size for image in images}) == 1 and max(images[0].size) <= max(LARGEST_KEPT_SIDE, *geometry.crop):
        return torch.from_numpy(np.stack([to_rgb(image) for image in images])).permute(0, 3, 1, 2)
    side = run.decoded_side or enough_pixels(run.train_image_size or [geometry.crop[0]], run.min_crop_scale)
    return [torch.from_numpy(whole_pixels(image, side)).permute(2, 0, 1) for image in images]


def _draw_views(
    run: RunResults, images: Sequence[Image.Image], labels: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """(N, S, S, 3) uint8 and (N, classes): what the train transform makes of images and labels at the first step."""
    recorded, classes = run.record["arguments"], len(run.class_names)
    fields = {field.name for field in dataclasses.fields(RunArguments)} & recorded.keys()
    arguments = RunArguments(**{name: recorded[name] for name in fields})
    geometry = read_geometry(AutoImageProcessor.from_pretrained(run.folder / "model"))
    evaluation = EvaluationTransform(geometry)
    transform = make_train_transform(arguments, evaluation, classes)
    generator = seeded_generator(recorded.get("seed", 0), 0, 0, 0)
    values, targets = transform(_prepare(images, geometry, arguments), torch.tensor(labels), generator)
    if targets.ndim == 1:
        targets = torch.nn.functional.one_hot(targets, classes)
    values = values.flip(1) if geometry.bgr else values
    seen = ((values - evaluation.offset) / evaluation.scale).round().clamp(0, 255).byte()  # (N, 3, S, S)
    return seen.permute(0, 2, 3, 1).numpy(), targets.numpy()


def show_training_images(run: RunResults, album: Album) -> list[dict]:
    """The training images that run.json names, as the train transform showed them to the model."""
    read = [(album.read(file), label) for file, label in run.record.get("train_sample", {}).items()]
    images = [(image, label) for image, label in read if image is not None]
    if not images:
        return []
    try:
        views, targets = _draw_views(run, *zip(*images, strict=True))
    except (ImportError, OSError):  # the model's processor is missing, or needs a package that is not installed
        return []
    shown = []
    for view, target in zip(views, targets, strict=True):
        labels = [label for label in np.argsort(-target, kind="stable")[:2] if target[label] >= SMALLEST_SHARE]
        parts = [run.class_names[label] + f" {percent(target[label])}" * (len(labels) > 1) for label in labels]
        shown.append({"label": ", ".join(parts), "picture": encode_thumbnail(Image.fromarray(view))})
    return shown


# The test images


def _list_deviations(found: Findings, counts: np.ndarray) -> list[dict]:
    """The classes whose number of test predictions is farthest from the expected one."""
    expected = expect_counts(found.confusions, int(counts.sum()), found.train_counts)
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
    """The balance and confidence of the test predictions, and the least confident ones; None without test images.

    Without `deviating` there are too few test images to expect a number of predictions of each class.
    """
    probabilities, images = found.test_probabilities, len(found.run.predictions.test_ids)
    if not images:
        return None
    predicted, classes = probabilities.argmax(1), len(found.names)
    counts, shares = np.bincount(predicted, minlength=classes), found.train_counts
    equal = (
        np.full(classes, images / classes) if shares is None or found.is_balanced else shares / shares.sum() * images
    )
    confidence, usual = float(probabilities.max(1).mean()), float(found.probabilities.max(1).mean())
    enough = min(images, len(found.labels)) >= FEWEST_OF_A_MEAN
    return {
        "images": images,
        "histogram": draw_histogram(counts.tolist(), found.names, equal.tolist()),
        "balanced": found.is_balanced,
        "never": [found.names[label] for label in np.flatnonzero(counts == 0)],
        "warning": balance_warning(predicted, classes) if found.is_balanced else None,
        "deviating": _list_deviations(found, counts) if images >= FEWEST_PER_CLASS * classes else [],
        "confidence": confidence,
        "validation_confidence": usual,
        "unlike": enough and confidence < usual - UNLIKE,
        "uncertain": _show_uncertain(found, album),
    }


# Two runs


def _recalls(run: RunResults) -> tuple[np.ndarray, np.ndarray]:
    """(classes,) each: how many validation images every class has, and how many of them are classified correctly."""
    confusions = run.predictions.count_confusions()
    return confusions.sum(1), confusions.diagonal()


def compare_classes(first: RunResults, second: RunResults) -> list[dict]:
    """The correct validation images of every class by two runs on the same images, the largest difference first."""
    images, ours = _recalls(first)
    _, theirs = _recalls(second)
    rows = [
        {"name": name, "images": int(n), "first": int(a), "second": int(b), "gain": int(b) - int(a)}
        for name, n, a, b in zip(first.class_names, images, ours, theirs, strict=True)
    ]
    return sorted(rows, key=lambda row: (-abs(row["gain"]), -row["gain"], row["name"]))


def list_differing_settings(first: RunResults, second: RunResults) -> list[tuple[str, str, str]]:
    """Arguments, precision and hardware that differ between two runs, as text."""
    names = ["data_dir", "dataset_name", "model_name_or_path", *card_names("setting"), *card_names("ingredient")]
    pairs = [(name, first.record["arguments"].get(name), second.record["arguments"].get(name)) for name in names]
    pairs += [(name, first.record.get(name), second.record.get(name)) for name in ("precision", "device")]

    def describe(value) -> str:
        return "–" if value is None else anonymize(str(value))

    return [(name, describe(a), describe(b)) for name, a, b in pairs if a != b]


def show_differences(
    first: RunResults, second: RunResults, order: np.ndarray, other: np.ndarray, album: Album
) -> dict:
    """Images that only one of two runs classifies correctly, and the accuracy of both together.

    `order` and `other` are the positions of the same images in both runs.
    """
    ours, theirs = Findings(first), Findings(second)
    labels, hits = ours.labels[order], (first.predictions.hits[order], second.predictions.hits[other])
    logits = first.predictions.validation_logits[order], second.predictions.validation_logits[other]

    def show_images(wrong: Findings, positions: np.ndarray, missed: np.ndarray) -> list[dict]:
        shown = sort_by_confidence(wrong.probabilities, positions[missed])[:DIFFERENCES_SHOWN]
        images = [describe_image(wrong, position) for position in shown]
        return [image | {"picture": album.show(image["file"])} for image in images]

    return {
        "ensemble": measure(average_probabilities(logits), labels),
        "both_wrong": int((~hits[0] & ~hits[1]).sum()),
        "only_first": show_images(theirs, other, hits[0] & ~hits[1]),
        "only_second": show_images(ours, order, hits[1] & ~hits[0]),
    }
