"""Small datasets in random layouts, as people have them, whose truth is known.

`python benchmarks/chaos.py --layouts 500` draws them, and `layout_check.py` compares what is read from them with the
truth.
"""

import csv
import io
import random
import re
import unicodedata
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

COLORS = [(230, 20, 20), (20, 200, 20), (20, 20, 230), (240, 240, 20), (20, 230, 230)]
FORMATS = {".jpg": "JPEG", ".JPEG": "JPEG", ".jfif": "JPEG", ".png": "PNG", ".webp": "WEBP"}
CLASSES = {  # kind of names -> names in label order, as they stand on disk
    "names": ["bee", "c9", "c10", "lion", "wolf"],
    "names of splits": ["bus", "data", "test", "train", "val"],
    "odd names": ["São Paulo", "bee, honey", "cafe\u0301", "grey wolf", "o'neill & co"],
    "wnids": ["n03", "n01", "n10", "n02", "n09"],
    "0 to N-1": ["0", "1", "2", "3", "4"],
    "1 to N": ["1", "2", "3", "4", "5"],
    "gaps": ["2", "5", "7", "11", "30"],
    "zeros before": ["001", "002", "010", "011", "100"],
}
GLOSSES = ["goldfish, Carassius auratus", "tabby cat", "crane", "drake, duck", "maillot"]  # of the wnids
JUNK = [".DS_Store", "Thumbs.db", "notes.txt", "__MACOSX/._x.jpg", "@eaDir/x.jpg", "README.md", "meta.csv"]
JUNK_TEXT = {"meta.csv": "temperature,pressure\n20.5,1013.2\n21.5,1012.9\n", "notes.txt": "thanks to all\n"}


@dataclass
class DataSet:
    """A dataset on disk, and what is true of it. Paths are relative to `top`, which `--data_dir` names."""

    rng: random.Random
    top: Path
    root: str  # of the dataset, ending with a slash unless it is `top` itself
    kind: str  # of the class names
    classes: list[str]
    what: list[str] = field(default_factory=list)  # choices, to tell one case from another
    images: dict[str, tuple[str, int]] = field(default_factory=dict)  # path -> (train, val, test or stray; label)
    read: set[str] = field(default_factory=set)  # other files that are to be used
    options: dict[str, str] = field(default_factory=dict)
    excuses: list[str] = field(default_factory=list)  # what a justified refusal may say
    split: dict[str, str] = field(default_factory=dict)  # names of the split folders
    header: list[str] = field(default_factory=lambda: ["image_id", "label"])
    separator: str = ","
    ids: dict[str, str] = field(default_factory=dict)  # id -> path of the test image, in the template's order
    words: list[str] = field(default_factory=list)  # how the csv writes each class
    columns: list[int] = field(default_factory=list)  # or the class of each column of probabilities
    has_text_labels: bool = False  # labels of a csv or of file names keep their zeros, names of folders are numbers

    @property
    def is_numbered(self) -> bool:
        return self.classes[0].isdecimal()

    @property
    def is_ordered(self) -> bool:
        """Whether a file gives the order of the classes."""
        return self.kind == "wnids" or "classes_file" in self.options

    def choose(self, *values):
        return self.rng.choice(values)

    def maybe(self, probability: float) -> bool:
        return self.rng.random() < probability

    def paths(self, role: str) -> list[str]:
        return [path for path, (name, _) in self.images.items() if name == role]

    def write(self, path: str, content: str | bytes, is_read: bool = False) -> None:
        """Write a file at a path below `top`, which may start with `../`."""
        file = self.top / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content.encode() if isinstance(content, str) else content)
        if is_read:
            self.read.add(path)

    def draw(self, path: str, role: str, label: int) -> str:
        """Write a picture in the color of its class, with bytes of its own."""
        self.write(path, picture(label, Path(path).suffix) + f"{len(self.images)}".encode())
        self.images[path] = (role, label)
        return path


