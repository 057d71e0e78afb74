"""The csv that is handed in: made from the template by id, and checked against it.

python -m transfer.submission CSV --template T     # exit 2 with every fault listed
"""

import argparse
import csv
import hashlib
import io
import operator
import re
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from transfer import UserError, exits_cleanly
from transfer.data.layouts import list_test, name_test_images

HEADER = ["image_id", "label"]

# Share of predictions in a wrong place against equal classes. A classifier of 0.8 accuracy on 5,000 images of 100
# classes has about 0.08; one that never predicts a quarter of the classes has at least 0.25.
IMBALANCE_LIMIT = 0.2

# As the writer writes it: '03', '+3' and '3.0' are other texts. int() raises over 4,300 digits.
INTEGER = re.compile(r"0|-?[1-9][0-9]{0,17}")


def _first(values: Sequence[str], count: int = 3) -> str:
    return ", ".join(repr(v) for v in values[:count]) + (", ..." if len(values) > count else "")


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as fault:
        raise UserError(f"{path}: cannot be read ({fault.strerror})") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: is not a text file") from None


def _read_rows(path: Path) -> list[tuple[int, list[str]]]:
    """(line number in an editor, cells) of every row that is not blank. Raises `UserError`."""
    reader = csv.reader(io.StringIO(_read_text(path)))
    try:
        return [(reader.line_num, row) for row in reader if row]
    except csv.Error as fault:
        raise UserError(f"{path}: is not a csv file (line {reader.line_num}: {fault})") from None


def read_template(path: Path) -> pd.DataFrame:
    """The template as text: an id column and a label column, in its own order. Raises `UserError`."""
    # Not pandas' reader: it drops a third cell of a row with a warning, and renames equal columns.
    rows = _read_rows(path)
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
        raise UserError(f"{path}: id {ids[ids.duplicated()].iloc[0]!r} stands there twice")
    return table


def make_template(ids: Sequence[str]) -> pd.DataFrame:
    """A template for test images that came without one."""
    return pd.DataFrame({HEADER[0]: list(ids), HEADER[1]: "0"}, dtype=str)


def open_template(path: Path | None, test_ids: Sequence[str]) -> pd.DataFrame:
    """What is to be filled in: the template's rows, then one for each test image that it leaves out."""
    if path is None:
        return make_template(test_ids)
    template = read_template(path)
    listed = set(template.iloc[:, 0])
    rest = [[image_id, "0"] for image_id in test_ids if image_id not in listed]
    return pd.concat([template, pd.DataFrame(rest, columns=template.columns, dtype=str)], ignore_index=True)


def check_template(template: pd.DataFrame, test_ids: Sequence[str], path: Path, may_be_short: bool = False) -> None:
    """Refuse a template whose ids are not exactly those of the test images, or some of them if it `may_be_short`."""
    ids = set(template.iloc[:, 0])
    unlisted, unfound = sorted(set(test_ids) - ids), sorted(ids - set(test_ids))
    faults = []
    if unfound:
        faults.append(f"{len(unfound)} ids have no test image ({_first(unfound)})")
    if unlisted and not may_be_short:
        faults.append(f"{len(unlisted)} test images have no row ({_first(unlisted)})")
    if faults:
        raise UserError(f"{path}: does not match the test images: {' and '.join(faults)}")


def render_submission(template: pd.DataFrame, label_of_id: Mapping[str, int]) -> bytes:
    """The csv's bytes: the template's header, ids and order, with labels joined by id. Raises `UserError`."""
    ids = list(template.iloc[:, 0])
    missing = [i for i in ids if i not in label_of_id]
    if missing:
        raise UserError(f"{len(missing)} ids of the template have no prediction ({_first(missing)})")
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(template.columns)
    writer.writerows((i, operator.index(label_of_id[i])) for i in ids)
    return text.getvalue().encode()


def digest_of(content: bytes) -> str:
    """sha256 of the csv, as run.json has it."""
    return hashlib.sha256(content).hexdigest()


def _label_fault(line: int, text: str, num_classes: int) -> str | None:
    if not INTEGER.fullmatch(text):
        return f"line {line}: label {text!r} is not an integer"
    if not 0 <= int(text) < num_classes:
        return f"line {line}: label {text} is out of range 0 to {num_classes - 1}"
    return None


