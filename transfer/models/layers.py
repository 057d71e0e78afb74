"""A classifier's parts by depth: its heads, its blocks, their learning rates, and which of them are frozen."""

import math

from torch import nn
from transformers import PreTrainedModel

from transfer.errors import UserError

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
MAX_BLOCK_LEVELS = 24  # ViT-L's depth: deeper backbones share levels, or their first layers would hardly learn


def head_modules(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The parts that turn features into logits, by name (DeiT's teacher model has two)."""
    if hasattr(model, "timm_model"):
        found = model.timm_model.get_classifier()
        heads = found if isinstance(found, tuple) else (found,)
        return {name: module for name, module in model.named_modules() if any(module is head for head in heads)}
    return {name: module for name, module in model.named_children() if "classifier" in name}


def head_names(model: PreTrainedModel) -> set[str]:
    """Names of the heads' parameters and buffers."""
    prefixes = tuple(f"{name}." for name in head_modules(model))
    return {name for name in model.state_dict() if name.startswith(prefixes)}


def find_heads(model: PreTrainedModel) -> dict[str, nn.Linear]:
    """The linear layers that give the logits, by name."""
    heads = {}
    for prefix, part in head_modules(model).items():
        for name, module in part.named_modules(prefix=prefix):
            if isinstance(module, nn.Linear) and module.out_features == model.num_labels:
                heads[name] = module
    if not heads:
        raise UserError(f"{type(model).__name__}: no linear head was found; use a ViT, ConvNeXt or similar checkpoint")
    return heads


def _count_matrices(module: nn.Module) -> int:
    """Weight matrices and convolutions, without those of adapters."""
    return sum(p.ndim > 1 for name, p in module.named_parameters() if "lora_" not in name)


def find_blocks(model: PreTrainedModel) -> list[str]:
    """Names of the backbone's blocks in the order of the data: ViT's layers, ConvNeXt's blocks inside its stages.

    A block is an item of a list of modules that holds two weight matrices or more, and no smaller block.
    """
    heads = tuple(f"{name}." for name in head_modules(model))
    items = [
        f"{name}.{index}"
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList | nn.Sequential) and not f"{name}.".startswith(heads)
        for index, item in module.named_children()
        if _count_matrices(item) >= 2
    ]
    blocks = {item for item in items if not any(other.startswith(f"{item}.") for other in items)}
    found = (prefix for name, _ in model.named_parameters() for prefix in _prefixes(name) if prefix in blocks)
    return list(dict.fromkeys(found))


def _prefixes(name: str) -> list[str]:
    """Every module that a parameter lies in: a.b.c -> [a, a.b]."""
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts))]


def parameter_levels(model: PreTrainedModel) -> dict[str, int]:
    """How deep every parameter lies: 0 for the stem, one more for each block, the head last.

    What stands between two blocks, such as ConvNeXt's downsampling, counts with the block above it; what comes after
    the last block is one level more. More than `MAX_BLOCK_LEVELS` blocks share levels, neighbours together:
    ConvNeXt-L's 36 are two by two (the ConvNeXt authors take three).
    """
    blocks, heads = find_blocks(model), head_names(model)
    shared = max(1, math.ceil(len(blocks) / MAX_BLOCK_LEVELS))
    level_of = {block: 1 + position // shared for position, block in enumerate(blocks)}
    levels, above = {}, max(level_of.values(), default=0) + 1
    for name in reversed([name for name, _ in model.named_parameters()]):
        if name not in heads:
            above = next((level_of[prefix] for prefix in _prefixes(name) if prefix in level_of), above)
            levels[name] = above
    for name in reversed(levels):
        if any(prefix in level_of for prefix in _prefixes(name)):
            break
        levels[name] = 0  # below the first block
    top = max(levels.values()) + 1
    return {name: levels.get(name, top) for name, _ in model.named_parameters()}


def parameter_groups(model: nn.Module, learning_rate: float, weight_decay: float, layer_decay: float) -> list[dict]:
    """Optimizer groups: each level's learning rate is `layer_decay` times that of the level above (Clark et al. 2020,
    Bao et al. 2021), the head's is `learning_rate`; vectors (biases, norms, layer scales) are not decayed."""
    if hasattr(model, "get_base_model"):  # adapters around it
        model = model.get_base_model()
    levels = parameter_levels(model)
    top = max(levels.values())
    groups = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        key = (levels[name], parameter.ndim > 1)
        group = groups.setdefault(
            key,
            {
                "params": [],
                "lr": learning_rate * layer_decay ** (top - levels[name]),
                "weight_decay": weight_decay if parameter.ndim > 1 else 0.0,
            },
        )
        group["params"].append(parameter)
    return [groups[key] for key in sorted(groups, reverse=True)]  # the head first: its rate is the one that is logged


def describe_learning_rates(groups: list[dict]) -> str:
    """The learning rates of `parameter_groups`, from the head down, in words."""
    head, *below = sorted({group["lr"] for group in groups}, reverse=True)
    if not below:
        return f"{head:.3g} for all that is trained"
    return f"{head:.3g} for the head, by level down {', '.join(f'{rate:.3g}' for rate in below)}"


def _stay_in_evaluation(module: nn.Module, inputs: tuple) -> None:
    module.eval()


def freeze_batch_norm_stats(model: nn.Module, frozen_only: bool = False) -> None:
    """Keep the statistics of batch norms, or of those whose parameters are frozen, whatever mode the Trainer sets."""
    for module in model.modules():
        if not isinstance(module, BATCH_NORMS):
            continue
        if not frozen_only or not any(p.requires_grad for p in module.parameters()):
            module.register_forward_pre_hook(_stay_in_evaluation)


def freeze_layers(model: PreTrainedModel, count: int) -> None:
    """Leave the lowest `count` levels of the backbone as they are: 1 is the stem, one more each block."""
    levels = parameter_levels(model)
    below_head = max(levels.values())
    if count > below_head:
        raise UserError(f"--freeze_layers {count}: {type(model).__name__} has {below_head} levels below its head")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and levels[name] >= count)
    freeze_batch_norm_stats(model, frozen_only=True)


def trained_share(model: nn.Module) -> float:
    """Share of the parameters that training changes."""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(size for size, trained in sizes if trained) / sum(size for size, _ in sizes)
