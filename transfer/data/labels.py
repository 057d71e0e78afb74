"""Labels: the order and names of the classes, the template of a submission, and the images that ids and cells mean."""

import codecs
import contextlib
import csv
import functools
import gzip
import io
import math
import operator
import re
import unicodedata
import zipfile
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence, Set
from pathlib import Path

import pandas as pd

from transfer.data.listing import (
    IMAGE_SUFFIXES,
    NATURAL_ORDER,
    WNIDS_NAME,
    choose_templates,
    file_name,
    find_split_folder,
    image_id_of,
    list_class_folders,
    list_files,
    list_images_below,
    list_unread,
    natural_key,
    normal_name,
    read_lines,
)
from transfer.errors import UserError

HEADER = ["image_id", "label"]
SEPARATORS = ",;\t"
MOST_SHOWN = 40  # characters of a value in a message
ROWS_LOOKED_AT = 100  # to find the separator and the columns
MOST_CSV_BYTES = 2**28  # of a csv that is unpacked
MISSING = frozenset({"", "nan", "null", "none", "na", "n/a", "<na>", "#n/a", "nat"})  # as pandas reads and writes them

Rows = Sequence[tuple[int, list[str]]]  # (line number as in an editor, cells) of each row

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


def read_class_order(root: Path, classes_file: Path | None) -> tuple[list[str], str]:
    """(class ids in label order, what gave the order). This is the only place that decides the class order.

    The order is that of the lines of `classes_file`, else of the lines of wnids.txt, else the natural order of the
    class folders. Raises `UserError` for a words.txt without the wnids.txt that it belongs to.
    """
    if classes_file is not None:
        return read_class_list(classes_file), classes_file.name
    if (root / WNIDS_NAME).is_file():
        return read_class_list(root / WNIDS_NAME), WNIDS_NAME
    if (root / "words.txt").is_file():
        raise UserError(
            f"{root}: has no wnids.txt, which gives every class its label, although it has a words.txt; "
            "if the class folders are not named 0 to N-1, give their order with --classes_file"
        )
    return sorted(list_class_folders(root, "train"), key=natural_key), NATURAL_ORDER


def order_labels(labels: Iterable[str]) -> list[str]:
    """The distinct labels of a column in class order: numbers by value, else natural order."""
    distinct = set(labels)
    if all(re.fullmatch(r"-?[0-9]+(\.[0-9]+)?", label) for label in distinct):
        return sorted(distinct, key=lambda label: (float(label), label))
    return sorted(distinct, key=natural_key)


def find_fault_of_labels(labels: Iterable[str]) -> str | None:
    """Why labels cannot be classes: a missing value among numbers, or one number written in two ways; else None."""
    number_of = {label: to_number(label) for label in sorted(labels, key=natural_key)}
    missing = [label for label in number_of if is_missing(label)]
    if any(value is None and label not in missing for label, value in number_of.items()):
        return None  # `NA` may be a name among names
    if missing and len(missing) < len(number_of):
        return f"{missing[0]!r} is a missing value among numbers; give its images a number"
    first: dict[float | None, str] = {}
    for label, value in number_of.items():
        other = first.setdefault(value, label)
        if "." in label + other and label != other:
            return f"{other!r} and {label!r} are the same number; write it in one way"
    return None


def describe_odd_classes(class_ids: Sequence[str], are_cells: bool) -> list[str]:
    """Warnings about classes whose names differ in case alone, or are missing values if they are cells of a csv."""
    by_name: dict[str, list[str]] = {}
    for class_id in class_ids:
        by_name.setdefault(class_id.casefold(), []).append(class_id)
    lines = [
        f"warning     classes {', '.join(alike)} differ in upper and lower case alone: give them one name if they are "
        "the same class"
        for alike in by_name.values()
        if len(alike) > 1
    ]
    missing = [class_id for class_id in class_ids if is_missing(class_id)] if are_cells else []
    return lines + [
        f"warning     class {class_id} may be a missing value: if it is one, give its images a label, or leave the "
        "class out with --classes_file"
        for class_id in missing
    ]


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


