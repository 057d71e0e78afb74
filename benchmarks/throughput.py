"""How fast this project trains, predicts and prepares data, compared with the standard recipe and with a ceiling.

    accelerate launch --config_file accelerate_config.yaml benchmarks/throughput.py [--json PATH] [--cases atto]

In each repeat the contenders take turns, each time starting with another one, so that a machine whose speed drifts
slows all of them. The numbers are medians over the repeats, and a ratio is the median of the ratios of the repeats.

- project: FinetuningTrainer over decoded pixels, with augmentation of whole batches;
- stock: the standard Hugging Face recipe for image classification, with PIL transforms of each image through
  `set_transform` and the default Trainer, in its own process, on as many cores but without this project's memory
  settings;
- ceiling: a bare loop over one synthetic batch that is already in memory; the same model, precision and batch size.

timm's train.py is not among them: it needs torchvision, which PyPI does not have for the CPU build of torch.
"""

import argparse
import copy
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F
import transformers
from transformers import (
    ConvNextConfig,
    ConvNextForImageClassification,
    ConvNextImageProcessor,
    ConvNextV2Config,
    ConvNextV2ForImageClassification,
    EfficientNetForImageClassification,
    Trainer,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

from benchmarks.stock import stock_trainer
from data_loading import load_dataset, open_data
from transfer.config import FinetuningArguments
from transfer.data.images import ImageGeometry
from transfer.data.images.store import PixelDataset, PixelStore, open_pixel_store
from transfer.models.build import Classifier
from transfer.models.cpu_kernels import apply_cpu_speedups, use_plain_attention
from transfer.models.load import read_geometry
from transfer.models.offline import offline_backbone
from transfer.runs.record import describe_device, describe_versions
from transfer.runs.timing import StepTimer
from transfer.runtime import resolve_mixed_precision, tune_malloc, use_all_cores
from transfer.training.trainer import FinetuningTrainer
from transfer.transforms.evaluation import EvaluationTransform
from transfer.transforms.training import TrainTransform, enough_pixels

CLASSES = 100
SMALLEST_CROP = 0.35  # of the area: the default of --min_crop_scale


def square(size: int) -> ViTImageProcessor:
    return ViTImageProcessor(size={"height": size, "width": size})


def convnext_atto():
    config = ConvNextConfig(hidden_sizes=[40, 80, 160, 320], depths=[2, 2, 6, 2], num_labels=CLASSES)
    return ConvNextForImageClassification(config), ConvNextImageProcessor(size={"shortest_edge": 64}, crop_pct=1.0)


def efficientnet_lite0():
    model = EfficientNetForImageClassification.from_pretrained(
        offline_backbone(), num_labels=CLASSES, ignore_mismatched_sizes=True
    )
    return model, square(160)


def vit(hidden: int, heads: int):
    config = ViTConfig(hidden_size=hidden, num_attention_heads=heads, intermediate_size=4 * hidden, num_labels=CLASSES)
    return ViTForImageClassification(config), square(224)


def convnextv2_base():
    config = ConvNextV2Config(hidden_sizes=[128, 256, 512, 1024], depths=[3, 3, 27, 3], num_labels=CLASSES)
    return ConvNextV2ForImageClassification(config), square(224)


# name: (title, model and processor, batch size, steps per repeat)
CASES = {
    "atto": ("ConvNeXt-atto, 64 px", convnext_atto, 64, 20),
    "lite0": ("EfficientNet-Lite0, 160 px", efficientnet_lite0, 64, 5),
    "vit_ti": ("ViT-Ti/16, 224 px", lambda: vit(192, 3), 64, 5),
}
GPU_CASES = {
    "vit_b": ("ViT-B/16, 224 px", lambda: vit(768, 12), 256, 20),
    "convnextv2_b": ("ConvNeXt V2-B, 224 px", convnextv2_base, 128, 20),
}


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def autocast(trainer: Trainer):
    """The mixed precision in which a Trainer trains: it is accelerate's, and not in the Trainer's arguments."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(trainer.accelerator.mixed_precision)
    return torch.autocast(trainer.args.device.type, dtype, enabled=dtype is not None)


class Ceiling:
    """A bare PyTorch loop: the speed that the hardware allows for this model and batch size."""

    def __init__(self, model, size: int, batch: int, trainer: Trainer):
        self.trainer, device = trainer, trainer.args.device
        self.model = model.to(device, memory_format=torch.channels_last)
        pixels = torch.randn(batch, 3, size, size, device=device)
        self.pixels = pixels.contiguous(memory_format=torch.channels_last)
        self.labels = torch.randint(CLASSES, (batch,), device=device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, weight_decay=0.05, fused=True)

    def train(self, steps: int) -> float:
        """Median seconds a step."""
        self.model.train()
        times = []
        for _ in range(steps):
            start = time.perf_counter()
            with autocast(self.trainer):
                logits = self.model(pixel_values=self.pixels).logits
            F.cross_entropy(logits.float(), self.labels).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            synchronize()
            times.append(time.perf_counter() - start)
        return statistics.median(times)

    def predict(self, images: int) -> float:
        """Seconds for that many images, in fp32 as the project's predictions are."""
        self.model.eval()
        start = time.perf_counter()
        with torch.inference_mode():
            for done in range(0, images, len(self.pixels)):
                self.model(pixel_values=self.pixels[: images - done]).logits.argmax(-1)
        synchronize()
        return time.perf_counter() - start


def train_timed(trainer: Trainer, steps: int) -> float:
    """Median seconds a step of a Trainer's own loop."""
    timer = StepTimer()
    trainer.add_callback(timer)
    trainer.train()
    trainer.pop_callback(timer)
    return statistics.median(timer.seconds(warm_up=1))


def time_prediction(trainer: FinetuningTrainer) -> float:
    """Seconds to predict all validation images."""
    start = time.perf_counter()
    trainer.predict_logits(trainer.eval_dataset)
    return time.perf_counter() - start


def take_turns(contenders: dict[str, Callable[[], float]], repeat: int) -> dict[str, float]:
    """The measurement of each contender; every repeat starts with another one."""
    names = list(contenders)
    first = repeat % len(names)
    return {name: contenders[name]() for name in names[first:] + names[:first]}


def quiet(folder: str, batch: int, steps: int) -> dict:
    """Arguments of both Trainers."""
    return {
        "output_dir": folder,
        "max_steps": steps + 2,
        "per_device_train_batch_size": batch,
        "per_device_eval_batch_size": batch,
        "eval_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "logging_strategy": "no",
    }


def open_store(folder, geometry: ImageGeometry) -> PixelStore:
    """The decoded images of a dataset, for crops as `project_trainer` draws them."""
    side = enough_pixels(geometry.crop, SMALLEST_CROP)
    return open_pixel_store(folder.root, folder.files, geometry, train_files=folder.train_files, train_side=side)


def project_trainer(model, processor, store, dataset, arguments: dict) -> FinetuningTrainer:
    view = EvaluationTransform(read_geometry(processor), store.cropped)
    training = TrainTransform(view, [view.geometry.crop[0]], SMALLEST_CROP)
    args = FinetuningArguments(**arguments, load_best_model_at_end=False)
    train, test = PixelDataset(store, dataset["train"], for_training=True), PixelDataset(store, dataset["test"])
    return FinetuningTrainer(Classifier(model, processor), args, view, training, train, test, layer_decay=0.9)


def serve_stock(pipe, name: str, data_dir: str, steps: int) -> None:
    """The process of the standard recipe: times one repeat on each request."""
    use_all_cores()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    _, build, batch, _ = (CASES | GPU_CASES)[name]
    model, processor = build()
    dataset = load_dataset(open_data(data_dir))
    with tempfile.TemporaryDirectory() as scratch:
        size = read_geometry(processor).crop[0]
        trainer = stock_trainer(model, processor, size, dataset, quiet(scratch, batch, steps))
        while pipe.recv():
            pipe.send(train_timed(trainer, steps))


class Stock:
    """The standard recipe, in its own process."""

    def __init__(self, name: str, data_dir: str, steps: int):
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve_stock, args=(theirs, name, data_dir, steps), daemon=True)
        self.process.start()
        theirs.close()  # otherwise recv would wait forever if the process dies

    def train(self) -> float:
        """Median seconds a step."""
        self.pipe.send(True)
        return self.pipe.recv()

    def close(self) -> None:
        self.pipe.send(False)
        self.process.join()


