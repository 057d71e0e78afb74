"""The submission csv: how it writes labels, as its template shows, and the check of a csv against the template.

python -m transfer.submission CSV --template T     # lists every kind of fault and exits with 2 if there are any
"""

import argparse
import hashlib
import re
import sys
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from transfer.config import SUBMISSION_LABELS
from transfer.data.labels import (
    HEADER,
    LabelForm,
    ProbabilityForm,
    WordForm,
    find_separator,
    index_form,
    match_ids,
    name_classes,
    name_test_images,
    open_template,
    read_class_order,
    read_rows,
    read_synonyms,
    read_template,
    render_rows,
    show_first,
    to_number,
)
from transfer.data.layouts import (
    NATURALLY,
    WNIDS_NAME,
    DatasetFiles,
    find_root,
    list_test_images,
    read_text,
)
from transfer.errors import UserError, exits_cleanly
from transfer.evaluation.predictions import balance_warning

COMPETITION_CLASSES = 100  # if nothing beside the template shows the classes

WAY_OUT = "say how labels are written with --submission_labels index, folder, name, wnid or probability"
UNDECIDED = {"", "0"}  # what a template has in its label column where it shows no label


def digest_of(content: bytes) -> str:
    """sha256 of the csv, as recorded in run.json."""
    return hashlib.sha256(content).hexdigest()


# How a submission writes labels


@dataclass(frozen=True)
class Classes:
    """The classes of a dataset in label order, as far as a submission may name them."""

    ids: Sequence[str]
    names: Sequence[str]
    order: str  # what gave the order, as in `DatasetFiles`

    @property
    def is_ordered(self) -> bool:
        """Whether a file or a column gives the order, so that an index is not a guess."""
        return not self.order.endswith(NATURALLY)

    @property
    def numbers(self) -> tuple[str, ...]:
        """The number of each class id, if all are distinct numbers; otherwise empty."""
        is_number = all(re.fullmatch("[0-9]{1,18}", class_id) for class_id in self.ids)
        numbers = tuple(str(int(class_id)) for class_id in self.ids) if is_number else ()
        return numbers if len(set(numbers)) == len(numbers) else ()


def word_forms(classes: Classes) -> dict[str, WordForm]:
    """The forms that write a word for each class, by their value of --submission_labels."""
    folder = "folder numbers" if classes.numbers else "folder names"
    return {
        "folder": WordForm(folder, classes.numbers or tuple(classes.ids)),
        "name": WordForm("class names", tuple(classes.names)),
        "wnid": WordForm("wnids" if classes.order == WNIDS_NAME else "folder names", tuple(classes.ids)),
        "index": index_form(len(classes.ids), classes.order),
    }


def match_columns(columns: Sequence[str], classes: Classes) -> tuple[int, ...] | None:
    """The label of the class that each column of a header names; None unless they name every class once."""

    def plain(word: str) -> str:
        return re.sub(r"[\W_]+", "", word.casefold())

    forms = word_forms(classes)
    known = [form.words for name, form in forms.items() if name != "index" or classes.is_ordered]
    for change in (str, plain):
        changed = [change(column) for column in columns]
        for words in ([change(word) for word in listed] for listed in known):
            # Around the class, every column may have the same words, as in p_bee and p_lion.
            for around in [changed[0].split(word, 1) for word in words if word and word in changed[0]]:
                label_of = {word.join(around): label for label, word in enumerate(words)}
                labels = tuple(label_of.get(column, -1) for column in changed)
                if sorted(labels) == list(range(len(words))):
                    return labels
    return None


def positive_class(column: str, classes: Classes) -> int | None:
    """The label of the class whose probability a lone column holds; None where it would be a guess."""
    tokens = set(re.split(r"[\W_]+", column.casefold()))
    named = [label for label, name in enumerate(classes.names) if name.casefold() in tokens]
    if len(named) == 1:
        return named[0]
    return 1 if classes.numbers == ("0", "1") or (classes.is_ordered and not classes.numbers) else None


