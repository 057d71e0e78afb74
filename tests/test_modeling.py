"""Classifiers built from checkpoints: what is loaded, what is new, what is resized."""

import json

import pytest
import torch
from conftest import ARCHITECTURES, GLOSSES, WNIDS
from safetensors.torch import load_file, save_file
from torch.profiler import ProfilerActivity, profile
from transformers import (
    EfficientNetConfig,
    EfficientNetForImageClassification,
    SiglipConfig,
    SiglipForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

from transfer.errors import UserError
from transfer.models.build import build_classifier, load_trained, match_labels
from transfer.models.cpu_kernels import use_plain_attention
from transfer.models.load import read_geometry

NAMES = [GLOSSES[wnid].split(",")[0] for wnid in WNIDS]


def build(checkpoint, **options):
    return build_classifier(str(checkpoint), WNIDS, NAMES, [GLOSSES[wnid] for wnid in WNIDS], **options)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_only_the_head_is_new(kind, checkpoints):
    built = build(checkpoints(kind)).model
    saved = type(built).from_pretrained(checkpoints(kind)).state_dict()
    for name, values in built.state_dict().items():
        if name.startswith("classifier"):
            assert values.shape[0] == 4 != saved[name].shape[0]
        else:
            assert torch.equal(values, saved[name])


def test_weights_missing_from_the_backbone_are_an_error_that_lists_them(checkpoints, tmp_path):
    source = checkpoints("vit")
    weights = load_file(source / "model.safetensors")
    missing = sorted(name for name in weights if "layer.1." in name or "layers.1." in name)
    assert missing
    save_file({k: v for k, v in weights.items() if k not in missing}, tmp_path / "model.safetensors", {"format": "pt"})
    for name in ("config.json", "preprocessor_config.json"):
        (tmp_path / name).write_bytes((source / name).read_bytes())
    with pytest.raises(UserError, match="backbone weights are missing or have another shape: vit"):
        build(tmp_path)


def test_a_checkpoint_without_a_head_gets_one(checkpoints, tmp_path):
    """google/vit-base-patch16-224-in21k is a bare encoder."""
    bare = ViTModel.from_pretrained(checkpoints("vit"))
    bare.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_bytes((checkpoints("vit") / "preprocessor_config.json").read_bytes())
    assert build(tmp_path).model.classifier.out_features == 4


def test_pickled_weights_are_refused(checkpoints, tmp_path):
    weights = load_file(checkpoints("vit") / "model.safetensors")
    torch.save(weights, tmp_path / "pytorch_model.bin")
    for name in ("config.json", "preprocessor_config.json"):
        (tmp_path / name).write_bytes((checkpoints("vit") / name).read_bytes())
    with pytest.raises(UserError, match=r"cannot be loaded.*model\.safetensors"):
        build(tmp_path)


def test_a_half_precision_checkpoint_trains_in_fp32(checkpoints, tmp_path):
    model = build(checkpoints("convnext")).model.half()
    model.save_pretrained(tmp_path)
    processor = checkpoints("convnext") / "preprocessor_config.json"
    (tmp_path / "preprocessor_config.json").write_bytes(processor.read_bytes())
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "float16"
    assert {p.dtype for p in build(tmp_path).model.parameters()} == {torch.float32}


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_another_image_size_is_set_once_and_saved(kind, checkpoints, tmp_path):
    built = build(checkpoints(kind), image_size=48)
    built.model.save_pretrained(tmp_path)
    built.processor.save_pretrained(tmp_path)
    again = load_trained(str(tmp_path), WNIDS)
    assert again.model.config.image_size == 48
    assert read_geometry(again.processor).crop == (48, 48)
    pixels = torch.rand(2, 3, 48, 48)
    with torch.no_grad():
        logits = again.model.eval()(pixels).logits
        assert torch.equal(logits, built.model.eval()(pixels).logits)
    assert logits.shape == (2, 4)


def test_resized_position_embeddings_equal_those_that_vit_interpolates_in_its_forward_pass(checkpoints):
    resized = build(checkpoints("vit"), image_size=48).model.eval()
    plain = type(resized).from_pretrained(checkpoints("vit")).eval()
    pixels = torch.rand(2, 3, 48, 48)
    with torch.no_grad():
        expected = plain.vit(pixels, interpolate_pos_encoding=True).last_hidden_state
        torch.testing.assert_close(resized.vit(pixels).last_hidden_state, expected)


def test_an_image_size_that_is_not_a_multiple_of_the_patch_size_is_refused(checkpoints):
    with pytest.raises(UserError, match="--image_size 50: must be a multiple of 8"):
        build(checkpoints("vit"), image_size=50)


def test_known_classes_are_matched_by_class_id_then_synonyms_then_unambiguous_first_synonym():
    ours = ["n1", "n2", "n3", "n4", "n5"]
    synonyms = ["crane", "goldfish, Carassius auratus", "jay, blue bird", "crane", "unknown"]
    theirs = ["jay", "crane", "Goldfish,  carassius_auratus", "crane"]
    assert match_labels(ours, synonyms, theirs) == {1: 2, 2: 0}  # crane is the name of two classes
    assert match_labels(ours, synonyms, theirs, ["n9", "n4", "n8", "n1"]) == {0: 3, 3: 1, 1: 2, 2: 0}
    assert match_labels(["b", "a"], ["x", "y"], ["a", "b"]) == {0: 1, 1: 0}  # labels that are class ids


def test_the_rows_of_known_classes_are_copied_and_the_others_are_new(checkpoints, tmp_path):
    first = build(checkpoints("convnext"))
    first.model.save_pretrained(tmp_path)
    first.processor.save_pretrained(tmp_path)
    order = [WNIDS[2], "n77777777", WNIDS[0]]
    built = build_classifier(str(tmp_path), order, ["blue", "new", "red"], ["blue", "new", "red"])
    assert built.copied_head_rows == 2
    old, new = first.model.classifier.weight, built.model.classifier.weight
    assert torch.equal(new[0], old[2]) and torch.equal(new[2], old[0])
    assert not any(torch.equal(new[1], row) for row in old)
    cold = build_classifier(str(tmp_path), order, ["b", "n", "r"], order, warm_start=False)
    assert cold.copied_head_rows == 0 and not torch.equal(cold.model.classifier.weight[0], old[2])


def test_efficientnets_batch_norms_average_over_batches(tmp_path, checkpoints):
    shape = {"in_channels": [32], "out_channels": [16], "kernel_sizes": [3], "strides": [2], "num_block_repeats": [1]}
    config = EfficientNetConfig(**shape, expand_ratios=[1], hidden_dim=16, image_size=32, depthwise_padding=[])
    EfficientNetForImageClassification(config).save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_bytes((checkpoints("vit") / "preprocessor_config.json").read_bytes())
    norms = [m for m in build(tmp_path).model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert norms and all(norm.momentum == 0.1 for norm in norms)


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"holds no config\.json"):
        build(tmp_path)


def test_a_foreign_model_is_not_taken_for_a_trained_one(checkpoints):
    with pytest.raises(UserError, match="was not saved by this project"):
        load_trained(str(checkpoints("vit")), WNIDS)


@pytest.mark.parametrize("frozen", [True, False])
def test_batch_norms_keep_their_statistics_unless_told_to_update_them(frozen, pristine_data, checkpoints, finetune):
    out = finetune(
        pristine_data, checkpoints("resnet"), num_train_epochs=1, freeze_batch_norm_stats=str(frozen).lower()
    )
    before, after = (load_file(folder / "model.safetensors") for folder in (checkpoints("resnet"), out / "model"))
    statistics = [name for name in before if name.endswith(("running_mean", "running_var"))]
    assert statistics and all(torch.equal(before[name], after[name]) == frozen for name in statistics)
    affine = [name for name in before if "normalization.weight" in name]
    assert any(not torch.equal(before[name], after[name]) for name in affine)  # weight and bias are trained either way


def test_stochastic_depth_changes_training_and_is_refused_where_there_is_none(
    pristine_data, checkpoints, finetune, capsys
):
    runs = {
        rate: finetune(pristine_data, checkpoints("convnext"), output_dir=f"rate{rate}", drop_path_rate=rate)
        for rate in (0.0, 0.5)
    }
    weights = {rate: (out / "model" / "model.safetensors").read_bytes() for rate, out in runs.items()}
    assert weights[0.0] != weights[0.5]
    with pytest.raises(SystemExit):
        finetune(pristine_data, checkpoints("vit"), output_dir="vit", drop_path_rate=0.1)
    assert "vit has no stochastic depth" in capsys.readouterr().err


SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 32,
    "patch_size": 8,
}


@pytest.mark.skipif(torch.accelerator.is_available(), reason="only without a GPU")
@pytest.mark.parametrize("kind", ["vit", "siglip"])
def test_short_sequences_train_without_the_slow_attention_kernel_and_long_ones_with_it(kind):
    if kind == "vit":
        model = ViTForImageClassification(ViTConfig(**SMALL))
    else:
        model = SiglipForImageClassification(SiglipConfig(vision_config={**SMALL, "vision_use_head": False}))
    images = torch.randn(3, 3, 32, 32)
    before = model(pixel_values=images).logits
    assert not use_plain_attention(model, train_batch=(10_000_000, 32), eval_batch=(3, 32))
    assert not use_plain_attention(model, train_batch=(3, 32), eval_batch=(3, 8_000))
    assert use_plain_attention(model, train_batch=(3, 32), eval_batch=(3, 32))
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        after = model(pixel_values=images).logits
    assert not any("scaled_dot_product" in event.key for event in profiled.key_averages())
    torch.testing.assert_close(after, before)


def test_models_without_global_attention_are_left_as_they_are(checkpoints):
    assert not use_plain_attention(build(checkpoints("convnext")).model, train_batch=(1, 32), eval_batch=(1, 32))
