"""The submission csv: how it writes labels, as its template shows.

`FORMS` lists the ways to write labels. `python -m transfer.submission CSV --template T` checks a csv.
"""

import hashlib
import re
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import ClassVar

import numpy as np
from scipy.special import softmax

from transfer.data.labels import (
    HEADER,
    is_missing,
    open_template,
    read_template,
    render_rows,
    shorten,
    show_first,
    strip_quotes,
    to_number,
)
from transfer.data.layouts import DatasetFiles
from transfer.data.listing import NATURAL_ORDER, NATURALLY, WNIDS_NAME
from transfer.errors import UserError

WAY_OUT = "say how labels are written with --submission_labels index, folder, name, wnid or probability"
UNDECIDED = frozenset({"", "0"})  # what a template has in its label column where it shows no label
UNKNOWN = frozenset({"?", "-", "-1"})  # these are read as empty cells there, as are missing values
UNICODE_FORMS = [partial(unicodedata.normalize, "NFC"), partial(unicodedata.normalize, "NFD")]


def digest_of(content: bytes) -> str:
    """sha256 of the csv, as recorded in run.json."""
    return hashlib.sha256(content).hexdigest()


# What decides how a submission writes labels


@dataclass(frozen=True)
class Classes:
    """The classes of a dataset in label order, as far as a submission may name them."""

    ids: tuple[str, ...]
    names: tuple[str, ...]
    order: str  # what gave the order, as in `DatasetFiles`

    @property
    def is_ordered(self) -> bool:
        """Whether a file or a column gives the order, so that an index is not a guess."""
        return not self.order.endswith(NATURALLY)

    @property
    def are_folders(self) -> bool:
        """Whether the ids are the names of folders; otherwise they are labels in a csv or in file names."""
        return self.is_ordered or self.order == NATURAL_ORDER

    @property
    def id_word(self) -> str:
        """What the ids are, for messages."""
        return "wnids" if self.order == WNIDS_NAME else "folder names" if self.are_folders else "training labels"

    @cached_property
    def numbers(self) -> tuple[str, ...]:
        """The number of each class id, if all are distinct numbers; otherwise empty."""
        is_number = all(re.fullmatch("[0-9]{1,18}", class_id) for class_id in self.ids)
        numbers = tuple(str(int(class_id)) for class_id in self.ids) if is_number else ()
        return numbers if len(set(numbers)) == len(numbers) else ()

    @property
    def has_padded_labels(self) -> bool:
        """Whether the ids are labels such as 007, whose text may matter; the names of folders are only numbers."""
        return bool(self.numbers) and self.numbers != self.ids and not self.are_folders

    def change(self, change: Callable[[str], str]) -> "Classes":
        """The same classes, with a function applied to all names."""
        return Classes(tuple(map(change, self.ids)), tuple(map(change, self.names)), self.order)


@dataclass(frozen=True)
class Shown:
    """The label columns of a template, and the distinct values in them."""

    path: Path | None  # None without a template
    columns: Sequence[str]
    values: Set[str]

    @property
    def has_fractions(self) -> bool:
        """Whether all values are numbers from 0 to 1, not all of them 0 or 1."""
        numbers = [to_number(value) for value in self.values]
        known = [n for n in numbers if n is not None and 0 <= n <= 1]
        return len(known) == len(numbers) and any(0 < n < 1 for n in known)


def look_at(path: Path | None) -> Shown:
    """What a template shows. Raises `UserError`."""
    if path is None:
        return Shown(None, HEADER[1:], frozenset())
    cells = read_template(path).iloc[:, 1:]
    return Shown(path, list(cells.columns), {text.strip() for text in cells.to_numpy().ravel()})


# The ways to write labels, of which docs/data.md has a table


def plain_word(word: str) -> str:
    """A word without case, spaces and signs."""
    return re.sub(r"[\W_]+", "", UNICODE_FORMS[0](word).casefold())


