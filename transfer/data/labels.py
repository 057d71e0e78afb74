"""Labels: from a csv or file names, the order of the classes, their names, and the template of a submission."""

import csv
import io
import operator
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from transfer.data.layouts import (
    EXPECTED,
    NATURAL_ORDER,
    WNIDS_NAME,
    file_name,
    find_split_folder,
    list_class_folders,
    list_folder,
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


def order_labels(labels: Iterable[str]) -> list[str]:
    """The distinct labels of a column in class order: numbers by value, else natural order."""
    distinct = set(labels)
    if all(re.fullmatch(r"-?[0-9]+(\.[0-9]+)?", label) for label in distinct):
        return sorted(distinct, key=lambda label: (float(label), label))
    return sorted(distinct, key=natural_key)


# Labels in a csv, or in file names

MOST_TABLE_BYTES = 64 * 2**20  # a larger file is read only if --labels_csv names it


@dataclass(frozen=True)
class LabelOptions:
    """What a user says about labels that are not folder names; None is decided from the files."""

    labels_csv: str | None = None
    image_column: str | None = None
    label_column: str | None = None
    label_pattern: str | None = None


class ImageNames:
    """Which images a name can mean: a path or the last parts of one, with or without the extension."""

    def __init__(self, files: Sequence[str]):
        self.paths = {normal_name(file): {file} for file in files}
        self.endings: dict[str, set[str]] = {}
        self.stems: dict[str, set[str]] = {}
        for path, found in self.paths.items():
            parts = path.split("/")
            for i in range(len(parts)):
                ending = "/".join(parts[i:])
                self.endings.setdefault(ending, set()).update(found)
                self.stems.setdefault(ending.rpartition(".")[0], set()).update(found)
        self.path_stems = {path.rpartition(".")[0]: self.stems[path.rpartition(".")[0]] for path in self.paths}

    def find(self, value: str, base: str = "") -> set[str]:
        """The images that `value` can mean, where a path may start in the folder `base` or far above the root."""
        name = normal_name(value.strip().replace("\\", "/")).removeprefix("./")
        here = f"{base}/{name}" if base else name
        for table, key in ((self.paths, here), (self.endings, name), (self.path_stems, here), (self.stems, name)):
            if name and key in table:
                return table[key]
        parts = name.split("/")
        above = ("/".join(parts[i:]) for i in range(1, len(parts)))
        return next((found for key in above if (found := self.paths.get(key) or self.path_stems.get(key))), set())


@dataclass(frozen=True)
class LabelTable:
    """A csv or txt file whose rows name images."""

    path: Path
    columns: list[str]
    rows: list[tuple[int, list[str]]]  # (line number, cells)
    images: dict[str, list[set[str]]]  # column that names images -> the images of each row

    def column(self, name: str) -> list[str]:
        """The cells of a column, stripped, in composed Unicode form."""
        position = self.columns.index(name)
        return [normal_name(cells[position].strip()) for _, cells in self.rows]


def _split_rows(path: Path) -> list[tuple[int, list[str]]]:
    """(line number, cells) of a csv with `,`, `;` or tab, or of lines `path label` in a txt. Raises `UserError`."""
    text = read_text(path)
    first = text.partition("\n")[0]
    delimiter = max(",;\t", key=first.count)
    if delimiter not in first:
        return [(n, line.rsplit(None, 1)) for n, line in enumerate(text.splitlines(), 1) if line.strip()]
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    try:
        return [(reader.line_num, row) for row in reader if row]
    except csv.Error as fault:
        raise UserError(f"{path}: is not a csv file (line {reader.line_num}: {fault})") from None


def read_label_table(path: Path, names: ImageNames, base: str = "") -> LabelTable:
    """Read a csv and find the columns in which at least half of the rows name an image of their own.

    Raises `UserError`.
    """
    rows = _split_rows(path)
    width = len(rows[0][1]) if rows else 0
    for line, cells in rows:
        if len(cells) != width:
            raise UserError(f"{path}: line {line} has {len(cells)} columns, but line {rows[0][0]} has {width}")
    images = {}
    for position in range(width):
        found = [names.find(cells[position], base) for _, cells in rows]
        if 2 * len(set().union(*found)) >= max(len(rows) - 1, 1) and any(found):
            images[position] = found
    has_header = bool(rows) and not any(found[0] for found in images.values())
    columns = [cell.strip() for cell in rows[0][1]] if has_header else [f"column {n + 1}" for n in range(width)]
    if len(set(columns)) < width:
        raise UserError(f"{path}: two columns have the same name; rename one")
    return LabelTable(path, columns, rows[has_header:], {columns[p]: f[has_header:] for p, f in images.items()})


def _list_tables(folder: Path) -> list[Path]:
    """Files in a folder that may hold labels; templates are left out."""
    paths = [folder / name for name in list_folder(folder)[0] if re.search(r"(?i)\.(csv|tsv|txt)$", name)]
    names_template = re.compile(r"(?i)(sample|template|submission)")
    return [p for p in paths if not names_template.search(p.name) and p.stat().st_size <= MOST_TABLE_BYTES]


def _try_table(path: Path, names: ImageNames, base: str) -> LabelTable | None:
    """The table in a file, or None if it is something else, such as notes."""
    try:
        table = read_label_table(path, names, base)
    except UserError:
        return None
    return table if table.images and len(table.columns) > 1 else None


def find_label_tables(root: Path, files: Sequence[str]) -> list[LabelTable]:
    """The tables that name images, in the root and its train and val folders; else those in the folder above."""
    splits = [folder for split in ("train", "val") if (folder := find_split_folder(root, split))]
    for places in (["", *splits], [".."]):
        paths = [(place, path) for place in places for path in _list_tables(root / place)]
        names = ImageNames(files if paths else [])
        tables = [table for place, path in paths if (table := _try_table(path, names, place.strip(".")))]
        if tables:
            return tables
    return []


def _choose_column(table: LabelTable, wanted: str | None, fitting: Sequence[str], flag: str) -> str:
    """The wanted column, or the only one that fits. Raises `UserError`."""
    if wanted is not None and wanted not in table.columns:
        raise UserError(f"--{flag} {wanted}: {table.path} has no such column, only {', '.join(table.columns)}")
    if wanted is None and len(fitting) != 1:
        what = f"{', '.join(fitting)} could each be" if fitting else f"none of {', '.join(table.columns)} seems to be"
        raise UserError(
            f"{table.path}: {what} the {flag.replace('_', ' ')}; choose it with --{flag}, or move the file away"
        )
    return wanted or fitting[0]


def choose_columns(table: LabelTable, options: LabelOptions) -> tuple[str, str]:
    """The names of the image and the label column. Raises `UserError` where several fit, or none."""
    images = list(table.images)
    if len(images) > 1 and all(table.images[name] == table.images[images[0]] for name in images):
        images = images[:1]  # such as an id and a path
    image = _choose_column(table, options.image_column, images, "image_column")
    others = [name for name in table.columns if name != image and name not in table.images]
    if len(others) > 1:  # a label repeats, but a row number or a note does not, and a constant tells nothing
        others = [name for name in others if 1 < len(set(table.column(name))) <= len(table.rows) / 2]
    return image, _choose_column(table, options.label_column, others, "label_column")


def read_labels(table: LabelTable, options: LabelOptions, names: ImageNames) -> dict[str, str]:
    """The label of every image that a table names. Raises `UserError`."""
    image, label = choose_columns(table, options)
    values, labels = table.column(image), table.column(label)
    found = table.images.get(image) or [names.find(value) for value in values]
    label_of: dict[str, str] = {}
    faults: dict[str, list[str]] = {}
    for (line, _), value, images, text in zip(table.rows, values, found, labels, strict=True):
        fault = None
        if len(images) != 1:
            fault = "rows name several images; write the folder and the extension" if images else "rows have no image"
        elif not text:
            fault = "rows have no label"
        elif label_of.setdefault(next(iter(images)), text) != text:
            fault = "rows give an image a second label"
        if fault:
            faults.setdefault(fault, []).append(f"line {line}, {value}")
    for fault, places in faults.items():
        raise UserError(f"{table.path}: {len(places)} {fault} ({places[0]}); correct the file, or remove the rows")
    return label_of


def _choose_tables(root: Path, files: Sequence[str], options: LabelOptions, names: ImageNames) -> list[LabelTable]:
    """The table of --labels_csv, or those found: one for all images, or one each for train and val."""
    if options.labels_csv:
        path = Path(options.labels_csv).expanduser()
        path = path if path.is_file() else root / options.labels_csv
        base = path.parent.relative_to(root).as_posix() if path.is_relative_to(root) else ""
        return [read_label_table(path, names, base.strip("."))]
    tables, validation = find_label_tables(root, files), find_split_folder(root, "val")
    if not tables:
        raise UserError(f"{root}: has no csv that names its images; give one with --labels_csv")
    in_val = [
        all(file.startswith(f"{validation}/") for rows in table.images.values() for row in rows for file in row)
        for table in tables
    ]
    if in_val.count(True) > 1 or in_val.count(False) > 1:
        listed = " and ".join(table.path.name for table in tables)
        raise UserError(f"{root}: {listed} could each hold the labels; choose one with --labels_csv")
    return tables


def _label_by_pattern(files: Sequence[str], pattern: str) -> dict[str, str]:
    """The label of every image whose file name matches a regular expression with one group. Raises `UserError`."""
    try:
        expression = re.compile(pattern)
    except re.error as fault:
        raise UserError(f"--label_pattern {pattern}: is not a regular expression ({fault})") from None
    if expression.groups != 1:
        raise UserError(f"--label_pattern {pattern}: has {expression.groups} groups; the label is the only group")
    matches = {file: expression.search(normal_name(file_name(file))) for file in files}
    missing = [file for file, match in matches.items() if match is None or not match[1]]
    if missing:
        raise UserError(f"--label_pattern {pattern}: {len(missing)} images do not match ({missing[0]})")
    return {file: match[1] for file, match in matches.items() if match}


def label_images(root: Path, files: Sequence[str], options: LabelOptions) -> tuple[dict[str, str], str, list[Path]]:
    """(label of every image that has one, where the labels come from, the tables used). Raises `UserError`."""
    if options.label_pattern:
        return _label_by_pattern(files, options.label_pattern), f"file names by {options.label_pattern}", []
    names = ImageNames(files)
    tables = _choose_tables(root, files, options, names)
    label_of: dict[str, str] = {}
    for table in tables:
        label_of |= read_labels(table, options, names)
    source = " and ".join(f"column {choose_columns(table, options)[1]} of {table.path.name}" for table in tables)
    return label_of, source, [table.path for table in tables]


def check_folder_labels(root: Path, class_of: Mapping[str, str]) -> None:
    """Refuse class folders beside a csv that sorts the same images into other classes. Raises `UserError`."""
    names = ImageNames(list(class_of))
    for table in find_label_tables(root, list(class_of)):
        try:
            label_of = read_labels(table, LabelOptions(), names)
        except UserError:  # it describes the images, but does not label them
            continue
        pairs = {(class_of[file], label) for file, label in label_of.items()}
        if len(pairs) > len({class_id for class_id, _ in pairs}):  # a folder has images of several labels
            raise UserError(
                f"{table.path}: sorts the images into other classes than their folders do; use it with --labels_csv, "
                "or move it out of the dataset"
            )


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
