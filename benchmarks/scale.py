"""How the input of a training grows with the number of photographs, beside the standard recipe's.

    python benchmarks/scale.py --images 1000 3000 [--repeats 3] [--json PATH] [--plot PATH.png]

JPEG photographs of several sizes are generated into a temporary folder, which --folder moves. For each number of them:
time and disk to prepare them, seconds to the first batch with nothing cached and afterwards, images/s of the input
alone (from files to normalized crops at 224 px, no model), and the peak memory, without the files that are mapped.

- cached: this project, with pixels in the datasets cache;
- uncached: this project with --cache_images false;
- stock: the standard recipe, PIL transforms of each image through `set_transform`.

Each is measured in its own process, with as many data workers as cores. They take turns, each repeat starting with
another one; speeds are medians over the repeats, and a ratio is the median of the ratios of the repeats.
"""

import argparse
import io
import json
import multiprocessing
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import datasets
import numpy as np
import psutil
import torch
from PIL import Image

from benchmarks.stock import collate, random_view, transform
from benchmarks.throughput import square, take_turns
from data_loading import load_dataset, open_data
from transfer.data.images.store import PixelDataset, identity_collate, open_pixel_store, unpack_images
from transfer.models.load import read_geometry
from transfer.runs.record import describe_device
from transfer.runtime import count_cores, tune_malloc
from transfer.transforms.evaluation import EvaluationTransform
from transfer.transforms.training import TrainTransform, enough_pixels, seeded_generator

SIZES = ((500, 375), (375, 500), (500, 375), (640, 480), (500, 333), (1024, 683))  # width, height
CLASSES, SCENES = 10, 24
SIDE, BATCH, MIN_SCALE = 224, 64, 0.35
MEASURED = 1500  # images, for each speed
CONTENDERS = ("cached", "uncached", "stock")

try:
    from matplotlib import pyplot, ticker
except ImportError:
    pyplot = None