# Reading a csv


def shorten(text: str) -> str:
    """A value for a message: quoted, and cut if it is long."""
    return repr(text if len(text) <= MOST_SHOWN else text[: MOST_SHOWN - 3] + "...")


def show_first(values: Sequence[str], count: int = 3) -> str:
    """The first values, quoted, with an ellipsis if there are more: for messages."""
    return ", ".join(map(shorten, values[:count])) + (", ..." if len(values) > count else "")


def to_number(text: str) -> float | None:
    """The finite number that a cell holds in plain decimal or scientific notation; otherwise None."""
    if not re.fullmatch(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]{1,3})?", text.strip(" ")):
        return None
    value = float(text)
    return value if math.isfinite(value) else None


def is_missing(text: str) -> bool:
    """Whether a cell is blank or has what programs write for a missing value."""
    return text.strip().casefold() in MISSING


def strip_quotes(text: str) -> str:
    """A cell without the spaces and quotes around it."""
    return text.strip(" \t'\"\u00a0\u200b")


def _unpack(path: Path, content: bytes) -> bytes:
    """The content of the only csv in a zip, or of a gz; other content as it is. Raises `UserError`."""
    try:
        if content.startswith(b"\x1f\x8b"):
            content = gzip.GzipFile(fileobj=io.BytesIO(content)).read(MOST_CSV_BYTES + 1)
        elif content.startswith(b"PK\x03\x04"):
            with zipfile.ZipFile(io.BytesIO(content)) as archive:
                names = [name for name in archive.namelist() if not re.match(r"__MACOSX/|(.*/)?\.", name)]
                if "[Content_Types].xml" in names:
                    raise UserError(f"{path}: is an Excel workbook; save it as CSV (UTF-8)")
                found = [name for name in names if re.search(r"(?i)\.[ct]sv$", name)]
                if len(found) != 1:
                    listed = f" ({show_first(found or names)})" if names else ""
                    raise UserError(
                        f"{path}: has {len(found)} csv files in it{listed}; pack exactly one, or give the csv itself"
                    )
                content = archive.open(found[0]).read(MOST_CSV_BYTES + 1)
    except UserError:
        raise
    except Exception as fault:  # zipfile and gzip raise many kinds for damaged files
        raise UserError(f"{path}: cannot be unpacked ({fault}); pack it again, or give the csv itself") from None
    if len(content) > MOST_CSV_BYTES:
        raise UserError(f"{path}: unpacks to more than {MOST_CSV_BYTES >> 20} MiB; give the csv itself")
    return content


def read_csv_text(path: Path) -> tuple[str, str]:
    """(text of a csv without a byte-order mark, its encoding: utf-8, utf-16 or cp1252), also from a zip or gz.

    Windows-1252 (cp1252) is what a text is that is neither UTF-8 nor UTF-16. Raises `UserError`.
    """
    try:
        content = _unpack(path, path.read_bytes())
    except OSError as fault:
        raise UserError(f"{path}: cannot be read ({fault.strerror})") from None
    encodings = ["utf-8-sig", "cp1252"]
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        encodings = ["utf-16"]
    elif b"\0" in content[:2]:  # one byte of each character in the header is zero, and no mark says which
        encodings = ["utf-16-be" if content.startswith(b"\0") else "utf-16-le"]
    for encoding in encodings:
        with contextlib.suppress(UnicodeDecodeError):
            text = content.decode(encoding).replace("\r\n", "\n").replace("\r", "\n")
            if not re.search(r"[\0-\x08\x0e-\x1f]", text):
                return text, re.sub("-(sig|le|be)", "", encoding)
    raise UserError(f"{path}: is not a text file, or its encoding is unknown; save it as UTF-8")


def find_doubtful_value(path: Path) -> str | None:
    """A value that looks wrong if Windows-1252 is not the encoding of a csv that was read so. Raises `UserError`."""
    text, encoding = read_csv_text(path)
    found = re.search(r"[^,;\t\n\"]*[^\0-\x7f][^,;\t\n\"]*", text) if encoding == "cp1252" else None
    return shorten(found[0].strip()) if found else None


