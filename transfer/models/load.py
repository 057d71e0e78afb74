"""What a run leaves behind: its folder, files that are written whole or not at all, and run.json.

How a checkpoint's processor brings an image to the model: read, applied, set to another size.

Checkpoints as they lie on a disk or the Hub: found, loaded whole, with the processor that feeds them.

Encoders that transformers has no plain classifier for, brought into a class that computes the same and has one.

So the saved model is a plain one, and a pipeline elsewhere needs nothing of this project.

A Trainer whose processes hold one model, whole in each or sharded among them.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
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
    ViTConfig,
    ViTForImageClassification,
)
from transformers.image_processing_base import ImageProcessingMixin

import transfer.models.dinov3  # noqa: F401  registers its class
from transfer.data.images import INTERPOLATIONS, ImageGeometry
from transfer.errors import UserError
from transfer.models.layers import head_names
from transfer.models.offline import offline_backbone

TIMM_INTERPOLATIONS = {"nearest": "nearest-exact", "bilinear": "bilinear", "bicubic": "bicubic"}


LOADING_ADVICE = "give a Hub id, a folder made by save_pretrained, or `offline`"


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


def _read_timm(config: Mapping) -> ImageGeometry:
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
    return ImageGeometry(resize, crop, interpolation, tuple(config["mean"]), tuple(config["std"]), rounds_corner=True)


def read_geometry(processor: BaseImageProcessor) -> ImageGeometry:
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
    return ImageGeometry(
        resize, crop or resize, interpolation, mean, std, bool(getattr(processor, "do_flip_channel_order", False))
    )


def set_image_size(processor: BaseImageProcessor, image_size: int) -> None:
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


def _shared_settings(config: PreTrainedConfig, target: type[PreTrainedConfig]) -> dict:
    """What two configs have in common."""
    apart = {"model_type", "architectures", "transformers_version", "out_features", "out_indices", "stage_names"}
    wanted = target().to_dict().keys() - apart
    return {name: value for name, value in config.to_dict().items() if name in wanted}


def _plant(model: PreTrainedModel, weights: dict[str, torch.Tensor]) -> PreTrainedModel:
    """Load weights that must cover everything but the head."""
    report = model.load_state_dict(weights, strict=False)
    assert not report.unexpected_keys and set(report.missing_keys) <= head_names(model), report
    return model


def mae_to_vit(encoder: PreTrainedModel) -> PreTrainedModel:
    """ViT-MAE's encoder is a ViT (He et al. 2022); without its decoder nothing is masked."""
    model = ViTForImageClassification(ViTConfig(**_shared_settings(encoder.config, ViTConfig)))
    return _plant(model, {f"vit.{name}": values for name, values in encoder.state_dict().items()})


def naflex_to_siglip(naflex: PreTrainedModel) -> PreTrainedModel:
    """SigLIP 2 NaFlex on square images is a SigLIP; its patches come as rows of a linear layer instead of a
    convolution. The pooling head, which classifiers leave out, is dropped."""
    vision = naflex.config.vision_config
    settings = _shared_settings(vision, type(SiglipConfig().vision_config))
    image_size = int(vision.num_patches**0.5) * vision.patch_size
    config = SiglipConfig(vision_config=settings | {"image_size": image_size, "vision_use_head": False})
    config.num_labels = naflex.config.num_labels
    config.id2label, config.label2id = naflex.config.id2label, naflex.config.label2id
    weights = {n: v for n, v in naflex.state_dict().items() if not n.startswith("vision_model.head.")}
    patches = "vision_model.embeddings.patch_embedding.weight"
    p = vision.patch_size
    weights[patches] = weights[patches].view(-1, p, p, vision.num_channels).permute(0, 3, 1, 2)  # (D, 3, P, P)
    return _plant(SiglipForImageClassification(config), weights)


def _name_in_convnext(name: str) -> str:
    """A parameter of DINOv3's ConvNeXt as transformers' ConvNeXt calls it."""
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
    """DINOv3's ConvNeXt is a ConvNeXt (Siméoni et al. 2025); the head stands on its normalised mean."""
    settings = _shared_settings(encoder.config, ConvNextConfig)
    model = ConvNextForImageClassification(ConvNextConfig(**settings, num_stages=len(encoder.config.depths)))
    return _plant(model, {_name_in_convnext(name): values for name, values in encoder.state_dict().items()})


# model_type -> how it is loaded, and what it becomes
CONVERSIONS = {
    "vit_mae": (AutoModel, mae_to_vit),
    "siglip2": (AutoModelForImageClassification, naflex_to_siglip),
    "dinov3_convnext": (AutoModel, dinov3_to_convnext),
}


def locate_checkpoint(name: str) -> str:
    """What from_pretrained takes for `--model_name_or_path`; a folder without a model is refused."""
    if name == "offline":
        return str(offline_backbone())
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(f"{name}: this folder holds no config.json; {LOADING_ADVICE}")
        return str(path)
    if name.startswith((".", "/", "~")) or path.is_file() or len(path.parts) > 2:
        raise UserError(f"--model_name_or_path {name}: no such folder; {LOADING_ADVICE}")
    return name


