"""Splits: which images are held out, and which are taken if fewer are wanted.

Every split depends on file names, their bytes, labels and a seed alone, so that it is the same on every machine.
"""

import functools
import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Sequence, Set
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from transfer.config import RunArguments
from transfer.data.images.store import listing_key
from transfer.data.layouts import DatasetFiles
from transfer.errors import UserError
from transfer.files import datasets_cache, recall, remember


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


def find_contents(root: Path, files: Sequence[str]) -> list[str]:
    """A key of each file's bytes: two files have the same key only if they are byte-identical copies.

    Only files of equal size are read. The keys are kept in the datasets cache until the files change.
    """
    return list(_find_contents(root, tuple(files), listing_key(root, files)))


@functools.lru_cache(maxsize=2)
def _find_contents(root: Path, files: tuple[str, ...], key: str) -> list[str]:
    kept = datasets_cache("contents") / f"{key}.json"
    contents = recall(kept)
    if isinstance(contents, list) and len(contents) == len(files):
        return contents
    sizes = [_size_of(f"{root}/{file}") for file in files]
    shared = {size for size, count in Counter(sizes).items() if count > 1}
    digests = [
        _digest_of(f"{root}/{file}") if size in shared else file for file, size in zip(files, sizes, strict=True)
    ]
    contents = [digest or file for digest, file in zip(digests, files, strict=True)]
    if None not in digests:  # a file that cannot be read now may be readable next time
        remember(kept, contents)
    return contents


def _size_of(path: str) -> int:
    try:
        return os.stat(path).st_size  # noqa: PTH116 - Path.stat of 50,000 files takes a second longer
    except OSError:
        return -1  # reported, with the reason, when the image is decoded


def _digest_of(path: str) -> str | None:
    try:
        with open(path, "rb", buffering=0) as file:  # noqa: PTH123 - as above
            return hashlib.blake2b(file.read(), digest_size=16).hexdigest()
    except OSError:
        return None


def find_units(data: DatasetFiles) -> list[str]:
    """A key of each training image: images that must stay on one side of a split have the same key.

    They are copies of each other, or belong to one group of the dataset's table.
    """
    contents = find_contents(data.root, data.train_files)
    if not data.train_groups:
        return contents
    count = len(contents)
    by_content, by_group = (np.unique(keys, return_inverse=True)[1] for keys in (contents, data.train_groups))
    # Images are the nodes 0 to count - 1 of a graph; their contents, then their groups, follow.
    images, keys = np.tile(np.arange(count), 2), np.concatenate([by_content + count, by_group + 2 * count])
    graph = coo_array((np.ones(2 * count), (images, keys)), shape=(3 * count, 3 * count))
    return [str(part) for part in connected_components(graph, directed=False)[1][:count]]


def find_copies(contents: Sequence[str]) -> list[list[int]]:
    """Positions of the files that have the same content, for every content that more than one file has."""
    positions = defaultdict(list)
    for position, content in enumerate(contents):
        positions[content].append(position)
    return [group for group in positions.values() if len(group) > 1]


def find_straddling(copies: Sequence[Sequence[int]], held_out: Set[int]) -> list[Sequence[int]]:
    """The groups of copies that have members on both sides of a split."""
    return [group for group in copies if 0 < sum(p in held_out for p in group) < len(group)]


@dataclass(frozen=True)
class CopyCounts:
    """Pictures that byte-identical training images show, and what the split does with them."""

    pictures: int  # that occur more than once
    images: int  # that show them
    with_several_labels: int  # of the pictures
    moved: int  # pictures whose copies a split by file names alone would have put on both sides
    published: int  # validation images, as published, that are also training images

    @property
    def text(self) -> str:
        """The counts in words."""
        parts = [
            f"{self.pictures} picture{'s occur' if self.pictures != 1 else ' occurs'} more than once in train "
            f"({self.images} images), "
            f"{self.with_several_labels} of them with several labels"
        ]
        if self.moved:
            parts.append(f"{self.moved} moved to one side of the validation split")
        if self.published:
            parts.append(f"{self.published} validation images are also in train")
        return "; ".join(parts)


