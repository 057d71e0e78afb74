"""The layouts of a dataset on disk: how each is recognized, and which files and labels it gives.

`LAYOUTS` lists the readers in the order in which they are tried. A new layout is a class with `recognizes`,
`read_classes` and `read`, a line in `LAYOUTS`, and a row in docs/data.md.
"""

import math
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from transfer.data.label_tables import (
    check_folder_labels,
    describe_unmatched,
    divides_images,
    find_label_tables,
    label_images,
    list_named_in_test_csv,
    list_tables,
    names_images_below,
    names_more_than_validation,
    read_test_labels,
    repeats_folders,
)
from transfer.data.label_tables.columns import DataOptions, label_names
from transfer.data.labels import (
    find_fault_of_labels,
    match_ids,
    name_classes,
    order_labels,
    read_class_list,
    read_class_order,
    read_synonyms,
    read_template,
)
from transfer.data.listing import (
    NATURAL_ORDER,
    NATURALLY,
    TEMPLATE_NAME,
    WNIDS_NAME,
    file_name,
    find_class_folders,
    find_split_folder,
    find_template,
    has_images,
    is_image,
    leave_out_masks,
    list_archives,
    list_class_folders,
    list_files,
    list_flat_classes,
    list_folder,
    list_images_below,
    list_visible_folders,
    natural_key,
    read_lines,
    show_names,
)
from transfer.errors import UserError

ANNOTATIONS_NAME = "val_annotations.txt"  # Tiny ImageNet's; a line is a file name, a class id and a box
ROOT_DEPTH = 3  # levels below --data_dir in which a dataset's root is searched
EXPECTED = f"{WNIDS_NAME}, train/<wnid>/images/*.JPEG, test/images/*.JPEG and {TEMPLATE_NAME}"
ALSO_EXPECTED = "or train/<class>/*, with val/<class>/* and test/* if there are such images"
WAYS_OUT = (
    "move class folders into train/, give labels in a csv with --labels_csv or in file names with --label_pattern, or "
    "load the dataset with --dataset_name"
)


@dataclass(frozen=True)
class DatasetFiles:
    """A dataset whose layout was recognized; image files are relative to `root`, with forward slashes."""

    kind: str  # name of the layout; empty for the competition's own
    root: Path
    class_ids: list[str]  # folder names or ClassLabel names; the label of a class is its position in this list
    synonyms: list[str]  # of each class, as in words.txt: "tabby, tabby cat"
    class_names: list[str]  # the first synonym of each class, made unique; shown to people
    label_order: str  # what gave the order of class_ids, for example "wnids.txt"
    train_files: list[str]
    train_labels: list[int]
    validation_files: list[str]  # as published; empty if validation images are to be held out of train
    validation_labels: list[int]
    test_files: list[str]
    test_labels: list[int] = field(default_factory=list)  # of each test file; empty if they are unknown
    test_labels_path: Path | None = None  # the csv that gives these labels
    test_ids: list[str] = field(default_factory=list)  # of each test file, as in the template
    template_path: Path | None = None
    submission_labels: str | None = None  # how the submission writes labels, if that was asked for
    left_out: int = 0  # number of classes that a classes file leaves out
    train_groups: list[str] = field(default_factory=list)  # images of a group stay on one side of a split
    sources: list[Path] = field(default_factory=list)  # files that were read besides images
    ignored: Counter[str] = field(default_factory=Counter)  # files of other kinds that are not used -> how many
    unreadable: dict[str, str] = field(default_factory=dict)  # image that is left out -> why it cannot be read
    unused_images: Counter[str] = field(default_factory=Counter)  # folders of images that are not used -> how many

    @property
    def files(self) -> list[str]:
        """All image files: train, validation, then test."""
        return self.train_files + self.validation_files + self.test_files


class Layout(Protocol):
    """A reader of one layout."""

    def recognizes(self, root: Path, options: DataOptions) -> bool:
        """Whether a folder is the root of a dataset of this layout."""

    def read_classes(self, root: Path, options: DataOptions) -> tuple[list[str], list[str], str]:
        """(class ids in label order, class names, what gave the order), without looking for images."""

    def read(self, root: Path, options: DataOptions) -> DatasetFiles:
        """The files and labels of a dataset, without its template. Only names are read. Raises `UserError`."""


