"""Faster training on a CPU with the same parameters and, up to rounding, the same results; and faster inference.

Depthwise convolutions: oneDNN has fast kernels for the weight gradient of kernels up to three columns wide, of any
height, and for the input gradient, except that of strided convolutions in bf16. Elsewhere it falls back to reference
code, which took three quarters of a training step of EfficientNet. Here those gradients are computed by convolutions
that have fast kernels. Inference and other devices are not affected.

Squeeze-and-excite gates: saturated ones, which multiply by exactly one, are skipped.

Attention: PyTorch's fused attention trains slowly on a CPU, so short sequences use plain matrix products.

Batch norms, activations and padding: for inference alone, `prepare_for_inference` folds the norms into the
convolutions before them, lets activations overwrite their input and lets depthwise convolutions pad it.
"""

from collections.abc import Callable
from contextlib import ExitStack, suppress
from itertools import pairwise
from types import MethodType
from typing import TypeGuard

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import fuse_conv_bn_eval
from transformers import PreTrainedModel
from transformers.models.efficientnet.modeling_efficientnet import EfficientNetSqueezeExciteLayer

FAST_COLUMNS = 3  # widest kernel with a fast weight gradient
IMAGES, WEIGHT = 0, 1  # positions in the results of convolution_backward


def _torch_gradient(
    of: int,
    gradient: torch.Tensor,
    images: torch.Tensor,
    weight: torch.Tensor,
    stride: tuple[int, int],
    padding: tuple[int, int],
) -> torch.Tensor:
    """The gradient of a depthwise convolution's images or weight (`of` is IMAGES or WEIGHT), computed by torch."""
    return torch.ops.aten.convolution_backward(
        gradient,
        images,
        weight,
        bias_sizes=None,
        stride=stride,
        padding=padding,
        dilation=(1, 1),
        transposed=False,
        output_padding=(0, 0),
        groups=len(weight),
        output_mask=(of == IMAGES, of == WEIGHT, False),
    )[of]


def weight_gradient(
    gradient: torch.Tensor,
    images: torch.Tensor,
    weight: torch.Tensor,
    stride: tuple[int, int],
    padding: tuple[int, int],
) -> torch.Tensor:
    """Return the gradient (C, 1, kH, kW) of a depthwise kernel, computed `FAST_COLUMNS` columns at a time.

    A group of kernel columns only meets certain columns of the image, so it is the kernel of a narrower convolution
    over a slice of the image.
    """
    (kernel_height, kernel_width), (height, width) = weight.shape[-2:], gradient.shape[-2:]
    images = F.pad(images, (padding[1], padding[1], padding[0], padding[0]))
    rows = (height - 1) * stride[0] + kernel_height
    gradients = []
    for first in range(0, kernel_width, FAST_COLUMNS):
        columns = weight[..., first : first + FAST_COLUMNS].contiguous()
        window = images[..., :rows, first : first + (width - 1) * stride[1] + columns.shape[-1]]
        gradients.append(_torch_gradient(WEIGHT, gradient, window, columns, stride, (0, 0)))
    return torch.cat(gradients, -1)


class _DepthwiseConvolution(torch.autograd.Function):
    """conv2d with one group per channel; images (B, C, H, W) and weight (C, 1, kH, kW) of one floating-point type."""

    @staticmethod
    def forward(ctx, images, weight, bias, stride, padding):
        ctx.save_for_backward(images, weight)
        ctx.stride, ctx.padding = stride, padding
        return F.conv2d(images, weight, bias, stride, padding, groups=len(weight))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        (images, weight), stride, padding = ctx.saved_tensors, ctx.stride, ctx.padding
        of_images = of_weight = of_bias = None
        low_precision, strided = gradient.dtype != torch.float32, max(stride) > 1
        if ctx.needs_input_grad[0]:
            tensors = (gradient, images, weight)
            if low_precision and strided:
                tensors = (gradient.float(), images.float(), weight.float())
            of_images = _torch_gradient(IMAGES, *tensors, stride, padding).to(gradient.dtype)
        if ctx.needs_input_grad[1]:
            if weight.shape[-1] > FAST_COLUMNS and (low_precision or not strided):
                of_weight = weight_gradient(gradient, images, weight, stride, padding)
            else:
                of_weight = _torch_gradient(WEIGHT, gradient, images, weight, stride, padding)
        if ctx.needs_input_grad[2]:
            of_bias = gradient.sum((0, 2, 3))
        return of_images, of_weight, of_bias, None, None


