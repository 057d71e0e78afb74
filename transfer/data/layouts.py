"""The layout of a dataset on disk: find its root, recognise its folders and list its image files.

docs/data.md describes the layouts. Every listing is sorted, so that two machines see the same files in the same order.
"""

import os
import re
from collections import Counter
from collections.abc import Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path

from transfer.errors import UserError

IMAGE_SUFFIXES = frozenset({".jpeg", ".jpg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff"})
WNIDS_NAME = "wnids.txt"
TEMPLATE_NAME = "submission_sample.csv"
ANNOTATIONS_NAME = "val_annotations.txt"  # Tiny ImageNet's; a line is a file name, a class id and a box
VALIDATION_FOLDERS = ("val", "valid", "validation")
EXPECTED = f"{WNIDS_NAME}, train/<wnid>/images/*.JPEG, test/images/*.JPEG and {TEMPLATE_NAME}"
ALSO_EXPECTED = "or train/<class>/*, with val/<class>/* and test/* if there are such images"
NATURAL_ORDER = "folder names, numbers as numbers"  # a label order; the others are named after their file or column


@dataclass(frozen=True)
class DatasetFiles:
    """A dataset whose layout was recognised; image files are relative to `root`, with forward slashes."""

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


def list_folder(folder: Path) -> tuple[list[str], list[str]]:
    """(names of the files, names of the folders) directly in a folder, each sorted. Raises `UserError`."""
    try:
        with os.scandir(folder) as entries:
            kinds = [(entry.name, entry.is_dir()) for entry in entries]
    except OSError as fault:
        raise UserError(f"{folder}: cannot be listed ({fault.strerror})") from None
    return sorted(n for n, is_dir in kinds if not is_dir), sorted(n for n, is_dir in kinds if is_dir)


# The dataset's root


def find_root(path: Path) -> Path:
    """The root of the dataset at `path`: the folder itself, or the one folder in it that looks like a dataset."""
    if not path.is_dir():
        raise UserError(f"{path}: no such folder or zip; --data_dir takes the dataset's folder, its zip, or `sample`")
    _, folders = list_folder(path)
    candidates = [path, *(path / name for name in folders if not name.startswith((".", "__")))]
    for marks in ((WNIDS_NAME, "train"), (WNIDS_NAME,), ("train", "test"), ("train",)):
        found = [folder for folder in candidates if all((folder / mark).exists() for mark in marks)]
        if len(found) > 1 and path not in found:
            raise UserError(f"{path}: holds several datasets ({', '.join(f.name for f in found)}); choose one of them")
        if found:
            return path if path in found else found[0]
    raise UserError(f"{path}: is not a dataset of a known layout; expected {EXPECTED}, {ALSO_EXPECTED}")


def find_template(root: Path) -> Path | None:
    """The submission template: submission_sample.csv, or the only csv with "sample" or "template" in its name."""
    if (root / TEMPLATE_NAME).is_file():
        return root / TEMPLATE_NAME
    names = [name for name in list_folder(root)[0] if re.search(r"(?i)(sample|template).*\.csv$", name)]
    if len(names) > 1:
        raise UserError(
            f"{root}: {' and '.join(names)} could each be the template; rename the right one {TEMPLATE_NAME}"
        )
    return root / names[0] if names else None


def name_layout(root: Path, class_ids: Sequence[str]) -> str:
    """The name of a dataset's layout; empty for the competition's own."""
    if (root / WNIDS_NAME).is_file():
        return "Tiny ImageNet as published" if (root / "val" / ANNOTATIONS_NAME).is_file() else ""
    return "numbered class folders" if all(class_id.isdecimal() for class_id in class_ids) else "class folders"


# Class folders


def list_class_folders(root: Path, split: str) -> list[str]:
    """Sorted names of a split's folders that are not hidden; each holds one class."""
    return [name for name in list_folder(root / split)[1] if not name.startswith(".")]


