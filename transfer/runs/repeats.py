"""Several trainings of one recipe, with different seeds or on different folds, and their combined results."""

import copy
import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import datasets
import numpy as np
from transformers import PreTrainedModel, TrainingArguments

from transfer.config import FinetuningArguments, RunArguments
from transfer.data.images import PixelDataset, PixelStore
from transfer.data.layouts import DatasetFiles
from transfer.evaluation.metrics import (
    LinearProbe,
    MeanTrainMetrics,
    RunMetrics,
    Scores,
    SoupMetrics,
    Speed,
    SplitScores,
    SubmissionSource,
    TrainMetrics,
    ZeroEpoch,
    measure,
    measure_calibration,
)
from transfer.evaluation.predictions import Predictions, average_probabilities
from transfer.models.build import load_trained
from transfer.runs.record import read_record
from transfer.runs.single import RunContext, evaluate_split, predict_and_measure, sample_of_train
from transfer.training.averaging import Weights, greedy_soup
from transfer.training.trainer import FinetuningTrainer


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


def _train_metrics(runs: Sequence[RunMetrics]) -> list[TrainMetrics | MeanTrainMetrics]:
    return [run.train for run in runs if run.train]  # all of them: repeated runs are trained


def _summarise_split(metrics: Sequence, statistic: Callable) -> Scores:
    return Scores(*(float(statistic([getattr(m, name) for m in metrics])) for name in ("accuracy", "loss")))


def summarise(runs: Sequence[RunMetrics]) -> tuple[SplitScores, SplitScores]:
    """Mean, and standard deviation with n - 1 degrees of freedom, of accuracy and loss over several trainings."""
    validation, train = [run.validation for run in runs], _train_metrics(runs)
    deviation = functools.partial(np.std, ddof=1)
    mean = SplitScores(_summarise_split(validation, np.mean), _summarise_split(train, np.mean))
    return mean, SplitScores(_summarise_split(validation, deviation), _summarise_split(train, deviation))


def choose_submission(scores: Mapping[str, float]) -> str:
    """The name with the best validation accuracy, the first of equals: list the simpler ones first."""
    return max(scores, key=lambda name: scores[name])


def plain_accuracy(run: RunMetrics) -> float:
    """Validation accuracy of a run's model without test-time augmentation, as in a pipeline."""
    return run.tta.accuracy["plain"] if run.tta else run.validation.accuracy


@dataclass(frozen=True)
class EnsembleResult:
    """The combined results of several trainings."""

    metrics: RunMetrics
    predictions: Predictions
    test_scores: np.ndarray  # (M, classes), from which the submission is made


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
    """Hash of the initial weights of all trainings."""
    starts = [read_record(folder / "run.json")["start_fingerprint"] for folder in folders]
    return hashlib.blake2b("\n".join(starts).encode(), digest_size=16).hexdigest()


def best_of(folders: Sequence[Path]) -> Path:
    """The finished run with the best validation accuracy without test-time augmentation."""
    return folders[int(np.argmax([plain_accuracy(RunMetrics.read(folder)) for folder in folders]))]


def _training_speed(runs: Sequence[RunMetrics]) -> Speed:
    """Mean images per second of several trainings, and their seconds in total."""
    trained = _train_metrics(runs)
    return Speed(float(np.mean([t.samples_per_second for t in trained])), sum(t.seconds for t in trained))


def _mean_probe(runs: Sequence[RunMetrics]) -> LinearProbe | None:
    probes = [run.linear_probe.accuracy for run in runs if run.linear_probe]
    return LinearProbe(float(np.mean(probes))) if probes else None


def _load_soup(
    folders: Sequence[Path], accuracies: Sequence[float], trainer: FinetuningTrainer, validation: PixelDataset
) -> list[int]:
    """Give the trainer's model the weights of the greedy soup of trained models; returns the positions of its members.

    `accuracies` are the models' own, on the validation images.
    """
    assert isinstance(trainer.model, PreTrainedModel)  # not wrapped for several devices yet
    class_ids = trainer.model.config.class_ids
    models = [load_trained(str(folder / "model"), class_ids).model.state_dict() for folder in folders]

    def load(weights: Weights) -> None:
        assert trainer.model is not None  # it is there from the start
        trainer.model.load_state_dict(weights)

    def validate(weights: Weights) -> float:
        load(weights)
        return evaluate_split(trainer, validation).accuracy

    weights, members, _ = greedy_soup(models, accuracies, validate)
    load(weights)
    return members