def probability_form(path: Path | None, columns: Sequence[str], classes: Classes, asked: bool) -> ProbabilityForm:
    """The form with the probabilities that a template's columns hold. Raises `UserError`."""
    everything = tuple(range(len(classes.ids)))
    if path is None:
        return ProbabilityForm("a probability for each class", everything)
    if len(columns) == 1 and len(everything) == 2:
        positive = positive_class(columns[0], classes)
        if positive is None and not asked:
            raise UserError(
                f"{path}: has probabilities of one class, but does not say of which ({show_first(classes.names)}); "
                "give the order with --classes_file, the positive class last, or --submission_labels probability "
                f"for {classes.names[1]!r}"
            )
        positive = 1 if positive is None else positive
        return ProbabilityForm(f"the probability of {classes.names[positive]!r}", (positive,))
    labels = match_columns(columns, classes)
    if labels is None:
        raise UserError(
            f"{path}: the columns {show_first(columns)} are not the {len(everything)} classes "
            f"({show_first(classes.names)}); {WAY_OUT}, and rename the columns or the class folders for probabilities"
        )
    return ProbabilityForm("a probability for each class, in the columns of the header", labels)


def are_fractions(numbers: Sequence[float | None]) -> bool:
    """Whether all cells are numbers from 0 to 1, not all of them 0 or 1."""
    known = [n for n in numbers if n is not None and 0 <= n <= 1]
    return len(known) == len(numbers) and any(0 < n < 1 for n in known)


def decide_words(values: set[str], classes: Classes) -> WordForm | None:
    """The only form whose words the labels of a template are; None where several fit, or none."""
    forms = word_forms(classes)
    folder, index = forms["folder"], forms["index"]
    if classes.numbers:
        own = folder if values <= {*folder.words, *UNDECIDED} else None
        # A list of classes that are numbers may number them anew; then both would fit.
        if own and classes.is_ordered and folder.words != index.words and values <= {*index.words, ""}:
            return None
        return own or next((form for form in (forms["name"], forms["wnid"]) if values <= set(form.words)), None)
    if values <= UNDECIDED:
        return index if classes.is_ordered else None
    preferred = ("wnid", "name") if classes.order == WNIDS_NAME else ("name", "wnid")
    found = [forms[name] for name in preferred] + [index] * classes.is_ordered
    found = [form for form in found if values <= set(form.words)]
    return found[0] if len({form.words for form in found}) == 1 else None


def decide_form(path: Path | None, classes: Classes, asked: str | None = None) -> LabelForm:
    """How a submission writes labels: as `asked`, or as the template's label columns show it. Raises `UserError`."""
    forms = word_forms(classes)
    if path is None:
        if asked == "probability":
            return probability_form(None, [], classes, asked=True)
        return forms[asked or ("folder" if classes.numbers and not classes.is_ordered else "index")]
    template = read_template(path)
    columns, values = list(template.columns[1:]), set(template.iloc[:, 1].str.strip())
    if len(columns) > 1 and asked not in (None, "probability"):
        raise UserError(f"{path}: has {len(columns)} label columns, which --submission_labels {asked} cannot fill")
    if len(columns) > 1 or asked == "probability":
        return probability_form(path, columns, classes, asked=asked is not None)
    if asked:
        return forms[asked]
    for unicode_form in ("NFC", "NFD"):  # as the template has it; names on disk may have the other

        def change(words: Sequence[str], unicode_form=unicode_form) -> list[str]:
            return [unicodedata.normalize(unicode_form, word) for word in words]

        if form := decide_words(values, Classes(change(classes.ids), change(classes.names), classes.order)):
            return form
    if len(classes.ids) == 2 and are_fractions([to_number(value) for value in values]):
        return probability_form(path, columns, classes, asked=False)
    order = "" if classes.is_ordered else "; there is no wnids.txt, which gives every class its label"
    raise UserError(
        f"{path}: the labels {show_first(sorted(values))} do not show how the classes ({show_first(classes.names)}) "
        f"are written{order}; {WAY_OUT}, or give the order with --classes_file"
    )


