"""Checks of the submission csv against the competition's template.

python -m transfer.submission CSV --template T     # lists every fault and exits with 2 if there are any
"""

import argparse
import hashlib
import re
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from transfer.data.labels import open_template, read_rows, read_template, show_first
from transfer.data.layouts import list_test_images, name_test_images, read_text
from transfer.errors import UserError, exits_cleanly

# Fraction of predictions above an equal share per class. A classifier with accuracy 0.8 on 5,000 images of 100
# classes has about 0.08; one that never predicts a quarter of the classes has at least 0.25.
IMBALANCE_LIMIT = 0.2

# '03', '+3' and '3.0' are not what render_submission writes. Bounded, since int() raises over 4,300 digits.
INTEGER = re.compile(r"0|-?[1-9][0-9]{0,17}")


def digest_of(content: bytes) -> str:
    """sha256 of the csv, as recorded in run.json."""
    return hashlib.sha256(content).hexdigest()


def _label_fault(line: int, text: str, num_classes: int) -> str | None:
    if not INTEGER.fullmatch(text):
        return f"line {line}: label {text!r} is not an integer"
    if not 0 <= int(text) < num_classes:
        return f"line {line}: label {text} is out of range 0 to {num_classes - 1}"
    return None


def find_faults(path: Path, template: pd.DataFrame, num_classes: int) -> list[str]:
    """Every fault of a csv against its template, a line each; an empty list if the csv can be submitted."""
    rows = read_rows(path)
    if not rows:
        return ["is empty"]
    faults = []
    header = list(template.columns)
    if rows[0][1] != header:
        faults.append(f"line 1: the header is {','.join(rows[0][1])!r}, not {','.join(header)!r}")
    good: list[tuple[int, str, str]] = []
    for line, cells in rows[1:]:
        if len(cells) == 2:
            good.append((line, cells[0], cells[1]))
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
        (repeated, "repeated"),
    ):
        if ids:
            faults.append(f"{len(ids)} ids are {what} ({show_first(ids)})")
    return faults + [f for line, _, label in good if (f := _label_fault(line, label, num_classes))]


def balance_warning(labels: Sequence[int], num_classes: int) -> str | None:
    """A warning if the predictions are far from equally many per class, as the competition's test images are."""
    if not len(labels):
        return None
    counts = np.bincount(labels, minlength=num_classes)
    excess = np.clip(counts / counts.sum() - 1 / num_classes, 0, None).sum()
    # With few images, chance alone makes the classes unequal.
    if excess <= IMBALANCE_LIMIT + np.sqrt(num_classes / (2 * np.pi * counts.sum())):
        return None
    return (
        f"predictions are far from balanced: label {counts.argmax()} occurs {counts.max()} times "
        f"(expected about {counts.sum() / num_classes:.0f}), {(counts == 0).sum()} of {num_classes} labels never; "
        "are classes mixed up, or is this the unchanged template?"
    )


def _count_classes(template_path: Path) -> int:
    wnids, train = (template_path.parent / name for name in ("wnids.txt", "train"))
    if wnids.is_file():
        return len(read_text(wnids).split())
    return sum(f.is_dir() and not f.name.startswith(".") for f in train.iterdir()) if train.is_dir() else 100


def _test_ids_beside(template_path: Path) -> list[str]:
    """Ids of the test images beside a template, which may leave some out; the competition's own is complete."""
    root = template_path.parent
    if (root / "wnids.txt").is_file():
        return []
    ids = set(read_template(template_path).iloc[:, 0])
    return name_test_images(root, list_test_images(root, Counter()), ids)


@exits_cleanly
def main(argv: Sequence[str] | None = None) -> None:
    """Check a csv against its template."""
    parser = argparse.ArgumentParser(
        prog="python -m transfer.submission",
        description="Check a submission against its template: lists every fault and exits with 2 if there are any.",
        epilog="example: python -m transfer.submission outputs/offline/submission.csv "
        "--template tiny-imagenet-100/submission_sample.csv",
    )
    parser.add_argument("csv", type=Path, help="the csv to submit")
    parser.add_argument("--template", type=Path, required=True, help="the competition's submission_sample.csv")
    parser.add_argument(
        "--num_classes", type=int, help="labels are 0..N-1 [lines of wnids.txt beside the template, or 100]"
    )
    args = parser.parse_args(argv)
    template = open_template(args.template, _test_ids_beside(args.template))
    num_classes = _count_classes(args.template) if args.num_classes is None else args.num_classes
    if num_classes < 1:
        raise UserError(f"--num_classes {num_classes}: must be at least 1; give the number of classes, such as 100")
    faults = find_faults(args.csv, template, num_classes)
    if faults:
        print(*(f"error: {args.csv}: {fault}" for fault in faults), sep="\n", file=sys.stderr)
        sys.exit(2)
    if warning := balance_warning([int(cells[1]) for _, cells in read_rows(args.csv)[1:]], num_classes):
        print(f"warning: {args.csv}: {warning}", file=sys.stderr)
    print(f"ok: {len(template)} rows match {args.template}")


if __name__ == "__main__":
    main()
