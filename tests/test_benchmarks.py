"""The benchmarks that train: what they count, and that they run."""

import json
import re
import sys
from types import SimpleNamespace

import pytest
from conftest import WNIDS

from benchmarks import ablation, peers, scale, time_to_accuracy
from benchmarks.time_to_accuracy import compare, first_time
from transfer.errors import UserError
from transfer.models import build

CURVE = [[0.0, 0.1], [10.0, 0.3], [20.0, 0.2], [30.0, 0.5]]


@pytest.mark.parametrize(
    ("accuracy", "seconds"),
    [(0.05, 0.0), (0.1, 0.0), (0.2, 5.0), (0.3, 10.0), (0.35, 25.0), (0.5, 30.0), (0.6, None)],
)
def test_an_accuracy_is_reached_between_points_linearly_or_never(accuracy, seconds):
    reached = first_time(CURVE, accuracy)
    assert reached == (None if seconds is None else pytest.approx(seconds))


def test_curves_come_to_a_ratio_of_errors_and_one_of_times():
    outcome = compare(project=CURVE, stock=[[0.0, 0.0], [40.0, 0.3]])
    assert outcome["error_ratio"] == pytest.approx(0.5 / 0.7) and outcome["time_ratio"] == pytest.approx(0.25)


def test_the_clock_counts_steps_and_the_wait_for_images_but_no_evaluation(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time_to_accuracy.time, "perf_counter", lambda: now[0])

    class SlowToEvaluate:
        eval_dataset = range(10)

        def evaluate(self, images):
            now[0] += 100
            return {"eval_accuracy": 0.5}

    curve = time_to_accuracy.Curve(SlowToEvaluate())
    curve.on_train_begin(None, None, None)
    for step in range(1, 17):
        now[0] += 2  # until the images are there
        curve.on_step_begin(None, None, None)
        now[0] += 1
        curve.on_step_end(None, SimpleNamespace(global_step=step, max_steps=16), None)
    assert [seconds for seconds, _ in curve.points] == [0, *range(6, 49, 6)]


