"""Every backbone that is tested, as a tiny random checkpoint, and the table of docs/backbones.md.

    python tests/backbones.py    # prints the table

Sizes, normalization and depth are read off each family's default configuration and processor, pooling off a forward
pass of the tiny model.
"""

import copy
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers as hf
from torch import nn
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))

from transfer.data.images import ImageGeometry
from transfer.models.dinov3 import DINOv3ViTForImageClassification
from transfer.models.layers import find_blocks, find_heads, parameter_levels
from transfer.models.load import read_geometry

SIZE = 32
WIDE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
VIT = {**WIDE, "image_size": SIZE, "patch_size": 8}
SWIN = {"image_size": SIZE, "patch_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2]} | {
    "window_size": 4,
    "mlp_ratio": 2.0,
}
CONVNEXT = {"hidden_sizes": [8, 16], "depths": [1, 2], "num_stages": 2, "image_size": SIZE}
TEXT = {**WIDE, "vocab_size": 100, "num_hidden_layers": 1}
SQUARE = {"size": {"height": SIZE, "width": SIZE}}
SHRUNK = {"size": {"shortest_edge": 36}, "crop_size": {"height": SIZE, "width": SIZE}}
IMAGENET = {"image_mean": IMAGENET_DEFAULT_MEAN, "image_std": IMAGENET_DEFAULT_STD}
EFFICIENTNET_STD = [0.47853944, 0.4732864, 0.47434163]  # divided by twice: ImageNet's are its squares
CROP_PCT = {"size": {"shortest_edge": SIZE}, "crop_pct": 0.875, **IMAGENET}
SQUARE_CROP = {
    "size": {"height": 36, "width": 36},
    "crop_size": SHRUNK["crop_size"],
    "do_center_crop": True,
    **IMAGENET,
}


@dataclass(frozen=True)
class Family:
    """A tiny checkpoint of one kind: the classes that publish it, and what its config and processor are told."""

    model: type
    config: type
    processor: type
    shape: dict
    view: dict
    checkpoint: str  # the published one that the default config is of
    published: dict = field(default_factory=dict)  # where its processor differs from the class's defaults


