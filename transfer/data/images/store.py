"""The store of a dataset's decoded images, which are kept in memory-mapped Arrow files, and batches from it."""

import contextlib
import hashlib
import itertools
import json
import math
import os
import shutil
from collections.abc import Sequence, Set
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image

from transfer.data.images import (
    ImageGeometry,
    ImageReader,
    ImageRecord,
    MixedSizes,
    read_all,
    read_image,
    reduced_size,
    to_rgb,
    view_pixels,
    whole_pixels,
)
from transfer.errors import UserError
from transfer.files import build_folder_once, datasets_cache, read_json
from transfer.runtime import shield_worker

STORE_FORMAT = 4  # raise it when pixels are made differently, so that older caches are not used

# Images of one size are kept as they are up to this many pixels per side, or up to the run's image size if that is
# larger: 50,000 of them then take at most 2.5 GB of disk.
LARGEST_KEPT_SIDE = 128
SAMPLED_SIZES = 200  # images, to estimate how much disk all of them take
FREE_SHARE = 0.9  # of the free disk may be filled: checkpoints need some as well


class PixelStore:
    """The images of a dataset as uint8 pixels, from memory-mapped Arrow files, or decoded whenever they are needed.

    - `size`: the (height, width) of all images if they are small and equal; they are kept as they are. Otherwise None:
      the evaluation view of every image is kept, and images to train on are kept whole as well.
    - `rows`: the row of each file.
    - `data_fingerprint`: a hash of the files' names and bytes.
    - `unreadable`: why a file could not be decoded, for each such file. Its pixels are black.
    - `why_uncached`: why images are decoded whenever they are needed; None if they are kept.
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
            # Memory-mapped: all processes share the same pages, and what is sent to a data worker are file names.
            images = datasets.concatenate_datasets(parts)
            kept = [name for name in ("pixels", "view") if name in images.column_names]
            self.columns = {name: images.select_columns([name]).with_format("arrow") for name in kept}
            shapes = images.select_columns(["pixels_height", "pixels_width"]).with_format("numpy")[:]
            self.shapes = np.stack([shapes["pixels_height"], shapes["pixels_width"]], 1)  # (N, 2)

    @property
    def cropped(self) -> bool:
        """Whether images to evaluate come resized and cropped by the geometry."""
        return self.size is None

    def take(self, rows: np.ndarray, whole: bool) -> tuple[np.ndarray, np.ndarray]:
        """The pixels of the images in these rows, as one line of bytes, and their (height, width) as (B, 2).

        Images of several sizes come as evaluation views, or `whole` for crops of them.
        """
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
        """(H, W, 3) pixels, equal to the kept ones. Raises `UserError` if the file can no longer be read."""
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
    # st_ctime_ns is the time of the last change of any kind. Nobody can set it back.
    return f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}"


def listing_key(root: Path, files: Sequence[str]) -> str:
    """Hash of the files' names, sizes and times of change, which tells changed data without reading them."""
    stamps = "".join(f"{file} {_stamp(f'{root}/{file}')}\n" for file in files)
    return hashlib.blake2b(os.fsencode(f"{STORE_FORMAT}\n{stamps}"), digest_size=16).hexdigest()


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


def _estimate_bytes(root: Path, files: Sequence[str], reader: ImageReader) -> int:
    """How much disk the decoded images will take, estimated from the sizes of some of them."""
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
    """Why a folder has no room for so many bytes, or None if it has."""
    place = next(folder for folder in (cache_dir, *cache_dir.parents) if folder.exists())
    free = shutil.disk_usage(place).free
    if needed <= FREE_SHARE * free:
        return None
    return (
        f"decoded, they take {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free in {cache_dir}; "
        "HF_DATASETS_CACHE chooses another place"
    )


def _fill(folder: Path, root: Path, files: Sequence[str], reader: ImageReader, may_fail: Set[str]) -> None:
    """Decode all files with the reader into Arrow files in a folder, and describe them in store.json.

    Raises `UserError` if files that are not in `may_fail` cannot be read, and `MixedSizes` as the reader does.
    """
    reader.mixed = folder / "mixed"
    rows = read_all(files, reader, "decoding" if reader.keeps else "checking", folder / "images.arrow")
    names = ["file", "digest", "fault", "is_transient", "height", "width"]
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
        "transient": list(itertools.compress(columns["file"], columns["is_transient"])),
    }
    (folder / "store.json").write_text(json.dumps(description))


def _is_valid(folder: Path, root: Path) -> bool:
    """Whether a store is there and up to date: the files with a transient fault still cannot be read."""
    try:
        description = read_json(folder / "store.json")
    except UserError:  # another process is replacing it
        return False
    return all(read_image(root, file)[0].is_transient for file in description["transient"])


