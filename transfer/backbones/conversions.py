"""Encoders that transformers has no plain classifier for, brought into a class that computes the same and has one.

So the saved model is a plain one, and a pipeline elsewhere needs nothing of this project.
"""

import torch
from transformers import (
    AutoModel,
    AutoModelForImageClassification,
    ConvNextConfig,
    ConvNextForImageClassification,
    PreTrainedConfig,
    PreTrainedModel,
    SiglipConfig,
    SiglipForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from transfer.backbones.layers import head_names


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