def _load(loader, name: str, **options):
    """from_pretrained whose failures are one line. Only safetensors are read: unpickling weights runs their code."""
    try:
        return loader.from_pretrained(name, **options)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as fault:
        reason = " ".join(str(fault).split())
        if "trust_remote_code" in reason:
            reason = "it brings its own code, which is not run; read it, and --trust_remote_code true runs it"
        if "timm" in reason and isinstance(fault, ImportError):
            reason = "it is one of timm's: pip install timm torchvision"
        raise UserError(f"--model_name_or_path {name}: cannot be loaded: {reason}; {LOADING_ADVICE}") from None


def set_drop_path(config: PreTrainedConfig, rate: float) -> None:
    """Set the stochastic depth of a backbone (Huang et al. 2016). Raises `UserError` for one without it."""
    known = [name for name in ("drop_path_rate", "drop_connect_rate") if hasattr(config, name)]
    if not known:
        raise UserError(f"--drop_path_rate {rate}: {config.model_type} has no stochastic depth in transformers")
    setattr(config, known[0], rate)


def load_processor(source: str, config: PreTrainedConfig, options: dict) -> BaseImageProcessor:
    """The checkpoint's own processor, or a plain one that does the same; `options` are those of from_pretrained."""
    # Processors are imported where they are used: without torchvision that prints a warning which means nothing here.
    if config.model_type == "siglip2":  # it cuts patches, a SigLIP does that itself
        from transformers import SiglipImageProcessor

        own = _load(AutoImageProcessor, source, **options)
        side = int(config.vision_config.num_patches**0.5) * config.vision_config.patch_size
        return SiglipImageProcessor(
            size={"height": side, "width": side},
            resample=own.resample,
            image_mean=own.image_mean,
            image_std=own.image_std,
        )
    if config.model_type.startswith("dinov3"):  # theirs needs torchvision, and resizes as ViT's does
        from transformers import ViTImageProcessor

        settings, _ = ImageProcessingMixin.get_image_processor_dict(source, revision=options["revision"])
        kept = ("size", "resample", "image_mean", "image_std", "do_center_crop", "crop_size")
        return ViTImageProcessor(**{name: settings[name] for name in kept if name in settings})
    return _load(AutoImageProcessor, source, **options)


def load_checkpoint(
    name: str, revision: str = "main", trust_remote_code: bool = False, drop_path_rate: float | None = None
) -> tuple[PreTrainedModel, BaseImageProcessor]:
    """A checkpoint as it was saved, in fp32. Raises `UserError` if anything but the head is missing from it."""
    source = locate_checkpoint(name)
    options = {"revision": revision, "trust_remote_code": trust_remote_code}  # None would ask at the terminal
    config = _load(AutoConfig, source, **options)
    if drop_path_rate is not None:
        set_drop_path(config, drop_path_rate)
    if config.num_labels == 0:
        config.num_labels = 2  # any head will do: it is replaced
    if config.model_type == "timm_wrapper" and config.model_args:
        config.model_args.pop("num_classes", None)  # newer timm saves it there too: it would be passed twice
    if config.model_type == "siglip":
        config.vision_config.vision_use_head = False  # the classifier stands on the patches, so it would never learn
    loader, convert = CONVERSIONS.get(config.model_type, (AutoModelForImageClassification, None))
    model, report = _load(
        loader,
        source,
        config=config,
        **options,
        # The checkpoint's own type would win: half precision trains badly and fp16 scaling refuses it.
        dtype=torch.float32,
        use_safetensors=True,
        output_loading_info=True,
    )
    absent = {*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])}
    lost = sorted(absent - head_names(model))
    if lost:
        shown = ", ".join(lost[:8]) + (f" and {len(lost) - 8} more" if len(lost) > 8 else "")
        raise UserError(f"--model_name_or_path {name}: only the head may be new, but these did not load: {shown}")
    processor = load_processor(source, config, options)
    return (convert(model) if convert else model), processor


def load_complete(kind: type[PreTrainedModel], folder: Path) -> PreTrainedModel:
    """A checkpoint's model in fp32. Raises `UserError` unless every tensor of it is there and fits."""
    try:
        model, report = kind.from_pretrained(
            folder, dtype=torch.float32, use_safetensors=True, output_loading_info=True
        )
        faults = [*report["missing_keys"], *report["unexpected_keys"], *report["mismatched_keys"]]
        if faults:
            raise ValueError(f"{faults[0]} does not fit, and {len(faults) - 1} more")
    except (OSError, ValueError, RuntimeError, SafetensorError) as fault:
        reason = " ".join(str(fault).split())[:300]
        raise UserError(f"{folder}: does not hold this run's model ({reason})") from None
    return model


def saved_class_ids(config: PreTrainedConfig) -> list[str] | None:
    """The class ids in label order of a model that this project saved (older ones call them `wnids`), or None."""
    found = getattr(config, "class_ids", None) or getattr(config, "wnids", None)
    return list(found) if found else None


def fingerprint_of_weights(model: torch.nn.Module) -> str:
    """Hash of every parameter and buffer, by name and bit for bit."""
    digest = hashlib.blake2b(digest_size=16)
    for name, values in sorted(model.state_dict().items()):
        digest.update(f"{name} {values.dtype} {tuple(values.shape)}\n".encode())
        digest.update(values.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
