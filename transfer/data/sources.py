"""Sources of a dataset besides a folder: a zip as downloaded, or a Hub dataset, made into a folder of image files.

Both folders lie in the datasets cache, which HF_DATASETS_CACHE moves. They are built once per content, atomically.
"""

import hashlib
import io
import lzma
import os
import shutil
import stat
import zipfile
import zlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import datasets
from PIL import Image

from transfer.data.images.store import listing_key
from transfer.data.labels import order_labels
from transfer.data.layouts import DatasetFiles
from transfer.data.listing import NATURALLY, image_id_of, is_image, list_images, name_junk, natural_key, normal_name
from transfer.errors import UserError
from transfer.files import build_folder_once, check_free_space, datasets_cache, recall, remember
from transfer.terminal import track

# A zip

MAX_TOTAL_BYTES = 20 * 2**30  # the competition's zip unpacks to 0.1 GB; this is far more and still fits on a disk
MAX_RATIO = 200  # photographs hardly shrink, and deflate cannot shrink anything more than 1032-fold
RATIO_CHECKED_FROM = 10 * 2**20  # bytes; a smaller member may be a table of zeros
DISK_BLOCK = 4096  # bytes; a file takes whole blocks
CSV_SUFFIXES = (".csv", ".tsv")
ZIP_FORMAT = 2  # of zips that hold a packed csv; increase it when they are unpacked in another way

# What zipfile raises for damaged bytes, besides OSError. A damaged version number reads as an unknown format.
DAMAGE = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, NotImplementedError, UnicodeDecodeError)


def _other_archive(path: Path) -> str | None:
    """What a file is by its first bytes, if it is packed in another way than as a zip."""
    with path.open("rb") as file:
        start = file.read(265)
    kinds = {b"\x1f\x8b": "gzip file", b"BZh": "bzip2 file", b"\xfd7zXZ": "xz file", b"7z\xbc\xaf": "7z archive"}
    found = next((kind for magic, kind in kinds.items() if start.startswith(magic)), None)
    if (found and path.suffixes[-2:-1] == [".tar"]) or path.suffix in (".tgz", ".tbz2", ".txz"):
        return "tar archive"
    return "tar archive" if start[257:262] == b"ustar" else "rar archive" if start.startswith(b"Rar!") else found


def _list_members(path: Path, ignored: Counter[str] | None = None) -> list[zipfile.ZipInfo]:
    """The members to extract; what macOS adds is left out and counted in `ignored`.

    Raises `UserError` if the file is not a complete zip.
    """
    try:
        if kind := _other_archive(path):
            raise UserError(f"{path}: is a {kind}, not a zip; unpack it, and give its folder as --data_dir")
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except DAMAGE as fault:
        raise UserError(f"{path}: is not a zip file or is truncated ({fault}); download it again") from None
    except OSError as fault:
        raise UserError(f"{path}: cannot be read ({fault.strerror})") from None
    kept = [m for m in members if not m.filename.startswith("__MACOSX/")]
    if ignored is not None and (left_out := len(members) - len(kept)):
        ignored[name_junk("__MACOSX")] += left_out
    return kept


def _fault_of(member: zipfile.ZipInfo) -> str | None:
    """Why a member must not be extracted, or None."""
    # ZipFile.extract drops absolute paths and "..", so the file would land somewhere else: refuse it instead.
    name = member.orig_filename  # as stored; `filename` has the system's separators replaced and ends at a NUL
    if not name:
        return "has no name"
    if name.startswith("/") or ":" in name or "\\" in name or "\0" in name:
        return "has an absolute or non-portable path"
    if ".." in name.split("/"):
        return "would be written outside the folder"
    if stat.S_ISLNK(member.external_attr >> 16):
        return "is a symbolic link"
    if member.flag_bits & 0x1:
        return "is encrypted"
    if member.file_size > RATIO_CHECKED_FROM and member.file_size > MAX_RATIO * max(member.compress_size, 1):
        return f"would grow more than {MAX_RATIO}-fold"
    return None


def _check_members(path: Path, members: Sequence[zipfile.ZipInfo]) -> None:
    """Refuse a zip that is unsafe or ambiguous to extract. Raises `UserError`."""
    if not members:
        raise UserError(f"{path}: is an empty zip")
    for member in members:
        if fault := _fault_of(member):
            raise UserError(f"{path}: member '{member.filename}' {fault}; nothing was extracted")
    name, count = Counter(m.filename for m in members).most_common(1)[0]
    if count > 1:
        raise UserError(f"{path}: member '{name}' appears {count} times; nothing was extracted")
    total = sum(m.file_size for m in members)
    if total > MAX_TOTAL_BYTES:
        raise UserError(
            f"{path}: would unpack to {total / 2**30:.0f} GiB, more than the limit of {MAX_TOTAL_BYTES / 2**30:.0f}; "
            "nothing was extracted"
        )


