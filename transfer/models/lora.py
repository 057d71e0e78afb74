"""LoRA adapters through peft (Hu et al. 2022).

The backbone is frozen, adapters and head are trained, and the adapters are merged into a plain model when it is saved.
"""

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

WEIGHTS = "adapter_model.safetensors"  # the file name that peft uses


def adapted_layers(model: PreTrainedModel, rank: int) -> list[str]:
    """Return the linear layers of the backbone's blocks that have more weights than an adapter of this rank.

    Both attention and MLP layers: adapters of the same size learn less on attention layers alone (Schulman 2025).
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
    """Return the model with adapters in its blocks, everything but adapters and head frozen.

    Raises `UserError` for a model without layers to adapt. The adapters' scale (alpha / r) is 2 at every rank, so that
    a learning rate carries over from one rank to another.
    """
    from peft import LoraConfig, get_peft_model  # peft takes seconds to import, and few runs need it

    targets = adapted_layers(model, rank)
    if not targets:
        raise UserError(
            f"--lora_r {rank}: {type(model).__name__} has no linear layers in its blocks that are larger than such "
            "adapters; use a smaller rank, a transformer or ConvNeXt checkpoint, or --freeze_layers"
        )
    settings = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, modules_to_save=list(find_heads(model)))
    adapted = get_peft_model(model, settings)
    adapted.peft_config["default"].base_model_name_or_path = None  # when saving, peft would look it up on the Hub
    freeze_batch_norm_stats(adapted, frozen_only=True)
    return adapted


def is_adapted(model: nn.Module) -> bool:
    """Return whether the model has LoRA adapters."""
    return hasattr(model, "merge_and_unload")


def holds_adapters(checkpoint: Path) -> bool:
    """Return whether a checkpoint folder holds LoRA adapters instead of a model."""
    return (checkpoint / WEIGHTS).is_file()


def _adapter_weights(model: "PeftModel") -> dict[str, torch.Tensor]:
    """The weights of adapters and head under the names that peft saves them by."""
    from peft import get_peft_model_state_dict

    # By default, peft asks the Hub for the base model's vocabulary size.
    return get_peft_model_state_dict(model, save_embedding_layers=False)


def load_adapters(model: "PeftModel", checkpoint: Path) -> None:
    """Load adapters and head from a checkpoint. Raises `UserError` unless every tensor is there and fits."""
    from peft import set_peft_model_state_dict

    try:
        weights = load_file(checkpoint / WEIGHTS)
    except (OSError, SafetensorError) as fault:
        raise UserError(f"{checkpoint}: its LoRA adapters cannot be loaded ({fault})") from None
    expected = _adapter_weights(model)
    differing = weights.keys() ^ expected.keys()
    differing |= {name for name in weights.keys() & expected.keys() if weights[name].shape != expected[name].shape}
    if differing:
        raise UserError(
            f"{checkpoint}: holds other adapters than this run's, for example in {min(differing)}; set the --lora_r "
            "that they were trained with"
        )
    set_peft_model_state_dict(model, weights)


def check_same_adapters(model: "PeftModel", checkpoint: Path) -> None:
    """Raise `RuntimeError` unless adapters and head equal those of the chosen checkpoint, bit for bit."""
    live, chosen = _adapter_weights(model), load_file(checkpoint / WEIGHTS)
    differing = [name for name in chosen if name not in live or not torch.equal(live[name].cpu(), chosen[name])]
    if differing or live.keys() != chosen.keys():
        raise RuntimeError(f"{checkpoint}: was chosen, but the model differs in {differing or 'its names'}")


def merge_adapters(model: "PeftModel") -> PreTrainedModel:
    """Return the plain model with the adapters merged into its weights; its outputs stay the same up to rounding."""
    return model.merge_and_unload().requires_grad_(True)