def picture(label: int, ending: str, made: dict = {}) -> bytes:  # noqa: B006 - a cache
    """The bytes of a small picture in the color of a class."""
    if (label, ending) not in made:
        stream = io.BytesIO()
        Image.new("RGB", (8, 8), COLORS[label]).save(stream, FORMATS[ending])
        made[label, ending] = stream.getvalue()
    return made[label, ending]


def table(rows: list[list[str]], separator: str) -> str:
    text = io.StringIO(newline="")
    csv.writer(text, delimiter=separator, lineterminator="\n").writerows(rows)
    return text.getvalue()


# The images


def name_split_folders(d: DataSet) -> None:
    d.split = {
        "train": d.choose("train", "Train", "training", "train_images", "TRAIN", "Training Set", "train/train"),
        "val": d.choose("val", "valid", "Validation", "val_images"),
        "test": d.choose("test", "Test", "testing", "test_images", "test1"),
    }


def draw_test(d: DataSet, may_be_labeled: bool = True) -> None:
    """A test folder, flat, with one folder in it, or with class folders."""
    form = d.choose("none", "flat", "flat", "images", "unknown", "labeled" if may_be_labeled else "flat")
    d.what.append(f"test {form}")
    if form == "none":
        return
    folder, count = d.root + d.split["test"], d.rng.randint(4, 6)
    name = d.choose("{:d}", "{:04d}", "test_{:d}", "{:d}_a1b2", "img ({:d})")
    shared = form == "labeled" and d.maybe(0.5)  # every class has an image of the same name
    for i in range(count if form != "labeled" else 2 * len(d.classes)):
        label = i % len(d.classes)
        inside = {"flat": "", "labeled": f"/{d.classes[label]}"}.get(form, f"/{form}")
        number = i // len(d.classes) if shared else i
        d.draw(f"{folder}{inside}/{name.format(number)}{ending_of(d)}", "test", label)
    if form == "flat" and d.maybe(0.2):  # two images whose names differ in the ending only
        twin = Path(d.paths("test")[0])
        d.draw(str(twin.with_suffix(".png" if twin.suffix != ".png" else ".jpg")), "test", 1)


def ending_of(d: DataSet) -> str:
    """The ending of most images, or now and then another one."""
    if "ending" not in d.split:
        d.split["ending"] = d.choose(*FORMATS)
    return d.split["ending"] if d.maybe(0.9) else d.choose(*FORMATS)


def draw_class_folders(d: DataSet) -> None:
    """train/<class>/*, or <class>/* for a flat one, with val/ and test/ if there are such."""
    name_split_folders(d)
    is_flat = d.maybe(0.25) and d.kind != "names of splits"
    train = d.root if is_flat else d.root + d.split["train"] + d.choose("/", "/", "/", "/images/")
    inside = d.choose("", "", "images/") if "images/" not in train else ""
    d.what.append("flat class folders" if is_flat else "class folders")
    deep = not is_flat and not inside and d.maybe(0.2)
    for label, name in enumerate(d.classes):
        for i in range(d.rng.randint(3, 4)):
            below = f"{d.choose('2020', '2021', 'a/b')}/" if deep else inside
            d.draw(f"{train}{name}/{below}{name[:1]}_{i}{ending_of(d)}", "train", label)
    if d.maybe(0.4):
        draw_validation(d, inside)
    if d.kind == "wnids":
        d.write(f"{d.root}wnids.txt", "\n".join(d.classes) + "\n", is_read=True)
        if d.maybe(0.5):
            lines = [f"{name}\t{gloss}\n" for name, gloss in zip(d.classes, GLOSSES, strict=False)]
            d.write(f"{d.root}words.txt", "".join(sorted(lines)), is_read=True)
            d.what.append("words.txt")
    draw_test(d)
    if d.maybe(0.15):
        rows = [[Path(path).name, d.classes[d.images[path][1]]] for path in d.paths("train")]
        if len({name for name, _ in rows}) == len(rows):
            d.write(f"{d.root}train.csv", table([["image", "label"], *rows], ","))
            d.what.append("csv that agrees")
    draw_stray(d, f"{d.root}cover.jpg", *([] if is_flat else [f"{d.root}extra/1.jpg", f"{train}1.jpg"]))


