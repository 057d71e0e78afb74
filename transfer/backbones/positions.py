"""A model brought to another image size: its position tables are resized once, so that nothing has to interpolate
later, neither in training nor in a plain pipeline."""

import copy

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from transfer import UserError


def _vision_config(config):
    """Where a config keeps the image size: CLIP and SigLIP describe a text tower too."""
    return getattr(config, "vision_config", config)


def _check_patches(config, image_size: int) -> None:
    if image_size % config.patch_size:
        raise UserError(f"--image_size {image_size}: must be a multiple of {config.patch_size}, the patch size")


def resize_table(module: nn.Module, table: torch.Tensor, config, image_size: int) -> torch.Tensor:
    """A table (1, N, D) of absolute positions for another image size, by the module's own interpolation."""
    old_patches = (config.image_size // config.patch_size) ** 2
    patches = (image_size // config.patch_size) ** 2
    # Only the shape of its first argument is read.
    tokens = torch.empty(1, table.shape[1] - old_patches + patches, table.shape[2])
    return module.interpolate_pos_encoding(tokens, image_size, image_size).clone()


def resize_relative_table(module: nn.Module, patches: int) -> torch.Tensor:
    """BEiT's table of biases for `patches` x `patches` tokens, as its forward would interpolate it at every step.

    (2P-1)^2 distances and three rows for the class token; x heads.
    """
    old = 2 * module.window_size[0] - 1
    distances, special = module.relative_position_bias_table.split([old * old, 3])
    distances = distances.reshape(1, old, old, -1).permute(0, 3, 1, 2)
    distances = F.interpolate(distances, (2 * patches - 1,) * 2, mode="bilinear")
    return torch.cat([distances.permute(0, 2, 3, 1).flatten(0, 2), special])


@torch.no_grad()
def interpolate_positions(model: PreTrainedModel, image_size: int) -> dict[str, torch.Tensor]:
    """Every position table of a ViT-like model for another image size, by its own interpolation."""
    tables, config = {}, _vision_config(model.config)
    for name, module in model.named_modules():
        if hasattr(module, "num_relative_distance"):
            _check_patches(config, image_size)
            table = resize_relative_table(module, image_size // config.patch_size)
            tables[f"{name}.relative_position_bias_table"] = table
        if not hasattr(module, "interpolate_pos_encoding"):
            continue
        if isinstance(table := getattr(module, "position_embeddings", None), nn.Parameter):
            _check_patches(config, image_size)
            tables[f"{name}.position_embeddings"] = resize_table(module, table, config, image_size)
        elif isinstance(embedding := getattr(module, "position_embedding", None), nn.Embedding):  # CLIP, SigLIP
            _check_patches(config, image_size)
            table = resize_table(module, embedding.weight[None], config, image_size)
            tables[f"{name}.position_embedding.weight"] = table[0]
    return tables


def resize_input(model: PreTrainedModel, image_size: int) -> PreTrainedModel:
    """The same model for square images of another size. Raises `UserError` where a model cannot change."""
    if hasattr(model, "timm_model"):
        return _resize_timm(model, image_size)
    if getattr(_vision_config(model.config), "image_size", image_size) == image_size:
        return model
    config = copy.deepcopy(model.config)
    _vision_config(config).image_size = image_size
    resized = type(model)(config)
    weights = model.state_dict() | interpolate_positions(model, image_size)
    expected = resized.state_dict()
    misfits = [name for name, values in weights.items() if expected[name].shape != values.shape]
    if misfits:
        old = _vision_config(model.config).image_size
        raise UserError(
            f"--image_size {image_size}: {type(model).__name__} cannot change from {old} px "
            f"({misfits[0]} would not fit)"
        )
    resized.load_state_dict(weights)
    return resized


def _resize_timm(model: PreTrainedModel, image_size: int) -> PreTrainedModel:
    """timm's ViTs and Swins resize themselves; its convolutional networks take any size."""
    config, old = model.config, model.config.pretrained_cfg.get("input_size", (3, 0, 0))[-1]
    config.pretrained_cfg["input_size"] = [3, image_size, image_size]
    if old == image_size or not hasattr(model.timm_model, "set_input_size"):
        return model
    try:
        model.timm_model.set_input_size(img_size=(image_size, image_size))
    except (AssertionError, RuntimeError, ValueError) as fault:
        reason = " ".join(str(fault).split())
        raise UserError(f"--image_size {image_size}: {config.architecture} cannot change to it ({reason})") from None
    config.model_args = {**(config.model_args or {}), "img_size": image_size}
    return model
