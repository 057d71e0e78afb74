"""Safe extraction of the data set's zip as downloaded.

A data set of the Hugging Face Hub, its images copied into files as they are.
"""

import hashlib
import io
import lzma
import shutil
import stat
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import datasets
from filelock import FileLock
from PIL import Image
from tqdm.auto import tqdm

from transfer.data.labels import name_classes
from transfer.data.layouts import DatasetFiles, image_id_of, list_images, natural_key
from transfer.errors import UserError

# The competition's zip holds 0.1 GB; ImageNet itself would be 150 GB, which nobody trains on from a zip.
MAX_TOTAL_BYTES = 20 * 2**30
# Photographs hardly shrink; deflate's limit is 1032. Small members may be tables of zeros.
MAX_RATIO, RATIO_CHECKED_FROM = 200, 10 * 2**20

READ_BYTES = 2**20

# What reading changed bytes raises, besides OSError: a changed version number is taken for an unknown format.
DAMAGE = (
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    EOFError,
    NotImplementedError,
    UnicodeDecodeError,
)


def _list_members(path: Path) -> list[zipfile.ZipInfo]:
    """Members to extract. Raises `UserError` if the file is no whole zip."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except DAMAGE as fault:
        raise UserError(f"{path}: is no zip or was cut short ({fault}); download it again") from None
    except OSError as fault:
        raise UserError(f"{path}: cannot be read ({fault.strerror})") from None
    return [m for m in members if not m.filename.startswith("__MACOSX/")]


def _fault_of(member: zipfile.ZipInfo) -> str | None:
    """Why a member must not be extracted, or None."""
    # ZipInfo turns the system's separators into "/" and cuts at a NUL; the name as stored is the one to judge.
    name = member.orig_filename
    if not name:
        return "has no name"
    if name.startswith("/") or ":" in name or "\\" in name or "\0" in name:
        return "has an absolute or foreign path"
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
    """Refuse a zip that could write elsewhere, fill the disk or mean two things. Raises `UserError`."""
    if not members:
        raise UserError(f"{path}: is an empty zip")
    for member in members:
        if fault := _fault_of(member):
            raise UserError(f"{path}: member '{member.filename}' {fault}; nothing was extracted")
    name, count = Counter(m.filename for m in members).most_common(1)[0]
    if count > 1:
        raise UserError(f"{path}: member '{name}' is there {count} times; nothing was extracted")
    total = sum(m.file_size for m in members)
    if total > MAX_TOTAL_BYTES:
        raise UserError(f"{path}: would unpack to {total / 2**30:.0f} GiB; nothing was extracted")


def _check_space(path: Path, members: Sequence[zipfile.ZipInfo], target: Path) -> None:
    # A file takes whole blocks of 4 KiB.
    needed = sum(-(-m.file_size // 4096) * 4096 for m in members)
    free = shutil.disk_usage(target).free
    if needed > free:
        raise UserError(f"{path}: needs {needed / 2**20:.0f} MiB in {target}, where {free / 2**20:.0f} MiB are free")


def _content_key(members: Sequence[zipfile.ZipInfo]) -> str:
    """Hash of the names, sizes and checksums that the zip's directory lists: the same for a copy elsewhere."""
    digest = hashlib.blake2b(digest_size=8)
    for m in members:
        digest.update(f"{m.filename}\0{m.file_size}\0{m.CRC}\n".encode())
    return digest.hexdigest()


def _write_members(path: Path, members: Sequence[zipfile.ZipInfo], target: Path) -> None:
    files = [m for m in members if not m.is_dir()]
    for folder in {target / m.filename if m.is_dir() else (target / m.filename).parent for m in members}:
        folder.mkdir(parents=True, exist_ok=True)
    # What ZipFile.extract does for each member besides (cleaning the name, making folders) was done for all above.
    with zipfile.ZipFile(path) as archive:
        for member in tqdm(files, desc="unpacking", unit=" files", leave=False, disable=None):
            try:
                with archive.open(member) as packed, open(f"{target}/{member.filename}", "xb") as file:  # noqa: PTH123
                    shutil.copyfileobj(packed, file, READ_BYTES)
            except DAMAGE as fault:
                raise UserError(
                    f"{path}: member '{member.filename}' is damaged ({fault}); download it again"
                ) from None


