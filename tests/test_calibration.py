"""Temperature scaling."""

import numpy as np
import pytest
from scipy.special import softmax

from transfer.evaluation.predictions import fit_temperature, measure_calibration


def honest_logits(images: int = 4000) -> tuple[np.ndarray, np.ndarray]:
    """Logits whose probabilities are those by which the labels were drawn."""
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, (images, 5))
    labels = np.array([rng.choice(5, p=p) for p in softmax(logits, axis=-1)])
    return logits, labels


@pytest.mark.parametrize("sharpness", [0.5, 1.0, 3.0])
def test_the_temperature_undoes_what_sharpened_the_logits(sharpness):
    logits, labels = honest_logits()
    assert fit_temperature(sharpness * logits, labels) == pytest.approx(sharpness, rel=0.06)


def test_scaling_fixes_overconfidence_on_images_it_was_not_fitted_on():
    logits, labels = honest_logits()
    calibration = measure_calibration(3 * logits, labels)
    assert calibration.ece > 0.1 > 0.03 > calibration.ece_scaled
    assert set(vars(calibration)) == {"temperature", "ece", "ece_scaled"}


def test_scaling_by_one_temperature_changes_no_label():
    logits, labels = honest_logits(50)
    assert np.array_equal((logits / fit_temperature(logits, labels)).argmax(1), logits.argmax(1))