def count_copies(data: DatasetFiles, fraction: float, split_seed: int, is_split: bool = True) -> CopyCounts | None:
    """Count byte-identical images of a dataset; None if there are none. `is_split`: one split is held out of train."""
    files, labels = data.train_files, data.train_labels
    contents = find_contents(data.root, files + data.validation_files)
    train, published = contents[: len(files)], contents[len(files) :]
    known = set(train)
    copies, repeated = find_copies(train), sum(content in known for content in published)
    if not copies and not repeated:
        return None
    moved: list = []
    if is_split and not published:
        moved = find_straddling(copies, set(split_validation(files, labels, fraction, split_seed)[1]))
    several = sum(len({labels[p] for p in group}) > 1 for group in copies)
    return CopyCounts(len(copies), sum(map(len, copies)), several, len(moved), repeated)


def _hold_out_of_class(
    files: Sequence[str], contents: Sequence[str], positions: Sequence[int], count: int, seed: int
) -> list[int]:
    """The positions of one class that are held out: about `count`, copies together, never all of them."""
    units: dict[str, list[int]] = {}  # by content, in the order in which their first members are drawn
    for i in draw_order([files[p] for p in positions], seed):
        units.setdefault(contents[positions[i]], []).append(positions[i])
    taken: list[int] = []
    for unit in list(units.values())[:-1]:  # the last one is trained on
        if len(taken) + len(unit) <= count:
            taken += unit
    if not taken and len(units) > 1:
        taken = min(units.values(), key=len)
    return taken


def _join_labels(
    files: Sequence[str], labels: Sequence[int], contents: Sequence[str], held_out: set[int], seed: int
) -> None:
    """Move copies that have several labels to the side of the one that is drawn first.

    They go to the training side where a class would have no other image there.
    """
    trained = Counter(label for position, label in enumerate(labels) if position not in held_out)
    for group in find_straddling(find_copies(contents), held_out):
        first = group[draw_order([files[p] for p in group], seed)[0]]
        moved = Counter(labels[p] for p in group if p not in held_out)
        if first in held_out and all(trained[label] > count for label, count in moved.items()):
            held_out.update(group)
            trained -= moved
        else:
            trained.update(labels[p] for p in group if p in held_out)
            held_out.difference_update(group)


def split_validation(
    files: Sequence[str],
    labels: Sequence[int],
    fraction: float,
    split_seed: int,
    contents: Sequence[str] | None = None,
) -> tuple[list[int], list[int]]:
    """Positions (train, validation) of a stratified split; files of the same content are on one side of it.

    Every class gives round(fraction * its size) images to validation, at least one, and keeps at least one. A class
    with a single image, or with copies of one image alone, keeps it. Raises `UserError` if there is no other class.
    """
    contents = files if contents is None else contents
    held_out: set[int] = set()
    for positions in positions_by_class(labels):
        count = max(1, round(fraction * len(positions)))
        held_out.update(_hold_out_of_class(files, contents, positions, count, split_seed))
    _join_labels(files, labels, contents, held_out, split_seed)
    if not held_out:
        raise UserError(
            f"{files[0]}: is the only image of its class, as in every class, so that none can be held out to validate "
            "on; add images, or a folder val/<class>/*"
        )
    return [p for p in range(len(files)) if p not in held_out], sorted(held_out)


def _deal_images(
    files: Sequence[str], labels: Sequence[int], contents: Sequence[str], folds: int, seed: int
) -> dict[int, int]:
    """The fold of each position: those of a class are dealt out, then copies join the one that is drawn first."""
    fold_of: dict[int, int] = {}
    for positions in positions_by_class(labels):
        drawn = draw_order([files[p] for p in positions], seed)
        fold_of |= {positions[i]: turn % folds + 1 for turn, i in enumerate(drawn)}
    for group in find_copies(contents):
        first = group[draw_order([files[p] for p in group], seed)[0]]
        fold_of |= dict.fromkeys(group, fold_of[first])
    return fold_of


def _balance_groups(
    files: Sequence[str], labels: Sequence[int], groups: Sequence[str], folds: int, seed: int
) -> dict[int, int]:
    """The fold of each position, such that a group is in one fold and each fold has its share of every class.

    The largest group comes first. Each goes where there are least of its classes, and of such folds to the smallest.
    """
    members = defaultdict(list)
    for i in draw_order(files, seed):
        members[groups[i]].append(i)
    size, counts = Counter(labels), [Counter[int]() for _ in range(folds)]
    fold_of: dict[int, int] = {}
    for group in sorted(members.values(), key=len, reverse=True):
        added = Counter(labels[p] for p in group)

        def cost(fold: int, added: Counter[int] = added) -> tuple[float, int]:
            there = counts[fold]
            return sum(there[label] * count / size[label] ** 2 for label, count in added.items()), there.total()

        chosen = min(range(folds), key=cost)
        counts[chosen] += added
        fold_of |= dict.fromkeys(group, chosen + 1)
    return fold_of


