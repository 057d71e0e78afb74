"""tiny-imagenet-100, as the competition hands it out, rebuilt from the public Tiny ImageNet-200."""

import hashlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from tqdm.auto import tqdm

from transfer import UserError
from transfer.data.layouts import TEMPLATE_NAME, ImageFolder, image_id_of, name_of
from transfer.submission import make_template, render_submission

CLASSES = 100
ANSWERS_NAME = "answers.csv"


def _check_source(folder: ImageFolder, destination: Path) -> None:
    if folder.label_order != "wnids.txt" or len(folder.wnids) <= CLASSES or not folder.validation_files:
        raise UserError(
            f"{folder.root}: is not Tiny ImageNet-200 as published: expected wnids.txt with 200 lines, "
            "train/<wnid>/images/*.JPEG and val/images/*.JPEG with val/val_annotations.txt"
        )
    if destination.exists():
        raise UserError(f"{destination}: is there already; name a new folder")


def _pair_files(folder: ImageFolder) -> Iterator[tuple[str, str]]:
    """(source, destination) of every image of the chosen classes, relative to the two roots."""
    for file, label in zip(folder.train_files, folder.train_labels, strict=True):
        if label < CLASSES:
            yield file, file
    for file, label in zip(folder.validation_files, folder.validation_labels, strict=True):
        if label < CLASSES:
            yield file, f"test/images/{name_of(file)}"


def _copy_images(folder: ImageFolder, destination: Path) -> None:
    pairs = list(_pair_files(folder))
    for place in {(destination / new).parent for _, new in pairs}:
        place.mkdir(parents=True, exist_ok=True)
    for old, new in tqdm(pairs, desc="copying", unit=" images", leave=False, disable=None):
        shutil.copyfile(f"{folder.root}/{old}", f"{destination}/{new}")


def _write_tables(folder: ImageFolder, destination: Path) -> None:
    """wnids.txt, words.txt, the template and what it asks for."""
    (destination / "wnids.txt").write_text("".join(f"{wnid}\n" for wnid in folder.wnids[:CLASSES]))
    if (folder.root / "words.txt").is_file():
        shutil.copyfile(folder.root / "words.txt", destination / "words.txt")
    labelled = zip(folder.validation_files, folder.validation_labels, strict=True)
    answers = {image_id_of(file): label for file, label in labelled if label < CLASSES}
    # In an order that has nothing to do with the labels, as the competition's template.
    template = make_template(sorted(answers, key=lambda image_id: hashlib.sha256(image_id.encode()).digest()))
    (destination / TEMPLATE_NAME).write_bytes(render_submission(template, dict.fromkeys(answers, 0)))
    (destination / ANSWERS_NAME).write_bytes(render_submission(template, answers))


def make_100(folder: ImageFolder, destination: Path) -> Path:
    """Build tiny-imagenet-100 from Tiny ImageNet-200; returns `destination`, which exists only whole.

    Its classes are the first 100 lines of wnids.txt. The published test images have no labels, not even which of the
    200 classes, so the test images here are the published validation images of these classes; the template names them
    with label 0 and answers.csv with the true one, to score a submission by. Raises `UserError`.
    """
    _check_source(folder, destination)
    unfinished = destination.with_name(f".{destination.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        unfinished.mkdir(parents=True)
        _copy_images(folder, unfinished)
        _write_tables(folder, unfinished)
        unfinished.rename(destination)
    except OSError as fault:
        raise UserError(f"{destination}: cannot be written ({fault.strerror or fault})") from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return destination
