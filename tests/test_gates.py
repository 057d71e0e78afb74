"""Skipping saturated squeeze-and-excite gates does not change the results."""

import copy

import pytest
import torch
from transformers import EfficientNetConfig, EfficientNetForImageClassification

from transfer.models.cpu_kernels import skip_saturated_gates


def small_efficientnet(saturated: bool) -> EfficientNetForImageClassification:
    torch.manual_seed(0)
    config = EfficientNetConfig(
        image_size=32, width_coefficient=0.25, depth_coefficient=0.2, hidden_dim=320, hidden_act="relu6", num_labels=4
    )
    model = EfficientNetForImageClassification(config)
    if saturated:
        for name, values in model.named_parameters():
            if "squeeze_excite" in name:
                values.data.fill_(20.0 if name.endswith("expand.bias") else 0.0)
    return model


@pytest.mark.parametrize("mixed", [False, True], ids=["fp32", "bf16"])
def test_logits_and_gradients_are_the_same_bit_for_bit(mixed):
    plain = small_efficientnet(saturated=True).eval()
    skipping = copy.deepcopy(plain)
    assert skip_saturated_gates(skipping) == 7
    images, results = torch.randn(2, 3, 32, 32), []
    for model in (plain, copy.deepcopy(skipping)):
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            logits = model(images).logits
        logits.float().square().sum().backward()
        results.append((logits, {n: p.grad for n, p in model.named_parameters() if "squeeze_excite" not in n}))
    assert torch.equal(results[0][0], results[1][0])
    assert all(torch.equal(gradient, results[1][1][name]) for name, gradient in results[0][1].items())


def test_skipped_gates_are_frozen_but_saved(tmp_path):
    model = small_efficientnet(saturated=True)
    before = copy.deepcopy(model.state_dict())
    skip_saturated_gates(model)
    assert not any(p.requires_grad for n, p in model.named_parameters() if "squeeze_excite" in n)
    model.save_pretrained(tmp_path)
    again = EfficientNetForImageClassification.from_pretrained(tmp_path).state_dict()
    assert before.keys() == again.keys() and all(torch.equal(before[name], again[name]) for name in before)


def test_gates_that_depend_on_the_image_are_kept():
    assert skip_saturated_gates(small_efficientnet(saturated=False)) == 0
