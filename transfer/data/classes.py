"""Which label a class has, and what it is called."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from transfer import UserError
from transfer.data.layouts import EXPECTED, NATURAL_ORDER, list_class_folders, natural_key, read_lines


def read_class_list(path: Path) -> list[str]:
    """The classes that a file lists, one a line, in label order."""
    wnids = read_lines(path)
    if not wnids:
        raise UserError(f"{path}: is empty; it must list one wnid a line, in label order")
    repeated = [wnid for wnid, count in Counter(wnids).items() if count > 1]
    if repeated:
        raise UserError(f"{path}: lists {repeated[0]} more than once ({len(repeated)} repeated in all)")
    return wnids


def read_class_order(root: Path, classes_file: Path | None, has_template: bool) -> tuple[list[str], str]:
    """The classes in label order, and what gave the order. The only place where class order is decided.

    The order is the lines of `classes_file` if one is given, else the lines of wnids.txt, else the natural order of
    the class folders. Raises `UserError` where that last one would be a guess: beside a words.txt, whose wnids.txt
    must be missing, and beside a template, unless the folders are the labels themselves, 0 to N-1.
    """
    if classes_file is not None:
        return read_class_list(classes_file), classes_file.name
    if (root / "wnids.txt").is_file():
        return read_class_list(root / "wnids.txt"), "wnids.txt"
    names = sorted(list_class_folders(root, "train"), key=natural_key)
    are_labels = all(name.isdecimal() and int(name) == label for label, name in enumerate(names))
    if (root / "words.txt").is_file() or (has_template and not are_labels):
        raise UserError(
            f"{root}: no wnids.txt, which gives every class its label; expected {EXPECTED}; "
            "--classes_file gives the order where class folders are not simply 0 to N-1"
        )
    return names, NATURAL_ORDER


def read_glosses(root: Path, wnids: Sequence[str], listed_in: str = "wnids.txt") -> list[str]:
    """Synonyms of each class from words.txt (`wnid<TAB>synonym, synonym`); the wnids where there is no such file."""
    path = root / "words.txt"
    if not path.is_file():
        return list(wnids)
    glosses = dict(line.split("\t", 1) for line in read_lines(path) if "\t" in line)
    unknown = [wnid for wnid in wnids if wnid not in glosses]
    if unknown:
        raise UserError(
            f"{root / listed_in}: {unknown[0]} is an unknown wnid: not in words.txt ({len(unknown)} unknown in all)"
        )
    return [glosses[wnid].strip() or wnid for wnid in wnids]


def name_classes(wnids: Sequence[str], glosses: Sequence[str]) -> list[str]:
    """First synonym of each class, with the wnid where two classes share it."""
    names = [gloss.split(",")[0].strip() or wnid for wnid, gloss in zip(wnids, glosses, strict=True)]
    counts = Counter(names)
    return [name if counts[name] == 1 else f"{name} ({wnid})" for name, wnid in zip(names, wnids, strict=True)]
