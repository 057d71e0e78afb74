"""The layout of a dataset on disk: find its root, recognize its folders and list its image files.

docs/data.md describes the layouts. Every listing is sorted, so that two machines see the same files in the same order.
"""

import itertools
import os
import posixpath
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from transfer.errors import UserError

# Formats that Pillow can open but that are not photographs: documents, films, icons and scientific arrays.
NOT_PICTURES = frozenset(
    {"BUFR", "CUR", "EPS", "FITS", "FLI", "GBR", "GRIB", "HDF5", "ICNS", "ICO", "IPTC", "MPEG", "PDF", "WMF"}
)
IMAGE_SUFFIXES = frozenset(
    suffix for suffix, name in Image.registered_extensions().items() if name in Image.OPEN and name not in NOT_PICTURES
)
WNIDS_NAME = "wnids.txt"
TEMPLATE_NAME = "submission_sample.csv"
ANNOTATIONS_NAME = "val_annotations.txt"  # Tiny ImageNet's; a line is a file name, a class id and a box
# The folders of the splits, in any case. A folder may also be called train_images, Training Set or valid-data.
# A digit may follow, as in test1.
SPLIT_FOLDERS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}
JUNK_FOLDERS = frozenset({"__MACOSX", "__pycache__", "@eaDir", "#recycle", "$RECYCLE.BIN", "lost+found"})
ROOT_DEPTH = 3  # levels below --data_dir in which a dataset's root is searched
EXPECTED = f"{WNIDS_NAME}, train/<wnid>/images/*.JPEG, test/images/*.JPEG and {TEMPLATE_NAME}"
ALSO_EXPECTED = "or train/<class>/*, with val/<class>/* and test/* if there are such images"
MOVES = "move class folders into train/, give a csv with --labels_csv, or load the dataset with --dataset_name"
NATURALLY = "in natural order"  # ends a label order that no file or column gives
NATURAL_ORDER = f"folder names {NATURALLY}"


@dataclass(frozen=True)
class DatasetFiles:
    """A dataset whose layout was recognized; image files are relative to `root`, with forward slashes."""

    kind: str  # name of the layout; empty for the competition's own
    root: Path
    class_ids: list[str]  # folder names or ClassLabel names; the label of a class is its position in this list
    synonyms: list[str]  # of each class, as in words.txt: "tabby, tabby cat"
    class_names: list[str]  # the first synonym of each class, made unique; shown to people
    label_order: str  # what gave the order of class_ids, for example "wnids.txt"
    train_files: list[str]
    train_labels: list[int]
    validation_files: list[str]  # as published; empty if validation images are to be held out of train
    validation_labels: list[int]
    test_files: list[str]
    test_ids: list[str]  # of each test file, as in the template
    template_path: Path | None
    left_out: int  # number of class folders in train/ that a classes file leaves out
    ignored: Counter[str]  # other files and folders that were found -> how many
    submission_labels: str | None = None  # how the submission writes labels, if that was asked for
    test_labels: list[int] = field(default_factory=list)  # of each test file; empty if they are unknown

    @property
    def files(self) -> list[str]:
        """All image files: train, validation, then test."""
        return self.train_files + self.validation_files + self.test_files


# Files and folders


