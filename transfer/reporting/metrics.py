"""What is measured on labelled images, and metrics.json."""

import json
from collections.abc import Mapping
from pathlib import Path

import datasets
import evaluate
import numpy as np
from scipy.special import log_softmax
from scipy.stats import betabinom, binomtest
from sklearn.metrics import f1_score, top_k_accuracy_score

from transfer.record import write_whole


def accuracy_interval(hits: int, images: int) -> tuple[float, float]:
    """95% interval of an accuracy (Wilson 1927): what other images of the same kind would give."""
    interval = binomtest(hits, images).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)


def score_interval(hits: int, images: int, scored: int) -> tuple[float, float]:
    """Where the accuracy on `scored` other images lies in 95% of cases, after `hits` of `images` were right.

    Beta-binomial under Jeffreys' prior: covers the luck of both draws, as a leaderboard's public part has it.
    """
    seen = betabinom(scored, hits + 0.5, images - hits + 0.5)
    return float(seen.ppf(0.025) / scored), float(seen.ppf(0.975) / scored)


class ClassificationMetrics(evaluate.Metric):
    """Accuracy with its 95% interval, top-5 accuracy, macro F1 and cross-entropy, from logits.

    A metric of our own: `evaluate.load` fetches its scripts from the Hub. The interval does not cover the spread over
    training seeds.
    """

    def _info(self):
        return evaluate.MetricInfo(
            description=self.__doc__,
            citation="",
            inputs_description="predictions: logits, (N, classes); references: labels, (N,)",
            features=datasets.Features(
                predictions=datasets.Sequence(datasets.Value("float32")), references=datasets.Value("int64")
            ),
        )

    def _compute(self, predictions, references):
        logits, labels = np.asarray(predictions, dtype=np.float64), np.asarray(references)
        chosen, classes = logits.argmax(-1), np.arange(logits.shape[1])
        hits = int((chosen == labels).sum())
        many = logits.shape[1] > 5
        return {
            "accuracy": hits / len(labels),
            "accuracy_ci95": list(accuracy_interval(hits, len(labels))),
            "top5_accuracy": float(top_k_accuracy_score(labels, logits, k=5, labels=classes)) if many else 1.0,
            "macro_f1": float(f1_score(labels, chosen, labels=np.unique(labels), average="macro")),
            "loss": float(-log_softmax(logits, axis=-1)[np.arange(len(labels)), labels].mean()),
            "n": len(labels),
        }


def measure(logits: np.ndarray, labels: np.ndarray) -> dict:
    """Metrics of logits (N, classes) against labels (N,)."""
    metric = ClassificationMetrics(keep_in_memory=True)
    return metric.compute(predictions=logits.astype(np.float32), references=labels)


def write_metrics(folder: Path, metrics: Mapping) -> None:
    """metrics.json, whole or not at all."""
    write_whole(folder / "metrics.json", json.dumps(metrics, indent=2, allow_nan=False) + "\n")


def read_metrics(folder: Path) -> dict:
    """A run's metrics.json."""
    return json.loads((folder / "metrics.json").read_text())
