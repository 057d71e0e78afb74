"""Files that are written whole, the run's record, the card, and the model link."""

import json
from typing import ClassVar

import numpy as np
import pytest
from conftest import WNIDS
from huggingface_hub import ModelCard
from huggingface_hub.errors import RepositoryNotFoundError

from transfer import UserError, hub, record
from transfer.reporting import measure


def test_a_file_is_written_whole_or_stays_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "metrics.json"
    record.write_whole(path, "old")
    with monkeypatch.context() as patch:
        patch.setattr(record.os, "fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(OSError, match="disk full"):
            record.write_whole(path, "new")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_an_output_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--output_dir .*file/out: cannot be written"):
        record.claim_output_dir(tmp_path / "file" / "out", resuming=False)


def test_metrics_are_right_on_a_case_counted_by_hand():
    logits = np.zeros((10, 8))
    logits[np.arange(10), [0, 1, 2, 3, 4, 5, 6, 7, 0, 1]] = 2.0
    logits[8, 1] = logits[9, 0] = 1.0  # the right labels of the two mistakes come second
    metrics = measure(logits, np.array([0, 1, 2, 3, 4, 5, 6, 7, 1, 0]))
    assert metrics["accuracy"] == 0.8 and metrics["n"] == 10
    assert metrics["accuracy_ci95"] == pytest.approx([0.4902, 0.9433], abs=1e-4)  # Wilson, by hand
    right, wrong = np.log(np.exp(2) + 7) - 2, np.log(np.exp(2) + np.exp(1) + 6) - 1
    assert metrics["loss"] == pytest.approx(0.8 * right + 0.2 * wrong)
    assert metrics["macro_f1"] == pytest.approx((6 * 1 + 2 * 0.5) / 8)
    assert metrics["top5_accuracy"] == 1.0


def test_the_card_states_the_runs_own_numbers_and_loads_as_a_card(pristine_data, checkpoints, finetune):
    out = finetune(pristine_data, checkpoints("convnext"))
    card = ModelCard.load(out / "model" / "README.md")
    accuracy = json.loads((out / "metrics.json").read_text())["validation"]["accuracy"]
    assert card.data.eval_results[0].metric_value == accuracy
    assert f"| {accuracy:.4f} |" in card.text and card.data.library_name == "transformers"
    assert str(out.parent) not in card.content


class FakeApi:
    """Stands for huggingface_hub.HfApi."""

    endpoint = "https://hub.example"
    calls: ClassVar[list] = []

    def create_repo(self, repo_id, **options):
        if repo_id.startswith("taken/"):
            raise RepositoryNotFoundError("403 Forbidden: you have no rights", response=_Response())
        self.calls.append(("create", repo_id, options))

    def upload_folder(self, **options):
        self.calls.append(("upload", options))
        return type("Commit", (), {"oid": "abc123"})


class _Response:
    headers, request, status_code, text = {}, None, 403, ""


def test_a_push_uploads_the_model_folder_alone_and_prints_the_link(
    pristine_data, checkpoints, finetune, monkeypatch, capsys
):
    monkeypatch.setattr(hub, "HfApi", FakeApi)
    FakeApi.calls.clear()
    out = finetune(
        pristine_data,
        checkpoints("convnext"),
        num_train_epochs=1,
        push_to_hub="true",
        hub_model_id="me/tiny",
        hub_private_repo="true",
    )
    assert "model link  https://hub.example/me/tiny/tree/abc123" in capsys.readouterr().out
    [(_, repo_id, created), (_, uploaded)] = FakeApi.calls
    assert repo_id == "me/tiny" and created["private"] is True
    assert uploaded["folder_path"] == out / "model"


def test_a_failed_push_keeps_the_run_and_says_how_to_push_again(
    pristine_data, checkpoints, finetune, monkeypatch, capsys, tmp_path
):
    monkeypatch.setattr(hub, "HfApi", FakeApi)
    with pytest.raises(SystemExit) as stop:
        finetune(
            pristine_data, checkpoints("convnext"), num_train_epochs=1, push_to_hub="true", hub_model_id="taken/tiny"
        )
    message = capsys.readouterr().err
    assert stop.value.code == 2 and "you have no rights" in message
    assert f"--do_train false --model_name_or_path {tmp_path / 'out' / 'model'} --output_dir " in message
    assert (tmp_path / "out" / "submission.csv").is_file()


def test_a_model_that_is_pushed_later_keeps_its_card_and_names_its_place(
    pristine_data, checkpoints, finetune, monkeypatch
):
    monkeypatch.setattr(hub, "HfApi", FakeApi)
    out = finetune(pristine_data, checkpoints("convnext"), num_train_epochs=1)
    pushed = {"do_train": "false", "push_to_hub": "true", "hub_model_id": "me/tiny"}
    again = finetune(pristine_data, out / "model", output_dir="again", **pushed)
    card, first = ((place / "model" / "README.md").read_text() for place in (again, out))
    assert 'model="me/tiny"' in card and card.replace("me/tiny", "path/to/model") == first
    assert json.loads((again / "run.json").read_text())["arguments"]["push_to_hub"] is True
    assert FakeApi.calls[-1][1]["folder_path"] == again / "model"


def test_wnids_are_kept_in_the_saved_config(pristine_data, checkpoints, finetune):
    out = finetune(pristine_data, checkpoints("convnext"), num_train_epochs=1)
    assert json.loads((out / "model" / "config.json").read_text())["wnids"] == WNIDS
