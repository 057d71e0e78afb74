"""Several trainings of one recipe, with several seeds or on several folds, and what they give together."""

import copy
import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import datasets
import numpy as np
import torch

from transfer.config import FinetuningArguments, RunArguments
from transfer.data.layouts import DatasetFiles
from transfer.data.splits import describe_splits
from transfer.evaluation.metrics import (
    LinearProbe,
    MeanTrainMetrics,
    RunMetrics,
    Scores,
    SoupMetrics,
    Speed,
    SplitScores,
    SubmissionSource,
    ZeroEpoch,
    measure,
)
from transfer.evaluation.predictions import Predictions, average_probabilities, fit_temperature, measure_calibration
from transfer.files import is_finished, read_json
from transfer.models.build import Classifier, load_trained
from transfer.runs import RunContext, list_parts
from transfer.runs.record import read_record
from transfer.runs.single import (
    evaluate_split,
    measure_on_train,
    predict_and_measure,
    start_record,
    write_results,
)
from transfer.runs.timing import share_of_time
from transfer.runtime import say
from transfer.training.checkpoints import RunProvenance, last_checkpoint
from transfer.training.trainer import FinetuningTrainer

Weights = Mapping[str, torch.Tensor]
FineTune = Callable[[RunContext, FinetuningArguments, str | None], RunMetrics]
MakeTrainer = Callable[[RunContext, FinetuningArguments, Classifier], FinetuningTrainer]
SplitData = Callable[[RunArguments, DatasetFiles], datasets.DatasetDict]


@dataclass(frozen=True)
class EnsembleResult:
    """What the output folder of a repeated run holds."""

    metrics: RunMetrics
    predictions: Predictions
    test_scores: np.ndarray  # (M, classes), what the submission is made of
    temperature: float  # that calibrates them


# The trainings


def part_arguments(args: FinetuningArguments, name: str) -> FinetuningArguments:
    """The arguments of one of several trainings, with its own folder `name`."""
    args = copy.copy(args)
    args.output_dir = str(Path(args.output_dir) / name)
    return args


def list_trainings(
    context: RunContext, args: FinetuningArguments, split_data: SplitData
) -> list[tuple[RunContext, FinetuningArguments]]:
    """A training for every seed, or for every fold on its own split, each in a folder of its own."""
    trainings = []
    for name, changes in list_parts(context.run).items():
        own, run, dataset = part_arguments(args, name), context.run, context.dataset
        own.seed = changes.get("seed", own.seed)
        if "fold" in changes:
            run = replace(run, fold=changes["fold"])
            dataset = split_data(run, context.data)
        arguments = context.arguments | changes | {"output_dir": own.output_dir}
        part = replace(context, run=run, arguments=arguments, dataset=dataset, parent_split=context.dataset)
        trainings.append((part, own))
    return trainings


def check_finished(context: RunContext, trainer: FinetuningTrainer, folder: Path) -> None:
    """Check that a finished training used the same data; warn of arguments that differ. Raises `UserError`."""
    record = start_record(context, trainer)
    provenance = RunProvenance(record["data_fingerprint"], record["split_fingerprint"], record["arguments"])
    provenance.compare(folder, read_record(folder / "run.json"))


def run_repeats(
    context: RunContext,
    args: FinetuningArguments,
    fine_tune: FineTune,
    make_trainer: MakeTrainer,
    split_data: SplitData,
) -> RunMetrics:
    """Train with every seed, or on every fold, each in its own folder, and combine them; returns the metrics."""
    resuming = args.resume_from_checkpoint is not None
    trainings = list_trainings(context, args, split_data)
    folders = [Path(own.output_dir) for _, own in trainings]
    reproduce = context.run.reproduce
    for number, (folder, (part, own)) in enumerate(zip(folders, trainings, strict=True), 1):
        if resuming and is_finished(folder):
            trained = load_trained(str(folder / "model"), context.data.class_ids)
            check_finished(
                replace(part, run=replace(part.run, reproduce=None)), make_trainer(part, own, trained), folder
            )
            continue
        say(f"{folder.name:<11} training {number} of {len(trainings)}: {describe_splits(part.dataset)}")
        checkpoint = last_checkpoint(folder) if resuming else None
        ends_by = share_of_time(context.ends_by, len(trainings) - number + 1)
        part = replace(part, run=replace(part.run, reproduce=reproduce), ends_by=ends_by, started=time.time())
        fine_tune(part, own, str(checkpoint) if checkpoint else None)
        reproduce = None  # the first one says what differs
    return combine(context, args, folders, make_trainer)