def _extract(path: Path, members: Sequence[zipfile.ZipInfo], target: Path) -> None:
    """Extract beside the target and move it there whole."""
    unfinished = target.with_name(f"{target.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)  # of a process that was killed: the lock is ours
    _check_space(path, members, target.parent)
    try:
        _write_members(path, members, unfinished)
        unfinished.rename(target)
    except OSError as fault:
        raise UserError(f"{path}: cannot be unpacked to {target} ({fault.strerror or fault})") from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def extract_zip(zip_path: Path, cache_dir: Path | None = None) -> Path:
    """Unpack a zip into the datasets cache, once; returns the folder with its content.

    The folder is named after what the zip holds, so that a copy elsewhere finds it and a changed zip does not, and it
    exists only whole. Raises `UserError`, with nothing written, for a zip that is damaged, encrypted, far too large,
    or has members outside the folder, symbolic links or two members of one name.
    """
    members = _list_members(zip_path)
    _check_members(zip_path, members)
    cache_dir = cache_dir or Path(datasets.config.HF_DATASETS_CACHE) / "finetune-vit" / "unpacked"
    target = cache_dir / f"{zip_path.stem}-{_content_key(members)}"
    if target.is_dir():
        return target
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
    except OSError as fault:
        raise UserError(f"{cache_dir}: cannot be made ({fault.strerror}); HF_DATASETS_CACHE names another") from None
    with FileLock(f"{target}.lock"):
        if not target.is_dir():
            _extract(zip_path, members, target)
    return target


# What the Hub's data sets call their splits, the usual name first.
SPLIT_NAMES = {"train": ("train",), "validation": ("validation", "valid", "val", "dev"), "test": ("test",)}

LOADING_FAULTS = (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError)


def load_splits(name: str, config_name: str | None) -> datasets.DatasetDict:
    """Every split of a Hub data set, of a folder that `load_dataset` understands, or of one made by `save_to_disk`."""
    path = Path(name).expanduser()
    try:
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            splits = datasets.load_from_disk(path)
        else:
            splits = datasets.load_dataset(str(path) if path.is_dir() else name, config_name)
    except LOADING_FAULTS as fault:
        raise UserError(f"--dataset_name {name}: cannot be loaded: {' '.join(str(fault).split())}") from None
    return splits if isinstance(splits, dict) else datasets.DatasetDict(train=splits)


def choose_splits(name: str, splits: datasets.DatasetDict) -> dict[str, datasets.Dataset]:
    """train, and validation and test where there are such, whatever they are called."""
    chosen = {}
    for split, names in SPLIT_NAMES.items():
        found = [n for n in names if n in splits]
        if found:
            chosen[split] = splits[found[0]]
    if "train" not in chosen:
        raise UserError(f"--dataset_name {name}: has no split train, but {', '.join(splits)}")
    return chosen


def _columns_of(features: datasets.Features, kind: type) -> list[str]:
    return [column for column, feature in features.items() if isinstance(feature, kind)]


def find_image_column(name: str, features: datasets.Features) -> str:
    """The column of type Image."""
    found = _columns_of(features, datasets.Image)
    if len(found) != 1:
        raise UserError(f"--dataset_name {name}: has {len(found)} image columns among {', '.join(features)}, not one")
    return found[0]


def find_label_column(name: str, features: datasets.Features, wanted: str | None) -> str:
    """The column of type ClassLabel, or the wanted one of several."""
    found = _columns_of(features, datasets.ClassLabel)
    if not found:
        raise UserError(
            f"--dataset_name {name}: no column of {', '.join(features)} is a ClassLabel; "
            "Dataset.class_encode_column makes one"
        )
    if wanted is None and len(found) > 1:
        raise UserError(f"--dataset_name {name}: {' and '.join(found)} are labels; --label_column_name chooses one")
    if wanted is not None and wanted not in found:
        raise UserError(f"--label_column_name {wanted}: is not among the label columns of {name}: {', '.join(found)}")
    return wanted or found[0]


def _check_columns(name: str, splits: dict[str, datasets.Dataset], image: str, label: str) -> None:
    """Refuse splits that do not have the same images and labels as train."""
    for split, rows in splits.items():
        for column in [image] if split == "test" else [image, label]:
            if rows.features.get(column) != splits["train"].features[column]:
                raise UserError(f"--dataset_name {name}: column {column} of split {split} is not that of train")


def _read_labels(name: str, split: str, rows: datasets.Dataset, column: str) -> list[int]:
    labels = rows[column][:]
    for row, label in enumerate(labels):
        if label is None or label < 0:
            raise UserError(f"--dataset_name {name}: row {row} of {split} has no label; remove it or the whole split")
    return labels


def _write_image(folder: Path, row: int, content: dict, where: str) -> None:
    """One image's bytes as they are, in a file named after its row and its format."""
    if content is None:
        raise UserError(f"{where}: row {row} has no image")
    try:
        data = content["bytes"] if content["bytes"] is not None else Path(content["path"]).read_bytes()
        ending = Image.open(io.BytesIO(data)).format.lower()
    except (OSError, ValueError, Image.DecompressionBombError) as fault:
        raise UserError(f"{where}: row {row} cannot be read as an image ({fault})") from None
    (folder / f"{row}.{ending}").write_bytes(data)


def _write_splits(folder: Path, name: str, splits: dict[str, datasets.Dataset], column: str) -> None:
    for split, rows in splits.items():
        (folder / split).mkdir()
        images = rows.select_columns(column).cast_column(column, datasets.Image(decode=False))
        for row, example in enumerate(tqdm(images, desc=f"copying {split}", leave=False, disable=None)):
            _write_image(folder / split, row, example[column], f"--dataset_name {name}, split {split}")


def _build(folder: Path, write: Callable[[Path], None]) -> None:
    """Write beside the folder's place and move it there whole."""
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)  # of a process that was killed: the lock is ours
    try:
        unfinished.mkdir()
        write(unfinished)
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def copy_images(name: str, splits: dict[str, datasets.Dataset], column: str, cache_dir: Path | None = None) -> Path:
    """Folder with the images of every split, `<split>/<row>.<format>`, in the datasets cache; written once."""
    fingerprints = "".join(f"{split} {rows._fingerprint}\n" for split, rows in splits.items())
    key = hashlib.blake2b(f"{column}\n{fingerprints}".encode(), digest_size=8).hexdigest()
    cache_dir = cache_dir or Path(datasets.config.HF_DATASETS_CACHE) / "finetune-vit" / "hub"
    folder = cache_dir / f"{Path(name).name}-{key}"
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not folder.is_dir():
                _build(folder, lambda place: _write_splits(place, name, splits, column))
    except OSError as fault:
        raise UserError(f"{cache_dir}: cannot be used ({fault}); HF_DATASETS_CACHE names another place") from None
    return folder