def read_text(path: Path) -> str:
    """The content of a small text file, without a byte-order mark. Raises `UserError`."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as fault:
        raise UserError(f"{path}: cannot be read ({fault.strerror})") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: is not a text file") from None


def read_lines(path: Path) -> list[str]:
    """The stripped, non-empty lines of a small text file. Raises `UserError`."""
    return [line.strip() for line in read_text(path).splitlines() if line.strip()]


def natural_key(name: str) -> tuple:
    """Sort key that compares numbers as numbers: 9 before 10, class2 before class10."""
    pieces = re.split(r"([0-9]+)", name)  # text and numbers alternate, text first
    return [int(piece) if i % 2 else piece for i, piece in enumerate(pieces)], name


def file_name(file: str) -> str:
    """The last part of a relative path with forward slashes."""
    return file.rpartition("/")[2]


def normal_name(name: str) -> str:
    """A name in its composed Unicode form (NFC); macOS and some archives store the decomposed form."""
    return unicodedata.normalize("NFC", name)


def is_image(name: str) -> bool:
    """Whether a file has the extension of an image and is not hidden."""
    return "." + name.rpartition(".")[2].lower() in IMAGE_SUFFIXES and not name.startswith(".")


def list_folder(folder: Path) -> tuple[list[str], list[str]]:
    """(names of the files, names of the folders) directly in a folder, each sorted. Raises `UserError`."""
    try:
        with os.scandir(folder) as entries:
            kinds = [(entry.name, entry.is_dir()) for entry in entries]
    except OSError as fault:
        raise UserError(f"{folder}: cannot be listed ({fault.strerror})") from None
    return sorted(n for n, is_dir in kinds if not is_dir), sorted(n for n, is_dir in kinds if is_dir)


def list_visible_folders(folder: Path) -> list[str]:
    """Sorted names of the folders in a folder, without hidden ones and those that systems and programs leave."""
    return [name for name in list_folder(folder)[1] if not name.startswith(".") and name not in JUNK_FOLDERS]


def has_images(folder: Path) -> bool:
    """Whether a folder holds images, directly or in images/."""
    names, folders = list_folder(folder)
    below = [list_folder(folder / name)[0] for name in folders if name.lower() == "images"]
    return any(is_image(name) for listed in (names, *below) for name in listed)


# The dataset's root


def find_split_folder(root: Path, split: str) -> str | None:
    """The folder of a split (train, val or test), relative to the root; None if there is none.

    A folder that holds nothing but a folder of the same name stands for that one. Raises `UserError` if there are
    several folders for the split.
    """
    stems = SPLIT_FOLDERS[split]
    pattern = re.compile(rf"(?i)({'|'.join(stems)})([_ -]?(images|imgs|set|data))?[0-9]?")
    found = [name for name in list_visible_folders(root) if pattern.fullmatch(name)]
    if len(found) > 1:
        raise UserError(
            f"{root}: {' and '.join(found)} could each be the {split} folder; merge them, or move one elsewhere"
        )
    if not found:
        return None
    folder = found[0]
    inside = list_visible_folders(root / folder)
    return f"{folder}/{inside[0]}" if inside == [folder] and not has_images(root / folder) else folder


def _list_flat_classes(root: Path) -> list[str]:
    """Folders of images directly in a folder that has no train, val or test folder."""
    if any(find_split_folder(root, split) for split in SPLIT_FOLDERS):
        return []
    names = [name for name in list_visible_folders(root) if has_images(root / name)]
    return [] if any(name.lower() == "images" for name in names) else names


def _marks_of(folder: Path) -> set[str]:
    """What shows that a folder is the root of a dataset: wnids.txt, a train folder, or folders of images."""
    marks = {split for split in ("train", "test") if find_split_folder(folder, split)}
    marks |= {WNIDS_NAME} if (folder / WNIDS_NAME).is_file() else set()
    return marks or ({"flat"} if len(_list_flat_classes(folder)) > 1 else set())


def _list_candidates(path: Path) -> list[list[tuple[Path, set[str]]]]:
    """(folder, its marks) of `path`, of the folders in it and so on; not below train or class folders."""
    levels = [[(path, _marks_of(path))]]
    for _ in range(ROOT_DEPTH):
        parents = [folder for folder, marks in levels[-1] if not marks & {"train", "flat"}]
        below = [parent / name for parent in parents for name in list_visible_folders(parent)]
        levels.append([(folder, _marks_of(folder)) for folder in below])
    return levels


def find_root(path: Path, has_labels: Callable[[Path], bool] = lambda folder: False) -> Path:
    """The root of the dataset at `path`: the folder itself, or the one folder below it that looks like a dataset.

    `has_labels` recognizes a root without a train folder by the labels that lie in it.
    """
    if not path.is_dir():
        raise UserError(f"{path}: no such folder or zip; --data_dir takes the dataset's folder, its zip, or `sample`")
    levels = _list_candidates(path)
    wanted: list[set[str]] = [{WNIDS_NAME, "train"}, {WNIDS_NAME}, {"train", "test"}, {"train"}, set(), {"flat"}]
    for marks, level in itertools.product(wanted, levels):
        found = [folder for folder, seen in level if (marks <= seen if marks else has_labels(folder))]
        if len(found) > 1:
            names = ", ".join(str(folder.relative_to(path)) for folder in found)
            raise UserError(f"{path}: holds several datasets ({names}); choose one of them")
        if found:
            return found[0]
    seen = [folder.name for level in levels for folder, _ in level if has_images(folder)]
    listed = ", ".join(seen[:3]) + ", ..." * (len(seen) > 3)
    found_images = f"; found {len(seen)} folder{'s' * (len(seen) > 1)} of images, no train/; {MOVES} ({listed})"
    fault = f"is not a dataset of a known layout; expected {EXPECTED}, {ALSO_EXPECTED}"
    raise UserError(f"{path}: {fault}{found_images if seen else ''}")


def list_templates(folder: Path) -> list[Path]:
    """submission_sample.csv if a folder has it, else every csv with "sample" or "template" in its name."""
    if (folder / TEMPLATE_NAME).is_file():
        return [folder / TEMPLATE_NAME]
    names = list_folder(folder)[0]
    return [folder / name for name in names if re.search(r"(?i)(sample|template).*\.[ct]sv$", name)]


def find_template(root: Path) -> Path | None:
    """The submission template in a dataset's root. Raises `UserError` if several files could be it."""
    found = list_templates(root)
    if len(found) > 1:
        raise UserError(
            f"{root}: {' and '.join(path.name for path in found)} could each be the template; "
            f"rename the right one {TEMPLATE_NAME}, or choose it with --template"
        )
    return found[0] if found else None