# What they give together


def combine(
    context: RunContext, args: FinetuningArguments, folders: Sequence[Path], make_trainer: MakeTrainer
) -> RunMetrics:
    """Write the combined results; the model is the soup of the seeds, or the best fold's."""
    context = replace(context, run=replace(context.run, reproduce=None))  # the first training said what differs
    best = load_trained(str(best_of(folders) / "model"), context.data.class_ids)
    trainer = make_trainer(context, args, best)
    record = start_record(context, trainer) | {"start_fingerprint": start_of(folders)}
    result = (
        combine_folds(folders, context.data.test_labels)
        if context.run.kfold
        else combine_seeds(context, trainer, folders)
    )
    if trainer.is_world_process_zero():
        write_results(
            context, trainer, record, result.metrics, result.predictions, result.test_scores, result.temperature
        )
    return result.metrics


def start_of(folders: Sequence[Path]) -> str:
    """Hash of the weights that all trainings started from."""
    starts = [read_json(folder / "run.json")["start_fingerprint"] for folder in folders]
    return hashlib.blake2b("\n".join(starts).encode(), digest_size=16).hexdigest()


def plain_accuracy(run: RunMetrics) -> float:
    """Validation accuracy of a run's model without test-time augmentation, as in a `pipeline`."""
    return run.tta.accuracy["plain"] if run.tta else run.validation.accuracy


def best_of(folders: Sequence[Path]) -> Path:
    """The finished run with the best validation accuracy without test-time augmentation."""
    return folders[int(np.argmax([plain_accuracy(RunMetrics.read(folder)) for folder in folders]))]


def summarize(runs: Sequence[RunMetrics]) -> dict[str, SplitScores]:
    """Mean, and standard deviation with n - 1 degrees of freedom, of accuracy and loss over several trainings."""

    def over_runs(statistic: Callable) -> SplitScores:
        splits = {}
        for name in ("validation", "train"):
            found = [getattr(run, name) for run in runs]
            splits[name] = Scores(statistic([m.accuracy for m in found]), statistic([m.loss for m in found]))
        return SplitScores(**splits)

    return {
        "mean": over_runs(lambda values: float(np.mean(values))),
        "std": over_runs(lambda values: float(np.std(values, ddof=1))),
    }


def total_speed(runs: Sequence[RunMetrics]) -> Speed:
    """Mean images per second of several trainings, and their seconds in total."""
    speeds = [run.train for run in runs if run.train is not None]
    return Speed(
        samples_per_second=float(np.mean([speed.samples_per_second for speed in speeds])),
        seconds=sum(speed.seconds for speed in speeds),
    )


def choose_submission(scores: Mapping[str, float]) -> str:
    """The name with the best validation accuracy, the first of equals: list the simpler ones first."""
    return max(scores, key=lambda name: scores[name])


def mean_weights(members: Sequence[Weights]) -> dict[str, torch.Tensor]:
    """The mean of several models' weights; counters are the first one's."""
    return {
        name: torch.stack([member[name] for member in members]).mean(0) if values.is_floating_point() else values
        for name, values in members[0].items()
    }


def greedy_soup(
    candidates: Sequence[Weights], scores: Sequence[float], score: Callable[[Weights], float]
) -> tuple[dict[str, torch.Tensor], list[int], float]:
    """Average the best candidate with each of the others in turn, keeping those that do not lower the score.

    Wortsman et al. 2022. Returns the soup, the positions of its members and its score, which is never below the best
    candidate's.
    """
    order = sorted(range(len(candidates)), key=lambda i: -scores[i])
    members, best = order[:1], scores[order[0]]
    for position in order[1:]:
        trial = score(mean_weights([candidates[i] for i in [*members, position]]))
        if trial >= best:
            members, best = [*members, position], trial
    return mean_weights([candidates[i] for i in members]), members, best


