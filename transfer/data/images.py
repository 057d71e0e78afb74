"""Images: how a checkpoint wants them, how files are decoded, and the memory-mapped store of decoded images."""

import errno
import hashlib
import io
import json
import os
import warnings
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm.auto import tqdm

from transfer.errors import UserError
from transfer.files import build_folder_once, check_free_space, datasets_cache, read_json
from transfer.runtime import shield_worker

# The geometry

# PIL's number of a resampling filter -> its name in torch. torch's "nearest" picks other pixels than PIL's.
INTERPOLATIONS = {0: "nearest-exact", 2: "bilinear", 3: "bicubic"}


@dataclass(frozen=True)
class ImageGeometry:
    """How a checkpoint's processor prepares an image: resize, center crop, normalize."""

    resize: tuple[int, int] | int  # (height, width), or the length of the shortest edge
    crop: tuple[int, int]  # (height, width) of the model's input
    interpolation: str  # a value of INTERPOLATIONS
    mean: tuple[float, ...]  # for pixels in 0..1
    std: tuple[float, ...]
    bgr: bool = False  # the model's channels are blue, green, red
    rounds_corner: bool = False  # of a center crop with an odd rest: torchvision rounds it, transformers floors it

    @property
    def rule(self) -> str:
        """Resize, crop and interpolation as text; two geometries with the same rule make the same pixels."""
        corner = " rounded" if self.rounds_corner else ""
        return f"resize {self.resize} crop {self.crop} {self.interpolation}{corner}"

    def resized(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) of an image of this height and width after resizing."""
        if not isinstance(self.resize, int):
            return self.resize
        short = min(height, width)
        # Rounded down, as in transformers.
        return int(height * self.resize / short), int(width * self.resize / short)

    def corner(self, height: int, width: int) -> tuple[int, int]:
        """(top, left) of the center crop in a resized image of this height and width."""
        rest = height - self.crop[0], width - self.crop[1]
        return (round(rest[0] / 2), round(rest[1] / 2)) if self.rounds_corner else (rest[0] // 2, rest[1] // 2)

    def apply(self, image: Image.Image) -> Image.Image:
        """The image after resizing and cropping; it is not normalized."""
        height, width = self.resized(image.height, image.width)
        resample = next(number for number, name in INTERPOLATIONS.items() if name == self.interpolation)
        image = image.resize((width, height), resample)
        top, left = self.corner(height, width)
        return image.crop((left, top, left + self.crop[1], top + self.crop[0]))


# One file


@dataclass(frozen=True)
class ImageRecord:
    """What reading one file showed; `fault` says why the file cannot be used, or is None."""

    file: str
    mode: str = ""
    size: tuple[int, int] = (0, 0)  # (width, height)
    digest: str = ""  # of the file's bytes
    fault: str | None = None


def decode(content: bytes) -> Image.Image:
    """Decode the bytes of an image file completely, in its own mode. Raises whatever the decoder raises."""
    with warnings.catch_warnings():
        # PIL only warns about images of one to two times its limit; in a dataset that size is a mistake.
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        image = Image.open(io.BytesIO(content))
        ImageOps.exif_transpose(image, in_place=True)  # upright, as people see it; a copy would take a third longer
        image.load()
    if image.mode.startswith(("I", "F")):
        raise ValueError(f"more than 8 bits per channel, mode {image.mode}; convert it to 8 bits")
    return image


def to_rgb(image: Image.Image) -> np.ndarray:
    """(H, W, 3) uint8 pixels of an image in any mode."""
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


def read_image(root: Path, file: str) -> tuple[ImageRecord, Image.Image | None]:
    """(record, decoded image) of one file; for a bad file, the record has a fault and the image is None."""
    try:
        content = (root / file).read_bytes()
        image = decode(content)
    except Exception as fault:  # damaged bytes make decoders raise anything: struct.error, IndexError, MemoryError
        unknown = isinstance(fault, UnidentifiedImageError)  # its text names only the memory that held the bytes
        reason = "unknown format" if unknown else " ".join(str(fault).split()) or type(fault).__name__
        return ImageRecord(file, fault=f"cannot be read as an image ({reason})"), None
    digest = hashlib.blake2b(content, digest_size=16).hexdigest()  # 128 bits: equal only if the bytes are equal
    return ImageRecord(file, image.mode, image.size, digest), image


# All files

IMAGES_PER_TASK = 256
WORKERS_FROM = 2000  # images; with fewer, starting workers takes longer than they save


class _ReadingTask(torch.utils.data.Dataset):
    """Reads and decodes files in the workers of a DataLoader, and writes them to an open store if there is one.

    With a geometry, images are resized and cropped before they are written. Without one, an image whose size is not
    the store's is not written.
    """

    def __init__(
        self, root: Path, files: Sequence[str], pixels_path: Path | None = None, geometry: ImageGeometry | None = None
    ):
        self.root, self.files, self.pixels_path, self.geometry = root, files, pixels_path, geometry

    def __len__(self) -> int:
        return len(self.files)

    def __getitems__(self, rows: list[int]) -> list[ImageRecord]:
        pixels = np.load(self.pixels_path, mmap_mode="r+") if self.pixels_path else None
        return [self._read(row, pixels) for row in rows]

    def _read(self, row: int, pixels: np.ndarray | None) -> ImageRecord:
        record, image = read_image(self.root, self.files[row])
        if image is not None and pixels is not None:
            values = to_rgb(self.geometry.apply(image.convert("RGB")) if self.geometry else image)
            if values.shape == pixels.shape[1:]:
                pixels[row] = values
            elif self.geometry:
                raise RuntimeError(f"{record.file}: resized to {values.shape}, not {pixels.shape[1:]}")
        return record


def _run(task: _ReadingTask, show_progress: bool, what: str) -> Iterator[ImageRecord]:
    """The records of a task in order, read by as many processes as there are cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = cores if cores > 1 and len(task) > WORKERS_FROM else 0
    loader = torch.utils.data.DataLoader(
        task, batch_size=IMAGES_PER_TASK, num_workers=workers, collate_fn=list, in_order=True
    )
    with tqdm(total=len(task), desc=what, unit=" images", disable=not show_progress, leave=False) as bar:
        for records in loader:
            bar.update(len(records))
            yield from records


