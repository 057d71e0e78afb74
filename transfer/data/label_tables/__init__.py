"""Labels that stand in a csv or in file names instead of folder names."""

import contextlib
import re
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path

from transfer.data.label_tables.columns import (
    LABEL_COLUMN,
    SPLIT_WORDS,
    DataOptions,
    LabelColumns,
    LabelTable,
    choose_columns,
    label_cells,
    label_columns_of_template,
    label_names,
    list_split_columns,
    read_label_table,
    read_rows,
    transpose,
)
from transfer.data.labels import ImageNames, shorten
from transfer.data.listing import (
    file_name,
    find_split_folder,
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
)
from transfer.errors import UserError

SEEN_ROWS = 50  # of a damaged csv
# Files that may label the test images; others hold the predictions of a model, or are to be filled with them.
TEST_LABELS = re.compile("(?i)test(?!.*(submission|sample|template|predict|result|output|baseline))")
SPLIT_FILE = re.compile(r"[*#\W_]*(labels?|set|data|images?|lists?|split|annotations?)?[*#\W_]*")  # around `train`
MOST_TABLE_BYTES = 64 * 2**20  # a larger file is read only if --labels_csv names it


@dataclass(frozen=True)
class FoundLabels:
    """The labels of a dataset that has them in a csv or in file names."""

    label_of: dict[str, str]  # of every image that has one
    source: str  # where they come from, in words
    tables: list[Path] = field(default_factory=list)
    columns: list[str] = field(default_factory=list)  # that hold the labels, and the names of the classes
    name_of: dict[str, str] = field(default_factory=dict)  # of each label, where another column names the classes
    split_of: dict[str, str] = field(default_factory=dict)  # train, val or test, of images whose table says it
    group_of: dict[str, str] = field(default_factory=dict)  # of every image of the table, with --group_column

    def name_classes(self, class_ids: Sequence[str]) -> list[str]:
        """The name of each class; the ids themselves if two classes have one name."""
        names = [self.name_of.get(class_id, class_id) for class_id in class_ids]
        return names if len(set(names)) == len(names) else list(class_ids)


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
    splits = list_split_columns(table, others)
    return bool(others) and all(name in splits or _counts_rows(table.column(name)) for name in others)


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
        rows = [cells for _, cells in read_rows(path)[1:SEEN_ROWS]]
        return 2 * sum(map(is_named, rows)) > len(rows)
    return False


def _counts_rows(cells: Sequence[str]) -> bool:
    """Whether a column numbers the rows, so that it is no label; two rows may also be two classes."""
    return len(cells) > 2 and any(list(cells) == [str(n + first) for n in range(len(cells))] for first in (0, 1))


def names_images_below(root: Path, table: LabelTable, files: Sequence[str]) -> bool:
    """Whether a table lies in the dataset; one in the folder above must have rows for at least half of the images."""
    if table.path.parent.resolve().is_relative_to(root.resolve()):
        return True
    named = {next(iter(found)) for rows in table.images.values() for found in rows if len(found) == 1}
    return 2 * len(named) >= len(files)


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
            columns = [list(map(names.find, cells)) for cells in transpose(read_rows(root / name))]
            if name.lower().endswith(".txt"):  # else it may be notes
                columns = [images for images in columns if all(images)]
            found = max((set().union(*images) for images in columns), key=len, default=set())
            if found:
                return sorted(found), [root / name]
    return [], []


def _label_by_cells(table: LabelTable, cells: Sequence[str], label_of: Mapping[str, int]) -> dict[str, int]:
    """The label of the image in each row; empty if a cell or an image is unknown, or an image has two labels."""
    labels: dict[str, int] = {}
    for images, cell in zip(next(iter(table.images.values()), []), cells, strict=False):
        if len(images) != 1 or cell not in label_of:
            return {}
        (file,) = images
        if labels.setdefault(file, label_of[cell]) != label_of[cell]:
            return {}
    return labels


def read_test_labels(
    root: Path, files: Sequence[str], class_ids: Sequence[str], class_names: Sequence[str], columns: Sequence[str] = ()
) -> tuple[list[int], Path | None]:
    """(label of each test image, the csv that has them), from the csv files whose names start with test.

    They lie in the root or in the test folder. The labels are in one of `columns`, by default in those that are called
    as labels are. There are none unless all images have one, and all such columns of all files agree. If the classes
    are numbers, each must occur, since others may be meant; else two of them.
    """
    label_of = dict(zip(class_ids, range(len(class_ids)), strict=True))
    label_of |= {name: label_of[class_id] for class_id, name in zip(class_ids, class_names, strict=True)}
    are_numbers = all(map(str.isdecimal, class_ids))
    if are_numbers:  # a folder may be 00007
        label_of = {str(int(class_id)): label for label, class_id in enumerate(class_ids)} | label_of
    folder = find_split_folder(root, "test")
    places = [root, *([root / folder] if folder else [])] if files else []
    paths = [place / name for place in places for name in list_csv_files(list_files(place), "csv|tsv|txt")]
    names, found = ImageNames(files), []
    for path in filter(Path.is_file, paths):  # no links to nothing
        if not TEST_LABELS.match(path.name) or path.stat().st_size > MOST_TABLE_BYTES:
            continue
        with contextlib.suppress(UserError):
            table = read_label_table(path, names)
            for name in (name for name in table.columns if name not in table.images):
                if name in columns if columns else LABEL_COLUMN.fullmatch(name):
                    found.append((_label_by_cells(table, table.column(name), label_of), path))
    complete = [(labels, path) for labels, path in found if set(labels) == set(files)]
    if not complete or any(labels != complete[0][0] for labels, _ in complete):
        return [], None
    labels, path = complete[0]
    if len(set(labels.values())) < (len(class_ids) if are_numbers else 2):
        return [], None
    return [labels[file] for file in files], path


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