@pytest.fixture
def words(pristine_data, checkpoints, tmp_path, monkeypatch):
    """What both benchmarks are told of a tiny training."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text("per_device_train_batch_size: 8\nnum_train_epochs: 1\nvalidation_fraction: 0.25\n")
    model, found = checkpoints("vit"), tmp_path / "found.json"
    return [str(recipe), "--data_dir", str(pristine_data), "--model_name_or_path", str(model), "--json", str(found)]


def test_stock_and_project_are_trained_to_the_end_of_every_budget(words, monkeypatch, tmp_path, capsys):
    budgets = ["--minutes", "0.01", "0.02", "--learning_rates", "1e-4", "1e-2"]
    monkeypatch.setattr(build, "note", print)
    monkeypatch.setattr(sys, "argv", ["time_to_accuracy.py", *words, "--learning_rate", "0.0077", *budgets])
    time_to_accuracy.main()
    output = capsys.readouterr().out
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["learning_rates"].keys() == {"0.0001", "0.01"} and found["budgets"].keys() == {"0.01", "0.02"}
    best = max(found["learning_rates"].values())
    assert found["budgets"]["0.01"]["stock"][-1][1] == best
    for outcome in found["budgets"].values():
        for curve in (outcome["stock"], outcome["project"]):
            times = [seconds for seconds, _ in curve]
            assert times[0] == 0.0 and times == sorted(times) and len(curve) > time_to_accuracy.POINTS
    assert "rates       0.0077 for the head" in output
    assert re.search(r"0.02 min: project \d\.\d{4}\n0.02 min: stock 0\.\d{4}; error ratio", output)
    if time_to_accuracy.pyplot is None:
        pytest.skip("matplotlib is an optional extra (requirements-extras.txt)")
    time_to_accuracy.draw(found, tmp_path / "curves.svg")
    assert "project, 0.02 min" in (tmp_path / "curves.svg").read_text()


def test_every_peer_is_trained_with_its_best_settings(words, checkpoints, monkeypatch, tmp_path, capsys):
    trained = []

    def train(peer, size, learning_rate, minutes):
        assert len(peer.train) > len(peer.validation) > 0
        trained.append((size, learning_rate, minutes))
        return size / 100 * learning_rate * minutes

    monkeypatch.setitem(peers.PEERS, "timm", (True, (1.0, 3.0, 2.0), train))
    monkeypatch.setattr(time_to_accuracy, "version", lambda name: "1.0")
    words = [*words, "--model_name_or_path", str(checkpoints("convnext")), "--image_size", "32"]
    budgets = ["--minutes", "0.02", "0.01", "--train_image_size", "32", "48", "64"]
    monkeypatch.setattr(sys, "argv", ["time_to_accuracy.py", *words, *budgets, "--peers", "timm"])
    time_to_accuracy.main()
    tuned = [(32, 1.0, 0.01), (32, 3.0, 0.01), (32, 2.0, 0.01), (64, 3.0, 0.01)]
    assert trained == [*tuned, (64, 3.0, 0.02)]
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["peers"]["timm"]["budgets"] == {"0.01": pytest.approx(0.0192), "0.02": pytest.approx(0.0384)}
    assert not found["learning_rates"] and found["budgets"]["0.02"].keys() == {"project"}  # no standard recipe
    assert re.search(r"0.02 min: timm 0\.0384; error ratio \d\.\d\d\n", capsys.readouterr().out)


def test_a_peer_that_is_not_installed_is_refused_before_anything_is_measured(words, monkeypatch, capsys):
    monkeypatch.setitem(peers.PEERS, "fastai", (None, (), None))
    monkeypatch.setattr(sys, "argv", ["time_to_accuracy.py", *words, "--peers", "fastai"])
    with pytest.raises(SystemExit):
        time_to_accuracy.main()
    assert "--peers: pip install fastai" in capsys.readouterr().err


def test_peers_are_not_compared_on_a_vit(words, monkeypatch):
    monkeypatch.setitem(peers.PEERS, "timm", (True, (), None))
    monkeypatch.setattr(time_to_accuracy, "version", lambda name: "1.0")
    monkeypatch.setattr(sys, "argv", ["time_to_accuracy.py", *words, "--peers", "timm"])
    with pytest.raises(UserError, match="convolutional"):
        time_to_accuracy.main()


@pytest.mark.parametrize("name", ["fastai", "timm"])
def test_a_peer_learns(name, words, checkpoints, monkeypatch, tmp_path):
    if peers.PEERS[name][0] is None:
        pytest.skip(f"{name} is not installed; it needs a PyTorch with torchvision")
    learning_rate = {"fastai": 8e-3, "timm": 2e-3}[name]
    monkeypatch.setitem(peers.PEERS, name, (True, (learning_rate,), peers.PEERS[name][2]))
    words = [*words, "--model_name_or_path", str(checkpoints("convnext")), "--image_size", "32"]
    budgets = ["--minutes", "0.1", "--peers", name]
    monkeypatch.setattr(sys, "argv", ["time_to_accuracy.py", *words, *budgets])
    time_to_accuracy.main()
    assert json.loads((tmp_path / "found.json").read_text())["peers"][name]["budgets"]["0.1"] > 2 / len(WNIDS)


def test_the_growth_of_every_input_is_drawn(tmp_path):
    if scale.pyplot is None:
        pytest.skip("matplotlib is an optional extra (requirements-extras.txt)")
    quantities = ("cold_seconds", "warm_seconds", "images_per_second", "disk_bytes", "memory_bytes")
    rows = [
        {"images": count, "contenders": {name: dict.fromkeys(quantities, count * 1e6) for name in scale.CONTENDERS}}
        for count in (1000, 3000)
    ]
    scale.draw_plot(rows, tmp_path / "growth.svg")
    drawn = (tmp_path / "growth.svg").read_text()
    assert all(word in drawn for word in (*scale.CONTENDERS, "(GB)", "2,000"))


@pytest.mark.parametrize("benchmark", [time_to_accuracy, scale])
def test_a_plot_that_cannot_be_drawn_is_refused_before_anything_is_measured(benchmark, words, monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "pyplot", None)
    words = words if benchmark is time_to_accuracy else []
    monkeypatch.setattr(sys, "argv", [benchmark.__name__, *words, "--plot", "curves.png"])
    with pytest.raises(SystemExit):
        benchmark.main()
    assert "--plot: pip install matplotlib" in capsys.readouterr().err


def test_an_ablation_changes_one_thing_at_a_time(words, monkeypatch, tmp_path, capsys):
    chosen = ["--variants", "one learning rate for all levels", "mixup", "--seeds", "0", "1"]
    monkeypatch.setattr(sys, "argv", ["ablation.py", *words, *chosen, "--learning_rate", "1e-2"])
    ablation.main()
    found = json.loads((tmp_path / "found.json").read_text())
    assert list(found) == ["the recipe", "one learning rate for all levels", "mixup"]
    assert all(len(scores) == 2 for scores in found.values())
    assert "| the recipe |" in capsys.readouterr().out
