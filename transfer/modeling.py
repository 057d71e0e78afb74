"""A pretrained checkpoint made into a classifier of our classes: new head, new input size, learning-rate groups."""

import copy
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    BaseImageProcessor,
    PreTrainedModel,
)

from transfer import UserError
from transfer.augmentation import read_geometry, set_view_size
from transfer.gates import skip_open_gates
from transfer.offline import offline_backbone

logger = logging.getLogger(__name__)

LOADING_ADVICE = "give a Hub id, a folder made by save_pretrained, or `offline`"


@dataclass(frozen=True)
class Classifier:
    """A model with one logit a class, the processor that feeds it, and what was done to get there."""

    model: PreTrainedModel
    processor: BaseImageProcessor
    warm_classes: int = 0  # head rows copied from the checkpoint


def locate_checkpoint(name: str) -> str:
    """What from_pretrained takes for `--model_name_or_path`; a folder without a model is refused."""
    if name == "offline":
        return str(offline_backbone())
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(f"{name}: this folder holds no config.json; {LOADING_ADVICE}")
        return str(path)
    if name.startswith((".", "/", "~")) or path.is_file() or len(path.parts) > 2:
        raise UserError(f"--model_name_or_path {name}: no such folder; {LOADING_ADVICE}")
    return name


def _load(loader, name: str, **options):
    """from_pretrained whose failures are one line. Only safetensors are read: unpickling weights runs their code."""
    try:
        return loader.from_pretrained(name, **options)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as fault:
        reason = " ".join(str(fault).split())
        if "trust_remote_code" in reason:
            reason = "it needs its own code to be run, which is off; choose a checkpoint that transformers knows"
        raise UserError(f"--model_name_or_path {name}: cannot be loaded: {reason}; {LOADING_ADVICE}") from None


def head_names(model: PreTrainedModel) -> set[str]:
    """Names of the parameters and buffers outside the backbone."""
    return {name for name in model.state_dict() if not name.startswith(f"{model.base_model_prefix}.")}


def load_checkpoint(name: str, revision: str = "main") -> Classifier:
    """A checkpoint as it was saved, in fp32. Raises `UserError` if anything but the head is missing from it."""
    source = locate_checkpoint(name)
    config = _load(AutoConfig, source, revision=revision)
    if config.num_labels == 0:
        config.num_labels = 2  # any head will do: it is replaced
    model, report = _load(
        AutoModelForImageClassification,
        source,
        config=config,
        revision=revision,
        # The checkpoint's own type would win: half precision trains badly and fp16 scaling refuses it.
        dtype=torch.float32,
        use_safetensors=True,
        output_loading_info=True,
    )
    absent = {*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])}
    lost = sorted(absent - head_names(model))
    if lost:
        shown = ", ".join(lost[:8]) + (f" and {len(lost) - 8} more" if len(lost) > 8 else "")
        raise UserError(f"--model_name_or_path {name}: only the head may be new, but these did not load: {shown}")
    processor = _load(AutoImageProcessor, source, revision=revision)
    return Classifier(model, processor)


def normalise_label(label: str) -> str:
    return " ".join(label.lower().replace("_", " ").split())


def _unambiguous(labels: Sequence[str]) -> dict[str, int]:
    """Label -> position, for labels that stand once."""
    counts = Counter(labels)
    return {label: position for position, label in enumerate(labels) if counts[label] == 1}


def match_labels(
    wnids: Sequence[str], glosses: Sequence[str], known_labels: Sequence[str], known_wnids: Sequence[str] = ()
) -> dict[int, int]:
    """For our classes that a checkpoint already knows: our label -> its label.

    Compared in this order: wnid, the whole gloss ("goldfish, Carassius auratus"), its first synonym; a name that
    stands for two classes on either side matches nothing.
    """
    ours = [list(wnids), [normalise_label(g) for g in glosses]]
    ours.append([gloss.split(",")[0] for gloss in ours[1]])
    theirs = [normalise_label(label) for label in known_labels]
    first = _unambiguous([label.split(",")[0] for label in theirs])
    tables = [_unambiguous(list(known_wnids) or theirs), _unambiguous(theirs), first]
    matches = {}
    for names, table in zip(ours, tables, strict=True):
        for name, label in _unambiguous(names).items():
            if name in table and label not in matches and table[name] not in matches.values():
                matches[label] = table[name]
    return matches


def find_heads(model: PreTrainedModel) -> dict[str, nn.Linear]:
    """The linear layers outside the backbone that give the logits (DeiT has two)."""
    inside = f"{model.base_model_prefix}."
    heads = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not name.startswith(inside) and module.out_features == model.num_labels
    }
    if not heads:
        raise UserError(f"{type(model).__name__}: no linear head was found; use a ViT, ConvNeXt or similar checkpoint")
    return heads


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


def set_labels(model: PreTrainedModel, wnids: Sequence[str], class_names: Sequence[str]) -> None:
    """Store the label maps, in label order, so that a plain pipeline answers with class names."""
    model.config.id2label = dict(enumerate(class_names))
    model.config.label2id = {name: label for label, name in enumerate(class_names)}
    model.config.wnids = list(wnids)
    model.config.problem_type = None  # set by a checkpoint that was trained on soft labels, it would change the loss
    model.num_labels = len(class_names)