def _content_key(members: Sequence[zipfile.ZipInfo]) -> str:
    """Hash of the names, sizes and checksums in the zip's directory; a copy of the zip has the same one."""
    digest = hashlib.blake2b(digest_size=8)
    if any(m.filename.lower().endswith(tuple(f"{suffix}.zip" for suffix in CSV_SUFFIXES)) for m in members):
        digest.update(f"{ZIP_FORMAT}\n".encode())
    for m in members:
        digest.update(f"{m.filename}\0{m.file_size}\0{m.CRC}\n".encode())
    return digest.hexdigest()


def _extract(path: Path, members: Sequence[zipfile.ZipInfo], folder: Path) -> None:
    """Extract members into an empty folder. Raises `UserError` naming the member that cannot be extracted."""
    with zipfile.ZipFile(path) as archive:
        for member in track(members, len(members), "unpacking", "files"):
            try:
                archive.extract(member, folder)
            except DAMAGE as fault:
                raise UserError(
                    f"{path}: member '{member.filename}' is damaged ({fault}); download it again"
                ) from None
            except OSError as fault:
                raise UserError(
                    f"{path}: member '{member.filename}' cannot be unpacked to {folder.parent} "
                    f"({fault.strerror or fault})"
                ) from None
    # Two names can mean one file: a//b and a/b, or A and a on a file system that ignores case.
    written = sum(len(files) for _, _, files in os.walk(folder))
    if written != sum(not m.is_dir() for m in members):
        raise UserError(f"{path}: cannot be unpacked, since several members have the same name on this file system")


def _extract_nested(folder: Path) -> None:
    """Unpack the zips that lie in an unpacked zip, each into a folder of its name; they are removed.

    Competitions often hand out one zip that holds train.zip and test.zip. A lone csv, as in sample_submission.csv.zip,
    gets no folder. Raises `UserError`.
    """
    found = [p for p in folder.rglob("*") if p.suffix.lower() == ".zip" and p.is_file() and not p.name.startswith(".")]
    for path in sorted(found):
        inside = path.with_suffix("")
        if inside.exists():  # it lies there unpacked, too
            continue
        members = _list_members(path)
        _check_members(path, members)
        inside.mkdir()
        check_free_space(folder.parent, sum(m.file_size for m in members), f"{path}: unpacking it")
        _extract(path, members, inside)
        if len(members) == 1 and all(n.lower().endswith(CSV_SUFFIXES) for n in (inside.name, members[0].filename)):
            (inside / members[0].filename).replace(path)
            shutil.rmtree(inside)
            path.rename(inside)
        else:
            path.unlink()