def find_separator(text: str) -> str:
    """The separator that splits the first line that is not blank into most cells; a comma if none does."""
    line = next((line for line in text.splitlines() if line.strip()), "")
    return max(SEPARATORS, key=line.count)


def split_rows(path: Path, text: str, separator: str) -> list[tuple[int, list[str]]]:
    """(line number as in an editor, cells) of every row of a csv's text that is not blank. Raises `UserError`."""
    reader = csv.reader(io.StringIO(text), delimiter=separator)
    try:
        return [(reader.line_num, row) for row in reader if row]
    except csv.Error as fault:
        raise UserError(f"{path}: is not a csv file (line {reader.line_num}: {fault})") from None


# The template, and the submission made from it


def read_template(path: Path) -> pd.DataFrame:
    """The template as text: an id column, and a label column or one for each class, in the file's order.

    `attrs["separator"]` is its separator. Raises `UserError`.
    """
    # Not pandas.read_csv: it drops a third cell of a row with a warning, and renames equal columns.
    text, _ = read_csv_text(path)
    rows = [(n, row) for n, row in split_rows(path, text, find_separator(text)) if any(map(str.strip, row))]
    if not rows:
        raise UserError(f"{path}: is empty; a template has a header, {','.join(HEADER)}, and a row for each id")
    width = len(rows[0][1])
    cells = {cell for _, row in rows[1:] for cell in row[1:]}
    has_probabilities = width > 2 and all(not cell or to_number(cell) is not None for cell in cells)
    expected = width if has_probabilities else 2
    for line, row in rows:
        if len(row) != expected:
            two = f"two, {','.join(HEADER)}, or a number for each class" if expected == 2 else f"{expected}"
            raise UserError(f"{path}: line {line} has {len(row)} columns; a template has {two}")
    table = pd.DataFrame([row for _, row in rows[1:]], columns=rows[0][1], dtype=str)
    ids = table.iloc[:, 0]
    if table.empty or (ids.str.strip() == "").any():
        raise UserError(f"{path}: has {'no rows' if table.empty else 'a row without an id'}")
    if ids.duplicated().any():
        raise UserError(f"{path}: id {ids[ids.duplicated()].iloc[0]!r} appears twice")
    table.attrs["separator"] = find_separator(text)
    return table


def make_template(ids: Sequence[str], columns: Sequence[str] = HEADER[1:]) -> pd.DataFrame:
    """A template that lists these ids in order, with label 0."""
    return pd.DataFrame([[i, *["0"] * len(columns)] for i in ids], columns=[HEADER[0], *columns], dtype=str)


def open_template(path: Path | None, test_ids: Sequence[str], columns: Sequence[str] = HEADER[1:]) -> pd.DataFrame:
    """The rows of a complete submission: the template's, then one for each test image that the template leaves out.

    Without a template its label columns are `columns`.
    """
    if path is None:
        return make_template(test_ids, columns)
    template = read_template(path)
    listed = set(template.iloc[:, 0])
    rest = make_template([i for i in test_ids if i not in listed], list(template.columns[1:]))
    rows = [*template.to_numpy().tolist(), *rest.to_numpy().tolist()]
    complete = pd.DataFrame(rows, columns=template.columns, dtype=str)
    complete.attrs.update(template.attrs)
    return complete


def check_template(
    template: pd.DataFrame, test_ids: Sequence[str], path: Path, may_be_short: bool = False, names: Sequence[str] = ()
) -> None:
    """Check that a template lists exactly the test images, or a part of them if it `may_be_short`.

    Raises `UserError`, which shows some of the images' `names`.
    """
    ids = set(template.iloc[:, 0])
    unlisted, unfound = sorted(set(test_ids) - ids), sorted(ids - set(test_ids))
    faults = []
    if unfound:
        faults.append(f"{len(unfound)} ids have no test image ({show_first(unfound)})")
    if unlisted and not may_be_short:
        faults.append(f"{len(unlisted)} test images have no row ({show_first(unlisted)})")
    if faults:
        beside = f"; the images are named {show_first(names)}; give another template with --template" if names else ""
        raise UserError(f"{path}: does not match the test images: {' and '.join(faults)}{beside}")


