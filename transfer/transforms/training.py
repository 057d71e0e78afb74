"""What the model sees of a uint8 batch: the evaluation view and random training views, made on the batch's device.

Random changes of colour and shape, and erasing: stronger augmentation for longer trainings, batched on the device.

TrivialAugment (Müller & Hutter 2021): every image gets one operation of a fixed list at a random strength; there is
nothing to tune. Operations take images (B, 3, H, W) in 0..255 and strengths (B, 1, 1, 1) in -1..1.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from transfer.transforms.evaluation import EvaluationTransform


def seeded_generator(*parts: int) -> torch.Generator:
    """A generator whose numbers depend on `parts` alone."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0]))


def resampling_weights(start: torch.Tensor, length: torch.Tensor, source: int, target: int) -> torch.Tensor:
    """(B, target, source) weights that resample pixels [start, start + length) of a line of `source` to `target`.

    Bilinear with anti-aliasing where the line shrinks, edges repeated; start and length are (B,), in pixels, and a
    negative length reads backwards. Every row sums to one.
    """
    step = length[:, None, None] / target
    centre = start[:, None, None] + (torch.arange(target, device=start.device)[None, :, None] + 0.5) * step - 0.5
    distance = centre.clamp(0, source - 1) - torch.arange(source, device=start.device)
    weights = (1 - distance.abs() / step.abs().clamp(min=1)).clamp(min=0)
    return weights / weights.sum(-1, keepdim=True)


def in_lines(images: torch.Tensor) -> torch.Tensor:
    """(B, 3, H, W) the same values, laid out in memory as (B, H, 3, W)."""
    return images.permute(0, 2, 1, 3).contiguous().permute(0, 2, 1, 3)