@dataclass(frozen=True)
class LabelForm(ABC):
    """A way to write labels in a csv. To add one, write a subclass and add it to `FORMS`."""

    flag: ClassVar[str]  # its value of --submission_labels
    classes: Classes
    what: str  # that the csv has, for messages, such as "class names"
    words: tuple[str, ...] = ()  # what stands for each class, if that is a word
    labels: tuple[int, ...] = ()  # the classes whose probabilities the columns hold, if they do

    @property
    def columns(self) -> Sequence[str]:
        """The label columns of a csv without a template."""
        return [self.classes.names[label] for label in self.labels] or HEADER[1:]

    @classmethod
    @abstractmethod
    def fill(cls, shown: Shown, classes: Classes) -> "LabelForm | None":
        """This form, asked for by its flag; None if the template's columns cannot hold it. Raises `UserError`."""

    @classmethod
    @abstractmethod
    def recognize(cls, shown: Shown, classes: Classes) -> "LabelForm | None":
        """This form, if the template shows it. Raises `UserError`."""

    @abstractmethod
    def render(self, scores: np.ndarray, temperature: float) -> list[list[str]]:
        """The cells of each row after its id, from logits (M, classes)."""

    @abstractmethod
    def find_fault(self, cells: Sequence[str]) -> tuple[str, str] | None:
        """(the value, what is wrong with it) of a row's cells after its id; None if they are right."""

    def explain(self, kind: str, rows: Sequence[Sequence[str]]) -> str:
        """What the cells of all rows tell about a kind of fault, to be added to it; empty if nothing."""
        return ""


class WordForm(LabelForm):
    """A label column that names the likeliest class of each image. Subclasses choose the words."""

    @classmethod
    @abstractmethod
    def make(cls, classes: Classes) -> "WordForm":
        """The form for these classes."""

    @classmethod
    def fill(cls, shown: Shown, classes: Classes) -> "WordForm | None":
        return cls.make(classes) if len(shown.columns) == 1 else None

    @classmethod
    def recognize(cls, shown: Shown, classes: Classes) -> "WordForm | None":
        form = cls.fill(shown, classes)
        return form if form and form.fits(shown.values) else None

    def fits(self, values: Set[str]) -> bool:
        """Whether the values in a template's label column are these words."""
        return bool(values - UNDECIDED) and values <= {*self.words, ""}

    def render(self, scores: np.ndarray, temperature: float) -> list[list[str]]:
        return [[self.words[label]] for label in scores.argmax(-1)]

    @cached_property
    def _known(self) -> Set[str]:
        return set(self.words)

    @cached_property
    def _others(self) -> dict[str, str]:
        """What each word of the other forms is."""
        return {word: form.what for form in reversed(word_forms(self.classes)) for word in form.words}

    @cached_property
    def _plain_words(self) -> Set[str]:
        return set(map(plain_word, self.words))

    @cached_property
    def _numbers(self) -> list[int]:
        """The words as numbers in order; empty if they are not."""
        return sorted(map(int, self.words)) if all(word.isdecimal() for word in self.words) else []

    @cached_property
    def _is_gapless(self) -> bool:
        return bool(self._numbers) and self._numbers[-1] - self._numbers[0] == len(self._numbers) - 1

    def find_fault(self, cells: Sequence[str]) -> tuple[str, str] | None:
        (text,) = cells
        if text in self._known:
            return None
        value = f"label {shorten(text)}"
        if is_missing(text):
            return value, "is blank or a missing value"
        if strip_quotes(text) in self._known:
            return value, "has spaces or quotes around it"
        hint = f", but one of the {self._others[text]}" if text in self._others else ""
        if self._numbers:
            return self._find_number_fault(text, hint)
        if plain_word(text) in self._plain_words:
            hint = "; it differs in case, spaces or signs only"
        elif not hint and to_number(text) is not None:
            hint = ", but a number"
        return value, f"is not one of the {self.what} ({show_first(self.words)}){hint}"

    def _find_number_fault(self, text: str, hint: str) -> tuple[str, str]:
        """What is wrong with a label where numbers are wanted; `hint` says what else it is."""
        if re.fullmatch("0|-?[1-9][0-9]{0,17}", text):  # bounded, since int() raises over 4,300 digits
            if self._is_gapless:
                return f"label {text}", f"is out of range {self._numbers[0]} to {self._numbers[-1]}"
            return f"label {text}", f"is not one of the {self.what} ({show_first(self.words)}){hint}"
        number = to_number(text.replace(",", "."))
        if re.fullmatch(r"(tensor\(|array\(|\[).*", text):
            hint = ", but an array or a tensor; write its number, as .item() gives it"
        elif number is None:
            hint = hint or ", but a wnid" * bool(re.fullmatch("n[0-9]{8}", text))
        elif not number.is_integer():
            hint = ", but a fraction; the template does not show probabilities"
        elif re.search("[.,eE]", text):
            hint = ", but a float; with pandas, convert the column with astype(int)"
        else:
            hint = "; it has a sign or leading zeros"
        return f"label {shorten(text)}", f"is not an integer{hint}"

    def explain(self, kind: str, rows: Sequence[Sequence[str]]) -> str:
        if not kind.startswith("is out of range"):
            return ""
        seen = [int(text) for (text,) in rows if re.fullmatch("-?[0-9]{1,18}", text)]
        for low, high in ((self._numbers[0] + by, self._numbers[-1] + by) for by in (1, -1)):
            if low <= min(seen) and max(seen) <= high:
                return f", but all labels fit {low} to {high}: they may be shifted by one"
        return ""