def combine_seeds(context: RunContext, trainer: FinetuningTrainer, folders: Sequence[Path]) -> EnsembleResult:
    """The soup and the ensemble of trainings on one split; the trainer's model becomes the soup.

    The submission comes from the single model, the soup or the ensemble, whichever has the best validation accuracy.
    """
    seeds = context.run.seeds
    runs, members = [RunMetrics.read(folder) for folder in folders], [Predictions.load(folder) for folder in folders]
    class_ids = context.data.class_ids
    models = [load_trained(str(folder / "model"), class_ids).model.state_dict() for folder in folders]

    def validate(weights: Weights) -> float:
        trainer.model.load_state_dict(weights)
        return evaluate_split(trainer, trainer.eval_dataset, "soup").accuracy

    weights, chosen, _ = greedy_soup(models, [plain_accuracy(run) for run in runs], validate)
    trainer.model.load_state_dict(weights)
    predictions, stages = predict_and_measure(context, trainer)
    stages["train"] = measure_on_train(context, trainer, total_speed(runs))
    stages["zero_epoch"] = runs[folders.index(best_of(folders))].zero_epoch
    probes = [run.linear_probe.accuracy for run in runs if run.linear_probe]
    if len(probes) == len(runs):
        stages["linear_probe"] = LinearProbe(float(np.mean(probes)))
    soup = SoupMetrics(**asdict(stages["validation"]), members=[seeds[i] for i in chosen])
    labels = predictions.validation_labels
    averaged = average_probabilities([member.validation_logits for member in members])
    ensemble = measure(averaged, labels)
    tested = average_probabilities([member.test_logits for member in members])
    first = int(np.argmax([run.validation.accuracy for run in runs]))  # with its test-time augmentation
    candidates = {  # name -> validation accuracy, scores of the test images and of the validation images
        f"seed {seeds[first]}": (
            runs[first].validation.accuracy,
            members[first].test_logits,
            members[first].validation_logits,
        ),
        "soup": (soup.accuracy, predictions.test_logits, predictions.validation_logits),
        "ensemble": (ensemble.accuracy, tested, averaged),
    }
    source = choose_submission({name: accuracy for name, (accuracy, *_) in candidates.items()})
    accuracy, scores, validated = candidates[source]
    metrics = RunMetrics(
        **(stages | summarize(runs)),
        seeds=runs,
        soup=soup,
        ensemble=ensemble,
        submission=SubmissionSource(source, accuracy),
    )
    return EnsembleResult(metrics, predictions, scores, fit_temperature(validated.astype(np.float64), labels))


def join_folds(members: Sequence[Predictions]) -> Predictions:
    """Out-of-fold predictions: each image by the fold that left it out, test images by the ensemble of all folds."""
    return Predictions(
        np.concatenate([member.validation_files for member in members]),
        np.concatenate([member.validation_labels for member in members]),
        np.concatenate([member.validation_logits for member in members]),
        members[0].test_ids,
        average_probabilities([member.test_logits for member in members]),
    )


def combine_folds(folders: Sequence[Path], test_labels: Sequence[int] = ()) -> EnsembleResult:
    """The metrics of a cross-validation, and the ensemble of its folds, which makes the submission.

    The accuracy is that of the folds on the images that each left out. It cannot be measured for the ensemble, which
    has seen every image, and which is usually better.
    """
    runs = [RunMetrics.read(folder) for folder in folders]
    predictions = join_folds([Predictions.load(folder) for folder in folders])
    summary = summarize(runs)
    stages: dict = {
        "validation": measure(predictions.validation_logits, predictions.validation_labels),
        "calibration": measure_calibration(predictions.validation_logits, predictions.validation_labels),
        "zero_epoch": ZeroEpoch(float(np.mean([run.zero_epoch.accuracy for run in runs if run.zero_epoch]))),
        "train": MeanTrainMetrics(**asdict(summary["mean"].train), **asdict(total_speed(runs))),
    }
    if len(predictions.test_ids):
        seconds = sum(run.prediction.seconds for run in runs if run.prediction)
        stages["prediction"] = Speed(len(predictions.test_ids) / seconds, seconds)
    if test_labels:
        stages["test"] = measure(predictions.test_logits, np.array(test_labels))
    source = SubmissionSource(f"ensemble of {len(runs)} folds")
    metrics = RunMetrics(**(stages | summary), folds=runs, submission=source)
    return EnsembleResult(metrics, predictions, predictions.test_logits, stages["calibration"].temperature)