def name_layout(root: Path, class_ids: Sequence[str]) -> str:
    """The name of a dataset's layout; empty for the competition's own."""
    if (root / WNIDS_NAME).is_file():
        validation = find_split_folder(root, "val")
        is_published = validation is not None and (root / validation / ANNOTATIONS_NAME).is_file()
        return "Tiny ImageNet as published" if is_published else ""
    if find_split_folder(root, "train") is None:
        return "class folders without train/"
    return "numbered class folders" if all(class_id.isdecimal() for class_id in class_ids) else "class folders"


# Class folders


def find_class_folders(root: Path, split: str) -> dict[str, list[str]]:
    """The folders of every class of a split, relative to the root; the name of a class is that of its folder.

    Folders whose names differ only in their Unicode form are one class. Without a train folder, the folders of images
    in the root are the classes.
    """
    parent = find_split_folder(root, split)
    names = list_visible_folders(root / parent) if parent else _list_flat_classes(root) if split == "train" else []
    folders: dict[str, list[str]] = {}
    for name in names:
        folders.setdefault(normal_name(name), []).append(posixpath.join(parent or "", name))
    return folders


def list_class_folders(root: Path, split: str) -> list[str]:
    """Sorted names of the classes that have a folder in a split."""
    return sorted(find_class_folders(root, split))