def measure_case(name: str, repeats: int, dataset, folder, data_dir: str) -> dict:
    """One model: training against both, prediction against the ceiling."""
    title, build, batch, steps = (CASES | GPU_CASES)[name]
    model, processor = build()
    apply_cpu_speedups(model)
    geometry = read_geometry(processor)
    size = geometry.crop[0]
    use_plain_attention(model, (batch, size), (batch, size))
    store = open_store(folder, geometry)
    rounds = []
    with tempfile.TemporaryDirectory() as scratch:
        arguments = quiet(scratch, batch, steps)
        ours = project_trainer(copy.deepcopy(model), processor, store, dataset, arguments)
        stock = Stock(name, data_dir, steps)
        stock.train()  # the first repeat of each would be slower
        train_timed(ours, steps)
        ceiling = Ceiling(model, size, batch, ours)
        ceiling.train(2)
        tested = len(ours.eval_dataset)
        trainings = {
            "project": lambda: train_timed(ours, steps),
            "ceiling": lambda: ceiling.train(steps),
            "stock": stock.train,
        }
        predictions = {"predict": lambda: time_prediction(ours), "forward": lambda: ceiling.predict(tested)}
        for repeat in range(repeats):
            rounds.append(take_turns(trainings, repeat) | take_turns(predictions, repeat))
            print(f"  {title}: repeat {repeat + 1} of {repeats}", file=sys.stderr, flush=True)
        stock.close()

    def rate(contender: str, images: int) -> float:
        return images / statistics.median(r[contender] for r in rounds)

    def ratio(slower: str, faster: str) -> float:
        return statistics.median(r[slower] / r[faster] for r in rounds)

    return {
        "case": title,
        "batch": batch,
        "repeats": repeats,
        "images_per_second": {who: rate(who, batch) for who in ("project", "stock", "ceiling")},
        "ratio_to_ceiling": ratio("ceiling", "project"),
        "ratio_to_stock": ratio("stock", "project"),
        "prediction": {
            "images": tested,
            "images_per_second": {"project": rate("predict", tested), "ceiling": rate("forward", tested)},
            "ratio_to_ceiling": ratio("forward", "predict"),
        },
    }


