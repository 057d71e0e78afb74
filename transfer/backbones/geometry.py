"""How a checkpoint's processor brings an image to the model: read, applied, set to another size."""

from collections.abc import Mapping
from dataclasses import dataclass

from PIL import Image
from transformers import BaseImageProcessor

from transfer import UserError

# PIL's numbers -> torch's names. torch's "nearest" takes other pixels than PIL's.
INTERPOLATIONS = {0: "nearest-exact", 2: "bilinear", 3: "bicubic"}
TIMM_INTERPOLATIONS = {"nearest": "nearest-exact", "bilinear": "bilinear", "bicubic": "bicubic"}


@dataclass(frozen=True)
class ViewGeometry:
    """How a checkpoint's processor brings an image to the model: resize, centre crop, normalise."""

    resize: tuple[int, int] | int  # (height, width), or the shortest edge
    crop: tuple[int, int]  # height, width of what the model sees
    interpolation: str  # a name in INTERPOLATIONS
    mean: tuple[float, ...]  # of pixels in 0..1
    std: tuple[float, ...]
    bgr: bool = False  # the model wants blue first
    rounds_corner: bool = False  # where a centre crop leaves an odd rest: torchvision rounds, transformers cuts off

    @property
    def rule(self) -> str:
        """The geometry in words that tell two of them apart."""
        corner = " rounded" if self.rounds_corner else ""
        return f"resize {self.resize} crop {self.crop} {self.interpolation}{corner}"

    def resized(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) after resizing an image of that height and width."""
        if not isinstance(self.resize, int):
            return self.resize
        short = min(height, width)
        # Rounded down, as transformers does.
        return int(height * self.resize / short), int(width * self.resize / short)

    def corner(self, height: int, width: int) -> tuple[int, int]:
        """(top, left) of the centre crop of a resized image."""
        rest = height - self.crop[0], width - self.crop[1]
        return (round(rest[0] / 2), round(rest[1] / 2)) if self.rounds_corner else (rest[0] // 2, rest[1] // 2)

    def apply(self, image: Image.Image) -> Image.Image:
        """The view of one PIL image, before normalisation."""
        height, width = self.resized(image.height, image.width)
        resample = next(number for number, name in INTERPOLATIONS.items() if name == self.interpolation)
        image = image.resize((width, height), resample)
        top, left = self.corner(height, width)
        return image.crop((left, top, left + self.crop[1], top + self.crop[0]))


def read_geometry(processor: BaseImageProcessor) -> ViewGeometry:
    """The evaluation view that a checkpoint's own processor describes. Raises `UserError` for one without a size."""
    if hasattr(processor, "data_config"):
        return _read_timm(processor.data_config)
    if not getattr(processor, "size", None):
        raise UserError(f"{type(processor).__name__}: names no image size; it is not supported here")
    size, crop = dict(processor.size), None
    if "shortest_edge" in size:
        resize, crop = _shortest_edge_rule(processor, size["shortest_edge"])
    elif "height" in size:
        resize = (size["height"], size["width"])
    else:
        raise UserError(f"{type(processor).__name__}: size {size} is no fixed input size")
    if crop is None and getattr(processor, "do_center_crop", False):
        crop_size = dict(processor.crop_size)
        crop = (crop_size["height"], crop_size["width"])
    if crop is None and isinstance(resize, int):
        raise UserError(
            f"{type(processor).__name__}: resizes the shortest edge and crops nothing; no fixed input size"
        )
    interpolation = INTERPOLATIONS.get(int(processor.resample))
    if interpolation is None:
        raise UserError(
            f"{type(processor).__name__}: resample {processor.resample} is neither nearest, bilinear nor bicubic"
        )
    mean, std = _read_normalisation(processor)
    return ViewGeometry(
        resize, crop or resize, interpolation, mean, std, bool(getattr(processor, "do_flip_channel_order", False))
    )


def _read_normalisation(processor: BaseImageProcessor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(mean, std); MobileViT's processor normalises nothing, EfficientNet's divides by std twice."""
    if not processor.do_normalize:
        return (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    mean, std = tuple(processor.image_mean), tuple(processor.image_std)
    if getattr(processor, "include_top", False):
        std = tuple(s * s for s in std)
    return mean, std


def _shortest_edge_rule(processor: BaseImageProcessor, edge: int):
    """(resize, crop or None); ConvNeXt's processors shrink by crop_pct below 384 px and squash from there on."""
    crop_pct = getattr(processor, "crop_pct", None)
    if crop_pct is None:
        return edge, None
    if edge >= 384:
        return (edge, edge), (edge, edge)
    return int(edge / crop_pct), (edge, edge)


def _read_timm(config: Mapping) -> ViewGeometry:
    """The view of timm's transforms_imagenet_eval: the crop is crop_pct of what was resized."""
    crop = tuple(config["input_size"][-2:])
    interpolation = TIMM_INTERPOLATIONS.get(config["interpolation"])
    if interpolation is None or config["crop_mode"] not in ("center", "squash") or crop[0] != crop[1]:
        raise UserError(
            f"timm view {config['crop_mode']} {crop} {config['interpolation']}: only square views that are cropped "
            "from the centre or squashed, nearest, bilinear or bicubic, are supported"
        )
    edge = int(crop[0] / config["crop_pct"])
    resize = edge if config["crop_mode"] == "center" else (edge, edge)
    return ViewGeometry(resize, crop, interpolation, tuple(config["mean"]), tuple(config["std"]), rounds_corner=True)


def set_view_size(processor: BaseImageProcessor, image_size: int) -> None:
    """Make a processor feed the model image_size x image_size, keeping its share of centre crop."""
    if hasattr(processor, "data_config"):
        from timm.data import create_transform  # a checkpoint of timm was loaded, so timm is here

        processor.data_config["input_size"] = (3, image_size, image_size)
        processor.val_transforms = create_transform(**processor.data_config, is_training=False)
        return
    old = read_geometry(processor).crop[0]
    scaled = {name: round(side * image_size / old) for name, side in dict(processor.size).items() if side}
    processor.size = dict.fromkeys(scaled, image_size) if getattr(processor, "crop_pct", None) else scaled
    if getattr(processor, "do_center_crop", False):
        processor.crop_size = {"height": image_size, "width": image_size}
