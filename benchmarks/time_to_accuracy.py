"""Validation accuracy over training time: a recipe of this project, and others at their best learning rate.

    accelerate launch --config_file accelerate_config.yaml benchmarks/time_to_accuracy.py recipes/offline_lite0.yaml \\
        --data_dir DATA.zip [--minutes 10 30] [--peers stock fastai timm] [--json PATH] [--plot PATH]

All use the same checkpoint, machine, split and precision. `stock` is the standard recipe (benchmarks/stock.py), the
only peer by default. For every budget, the learning-rate schedule ends with the budget: steps are timed for a tenth of
it to find their number. Evaluations do not count as training time; they use all validation images at the end and some
of them before. The learning rate of the standard recipe is the best of `--learning_rates` on the validation images at
the shortest budget. fastai and timm (benchmarks/peers.py) have three of their own, at the recipe's first training
size, and then try its last size with the best one. On two CPU cores, the default budgets take a little over two hours;
without `stock` 50 minutes, and 70 more for each of fastai and timm. Results are written after every training, those of
fastai and timm once their settings are chosen.
"""

import argparse
import copy
import itertools
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import transformers
from accelerate.utils import set_seed
from torch.utils.data import Dataset, Subset
from transformers import AutoImageProcessor, AutoModelForImageClassification, Trainer, TrainerCallback

from benchmarks.peers import PEERS, Peer
from benchmarks.stock import stock_trainer
from data_loading import find_data, load_dataset
from finetune_vit import make_trainer
from transfer.cli import parse_command_line
from transfer.models.build import prepare_model
from transfer.models.load import locate_checkpoint
from transfer.runs import RunContext
from transfer.runs.record import describe_device, describe_versions
from transfer.runs.timing import StepTimer
from transfer.runtime import resolve_mixed_precision, tune_malloc, use_all_cores

try:
    from matplotlib import pyplot
except ImportError:
    pyplot = None

STOCK = "stock"  # the name of the standard recipe
POINTS = 8  # of a curve, after the one before training
POINT_IMAGES = 1000  # validation images of all points but the last
TIMED_STEPS, WARM_UP_STEPS = 12, 4
TIMED_SHARE = 0.1  # of the budget, timed before it: a shared machine's speed changes for tens of seconds
QUIET = {
    "eval_strategy": "no",
    "save_strategy": "no",
    "logging_strategy": "no",
    "load_best_model_at_end": False,
    "report_to": "none",
    "disable_tqdm": True,
}


class Curve(TrainerCallback):
    """Seconds of training and validation accuracy: before the first step, then at equal distances."""

    def __init__(self, trainer: Trainer):
        self.trainer, self.points, self.seconds = trainer, [], 0.0
        held_out = trainer.eval_dataset  # class after class: equal strides take equally many of each
        self.some = Subset(held_out, range(0, len(held_out), math.ceil(len(held_out) / POINT_IMAGES)))

    def add_point(self, images: Dataset) -> None:
        measured = self.trainer.evaluate(images)
        self.points.append([self.seconds, max(measured["eval_accuracy"], measured.get("eval_ema_accuracy", 0))])
        self.start = time.perf_counter()

    def on_train_begin(self, args, state, control, **kwargs):
        self.add_point(self.some)

    def on_step_end(self, args, state, control, **kwargs):
        if (state.global_step * POINTS) % state.max_steps < POINTS:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.seconds += time.perf_counter() - self.start  # of steps, and of the images they waited for
            self.add_point(self.trainer.eval_dataset if state.global_step == state.max_steps else self.some)


def seconds_a_step(make, steps: int) -> float:
    """Mean time of a contender's step, those with smaller images among them, on a trainer that is thrown away."""
    trainer, timer = make(steps), StepTimer()
    trainer.add_callback(timer)
    trainer.train()
    return statistics.mean(timer.seconds(WARM_UP_STEPS))


def train_for(make, minutes: float) -> list[list[float]]:
    """The curve of a training whose schedule ends after so many minutes."""
    timed = max(TIMED_STEPS, int(TIMED_SHARE * 60 * minutes / seconds_a_step(make, TIMED_STEPS)))
    steps = max(POINTS, int(60 * minutes / seconds_a_step(make, timed)))
    trainer = make(steps)
    curve = Curve(trainer)
    trainer.add_callback(curve)
    trainer.train()
    print(f"  {steps} steps, {curve.seconds / 60:.1f} min: accuracy {curve.points[-1][1]:.4f}", flush=True)
    return curve.points


