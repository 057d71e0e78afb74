"""Load a dataset, from its folder or zip to a checked DatasetDict; as a command, check it and print what was found.

    python data_loading.py PATH [--classes_file FILE]   # exit code 2 if the dataset cannot be used
    python data_loading.py make-100 SRC DEST            # build tiny-imagenet-100 from Tiny ImageNet-200

`load_dataset("imagefolder")` cannot be used: it labels an image by the name of its own folder, which is always
`images` in the competition's data. It would also sort the classes, but the competition numbers them by their line in
wnids.txt. `read_class_order` decides the order once, for every split and for the saved model.
"""

import argparse
import os
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path

import datasets
import pandas as pd
import pyarrow as pa
from accelerate import PartialState
from transformers.hf_argparser import string_to_bool

from transfer.config import SUBMISSION_LABELS, RunArguments
from transfer.data.images import scan_images
from transfer.data.label_tables import list_tables
from transfer.data.label_tables.columns import DataOptions
from transfer.data.labels import (
    check_template,
    describe_odd_classes,
    find_doubtful_value,
    find_template_above,
    match_ids,
    name_test_images,
    read_template,
)
from transfer.data.layouts import DatasetFiles, LabelTables, Layout, find_layout
from transfer.data.listing import (
    TEMPLATE_NAME,
    WNIDS_NAME,
    choose_templates,
    file_name,
    find_split_folder,
    find_template,
    list_csv_files,
    list_files,
    list_images_below,
    list_unread,
    list_unused,
    list_visible_folders,
    normal_name,
    show_names,
)
from transfer.data.sources import extract_zip, open_hub_data
from transfer.data.splits import (
    count_copies,
    describe_imbalance,
    describe_small_classes,
    describe_splits,
    find_units,
    split_fold,
    split_validation,
    take_evenly,
)
from transfer.data.tiny_imagenet import make_100, sample_data
from transfer.errors import UserError, exits_cleanly
from transfer.submission import form_of
from transfer.terminal import show

UNUSED_SHOWN = 5  # folders of unused images that are named
CONFLICTS_SHOWN = 10  # pictures with several labels that are named

# From a path to the files of a dataset


def _explain_no_test(data: DatasetFiles, template: pd.DataFrame) -> str:
    """Why there are no test images, and which folder may hold those that a template lists."""
    if folder := find_split_folder(data.root, "test"):
        return f"{folder}/ has no images; add them, or move the template out of the dataset"
    ids, used = set(template.iloc[:, 0]), set(data.files)
    for name in list_visible_folders(data.root):
        files = [file for file in list_images_below(data.root, name) if file not in used]
        if files and len(match_ids(files, ids)) == min(len(files), len(ids)):
            return f"there is no test folder; rename {name}/ to test/"
    return "there is no test folder; add the images as test/, or move the template out of the dataset"


def join_template(data: DatasetFiles, template_path: Path | None, above: Sequence[Path] = ()) -> DatasetFiles:
    """The dataset with the ids and the template of its submission.

    Without a path, the template is looked for in the root, then in the folders `above`.
    Raises `UserError` where the template and the test images do not match, or do not tell how labels are written.
    """
    files = data.test_files
    path = template_path or find_template(data.root, data.sources)
    for folder in above if files else ():
        path = path or find_template_above(folder, files, data.sources)
    if path is None:
        data = replace(data, test_ids=name_test_images(data.root, files))
    else:
        template = read_template(path)
        if not files and not data.kind.startswith("Hub dataset"):
            raise UserError(f"{path}: lists {len(template)} test images, but {_explain_no_test(data, template)}")
        ids = name_test_images(data.root, files, set(template.iloc[:, 0]))
        # Some templates omit test images that the grader expects; the competition's own template is complete.
        may_be_short = not (data.root / WNIDS_NAME).is_file()
        check_template(template, ids, path, may_be_short, [file_name(file) for file in files])
        data = replace(data, test_ids=ids, template_path=path)
    if files:
        form_of(data)
    return data


