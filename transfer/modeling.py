"""A pretrained checkpoint made into a classifier of our classes: new head, warm where classes are known, new size."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import BaseImageProcessor, PreTrainedModel

from transfer import UserError
from transfer.backbones.depthwise import quicken_depthwise
from transfer.backbones.gates import skip_open_gates
from transfer.backbones.geometry import read_geometry, set_view_size
from transfer.backbones.layers import find_heads
from transfer.backbones.positions import resize_input
from transfer.backbones.pretrained import load_checkpoint


@dataclass(frozen=True)
class Classifier:
    """A model with one logit a class, the processor that feeds it, and what was done to get there."""

    model: PreTrainedModel
    processor: BaseImageProcessor
    warm_classes: int = 0  # head rows copied from the checkpoint


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
    if hasattr(model.config, "label_names"):  # timm's, which would win over id2label in what is saved
        model.config.label_names = list(class_names)
    model.config.wnids = list(wnids)
    model.config.problem_type = None  # set by a checkpoint that was trained on soft labels, it would change the loss
    model.num_labels = len(class_names)


def mend_batch_norms(model: PreTrainedModel) -> None:
    """Let batch norms average over batches.

    EfficientNet's momentum of 0.99 was TensorFlow's, the share that is kept; torch takes it as the share of the
    newest batch, so that evaluation would stand on the statistics of the last training batch alone.
    """
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.momentum and module.momentum > 0.5:
            module.momentum = 0.1


def quicken(model: PreTrainedModel) -> None:
    """Leave out and replace what takes time for nothing; the parameters and what they mean stay."""
    skip_open_gates(model)
    quicken_depthwise(model)


def build_classifier(
    name: str,
    wnids: Sequence[str],
    class_names: Sequence[str],
    glosses: Sequence[str],
    image_size: int | None = None,
    revision: str = "main",
    warm_start: bool = True,
    trust_remote_code: bool = False,
    drop_path_rate: float | None = None,
) -> Classifier:
    """A classifier of our classes from any image-classification checkpoint; its head is new, its backbone is not.

    `wnids`, `class_names` (unique, shown to people) and `glosses` (to find classes that the checkpoint knows) are in
    label order. Head rows that are not copied are drawn from torch's global generator. Raises `UserError`.
    """
    model, processor = load_checkpoint(name, revision, trust_remote_code, drop_path_rate)
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
    quicken(model)
    return Classifier(model, processor, len(matches))


def load_trained(
    name: str, wnids: Sequence[str], revision: str = "main", trust_remote_code: bool = False
) -> Classifier:
    """A model that was fine-tuned on these classes before. Raises `UserError` if its labels are others."""
    model, processor = load_checkpoint(name, revision, trust_remote_code)
    known = getattr(model.config, "wnids", None)
    if known is None:
        raise UserError(f"--model_name_or_path {name}: was not saved by this project, so its label order is unknown")
    if list(known) != list(wnids):
        differing = sum(a != b for a, b in zip(known, wnids, strict=False)) + abs(len(known) - len(wnids))
        raise UserError(
            f"--model_name_or_path {name}: was trained on other classes or another order of wnids.txt "
            f"({differing} labels differ)"
        )
    quicken(model)
    return Classifier(model, processor)