def stock_maker(context: RunContext, args, scratch: str, learning_rate: float):
    """make(steps) is the Trainer of the standard recipe for so many steps."""
    source = locate_checkpoint(context.run.model_name_or_path)
    size = (context.run.train_image_size or [context.run.image_size])[0]
    batches = {
        name: getattr(args, name) for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "seed")
    }

    def make(steps: int) -> Trainer:
        set_seed(args.seed)
        model = AutoModelForImageClassification.from_pretrained(
            source, num_labels=len(context.data.class_ids), ignore_mismatched_sizes=True, dtype="float32"
        )
        settings = QUIET | batches | {"output_dir": scratch, "max_steps": steps, "learning_rate": learning_rate}
        processor = AutoImageProcessor.from_pretrained(source)
        return stock_trainer(model, processor, size or processor.size["height"], context.dataset, settings)

    return make


def project_maker(context: RunContext, args, scratch: str):
    """make(steps) is the Trainer of this project for so many steps."""

    def make(steps: int) -> Trainer:
        own = copy.copy(args)
        for name, value in QUIET.items():
            setattr(own, name, {"report_to": []}.get(name, value))
        own.output_dir, own.max_steps = scratch, steps
        return make_trainer(context, own, prepare_model(context.run, own, context.data))

    return make


def first_time(points: list[list[float]], accuracy: float) -> float | None:
    """Seconds after which a curve has reached an accuracy, between its points linearly; None if it never has."""
    before = points[0]
    if before[1] >= accuracy:
        return before[0]
    for seconds, reached in points[1:]:
        if reached >= accuracy:
            share = (accuracy - before[1]) / (reached - before[1])
            return before[0] + share * (seconds - before[0])
        before = (seconds, reached)
    return None


def error_ratio(accuracy: float, other: float) -> float:
    """How many errors there are for each one of the other's."""
    return (1 - accuracy) / (1 - other) if other < 1 else math.inf


def compare(project: list[list[float]], stock: list[list[float]] | None) -> dict:
    """The curves of one budget, and their ratios of error and time."""
    if stock is None:
        return {"project": project}
    seconds, accuracy = stock[-1]
    reached = first_time(project, accuracy)
    return {
        STOCK: stock,
        "project": project,
        "error_ratio": error_ratio(project[-1][1], accuracy),
        "time_ratio": None if reached is None else reached / seconds,
    }


def draw(results: dict, path: Path) -> None:
    """The curves as a picture."""
    figure, axes = pyplot.subplots(figsize=(7, 4))
    for color, (minutes, outcome) in enumerate(results["budgets"].items()):
        for who, style in (("project", "-"), (STOCK, "--")):
            if who not in outcome:
                continue
            times, accuracies = zip(*outcome[who], strict=True)
            label = f"{who}, {minutes} min"
            axes.plot([t / 60 for t in times], accuracies, style, color=f"C{color}", marker="o", label=label)
    for name, marker in zip(results.get("peers", {}), "s^", strict=False):
        reached = results["peers"][name]["budgets"]
        axes.plot([float(minutes) for minutes in reached], list(reached.values()), f"k{marker}", label=name)
    axes.set(xlabel="minutes of training", ylabel="validation accuracy")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, bbox_inches="tight", dpi=150)


def train_peer(peer: Peer, name: str, size: int, learning_rate: float, minutes: float) -> float:
    """Its validation accuracy after so many minutes, which is also printed."""
    print(f"{name}, {minutes:g} min, {size} px, learning rate {learning_rate:g}", flush=True)
    accuracy = PEERS[name][2](peer, size, learning_rate, minutes)
    print(f"  accuracy {accuracy:.4f}", flush=True)
    return accuracy


def measure_peers(peer: Peer, names: list[str], minutes: list[float]) -> Iterator[dict]:
    """Tune every peer at the shortest budget and measure it at all of them; yields the results so far."""
    shortest, found = min(minutes), {name: {"settings": {}, "budgets": {}} for name in names}
    for name in names:
        first, *last = peer.sizes
        tried = {(first, rate): train_peer(peer, name, first, rate, shortest) for rate in PEERS[name][1]}
        _, rate = max(tried, key=tried.get)
        tried |= {(size, rate): train_peer(peer, name, size, rate, shortest) for size in last}
        best = max(tried, key=tried.get)
        found[name]["settings"] = {f"{size} px, {rate:g}": accuracy for (size, rate), accuracy in tried.items()}
        for budget in sorted(minutes):
            accuracy = tried[best] if budget == shortest else train_peer(peer, name, *best, budget)
            found[name]["budgets"][f"{budget:g}"] = accuracy
            yield {"peers": found}