def draw_scene(width: int, height: int, seed: int) -> bytes:
    """A JPEG with as much detail as a photograph: about 0.3 bytes per pixel."""
    random = np.random.default_rng(seed)
    pixels = np.zeros((height, width, 3))
    for cells, strength in ((6, 90), (24, 50), (90, 25)):
        small = random.normal(0, strength, (cells, cells, 3)).clip(-127, 127) + 128
        grown = Image.fromarray(small.astype(np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
        pixels += np.asarray(grown, np.float64) - 128
    pixels += random.normal(0, 6, pixels.shape)
    content = io.BytesIO()
    Image.fromarray((pixels + 128).clip(0, 255).astype(np.uint8)).save(content, "JPEG", quality=88)
    return content.getvalue()


def write_photographs(folder: Path, count: int, sizes: tuple) -> int:
    """Write `count` photographs in class folders; returns their bytes. A comment makes each file's bytes its own."""
    scenes = [draw_scene(*sizes[i % len(sizes)], i) for i in range(SCENES)]
    for label in range(CLASSES):
        (folder / "train" / f"class_{label}").mkdir(parents=True)
    total = 0
    for i in range(count):
        text, scene = f"{i:08}".encode(), scenes[i % SCENES]
        content = scene[:2] + b"\xff\xfe" + (len(text) + 2).to_bytes(2, "big") + text + scene[2:]
        (folder / "train" / f"class_{i * 7 % CLASSES}" / f"{i:08}.jpg").write_bytes(content)
        total += len(content)
    return total


class PeakMemory(threading.Thread):
    """The most memory, in bytes, that this process and its children held, without the files that they map."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak, self.ended = 0, threading.Event()

    def run(self) -> None:
        me = psutil.Process()
        while not self.ended.wait(0.1):
            held = 0
            for process in [me, *me.children(recursive=True)]:
                try:
                    memory = process.memory_info()
                    held += memory.rss - memory.shared
                except psutil.Error:
                    continue
            self.peak = max(self.peak, held)


def load_batches(images, collate_fn: Callable) -> torch.utils.data.DataLoader:
    """Batches in random order, by a worker on each core."""
    return torch.utils.data.DataLoader(
        images,
        BATCH,
        shuffle=True,
        num_workers=count_cores(),
        collate_fn=collate_fn,
        multiprocessing_context="fork",  # a spawned process would spawn them
    )


def stock_batches(folder: Path) -> Iterator[torch.Tensor]:
    split = load_dataset(open_data(str(folder)))["train"]
    split = split.with_transform(transform(random_view(SIDE, np.random.default_rng(0)), square(SIDE)))
    for batch in load_batches(split, collate):
        yield batch["pixel_values"]


def project_batches(folder: Path, is_cached: bool) -> Iterator[torch.Tensor]:
    data, geometry = open_data(str(folder)), read_geometry(square(SIDE))
    split, side = load_dataset(data)["train"], enough_pixels([SIDE], MIN_SCALE)
    why = None if is_cached else "measured"
    store = open_pixel_store(
        data.root, data.files, geometry, train_files=data.train_files, train_side=side, why_uncached=why
    )
    view = TrainTransform(EvaluationTransform(geometry, store.cropped), [SIDE], MIN_SCALE)
    images = PixelDataset(store, split, for_training=True)
    for step, batch in enumerate(load_batches(images, identity_collate)):
        batch = unpack_images(batch)
        yield view(batch["images"], batch["labels"], seeded_generator(0, step))[0]


def measure(contender: str, folder: Path, cache: Path) -> dict[str, float]:
    """Seconds to the first batch, images/s after it and peak memory; in a process of its own."""
    datasets.config.HF_DATASETS_CACHE = cache
    datasets.disable_progress_bars()
    tune_malloc()
    memory = PeakMemory()
    memory.start()
    start = time.perf_counter()
    batches = stock_batches(folder) if contender == "stock" else project_batches(folder, contender == "cached")
    next(batches)
    first = time.perf_counter()
    images = sum(len(batch) for batch, _ in zip(batches, range(MEASURED // BATCH), strict=False))
    speed = images / (time.perf_counter() - first)
    memory.ended.set()
    return {"first_batch": first - start, "speed": speed, "memory": memory.peak}


def in_own_process(*arguments) -> dict[str, float]:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measure, *arguments).result()


def measure_count(count: int, sizes: tuple, repeats: int, place: Path) -> dict:
    """One row of the table."""
    folder, cache = place / "photographs", place / "cache"
    total = write_photographs(folder, count, sizes)
    try:
        cold = {name: in_own_process(name, folder, cache / name) for name in CONTENDERS}
        disk = {name: sum(f.stat().st_size for f in (cache / name).rglob("*") if f.is_file()) for name in CONTENDERS}
        rounds = []
        for repeat in range(repeats):
            turns = {name: lambda name=name: in_own_process(name, folder, cache / name) for name in CONTENDERS}
            rounds.append(take_turns(turns, repeat))
            print(f"  {count} images: repeat {repeat + 1} of {repeats}", file=sys.stderr, flush=True)
    finally:
        shutil.rmtree(place, ignore_errors=True)
    row: dict = {"images": count, "file_bytes": total, "contenders": {}}
    for name in CONTENDERS:
        row["contenders"][name] = {
            "cold_seconds": cold[name]["first_batch"],
            "warm_seconds": statistics.median(r[name]["first_batch"] for r in rounds),
            "disk_bytes": disk[name],
            "images_per_second": statistics.median(r[name]["speed"] for r in rounds),
            "times_stock": statistics.median(r[name]["speed"] / r["stock"]["speed"] for r in rounds),
            "memory_bytes": max(r[name]["memory"] for r in [cold, *rounds]),
        }
    return row


def table(rows: list[dict]) -> str:
    """The results as the docs show them."""
    lines = [
        "| photographs | input | first batch, cold | first batch, warm | disk | images/s | times stock | memory |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        for name, found in row["contenders"].items():
            lines.append(
                f"| {row['images']:,} ({row['file_bytes'] / 1e6:,.0f} MB) | {name} | {found['cold_seconds']:.1f} s "
                f"| {found['warm_seconds']:.1f} s | {found['disk_bytes'] / 1e6:,.0f} MB "
                f"| {found['images_per_second']:,.0f} | {found['times_stock']:.2f} "
                f"| {found['memory_bytes'] / 1e6:,.0f} MB |"
            )
    return "\n".join(lines)


def draw_plot(rows: list[dict], path: Path) -> None:
    """How each quantity grows with the number of photographs."""
    titles = {
        "cold_seconds": ("first batch, nothing cached (s)", 1),
        "warm_seconds": ("first batch afterwards (s)", 1),
        "images_per_second": ("images/s of the input alone", 1),
        "disk_bytes": ("disk for decoded images (GB)", 1e9),
        "memory_bytes": ("peak memory of all processes (GB)", 1e9),
    }
    counts = [row["images"] for row in rows]
    figure, axes = pyplot.subplots(2, 3, figsize=(12, 6.5), layout="constrained")
    for axis, (quantity, (title, unit)) in zip(axes.flat, titles.items(), strict=False):
        for name, style in zip(CONTENDERS, ("o-", "s-", "^--"), strict=True):
            values = [row["contenders"][name][quantity] / unit for row in rows]
            axis.plot(counts, values, style, label=name, alpha=0.8)
        axis.margins(0.08)
        axis.set(
            title=title, xlabel="photographs", xlim=(0, None), ylim=(0, None)
        )  # a proportional cost is a straight line
        axis.xaxis.set_major_formatter(ticker.StrMethodFormatter("{x:,.0f}"))
        axis.xaxis.set_major_locator(ticker.MaxNLocator(5, steps=[1, 2, 5, 10]))
        axis.grid(alpha=0.3)
    axes.flat[-1].axis("off")
    axes.flat[-1].legend(*axes.flat[0].get_legend_handles_labels(), loc="center", title="input")
    figure.savefig(path, dpi=150)


def main() -> None:
    """Measure what the command line names and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", nargs="+", type=int, default=[1000, 3000], help="up to 100,000 and more")
    parser.add_argument("--width", type=int, help="with --height: all photographs have this size")
    parser.add_argument("--height", type=int)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where photographs and caches go: 0.5 MB for each photograph")
    parser.add_argument("--json", type=Path, help="where to write the numbers")
    parser.add_argument("--plot", type=Path, help="where to draw how they grow; needs matplotlib")
    options = parser.parse_args()
    if options.plot and pyplot is None:
        parser.error("--plot: pip install matplotlib")
    sizes = ((options.width, options.height),) if options.width and options.height else SIZES
    rows = []
    for count in options.images:
        with tempfile.TemporaryDirectory(dir=options.folder) as place:
            rows.append(measure_count(count, sizes, options.repeats, Path(place)))
        print(table(rows[-1:]), flush=True)
    print(f"\n{describe_device()}\n{table(rows)}")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")
    if options.plot:
        draw_plot(rows, options.plot)


if __name__ == "__main__":
    main()
