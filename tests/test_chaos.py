"""A short run of benchmarks/chaos.py: datasets that are damaged at random."""

import importlib.util
import random

from conftest import ROOT


def load_chaos():
    spec = importlib.util.spec_from_file_location("chaos", ROOT / "benchmarks" / "chaos.py")
    chaos = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(chaos)
    return chaos


def test_damaged_data_are_refused_in_a_line_or_read_as_what_they_are(tmp_path):
    outcomes = load_chaos().fuzz(24, tmp_path, random.Random(1))
    assert outcomes.keys() == {"refused", "accepted, right"}


def test_the_judge_notices_labels_that_follow_sorted_folders(tmp_path, monkeypatch):
    import data_loading

    chaos = load_chaos()
    root = chaos.write_data_set(tmp_path / "set", 6, 6, chaos.np.random.default_rng(0))
    assert chaos.judge(root, None, tmp_path / "one") == "accepted, right"
    original = data_loading.read_class_order

    def sort(*args, **kwargs):
        wnids, origin = original(*args, **kwargs)
        return sorted(wnids), origin

    monkeypatch.setattr(data_loading, "read_class_order", sort)
    assert chaos.judge(root, None, tmp_path / "two") == "accepted, WRONG"