def scan_images(root: Path, files: Sequence[str], show_progress: bool = False) -> Iterator[ImageRecord]:
    """Decode every file and yield its record, in the given order."""
    return _run(_ReadingTask(root, files), show_progress, "checking images")


# The store of decoded images

STORE_FORMAT = 2  # raise it when pixels are made differently, so that older stores are not used

# Images of one size are stored as they are up to this many pixels per side, or up to the run's image size if that is
# larger: 50,000 of them then take at most 2.5 GB of disk.
LARGEST_KEPT_SIDE = 128


class PixelStore:
    """Decoded images: `pixels` is (N, H, W, 3) uint8, memory-mapped; `rows` maps a file to its row.

    `data_fingerprint` is a hash of the files' names and bytes. `cropped` says that the images were resized and cropped
    by a geometry before they were stored. `unreadable` maps each file that could not be decoded to its fault; its
    pixels are black.
    """

    def __init__(self, folder: Path, files: Sequence[str]):
        description = read_json(folder / "store.json")
        self.data_fingerprint, self.cropped = description["data_fingerprint"], description["cropped"]
        self.unreadable: dict[str, str] = description.get("unreadable", {})
        # Read-only and shared: all processes and workers see the same pages of memory.
        self.pixels = np.load(folder / "pixels.npy", mmap_mode="r")
        self.rows = {file: row for row, file in enumerate(files)}


def _stamp(path: str) -> str:
    try:
        status = os.stat(path)  # noqa: PTH116 - Path.stat of 55,000 files takes a second longer
    except OSError:
        return "absent"  # reported, with the reason, when the file is read
    return f"{status.st_size} {status.st_mtime_ns}"


def listing_key(root: Path, files: Sequence[str]) -> str:
    """Hash of the files' names, sizes and modification times; it detects changed data without reading them."""
    stamps = "".join(f"{file} {_stamp(f'{root}/{file}')}\n" for file in files)
    return hashlib.blake2b(f"{STORE_FORMAT}\n{stamps}".encode(), digest_size=16).hexdigest()


def _refuse_faults(root: Path, records: Sequence[ImageRecord]) -> None:
    faults = [record for record in records if record.fault]
    if faults:
        raise UserError(
            f"{root / faults[0].file}: {faults[0].fault}; {len(faults)} of {len(records)} images cannot be used"
            f"{': ' + ', '.join(r.file for r in faults) if len(faults) > 1 else ''}; replace them, or leave them out "
            "with --skip_unreadable true"
        )


def _kept_size(root: Path, files: Sequence[str], geometry: ImageGeometry) -> tuple[int, int] | None:
    """(H, W) of the first image if images of that size are stored as they are, else None."""
    record, _ = read_image(root, files[0])
    _refuse_faults(root, [record])
    width, height = record.size
    return (height, width) if max(width, height) <= max(LARGEST_KEPT_SIDE, *geometry.crop) else None


def _reserve(path: Path) -> None:
    """Allocate the disk blocks of a sparse file now: a lack of them in mapped memory would kill the process."""
    if hasattr(os, "posix_fallocate"):
        with path.open("r+b") as file:
            try:
                os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
            except OSError as fault:  # some file systems cannot
                if fault.errno in (errno.ENOSPC, errno.EDQUOT):
                    raise