def split_fold(
    files: Sequence[str],
    labels: Sequence[int],
    fold: int,
    folds: int,
    split_seed: int,
    contents: Sequence[str] | None = None,
    has_groups: bool = False,
) -> tuple[list[int], list[int]]:
    """Positions (train, validation) of one fold, 1 to `folds`, of a stratified cross-validation.

    Every image is in the validation part of exactly one fold, and copies are in the same one; with `has_groups`, the
    contents are those of groups, which may be large. Raises `UserError` for a class with fewer images than folds, and
    for one whose images are all in one fold.
    """
    contents = files if contents is None else contents
    for positions in positions_by_class(labels):
        if len(positions) < folds:
            raise UserError(
                f"--kfold {folds}: the class of {files[positions[0]]} has only {len(positions)} images; every fold "
                "needs one image of each class"
            )
    share_out = _balance_groups if has_groups else _deal_images
    fold_of = share_out(files, labels, contents, folds, split_seed)
    if empty := set(range(1, folds + 1)) - set(fold_of.values()):
        raise UserError(
            f"--kfold {folds}: fold {min(empty)} would have no image, since copies, and images of one group, stay in "
            "one fold; use fewer folds"
        )
    for positions in positions_by_class(labels):
        if len({fold_of[p] for p in positions}) == 1:
            raise UserError(
                f"--kfold {folds}: almost all images of the class of {files[positions[0]]} are copies or one group, "
                "so that one fold would hold them all; remove copies, or use fewer folds"
            )
    order = range(len(files))
    return [p for p in order if fold_of[p] != fold], [p for p in order if fold_of[p] == fold]


FEW_IMAGES = 3  # of a class, in training and validation
IMBALANCE = 10  # the largest class's size over the smallest one's, above which it is said


def describe_imbalance(class_ids: Sequence[str], labels: Sequence[int]) -> list[str]:
    """A line about classes of very different sizes, with a remedy; nothing if they are not."""
    counts = Counter(labels).most_common()
    (largest, most), (smallest, least) = counts[0], counts[-1]
    if most <= IMBALANCE * least:
        return []
    return [
        f"imbalance   class {class_ids[largest]} has {most} training images, {class_ids[smallest]} has {least}: "
        "consider --class_weights balanced and --metric_for_best_model macro_f1"
    ]


def describe_small_classes(class_ids: Sequence[str], dataset: datasets.DatasetDict) -> list[str]:
    """Warnings about classes that have few images, or none to validate on, with a remedy."""
    train, validation = (Counter(dataset[split]["label"][:]) for split in ("train", "validation"))
    counts = {name: train[label] + validation[label] for label, name in enumerate(class_ids)}
    unseen = [name for label, name in enumerate(class_ids) if not validation[label]]
    few = [name for name, count in counts.items() if count <= FEW_IMAGES and name not in unseen]
    lines = []
    for names, fault in (
        (unseen, "too few images to validate on: trained on, but not measured"),
        (few, f"{FEW_IMAGES} images or fewer: their accuracy means little"),
    ):
        if names:
            number = f"{len(names)} classes have" if len(names) > 1 else "1 class has"
            shown = ", ".join(f"{name} ({counts[name]})" for name in names[:5]) + ", ..." * (len(names) > 5)
            lines.append(f"warning     {number} {fault}; add images: {shown}")
    return lines


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


def describe_data(run: RunArguments, data: DatasetFiles, dataset: datasets.DatasetDict) -> str:
    """The dataset in one line: its name, classes and images."""
    if run.kfold and not run.fold:  # each fold has its own split
        counts = f"{len(data.train_files):,} in {run.kfold} folds, {len(data.test_files):,} test"
    else:
        short = {"validation": "val"}  # fits 80 columns
        counts = ", ".join(f"{len(split):,} {short.get(name, name)}" for name, split in dataset.items())
    name = run.dataset_name or Path(run.data_dir or data.root).name or data.root.name
    return f"data        {name} ({len(data.class_ids)} classes): {counts} images"


def describe_splits(dataset: datasets.DatasetDict) -> str:
    """The number of images of each split."""
    return ", ".join(f"{name} {len(split)}" for name, split in dataset.items())
