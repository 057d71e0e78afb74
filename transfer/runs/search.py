"""Several trainings of one recipe: their mean and spread, and what they are worth together.

--search: settings tried by Optuna through Trainer.hyperparameter_search, on a slice of the training images.
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
from transformers import TrainerCallback, TrainingArguments

from transfer.data.splits import split_validation
from transfer.errors import UserError
from transfer.files import write_atomically
from transfer.training.trainer import FinetuningTrainer


def trial_arguments(run, args: TrainingArguments, settings: Mapping):
    """The run's and the Trainer's arguments of one trial of a search, which leaves nothing on the disk."""
    own = {name: value for name, value in settings.items() if hasattr(run, name)}
    args = copy.copy(args)
    quiet = {"save_strategy": "no", "load_best_model_at_end": False, "report_to": [], "resume_from_checkpoint": None}
    for name, value in (settings | quiet).items():
        if name not in own:
            setattr(args, name, value)
    return replace(run, **own), args


STUDY_FILE = "search.db"  # in the output folder, SQLite
BEST_FILE = "best.yaml"
# Where a recipe names no ranges: what decides most, over what is usual.
DEFAULT_SPACE = {
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


def hold_out_of_train(dataset: datasets.DatasetDict, fraction: float, seed: int) -> datasets.DatasetDict:
    """Training images alone, a share of them to choose by: the validation images stay for the final figure."""
    train = dataset["train"]
    kept, held_out = split_validation(train["file"][:], train["label"][:], fraction, seed)
    return datasets.DatasetDict(train=train.select(kept), validation=train.select(held_out))


def import_optuna():
    """The optional package."""
    try:
        import optuna
    except ImportError:
        raise UserError("--search needs Optuna: pip install optuna") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def open_study(out: Path, identity: Mapping, resuming: bool, seed: int) -> dict:
    """What `optuna.create_study` takes for the study in an output folder; one of other settings is refused."""
    optuna = import_optuna()
    place = out / STUDY_FILE
    if place.is_file() and not resuming:
        raise UserError(f"{place}: holds a search; --resume_from_checkpoint true goes on with it")
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
    """Trials that came to an end, by their accuracy or because others were better; a killed one is tried again."""
    optuna = import_optuna()
    trials = optuna.create_study(**study, direction="maximize").get_trials(deepcopy=False)
    return sum(trial.state in (optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.PRUNED) for trial in trials)


def best_accuracy(metrics: Mapping[str, float]) -> float:
    """What a trial is judged by: the better of the model and its moving average."""
    return max(metrics["eval_accuracy"], metrics.get("eval_ema_accuracy", 0.0))


class TrialLogger(TrainerCallback):
    """Says how a trial goes."""

    def __init__(self, say: Callable[[str], None]):
        self.say = say

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        for name, whose in (("eval_accuracy", "accuracy"), ("eval_ema_accuracy", "its moving average's")):
            if name in metrics:
                self.say(f"            epoch {state.epoch:g}: {whose} {metrics[name]:.4f} on held-out training images")


def describe_progress(trials: Sequence) -> list[str]:
    """Lines between two trials: that the last one was stopped, and which is the best so far."""
    states = import_optuna().trial.TrialState
    ended = [trial for trial in trials if trial.state in (states.COMPLETE, states.PRUNED)]
    whole = [trial for trial in ended if trial.state == states.COMPLETE]
    lines = ["            stopped: it fell behind the others"] if ended and ended[-1].state == states.PRUNED else []
    if whole:
        best = max(whole, key=lambda trial: trial.value)
        lines.append(f"            best so far: trial {best.number}, accuracy {best.value:.4f}")
    return lines


def search(
    trainer: FinetuningTrainer,
    build: Callable[[dict], FinetuningTrainer],
    space: SearchSpace,
    trials: int,
    study: Mapping,
    say: Callable[[str], None],
) -> tuple[dict, float]:
    """Settings of the best of so many trials, those of an earlier search counted, and its accuracy.

    `build` makes the trainer of one trial's settings; the given one takes over its parts and does the training.
    """

    def start(trial):
        if trial is None:
            return trainer.model
        for line in describe_progress(trial.study.get_trials(deepcopy=False)):
            say(line)
        settings = space.suggest(trial)
        say(f"trial {trial.number:<5} {json.dumps(settings)}")
        trainer.take_over(build(settings))
        return trainer.model

    trainer.model_init = start
    trainer.add_callback(TrialLogger(say))
    left = max(0, trials - count_finished(study))
    if left:
        trainer.hyperparameter_search(
            space.suggest, best_accuracy, left, direction="maximize", backend="optuna", **study
        )
    best = import_optuna().load_study(study_name=study["study_name"], storage=study["storage"]).best_trial
    return best.params, best.value


def write_best(out: Path, recipe: Mapping, accuracy: float) -> str:
    """best.yaml, a whole recipe, whole or not at all; returns its text."""
    path = out / BEST_FILE
    fewer = "# The search's max_train_samples stands below: without it the recipe trains on all images.\n"
    text = (
        f"# accelerate launch --config_file accelerate_config.yaml finetune_vit.py {path}\n#\n"
        f"# The best of a search: accuracy {accuracy:.4f} on training images held out for it.\n"
        f"{fewer if 'max_train_samples' in recipe else ''}"
        f"{yaml.safe_dump(dict(recipe), sort_keys=False)}"
    )
    write_atomically(path, text.encode())
    return text
