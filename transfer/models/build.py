"""Build a classifier from a pretrained checkpoint: a new head, the image size, frozen layers, LoRA adapters.

Position embeddings are resized once, so that neither training nor a pipeline interpolates them at every step.
"""

import copy
import functools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, cast, runtime_checkable

import torch
import torch.nn.functional as F
from accelerate.utils import set_seed
from torch import nn
from transformers import BaseImageProcessor, EfficientNetConfig, PreTrainedConfig, PreTrainedModel

from transfer.config import FinetuningArguments, RunArguments
from transfer.data.images import ImageGeometry
from transfer.data.layouts import DatasetFiles
from transfer.errors import UserError
from transfer.models.cpu_kernels import apply_cpu_speedups, use_plain_attention
from transfer.models.layers import (
    add_adapters,
    describe_learning_rates,
    find_heads,
    fix_batch_norm_momentum,
    freeze_batch_norm_stats,
    freeze_layers,
    parameter_groups,
    trainable_fraction,
)
from transfer.models.load import load_checkpoint, read_geometry, saved_class_ids, set_image_size
from transfer.models.offline import blocks_with_odd_input
from transfer.runtime import note, say


@runtime_checkable
class _PositionEmbeddings(Protocol):
    """A module that interpolates its absolute position embeddings, as in most of transformers' vision transformers."""

    def interpolate_pos_encoding(self, embeddings: torch.Tensor, height: int, width: int) -> torch.Tensor: ...


def _vision_config(config: PreTrainedConfig) -> Any:
    """The config that has the image size: that of the vision tower, where there is a text tower too (CLIP, SigLIP)."""
    return getattr(config, "vision_config", config)


def _check_patches(config: Any, image_size: int) -> None:
    if image_size % config.patch_size:
        raise UserError(f"--image_size {image_size}: must be a multiple of {config.patch_size}, the patch size")


