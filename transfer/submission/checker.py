"""The check of a submission csv against its template: every kind of fault, once, with its count and examples."""

import argparse
import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

import pandas as pd

from transfer.data.label_tables.columns import DataOptions
from transfer.data.labels import (
    MOST_SHOWN,
    ROWS_LOOKED_AT,
    SEPARATORS,
    Rows,
    is_missing,
    match_ids,
    name_classes,
    name_test_images,
    open_template,
    plain_id,
    read_class_order,
    read_csv_text,
    read_synonyms,
    read_template,
    shorten,
    show_first,
    split_rows,
    strip_quotes,
    to_number,
)
from transfer.data.layouts import DatasetFiles, Layout, find_layout, list_test_images
from transfer.data.listing import WNIDS_NAME, find_split_folder, normal_name
from transfer.errors import UserError
from transfer.submission import (
    Classes,
    IndexForm,
    LabelForm,
    Shown,
    decide_form,
    form_of,
    look_at,
)

UNKNOWN = (
    "the classes are unknown, since no dataset lies beside {}; list them with --classes_file, or give --num_classes N "
    "for labels 0 to N-1"
)
MOST_LINES = 20  # of faults
MOST_FOLDERS = 30  # in which a template's dataset is searched: the template may lie among all that was downloaded

# A csv beside its template: rows are read as they are meant, and what is wrong with all of them is said


def _split_as_meant(path: Path, text: str, template: pd.DataFrame) -> tuple[list[tuple[int, list[str]]], list[str]]:
    """(rows of a csv, by the separator that suits the template; faults). Raises `UserError`."""
    wanted, width, ids = template.attrs.get("separator", ","), len(template.columns), set(template.iloc[:, 0])
    start = "\n".join(text.split("\n")[:ROWS_LOOKED_AT])

    def fit(separator: str) -> int:
        try:
            cells = [cells for _, cells in split_rows(path, start, separator)]
        except UserError:  # such as a line that is too long for one cell
            return 0
        return sum(
            (len(row) in (width, width + 1)) + (not ids.isdisjoint(map(strip_quotes, row[:2]))) for row in cells
        )

    separator = max([wanted, *SEPARATORS, "|", " "], key=fit)  # the wanted one, if several suit
    rows = split_rows(path, text, separator)
    if separator != wanted:
        return rows, [f"columns are separated by {separator!r}, not by {wanted!r}"]
    if rows and all(len(cells) == 1 and separator in cells[0] and "\n" not in cells[0] for _, cells in rows):
        rows = [(line, split_rows(path, cells[0], separator)[0][1]) for line, cells in rows]
        return rows, ["every line as a whole is in quotes; save it again without them"]
    return rows, []


def _compare_headers(found: Sequence[str], wanted: Sequence[str], separator: str) -> str:
    """The found header and the wanted one in words; of long headers, only the first column that differs."""
    texts = [separator.join(header) for header in (found, wanted)]
    if max(map(len, texts)) <= 3 * MOST_SHOWN:
        return f"{texts[0]!r}, not {texts[1]!r}"
    pairs = itertools.zip_longest(found, wanted, fillvalue="(nothing)")
    column, (name, other) = next((n, pair) for n, pair in enumerate(pairs, 1) if pair[0] != pair[1])
    return f"of {len(found)} columns, not {len(wanted)}, and column {column} is {shorten(name)}, not {shorten(other)}"


