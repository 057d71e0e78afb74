"""How fast `python -m transfer.predict` is, compared with the model's bare forward pass.

    python benchmarks/predict_speed.py outputs/sample [--pictures 1000] [--repeats 5] [--json PATH]

The pictures are made up: JPEG, PNG, WebP and BMP files with sides of 48 to 500 pixels, in color, grayscale, with
transparency and with a palette. The two take turns; the ratio is the median of the ratios of the repeats.

- predict: reading, decoding, resizing and the forward pass of every file;
- forward: the same model on as many images, from one batch that is already in memory.
"""

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from PIL import Image

from transfer.predict import PictureClassifier, list_pictures, open_classifier, predict_pictures
from transfer.runs.record import describe_device, describe_versions
from transfer.runtime import tune_malloc

SIDES = (48, 500)  # pixels
SUFFIXES = {"RGB": ("jpg", "jpg", "jpg", "png", "webp", "bmp"), "L": ("jpg", "png"), "RGBA": ("png",), "P": ("png",)}
MODES = ("RGB",) * 6 + ("L", "RGBA", "P")


def write_pictures(folder: Path, count: int) -> None:
    """Fill a folder with pictures of smooth random shapes and some noise, which compress about as photos do."""
    choices, noise = random.Random(0), np.random.default_rng(0)
    for i in range(count):
        width, height = choices.randint(*SIDES), choices.randint(*SIDES)
        shapes = Image.fromarray(noise.integers(0, 256, (12, 12, 3), dtype=np.uint8)).resize((width, height))
        pixels = np.asarray(shapes) + noise.normal(0, 6, (height, width, 3))
        mode = choices.choice(MODES)
        picture = Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).convert(mode)
        picture.save(folder / f"{i}.{choices.choice(SUFFIXES[mode])}")


@torch.inference_mode()
def time_forward(classifier: PictureClassifier, count: int, batch_size: int) -> float:
    """Seconds of the forward pass alone."""
    pixels = torch.randn(batch_size, 3, *classifier.geometry.crop, device=classifier.model.device)
    pixels = pixels.contiguous(memory_format=torch.channels_last)
    start = time.perf_counter()
    for done in range(0, count, batch_size):
        labels = classifier.model(pixel_values=pixels[: count - done]).logits.argmax(-1).cpu()
    assert len(labels)
    return time.perf_counter() - start


def time_predict(classifier: PictureClassifier, files: Sequence[Path], batch_size: int) -> float:
    """Seconds from the files to their labels."""
    start = time.perf_counter()
    predictions, _ = predict_pictures(classifier, files, 3, batch_size)
    assert len(predictions) == len(files)
    return time.perf_counter() - start


def main() -> None:
    """Measure the model that the command line names and print the speeds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a finished run, a model folder or a Hub id")
    parser.add_argument("--pictures", type=int, default=1000)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="where to write the numbers")
    options = parser.parse_args()
    tune_malloc()
    classifier = open_classifier(options.model)
    rounds = []
    with tempfile.TemporaryDirectory() as folder:
        write_pictures(Path(folder), options.pictures)
        files, _ = list_pictures([folder])
        time_predict(classifier, files[: 2 * options.batch_size], options.batch_size)  # the first batches are slower
        for repeat in range(options.repeats):
            contenders = {
                "predict": lambda: time_predict(classifier, files, options.batch_size),
                "forward": lambda: time_forward(classifier, len(files), options.batch_size),
            }
            order = list(contenders) if repeat % 2 else list(reversed(contenders))
            rounds.append({name: contenders[name]() for name in order})
    speeds = {who: len(files) / statistics.median(r[who] for r in rounds) for who in ("predict", "forward")}
    results = {
        "device": describe_device(),
        "versions": describe_versions(),
        "pictures": len(files),
        "images_per_second": speeds,
        "ratio": statistics.median(r["forward"] / r["predict"] for r in rounds),
    }
    print(f"predict {speeds['predict']:.0f} images/s, forward {speeds['forward']:.0f}, ratio {results['ratio']:.2f}")
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
