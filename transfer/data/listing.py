"""Files and folders: names, text, and the images that lie in a folder.

Every listing is sorted, so that two machines see the same files in the same order.
"""

import os
import posixpath
import re
import unicodedata
from collections import Counter
from collections.abc import Collection, Sequence, Set
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
# The folders of the splits, in any case. A folder may also be called train_images, Training Set or valid-data.
# A digit may follow, as in test1.
SPLIT_FOLDERS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}
MASK_FOLDER = re.compile(r"(?i)(.*[^a-z])?(masks?|segmentations?|annotations?|labels?|ground.?truth)([^a-z].*)?")
MASK_ENDING = re.compile(r"(?i)[ _-](mask|seg|segmentation)([ _-]?[0-9]+)?$")
JUNK_FOLDERS = frozenset({"__MACOSX", "__pycache__", "@eaDir", "#recycle", "$RECYCLE.BIN", "lost+found"})
NATURALLY = "in natural order"  # ends a label order that no file or column gives
NATURAL_ORDER = f"folder names {NATURALLY}"


# Names and text


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
    return posixpath.splitext(name)[1].lower() in IMAGE_SUFFIXES and not name.startswith(".")


def image_id_of(file: str) -> str:
    """The id of a test image in a template: its file name without the extension."""
    return posixpath.splitext(file_name(file))[0]


# Folders


def list_folder(folder: Path) -> tuple[list[str], list[str]]:
    """(names of the files, names of the folders) directly in a folder, each sorted. Raises `UserError`."""
    try:
        with os.scandir(folder) as entries:
            kinds = [(entry.name, entry.is_dir()) for entry in entries]
    except OSError as fault:
        raise UserError(f"{folder}: cannot be listed ({fault.strerror})") from None
    return sorted(n for n, is_dir in kinds if not is_dir), sorted(n for n, is_dir in kinds if is_dir)


def list_files(folder: Path) -> list[str]:
    """Sorted names of the files in a folder; empty if it may not be listed, as on some clusters."""
    try:
        return list_folder(folder)[0]
    except UserError:
        return []


def list_files_above(root: Path) -> list[str]:
    """Sorted names of the files in the folder above; empty if it may not be listed."""
    return list_files(root.absolute().parent)


def list_visible_folders(folder: Path) -> list[str]:
    """Sorted names of the folders in a folder, without hidden ones and those that systems and programs leave."""
    return [name for name in list_folder(folder)[1] if not name.startswith(".") and name not in JUNK_FOLDERS]


def list_image_folders(folder: Path) -> list[str]:
    """The visible folders in a folder, without those of masks beside images/."""
    names = list_visible_folders(folder)
    masks = [name for name in names if MASK_FOLDER.fullmatch(name)]
    images = [name for name in names if name.lower() == "images"]
    if not masks or not images:
        return names
    stems = _list_stems(folder / images[0])
    return [name for name in names if name not in masks or not _are_masks(_list_stems(folder / name), stems)]


def _list_stems(folder: Path) -> set[str]:
    """The names of the images directly in a folder, without their endings."""
    return {image_id_of(name) for name in list_files(folder) if is_image(name)}


def _are_masks(stems: Set[str], of_images: Set[str]) -> bool:
    """Whether all images are called as the masked ones are, or so with the ending of masks."""
    return bool(stems) and {MASK_ENDING.sub("", stem) for stem in stems} <= of_images


def leave_out_masks(files: Sequence[str]) -> list[str]:
    """The files without masks of others among them, such as a_mask.png beside a.png."""
    if not any(MASK_ENDING.search(posixpath.splitext(file)[0]) for file in files if re.search("(?i)mask|seg", file)):
        return list(files)
    stem_of = {file: posixpath.splitext(file)[0] for file in files}
    stems = set(stem_of.values())
    masks = {stem for stem in stems if (masked := MASK_ENDING.sub("", stem)) != stem and masked in stems}
    return [file for file in files if stem_of[file] not in masks]


def has_images(folder: Path) -> bool:
    """Whether a folder holds images, directly or in images/."""
    names, folders = list_folder(folder)
    below = [list_folder(folder / name)[0] for name in folders if name.lower() == "images"]
    return any(is_image(name) for listed in (names, *below) for name in listed)


def _usual_names(split: str) -> re.Pattern:
    """What the folder of a split is usually called."""
    return re.compile(rf"(?i)({'|'.join(SPLIT_FOLDERS[split])})([_ -]?(images|imgs|set|data))?[0-9]?")


