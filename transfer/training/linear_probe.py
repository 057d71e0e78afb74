"""A linear probe: a regularized logistic head on frozen features, a baseline in minutes and a start for fine-tuning.

Fine-tuning from the probe's head instead of a random one distorts the backbone less (Kumar et al. 2022).
"""

import contextlib
import hashlib
import io
from collections.abc import Iterator, Sequence

import datasets
import numpy as np
import torch
import torch.nn.functional as F
from accelerate.utils import broadcast, gather_object
from torch import nn
from transformers import PreTrainedModel

from transfer.data.images.store import PixelDataset, PixelStore
from transfer.files import datasets_cache, write_atomically
from transfer.models.layers import find_heads
from transfer.models.load import fingerprint_of_weights
from transfer.training.trainer import FinetuningTrainer

PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1)  # of the squared distance from the head that the fit starts from
HELD_OUT = 10  # every tenth image chooses the penalty
ITERATIONS = 60


@contextlib.contextmanager
def _without_heads(model: PreTrainedModel) -> Iterator[None]:
    """Let the model answer with what its head sees: the features, or their mean where there are two heads."""
    heads = find_heads(model)
    for name in heads:
        model.set_submodule(name, nn.Identity())
    try:
        yield
    finally:
        for name, head in heads.items():
            model.set_submodule(name, head)


def _features_key(model: PreTrainedModel, store: PixelStore, rule: str, files: Sequence[str]) -> str:
    """Hash of everything that the features depend on."""
    with _without_heads(model):
        parts = [fingerprint_of_weights(model), store.data_fingerprint, rule, *files]
    return hashlib.blake2b("\n".join(parts).encode(), digest_size=16).hexdigest()


def extract_features(
    trainer: FinetuningTrainer, store: PixelStore, split: datasets.Dataset, rule: str
) -> torch.Tensor:
    """(N, D) float32 features under the evaluation transform, computed once and kept in the datasets cache.

    `rule` is the transform in words. Computed in the run's mixed precision, as in training; each machine has its own.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    key = _features_key(model, store, f"{rule} {trainer.accelerator.mixed_precision}", split["file"][:])
    place = datasets_cache("features") / f"{key}.npy"
    if all(gather_object([place.is_file()])):  # computing them takes every process
        return torch.from_numpy(np.load(place))
    with _without_heads(model), trainer.accelerator.autocast():
        features = trainer.predict_logits(PixelDataset(store, split), what="features")
    if trainer.args.local_process_index == 0:
        place.parent.mkdir(parents=True, exist_ok=True)
        content = io.BytesIO()
        np.save(content, features)
        write_atomically(place, content.getvalue())
    return torch.from_numpy(features)


def fit_head(
    features: torch.Tensor,
    labels: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    penalty: float,
    class_weights: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight (classes, D) and bias (classes,) of the logistic head with the least loss on features (N, D).

    The loss is the mean cross-entropy, weighted by class if weights are given, and `penalty` times the squared
    distance of the weight from the one given, so that a head which already knows the classes is not forgotten.
    """
    start = weight.detach()
    weight, bias = (values.detach().clone().requires_grad_() for values in (weight, bias))
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=ITERATIONS, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        total = F.cross_entropy(F.linear(features, weight, bias), labels, class_weights)
        total = total + penalty * (weight - start).square().sum()
        total.backward()
        return total

    optimizer.step(loss)
    return weight.detach(), bias.detach()


def choose_penalty(
    features: torch.Tensor,
    labels: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    class_weights: torch.Tensor | None = None,
) -> float:
    """The penalty whose head, fitted on the other images, has the least loss on every tenth."""
    held_out = torch.arange(len(features), device=features.device) % HELD_OUT == 0
    losses = []
    for penalty in PENALTIES:
        head = fit_head(features[~held_out], labels[~held_out], weight, bias, penalty, class_weights)
        losses.append(float(F.cross_entropy(F.linear(features[held_out], *head), labels[held_out], class_weights)))
    return PENALTIES[int(np.argmin(losses))]


def fit_probe(trainer: FinetuningTrainer, store: PixelStore, split: datasets.Dataset, rule: str) -> float:
    """Put a logistic head, fitted on frozen features of a labeled split, into the model; returns its penalty."""
    model, device = trainer.accelerator.unwrap_model(trainer.model), trainer.args.device
    features = extract_features(trainer, store, split, rule).to(device)
    labels = torch.tensor(split["label"][:], device=device)
    # A split lists class after class: shuffled, every tenth image is a fair sample.
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0)).to(device)
    features, labels = features[order], labels[order]
    heads = find_heads(model).values()
    weight = torch.stack([head.weight for head in heads]).mean(0)
    bias = torch.stack([head.bias for head in heads]).mean(0)
    with torch.enable_grad():
        penalty = choose_penalty(features, labels, weight, bias, trainer.class_weights)
        head = fit_head(features, labels, weight, bias, penalty, trainer.class_weights)
    weight, bias = broadcast(list(head))  # rounding differs by process on a GPU, and the model must not
    with torch.no_grad():
        for layer in heads:
            layer.weight.copy_(weight)
            layer.bias.copy_(bias)
    return penalty
