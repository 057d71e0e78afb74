"""Mixup and CutMix: blend pairs of images of a batch, and their labels in the same ratio."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn


def draw_ratio(alpha: float, generator: torch.Generator) -> float:
    """Return a random number from Beta(alpha, alpha)."""
    # torch's Beta distribution does not accept a generator.
    seed = int(torch.randint(2**62, (), generator=generator))
    return float(np.random.default_rng(seed).beta(alpha, alpha))


def draw_box(height: int, width: int, area: float, generator: torch.Generator) -> tuple[slice, slice]:
    """Return rows and columns of a box with this fraction of the area, centered uniformly and clipped at the edges."""
    side = area**0.5
    centers = torch.rand(2, generator=generator).tolist()
    sides = []
    for length, center in zip((height, width), centers, strict=True):
        half, middle = round(side * length / 2), int(center * length)
        sides.append(slice(max(0, middle - half), min(length, middle + half)))
    return sides[0], sides[1]


class Mixing(nn.Module):
    """(B, 3, S, S) pixel values and (B,) labels -> pixel values and (B, classes) targets that sum to one.

    The mixing ratio is drawn once per batch. Mixup (Zhang et al. 2018) blends each image with a partner; CutMix
    (Yun et al. 2019) pastes a box of the partner. With both, each batch gets one of them; an alpha of 0 disables one.
    """

    def __init__(self, classes: int, mixup_alpha: float = 0.0, cutmix_alpha: float = 0.0):
        super().__init__()
        self.classes, self.mixup_alpha, self.cutmix_alpha = classes, mixup_alpha, cutmix_alpha

    def forward(
        self, pixel_values: torch.Tensor, labels: torch.Tensor, generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        cut = self.cutmix_alpha > 0
        if cut and self.mixup_alpha > 0:
            cut = bool(torch.rand((), generator=generator) < 0.5)
        partner = torch.randperm(len(pixel_values), generator=generator).to(pixel_values.device)
        ratio = draw_ratio(self.cutmix_alpha if cut else self.mixup_alpha, generator)
        if cut:
            height, width = pixel_values.shape[-2:]
            rows, columns = draw_box(height, width, 1 - ratio, generator)
            pixel_values = pixel_values.clone()
            pixel_values[..., rows, columns] = pixel_values[partner][..., rows, columns]
            # The labels follow the area that was pasted: the box may be clipped.
            pasted = (rows.stop - rows.start) * (columns.stop - columns.start)
            ratio = 1 - pasted / (height * width)
        else:
            pixel_values = torch.lerp(pixel_values[partner], pixel_values, ratio)
        targets = F.one_hot(labels, self.classes).float()
        return pixel_values, torch.lerp(targets[partner], targets, ratio)
