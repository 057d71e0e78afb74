"""Checkpoints as they lie on a disk or the Hub: found, loaded whole, with the processor that feeds them."""

from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    BaseImageProcessor,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.image_processing_base import ImageProcessingMixin

import transfer.backbones.dinov3  # noqa: F401  registers its class
from transfer import UserError
from transfer.backbones.conversions import CONVERSIONS
from transfer.backbones.layers import head_names
from transfer.offline import offline_backbone

LOADING_ADVICE = "give a Hub id, a folder made by save_pretrained, or `offline`"


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