# Class folders


def check_class_folders(root: Path, class_ids: Sequence[str], label_order: str, is_subset: bool) -> set[str]:
    """Check that train/ has a folder for each class; return the folders that a subset of the classes leaves out.

    Raises `UserError` for a missing folder, for an extra one unless `is_subset`, and for fewer than two classes.
    """
    folders, train = list_class_folders(root, "train"), root / (find_split_folder(root, "train") or "")
    missing = sorted(set(class_ids) - set(folders))
    extra = sorted(set(folders) - set(class_ids))
    if missing:
        raise UserError(
            f"{train / missing[0]}: class folder is missing ({len(missing)} missing in all); add it, or correct "
            f"{label_order}"
        )
    if extra and not is_subset:
        raise UserError(
            f"{train / extra[0]}: class folder is not in {label_order} ({len(extra)} extra in all); "
            "add a line for it or remove the folder"
        )
    if len(class_ids) < 2:
        raise UserError(
            f"{train}: found {len(class_ids)} class folders ({', '.join(class_ids) or 'none'}); "
            "expected at least two, as train/<class>/*, or a csv that names the images, or --label_pattern"
        )
    return set(extra)


def list_class_images(root: Path, folders: Sequence[str], label_order: str) -> list[str]:
    """Training images of one class, <folder>/images/*, <folder>/* and below. Raises `UserError` if it has none."""
    files = leave_out_masks([file for folder in folders for file in list_images_below(root, folder)])
    if not files:
        reason = (
            "every folder in train/ is a class" if label_order == NATURAL_ORDER else f"{label_order} lists the class"
        )
        raise UserError(f"{root / folders[0]}: has no images, but {reason}")
    return files


def list_test_images(root: Path) -> list[str]:
    """Images in the test folder, in natural order unless there is a wnids.txt; empty without a test folder."""
    folder = find_split_folder(root, "test")
    files = list_images_below(root, folder) if folder else []
    return files if (root / WNIDS_NAME).is_file() else sorted(files, key=natural_key)


def find_held_out_folders(root: Path, split: str, class_ids: Sequence[str]) -> dict[str, list[str]]:
    """The folders of every class in val/ or test/, also if its name is in another case there."""
    alike: dict[str, list[str]] = {}
    for class_id in class_ids:
        alike.setdefault(class_id.casefold(), []).append(class_id)
    folders: dict[str, list[str]] = {}
    in_train = find_class_folders(root, "train")
    for name, places in find_class_folders(root, split).items():
        same = [] if name in in_train else alike.get(name.casefold(), [])
        folders.setdefault(same[0] if len(same) == 1 else name, []).extend(places)
    return folders


def list_labeled_test_images(root: Path, class_ids: Sequence[str]) -> tuple[list[str], list[int]]:
    """(files, labels) of test/<class>/*; empty unless every folder in test/ is a class and holds images."""
    split, folders = find_split_folder(root, "test"), find_held_out_folders(root, "test", class_ids)
    if split is None or not folders or not set(folders) <= set(class_ids) or has_images(root / split):
        return [], []
    found = {name: [f for place in places for f in list_images_below(root, place)] for name, places in folders.items()}
    if not all(found.values()):
        return [], []
    pairs = [(file, label) for label, class_id in enumerate(class_ids) for file in found.get(class_id, [])]
    return [file for file, _ in pairs], [label for _, label in pairs]


def _read_annotations(path: Path) -> dict[str, str]:
    """The class id of every file name in val_annotations.txt."""
    class_of = {}
    for number, line in enumerate(read_lines(path), 1):
        cells = line.split("\t")
        if len(cells) < 2:
            raise UserError(f"{path}: line {number} is not `file<TAB>class ...`")
        if cells[0] in class_of:
            raise UserError(f"{path}: line {number} lists {cells[0]} a second time")
        class_of[cells[0]] = cells[1]
    return class_of


