"""A short run of benchmarks/chaos.py: datasets that are damaged, and laid out, at random."""

import importlib.util
import random
from collections import Counter

import pytest
from conftest import ROOT

from benchmarks.layout_check import fuzz_layouts
from transfer.data import layouts


def load_chaos():
    spec = importlib.util.spec_from_file_location("chaos", ROOT / "benchmarks" / "chaos.py")
    chaos = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(chaos)
    return chaos


def test_damaged_data_are_refused_in_a_line_or_read_as_what_they_are(tmp_path):
    outcomes = load_chaos().fuzz(24, tmp_path, random.Random(1))
    assert outcomes.keys() == {"refused", "accepted, right"}


def test_the_judge_notices_labels_that_follow_sorted_folders(tmp_path, monkeypatch):
    chaos = load_chaos()
    root = chaos.write_data_set(tmp_path / "set", 6, 6, chaos.np.random.default_rng(0))
    assert chaos.judge(root, None, tmp_path / "one") == "accepted, right"
    original = layouts.read_class_order

    def sort(*args, **kwargs):
        wnids, origin = original(*args, **kwargs)
        return sorted(wnids), origin

    monkeypatch.setattr(layouts, "read_class_order", sort)
    assert chaos.judge(root, None, tmp_path / "two") == "accepted, WRONG"


def test_random_layouts_are_read_as_what_they_are_or_refused_with_a_way_out(tmp_path, capsys):
    outcomes = fuzz_layouts(25, tmp_path, seed=1)
    assert outcomes.keys() <= {"right", "refused"} and outcomes["right"] >= 15, capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "change", "outcome"),
    [
        ("transfer.data.layouts.order_labels", lambda labels: sorted(labels, reverse=True), "WRONG"),
        ("transfer.data.layouts.list_test_images", lambda root: [], "WRONG"),
        ("transfer.data.layouts.natural_key", lambda name: 1 / 0, "TRACEBACK"),
        ("data_loading.list_unused", lambda root, used: (Counter(), Counter()), "SILENT"),
    ],
)
def test_the_judge_of_layouts_notices_what_is_wrong(name, change, outcome, tmp_path, monkeypatch):
    monkeypatch.setattr(name, change)
    assert fuzz_layouts(15, tmp_path, seed=1)[outcome] > 0