class _MixedSizes(Exception):
    """An image differs in size from the first one."""


def _fill(
    folder: Path,
    root: Path,
    files: Sequence[str],
    size: tuple[int, int],
    geometry: ImageGeometry | None,
    may_fail: Set[str],
) -> None:
    """Decode all files into folder/pixels.npy, as they are or by the geometry, and describe them in store.json.

    Raises `UserError` for bad images, except those in `may_fail`, and `_MixedSizes` for an image of another size if
    there is no geometry.
    """
    path = folder / "pixels.npy"
    needed = len(files) * size[0] * size[1] * 3
    advice = "HF_DATASETS_CACHE chooses another place"
    check_free_space(folder.parent, needed, f"decoding {len(files)} images", advice)
    np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=(len(files), *size, 3)).flush()
    _reserve(path)
    records = []
    for record in _run(_ReadingTask(root, files, path, geometry), True, "decoding images"):
        if geometry is None and not record.fault and record.size != (size[1], size[0]):
            raise _MixedSizes
        records.append(record)
    _refuse_faults(root, [record for record in records if record.file not in may_fail])
    named = sorted(f"{record.file} {record.digest}" for record in records)
    fingerprint = hashlib.sha256("\n".join(named).encode()).hexdigest()
    description: dict = {"data_fingerprint": fingerprint, "images": len(files), "cropped": geometry is not None}
    if unreadable := {record.file: record.fault for record in records if record.fault}:
        description["unreadable"] = unreadable
    (folder / "store.json").write_text(json.dumps(description))


def _find_or_build(
    cache_dir: Path, root: Path, files: Sequence[str], geometry: ImageGeometry, may_fail: Set[str]
) -> Path:
    """The folder of the store: of images as they are if all have the first one's size, else of cropped ones."""
    key = listing_key(root, files)
    size = _kept_size(root, files, geometry)
    kept = cache_dir / f"{key}-whole"
    cropped = cache_dir / f"{key}-{hashlib.sha256(geometry.rule.encode()).hexdigest()[:8]}"
    if size and not cropped.is_dir():
        try:
            return build_folder_once(kept, lambda f: _fill(f, root, files, size, None, may_fail), "HF_DATASETS_CACHE")
        except _MixedSizes:
            pass

    def build(folder: Path) -> None:
        _fill(folder, root, files, geometry.crop, geometry, may_fail)

    return build_folder_once(cropped, build, "HF_DATASETS_CACHE")


def open_pixel_store(
    root: Path,
    files: Sequence[str],
    geometry: ImageGeometry,
    cache_dir: Path | None = None,
    may_fail: Sequence[str] = (),
) -> PixelStore:
    """Open the store of these files in the datasets cache; it is built first if it is missing or the files changed.

    Images that all have the same, small size are stored as they are; others are resized and cropped by the geometry.
    Raises `UserError` for the first image that cannot be read and is not in `may_fail`. Processes that ask at the same
    time build it once.
    """
    cache_dir = cache_dir or datasets_cache("pixels")
    store = PixelStore(_find_or_build(cache_dir, root, files, geometry, frozenset(may_fail)), files)
    # The store may have been built for a run that could do without other files.
    faults = {file: fault for file, fault in store.unreadable.items() if file not in may_fail}
    _refuse_faults(root, [ImageRecord(file, fault=faults.get(file)) for file in files] if faults else [])
    return store


# Batches


class PixelDataset(torch.utils.data.Dataset):
    """One split of the dataset over a pixel store; a whole batch is gathered at once.

    `__getitems__` gives {"images": (B, 3, H, W) uint8} and, where the split has labels, "labels": (B,) int64.
    """

    def __init__(self, store: PixelStore, split: datasets.Dataset):
        self.store, self.pixels = store, store.pixels
        # [:] reads a column at once; without it every row is looked up by itself.
        self.rows = np.array([store.rows[file] for file in split["file"][:]], dtype=np.int64)
        self.labels = np.array(split["label"][:], dtype=np.int64) if "label" in split.column_names else None

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, positions: Sequence[int]) -> dict[str, torch.Tensor]:
        if torch.utils.data.get_worker_info():  # its process may be about to save a last checkpoint
            shield_worker(os.getpid())
        # (B, H, W, 3) in memory, seen as (B, 3, H, W): channels-last, as convolutions like it
        images = torch.from_numpy(self.pixels[self.rows[positions]]).permute(0, 3, 1, 2)
        batch = {"images": images}
        if self.labels is not None:
            batch["labels"] = torch.from_numpy(self.labels[positions])
        return batch

    def __getitem__(self, position: int) -> dict[str, torch.Tensor]:
        return {name: values[0] for name, values in self.__getitems__([position]).items()}


def identity_collate(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Collate function for `PixelDataset`, whose batches come gathered."""
    return batch