def _find_columns(
    rows: Rows, header: Sequence[str], ids: Set[str], separator: str
) -> tuple[int, list[int], bool, list[str]]:
    """(cells that a row should have, which of them are the template's columns, whether there is a header, faults)."""
    (line, first), width, faults = rows[0], len(header), []

    def count_ids(column: int) -> int:
        cells = [cells for _, cells in rows[1:][:ROWS_LOOKED_AT] if column < len(cells)]
        return sum(plain_id(row[column]) in ids for row in cells)

    names, wanted = ([strip_quotes(name).casefold() for name in cells] for cells in (first, header))
    size = Counter([len(cells) for _, cells in rows[1:]] or [width]).most_common(1)[0][0]
    keep, seen, by_name = list(range(width)), first, len(set(names)) == len(names) and set(wanted) <= set(names)
    if size == width + 1 and not any(cells[width].strip() for _, cells in rows[1:] if len(cells) > width):
        faults.append(f"rows end with {separator!r}, which makes an extra column; remove it")
        seen, names = first[:width], names[:width]
    elif size == width + 1 and (names[1:] == wanted or count_ids(1) > count_ids(0)):
        faults.append("the first column is extra, probably row numbers; with pandas, save with index=False")
        keep, seen, names = list(range(1, width + 1)), first[-width:], names[-width:]
    elif by_name and size == len(names) and count_ids(names.index(wanted[0])) >= count_ids(0):
        keep = [names.index(name) for name in wanted]
    else:
        size, by_name = width, False
    if seen == list(header):
        return size, keep, True, faults
    compared, has_header = _compare_headers(seen, header, separator), True
    if others := [name for name, plain in zip(seen, names, strict=False) if plain not in wanted] * by_name:
        fault = f"has columns that the template has not ({show_first(others)}); remove them"
    elif by_name and keep != sorted(keep):
        fault = f"has another order: it is {compared}"
    elif by_name:
        fault = f"is {compared}; it differs in case, spaces or quotes only"
    elif len(seen) == width and plain_id(seen[0]) in ids:
        fault, has_header = f"is missing: it must be {separator.join(header)[: 3 * MOST_SHOWN]!r}", False
    else:
        fault = f"is {compared}"
    return size, keep, has_header, [*faults, f"line {line}: the header {fault}"]


@dataclass(frozen=True)
class AlignedCsv:
    """A csv in the columns of its template."""

    rows: Rows  # that have all columns
    short: Rows  # that have more or fewer columns, as they are
    width: int  # of the others in the file
    ids: list[str]  # of all rows
    faults: list[str]  # of all rows at once


def align_csv(path: Path, template: pd.DataFrame) -> AlignedCsv:
    """Read a csv as if what is wrong with all of its rows were corrected. Raises `UserError`."""
    text, encoding = read_csv_text(path)
    rows, faults = _split_as_meant(path, text, template)
    if not rows:
        return AlignedCsv([], [], 0, [], ["is empty"])
    if encoding == "cp1252":
        faults.insert(0, "is not UTF-8 text, but Windows-1252, Latin-1 or the like; save it as UTF-8")
    above = next((n for n, (_, cells) in enumerate(rows[:ROWS_LOOKED_AT]) if cells == list(template.columns)), 0)
    if above and not set(template.iloc[:, 0]) & {cells[0] for _, cells in rows[:above]}:
        faults.append(f"the header is in line {rows[above][0]}; remove what is above it")
        rows = rows[above:]
    ids = {plain_id(image_id) for image_id in template.iloc[:, 0]}
    separator = template.attrs.get("separator", ",")
    width, keep, has_header, more = _find_columns(rows, list(template.columns), ids, separator)
    data = rows[has_header:]

    def is_whole(cells: Sequence[str]) -> bool:
        return len(cells) == width and any(map(str.strip, cells))

    return AlignedCsv(
        rows=[(line, [cells[column] for column in keep]) for line, cells in data if is_whole(cells)],
        short=[(line, cells) for line, cells in data if not is_whole(cells)],
        width=width,
        ids=[cells[keep[0]] if keep[0] < len(cells) else "" for _, cells in data if any(map(str.strip, cells))],
        faults=faults + more,
    )


# What a spreadsheet or a program makes of an id


def _number_key(text: str) -> str | None:
    value = to_number(text)
    return None if value is None else str(Decimal(text.strip()).normalize())


def _rounded_key(text: str) -> str | None:
    return None if to_number(text) is None else f"{Decimal(text.strip()):.5E}"


def _date_key(text: str) -> str | None:
    return "date" if re.fullmatch(DATE, text.strip()) or re.fullmatch(f"{MONTH}-?[0-9]{{1,4}}", text) else None