def draw_validation(d: DataSet, inside: str) -> None:
    """val/<class>/*, or val/images/* with annotations."""
    val = d.root + d.split["val"]
    is_annotated = d.kind == "wnids" and d.maybe(0.5)
    lines = []
    for i in range(d.rng.randint(2, 8)):  # perhaps of some classes only
        label = i % len(d.classes)
        name = f"val_{i}{ending_of(d)}"
        d.draw(
            f"{val}/{'images' if is_annotated else d.classes[label]}/{'' if is_annotated else inside}{name}",
            "val",
            label,
        )
        lines.append(f"{name}\t{d.classes[label]}\t0\t0\t7\t7\n")
    d.what.append("val annotated" if is_annotated else "val folders")
    if is_annotated or (d.kind == "wnids" and d.maybe(0.4)):
        d.write(f"{val}/val_annotations.txt", "".join(lines), is_read=is_annotated)


def draw_stray(d: DataSet, *paths: str, excuses: tuple[str, ...] = ()) -> None:
    """Now and then, an image that belongs to nothing."""
    if d.maybe(0.15):
        path = d.choose(*paths)
        d.draw(path, "stray", 0)
        d.what.append(f"stray {path}")
        d.excuses += excuses


def draw_labeled_by_csv(d: DataSet) -> None:
    """Images in one folder or several, and a csv or txt with their labels."""
    d.has_text_labels = True
    name_split_folders(d)
    places = d.choose([d.split["train"]], ["images"], ["pics/a", "pics/b"], ["part1", "part2"], [""])
    number = d.choose("{:d}", "{:05d}", "img_{:d}", "x{:d} y")
    d.what.append(f"images in {' and '.join(places) or 'the root'}")

    def draw_into(place: str, i: int, role: str) -> str:
        folder = f"{d.root}{place}/" if place else d.root
        return d.draw(f"{folder}{number.format(i)}{ending_of(d)}", role, i % len(d.classes))

    paths = [draw_into(places[i % len(places)], i, "train") for i in range(4 * len(d.classes))]
    draw_test(d, may_be_labeled=False)
    if d.paths("test") and d.maybe(0.3):
        rows = [[Path(path).name, "8"] for path in d.paths("test")]
        d.write(f"{d.root}test.csv", table([["image_id", "width"], *rows], ","))
    elif not d.paths("test") and len(places) == 1 and d.maybe(0.6):
        for i in range(100, 105):
            draw_into(places[0], i, "test")
        d.what.append("test images beside")  # the template tells them
    if places == [d.split["train"]] and d.maybe(0.3):
        d.what.append("val labeled by the csv")
        paths += [draw_into(d.split["val"], i, "val") for i in range(200, 200 + 2 * len(d.classes))]
    write_labels(d, paths, is_in_train=places == [d.split["train"]] and not d.paths("val"))
    spots = f"{d.root}cover.jpg", f"{d.root}extra/1.jpg"
    draw_stray(d, *spots, excuses=("has no label in", "could each be", "name several images"))


PATH_FORMS = {  # how a csv may name an image
    "name": lambda path: Path(path).name,
    "stem": lambda path: Path(path).stem,
    "path": lambda path: path,
    "dotted": lambda path: f"./{path}",
    "far": lambda path: f"/kaggle/input/set/{path}",
    "windows": lambda path: "C:\\data\\" + path.replace("/", "\\"),
}
TABLES = ["train.csv", "labels.csv", "train_labels.csv", "metadata.csv", "Train_Data.CSV", "annotations.csv", "y.tsv"]