def _list_annotated(root: Path, split: str, class_ids: Sequence[str], left_out: Set[str]) -> Iterator[tuple[str, int]]:
    """(file, label) of the images in split/images/*, labeled by val_annotations.txt."""
    path = root / split / ANNOTATIONS_NAME
    class_of, files = _read_annotations(path), list_images_below(root, split)
    unlabeled = [file for file in files if file_name(file) not in class_of]
    absent = sorted(set(class_of) - {file_name(file) for file in files})
    unknown = sorted(set(class_of.values()) - set(class_ids) - left_out)
    for faults, what in (
        (unlabeled, "has no line for the image"),
        (absent, "lists the missing image"),
        (unknown, "names the unknown class"),
    ):
        if faults:
            raise UserError(f"{path}: {what} {faults[0]} ({len(faults)} in all)")
    label_of = {class_id: label for label, class_id in enumerate(class_ids)}
    for file in files:
        if (label := label_of.get(class_of[file_name(file)])) is not None:
            yield file, label


def _list_by_class(root: Path, split: str, class_ids: Sequence[str], left_out: Set[str]) -> Iterator[tuple[str, int]]:
    """(file, label) of the images in split/<class>/*."""
    found = find_held_out_folders(root, "val", class_ids)
    folders = {name: places for name, places in found.items() if name != "images" or name in class_ids}
    unknown = sorted(set(folders) - set(class_ids) - left_out)
    if unknown or not folders:
        fault = f"{unknown[0]} is not a class of train/" if unknown else "has no class folders"
        raise UserError(f"{root / split}: {fault}; expected val/<class>/*, or val/images/* and {ANNOTATIONS_NAME}")
    for label, class_id in enumerate(class_ids):
        for folder in folders.get(class_id, []):
            yield from ((file, label) for file in leave_out_masks(list_images_below(root, folder)))


def list_validation_images(root: Path, class_ids: Sequence[str], left_out: Set[str]) -> list[tuple[str, int]]:
    """(file, label) of the published validation images; empty if there is no validation folder.

    They lie in val/images/*, labeled by val_annotations.txt, or in val/<class>/*, where that file may be left over.
    Images of the classes in `left_out` are skipped. Raises `UserError`.
    """
    split = find_split_folder(root, "val")
    if split is None:
        return []
    found = list((_list_annotated if is_annotated(root) else _list_by_class)(root, split, class_ids, left_out))
    if not found:
        raise UserError(f"{root / split}: has no images; add some, or remove the folder to hold out a part of train/")
    return found


def is_annotated(root: Path) -> bool:
    """Whether val_annotations.txt has the labels of the validation images, as in Tiny ImageNet."""
    folder = find_split_folder(root, "val")
    return folder is not None and (root / folder / ANNOTATIONS_NAME).is_file() and has_images(root / folder)


class ClassFolders:
    """train/<class>/*: a folder for each class, in natural order unless --classes_file gives another one."""

    def recognizes(self, root: Path, options: DataOptions) -> bool:
        return find_split_folder(root, "train") is not None and len(list_class_folders(root, "train")) > 1

    def name(self, root: Path, class_ids: Sequence[str]) -> str:
        return "numbered class folders" if all(name.isdecimal() for name in class_ids) else "class folders"

    def check_tables(self, root: Path, class_of: dict[str, str]) -> None:
        check_folder_labels(root, class_of)

    def read_classes(self, root: Path, options: DataOptions) -> tuple[list[str], list[str], str]:
        class_ids, label_order = read_class_order(root, options.classes_path)
        return class_ids, name_classes(class_ids, read_synonyms(root, class_ids, label_order)), label_order

    def read(self, root: Path, options: DataOptions) -> DatasetFiles:
        class_ids, label_order = read_class_order(root, options.classes_path)
        left_out = check_class_folders(root, class_ids, label_order, is_subset=options.classes_file is not None)
        folders = find_class_folders(root, "train")
        by_class = [list_class_images(root, folders[class_id], label_order) for class_id in class_ids]
        train = [(file, label) for label, files in enumerate(by_class) for file in files]
        self.check_tables(root, {file: class_ids[label] for file, label in train})
        validation = list_validation_images(root, class_ids, left_out)
        synonyms = read_synonyms(root, class_ids, label_order)
        class_names, labels_path = name_classes(class_ids, synonyms), None
        tested, test_labels = list_labeled_test_images(root, class_ids)
        if not tested:
            tested = list_test_images(root)
            test_labels, labels_path = read_test_labels(root, tested, class_ids, class_names)
        sources = [root / name for name in (WNIDS_NAME, "words.txt")]
        if is_annotated(root):
            sources.append(root / (find_split_folder(root, "val") or "") / ANNOTATIONS_NAME)
        return DatasetFiles(
            kind=self.name(root, class_ids),
            root=root,
            class_ids=class_ids,
            synonyms=synonyms,
            class_names=class_names,
            label_order=label_order,
            train_files=[file for file, _ in train],
            train_labels=[label for _, label in train],
            validation_files=[file for file, _ in validation],
            validation_labels=[label for _, label in validation],
            test_files=tested,
            test_labels=test_labels,
            test_labels_path=labels_path,
            left_out=len(left_out),
            sources=[*sources, *filter(None, [labels_path])],
        )


