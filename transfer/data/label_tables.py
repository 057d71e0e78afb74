"""Labels that stand in a csv or in file names instead of folder names."""

import contextlib
import re
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path

from transfer.data.labels import SEPARATORS, ImageNames, plain_path, read_csv_text, shorten, split_rows, to_number
from transfer.data.listing import (
    file_name,
    find_split_folder,
    find_template,
    is_template_name,
    list_csv_files,
    list_files,
    list_files_above,
    list_folder,
    list_images_below,
    natural_key,
    normal_name,
    show_names,
    split_in_name,
    split_of_word,
)
from transfer.errors import UserError

SEEN_ROWS = 50  # of a damaged csv
MOST_TABLE_BYTES = 64 * 2**20  # a larger file is read only if --labels_csv names it


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
class FoundLabels:
    """The labels of a dataset that has them in a csv or in file names."""

    label_of: dict[str, str]  # of every image that has one
    source: str  # where they come from, in words
    tables: list[Path] = field(default_factory=list)
    name_of: dict[str, str] = field(default_factory=dict)  # of each label, where another column names the classes
    split_of: dict[str, str] = field(default_factory=dict)  # train, val or test, of images whose table says it
    group_of: dict[str, str] = field(default_factory=dict)  # of the same images, with --group_column

    def name_classes(self, class_ids: Sequence[str]) -> list[str]:
        """The name of each class; two classes with one name keep their ids."""
        names = [self.name_of.get(class_id, class_id) for class_id in class_ids]
        return names if len(set(names)) == len(names) else list(class_ids)


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
    names: str | None = None  # the names of classes whose labels are numbers
    split: str | None = None  # train, val or test
    passed_over: Sequence[str] = ()  # columns that could hold labels as well


def _read_rows(path: Path) -> list[tuple[int, list[str]]]:
    """(line number, cells) of a csv with `,`, `;` or tab, or of lines `path label` in a txt. Raises `UserError`."""
    text, _ = read_csv_text(path)
    first, lines = text.partition("\n")[0], [line for line in text.splitlines() if line.strip()]
    separator = max(SEPARATORS, key=lambda sign: (all(sign in line for line in lines), first.count(sign)))
    if separator not in first:
        return [(n, line.rsplit(None, 1)) for n, line in enumerate(text.splitlines(), 1) if line.strip()]
    # Spreadsheets leave rows of separators alone below the last one.
    return [(line, cells) for line, cells in split_rows(path, text, separator) if any(map(str.strip, cells))]


def _columns_of(rows: Sequence[tuple[int, list[str]]]) -> list[tuple[str, ...]]:
    """The cells of each column, with the header, cut to the shortest row."""
    return list(zip(*(cells for _, cells in rows), strict=False))


def read_label_table(path: Path, names: ImageNames, base: str = "") -> LabelTable:
    """Read a csv and find the columns in which at least half of the rows name an image of their own.

    Raises `UserError`.
    """
    rows = _read_rows(path)
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


def list_tables(folder: Path, names: Sequence[str]) -> list[Path]:
    """The files in a folder, of these names, that may hold labels; templates and lists of test images are left out."""
    found = list_csv_files(names, "csv|tsv|txt")
    named = [name for name in found if not re.search(r"(?i)submission|^test", name)]
    labels = [name for name in named if not is_template_name(name)]
    if not labels:
        labels = [name for name in named if "label" in name.lower()]  # sample_labels.csv
    paths = [folder / name for name in labels if (folder / name).is_file()]  # not a link to nothing
    return [path for path in paths if path.stat().st_size <= MOST_TABLE_BYTES]


def _try_table(path: Path, names: ImageNames, base: str, refuse_damaged: bool) -> LabelTable | None:
    """The table in a file, or None if it is something else, such as notes.

    Raises `UserError` for a damaged csv whose rows name images, if that is wanted.
    """
    try:
        table = read_label_table(path, names, base)
    except UserError:
        if refuse_damaged and path.suffix.lower() != ".txt" and _seems_to_name_images(path, names, base):
            raise
        return None
    if not table.images or len(table.columns) < 2:
        return None
    # In train/ and val/, each row may be of another class.
    return None if not base and (_only_counts(table) or _names_by_chance(table, names)) else table


