"""python -m transfer.submission CSV --template T     # lists every kind of fault and exits with 2 if there are any"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from transfer.data.labels import (
    open_template,
    read_csv_text,
)
from transfer.data.listing import WNIDS_NAME
from transfer.errors import exits_cleanly
from transfer.submission import (
    FORMS,
    WordForm,
)
from transfer.submission.checker import (
    UNKNOWN,
    align_csv,
    choose_form,
    find_data,
    find_faults,
    other_test_ids,
    read_classes,
)


@exits_cleanly
def main(argv: Sequence[str] | None = None) -> None:
    """Check a csv against its template."""
    parser = argparse.ArgumentParser(
        prog="python -m transfer.submission",
        description="Check a submission against its template: lists every kind of fault once, with its count, and "
        "exits with 2 if there are any.",
        epilog="example: python -m transfer.submission outputs/offline/submission.csv "
        "--template tiny-imagenet-100/submission_sample.csv",
    )
    parser.add_argument("csv", type=Path, help="the csv to submit, also as .zip or .gz")
    parser.add_argument("--template", type=Path, required=True, help="the competition's submission_sample.csv")
    parser.add_argument(
        "--num_classes", type=int, help="labels are 0..N-1 [as the template and the dataset beside it show]"
    )
    parser.add_argument("--classes_file", type=Path, help="the classes, one per line in label order")
    parser.add_argument(
        "--submission_labels", choices=[*dict.fromkeys(form.flag for form in FORMS)], help="how labels are written"
    )
    args = parser.parse_args(argv)
    folder, found = args.template.parent, find_data(args.template)
    classes = read_classes(found, folder, args.classes_file)
    form = choose_form(args, classes)
    template = open_template(args.template, other_test_ids(found, args.template))
    faults = find_faults(args.csv, template, form)
    if form is None:
        faults.append(f"labels are not checked: {UNKNOWN.format(args.template)}")
    if faults:
        print(*(f"error: {args.csv}: {fault}" for fault in faults), sep="\n", file=sys.stderr)
        sys.exit(2)
    warnings = []
    if (encoding := read_csv_text(args.csv)[1]) != "utf-8":
        warnings.append(f"is {encoding.upper()} text; save it as UTF-8 if the competition refuses it")
    # The test images of tiny-imagenet-100 are balanced.
    is_balanced = (folder / WNIDS_NAME).is_file() or (found is not None and (found[0] / WNIDS_NAME).is_file())
    if is_balanced and isinstance(form, WordForm):
        from transfer.evaluation.predictions import balance_warning  # here, as it loads transformers for seconds

        labels = [form.words.index(cells[1]) for _, cells in align_csv(args.csv, template).rows]
        if warning := balance_warning(labels, len(form.words)):
            warnings.append(warning)
    for warning in warnings:
        print(f"warning: {args.csv}: {warning}", file=sys.stderr)
    assert form is not None  # otherwise labels are not checked, which is a fault
    print(f"ok: {len(template)} rows match {args.template}, labels written as {form.what}")


if __name__ == "__main__":
    main()
