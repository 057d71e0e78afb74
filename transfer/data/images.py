"""How a checkpoint's processor brings an image to the model: read, applied, set to another size.

Every image decoded once into a memory-mapped uint8 store, and batches gathered from it by index.
"""

import errno
import hashlib
import io
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import torch
from filelock import FileLock
from PIL import Image, ImageOps
from tqdm.auto import tqdm

from transfer.errors import UserError

# PIL's numbers -> torch's names. torch's "nearest" takes other pixels than PIL's.
INTERPOLATIONS = {0: "nearest-exact", 2: "bilinear", 3: "bicubic"}


@dataclass(frozen=True)
class ImageGeometry:
    """How a checkpoint's processor brings an image to the model: resize, centre crop, normalise."""

    resize: tuple[int, int] | int  # (height, width), or the shortest edge
    crop: tuple[int, int]  # height, width of what the model sees
    interpolation: str  # a name in INTERPOLATIONS
    mean: tuple[float, ...]  # of pixels in 0..1
    std: tuple[float, ...]
    bgr: bool = False  # the model wants blue first
    rounds_corner: bool = False  # where a centre crop leaves an odd rest: torchvision rounds, transformers cuts off

    @property
    def rule(self) -> str:
        """The geometry in words that tell two of them apart."""
        corner = " rounded" if self.rounds_corner else ""
        return f"resize {self.resize} crop {self.crop} {self.interpolation}{corner}"

    def resized(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) after resizing an image of that height and width."""
        if not isinstance(self.resize, int):
            return self.resize
        short = min(height, width)
        # Rounded down, as transformers does.
        return int(height * self.resize / short), int(width * self.resize / short)

    def corner(self, height: int, width: int) -> tuple[int, int]:
        """(top, left) of the centre crop of a resized image."""
        rest = height - self.crop[0], width - self.crop[1]
        return (round(rest[0] / 2), round(rest[1] / 2)) if self.rounds_corner else (rest[0] // 2, rest[1] // 2)

    def apply(self, image: Image.Image) -> Image.Image:
        """The view of one PIL image, before normalisation."""
        height, width = self.resized(image.height, image.width)
        resample = next(number for number, name in INTERPOLATIONS.items() if name == self.interpolation)
        image = image.resize((width, height), resample)
        top, left = self.corner(height, width)
        return image.crop((left, top, left + self.crop[1], top + self.crop[0]))


# Raise when the way in which pixels are made changes: older stores are then not used.
STORE_FORMAT = 2

# Images of one size stay as they are up to this many pixels a side (or the run's size, if larger): 50,000 of them
# then take at most 2.5 GB of disk.
LARGEST_KEPT_SIDE = 128

IMAGES_PER_TASK = 256


@dataclass(frozen=True)
class ImageRecord:
    """What reading one file showed; `fault` says why it cannot be used, or is None."""

    file: str
    mode: str = ""
    size: tuple[int, int] = (0, 0)  # width, height
    digest: str = ""  # of the file's bytes
    fault: str | None = None


def decode(content: bytes) -> Image.Image:
    """Decode the bytes of one image file, whole, to its own mode. A bad one raises whatever its decoder does."""
    with warnings.catch_warnings():
        # PIL only warns of images up to twice its limit; a training image of that size is a mistake.
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        image = Image.open(io.BytesIO(content))
        ImageOps.exif_transpose(image, in_place=True)  # photographs taken upright, as seen; a copy would cost a third
        image.load()
    if image.mode.startswith(("I", "F")):
        raise ValueError(f"it has more than 8 bits a channel, mode {image.mode}; convert it to 8 bits")
    return image


def to_rgb(image: Image.Image) -> np.ndarray:
    """(H, W, 3) uint8 of an image in any mode."""
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


def read_image(root: Path, file: str) -> tuple[ImageRecord, Image.Image | None]:
    """Read and decode one file; a bad one gives a record with its fault instead of an exception."""
    try:
        content = (root / file).read_bytes()
        image = decode(content)
    except Exception as fault:  # damaged bytes make decoders raise anything: struct.error, IndexError, MemoryError
        reason = " ".join(str(fault).split()) or type(fault).__name__
        return ImageRecord(file, fault=f"cannot be read as an image ({reason})"), None
    # 128 bits: two images share a digest only if their bytes are the same.
    digest = hashlib.blake2b(content, digest_size=16).hexdigest()
    return ImageRecord(file, image.mode, image.size, digest), image


class _ReadingTask(torch.utils.data.Dataset):
    """Reads images in a DataLoader's workers; rows of an open store are written where they are decoded."""

    def __init__(
        self,
        root: Path,
        files: Sequence[str],
        pixels_path: Path | None = None,
        resize: Callable | None = None,
    ):
        self.root, self.files, self.pixels_path, self.resize = root, files, pixels_path, resize

    def __len__(self) -> int:
        return len(self.files)

    def __getitems__(self, rows: list[int]) -> list[ImageRecord]:
        pixels = np.load(self.pixels_path, mmap_mode="r+") if self.pixels_path else None
        return [self._read(row, pixels) for row in rows]

    def _read(self, row: int, pixels: np.ndarray | None) -> ImageRecord:
        record, image = read_image(self.root, self.files[row])
        if image is not None and pixels is not None:
            values = to_rgb(self.resize(image.convert("RGB")) if self.resize else image)
            if values.shape == pixels.shape[1:]:
                pixels[row] = values
            elif self.resize:
                raise RuntimeError(f"{record.file}: resized to {values.shape}, not {pixels.shape[1:]}")
        return record


