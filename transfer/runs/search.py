"""--search: settings that Optuna tries on the training images, part of which is held out; the best become a recipe.

Optional. The validation images are not used, so they can still measure the final model.
"""

import copy
import difflib
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import datasets
import yaml
from accelerate.utils import set_seed
from transformers import TrainerCallback

from transfer.config import FinetuningArguments, RunArguments, chosen_arguments, known_names
from transfer.data.layouts import DatasetFiles
from transfer.data.splits import describe_splits, find_units, split_fingerprint, split_validation
from transfer.errors import UserError
from transfer.files import write_atomically
from transfer.models.build import prepare_model
from transfer.runs import RunContext
from transfer.runtime import say
from transfer.training.trainer import FinetuningTrainer

STUDY_FILE = "search.db"  # in the output folder, SQLite
BEST_FILE = "best.yaml"
# Where a recipe names no ranges: the settings that matter most, over their usual values.
DEFAULT_SPACE: dict[str, list | Mapping] = {
    "learning_rate": {"low": 5e-5, "high": 5e-3, "log": True},
    "layer_decay": [0.65, 0.75, 0.85, 1.0],
    "min_crop_scale": [0.08, 0.35, 0.6],
    "label_smoothing_factor": [0.0, 0.1],
}


@dataclass(frozen=True)
class SearchSpace:
    """For every argument its choices, a list, or its range: {low, high}, with log or step."""

    ranges: Mapping[str, list | Mapping]

    @classmethod
    def read(cls, text: str | None, known: list[str]) -> "SearchSpace":
        """A recipe's `search_space`, as json. Raises `UserError` for what cannot be searched."""
        ranges = DEFAULT_SPACE if text is None else json.loads(text)
        if not isinstance(ranges, Mapping) or not ranges:
            raise UserError("search_space: name arguments, each with a list of choices or with low and high")
        for name, values in ranges.items():
            if name not in known:
                near = " or ".join(difflib.get_close_matches(name, known, n=3, cutoff=0.5)) or "see --help"
                raise UserError(f"search_space: unknown argument '{name}'; did you mean {near}?")
            check_range(name, values)
        return cls(ranges)

    def suggest(self, trial) -> dict:
        """The values of one trial."""
        return {name: _suggest(trial, name, values) for name, values in self.ranges.items()}


def check_range(name: str, values) -> None:
    """Refuse what is neither a list of choices nor a range with two ends."""
    if isinstance(values, list) and values:
        return
    keys = set(values) if isinstance(values, Mapping) else set()
    if not {"low", "high"} <= keys <= {"low", "high", "log", "step"}:
        raise UserError(f"search_space: {name}: give a list of choices, or low and high, with log: true or step")
    numbers = [values["low"], values["high"]]
    if not all(isinstance(number, (int, float)) for number in numbers) or numbers[0] >= numbers[1]:
        raise UserError(f"search_space: {name}: low must be a number below high (yaml reads 1e-4 as text: 1.0e-4)")


def _suggest(trial, name: str, values):
    if isinstance(values, list):
        return trial.suggest_categorical(name, values)
    whole = isinstance(values["low"], int) and isinstance(values["high"], int)
    return (trial.suggest_int if whole else trial.suggest_float)(name, **values)


def hold_out_of_train(
    data: DatasetFiles, dataset: datasets.DatasetDict, fraction: float, seed: int
) -> datasets.DatasetDict:
    """Split the training images alone; the validation images are not used."""
    train = dataset["train"]
    files, unit_of = train["file"][:], dict(zip(data.train_files, find_units(data), strict=True))
    units = [unit_of[file] for file in files]
    kept, held_out = split_validation(files, train["label"][:], fraction, seed, units)
    return datasets.DatasetDict(train=train.select(kept), validation=train.select(held_out))


def import_optuna():
    """The optional package optuna. Raises `UserError` if it is not installed."""
    try:
        import optuna
    except ImportError:
        raise UserError("--search needs Optuna: pip install optuna") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def open_study(out: Path, identity: Mapping, resuming: bool, seed: int) -> dict:
    """The arguments of `optuna.create_study` for the study in an output folder.

    Raises `UserError` for a study of other settings or data.
    """
    optuna = import_optuna()
    place = out / STUDY_FILE
    if place.is_file() and not resuming:
        raise UserError(f"{place}: holds a search; continue it with --resume_from_checkpoint true")
    out.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    storage = f"sqlite:///{place}"
    studies = optuna.get_all_study_summaries(storage) if place.is_file() else []
    if [study.study_name for study in studies] not in ([], [digest]):
        raise UserError(f"{place}: is a search with other settings or data; choose another --output_dir")
    return {
        "study_name": digest,
        "storage": storage,
        "load_if_exists": True,
        # With the same seed a resumed search would draw once more what its first trials drew.
        "sampler": optuna.samplers.TPESampler(seed=seed + sum(study.n_trials for study in studies)),
        "pruner": optuna.pruners.MedianPruner(n_startup_trials=4),
    }


def count_finished(study: Mapping) -> int:
    """The number of trials that ended, by themselves or because Optuna stopped them; a killed one is run again."""
    optuna = import_optuna()
    trials = optuna.create_study(**study, direction="maximize").get_trials(deepcopy=False)
    return sum(trial.state in (optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.PRUNED) for trial in trials)