def find_faults(path: Path, template: pd.DataFrame, num_classes: int) -> list[str]:
    """Every fault of a csv against its template, a line each; an empty list for one that can be handed in."""
    rows = _read_rows(path)
    if not rows:
        return ["is empty"]
    faults = []
    header = list(template.columns)
    if rows[0][1] != header:
        faults.append(f"line 1: the header is {','.join(rows[0][1])!r}, not {','.join(header)!r}")
    good = []
    for line, cells in rows[1:]:
        if len(cells) == 2:
            good.append((line, *cells))
        else:
            faults.append(f"line {line}: has {len(cells)} columns, not 2")
    counts = Counter(image_id for _, image_id, _ in good)
    expected = list(template.iloc[:, 0])
    missing = [i for i in expected if i not in counts]
    extra = sorted(set(counts) - set(expected))
    repeated = [i for i, count in counts.items() if count > 1]
    for ids, what in (
        (missing, "missing"),
        (extra, "not in the template"),
        (repeated, "there more than once"),
    ):
        if ids:
            faults.append(f"{len(ids)} ids are {what} ({_first(ids)})")
    return faults + [f for line, _, label in good if (f := _label_fault(line, label, num_classes))]


def balance_warning(labels: Sequence[int], num_classes: int) -> str | None:
    """A warning if predictions are far from the equal classes that the competition's test images have, or None."""
    if not len(labels):
        return None
    counts = np.bincount(labels, minlength=num_classes)
    excess = np.clip(counts / counts.sum() - 1 / num_classes, 0, None).sum()
    # Even a perfect classifier of few images cannot hit every class equally often.
    if excess <= IMBALANCE_LIMIT + np.sqrt(num_classes / (2 * np.pi * counts.sum())):
        return None
    return (
        f"predictions are far from balanced: label {counts.argmax()} stands {counts.max()} times "
        f"(equal classes: {counts.sum() / num_classes:.0f}), {(counts == 0).sum()} of {num_classes} labels never; "
        "were classes mixed up, or is this the untouched template?"
    )


def _count_classes(template_path: Path) -> int:
    wnids, train = (template_path.parent / name for name in ("wnids.txt", "train"))
    if wnids.is_file():
        return len(_read_text(wnids).split())
    return sum(f.is_dir() and not f.name.startswith(".") for f in train.iterdir()) if train.is_dir() else 100


def _test_ids_beside(template_path: Path) -> list[str]:
    """Ids of the test images by a template that may leave some out; the competition's is complete."""
    root = template_path.parent
    if (root / "wnids.txt").is_file():
        return []
    ids = set(read_template(template_path).iloc[:, 0])
    return name_test_images(root, list_test(root, Counter()), ids)


@exits_cleanly
def main(argv: Sequence[str] | None = None) -> None:
    """Check a csv against its template."""
    parser = argparse.ArgumentParser(
        prog="python -m transfer.submission",
        description="Check a submission against its template; every fault is listed and the exit code is then 2.",
        epilog="example: python -m transfer.submission outputs/offline/submission.csv "
        "--template tiny-imagenet-100/submission_sample.csv",
    )
    parser.add_argument("csv", type=Path, help="the file to hand in")
    parser.add_argument("--template", type=Path, required=True, help="the competition's submission_sample.csv")
    parser.add_argument(
        "--num_classes", type=int, help="labels are 0..N-1 [lines of wnids.txt by the template, or 100]"
    )
    args = parser.parse_args(argv)
    template = open_template(args.template, _test_ids_beside(args.template))
    num_classes = _count_classes(args.template) if args.num_classes is None else args.num_classes
    if num_classes < 1:
        raise UserError(f"--num_classes: {num_classes} leaves no label; give the number of classes, such as 100")
    faults = find_faults(args.csv, template, num_classes)
    if faults:
        print(*(f"error: {args.csv}: {fault}" for fault in faults), sep="\n", file=sys.stderr)
        sys.exit(2)
    if warning := balance_warning([int(cells[1]) for _, cells in _read_rows(args.csv)[1:]], num_classes):
        print(f"warning: {args.csv}: {warning}", file=sys.stderr)
    print(f"ok: {len(template)} rows, as {args.template} wants them")


if __name__ == "__main__":
    main()
