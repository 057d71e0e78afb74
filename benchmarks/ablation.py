"""How much each option of a recipe contributes: one is changed at a time, over several seeds.

    accelerate launch --config_file accelerate_config.yaml benchmarks/ablation.py recipes/offline_lite0.yaml \\
        --data_dir DATA.zip --max_train_samples 10000 --num_train_epochs 1 [--json PATH]

Prints a table of validation accuracy: mean and standard deviation over the seeds, and the difference from the
unchanged recipe. Flags after the recipe set the budget. Options that the recipe uses are removed, others are added;
`--variants` selects those that make sense for a backbone. Short trainings on few images say little about long ones.
"""

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import transformers
from tqdm import tqdm

from benchmarks.time_to_accuracy import QUIET
from data_loading import find_data, load_dataset
from finetune_vit import make_trainer
from transfer.cli import parse_command_line
from transfer.models.build import prepare_model
from transfer.runs import RunContext
from transfer.runs.record import describe_device
from transfer.runtime import resolve_mixed_precision, tune_malloc, use_all_cores
from transfer.training.linear_probe import fit_probe

VARIANTS = {
    "the recipe": [],
    "a new head": ["--head_warm_start", "false"],
    "the probe's head": ["--linear_probe", "true"],
    "one learning rate for all levels": ["--layer_decay", "1"],
    "no warm-up": ["--warmup_steps", "0"],
    "a constant learning rate": ["--lr_scheduler_type", "constant_with_warmup"],
    "no weight decay": ["--weight_decay", "0"],
    "batch norms follow the crops": ["--freeze_batch_norm_stats", "false"],
    "nothing frozen": ["--freeze_layers", "0"],
    "the lowest two levels frozen": ["--freeze_layers", "2"],
    "full size from the start": ["--train_image_size"],
    "smaller crops of the image": ["--min_crop_scale", "0.08"],
    "a moving average": ["--ema_decay", "0.99"],
    "label smoothing": ["--label_smoothing_factor", "0.1"],
    "mixup": ["--mixup_alpha", "0.2"],
    "cutmix": ["--cutmix_alpha", "1"],
    "TrivialAugment": ["--trivial_augment", "true"],
    "erasing": ["--erasing_probability", "0.25"],
    "stochastic depth": ["--drop_path_rate", "0.1"],
}


def train_once(words: list[str], folder_cache: dict) -> float:
    """Validation accuracy after a training, of the model or its average, whichever is better."""
    run, args = parse_command_line(words)
    if run.data_dir not in folder_cache:
        folder_cache[run.data_dir] = find_data(run)
    folder = folder_cache[run.data_dir]
    dataset = load_dataset(folder, run.validation_fraction, run.split_seed, run.max_train_samples)
    context = RunContext(run, {}, "", folder, dataset)
    for name, value in QUIET.items():
        setattr(args, name, {"report_to": []}.get(name, value))
    trainer = make_trainer(context, args, prepare_model(run, args, folder))
    if run.linear_probe:
        fit_probe(trainer, trainer.eval_dataset.store, dataset["train"], trainer.eval_transform.geometry.rule)
    trainer.train()
    measured = trainer.evaluate()
    return max(measured["eval_accuracy"], measured.get("eval_ema_accuracy", 0.0))


def table(results: dict[str, list[float]]) -> str:
    """Mean, spread and the difference from the recipe, a row each."""
    recipe = statistics.mean(results["the recipe"])
    lines = ["| changed | validation accuracy | standard deviation | difference |", "|---|---|---|---|"]
    for name, scores in results.items():
        spread = f"{statistics.stdev(scores):.4f}" if len(scores) > 1 else "one seed"
        lines.append(
            f"| {name} | {statistics.mean(scores):.4f} | {spread} | {statistics.mean(scores) - recipe:+.4f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Train every variant with every seed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("recipe")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--json", type=Path, help="where to write the scores")
    options, flags = parser.parse_known_args()
    print(resolve_mixed_precision(), describe_device(), sep="\n")
    use_all_cores()
    tune_malloc()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    names = list(dict.fromkeys(["the recipe", *options.variants]))
    results, folders = {name: [] for name in names}, {}
    with tempfile.TemporaryDirectory() as scratch:
        for seed in options.seeds:  # seed by seed: a stop in between leaves whole columns
            for name in tqdm(names, desc=f"seed {seed}"):
                words = [options.recipe, *flags, *VARIANTS[name], "--seed", str(seed), "--output_dir", scratch]
                results[name].append(train_once(words, folders))
                if options.json:
                    options.json.write_text(json.dumps(results, indent=2) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
