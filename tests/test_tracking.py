"""What a run logs on its way: wall time, and trackers that are installed."""

import json

import pytest
from transformers.integrations import is_tensorboard_available

from transfer import cli, config
from transfer.errors import UserError


def history_of(out) -> list[dict]:
    return json.loads((out / "trainer_state.json").read_text())["log_history"]


def test_every_entry_of_the_log_has_its_seconds_and_a_resumed_run_counts_on(pristine_data, checkpoints, finetune):
    out = finetune(pristine_data, checkpoints("convnext"), num_train_epochs=1)
    first = [entry["seconds"] for entry in history_of(out)]
    assert len(first) >= 2 and first == sorted(first) and first[0] > 0
    finetune(pristine_data, checkpoints("convnext"), num_train_epochs=2, resume_from_checkpoint="true")
    both = [entry["seconds"] for entry in history_of(out)]
    assert len(both) > len(first) and both == sorted(both)


def test_tensorboard_is_the_default_where_it_is_installed_and_nothing_elsewhere(monkeypatch):
    monkeypatch.setattr(config, "is_tensorboard_available", lambda: True)
    assert config.default_trackers() == ["tensorboard"]
    monkeypatch.setattr(config, "is_tensorboard_available", lambda: False)
    assert config.default_trackers() == []


def test_without_tensorboard_a_run_goes_on_and_says_nothing_of_it(
    pristine_data, checkpoints, finetune, monkeypatch, capsys
):
    monkeypatch.setattr(config, "is_tensorboard_available", lambda: False)
    out = finetune(pristine_data, checkpoints("convnext"), num_train_epochs=1)
    assert not (out / "runs").exists() and "tensorboard" not in capsys.readouterr().err.lower()
    assert json.loads((out / "run.json").read_text())["arguments"]["report_to"] == []


@pytest.mark.skipif(not is_tensorboard_available(), reason="tensorboard is not installed")
def test_with_tensorboard_a_run_leaves_its_curves(pristine_data, checkpoints, finetune):
    out = finetune(pristine_data, checkpoints("convnext"), num_train_epochs=1)
    assert list((out / "runs").rglob("events.out.tfevents.*"))
    silent = finetune(
        pristine_data, checkpoints("convnext"), output_dir="silent", num_train_epochs=1, report_to="none"
    )
    assert not (silent / "runs").exists()


def missing_tracker() -> str:
    """A tracker that this environment does not have."""
    for name in ("wandb", "trackio", "comet_ml", "clearml"):
        try:
            cli.check_trackers([name])
        except UserError:
            return name
    pytest.skip("every tracker is installed")


def test_a_tracker_that_is_not_installed_is_an_error_before_anything_is_read(tmp_path, finetune, capsys):
    name = missing_tracker()
    with pytest.raises(SystemExit) as stop:
        finetune(tmp_path / "no data", "nowhere", report_to=name)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith(f"error: --report_to {name}: cannot be used: ")
    assert "install" in error and len(error.splitlines()) == 1


def test_an_unknown_tracker_names_those_that_exist(tmp_path, finetune, capsys):
    with pytest.raises(SystemExit):
        finetune(tmp_path / "no data", "nowhere", report_to="tensorbord")
    error = capsys.readouterr().err
    assert "error: --report_to tensorbord: is not a tracker; choose from " in error and "tensorboard" in error