class WnidFolders(ClassFolders):
    """The competition's layout, and Tiny ImageNet's as published: class folders in the order of wnids.txt."""

    def recognizes(self, root: Path, options: DataOptions) -> bool:
        return (root / WNIDS_NAME).is_file() and find_split_folder(root, "train") is not None

    def name(self, root: Path, class_ids: Sequence[str]) -> str:
        return "Tiny ImageNet as published" if is_annotated(root) else ""

    def check_tables(self, root: Path, class_of: dict[str, str]) -> None:
        pass  # wnids.txt says that the folders are the classes


class FlatClassFolders(ClassFolders):
    """<class>/*: class folders without a train folder."""

    def recognizes(self, root: Path, options: DataOptions) -> bool:
        return len(list_flat_classes(root)) > 1

    def name(self, root: Path, class_ids: Sequence[str]) -> str:
        return "class folders without train/"


# Labels that are not folder names


def list_labeled(root: Path, options: DataOptions) -> list[str]:
    """The images that labels are wanted for: all but those of test/."""
    files = sorted(list_images_below(root, without=find_split_folder(root, "test")))
    if not options.label_pattern or find_split_folder(root, "train") is None:
        return files
    # A csv names its images, but a pattern may match any: only those of train/ and val/ are meant.
    starts = tuple(f"{folder}/" for split in ("train", "val") if (folder := find_split_folder(root, split)))
    return [file for file in files if file.startswith(starts)]


def list_unlabeled_test(
    root: Path, template: Path | None, unlabeled: Sequence[str], source: str
) -> tuple[list[str], list[Path]]:
    """(test files, the csv that lists them): those in test/, or the unlabeled ones in the template or a test.csv.

    Raises `UserError`.
    """
    listed: Collection[str] = ()
    sources: list[Path] = []
    if unlabeled and not list_test_images(root):
        if template:
            listed = match_ids(unlabeled, set(read_template(template).iloc[:, 0]))
        else:
            listed, sources = list_named_in_test_csv(root, unlabeled)
    if rest := sorted(set(unlabeled).difference(listed)):
        raise UserError(
            f"{root / rest[0]}: has no label in {source} ({len(rest)} images have none); add rows for "
            "them, or move them into test/ or out of the dataset"
        )
    return sorted(listed, key=natural_key) if listed else list_test_images(root), sources


def is_wrapper(root: Path) -> bool:
    """Whether the only folder in a folder may be the dataset, as in an unpacked archive."""
    return len(list_visible_folders(root)) == 1 and not has_images(root) and find_split_folder(root, "train") is None


def order_used_labels(root: Path, labels: Set[str], classes_file: Path | None, source: str) -> list[str]:
    """The labels in class order, or those of `classes_file`. Raises `UserError`."""
    class_ids = read_class_list(classes_file) if classes_file else order_labels(labels)
    unknown = [class_id for class_id in class_ids if class_id not in labels]
    if unknown or len(class_ids) < 2:
        what = f"no image has the class {unknown[0]} of the classes file" if unknown else "fewer than two classes"
        raise UserError(f"{root}: labels from {source}: {what}")
    if fault := find_fault_of_labels(class_ids):
        raise UserError(f"{root}: labels from {source}: {fault}, or list the right classes with --classes_file")
    return class_ids