def _fast_forward(module: nn.Conv2d, images: torch.Tensor) -> torch.Tensor:
    """The forward pass of nn.Conv2d; when training on a CPU, its gradients take the fast way."""
    if images.device.type != "cpu" or not torch.is_grad_enabled():
        return nn.Conv2d.forward(module, images)
    weight, bias = module.weight, module.bias
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        images, weight, bias = images.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    padding = module.padding
    if isinstance(padding, str):
        padding = (0, 0) if padding == "valid" else tuple(size // 2 for size in module.kernel_size)
    return _DepthwiseConvolution.apply(images, weight, bias, module.stride, padding)


def _replace_forward(module: nn.Module, forward: Callable) -> None:
    # mypy forbids assigning to a method; here one instance gets another forward, and its class stays as it is.
    module.forward = MethodType(forward, module)  # type: ignore[method-assign]


def _has_slow_gradient(module: nn.Module) -> bool:
    """Whether the module is a plain depthwise convolution with a gradient that oneDNN computes slowly."""
    if not isinstance(module, nn.Conv2d) or type(module).forward is not nn.Conv2d.forward:
        return False
    if "forward" in vars(module) or module.padding_mode != "zeros":
        return False
    depthwise = module.groups == module.in_channels == module.out_channels
    symmetric = module.padding != "same" or all(size % 2 for size in module.kernel_size)
    slow = module.kernel_size[1] > FAST_COLUMNS or max(module.stride) > 1
    return depthwise and symmetric and slow and module.dilation == (1, 1)


def use_fast_depthwise(model: nn.Module) -> int:
    """Let depthwise convolutions compute their slow gradients the fast way; returns how many it changed."""
    modules = [module for module in model.modules() if _has_slow_gradient(module)]
    for module in modules:
        _replace_forward(module, _fast_forward)
    return len(modules)


def _is_saturated(gate: EfficientNetSqueezeExciteLayer) -> bool:
    """Whether the gate's output is one for every image: a sigmoid of its bias alone, which rounds to one."""
    weight, bias = gate.expand.weight, gate.expand.bias
    return bias is not None and not weight.any() and bool((torch.sigmoid(bias) == 1).all())


def _return_input(gate: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
    return hidden_states


def skip_saturated_gates(model: nn.Module) -> int:
    """Let saturated squeeze-and-excite gates return their input; returns how many it changed.

    EfficientNet-Lite has no gates; as an EfficientNet of transformers it has saturated ones, which take a tenth of a
    training step. Skipping them changes no bit of the results, and their gradients are zero anyway: the derivative of
    a saturated sigmoid is. Their parameters stay in the saved model and are frozen.
    """
    gates = [m for m in model.modules() if isinstance(m, EfficientNetSqueezeExciteLayer) and _is_saturated(m)]
    for gate in gates:
        gate.requires_grad_(False)
        _replace_forward(gate, _return_input)
    return len(gates)


def apply_cpu_speedups(model: nn.Module) -> None:
    """Speed up training on a CPU in place; parameters and outputs stay the same."""
    skip_saturated_gates(model)
    use_fast_depthwise(model)


ATTENTION_BYTES = 8  # of one attention weight while training: scores, fp32 softmax and its bf16 copy
ATTENTION_LIMIT = 2**30  # bytes that the attention weights of one training or evaluation batch may take


def use_plain_attention(model: PreTrainedModel, train_batch: tuple[int, int], eval_batch: tuple[int, int]) -> bool:
    """Let a transformer compute attention by matrix products instead of the fused kernel; returns whether it does.

    On a CPU, a training step of a ViT-S with 65 tokens then takes 0.77 times as long, but keeps the attention weights
    of all layers for the backward pass; evaluation keeps those of one layer. The model stays as it is if they would
    take more than `ATTENTION_LIMIT` for one of the batches, each (images, image size), or if there is a GPU.
    """
    part = "vision_config" if hasattr(model.config, "vision_config") else ""
    config = getattr(model.config, part) if part else model.config
    patch_size, heads, layers = (
        getattr(config, name, None) for name in ("patch_size", "num_attention_heads", "num_hidden_layers")
    )
    if not (isinstance(patch_size, int) and isinstance(heads, int) and isinstance(layers, int)):
        return False
    weights = [
        kept * images * heads * ((side // patch_size) ** 2 + 1) ** 2
        for kept, (images, side) in ((layers, train_batch), (1, eval_batch))
    ]
    if torch.accelerator.is_available() or ATTENTION_BYTES * max(weights) > ATTENTION_LIMIT:
        return False
    model.set_attn_implementation({part: "eager"})
    return True


INFERENCE_TOLERANCE = 1e-3  # of the largest logit; rounding alone changes it by about 1e-6
ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.SiLU, nn.Hardswish)  # those that can overwrite their input


def _neighbors(model: nn.Module) -> list[tuple[nn.Module, tuple[str, nn.Module], tuple[str, nn.Module]]]:
    """Modules that a module lists one after the other: (parent, (name, first), (name, second))."""
    return [(parent, *pair) for parent in model.modules() for pair in pairwise(parent.named_children())]


def _is_plain(module: nn.Module) -> TypeGuard[nn.Conv2d]:
    """Whether a module is a convolution that computes what its class says, with a weight of its own."""
    return (
        isinstance(module, nn.Conv2d)
        and type(module).forward is nn.Conv2d.forward
        and module.padding_mode == "zeros"
        and "weight" in dict(module.named_parameters(recurse=False))  # not computed from other parameters
    )


def _find_folds(model: nn.Module) -> list[tuple[nn.Module, nn.Conv2d, str, nn.BatchNorm2d]]:
    """Batch norms right after a convolution of as many channels: (parent, convolution, name, batch norm)."""
    return [
        (parent, convolution, name, norm)
        for parent, (_, convolution), (name, norm) in _neighbors(model)
        if _is_plain(convolution) and type(norm) is nn.BatchNorm2d  # a subclass may do more
        if convolution.out_channels == norm.num_features and norm.running_mean is not None
    ]


def _find_activations(model: nn.Module) -> list[nn.Module]:
    """Activations right after a convolution or a batch norm."""
    return [
        activation
        for _, (_, before), (_, activation) in _neighbors(model)
        if isinstance(before, nn.Conv2d | nn.BatchNorm2d) and isinstance(activation, ACTIVATIONS)
    ]


def _find_pads(model: nn.Module) -> list[tuple[nn.Module, str, nn.ZeroPad2d, nn.Conv2d]]:
    """Padding right before a depthwise convolution that does not pad: (parent, name, padding, convolution)."""
    return [
        (parent, name, pad, convolution)
        for parent, (name, pad), (_, convolution) in _neighbors(model)
        if isinstance(pad, nn.ZeroPad2d) and min(pad.padding) >= 0 and _is_plain(convolution)
        if convolution.padding in ("valid", (0, 0)) and convolution.dilation == (1, 1)
        if convolution.groups == convolution.in_channels > 1  # the kernel of the stem would be slower
    ]


def _fold_pad(pad: nn.ZeroPad2d, convolution: nn.Conv2d) -> tuple[nn.Parameter, tuple[int, int]]:
    """The (weight, padding) with which a convolution pads its input itself.

    Its padding is the same on both sides, so zeros extend the kernel on the side that has less.
    """
    left, right, top, bottom = pad.padding
    missing = [max(right - left, 0), max(left - right, 0), max(bottom - top, 0), max(top - bottom, 0)]
    weight = nn.Parameter(F.pad(convolution.weight, missing), requires_grad=False)
    return weight, (max(top, bottom), max(left, right))


def _replace(changes: ExitStack, owner: nn.Module, name: str, value: object) -> None:
    """Replace an attribute until `changes` is closed."""
    changes.callback(setattr, owner, name, getattr(owner, name))
    setattr(owner, name, value)


@torch.no_grad()
def prepare_for_inference(model: PreTrainedModel, size: tuple[int, int]) -> ExitStack:
    """Make the forward pass of a model on a CPU faster, for inference only; closing what it returns undoes that.

    Batch norms are folded into the convolutions before them, activations overwrite their input, and depthwise
    convolutions pad it: each saves a pass over memory. Modules that follow each other in a list need not be connected,
    and others may read what is overwritten, so all is undone at once if the logits of random images of this
    (height, width) change by more than rounding. A model on another device, or in autocast, which round more coarsely,
    stays as it is.
    """
    model.eval()
    folds, activations, pads = _find_folds(model), _find_activations(model), _find_pads(model)
    on_cpu = next(model.parameters()).device.type == "cpu"
    if not (folds or activations or pads) or not on_cpu or torch.is_autocast_enabled("cpu"):
        return ExitStack()
    images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
    before = type(model).forward(model, pixel_values=images).logits
    with ExitStack() as changes:
        for activation in activations:
            _replace(changes, activation, "inplace", True)
        for parent, name, pad, convolution in pads:
            weight, padding = _fold_pad(pad, convolution)
            _replace(changes, convolution, "weight", weight)
            _replace(changes, convolution, "padding", padding)
            _replace(changes, parent, name, nn.Identity())
        for parent, convolution, name, norm in folds:
            folded = fuse_conv_bn_eval(convolution, norm)
            _replace(changes, convolution, "weight", folded.weight)
            _replace(changes, convolution, "bias", folded.bias)
            _replace(changes, parent, name, nn.Identity())
        with suppress(RuntimeError):  # shapes that no longer fit
            change = (type(model).forward(model, pixel_values=images).logits - before).abs().max()
            if change <= INFERENCE_TOLERANCE * before.abs().max():
                return changes.pop_all()
    return ExitStack()
