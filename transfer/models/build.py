"""A pretrained checkpoint made into a classifier of our classes: a new head, another image size, frozen or adapted.

Position tables are resized once, so that nothing has to interpolate later, in training or in a plain pipeline.
"""

import copy
import functools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from accelerate.utils import set_seed
from torch import nn
from transformers import BaseImageProcessor, PreTrainedModel

from transfer.config import FinetuningArguments, RunArguments
from transfer.data.images import ImageGeometry
from transfer.data.layouts import DatasetFiles
from transfer.errors import UserError
from transfer.models.cpu_kernels import skip_open_gates, use_fast_depthwise
from transfer.models.layers import (
    BATCH_NORMS,
    describe_learning_rates,
    find_heads,
    freeze_batch_norm_stats,
    freeze_layers,
    parameter_groups,
    trained_share,
)
from transfer.models.load import load_checkpoint, read_geometry, saved_class_ids, set_image_size
from transfer.models.lora import add_adapters
from transfer.runtime import say


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


def normalise_label(label: str) -> str:
    return " ".join(label.lower().replace("_", " ").split())


def _unambiguous(labels: Sequence[str]) -> dict[str, int]:
    """Label -> position, for labels that stand once."""
    counts = Counter(labels)
    return {label: position for position, label in enumerate(labels) if counts[label] == 1}


def match_labels(
    class_ids: Sequence[str], synonyms: Sequence[str], known_labels: Sequence[str], known_class_ids: Sequence[str] = ()
) -> dict[int, int]:
    """For our classes that a checkpoint already knows: our label -> its label.

    Compared in this order: class_id, the whole synonym ("goldfish, Carassius auratus"), its first synonym; a name that
    stands for two classes on either side matches nothing.
    """
    ours = [list(class_ids), [normalise_label(g) for g in synonyms]]
    ours.append([synonym.split(",")[0] for synonym in ours[1]])
    theirs = [normalise_label(label) for label in known_labels]
    first = _unambiguous([label.split(",")[0] for label in theirs])
    tables = [_unambiguous(list(known_class_ids) or theirs), _unambiguous(theirs), first]
    matches = {}
    for names, table in zip(ours, tables, strict=True):
        for name, label in _unambiguous(names).items():
            if name in table and label not in matches and table[name] not in matches.values():
                matches[label] = table[name]
    return matches


def replace_heads(model: PreTrainedModel, num_labels: int, matches: Mapping[int, int]) -> None:
    """Give every head `num_labels` rows: rows in `matches` (new -> old) are copied, the others small and random."""
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
    """Store the label maps, in label order, so that a plain pipeline answers with class names."""
    model.config.id2label = dict(enumerate(class_names))
    model.config.label2id = {name: label for label, name in enumerate(class_names)}
    if hasattr(model.config, "label_names"):  # timm's, which would win over id2label in what is saved
        model.config.label_names = list(class_names)
    model.config.class_ids = list(class_ids)
    model.config.problem_type = None  # set by a checkpoint that was trained on soft labels, it would change the loss
    model.num_labels = len(class_names)


def fix_batch_norm_momentum(model: PreTrainedModel) -> None:
    """Let batch norms average over batches.

    EfficientNet's momentum of 0.99 was TensorFlow's, the share that is kept; torch takes it as the share of the
    newest batch, so that evaluation would stand on the statistics of the last training batch alone.
    """
    for module in model.modules():
        if isinstance(module, BATCH_NORMS) and module.momentum and module.momentum > 0.5:
            module.momentum = 0.1


def apply_cpu_speedups(model: PreTrainedModel) -> None:
    """Leave out and replace what takes time for nothing; the parameters and what they mean stay."""
    skip_open_gates(model)
    use_fast_depthwise(model)


@dataclass(frozen=True)
class Classifier:
    """A model with one logit a class, the processor that feeds it, and what was done to get there."""

    model: PreTrainedModel
    processor: BaseImageProcessor
    warm_classes: int = 0  # head rows copied from the checkpoint

    @functools.cached_property
    def geometry(self) -> ImageGeometry:
        """How the processor brings an image to the model."""
        return read_geometry(self.processor)


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
    """A classifier of our classes from any image-classification checkpoint; its head is new, its backbone is not.

    `class_ids`, `class_names` (unique, shown to people) and `synonyms` (to find classes that the checkpoint knows) are
    in label order. Head rows that are not copied are drawn from torch's global generator. Raises `UserError`.
    """
    model, processor = load_checkpoint(name, revision, trust_remote_code, drop_path_rate)
    matches = {}
    if warm_start:
        known = [str(model.config.id2label[label]) for label in sorted(model.config.id2label)]
        matches = match_labels(class_ids, synonyms, known, saved_class_ids(model.config) or ())
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
    """A model that was fine-tuned on these classes before. Raises `UserError` if its labels are others."""
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


def prepare_model(run: RunArguments, args: FinetuningArguments, data: DatasetFiles) -> Classifier:
    """The checkpoint with a head for the data's classes, or a fine-tuned model where nothing is trained."""
    if not args.do_train:
        return load_trained(run.model_name_or_path, data.class_ids, run.model_revision, run.trust_remote_code)
    set_seed(args.seed)  # before the head is drawn
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
    kind, parameters = type(classifier.model).__name__, sum(p.numel() for p in classifier.model.parameters())
    if run.freeze_batch_norm_stats:
        freeze_batch_norm_stats(classifier.model)
    if run.freeze_layers:
        freeze_layers(classifier.model, run.freeze_layers)
    if run.lora_r:
        classifier = replace(classifier, model=add_adapters(classifier.model, run.lora_r))
    say(
        f"model       {kind}, {parameters / 1e6:.1f} M parameters, {trained_share(classifier.model):.2%} trained; "
        f"the head starts from the checkpoint's for {classifier.warm_classes} of {len(data.class_ids)} classes",
    )
    groups = parameter_groups(classifier.model, args.learning_rate, args.weight_decay, run.layer_decay)
    say(f"rates       {describe_learning_rates(groups)}")
    if args.gradient_checkpointing and not classifier.model.supports_gradient_checkpointing:
        raise UserError(f"--gradient_checkpointing: {type(classifier.model).__name__} does not support it")
    return classifier