def form_of(data: DatasetFiles) -> LabelForm:
    """How the submission of a dataset writes labels. Raises `UserError`."""
    classes = Classes(data.class_ids, data.class_names, data.label_order)
    return decide_form(data.template_path, classes, data.submission_labels)


def fill_submission(data: DatasetFiles, ids: Sequence[str], scores: np.ndarray, temperature: float) -> bytes:
    """The bytes of a dataset's submission, from the scores (M, classes) of its test images. Raises `UserError`."""
    form = form_of(data)
    columns = data.class_names if isinstance(form, ProbabilityForm) else HEADER[1:]
    cells = dict(zip(ids, form.render(scores, temperature), strict=True))
    return render_rows(open_template(data.template_path, data.test_ids, columns), cells)


# The check of a csv


def check_rows(path: Path, data: DatasetFiles) -> int:
    """The number of rows of a dataset's csv, after checking it as the command does. Raises `UserError` for a fault."""
    form = form_of(data)
    columns = data.class_names if isinstance(form, ProbabilityForm) else HEADER[1:]
    template = open_template(data.template_path, data.test_ids, columns)
    if faults := find_faults(path, template, form):
        raise UserError(f"{path}: {faults[0]}")
    return len(template)


def _read_csv(path: Path, template: pd.DataFrame) -> tuple[list[tuple[int, list[str]]], list[str]]:
    """(rows of a csv, faults of all rows at once); rows are read on as if these faults were corrected."""
    separator, header = template.attrs.get("separator", ","), list(template.columns)
    rows, faults = read_rows(path, separator), []
    other = find_separator(read_text(path))
    if rows and other != separator and all(len(cells) == 1 for _, cells in rows):
        split = read_rows(path, other)
        if split[0][1] == header:
            rows = split
            faults.append(f"columns are separated by {other!r}, not by {separator!r}")
    if rows and rows[0][1][1:] == header and all(len(cells) == len(header) + 1 for _, cells in rows):
        rows = [(line, cells[1:]) for line, cells in rows]
        faults.append("the first column is extra, probably row numbers; with pandas, save with index=False")
    return rows, faults


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


def find_faults(path: Path, template: pd.DataFrame, form: LabelForm | int) -> list[str]:
    """Every kind of fault of a csv against its template, a line each; an empty list if the csv can be submitted.

    `form` says how labels are written; an int N stands for labels 0 to N-1.
    """
    form = index_form(form) if isinstance(form, int) else form
    rows, faults = _read_csv(path, template)
    if not rows:
        return ["is empty"]
    header = list(template.columns)
    if rows[0][1] != header:
        faults.append(f"line 1: the header is {','.join(rows[0][1])!r}, not {','.join(header)!r}")
    good = [(line, cells) for line, cells in rows[1:] if len(cells) == len(header)]
    faults += _list_by_kind(
        [(line, f"has {len(c)} columns", f", not {len(header)}") for line, c in rows[1:] if len(c) != len(header)]
    )
    counts = Counter(cells[0] for _, cells in good)
    expected = list(template.iloc[:, 0])
    missing = [i for i in expected if i not in counts]
    extra = sorted(set(counts) - set(expected))
    repeated = [i for i, count in counts.items() if count > 1]
    for ids, what in ((missing, "missing"), (extra, "not in the template"), (repeated, "repeated")):
        if ids:
            faults.append(f"{len(ids)} ids are {what} ({show_first(ids)})")
    found = [(line, fault) for line, cells in good if (fault := form.find_fault(cells[1:]))]
    return faults + _list_by_kind([(line, value, f" {kind}") for line, (value, kind) in found])


