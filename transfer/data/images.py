"""Images: how a checkpoint wants them, how files are decoded, the cache of decoded images, and batches of them."""

import contextlib
import functools
import hashlib
import io
import itertools
import json
import math
import os
import secrets
import shutil
import signal
import threading
import time
import warnings
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError

from transfer.errors import Terminated, UserError
from transfer.files import build_folder_once, datasets_cache, read_json
from transfer.runtime import count_cores, forks_end_with_this_process, shield_worker
from transfer.terminal import format_duration, is_terminal, log_only

# The geometry

# PIL's number of a resampling filter -> its name in torch. torch's "nearest" picks other pixels than PIL's.
INTERPOLATIONS = {0: "nearest-exact", 2: "bilinear", 3: "bicubic"}

LARGEST_RESIZED = 64  # times the area of the crop: larger images are cropped before they are resized


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
        top, left = self.corner(height, width)
        if height * width > LARGEST_RESIZED * self.crop[0] * self.crop[1]:
            # A strip of 20,000 x 1 pixels would take gigabytes: only the part that is cropped is resized.
            upper, lower = max(0, top), min(height, top + self.crop[0])
            first, last = max(0, left), min(width, left + self.crop[1])
            down, along = image.height / height, image.width / width
            box = first * along, upper * down, last * along, lower * down
            image = image.resize((last - first, lower - upper), resample, box)
            top, left = top - upper, left - first
        else:
            image = image.resize((width, height), resample)
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
    may_pass: bool = False  # the fault is not the content's, as an error of a network disk: another try may succeed


def reduced_size(size: tuple[int, int], side: int) -> tuple[int, int]:
    """The size with the shorter side reduced to `side`; a smaller image stays as it is."""
    short = max(min(size), 1)
    return size if short <= side else (round(size[0] * side / short), round(size[1] * side / short))


def decode(content: bytes, side: int | None = None) -> Image.Image:
    """Decode the bytes of an image file, in its own mode. Raises whatever the decoder raises.

    With a side, a JPEG is decoded at the smallest of 1/8, 1/4 and 1/2 of its size whose shorter side is at least that.
    """
    with warnings.catch_warnings():
        # PIL only warns about images of one to two times its limit; in a dataset that size is a mistake.
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        image = Image.open(io.BytesIO(content))
        if side:
            image.draft(None, reduced_size(image.size, side))  # type: ignore[arg-type]  # None: the mode stays
        ImageOps.exif_transpose(image, in_place=True)  # upright, as people see it; a copy would take a third longer
        image.load()
    if image.mode.startswith(("I", "F")):
        raise ValueError(f"more than 8 bits per channel, mode {image.mode}; convert it to 8 bits")
    return image


def to_rgb(image: Image.Image) -> np.ndarray:
    """(H, W, 3) uint8 pixels of an image in any mode."""
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


def whole_pixels(image: Image.Image, side: int) -> np.ndarray:
    """(H, W, 3) uint8 pixels of a whole image, reduced so that its shorter side is at most `side`."""
    values = np.array(image if image.mode == "RGB" else image.convert("RGB"))  # a copy: torch wants to own it
    size = reduced_size(values.shape[:2], side)
    if size == values.shape[:2]:
        return values
    pixels = torch.from_numpy(values).unsqueeze(0).permute(0, 3, 1, 2)  # (1, 3, H, W), channels-last
    # On a CPU torch's integer kernel is PIL's, and three times as fast; bicubic keeps more detail than bilinear.
    return F.interpolate(pixels, size, mode="bicubic", antialias=True).permute(0, 2, 3, 1)[0].contiguous().numpy()


def view_pixels(image: Image.Image | None, geometry: ImageGeometry) -> np.ndarray:
    """(H, W, 3) uint8 pixels as the geometry makes them; black ones without an image."""
    return np.zeros((*geometry.crop, 3), np.uint8) if image is None else to_rgb(geometry.apply(image.convert("RGB")))


