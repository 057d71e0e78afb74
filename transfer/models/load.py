"""Load a checkpoint from a folder or the Hub: its weights, checked for completeness, and its image preprocessing."""

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    BaseImageProcessor,
    ConvNextConfig,
    ConvNextForImageClassification,
    PreTrainedConfig,
    PreTrainedModel,
    SiglipConfig,
    SiglipForImageClassification,
    SiglipVisionConfig,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.image_processing_base import ImageProcessingMixin

import transfer.models.dinov3  # noqa: F401  registers its class
from transfer.data.images import INTERPOLATIONS, ImageGeometry
from transfer.errors import UserError
from transfer.models.layers import head_names
from transfer.models.offline import is_offline, offline_backbone

TIMM_ADVICE = "use a checkpoint with a square center or squash crop and nearest, bilinear or bicubic interpolation"
TIMM_INTERPOLATIONS = {"nearest": "nearest-exact", "bilinear": "bilinear", "bicubic": "bicubic"}
CHECKPOINT_ADVICE = "give a Hub id, a folder made by save_pretrained, or `offline`"
SIZE_ADVICE = "use a checkpoint with a fixed input size"
INTERPOLATION_ADVICE = "use a checkpoint with nearest, bilinear or bicubic interpolation"

# Any, because BaseImageProcessor does not declare the settings that its subclasses have: size, crop_size, resample,
# image_mean and so on.
ImageProcessor: TypeAlias = Any


