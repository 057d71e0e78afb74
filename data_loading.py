"""Load a dataset, from its folder or zip to a checked DatasetDict; as a command, check it and print what was found.

    python data_loading.py PATH [--classes_file FILE]   # exit code 2 if the dataset cannot be used
    python data_loading.py make-100 SRC DEST            # build tiny-imagenet-100 from Tiny ImageNet-200

`load_dataset("imagefolder")` would lose the labels: it takes the name of an image's own folder, which is always
`images` here. It would also sort the classes, but the competition numbers them by their line in wnids.txt.
`read_class_order` decides the order once, for every split and for the saved model.
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
    WNIDS_NAME,
    DatasetFiles,
    check_class_folders,
    find_root,
    find_template,
    list_class_images,
    list_folder,
    list_labelled_test_images,
    list_test_images,
    list_validation_images,
    name_labelled_test_images,
    name_layout,
    name_test_images,
)
from transfer.data.sources import extract_zip, open_hub_data
from transfer.data.splits import (
    count_copies,
    describe_imbalance,
    describe_small_classes,
    find_contents,
    split_fold,
    split_validation,
    take_evenly,
)
from transfer.data.tiny_imagenet import make_100, sample_data
from transfer.errors import UserError, exits_cleanly

# From a path to the files of a dataset


def open_test(
    root: Path, template_path: Path | None, class_ids: Sequence[str], ignored: Counter[str]
) -> tuple[list[str], list[str], list[int]]:
    """(test files, their ids, their labels if they lie in class folders), checked against the template.

    Raises `UserError`.
    """
    labelled = list_labelled_test_images(root, class_ids, ignored)
    files, labels = [file for file, _ in labelled], [label for _, label in labelled]
    if labelled and template_path is None:
        return files, name_labelled_test_images(root, files), labels
    files = files or list_test_images(root, ignored)
    if template_path is None:
        return files, name_test_images(root, files), labels
    template = read_template(template_path)
    ids = name_test_images(root, files, set(template.iloc[:, 0]))
    # The template of a later year lacked rows that its grader wanted; the competition's is complete.
    check_template(template, ids, template_path, may_be_short=not (root / WNIDS_NAME).is_file())
    return files, ids, labels


def open_folder(path: Path, classes_file: Path | None = None) -> DatasetFiles:
    """Recognise and check a dataset's folder. Only names are read: images are checked when they are decoded.

    Raises `UserError`.
    """
    root = find_root(path)
    if not (root / "train").is_dir():
        raise UserError(f"{root}: has no train folder; expected {EXPECTED}")
    template_path = find_template(root)
    class_ids, label_order = read_class_order(root, classes_file, has_template=template_path is not None)
    left_out = check_class_folders(root, class_ids, label_order, is_subset=classes_file is not None)
    if left_out:  # it is unknown which test images show the classes that are used
        template_path = None
    ignored = Counter(list_folder(root / "train")[0])
    by_class = [list_class_images(root, class_id, ignored, label_order) for class_id in class_ids]
    validation = list_validation_images(root, class_ids, left_out, ignored)
    test = ([], [], []) if left_out else open_test(root, template_path, class_ids, ignored)
    test_files, test_ids, test_labels = test
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
        test_labels=test_labels,
    )


def open_data(data_dir: str, classes_file: str | None = None) -> DatasetFiles:
    """Recognise and check the dataset of `--data_dir`: a folder, a zip as downloaded, or `sample`.

    `classes_file` lists the classes to use, one per line, in label order. Raises `UserError`.
    """
    chosen = Path(classes_file).expanduser() if classes_file else None
    if data_dir == "sample":
        return open_folder(sample_data(), chosen)
    path = Path(data_dir).expanduser()
    return open_folder(extract_zip(path) if path.is_file() else path, chosen)


def find_data(run: RunArguments) -> DatasetFiles:
    """Recognise and check the dataset of `--data_dir` or `--dataset_name`. Raises `UserError`."""
    if run.dataset_name:
        return open_hub_data(run.dataset_name, run.dataset_config_name, run.label_column_name)
    return open_data(run.data_dir or "", run.classes_file)


# From the files to a DatasetDict


def draw_splits(
    data: DatasetFiles,
    validation_fraction: float,
    split_seed: int,
    max_train_samples: int | None,
    fold: tuple[int, int] | None,
) -> dict[str, tuple[list[str], list[int]]]:
    """(files, labels) of train and validation, where validation is the published one or is held out of train."""
    files, labels = data.train_files, data.train_labels
    contents = find_contents(data.root, files)  # copies of an image must not be trained on and validated on
    held_out: list[int] = []
    if fold and data.validation_files:
        raise UserError("--kfold: this dataset has its own validation images, on which every run is measured")
    if fold:
        train, held_out = split_fold(files, labels, *fold, split_seed, contents)
    elif data.validation_files:
        train = list(range(len(files)))
    else:
        train, held_out = split_validation(files, labels, validation_fraction, split_seed, contents)
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
    labelled = datasets.Features(image=image, label=datasets.ClassLabel(names=data.class_ids), file=text)
    unlabelled = datasets.Features(image=image, image_id=text, file=text)

    def paths(files: Sequence[str]) -> list[str]:
        return [f"{data.root}/{file}" for file in files]

    splits = datasets.DatasetDict()
    for name, (files, labels) in draw_splits(data, validation_fraction, split_seed, max_train_samples, fold).items():
        rows = {"image": paths(files), "label": labels, "file": files}
        splits[name] = datasets.Dataset.from_dict(rows, labelled)
    if data.test_files:
        rows = {"image": paths(data.test_files), "image_id": data.test_ids, "file": data.test_files}
        splits["test"] = datasets.Dataset.from_dict(rows, unlabelled)
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
    return list(
        dict.fromkeys("/".join(sign if p in class_ids else p for p in folder.split("/")) + "/*" for folder in folders)
    )


def _describe_order(data: DatasetFiles) -> str:
    is_sorted = data.class_ids == sorted(data.class_ids)
    if data.label_order != WNIDS_NAME:
        return f"labels by {data.label_order}{'' if is_sorted else ', which is not the sorted order'}"
    return "wnids.txt is sorted" if is_sorted else "wnids.txt is not the sorted order: labels follow wnids.txt"


def _describe_classes(data: DatasetFiles) -> str:
    counts = Counter(data.train_labels)
    sizes = [counts[label] for label in range(len(data.class_ids))]
    size = f"{sizes[0]}" if min(sizes) == max(sizes) else f"{min(sizes)} to {max(sizes)}"
    left_out = f"; {data.left_out} more classes in train/ are left out" if data.left_out else ""
    return f"{len(data.class_ids)}, {size} training images each; {_describe_order(data)}{left_out}"


def _describe_counts(data: DatasetFiles) -> str:
    train, published, tested = len(data.train_files), len(data.validation_files), f"{len(data.test_files)} to predict"
    if data.test_labels:
        tested += " and to measure the test accuracy on, after training"
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
    if named < tested:
        return f"{data.template_path.name} lists {named} of the {tested} test images; the submission will list all"
    return f"{data.template_path.name} lists exactly the {tested} test images"


def describe_layout(data: DatasetFiles) -> list[str]:
    """What file names tell about a dataset, as lines to print."""
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
        f"labels      {', '.join(labels[:3])} ...",
        f"images      {_describe_counts(data)}",
        f"ignored     {ignored}",
        f"template    {_describe_template(data)}",
    ]


def describe_splits(dataset: datasets.DatasetDict) -> str:
    """The number of images of each split."""
    return ", ".join(f"{name} {len(split)}" for name, split in dataset.items())


def describe_quirks(run: RunArguments, data: DatasetFiles, dataset: datasets.DatasetDict) -> list[str]:
    """Lines about byte-identical copies and about uneven and too small classes; none if there are none."""
    copies = count_copies(data, run.validation_fraction, run.split_seed, is_split=not run.kfold)
    lines = [f"copies      {copies.text}"] if copies else []
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


def describe_images(data: DatasetFiles) -> list[str]:
    """What decoding every image shows, as lines to print.

    Raises `UserError` naming the unreadable images, unless they are test images alone.
    """
    records = list(scan_images(data.root, data.files, show_progress=True))
    tested = set(data.test_files)
    faults = [f"{data.root / r.file}: {r.fault}" for r in records if r.fault]
    if any(r.fault and r.file not in tested for r in records):
        more = f": {'; '.join(faults[1:10])}" if len(faults) > 1 else ""
        raise UserError(f"{faults[0]}; {len(faults)} of {len(records)} images cannot be read{more}")
    unread = f"{len(faults)} test images cannot be read" if faults else "every image decodes"
    readable = [r for r in records if not r.fault]
    modes = ", ".join(f"{n} {mode}" for mode, n in Counter(r.mode for r in readable).most_common())
    sizes = Counter(f"{r.size[0]}x{r.size[1]}" for r in readable).most_common()
    more = f", {len(sizes) - 5} more sizes" if len(sizes) > 5 else ""
    return [
        f"pixels      {unread}; modes {modes} (all become RGB); "
        f"sizes {', '.join(f'{n} of {size}' for size, n in sizes[:5])}{more}",
        f"duplicates  {describe_duplicates({r.file: r.digest for r in records}, data)} (identical bytes)",
        *(f"warning     {fault}; its row in the csv will have the commonest class" for fault in faults[:10]),
    ]


# The command


def check_data(data_dir: str, classes_file: str | None = None) -> None:
    """Print what was found in a folder or zip after decoding every image. Raises `UserError`."""
    run = RunArguments(data_dir=data_dir, classes_file=classes_file)
    data = find_data(run)
    for line in describe_layout(data) + describe_images(data):
        print(line)
    dataset = split_data(run, data)
    for line in [f"splits      {describe_splits(dataset)}", *describe_quirks(run, data, dataset)]:
        print(line)
    print("ok          this dataset can be used")


@exits_cleanly
def main(argv: Sequence[str] | None = None) -> None:
    """Check a dataset and print what was found, or build tiny-imagenet-100."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv[:1] == ["make-100"] and len(argv) == 3:
        print(f"written     {make_100(open_data(argv[1]), Path(argv[2]).expanduser())}")
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", metavar="PATH", help="the dataset's folder or zip, or `sample`")
    parser.add_argument("--classes_file", metavar="FILE", help="use only these classes, one per line in label order")
    options = parser.parse_args(argv)
    check_data(options.path, options.classes_file)


if __name__ == "__main__":
    main()