def list_ignored(data: DatasetFiles, path: Path, options: DataOptions, above: Sequence[Path]) -> DatasetFiles:
    """The dataset with everything in its root that it does not use, and every csv in the folders `above`."""
    read = [*data.sources, *filter(None, [options.classes_path, data.template_path])]
    # Path.absolute keeps "..", and Path.resolve follows links.
    root = Path(os.path.abspath(data.root))  # noqa: PTH100
    known = {Path(os.path.abspath(file)) for file in read}  # noqa: PTH100
    used = {*data.files, *(file.relative_to(root).as_posix() for file in known if file.is_relative_to(root))}
    ignored, images = list_unused(root, used)
    if data.left_out:  # not by mistake
        ignored["images of other classes"], images = images.total(), Counter()
    for folder in above:
        names = list_files(folder)
        templates = choose_templates(names)
        # If --data_dir is the dataset's folder itself, only templates in the folder above count.
        is_near = folder != root.parent or folder.is_relative_to(path.absolute())
        unread = list_unread(folder, list_csv_files(names) if is_near else templates, known)
        ignored.update(f"../{name}" + " (lists other images)" * (name in templates) for name in unread)
    top = Path(os.path.abspath(path))  # noqa: PTH100
    if root != top and root.is_relative_to(top):
        beside = list_unused(top, set(), without=root)[1]
        images.update({os.path.relpath(top / folder, root): count for folder, count in beside.items()})
    return replace(data, ignored=+ignored, unused_images=images)


def find_root(path: Path, options: DataOptions, zip_path: Path | None) -> tuple[Path, Layout]:
    """The dataset's root and layout, as `find_layout` gives them. Raises `UserError`."""
    try:
        return find_layout(path, options)
    except UserError as fault:
        tables = list_tables(zip_path.parent, list_files(zip_path.parent)) if zip_path else []
        if options.names_a_table or not tables:
            raise
        listed = show_names([table.name for table in tables])
        raise UserError(f"{fault}; if the labels are in a csv beside the zip ({listed}), add --labels_csv") from None


def open_folder(path: Path, options: DataOptions | None = None, zip_path: Path | None = None) -> DatasetFiles:
    """Recognize and check a dataset's folder. Only names are read: images are checked when they are decoded.

    The folder above that of an unpacked zip is the zip's own. Raises `UserError`.
    """
    options = options or DataOptions()
    root, layout = find_root(path, options, zip_path)
    above = [] if zip_path and root == path else [Path(os.path.abspath(root)).parent]  # noqa: PTH100
    above += [zip_path.absolute().parent] if zip_path else []
    data = replace(layout.read(root, options), submission_labels=options.submission_labels)
    if data.left_out:  # it is unknown which test images show the classes that are used
        data = replace(data, test_files=[], test_labels=[])
    else:
        data = join_template(data, options.template_path, above)
    return list_ignored(data, path, options, above)


def open_data(data_dir: str, **options: str | None) -> DatasetFiles:
    """Recognize and check the dataset of `--data_dir`: a folder, a zip as downloaded, or `sample`.

    The options are those of `DataOptions`, such as `classes_file`. Raises `UserError`.
    """
    path = sample_data() if data_dir == "sample" else Path(data_dir).expanduser()
    left_out: Counter[str] = Counter()
    is_zip = path.is_file()
    folder = extract_zip(path, ignored=left_out) if is_zip else path
    data = open_folder(folder, DataOptions(**options), path if is_zip else None)
    return replace(data, ignored=data.ignored + left_out)


def skip_unreadable(data: DatasetFiles) -> DatasetFiles:
    """The dataset without the training and validation images that cannot be read. Raises `UserError`.

    Unreadable test images stay, because the submission has a row for each of them.
    """
    is_first = PartialState().is_main_process
    records = scan_images(data.root, data.train_files + data.validation_files, show_progress=is_first)
    faults = {record.file: record.fault for record in records if record.fault}
    train, validation = (
        [row for row in zip(files, labels, strict=True) if row[0] not in faults]
        for files, labels in ((data.train_files, data.train_labels), (data.validation_files, data.validation_labels))
    )
    empty = set(range(len(data.class_ids))) - {label for _, label in train}
    if empty:
        raise UserError(f"no training image of class {data.class_ids[min(empty)]} can be read; replace its images")
    groups = [group for file, group in zip(data.train_files, data.train_groups, strict=False) if file not in faults]
    return replace(
        data,
        train_files=[file for file, _ in train],
        train_labels=[label for _, label in train],
        train_groups=groups,
        validation_files=[file for file, _ in validation],
        validation_labels=[label for _, label in validation],
        unreadable=faults,
    )


def find_data(run: RunArguments) -> DatasetFiles:
    """Recognize and check the dataset of `--data_dir` or `--dataset_name`. Raises `UserError`."""
    given = {option.name: getattr(run, option.name) for option in fields(DataOptions)}
    if run.dataset_name:
        data = open_hub_data(run.dataset_name, run.dataset_config_name, run.label_column_name)
        data = replace(data, submission_labels=run.submission_labels)
        data = join_template(data, DataOptions(**given).template_path)
    else:
        data = open_data(run.data_dir or "", **given)
    return skip_unreadable(data) if run.skip_unreadable else data


