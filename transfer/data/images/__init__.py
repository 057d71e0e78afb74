"""Images: how a checkpoint prepares them, and how their files are decoded, one at a time or all at once.

`transfer.data.images.store` keeps what was decoded.
"""

import contextlib
import functools
import hashlib
import io
import os
import secrets
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError

from transfer.errors import Terminated
from transfer.runtime import count_cores, forks_end_with_this_process
from transfer.terminal import format_duration, is_terminal, log_only

# The geometry

# PIL's number of a resampling filter -> its name in torch. torch's "nearest" picks other pixels than PIL's.
INTERPOLATIONS = {0: "nearest-exact", 2: "bilinear", 3: "bicubic"}

LARGEST_RESIZED = 64  # times the area of the crop: larger images are cropped before they are resized


@dataclass(frozen=True)
class ImageGeometry:
    """How a checkpoint's processor prepares an image: it is resized, cropped at the center and normalized."""

    resize: tuple[int, int] | int  # (height, width), or the length of the shortest edge
    crop: tuple[int, int]  # (height, width) of the model's input
    interpolation: str  # a value of INTERPOLATIONS
    mean: tuple[float, ...]  # for pixels in 0..1
    std: tuple[float, ...]
    bgr: bool = False  # the model's channels are blue, green, red
    rounds_corner: bool = False  # where half of the margin is no whole pixel: torchvision rounds, transformers floors

    @property
    def rule(self) -> str:
        """Resize, crop and interpolation as text. Two geometries with the same rule make the same pixels."""
        corner = " rounded" if self.rounds_corner else ""
        return f"resize {self.resize} crop {self.crop} {self.interpolation}{corner}"

    def resized(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) after resizing of an image of this height and width."""
        if not isinstance(self.resize, int):
            return self.resize
        short = min(height, width)
        # Rounded down, as in transformers.
        return int(height * self.resize / short), int(width * self.resize / short)

    def corner(self, height: int, width: int) -> tuple[int, int]:
        """(top, left) of the center crop in a resized image of this height and width."""
        down, along = height - self.crop[0], width - self.crop[1]
        return (round(down / 2), round(along / 2)) if self.rounds_corner else (down // 2, along // 2)

    def apply(self, image: Image.Image) -> Image.Image:
        """The image, resized and cropped. It is not normalized."""
        height, width = self.resized(image.height, image.width)
        resample = next(number for number, name in INTERPOLATIONS.items() if name == self.interpolation)
        top, left = self.corner(height, width)
        if height * width > LARGEST_RESIZED * self.crop[0] * self.crop[1]:
            # Resized, a strip of 20,000 x 1 pixels would take gigabytes: only the part inside the crop is resized.
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
    """What was found when one file was read."""

    file: str
    mode: str = ""
    size: tuple[int, int] = (0, 0)  # (width, height)
    digest: str = ""  # of the file's bytes
    fault: str | None = None  # why the file cannot be used
    is_transient: bool = False  # the fault is not the content's but, for example, the network's: it may pass


def reduced_size(size: tuple[int, int], side: int) -> tuple[int, int]:
    """The size of an image whose shorter side is reduced to `side`; smaller images keep their size."""
    short = max(min(size), 1)
    return size if short <= side else (round(size[0] * side / short), round(size[1] * side / short))


def decode(content: bytes, side: int | None = None) -> Image.Image:
    """The image in the bytes of a file, upright and in its own mode. Raises whatever the decoder raises.

    With `side`, a JPEG is decoded at the smallest of 1/8, 1/4, 1/2 and all of its size whose shorter side is at least
    `side`.
    """
    with warnings.catch_warnings():
        # PIL only warns about images of one to two times its limit. In a dataset, that size is a mistake.
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
    values = np.array(image if image.mode == "RGB" else image.convert("RGB"))  # a copy: torch wants writable memory
    size = reduced_size(values.shape[:2], side)
    if size == values.shape[:2]:
        return values
    pixels = torch.from_numpy(values).unsqueeze(0).permute(0, 3, 1, 2)  # (1, 3, H, W), channels-last
    # On a CPU, torch computes what PIL does, three times as fast. Bicubic keeps more detail than bilinear.
    return F.interpolate(pixels, size, mode="bicubic", antialias=True).permute(0, 2, 3, 1)[0].contiguous().numpy()


def view_pixels(image: Image.Image | None, geometry: ImageGeometry) -> np.ndarray:
    """(H, W, 3) uint8 pixels of the evaluation view, which the geometry makes; black without an image."""
    return np.zeros((*geometry.crop, 3), np.uint8) if image is None else to_rgb(geometry.apply(image.convert("RGB")))


def read_image(
    root: Path, file: str, side: int | None = None, with_digest: bool = True
) -> tuple[ImageRecord, Image.Image | None]:
    """(record, decoded image) of one file. For a bad file, the record has a fault and the image is None.

    With `side`, the image may come at a reduced size (see `decode`), and the record has no digest.
    """
    content = None
    try:
        content = (root / file).read_bytes()
        image = decode(content, side)
    except Exception as fault:  # damaged bytes make decoders raise anything: struct.error, IndexError, MemoryError
        unknown = isinstance(fault, UnidentifiedImageError)  # its text would only name an address in memory
        reason = "unknown format" if unknown else " ".join(str(fault).split()) or type(fault).__name__
        is_transient = content is None or isinstance(fault, MemoryError)
        return ImageRecord(file, fault=f"cannot be read as an image ({reason})", is_transient=is_transient), None
    # With 128 bits, equal digests mean equal bytes.
    digest = hashlib.blake2b(content, digest_size=16).hexdigest() if with_digest and not side else ""
    return ImageRecord(file, image.mode, image.size, digest), image


# All files

REDUCIBLE = ("JPEG", "MPO")  # formats that Pillow decodes at a reduced size; an MPO is a JPEG with others inside
IMAGES_PER_TASK = 256
PHOTOS_PER_TASK = 32  # their pixels take up to half a megabyte each
WORKERS_FROM = 2000  # images; with fewer, starting workers takes longer than they save


class MixedSizes(Exception):
    """An image has another size than the first one."""


def _end_with(parent: int) -> None:
    """End this process within a second after its parent was killed."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


