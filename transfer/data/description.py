"""What is said of a data set before anything is trained on it."""

from collections import Counter
from collections.abc import Sequence

from transfer import UserError
from transfer.data.layouts import TEMPLATE_NAME, ImageFolder
from transfer.data.pixels import scan_images
from transfer.submission import read_template


def folder_patterns(folder: ImageFolder) -> list[str]:
    """Where images were found, such as train/<wnid>/images/*."""
    wnids, sign = set(folder.wnids), "<wnid>" if folder.label_order == "wnids.txt" else "<class>"
    places = dict.fromkeys(file.rpartition("/")[0] for file in folder.files)
    return list(
        dict.fromkeys("/".join(sign if p in wnids else p for p in place.split("/")) + "/*" for place in places)
    )


def _describe_order(folder: ImageFolder) -> str:
    is_sorted = folder.wnids == sorted(folder.wnids)
    if folder.label_order != "wnids.txt":
        return f"labels by {folder.label_order}{'' if is_sorted else ', which is not the sorted order'}"
    return "wnids.txt is sorted" if is_sorted else "wnids.txt is not the sorted order: labels follow wnids.txt"


def _describe_template(folder: ImageFolder) -> str:
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


def _describe_counts(folder: ImageFolder) -> str:
    train, published = len(folder.train_files), len(folder.validation_files)
    if not published:
        return f"{train} to train and validate, {len(folder.test_files)} to predict"
    return (
        f"{train} to train, {published} to validate (as published, nothing is held out of train), "
        f"{len(folder.test_files)} to predict"
    )


def describe_layout(folder: ImageFolder) -> list[str]:
    """What was understood from names alone, a line each."""
    kind = f"{folder.kind}: " if folder.kind else ""
    counts = Counter(folder.train_labels)
    sizes = [counts[label] for label in range(len(folder.wnids))]
    ignored = ", ".join(f"{count} {name}" for name, count in sorted(folder.ignored.items())) or "nothing"
    named = zip(folder.wnids, folder.class_names, strict=True)
    labels = [f"{label} = {wnid}" + f" {name}" * (name != wnid) for label, (wnid, name) in enumerate(named)]
    left_out = f"; {folder.left_out} more in train are left out" * (folder.left_out > 0)
    return [
        f"data set    {folder.root}",
        f"layout      {kind}{', '.join(folder_patterns(folder))}, labels from {folder.label_order}",
        f"classes     {len(folder.wnids)}, {min(sizes)} to {max(sizes)} training images each; "
        f"{_describe_order(folder)}{left_out}",
        f"labels      {', '.join(labels[:3])} ...",
        f"images      {_describe_counts(folder)}",
        f"ignored     {ignored}",
        f"template    {_describe_template(folder)}",
    ]


def describe_duplicates(digests: dict[str, str], folder: ImageFolder) -> str:
    """How many images have identical bytes: within train, and between train and what it is measured on."""
    train = {digests[file] for file in folder.train_files}
    shared = [
        f"{sum(digests[file] in train for file in files)} {name} images also in train"
        for name, files in (("validation", folder.validation_files), ("test", folder.test_files))
        if files or name == "test"
    ]
    return f"{len(folder.train_files) - len(train)} repeated within train, {', '.join(shared)}"


def describe_images(folder: ImageFolder) -> list[str]:
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