def _read_normalization(processor: ImageProcessor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(mean, std); MobileViT's processor does not normalize, EfficientNet's divides by std twice."""
    if not processor.do_normalize:
        return (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    mean, std = tuple(processor.image_mean), tuple(processor.image_std)
    if getattr(processor, "include_top", False):
        std = tuple(s * s for s in std)
    return mean, std


def _read_resize(processor: ImageProcessor) -> tuple[tuple[int, int] | int, tuple[int, int]]:
    """(resize, crop) as in `ImageGeometry`."""
    name, size = type(processor).__name__, dict(getattr(processor, "size", None) or {})
    if not size:
        raise UserError(f"{name}: has no image size, so it is not supported; {SIZE_ADVICE}")
    if "shortest_edge" in size:
        resize, crop_pct = size["shortest_edge"], getattr(processor, "crop_pct", None)
        if crop_pct is not None:  # ConvNeXt's processors crop below 384 px, and squash from there on
            return (resize, resize) if resize >= 384 else int(resize / crop_pct), (resize, resize)
    elif "height" in size:
        resize = (size["height"], size["width"])
    else:
        raise UserError(f"{name}: size {size} is not a fixed input size; {SIZE_ADVICE}")
    if getattr(processor, "do_center_crop", False):
        crop = dict(processor.crop_size)
        return resize, (crop["height"], crop["width"])
    if isinstance(resize, int):
        raise UserError(f"{name}: resizes the shortest edge without a center crop; {SIZE_ADVICE}")
    return resize, resize


def _read_timm(config: Mapping) -> ImageGeometry:
    """The geometry of timm's transforms_imagenet_eval, which crops to crop_pct of what it resizes."""
    crop = tuple(config["input_size"][-2:])
    interpolation = TIMM_INTERPOLATIONS.get(config["interpolation"])
    if interpolation is None or config["crop_mode"] not in ("center", "squash") or crop[0] != crop[1]:
        view = f"{config['crop_mode']} crop to {crop}, {config['interpolation']} interpolation"
        raise UserError(f"timm preprocessing with {view} is not supported; {TIMM_ADVICE}")
    edge = int(crop[0] / config["crop_pct"])
    resize = edge if config["crop_mode"] == "center" else (edge, edge)
    return ImageGeometry(resize, crop, interpolation, tuple(config["mean"]), tuple(config["std"]), rounds_corner=True)


def read_geometry(processor: ImageProcessor) -> ImageGeometry:
    """Return how a checkpoint's image processor resizes, crops and normalizes.

    Raises `UserError` if its input size is not fixed or its interpolation is not supported.
    """
    if hasattr(processor, "data_config"):  # timm's
        return _read_timm(processor.data_config)
    needed = ["resample", "image_mean", "image_std"] if processor.do_normalize else ["resample"]
    absent = [name for name in needed if getattr(processor, name, 0) is None]
    if absent:
        raise UserError(f"{type(processor).__name__}: {absent[0]} is not set; set it in preprocessor_config.json")
    resize, crop = _read_resize(processor)
    interpolation = INTERPOLATIONS.get(int(processor.resample))
    if interpolation is None:
        name = type(processor).__name__
        raise UserError(f"{name}: resample {processor.resample} is not supported; {INTERPOLATION_ADVICE}")
    mean, std = _read_normalization(processor)
    bgr = bool(getattr(processor, "do_flip_channel_order", False))
    return ImageGeometry(resize, crop, interpolation, mean, std, bgr)


def set_image_size(processor: ImageProcessor, image_size: int) -> None:
    """Let a processor output `image_size` x `image_size` pixels; the ratio of crop to resized image stays the same."""
    if hasattr(processor, "data_config"):
        from timm.data import create_transform  # only timm's processors have a data_config, so timm is installed

        processor.data_config["input_size"] = (3, image_size, image_size)
        processor.val_transforms = create_transform(**processor.data_config, is_training=False)
        return
    old = read_geometry(processor).crop[0]
    scaled = {name: round(side * image_size / old) for name, side in dict(processor.size).items() if side}
    processor.size = dict.fromkeys(scaled, image_size) if getattr(processor, "crop_pct", None) else scaled
    if getattr(processor, "do_center_crop", False):
        processor.crop_size = {"height": image_size, "width": image_size}


# Encoders without an image classification class in transformers, converted to a class that computes the same and has
# one. The saved model is then a standard one, which a pipeline loads without this project.


def _shared_settings(config: PreTrainedConfig, target: type[PreTrainedConfig]) -> dict:
    """The settings of a config that the target class has too."""
    excluded = {"model_type", "architectures", "transformers_version", "out_features", "out_indices", "stage_names"}
    wanted = target().to_dict().keys() - excluded
    return {name: value for name, value in config.to_dict().items() if name in wanted}


def _load_backbone(model: PreTrainedModel, weights: dict[str, torch.Tensor]) -> PreTrainedModel:
    """Load converted weights, which must cover everything but the head."""
    report = model.load_state_dict(weights, strict=False)
    assert not report.unexpected_keys and set(report.missing_keys) <= head_names(model), report
    return model


def mae_to_vit(encoder: PreTrainedModel) -> PreTrainedModel:
    """Return ViT-MAE's encoder as a ViT (He et al. 2022), which masks no patches."""
    model = ViTForImageClassification(ViTConfig(**_shared_settings(encoder.config, ViTConfig)))
    return _load_backbone(model, {f"vit.{name}": values for name, values in encoder.state_dict().items()})


def naflex_to_siglip(naflex: PreTrainedModel) -> PreTrainedModel:
    """Return SigLIP 2 NaFlex as a SigLIP, which computes the same on square images; its patch embedding is a
    convolution instead of a linear layer. The pooling head, which classifiers do not use, is dropped."""
    vision = naflex.config.vision_config
    image_size = int(vision.num_patches**0.5) * vision.patch_size
    settings = _shared_settings(vision, SiglipVisionConfig) | {"image_size": image_size, "vision_use_head": False}
    config = SiglipConfig(vision_config=settings, id2label=naflex.config.id2label, label2id=naflex.config.label2id)
    weights = {n: v for n, v in naflex.state_dict().items() if not n.startswith("vision_model.head.")}
    patches, p = "vision_model.embeddings.patch_embedding.weight", vision.patch_size
    weights[patches] = weights[patches].view(-1, p, p, vision.num_channels).permute(0, 3, 1, 2)  # (D, 3, P, P)
    return _load_backbone(SiglipForImageClassification(config), weights)


def _name_in_convnext(name: str) -> str:
    """The name in transformers' ConvNeXt of a parameter of DINOv3's ConvNeXt."""
    for old, new in {
        "model.stages.0.downsample_layers.0.": "convnext.embeddings.patch_embeddings.",
        "model.stages.0.downsample_layers.1.": "convnext.embeddings.layernorm.",
        "model.stages.": "convnext.encoder.stages.",
        "downsample_layers.": "downsampling_layer.",
        ".gamma": ".layer_scale_parameter",
        "depthwise_conv.": "dwconv.",
        "pointwise_conv": "pwconv",
        ".layer_norm.": ".layernorm.",
    }.items():
        name = name.replace(old, new)
    return name.replace("layer_norm.", "convnext.layernorm.") if name.startswith("layer_norm.") else name


def dinov3_to_convnext(encoder: PreTrainedModel) -> PreTrainedModel:
    """Return DINOv3's ConvNeXt (Siméoni et al. 2025) as a ConvNeXt; the head's input is the normalized mean."""
    settings = _shared_settings(encoder.config, ConvNextConfig)
    model = ConvNextForImageClassification(ConvNextConfig(**settings, num_stages=len(encoder.config.depths)))
    return _load_backbone(model, {_name_in_convnext(name): values for name, values in encoder.state_dict().items()})


# A damaged config.json can raise any of these.
LOADING_FAULTS = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    ImportError,
    RuntimeError,
    SafetensorError,
    StrictDataclassError,
)