class FolderForm(WordForm):
    """The numbers that the class folders are named by; asked for, the folders' names where they are not numbers."""

    flag = "folder"

    @classmethod
    def make(cls, classes: Classes) -> WordForm:
        what = "folder numbers" if classes.are_folders else "numbers of the training labels"
        return cls(classes, what if classes.numbers else classes.id_word, classes.numbers or classes.ids)

    def fits(self, values: Set[str]) -> bool:
        if self.classes.has_padded_labels and values <= UNDECIDED:
            return False
        return bool(self.classes.numbers) and (values <= UNDECIDED or values <= {*self.words, ""})


class NameForm(WordForm):
    """The names of the classes."""

    flag = "name"

    @classmethod
    def make(cls, classes: Classes) -> WordForm:
        is_wnid = classes.id_word == "wnids" and classes.names == classes.ids
        return cls(classes, "wnids" if is_wnid else "class names", classes.names)


class WnidForm(WordForm):
    """The names of the class folders as they are, such as wnids."""

    flag = "wnid"

    @classmethod
    def make(cls, classes: Classes) -> WordForm:
        return cls(classes, classes.id_word, classes.ids)


class IndexForm(WordForm):
    """Integers from 0 in label order."""

    flag = "index"

    @classmethod
    def make(cls, classes: Classes) -> WordForm:
        what = f"integers 0 to {len(classes.ids) - 1}" + f", by {classes.order}" * bool(classes.order)
        return cls(classes, what, tuple(map(str, range(len(classes.ids)))))

    def fits(self, values: Set[str]) -> bool:
        return self.classes.is_ordered and values <= {*self.words, ""}