def read_image(root: Path, file: str, side: int | None = None) -> tuple[ImageRecord, Image.Image | None]:
    """(record, decoded image) of one file; for a bad file, the record has a fault and the image is None.

    With a side, the image may be smaller than the file's, as `decode` says, and the record has no digest.
    """
    content = None
    try:
        content = (root / file).read_bytes()
        image = decode(content, side)
    except Exception as fault:  # damaged bytes make decoders raise anything: struct.error, IndexError, MemoryError
        unknown = isinstance(fault, UnidentifiedImageError)  # its text names only the memory that held the bytes
        reason = "unknown format" if unknown else " ".join(str(fault).split()) or type(fault).__name__
        may_pass = content is None or isinstance(fault, MemoryError)
        return ImageRecord(file, fault=f"cannot be read as an image ({reason})", may_pass=may_pass), None
    # 128 bits: equal only if the bytes are equal
    digest = "" if side else hashlib.blake2b(content, digest_size=16).hexdigest()
    return ImageRecord(file, image.mode, image.size, digest), image


# All files

REDUCIBLE = ("JPEG", "MPO")  # formats that Pillow decodes at a reduced size; an MPO is a JPEG with others inside
IMAGES_PER_TASK = 256
PHOTOS_PER_TASK = 32  # their pixels take up to half a megabyte each
WORKERS_FROM = 2000  # images; with fewer, starting workers takes longer than they save


class _MixedSizes(Exception):
    """An image differs in size from the first one."""


def _end_with(parent: int) -> None:
    """End this process soon after its parent, which was killed."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


@functools.cache
def _start_reader(pid: int) -> None:
    """For a process with this id that `Dataset.map` started: its run ends it, not the terminal."""
    torch.set_num_threads(1)  # there is a process for every core, and a fork has none of its parent's threads
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    # The parent is the run, or a fork server, which ends with the run.
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()


@dataclass
class _Reader:
    """Reads and decodes a batch of files; `Dataset.map` calls it in as many processes as there are cores.

    `keeps` says which pixels become columns: none; "same", images as they are, which all have `size`; or "mixed", the
    evaluation view of every image, and those in `train` whole as well.
    """

    root: Path
    keeps: str = ""
    size: tuple[int, int] = (0, 0)  # (height, width)
    geometry: ImageGeometry | None = None
    side: int = 0  # of whole images
    train: Set[str] = frozenset()
    mixed: Path | None = None  # a file that is made when an image of another size is found

    def __post_init__(self) -> None:
        self.run = os.getpid()
        text, number, pixels = (datasets.Value(kind) for kind in ("string", "int32", "large_binary"))
        self.features = {"file": text, "mode": text, "width": number, "height": number, "digest": text, "fault": text}
        self.features |= {"may_pass": datasets.Value("bool")}
        if self.keeps:
            self.features |= {"pixels": pixels, "pixels_height": number, "pixels_width": number}
        if self.keeps == "mixed":
            self.features |= {"view": pixels}

    def __call__(self, batch: dict[str, list]) -> dict[str, list]:
        if os.getpid() != self.run:
            _start_reader(os.getpid())
        rows = [self._read(file) for file in batch["file"]]
        return {name: [row[name] for row in rows] for name in self.features}

    def _read(self, file: str) -> dict:
        record, image = read_image(self.root, file)
        row = {"file": file, "mode": record.mode, "width": record.size[0], "height": record.size[1]}
        row |= {"digest": record.digest, "fault": record.fault or "", "may_pass": record.may_pass, "view": b""}
        values = np.zeros((*self.size, 3), np.uint8)  # black, if the file cannot be read
        if self.keeps == "same" and image is not None:
            self._check_size(image)
            values = to_rgb(image)
        elif self.keeps == "mixed":
            assert self.geometry is not None
            row["view"] = view_pixels(image, self.geometry).tobytes()
            if image is not None and file in self.train:
                values = whole_pixels(self._reduced(file, image), self.side)
        return row | {"pixels": values.tobytes(), "pixels_height": values.shape[0], "pixels_width": values.shape[1]}

    def _check_size(self, image: Image.Image) -> None:
        assert self.mixed is not None
        if self.mixed.exists() or (image.height, image.width) != self.size:
            self.mixed.touch()  # the other processes stop as well
            raise _MixedSizes

    def _reduced(self, file: str, image: Image.Image) -> Image.Image:
        """The image as `decode` gives it for a side, which is how it is read without the cache."""
        reads_less = image.format in REDUCIBLE and min(image.size) >= 2 * self.side
        return (read_image(self.root, file, self.side)[1] if reads_less else None) or image


@contextlib.contextmanager
def _librarys_bar(what: str, images: int, hidden: bool) -> Iterator[None]:
    """Let `datasets` show its progress bar where a person watches, and write the time to run.log."""
    were_disabled = datasets.are_progress_bars_disabled()
    (datasets.disable_progress_bars if hidden or not is_terminal() else datasets.enable_progress_bars)()
    start = time.perf_counter()
    try:
        yield
    finally:
        (datasets.disable_progress_bars if were_disabled else datasets.enable_progress_bars)()
    if not hidden:
        log_only(f"{what:<11} {images:,} images in {format_duration(time.perf_counter() - start)}")


@contextlib.contextmanager
def _interrupts_first() -> Iterator[None]:
    """Let Ctrl-C and signals through, which `Dataset.map` hides behind an error of its processes."""
    try:
        yield
    except Exception as fault:
        if isinstance(fault.__context__, KeyboardInterrupt | Terminated):
            raise fault.__context__ from None
        raise


@contextlib.contextmanager
def _same_environment() -> Iterator[None]:
    """Keep the object os.environ, which `Dataset.map` replaces by a copy: others hold it and would miss changes."""
    environment, names = os.environ, set(os.environ)
    try:
        yield
    finally:
        os.environ = environment  # noqa: B003  the very object
        for name in set(environment) - names:
            del environment[name]


def _read_all(
    files: Sequence[str], reader: _Reader, what: str, place: Path | None = None, hidden: bool = False
) -> datasets.Dataset:
    """One row with the reader's columns for each file, in order; in Arrow files at `place`, or in temporary ones."""
    at_once = PHOTOS_PER_TASK if reader.keeps == "mixed" else IMAGES_PER_TASK
    with (
        _librarys_bar(what, len(files), hidden),
        _same_environment(),
        _interrupts_first(),
        forks_end_with_this_process(),
    ):
        return datasets.Dataset.from_dict({"file": list(files)}).map(
            reader,
            batched=True,
            batch_size=at_once,
            writer_batch_size=at_once,
            features=datasets.Features(reader.features),
            num_proc=count_cores() if count_cores() > 1 and len(files) > WORKERS_FROM else None,
            cache_file_name=str(place) if place else None,
            # Otherwise it would be a hash of everything that the reader holds. The folder has the fingerprint.
            new_fingerprint=secrets.token_hex(8),
            desc=what,
        )


