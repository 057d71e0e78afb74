"""The standard recipe: image classification as in the Hugging Face docs, with PIL in place of torchvision.

Every image is decoded and transformed by itself through `set_transform`; everything else is the Trainer's default.
"""

from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from transformers import Trainer, TrainingArguments

SMALLEST_CROP = 0.08  # of the area: torchvision's default, which the docs leave as it is


def normalize(image: Image.Image, processor) -> torch.Tensor:
    """(3, H, W) float32."""
    mean, std = np.array(processor.image_mean, np.float32), np.array(processor.image_std, np.float32)
    return torch.from_numpy((np.asarray(image, np.float32) / 255 - mean) / std).permute(2, 0, 1)


def random_view(size: int, random: np.random.Generator) -> Callable[[Image.Image], Image.Image]:
    """RandomResizedCrop and RandomHorizontalFlip."""

    def view(image: Image.Image) -> Image.Image:
        width, height = image.size
        area = random.uniform(SMALLEST_CROP, 1) * width * height
        aspect = np.exp(random.uniform(np.log(3 / 4), np.log(4 / 3)))
        w, h = min(width, (area * aspect) ** 0.5), min(height, (area / aspect) ** 0.5)
        left, top = random.uniform(0, width - w), random.uniform(0, height - h)
        image = image.resize((size, size), Image.Resampling.BILINEAR, (left, top, left + w, top + h))
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if random.random() < 0.5 else image

    return view


def plain_view(size: int) -> Callable[[Image.Image], Image.Image]:
    """Resize; the images are square."""
    return lambda image: image.resize((size, size), Image.Resampling.BILINEAR)


def transform(view: Callable[[Image.Image], Image.Image], processor) -> Callable[[dict], dict]:
    """What `set_transform` takes."""

    def apply(examples: dict) -> dict:
        images = examples.pop("image")
        examples["pixel_values"] = [normalize(view(image.convert("RGB")), processor) for image in images]
        return examples

    return apply


def collate(examples: list[dict]) -> dict[str, torch.Tensor]:
    pixels = torch.stack([example["pixel_values"] for example in examples])
    return {"pixel_values": pixels, "labels": torch.tensor([example["label"] for example in examples])}


def accuracy(outcome) -> dict[str, float]:
    return {"accuracy": float((outcome.predictions.argmax(-1) == outcome.label_ids).mean())}


def stock_trainer(model, processor, size: int, dataset, arguments: dict) -> Trainer:
    """A default Trainer over a DatasetDict of images of which the model sees size x size."""
    train = dataset["train"].with_transform(transform(random_view(size, np.random.default_rng(0)), processor))
    held_out = dataset["validation"].with_transform(transform(plain_view(size), processor))
    args = TrainingArguments(
        **arguments, remove_unused_columns=False, dataloader_pin_memory=torch.accelerator.is_available()
    )
    return Trainer(
        model=model,
        args=args,
        train_dataset=train,
        eval_dataset=held_out,
        data_collator=collate,
        compute_metrics=accuracy,
    )