class ProbabilityForm(LabelForm):
    """Probabilities: `labels` are the classes that the columns hold."""

    flag = "probability"

    def render(self, scores: np.ndarray, temperature: float) -> list[list[str]]:
        probabilities = softmax(np.asarray(scores, dtype=np.float64) / temperature, axis=-1)
        return [[format(p, ".10g") for p in row] for row in probabilities[:, list(self.labels)]]

    def find_fault(self, cells: Sequence[str]) -> tuple[str, str] | None:
        numbers = [to_number(text) for text in cells]
        for text, number in zip(cells, numbers, strict=True):
            if number is not None and 0 <= number <= 1:
                continue
            value = f"value {shorten(text)}"
            if is_missing(text):
                return value, "is blank or a missing value"
            if to_number(text.replace(",", ".")) is not None and "," in text:
                return value, "has a decimal comma; write a point"
            may_be_percent = text.endswith("%") or (number is not None and 1 < number <= 100)
            return value, "is not a probability from 0 to 1" + ", but may be a percentage" * may_be_percent
        total = sum(number for number in numbers if number is not None)
        if len(cells) > 1 and abs(total - 1) > 1e-3:
            return f"the sum {total:.6g} of the probabilities", "is not 1"
        return None

    def explain(self, kind: str, rows: Sequence[Sequence[str]]) -> str:
        if len(self.labels) == 1 or not kind.endswith("percentage"):
            return ""
        totals = [sum(to_number(text.rstrip("%")) or 0 for text in cells) for cells in rows]
        return ": the sums are 100, so divide by 100" if all(99 <= total <= 101 for total in totals) else ""


class PositiveForm(ProbabilityForm):
    """One column with the probability of one of two classes."""

    @classmethod
    def fill(cls, shown: Shown, classes: Classes) -> LabelForm | None:
        if shown.path is None or len(shown.columns) > 1 or len(classes.ids) != 2:
            return None
        positive = positive_class(shown.columns[0], classes)
        positive = 1 if positive is None else positive
        return cls(classes, f"the probability of {classes.names[positive]!r}", labels=(positive,))

    @classmethod
    def recognize(cls, shown: Shown, classes: Classes) -> LabelForm | None:
        form = cls.fill(shown, classes)
        if form is None or not shown.has_fractions or shown.values <= set(classes.names):
            return None
        if positive_class(shown.columns[0], classes) is None:
            raise UserError(
                f"{shown.path}: has probabilities of one class, but does not say of which "
                f"({show_first(classes.names)}); give the order with --classes_file, the positive class last, or "
                f"--submission_labels probability for {classes.names[1]!r}"
            )
        return form


class ColumnsForm(ProbabilityForm):
    """A column for each class, which the header names."""

    @classmethod
    def fill(cls, shown: Shown, classes: Classes) -> LabelForm | None:
        if shown.path is None:
            return cls(classes, "a probability for each class", labels=tuple(range(len(classes.ids))))
        labels = match_columns(shown.columns, classes)
        if labels is None:
            raise UserError(
                f"{shown.path}: the columns {show_first(shown.columns)} are not the {len(classes.ids)} classes "
                f"({show_first(classes.names)}); {WAY_OUT}, and rename the columns or the class folders for "
                "probabilities"
            )
        return cls(classes, "a probability for each class, in the columns of the header", labels=labels)

    @classmethod
    def recognize(cls, shown: Shown, classes: Classes) -> LabelForm | None:
        return cls.fill(shown, classes) if len(shown.columns) > 1 else None


# Of forms with the same words, the first one gives the name. Of --submission_labels, the first that can be filled.
FORMS: tuple[type[LabelForm], ...] = (FolderForm, NameForm, WnidForm, IndexForm, PositiveForm, ColumnsForm)


def word_forms(classes: Classes) -> list[WordForm]:
    """All forms that write a word for each class."""
    return [form.make(classes) for form in FORMS if issubclass(form, WordForm)]


def match_columns(columns: Sequence[str], classes: Classes) -> tuple[int, ...] | None:
    """The label of the class that each column of a header names; None unless they name every class once."""
    known = [form.words for form in word_forms(classes) if classes.is_ordered or not isinstance(form, IndexForm)]
    for change in (str, plain_word):
        changed = [change(UNICODE_FORMS[0](column)) for column in columns]
        for words in ([change(word) for word in listed] for listed in known):
            # Around the class, every column may have the same words, as in p_bee and p_lion.
            for around in [changed[0].split(word, 1) for word in words if word and word in changed[0]]:
                label_of = {word.join(around): label for label, word in enumerate(words)}
                labels = tuple(label_of.get(column, -1) for column in changed)
                if sorted(labels) == list(range(len(words))):
                    return labels
    return None