# From the files to a DatasetDict


def draw_splits(
    data: DatasetFiles,
    validation_fraction: float,
    split_seed: int,
    max_train_samples: int | None,
    fold: tuple[int, int] | None,
) -> dict[str, tuple[list[str], list[int]]]:
    """(files, labels) of train and validation; validation images are the published ones, or are held out of train."""
    files, labels = data.train_files, data.train_labels
    units = find_units(data)  # copies of an image must not be trained on and validated on
    held_out: list[int] = []
    if fold and data.validation_files:
        raise UserError("--kfold: this dataset has its own validation images, on which every run is measured")
    if fold:
        train, held_out = split_fold(files, labels, *fold, split_seed, units, has_groups=bool(data.train_groups))
    elif data.validation_files:
        train = list(range(len(files)))
    else:
        train, held_out = split_validation(files, labels, validation_fraction, split_seed, units)
    if max_train_samples is not None:
        train = take_evenly(train, files, labels, max_train_samples)

    def take(positions: Sequence[int]) -> tuple[list[str], list[int]]:
        return [files[p] for p in positions], [labels[p] for p in positions]

    published = data.validation_files, data.validation_labels
    return {"train": take(train), "validation": published if data.validation_files else take(held_out)}


def load_dataset(
    data: DatasetFiles,
    validation_fraction: float = 0.1,
    split_seed: int = 0,
    max_train_samples: int | None = None,
    fold: tuple[int, int] | None = None,
) -> datasets.DatasetDict:
    """Load the files as a DatasetDict of train, validation and, if there are test images, test.

    Rows of train and validation are {image, label, file}, with labels as a ClassLabel in label order; rows of test are
    {image, image_id, file}. Images decode to RGB. With `fold`, for example (1, 5) for the first of five folds,
    validation is that fold instead of `validation_fraction`.
    """
    image, text = datasets.Image(mode="RGB"), datasets.Value("string")
    labeled = datasets.Features(image=image, label=datasets.ClassLabel(names=data.class_ids), file=text)
    unlabeled = datasets.Features(image=image, image_id=text, file=text)

    # Arrow arrays, because lists of 50,000 rows would be encoded one by one.
    def strings(values: Sequence[str]) -> pa.Array:
        return pa.array(values, pa.string())

    def paths(files: Sequence[str]) -> pa.Array:
        return strings([f"{data.root}/{file}" for file in files])

    splits = datasets.DatasetDict()
    for name, (files, labels) in draw_splits(data, validation_fraction, split_seed, max_train_samples, fold).items():
        rows = {"image": paths(files), "label": pa.array(labels, pa.int64()), "file": strings(files)}
        splits[name] = datasets.Dataset.from_dict(rows, labeled)
    if data.test_files:
        test = data.test_files
        rows = {"image": paths(test), "image_id": strings(data.test_ids), "file": strings(test)}
        splits["test"] = datasets.Dataset.from_dict(rows, unlabeled)
    return splits


def split_data(run: RunArguments, data: DatasetFiles) -> datasets.DatasetDict:
    """Load the files as a DatasetDict, split as the arguments say: for one fold, or for the whole run."""
    fold = (run.fold, run.kfold) if run.fold and run.kfold else None
    return load_dataset(data, run.validation_fraction, run.split_seed, run.max_train_samples, fold)


# What is printed about a dataset


def folder_patterns(data: DatasetFiles) -> list[str]:
    """Where the images were found, for example train/<wnid>/images/*."""
    class_ids, sign = set(data.class_ids), "<wnid>" if data.label_order == WNIDS_NAME else "<class>"
    folders = dict.fromkeys(file.rpartition("/")[0] for file in data.files)

    def pattern(folder: str) -> str:
        parts = folder.split("/") if folder else []
        return "/".join([*(sign if normal_name(part) in class_ids else part for part in parts), "*"])

    return list(dict.fromkeys(map(pattern, folders)))


def _describe_order(data: DatasetFiles) -> str:
    is_sorted = data.class_ids == sorted(data.class_ids)
    if data.label_order != WNIDS_NAME:
        return f"labels by {data.label_order}{'' if is_sorted else ', which is not the sorted order'}"
    return "wnids.txt is sorted" if is_sorted else "labels follow wnids.txt, which is not sorted"


def _describe_classes(data: DatasetFiles) -> str:
    counts = Counter(data.train_labels)
    sizes = [counts[label] for label in range(len(data.class_ids))]
    size = f"{sizes[0]}" if min(sizes) == max(sizes) else f"{min(sizes)} to {max(sizes)}"
    left_out = f"; {data.left_out} more classes in train/ are left out" if data.left_out else ""
    return f"{len(data.class_ids)}, {size} training images each; {_describe_order(data)}{left_out}"