def repeats_folders(table: LabelTable, files: Sequence[str]) -> bool:
    """Whether a table gives each image the name of one of its folders as the label, so that it tells nothing new."""
    try:
        labels = read_labels(table, choose_columns(table, DataOptions()), ImageNames(files))
    except UserError:
        return False
    named = ((file, labels.name_of.get(label, label)) for file, label in labels.label_of.items())
    return all(name in normal_name(file).split("/")[:-1] for file, name in named)


def _split_by_name(tables: Sequence[LabelTable]) -> list[str | None]:
    """The split of each of two tables of different images, if one is called train and the other val; else None."""
    splits: list[str | None] = []
    for stem in (table.path.name.split(".")[0] for table in tables):  # of train.csv.gz too
        split, rest = split_in_name(stem)
        splits.append(split if split and SPLIT_FILE.fullmatch(rest) else SPLIT_WORDS.get(stem.lower()))
    is_split = sorted(map(str, splits)) == ["train", "val"] and not tables[0].named_images() & tables[1].named_images()
    return splits if is_split else [None] * len(tables)


def divides_images(root: Path, tables: Sequence[LabelTable], files: Sequence[str]) -> bool:
    """Whether tables, or a list of test images beside them, say what the images are for."""
    if any(_split_by_name(tables)) or any(list_split_columns(table, table.columns) for table in tables):
        return True
    named = set().union(*(table.named_images() for table in tables))
    rest = [file for file in files if file not in named]
    return bool(rest) and len(list_named_in_test_csv(root, rest)[0]) == len(rest)


def read_labels(
    table: LabelTable, columns: LabelColumns, names: ImageNames, group_column: str | None = None
) -> FoundLabels:
    """The labels of every image that a table names. Raises `UserError`."""
    values, labels = table.column(columns.image), label_cells(table, columns.labels)
    images_of = table.images.get(columns.image) or names.find_all(values)
    class_names = table.column(columns.names) if columns.names else labels
    of_test = {text for text, split in zip(labels, columns.splits, strict=True) if split == "test"}
    unknown = of_test if len(of_test) == 1 else set()  # all rows to test have one mark, such as ? or 0
    found = FoundLabels({}, _describe_source(table, columns), [table.path])
    faults: dict[str, list[str]] = {}
    rows = zip(table.rows, values, images_of, labels, class_names, columns.splits, strict=True)
    for (line, _), value, images, text, name, split in rows:
        fault = None
        if len(images) != 1:
            fault = "rows name several images; write the folder and the extension" if images else "rows have no image"
        elif split and found.split_of.setdefault(next(iter(images)), split) != split:
            fault = "rows give an image a second split"
        elif not text or (split == "test" and text in unknown):
            fault = None if split == "test" else "rows have no label"
        elif found.label_of.setdefault(next(iter(images)), text) != text:
            fault = "rows give an image a second label"
        elif columns.names:
            found.name_of[text] = name
        if fault:
            faults.setdefault(fault, []).append(f"line {line}, {value}")
    for fault, places in faults.items():
        raise UserError(f"{table.path}: {len(places)} {fault} ({places[0]}); correct the file, or remove the rows")
    if group_column is not None:
        if group_column not in table.columns:
            listed = ", ".join(table.columns)
            raise UserError(f"--group_column {group_column}: {table.path} has no such column, only {listed}")
        groups = table.column(group_column)
        # An image without a group is a group of its own.
        found.group_of.update(
            (file, group or file) for files, group in zip(images_of, groups, strict=True) for file in files
        )
    return found


def _choose_tables(
    root: Path, files: Sequence[str], options: DataOptions, names: ImageNames
) -> list[tuple[LabelTable, str | None]]:
    """The table of --labels_csv, or those found: one for all images, or one each for train and then val.

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
        return [(tables[position], None) for position in sorted(range(len(tables)), key=in_val.__getitem__)]
    if any(splits := _split_by_name(tables)):
        return sorted(zip(tables, splits, strict=True), key=lambda pair: pair[1] or "")
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
    first = choose_columns(tables[0][0], options)
    others = [choose_columns(table, options, like=first) for table, _ in tables[1:]]
    groups = options.group_column
    every = [read_labels(tables[0][0], first, names, groups)]
    for (table, _), columns in zip(tables[1:], others, strict=True):  # groups matter for training images alone
        every.append(read_labels(table, columns, names, groups if groups in table.columns else None))
    source, paths = " and ".join(part.source for part in every), [table.path for table, _ in tables]
    found = FoundLabels({}, source, paths, columns=[*first.labels, *filter(None, [first.names])])
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
    in_template = label_columns_of_template(table, None)
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
        columns = [[normal_name(cell.strip()) for cell in cells[1:]] for cells in transpose(read_rows(path))]
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
