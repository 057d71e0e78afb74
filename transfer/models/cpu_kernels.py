"""Speed-ups for a CPU that leave parameters and results as they are.

Depthwise convolutions: oneDNN has fast kernels for the weight gradient up to three columns wide, however high, and
falls back on reference code beyond that; for the input gradient of strided ones it does so in bf16. Both together took
three quarters of a training step of EfficientNet. The slow gradients are computed by convolutions that are fast.
Nothing changes on other devices or where no gradient is wanted.

Gates: squeeze-and-excite gates that are pinned open are skipped.
"""

from types import MethodType

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers.models.efficientnet.modeling_efficientnet import EfficientNetSqueezeExciteLayer

FAST_COLUMNS = 3  # of a kernel


def _gradients(
    gradient: torch.Tensor,
    images: torch.Tensor,
    weight: torch.Tensor,
    stride: tuple[int, int],
    padding: tuple[int, int],
    of_images: bool = False,
    of_weight: bool = False,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """What torch itself computes."""
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
        output_mask=(of_images, of_weight, False),
    )[:2]


def weight_gradient(
    gradient: torch.Tensor,
    images: torch.Tensor,
    weight: torch.Tensor,
    stride: tuple[int, int],
    padding: tuple[int, int],
) -> torch.Tensor:
    """The gradient (C, 1, kH, kW) of a depthwise kernel, some of its columns at a time.

    Columns of a kernel see columns of the image: each share is the kernel of a narrower convolution over a slice.
    """
    (kernel_height, kernel_width), (height, width) = weight.shape[-2:], gradient.shape[-2:]
    images = F.pad(images, (padding[1], padding[1], padding[0], padding[0]))
    rows = (height - 1) * stride[0] + kernel_height
    shares = []
    for first in range(0, kernel_width, FAST_COLUMNS):
        columns = weight[..., first : first + FAST_COLUMNS].contiguous()
        seen = images[..., :rows, first : first + (width - 1) * stride[1] + columns.shape[-1]]
        shares.append(_gradients(gradient, seen, columns, stride, (0, 0), of_weight=True)[1])
    return torch.cat(shares, -1)


class _DepthwiseConvolution(torch.autograd.Function):
    """conv2d with groups = channels; images (B, C, H, W) and weight (C, 1, kH, kW) of one floating-point type."""

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
        lean, strided = gradient.dtype != torch.float32, max(stride) > 1
        if ctx.needs_input_grad[0]:
            operands = [t.float() if lean and strided else t for t in (gradient, images, weight)]
            of_images = _gradients(*operands, stride, padding, of_images=True)[0].to(gradient.dtype)
        if ctx.needs_input_grad[1]:
            if weight.shape[-1] > FAST_COLUMNS and (lean or not strided):
                of_weight = weight_gradient(gradient, images, weight, stride, padding)
            else:
                of_weight = _gradients(gradient, images, weight, stride, padding, of_weight=True)[1]
        if ctx.needs_input_grad[2]:
            of_bias = gradient.sum((0, 2, 3))
        return of_images, of_weight, of_bias, None, None


def _fast_forward(module: nn.Conv2d, images: torch.Tensor) -> torch.Tensor:
    """What nn.Conv2d computes, with the fast gradients where a CPU trains."""
    if images.device.type != "cpu" or not torch.is_grad_enabled():
        return nn.Conv2d.forward(module, images)
    weight, bias = module.weight, module.bias
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        images, weight, bias = (t if t is None else t.to(dtype) for t in (images, weight, bias))
    padding = module.padding
    if isinstance(padding, str):
        padding = (0, 0) if padding == "valid" else tuple(size // 2 for size in module.kernel_size)
    return _DepthwiseConvolution.apply(images, weight, bias, module.stride, padding)


def _is_slow(module: nn.Module) -> bool:
    """Whether it is a depthwise convolution, computed as torch does, one of whose gradients is slow."""
    if not isinstance(module, nn.Conv2d) or type(module).forward is not nn.Conv2d.forward:
        return False
    if "forward" in vars(module) or module.padding_mode != "zeros":
        return False
    depthwise = module.groups == module.in_channels == module.out_channels
    symmetric = module.padding != "same" or all(size % 2 for size in module.kernel_size)
    slow = module.kernel_size[1] > FAST_COLUMNS or max(module.stride) > 1
    return depthwise and symmetric and slow and module.dilation == (1, 1)


def use_fast_depthwise(model: nn.Module) -> int:
    """Let depthwise convolutions compute their gradients the fast way; returns how many. Parameters stay."""
    modules = [module for module in model.modules() if _is_slow(module)]
    for module in modules:
        module.forward = MethodType(_fast_forward, module)  # type: ignore[method-assign]
    return len(modules)


def _is_open(gate: EfficientNetSqueezeExciteLayer) -> bool:
    """Whether the gate multiplies by one whatever the image: a sigmoid of a bias alone, which rounds to one."""
    return not gate.expand.weight.any() and bool((torch.sigmoid(gate.expand.bias) == 1).all())


def _identity(images: torch.Tensor) -> torch.Tensor:
    return images


def skip_open_gates(model: PreTrainedModel) -> int:
    """Let gates that are pinned open return their input; returns how many.

    EfficientNet-Lite has no gates, and is written so as an EfficientNet. The result is the same bit for bit, and the
    gates would get no gradient (a sigmoid at one has none), but they take a tenth of a training step. Their parameters
    stay, for the saved model, and are not trained.
    """
    gates = [m for m in model.modules() if isinstance(m, EfficientNetSqueezeExciteLayer) and _is_open(m)]
    for gate in gates:
        gate.requires_grad_(False)
        gate.forward = _identity
    return len(gates)