def scan_images(root: Path, files: Sequence[str], show_progress: bool = False) -> list[ImageRecord]:
    """Decode every file and return its record, in the given order."""
    rows = _read_all(files, _Reader(root), "checking", hidden=not show_progress)
    return [
        ImageRecord(row["file"], row["mode"], (row["width"], row["height"]), row["digest"], row["fault"] or None)
        for row in rows
    ]


# The cache of decoded images

STORE_FORMAT = 4  # raise it when pixels are made differently, so that older caches are not used

# Images of one size are kept as they are up to this many pixels per side, or up to the run's image size if that is
# larger: 50,000 of them then take at most 2.5 GB of disk.
LARGEST_KEPT_SIDE = 128
SAMPLED_SIZES = 200  # images, to foresee how much disk all of them take
FREE_SHARE = 0.9  # of the free disk that may be filled: checkpoints need some as well


class PixelStore:
    """The images of a dataset as uint8 pixels, from memory-mapped Arrow files, or decoded whenever they are needed.

    `rows` maps a file to its row. `data_fingerprint` is a hash of the files' names and bytes. `size` is the (height,
    width) of all images where these are small and equal: they are kept as they are. Otherwise it is None: images are
    kept as the geometry's evaluation views, and those to train on whole as well. `unreadable` maps each file that
    could not be decoded to its fault; its pixels are black. `why_uncached` is a reason, or None.
    """

    def __init__(
        self,
        folder: Path,
        root: Path,
        files: Sequence[str],
        geometry: ImageGeometry,
        side: int,
        why_uncached: str | None,
    ):
        description = read_json(folder / "store.json")
        self.data_fingerprint: str = description["data_fingerprint"]
        self.unreadable: dict[str, str] = description["unreadable"]
        self.root, self.files, self.geometry, self.side = root, list(files), geometry, side
        self.rows = {file: row for row, file in enumerate(files)}
        self.why_uncached = why_uncached
        same = description["size"]
        self.size = (same[0], same[1]) if same and _is_small(same, geometry) else None
        if why_uncached is None:
            parts = [datasets.Dataset.from_file(str(path)) for path in sorted(folder.glob("*.arrow"))]
            # Memory-mapped: all processes see the same pages of memory, and a copy for a worker only has their names.
            images = datasets.concatenate_datasets(parts)
            kept = [name for name in ("pixels", "view") if name in images.column_names]
            self.columns = {name: images.select_columns([name]).with_format("arrow") for name in kept}
            shapes = images.select_columns(["pixels_height", "pixels_width"]).with_format("numpy")[:]
            self.shapes = np.stack([shapes["pixels_height"], shapes["pixels_width"]], 1)  # (N, 2)

    @property
    def cropped(self) -> bool:
        """Whether images for evaluation come resized and cropped by the geometry."""
        return self.size is None

    def take(self, rows: np.ndarray, whole: bool) -> tuple[np.ndarray, np.ndarray]:
        """The pixels of some images, one after the other as one line of bytes, and their (height, width), (B, 2)."""
        if self.why_uncached is not None:
            images = [self._decode(self.files[row], whole) for row in rows]
            return np.concatenate([image.reshape(-1) for image in images]), np.array([i.shape[:2] for i in images])
        is_view = self.size is None and not whole
        shapes = np.broadcast_to(self.geometry.crop, (len(rows), 2)) if is_view else self.shapes[rows]
        array = self.columns["view" if is_view else "pixels"][rows.tolist()].column(0).combine_chunks()
        _, ends, values = array.buffers()
        ends = np.frombuffer(ends, np.int64)[array.offset : array.offset + len(rows) + 1]
        return np.frombuffer(values, np.uint8)[ends[0] : ends[-1]].copy(), shapes

    def _decode(self, file: str, whole: bool) -> np.ndarray:
        """(H, W, 3) pixels, as the cache has them. Raises `UserError` if the file was damaged since it was checked."""
        whole = whole and self.size is None
        record, image = read_image(self.root, file, self.side if whole else None)
        if image is None and file not in self.unreadable:
            raise UserError(
                f"{self.root / file}: {record.fault}, although it was read at the start; run the same command again "
                "when it can be read"
            )
        if self.size is None:
            return whole_pixels(image, self.side) if image and whole else view_pixels(image, self.geometry)
        return np.zeros((*self.size, 3), np.uint8) if image is None else to_rgb(image)