def _describe_counts(data: DatasetFiles) -> str:
    train, published, tested = len(data.train_files), len(data.validation_files), f"{len(data.test_files)} to predict"
    if data.test_labels:
        source = f" (labels from {data.test_labels_path.name})" if data.test_labels_path else ""
        tested += f" and to measure the test accuracy on, after training{source}"
    if not published:
        return f"{train} to train and validate, {tested}"
    return f"{train} to train, {published} to validate (as published, none are held out of train), {tested}"


def _describe_template(data: DatasetFiles) -> str:
    tested = len(data.test_files)
    if data.left_out:
        return "test images may also show the classes that are left out: there will be no submission"
    if not tested:
        return "no test images: there will be no submission"
    if data.template_path is None:
        return f"no {TEMPLATE_NAME}: the submission will list the test images by name"
    named = len(read_template(data.template_path))
    name, root = data.template_path.name, data.root.resolve()
    if data.template_path.resolve().parent != root:
        place = data.template_path.resolve().parent
        name += " in the folder above" if place == root.parent else f" in {place}"
    if named < tested:
        return f"{name} lists {named} of the {tested} test images; the submission will list all"
    return f"{name} lists exactly the {tested} test images"


def _describe_labels(data: DatasetFiles) -> str:
    if not data.test_files:
        return "not written"
    if data.submission_labels:
        origin = "as --submission_labels says"
    else:
        origin = f"as in {data.template_path.name}" if data.template_path else "since there is no template"
    return f"written as {form_of(data).what}, {origin}"


def _describe_unused(images: Counter[str]) -> list[str]:
    """Warnings about folders of images that are not used."""
    shown = images.most_common(UNUSED_SHOWN)
    lines = [
        f"warning     {count} images in {folder}/ are not used: masks, or in no folder of a class, val or test"
        for folder, count in shown
    ]
    if rest := images.total() - sum(count for _, count in shown):
        lines.append(f"warning     {rest} more images in {len(images) - len(shown)} other folders are not used")
    return lines


def _describe_unreadable(data: DatasetFiles) -> list[str]:
    """A warning with the images that are left out because they cannot be read."""
    if not data.unreadable:
        return []
    return [f"warning     {len(data.unreadable)} images cannot be read and are left out: {', '.join(data.unreadable)}"]


def _describe_encodings(data: DatasetFiles) -> list[str]:
    """Warnings about csv files whose text may be wrong, since nothing says in which encoding they are."""
    tables = data.sources if data.kind == LabelTables.kind else []
    values = {path.name: find_doubtful_value(path) for path in [*tables, *filter(None, [data.template_path])]}
    return [
        f"warning     {name} was read as Windows-1252: {value}; if that looks wrong, save the file as UTF-8"
        for name, value in values.items()
        if value
    ]


def describe_layout(data: DatasetFiles) -> list[str]:
    """What the file names show about a dataset, as lines to print."""
    kind = f"{data.kind}: " if data.kind else ""
    named = zip(data.class_ids, data.class_names, strict=True)
    labels = [
        f"{label} = {class_id}" + f" {name}" * (name != class_id) for label, (class_id, name) in enumerate(named)
    ]
    ignored = ", ".join(f"{count} {name}" for name, count in sorted(data.ignored.items())) or "nothing"
    return [
        f"dataset     {data.root}",
        f"layout      {kind}{', '.join(folder_patterns(data))}, labels from {data.label_order}",
        f"classes     {_describe_classes(data)}",
        f"labels      {', '.join(labels[:3])}{', ...' * (len(labels) > 3)}",
        f"images      {_describe_counts(data)}",
        f"ignored     {ignored}",
        *_describe_unused(data.unused_images),
        *_describe_unreadable(data),
        *_describe_encodings(data),
        f"template    {_describe_template(data)}",
        f"labels      {_describe_labels(data)}",
    ]


def describe_warnings(run: RunArguments, data: DatasetFiles, dataset: datasets.DatasetDict) -> list[str]:
    """Lines about byte-identical copies and about odd, uneven and too small classes; none if there are none."""
    copies = count_copies(data, run.validation_fraction, run.split_seed, is_split=not run.kfold)
    lines = [f"copies      {copies.text}"] if copies else []
    lines += describe_odd_classes(data.class_ids, are_cells=data.kind == LabelTables.kind)
    lines += describe_imbalance(data.class_ids, dataset["train"]["label"][:])
    return lines + describe_small_classes(data.class_ids, dataset)