def check_class_folders(root: Path, class_ids: Sequence[str], label_order: str, is_subset: bool) -> set[str]:
    """Check that train/ has a folder for each class; return the folders that a subset of the classes leaves out.

    Raises `UserError` for a missing folder, for an extra one unless `is_subset`, and for fewer than two classes.
    """
    folders = list_class_folders(root, "train")
    missing = sorted(set(class_ids) - set(folders))
    extra = sorted(set(folders) - set(class_ids))
    if missing:
        raise UserError(f"{root / 'train' / missing[0]}: class folder is missing ({len(missing)} missing in all)")
    if extra and not is_subset:
        raise UserError(
            f"{root / 'train' / extra[0]}: class folder is not in {label_order} ({len(extra)} extra in all); "
            "add a line for it or remove the folder"
        )
    if len(class_ids) < 2:
        raise UserError(
            f"{root / 'train'}: found {len(class_ids)} class folders ({', '.join(class_ids) or 'none'}); "
            "expected at least two, as train/<class>/*"
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
        if "." + name.rpartition(".")[2].lower() in IMAGE_SUFFIXES and not name.startswith("."):
            images.append(f"{folder}/{name}")
        else:
            ignored["*_boxes.txt" if name.endswith("_boxes.txt") else name] += 1
    ignored.update(f"{name}/" for name in folders if name != "images")
    return images


def list_images_here_or_below(root: Path, folder: str, ignored: Counter[str]) -> list[str]:
    """Image files of folder/images/*, then those of folder/*."""
    direct = list_images(root, folder, ignored)
    nested = list_images(root, f"{folder}/images", ignored) if (root / folder / "images").is_dir() else []
    return nested + direct


def list_class_images(root: Path, class_id: str, ignored: Counter[str], label_order: str) -> list[str]:
    """Training images of one class, train/<class>/images/* and train/<class>/*. Raises `UserError` if it has none."""
    files = list_images_here_or_below(root, f"train/{class_id}", ignored)
    if not files:
        reason = (
            "every folder in train/ is a class" if label_order == NATURAL_ORDER else f"{label_order} lists the class"
        )
        raise UserError(f"{root / 'train' / class_id}: has no images, but {reason}")
    return files


def list_test_images(root: Path, ignored: Counter[str]) -> list[str]:
    """Test images, test/images/* and test/*; empty if there is no test folder."""
    files = list_images_here_or_below(root, "test", ignored) if (root / "test").is_dir() else []
    return files if (root / WNIDS_NAME).is_file() else sorted(files, key=natural_key)


def list_labelled_test_images(root: Path, class_ids: Sequence[str], ignored: Counter[str]) -> list[tuple[str, int]]:
    """(file, label) of test/<class>/*; empty unless every folder in test/ is a class and holds images."""
    split = next((name for name in list_folder(root)[1] if name.lower() == "test"), None)
    folders = list_class_folders(root, split) if split else []
    if not folders or not set(folders) <= set(class_ids):
        return []
    beside: Counter[str] = Counter()
    if list_images(root, f"{split}", beside):
        return []
    found = {name: list_images_here_or_below(root, f"{split}/{name}", beside) for name in folders}
    if not all(found.values()):
        return []
    ignored.update({name: count for name, count in beside.items() if name.removesuffix("/") not in folders})
    labels = {class_id: label for label, class_id in enumerate(class_ids)}
    return [(file, labels[name]) for name in sorted(folders, key=labels.__getitem__) for file in found[name]]


def name_labelled_test_images(root: Path, files: Sequence[str]) -> list[str]:
    """The id of every image in test/<class>/*: its file name, or <class>/<file name> where classes share names."""
    names = [image_id_of(file) for file in files]
    if len(set(names)) == len(names):
        return name_test_images(root, files)
    paths = [str(Path(*Path(file).parts[1:]).with_suffix("").as_posix()) for file in files]
    return paths if len(set(paths)) == len(paths) else [file.partition("/")[2] for file in files]


def image_id_of(file: str) -> str:
    """The id of a test image in a template: its file name without the extension."""
    return Path(file).stem


def name_test_images(root: Path, files: Sequence[str], template_ids: Set[str] = frozenset()) -> list[str]:
    """The id of every test image: its file name, with the extension only if all of `template_ids` have it."""
    names = [file_name(file) for file in files]
    with_extension = template_ids and template_ids <= set(names)
    ids = names if with_extension else [image_id_of(file) for file in files]
    repeated = [i for i, count in Counter(ids).items() if count > 1]
    if repeated:
        raise UserError(
            f"{root / 'test'}: two images have the id '{repeated[0]}'; ids are file names without the extension"
        )
    return ids


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
    """(file, label) of the images in split/images/*, labelled by val_annotations.txt."""
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
    folders = [name for name in list_class_folders(root, split) if name != "images" or name in class_ids]
    unknown = sorted(set(folders) - set(class_ids) - left_out)
    if unknown or not folders:
        fault = f"{unknown[0]} is not a class of train/" if unknown else "has no class folders"
        raise UserError(f"{root / split}: {fault}; expected val/<class>/*, or val/images/* and {ANNOTATIONS_NAME}")
    ignored.update(list_folder(root / split)[0])
    found = [
        (file, label)
        for label, class_id in enumerate(class_ids)
        if class_id in folders
        for file in list_images_here_or_below(root, f"{split}/{class_id}", ignored)
    ]
    if not found:
        raise UserError(f"{root / split}: has no images; add some, or remove the folder to hold out a part of train/")
    return found


def list_validation_images(
    root: Path, class_ids: Sequence[str], left_out: Set[str], ignored: Counter[str]
) -> list[tuple[str, int]]:
    """(file, label) of the published validation images; empty if there is no validation folder.

    They lie in val/images/*, labelled by val_annotations.txt, or in val/<class>/*. The folder may also be called
    `valid` or `validation`. Images of the classes in `left_out` are skipped.
    """
    split = next((name for name in VALIDATION_FOLDERS if (root / name).is_dir()), None)
    if split is None:
        return []
    is_annotated = (root / split / ANNOTATIONS_NAME).is_file()
    return (_list_annotated if is_annotated else _list_by_class)(root, split, class_ids, left_out, ignored)
