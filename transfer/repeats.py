"""Several trainings of one recipe, with several seeds or on several folds, and what they come to together."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import datasets
import numpy as np

from transfer.arguments import FinetuningArguments, RunArguments
from transfer.calibration import measure_calibration
from transfer.data.layouts import ImageFolder
from transfer.data.pixels import PixelStore
from transfer.evaluation import evaluate_split, predict_and_measure, sample_of_train
from transfer.experiment import (
    average_probabilities,
    choose_submission,
    fold_arguments,
    plain_accuracy,
    seed_arguments,
    summarise,
)
from transfer.modeling import load_trained
from transfer.predictions import Predictions
from transfer.reporting import measure, read_metrics
from transfer.task import Task
from transfer.training.averaging import Weights, greedy_soup
from transfer.training.trainer import FinetuningTrainer


@dataclass(frozen=True)
class Combined:
    """What goes into the folder of the whole."""

    metrics: dict
    predictions: Predictions
    test_scores: np.ndarray  # (M, classes), what the submission is made of


def list_seeds(task: Task, args: FinetuningArguments) -> list[tuple[Task, FinetuningArguments]]:
    """A training for every seed, in a folder of its own."""
    trainings = []
    for seed in task.run.seeds:
        own = seed_arguments(args, seed)
        arguments = task.arguments | {"seeds": None, "output_dir": own.output_dir}
        trainings.append((replace(task, arguments=arguments, whole=task.dataset), own))
    return trainings


def list_folds(
    task: Task, args: FinetuningArguments, split_data: Callable[[RunArguments, ImageFolder], datasets.DatasetDict]
) -> list[tuple[Task, FinetuningArguments]]:
    """A training for every fold, on its own split and in a folder of its own."""
    trainings = []
    for fold in range(1, task.run.kfold + 1):
        own, run = fold_arguments(args, fold), replace(task.run, fold=fold)
        arguments = task.arguments | {"fold": fold, "output_dir": own.output_dir}
        dataset = split_data(run, task.folder)
        trainings.append((replace(task, run=run, arguments=arguments, dataset=dataset, whole=task.dataset), own))
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
    test_time_views: Sequence[str] = (),
) -> Combined:
    """Soup and ensemble of trainings on one split; the trainer, of the best of them, ends with the soup's weights.

    The submission comes from the best of the single models, the soup and the ensemble, on validation.
    """
    runs, members = [read_metrics(folder) for folder in folders], [Predictions.load(folder) for folder in folders]
    singles = [plain_accuracy(run) for run in runs]
    wnids = trainer.model.config.wnids
    models = [load_trained(str(folder / "model"), wnids).model.state_dict() for folder in folders]

    def validate(weights: Weights) -> float:
        trainer.model.load_state_dict(weights)
        return evaluate_split(trainer, trainer.eval_dataset)["accuracy"]

    weights, chosen, _ = greedy_soup(models, singles, validate)
    trainer.model.load_state_dict(weights)
    predictions, metrics = predict_and_measure(trainer, dataset, store, test_time_views)
    metrics["train"] = evaluate_split(trainer, sample_of_train(dataset, store)) | _training_speed(runs)
    zero_epoch = runs[folders.index(best_of(folders))]["zero_epoch"]
    metrics |= {"zero_epoch": zero_epoch, "seeds": runs} | summarise(runs)
    if all("probe" in run for run in runs):
        metrics["probe"] = {"accuracy": float(np.mean([run["probe"]["accuracy"] for run in runs]))}
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
    return Combined(metrics, predictions, scores)


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


def combine_folds(folders: Sequence[Path]) -> Combined:
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
    return Combined(metrics | summarise(runs), predictions, predictions.test_logits)