def resample(images: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """(B, 3, H, W) -> (B, 3, S, T) by weights (B, S, H) and (B, T, W).

    A crop that is resized and flipped is separable, so two batched matrix products do it for a whole batch: several
    times faster on a CPU than sampling a grid.
    """
    b, c, h, w = images.shape
    lines = images.permute(0, 2, 1, 3).reshape(b, h, c * w)  # no copy of images that lie `in_lines`
    lines = torch.bmm(rows, lines).view(b, -1, w)  # (B, S*3, W)
    lines = torch.bmm(lines, columns.transpose(1, 2))  # (B, S*3, T)
    return lines.view(b, rows.shape[1], c, columns.shape[1]).permute(0, 2, 1, 3)


def draw_crops(batch: int, height: int, width: int, min_area: float, generator: torch.Generator) -> list[torch.Tensor]:
    """[top, left, height, width], each (batch,) in pixels: random resized crops, half of them mirrored.

    Area uniform in min_area..1 of the image, aspect log-uniform in 3/4..4/3, place uniform (Szegedy et al. 2015). A
    mirrored crop starts at its right edge and has a negative width.
    """
    area, aspect, down, along, mirrored = torch.rand(5, batch, generator=generator)
    aspect = torch.exp((2 * aspect - 1) * math.log(4 / 3))
    area = (min_area + (1 - min_area) * area) * height * width
    crop_height, crop_width = (
        (area / aspect).sqrt().clamp(max=height),
        (area * aspect).sqrt().clamp(max=width),
    )
    top, left = down * (height - crop_height), along * (width - crop_width)
    mirrored = mirrored < 0.5
    left = torch.where(mirrored, left + crop_width, left)
    crop_width = torch.where(mirrored, -crop_width, crop_width)
    return [top, left, crop_height, crop_width]


class TrainTransform(nn.Module):
    """(B, 3, H, W) uint8 -> (B, 3, S, S) float32: every image cropped at random, perhaps mirrored, normalised.

    `sizes` are the values of S in the order of training, each for an equal share of it. Before `augment_until` of
    training is over, TrivialAugment changes the whole images and boxes of the views are erased, where asked for.
    """

    def __init__(
        self,
        evaluation: EvaluationTransform,
        sizes: Sequence[int],
        min_crop_scale: float,
        trivial: bool = False,
        erasing_probability: float = 0.0,
        augment_until: float = 1.0,
    ):
        super().__init__()
        self.evaluation, self.sizes, self.min_crop_scale = evaluation, tuple(sizes), min_crop_scale
        self.trivial, self.erasing_probability, self.augment_until = trivial, erasing_probability, augment_until

    def size_at(self, progress: float) -> int:
        """Side of the views after that share of training."""
        return self.sizes[min(int(progress * len(self.sizes)), len(self.sizes) - 1)]

    def forward(self, images: torch.Tensor, generator: torch.Generator, progress: float = 0.0) -> torch.Tensor:
        b, _, h, w = images.shape
        size, strong = self.size_at(progress), progress < self.augment_until
        images = in_lines(images).float()  # uint8 is laid out quickest, and in lines normalised quicker than by pixels
        if self.trivial and strong:
            images = trivial_augment(images, generator)
        crops = draw_crops(b, h, w, self.min_crop_scale, generator)
        top, left, height, width = (values.to(images.device, non_blocking=True) for values in crops)
        rows = resampling_weights(top, height, h, size)
        columns = resampling_weights(left, width, w, size)
        # Normalised before it is enlarged: the same values, on fewer pixels.
        views = resample(self.evaluation.normalise(images), rows, columns)
        if self.erasing_probability and strong:
            views = erase(views, self.erasing_probability, generator)
        return views


Operation = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

LUMINANCE = (0.299, 0.587, 0.114)  # of red, green, blue, as PIL's mode L
STRONGEST = 0.99  # of a blend: at 1 an image would lose all contrast
FARTHEST = 0.25  # translation, as a share of the side
STEEPEST = 135.0  # rotation, in degrees


def _blend(images: torch.Tensor, other: torch.Tensor, strength: torch.Tensor) -> torch.Tensor:
    """Away from `other` for positive strengths, towards it for negative ones."""
    return (other + (1 + STRONGEST * strength) * (images - other)).clamp(0, 255)


def _grey(images: torch.Tensor) -> torch.Tensor:
    weights = torch.tensor(LUMINANCE, device=images.device).view(1, 3, 1, 1)
    return (images * weights).sum(1, keepdim=True)  # (B, 1, H, W)


def _brightness(images, strength):
    return _blend(images, torch.zeros_like(images), strength)


def _contrast(images, strength):
    return _blend(images, _grey(images).mean((2, 3), keepdim=True), strength)


def _saturation(images, strength):
    return _blend(images, _grey(images), strength)


def _sharpness(images, strength):
    kernel = torch.tensor([[1.0, 1, 1], [1, 5, 1], [1, 1, 1]], device=images.device) / 13  # PIL's SMOOTH
    padded = F.pad(images, (1, 1, 1, 1), mode="replicate")
    smooth = F.conv2d(padded, kernel.expand(3, 1, 3, 3), groups=3)
    return _blend(images, smooth, strength)


def _posterise(images, strength):
    step = 2 ** (6 * strength.abs()).round()  # from all 8 bits a channel down to 2
    return (images / step).floor() * step


def _solarise(images, strength):
    return torch.where(images > 255 * (1 - strength.abs()), 255 - images, images)


def _stretch(images, strength):
    """Every channel from 0 to 255."""
    low, high = images.amin((2, 3), keepdim=True), images.amax((2, 3), keepdim=True)
    return torch.where(high > low, (images - low) * 255 / (high - low).clamp(min=1), images)


def _equalise(images, strength):
    """Every channel's histogram made flat: a value becomes its rank."""
    b, c, h, w = images.shape
    values = images.round().clamp(0, 255).long().reshape(b * c, h * w)
    histogram = torch.zeros(b * c, 256, device=images.device).scatter_add_(1, values, torch.ones_like(values).float())
    ranks = histogram.cumsum(1)
    lowest = ranks.gather(1, values.amin(1, keepdim=True))
    equal = (ranks.gather(1, values) - lowest) * 255 / (h * w - lowest).clamp(min=1)
    return torch.where(lowest == h * w, values.float(), equal).view(b, c, h, w)


def _warp(images: torch.Tensor, matrices: torch.Tensor) -> torch.Tensor:
    """Images seen through affine maps (B, 2, 3) of their coordinates in -1..1; black outside."""
    grid = F.affine_grid(matrices, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", align_corners=False)


def _affine(images, xx, xy, x, yx, yy, y):
    zero = torch.zeros(len(images), device=images.device)
    entries = [zero + entry for entry in (xx, xy, x, yx, yy, y)]
    return _warp(images, torch.stack(entries, 1).view(-1, 2, 3))


def _shear_x(images, strength):
    return _affine(images, 1, STRONGEST * strength.flatten(), 0, 0, 1, 0)


def _shear_y(images, strength):
    return _affine(images, 1, 0, 0, STRONGEST * strength.flatten(), 1, 0)


def _translate_x(images, strength):
    return _affine(images, 1, 0, 2 * FARTHEST * strength.flatten(), 0, 1, 0)


def _translate_y(images, strength):
    return _affine(images, 1, 0, 0, 0, 1, 2 * FARTHEST * strength.flatten())


def _rotate(images, strength):
    angle = math.radians(STEEPEST) * strength.flatten()
    return _affine(images, angle.cos(), -angle.sin(), 0, angle.sin(), angle.cos(), 0)


OPERATIONS: list[Operation] = [
    lambda images, strength: images,
    _brightness,
    _contrast,
    _saturation,
    _sharpness,
    _posterise,
    _solarise,
    _stretch,
    _equalise,
    _shear_x,
    _shear_y,
    _translate_x,
    _translate_y,
    _rotate,
]


def trivial_augment(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """(B, 3, H, W) in 0..255: each image after one random operation at a random strength."""
    chosen = torch.randint(len(OPERATIONS), (len(images),), generator=generator)
    strengths = 2 * torch.rand(len(images), 1, 1, 1, generator=generator) - 1
    changed = images.clone()
    for number, operation in enumerate(OPERATIONS):
        rows = (chosen == number).nonzero().flatten()
        if len(rows):
            rows_there = rows.to(images.device)
            changed[rows_there] = operation(images[rows_there], strengths[rows].to(images.device))
    return changed


def erase(views: torch.Tensor, probability: float, generator: torch.Generator) -> torch.Tensor:
    """(B, 3, S, S) normalised: a random box of each, with that probability, becomes the mean colour.

    Random erasing (Zhong et al. 2020): 2% to a third of the area, aspect 0.3 to 3.3.
    """
    b, _, height, width = views.shape
    hit, area, aspect, down, along = torch.rand(5, b, 1, generator=generator)
    area = 0.02 + (1 / 3 - 0.02) * area
    aspect = torch.exp((2 * aspect - 1) * math.log(3.3))
    boxes = []  # per side: is the line inside the box? (B, S)
    for length, share, place in (
        (height, (area * aspect).sqrt(), down),
        (width, (area / aspect).sqrt(), along),
    ):
        share = share.clamp(max=1)
        centres = (torch.arange(length) + 0.5) / length
        boxes.append((centres >= place * (1 - share)) & (centres < place * (1 - share) + share))
    erased = boxes[0][:, None, :, None] & boxes[1][:, None, None, :] & (hit < probability)[:, :, None, None]
    return views.masked_fill(erased.to(views.device), 0.0)