def divide_files(root: Path, files: Sequence[str], split_of: Mapping[str, str]) -> dict[str, list[str]]:
    """The files of train, val and test, as their table says or else their folder."""
    folder = find_split_folder(root, "val")
    found: dict[str, list[str]] = {"train": [], "val": [], "test": []}
    for file in files:
        in_val = folder is not None and file.startswith(f"{folder}/")
        found[split_of.get(file) or ("val" if in_val else "train")].append(file)
    return found


class LabelTables:
    """Labels in a csv or txt whose rows name images."""

    kind = "labels in a csv"

    def recognizes(self, root: Path, options: DataOptions) -> bool:
        files = list_images_below(root, without=find_split_folder(root, "test"))
        tables = find_label_tables(root, files, options.template_path)
        if len(list_flat_classes(root)) > 1:  # the folders may be the classes, and the table notes on the images
            tables = [table for table in tables if label_names(table) and names_images_below(root, table, files)]
            if not divides_images(root, tables, files):
                tables = [table for table in tables if not repeats_folders(table, files)]
        return any(names_more_than_validation(root, table) for table in tables)

    def read_classes(self, root: Path, options: DataOptions) -> tuple[list[str], list[str], str]:
        labels = label_images(root, list_labeled(root, options), options)
        class_ids = order_labels(labels.label_of.values())
        return class_ids, labels.name_classes(class_ids), f"{labels.source} {NATURALLY}"

    def read(self, root: Path, options: DataOptions) -> DatasetFiles:
        files = list_labeled(root, options)
        labels = label_images(root, files, options)
        template = options.template_path or find_template(root, labels.tables)
        label_of, classes_file = labels.label_of, options.classes_path
        class_ids = order_used_labels(root, set(label_of.values()), classes_file, labels.source)
        number = {class_id: label for label, class_id in enumerate(class_ids)}
        in_split = divide_files(root, [file for file in files if label_of.get(file) in number], labels.split_of)
        train, held_out = sorted(in_split["train"]), in_split["val"]
        if untrained := sorted(set(class_ids) - {label_of[file] for file in train}, key=natural_key):
            raise UserError(
                f"{root}: labels from {labels.source}: class {untrained[0]} has no images to train on "
                f"({len(untrained)} such classes in all); add some, or list the other classes with --classes_file"
            )
        marked = {file for file, split in labels.split_of.items() if split == "test"}
        tested = sorted(marked, key=natural_key)
        unlabeled = [file for file in leave_out_masks(files) if file not in label_of and file not in marked]
        others, lists = list_unlabeled_test(root, template, unlabeled, labels.source)
        if tested and others:
            raise UserError(
                f"{root}: labels from {labels.source}: there are rows for testing, and test images without a row "
                f"({others[0]}); remove the rows, or move the images elsewhere"
            )
        names, labels_path = labels.name_classes(class_ids), None
        test_labels = [number[label_of[file]] for file in tested] if len(tested) == len(in_split["test"]) else []
        if not tested:
            test_labels, labels_path = read_test_labels(root, others, class_ids, names, labels.columns)
        return DatasetFiles(
            kind=self.kind,
            root=root,
            class_ids=class_ids,
            synonyms=names,
            class_names=names,
            label_order=classes_file.name if classes_file else f"{labels.source} {NATURALLY}",
            train_files=train,
            train_labels=[number[label_of[file]] for file in train],
            train_groups=[labels.group_of[file] for file in train] if labels.group_of else [],
            validation_files=held_out,
            validation_labels=[number[label_of[file]] for file in held_out],
            test_files=tested or others,
            test_labels=test_labels,
            test_labels_path=labels_path,
            left_out=len(set(label_of.values()) - set(class_ids)),
            sources=[*labels.tables, *lists, *filter(None, [labels_path])],
        )


class ChosenLabels(LabelTables):
    """Labels where the user says that they are: in a csv that --labels_csv or a column's name chooses."""

    def recognizes(self, root: Path, options: DataOptions) -> bool:
        if options.label_pattern or not options.names_a_table:
            return False
        named = Path(options.labels_csv or "").expanduser()
        if options.labels_csv:
            lies_here = (root / named).is_file() and (not named.is_absolute() or named.parent == root.absolute())
        else:
            lies_here = bool(list_tables(root, list_folder(root)[0]))
        return lies_here or not is_wrapper(root)