def trial_arguments(
    run: RunArguments, args: FinetuningArguments, settings: Mapping
) -> tuple[RunArguments, FinetuningArguments]:
    """The run's and the Trainer's arguments of one trial, which leaves nothing on the disk."""
    own = {name: value for name, value in settings.items() if hasattr(run, name)}
    args = copy.copy(args)
    quiet = {"save_strategy": "no", "load_best_model_at_end": False, "report_to": [], "resume_from_checkpoint": None}
    for name, value in {**settings, **quiet}.items():
        if name not in own:
            setattr(args, name, value)
    return replace(run, **own), args


class ReportTrial(TrainerCallback):
    """Reports every evaluation of a trial to the terminal and to Optuna, which may stop the trial.

    A trial is judged by its last evaluation: by the better of the model and its moving average.
    """

    def __init__(self, trial, say: Callable[[str], None]):
        self.trial, self.say = trial, say
        self.accuracy: float | None = None

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        if "eval_accuracy" not in metrics:  # the evaluation of the average alone
            return
        for name, what in (("eval_accuracy", "accuracy"), ("eval_ema_accuracy", "accuracy of the moving average")):
            if name in metrics:
                self.say(f"            epoch {state.epoch:g}: {what} {metrics[name]:.4f} on held-out training images")
        self.accuracy = max(metrics["eval_accuracy"], metrics.get("eval_ema_accuracy", 0.0))
        self.trial.report(self.accuracy, state.global_step)
        if self.trial.should_prune():
            raise import_optuna().TrialPruned()


def describe_progress(trials: Sequence) -> list[str]:
    """Lines between two trials: whether the last one was stopped, and which is the best so far."""
    states = import_optuna().trial.TrialState
    ended = [trial for trial in trials if trial.state in (states.COMPLETE, states.PRUNED)]
    complete = [trial for trial in ended if trial.state == states.COMPLETE]
    lines = ["            stopped: it fell behind the others"] if ended and ended[-1].state == states.PRUNED else []
    if complete:
        best = max(complete, key=lambda trial: trial.value)
        lines.append(f"            best so far: trial {best.number}, accuracy {best.value:.4f}")
    return lines


def search(
    build: Callable[[dict], FinetuningTrainer],
    space: SearchSpace,
    trials: int,
    study: Mapping,
    say: Callable[[str], None],
) -> tuple[dict, float]:
    """Settings of the best of `trials` trials, those of an earlier search included, and its accuracy.

    `build` makes the Trainer of one trial's settings.
    """

    def run_trial(trial) -> float:
        for line in describe_progress(trial.study.get_trials(deepcopy=False)):
            say(line)
        settings = space.suggest(trial)
        say(f"trial {trial.number:<5} {json.dumps(settings)}")
        trainer, report = build(settings), ReportTrial(trial, say)
        trainer.add_callback(report)
        set_seed(trainer.args.seed)
        trainer.train()
        if report.accuracy is None:  # no evaluation on the way
            trainer.evaluate()
        assert report.accuracy is not None  # every evaluation is reported
        return report.accuracy

    left = max(0, trials - count_finished(study))
    optimized = import_optuna().create_study(**study, direction="maximize")
    optimized.optimize(run_trial, n_trials=left, gc_after_trial=True)
    return optimized.best_trial.params, optimized.best_trial.value


def write_best(out: Path, recipe: Mapping, accuracy: float) -> str:
    """Write best.yaml, a complete recipe, atomically; returns its text."""
    path = out / BEST_FILE
    fewer = "# The max_train_samples of the search is kept below; remove it to train on all images.\n"
    text = (
        f"# accelerate launch --quiet --config_file accelerate_config.yaml finetune_vit.py {path}\n#\n"
        f"# The best trial of a search: accuracy {accuracy:.4f} on held-out training images.\n"
        f"{fewer if 'max_train_samples' in recipe else ''}"
        f"{yaml.safe_dump(dict(recipe), sort_keys=False)}"
    )
    write_atomically(path, text.encode())
    return text


def search_settings(context: RunContext, args: FinetuningArguments, make_trainer: Callable) -> None:
    """Try settings on the training images, part of which is held out, and write the best ones as a recipe."""
    run, out = context.run, Path(args.output_dir)
    space = SearchSpace.read(run.search_space, known_names())
    dataset = hold_out_of_train(context.data, context.dataset, run.validation_fraction, run.split_seed)
    identity = chosen_arguments(context.arguments) | {"ranges": space.ranges, "split": split_fingerprint(dataset)}
    study = open_study(out, identity, args.resume_from_checkpoint is not None, args.seed)

    def build(settings: dict) -> FinetuningTrainer:
        tried, own = trial_arguments(run, args, settings)
        trial = replace(context, run=tried, dataset=dataset)
        trainer = make_trainer(trial, own, prepare_model(tried, own, context.data))
        trainer.shown.tells = False  # ReportTrial does
        return trainer

    say(f"search      {run.search} trials on the training images alone: {describe_splits(dataset)}")
    best, accuracy = search(build, space, run.search or 0, study, say)
    recipe = {"model_name_or_path": run.model_name_or_path} | chosen_arguments(context.arguments) | best
    say(write_best(out, recipe, accuracy), f"best settings in {out / BEST_FILE}")
