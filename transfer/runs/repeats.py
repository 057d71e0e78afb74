"""Several trainings of one recipe: their mean and spread, and what they are worth together.

Several trainings of one recipe, with several seeds or on several folds, and what they come to together.
"""

import copy
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import datasets
import numpy as np
from transformers import TrainingArguments

from transfer.config import FinetuningArguments, RunArguments
from transfer.data.images import PixelStore
from transfer.data.layouts import DatasetFiles
from transfer.evaluation.metrics import measure, measure_calibration, read_metrics
from transfer.evaluation.predictions import Predictions, average_probabilities
from transfer.models.build import load_trained
from transfer.runs.single import RunContext, evaluate_split, predict_and_measure, sample_of_train
from transfer.training.averaging import Weights, greedy_soup
from transfer.training.trainer import FinetuningTrainer

SUMMARISED = {"validation": ("accuracy", "loss"), "train": ("accuracy", "loss")}


def seed_arguments(args: TrainingArguments, seed: int) -> TrainingArguments:
    """The arguments of one of several trainings: its seed and its folder."""
    args = copy.copy(args)
    args.seed = seed
    args.output_dir = str(Path(args.output_dir) / f"seed-{seed}")
    return args


def fold_arguments(args: TrainingArguments, fold: int) -> TrainingArguments:
    """The arguments of one fold of a cross-validation: its folder."""
    args = copy.copy(args)
    args.output_dir = str(Path(args.output_dir) / f"fold-{fold}")
    return args


def summarise(runs: Sequence[Mapping]) -> dict[str, dict]:
    """Mean and standard deviation (of a sample: n - 1) over the trainings' metrics."""
    summary = {"mean": {}, "std": {}}
    for split, names in SUMMARISED.items():
        values = {name: [run[split][name] for run in runs] for name in names}
        summary["mean"][split] = {name: float(np.mean(v)) for name, v in values.items()}
        summary["std"][split] = {name: float(np.std(v, ddof=1)) for name, v in values.items()}
    return summary


def choose_submission(scores: Mapping[str, float]) -> str:
    """The name with the best validation accuracy; of equals the first, so name the simpler one first."""
    return max(scores, key=lambda name: scores[name])


def plain_accuracy(run: Mapping) -> float:
    """Validation accuracy of a run's model as a plain pipeline shows it the images."""
    return run.get("tta", {}).get("accuracy", {}).get("plain", run["validation"]["accuracy"])


@dataclass(frozen=True)
class EnsembleResult:
    """What goes into the folder of the whole."""

    metrics: dict
    predictions: Predictions
    test_scores: np.ndarray  # (M, classes), what the submission is made of


def list_seeds(context: RunContext, args: FinetuningArguments) -> list[tuple[RunContext, FinetuningArguments]]:
    """A training for every seed, in a folder of its own."""
    trainings = []
    for seed in context.run.seeds:
        own = seed_arguments(args, seed)
        arguments = context.arguments | {"seeds": None, "output_dir": own.output_dir}
        trainings.append((replace(context, arguments=arguments, parent_split=context.dataset), own))
    return trainings


def list_folds(
    context: RunContext,
    args: FinetuningArguments,
    split_data: Callable[[RunArguments, DatasetFiles], datasets.DatasetDict],
) -> list[tuple[RunContext, FinetuningArguments]]:
    """A training for every fold, on its own split and in a folder of its own."""
    trainings = []
    for fold in range(1, context.run.kfold + 1):
        own, run = fold_arguments(args, fold), replace(context.run, fold=fold)
        arguments = context.arguments | {"fold": fold, "output_dir": own.output_dir}
        dataset = split_data(run, context.folder)
        trainings.append(
            (replace(context, run=run, arguments=arguments, dataset=dataset, parent_split=context.dataset), own)
        )
    return trainings


def start_of(folders: Sequence[Path]) -> str:
    """Hash of the weights that all trainings started from."""
    starts = [json.loads((folder / "run.json").read_text())["start_fingerprint"] for folder in folders]
    return hashlib.blake2b("\n".join(starts).encode(), digest_size=16).hexdigest()


def best_of(folders: Sequence[Path]) -> Path:
    """The finished run with the best validation accuracy as a plain pipeline has it."""
    return folders[int(np.argmax([plain_accuracy(read_metrics(folder)) for folder in folders]))]


