"""Where the images of a data set lie: its folders recognised, and their files listed."""

import os
import re
from collections import Counter
from collections.abc import Sequence, Set
from dataclasses import dataclass
from pathlib import Path

from transfer.errors import UserError

IMAGE_SUFFIXES = frozenset({".jpeg", ".jpg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff"})
TEMPLATE_NAME = "submission_sample.csv"
EXPECTED = "wnids.txt, train/<wnid>/images/*.JPEG, test/images/*.JPEG and " + TEMPLATE_NAME
ALSO_EXPECTED = "or train/<class>/* alone, with val/<class>/* and test/* where there are such images"

NATURAL_ORDER = "folder names, numbers as numbers"
VALIDATION_FOLDERS = ("val", "valid", "validation")
ANNOTATIONS_NAME = "val_annotations.txt"  # Tiny ImageNet's: file name, class_id and a box on every line


@dataclass(frozen=True)
class DatasetFiles:
    """A data set whose layout was understood; files are relative to root, with forward slashes."""

    kind: str  # the layout in words; none for the competition's
    root: Path
    class_ids: list[str]  # the classes' own names; the label of a class is its position here
    synonyms: list[str]  # all synonyms of each class, as words.txt has them
    class_names: list[str]  # first synonyms, made unique, to show to people
    label_order: str  # what gave the order of class_ids
    train_files: list[str]
    train_labels: list[int]
    validation_files: list[str]  # as published; none where validation images have to be held out of train
    validation_labels: list[int]
    test_files: list[str]
    test_ids: list[str]  # of each test file, as the template writes it
    template_path: Path | None
    left_out: int  # classes of train/ that a classes file does not list
    ignored: Counter  # what else lies there -> how many

    @property
    def files(self) -> list[str]:
        """Every image."""
        return self.train_files + self.validation_files + self.test_files


def read_lines(path: Path) -> list[str]:
    """Non-empty lines of a small text file; byte-order mark and CRLF are no part of them."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as fault:
        raise UserError(f"{path}: cannot be read ({fault.strerror})") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: is not a text file") from None
    return [line.strip() for line in text.splitlines() if line.strip()]


def natural_key(name: str) -> tuple:
    """Sorts as people count: 9 before 10, class2 before class10."""
    pieces = re.split(r"([0-9]+)", name)  # every second one is a number
    return [int(piece) if i % 2 else piece for i, piece in enumerate(pieces)], name


def list_folder(folder: Path) -> tuple[list[str], list[str]]:
    """Names of the files and of the folders in a folder, each sorted."""
    try:
        with os.scandir(folder) as entries:
            kinds = [(entry.name, entry.is_dir()) for entry in entries]
    except OSError as fault:
        raise UserError(f"{folder}: cannot be listed ({fault.strerror})") from None
    return sorted(n for n, is_dir in kinds if not is_dir), sorted(n for n, is_dir in kinds if is_dir)


def find_root(path: Path) -> Path:
    """The data set's root: the folder itself or the one folder inside it that looks like one."""
    if not path.is_dir():
        raise UserError(f"{path}: no such folder or zip; --data_dir takes the data set's folder, its zip, or `sample`")
    _, folders = list_folder(path)
    candidates = [path, *(path / name for name in folders if not name.startswith((".", "__")))]
    for marks in (("wnids.txt", "train"), ("wnids.txt",), ("train", "test"), ("train",)):
        found = [folder for folder in candidates if all((folder / mark).exists() for mark in marks)]
        if len(found) > 1 and path not in found:
            raise UserError(f"{path}: holds several data sets ({', '.join(f.name for f in found)}); name one of them")
        if found:
            return path if path in found else found[0]
    raise UserError(f"{path}: is not this data set; expected {EXPECTED}, {ALSO_EXPECTED}")


def name_layout(root: Path, class_ids: Sequence[str]) -> str:
    """The layout of a data set in words; none for the competition's own."""
    if (root / "wnids.txt").is_file():
        return "Tiny ImageNet as published" if (root / "val" / ANNOTATIONS_NAME).is_file() else ""
    return "numbered class folders" if all(class_id.isdecimal() for class_id in class_ids) else "class folders"


def find_template(root: Path) -> Path | None:
    """The submission template: submission_sample.csv, or the one csv that calls itself a sample or a template."""
    if (root / TEMPLATE_NAME).is_file():
        return root / TEMPLATE_NAME
    names = [name for name in list_folder(root)[0] if re.search(r"(?i)(sample|template).*\.csv$", name)]
    if len(names) > 1:
        raise UserError(f"{root}: {' and '.join(names)} may all be the template; name the right one {TEMPLATE_NAME}")
    return root / names[0] if names else None


def list_class_folders(root: Path, split: str) -> list[str]:
    """Names of the folders in a split that hold a class each, sorted."""
    return [name for name in list_folder(root / split)[1] if not name.startswith(".")]


def check_class_folders(root: Path, class_ids: Sequence[str], listed_in: str, is_subset: bool) -> set[str]:
    """Refuse a train folder whose classes are not those listed; returns the ones that a subset leaves out."""
    folders = list_class_folders(root, "train")
    missing = sorted(set(class_ids) - set(folders))
    extra = sorted(set(folders) - set(class_ids))
    if missing:
        raise UserError(f"{root / 'train' / missing[0]}: class folder is missing ({len(missing)} missing in all)")
    if extra and not is_subset:
        raise UserError(
            f"{root / 'train' / extra[0]}: class folder is not in {listed_in} ({len(extra)} extra in all); "
            "without a line there it has no label"
        )
    if len(class_ids) < 2:
        raise UserError(
            f"{root / 'train'}: {len(class_ids)} class folders to tell apart ({', '.join(class_ids) or 'none'}); "
            "expected two or more, train/<class>/*"
        )
    return set(extra)


