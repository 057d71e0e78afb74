"""Averages of weights: an exponential moving average along one training, a greedy soup of several trainings."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

Weights = Mapping[str, torch.Tensor]


def _warming_average(decay: float) -> Callable:
    """avg_fn of `AveragedModel`: after n updates at most n / (n + 9) of the average is kept.

    The average so forgets where it started however short the training is (as in TensorFlow's and timm's).
    """

    @torch.no_grad()
    def average(averages: list[torch.Tensor], current: list[torch.Tensor], updates: torch.Tensor) -> None:
        updates = int(updates)
        kept = min(decay, (1 + updates) / (10 + updates))
        if averages[0].is_floating_point():
            torch._foreach_lerp_(averages, current, 1 - kept)
        else:  # how many batches a batch norm has seen
            torch._foreach_copy_(averages, current)

    return average


def average_weights(model: nn.Module, decay: float) -> AveragedModel:
    """An exponential moving average of a model's parameters and batch-norm statistics, to be updated every step."""
    return AveragedModel(model, multi_avg_fn=_warming_average(decay), use_buffers=True)


@contextlib.contextmanager
def weights_of(source: nn.Module, model: nn.Module) -> Iterator[None]:
    """Let `model` hold the weights of `source` for a while."""
    own = {name: values.clone() for name, values in model.state_dict().items()}
    model.load_state_dict(source.state_dict())
    try:
        yield
    finally:
        model.load_state_dict(own)


def mean_weights(members: Sequence[Weights]) -> dict[str, torch.Tensor]:
    """The mean of several models' weights; counters are the first one's."""
    return {
        name: torch.stack([member[name] for member in members]).mean(0) if values.is_floating_point() else values
        for name, values in members[0].items()
    }


def greedy_soup(
    candidates: Sequence[Weights], scores: Sequence[float], score: Callable[[Weights], float]
) -> tuple[dict[str, torch.Tensor], list[int], float]:
    """Average the best candidate with each of the others in turn, keeping those that do not lower the score.

    Wortsman et al. 2022. Returns the soup, the positions of its members and its score, which is never below the best
    candidate's.
    """
    order = sorted(range(len(candidates)), key=lambda i: -scores[i])
    members, best = order[:1], scores[order[0]]
    for position in order[1:]:
        trial = score(mean_weights([candidates[i] for i in [*members, position]]))
        if trial >= best:
            members, best = [*members, position], trial
    return mean_weights([candidates[i] for i in members]), members, best