def check_class_folders(root: Path, class_ids: Sequence[str], label_order: str, is_subset: bool) -> set[str]:
    """Check that train/ has a folder for each class; return the folders that a subset of the classes leaves out.

    Raises `UserError` for a missing folder, for an extra one unless `is_subset`, and for fewer than two classes.
    """
    folders, train = list_class_folders(root, "train"), root / (find_split_folder(root, "train") or "")
    missing = sorted(set(class_ids) - set(folders))
    extra = sorted(set(folders) - set(class_ids))
    if missing:
        raise UserError(f"{train / missing[0]}: class folder is missing ({len(missing)} missing in all)")
    if extra and not is_subset:
        raise UserError(
            f"{train / extra[0]}: class folder is not in {label_order} ({len(extra)} extra in all); "
            "add a line for it or remove the folder"
        )
    if len(class_ids) < 2:
        raise UserError(
            f"{train}: found {len(class_ids)} class folders ({', '.join(class_ids) or 'none'}); "
            "expected at least two, as train/<class>/*, or a csv that names the images, or --label_pattern"
        )
    return set(extra)


# Image files


def list_images(root: Path, folder: str, ignored: Counter[str]) -> list[str]:
    """Sorted image files directly in root/folder, relative to root; counts everything else in `ignored`."""
    names, folders = list_folder(root / folder)
    images = []
    for name in names:
        if not name.isprintable():
            raise UserError(f"{root / folder}: the file name {name!r} has unprintable characters; rename the file")
        if is_image(name):
            images.append(f"{folder}/{name}")
        else:
            ignored["*_boxes.txt" if name.endswith("_boxes.txt") else name] += 1
    ignored.update(f"{name}/" for name in folders if name.lower() != "images")
    return images


def list_images_here_or_below(root: Path, folder: str, ignored: Counter[str]) -> list[str]:
    """Image files of folder/images/*, then those of folder/*."""
    direct = list_images(root, folder, ignored)
    names = [name for name in list_folder(root / folder)[1] if name.lower() == "images"]
    return [file for name in names for file in list_images(root, f"{folder}/{name}", ignored)] + direct


def list_class_images(root: Path, folders: Sequence[str], ignored: Counter[str], label_order: str) -> list[str]:
    """Training images of one class, <folder>/images/* and <folder>/*. Raises `UserError` if it has none."""
    files = [file for folder in folders for file in list_images_here_or_below(root, folder, ignored)]
    if not files:
        reason = (
            "every folder in train/ is a class" if label_order == NATURAL_ORDER else f"{label_order} lists the class"
        )
        raise UserError(f"{root / folders[0]}: has no images, but {reason}")
    return files


def list_test_images(root: Path, ignored: Counter[str]) -> list[str]:
    """Test images, test/images/* and test/*, or those of the only folder in test/; empty without a test folder."""
    folder = find_split_folder(root, "test")
    if folder is None:
        return []
    inside = [name for name in list_visible_folders(root / folder) if name.lower() != "images"]
    if len(inside) == 1 and not has_images(root / folder):
        ignored.update(list_folder(root / folder)[0])
        folder = f"{folder}/{inside[0]}"
    files = list_images_here_or_below(root, folder, ignored)
    return files if (root / WNIDS_NAME).is_file() else sorted(files, key=natural_key)


def list_labelled_test_images(
    root: Path, class_ids: Sequence[str], ignored: Counter[str]
) -> tuple[list[str], list[int]]:
    """(files, labels) of test/<class>/*; empty unless every folder in test/ is a class and holds images."""
    split, folders = find_split_folder(root, "test"), find_class_folders(root, "test")
    if split is None or not folders or not set(folders) <= set(class_ids) or has_images(root / split):
        return [], []
    beside = Counter(list_folder(root / split)[0])
    found = {
        class_id: [file for place in places for file in list_images_here_or_below(root, place, beside)]
        for class_id, places in folders.items()
    }
    if not all(found.values()):
        return [], []
    ignored.update(beside)
    order = [class_id for class_id in class_ids if class_id in found]
    labels = [class_ids.index(class_id) for class_id in order for _ in found[class_id]]
    return [file for class_id in order for file in found[class_id]], labels


