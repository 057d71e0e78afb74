"""predictions.npz and metrics.json: what is written is what is read, and a damaged file is refused."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from fabricated import seed_metrics, some_metrics, trained_metrics

from transfer.errors import UserError
from transfer.evaluation.metrics import (
    LinearProbe,
    MeanTrainMetrics,
    RunMetrics,
    Speed,
    SubmissionSource,
    TtaMetrics,
    measure,
)
from transfer.evaluation.predictions import Predictions


def some_predictions(**changes) -> Predictions:
    logits = np.random.default_rng(0).normal(size=(3, 4))
    values = {"validation_files": ["train/a/é.JPEG", "b", "c"], "validation_labels": [0, 3, 1]}
    values |= {"validation_logits": logits, "test_ids": ["007", "NA"], "test_logits": logits[:2]}
    return Predictions(**values | changes)


def test_predictions_come_back_as_they_were_saved(tmp_path):
    saved = some_predictions()
    saved.save(tmp_path)
    loaded = Predictions.load(tmp_path)
    assert loaded.validation_files.tolist() == ["train/a/é.JPEG", "b", "c"]
    assert loaded.test_ids.tolist() == ["007", "NA"]
    for name in ("validation_labels", "validation_logits", "test_logits"):
        first, second = getattr(saved, name), getattr(loaded, name)
        assert first.dtype == second.dtype and np.array_equal(first, second)
    assert [path.name for path in tmp_path.iterdir()] == ["predictions.npz"]


def test_arrays_that_do_not_belong_together_are_refused():
    with pytest.raises(ValueError, match="3 validation and 1 test images do not go with"):
        some_predictions(test_ids=["x"])


def test_a_pickle_is_not_opened(tmp_path):
    class Trap:
        def __reduce__(self):
            return (tmp_path.joinpath("sprung").touch, ())

    arrays = {name: getattr(some_predictions(), name) for name in Predictions.__dataclass_fields__}
    np.savez(tmp_path / "predictions.npz", **arrays | {"test_ids": np.array([Trap(), Trap()], dtype=object)})
    with pytest.raises(UserError, match=r"predictions.npz: is not a run's predictions .*allow_pickle"):
        Predictions.load(tmp_path)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("content", [b"", b"not a zip", b"PK\x03\x04 cut short"])
def test_a_damaged_file_is_named(content, tmp_path):
    (tmp_path / "predictions.npz").write_bytes(content)
    with pytest.raises(UserError, match=r"predictions.npz: is not a run's predictions"):
        Predictions.load(tmp_path)


def test_a_missing_file_says_that_the_run_was_not_finished(tmp_path):
    with pytest.raises(UserError, match="was not finished"):
        Predictions.load(tmp_path)
    with pytest.raises(UserError, match=r"metrics.json: cannot be read .*is .* a finished run?"):
        RunMetrics.read(tmp_path)


def test_metrics_come_back_as_they_were_written(tmp_path):
    views, submission = TtaMetrics(["plain", "flip"], {"plain": 0.7, "flip": 0.6}), SubmissionSource("soup", 0.8)
    seeds = seed_metrics([0.7, 0.72], soup=0.8, ensemble=0.75, members=[3, 5])
    measured = replace(trained_metrics(0.8), tta=views, prediction=Speed(50.0, 2.0), submission=submission, **seeds)
    measured.write(tmp_path)
    assert RunMetrics.read(tmp_path) == measured and [p.name for p in tmp_path.iterdir()] == ["metrics.json"]
    folds = RunMetrics(
        some_metrics(0.7),
        train=MeanTrainMetrics(0.9, 0.5, samples_per_second=3.0, seconds=4.0),
        linear_probe=LinearProbe(0.4),
        folds=[trained_metrics(0.7), trained_metrics(0.8)],
    )
    folds.write(tmp_path)
    assert RunMetrics.read(tmp_path) == folds


def test_metrics_json_has_a_key_for_each_stage_of_the_run_and_none_for_others():
    content = trained_metrics(0.8).to_json()
    assert set(content) == {"validation", "calibration", "zero_epoch", "train"}
    assert content["validation"]["accuracy_ci95"] == pytest.approx([0.7, 0.9])
    scores = {"accuracy", "accuracy_ci95", "top5_accuracy", "macro_f1", "loss", "n"}
    assert set(content["validation"]) == scores and set(content["train"]) == scores | {"samples_per_second", "seconds"}
    content = RunMetrics(some_metrics(0.7), submission=SubmissionSource("ensemble of 3 folds")).to_json()
    assert content["submission"] == {"from": "ensemble of 3 folds"}


def test_a_run_keeps_the_logits_behind_its_accuracy_and_its_submission(pristine_data, checkpoints, finetune):
    out = finetune(pristine_data, checkpoints("convnext"), num_train_epochs=1)
    kept = Predictions.load(out)
    validation = json.loads((out / "metrics.json").read_text())["validation"]
    assert vars(measure(kept.validation_logits, kept.validation_labels)) == validation
    assert all((pristine_data / file).is_file() for file in kept.validation_files)
    table = pd.read_csv(out / "submission.csv", dtype={"image_id": str}).set_index("image_id")["label"]
    assert table.loc[kept.test_ids].tolist() == kept.test_logits.argmax(-1).tolist()


def test_a_data_set_without_test_images_has_no_test_rows(data, checkpoints, finetune):
    shutil.rmtree(data / "test")
    (data / "submission_sample.csv").unlink()
    kept = Predictions.load(finetune(data, checkpoints("convnext"), num_train_epochs=1))
    assert kept.test_ids.shape == (0,) and kept.test_logits.shape == (0, 4)