def _only_counts(table: LabelTable) -> bool:
    """Whether a table numbers the images, or tells their splits, and says nothing else of them."""
    others = [name for name in table.columns if name not in table.images]
    split = find_split_column(table, DataOptions())
    return bool(others) and all(name == split or _counts_rows(table.column(name)) for name in others)


def _names_by_chance(table: LabelTable, names: ImageNames) -> bool:
    """Whether a table numbers something else, such as the classes, and some images have the same numbers as names.

    No column then repeats some of its values, as labels do.
    """
    if 4 * len(table.named_images()) >= len(names.paths):
        return False
    columns = {name: table.column(name) for name in table.columns}
    are_numbers = all(map(str.isdecimal, (cell for name in table.images for cell in columns[name])))
    return are_numbers and all(len(set(cells)) in (1, len(cells)) for cells in columns.values())


def _seems_to_name_images(path: Path, names: ImageNames, base: str) -> bool:
    """Whether most of the first rows of a damaged csv name images, by numbers only in the first column."""

    def is_named(cells: Sequence[str]) -> bool:
        return any(names.find(cell, base) for n, cell in enumerate(cells) if n == 0 or not cell.strip().isdecimal())

    with contextlib.suppress(UserError):
        rows = [cells for _, cells in _read_rows(path)[1:SEEN_ROWS]]
        return 2 * sum(map(is_named, rows)) > len(rows)
    return False


def _counts_rows(cells: Sequence[str]) -> bool:
    """Whether a column numbers the rows, so that it is no label; two rows may also be two classes."""
    return len(cells) > 2 and any(list(cells) == [str(n + first) for n in range(len(cells))] for first in (0, 1))


def names_images_below(root: Path, table: LabelTable, files: Sequence[str]) -> bool:
    """Whether a table lies in the dataset, or in the folder above and each of at least half the images has a row."""
    if table.path.parent.resolve().is_relative_to(root.resolve()):
        return True
    sure = {next(iter(files)) for rows in table.images.values() for files in rows if len(files) == 1}
    return 2 * len(sure) >= len(files)


def find_label_tables(
    root: Path, files: Sequence[str], template: Path | None = None, refuse_damaged: bool = True
) -> list[LabelTable]:
    """The tables that name images, in the root and its train and val folders; else those in the folder above.

    The `template` is not among them, nor is a copy of it, which may have been unpacked with the dataset.
    Raises `UserError` for a damaged one in the dataset, unless that is to be passed over.
    """
    content = template.read_bytes() if template and template.is_file() else None
    splits = [folder for split in ("train", "val") if (folder := find_split_folder(root, split))]
    for places in (["", *splits], [".."]):
        names_in = {
            place: list_files_above(root) if place == ".." else list_folder(root / place)[0] for place in places
        }
        paths = [(place, path) for place, listed in names_in.items() for path in list_tables(root / place, listed)]
        paths = [(place, path) for place, path in paths if content is None or path.read_bytes() != content]
        names = ImageNames(files if paths else [], root)
        strict = refuse_damaged and places != [".."]
        tables = [table for place, path in paths if (table := _try_table(path, names, place.strip("."), strict))]
        if tables:
            return tables
    return []


def list_named_in_test_csv(root: Path, files: Sequence[str]) -> tuple[list[str], list[Path]]:
    """(those of the files that a csv or txt in the root lists whose name starts with test, its path); else nothing."""
    names = ImageNames(files)
    for name in list_csv_files(list_folder(root)[0], "csv|tsv|txt"):
        if not name.lower().startswith("test"):
            continue
        with contextlib.suppress(UserError):
            columns = _columns_of(_read_rows(root / name))
            found = max((set().union(*map(names.find, cells)) for cells in columns), key=len, default=set())
            if found:
                return sorted(found), [root / name]
    return [], []


