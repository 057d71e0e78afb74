"""A search finds what learns, goes on after a kill, and leaves a recipe that can be run."""

import json

import pytest
import yaml

from transfer.config import known_names
from transfer.errors import UserError
from transfer.runs.search import SearchSpace
from transfer.training.averaging import WeightAveraging
from transfer.training.trainer import FinetuningTrainer

optuna = pytest.importorskip("optuna", reason="--search is tested where Optuna is installed")
RATES = [1e-7, 1e-6, 1e-5, 1e-2]  # only the last one learns anything in two epochs


def space(**ranges) -> str:
    return json.dumps(ranges)


def trials_of(out) -> list:
    storage = f"sqlite:///{out / 'search.db'}"
    [study] = optuna.get_all_study_summaries(storage)
    return optuna.load_study(study_name=study.study_name, storage=storage).get_trials()


@pytest.fixture
def searching(pristine_data, checkpoints, finetune):
    """searching(**arguments) searches for the learning rate of a tiny model; returns its output folder."""

    def run(**arguments):
        defaults = {
            "search": 8,
            "search_space": space(learning_rate=RATES, layer_decay=[0.5, 1.0]),
            "min_crop_scale": 0.8,
        }
        return finetune(pristine_data, checkpoints("convnext"), **(defaults | arguments))

    return run


def test_a_search_finds_the_learning_rate_that_learns_and_writes_a_recipe(
    searching, pristine_data, checkpoints, finetune, capsys
):
    out = searching()
    best = yaml.safe_load((out / "best.yaml").read_text())
    assert best["learning_rate"] == 1e-2
    assert best["layer_decay"] in (0.5, 1.0) and best["min_crop_scale"] == 0.8
    assert not {"search", "disable_tqdm"} & best.keys()
    assert best["model_name_or_path"] == str(checkpoints("convnext"))
    said = capsys.readouterr().out
    assert (out / "best.yaml").read_text() in said
    assert "search      8 trials on the training images alone: train 28, validation 8\n" in said
    trials = trials_of(out)
    finished = [trial.value for trial in trials[:-1] if trial.state == optuna.trial.TrialState.COMPLETE]
    assert len(trials) == 8 and f"accuracy {max(finished):.4f}\ntrial 7" in said  # the best before the last one
    stopped = sum(trial.state == optuna.trial.TrialState.PRUNED for trial in trials[:-1])
    assert said.count("stopped: it fell behind the others") == stopped
    assert {path.name for path in out.iterdir()} == {"search.db", "best.yaml"}  # no trial leaves a checkpoint

    from finetune_vit import main

    main([str(out / "best.yaml"), "--output_dir", str(out / "run")])
    assert json.loads((out / "run" / "run.json").read_text())["arguments"]["learning_rate"] == 1e-2


def test_a_search_that_was_killed_goes_on_with_the_trials_that_are_left(searching, monkeypatch, capsys):
    trained, original = [], FinetuningTrainer.train
    ranges = space(learning_rate={"low": 1e-7, "high": 1e-2, "log": True})

    def killed(self, *args, **kwargs):
        trained.append(1)
        if len(trained) == 3:
            raise SystemExit("killed")
        return original(self, *args, **kwargs)

    monkeypatch.setattr(FinetuningTrainer, "train", killed)
    with pytest.raises(SystemExit, match="killed"):
        searching(search=5, search_space=ranges)
    with pytest.raises(SystemExit):
        searching(search=5, search_space=ranges)
    assert "holds a search; continue it with --resume_from_checkpoint true" in capsys.readouterr().err
    out = searching(search=5, search_space=ranges, resume_from_checkpoint="true")
    assert len(trained) == 3 + 3  # two were finished
    drawn = [trial.params["learning_rate"] for trial in trials_of(out) if trial.params]
    assert len(set(drawn)) == len(drawn) >= 5  # none a second time
    assert sum(trial.state.is_finished() and trial.value is not None for trial in trials_of(out)) == 5
    with pytest.raises(SystemExit):
        searching(search=5, search_space=ranges, resume_from_checkpoint="true", learning_rate="1e-3")
    assert "is a search with other settings or data" in capsys.readouterr().err


def test_a_search_whose_trials_are_not_evaluated_on_the_way_evaluates_them_at_their_end(searching):
    never = {"eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": "false"}
    out = searching(search=1, search_space=space(learning_rate=[1e-2]), **never)
    assert trials_of(out)[0].value > 0


def test_what_is_searched_is_what_the_trials_train_with(searching, monkeypatch):
    seen, original = [], FinetuningTrainer.train

    def watched(self, *args, **kwargs):
        result = original(self, *args, **kwargs)
        averages = any(isinstance(callback, WeightAveraging) for callback in self.callback_handler.callbacks)
        seen.append((self.args.learning_rate, self.layer_decay, averages))
        return result

    monkeypatch.setattr(FinetuningTrainer, "train", watched)
    out = searching(search=6, search_space=space(learning_rate=RATES, layer_decay=[0.5, 1.0], ema_decay=[0.0, 0.9]))
    tried = [(t.params["learning_rate"], t.params["layer_decay"], t.params["ema_decay"] > 0) for t in trials_of(out)]
    assert seen == tried


@pytest.mark.parametrize(
    ("ranges", "message"),
    [
        ({"learning_rat": [1e-3]}, "unknown argument 'learning_rat'; did you mean learning_rate"),
        ({"learning_rate": {"low": 1e-3}}, "learning_rate: give a list of choices, or low and high"),
        ({"learning_rate": {"low": "1e-4", "high": 1e-2}}, "low must be a number below high"),
        ({"learning_rate": []}, "learning_rate: give a list of choices"),
        ({}, "name arguments"),
    ],
)
def test_a_space_that_cannot_be_searched_is_refused(ranges, message):
    with pytest.raises(UserError, match=message):
        SearchSpace.read(json.dumps(ranges), known_names())


def test_a_search_beside_repeats_is_refused(searching, capsys):
    with pytest.raises(SystemExit):
        searching(kfold=2)
    assert "--search and --kfold cannot be combined" in capsys.readouterr().err