def open_hub_data(name: str, config_name: str | None = None, label_column: str | None = None) -> DatasetFiles:
    """Understand `--dataset_name`; images are copied byte by byte into files, so that all else is as with a folder.

    Columns are found by their feature types, Image and ClassLabel; labels are the ClassLabel's own. Test images are
    named by their rows, and their labels, if there are any, are not looked at. Raises `UserError`.
    """
    splits = choose_splits(name, load_splits(name, config_name))
    features = splits["train"].features
    image, label = find_image_column(name, features), find_label_column(name, features, label_column)
    _check_columns(name, splits, image, label)
    labels = {split: _read_labels(name, split, rows, label) for split, rows in splits.items() if split != "test"}
    root, ignored = copy_images(name, splits, image), Counter()
    files = {split: sorted(list_images(root, split, ignored), key=natural_key) for split in splits}
    class_ids, tested = features[label].names, files.get("test", [])
    return DatasetFiles(
        kind=f"Hub data set {name}, column {image}",
        root=root,
        class_ids=class_ids,
        synonyms=list(class_ids),
        class_names=name_classes(class_ids, class_ids),
        label_order=f"column {label}",
        train_files=files["train"],
        train_labels=labels["train"],
        validation_files=files.get("validation", []),
        validation_labels=labels.get("validation", []),
        test_files=tested,
        test_ids=[image_id_of(file) for file in tested],
        template_path=None,
        left_out=0,
        ignored=ignored,
    )