def plain_id(text: str) -> str:
    """An id or image name without folder, known ending, case and leading zeros."""
    name = re.split(r"[/\\\\]", text.strip())[-1]
    stem, _, ending = name.rpartition(".")
    name = stem if stem and "." + ending.lower() in IMAGE_SUFFIXES else name
    return re.sub(r"(?<![0-9])0+(?=[0-9])", "", unicodedata.normalize("NFC", name.casefold()))


def _below(file: str) -> str:
    """A test image's path below the folder of all test images."""
    return file.partition("/")[2]


def _stem_below(file: str) -> str:
    """A test image's path below the folder of all test images, without its extension."""
    return _below(file).rpartition(".")[0]


def _in_lower_case(text: str) -> str:
    """A file name with its ending, regardless of case and Unicode form: `A.JPG` is `a.jpg` even beside `a.png`."""
    return normal_name(file_name(text)).casefold()


def match_ids(files: Sequence[str], ids: Set[str]) -> dict[str, str]:
    """The id of each test image that one of `ids` names: exactly, without ending, or uniquely once made plain."""
    id_of: dict[str, str] = {}
    matched: set[str] = set()
    ways: list[Callable[[str], str]] = [file_name, image_id_of, _below, _stem_below, str, _in_lower_case, plain_id]
    for key_of_file in ways:
        if len(matched) in (len(ids), len(files)):
            break
        key_of_id = key_of_file if key_of_file in (_in_lower_case, plain_id) else str
        file_counts, id_counts = Counter(map(key_of_file, files)), Counter(map(key_of_id, ids))
        file_of = {key_of_file(file): file for file in files if file_counts[key_of_file(file)] == 1}
        id_with = {key_of_id(i): i for i in ids if id_counts[key_of_id(i)] == 1}
        for key in file_of.keys() & id_with.keys():
            if file_of[key] not in id_of and id_with[key] not in matched:
                id_of[file_of[key]] = id_with[key]
                matched.add(id_with[key])
    return id_of


def name_test_images(root: Path, files: Sequence[str], template_ids: Set[str] = frozenset()) -> list[str]:
    """The id of every test image: the one that the template has for it, or else its file name.

    The file name loses its extension, unless all of the template's ids have one or names then appear twice. If file
    names appear twice, the id is the path below the test folder.
    """
    ways: list[Callable[[str], str]] = [image_id_of, file_name, _stem_below, _below]
    if template_ids and template_ids <= set(map(file_name, files)):
        ways = ways[1:]
    way = next((way for way in ways if len(set(map(way, files))) == len(files)), str)
    id_of = match_ids(files, template_ids)
    ids = [id_of.get(file, way(file)) for file in files]
    repeated = [i for i, count in Counter(ids).items() if count > 1]
    if repeated:
        raise UserError(f"{root / 'test'}: two images have the id '{repeated[0]}'; rename one of them")
    return ids


def render_rows(template: pd.DataFrame, cells_of_id: Mapping[str, Sequence[str]]) -> bytes:
    """The bytes of a submission: the template's header, ids and order, cells joined by id. Raises `UserError`."""
    ids = list(template.iloc[:, 0])
    missing = [i for i in ids if i not in cells_of_id]
    if missing:
        raise UserError(f"{len(missing)} ids of the template have no prediction ({show_first(missing)})")
    text = io.StringIO(newline="")
    writer = csv.writer(text, delimiter=template.attrs.get("separator", ","), lineterminator="\n")
    writer.writerow(template.columns)
    writer.writerows((i, *cells_of_id[i]) for i in ids)
    return text.getvalue().encode()


def render_submission(template: pd.DataFrame, label_of_id: Mapping[str, int]) -> bytes:
    """The bytes of a submission whose labels are integers. Raises `UserError`."""
    # operator.index refuses a float: int() would cut off its fraction.
    return render_rows(template, {i: [str(operator.index(label))] for i, label in label_of_id.items()})