@functools.cache
def _start_reader(pid: int) -> None:
    """Prepare a process, with this id, that `Dataset.map` started: its run ends it, not Ctrl-C."""
    torch.set_num_threads(1)  # there is a process for every core, and a fork has none of its parent's threads
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    # The parent is the run, or a fork server, which ends with the run.
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()


@dataclass
class ImageReader:
    """Reads and decodes a batch of files. `Dataset.map` calls it in as many processes as there are cores.

    `keeps` says which pixels become columns:

    - "": none. The files are only checked.
    - "same": the images as they are. All of them must have `size`, or `MixedSizes` is raised.
    - "mixed": the evaluation view of every image, and the images in `train` also whole, their shorter side reduced to
      `side`.
    """

    root: Path
    keeps: str = ""
    size: tuple[int, int] = (0, 0)  # (height, width)
    geometry: ImageGeometry | None = None
    side: int = 0
    train: Set[str] = frozenset()
    mixed: Path | None = None  # a file that tells all processes of an image of another size

    def __post_init__(self) -> None:
        self.run = os.getpid()
        text, number, pixels = (datasets.Value(kind) for kind in ("string", "int32", "large_binary"))
        self.features = {"file": text, "mode": text, "width": number, "height": number, "digest": text, "fault": text}
        self.features |= {"is_transient": datasets.Value("bool")}
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
        row |= {"digest": record.digest, "fault": record.fault or "", "is_transient": record.is_transient, "view": b""}
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
            self.mixed.touch()
            raise MixedSizes

    def _reduced(self, file: str, image: Image.Image) -> Image.Image:
        """The image as `decode` returns it with `side`, which is how it is read without the cache."""
        reads_less = image.format in REDUCIBLE and min(image.size) >= 2 * self.side
        return (read_image(self.root, file, self.side)[1] if reads_less else None) or image


@contextlib.contextmanager
def _progress(what: str, images: int, hidden: bool) -> Iterator[None]:
    """Let `datasets` show its progress bar on a terminal, and write the time to run.log, unless `hidden`."""
    were_disabled = datasets.are_progress_bars_disabled()
    (datasets.disable_progress_bars if hidden or not is_terminal() else datasets.enable_progress_bars)()
    start = time.perf_counter()
    try:
        yield
    except MixedSizes:
        if not datasets.are_progress_bars_disabled() and sys.stderr.isatty():
            sys.stderr.write("\x1b[A\x1b[2K")  # erase the bar that stays, as another one follows
        raise
    finally:
        (datasets.disable_progress_bars if were_disabled else datasets.enable_progress_bars)()
    if not hidden:
        log_only(f"{what:<11} {images:,} images in {format_duration(time.perf_counter() - start)}")


@contextlib.contextmanager
def _interrupts_first() -> Iterator[None]:
    """Raise Ctrl-C and signals themselves: `Dataset.map` hides them behind an error of its processes."""
    try:
        yield
    except Exception as fault:
        if isinstance(fault.__context__, KeyboardInterrupt | Terminated):
            raise fault.__context__ from None
        raise


@contextlib.contextmanager
def _same_environment() -> Iterator[None]:
    """Keep the object os.environ: `Dataset.map` puts a copy in its place, and libraries hold the original."""
    environment, names = os.environ, set(os.environ)
    try:
        yield
    finally:
        os.environ = environment  # noqa: B003  the very object
        for name in set(environment) - names:
            del environment[name]


def read_all(
    files: Sequence[str], reader: ImageReader, what: str, place: Path | None = None, hidden: bool = False
) -> datasets.Dataset:
    """A dataset with the reader's columns and a row for each file, in order; its Arrow files are at `place`.

    Without a place, they are temporary.
    """
    workers = count_cores() if count_cores() > 1 and len(files) > WORKERS_FROM else None
    at_once = PHOTOS_PER_TASK if reader.keeps == "mixed" else IMAGES_PER_TASK
    with (
        _progress(what, len(files), hidden),
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
            num_proc=workers,
            cache_file_name=str(place) if place else None,
            # By default, it would be a hash of everything that the reader holds.
            new_fingerprint=secrets.token_hex(8),
            desc=f"{what:<11}" if workers else what,  # "decoding    (num_proc=2)", as other bars begin
        )


def scan_images(root: Path, files: Sequence[str], show_progress: bool = False) -> list[ImageRecord]:
    """Decode every file and return its record, in the given order."""
    rows = read_all(files, ImageReader(root), "checking", hidden=not show_progress)
    return [
        ImageRecord(row["file"], row["mode"], (row["width"], row["height"]), row["digest"], row["fault"] or None)
        for row in rows
    ]