class FileNames(LabelTables):
    """Labels in file names, from which --label_pattern takes them."""

    kind = "labels in file names"

    def recognizes(self, root: Path, options: DataOptions) -> bool:
        return options.label_pattern is not None and not is_wrapper(root)


# The dataset's root

LAYOUTS: tuple[Layout, ...] = (
    FileNames(),
    ChosenLabels(),
    WnidFolders(),
    ClassFolders(),
    LabelTables(),
    FlatClassFolders(),
)


def _list_candidates(path: Path, most: float) -> list[tuple[int, Path]]:
    """(level, folder) of `path`, of the folders in it and so on; not below train, val, test or class folders.

    A level is left out, with those below it, if there are more than `most` folders down to it.
    """
    found, level = [(0, path)], [path]
    for depth in range(1, ROOT_DEPTH + 1):
        parents = [f for f in level if not (find_split_folder(f, "train") or len(list_flat_classes(f)) > 1)]
        level = [parent / name for parent in parents for name in list_visible_folders(parent)]
        if len(found) + len(level) > most:
            break
        found += [(depth, folder) for folder in level]
    return found


def find_layout(path: Path, options: DataOptions | None = None, most: float = math.inf) -> tuple[Path, Layout]:
    """(the root of the dataset, its layout): the folder `path` itself, or the one folder below it that is recognized.

    Below `path`, at most that many folders are looked at.
    Raises `UserError` if there is none, or several.
    """
    options = options or DataOptions()
    if not path.is_dir():
        raise UserError(f"{path}: no such folder or zip; --data_dir takes the dataset's folder, its zip, or `sample`")
    candidates = _list_candidates(path, most)
    for layout in LAYOUTS:
        found: dict[tuple[int, int], list[Path]] = {}
        for level, folder in candidates:
            if layout.recognizes(folder, options):
                splits = sum(find_split_folder(folder, name) is not None for name in ("train", "test"))
                found.setdefault((-splits, level), []).append(folder)
        if found:
            best = found[min(found)]
            if len(best) > 1:
                names = ", ".join(str(folder.relative_to(path)) for folder in best)
                raise UserError(f"{path}: holds several datasets ({names}); choose one of them")
            return best[0], layout
    raise UserError(_describe_unknown(path, [folder for _, folder in candidates]))


def _describe_unknown(path: Path, folders: Sequence[Path]) -> str:
    """Why a folder is not a dataset, what was seen in it, and what helps."""
    unmatched = map(describe_unmatched, folders)
    also = next((f"; {text}" for text in unmatched if text), "")
    for folder in folders:
        train = find_split_folder(folder, "train")
        if train is None and (folder / WNIDS_NAME).is_file():
            return f"{folder}: has no train folder; expected {EXPECTED}"
        if train and not list_archives(folder / train):
            classes, names = list_class_folders(folder, "train"), list_files(folder / train)
            if names and not classes and not any(map(is_image, names)):
                endings = sorted({f"*{Path(name).suffix}" for name in names})
                return (
                    f"{folder / train}: holds no images, only {show_names(endings)}; convert them to JPEG or PNG, or "
                    "load the dataset with --dataset_name"
                )
            return (
                f"{folder / train}: found {len(classes)} class folder{'s' * (len(classes) != 1)} "
                f"({', '.join(classes) or 'none'}); expected at least two, as train/<class>/*, or a csv that names "
                f"the images (--labels_csv), or --label_pattern{also}"
            )
    archives = [str(file.relative_to(path)) for folder in folders for file in list_archives(folder)]
    if archives:
        return f"{path}: holds {show_names(archives)}, which must be unpacked first; then give the folder again"
    seen = [folder.name for folder in folders if has_images(folder)]
    found = f"; found {len(seen)} folder{'s' * (len(seen) != 1)} of images ({show_names(seen)}), no train/: {WAYS_OUT}"
    also = f"{found}{also}" if seen else also
    return f"{path}: is not a dataset of a known layout; expected {EXPECTED}, {ALSO_EXPECTED}{also}"
