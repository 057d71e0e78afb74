"""Files that are written whole, the run's record, and the card."""

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import WNIDS
from huggingface_hub import ModelCard

from transfer import files
from transfer.errors import UserError
from transfer.evaluation.metrics import measure


def test_a_file_is_written_whole_or_stays_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "metrics.json"
    files.write_atomically(path, "old")
    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(OSError, match="disk full"):
            files.write_atomically(path, "new")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_kill_while_a_folder_is_replaced_leaves_no_half_of_it(tmp_path, monkeypatch):
    def write(text):
        return lambda folder: [(folder / name).write_text(text) for name in ("config", "weights")]

    def delete_a_half_and_be_killed(path, **_):
        if Path(path).exists():
            (Path(path) / "config").unlink()
            raise KeyboardInterrupt

    files.write_folder_atomically(tmp_path / "model", write("old"))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(files.shutil, "rmtree", delete_a_half_and_be_killed)
        files.write_folder_atomically(tmp_path / "model", write("new"))
    assert {path.name: path.read_text() for path in (tmp_path / "model").iterdir()} == {
        "config": "new",
        "weights": "new",
    }
    files.write_folder_atomically(tmp_path / "model", write("newer"))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_an_output_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--output_dir .*file/out: cannot be written"):
        files.claim_output_dir(tmp_path / "file" / "out", resuming=False)


def test_metrics_are_right_on_a_case_counted_by_hand():
    logits = np.zeros((10, 8))
    logits[np.arange(10), [0, 1, 2, 3, 4, 5, 6, 7, 0, 1]] = 2.0
    logits[8, 1] = logits[9, 0] = 1.0  # the right labels of the two mistakes come second
    metrics = measure(logits, np.array([0, 1, 2, 3, 4, 5, 6, 7, 1, 0]))
    assert metrics.accuracy == 0.8 and metrics.n == 10
    assert metrics.accuracy_ci95 == pytest.approx([0.4902, 0.9433], abs=1e-4)  # Wilson, by hand
    right, wrong = np.log(np.exp(2) + 7) - 2, np.log(np.exp(2) + np.exp(1) + 6) - 1
    assert metrics.loss == pytest.approx(0.8 * right + 0.2 * wrong)
    assert metrics.macro_f1 == pytest.approx((6 * 1 + 2 * 0.5) / 8)
    assert metrics.top5_accuracy == 1.0


def test_the_card_states_the_runs_own_numbers_and_loads_as_a_card(pristine_data, checkpoints, finetune):
    out = finetune(pristine_data, checkpoints("convnext"))
    card = ModelCard.load(out / "model" / "README.md")
    accuracy = json.loads((out / "metrics.json").read_text())["validation"]["accuracy"]
    assert card.data.eval_results[0].metric_value == accuracy
    assert f"| {accuracy:.4f} |" in card.text and card.data.library_name == "transformers"
    assert str(out.parent) not in card.content


def test_wnids_are_kept_in_the_saved_config(pristine_data, checkpoints, finetune):
    out = finetune(pristine_data, checkpoints("convnext"), num_train_epochs=1)
    assert json.loads((out / "model" / "config.json").read_text())["class_ids"] == WNIDS