MONTH = r"(?i:(?:jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)[a-z]*)"
DATE = rf"[0-9]{{1,4}}[-/. ](?:[0-9]{{1,2}}|{MONTH})(?:[-/. ][0-9]{{2,4}})?(?: 0?0:00.*)?|{MONTH}[-/. ][0-9]{{2,4}}"
# (what happened to ids, what such ids look like, what stays the same)
ID_CHANGES: tuple[tuple[str, str, Callable[[str], str | None]], ...] = (
    ("have spaces or quotes around them", r"[\s\S]*", strip_quotes),
    ("differ in case or Unicode form", r"[\s\S]*", lambda text: normal_name(text).casefold()),
    ("have lost or gained leading zeros, as in a spreadsheet", "[0-9]+", lambda text: text.lstrip("0")),
    ("are written as other numbers, as in a spreadsheet", r"[0-9.,eE+ -]+", _number_key),
    ("have lost digits, as in a spreadsheet", r"[0-9.]+[eE]\+?[0-9]+", _rounded_key),
    ("have lost digits, as in a spreadsheet", "[0-9]{15}0+", lambda text: f"{text[:15]} {len(text)}"),
    ("have become dates, as in a spreadsheet", DATE, _date_key),
    (
        "are blank or missing values; with pandas, read ids with dtype=str, keep_default_na=False",
        r"[\s\S]*",
        lambda text: "" if is_missing(text) else None,
    ),
    ("differ in folder or extension", r"[\s\S]*", plain_id),
)


def find_id_faults(found: Sequence[str], expected: Sequence[str]) -> list[str]:
    """Every kind of fault of the ids of a csv, a line each, with what was probably done to them."""
    counts, wanted = Counter(found), set(expected)
    missing, extra, faults = [i for i in expected if i not in counts], sorted(set(counts) - wanted), []
    for what, pattern, key_of in ID_CHANGES:
        by_key: dict[str | None, list[str]] = {}
        for image_id in missing:
            by_key.setdefault(key_of(image_id), []).append(image_id)
        by_key.pop(None, None)
        pairs = [(i, by_key[key]) for i in extra if re.fullmatch(pattern, i) and (key := key_of(i)) in by_key]
        if pairs:
            shown = [f"{shorten(i)} for {shorten(ids[0])}" if len(ids) == 1 else shorten(i) for i, ids in pairs[:3]]
            faults.append(f"{len(pairs)} ids {what} ({', '.join(shown)}{', ...' * (len(pairs) > 3)})")
            explained = {i for changed, ids in pairs for i in (changed, *ids)}
            missing, extra = ([i for i in ids if i not in explained] for ids in (missing, extra))
    if (
        extra
        and len(counts) == len(wanted)
        and set(found) in ({str(n) for n in range(by, len(counts) + by)} for by in (0, 1))
    ):
        return [*faults, f"the ids are row numbers ({show_first(list(counts))}), not ids ({show_first(missing)})"]
    repeated = [i for i, count in counts.items() if count > 1]
    for ids, what in ((missing, "missing"), (extra, "not in the template"), (repeated, "repeated")):
        if ids:
            faults.append(f"{len(ids)} ids are {what} ({show_first(ids)})")
    return faults


# The check of a csv


def check_rows(path: Path, data: DatasetFiles) -> int:
    """The number of rows of a dataset's csv, after checking it as the command does. Raises `UserError` for a fault."""
    form = form_of(data)
    template = open_template(data.template_path, data.test_ids, form.columns)
    if faults := find_faults(path, template, form):
        raise UserError(f"{path}: {faults[0]}")
    return len(template)


def _list_by_kind(found: Sequence[tuple[int, str, str]]) -> list[str]:
    """A line for each kind of fault, from (line, value, kind): the first with the count and two more examples."""
    kinds = defaultdict(list)
    for line, value, kind in found:
        kinds[kind].append((line, value))
    lines = []
    for kind, places in kinds.items():
        (line, value), others = places[0], [f"line {line}: {value}" for line, value in places[1:3]]
        others += ["..."] if len(places) > 3 else []
        more = f" ({len(places)} in all; {'; '.join(others)})" if others else ""
        lines.append(f"line {line}: {value}{kind}{more}")
    return lines


def _explain_width(cells: Sequence[str], width: int, separator: str, form: LabelForm | None) -> tuple[str, str]:
    """(what a row is, what is wrong with it) of a row with more or fewer columns than others."""
    if not any(map(str.strip, cells)):
        return "is a row of empty cells", "; remove it"
    value, kind = f"has {len(cells)} columns", f", not {width}"
    if form and len(cells) > width and separator.join(cells[1:]).strip() in form.words:
        kind += f"; put names that contain {separator!r} in quotes"
    elif form and form.labels and separator == "," and len(cells) == 2 * width - 1:
        kind += "; is the comma a decimal sign? write a point"
    return value, kind