def describe_unmatched(root: Path) -> str:
    """What to say of the first csv in the root, train/ or val/ whose cells name no image; empty if there is none."""
    places = ["", *(folder for split in ("train", "val") if (folder := find_split_folder(root, split)))]
    paths = [(place, path) for place in places for path in list_tables(root / place, list_folder(root / place)[0])]
    paths = [(place, path) for place, path in paths if path.suffix.lower() != ".txt"]  # which may be notes
    files = list_images_below(root, without=find_split_folder(root, "test")) if paths else []
    names = ImageNames(files)
    for place, path in paths if files else []:
        with contextlib.suppress(UserError):
            table = read_label_table(path, names, place)
            if len(table.columns) > 1 and len(table.rows) > 1 and not table.images:
                return _show_unmatched(table, files)
    return ""


def _show_unmatched(table: LabelTable, files: Sequence[str]) -> str:
    """The first cell of a table that names no image, beside the name of the first image."""
    cell, file = shorten(table.rows[0][1][0]), min(files, key=natural_key)
    return f"{table.path}: no column names the images: the first one has {cell}, and the first image is {file}"


def names_more_than_validation(root: Path, table: LabelTable) -> bool:
    """Whether a table lies outside the validation folder and names an image outside it."""
    folder = find_split_folder(root, "val") or "val"
    images = (file for rows in table.images.values() for row in rows for file in row)
    return not table.path.is_relative_to(root / folder) and any(not f.startswith(f"{folder}/") for f in images)


def label_names(table: LabelTable) -> list[str]:
    """The columns that are called as labels are, or that have no name; `y` beside `x` is a coordinate."""
    is_label = re.compile(r"(?i)label|class|categor|target|species|breed|diagnosis|^(dx|y|column \d+)$")
    has_x = any(column.lower() == "x" for column in table.columns)
    return [name for name in table.columns if is_label.search(name) and not (has_x and name.lower() == "y")]


def repeats_folders(table: LabelTable, files: Sequence[str]) -> bool:
    """Whether a table gives each image the name of one of its folders as the label, so that it tells nothing new."""
    try:
        labels = read_labels(table, DataOptions(), ImageNames(files))
    except UserError:
        return False
    named = ((file, labels.name_of.get(label, label)) for file, label in labels.label_of.items())
    return all(name in normal_name(file).split("/")[:-1] for file, name in named)


def _split_by_name(tables: Sequence[LabelTable]) -> list[str | None]:
    """The split of each of two tables of different images, if one is called train and the other val; else None."""
    splits: list[str | None] = [split_in_name(table.path.stem)[0] for table in tables]
    is_split = sorted(map(str, splits)) == ["train", "val"] and not tables[0].named_images() & tables[1].named_images()
    return splits if is_split else [None] * len(tables)


def divides_images(root: Path, tables: Sequence[LabelTable], files: Sequence[str]) -> bool:
    """Whether tables say which images are for training, validation and testing."""
    if any(_split_by_name(tables)) or any(find_split_column(table, DataOptions()) for table in tables):
        return True
    named = set().union(*(table.named_images() for table in tables))
    rest = [file for file in files if file not in named]
    return bool(rest) and len(list_named_in_test_csv(root, rest)[0]) == len(rest)


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
    """The label of each row: the cell of the only column, or the name of the column that holds 1."""
    if len(columns) == 1:
        return table.column(columns[0])
    marked = zip(*([to_number(cell) == 1 for cell in table.column(name)] for name in columns), strict=True)
    return [normal_name(columns[marks.index(True)]) for marks in marked]


def find_split_column(table: LabelTable, options: DataOptions) -> str | None:
    """The only column that says train, val or test in every row; None if it is chosen as something else."""
    found = []
    for name in set(table.columns) - {*table.images, options.label_column, options.group_column}:
        splits = {split_of_word(cell) for cell in set(table.column(name))}
        if "train" in splits and len(splits) > 1 and None not in splits:
            found.append(name)
    return found[0] if len(found) == 1 else None


