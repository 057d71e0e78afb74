"""Depthwise convolutions with faster gradients compute the same as torch's own."""

import copy

import pytest
import torch
from torch import nn
from transformers import ConvNextConfig, ConvNextForImageClassification

from transfer.models.cpu_kernels import use_fast_depthwise, weight_gradient

SHAPES = [  # kernel, stride, padding, height and width of the image
    (5, 1, 2, (9, 9)),
    (5, 1, "same", (6, 8)),
    (5, 2, 2, (8, 9)),
    (5, 2, "valid", (11, 10)),
    (3, 2, 1, (8, 8)),
    (7, 1, 3, (2, 2)),
    ((3, 4), (1, 2), (0, 1), (7, 9)),
]


def depthwise(kernel, stride, padding, bias=True) -> nn.Conv2d:
    torch.manual_seed(0)
    return nn.Conv2d(6, 6, kernel, stride, padding, groups=6, bias=bias)


def results(convolution: nn.Conv2d, images: torch.Tensor, mixed: bool) -> list[torch.Tensor]:
    """Output and the gradients of images, weight and bias."""
    images = images.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        output = convolution(images)
    weights = torch.linspace(-1, 1, output.numel()).reshape(output.shape)
    (output.float() * weights).sum().backward()
    return [output, images.grad, *(p.grad for p in convolution.parameters())]


@pytest.mark.parametrize("mixed", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("kernel", "stride", "padding", "size"), SHAPES)
def test_outputs_and_gradients_are_those_of_a_plain_convolution(kernel, stride, padding, size, bias, mixed):
    plain = depthwise(kernel, stride, padding, bias)
    fast = copy.deepcopy(plain)
    assert use_fast_depthwise(nn.Sequential(fast)) == 1
    images = torch.randn(3, 6, *size).contiguous(memory_format=torch.channels_last)
    expected, got = results(plain, images, mixed), results(fast, images, mixed)
    assert torch.equal(got[0], expected[0])
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, **({"rtol": 0.02, "atol": 0.02} if mixed else {}))


def test_a_weight_gradient_computed_by_columns_is_exact_up_to_rounding():
    torch.manual_seed(0)
    images, weight, gradient = torch.randn(4, 8, 12, 12), torch.randn(8, 1, 7, 7), torch.randn(4, 8, 12, 12)
    low_precision = [t.bfloat16() for t in (gradient, images, weight)]
    exact = [t.double() for t in low_precision]
    weight = exact[2].requires_grad_()
    nn.functional.conv2d(exact[1], weight, padding=3, groups=8).backward(exact[0])
    error = (weight_gradient(*low_precision, (1, 1), (3, 3)).double() - weight.grad).norm() / weight.grad.norm()
    assert error < 2**-8  # the rounding error of bf16


def test_other_convolutions_are_not_changed():
    others = [
        nn.Conv2d(6, 6, 5),
        nn.Conv2d(6, 12, 5, groups=6),
        nn.Conv2d(6, 6, 3, padding=1, groups=6),
        nn.Conv2d(6, 6, 5, groups=6, dilation=2),
        nn.Conv2d(6, 6, 5, groups=6, padding=2, padding_mode="reflect"),
        nn.Conv2d(6, 6, 4, groups=6, padding="same"),
    ]
    assert use_fast_depthwise(nn.Sequential(*others)) == 0
    assert not any("forward" in vars(module) for module in others)


def test_frozen_kernels_get_no_gradient():
    convolution = depthwise(5, 1, 2)
    use_fast_depthwise(nn.Sequential(convolution))
    convolution.weight.requires_grad_(False)
    images = torch.randn(2, 6, 8, 8, requires_grad=True)
    convolution(images).sum().backward()
    assert convolution.weight.grad is None
    assert images.grad.abs().sum() > 0


def test_a_model_with_fast_convolutions_is_saved_and_copied_unchanged(tmp_path):
    torch.manual_seed(0)
    model = ConvNextForImageClassification(ConvNextConfig(hidden_sizes=[8, 8], depths=[1, 1], num_stages=2)).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        before = model(images).logits
    assert use_fast_depthwise(model) == 2
    model.save_pretrained(tmp_path)
    reloaded = ConvNextForImageClassification.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert all(torch.equal(m(images).logits, before) for m in (model, copy.deepcopy(model), reloaded))
    replaced = [module for module in copy.deepcopy(model).modules() if "forward" in vars(module)]
    assert len(replaced) == 2 and all(module.forward.__self__ is module for module in replaced)  # its own weights
