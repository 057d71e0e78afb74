"""The layers of a classifier: heads and blocks, their learning rates, frozen layers, batch norms, LoRA adapters."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel

from transfer.errors import UserError

if TYPE_CHECKING:
    from peft import PeftModel

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
ADAPTER_WEIGHTS = "adapter_model.safetensors"  # the file name that peft uses
MAX_BLOCK_LEVELS = 24  # the depth of ViT-L; over more levels, the decay would leave the first layers almost untrained


@runtime_checkable
class _LoraWrapper(Protocol):
    """The one method of peft's PeftModel that is needed here: importing peft takes seconds, and few runs need it."""

    def get_base_model(self) -> nn.Module: ...


def head_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules that turn features into logits, by name; DeiT with a distillation head has two."""
    timm_model: Any = getattr(model, "timm_model", None)  # Any: timm is optional, so its types cannot be imported
    if timm_model is None:
        return {name: module for name, module in model.named_children() if "classifier" in name}
    found = timm_model.get_classifier()
    heads = found if isinstance(found, tuple) else (found,)
    return {name: module for name, module in model.named_modules() if any(module is head for head in heads)}


def head_names(model: nn.Module) -> set[str]:
    """Return the names of the heads' parameters and buffers."""
    prefixes = tuple(f"{name}." for name in head_modules(model))
    return {name for name in model.state_dict() if name.startswith(prefixes)}


def find_heads(model: nn.Module) -> dict[str, nn.Linear]:
    """Return the linear layers that output the logits, by name. Raises `UserError` if there are none."""
    heads = {}
    for prefix, part in head_modules(model).items():
        for name, module in part.named_modules(prefix=prefix):
            if isinstance(module, nn.Linear) and module.out_features == model.num_labels:
                heads[name] = module
    if not heads:
        raise UserError(f"{type(model).__name__} has no linear head; use a ViT, ConvNeXt or similar checkpoint")
    return heads


def _count_weight_matrices(module: nn.Module) -> int:
    """Number of weight matrices and convolution kernels, without those of LoRA adapters."""
    return sum(p.ndim > 1 for name, p in module.named_parameters() if "lora_" not in name)


def _parents(name: str) -> list[str]:
    """The modules that contain a parameter, outermost first: a.b.c -> [a, a.b]."""
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts))]


def find_blocks(model: nn.Module) -> list[str]:
    """Return the names of the backbone's blocks in forward order: a ViT's layers, the blocks in ConvNeXt's stages.

    A block is an item of a `ModuleList` or `Sequential` that holds at least two weight matrices and no smaller block.
    """
    heads = tuple(f"{name}." for name in head_modules(model))
    items = [
        f"{name}.{index}"
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList | nn.Sequential) and not f"{name}.".startswith(heads)
        for index, item in module.named_children()
        if _count_weight_matrices(item) >= 2
    ]
    blocks = {item for item in items if not any(other.startswith(f"{item}.") for other in items)}
    found = (parent for name, _ in model.named_parameters() for parent in _parents(name) if parent in blocks)
    return list(dict.fromkeys(found))