def _match_one_to_one(first: Sequence[str], second: Sequence[str]) -> bool:
    """Whether equal cells of one column are beside equal cells of the other, and different ones beside different."""
    return len(set(first)) == len(set(second)) == len(set(zip(first, second, strict=True)))


def _are_numbers(cells: Sequence[str]) -> bool:
    return all(to_number(cell) is not None for cell in set(cells))


def _find_class_names(table: LabelTable, label: str, others: Sequence[str]) -> str | None:
    """The only column of words, or the only one that is called as labels are, that names the numbers in `label`."""
    labels = table.column(label)
    if not _are_numbers(labels):
        return None
    cells = {name: table.column(name) for name in others if name != label}
    found = [
        name
        for name, words in cells.items()
        if all(to_number(word) is None for word in words) and _match_one_to_one(labels, words)
    ]
    called = [name for name in found if name in label_names(table)]
    return next((only[0] for only in (found, called) if len(only) == 1), None)


def _columns_of_template(table: LabelTable, template: Path | None) -> set[str]:
    """The columns, in lower case, of the given template or of the one in the dataset's root; none without one."""
    try:
        path = template or (find_template(table.root, [table.path]) if table.root else None)
        return {cell.strip().casefold() for cell in _read_rows(path)[0][1]} if path else set()
    except (UserError, IndexError):  # said when the template is read
        return set()


def _choose_label(table: LabelTable, fitting: Sequence[str]) -> list[str]:
    """Those of several columns that could be the label for which their cells or names speak.

    These are the only numbers, if the other columns name them; else the only column that is called as labels are,
    unless another one holds ids, which may be labels too.
    """
    numbers = [name for name in fitting if _are_numbers(table.column(name))]
    if len(numbers) == 1 and all(_match_one_to_one(table.column(numbers[0]), table.column(name)) for name in fitting):
        return numbers
    called = [name for name in fitting if name in label_names(table)]
    has_ids = any(re.search("(^|[^a-zA-Z])[iI][dD]s?$|[a-z]I[dD]s?$", name) for name in fitting if name not in called)
    return called if len(called) == 1 and not has_ids else list(fitting)


def choose_columns(table: LabelTable, options: DataOptions) -> LabelColumns:
    """Which columns name the images, their labels and so on. Raises `UserError` where several fit, or none."""
    images = list(table.images)
    if len(images) > 1 and all(table.images[name] == table.images[images[0]] for name in images):
        images = images[:1]  # such as an id and a path
    image = _choose_column(table, options.image_column, images, "image_column")
    split = find_split_column(table, options)
    taken = {image, split, options.group_column, *table.images}
    others = fitting = [name for name in table.columns if name not in taken]
    if len(others) > 1:  # a label repeats, but a row number or a note does not, and a constant tells nothing
        repeated = [name for name in others if 1 < len(set(table.column(name))) <= len(table.rows) / 2]
        fitting = [name for name in repeated if not re.fullmatch("(Unnamed: [0-9]+)?", name)]  # an index of pandas
    likely = fitting
    if options.label_column is None and len(fitting) > 1:
        in_template = _columns_of_template(table, options.template_path)
        likely = [name for name in fitting if name.casefold() in in_template]
        if len(likely) != 1:
            if is_one_hot(table, fitting):
                return LabelColumns(image, fitting, split=split)
            likely = _choose_label(table, fitting)
    label = _choose_column(table, options.label_column, likely, "label_column")
    names = _find_class_names(table, label, others)
    passed_over = [name for name in fitting if name not in (label, names)] if options.label_column is None else []
    return LabelColumns(image, [label], names, split, passed_over)


