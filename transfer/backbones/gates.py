"""Squeeze-and-excite gates that are pinned open, and cost time for nothing."""

import torch
from transformers import PreTrainedModel
from transformers.models.efficientnet.modeling_efficientnet import EfficientNetSqueezeExciteLayer


def _is_open(gate: EfficientNetSqueezeExciteLayer) -> bool:
    """Whether the gate multiplies by one whatever the image: a sigmoid of a bias alone, which rounds to one."""
    return not gate.expand.weight.any() and bool((torch.sigmoid(gate.expand.bias) == 1).all())


def _hand_on(images: torch.Tensor) -> torch.Tensor:
    return images


def skip_open_gates(model: PreTrainedModel) -> int:
    """Let gates that are pinned open hand on their input; returns how many.

    EfficientNet-Lite has no gates, and is written so as an EfficientNet. The result is the same bit for bit, and the
    gates would get no gradient (a sigmoid at one has none), but they take a tenth of a training step. Their parameters
    stay, for the saved model, and are not trained.
    """
    gates = [m for m in model.modules() if isinstance(m, EfficientNetSqueezeExciteLayer) and _is_open(m)]
    for gate in gates:
        gate.requires_grad_(False)
        gate.forward = _hand_on
    return len(gates)