def find_split_folder(root: Path, split: str) -> str | None:
    """The folder of a split (train, val or test), relative to the root; None if there is none.

    A folder that holds nothing but another folder for this split stands for that one. Raises `UserError` if there are
    several folders for the split.
    """
    names, pattern = list_visible_folders(root), _usual_names(split)
    found = [name for name in names if pattern.fullmatch(name)] or _find_alike(names)[split]
    if len(found) > 1:
        raise UserError(
            f"{root}: {' and '.join(found)} could each be the {split} folder; merge them, or move one elsewhere"
        )
    if not found:
        return None
    folder = found[0]
    inside = list_visible_folders(root / folder)
    is_same = len(inside) == 1 and (pattern.fullmatch(inside[0]) or inside[0].lower() == folder.lower())
    return f"{folder}/{inside[0]}" if is_same and not has_images(root / folder) else folder


def split_in_name(name: str) -> tuple[str, str]:
    """(the split that a word in a name means, the rest with # for numbers); two empty texts without one."""
    for split, stems in SPLIT_FOLDERS.items():
        if parts := re.fullmatch(rf"(.*?)(?<![a-z])({'|'.join(stems)})(?![a-z])(.*)", name.lower()):
            return split, re.sub("[0-9]+", "#", f"{parts[1]}*{parts[3]}")
    return "", ""


def _find_alike(names: Sequence[str]) -> dict[str, list[str]]:
    """The folders of each split where train and another one are called alike, as seg_train and seg_test.

    Nothing where a folder is called train, val or test without more, or where several pairs of folders are alike.
    """
    found: dict[str, dict[str, list[str]]] = {}
    for name in names:
        split, rest = split_in_name(name) if re.search("(?i)train|val|test", name) else ("", "")
        if split:
            found.setdefault(rest, {}).setdefault(split, []).append(name)
    alike = [folders for folders in found.values() if "train" in folders and len(folders) > 1]
    only = alike[0] if len(alike) == 1 else {}
    if only and any(_usual_names(split).fullmatch(name) for split in SPLIT_FOLDERS for name in names):
        only = {}
    return {split: only.get(split, []) for split in SPLIT_FOLDERS}


def list_flat_classes(root: Path) -> list[str]:
    """Folders of images directly in a folder that has no train folder; its val and test folders are not classes.

    If all are called as parts of splits are, such as train_1 and train_2, none of them is a class.
    """
    splits = {split: find_split_folder(root, split) for split in SPLIT_FOLDERS}
    if splits["train"]:
        return []
    others = {(folder or "").partition("/")[0] for folder in splits.values()}
    names = [name for name in list_visible_folders(root) if name not in others and has_images(root / name)]
    splits_of, rests = zip(*map(split_in_name, names), strict=True) if names else ((), ())
    are_parts = all(splits_of) and (len(set(splits_of)) > 1 or not re.search("[a-z]", "".join(rests)))
    return [] if are_parts or any(name.lower() == "images" for name in names) else names


def find_class_folders(root: Path, split: str) -> dict[str, list[str]]:
    """The folders of every class of a split, relative to the root; the name of a class is that of its folder.

    Folders whose names differ only in their Unicode form are one class. Without a train folder, the folders of images
    in the root are the classes.
    """
    parent = find_split_folder(root, split)
    names = list_image_folders(root / parent) if parent else list_flat_classes(root) if split == "train" else []
    if parent and [name.lower() for name in names] == ["images"]:
        inside = f"{parent}/{names[0]}"
        if 2 * len(list_images(root, inside)) < len(list_images_below(root, inside)):  # train/images/<class>/*
            parent, names = inside, list_image_folders(root / inside)
    folders: dict[str, list[str]] = {}
    for name in names:
        folders.setdefault(normal_name(name), []).append(posixpath.join(parent or "", name))
    return folders


def list_class_folders(root: Path, split: str) -> list[str]:
    """Sorted names of the classes that have a folder in a split."""
    return sorted(find_class_folders(root, split))


# Images


def list_images(root: Path, folder: str) -> list[str]:
    """Sorted image files directly in root/folder, relative to root. Raises `UserError` for an unprintable name."""
    images = [name for name in list_folder(root / folder)[0] if is_image(name)]
    if odd := [name for name in images if not name.isprintable()]:
        raise UserError(f"{root / folder}: the file name {odd[0]!r} has unprintable characters; rename the file")
    return [posixpath.join(folder, name) for name in images]


def is_link_above(folder: Path) -> bool:
    """Whether a folder is a link to one that holds it: it would be walked without end."""
    return folder.is_symlink() and folder.parent.resolve().is_relative_to(folder.resolve())