def read_labels(table: LabelTable, options: DataOptions, names: ImageNames) -> FoundLabels:
    """The labels of every image that a table names. Raises `UserError`."""
    columns = choose_columns(table, options)
    values, labels = table.column(columns.image), label_cells(table, columns.labels)
    images_of = table.images.get(columns.image) or names.find_all(values)
    class_names = table.column(columns.names) if columns.names else labels
    splits = [split_of_word(cell) for cell in table.column(columns.split)] if columns.split else [None] * len(labels)
    found = FoundLabels({}, _describe_source(table, columns), [table.path])
    faults: dict[str, list[str]] = {}
    rows = zip(table.rows, values, images_of, labels, class_names, splits, strict=True)
    for (line, _), value, images, text, name, split in rows:
        fault = None
        if len(images) != 1:
            fault = "rows name several images; write the folder and the extension" if images else "rows have no image"
        elif split and found.split_of.setdefault(next(iter(images)), split) != split:
            fault = "rows give an image a second split"
        elif not text:
            fault = None if split == "test" else "rows have no label"
        elif found.label_of.setdefault(next(iter(images)), text) != text:
            fault = "rows give an image a second label"
        elif columns.names:
            found.name_of[text] = name
        if fault:
            faults.setdefault(fault, []).append(f"line {line}, {value}")
    for fault, places in faults.items():
        raise UserError(f"{table.path}: {len(places)} {fault} ({places[0]}); correct the file, or remove the rows")
    if options.group_column is not None:
        groups = table.column(_choose_column(table, options.group_column, [], "group_column"))
        # An image without a group is a group of its own.
        found.group_of.update(
            (file, group or file) for files, group in zip(images_of, groups, strict=True) for file in files
        )
    return found


def _choose_tables(
    root: Path, files: Sequence[str], options: DataOptions, names: ImageNames
) -> list[tuple[LabelTable, str | None]]:
    """The table of --labels_csv, or those found: one for all images, or one each for train and val.

    Each has the split that its name says, unless the folders of its images say it.
    """
    if options.labels_csv:
        path = Path(options.labels_csv).expanduser()
        path = path if path.is_file() else root / options.labels_csv
        base = path.parent.relative_to(root).as_posix() if path.is_relative_to(root) else ""
        named = read_label_table(path, names, base.strip("."))
        if not named.images and options.image_column is None and named.rows and files:
            raise UserError(
                f"{_show_unmatched(named, files)}; correct the names, or choose the column with --image_column"
            )
        return [(named, None)]
    tables = find_label_tables(root, files, options.template_path)
    if not tables:
        unmatched = describe_unmatched(root)
        raise UserError(
            f"{unmatched}; correct the names"
            if unmatched
            else f"{root}: has no csv that names its images; give one with --labels_csv"
        )
    validation = find_split_folder(root, "val")
    in_val = [all(file.startswith(f"{validation}/") for file in table.named_images()) for table in tables]
    if in_val.count(True) <= 1 and in_val.count(False) <= 1:
        return [(table, None) for table in tables]
    if any(splits := _split_by_name(tables)):
        return list(zip(tables, splits, strict=True))
    listed = " and ".join(table.path.name for table in tables)
    raise UserError(f"{root}: {listed} could each hold the labels; choose one with --labels_csv")


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
        raise UserError(
            f"--label_pattern {pattern}: {len(missing)} images do not match ({missing[0]}); change the expression, or "
            "move them out of the dataset"
        )
    return {file: match[1] for file, match in matches.items() if match}


def _describe_source(table: LabelTable, columns: LabelColumns) -> str:
    """Where the labels of a table come from, in words."""
    labels = columns.labels
    column = f"columns {show_names(labels)} (one for each class)" if len(labels) > 1 else f"column {labels[0]}"
    notes = [
        *([f"named by column {columns.names}"] if columns.names else []),
        *([f"split by column {columns.split}"] if columns.split else []),
        *([f"not {show_names(columns.passed_over)}"] if columns.passed_over else []),
        *([f"{table.test_rows} rows of test images ignored"] if table.test_rows else []),
    ]
    return f"{column} of {table.path.name}" + f" ({', '.join(notes)})" * bool(notes)


