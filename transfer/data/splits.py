"""Splits: which images are held out, and which are taken if fewer are wanted.

Every function depends on file names, labels and a seed alone, so that a split is the same on every machine.
"""

import hashlib
from collections import defaultdict
from collections.abc import Sequence

import datasets

from transfer.errors import UserError


def draw_order(files: Sequence[str], seed: int) -> list[int]:
    """Positions of the files in a random order that depends on the seed and the file names only."""

    def key(position: int) -> bytes:
        return hashlib.sha256(f"{seed}/{files[position]}".encode()).digest()

    return sorted(range(len(files)), key=key)


def positions_by_class(labels: Sequence[int]) -> list[list[int]]:
    """For each label that occurs, in label order, the positions that have it."""
    positions = defaultdict(list)
    for position, label in enumerate(labels):
        positions[label].append(position)
    return [positions[label] for label in sorted(positions)]


def split_validation(
    files: Sequence[str], labels: Sequence[int], fraction: float, split_seed: int
) -> tuple[list[int], list[int]]:
    """Positions (train, validation) of a stratified split.

    Every class gives round(fraction * its size) images to validation, at least one, and keeps at least one. Raises
    `UserError` for a class with a single image.
    """
    train, validation = [], []
    for positions in positions_by_class(labels):
        drawn = [positions[i] for i in draw_order([files[p] for p in positions], split_seed)]
        if len(drawn) < 2:
            raise UserError(
                f"{files[drawn[0]]}: is the only image of its class; a class needs at least two, one to train on and "
                "one to validate on"
            )
        held_out = min(max(1, round(fraction * len(drawn))), len(drawn) - 1)
        validation += drawn[:held_out]
        train += drawn[held_out:]
    return sorted(train), sorted(validation)


def split_fold(
    files: Sequence[str], labels: Sequence[int], fold: int, folds: int, split_seed: int
) -> tuple[list[int], list[int]]:
    """Positions (train, validation) of one fold, 1 to `folds`, of a stratified cross-validation.

    Every image is in the validation part of exactly one fold. Raises `UserError` for a class with fewer images than
    folds.
    """
    train, validation = [], []
    for positions in positions_by_class(labels):
        if len(positions) < folds:
            raise UserError(
                f"--kfold {folds}: the class of {files[positions[0]]} has only {len(positions)} images; every fold "
                "needs one image of each class"
            )
        drawn = [positions[i] for i in draw_order([files[p] for p in positions], split_seed)]
        validation += drawn[fold - 1 :: folds]
        train += [p for turn, p in enumerate(drawn) if turn % folds != fold - 1]
    return sorted(train), sorted(validation)


def take_evenly(positions: Sequence[int], files: Sequence[str], labels: Sequence[int], count: int) -> list[int]:
    """At most `count` of the positions, spread over the classes as evenly as their sizes allow."""
    rounds = []
    for members in positions_by_class([labels[p] for p in positions]):
        drawn = draw_order([files[positions[m]] for m in members], seed=0)
        rounds += [(turn, positions[members[i]]) for turn, i in enumerate(drawn)]
    return sorted(position for _, position in sorted(rounds)[:count])


def split_fingerprint(dataset: datasets.DatasetDict) -> str:
    """Hash of the file names in each split; the same wherever the dataset lies."""
    digest = hashlib.sha256()
    for name in ("train", "validation", "test"):
        if name in dataset:
            digest.update("\n".join([name, *dataset[name]["file"][:], ""]).encode())
    return digest.hexdigest()


def describe_splits(dataset: datasets.DatasetDict) -> str:
    """The number of images of each split."""
    return ", ".join(f"{name} {len(split)}" for name, split in dataset.items())