def _stamp(path: str) -> str:
    try:
        status = os.stat(path)  # noqa: PTH116 - Path.stat of 55,000 files takes a second longer
    except OSError:
        return "absent"  # reported, with the reason, when the file is read
    # The last one is when the file was changed in any way: nobody can set it back.
    return f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}"


def listing_key(root: Path, files: Sequence[str]) -> str:
    """Hash of the files' names, sizes and times of change; it detects changed data without reading them."""
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


def _is_small(size: Sequence[int], geometry: ImageGeometry) -> bool:
    return max(size) <= max(LARGEST_KEPT_SIDE, *geometry.crop)


def _foresee_bytes(root: Path, files: Sequence[str], reader: _Reader) -> int:
    """How much disk the images take, by the sizes of some of them."""
    if reader.keeps == "same":
        return len(files) * math.prod(reader.size) * 3
    assert reader.geometry is not None
    sizes = []
    for file in [file for file in files if file in reader.train][:: max(1, len(reader.train) // SAMPLED_SIZES)]:
        with contextlib.suppress(Exception), Image.open(root / file) as image:  # bad files are found when all are read
            sizes.append(math.prod(reduced_size(image.size, reader.side)))
    whole = len(reader.train) * sum(sizes) / max(1, len(sizes))
    return int(3 * (whole + len(files) * math.prod(reader.geometry.crop)))


def _describe_lack(cache_dir: Path, needed: int) -> str | None:
    """Why so many bytes cannot be kept in a folder, or None if its disk has room for them."""
    place = next(folder for folder in (cache_dir, *cache_dir.parents) if folder.exists())
    free = shutil.disk_usage(place).free
    if needed <= FREE_SHARE * free:
        return None
    return (
        f"decoded, they take {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free in {cache_dir}; "
        "HF_DATASETS_CACHE chooses another place"
    )


def _fill(folder: Path, root: Path, files: Sequence[str], reader: _Reader, may_fail: Set[str]) -> None:
    """Decode all files into Arrow files in a folder, as the reader says, and describe them in store.json.

    Raises `UserError` for bad images, except those in `may_fail`, and `_MixedSizes` for an image of another size than
    the reader wants.
    """
    reader.mixed = folder / "mixed"
    rows = _read_all(files, reader, "decoding" if reader.keeps else "checking", folder / "images.arrow")
    names = ["file", "digest", "fault", "may_pass", "height", "width"]
    columns = rows.select_columns(names).with_format("arrow")[:].to_pydict()
    named = list(zip(columns["file"], columns["digest"], columns["fault"], strict=True))
    _refuse_faults(root, [ImageRecord(f, fault=fault or None) for f, _, fault in named if f not in may_fail])
    fingerprint = hashlib.sha256("\n".join(sorted(f"{f} {digest}" for f, digest, _ in named)).encode()).hexdigest()
    readable = zip(columns["height"], columns["width"], columns["fault"], strict=True)
    sizes = {(height, width) for height, width, fault in readable if not fault}
    description = {
        "data_fingerprint": fingerprint,
        "images": len(files),
        "size": next(iter(sizes)) if len(sizes) == 1 else None,
        "unreadable": {f: fault for f, _, fault in named if fault},
        "may_pass": list(itertools.compress(columns["file"], columns["may_pass"])),
    }
    (folder / "store.json").write_text(json.dumps(description))


def _is_valid(folder: Path, root: Path) -> bool:
    """Whether no file of a filled folder can be read now that could not be read when it was filled."""
    return all(read_image(root, file)[0].may_pass for file in read_json(folder / "store.json")["may_pass"])


def _name_of(reader: _Reader) -> str:
    """What ends the name of the folder with the reader's rows: it differs where the pixels do."""
    if reader.keeps != "mixed":
        return reader.keeps or "checked"
    assert reader.geometry is not None
    made = "\n".join([reader.geometry.rule, f"whole {reader.side}", *sorted(reader.train)])
    return hashlib.sha256(made.encode()).hexdigest()[:8]


def _find_or_build(
    cache_dir: Path, files: Sequence[str], reader: _Reader, may_fail: Set[str], crops: bool, why_uncached: str | None
) -> tuple[Path, str | None]:
    """The folder of the decoded images, and None, or the folder with what is known about the files, and why."""
    root, geometry = reader.root, reader.geometry
    assert geometry is not None
    key = listing_key(root, files)

    def folder_of(reader: _Reader) -> Path:
        return cache_dir / f"{key}-{_name_of(reader)}"

    def build(reader: _Reader) -> Path:
        folder = folder_of(reader)
        return build_folder_once(
            folder,
            lambda f: _fill(f, root, files, reader, may_fail),
            "HF_DATASETS_CACHE",
            lambda: _is_valid(folder, root),
        )

    mixed = replace(reader, keeps="mixed")
    if not crops and not folder_of(mixed).is_dir():
        mixed = replace(mixed, train=frozenset(), side=0)
    tried = [mixed]
    records = (read_image(root, file)[0] for file in files)
    width, height = next((record.size for record in records if not record.fault), (0, 0))
    if height and _is_small((height, width), geometry) and not folder_of(mixed).is_dir():
        tried.insert(0, replace(reader, keeps="same", size=(height, width)))
    for kept in tried if why_uncached is None else []:
        if not folder_of(kept).is_dir():
            why_uncached = _describe_lack(cache_dir, _foresee_bytes(root, files, kept))
        if why_uncached:
            break
        with contextlib.suppress(_MixedSizes):
            return build(kept), None
    return build(reader), why_uncached


def open_pixel_store(
    root: Path,
    files: Sequence[str],
    geometry: ImageGeometry,
    cache_dir: Path | None = None,
    may_fail: Sequence[str] = (),
    train_files: Sequence[str] = (),
    train_side: int = 0,
    why_uncached: str | None = None,
    crops: bool = True,
) -> PixelStore:
    """Open the pixels of these files in the datasets cache; they are decoded first if they are missing or changed.

    Where the images differ in size, or are large, `train_files` are kept whole as well, their shorter side reduced to
    `train_side`. Without `crops` to train on, they are not, unless another run has kept them. If the disk has no room
    for the pixels, or `why_uncached` gives another reason, files are checked once and decoded whenever they are
    needed, to the same pixels. Raises `UserError` for the first image that cannot be read and is not in `may_fail`.
    Processes that ask at the same time decode once.
    """
    cache_dir = cache_dir or datasets_cache("pixels")
    reader = _Reader(root, geometry=geometry, side=train_side, train=frozenset(train_files))
    folder, why_uncached = _find_or_build(cache_dir, files, reader, frozenset(may_fail), crops, why_uncached)
    store = PixelStore(folder, root, files, geometry, train_side, why_uncached)
    # It may have been made for a run that could do without other files.
    faults = {file: fault for file, fault in store.unreadable.items() if file not in may_fail}
    _refuse_faults(root, [ImageRecord(file, fault=faults.get(file)) for file in files] if faults else [])
    return store


# Batches


class PixelDataset(torch.utils.data.Dataset):
    """One split of the dataset over a pixel store, to evaluate or to train on; a whole batch is gathered at once.

    `__getitems__` gives {"images": (B, 3, H, W) uint8} and, where the split has labels, "labels": (B,) int64. To train
    on, images of several sizes come as one line of bytes, with a list of their "shapes", (height, width);
    `unpack_images` takes them apart.
    """

    def __init__(self, store: PixelStore, split: datasets.Dataset, for_training: bool = False):
        self.store, self.for_training = store, for_training
        # [:] reads a column at once; without it every row is looked up by itself.
        self.rows = np.array([store.rows[file] for file in split["file"][:]], dtype=np.int64)
        self.labels = np.array(split["label"][:], dtype=np.int64) if "label" in split.column_names else None

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, positions: Sequence[int]) -> dict[str, Any]:
        if torch.utils.data.get_worker_info():  # its process may be about to save a last checkpoint
            shield_worker(os.getpid())
        values, shapes = self.store.take(self.rows[positions], self.for_training)
        images = torch.from_numpy(values)
        batch: dict[str, Any] = {}
        if self.for_training and self.store.size is None:
            batch |= {"images": images, "shapes": shapes.tolist()}
        else:
            # (B, H, W, 3) in memory, seen as (B, 3, H, W): channels-last, as convolutions like it
            batch["images"] = images.view(len(shapes), *shapes[0].tolist(), 3).permute(0, 3, 1, 2)
        if self.labels is not None:
            batch["labels"] = torch.from_numpy(self.labels[positions])
        return batch

    def __getitem__(self, position: int) -> dict[str, Any]:
        batch = unpack_images(self.__getitems__([position]))
        return {name: values[0] for name, values in batch.items()}


def unpack_images(batch: dict[str, Any]) -> dict[str, Any]:
    """The batch with images of several sizes as a list of (3, H, W) uint8; other batches stay as they are."""
    if "shapes" not in batch:
        return batch
    parts = batch["images"].split([3 * height * width for height, width in batch["shapes"]])
    shaped = zip(parts, batch["shapes"], strict=True)
    images = [part.view(height, width, 3).permute(2, 0, 1) for part, (height, width) in shaped]
    return {name: values for name, values in batch.items() if name != "shapes"} | {"images": images}


def identity_collate(batch: dict[str, Any]) -> dict[str, Any]:
    """Collate function for `PixelDataset`, whose batches come gathered."""
    return batch
