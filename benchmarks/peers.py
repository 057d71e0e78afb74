"""fastai and timm, fine-tuning a convolutional network as their documentation does, for time_to_accuracy.py.

They get the weights, split, seed, batch size and precision of this project's recipe, and put a new head on the
network, as both do by default. For EfficientNet, what transformers does differently from timm is undone: the momentum
of batch norms, the padding for another image size, stochastic depth, and the time for gates that are always open.
Schedules follow the time: they end with the minutes of the training.

- fastai: `vision_learner` and `fine_tune` with `aug_transforms`. The frozen epoch takes a quarter of the time at most.
- timm: the transforms, label smoothing and cosine schedule of its `train.py`. AdamW with weight decay 0.05 and a
  warm-up of a twentieth of the time are this project's choice: the defaults are meant for hundreds of epochs.
"""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from PIL import Image
from torch import nn
from transformers import AutoImageProcessor

from transfer.errors import UserError
from transfer.models.build import resize_input
from transfer.models.cpu_kernels import skip_saturated_gates
from transfer.models.layers import fix_batch_norm_momentum
from transfer.models.load import load_checkpoint, locate_checkpoint, read_geometry
from transfer.runs import RunContext
from transfer.runtime import count_cores

try:
    from fastai.vision import all as fastai
except (ImportError, RuntimeError):  # the latter from a torchvision that does not match PyTorch
    fastai = None
try:
    import timm
    import timm.loss
    import timm.optim
    import timm.scheduler
except (ImportError, RuntimeError):
    timm = None

FROZEN_SHARE = 0.25  # of the time, at most
MANY_EPOCHS = 10_000  # time ends the training
WARM_UP, TICKS = 0.05, 10_000  # share of timm's schedule, and its resolution
LABEL_SMOOTHING, COLOR_JITTER, WEIGHT_DECAY = 0.1, 0.4, 0.05

Images = list[tuple[Path, int]]  # with their labels


class Features(nn.Module):
    """The feature maps (B, C, H, W) of a checkpoint in fp32, computed in the precision of accelerate's config."""

    def __init__(self, checkpoint: str, size: int):
        super().__init__()
        model = resize_input(load_checkpoint(checkpoint)[0], size)
        skip_saturated_gates(model)
        fix_batch_norm_momentum(model)
        for dropout in filter(lambda part: isinstance(part, nn.Dropout), model.modules()):
            dropout.p = 0.0  # EfficientNet's stochastic depth
        self.body, self.accelerator = model.base_model.to(memory_format=torch.channels_last), Accelerator()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        images = images.as_subclass(torch.Tensor).contiguous(memory_format=torch.channels_last)
        with self.accelerator.autocast():
            return self.body(pixel_values=images).last_hidden_state.float()


class Peer:
    """What both peers are given. Raises `UserError` if they cannot train with it."""

    def __init__(self, context: RunContext, args):
        run, self.args = context.run, args
        self.checkpoint = locate_checkpoint(run.model_name_or_path)
        self.processor = AutoImageProcessor.from_pretrained(self.checkpoint)
        sizes = run.train_image_size or [run.image_size or read_geometry(self.processor).crop[0]]
        self.sizes = sorted({sizes[0], sizes[-1]})  # each peer uses the better one
        self.classes = len(context.data.class_ids)
        self.train, self.validation = (self.list_images(context, name) for name in ("train", "validation"))
        if len(self.train) < args.per_device_train_batch_size:
            raise UserError("--peers: there are fewer training images than --per_device_train_batch_size")
        if Accelerator().mixed_precision == "fp16":
            raise UserError("--peers: train in bf16 or fp32; their losses are not scaled for fp16")
        if self.features(self.sizes[0])(torch.zeros(1, 3, self.sizes[0], self.sizes[0])).ndim != 4:
            raise UserError("--peers: only convolutional networks can be compared")

    @staticmethod
    def list_images(context: RunContext, split: str) -> Images:
        rows = context.dataset[split].select_columns(["file", "label"])[:]
        return [(context.data.root / file, label) for file, label in zip(rows["file"], rows["label"], strict=True)]

    def features(self, size: int) -> Features:
        set_seed(self.args.seed)
        return Features(self.checkpoint, size)