def _run(task: _ReadingTask, show_progress: bool, what: str) -> Iterator[ImageRecord]:
    """Every record of a task in order, read by as many processes as there are cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    # Starting workers costs more than a few thousand small images.
    workers = cores if cores > 1 and len(task) > 2000 else 0
    loader = torch.utils.data.DataLoader(
        task, batch_size=IMAGES_PER_TASK, num_workers=workers, collate_fn=list, in_order=True
    )
    with tqdm(total=len(task), desc=what, unit=" images", disable=not show_progress, leave=False) as bar:
        for records in loader:
            bar.update(len(records))
            yield from records


def scan_images(root: Path, files: Sequence[str], show_progress: bool = False) -> Iterator[ImageRecord]:
    """Decode every file and say what it is, in the given order."""
    return _run(_ReadingTask(root, files), show_progress, "checking images")


class PixelStore:
    """Decoded images: `pixels` is (N, H, W, 3) uint8, memory-mapped; `rows` gives a file's row.

    `data_fingerprint` depends on the files' names and bytes alone; `cropped` says that the pixels are the evaluation
    view's, and not the images' own.
    """

    def __init__(self, folder: Path, files: Sequence[str]):
        # Read-only and shared: every process and worker looks at the same pages.
        self.pixels = np.load(folder / "pixels.npy", mmap_mode="r")
        description = json.loads((folder / "store.json").read_text())
        self.data_fingerprint, self.cropped = description["data_fingerprint"], description["cropped"]
        self.rows = {file: row for row, file in enumerate(files)}


def _stamp(path: str) -> str:
    try:
        status = os.stat(path)  # noqa: PTH116 - 55,000 Paths cost a second
    except OSError:
        return "absent"  # which is said, with its reason, when the file is read
    return f"{status.st_size} {status.st_mtime_ns}"


def listing_key(root: Path, files: Sequence[str]) -> str:
    """Hash of the files' names, sizes and modification times: changes whenever the data do, without reading them."""
    stamps = "".join(f"{file} {_stamp(f'{root}/{file}')}\n" for file in files)
    return hashlib.blake2b(f"{STORE_FORMAT}\n{stamps}".encode(), digest_size=16).hexdigest()


def _refuse_faults(root: Path, records: Sequence[ImageRecord]) -> None:
    faults = [record for record in records if record.fault]
    if faults:
        raise UserError(
            f"{root / faults[0].file}: {faults[0].fault}; {len(faults)} of {len(records)} images are bad, "
            "`python data_loading.py` on the data set lists them"
        )


