"""From the competition's folder or zip to a checked DatasetDict.

    python data_loading.py PATH      # check a folder or zip and say what was understood; exit 2 if it cannot be used

The label of a class is its line number in wnids.txt, which is not sorted: `read_class_order` decides it, once,
for training, validation, test and the saved model.
"""

import hashlib
import os
import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets

from transfer import UserError, exits_cleanly
from transfer.archive import extract_zip
from transfer.offline import sample_data
from transfer.pixels import IMAGE_SUFFIXES, scan_images
from transfer.submission import check_template, read_template

TEMPLATE_NAME = "submission_sample.csv"
EXPECTED = "wnids.txt, train/<wnid>/images/*.JPEG, test/images/*.JPEG and " + TEMPLATE_NAME


@dataclass(frozen=True)
class ImageFolder:
    """A data set folder whose layout was understood; files are relative to root, with forward slashes."""

    root: Path
    wnids: list[str]  # the label of a class is its position here
    glosses: list[str]  # all synonyms of each class, as words.txt has them
    class_names: list[str]  # first synonyms, made unique, to show to people
    train_files: list[str]
    train_labels: list[int]
    test_files: list[str]
    template_path: Path | None
    ignored: Counter  # what else lies there -> how many


def read_lines(path: Path) -> list[str]:
    """Non-empty lines of a small text file; byte-order mark and CRLF are no part of them."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as fault:
        raise UserError(f"{path}: cannot be read ({fault.strerror})") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: is not a text file") from None
    return [line.strip() for line in text.splitlines() if line.strip()]


def read_class_order(root: Path) -> list[str]:
    """The wnids in label order: the line order of wnids.txt. The only place where class order is decided."""
    path = root / "wnids.txt"
    if not path.is_file():
        raise UserError(f"{root}: no wnids.txt, which gives every class its label; expected {EXPECTED}")
    wnids = read_lines(path)
    if not wnids:
        raise UserError(f"{path}: is empty; it must list one wnid a line, in label order")
    repeated = [wnid for wnid, count in Counter(wnids).items() if count > 1]
    if repeated:
        raise UserError(f"{path}: lists {repeated[0]} more than once ({len(repeated)} repeated in all)")
    return wnids


def read_glosses(root: Path, wnids: Sequence[str]) -> list[str]:
    """Synonyms of each class from words.txt (`wnid<TAB>synonym, synonym`); the wnids where there is no such file."""
    path = root / "words.txt"
    if not path.is_file():
        return list(wnids)
    glosses = dict(line.split("\t", 1) for line in read_lines(path) if "\t" in line)
    unknown = [wnid for wnid in wnids if wnid not in glosses]
    if unknown:
        raise UserError(
            f"{root / 'wnids.txt'}: {unknown[0]} is an unknown wnid: not in words.txt ({len(unknown)} unknown in all)"
        )
    return [glosses[wnid].strip() or wnid for wnid in wnids]


def name_classes(wnids: Sequence[str], glosses: Sequence[str]) -> list[str]:
    """First synonym of each class, with the wnid where two classes share it."""
    names = [gloss.split(",")[0].strip() for gloss in glosses]
    counts = Counter(names)
    return [name if counts[name] == 1 else f"{name} ({wnid})" for name, wnid in zip(names, wnids, strict=True)]


def list_folder(folder: Path) -> tuple[list[str], list[str]]:
    """Names of the files and of the folders in a folder, each sorted."""
    try:
        with os.scandir(folder) as entries:
            kinds = [(entry.name, entry.is_dir()) for entry in entries]
    except OSError as fault:
        raise UserError(f"{folder}: cannot be listed ({fault.strerror})") from None
    return sorted(n for n, is_dir in kinds if not is_dir), sorted(n for n, is_dir in kinds if is_dir)


def list_images(root: Path, folder: str, ignored: Counter) -> list[str]:
    """Image files of a folder, relative to root and sorted; everything else is counted in `ignored`."""
    names, folders = list_folder(root / folder)
    images = []
    for name in names:
        if not name.isprintable():
            raise UserError(f"{root / folder}: the file name {name!r} has characters that are no text; rename it")
        if Path(name).suffix.lower() in IMAGE_SUFFIXES and not name.startswith("."):
            images.append(f"{folder}/{name}")
        else:
            ignored["*_boxes.txt" if name.endswith("_boxes.txt") else name] += 1
    ignored.update(f"{name}/" for name in folders if name != "images")
    return images


def list_class(root: Path, wnid: str, ignored: Counter) -> list[str]:
    """Images of one class: train/<wnid>/images/*, or train/<wnid>/* where there is no images folder."""
    folder = f"train/{wnid}"
    direct = list_images(root, folder, ignored)
    nested = list_images(root, f"{folder}/images", ignored) if (root / folder / "images").is_dir() else []
    if not direct and not nested:
        raise UserError(f"{root / folder}: has no images, yet wnids.txt lists the class")
    return nested + direct


def check_class_folders(root: Path, wnids: Sequence[str]) -> None:
    """Refuse a train folder whose classes are not exactly those of wnids.txt."""
    _, folders = list_folder(root / "train")
    folders = [name for name in folders if not name.startswith(".")]
    missing = sorted(set(wnids) - set(folders))
    extra = sorted(set(folders) - set(wnids))
    if missing:
        raise UserError(f"{root / 'train' / missing[0]}: class folder is missing ({len(missing)} missing in all)")
    if extra:
        raise UserError(
            f"{root / 'train' / extra[0]}: class folder is not in wnids.txt ({len(extra)} extra in all); "
            "without a line there it has no label"
        )


def find_root(path: Path) -> Path:
    """The data set's root: the folder itself or the one folder inside it that looks like one."""
    if not path.is_dir():
        raise UserError(f"{path}: no such folder or zip; --data_dir takes the data set's folder, its zip, or `sample`")
    _, folders = list_folder(path)
    candidates = [path, *(path / name for name in folders if not name.startswith((".", "__")))]
    for marks in (("wnids.txt", "train"), ("wnids.txt",), ("train", "test")):
        found = [folder for folder in candidates if all((folder / mark).exists() for mark in marks)]
        if len(found) > 1 and path not in found:
            raise UserError(f"{path}: holds several data sets ({', '.join(f.name for f in found)}); name one of them")
        if found:
            return path if path in found else found[0]
    raise UserError(f"{path}: is not this data set; expected {EXPECTED}")


def image_id_of(file: str) -> str:
    """The id that the template uses for a test image: its file name without the ending."""
    return Path(file).stem


def list_test(root: Path, ignored: Counter) -> list[str]:
    """Test images: test/images/*, or test/* where there is no images folder; none if there is no test folder."""
    if not (root / "test").is_dir():
        return []
    direct = list_images(root, "test", ignored)
    nested = list_images(root, "test/images", ignored) if (root / "test" / "images").is_dir() else []
    files = nested + direct
    repeated = [i for i, count in Counter(map(image_id_of, files)).items() if count > 1]
    if repeated:
        raise UserError(f"{root / 'test'}: two images share the id '{repeated[0]}'; ids are names without ending")
    return files


def find_template(root: Path, test_files: Sequence[str]) -> Path | None:
    """The submission template, checked against the test files; None where the data set has none."""
    path = root / TEMPLATE_NAME
    if not path.is_file():
        return None
    check_template(read_template(path), [image_id_of(file) for file in test_files], path)
    return path


def open_image_folder(path: Path) -> ImageFolder:
    """Understand and check a data set folder (names only; pixels are checked when they are decoded)."""
    root = find_root(path)
    wnids = read_class_order(root)
    if not (root / "train").is_dir():
        raise UserError(f"{root}: no train folder; expected {EXPECTED}")
    check_class_folders(root, wnids)
    ignored = Counter()
    ignored.update(list_folder(root / "train")[0])
    by_class = [list_class(root, wnid, ignored) for wnid in wnids]
    test_files = list_test(root, ignored)
    glosses = read_glosses(root, wnids)
    return ImageFolder(
        root=root,
        wnids=wnids,
        glosses=glosses,
        class_names=name_classes(wnids, glosses),
        train_files=[file for files in by_class for file in files],
        train_labels=[label for label, files in enumerate(by_class) for _ in files],
        test_files=test_files,
        template_path=find_template(root, test_files),
        ignored=ignored,
    )


def open_data(data_dir: str) -> ImageFolder:
    """Understand `--data_dir`: a folder, the zip as downloaded, or `sample`. Raises `UserError`."""
    if data_dir == "sample":
        return open_image_folder(sample_data())
    path = Path(data_dir).expanduser()
    if path.is_file():
        return open_image_folder(extract_zip(path))
    return open_image_folder(path)


def draw_order(files: Sequence[str], seed: int) -> list[int]:
    """Positions of the files in an order that depends on the seed and their names alone."""

    def key(position: int) -> bytes:
        return hashlib.sha256(f"{seed}/{files[position]}".encode()).digest()

    return sorted(range(len(files)), key=key)


def positions_by_class(labels: Sequence[int]) -> list[list[int]]:
    """For every label, the positions that have it, in label order."""
    positions = defaultdict(list)
    for position, label in enumerate(labels):
        positions[label].append(position)
    return [positions[label] for label in sorted(positions)]


def split_validation(
    files: Sequence[str], labels: Sequence[int], fraction: float, split_seed: int
) -> tuple[list[int], list[int]]:
    """Positions (train, validation) of a stratified split that depends on the file names and split_seed alone.

    Every class gives round(fraction x its size) images to validation, at least one, and keeps at least one.
    """
    train, validation = [], []
    for positions in positions_by_class(labels):
        drawn = [positions[i] for i in draw_order([files[p] for p in positions], split_seed)]
        if len(drawn) < 2:
            raise UserError(
                f"{files[drawn[0]]}: is its class's only image; a class needs one to train and one to check"
            )
        held_out = min(max(1, round(fraction * len(drawn))), len(drawn) - 1)
        validation += drawn[:held_out]
        train += drawn[held_out:]
    return sorted(train), sorted(validation)


def take_evenly(positions: Sequence[int], files: Sequence[str], labels: Sequence[int], count: int) -> list[int]:
    """At most `count` of the positions, as evenly over the classes as their sizes allow; depends on names alone."""
    rounds = []
    for members in positions_by_class([labels[p] for p in positions]):
        drawn = draw_order([files[positions[m]] for m in members], seed=0)
        rounds += [(turn, positions[members[i]]) for turn, i in enumerate(drawn)]
    return sorted(position for _, position in sorted(rounds)[:count])


def load_dataset(
    folder: ImageFolder,
    validation_fraction: float = 0.1,
    split_seed: int = 0,
    max_train_samples: int | None = None,
) -> datasets.DatasetDict:
    """The data set as a DatasetDict.

    `train` and `validation` hold image, label (ClassLabel in wnids.txt order) and file; `test`, where there are test
    images, holds image, image_id and file. Images decode to RGB.
    """
    files, labels = folder.train_files, folder.train_labels
    train, validation = split_validation(files, labels, validation_fraction, split_seed)
    if max_train_samples is not None:
        train = take_evenly(train, files, labels, max_train_samples)
    image = datasets.Image(mode="RGB")
    labelled = datasets.Features(
        image=image, label=datasets.ClassLabel(names=folder.wnids), file=datasets.Value("string")
    )
    unlabelled = datasets.Features(image=image, image_id=datasets.Value("string"), file=datasets.Value("string"))

    def paths(chosen: Sequence[str]) -> list[str]:
        return [f"{folder.root}/{file}" for file in chosen]

    def rows(positions: Sequence[int]) -> dict:
        chosen = [files[p] for p in positions]
        return {"image": paths(chosen), "label": [labels[p] for p in positions], "file": chosen}

    splits = {
        "train": datasets.Dataset.from_dict(rows(train), labelled),
        "validation": datasets.Dataset.from_dict(rows(validation), labelled),
    }
    if folder.test_files:
        test = {
            "image": paths(folder.test_files),
            "image_id": [image_id_of(file) for file in folder.test_files],
            "file": folder.test_files,
        }
        splits["test"] = datasets.Dataset.from_dict(test, unlabelled)
    return datasets.DatasetDict(splits)


def split_fingerprint(dataset: datasets.DatasetDict) -> str:
    """Hash of which files are in which split, whatever folder they lie in."""
    digest = hashlib.sha256()
    for name in ("train", "validation", "test"):
        if name in dataset:
            digest.update("\n".join([name, *dataset[name]["file"], ""]).encode())
    return digest.hexdigest()


def folder_patterns(folder: ImageFolder) -> list[str]:
    """Where images were found, such as train/<wnid>/images/*."""
    wnids = set(folder.wnids)
    places = dict.fromkeys(file.rpartition("/")[0] for file in folder.train_files + folder.test_files)
    return list(
        dict.fromkeys("/".join("<wnid>" if p in wnids else p for p in place.split("/")) + "/*" for place in places)
    )


def describe_layout(folder: ImageFolder) -> list[str]:
    """What was understood from names alone, a line each."""
    sizes = Counter(folder.train_labels).values()
    order = "is sorted" if folder.wnids == sorted(folder.wnids) else "is not the sorted order: labels follow wnids.txt"
    ignored = ", ".join(f"{count} {name}" for name, count in sorted(folder.ignored.items())) or "nothing"
    named = zip(folder.wnids, folder.class_names, strict=True)
    labels = ", ".join(f"{label} = {wnid} {name}" for label, (wnid, name) in enumerate(named) if label < 3)
    if not folder.test_files:
        template = "no test images: there will be no submission"
    elif folder.template_path is None:
        template = f"no {TEMPLATE_NAME}: a submission will list the test images by name"
    else:
        template = f"{folder.template_path.name} names exactly the {len(folder.test_files)} test images"
    return [
        f"data set    {folder.root}",
        f"layout      {', '.join(folder_patterns(folder))}, labels from wnids.txt",
        f"classes     {len(folder.wnids)}, {min(sizes)} to {max(sizes)} training images each; wnids.txt {order}",
        f"labels      {labels} ...",
        f"images      {len(folder.train_files)} to train and validate, {len(folder.test_files)} to predict",
        f"ignored     {ignored}",
        f"template    {template}",
    ]


def describe_duplicates(digests: dict[str, str]) -> str:
    """How many images have identical bytes, within train and between train and test."""
    groups = defaultdict(list)
    for file, digest in digests.items():
        groups[digest].append(file.startswith("test/"))
    within = sum(len(g) - sum(g) - 1 for g in groups.values() if len(g) - sum(g) > 1)
    between = sum(sum(g) for g in groups.values() if any(g) and not all(g))
    return f"{within} repeated within train, {between} test images also in train"


def describe_images(folder: ImageFolder) -> list[str]:
    """What decoding every image shows, a line each. Raises `UserError` naming the unreadable ones."""
    files = folder.train_files + folder.test_files
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
        f"duplicates  {describe_duplicates({r.file: r.digest for r in records})} (identical bytes)",
    ]


def _and_others(faults: Sequence[str]) -> str:
    return f": {'; '.join(faults[1:10])}" if len(faults) > 1 else ""


@exits_cleanly
def main(argv: Sequence[str] | None = None) -> None:
    """Check a folder or zip and say what was understood."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if len(argv) != 1 or argv[0].startswith("-"):
        print(__doc__)
        sys.exit(0 if argv in (["-h"], ["--help"]) else 2)
    folder = open_data(argv[0])
    for line in describe_layout(folder) + describe_images(folder):
        print(line)
    print("ok          this data set can be used")


if __name__ == "__main__":
    main()
