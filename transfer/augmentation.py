"""What the model sees of a uint8 batch: the evaluation view and random training views, made on the batch's device."""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from transformers import BaseImageProcessor

from transfer import UserError
from transfer.backbones.geometry import ViewGeometry
from transfer.policies import erase, trivial_augment


def resize_as_pil(images: torch.Tensor, size: tuple[int, int], interpolation: str) -> torch.Tensor:
    """(B, 3, H, W) uint8 resized to (height, width): anti-aliased, and rounded to whole pixels, as PIL does it."""
    if interpolation == "nearest-exact":
        return F.interpolate(images, size, mode=interpolation)
    if images.device.type == "cpu":
        return F.interpolate(images, size, mode=interpolation, antialias=True)  # torch's integer kernel is PIL's
    images = images.float()
    for step in ((images.shape[2], size[1]), size):  # along, then down: PIL rounds and clips in between
        images = F.interpolate(images, step, mode=interpolation, antialias=True).round().clamp(0, 255)
    return images


class EvaluationView(nn.Module):
    """(B, 3, H, W) uint8 -> (B, 3, S, S) float32, as the checkpoint's processor would make it.

    `cropped` says that the images were resized and cropped when they were stored, and need only be normalised.
    """

    def __init__(self, geometry: ViewGeometry, cropped: bool = False):
        super().__init__()
        self.geometry, self.cropped = geometry, cropped
        mean, std = torch.tensor(geometry.mean).view(1, -1, 1, 1), torch.tensor(geometry.std).view(1, -1, 1, 1)
        self.register_buffer("scale", 1 / (255 * std), persistent=False)
        self.register_buffer("offset", -mean / std, persistent=False)

    def normalise(self, images: torch.Tensor) -> torch.Tensor:
        """Normalise pixels in 0..255, red first; the channels come out in the model's order."""
        images = torch.addcmul(self.offset, images, self.scale)
        return images.flip(1) if self.geometry.bgr else images

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if self.cropped and tuple(images.shape[-2:]) == self.geometry.crop:
            return self.normalise(images.float())
        size = self.geometry.crop if self.cropped else self.geometry.resized(*images.shape[-2:])
        if tuple(images.shape[-2:]) != size:
            images = resize_as_pil(images, size, self.geometry.interpolation)
        top, left = self.geometry.corner(*size)
        images = images[..., top : top + self.geometry.crop[0], left : left + self.geometry.crop[1]]
        return self.normalise(images.float())


MARGIN = 1 / 8  # of the side, that zoomed test-time views leave out


def _window(images: torch.Tensor, top: int, left: int) -> torch.Tensor:
    """The window of (B, 3, H, W) that leaves out MARGIN of each side, `top` and `left` eighths from the corner."""
    height, width = images.shape[-2:]
    y, x = round(top * height * MARGIN), round(left * width * MARGIN)
    return images[..., y : y + height - round(height * MARGIN), x : x + width - round(width * MARGIN)]


# Name -> the further images that are shown to the model in prediction, each (B, 3, H, W) uint8 as the first is.
TEST_TIME_VIEWS: dict[str, list[Callable[[torch.Tensor], torch.Tensor]]] = {
    "flip": [lambda images: images.flip(-1)],
    "zoom": [lambda images: _window(images, 0.5, 0.5)],
    "zoom_flip": [lambda images: _window(images, 0.5, 0.5).flip(-1)],
    "corners": [lambda images, y=y, x=x: _window(images, y, x) for y in (0, 1) for x in (0, 1)],
}


def check_view(processor: BaseImageProcessor, view: EvaluationView) -> None:
    """Refuse a checkpoint whose processor does more than the view: scores would not be the pipeline's."""
    ramp = np.linspace(0, 255, 72 * 72 * 3).reshape(72, 72, 3).astype(np.uint8)
    ramp[20:50, 10:40, 0] = 255 - ramp[20:50, 10:40, 0]
    expected = processor(Image.fromarray(ramp), return_tensors="pt")["pixel_values"]
    ours = view(torch.from_numpy(ramp).permute(2, 0, 1)[None])
    # One grey level is about 0.02 after normalisation.
    if expected.shape != ours.shape or (expected - ours).abs().max() > 0.05:
        raise UserError(
            f"{type(processor).__name__}: prepares images in a way that is not supported here; "
            "use a checkpoint that resizes, crops and normalises"
        )


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


class TrainingView(nn.Module):
    """(B, 3, H, W) uint8 -> (B, 3, S, S) float32: every image cropped at random, perhaps mirrored, normalised.

    `sizes` are the values of S in the order of training, each for an equal share of it. Before `strong_until` of
    training is over, TrivialAugment changes the whole images and boxes of the views are erased, where asked for.
    """

    def __init__(
        self,
        evaluation: EvaluationView,
        sizes: Sequence[int],
        min_crop_area: float,
        trivial: bool = False,
        erasing_probability: float = 0.0,
        strong_until: float = 1.0,
    ):
        super().__init__()
        self.evaluation, self.sizes, self.min_crop_area = evaluation, tuple(sizes), min_crop_area
        self.trivial, self.erasing_probability, self.strong_until = trivial, erasing_probability, strong_until

    def size_at(self, progress: float) -> int:
        """Side of the views after that share of training."""
        return self.sizes[min(int(progress * len(self.sizes)), len(self.sizes) - 1)]

    def forward(self, images: torch.Tensor, generator: torch.Generator, progress: float = 0.0) -> torch.Tensor:
        b, _, h, w = images.shape
        size, strong = self.size_at(progress), progress < self.strong_until
        images = in_lines(images).float()  # uint8 is laid out quickest, and in lines normalised quicker than by pixels
        if self.trivial and strong:
            images = trivial_augment(images, generator)
        crops = draw_crops(b, h, w, self.min_crop_area, generator)
        top, left, height, width = (values.to(images.device, non_blocking=True) for values in crops)
        rows = resampling_weights(top, height, h, size)
        columns = resampling_weights(left, width, w, size)
        # Normalised before it is enlarged: the same values, on fewer pixels.
        views = resample(self.evaluation.normalise(images), rows, columns)
        if self.erasing_probability and strong:
            views = erase(views, self.erasing_probability, generator)
        return views