def write_labels(d: DataSet, paths: list[str], is_in_train: bool) -> None:
    """A csv or txt with a label for each of these images, in one of the forms that people use."""
    form = d.choose("name", *PATH_FORMS)
    rows = [[PATH_FORMS[form](path.removeprefix(d.root)), d.classes[d.images[path][1]]] for path in paths]
    if not any(" " in cell for row in rows for cell in row) and d.maybe(0.2):
        d.write(f"{d.root}labels.txt", "".join(" ".join(row) + "\n" for row in rows), is_read=True)
        d.what.append(f"txt, {form}")
        return
    header = [d.choose("image_id", "file_name", "id", "path"), d.choose("label", "class", "species", "target")]
    extra = d.choose("", "", "row_number", "constant", "numbers")
    for i, row in enumerate(rows):
        row[1:1] = {"row_number": [str(i)], "constant": ["train"], "numbers": [f"{0.37 * i + 0.1:.2f}"]}.get(extra, [])
    header[1:1] = [extra] * bool(extra)
    if extra == "row_number":  # it may be the name of an image, too
        d.excuses.append("could each be the image column")
    if d.maybe(0.3):
        rows, header = [row[::-1] for row in rows], header[::-1]
    d.rng.shuffle(rows)
    lines = [header, *rows] if d.maybe(0.8) else rows
    if lines is rows and d.kind == "names of splits":  # without a header, they may be splits
        d.excuses.append("seems to ")
    place = f"{d.root}{d.split['train']}/" if is_in_train and form in ("name", "stem") and d.maybe(0.4) else d.root
    has_split_folder = is_in_train or (d.paths("test") and "test images beside" not in d.what)
    if place == d.root and d.root and has_split_folder and d.maybe(0.15):
        place = d.root.rpartition("/")[0].rpartition("/")[0]
        place = f"{place}/" if place else ""
    name, separator = d.choose(*TABLES), d.choose(",", ",", ";", "\t")
    d.write(place + name, table(lines, separator), is_read=True)
    d.what.append(f"{place}{name} by {form}, {extra or 'no'} extra, {lines[0]}, {separator!r}")
    if place == d.root and d.maybe(0.15):  # another csv that names the same images
        d.write(f"{d.root}other.csv", table([["image", "kind"], *([row[0], "x"] for row in rows)], ","))
        d.excuses.append("other.csv could each hold the labels" if name < "other" else "could each hold the labels")
        if d.maybe(0.7):
            d.options["labels_csv"], d.excuses = d.choose(name, str(d.top / place / name)), []


def draw_labeled_by_name(d: DataSet) -> None:
    """Images whose names start with their class, and --label_pattern."""
    d.has_text_labels = True
    name_split_folders(d)
    folder = d.choose(d.split["train"], "images", "")
    sign = d.choose(".", "_", "-")
    d.what.append(f"file names in {folder or 'the root'}")
    d.options["label_pattern"] = rf"^(.+){re.escape(sign)}[0-9]+\.[A-Za-z]+$"
    for i in range(4 * len(d.classes)):
        label, place = i % len(d.classes), f"{d.root}{folder}/" if folder else d.root
        d.draw(f"{place}{d.classes[label]}{sign}{i}{ending_of(d)}", "train", label)
    draw_test(d, may_be_labeled=False)
    excuses = () if folder == d.split["train"] else ("do not match",)
    draw_stray(d, f"{d.root}cover.jpg", f"{d.root}extra/1.jpg", excuses=excuses)


# The template