def find_faults(path: Path, template: pd.DataFrame, form: LabelForm | int | None) -> list[str]:
    """Every kind of fault of a csv against its template, a line each; an empty list if the csv can be submitted.

    `form` says how labels are written; an int N stands for labels 0 to N-1, and None leaves labels unchecked.
    """
    form = IndexForm.make(number_classes(form)) if isinstance(form, int) else form
    aligned, separator = align_csv(path, template), template.attrs.get("separator", ",")
    if not aligned.ids and not aligned.width:
        return aligned.faults
    widths = [(line, *_explain_width(cells, aligned.width, separator, form)) for line, cells in aligned.short]
    faults = [*aligned.faults, *_list_by_kind(widths), *find_id_faults(aligned.ids, list(template.iloc[:, 0]))]
    if form:
        labels = [cells[1:] for _, cells in aligned.rows]
        found = [
            (line, fault)
            for (line, _), cells in zip(aligned.rows, labels, strict=True)
            if (fault := form.find_fault(cells))
        ]
        hints = {kind: form.explain(kind, labels) for kind in {kind for _, (_, kind) in found}}
        faults += _list_by_kind([(line, value, f" {kind}{hints[kind]}") for line, (value, kind) in found])
    rest = len(faults) - MOST_LINES
    return faults if rest <= 0 else [*faults[: MOST_LINES - 1], f"has {rest + 1} more kinds of faults"]


def number_classes(number: int) -> Classes:
    """Classes that are named by the numbers from 0."""
    names = tuple(map(str, range(number)))
    return Classes(names, names, order="")


def find_data(template_path: Path) -> tuple[Path, Layout] | None:
    """(root, layout) of the dataset beside a template, or in a folder below whose test images it lists."""
    folder = template_path.parent
    try:
        root, layout = find_layout(folder, most=MOST_FOLDERS)
        is_sure = root == folder and find_split_folder(root, "train") is not None
        ids = set(read_template(template_path).iloc[:, 0])
        return (root, layout) if is_sure or match_ids(list_test_images(root), ids) else None
    except UserError:
        return None


def read_classes(found: tuple[Path, Layout] | None, folder: Path, classes_file: Path | None) -> Classes | None:
    """The classes of a file, of the wnids.txt beside a template, or of a dataset; None if there is none of them.

    Raises `UserError`.
    """
    if classes_file is None and found is not None and not (folder / WNIDS_NAME).is_file():
        root, layout = found
        try:
            ids, names, order = layout.read_classes(root, DataOptions())
        except UserError:  # such as a csv with several columns that could be the labels
            return None
    elif classes_file is None and not (folder / WNIDS_NAME).is_file():
        return None
    else:
        root = found[0] if found else folder
        ids, order = read_class_order(root, classes_file)
        names = name_classes(ids, read_synonyms(root, ids, order))
    return Classes(tuple(ids), tuple(names), order)


def classes_of_template(shown: Shown) -> Classes | None:
    """The classes that a template shows without a dataset: a column for each, or fractions for the second of two."""
    if len(shown.columns) > 1:
        return Classes(tuple(shown.columns), tuple(shown.columns), "the header")
    return number_classes(2) if shown.has_fractions else None


def other_test_ids(found: tuple[Path, Layout] | None, template_path: Path) -> list[str]:
    """Ids of the test images of a dataset whose template may leave some out; the competition's own is complete."""
    if found is None or (found[0] / WNIDS_NAME).is_file():
        return []
    return name_test_images(found[0], list_test_images(found[0]), set(read_template(template_path).iloc[:, 0]))


def choose_form(args: argparse.Namespace, classes: Classes | None) -> LabelForm | None:
    """How the labels of a csv are to be written; None if nothing tells the classes. Raises `UserError`."""
    number, shown, asked = args.num_classes, look_at(args.template), args.submission_labels
    if number is None:
        classes = classes or classes_of_template(shown)
        if classes is None and asked:
            raise UserError(f"--submission_labels {asked}: {UNKNOWN.format(args.template)}")
        return decide_form(args.template, classes, asked) if classes else None
    if asked or args.classes_file:
        other = "--submission_labels" if asked else "--classes_file"
        raise UserError(f"{other} and --num_classes cannot be combined; leave one of them out")
    if number < 1:
        raise UserError(f"--num_classes {number}: must be at least 1; give the number of classes, such as 100")
    if len(shown.columns) not in (1, number):
        raise UserError(
            f"--num_classes {number}: {args.template} has {len(shown.columns)} label columns; leave it out"
        )
    if (classes := classes_of_template(shown)) and len(classes.ids) == number:
        return decide_form(args.template, classes)
    return IndexForm.make(number_classes(number))
