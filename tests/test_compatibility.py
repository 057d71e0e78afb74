"""The guard on other libraries: it lists every override, and a rename upstream is an error instead of silence."""

import ast

import evaluate
import pytest
import torch
import transformers
from conftest import ROOT

from transfer import runtime
from transfer.errors import UserError
from transfer.evaluation import metrics
from transfer.runs import search, timing  # noqa: F401  their callbacks are looked at below
from transfer.runtime import CALLED, OVERRIDDEN, TESTED, check_libraries
from transfer.training import averaging  # noqa: F401
from transfer.training.trainer import FinetuningTrainer

PARENTS = {
    "transformers:Trainer": transformers.Trainer,
    "evaluate:Metric": evaluate.Metric,
    "transformers:TrainerCallback": transformers.TrainerCallback,
}


def test_the_installed_libraries_fit():
    check_libraries()


@pytest.mark.parametrize(("name", "method"), [(name, method) for name in OVERRIDDEN for method in OVERRIDDEN[name]])
def test_a_method_that_was_renamed_is_named_with_both_versions(name, method, monkeypatch):
    package = name.partition(":")[0]
    parent = next(kind for kind in PARENTS[name].__mro__ if method in vars(kind))
    original = getattr(parent, method)
    monkeypatch.delattr(parent, method)
    monkeypatch.setattr(parent, f"{method}_renamed", original, raising=False)
    monkeypatch.setattr(runtime.importlib.metadata, "version", lambda _: "99.0")
    with pytest.raises(
        UserError, match=rf"{package} 99\.0 has no {method}\(.*tested with {package} {TESTED[package]}"
    ):
        check_libraries()


def test_a_parameter_that_was_renamed_is_noticed(monkeypatch):
    monkeypatch.setattr(transformers.Trainer, "training_step", lambda self, model, batch: None)
    with pytest.raises(UserError, match=r"no training_step\(model, inputs, num_items_in_batch\)"):
        check_libraries()


def test_a_private_function_that_is_gone_is_noticed(monkeypatch):
    [name] = CALLED
    monkeypatch.delattr(torch.cpu, name.partition(":")[2])
    with pytest.raises(UserError, match=r"torch .* has no _is_avx512_bf16_supported"):
        check_libraries()


def test_a_run_checks_the_libraries_first(monkeypatch, capsys):
    from finetune_vit import main

    monkeypatch.delattr(transformers.Trainer, "_get_grad_norm")
    with pytest.raises(SystemExit) as stop:
        main(["recipes/none.yaml"])
    assert stop.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: transformers ") and "_get_grad_norm" in line


@pytest.mark.parametrize(
    ("ours", "name"),
    [(FinetuningTrainer, "transformers:Trainer"), (metrics.ImageClassificationMetric, "evaluate:Metric")],
)
def test_every_method_of_ours_that_hides_a_parents_is_listed(ours, name):
    parent = PARENTS[name]
    hides = {method for method in vars(ours) if callable(getattr(ours, method)) and hasattr(parent, method)}
    assert {method for method in hides if not method.startswith("__")} == set(OVERRIDDEN[name])


def test_every_hook_of_our_callbacks_is_listed_and_exists():
    ours = [kind for kind in transformers.TrainerCallback.__subclasses__() if kind.__module__.startswith("transfer.")]
    assert len(ours) >= 7  # of checkpoints, averaging, timing, search and the Trainer
    hooks = {name for kind in ours for name in vars(kind) if name.startswith("on_")}
    assert hooks == set(OVERRIDDEN["transformers:TrainerCallback"])


def test_no_other_private_name_of_a_library_is_used():
    documented = {"_exit"}  # of os
    allowed = {name.partition(":")[2] for name in CALLED} | set(OVERRIDDEN["transformers:Trainer"]) | documented
    for path in [*(ROOT / "transfer").rglob("*.py"), ROOT / "finetune_vit.py", ROOT / "data_loading.py"]:
        tree = ast.parse(path.read_text())
        ours = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        used = {
            node.attr
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__")
            if not (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"))
        }
        assert used - ours <= allowed, (path, used - ours - allowed)


def test_the_tested_versions_are_those_of_the_constraints():
    pinned = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    assert {name: pinned[name] for name in TESTED} == TESTED


@pytest.mark.parametrize("package", ["transformers", "accelerate"])
def test_the_requirements_stop_at_the_next_untested_minor_version(package):
    [line] = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if line.startswith(package)]
    major, minor, _ = map(int, TESTED[package].split("."))
    assert line.endswith(f",<{major}.{minor + 1}")
