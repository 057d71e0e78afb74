"""Mixup and cutmix: pairs of a batch's images blended into one, with the labels' shares as the target."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn


def draw_share(alpha: float, generator: torch.Generator) -> float:
    """A number from Beta(alpha, alpha)."""
    # torch's own Beta distribution takes no generator.
    seed = int(torch.randint(2**62, (), generator=generator))
    return float(np.random.default_rng(seed).beta(alpha, alpha))


def draw_box(height: int, width: int, area: float, generator: torch.Generator) -> tuple[slice, slice]:
    """Rows and columns of a box of about that share of the area, around a uniform centre and clipped at the edges."""
    side = area**0.5
    centres = torch.rand(2, generator=generator).tolist()
    sides = []
    for length, centre in zip((height, width), centres, strict=True):
        half, middle = round(side * length / 2), int(centre * length)
        sides.append(slice(max(0, middle - half), min(length, middle + half)))
    return sides[0], sides[1]


class Mixing(nn.Module):
    """(B, 3, S, S) pixel values and (B,) labels -> pixel values and (B, classes) targets that sum to one.

    One share is drawn a batch. Mixup (Zhang et al. 2018) blends each image with a partner's; cutmix (Yun et al. 2019)
    pastes a box of the partner's. Where both are on, each batch gets one of the two; an alpha of 0 switches one off.
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
        share = draw_share(self.cutmix_alpha if cut else self.mixup_alpha, generator)
        if cut:
            rows, columns = draw_box(*pixel_values.shape[-2:], 1 - share, generator)
            pixel_values = pixel_values.clone()
            pixel_values[..., rows, columns] = pixel_values[partner][..., rows, columns]
            # what was really pasted: the box may be clipped
            pasted = (rows.stop - rows.start) * (columns.stop - columns.start)
            share = 1 - pasted / (pixel_values.shape[-2] * pixel_values.shape[-1])
        else:
            pixel_values = torch.lerp(pixel_values[partner], pixel_values, share)
        targets = F.one_hot(labels, self.classes).float()
        return pixel_values, torch.lerp(targets[partner], targets, share)