def interpolate_positions(model: PreTrainedModel, image_size: int) -> dict[str, torch.Tensor]:
    """Position tables of a ViT-like model for another image size, by its own bicubic interpolation."""
    tables = {}
    for name, module in model.named_modules():
        table = getattr(module, "position_embeddings", None)
        if not isinstance(table, nn.Parameter) or not hasattr(module, "interpolate_pos_encoding"):
            continue
        if image_size % model.config.patch_size:
            raise UserError(
                f"--image_size {image_size}: must be a multiple of {model.config.patch_size}, the patch size"
            )
        old_patches = (model.config.image_size // model.config.patch_size) ** 2
        patches = (image_size // model.config.patch_size) ** 2
        # Only the shape of its first argument is read.
        tokens = torch.empty(1, table.shape[1] - old_patches + patches, table.shape[2])
        with torch.no_grad():
            resized = module.interpolate_pos_encoding(tokens, image_size, image_size)
        tables[f"{name}.position_embeddings"] = resized.clone()
    return tables


def resize_input(model: PreTrainedModel, image_size: int) -> PreTrainedModel:
    """The same model for square images of another size: done once, so that nothing has to interpolate later."""
    if getattr(model.config, "image_size", image_size) == image_size:
        return model
    config = copy.deepcopy(model.config)
    config.image_size = image_size
    resized = type(model)(config)
    weights = model.state_dict() | interpolate_positions(model, image_size)
    expected = resized.state_dict()
    misfits = [name for name, values in weights.items() if expected[name].shape != values.shape]
    if misfits:
        raise UserError(
            f"--image_size {image_size}: {type(model).__name__} cannot change from {model.config.image_size} px "
            f"({misfits[0]} would not fit)"
        )
    resized.load_state_dict(weights)
    return resized


def mend_batch_norms(model: PreTrainedModel) -> None:
    """Let batch norms average over batches.

    EfficientNet's momentum of 0.99 was TensorFlow's, the share that is kept; torch takes it as the share of the
    newest batch, so that evaluation would stand on the statistics of the last training batch alone.
    """
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.momentum and module.momentum > 0.5:
            module.momentum = 0.1


def build_classifier(
    name: str,
    wnids: Sequence[str],
    class_names: Sequence[str],
    glosses: Sequence[str],
    image_size: int | None = None,
    revision: str = "main",
    warm_start: bool = True,
) -> Classifier:
    """A classifier of our classes from any image-classification checkpoint; its head is new, its backbone is not.

    `wnids`, `class_names` (unique, shown to people) and `glosses` (to find classes that the checkpoint knows) are in
    label order. Head rows that are not copied are drawn from torch's global generator. Raises `UserError`.
    """
    loaded = load_checkpoint(name, revision)
    model, processor = loaded.model, loaded.processor
    matches = {}
    if warm_start:
        known = [str(model.config.id2label[label]) for label in sorted(model.config.id2label)]
        matches = match_labels(wnids, glosses, known, getattr(model.config, "wnids", ()))
    replace_heads(model, len(wnids), matches)
    set_labels(model, wnids, class_names)
    image_size = image_size or read_geometry(processor).crop[0]
    set_view_size(processor, image_size)
    model = resize_input(model, image_size)
    mend_batch_norms(model)
    skip_open_gates(model)
    return Classifier(model, processor, len(matches))


def load_trained(name: str, wnids: Sequence[str], revision: str = "main") -> Classifier:
    """A model that was fine-tuned on these classes before. Raises `UserError` if its labels are others."""
    loaded = load_checkpoint(name, revision)
    known = getattr(loaded.model.config, "wnids", None)
    if known is None:
        raise UserError(f"--model_name_or_path {name}: was not saved by this project, so its label order is unknown")
    if list(known) != list(wnids):
        differing = sum(a != b for a, b in zip(known, wnids, strict=False)) + abs(len(known) - len(wnids))
        raise UserError(
            f"--model_name_or_path {name}: was trained on other classes or another order of wnids.txt "
            f"({differing} labels differ)"
        )
    skip_open_gates(loaded.model)
    return loaded


def parameter_levels(model: PreTrainedModel) -> dict[str, int]:
    """How deep every parameter lies: 0 for the stem, one more for each block, the head last.

    Read off the module tree: a block is an item of the backbone's ModuleLists (ViT's layers, ConvNeXt's blocks inside
    stages, EfficientNet's blocks); what comes after the last block counts as one more.
    """
    lists = {name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    heads = head_names(model)
    levels, level, block = {}, 0, None
    for name, _ in model.named_parameters():
        parts = name.split(".")
        inside = [i for i in range(1, len(parts)) if ".".join(parts[:i]) in lists]
        current = "head" if name in heads else ".".join(parts[: inside[-1] + 1]) if inside else ""
        if block is not None and current != block:
            level += 1
        levels[name], block = level, current
    return levels


def parameter_groups(
    model: PreTrainedModel, learning_rate: float, weight_decay: float, layer_decay: float
) -> list[dict]:
    """Optimizer groups: each level's learning rate is `layer_decay` times that of the level above (Clark et al. 2020,
    Bao et al. 2021), the head's is `learning_rate`; vectors (biases, norms, layer scales) are not decayed."""
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
    return list(groups.values())[::-1]  # the head first: its learning rate is the one that gets logged
