"""Several trainings of one recipe: their mean and spread, and what they are worth together."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from scipy.special import log_softmax, logsumexp
from transformers import TrainingArguments

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


def trial_arguments(run, args: TrainingArguments, settings: Mapping):
    """The run's and the Trainer's arguments of one trial of a search, which leaves nothing on the disk."""
    own = {name: value for name, value in settings.items() if hasattr(run, name)}
    args = copy.copy(args)
    quiet = {"save_strategy": "no", "load_best_model_at_end": False, "report_to": [], "resume_from_checkpoint": None}
    for name, value in (settings | quiet).items():
        if name not in own:
            setattr(args, name, value)
    return replace(run, **own), args


def summarise(runs: Sequence[Mapping]) -> dict[str, dict]:
    """Mean and standard deviation (of a sample: n - 1) over the trainings' metrics."""
    summary = {"mean": {}, "std": {}}
    for split, names in SUMMARISED.items():
        values = {name: [run[split][name] for run in runs] for name in names}
        summary["mean"][split] = {name: float(np.mean(v)) for name, v in values.items()}
        summary["std"][split] = {name: float(np.std(v, ddof=1)) for name, v in values.items()}
    return summary


def average_probabilities(logits: Sequence[np.ndarray]) -> np.ndarray:
    """The ensemble's log-probabilities (N, classes), from each member's logits (N, classes)."""
    members = np.stack([log_softmax(np.asarray(member, dtype=np.float64), axis=-1) for member in logits])
    return logsumexp(members, axis=0) - np.log(len(members))


def choose_submission(scores: Mapping[str, float]) -> str:
    """The name with the best validation accuracy; of equals the first, so name the simpler one first."""
    return max(scores, key=lambda name: scores[name])


def average_views(logits: Sequence[np.ndarray]) -> np.ndarray:
    """Logits (N, classes) of one view as they are; of several, the log of their mean probabilities."""
    return logits[0] if len(logits) == 1 else average_probabilities(logits)


def choose_views(tried: Mapping[str, np.ndarray], labels: np.ndarray) -> list[str]:
    """Names of the views to average: the first, and each other that makes those before it more accurate."""
    names = list(tried)
    kept, best = names[:1], (tried[names[0]].argmax(-1) == labels).mean()
    for name in names[1:]:
        together = average_views([tried[k] for k in [*kept, name]])
        accuracy = (together.argmax(-1) == labels).mean()
        if accuracy > best:
            kept, best = [*kept, name], accuracy
    return kept


def plain_accuracy(run: Mapping) -> float:
    """Validation accuracy of a run's model as a plain pipeline shows it the images."""
    return run.get("test_time_views", {}).get("accuracy", {}).get("plain", run["validation"]["accuracy"])