def describe_duplicates(digests: dict[str, str], data: DatasetFiles) -> str:
    """How many images repeat another one byte for byte, within train and between train and the other splits."""
    train = {digests[file] for file in data.train_files}
    shared = [
        f"{sum(digests[file] in train for file in files)} {name} images also in train"
        for name, files in (("validation", data.validation_files), ("test", data.test_files))
        if files or name == "test"
    ]
    return f"{len(data.train_files) - len(train)} repeated within train, {', '.join(shared)}"


def describe_conflicts(digests: dict[str, str], data: DatasetFiles) -> list[str]:
    """A line for each picture that is in train/ with several labels, up to ten of them."""
    files_of: dict[str, list[tuple[str, int]]] = {}
    for file, label in zip(data.train_files, data.train_labels, strict=True):
        files_of.setdefault(digests[file], []).append((file, label))
    conflicts = [files for files in files_of.values() if len({label for _, label in files}) > 1]
    lines = [
        "two labels  " + " = ".join(f"{file} ({data.class_names[label]})" for file, label in files)
        for files in conflicts[:CONFLICTS_SHOWN]
    ]
    return lines + [f"two labels  {len(conflicts) - CONFLICTS_SHOWN} more"] * (len(conflicts) > CONFLICTS_SHOWN)


def describe_images(data: DatasetFiles) -> list[str]:
    """What decoding every image shows, as lines to print.

    Raises `UserError` naming the unreadable images, unless they are test images alone.
    """
    records = list(scan_images(data.root, data.files, show_progress=True))
    tested = set(data.test_files)
    faults = [f"{data.root / r.file}: {r.fault}" for r in records if r.fault]
    if any(r.fault and r.file not in tested for r in records):
        more = f": {'; '.join(faults[1:])}" if len(faults) > 1 else ""
        raise UserError(
            f"{faults[0]}; {len(faults)} of {len(records)} images cannot be read{more}; replace them, or leave them "
            "out with --skip_unreadable true"
        )
    unread = f"{len(faults)} test image{'s' * (len(faults) > 1)} cannot be read" if faults else "every image decodes"
    readable = [r for r in records if not r.fault]
    modes = ", ".join(f"{n} {mode}" for mode, n in Counter(r.mode for r in readable).most_common())
    converted = " (all are converted to RGB)" if any(r.mode != "RGB" for r in readable) else ""
    sizes = Counter(f"{r.size[0]}x{r.size[1]}" for r in readable).most_common()
    more = f", {len(sizes) - 5} more sizes" if len(sizes) > 5 else ""
    digests = {r.file: r.digest for r in records}
    return [
        f"pixels      {unread}; modes {modes}{converted}; "
        f"sizes {', '.join(f'{n} of {size}' for size, n in sizes[:5])}{more}",
        f"duplicates  {describe_duplicates(digests, data)} (identical bytes)",
        *describe_conflicts(digests, data),
        *(f"warning     {fault}; its row in the csv will have the most frequent class" for fault in faults[:10]),
    ]


# The command


def check_data(run: RunArguments) -> None:
    """Print what was found in a dataset after decoding every image, and how a run splits it. Raises `UserError`."""
    data = find_data(run)
    show(*describe_layout(data), *describe_images(data))
    dataset = split_data(run, data)
    show(f"splits      {describe_splits(dataset)}", *describe_warnings(run, data, dataset))
    show("ok          this dataset can be used")


@exits_cleanly
def main(argv: Sequence[str] | None = None) -> None:
    """Check a dataset and print what was found, or build tiny-imagenet-100."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv[:1] == ["make-100"] and len(argv) == 3:
        print(f"written     {make_100(open_data(argv[1]), Path(argv[2]).expanduser())}")
        return
    parser = argparse.ArgumentParser(
        description="\n\n".join((__doc__ or "").split("\n\n")[:2]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("path", metavar="PATH", help="the dataset's folder or zip, or `sample`")
    parser.add_argument("--classes_file", metavar="FILE", help="use only these classes, one per line in label order")
    parser.add_argument("--template", metavar="FILE", help="the submission's template")
    parser.add_argument("--submission_labels", choices=SUBMISSION_LABELS, help="how the submission writes labels")
    parser.add_argument(
        "--skip_unreadable", type=string_to_bool, nargs="?", const=True, default=False, help="leave out bad images"
    )
    names = [option.name for option in fields(DataOptions)] + ["skip_unreadable"]
    for name in names[3:-1]:
        parser.add_argument(f"--{name}", help="as in finetune_vit.py")
    given = parser.parse_args(argv)
    check_data(RunArguments(data_dir=given.path, **{name: getattr(given, name) for name in names}))


if __name__ == "__main__":
    main()
