"""A table that names images: how it is read, and which of its columns hold labels, class names and splits."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from transfer.data.labels import (
    SEPARATORS,
    ImageNames,
    find_template_above,
    is_missing,
    plain_path,
    read_csv_text,
    shorten,
    split_rows,
    to_number,
)
from transfer.data.listing import (
    SPLIT_FOLDERS,
    find_split_folder,
    find_template,
    list_images_below,
    normal_name,
    show_names,
    split_in_name,
)
from transfer.errors import UserError

# What a cell may call a split, without case and signs; PublicTest and PrivateTest are Kaggle's.
SPLIT_WORDS = {word: split for split, words in SPLIT_FOLDERS.items() for word in words} | {
    "dev": "val",
    "eval": "val",
    "evaluation": "val",
    "holdout": "test",
    "publictest": "test",
    "privatetest": "test",
}
FLAG_COLUMN = re.compile(r"(?i)is[ _]?(val|valid|validation|test|testing)")  # its cells are 0 and 1, or False and True
FLAGS = ({"0", "1"}, {"0.0", "1.0"}, {"false", "true"})
# Flags in a column of such a name may tell the splits in a way that is not known.
MAYBE_SPLIT_COLUMN = re.compile(r"(?i)(is[ _]?)?(train|training|val|valid|validation|test)|split|subset|usage")
# What a column is called that holds labels, and what it is called if it may hold them.
LABEL_COLUMN = re.compile(
    r"(?i)(labels?|class(es)?|categor(y|ies)|target|species|breed)([ _-]?(id|name)s?)?|diagnosis|dx"
)
MAYBE_LABEL_COLUMN = re.compile(r"(?i)label|class|categor|target|species|breed|diagnosis|^(dx|y|column \d+)$")
EXCEPTIONS = 0.05  # share of values that may have several labels, by mistakes, in a column that divides the classes


@dataclass(frozen=True)
class DataOptions:
    """What a user says about a dataset, as in `RunArguments`; None is decided from the files."""

    classes_file: str | None = None
    template: str | None = None
    submission_labels: str | None = None
    labels_csv: str | None = None
    image_column: str | None = None
    label_column: str | None = None
    group_column: str | None = None
    label_pattern: str | None = None

    @property
    def classes_path(self) -> Path | None:
        """The path of the classes file."""
        return Path(self.classes_file).expanduser() if self.classes_file else None

    @property
    def template_path(self) -> Path | None:
        """The path of the template, if the user gives one."""
        return Path(self.template).expanduser() if self.template else None

    @property
    def names_a_table(self) -> bool:
        """Whether the user says that the labels are in a csv."""
        return bool(self.labels_csv or self.image_column or self.label_column or self.group_column)


@dataclass(frozen=True)
class LabelTable:
    """A csv or txt file whose rows name images."""

    path: Path
    columns: list[str]
    rows: list[tuple[int, list[str]]]  # (line number, cells)
    images: dict[str, list[set[str]]]  # column that names images -> the images of each row
    test_rows: int = 0  # that name test images, and are left out
    root: Path | None = None  # of the dataset, whose template may show which column is the label

    def column(self, name: str) -> list[str]:
        """The cells of a column, stripped, in composed Unicode form."""
        position = self.columns.index(name)
        return [normal_name(cells[position].strip()) for _, cells in self.rows]

    def named_images(self) -> set[str]:
        """All images that the rows can mean."""
        return {file for rows in self.images.values() for files in rows for file in files}


@dataclass(frozen=True)
class LabelColumns:
    """What the columns of a table hold."""

    image: str
    labels: list[str]  # one column, or one for each class
    names: str | None  # the names of classes whose labels are numbers
    split: str | None
    splits: list[str | None]  # train, val or test for each row, by the split column
    passed_over: Sequence[str] = ()  # columns that could hold labels as well


# Reading


def read_rows(path: Path) -> list[tuple[int, list[str]]]:
    """(line number, cells) of a csv with `,`, `;` or tab, or of lines `path label` in a txt. Raises `UserError`."""
    text, _ = read_csv_text(path)
    first, lines = text.partition("\n")[0], [line for line in text.splitlines() if line.strip()]
    separator = max(SEPARATORS, key=lambda sign: (all(sign in line for line in lines), first.count(sign)))
    if separator not in first:
        return [(n, line.rsplit(None, 1)) for n, line in enumerate(text.splitlines(), 1) if line.strip()]
    # Spreadsheets leave rows of separators alone below the last one.
    return [(line, cells) for line, cells in split_rows(path, text, separator) if any(map(str.strip, cells))]


def transpose(rows: Sequence[tuple[int, list[str]]]) -> list[tuple[str, ...]]:
    """The cells of each column, with the header, cut to the shortest row."""
    return list(zip(*(cells for _, cells in rows), strict=False))


def read_label_table(path: Path, names: ImageNames, base: str = "") -> LabelTable:
    """Read a csv and find the columns in which at least half of the rows name an image of their own.

    Raises `UserError`.
    """
    rows = read_rows(path)
    width = len(rows[0][1]) if rows else 0
    for line, cells in rows:
        if len(cells) != width:
            fault = f"line {line} has {len(cells)} columns, but line {rows[0][0]} has {width}"
            raise UserError(f"{path}: {fault}; correct it, or move the file away")
    images, of_test = _find_images([[cells[position] for _, cells in rows] for position in range(width)], names, base)
    has_header = bool(rows) and 0 not in of_test and not any(found[0] for found in images.values())
    columns = [cell.strip() for cell in rows[0][1]] if has_header else [f"column {n + 1}" for n in range(width)]
    if len(set(columns)) < width:
        raise UserError(f"{path}: two columns have the same name; rename one")
    kept = [row for row in range(has_header, len(rows)) if row not in of_test]
    found_in = {columns[position]: [found[row] for row in kept] for position, found in images.items()}
    return LabelTable(path, columns, [rows[row] for row in kept], found_in, len(of_test), names.root)


def _find_images(
    columns_of_cells: Sequence[Sequence[str]], names: ImageNames, base: str
) -> tuple[dict[int, list[set[str]]], set[int]]:
    """(position of each column that names images -> the images of each row, the rows that name test images)."""
    images: dict[int, list[set[str]]] = {}
    of_test: set[int] = set()
    for position, values in enumerate(columns_of_cells):
        found = [names.find(value, base) for value in values]
        tested: set[int] = set()
        if any(found) and not all(found[1:]):
            tested = {row for row, value in enumerate(values) if not found[row] and names.means_test_image(value)}
        others = len(values) - 1 - len({values[row] for row in tested})
        if any(found) and 2 * len(set().union(*found)) >= others:
            rest = ["" if row in tested else value for row, value in enumerate(values)]
            images[position] = found if all(found[1:]) else [*found[:1], *names.find_all(rest, base)[1:]]
            of_test |= tested
    if not images:  # names that are only alike must be those of more images, since any numbers may be alike
        for position, values in enumerate(columns_of_cells):
            of_tests = [names.tests.plain.get(plain_path(value)) for value in values[1:]]
            found = [] if all(of_tests) else names.find_all(values, base)  # else it may be a template
            if len(set().union(*found)) >= max((len(values) - 1) / 2, len(names.paths) / 4, 1):
                images[position] = found
    return images, {row for row in of_test if not any(found[row] for found in images.values())}


# Splits


def _read_splits(table: LabelTable, column: str) -> list[str | None]:
    """The split that each cell means: a word, or a flag in a column that is called `is_valid` or the like."""
    cells = [cell.casefold() for cell in table.column(column)]
    flagged = FLAG_COLUMN.fullmatch(column)
    if flagged and set(cells) in FLAGS:
        return [SPLIT_WORDS[flagged[1].lower()] if cell in ("1", "1.0", "true") else "train" for cell in cells]
    return [SPLIT_WORDS.get(re.sub(r"[\W_]+", "", cell)) for cell in cells]


def list_split_columns(table: LabelTable, columns: Sequence[str]) -> list[str]:
    """The columns that say in every row whether an image is to train, to validate or to test."""
    # A class may be called `train`.
    splits = {name: set(_read_splits(table, name)) for name in columns if not LABEL_COLUMN.fullmatch(name)}
    return [name for name, found in splits.items() if "train" in found and len(found) > 1 and None not in found]


def _find_split_column(table: LabelTable, options: DataOptions) -> str | None:
    """The column that tells the splits; None without one. Raises `UserError` for an unclear one, or for several."""
    others = [name for name in table.columns if name not in table.images]
    chosen = (options.label_column, options.group_column)
    columns = [name for name in others if name not in chosen and not LABEL_COLUMN.fullmatch(name)]
    found = list_split_columns(table, columns)
    for name in columns if len(others) > 1 else []:
        cells, splits = table.column(name), set(_read_splits(table, name))
        has_flags = {cell.casefold() for cell in cells} in FLAGS
        is_called_so = bool(MAYBE_SPLIT_COLUMN.fullmatch(name)) and len(set(cells)) > 1
        if name not in found and (len(splits - {None}) > 1 or (is_called_so and (has_flags or splits - {None}))):
            odd = "no train in it"
            if None in splits or has_flags:
                odd = f"{shorten(next(cell for cell in cells if cell.casefold() not in SPLIT_WORDS))} in it"
            raise UserError(
                f"{table.path}: column {name} seems to tell which images are to validate or to test, but has {odd}; "
                "write train, val or test in every row, or remove the column"
            )
    if len(found) > 1:
        raise UserError(f"{table.path}: {show_names(found)} each tell which images are to train; remove all but one")
    return found[0] if found else None


# Labels


def label_names(table: LabelTable) -> list[str]:
    """The columns that may hold labels by their names, or that have no name; `y` beside `x` is a coordinate."""
    has_x = any(column.lower() == "x" for column in table.columns)
    return [n for n in table.columns if MAYBE_LABEL_COLUMN.search(n) and not (has_x and n.lower() == "y")]


def label_columns_of_template(table: LabelTable, template: Path | None) -> set[str]:
    """The label columns, in lower case, of the given template, or of the one in the dataset or the folder above."""
    try:
        path = template or (_find_any_template(table.root, table.path) if table.root else None)
        return {cell.strip().casefold() for cell in read_rows(path)[0][1][1:]} if path else set()
    except (UserError, IndexError):  # said when the template is read
        return set()


def _find_any_template(root: Path, table: Path) -> Path | None:
    folder = find_split_folder(root, "test")
    tests = list_images_below(root, folder) if folder else []
    return find_template(root, [table]) or find_template_above(root.absolute().parent, tests, [table])


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


def is_one_hot(table: LabelTable, columns: Sequence[str]) -> bool:
    """Whether several columns hold 0 or 1, and each row has one 1: a column for each class.

    Raises `UserError` where all hold 0 or 1, but a row has no 1, or several.
    """
    numbers = [[to_number(cell) for cell in table.column(name)] for name in columns]
    if len(columns) < 2 or any(number not in (0, 1) for column in numbers for number in column):
        return False
    for (line, _), cells in zip(table.rows, zip(*numbers, strict=True), strict=True):
        if cells.count(1) != 1:
            raise UserError(
                f"{table.path}: line {line} has 1 in {cells.count(1)} of the columns {show_names(columns)}, but an "
                "image has one class here; choose a label column with --label_column, or move the file away"
            )
    return True


def label_cells(table: LabelTable, columns: Sequence[str]) -> list[str]:
    """The label of each row: the cell of the only column, or the name of the column that holds 1, if only one does."""
    if len(columns) == 1:
        return table.column(columns[0])
    marked = zip(*([to_number(cell) == 1 for cell in table.column(name)] for name in columns), strict=True)
    return [normal_name(columns[marks.index(True)]) if marks.count(True) == 1 else "" for marks in marked]


def _are_one_to_one(first: Sequence[str], second: Sequence[str]) -> bool:
    """Whether equal cells of one column are beside equal cells of the other, and different ones beside different."""
    return len(set(first)) == len(set(second)) == len(set(zip(first, second, strict=True)))


def _divides(fine: Sequence[str], coarse: Sequence[str]) -> bool:
    """Whether the first column divides the classes of the second into smaller ones, but for a few mistakes."""
    smaller = len(set(fine))
    return smaller > len(set(coarse)) and len(set(zip(fine, coarse, strict=True))) - smaller <= EXCEPTIONS * smaller


def _are_numbers(cells: Sequence[str]) -> bool:
    return all(to_number(cell) is not None for cell in set(cells))


def _are_words(cells: Sequence[str]) -> bool:
    return all(to_number(cell) is None and not is_missing(cell) for cell in set(cells))


def _find_class_names(table: LabelTable, label: str, others: Sequence[str]) -> str | None:
    """The column that names the numbers in `label`: the only one of words, or the only one called as labels are."""
    labels = table.column(label)
    words = [name for name in others if name != label and _are_words(table.column(name))]
    if not _are_numbers(labels) or not words:
        return None
    called = [name for name in words if name in label_names(table)]
    found = [name for name in (words if len(words) == 1 else called) if _are_one_to_one(labels, table.column(name))]
    return found[0] if len(found) == 1 else None


def _lie_in_folders(table: LabelTable) -> bool:
    """Whether the images lie in several folders that are not those of splits, and that may be the classes."""
    parents = {tuple(file.split("/")[:-1]) for file in table.named_images()}
    return len({tuple(name for name in parts if not split_in_name(name)[0]) for parts in parents}) > 1


def _could_be_labels(table: LabelTable, columns: Sequence[str]) -> list[str]:
    """The columns whose values repeat, as those of labels do; without constants, notes and an index of pandas."""
    cells = {name: table.column(name) for name in columns}
    repeated = [name for name, values in cells.items() if 1 < len(set(values)) <= len(values) / 2]
    return [n for n in repeated if not (re.fullmatch("(Unnamed: [0-9]+)?", n) and all(map(str.isdecimal, cells[n])))]


def _list_likely(table: LabelTable, others: Sequence[str], fitting: Sequence[str]) -> list[str]:
    """The one column that holds the labels, or else all that may be meant.

    It is the only one of numbers, if the other fitting ones name these. Otherwise it is the only one that is called as
    labels are, or the numbers among these, unless another column divides its classes, which may then be meant.
    """
    cells = {name: table.column(name) for name in others}

    def find_numbers(group: Sequence[str]) -> list[str]:
        numbers = [name for name in group if _are_numbers(cells[name])]
        are_named = len(numbers) == 1 < len(group) and all(
            _are_one_to_one(cells[numbers[0]], cells[name]) for name in group
        )
        return numbers if are_named else []

    if numbers := find_numbers(fitting):
        return numbers
    called = [name for name in others if LABEL_COLUMN.fullmatch(name) and len(set(cells[name])) > 1]
    called = find_numbers(called) or called
    if len(called) != 1:
        return [name for name in others if name in called or name in fitting]
    # A column that repeats little may hold classes if it holds words; ids have digits.
    words = {n for n in others if len(set(cells[n])) < len(table.rows) and not re.search("[0-9]", "".join(cells[n]))}
    may_be_meant = {n for n in others if (n in fitting or n in words) and _divides(cells[n], cells[called[0]])}
    return [n for n in others if n in called or n in fitting or n in may_be_meant] if may_be_meant else called


def choose_columns(table: LabelTable, options: DataOptions, like: LabelColumns | None = None) -> LabelColumns:
    """Which columns name the images, their labels and so on; the labels as in `like`, if it is given.

    Raises `UserError` where several columns fit, or none.
    """
    images = list(table.images)
    if len(images) > 1 and all(table.images[name] == table.images[images[0]] for name in images):
        images = images[:1]  # such as an id and a path
    image = _choose_column(table, options.image_column, images, "image_column")
    split = _find_split_column(table, options)
    splits: list[str | None] = _read_splits(table, split) if split else [None] * len(table.rows)
    # Rows to test may have no label.
    known = replace(table, rows=[row for row, part in zip(table.rows, splits, strict=True) if part != "test"])
    taken = {image, split, options.group_column, *table.images}
    others = [name for name in table.columns if name not in taken]
    if like and set(like.labels) <= set(others):
        return LabelColumns(image, like.labels, like.names if like.names in others else None, split, splits)
    in_template = label_columns_of_template(table, options.template_path)
    called = [name for name in others if name.casefold() in in_template]
    fitting = others if len(others) == 1 and not split else _could_be_labels(known, others)
    if like:
        fitting = [name for name in others if LABEL_COLUMN.fullmatch(name) or re.fullmatch(r"column \d+", name)]
    elif split and len(others) == 1 and not called and _lie_in_folders(table):
        fitting = [name for name in others if name in label_names(table)]  # another one may be a note
    likely = fitting
    if options.label_column is None and not like and len(others) > 1:
        likely = called if len(called) == 1 else _list_likely(known, others, fitting)
        one_hot = called if len(called) > 1 else fitting
        if len(likely) != 1 and is_one_hot(known, one_hot):
            return LabelColumns(image, one_hot, None, split, splits)
    label = _choose_column(table, options.label_column, likely, "label_column")
    names = _find_class_names(known, label, others)
    passed_over = [name for name in fitting if name not in (label, names)] if options.label_column is None else []
    return LabelColumns(image, [label], names, split, splits, passed_over)