def measure_data(data_dir: str) -> dict:
    """Seconds from the zip or folder to the first batch: nothing cached, then everything."""
    import datasets

    geometry = read_geometry(square(64))
    times = {}
    with tempfile.TemporaryDirectory() as cache:
        datasets.config.HF_DATASETS_CACHE, before = Path(cache), datasets.config.HF_DATASETS_CACHE
        for state in ("cold", "warm"):
            start = time.perf_counter()
            folder = open_data(data_dir)
            dataset = load_dataset(folder)
            opened = time.perf_counter()
            store = open_store(folder, geometry)
            PixelDataset(store, dataset["train"], for_training=True).__getitems__(range(64))
            end = time.perf_counter()
            times[state] = {"seconds": end - start, "of_it_on_the_cache": end - opened, "images": len(folder.files)}
        datasets.config.HF_DATASETS_CACHE = before
    return times


def table(results: dict) -> str:
    """The results as a Markdown table."""
    lines = [
        "| model | this project | stock recipe | ceiling | of ceiling | times stock |",
        "|---|---|---|---|---|---|",
    ]
    for case in results["training"].values():
        speed = case["images_per_second"]
        lines.append(
            f"| {case['case']}, batch {case['batch']} | {speed['project']:.0f} | {speed['stock']:.0f} "
            f"| {speed['ceiling']:.0f} | {case['ratio_to_ceiling']:.2f} | {case['ratio_to_stock']:.2f} |"
        )
        p = case["prediction"]
        lines.append(
            f"| prediction | {p['images_per_second']['project']:.0f} | | {p['images_per_second']['ceiling']:.0f} "
            f"| {p['ratio_to_ceiling']:.2f} | |"
        )
    for state, took in results["data"].items():
        lines.append(
            f"\ndata to first batch, {state}: {took['seconds']:.2f} s for {took['images']} images, "
            f"{took['of_it_on_the_cache']:.2f} s of it to decode the images, or to open them decoded"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure what the command line names and print it."""
    known = CASES | (GPU_CASES if torch.cuda.is_available() else {})
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=list(CASES | GPU_CASES), default=list(known))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--data_dir", default="sample", help="images to train on, and for the data case")
    parser.add_argument("--json", type=Path, help="where to write the numbers")
    options = parser.parse_args()
    print(resolve_mixed_precision())
    use_all_cores()
    tune_malloc()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    folder = open_data(options.data_dir)
    dataset = load_dataset(folder)
    results = {
        "device": describe_device(),
        "versions": describe_versions(),
        "data": measure_data(options.data_dir),
        "training": {
            name: measure_case(name, options.repeats, dataset, folder, options.data_dir) for name in options.cases
        },
    }
    print(table(results))
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