def combine_seeds(
    folders: Sequence[Path],
    seeds: Sequence[int],
    trainer: FinetuningTrainer,
    dataset: datasets.DatasetDict,
    store: PixelStore,
    tta: Sequence[str] = (),
) -> EnsembleResult:
    """The soup and the ensemble of trainings on one split; the trainer's model becomes the soup.

    The submission comes from the single model, the soup or the ensemble, whichever has the best validation accuracy.
    """
    runs, members = [RunMetrics.read(folder) for folder in folders], [Predictions.load(folder) for folder in folders]
    accuracies = [plain_accuracy(run) for run in runs]
    chosen = _load_soup(folders, accuracies, trainer, PixelDataset(store, dataset["validation"]))
    predictions, soup = predict_and_measure(trainer, dataset, store, tta)
    measured = evaluate_split(trainer, sample_of_train(dataset, store))
    ensemble_logits = average_probabilities([member.validation_logits for member in members])
    ensemble = measure(ensemble_logits, predictions.validation_labels)
    mean, std = summarise(runs)
    metrics = replace(
        soup,
        zero_epoch=runs[int(np.argmax(accuracies))].zero_epoch,
        linear_probe=_mean_probe(runs),
        train=TrainMetrics(**vars(measured), **vars(_training_speed(runs))),
        seeds=runs,
        mean=mean,
        std=std,
        soup=SoupMetrics(**vars(soup.validation), members=[seeds[i] for i in chosen]),
        ensemble=ensemble,
    )
    best = int(np.argmax([run.validation.accuracy for run in runs]))  # with its test-time augmentation
    candidates = {  # name -> metrics, scores of the test images
        f"seed {seeds[best]}": (runs[best].validation, members[best].test_logits),
        "soup": (soup.validation, predictions.test_logits),
        "ensemble": (ensemble, average_probabilities([member.test_logits for member in members])),
    }
    source = choose_submission({name: validation.accuracy for name, (validation, _) in candidates.items()})
    validation, scores = candidates[source]
    submission = SubmissionSource(source, validation.accuracy)
    return EnsembleResult(replace(metrics, submission=submission), predictions, scores)


def join_folds(members: Sequence[Predictions]) -> Predictions:
    """Out-of-fold predictions: each image by the fold that left it out, test images by the ensemble of all folds."""
    return Predictions(
        np.concatenate([member.validation_files for member in members]),
        np.concatenate([member.validation_labels for member in members]),
        np.concatenate([member.validation_logits for member in members]),
        members[0].test_ids,
        average_probabilities([member.test_logits for member in members]),
    )


def combine_folds(folders: Sequence[Path]) -> EnsembleResult:
    """The metrics of a cross-validation, and the ensemble of its folds, which makes the submission.

    The accuracy is that of the folds on the images that each left out. It cannot be measured for the ensemble, which
    has seen every image, and which is usually better.
    """
    runs = [RunMetrics.read(folder) for folder in folders]
    predictions = join_folds([Predictions.load(folder) for folder in folders])
    logits, labels = predictions.validation_logits, predictions.validation_labels
    mean, std = summarise(runs)
    seconds = sum(run.prediction.seconds for run in runs if run.prediction)
    metrics = RunMetrics(
        validation=measure(logits, labels),
        calibration=measure_calibration(logits, labels),
        prediction=Speed(len(predictions.test_ids) / seconds, seconds) if seconds else None,
        zero_epoch=ZeroEpoch(float(np.mean([run.zero_epoch.accuracy for run in runs if run.zero_epoch]))),
        train=MeanTrainMetrics(**vars(mean.train), **vars(_training_speed(runs))),
        folds=runs,
        mean=mean,
        std=std,
        submission=SubmissionSource(f"ensemble of {len(runs)} folds"),
    )
    return EnsembleResult(metrics, predictions, predictions.test_logits)