FAMILIES = {
    "vit": Family(
        hf.ViTForImageClassification,
        hf.ViTConfig,
        hf.ViTImageProcessor,
        VIT,
        SQUARE,
        "google/vit-base-patch16-224-in21k",
    ),
    "deit": Family(
        hf.DeiTForImageClassification,
        hf.DeiTConfig,
        hf.DeiTImageProcessor,
        VIT,
        SQUARE_CROP,
        "facebook/deit-base-patch16-224",
    ),
    "deit with distillation head": Family(
        hf.DeiTForImageClassificationWithTeacher,
        hf.DeiTConfig,
        hf.DeiTImageProcessor,
        VIT,
        SQUARE_CROP,
        "facebook/deit-base-distilled-patch16-224",
    ),
    "beit": Family(
        hf.BeitForImageClassification,
        hf.BeitConfig,
        hf.BeitImageProcessor,
        {**VIT, "use_relative_position_bias": True},
        SQUARE,
        "microsoft/beit-base-patch16-224-pt22k-ft22k",
        {"size": {"height": 224, "width": 224}},
    ),
    "vit_mae": Family(
        hf.ViTMAEModel, hf.ViTMAEConfig, hf.ViTImageProcessor, VIT, {**SQUARE, **IMAGENET}, "facebook/vit-mae-base"
    ),
    "swin": Family(
        hf.SwinForImageClassification,
        hf.SwinConfig,
        hf.ViTImageProcessor,
        SWIN,
        {**SQUARE, **IMAGENET},
        "microsoft/swin-tiny-patch4-window7-224",
    ),
    "swinv2": Family(
        hf.Swinv2ForImageClassification,
        hf.Swinv2Config,
        hf.ViTImageProcessor,
        SWIN,
        {**SQUARE, **IMAGENET},
        "microsoft/swinv2-tiny-patch4-window8-256",
        {"size": {"height": 256, "width": 256}},
    ),
    "convnext": Family(
        hf.ConvNextForImageClassification,
        hf.ConvNextConfig,
        hf.ConvNextImageProcessor,
        CONVNEXT,
        CROP_PCT,
        "facebook/convnext-tiny-224",
        {"size": {"shortest_edge": 224}},
    ),
    "convnextv2": Family(
        hf.ConvNextV2ForImageClassification,
        hf.ConvNextV2Config,
        hf.ConvNextImageProcessor,
        CONVNEXT,
        CROP_PCT,
        "facebook/convnextv2-tiny-22k-224",
        {"size": {"shortest_edge": 224}},
    ),
    "dinov2": Family(
        hf.Dinov2Model,
        hf.Dinov2Config,
        hf.BitImageProcessor,
        VIT,
        {**SHRUNK, **IMAGENET},
        "facebook/dinov2-base",
        {"size": {"shortest_edge": 256}},
    ),
    "dinov2_with_registers": Family(
        hf.Dinov2WithRegistersModel,
        hf.Dinov2WithRegistersConfig,
        hf.BitImageProcessor,
        VIT,
        {**SHRUNK, **IMAGENET},
        "facebook/dinov2-with-registers-base",
        {"size": {"shortest_edge": 256}},
    ),
    "dinov3_vit": Family(
        hf.DINOv3ViTModel,
        hf.DINOv3ViTConfig,
        hf.ViTImageProcessor,
        {**VIT, "num_register_tokens": 4},
        {**SQUARE, **IMAGENET},
        "facebook/dinov3-vits16-pretrain-lvd1689m",
    ),
    "dinov3_convnext": Family(
        hf.DINOv3ConvNextModel,
        hf.DINOv3ConvNextConfig,
        hf.ViTImageProcessor,
        {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1], "image_size": SIZE},
        {**SQUARE, **IMAGENET},
        "facebook/dinov3-convnext-tiny-pretrain-lvd1689m",
    ),
    "siglip": Family(
        hf.SiglipModel,
        hf.SiglipConfig,
        hf.SiglipImageProcessor,
        {"vision_config": VIT, "text_config": TEXT},
        SQUARE,
        "google/siglip2-base-patch16-224",
    ),
    "siglip2": Family(
        hf.Siglip2Model,
        hf.Siglip2Config,
        hf.Siglip2ImageProcessor,
        {"vision_config": {**WIDE, "patch_size": 8, "num_patches": 16}, "text_config": TEXT},
        {"patch_size": 8, "max_num_patches": 16},
        "google/siglip2-base-patch16-naflex",
    ),
    "clip": Family(
        hf.CLIPModel,
        hf.CLIPConfig,
        hf.CLIPImageProcessor,
        {"vision_config": VIT, "text_config": TEXT},
        SHRUNK,
        "openai/clip-vit-base-patch32",
    ),
    "mobilevit": Family(
        hf.MobileViTForImageClassification,
        hf.MobileViTConfig,
        hf.MobileViTImageProcessor,
        {
            "image_size": SIZE,
            "hidden_sizes": [16, 16, 24],
            "neck_hidden_sizes": [8, 8, 8, 16, 16, 16, 32],
            "num_attention_heads": 2,
        },
        SHRUNK,
        "apple/mobilevit-small",
        {"size": {"shortest_edge": 288}},
    ),
    "efficientnet": Family(
        hf.EfficientNetForImageClassification,
        hf.EfficientNetConfig,
        hf.EfficientNetImageProcessor,
        {
            "image_size": SIZE,
            "width_coefficient": 0.25,
            "depth_coefficient": 0.1,
            "hidden_dim": 320,
        },
        {**SQUARE, "resample": 0, "image_mean": IMAGENET_DEFAULT_MEAN, "image_std": EFFICIENTNET_STD},
        "google/efficientnet-b7",
        {"size": {"height": 600, "width": 600}},
    ),
    "resnet": Family(
        hf.ResNetForImageClassification,
        hf.ResNetConfig,
        hf.ConvNextImageProcessor,
        {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 2], "layer_type": "basic"},
        CROP_PCT,
        "microsoft/resnet-50",
        {"size": {"shortest_edge": 224}},
    ),
}


def save_tiny(kind: str, place: Path) -> None:
    """Write a tiny random checkpoint of a family, as a hub would hold it."""
    family = FAMILIES[kind]
    torch.manual_seed(0)
    family.model(family.config(**copy.deepcopy(family.shape))).save_pretrained(place)
    family.processor(**family.view).save_pretrained(place)
    if kind.startswith("dinov3"):  # whose own processor needs torchvision
        path = place / "preprocessor_config.json"
        path.write_text(path.read_text().replace("ViTImageProcessor", "DINOv3ViTImageProcessor"))