def _name_of(reader: ImageReader) -> str:
    """The last part of the name of the folder with the reader's rows, which depends on the pixels that it keeps."""
    if reader.keeps != "mixed":
        return reader.keeps or "checked"
    assert reader.geometry is not None
    made = "\n".join([reader.geometry.rule, f"whole {reader.side}", *sorted(reader.train)])
    return hashlib.sha256(made.encode()).hexdigest()[:8]


def _find_or_build(
    cache_dir: Path,
    files: Sequence[str],
    reader: ImageReader,
    may_fail: Set[str],
    crops: bool,
    why_uncached: str | None,
) -> tuple[Path, str | None]:
    """(folder of the decoded images, None), or (folder without pixels, why they are not kept)."""
    root, geometry = reader.root, reader.geometry
    assert geometry is not None
    key = listing_key(root, files)

    def folder_of(reader: ImageReader) -> Path:
        return cache_dir / f"{key}-{_name_of(reader)}"

    def build(reader: ImageReader) -> Path:
        folder = folder_of(reader)
        return build_folder_once(
            folder,
            lambda f: _fill(f, root, files, reader, may_fail),
            "HF_DATASETS_CACHE",
            lambda: _is_valid(folder, root),
        )

    mixed = replace(reader, keeps="mixed")
    if not crops and not folder_of(mixed).is_dir():  # no training has made it
        mixed = replace(mixed, train=frozenset(), side=0)
    tried = [mixed]
    records = (read_image(root, file)[0] for file in files)
    width, height = next((record.size for record in records if not record.fault), (0, 0))
    if height and _is_small((height, width), geometry) and not folder_of(mixed).is_dir():
        tried.insert(0, replace(reader, keeps="same", size=(height, width)))
    for kept in tried if why_uncached is None else []:
        if not folder_of(kept).is_dir():
            why_uncached = _describe_lack(cache_dir, _estimate_bytes(root, files, kept))
        if why_uncached:
            break
        with contextlib.suppress(MixedSizes):
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
    """Return the store of these files' pixels. Missing or changed ones are first decoded into the datasets cache.

    Where images differ in size or are large, `train_files` are kept whole as well, their shorter side reduced to
    `train_side`. `crops=False` says that nothing is trained on crops of them: they are not kept whole, unless an
    earlier training kept them. If the disk has no room for the pixels, or `why_uncached` gives another reason, nothing
    is kept: files are checked once, and decoded to the same pixels whenever they are needed. Processes that ask at the
    same time decode once.

    Raises `UserError` that names the images that cannot be read, except those in `may_fail`.
    """
    cache_dir = cache_dir or datasets_cache("pixels")
    reader = ImageReader(root, geometry=geometry, side=train_side, train=frozenset(train_files))
    folder, why_uncached = _find_or_build(cache_dir, files, reader, frozenset(may_fail), crops, why_uncached)
    store = PixelStore(folder, root, files, geometry, train_side, why_uncached)
    # The run that made it may have had other files in `may_fail`.
    faults = {file: fault for file, fault in store.unreadable.items() if file not in may_fail}
    _refuse_faults(root, [ImageRecord(file, fault=faults.get(file)) for file in files] if faults else [])
    return store


# Batches


class PixelDataset(torch.utils.data.Dataset):
    """One split of a dataset, whose images come from a pixel store, for evaluation or for training.

    `__getitems__` gathers a whole batch: {"images": (B, 3, H, W) uint8} and, if the split has labels, "labels": (B,)
    int64. For training, images of several sizes are one line of bytes with a list of their "shapes", (height, width);
    `unpack_images` turns them into images.
    """

    def __init__(self, store: PixelStore, split: datasets.Dataset, for_training: bool = False):
        self.store, self.for_training = store, for_training
        # [:] reads a column at once; without it, each row would be looked up separately.
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
            # (B, 3, H, W) over memory in the order (B, H, W, 3): channels-last, which is fast for convolutions
            batch["images"] = images.view(len(shapes), *shapes[0].tolist(), 3).permute(0, 3, 1, 2)
        if self.labels is not None:
            batch["labels"] = torch.from_numpy(self.labels[positions])
        return batch

    def __getitem__(self, position: int) -> dict[str, Any]:
        batch = unpack_images(self.__getitems__([position]))
        return {name: values[0] for name, values in batch.items()}


def unpack_images(batch: dict[str, Any]) -> dict[str, Any]:
    """The batch, whose images of several sizes become a list of (3, H, W) uint8; other batches stay as they are."""
    if "shapes" not in batch:
        return batch
    parts = batch["images"].split([3 * height * width for height, width in batch["shapes"]])
    shaped = zip(parts, batch["shapes"], strict=True)
    images = [part.view(height, width, 3).permute(2, 0, 1) for part, (height, width) in shaped]
    return {name: values for name, values in batch.items() if name != "shapes"} | {"images": images}


def identity_collate(batch: dict[str, Any]) -> dict[str, Any]:
    """The batch as it is: a collate function for `PixelDataset`, which gathers whole batches."""
    return batch
