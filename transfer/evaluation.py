"""A trained model measured: on held-out images, on unaugmented training images, and its predictions for the test."""

import time
from collections.abc import Sequence

import datasets
import numpy as np

from transfer.calibration import measure_calibration
from transfer.data.pixels import PixelDataset, PixelStore
from transfer.data.splits import take_evenly
from transfer.experiment import average_views, choose_views
from transfer.predictions import Predictions
from transfer.reporting import measure
from transfer.training.trainer import FinetuningTrainer


def evaluate_split(trainer: FinetuningTrainer, split: PixelDataset) -> dict:
    """Metrics of the evaluation view of a labelled split."""
    outcome = trainer.predict(split)
    return measure(outcome.predictions, outcome.label_ids)


def sample_of_train(dataset: datasets.DatasetDict, store: PixelStore) -> PixelDataset:
    """As many training images as there are validation images, evenly over the classes."""
    train = dataset["train"]
    positions = take_evenly(range(len(train)), train["file"][:], train["label"][:], len(dataset["validation"]))
    return PixelDataset(store, train.select(positions))


def predict_and_measure(
    trainer: FinetuningTrainer, dataset: datasets.DatasetDict, store: PixelStore, test_time_views: Sequence[str] = ()
) -> tuple[Predictions, dict]:
    """Logits of the validation and test images; the accuracy on the first and how fast the second were predicted.

    Test-time views are averaged in where they raise the accuracy on the validation images.
    """
    labels = trainer.eval_dataset.labels
    tried = {name: trainer.predict_view(trainer.eval_dataset, name) for name in ["plain", *test_time_views]}
    kept = choose_views(tried, labels)
    held_out = average_views([tried[name] for name in kept])
    metrics = {"validation": measure(held_out, labels), "calibration": measure_calibration(held_out, labels)}
    if test_time_views:
        accuracies = {name: measure(logits, labels)["accuracy"] for name, logits in tried.items()}
        metrics["test_time_views"] = {"kept": kept, "accuracy": accuracies}
    ids, tested = [], np.empty((0, held_out.shape[-1]))
    if "test" in dataset:
        start = time.perf_counter()
        unlabelled = PixelDataset(store, dataset["test"])
        tested = average_views([trainer.predict_view(unlabelled, name) for name in kept])
        seconds = time.perf_counter() - start
        ids = dataset["test"]["image_id"][:]
        metrics["prediction"] = {"samples_per_second": len(ids) / seconds, "seconds": seconds}
    return Predictions(dataset["validation"]["file"][:], labels, held_out, ids, tested), metrics
