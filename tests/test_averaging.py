"""Averages of weights: along one training and of several."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from transfer.runs.repeats import greedy_soup
from transfer.training import trainer
from transfer.training.averaging import AVERAGE_FOLDER, average_weights, weights_of


def constant(value: float) -> nn.Module:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    with torch.no_grad():
        for values in model.state_dict().values():
            values.fill_(value)
    return model


def test_the_average_follows_its_formula_and_averages_batch_norms_too():
    model = constant(0.0)
    average = average_weights(model, decay=0.5)
    expected = 0.0
    for update, value in enumerate([4.0, 8.0, 2.0, 6.0]):
        model.load_state_dict(constant(value).state_dict())
        average.update_parameters(model)
        kept = 0.0 if update == 0 else min(0.5, (1 + update) / (10 + update))
        expected = kept * expected + (1 - kept) * value
    weights = average.module.state_dict()
    for name in ("0.weight", "1.running_mean"):
        torch.testing.assert_close(weights[name], torch.full_like(weights[name], expected))
    assert weights["1.num_batches_tracked"] == 6


def test_weights_are_lent_and_given_back():
    model = constant(1.0)
    with weights_of(constant(5.0), model):
        assert model[0].weight.eq(5).all()
    assert model[0].weight.eq(1).all()


def scores_by_mean(weights) -> float:
    """Best at a mean weight of 3."""
    return -abs(float(weights["0.weight"].mean()) - 3)


@pytest.mark.parametrize("values", [[1.0, 5.0, 100.0], [3.0, 9.0], [0.0, 1.0, 2.0]])
def test_a_soup_is_never_worse_than_its_best_member(values):
    candidates = [constant(value).state_dict() for value in values]
    scores = [scores_by_mean(weights) for weights in candidates]
    soup, members, score = greedy_soup(candidates, scores, scores_by_mean)
    assert score >= max(scores) and members[0] == int(np.argmax(scores))
    assert scores_by_mean(soup) == pytest.approx(score)
    assert soup["1.num_batches_tracked"].dtype == torch.int64


def test_a_soup_takes_what_helps_and_leaves_what_hurts():
    candidates = [constant(value).state_dict() for value in (1.0, 5.0, 100.0)]
    _, members, score = greedy_soup(candidates, [-2, -2, -97], scores_by_mean)
    assert members == [0, 1] and score == 0


def test_the_average_is_what_is_saved_where_it_is_better(pristine_data, checkpoints, finetune, monkeypatch):
    """The live weights are wrecked before the evaluation, the average is not."""

    original = trainer.FinetuningTrainer.evaluate

    def evaluate_wrecked(self, *args, **kwargs):
        if kwargs.get("metric_key_prefix") != "eval_ema":
            with torch.no_grad():
                for parameter in self.model.parameters():
                    parameter.zero_()
        return original(self, *args, **kwargs)

    monkeypatch.setattr(trainer.FinetuningTrainer, "evaluate", evaluate_wrecked)
    arguments = {"learning_rate": "1e-2", "layer_decay": 1, "min_crop_scale": 0.9, "num_train_epochs": 1}
    out = finetune(pristine_data, checkpoints("vit"), ema_decay=0.9, **arguments)
    (checkpoint,) = out.glob("checkpoint-*")
    live, average, kept = (
        load_file(place / "model.safetensors") for place in (checkpoint, checkpoint / AVERAGE_FOLDER, out / "model")
    )
    assert all(torch.equal(kept[name], average[name]) for name in average)
    assert not all(torch.equal(kept[name], live[name]) for name in live)
    evaluation = next(
        e for e in json.loads((out / "trainer_state.json").read_text())["log_history"] if "eval_ema_accuracy" in e
    )
    validation = json.loads((out / "metrics.json").read_text())["validation"]
    assert validation["accuracy"] == evaluation["eval_ema_accuracy"] > 0.25


def test_an_average_that_is_worse_is_not_kept_and_costs_nothing(pristine_data, checkpoints, finetune):
    plain = finetune(pristine_data, checkpoints("convnext"), learning_rate="1e-2", output_dir="plain")
    averaged = finetune(pristine_data, checkpoints("convnext"), learning_rate="1e-2", ema_decay=0.99)
    states = [json.loads((out / "trainer_state.json").read_text()) for out in (plain, averaged)]
    losses = [[e["loss"] for e in state["log_history"] if "loss" in e] for state in states]
    assert losses[0] == losses[1]  # the training itself is the same


@pytest.mark.parametrize("kind", ["vit", "convnext"])
def test_a_run_with_an_average_resumes_to_the_same_weights(kind, pristine_data, checkpoints, finetune):
    arguments = {"learning_rate": "5e-3", "num_train_epochs": 3, "ema_decay": 0.9, "save_total_limit": 5}
    whole = finetune(pristine_data, checkpoints(kind), output_dir="whole", **arguments)
    steps = sorted(int(path.name.split("-")[1]) for path in whole.glob("checkpoint-*"))
    resumed = finetune(
        pristine_data,
        checkpoints(kind),
        output_dir="resumed",
        resume_from_checkpoint=whole / f"checkpoint-{steps[0]}",
        **arguments,
    )
    for place in (f"checkpoint-{steps[-1]}", f"checkpoint-{steps[-1]}/{AVERAGE_FOLDER}", "model"):
        first, second = ((out / place / "model.safetensors").read_bytes() for out in (whole, resumed))
        assert first == second, place


def test_adapters_with_an_average_resume_to_the_same_weights(pristine_data, checkpoints, finetune):
    arguments = {"lora_r": 2, "ema_decay": 0.9, "learning_rate": "1e-2", "num_train_epochs": 3, "save_total_limit": 5}
    whole = finetune(pristine_data, checkpoints("vit"), output_dir="whole", **arguments)
    first = min(whole.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    resumed = finetune(
        pristine_data, checkpoints("vit"), output_dir="resumed", resume_from_checkpoint=first, **arguments
    )
    one, other = ((out / "model" / "model.safetensors").read_bytes() for out in (whole, resumed))
    assert one == other
