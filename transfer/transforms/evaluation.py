"""The evaluation transform, which is the checkpoint's own preprocessing, and test-time augmentation (TTA)."""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from transformers import BaseImageProcessor

from transfer.data.images import ImageGeometry
from transfer.errors import UserError


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


class EvaluationTransform(nn.Module):
    """(B, 3, H, W) uint8 images -> (B, 3, S, S) float32 pixel values, as the checkpoint's processor makes them.

    `cropped` says that the images were resized and cropped when they were stored, and need only be normalized.
    """

    scale: torch.Tensor
    offset: torch.Tensor

    def __init__(self, geometry: ImageGeometry, cropped: bool = False):
        super().__init__()
        self.geometry, self.cropped = geometry, cropped
        mean, std = torch.tensor(geometry.mean).view(1, -1, 1, 1), torch.tensor(geometry.std).view(1, -1, 1, 1)
        self.register_buffer("scale", 1 / (255 * std), persistent=False)
        self.register_buffer("offset", -mean / std, persistent=False)

    def normalize(self, images: torch.Tensor) -> torch.Tensor:
        """Normalize pixels in 0..255, red first; the channels come out in the model's order."""
        images = torch.addcmul(self.offset, images, self.scale)
        return images.flip(1) if self.geometry.bgr else images

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        height, width = images.shape[-2:]
        if self.cropped and (height, width) == self.geometry.crop:
            return self.normalize(images.float())
        size = self.geometry.crop if self.cropped else self.geometry.resized(height, width)
        if (height, width) != size:
            images = resize_as_pil(images, size, self.geometry.interpolation)
        top, left = self.geometry.corner(*size)
        images = images[..., top : top + self.geometry.crop[0], left : left + self.geometry.crop[1]]
        return self.normalize(images.float())


MARGIN = 1 / 8  # of the side, that zoomed TTA leaves out


def _window(images: torch.Tensor, top: float, left: float) -> torch.Tensor:
    """The window of (B, 3, H, W) that leaves out MARGIN of each side, `top` and `left` eighths from the corner."""
    height, width = images.shape[-2:]
    y, x = round(top * height * MARGIN), round(left * width * MARGIN)
    return images[..., y : y + height - round(height * MARGIN), x : x + width - round(width * MARGIN)]


# Name of --tta -> the further images whose predictions are averaged, each (B, 3, H, W) uint8 as the first is.
TTA_TRANSFORMS: dict[str, list[Callable[[torch.Tensor], torch.Tensor]]] = {
    "flip": [lambda images: images.flip(-1)],
    "zoom": [lambda images: _window(images, 0.5, 0.5)],
    "zoom_flip": [lambda images: _window(images, 0.5, 0.5).flip(-1)],
    "corners": [lambda images, y=y, x=x: _window(images, y, x) for y in (0, 1) for x in (0, 1)],  # type: ignore[misc]
}


def check_transform(processor: BaseImageProcessor, transform: EvaluationTransform) -> None:
    """Refuse a checkpoint whose processor does more than the transform: scores would not be the pipeline's."""
    ramp = np.linspace(0, 255, 72 * 72 * 3).reshape(72, 72, 3).astype(np.uint8)
    ramp[20:50, 10:40, 0] = 255 - ramp[20:50, 10:40, 0]
    expected = processor(Image.fromarray(ramp), return_tensors="pt")["pixel_values"]
    ours = transform(torch.from_numpy(ramp).permute(2, 0, 1)[None])
    # One gray level is about 0.02 after normalization.
    if expected.shape != ours.shape or (expected - ours).abs().max() > 0.05:
        raise UserError(
            f"{type(processor).__name__}: prepares images in a way that is not supported here; "
            "use a checkpoint that resizes, crops and normalizes"
        )