def measure(context: RunContext, args, minutes: list[float], learning_rates: list[float]) -> Iterator[dict]:
    """Measure this project and the standard recipe at every budget; yields the results so far after every training.

    Without learning rates, the standard recipe is left out.
    """
    results = {"learning_rates": {}, "budgets": {}}
    with tempfile.TemporaryDirectory() as scratch:
        shortest, curves = min(minutes), {}
        for rate in learning_rates:
            print(f"stock, {shortest:g} min, learning rate {rate:g}", flush=True)
            curves[rate] = train_for(stock_maker(context, args, scratch, rate), shortest)
            results["learning_rates"][f"{rate:g}"] = curves[rate][-1][1]
            yield results
        best = max(curves, key=lambda rate: curves[rate][-1][1], default=None)
        for budget in sorted(minutes):
            print(f"project, {budget:g} min", flush=True)
            ours, stock = train_for(project_maker(context, args, scratch), budget), curves.get(best)
            if stock and budget != shortest:
                print(f"stock, {budget:g} min, learning rate {best:g}", flush=True)
                stock = train_for(stock_maker(context, args, scratch, best), budget)
            results["budgets"][f"{budget:g}"] = compare(ours, stock)
            yield results


def main() -> None:
    """Measure, print the ratios, write what was asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,  # --learning_rate is the recipe's, not short for --learning_rates
    )
    parser.add_argument("recipe", help="recipe of this project; its peers use its checkpoint")
    parser.add_argument("--minutes", nargs="+", type=float, default=[10, 30], help="budgets of training time")
    parser.add_argument(
        "--learning_rates",
        nargs="+",
        type=float,
        default=[2e-4, 5e-4, 2e-3],
        help="learning rates that the standard recipe tries, if it is among the peers",
    )
    parser.add_argument(
        "--peers",
        nargs="+",
        choices=[STOCK, *PEERS],
        default=[STOCK],
        help="what to compare with: the standard recipe and other libraries",
    )
    parser.add_argument("--json", type=Path, help="where to write the curves")
    parser.add_argument("--plot", type=Path, help="where to draw them, such as curves.png; needs matplotlib")
    options, flags = parser.parse_known_args()
    if options.plot and pyplot is None:
        parser.error("--plot: pip install matplotlib")
    libraries = [name for name in options.peers if name != STOCK]
    for name in libraries:
        if PEERS[name][0] is None:
            parser.error(f"--peers: pip install {name}, beside a torchvision that matches PyTorch")
    print(resolve_mixed_precision())
    use_all_cores()
    tune_malloc()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    run, args = parse_command_line([options.recipe, *flags])
    folder = find_data(run)
    dataset = load_dataset(folder, run.validation_fraction, run.split_seed, run.max_train_samples)
    context = RunContext(run, {}, "", folder, dataset)
    results = {"device": describe_device(), "versions": dict(describe_versions())}
    results["versions"] |= {name: version(name) for name in libraries}
    trainings = (
        measure(context, args, options.minutes, options.learning_rates if STOCK in options.peers else []),
        measure_peers(Peer(context, args), libraries, options.minutes) if libraries else [],
    )
    for found in itertools.chain(*trainings):
        results |= found
        if options.json:
            options.json.write_text(json.dumps(results, indent=2) + "\n")
    for budget, outcome in results["budgets"].items():
        ours = outcome["project"][-1][1]
        print(f"{budget} min: project {ours:.4f}")
        if STOCK in outcome:
            reached = "never" if outcome["time_ratio"] is None else f"in {outcome['time_ratio']:.2f} of its time"
            theirs, ratio = outcome[STOCK][-1][1], outcome["error_ratio"]
            print(f"{budget} min: stock {theirs:.4f}; error ratio {ratio:.2f}; its accuracy is reached {reached}")
        for name, peer in results.get("peers", {}).items():
            accuracy = peer["budgets"][budget]
            print(f"{budget} min: {name} {accuracy:.4f}; error ratio {error_ratio(ours, accuracy):.2f}")
    if options.plot:
        draw(results, options.plot)


if __name__ == "__main__":
    main()