def find_template_above(folder: Path, files: Sequence[str], read: Collection[Path] = ()) -> Path | None:
    """The only template in a folder above that lists test images of `files`; none of those `read` for something else.

    Raises `UserError`.
    """
    found = [folder / name for name in list_unread(folder, choose_templates(list_files(folder)), read)]
    fitting = [path for path in found if match_ids(files, _ids_of(path))]
    if len(fitting) > 1:
        raise UserError(
            f"{folder}: {' and '.join(f.name for f in fitting)} each list test images; choose one with --template"
        )
    return fitting[0] if fitting else None


def _ids_of(path: Path) -> set[str]:
    try:
        return set(read_template(path).iloc[:, 0])
    except UserError:  # it may be of another dataset
        return set()


# The images that a cell means


def plain_path(path: str) -> str:
    """A path without case, known ending, leading zeros, and the `.0` of an id that a program took for a number."""
    folder, slash, name = path.rpartition("/")
    return folder.casefold() + slash + plain_id(re.sub(r"^([0-9]+)\.0+$", r"\1", name))


class ImageNames:
    """Which images a name can mean: a path or the last parts of one, with or without the extension."""

    def __init__(self, files: Sequence[str], root: Path | None = None):
        self.root = root  # whose test images a table may name too
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

    @functools.cached_property
    def tests(self) -> "ImageNames":
        """The names of the dataset's test images."""
        folder = find_split_folder(self.root, "test") if self.root else None
        return ImageNames(list_images_below(self.root, folder) if self.root and folder else [])

    def means_test_image(self, value: str) -> bool:
        """Whether a value that means none of the images means a test image; by its path, where names are in both."""
        if self.tests.stems.keys().isdisjoint(self.stems):
            return bool(self.tests.find(value))
        parts = self._read(value, "")[0].split("/")
        paths = ("/".join(parts[i:]) for i in range(len(parts)))
        return any(path in self.tests.paths or path in self.tests.path_stems for path in paths)

    @functools.cached_property
    def plain(self) -> dict[str, set[str]]:
        """The images of every path, and of the last parts of one, without what `plain_path` leaves out."""
        images: dict[str, set[str]] = {}
        for path, found in self.paths.items():
            parts = plain_path(path).split("/")
            for i in range(len(parts)):
                images.setdefault("/".join(parts[i:]), set()).update(found)
        return images

    @staticmethod
    def _read(value: str, base: str) -> tuple[str, str]:
        """(the path in a cell, the same below the folder `base`)."""
        name = normal_name(value.strip().replace("\\", "/")).removeprefix("./")
        return name, f"{base}/{name}" if base else name

    def find_all(self, values: Sequence[str], base: str = "") -> list[set[str]]:
        """The images that each value can mean; one that means none may mean an image that no other value means.

        It then has the image's name in another case, with another ending, or without leading zeros.
        """
        found = [self.find(value, base) for value in values]
        alike: dict[str, set[str]] = {}
        for value in {value for value, images in zip(values, found, strict=True) if not images}:
            name, here = (plain_path(path) for path in self._read(value, base))
            images = (self.plain.get(here) or self.plain.get(name) or set()) if name else set()
            alike[value] = images if len(images) == 1 else set()
        meant = Counter(file for images in [*alike.values(), set().union(*found)] for file in images)
        return [
            images or {file for file in alike[value] if meant[file] == 1}
            for value, images in zip(values, found, strict=True)
        ]

    def find(self, value: str, base: str = "") -> set[str]:
        """The images that `value` can mean, where a path may start in the folder `base` or far above the root."""
        name, here = self._read(value, base)
        for table, key in ((self.paths, here), (self.endings, name), (self.path_stems, here), (self.stems, name)):
            if name and key in table:
                return table[key]
        parts = name.split("/")
        above = ("/".join(parts[i:]) for i in range(1, len(parts)))
        return next((found for key in above if (found := self.paths.get(key) or self.path_stems.get(key))), set())
