"""Mixup and cutmix: pairs of a batch's views blended into one, with the labels' shares as its target."""

import torch
import torch.nn.functional as F
from torch import nn


def draw_share(alpha: float, generator: torch.Generator) -> float:
    """A number from Beta(alpha, alpha)."""
    return float(torch._sample_dirichlet(torch.full((2,), alpha), generator=generator)[0])


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
    """(B, 3, S, S) views and (B,) labels -> views and (B, classes) targets that sum to one.

    One share is drawn a batch. Mixup (Zhang et al. 2018) blends each view with a partner's; cutmix (Yun et al. 2019)
    pastes a box of the partner's. Where both are on, each batch gets one of the two; an alpha of 0 switches one off.
    """

    def __init__(self, classes: int, mixup_alpha: float = 0.0, cutmix_alpha: float = 0.0):
        super().__init__()
        self.classes, self.mixup_alpha, self.cutmix_alpha = classes, mixup_alpha, cutmix_alpha

    def forward(
        self, views: torch.Tensor, labels: torch.Tensor, generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        cut = self.cutmix_alpha > 0
        if cut and self.mixup_alpha > 0:
            cut = bool(torch.rand((), generator=generator) < 0.5)
        partner = torch.randperm(len(views), generator=generator).to(views.device)
        share = draw_share(self.cutmix_alpha if cut else self.mixup_alpha, generator)
        if cut:
            rows, columns = draw_box(*views.shape[-2:], 1 - share, generator)
            views = views.clone()
            views[..., rows, columns] = views[partner][..., rows, columns]
            # what was really pasted: the box may be clipped
            pasted = (rows.stop - rows.start) * (columns.stop - columns.start)
            share = 1 - pasted / (views.shape[-2] * views.shape[-1])
        else:
            views = torch.lerp(views[partner], views, share)
        targets = F.one_hot(labels, self.classes).float()
        return views, torch.lerp(targets[partner], targets, share)
