"""Labels: the order of the classes, their names, and the template that a submission fills in."""

import csv
import io
import operator
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

from transfer.data.layouts import (
    EXPECTED,
    NATURAL_ORDER,
    WNIDS_NAME,
    list_class_folders,
    natural_key,
    normal_name,
    read_lines,
    read_text,
)
from transfer.errors import UserError

HEADER = ["image_id", "label"]

# The order of the classes


def read_class_list(path: Path) -> list[str]:
    """The class ids that a file lists, one per line, in label order. Raises `UserError`."""
    class_ids = [normal_name(line) for line in read_lines(path)]
    if not class_ids:
        raise UserError(f"{path}: is empty; it must list one class id per line, in label order")
    repeated = [class_id for class_id, count in Counter(class_ids).items() if count > 1]
    if repeated:
        raise UserError(f"{path}: lists {repeated[0]} more than once ({len(repeated)} repeated in all)")
    return class_ids


def read_class_order(root: Path, classes_file: Path | None, has_template: bool) -> tuple[list[str], str]:
    """(class ids in label order, what gave the order). This is the only place that decides the class order.

    The order is that of the lines of `classes_file`, else of the lines of wnids.txt, else the natural order of the
    class folders. Raises `UserError` where the folders' order would be a guess: with a words.txt, which belongs to a
    wnids.txt, and with a template, unless the folders are named by their labels, 0 to N-1.
    """
    if classes_file is not None:
        return read_class_list(classes_file), classes_file.name
    if (root / WNIDS_NAME).is_file():
        return read_class_list(root / WNIDS_NAME), WNIDS_NAME
    names = sorted(list_class_folders(root, "train"), key=natural_key)
    are_labels = all(name.isdecimal() and int(name) == label for label, name in enumerate(names))
    if (root / "words.txt").is_file() or (has_template and not are_labels):
        raise UserError(
            f"{root}: has no wnids.txt, which gives every class its label; expected {EXPECTED}; "
            "if the class folders are not named 0 to N-1, give their order with --classes_file"
        )
    return names, NATURAL_ORDER


# The names of the classes


def read_synonyms(root: Path, class_ids: Sequence[str], label_order: str = WNIDS_NAME) -> list[str]:
    """The synonyms of each class from words.txt (`wnid<TAB>synonym, synonym`); without that file, the class ids."""
    path = root / "words.txt"
    if not path.is_file():
        return list(class_ids)
    synonyms = dict(line.split("\t", 1) for line in read_lines(path) if "\t" in line)
    unknown = [class_id for class_id in class_ids if class_id not in synonyms]
    if unknown:
        raise UserError(
            f"{root / label_order}: {unknown[0]} is an unknown wnid: not in words.txt ({len(unknown)} unknown in all)"
        )
    return [synonyms[class_id].strip() or class_id for class_id in class_ids]


def name_classes(class_ids: Sequence[str], synonyms: Sequence[str]) -> list[str]:
    """The first synonym of each class, followed by the class id in parentheses where several classes share it."""
    pairs = zip(class_ids, synonyms, strict=True)
    # Without words.txt the synonyms are the class id, which may contain commas itself.
    names = [class_id if s == class_id else s.split(",")[0].strip() or class_id for class_id, s in pairs]
    counts = Counter(names)
    return [
        name if counts[name] == 1 else f"{name} ({class_id})" for name, class_id in zip(names, class_ids, strict=True)
    ]


# The template, and the submission made from it


def show_first(values: Sequence[str], count: int = 3) -> str:
    """The first values, quoted, with an ellipsis if there are more: for messages."""
    return ", ".join(repr(v) for v in values[:count]) + (", ..." if len(values) > count else "")


def read_rows(path: Path) -> list[tuple[int, list[str]]]:
    """(line number as in an editor, cells) of every row of a csv that is not blank. Raises `UserError`."""
    reader = csv.reader(io.StringIO(read_text(path)))
    try:
        return [(reader.line_num, row) for row in reader if row]
    except csv.Error as fault:
        raise UserError(f"{path}: is not a csv file (line {reader.line_num}: {fault})") from None


def read_template(path: Path) -> pd.DataFrame:
    """The template as text: an id column and a label column, in the file's order. Raises `UserError`."""
    # Not pandas.read_csv: it drops a third cell of a row with a warning, and renames equal columns.
    rows = read_rows(path)
    if not rows:
        raise UserError(f"{path}: is empty; a template has a header, {','.join(HEADER)}, and a row for each id")
    for line, cells in rows:
        if len(cells) != 2:
            raise UserError(f"{path}: line {line} has {len(cells)} columns; a template has two, {','.join(HEADER)}")
    table = pd.DataFrame([cells for _, cells in rows[1:]], columns=rows[0][1], dtype=str)
    ids = table.iloc[:, 0]
    if table.empty or (ids.str.strip() == "").any():
        raise UserError(f"{path}: has {'no rows' if table.empty else 'a row without an id'}")
    if ids.duplicated().any():
        raise UserError(f"{path}: id {ids[ids.duplicated()].iloc[0]!r} appears twice")
    return table


def make_template(ids: Sequence[str]) -> pd.DataFrame:
    """A template that lists these ids in order, with label 0."""
    return pd.DataFrame({HEADER[0]: list(ids), HEADER[1]: "0"}, dtype=str)


def open_template(path: Path | None, test_ids: Sequence[str]) -> pd.DataFrame:
    """The rows of a complete submission: the template's, then one for each test image that the template leaves out."""
    if path is None:
        return make_template(test_ids)
    template = read_template(path)
    listed = set(template.iloc[:, 0])
    rest = [[image_id, "0"] for image_id in test_ids if image_id not in listed]
    return pd.concat([template, pd.DataFrame(rest, columns=template.columns, dtype=str)], ignore_index=True)


def check_template(template: pd.DataFrame, test_ids: Sequence[str], path: Path, may_be_short: bool = False) -> None:
    """Check that a template lists exactly the test images, or a part of them if it `may_be_short`.

    Raises `UserError`.
    """
    ids = set(template.iloc[:, 0])
    unlisted, unfound = sorted(set(test_ids) - ids), sorted(ids - set(test_ids))
    faults = []
    if unfound:
        faults.append(f"{len(unfound)} ids have no test image ({show_first(unfound)})")
    if unlisted and not may_be_short:
        faults.append(f"{len(unlisted)} test images have no row ({show_first(unlisted)})")
    if faults:
        raise UserError(f"{path}: does not match the test images: {' and '.join(faults)}")


def render_submission(template: pd.DataFrame, label_of_id: Mapping[str, int]) -> bytes:
    """The bytes of a submission: the template's header, ids and order, labels joined by id. Raises `UserError`."""
    ids = list(template.iloc[:, 0])
    missing = [i for i in ids if i not in label_of_id]
    if missing:
        raise UserError(f"{len(missing)} ids of the template have no prediction ({show_first(missing)})")
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(template.columns)
    # operator.index refuses a float: int() would cut off its fraction.
    writer.writerows((i, operator.index(label_of_id[i])) for i in ids)
    return text.getvalue().encode()
