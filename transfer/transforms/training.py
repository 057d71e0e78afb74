"""The train transform: random crops, flips, TrivialAugment, random erasing, mixup and CutMix, on the batch's device.

Every random number comes from a generator that is seeded by (seed, step, batch of the step, process), so that the
images a step sees depend neither on the number of data workers nor on where a run was resumed.
"""

import contextlib
import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from transfer.config import RunArguments
from transfer.transforms.evaluation import EvaluationTransform, resize_as_pil

WIDEST_CROP = 4 / 3  # width / height of a training crop, and the inverse of the highest one's


def seeded_generator(*parts: int) -> torch.Generator:
    """A generator whose numbers depend on `parts` alone."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0]))


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


@contextlib.contextmanager
def _kornia_draws_from(generator: torch.Generator) -> Iterator[None]:
    """Seed torch's global CPU generator, which kornia draws from, by `generator`; its state is restored afterwards."""
    seed = int(torch.randint(2**62, (), generator=generator))
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


class TrivialAugment(nn.Module):
    """(B, 3, H, W) in 0..255 -> the same shape; each image is changed by one random operation of random strength.

    TrivialAugment "wide" (Müller & Hutter 2021) has nothing to tune. kornia's own class draws one operation for the
    whole batch; the paper draws one for each image.
    """

    def __init__(self):
        super().__init__()
        import kornia.augmentation as K  # importing it takes a second, and few runs need it

        blend = (0.01, 1.99)  # 1 leaves the image as it is
        # A plain list: as submodules they would follow the model to a GPU, and draw from its generator.
        self.operations = [
            nn.Identity(),
            K.ColorJitter(brightness=blend, p=1.0),  # RandomBrightness adds; PIL, and this, multiply
            K.ColorJitter(contrast=blend, p=1.0),
            K.ColorJitter(saturation=blend, p=1.0),
            K.RandomSharpness(blend, p=1.0),
            K.RandomPosterize((2.0, 8.0), p=1.0),
            K.RandomSolarize((0.0, 1.0), additions=0.0, p=1.0),
            K.RandomAutoContrast(p=1.0),
            K.RandomEqualize(p=1.0),
            K.RandomShear((-44.7, 44.7, 0.0, 0.0), p=1.0),  # degrees: the paper's 0.99
            K.RandomShear((0.0, 0.0, -44.7, 44.7), p=1.0),
            K.RandomTranslate(translate_x=(-0.25, 0.25), p=1.0),
            K.RandomTranslate(translate_y=(-0.25, 0.25), p=1.0),
            K.RandomRotation(135.0, p=1.0),
        ]

    def forward(self, images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        chosen = torch.randint(len(self.operations), (len(images),), generator=generator)
        changed = images.clone()
        with _kornia_draws_from(generator):
            for number, operation in enumerate(self.operations):
                rows = (chosen == number).nonzero().flatten().to(images.device)
                if len(rows):
                    changed[rows] = 255 * operation(images[rows] / 255)  # kornia works on 0..1
        return changed


class RandomErasing(nn.Module):
    """(B, 3, S, S) pixel values -> the same; with `probability` a random box becomes the mean color.

    Random erasing (Zhong et al. 2020). The box has 2% to a third of the area and an aspect of 0.3 to 3.3.
    """

    def __init__(self, probability: float):
        super().__init__()
        from kornia.augmentation import RandomErasing as KorniaErasing

        erasing = KorniaErasing(scale=(0.02, 1 / 3), ratio=(0.3, 3.3), value=0.0, p=probability)
        self.erasing = [erasing]  # no submodule, as in TrivialAugment

    def forward(self, pixel_values: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        with _kornia_draws_from(generator):
            return self.erasing[0](pixel_values)


def resampling_weights(start: torch.Tensor, length: torch.Tensor, source: int, target: int) -> torch.Tensor:
    """(B, target, source) weights that resample pixels [start, start + length) of a line of `source` to `target`.

    Bilinear with anti-aliasing where the line shrinks, edges repeated; start and length are (B,), in pixels, and a
    negative length reads backwards. Every row sums to one.
    """
    step = length[:, None, None] / target
    center = start[:, None, None] + (torch.arange(target, device=start.device)[None, :, None] + 0.5) * step - 0.5
    distance = center.clamp(0, source - 1) - torch.arange(source, device=start.device)
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


def draw_crops(
    heights: torch.Tensor, widths: torch.Tensor, min_scale: float, generator: torch.Generator
) -> list[torch.Tensor]:
    """[top, left, height, width], each (B,) in pixels: random resized crops of images, half of them mirrored.

    Area uniform in min_scale..1 of the image, aspect log-uniform in 3/4..4/3, place uniform (Szegedy et al. 2015). A
    crop that is too high or too wide for its image is cut, and keeps an aspect in these limits. A mirrored crop starts
    at its right edge and has a negative width.
    """
    area, aspect, down, along, mirror = torch.rand(5, len(heights), generator=generator)
    aspect = torch.exp((2 * aspect - 1) * math.log(WIDEST_CROP))
    area = (min_scale + (1 - min_scale) * area) * heights * widths
    crop_height, crop_width = (area / aspect).sqrt(), (area * aspect).sqrt()
    too_high, too_wide = crop_height > heights, crop_width > widths
    crop_height, crop_width = torch.minimum(crop_height, heights), torch.minimum(crop_width, widths)
    crop_width = torch.where(too_high, torch.minimum(crop_width, WIDEST_CROP * crop_height), crop_width)
    crop_height = torch.where(too_wide, torch.minimum(crop_height, WIDEST_CROP * crop_width), crop_height)
    top, left = down * (heights - crop_height), along * (widths - crop_width)
    mirrored = mirror < 0.5
    left = torch.where(mirrored, left + crop_width, left)
    crop_width = torch.where(mirrored, -crop_width, crop_width)
    return [top, left, crop_height, crop_width]


def enough_pixels(sizes: Sequence[int], min_scale: float) -> int:
    """The shorter side that an image needs so that a crop of median area is not enlarged to any of the sizes."""
    return math.ceil(max(sizes) / math.sqrt((min_scale + 1) / 2))


def whole_boxes(
    heights: torch.Tensor, widths: torch.Tensor, crops: Sequence[torch.Tensor]
) -> list[tuple[int, int, int, int]]:
    """(top, left, bottom, right) of each crop in whole pixels: at least one, and inside the image."""
    top, left, crop_height, crop_width = crops
    left = torch.minimum(left, left + crop_width)
    crop_height, crop_width = crop_height.round().clamp(min=1), crop_width.abs().round().clamp(min=1)
    top, left = torch.minimum(top.round(), heights - crop_height), torch.minimum(left.round(), widths - crop_width)
    box = torch.stack([top, left, top + crop_height, left + crop_width], 1)
    return [tuple(edges) for edges in box.long().tolist()]


def crop_each(images: Sequence[torch.Tensor], size: int, min_scale: float, generator: torch.Generator) -> torch.Tensor:
    """Images (3, H, W) uint8 of any sizes -> (B, 3, size, size) uint8: random resized crops, anti-aliased.

    Only the pixels of the crop are touched. The edges of a crop are rounded to whole pixels, as in torchvision.
    """
    heights, widths = torch.tensor([image.shape[1:] for image in images], dtype=torch.float32).T
    crops = draw_crops(heights, widths, min_scale, generator)
    cut = torch.empty(len(images), size, size, 3, dtype=torch.uint8, device=images[0].device).permute(0, 3, 1, 2)
    boxes = zip(images, whole_boxes(heights, widths, crops), (crops[3] < 0).tolist(), strict=True)
    for row, (image, (top, left, bottom, right), mirrored) in enumerate(boxes):
        # torch keeps pixels together, which is faster, only where the first stride is the largest.
        view = image.permute(1, 2, 0)[top:bottom, left:right].unsqueeze(0).permute(0, 3, 1, 2)
        view = resize_as_pil(view, (size, size), "bilinear")
        cut[row] = view[0].flip(-1) if mirrored else view[0]
    return cut


class TrainTransform(nn.Module):
    """(B, 3, H, W) uint8 images, or a list of (3, H, W), and (B,) labels -> (B, 3, S, S) float32 pixels and labels.

    Every image is cropped at random, mirrored with probability 0.5, and normalized. `sizes` are the values of S, used
    in turn, each for an equal part of the training. Until the fraction `augment_until` of the training,
    TrivialAugment, random erasing and `mixing` are applied if they are given; with `mixing`, labels become
    (B, classes) targets.
    """

    def __init__(
        self,
        evaluation: EvaluationTransform,
        sizes: Sequence[int],
        min_crop_scale: float,
        trivial_augment: bool = False,
        erasing_probability: float = 0.0,
        augment_until: float = 1.0,
        mixing: nn.Module | None = None,
    ):
        super().__init__()
        self.evaluation, self.sizes, self.min_crop_scale = evaluation, tuple(sizes), min_crop_scale
        self.trivial_augment = TrivialAugment() if trivial_augment else None
        self.erasing = RandomErasing(erasing_probability) if erasing_probability else None
        self.augment_until, self.mixing = augment_until, mixing

    def size_at(self, progress: float) -> int:
        """Side of the crops after that fraction of the training."""
        return self.sizes[min(int(progress * len(self.sizes)), len(self.sizes) - 1)]

    def pixels_ahead(self, progress: float) -> float:
        """Mean pixels of a crop in the rest of the training, after that fraction of it."""
        rest, parts = 1 - progress, len(self.sizes)
        if rest <= 0:
            return self.sizes[-1] ** 2
        ahead = (max(0.0, (part + 1) / parts - max(progress, part / parts)) for part in range(parts))
        return sum(size**2 * share for size, share in zip(self.sizes, ahead, strict=True)) / rest

    def crop_batch(self, images: torch.Tensor, size: int, augments: bool, generator: torch.Generator) -> torch.Tensor:
        """Normalized crops of images of one size, which TrivialAugment changes before they are cropped."""
        b, _, h, w = images.shape
        images = in_lines(images).float()  # fastest order: lay out as uint8, then normalize in lines
        if self.trivial_augment and augments:
            images = self.trivial_augment(images, generator)
        heights, widths = torch.full((b,), float(h)), torch.full((b,), float(w))
        crops = draw_crops(heights, widths, self.min_crop_scale, generator)
        top, left, height, width = (values.to(images.device, non_blocking=True) for values in crops)
        rows = resampling_weights(top, height, h, size)
        columns = resampling_weights(left, width, w, size)
        # Normalizing first gives the same values, on fewer pixels where a crop is enlarged.
        return resample(self.evaluation.normalize(images), rows, columns)

    def crop_list(
        self, images: Sequence[torch.Tensor], size: int, augments: bool, generator: torch.Generator
    ) -> torch.Tensor:
        """Normalized crops of images of several sizes, which TrivialAugment changes after they were cropped."""
        cut = crop_each(images, size, self.min_crop_scale, generator).float()
        if self.trivial_augment and augments:
            cut = self.trivial_augment(cut, generator)
        return self.evaluation.normalize(cut)

    def forward(
        self,
        images: torch.Tensor | Sequence[torch.Tensor],
        labels: torch.Tensor,
        generator: torch.Generator,
        progress: float = 0.0,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        size, augments = self.size_at(progress), progress < self.augment_until
        if isinstance(images, torch.Tensor):
            pixel_values = self.crop_batch(images, size, augments, generator)
        else:
            pixel_values = self.crop_list(images, size, augments, generator)
        if self.erasing and augments:
            pixel_values = self.erasing(pixel_values, generator)
        if self.mixing and augments:
            return self.mixing(pixel_values, labels, generator)
        return pixel_values, labels


def make_train_transform(run: RunArguments, evaluation: EvaluationTransform, classes: int) -> TrainTransform:
    """Return the train transform for the run's arguments."""
    mixes = run.mixup_alpha > 0 or run.cutmix_alpha > 0
    return TrainTransform(
        evaluation,
        run.train_image_size or [evaluation.geometry.crop[0]],
        run.min_crop_scale,
        run.trivial_augment,
        run.erasing_probability,
        run.augment_until,
        mixing=Mixing(classes, run.mixup_alpha, run.cutmix_alpha) if mixes else None,
    )
