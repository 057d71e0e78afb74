"""Finished runs without any training: the content of a run's folder, made up."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np

from transfer.evaluation.metrics import (
    Calibration,
    ClassificationMetrics,
    RunMetrics,
    Scores,
    SoupMetrics,
    SplitScores,
    TrainMetrics,
    ZeroEpoch,
    measure,
)
from transfer.evaluation.predictions import Predictions, measure_calibration

# The content of run.json besides the arguments.
RECORD = {
    "command": "accelerate launch --config_file accelerate_config.yaml finetune_vit.py recipes/sample.yaml",
    "precision": "precision: bf16 (mixed_precision in the accelerate config)",
    "local_model": True,
    "code": {"commit": "0123abc", "clean": True},
    "versions": {"python": "3.11.9", "torch": "2.13.0"},
    "device": "CPU, Some Processor, 2 threads",
    "data_fingerprint": "d4" * 32,
    "split_fingerprint": "5e" * 32,
}
ARGUMENTS = {
    "model_name_or_path": "offline",
    "output_dir": "outputs/made_up",
    "hub_model_id": None,
    "push_to_hub": False,
    "label_smoothing_factor": 0.1,
    "learning_rate": 0.002,
    "num_train_epochs": 3.0,
    "seed": 0,
}


def some_logits(labels, classes: int, seed: int = 0, sharpness: float = 2.5) -> np.ndarray:
    """(N, classes) logits that mostly favor the labels."""
    logits = np.random.default_rng(seed).normal(size=(len(labels), classes))
    logits[np.arange(len(labels)), labels] += sharpness
    return logits.astype(np.float32)


def some_metrics(accuracy: float, loss: float = 1.5) -> ClassificationMetrics:
    """Metrics of a split with this accuracy and loss."""
    return ClassificationMetrics(accuracy, [accuracy - 0.1, accuracy + 0.1], 0.95, accuracy - 0.01, loss, n=48)


def trained_metrics(accuracy: float, train_accuracy: float = 0.9) -> RunMetrics:
    """Metrics of a single training with this validation accuracy."""
    train = TrainMetrics(**vars(some_metrics(train_accuracy, 0.5)), samples_per_second=123.4, seconds=76.5)
    calibration = Calibration(temperature=0.9, ece=0.04, ece_scaled=0.03)
    return RunMetrics(some_metrics(accuracy), calibration, zero_epoch=ZeroEpoch(0.125), train=train)


def seed_metrics(accuracies, soup: float, ensemble: float, members: list[int]) -> dict:
    """What several seeds with these validation accuracies add to the metrics of their run."""
    return {
        "seeds": [trained_metrics(accuracy) for accuracy in accuracies],
        "mean": SplitScores(Scores(float(np.mean(accuracies)), 1.5), Scores(0.9, 0.5)),
        "std": SplitScores(Scores(float(np.std(accuracies, ddof=1)), 0.0), Scores(0.0, 0.0)),
        "soup": SoupMetrics(**vars(some_metrics(soup)), members=members),
        "ensemble": some_metrics(ensemble),
    }


def write_run(folder: Path, data_dir, files, labels, names, logits=None, test_ids=(), **changes) -> Path:
    """A finished run's folder; `changes` replace stages of its metrics, or values of run.json under `record`."""
    (folder / "model").mkdir(parents=True)
    labels, classes = np.asarray(labels), len(names)
    logits = some_logits(labels, classes) if logits is None else np.asarray(logits, dtype=np.float32)
    test_logits = some_logits(np.arange(len(test_ids)) % classes, classes, seed=1)
    Predictions(files, labels, logits, list(test_ids), test_logits).save(folder)
    record = RECORD | {"arguments": ARGUMENTS | {"data_dir": str(data_dir)}} | changes.pop("record", {})
    validation = measure(logits, labels)
    train = TrainMetrics(**vars(validation), samples_per_second=123.4, seconds=76.5)
    metrics = RunMetrics(validation, measure_calibration(logits, labels), zero_epoch=ZeroEpoch(0.125), train=train)
    replace(metrics, **changes).write(folder)
    (folder / "run.json").write_text(json.dumps(record))
    (folder / "model" / "config.json").write_text(json.dumps({"id2label": dict(enumerate(names))}))
    return folder


def write_history(folder: Path, epochs: int = 2, offset: float = 0.0) -> None:
    """A Trainer's log with two losses and one evaluation an epoch."""
    folder.mkdir(exist_ok=True)
    history = []
    for step in range(2 * epochs):
        history.append({"epoch": step / 2, "loss": 2 - 0.3 * step, "learning_rate": 1e-3, "seconds": 5.0 * step})
        if step % 2:
            accuracy = 0.5 + 0.05 * step + offset
            history.append({"epoch": step / 2, "eval_loss": 1.0, "eval_accuracy": accuracy, "seconds": 5.0 * step + 1})
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": history}))