def _kept_size(root: Path, files: Sequence[str], view_size: int) -> tuple[int, int] | None:
    """(H, W) of the first image if images of that size would be kept as they are."""
    record, _ = read_image(root, files[0])
    _refuse_faults(root, [record])
    width, height = record.size
    return (height, width) if max(width, height) <= max(LARGEST_KEPT_SIDE, view_size) else None


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:  # a memory-mapped file on a full disk kills the process
        raise UserError(
            f"{folder}: decoded pixels need {needed / 2**20:.0f} MiB, {free / 2**20:.0f} MiB are free; "
            "HF_DATASETS_CACHE names another place"
        )


def _reserve(path: Path) -> None:
    """Take a sparse file's blocks from the disk now: later, in mapped memory, a lack of them kills the process."""
    if hasattr(os, "posix_fallocate"):
        with path.open("r+b") as file:
            try:
                os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
            except OSError as fault:  # not every file system can
                if fault.errno in (errno.ENOSPC, errno.EDQUOT):
                    raise


def _fill(folder: Path, root: Path, files: Sequence[str], size: tuple[int, int], resize: Callable | None) -> bool:
    """Decode all files into folder/pixels.npy; False if an image has another size and nothing resizes it."""
    path = folder / "pixels.npy"
    _check_space(folder, len(files) * size[0] * size[1] * 3)
    np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=(len(files), *size, 3)).flush()
    _reserve(path)
    records = []
    for record in _run(_ReadingTask(root, files, path, resize), True, "decoding images"):
        if resize is None and not record.fault and record.size != (size[1], size[0]):
            return False
        records.append(record)
    _refuse_faults(root, records)
    named = sorted(f"{record.file} {record.digest}" for record in records)
    fingerprint = hashlib.sha256("\n".join(named).encode()).hexdigest()
    description = {"data_fingerprint": fingerprint, "images": len(files), "cropped": resize is not None}
    (folder / "store.json").write_text(json.dumps(description))
    return True


def _build(folder: Path, fill: Callable[[Path], bool]) -> bool:
    """Build a store beside its place and move it there whole; False if `fill` cannot."""
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)  # of a process that was killed: the lock is ours
    unfinished.mkdir()
    try:
        if not fill(unfinished):
            return False
        unfinished.rename(folder)
        return True
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _find_or_build(cache_dir: Path, root: Path, files: Sequence[str], resize: Callable, crop, rule: str) -> Path:
    key = listing_key(root, files)
    kept, cropped = cache_dir / f"{key}-whole", cache_dir / f"{key}-{hashlib.sha256(rule.encode()).hexdigest()[:8]}"
    size = _kept_size(root, files, max(crop))
    if cropped.is_dir():  # made where sizes are mixed, or large
        return cropped
    with FileLock(cache_dir / f"{key}.lock"):
        if size and (kept.is_dir() or _build(kept, lambda folder: _fill(folder, root, files, size, None))):
            return kept
        if not cropped.is_dir():
            _build(cropped, lambda folder: _fill(folder, root, files, crop, resize))
    return cropped


def open_pixel_store(
    root: Path,
    files: Sequence[str],
    resize: Callable[[Image.Image], Image.Image],
    crop: tuple[int, int],
    rule: str,
    cache_dir: Path | None = None,
) -> PixelStore:
    """The store of these files, built first if it is not in the datasets cache or the files have changed.

    Images of one size are kept as they are, unless large; others become `resize` of themselves, `crop` pixels (height,
    width), by what `rule` names. Raises `UserError` for the first image that cannot be read. Two processes that ask at
    once build it once.
    """
    cache_dir = cache_dir or Path(datasets.config.HF_DATASETS_CACHE) / "finetune-vit" / "pixels"
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        return PixelStore(_find_or_build(cache_dir, root, files, resize, crop, rule), files)
    except OSError as fault:
        raise UserError(f"{cache_dir}: cannot be used ({fault}); HF_DATASETS_CACHE names another place") from None


class PixelDataset(torch.utils.data.Dataset):
    """One split of the data set over a pixel store; a whole batch is gathered at once.

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