def _resize_absolute(module: _PositionEmbeddings, table: torch.Tensor, config: Any, image_size: int) -> torch.Tensor:
    """Absolute position embeddings (1, N, D) for another image size, by the module's own interpolation."""
    old_patches = (config.image_size // config.patch_size) ** 2
    patches = (image_size // config.patch_size) ** 2
    # interpolate_pos_encoding reads only the shape of its first argument.
    tokens = torch.empty(1, table.shape[1] - old_patches + patches, table.shape[2])
    return module.interpolate_pos_encoding(tokens, image_size, image_size).clone()


def _resize_relative(table: torch.Tensor, patches: int) -> torch.Tensor:
    """BEiT's relative position biases for `patches` x `patches` tokens, interpolated as in BEiT's forward pass.

    The table has a row for each of (2P-1)^2 distances and three for the class token, and a column per attention head.
    """
    old = math.isqrt(len(table) - 3)  # 2P-1
    distances, class_token = table.split([old * old, 3])
    distances = distances.reshape(1, old, old, -1).permute(0, 3, 1, 2)
    distances = F.interpolate(distances, (2 * patches - 1,) * 2, mode="bilinear")
    return torch.cat([distances.permute(0, 2, 3, 1).flatten(0, 2), class_token])


@torch.no_grad()
def interpolate_positions(model: PreTrainedModel, image_size: int) -> dict[str, torch.Tensor]:
    """Return the position embeddings and biases of a ViT-like model for another image size, by parameter name."""
    resized, config = {}, _vision_config(model.config)
    for name, module in model.named_modules():
        if hasattr(module, "num_relative_distance"):  # BEiT
            _check_patches(config, image_size)
            biases = module.get_parameter("relative_position_bias_table")
            resized[f"{name}.relative_position_bias_table"] = _resize_relative(biases, image_size // config.patch_size)
        if not isinstance(module, _PositionEmbeddings):
            continue
        if isinstance(table := getattr(module, "position_embeddings", None), nn.Parameter):
            _check_patches(config, image_size)
            resized[f"{name}.position_embeddings"] = _resize_absolute(module, table, config, image_size)
        elif isinstance(embedding := getattr(module, "position_embedding", None), nn.Embedding):  # CLIP, SigLIP
            _check_patches(config, image_size)
            positions = _resize_absolute(module, embedding.weight[None], config, image_size)
            resized[f"{name}.position_embedding.weight"] = positions[0]
    return resized


def _resize_timm(model: PreTrainedModel, image_size: int) -> PreTrainedModel:
    """timm's ViTs and Swins resize themselves; its convolutional networks take any size."""
    timm_model: Any = model.timm_model  # Any: timm is optional, so its types cannot be imported
    config, old = model.config, model.config.pretrained_cfg.get("input_size", (3, 0, 0))[-1]
    config.pretrained_cfg["input_size"] = [3, image_size, image_size]
    if old == image_size or not hasattr(timm_model, "set_input_size"):
        return model
    try:
        timm_model.set_input_size(img_size=(image_size, image_size))
    except (AssertionError, RuntimeError, ValueError) as fault:
        reason = " ".join(str(fault).split())
        raise UserError(f"--image_size {image_size}: {config.architecture} does not support it ({reason})") from None
    config.model_args = {**(config.model_args or {}), "img_size": image_size}
    return model


def resize_input(model: PreTrainedModel, image_size: int) -> PreTrainedModel:
    """Return the model for square images of another size. Raises `UserError` if it does not support that size."""
    if hasattr(model, "timm_model"):
        return _resize_timm(model, image_size)
    old = getattr(_vision_config(model.config), "image_size", image_size)
    if old == image_size:
        return model
    config = copy.deepcopy(model.config)
    _vision_config(config).image_size = image_size
    if isinstance(config, EfficientNetConfig):
        config.depthwise_padding = blocks_with_odd_input(config, image_size)
    resized = type(model)(config)
    weights = model.state_dict() | interpolate_positions(model, image_size)
    expected = resized.state_dict()
    mismatched = [name for name, values in weights.items() if expected[name].shape != values.shape]
    if mismatched:
        raise UserError(
            f"--image_size {image_size}: {type(model).__name__} cannot change from {old} px "
            f"({mismatched[0]} would have another shape)"
        )
    resized.load_state_dict(weights)
    return resized


def normalize_label(label: str) -> str:
    """Return a label in lower case, with single spaces for underscores and repeated spaces."""
    return " ".join(label.lower().replace("_", " ").split())


def _unambiguous(labels: Sequence[str]) -> dict[str, int]:
    """Label -> position, for labels that occur once."""
    counts = Counter(labels)
    return {label: position for position, label in enumerate(labels) if counts[label] == 1}


def match_labels(
    class_ids: Sequence[str], synonyms: Sequence[str], known_labels: Sequence[str], known_class_ids: Sequence[str] = ()
) -> dict[int, int]:
    """Map our labels to the checkpoint's labels, for classes that both have.

    Names are compared in this order: class id, all synonyms ("goldfish, Carassius auratus"), first synonym. A name of
    two classes, on either side, matches nothing.
    """
    ours = [list(class_ids), [normalize_label(names) for names in synonyms]]
    ours.append([synonym.split(",")[0] for synonym in ours[1]])
    theirs = [normalize_label(label) for label in known_labels]
    first = _unambiguous([label.split(",")[0] for label in theirs])
    tables = [_unambiguous(list(known_class_ids) or theirs), _unambiguous(theirs), first]
    matches: dict[int, int] = {}
    for names, table in zip(ours, tables, strict=True):
        for name, label in _unambiguous(names).items():
            if name in table and label not in matches and table[name] not in matches.values():
                matches[label] = table[name]
    return matches


def replace_heads(model: PreTrainedModel, num_labels: int, matches: Mapping[int, int]) -> None:
    """Give every head `num_labels` rows: those in `matches` (new -> old) are copied, the others drawn at random."""
    for name, old in find_heads(model).items():
        new = nn.Linear(old.in_features, num_labels)
        with torch.no_grad():
            nn.init.normal_(new.weight, std=getattr(model.config, "initializer_range", 0.02))
            nn.init.zeros_(new.bias)
            for row, old_row in matches.items():
                new.weight[row] = old.weight[old_row]
                if old.bias is not None:
                    new.bias[row] = old.bias[old_row]
        model.set_submodule(name, new)


def set_labels(model: PreTrainedModel, class_ids: Sequence[str], class_names: Sequence[str]) -> None:
    """Store ids and names of the classes, in label order, so that a pipeline answers with class names."""
    model.config.id2label = dict(enumerate(class_names))
    model.config.label2id = {name: label for label, name in enumerate(class_names)}
    if hasattr(model.config, "label_names"):  # timm's, which would be saved in place of id2label
        model.config.label_names = list(class_names)
    model.config.class_ids = list(class_ids)
    model.config.problem_type = None  # some checkpoints set one, which would change the loss
    model.num_labels = len(class_names)  # type: ignore[assignment]  # nn.Module's stub allows only tensors and modules


@dataclass(frozen=True)
class Classifier:
    """A model with one logit per class, and its image processor."""

    model: PreTrainedModel
    processor: BaseImageProcessor
    copied_head_rows: int = 0  # classes whose head weights come from the checkpoint

    @functools.cached_property
    def geometry(self) -> ImageGeometry:
        """How the processor resizes, crops and normalizes an image."""
        return read_geometry(self.processor)


def _known_labels(config: PreTrainedConfig) -> list[str]:
    """The checkpoint's class names in label order."""
    return [str(name) for _, name in sorted((config.id2label or {}).items())]


def build_classifier(
    name: str,
    class_ids: Sequence[str],
    class_names: Sequence[str],
    synonyms: Sequence[str],
    image_size: int | None = None,
    revision: str = "main",
    warm_start: bool = True,
    trust_remote_code: bool = False,
    drop_path_rate: float | None = None,
) -> Classifier:
    """Return a classifier of our classes: the checkpoint's backbone with a new head.

    `class_ids`, `class_names` (unique, for people) and `synonyms` (to find classes that the checkpoint knows) are in
    label order. With `warm_start`, the head rows of known classes are copied; torch's global generator draws the
    others. Raises `UserError`.
    """
    model, processor = load_checkpoint(name, revision, trust_remote_code, drop_path_rate)
    matches: dict[int, int] = {}
    if warm_start:
        known_ids = saved_class_ids(model.config) or ()
        matches = match_labels(class_ids, synonyms, _known_labels(model.config), known_ids)
    replace_heads(model, len(class_ids), matches)
    set_labels(model, class_ids, class_names)
    image_size = image_size or read_geometry(processor).crop[0]
    set_image_size(processor, image_size)
    model = resize_input(model, image_size)
    fix_batch_norm_momentum(model)
    apply_cpu_speedups(model)
    return Classifier(model, processor, len(matches))


def load_trained(
    name: str, class_ids: Sequence[str], revision: str = "main", trust_remote_code: bool = False
) -> Classifier:
    """Return a model that was fine-tuned on these classes. Raises `UserError` if its labels differ."""
    model, processor = load_checkpoint(name, revision, trust_remote_code)
    known = saved_class_ids(model.config)
    if known is None:
        raise UserError(f"--model_name_or_path {name}: was not saved by this project, so its label order is unknown")
    if known != list(class_ids):
        differing = sum(a != b for a, b in zip(known, class_ids, strict=False)) + abs(len(known) - len(class_ids))
        raise UserError(
            f"--model_name_or_path {name}: was trained on other classes or another order of wnids.txt "
            f"({differing} labels differ)"
        )
    apply_cpu_speedups(model)
    return Classifier(model, processor)


def _choose_trained_weights(model: PreTrainedModel, run: RunArguments) -> PreTrainedModel:
    """Freeze layers and add LoRA adapters as the arguments say; returns the model."""
    if run.freeze_batch_norm_stats:
        freeze_batch_norm_stats(model)
    if run.freeze_layers:
        freeze_layers(model, run.freeze_layers)
    if run.lora_r:
        # peft's wrapper is not a PreTrainedModel, but it passes every attribute on to the one inside it.
        model = cast(PreTrainedModel, add_adapters(model, run.lora_r))
    return model


def prepare_model(run: RunArguments, args: FinetuningArguments, data: DatasetFiles) -> Classifier:
    """Return a classifier ready for training; with `--do_train false`, a fine-tuned one ready for prediction."""
    if not args.do_train:
        finished = load_trained(run.model_name_or_path, data.class_ids, run.model_revision, run.trust_remote_code)
        if run.image_size and run.image_size != (side := finished.geometry.crop[0]):
            say(f"warning     --image_size {run.image_size} is ignored: a trained model keeps its {side} px")
        return finished
    set_seed(args.seed)  # before the head is initialized: the Trainer would seed too late
    classifier = build_classifier(
        run.model_name_or_path,
        data.class_ids,
        data.class_names,
        data.synonyms,
        run.image_size,
        run.model_revision,
        run.head_warm_start,
        run.trust_remote_code,
        run.drop_path_rate,
    )
    side = classifier.geometry.crop[0]
    train_batch = args.per_device_train_batch_size, max(run.train_image_size or [side])
    if use_plain_attention(classifier.model, train_batch, (args.per_device_eval_batch_size, side)):
        note("attention   by matrix products, which train short sequences faster on a CPU")
    kind, parameters = type(classifier.model).__name__, sum(p.numel() for p in classifier.model.parameters())
    model = _choose_trained_weights(classifier.model, run)
    share = trainable_fraction(model)
    trained = f", {share:.2%} trainable" if share < 1 else ""
    short = kind.removesuffix("ForImageClassification")  # fits 80 columns
    say(f"model       {short}, {parameters / 1e6:.1f} M parameters{trained}, {side} px")
    note(f"head        copied from the checkpoint for {classifier.copied_head_rows} of {len(data.class_ids)} classes")
    groups = parameter_groups(model, args.learning_rate, args.weight_decay, run.layer_decay)
    note(f"rates       {describe_learning_rates(groups)}")
    if args.gradient_checkpointing and not model.supports_gradient_checkpointing:
        raise UserError(f"--gradient_checkpointing: {kind} does not support it")
    return replace(classifier, model=model)