def list_all_images(root: Path, without: str | None, ignored: Counter[str]) -> list[str]:
    """Sorted images in all folders of a root but `without`, relative to root; counts other files in `ignored`."""
    files = []
    for place, folders, names in os.walk(root):
        relative = Path(place).relative_to(root).as_posix()
        kept = set(list_visible_folders(Path(place)))
        ignored.update(f"{name}/" for name in folders if name not in kept)
        folders[:] = [name for name in folders if name in kept and posixpath.normpath(f"{relative}/{name}") != without]
        files += [posixpath.normpath(f"{relative}/{name}") for name in names if is_image(name)]
        ignored.update(name for name in names if not is_image(name))
    return sorted(files)


def image_id_of(file: str) -> str:
    """The id of a test image in a template: its file name without the extension."""
    return Path(file).stem


# Published validation images


def _read_annotations(path: Path) -> dict[str, str]:
    """The class id of every file name in val_annotations.txt."""
    class_of = {}
    for number, line in enumerate(read_lines(path), 1):
        cells = line.split("\t")
        if len(cells) < 2:
            raise UserError(f"{path}: line {number} is not `file<TAB>class ...`")
        if cells[0] in class_of:
            raise UserError(f"{path}: line {number} lists {cells[0]} a second time")
        class_of[cells[0]] = cells[1]
    return class_of


def _list_annotated(
    root: Path, split: str, class_ids: Sequence[str], left_out: Set[str], ignored: Counter[str]
) -> list[tuple[str, int]]:
    """(file, label) of the images in split/images/*, labeled by val_annotations.txt."""
    path = root / split / ANNOTATIONS_NAME
    label_of = {class_id: label for label, class_id in enumerate(class_ids)}
    class_of = _read_annotations(path)
    files = list_images_here_or_below(root, split, ignored)
    del ignored[ANNOTATIONS_NAME]
    unlabelled = [file for file in files if file_name(file) not in class_of]
    absent = sorted(set(class_of) - {file_name(file) for file in files})
    unknown = sorted(set(class_of.values()) - set(class_ids) - left_out)
    for faults, what in (
        (unlabelled, "has no line for the image"),
        (absent, "lists the missing image"),
        (unknown, "names the unknown class"),
    ):
        if faults:
            raise UserError(f"{path}: {what} {faults[0]} ({len(faults)} in all)")
    labels = [label_of.get(class_of[file_name(file)]) for file in files]
    return [(file, label) for file, label in zip(files, labels, strict=True) if label is not None]


def _list_by_class(
    root: Path, split: str, class_ids: Sequence[str], left_out: Set[str], ignored: Counter[str]
) -> list[tuple[str, int]]:
    """(file, label) of the images in split/<class>/*."""
    found_folders = find_class_folders(root, "val")
    folders = {name: places for name, places in found_folders.items() if name != "images" or name in class_ids}
    unknown = sorted(set(folders) - set(class_ids) - left_out)
    if unknown or not folders:
        fault = f"{unknown[0]} is not a class of train/" if unknown else "has no class folders"
        raise UserError(f"{root / split}: {fault}; expected val/<class>/*, or val/images/* and {ANNOTATIONS_NAME}")
    ignored.update(list_folder(root / split)[0])
    found = [
        (file, label)
        for label, class_id in enumerate(class_ids)
        for folder in folders.get(class_id, [])
        for file in list_images_here_or_below(root, folder, ignored)
    ]
    if not found:
        raise UserError(f"{root / split}: has no images; add some, or remove the folder to hold out a part of train/")
    return found


def list_validation_images(
    root: Path, class_ids: Sequence[str], left_out: Set[str], ignored: Counter[str]
) -> list[tuple[str, int]]:
    """(file, label) of the published validation images; empty if there is no validation folder.

    They lie in val/images/*, labeled by val_annotations.txt, or in val/<class>/*, where that file may be left over.
    Images of the classes in `left_out` are skipped.
    """
    split = find_split_folder(root, "val")
    if split is None:
        return []
    is_annotated = (root / split / ANNOTATIONS_NAME).is_file() and has_images(root / split)
    return (_list_annotated if is_annotated else _list_by_class)(root, split, class_ids, left_out, ignored)