def label_images(root: Path, files: Sequence[str], options: DataOptions) -> FoundLabels:
    """The labels of the images, from file names or from tables. Raises `UserError`."""
    if options.label_pattern:
        return FoundLabels(_label_by_pattern(files, options.label_pattern), f"file names by {options.label_pattern}")
    names = ImageNames(files, root)
    tables = _choose_tables(root, files, options, names)
    every = [read_labels(table, options, names) for table, _ in tables]
    found = FoundLabels({}, " and ".join(part.source for part in every), [table.path for table, _ in tables])
    for part, (table, split) in zip(every, tables, strict=True):
        for label, name in part.name_of.items():
            if found.name_of.setdefault(label, name) != name:
                other = f"{tables[0][0].path.name} names it {shorten(found.name_of[label])}"
                raise UserError(f"{table.path}: names class {label} {shorten(name)}, but {other}; give it one name")
        found.label_of.update(part.label_of)
        found.group_of.update(part.group_of)
        found.split_of.update(dict.fromkeys(part.label_of, split) if split else part.split_of)
    return found


def _folder_labels(table: LabelTable, class_of: Mapping[str, str], labels: Sequence[str]) -> set[tuple[str, str]]:
    """The pairs (class folder, label) of the rows that name one image each, without empty labels."""
    cells = zip(next(iter(table.images.values())), labels, strict=True)
    return {(class_of[next(iter(images))], text) for images, text in cells if len(images) == 1 and text}


def _contradicts_folders(table: LabelTable, class_of: Mapping[str, str]) -> bool:
    """Whether a table seems to sort the images into other classes than their folders do.

    Where several columns could be the label, one that is called so, or that the template has too, tells.
    """
    columns = {name: table.column(name) for name in table.columns if name not in table.images}
    in_template = _columns_of_template(table, None)
    called = {*label_names(table), *(name for name in columns if name.casefold() in in_template)}
    with contextlib.suppress(UserError):
        chosen = choose_columns(table, DataOptions()).labels
        columns = {chosen[0]: label_cells(table, chosen)}
        called.update(name for name, labels in columns.items() if len(set(labels)) <= len(table.rows) / 2)
    contradicts, agrees = [], []
    for name, labels in columns.items():
        pairs = _folder_labels(table, class_of, labels)
        if len(pairs) > len({folder for folder, _ in pairs}):  # a folder has images of several labels
            contradicts.append(name)
        elif len(pairs) == len({label for _, label in pairs}) > 1:
            agrees.append(name)
    return any(name in called for name in contradicts) and not any(name in called for name in agrees)


def _labels_folders(path: Path, folders: Set[str]) -> bool:
    """Whether the rows of a csv are those of the class folders, and a column sorts them into fewer classes."""
    with contextlib.suppress(UserError):
        columns = [[normal_name(cell.strip()) for cell in cells[1:]] for cells in _columns_of(_read_rows(path))]
        counts = [len(set(cells)) for cells in columns]
        are_folders = any(folders <= set(cells) and len(cells) < 2 * len(folders) for cells in columns)
        return are_folders and any(1 < count <= len(folders) / 2 for count in counts)
    return False


def check_folder_labels(root: Path, class_of: Mapping[str, str]) -> None:
    """Refuse class folders beside a csv that sorts the same images, or folders, into other classes.

    Raises `UserError`.
    """
    for place in (root, root.absolute().parent):
        for path in list_tables(place, list_files(place)):
            if "train" in path.name.lower() and _labels_folders(path, set(class_of.values())):
                raise UserError(
                    f"{path}: gives the class folders labels, so each folder is no class of its own; list the images "
                    "with their labels in a csv for --labels_csv, or move this one away"
                )
    for table in find_label_tables(root, list(class_of), refuse_damaged=False):
        if _contradicts_folders(table, class_of):
            raise UserError(
                f"{table.path}: sorts the images into other classes than their folders do; use it with --labels_csv, "
                "or move it out of the dataset"
            )