def _find_data(template_path: Path) -> Path | None:
    """The root of the dataset beside a template, or in the folder below whose test images it lists."""
    folder = template_path.parent
    try:
        root = find_root(folder)
    except UserError:
        return None
    ids = set(read_template(template_path).iloc[:, 0])
    return root if root == folder or match_ids(list_test_images(root, Counter()), ids) else None


def _read_classes(root: Path | None, classes_file: Path | None) -> Classes | None:
    """The classes of a file, or of a dataset; None if there is neither."""
    if root is None and classes_file is None:
        return None
    class_ids, order = read_class_order(root or Path(), classes_file)
    names = name_classes(class_ids, read_synonyms(root, class_ids, order)) if root else class_ids
    return Classes(class_ids, names, order)


def form_without_classes(path: Path) -> LabelForm:
    """How a submission writes labels, as its template alone can show it. Raises `UserError`."""
    template = read_template(path)
    cells = template.iloc[:, 1:]
    numbers = [to_number(text) for text in cells.to_numpy().ravel()]
    if cells.shape[1] > 1:
        return ProbabilityForm("a probability for each class", tuple(range(cells.shape[1])))
    if are_fractions(numbers):
        return ProbabilityForm("the probability of the positive class", (1,))
    if set(cells.iloc[:, 0].str.strip()) <= UNDECIDED:
        return index_form(COMPETITION_CLASSES)
    raise UserError(
        f"{path}: the classes are unknown, since no dataset lies beside it; list them with --classes_file, or give "
        "--num_classes N for labels 0 to N-1"
    )


def _other_test_ids(root: Path | None, template_path: Path) -> list[str]:
    """Ids of the test images of a dataset whose template may leave some out; the competition's own is complete."""
    if root is None or (root / WNIDS_NAME).is_file():
        return []
    return name_test_images(root, list_test_images(root, Counter()), set(read_template(template_path).iloc[:, 0]))


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
        "--num_classes", type=int, help="labels are 0..N-1 [as the template and the dataset beside it show, or 100]"
    )
    parser.add_argument("--classes_file", type=Path, help="the classes, one per line in label order")
    parser.add_argument("--submission_labels", choices=SUBMISSION_LABELS, help="how labels are written")
    args = parser.parse_args(argv)
    if args.num_classes is not None and args.num_classes < 1:
        raise UserError(
            f"--num_classes {args.num_classes}: must be at least 1; give the number of classes, such as 100"
        )
    root = _find_data(args.template)
    classes = _read_classes(root, args.classes_file)
    if args.submission_labels and args.num_classes is not None:
        raise UserError("--submission_labels and --num_classes cannot be combined; leave one of them out")
    if args.submission_labels and classes is None:
        raise UserError(
            f"--submission_labels {args.submission_labels}: the classes are unknown, since no dataset lies beside "
            f"{args.template}; list them with --classes_file"
        )
    if args.num_classes is not None:
        form: LabelForm = index_form(args.num_classes)
    elif classes is None:
        form = form_without_classes(args.template)
    else:
        form = decide_form(args.template, classes, args.submission_labels)
    template = open_template(args.template, _other_test_ids(root, args.template))
    if faults := find_faults(args.csv, template, form):
        print(*(f"error: {args.csv}: {fault}" for fault in faults), sep="\n", file=sys.stderr)
        sys.exit(2)
    is_balanced = classes is None or classes.order == WNIDS_NAME
    if is_balanced and isinstance(form, WordForm):
        labels = [form.words.index(cells[1]) for _, cells in read_rows(args.csv)[1:]]
        if warning := balance_warning(labels, len(form.words)):
            print(f"warning: {args.csv}: {warning}", file=sys.stderr)
    print(f"ok: {len(template)} rows match {args.template}, labels written as {form.what}")


if __name__ == "__main__":
    main()
