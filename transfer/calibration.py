"""Whether probabilities mean what they say, and the one number that makes them (Guo et al. 2017)."""

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, softmax

from transfer.reporting.diagnosis import judge_confidence

HIGHEST = 20.0  # temperature; the lowest is its inverse


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """The number by which logits (N, classes) are divided for the least cross-entropy against labels (N,)."""
    rows = np.arange(len(labels))

    def loss(log_temperature: float) -> float:
        return -log_softmax(logits / np.exp(log_temperature), axis=-1)[rows, labels].mean()

    bound = np.log(HIGHEST)
    return float(np.exp(minimize_scalar(loss, bounds=(-bound, bound), method="bounded").x))


def measure_calibration(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Temperature, and the expected calibration error without and with it.

    Each half of the images is scaled by the temperature of the other half, so that the error is not measured where
    the temperature was fitted. Scaling changes no label: the submission is the same.
    """
    logits = np.asarray(logits, dtype=np.float64)
    scaled, first = np.empty_like(logits), np.arange(len(labels)) % 2 == 0
    for half in (first, ~first):
        other = ~half if (~half).any() else half
        scaled[half] = logits[half] / fit_temperature(logits[other], labels[other])
    return {
        "temperature": fit_temperature(logits, labels),
        "ece": judge_confidence(softmax(logits, axis=-1), labels).ece,
        "ece_scaled": judge_confidence(softmax(scaled, axis=-1), labels).ece,
    }