def write_template(d: DataSet) -> None:
    """A template of a random kind, and what the csv made from it must say."""
    d.words = plain_words(d)
    if not d.paths("test") or (d.maybe(0.2) and "test images beside" not in d.what):
        return
    d.separator = d.choose(",", ",", ",", ";", "\t")
    ids = template_ids(d)
    kinds = ["labels", "labels", "labels", "columns", "columns", "zeros", "empty"] + ["index"] * d.is_ordered
    kind = d.choose(*kinds, *["fraction"] * 3 * (len(d.classes) == 2))
    d.header = [d.choose("id", "ID", "image_id", "file"), d.choose("label", "Label", "prediction", "target")]
    cells = {
        "labels": lambda: label_cells(d, ids),
        "index": lambda: index_cells(d, ids),
        "zeros": lambda: undecided_cells(d, ids, "0"),
        "empty": lambda: undecided_cells(d, ids, ""),
        "columns": lambda: column_cells(d, ids),
        "fraction": lambda: fraction_cells(d, ids),
    }[kind]()
    order = list(ids)
    d.rng.shuffle(order)
    if d.kind != "wnids" and "test images beside" not in d.what and d.maybe(0.15):
        order = order[1:]  # a template may leave images out
    d.ids = {i: ids[i] for i in order}
    if kind == "labels":
        forget_unseen_forms(d, {cells[i][0] for i in order})
    name = d.choose("sample_submission.csv", "submission_sample.csv", "sampleSubmission.csv", "template.csv")
    above = d.maybe(0.2) and "test images beside" not in d.what
    d.what.append(f"template of {kind}{' above' * above}, {d.separator!r}")
    parent = "".join(f"{part}/" for part in d.root.split("/")[:-2]) if d.root else "../"
    path = (parent if above else d.root) + name
    if d.maybe(0.1):
        path = f"{d.root}to_fill.csv"
        d.options["template"] = str(d.top / path)
    d.write(path, table([d.header, *([i, *cells[i]] for i in order)], d.separator), is_read=True)


def plain_words(d: DataSet) -> list[str]:
    """How a class is written without a template: as its label, as its folder's number, or as its place."""
    if d.is_numbered and d.has_text_labels:
        return list(d.classes)
    return [str(int(name)) if d.is_numbered else str(label) for label, name in enumerate(d.classes)]


def template_ids(d: DataSet) -> dict[str, str]:
    """id -> path of every test image, written in one of the ways that people use."""
    paths = d.paths("test")
    below = {path: path.removeprefix(f"{d.root}{d.split['test']}/") for path in paths}
    forms = {
        "name": lambda path: Path(path).name,
        "stem": lambda path: Path(path).stem,
        "upper case": lambda path: Path(path).name.upper(),
        "other ending": lambda path: f"{Path(path).stem}.bmp",
        "fewer zeros": lambda path: re.sub(r"(?<![0-9])0+(?=[0-9])", "", Path(path).stem),
        "more zeros": lambda path: re.sub(r"(?<![0-9])([0-9]+)", r"00\1", Path(path).stem),
        "path": lambda path: path.removeprefix(d.root),
        "path below test": lambda path: below[path],
    }
    order = list(forms)
    d.rng.shuffle(order)
    for form in order:
        ids = {forms[form](path): path for path in paths}
        if len(ids) == len(paths):
            d.what.append(f"ids by {form}")
            return ids
    raise AssertionError("paths differ")


def label_cells(d: DataSet, ids: dict[str, str]) -> dict[str, list[str]]:
    """The template names classes: one in all rows, or several."""
    unicode_form = d.choose("NFC", "NFD")
    vocabularies = [[unicodedata.normalize(unicode_form, name) for name in d.classes]]
    if "words.txt" in d.what:
        vocabularies.append([gloss.split(",")[0] for gloss in GLOSSES[: len(d.classes)]])
    d.words = d.choose(*vocabularies)
    used = d.words if d.maybe(0.5) else [d.choose(*d.words)]
    return {i: [d.choose(*used)] for i in ids}