def train_fastai(peer: Peer, size: int, learning_rate: float, minutes: float) -> float:
    """The validation accuracy after so many minutes with images of that size."""
    validation = range(len(peer.train), len(peer.train) + len(peer.validation))
    block = fastai.DataBlock(
        blocks=(fastai.ImageBlock, fastai.CategoryBlock(vocab=list(range(peer.classes)))),
        splitter=fastai.IndexSplitter(validation),
        get_y=dict([*peer.train, *peer.validation]).get,
        item_tfms=fastai.Resize(size),
        batch_tfms=[
            *fastai.aug_transforms(),
            fastai.Normalize.from_stats(peer.processor.image_mean, peer.processor.image_std),
        ],
    )

    class FollowTime(fastai.Callback):
        """Ends each of `fine_tune`'s two trainings with its time, and evaluates only at the end."""

        order = fastai.ParamScheduler.order - 1

        def __init__(self):
            super().__init__()
            self.now, self.ends = 0.0, [FROZEN_SHARE * 60 * minutes, 60 * minutes]

        def before_fit(self):
            self.begins, self.end = self.now, self.ends.pop(0)
            self.start = time.perf_counter() - self.begins

        def before_batch(self):
            if self.training:
                self.now = time.perf_counter() - self.start
                share = (self.now - self.begins) / (self.end - self.begins)
                if share >= 1:
                    raise fastai.CancelFitException
                if not self.ends:  # the frozen training may end with its epoch instead
                    self.learn.pct_train = share

        def before_validate(self):
            raise fastai.CancelValidException

    features = peer.features(size)
    loaders = block.dataloaders(
        [path for path, _ in [*peer.train, *peer.validation]],
        bs=peer.args.per_device_train_batch_size,
        num_workers=count_cores(),
        device=peer.args.device,
    )

    def architecture(pretrained: bool) -> nn.Module:
        return nn.Sequential(features, nn.AdaptiveAvgPool2d(1))  # fastai cuts it at the pooling

    learner = fastai.vision_learner(loaders, architecture, normalize=False, metrics=fastai.accuracy)
    with learner.no_bar(), learner.no_logging():
        with learner.added_cbs(FollowTime()):
            learner.fine_tune(MANY_EPOCHS, base_lr=learning_rate)
        return float(learner.validate()[1])


class ImageList(torch.utils.data.Dataset):
    """Transformed images from their files, with their labels."""

    def __init__(self, images: Images, transform: Callable[[Image.Image], torch.Tensor]):
        self.images, self.transform = images, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int) -> tuple[torch.Tensor, int]:
        path, label = self.images[row]
        with Image.open(path) as image:
            return self.transform(image.convert("RGB")), label


def load_timm(peer: Peer, size: int, is_training: bool) -> torch.utils.data.DataLoader:
    """Batches with the transforms of timm; validation images are not cropped, as in the other trainings."""
    transform = timm.data.create_transform(
        size,
        is_training,
        color_jitter=COLOR_JITTER,
        interpolation="random" if is_training else "bilinear",
        mean=peer.processor.image_mean,
        std=peer.processor.image_std,
        crop_pct=1.0,
    )
    args, images = peer.args, peer.train if is_training else peer.validation
    batch = args.per_device_train_batch_size if is_training else args.per_device_eval_batch_size
    return torch.utils.data.DataLoader(
        ImageList(images, transform),
        batch,
        shuffle=is_training,
        drop_last=is_training,
        num_workers=count_cores(),
        persistent_workers=True,
    )


def repeat(batches: torch.utils.data.DataLoader) -> Iterator[Any]:
    """The batches of epoch after epoch."""
    while True:
        yield from batches


def train_timm(peer: Peer, size: int, learning_rate: float, minutes: float) -> float:
    """The validation accuracy after so many minutes with images of that size."""
    features = peer.features(size)
    channels = features(torch.zeros(1, 3, size, size)).shape[1]
    model = nn.Sequential(features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, peer.classes))
    model.to(peer.args.device).train()
    optimizer = timm.optim.create_optimizer_v2(model, "adamw", learning_rate, WEIGHT_DECAY)
    schedule = timm.scheduler.CosineLRScheduler(
        optimizer, TICKS, warmup_t=int(WARM_UP * TICKS), warmup_lr_init=learning_rate / 100, t_in_epochs=False
    )
    smooth, start = timm.loss.LabelSmoothingCrossEntropy(LABEL_SMOOTHING), time.perf_counter()
    for images, labels in repeat(load_timm(peer, size, is_training=True)):
        share = (time.perf_counter() - start) / (60 * minutes)
        if share >= 1:
            break
        schedule.step_update(int(share * TICKS))
        optimizer.zero_grad()
        smooth(model(images.to(peer.args.device)), labels.to(peer.args.device)).backward()
        optimizer.step()
    model.eval()
    hits = 0
    with torch.inference_mode():
        for images, labels in load_timm(peer, size, is_training=False):
            hits += int((model(images.to(peer.args.device)).argmax(-1).cpu() == labels).sum())
    return hits / len(peer.validation)


# Name of --peers: the library if it is installed, learning rates to choose from, and the training.
PEERS = {
    "fastai": (fastai, (5e-4, 2e-3, 8e-3), train_fastai),
    "timm": (timm, (2e-4, 5e-4, 2e-3), train_timm),
}
