"""Numbers behind the report, counted by hand."""

import functools

import numpy as np
import pytest

from transfer.evaluation import predictions
from transfer.evaluation.metrics import score_interval
from transfer.reporting.charts import choose_classes, draw_matrix, find_ticks

CONFUSIONS = np.array([[8, 2, 0], [1, 9, 0], [0, 0, 5]])


def test_classes_are_scored_by_their_own_images_the_worst_first():
    scores = predictions.score_classes(CONFUSIONS)
    assert [(s.label, s.correct, s.images, s.confused_with, s.times) for s in scores] == [
        (0, 8, 10, 1, 2),
        (1, 9, 10, 0, 1),
        (2, 5, 5, None, 0),
    ]


def test_a_pair_counts_both_directions_and_names_the_loser_first():
    [pair] = predictions.find_confused_pairs(CONFUSIONS.T, most=5)
    assert (pair.first, pair.second, pair.first_as_second, pair.second_as_first) == (1, 0, 2, 1)


def test_a_confusion_is_counted_in_the_labels_row_and_a_class_without_images_has_a_row_too():
    logits = np.eye(3)[[1, 1, 2]]
    found = predictions.Predictions(["a", "b", "c"], [0, 0, 2], logits, [], np.empty((0, 3)))
    assert found.count_confusions().tolist() == [[0, 2, 0], [0, 0, 0], [0, 0, 1]]
    assert found.hits.tolist() == [False, False, True]


def test_the_calibration_error_is_the_gap_weighed_by_images():
    sure, unsure = [0.9, 0.1], [0.55, 0.45]
    probabilities = np.array([sure, sure, sure, sure, unsure, unsure])
    found = predictions.measure_reliability(probabilities, np.array([0, 0, 0, 1, 1, 1]))
    assert found.images.tolist() == [2, 4]
    assert found.confidence == pytest.approx([0.55, 0.9]) and found.accuracy == pytest.approx([0, 0.75])
    assert found.ece == pytest.approx((2 * 0.55 + 4 * 0.15) / 6)


def test_full_confidence_falls_into_the_last_bin():
    found = predictions.measure_reliability(np.array([[1.0, 0.0]]), np.array([0]))
    assert found.images.tolist() == [1] and found.ece == 0


def test_classes_that_are_taken_for_each_other_stand_side_by_side():
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(8), 20)
    probabilities = np.full((160, 8), 0.01) + rng.uniform(0, 0.01, (160, 8))
    probabilities[np.arange(160), labels] += 0.5
    probabilities[np.arange(160), (labels + 4) % 8] += 0.4  # 0 with 4, 1 with 5 ...
    order = predictions.order_classes(probabilities, labels)
    assert sorted(order) == list(range(8))
    assert all(abs(order.index(c) - order.index(c + 4)) == 1 for c in range(4))


def test_predictions_are_expected_as_the_held_out_images_were_confused():
    expected = predictions.expect_counts(CONFUSIONS, images=30)
    assert expected == pytest.approx([9, 11, 10])


def test_planted_label_errors_are_found_and_hard_images_are_not_called_errors():
    rng = np.random.default_rng(0)
    labels = np.arange(400) % 20
    logits = rng.normal(size=(400, 20))
    logits[np.arange(400), labels] += 9
    given = labels.copy()
    given[:10] = (labels[:10] + 7) % 20
    logits[np.arange(10), given[:10]] -= 3  # unlike the label that they bear
    logits[10:30] = rng.normal(size=(20, 20)) * 0.1  # hard ones: no class is likely
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    found = np.flatnonzero(predictions.find_label_issues(probabilities, given))
    assert set(found) == set(range(10))


def test_a_model_that_is_mostly_wrong_finds_no_label_errors():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(400, 20))
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    assert not predictions.find_label_issues(probabilities, np.arange(400) % 20).any()


def test_a_leaderboards_interval_covers_its_score_in_95_of_100_cases():
    rng, interval, covered = np.random.default_rng(0), functools.cache(score_interval), []
    for hits, scored in zip(rng.binomial(200, 0.8, 3000).tolist(), rng.binomial(100, 0.8, 3000) / 100, strict=True):
        low, high = interval(hits, 200, 100)
        covered.append(low <= scored <= high)
    assert 0.94 <= np.mean(covered) <= 0.98
    low, high = score_interval(4000, 5000, 500)
    assert (low, high) == pytest.approx((0.762, 0.836), abs=0.003)  # 0.8 +- 1.96 sqrt(0.16 (1/500 + 1/5000))


def test_of_very_many_classes_the_matrix_shows_those_with_mistakes():
    confusions = np.eye(300, dtype=int) * 5
    confusions[7, 250] = 3
    shown = choose_classes(confusions, list(range(300))[::-1])
    assert len(shown) == 120 and {7, 250} <= set(shown) and shown == sorted(shown, reverse=True)
    picture, reading = draw_matrix(confusions, [str(i) for i in range(300)], shown)
    assert [shown.index(7), shown.index(250), 3] in reading["cells"]
    assert 'class="wrong-3"' in picture  # 3 of 8 images: 37.5% lie between 20% and 40%


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.743, 0.791), (3, 3), (0, 0), (0, 12345), (-2, 1e-3)])
def test_ticks_are_few_and_span_the_values(low, high):
    ticks = find_ticks(low, high)
    assert ticks[0] <= low and high <= ticks[-1] and 2 <= len(ticks) <= 8