def _join_words(text: str) -> str:
    """The words of a text as `_is_tumor_`, in lower case: a run of them is a part of it."""
    return "_" + "_".join(re.findall(r"[^\W_]+", UNICODE_FORMS[0](text).casefold())) + "_"


def positive_class(column: str, classes: Classes) -> int | None:
    """The label of the class whose probability a lone column holds; None where it would be a guess."""
    for change in (str, plain_word):
        named = [label for label, name in enumerate(classes.names) if change(name) == change(column)]
        if len(named) == 1:
            return named[0]
    rest, named, words = _join_words(column), [], list(map(_join_words, classes.names))
    for label in sorted(range(len(words)), key=lambda label: -len(words[label])):  # hot_dog before dog
        if words[label] in rest:
            named.append(label)
            rest = rest.replace(words[label], "_/_")
    is_opposite = bool({"no", "non", "not", "without"} & set(rest.split("_")))  # such as no_tumor of tumor and normal
    if len(named) > 1 or (named and is_opposite):
        return None
    if named:
        return named[0]
    return 1 if classes.numbers == ("0", "1") or (classes.is_ordered and not classes.numbers) else None


def decide_form(path: Path | None, classes: Classes, asked: str | None = None) -> LabelForm:
    """How a submission writes labels: as `asked`, or as the template's label columns show it. Raises `UserError`."""
    shown = look_at(path)
    if path is None and asked is None:
        asked = "index" if classes.is_ordered or not classes.numbers else "folder" if classes.are_folders else "wnid"
    if asked:
        form = next((form for kind in FORMS if kind.flag == asked and (form := kind.fill(shown, classes))), None)
        if form is None:
            columns = len(shown.columns)
            raise UserError(f"{path}: has {columns} label columns, which --submission_labels {asked} cannot fill")
        return form
    words = {*classes.ids, *classes.names}
    known = {"" if (is_missing(v) or v in UNKNOWN) and v not in words else v for v in shown.values}
    for spelled in map(classes.change, UNICODE_FORMS):  # as the template has it; names on disk may have the other
        found = [form for kind in FORMS if (form := kind.recognize(replace(shown, values=known), spelled))]
        if len({form.words for form in found}) == 1:
            return found[0]
    if classes.has_padded_labels and shown.values <= UNDECIDED:
        raise UserError(
            f"{path}: does not show whether labels are written as the text {classes.ids[0]!r} or as the number "
            f"{classes.numbers[0]}; say so with --submission_labels wnid (the text) or folder (the number)"
        )
    order = "" if classes.is_ordered else "; there is no wnids.txt, which gives every class its label"
    raise UserError(
        f"{path}: the labels {show_first(sorted(shown.values))} do not show how the classes "
        f"({show_first(classes.names)}) are written{order}; {WAY_OUT}, or give the order with --classes_file"
    )


def form_of(data: DatasetFiles) -> LabelForm:
    """How the submission of a dataset writes labels. Raises `UserError`."""
    classes = Classes(tuple(data.class_ids), tuple(data.class_names), data.label_order)
    return decide_form(data.template_path, classes, data.submission_labels)


def fill_submission(data: DatasetFiles, ids: Sequence[str], scores: np.ndarray, temperature: float) -> bytes:
    """The bytes of a dataset's submission, from the scores (M, classes) of its test images. Raises `UserError`."""
    form = form_of(data)
    cells = dict(zip(ids, form.render(scores, temperature), strict=True))
    return render_rows(open_template(data.template_path, data.test_ids, form.columns), cells)