def _training_speed(runs: Sequence[Mapping]) -> dict:
    """Seconds of all trainings, and images per second of the mean one."""
    return {
        "seconds": sum(run["train"]["seconds"] for run in runs),
        "samples_per_second": float(np.mean([run["train"]["samples_per_second"] for run in runs])),
    }


def combine_seeds(
    folders: Sequence[Path],
    seeds: Sequence[int],
    trainer: FinetuningTrainer,
    dataset: datasets.DatasetDict,
    store: PixelStore,
    tta: Sequence[str] = (),
) -> EnsembleResult:
    """Soup and ensemble of trainings on one split; the trainer, of the best of them, ends with the soup's weights.

    The submission comes from the best of the single models, the soup and the ensemble, on validation.
    """
    runs, members = [read_metrics(folder) for folder in folders], [Predictions.load(folder) for folder in folders]
    singles = [plain_accuracy(run) for run in runs]
    class_ids = trainer.model.config.class_ids
    models = [load_trained(str(folder / "model"), class_ids).model.state_dict() for folder in folders]

    def validate(weights: Weights) -> float:
        trainer.model.load_state_dict(weights)
        return evaluate_split(trainer, trainer.eval_dataset)["accuracy"]

    weights, chosen, _ = greedy_soup(models, singles, validate)
    trainer.model.load_state_dict(weights)
    predictions, metrics = predict_and_measure(trainer, dataset, store, tta)
    metrics["train"] = evaluate_split(trainer, sample_of_train(dataset, store)) | _training_speed(runs)
    zero_epoch = runs[folders.index(best_of(folders))]["zero_epoch"]
    metrics |= {"zero_epoch": zero_epoch, "seeds": runs} | summarise(runs)
    if all("linear_probe" in run for run in runs):
        metrics["linear_probe"] = {"accuracy": float(np.mean([run["linear_probe"]["accuracy"] for run in runs]))}
    metrics["soup"] = metrics["validation"] | {"members": [seeds[i] for i in chosen]}
    ensemble = average_probabilities([member.validation_logits for member in members])
    metrics["ensemble"] = measure(ensemble, predictions.validation_labels)
    tested = average_probabilities([member.test_logits for member in members])
    first = int(np.argmax([run["validation"]["accuracy"] for run in runs]))  # with its test-time views
    candidates = {  # name -> validation accuracy, scores of the test images
        f"seed {seeds[first]}": (runs[first]["validation"]["accuracy"], members[first].test_logits),
        "soup": (metrics["soup"]["accuracy"], predictions.test_logits),
        "ensemble": (metrics["ensemble"]["accuracy"], tested),
    }
    source = choose_submission({name: accuracy for name, (accuracy, _) in candidates.items()})
    accuracy, scores = candidates[source]
    metrics["submission"] = {"from": source, "validation_accuracy": accuracy}
    return EnsembleResult(metrics, predictions, scores)


def join_folds(members: Sequence[Predictions]) -> Predictions:
    """Every image as the fold that had not seen it predicts it; test images as the mean of all folds does."""
    first = members[0]
    tested = average_probabilities([member.test_logits for member in members])
    return Predictions(
        np.concatenate([member.validation_files for member in members]),
        np.concatenate([member.validation_labels for member in members]),
        np.concatenate([member.validation_logits for member in members]),
        first.test_ids,
        tested,
    )


def combine_folds(folders: Sequence[Path]) -> EnsembleResult:
    """The accuracy of a cross-validation on all images, and its ensemble, which makes the submission.

    The ensemble itself has seen every image: that each fold is as good as the others' models on images which are new
    to it is what is measured, and the ensemble is usually better.
    """
    runs = [read_metrics(folder) for folder in folders]
    predictions = join_folds([Predictions.load(folder) for folder in folders])
    metrics = {
        "validation": measure(predictions.validation_logits, predictions.validation_labels),
        "calibration": measure_calibration(predictions.validation_logits, predictions.validation_labels),
        "zero_epoch": {"accuracy": float(np.mean([run["zero_epoch"]["accuracy"] for run in runs]))},
        "train": {name: float(np.mean([run["train"][name] for run in runs])) for name in ("accuracy", "loss")}
        | _training_speed(runs),
        "folds": runs,
        "submission": {"from": f"ensemble of {len(runs)} folds"},
    }
    if len(predictions.test_ids):
        seconds = sum(run["prediction"]["seconds"] for run in runs)
        metrics["prediction"] = {"seconds": seconds, "samples_per_second": len(predictions.test_ids) / seconds}
    return EnsembleResult(metrics | summarise(runs), predictions, predictions.test_logits)