# model_type -> the class that loads it, and its conversion
CONVERSIONS: dict[str, tuple[type, Callable[[PreTrainedModel], PreTrainedModel]]] = {
    "vit_mae": (AutoModel, mae_to_vit),
    "siglip2": (AutoModelForImageClassification, naflex_to_siglip),
    "dinov3_convnext": (AutoModel, dinov3_to_convnext),
}


def locate_checkpoint(name: str) -> str:
    """Return what from_pretrained takes for a `--model_name_or_path`. Raises `UserError` for a folder without one."""
    if is_offline(name):
        return str(offline_backbone(name))
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(f"{name}: this folder holds no config.json; {CHECKPOINT_ADVICE}")
        return str(path)
    if name.startswith((".", "/", "~")) or path.is_file() or len(path.parts) > 2:
        raise UserError(f"--model_name_or_path {name}: no such folder; {CHECKPOINT_ADVICE}")
    return name


def _from_pretrained(loader: Any, source: str, **options) -> Any:
    """`loader.from_pretrained`, whose failures become a `UserError` of one line."""
    try:
        return loader.from_pretrained(source, **options)
    except LOADING_FAULTS as fault:
        reason = " ".join(str(fault).split())
        if "trust_remote_code" in reason:
            reason = "it has custom code, which is not run by default; read it, then set --trust_remote_code true"
        if "timm" in reason and isinstance(fault, ImportError):
            reason = "it is a timm checkpoint: pip install timm torchvision"
        raise UserError(f"--model_name_or_path {source}: cannot be loaded: {reason}; {CHECKPOINT_ADVICE}") from None


# Options of every from_pretrained that loads weights.
WEIGHT_OPTIONS = {
    "dtype": torch.float32,  # not the checkpoint's: half precision trains badly, and fp16 loss scaling refuses it
    "use_safetensors": True,  # unpickling other weight files can run any code
    "output_loading_info": True,  # returns (model, report)
}


def set_drop_path(config: PreTrainedConfig, rate: float) -> None:
    """Set the rate of stochastic depth (Huang et al. 2016). Raises `UserError` for a backbone without it."""
    known = [name for name in ("drop_path_rate", "drop_connect_rate") if hasattr(config, name)]
    if not known:
        raise UserError(f"--drop_path_rate {rate}: {config.model_type} has no stochastic depth in transformers")
    setattr(config, known[0], rate)