def extract_zip(zip_path: Path, cache_dir: Path | None = None, ignored: Counter[str] | None = None) -> Path:
    """Extract a zip into the datasets cache, once per content, and return the folder; `ignored` counts what is not.

    The folder's name holds a hash of the content: a copy of the zip finds it, a changed zip gets another folder. Zips
    in the zip are unpacked too. The cache remembers the folder of each zip by the zip's name, size and time of change,
    because reading the list of a large zip's members takes a while.

    Raises `UserError`, with nothing written, for a zip that is damaged, encrypted or too large, and for members
    outside the folder, symbolic links and duplicate names.
    """
    cache_dir = cache_dir or datasets_cache("unpacked")
    ignored = Counter() if ignored is None else ignored
    memory = cache_dir / f".{ZIP_FORMAT}-{listing_key(zip_path.parent, [zip_path.name])}.json"
    known = recall(memory)
    if isinstance(known, dict) and known and (folder := cache_dir / known["folder"]).is_dir():
        ignored.update(known["ignored"])
        return folder
    left_out: Counter[str] = Counter()
    members = _list_members(zip_path, left_out)
    _check_members(zip_path, members)
    ignored.update(left_out)

    def build(folder: Path) -> None:
        needed = sum(-(-m.file_size // DISK_BLOCK) * DISK_BLOCK for m in members)
        check_free_space(folder.parent, needed, f"{zip_path}: unpacking it", "HF_DATASETS_CACHE chooses another place")
        _extract(zip_path, members, folder)
        _extract_nested(folder)

    folder = build_folder_once(cache_dir / f"{zip_path.stem}-{_content_key(members)}", build, "HF_DATASETS_CACHE")
    remember(memory, {"folder": folder.name, "ignored": left_out})
    return folder


# A Hub dataset

# The names that Hub datasets give to their splits, the usual one first.
SPLIT_NAMES = {"train": ("train",), "validation": ("validation", "valid", "val", "dev"), "test": ("test",)}

HUB_FORMAT = 2  # of the copied images; increase it when their names change
ENDINGS = {"MPO": "jpeg", "JPEG2000": "jp2"}  # of formats whose own name is not the ending of an image

LOADING_FAULTS = (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError)


def load_splits(name: str, config_name: str | None) -> datasets.DatasetDict:
    """All splits of a Hub dataset, of a folder that `load_dataset` understands, or of one made by `save_to_disk`.

    Every split is memory-mapped from Arrow files, never held in memory. Raises `UserError`.
    """
    path = Path(name).expanduser()
    try:
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            splits = datasets.load_from_disk(path, keep_in_memory=False)
        else:
            splits = datasets.load_dataset(str(path) if path.is_dir() else name, config_name, keep_in_memory=False)
    except LOADING_FAULTS as fault:
        raise UserError(f"--dataset_name {name}: cannot be loaded: {' '.join(str(fault).split())}") from None
    return splits if isinstance(splits, datasets.DatasetDict) else datasets.DatasetDict(train=splits)


def choose_splits(name: str, splits: datasets.DatasetDict) -> dict[str, datasets.Dataset]:
    """The split train, and validation and test if they exist, under these names. Raises `UserError`."""
    chosen = {}
    for split, names in SPLIT_NAMES.items():
        found = [n for n in names if n in splits]
        if found:
            chosen[split] = splits[found[0]]
    if "train" not in chosen:
        raise UserError(f"--dataset_name {name}: has no split train, only {', '.join(splits)}")
    return chosen


def _columns_of(features: datasets.Features, kind: type) -> list[str]:
    return [column for column, feature in features.items() if isinstance(feature, kind)]


def _is_plain_label(feature: object) -> bool:
    """Whether a column has strings or integers, which can become a ClassLabel."""
    return isinstance(feature, datasets.Value) and feature.dtype.startswith(("string", "large_string", "int", "uint"))


def find_image_column(name: str, features: datasets.Features) -> str:
    """The only column of type Image. Raises `UserError`."""
    found = _columns_of(features, datasets.Image)
    if len(found) != 1:
        raise UserError(
            f"--dataset_name {name}: has {len(found)} image columns among {', '.join(features)}; expected one"
        )
    return found[0]


def find_label_column(name: str, features: datasets.Features, wanted: str | None) -> str:
    """The column of type ClassLabel, else of strings or integers; `wanted` chooses if there are several.

    Raises `UserError`.
    """
    plain = [column for column, feature in features.items() if _is_plain_label(feature)]
    found = _columns_of(features, datasets.ClassLabel) or plain
    found = [*found, wanted] if wanted in plain and wanted not in found else found
    if not found:
        raise UserError(
            f"--dataset_name {name}: no column of {', '.join(features)} is a ClassLabel or has strings or integers; "
            "make one with Dataset.class_encode_column"
        )
    if wanted is None and len(found) > 1:
        raise UserError(
            f"--dataset_name {name}: has several label columns, {' and '.join(found)}; "
            "choose one with --label_column_name"
        )
    if wanted is not None and wanted not in found:
        raise UserError(f"--label_column_name {wanted}: is not among the label columns of {name}: {', '.join(found)}")
    return wanted or found[0]


def encode_labels(name: str, splits: dict[str, datasets.Dataset], label: str) -> dict[str, datasets.Dataset]:
    """The splits with `label` as a ClassLabel, whose names are the values of train in class order.

    Raises `UserError` for a row without a label and for a label of validation that train does not have.
    """
    if isinstance(splits["train"].features[label], datasets.ClassLabel):
        return splits
    class_ids: list[str] = []
    encoded = dict(splits)
    for split, rows in splits.items():
        if split == "test":  # its labels are not read
            continue
        if label not in rows.features:
            raise UserError(f"--dataset_name {name}: column {label} of split {split} is not the same as in train")
        values = ["" if value is None else normal_name(str(value).strip()) for value in rows[label][:]]
        if "" in values:
            raise UserError(
                f"--dataset_name {name}: row {values.index('')} of {split} has no label; remove the row or the split"
            )
        class_ids = class_ids or order_labels(values)
        number = {class_id: position for position, class_id in enumerate(class_ids)}
        unknown = sorted(set(values) - set(number), key=natural_key)
        if unknown:
            raise UserError(f"--dataset_name {name}: {split} has the label {unknown[0]}, which train does not have")
        numbers = datasets.Dataset.from_dict(
            {label: [number[value] for value in values]},
            datasets.Features({label: datasets.ClassLabel(names=class_ids)}),
        )
        encoded[split] = datasets.concatenate_datasets([rows.remove_columns(label), numbers], axis=1)
    return encoded


def _check_columns(name: str, splits: dict[str, datasets.Dataset], image: str, label: str) -> None:
    """Refuse splits whose image or label column differs from that of train. Raises `UserError`."""
    for split, rows in splits.items():
        for column in [image] if split == "test" else [image, label]:
            if rows.features.get(column) != splits["train"].features[column]:
                raise UserError(f"--dataset_name {name}: column {column} of split {split} is not the same as in train")


def _read_labels(name: str, split: str, rows: datasets.Dataset, column: str) -> list[int]:
    labels = rows[column][:]
    for row, label in enumerate(labels):
        if label is None or label < 0:
            raise UserError(f"--dataset_name {name}: row {row} of {split} has no label; remove the row or the split")
    return labels


def _write_image(folder: Path, row: int, content: dict | None, where: str) -> None:
    """Write the bytes of one image, unchanged, to a file named after its row and its format."""
    if content is None:
        raise UserError(f"{where}: row {row} has no image")
    try:
        data = content["bytes"] if content["bytes"] is not None else Path(content["path"]).read_bytes()
        image_format = Image.open(io.BytesIO(data)).format
    except (OSError, ValueError, Image.DecompressionBombError) as fault:
        raise UserError(f"{where}: row {row} cannot be read as an image ({fault})") from None
    assert image_format is not None  # only an image that was not opened from a file has none
    name = f"{row}.{ENDINGS.get(image_format, image_format.lower())}"
    if not is_image(name):
        raise UserError(f"{where}: row {row} is a file of the format {image_format}; convert it to JPEG or PNG")
    (folder / name).write_bytes(data)


def _write_splits(folder: Path, name: str, splits: dict[str, datasets.Dataset], column: str) -> None:
    for split, rows in splits.items():
        (folder / split).mkdir()
        images = rows.select_columns(column).cast_column(column, datasets.Image(decode=False))
        for row, example in enumerate(track(images, len(images), f"copying {split}"[:11])):
            _write_image(folder / split, row, example[column], f"--dataset_name {name}, split {split}")


def _splits_key(splits: dict[str, datasets.Dataset], column: str) -> str:
    """Hash of the image column's name and of the name, size and modification time of every split's Arrow files.

    `datasets` names the files of a changed dataset differently, and `save_to_disk` writes its files anew.
    """
    lines = [f"{HUB_FORMAT} {column}"]
    for split, rows in splits.items():
        assert rows.cache_files or not len(rows)  # else two datasets could share a key: see load_splits
        lines.append(f"{split} {len(rows)}")
        for file in rows.cache_files:
            status = Path(file["filename"]).stat()
            lines.append(f"{file['filename']} {status.st_size} {status.st_mtime_ns}")
    return hashlib.blake2b("\n".join(lines).encode(), digest_size=8).hexdigest()


def copy_images(name: str, splits: dict[str, datasets.Dataset], column: str) -> Path:
    """Copy the images of every split to `<split>/<row>.<format>` in the datasets cache, once; return the folder."""
    cache_dir = datasets_cache("hub")
    return build_folder_once(
        cache_dir / f"{Path(name).name}-{_splits_key(splits, column)}",
        lambda folder: _write_splits(folder, name, splits, column),
        "HF_DATASETS_CACHE",
    )


def open_hub_data(name: str, config_name: str | None = None, label_column: str | None = None) -> DatasetFiles:
    """Understand the dataset of `--dataset_name`; its images are copied to files, byte for byte.

    The columns are found by their feature types, Image and ClassLabel, and the labels are those of the ClassLabel. A
    column of strings or integers becomes a ClassLabel in class order.
    Test images are named by their row number; test labels are not read. Raises `UserError`.
    """
    splits = choose_splits(name, load_splits(name, config_name))
    columns = splits["train"].features
    image, label = find_image_column(name, columns), find_label_column(name, columns, label_column)
    copied, splits = splits, encode_labels(name, splits, label)
    _check_columns(name, splits, image, label)
    labels = {split: _read_labels(name, split, rows, label) for split, rows in splits.items() if split != "test"}
    root = copy_images(name, copied, image)
    files = {split: sorted(list_images(root, split), key=natural_key) for split in splits}
    is_class_label = isinstance(columns[label], datasets.ClassLabel)
    class_ids, test_files = splits["train"].features[label].names, files.get("test", [])
    return DatasetFiles(
        kind=f"Hub dataset {name}, column {image}",
        root=root,
        class_ids=class_ids,
        synonyms=list(class_ids),
        class_names=list(class_ids),
        label_order=f"column {label}" if is_class_label else f"column {label} {NATURALLY}",
        train_files=files["train"],
        train_labels=labels["train"],
        validation_files=files.get("validation", []),
        validation_labels=labels.get("validation", []),
        test_files=test_files,
        test_ids=[image_id_of(file) for file in test_files],
    )