def _pooled(tokens: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    """Ways to make features of (1, N, C) tokens or a (1, C, H, W) map."""
    if tokens.ndim == 4:
        return [("mean of the map", tokens.mean((2, 3)))]
    first, second, patches = tokens[:, 0], tokens[:, 1], tokens[:, 1:].mean(1)
    return [
        ("class token", first),
        ("distillation token", second),
        ("mean of all tokens", tokens.mean(1)),
        ("mean of patches", patches),
        ("class token, mean of patches", torch.cat([first, patches], 1)),
        ("class token, mean of patches", torch.cat([first, tokens[:, 5:].mean(1)], 1)),  # four registers between
    ]


def find_pooling(model: nn.Module, image_size: int) -> str:
    """How the heads' input comes from the last tokens or map of the backbone, found in a forward pass."""
    maps, features, model = [], {}, copy.deepcopy(model)
    for parameter in model.parameters():
        if parameter.ndim == 3:
            nn.init.normal_(parameter)  # tokens and positions start alike, and could not be told apart

    def keep_map(module, inputs, output):
        if isinstance(output, torch.Tensor) and output.ndim > 2 and output[0].numel() > output.shape[-1]:
            maps.append(output)

    hooks = [module.register_forward_hook(keep_map) for module in model.modules()]
    for name, head in find_heads(model).items():

        def keep_features(module, inputs, name=name):
            features[name] = inputs[0]

        hooks.append(head.register_forward_pre_hook(keep_features))
    with torch.no_grad():
        model.eval()(torch.randn(1, 3, image_size, image_size))
    for hook in hooks:
        hook.remove()
    return " and ".join(dict.fromkeys(_name_pooling(maps, feature) for feature in features.values()))


def _name_pooling(maps: list[torch.Tensor], feature: torch.Tensor) -> str:
    def normalized(values):
        return F.layer_norm(values, values.shape[-1:], eps=1e-12)

    for tokens in reversed(maps):
        for name, pooled in _pooled(tokens):
            if pooled.shape == feature.shape and torch.allclose(pooled, feature, atol=1e-5):
                return name
            if pooled.shape == feature.shape and torch.allclose(normalized(pooled), feature, atol=1e-3):
                return f"{name}, normalized"
    raise AssertionError("the head's input comes from nowhere")


HEADER = [
    "| backbone | for example | view | mean / std | pooling | learning-rate levels |",
    "|---|---|---|---|---|---|",
]


def _published(kind: str) -> tuple[nn.Module, ImageGeometry]:
    """A family at its default size, without weights, and the view of its default processor."""
    family = FAMILIES[kind]
    loaded = family.model if family.model.__name__.endswith("Classification") else _classifier_of(kind)
    with torch.device("meta"):
        model = loaded(loaded.config_class())
    if kind == "siglip2":  # as it is fed here
        return model, read_geometry(hf.SiglipImageProcessor(size={"height": 256, "width": 256}, resample=2))
    view = {name: value for name, value in family.view.items() if name not in ("size", "crop_size")}
    return model, read_geometry(family.processor(**view, **family.published))


def _classifier_of(kind: str) -> type:
    """The class that an encoder becomes."""
    became = {"vit_mae": hf.ViTForImageClassification, "dinov3_convnext": hf.ConvNextForImageClassification}
    became |= {"siglip2": hf.SiglipForImageClassification, "dinov3_vit": DINOv3ViTForImageClassification}
    return became.get(kind) or getattr(hf, FAMILIES[kind].model.__name__.replace("Model", "ForImageClassification"))


def _name_normalization(geometry: ImageGeometry) -> str:
    known = {(IMAGENET_DEFAULT_MEAN[0], IMAGENET_DEFAULT_STD[0]): "ImageNet", (0.5, 0.5): "0.5 / 0.5", (0, 1): "none"}
    known |= {(OPENAI_CLIP_MEAN[0], OPENAI_CLIP_STD[0]): "CLIP"}
    name = known[geometry.mean[0], round(geometry.std[0], 8 if geometry.std[0] == OPENAI_CLIP_STD[0] else 3)]
    return name + ", channels blue, green, red" * geometry.bgr


def describe_families(poolings: dict[str, str]) -> list[str]:
    """The rows of docs/backbones.md for families whose pooling was found."""
    rows = []
    for kind, pooling in poolings.items():
        model, geometry = _published(kind)
        blocks, levels = len(find_blocks(model)), max(parameter_levels(model).values()) + 1
        edge = geometry.resize if isinstance(geometry.resize, int) else geometry.resize[0]
        view = f"{geometry.crop[0]}" + (f" of {edge}" if edge != geometry.crop[0] else "")
        rows.append(
            f"| {kind} | `{FAMILIES[kind].checkpoint}` | {view} "
            f"| {_name_normalization(geometry)} | {pooling} | {levels} over {blocks} blocks |"
        )
    return rows


def print_table() -> None:
    from transfer.models.build import build_classifier

    poolings = {}
    for kind in FAMILIES:
        with tempfile.TemporaryDirectory() as place:
            save_tiny(kind, Path(place))
            built = build_classifier(place, ["a", "b"], ["a", "b"], ["a", "b"])
        poolings[kind] = find_pooling(built.model, SIZE)
    print(*HEADER, *describe_families(poolings), sep="\n")


if __name__ == "__main__":
    hf.utils.logging.set_verbosity_error()
    print_table()
