"""What is said of a data set before anything is trained on it.

From a data set's folder, zip or Hub id to a checked DatasetDict.

    python data_loading.py PATH [--classes_file FILE]   # say what was understood; exit 2 if it cannot be used
    python data_loading.py make-100 SRC DEST            # tiny-imagenet-100 from the public Tiny ImageNet-200

The label of a class is its line number in wnids.txt, which is not sorted; where there is none, its folder's place in
natural order. `read_class_order` decides it, once, for training, validation, test and the saved model.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import datasets

from transfer.config import RunArguments
from transfer.data.images import scan_images
from transfer.data.labels import check_template, name_classes, read_class_order, read_synonyms, read_template
from transfer.data.layouts import (
    EXPECTED,
    TEMPLATE_NAME,
    DatasetFiles,
    check_class_folders,
    find_root,
    find_template,
    list_class,
    list_folder,
    list_test,
    list_validation,
    name_layout,
    name_test_images,
)
from transfer.data.sources import extract_zip, open_hub_data
from transfer.data.splits import split_fold, split_validation, take_evenly
from transfer.data.tiny_imagenet import make_100, sample_data
from transfer.errors import UserError, exits_cleanly


def folder_patterns(folder: DatasetFiles) -> list[str]:
    """Where images were found, such as train/<wnid>/images/*."""
    class_ids, sign = set(folder.class_ids), "<wnid>" if folder.label_order == "wnids.txt" else "<class>"
    places = dict.fromkeys(file.rpartition("/")[0] for file in folder.files)
    return list(
        dict.fromkeys("/".join(sign if p in class_ids else p for p in place.split("/")) + "/*" for place in places)
    )


def _describe_order(folder: DatasetFiles) -> str:
    is_sorted = folder.class_ids == sorted(folder.class_ids)
    if folder.label_order != "wnids.txt":
        return f"labels by {folder.label_order}{'' if is_sorted else ', which is not the sorted order'}"
    return "wnids.txt is sorted" if is_sorted else "wnids.txt is not the sorted order: labels follow wnids.txt"


def _describe_template(folder: DatasetFiles) -> str:
    tested = len(folder.test_files)
    if folder.left_out:
        return "test images may show any class, those left out too: there will be no submission"
    if not folder.test_files:
        return "no test images: there will be no submission"
    if folder.template_path is None:
        return f"no {TEMPLATE_NAME}: a submission will list the test images by name"
    named = len(read_template(folder.template_path))
    if named < tested:
        return f"{folder.template_path.name} names {named} of the {tested} test images; a submission names all"
    return f"{folder.template_path.name} names exactly the {tested} test images"


def _describe_counts(folder: DatasetFiles) -> str:
    train, published = len(folder.train_files), len(folder.validation_files)
    if not published:
        return f"{train} to train and validate, {len(folder.test_files)} to predict"
    return (
        f"{train} to train, {published} to validate (as published, nothing is held out of train), "
        f"{len(folder.test_files)} to predict"
    )


def describe_layout(folder: DatasetFiles) -> list[str]:
    """What was understood from names alone, a line each."""
    kind = f"{folder.kind}: " if folder.kind else ""
    counts = Counter(folder.train_labels)
    sizes = [counts[label] for label in range(len(folder.class_ids))]
    ignored = ", ".join(f"{count} {name}" for name, count in sorted(folder.ignored.items())) or "nothing"
    named = zip(folder.class_ids, folder.class_names, strict=True)
    labels = [
        f"{label} = {class_id}" + f" {name}" * (name != class_id) for label, (class_id, name) in enumerate(named)
    ]
    left_out = f"; {folder.left_out} more in train are left out" * (folder.left_out > 0)
    return [
        f"data set    {folder.root}",
        f"layout      {kind}{', '.join(folder_patterns(folder))}, labels from {folder.label_order}",
        f"classes     {len(folder.class_ids)}, {min(sizes)} to {max(sizes)} training images each; "
        f"{_describe_order(folder)}{left_out}",
        f"labels      {', '.join(labels[:3])} ...",
        f"images      {_describe_counts(folder)}",
        f"ignored     {ignored}",
        f"template    {_describe_template(folder)}",
    ]


def describe_duplicates(digests: dict[str, str], folder: DatasetFiles) -> str:
    """How many images have identical bytes: within train, and between train and what it is measured on."""
    train = {digests[file] for file in folder.train_files}
    shared = [
        f"{sum(digests[file] in train for file in files)} {name} images also in train"
        for name, files in (("validation", folder.validation_files), ("test", folder.test_files))
        if files or name == "test"
    ]
    return f"{len(folder.train_files) - len(train)} repeated within train, {', '.join(shared)}"


def describe_images(folder: DatasetFiles) -> list[str]:
    """What decoding every image shows, a line each. Raises `UserError` naming the unreadable ones."""
    files = folder.files
    records = list(scan_images(folder.root, files, show_progress=True))
    faults = [f"{folder.root / r.file}: {r.fault}" for r in records if r.fault]
    if faults:
        raise UserError(f"{faults[0]}; {len(faults)} of {len(files)} images cannot be read" + _and_others(faults))
    modes = ", ".join(f"{n} {mode}" for mode, n in Counter(r.mode for r in records).most_common())
    sizes = Counter(f"{r.size[0]}x{r.size[1]}" for r in records).most_common()
    shown = ", ".join(f"{n} of {size}" for size, n in sizes[:5]) + (
        f", {len(sizes) - 5} more sizes" * (len(sizes) > 5)
    )
    return [
        f"pixels      every image decodes; modes {modes} (all become RGB); sizes {shown}",
        f"duplicates  {describe_duplicates({r.file: r.digest for r in records}, folder)} (identical bytes)",
    ]


def _and_others(faults: Sequence[str]) -> str:
    return f": {'; '.join(faults[1:10])}" if len(faults) > 1 else ""


def open_test(root: Path, template_path: Path | None, ignored: Counter) -> tuple[list[str], list[str]]:
    """Test images and their ids, checked against the template."""
    files = list_test(root, ignored)
    if template_path is None:
        return files, name_test_images(root, files)
    template = read_template(template_path)
    ids = name_test_images(root, files, set(template.iloc[:, 0]))
    # A course handed out a template with fewer rows than its grader wanted; the competition's is complete.
    check_template(template, ids, template_path, may_be_short=not (root / "wnids.txt").is_file())
    return files, ids


def open_image_folder(path: Path, classes_file: Path | None = None) -> DatasetFiles:
    """Understand and check a data set folder (names only; pixels are checked when they are decoded)."""
    root = find_root(path)
    if not (root / "train").is_dir():
        raise UserError(f"{root}: no train folder; expected {EXPECTED}")
    template_path = find_template(root)
    class_ids, label_order = read_class_order(root, classes_file, has_template=template_path is not None)
    left_out = check_class_folders(root, class_ids, label_order, is_subset=classes_file is not None)
    if left_out:  # which test images show the chosen classes is not known
        template_path = None
    ignored = Counter(list_folder(root / "train")[0])
    by_class = [list_class(root, class_id, ignored, label_order) for class_id in class_ids]
    validation = list_validation(root, class_ids, left_out, ignored)
    test_files, test_ids = ([], []) if left_out else open_test(root, template_path, ignored)
    synonyms = read_synonyms(root, class_ids, label_order)
    return DatasetFiles(
        kind=name_layout(root, class_ids),
        root=root,
        class_ids=class_ids,
        synonyms=synonyms,
        class_names=name_classes(class_ids, synonyms),
        label_order=label_order,
        train_files=[file for files in by_class for file in files],
        train_labels=[label for label, files in enumerate(by_class) for _ in files],
        validation_files=[file for file, _ in validation],
        validation_labels=[label for _, label in validation],
        test_files=test_files,
        test_ids=test_ids,
        template_path=template_path,
        left_out=len(left_out),
        ignored=ignored,
    )


def open_data(data_dir: str, classes_file: str | None = None) -> DatasetFiles:
    """Understand `--data_dir`: a folder, the zip as downloaded, or `sample`. Raises `UserError`.

    `classes_file` lists the classes to use, a line each, in label order.
    """
    chosen = Path(classes_file).expanduser() if classes_file else None
    if data_dir == "sample":
        return open_image_folder(sample_data(), chosen)
    path = Path(data_dir).expanduser()
    return open_image_folder(extract_zip(path) if path.is_file() else path, chosen)


def draw_splits(
    folder: DatasetFiles,
    validation_fraction: float,
    split_seed: int,
    max_train_samples: int | None,
    fold: tuple[int, int] | None,
) -> dict[str, tuple[list[str], list[int]]]:
    """(files, labels) of train and validation: validation as published, or held out of train."""
    files, labels = folder.train_files, folder.train_labels
    published = folder.validation_files, folder.validation_labels
    train, held_out = range(len(files)), []
    if fold and folder.validation_files:
        raise UserError("--kfold: these data have validation images of their own, which all runs are measured on")
    if fold:
        train, held_out = split_fold(files, labels, *fold, split_seed)
    elif not folder.validation_files:
        train, held_out = split_validation(files, labels, validation_fraction, split_seed)
    if max_train_samples is not None:
        train = take_evenly(train, files, labels, max_train_samples)

    def take(positions: Sequence[int]) -> tuple[list[str], list[int]]:
        return [files[p] for p in positions], [labels[p] for p in positions]

    return {"train": take(train), "validation": published if folder.validation_files else take(held_out)}


def load_dataset(
    folder: DatasetFiles,
    validation_fraction: float = 0.1,
    split_seed: int = 0,
    max_train_samples: int | None = None,
    fold: tuple[int, int] | None = None,
) -> datasets.DatasetDict:
    """The data set as a DatasetDict; `fold`, such as (1, 5), takes a share of cross-validation instead of a fraction.

    `train` and `validation` hold image, label (ClassLabel in label order) and file; `test`, where there are test
    images, holds image, image_id and file. Images decode to RGB.
    """
    image, text = datasets.Image(mode="RGB"), datasets.Value("string")
    labelled = datasets.Features(image=image, label=datasets.ClassLabel(names=folder.class_ids), file=text)
    unlabelled = datasets.Features(image=image, image_id=text, file=text)

    def paths(files: Sequence[str]) -> list[str]:
        return [f"{folder.root}/{file}" for file in files]

    splits = {}
    for name, (files, labels) in draw_splits(folder, validation_fraction, split_seed, max_train_samples, fold).items():
        rows = {"image": paths(files), "label": labels, "file": files}
        splits[name] = datasets.Dataset.from_dict(rows, labelled)
    if folder.test_files:
        rows = {"image": paths(folder.test_files), "image_id": folder.test_ids, "file": folder.test_files}
        splits["test"] = datasets.Dataset.from_dict(rows, unlabelled)
    return datasets.DatasetDict(splits)


def find_data(run: RunArguments) -> DatasetFiles:
    """The data set that `--data_dir` or `--dataset_name` names, its layout understood. Raises `UserError`."""
    if run.dataset_name:
        return open_hub_data(run.dataset_name, run.dataset_config_name, run.label_column_name)
    return open_data(run.data_dir or "", run.classes_file)


def split_data(run: RunArguments, data: DatasetFiles) -> datasets.DatasetDict:
    """Train, validation and test images of a run, or of one fold of it."""
    fold = (run.fold, run.kfold) if run.fold and run.kfold else None
    return load_dataset(data, run.validation_fraction, run.split_seed, run.max_train_samples, fold)


def describe_splits(dataset: datasets.DatasetDict) -> str:
    """How many images each split has."""
    return ", ".join(f"{name} {len(split)}" for name, split in dataset.items())


def check_data(data_dir: str, classes_file: str | None = None) -> None:
    """Print what was understood of a folder or zip, every image decoded. Raises `UserError`."""
    folder = open_data(data_dir, classes_file)
    for line in describe_layout(folder) + describe_images(folder):
        print(line)
    print("ok          this data set can be used")


@exits_cleanly
def main(argv: Sequence[str] | None = None) -> None:
    """Check a folder or zip and say what was understood, or build tiny-imagenet-100."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv[:1] == ["make-100"] and len(argv) == 3:
        print(f"written     {make_100(open_data(argv[1]), Path(argv[2]).expanduser())}")
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", metavar="PATH", help="the data set's folder or zip, or `sample`")
    parser.add_argument("--classes_file", metavar="FILE", help="use these classes alone, a line each in label order")
    options = parser.parse_args(argv)
    check_data(options.path, options.classes_file)


if __name__ == "__main__":
    main()