def load_processor(source: str, config: PreTrainedConfig, options: dict) -> BaseImageProcessor:
    """Return the checkpoint's image processor, or an equal one for a converted model; `options` of from_pretrained."""
    # Processors are imported here, because without torchvision their import prints a warning that does not matter.
    if config.model_type == "siglip2":  # its processor also cuts the image into patches, which SigLIP's model does
        from transformers import SiglipImageProcessor

        own = _from_pretrained(AutoImageProcessor, source, **options)
        side = int(config.vision_config.num_patches**0.5) * config.vision_config.patch_size
        return SiglipImageProcessor(
            size={"height": side, "width": side},
            resample=own.resample,
            image_mean=own.image_mean,
            image_std=own.image_std,
        )
    if config.model_type.startswith("dinov3"):  # its processor requires torchvision, and resizes as ViT's does
        from transformers import ViTImageProcessor

        settings, _ = ImageProcessingMixin.get_image_processor_dict(source, revision=options["revision"])
        kept = ("size", "resample", "image_mean", "image_std", "do_center_crop", "crop_size")
        return ViTImageProcessor(**{name: settings[name] for name in kept if name in settings})
    return _from_pretrained(AutoImageProcessor, source, **options)


def load_checkpoint(
    name: str,
    revision: str = "main",
    trust_remote_code: bool = False,
    drop_path_rate: float | None = None,
    needs_head: bool = False,
) -> tuple[PreTrainedModel, BaseImageProcessor]:
    """Return a checkpoint's model in fp32 and its image processor.

    Raises `UserError` if the checkpoint cannot be loaded, or lacks weights other than the head's; if it `needs_head`,
    also those.
    """
    source = locate_checkpoint(name)
    options = {"revision": revision, "trust_remote_code": trust_remote_code}  # None would ask at the terminal
    config = _from_pretrained(AutoConfig, source, **options)
    if drop_path_rate is not None:
        set_drop_path(config, drop_path_rate)
    if (channels := getattr(config, "num_channels", 3)) != 3:
        raise UserError(f"--model_name_or_path {name}: takes images of {channels} channels; use a checkpoint for RGB")
    if config.num_labels == 0:
        config.num_labels = 2  # any number will do: the head is replaced
    if config.model_type == "timm_wrapper" and config.model_args:
        config.model_args.pop("num_classes", None)  # newer timm saves it here too, and it would be passed twice
    if config.model_type == "siglip":
        config.vision_config.vision_use_head = False  # the classifier does not use it, so it would not be trained
    loader, convert = CONVERSIONS.get(config.model_type, (AutoModelForImageClassification, None))
    model, report = _from_pretrained(loader, source, config=config, **options, **WEIGHT_OPTIONS)
    absent = {*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])}
    if needs_head and (loader is AutoModel or absent & head_names(model)):
        raise UserError(f"--model_name_or_path {name}: has no trained classification head; fine-tune it first")
    lost = sorted(absent - head_names(model))
    if lost:
        shown = ", ".join(lost[:8]) + (f" and {len(lost) - 8} more" if len(lost) > 8 else "")
        raise UserError(
            f"--model_name_or_path {name}: backbone weights are missing or have another shape: {shown}; "
            "use a complete checkpoint"
        )
    processor = load_processor(source, config, options)
    return (convert(model) if convert else model), processor


def load_complete(kind: type[PreTrainedModel], folder: Path) -> PreTrainedModel:
    """Return a checkpoint's model in fp32. Raises `UserError` unless every tensor is there and fits."""
    loader: Any = kind  # the annotation of from_pretrained leaves out the report
    try:
        model, report = loader.from_pretrained(folder, **WEIGHT_OPTIONS)
        faults = [*report["missing_keys"], *report["unexpected_keys"], *report["mismatched_keys"]]
        if faults:
            raise ValueError(f"{len(faults)} of its tensors do not fit, the first is {faults[0]}")
    except (OSError, ValueError, RuntimeError, SafetensorError) as fault:
        reason = " ".join(str(fault).split())[:300]
        raise UserError(f"{folder}: does not hold this run's model ({reason})") from None
    return model


def saved_class_ids(config: PreTrainedConfig) -> list[str] | None:
    """Return the class ids, in label order, of a model that this project saved (earlier as `wnids`), or None."""
    found = getattr(config, "class_ids", None) or getattr(config, "wnids", None)
    return list(found) if found else None


def fingerprint_of_weights(model: nn.Module) -> str:
    """Return a hash of the name, dtype, shape and bytes of every parameter and buffer."""
    digest = hashlib.blake2b(digest_size=16)
    for name, values in sorted(model.state_dict().items()):
        digest.update(f"{name} {values.dtype} {tuple(values.shape)}\n".encode())
        digest.update(values.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