def name_of(file: str) -> str:
    """The last part of a relative path."""
    return file.rpartition("/")[2]


def list_images(root: Path, folder: str, ignored: Counter) -> list[str]:
    """Image files of a folder, relative to root and sorted; everything else is counted in `ignored`."""
    names, folders = list_folder(root / folder)
    images = []
    for name in names:
        if not name.isprintable():
            raise UserError(f"{root / folder}: the file name {name!r} has characters that are no text; rename it")
        if "." + name.rpartition(".")[2].lower() in IMAGE_SUFFIXES and not name.startswith("."):
            images.append(f"{folder}/{name}")
        else:
            ignored["*_boxes.txt" if name.endswith("_boxes.txt") else name] += 1
    ignored.update(f"{name}/" for name in folders if name != "images")
    return images


def list_images_here_or_below(root: Path, folder: str, ignored: Counter) -> list[str]:
    """Images of folder/images/*, then those of folder/*."""
    direct = list_images(root, folder, ignored)
    nested = list_images(root, f"{folder}/images", ignored) if (root / folder / "images").is_dir() else []
    return nested + direct


def list_class(root: Path, class_id: str, ignored: Counter, listed_in: str) -> list[str]:
    """Images of one class: train/<wnid>/images/*, or train/<wnid>/* where there is no images folder."""
    files = list_images_here_or_below(root, f"train/{class_id}", ignored)
    if not files:
        why = "every folder of train/ is a class" if listed_in == NATURAL_ORDER else f"yet {listed_in} lists the class"
        raise UserError(f"{root / 'train' / class_id}: has no images, {why}")
    return files


def list_test(root: Path, ignored: Counter) -> list[str]:
    """Test images: test/images/*, or test/* where there is no images folder; none if there is no test folder."""
    files = list_images_here_or_below(root, "test", ignored) if (root / "test").is_dir() else []
    return files if (root / "wnids.txt").is_file() else sorted(files, key=natural_key)


def image_id_of(file: str) -> str:
    """The id that a template uses for a test image: its file name without the ending."""
    return Path(file).stem


def name_test_images(root: Path, files: Sequence[str], template_ids: Set[str] = frozenset()) -> list[str]:
    """The id of every test image: its file name without the ending, or with it where the template writes it so."""
    names = [name_of(file) for file in files]
    with_ending = template_ids and template_ids <= set(names)
    ids = names if with_ending else [image_id_of(file) for file in files]
    repeated = [i for i, count in Counter(ids).items() if count > 1]
    if repeated:
        raise UserError(f"{root / 'test'}: two images share the id '{repeated[0]}'; ids are names without ending")
    return ids


def list_validation(
    root: Path, class_ids: Sequence[str], left_out: Set[str], ignored: Counter
) -> list[tuple[str, int]]:
    """(file, label) of the published validation images; none where there is no such folder.

    They lie in val/images/* with val_annotations.txt, or in val/<class>/*. Images of classes in `left_out` are left
    out too.
    """
    split = next((name for name in VALIDATION_FOLDERS if (root / name).is_dir()), None)
    if split is None:
        return []
    if (root / split / ANNOTATIONS_NAME).is_file():
        return _list_annotated(root, split, class_ids, left_out, ignored)
    folders = [name for name in list_class_folders(root, split) if name != "images" or name in class_ids]
    strange = sorted(set(folders) - set(class_ids) - left_out)
    if strange or not folders:
        found = f"{strange[0]} is no class of train/" if strange else "it holds no class folders"
        raise UserError(f"{root / split}: {found}; expected val/<class>/*, or val/images/* and {ANNOTATIONS_NAME}")
    ignored.update(list_folder(root / split)[0])
    found = [
        (file, label)
        for label, class_id in enumerate(class_ids)
        if class_id in folders
        for file in list_images_here_or_below(root, f"{split}/{class_id}", ignored)
    ]
    if not found:
        raise UserError(f"{root / split}: has no images; remove the folder and they are held out of train/")
    return found


def _list_annotated(
    root: Path, split: str, class_ids: Sequence[str], left_out: Set[str], ignored: Counter
) -> list[tuple[str, int]]:
    """(file, label) of images whose classes stand in val_annotations.txt."""
    path = root / split / ANNOTATIONS_NAME
    label_of = {class_id: label for label, class_id in enumerate(class_ids)}
    class_of = _read_annotations(path)
    files = list_images_here_or_below(root, split, ignored)
    del ignored[ANNOTATIONS_NAME]
    unlabelled = [file for file in files if name_of(file) not in class_of]
    absent = sorted(set(class_of) - {name_of(file) for file in files})
    strange = sorted(set(class_of.values()) - set(class_ids) - left_out)
    for faults, what in (
        (unlabelled, "has no line for the image"),
        (absent, "has a line for an image that is not there,"),
        (strange, "names the unknown class"),
    ):
        if faults:
            raise UserError(f"{path}: {what} {faults[0]} ({len(faults)} in all)")
    labels = [label_of.get(class_of[name_of(file)]) for file in files]
    return [(file, label) for file, label in zip(files, labels, strict=True) if label is not None]


def _read_annotations(path: Path) -> dict[str, str]:
    """File name -> class."""
    class_of = {}
    for number, line in enumerate(read_lines(path), 1):
        cells = line.split("\t")
        if len(cells) < 2 or cells[0] in class_of:
            fault = "is no `file<TAB>class ...`" if len(cells) < 2 else f"names {cells[0]} a second time"
            raise UserError(f"{path}: line {number} {fault}")
        class_of[cells[0]] = cells[1]
    return class_of
