"""Low-rank adapters through peft: a large backbone stays as it is, the head is trained in full, and what is saved in
the end is a plain model (Hu et al. 2022)."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel

from transfer.errors import UserError
from transfer.models.layers import find_blocks, find_heads, freeze_batch_norm_stats

if TYPE_CHECKING:
    from peft import PeftModel

WEIGHTS = "adapter_model.safetensors"  # peft's name


def adapted_layers(model: PreTrainedModel, rank: int) -> list[str]:
    """The linear layers of the backbone's blocks that an adapter of this rank is smaller than.

    Attention and MLP alike: adapters on attention alone learn less at the same size (Schulman 2025).
    """
    blocks = tuple(f"{name}." for name in find_blocks(model))
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and name.startswith(blocks)
        and rank * (module.in_features + module.out_features) < module.weight.numel()
    ]


def add_adapters(model: PreTrainedModel, rank: int) -> "PeftModel":
    """The model with adapters of a rank on every block and all else but its head frozen.

    The adapters' scale is 2 whatever their rank, so that a learning rate carries over from one rank to another.
    """
    from peft import LoraConfig, get_peft_model  # peft takes seconds to import, and few runs need it

    targets = adapted_layers(model, rank)
    if not targets:
        raise UserError(
            f"--lora_r {rank}: {type(model).__name__} has no linear layers in its blocks that such adapters would be "
            "smaller than; use a smaller rank, a transformer or a ConvNeXt, or --freeze_layers"
        )
    settings = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, modules_to_save=list(find_heads(model)))
    adapted = get_peft_model(model, settings)
    adapted.peft_config["default"].base_model_name_or_path = None  # a checkpoint holds adapters of this run alone
    freeze_batch_norm_stats(adapted, frozen_only=True)
    return adapted


def is_adapted(model: nn.Module) -> bool:
    """Whether a model is one of peft's."""
    return hasattr(model, "merge_and_unload")


def holds_adapters(checkpoint: Path) -> bool:
    """Whether a checkpoint is one of adapters."""
    return (checkpoint / WEIGHTS).is_file()


def _adapter_weights(model: "PeftModel") -> dict[str, torch.Tensor]:
    """Adapters and head under the names that peft saves them by."""
    from peft import get_peft_model_state_dict

    return get_peft_model_state_dict(model, save_embedding_layers=False)  # else it asks the Hub for a vocabulary


def load_adapters(model: "PeftModel", checkpoint: Path) -> None:
    """Bring adapters and head to a checkpoint's. Raises `UserError` where it holds others."""
    from peft import set_peft_model_state_dict

    try:
        weights = load_file(checkpoint / WEIGHTS)
    except (OSError, SafetensorError) as fault:
        raise UserError(f"{checkpoint}: holds no adapters of this run ({fault})") from None
    expected = _adapter_weights(model)
    differing = weights.keys() ^ expected.keys()
    differing |= {name for name in weights.keys() & expected.keys() if weights[name].shape != expected[name].shape}
    if differing:
        raise UserError(f"{checkpoint}: holds other adapters than this run's ({min(differing)}); is --lora_r another?")
    set_peft_model_state_dict(model, weights)


def check_same_adapters(model: "PeftModel", checkpoint: Path) -> None:
    """Refuse live adapters that are not those of the checkpoint that was chosen, bit for bit."""
    live, chosen = _adapter_weights(model), load_file(checkpoint / WEIGHTS)
    differing = [name for name in chosen if name not in live or not torch.equal(live[name].cpu(), chosen[name])]
    if differing or live.keys() != chosen.keys():
        raise RuntimeError(f"{checkpoint}: was chosen, but the model differs in {differing or 'its names'}")


def merge_adapters(model: "PeftModel") -> PreTrainedModel:
    """The plain model that computes the same, up to rounding."""
    return model.merge_and_unload().requires_grad_(True)