def forget_unseen_forms(d: DataSet, shown: set[str]) -> None:
    """A template shows the Unicode form of the names, or leading zeros, only if a name in it has them."""
    if all(word.isascii() for word in shown):
        d.words = [unicodedata.normalize("NFC", word) for word in d.words]
    if d.is_numbered and not any(word[0] == "0" != word for word in shown):
        d.words = [str(int(name)) for name in d.classes]
        if d.kind == "zeros before":
            d.excuses.append("do not show how the classes")


def index_cells(d: DataSet, ids: dict[str, str]) -> dict[str, list[str]]:
    return {i: [str(d.rng.randrange(len(d.classes)))] for i in ids}


def undecided_cells(d: DataSet, ids: dict[str, str], cell: str) -> dict[str, list[str]]:
    if d.kind == "zeros before" and d.has_text_labels:
        asked = d.choose("folder", "wnid", None)
        if asked is None:
            d.excuses.append("does not show whether labels are written")
        else:
            d.options["submission_labels"] = asked
            d.words = list(d.classes) if asked == "wnid" else [str(int(name)) for name in d.classes]
    elif not d.is_numbered and not d.is_ordered:
        asked = d.choose("index", "folder", "name", None)
        if asked is None:
            d.excuses.append("do not show how the classes")
        else:
            d.options["submission_labels"] = asked
        if asked in ("folder", "name"):
            d.words = [unicodedata.normalize("NFC", name) for name in d.classes]
    return {i: [cell] for i in ids}


def column_cells(d: DataSet, ids: dict[str, str]) -> dict[str, list[str]]:
    """A column for each class, in random order; the names may have something around them."""
    d.columns = list(range(len(d.classes)))
    d.rng.shuffle(d.columns)
    around = d.choose("{}", "{}", "p_{}", "{}_prob")
    d.header = [d.header[0], *(around.format(d.classes[label]) for label in d.columns)]
    return {i: [d.choose("0", "0.5")] * len(d.columns) for i in ids}


def fraction_cells(d: DataSet, ids: dict[str, str]) -> dict[str, list[str]]:
    """One column with the probability of one of two classes."""
    d.columns = [1]
    if d.maybe(0.5) and d.classes[0] in ("bee", "lion", "c9", "c10", "wolf"):
        d.columns = [d.rng.randrange(2)]
        d.header[1] = d.choose("{}", "p_{}", "{}_probability").format(d.classes[d.columns[0]])
    elif not d.is_ordered and d.classes != ["0", "1"]:
        d.excuses.append("does not say of which")
    return {i: ["0.5"] for i in ids}


def draw_data_set(place: Path, rng: random.Random) -> DataSet:
    """A random dataset below a folder."""
    kind = rng.choice(list(CLASSES))
    count = rng.choice([2, 3, 3, 4, 5])
    draw_images = rng.choice([draw_class_folders] * 4 + [draw_labeled_by_csv] * 2 + [draw_labeled_by_name])
    if draw_images is not draw_class_folders and kind == "wnids":
        kind = "names"
    fixed = kind in ("0 to N-1", "1 to N")
    chosen = range(count) if fixed else sorted(rng.sample(range(5), count))
    root = "".join(f"{name}/" for name in rng.sample(["download", "my set", "data", "v1.2"], rng.randint(0, 3)))
    d = DataSet(rng, place / "top", root, kind, [CLASSES[kind][i] for i in chosen])
    d.top.mkdir(parents=True)
    d.what += [f"{count} classes, {kind}", f"root {root or '.'}"]
    if kind in ("names", "odd names") and d.maybe(0.2):
        rng.shuffle(d.classes)
        d.write("../order.txt", "\n".join(d.classes))
        d.options["classes_file"] = str(d.top.parent / "order.txt")
    draw_images(d)
    write_template(d)
    places = ["", root, str(Path(d.paths("train")[0]).parent) + "/"]
    for name in rng.sample(JUNK, rng.choice([0, 0, 1, 3])):
        d.write(rng.choice(places) + name, JUNK_TEXT.get(name, "\0"))
    return d