def list_images_below(root: Path, folder: str = "", without: str | None = None) -> list[str]:
    """Images of a folder and all folders in it but `without` and folders of masks, relative to root.

    Those in folder/images/ are first, then those directly in the folder.
    """
    visible = [name for name in list_image_folders(root / folder) if not is_link_above(root / folder / name)]
    below = [posixpath.join(folder, name) for name in visible]
    below = sorted((name for name in below if name != without), key=lambda name: file_name(name).lower() != "images")
    found = [list_images_below(root, name, without) for name in below]
    first = bool(below) and file_name(below[0]).lower() == "images"
    return [*(found[0] if first else []), *list_images(root, folder), *(f for part in found[first:] for f in part)]


def name_junk(folder: str) -> str:
    """What the files of a hidden folder, or of one that a system left, are called in the list of ignored files."""
    return f"{folder}/* (hidden or left by a system)"


def list_unused(root: Path, used: Set[str], without: Path | None = None) -> tuple[Counter[str], Counter[str]]:
    """(other files by name or ending, images by folder) below the root, but not in `without`, that are not used."""
    others: Counter[str] = Counter()
    images: Counter[str] = Counter()
    by_ending: dict[str, Counter[str]] = {}
    for place, folders, names in os.walk(root, followlinks=True):
        below = {name: Path(place) / name for name in folders}
        folders[:] = [name for name in folders if not is_link_above(below[name]) and below[name] != without]
        parts = Path(place).relative_to(root).parts
        above = "".join(f"{part}/" for part in parts)
        junk = next((part for part in parts if part in JUNK_FOLDERS or part.startswith(".")), None)
        for name in (name for name in names if above + name not in used):
            if junk:
                others[name_junk(junk)] += 1
            elif is_image(name):
                images["/".join(parts) or "."] += 1
            else:
                ending = "_boxes.txt" if name.endswith("_boxes.txt") else os.path.splitext(name)[1]  # noqa: PTH122
                by_ending.setdefault(ending.lower() or name, Counter())[name] += 1
    for ending, counted in by_ending.items():
        others[next(iter(counted)) if len(counted) == 1 else f"*{ending}"] += counted.total()
    return others, images


# Templates and archives


def list_csv_files(names: Sequence[str], endings: str = "csv|tsv") -> list[str]:
    """The names with these endings, also as .csv.zip or .csv.gz, unless the csv itself is among the names."""
    found = [name for name in names if re.search(rf"(?i)\.({endings})(\.(zip|gz))?$", name)]
    return [name for name in found if (plain := re.sub(r"(?i)\.(zip|gz)$", "", name)) == name or plain not in names]


def is_template_name(name: str) -> bool:
    """Whether a file is called as templates are: submission_format.csv is one, train_resampled.csv is not."""
    if re.search(r"(?i)(example|format)[_ -]?submission|submission[_ -]?(example|format)(?![a-z])", name):
        return True
    start = r"(?i:(?<![^\W\d_])|(?<=submission))(?i:sample)|(?<=[a-z])Sample"
    return bool(re.search(rf"(?i:template)|({start})(?i:(?![dr]))", name))


def choose_templates(names: Sequence[str]) -> list[str]:
    """submission_sample.csv if it is among the names, else every csv that is called as templates are."""
    if TEMPLATE_NAME in names:
        return [TEMPLATE_NAME]
    return list(filter(is_template_name, list_csv_files(names)))


def list_unread(folder: Path, names: Sequence[str], read: Collection[Path]) -> list[str]:
    """The names in a folder that are not those of files that were read, such as a csv of labels."""
    known = {path.resolve() for path in read}
    return [name for name in names if (folder / name).resolve() not in known]


def find_template(root: Path, read: Collection[Path] = ()) -> Path | None:
    """The submission template in a dataset's root, none of the files that were `read` for something else.

    Raises `UserError` if several files could be it.
    """
    found = list_unread(root, choose_templates(list_folder(root)[0]), read)
    if len(found) > 1:
        raise UserError(
            f"{root}: {' and '.join(found)} could each be the template; "
            f"rename the right one {TEMPLATE_NAME}, or choose it with --template"
        )
    return root / found[0] if found else None


def list_archives(folder: Path) -> list[Path]:
    """Packed files in a folder that may hold images."""
    packed = re.compile(r"(?i)\.(zip|tar|tgz|tar\.\w+|7z|rar)$")
    return [folder / name for name in list_folder(folder)[0] if packed.search(name)]


def show_names(names: Sequence[str]) -> str:
    """The first three names, with an ellipsis if there are more: for messages."""
    return ", ".join(names[:3]) + ", ..." * (len(names) > 3)