def parameter_levels(model: nn.Module) -> dict[str, int]:
    """Return the depth of every parameter, by name: 0 for the stem, one more for each block, the head last.

    Layers between two blocks, such as ConvNeXt's downsampling, share the level of the block that follows them. Layers
    after the last block form one more level. With more than `MAX_BLOCK_LEVELS` blocks, neighboring blocks share a
    level: the 36 blocks of ConvNeXt-L form 18 levels of two (the ConvNeXt authors group three).
    """
    blocks, heads = find_blocks(model), head_names(model)
    blocks_per_level = max(1, math.ceil(len(blocks) / MAX_BLOCK_LEVELS))
    level_of = {block: 1 + position // blocks_per_level for position, block in enumerate(blocks)}
    levels: dict[str, int] = {}
    current = max(level_of.values(), default=0) + 1  # after the last block
    for name in reversed([name for name, _ in model.named_parameters()]):
        if name not in heads:
            current = next((level_of[parent] for parent in _parents(name) if parent in level_of), current)
            levels[name] = current
    for name in reversed(levels):
        if any(parent in level_of for parent in _parents(name)):
            break
        levels[name] = 0  # before the first block
    top = max(levels.values()) + 1
    return {name: levels.get(name, top) for name, _ in model.named_parameters()}


def parameter_groups(model: nn.Module, learning_rate: float, weight_decay: float, layer_decay: float) -> list[dict]:
    """Return optimizer groups with layer-wise learning-rate decay (Clark et al. 2020, Bao et al. 2021), head first.

    The head learns at `learning_rate`, each level below at `layer_decay` times the rate of the level above it. Weight
    decay applies to matrices and convolution kernels, not to biases, norms and layer scales.
    """
    if isinstance(model, _LoraWrapper):
        model = model.get_base_model()
    levels = parameter_levels(model)
    top = max(levels.values())
    groups: dict[tuple[int, bool], dict] = {}
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
    return [groups[key] for key in sorted(groups, reverse=True)]  # the Trainer logs the rate of the first group


def describe_learning_rates(groups: list[dict]) -> str:
    """Return the learning rates of `parameter_groups` in words, from the head down."""
    head, *below = sorted({group["lr"] for group in groups}, reverse=True)
    if not below:
        return f"{head:.3g} for all trainable parameters"
    return f"{head:.3g} for the head; {', '.join(f'{rate:.3g}' for rate in below)} for the levels below it"


def fix_batch_norm_momentum(model: nn.Module) -> None:
    """Set the momentum of batch norms to torch's default, 0.1, where it is above 0.5.

    EfficientNet's 0.99 comes from TensorFlow, where it is the weight of the old statistics. In torch it is the weight
    of the newest batch, so evaluation would use the statistics of the last training batch alone.
    """
    for module in model.modules():
        if isinstance(module, BATCH_NORMS) and module.momentum and module.momentum > 0.5:
            module.momentum = 0.1


def _set_eval_mode(module: nn.Module, inputs: tuple) -> None:
    module.eval()


def freeze_batch_norm_stats(model: nn.Module, frozen_only: bool = False) -> None:
    """Keep the running statistics of batch norms as they are, also when the Trainer sets the training mode.

    `frozen_only` limits this to batch norms whose parameters are all frozen.
    """
    for module in model.modules():
        if not isinstance(module, BATCH_NORMS):
            continue
        if not frozen_only or not any(p.requires_grad for p in module.parameters()):
            module.register_forward_pre_hook(_set_eval_mode)


def freeze_layers(model: nn.Module, count: int) -> None:
    """Freeze the lowest `count` levels of the backbone: 1 is the stem, each further level is a block."""
    levels = parameter_levels(model)
    below_head = max(levels.values())
    if count > below_head:
        raise UserError(f"--freeze_layers {count}: {type(model).__name__} has {below_head} levels below its head")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and levels[name] >= count)
    freeze_batch_norm_stats(model, frozen_only=True)


def trainable_fraction(model: nn.Module) -> float:
    """Return the fraction of the parameters that are trained."""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(size for size, trained in sizes if trained) / sum(size for size, _ in sizes)


# LoRA adapters through peft (Hu et al. 2022): the backbone is frozen, adapters and head are trained, and the adapters
# are merged into a plain model when it is saved.


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
    return (checkpoint / ADAPTER_WEIGHTS).is_file()


def _adapter_weights(model: "PeftModel") -> dict[str, torch.Tensor]:
    """The weights of adapters and head under the names that peft saves them by."""
    from peft import get_peft_model_state_dict

    # By default, peft asks the Hub for the base model's vocabulary size.
    return get_peft_model_state_dict(model, save_embedding_layers=False)


def load_adapters(model: "PeftModel", checkpoint: Path) -> None:
    """Load adapters and head from a checkpoint. Raises `UserError` unless every tensor is there and fits."""
    from peft import set_peft_model_state_dict

    try:
        weights = load_file(checkpoint / ADAPTER_WEIGHTS)
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
    live, chosen = _adapter_weights(model), load_file(checkpoint / ADAPTER_WEIGHTS)
    differing = [name for name in chosen if name not in live or not torch.equal(live[name].cpu(), chosen[name])]
    if differing or live.keys() != chosen.keys():
        raise RuntimeError(f"{checkpoint}: was chosen, but the model differs in {differing or 'its names'}")


def merge_adapters(model: "PeftModel") -> PreTrainedModel:
    """Return the plain model with the adapters merged into its weights; its outputs stay the same up to rounding."""
    return model.merge_and_unload().requires_grad_(True)
