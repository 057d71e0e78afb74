"""Every backbone trains, keeps its best epoch, reloads, and predicts the same in a plain pipeline."""

import json
import os
import subprocess
import sys

import pytest
import torch
import transformers
from backbones import FAMILIES, describe_families, find_pooling
from conftest import GLOSSES, ROOT, WNIDS
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForImageClassification, Siglip2ImageProcessor, pipeline

from transfer.errors import UserError
from transfer.models.build import build_classifier, load_trained
from transfer.models.layers import find_blocks, freeze_layers, head_names, parameter_groups, parameter_levels
from transfer.models.load import read_geometry
from transfer.transforms.evaluation import EvaluationTransform, check_transform

NAMES = [GLOSSES[wnid].split(",")[0] for wnid in WNIDS]


def build(checkpoint, **options):
    return build_classifier(str(checkpoint), WNIDS, NAMES, NAMES, **options)


def labels_of(submission) -> dict[str, int]:
    return {row.split(",")[0]: int(row.split(",")[1]) for row in submission.read_text().splitlines()[1:]}


def check_pipeline(out, data) -> None:
    """Check that a plain pipeline predicts the labels of the csv."""
    names = [GLOSSES[wnid].split(",")[0] for wnid in WNIDS]
    ours = labels_of(out / "submission.csv")
    images = [Image.open(data / "test" / "images" / f"{image_id}.JPEG") for image_id in ours]
    answers = pipeline("image-classification", model=str(out / "model"), top_k=1)(images)
    assert [answer[0]["label"] for answer in answers] == [names[label] for label in ours.values()]


def check_from_training_to_pipeline(checkpoint, data, finetune, **options) -> None:
    """Check that a run trains, keeps its best epoch, reloads, and predicts the same in a plain pipeline."""
    out = finetune(data, checkpoint, learning_rate="5e-3", layer_decay=0.9, **options)
    best = json.loads((out / "trainer_state.json").read_text())["best_model_checkpoint"]
    saved, chosen = load_file(out / "model" / "model.safetensors"), load_file(f"{best}/model.safetensors")
    assert saved.keys() == chosen.keys() and all(torch.equal(saved[name], chosen[name]) for name in saved)
    untrained = build(checkpoint, **options).model
    start, trained = untrained.state_dict(), load_trained(str(out / "model"), WNIDS).model.state_dict()
    assert trained.keys() == start.keys()
    # Both backbone and head have changed: neither was frozen by mistake, or lost when it was saved.
    heads = head_names(untrained)
    for part in (heads, start.keys() - heads):
        assert any(not torch.equal(start[name], trained[name]) for name in part)
    again = finetune(data, out / "model", output_dir="again", do_train="false")
    assert (again / "submission.csv").read_bytes() == (out / "submission.csv").read_bytes()
    assert NAMES[0] in (again / "report.html").read_text()
    check_pipeline(out, data)


@pytest.mark.parametrize("kind", FAMILIES)
def test_every_backbone_trains_keeps_its_best_epoch_reloads_and_predicts_the_same(
    kind, pristine_data, checkpoints, finetune
):
    check_from_training_to_pipeline(checkpoints(kind), pristine_data, finetune)


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("image_size", [None, 64])
def test_the_evaluation_transform_does_what_the_saved_processor_does_at_any_size(
    kind, image_size, checkpoints, tmp_path
):
    built = build(checkpoints(kind), image_size=image_size)
    built.processor.save_pretrained(tmp_path)
    built.model.save_pretrained(tmp_path)
    again = load_trained(str(tmp_path), WNIDS)
    geometry = read_geometry(again.processor)
    assert geometry.crop == (image_size or 32,) * 2
    check_transform(again.processor, EvaluationTransform(geometry))
    pixels = torch.rand(2, 3, *geometry.crop)
    with torch.no_grad():
        torch.testing.assert_close(again.model.eval()(pixels).logits, built.model.eval()(pixels).logits)


def test_a_processor_without_a_size_is_refused():
    with pytest.raises(UserError, match=r"Siglip2ImageProcessor.*has no image size"):
        read_geometry(Siglip2ImageProcessor())


@pytest.mark.parametrize("kind", FAMILIES)
def test_learning_rates_fall_from_the_head_to_the_stem(kind, checkpoints):
    model = build(checkpoints(kind)).model
    groups = parameter_groups(model, learning_rate=1.0, weight_decay=0.1, layer_decay=0.5)
    listed = [p for group in groups for p in group["params"]]
    assert len(listed) == len({id(p) for p in listed}) == len(list(model.parameters()))
    levels, heads, blocks = parameter_levels(model), head_names(model), find_blocks(model)
    by_block = [{levels[name] for name in levels if name.startswith(f"{block}.")} for block in blocks]
    assert by_block == [{1 + position} for position in range(len(blocks))]
    top = max(levels.values())
    assert {name for name in levels if levels[name] == top} == heads & levels.keys()
    stem = next(iter(levels))
    assert levels[stem] == 0 and not any(stem.startswith(block) for block in blocks)
    rate = {id(p): group["lr"] for group in groups for p in group["params"]}
    assert all(rate[id(p)] == 0.5 ** (top - levels[name]) for name, p in model.named_parameters())
    assert groups[0]["lr"] == 1.0  # the rate that is logged


def test_a_run_logs_the_learning_rate_of_each_level(pristine_data, checkpoints, finetune):
    out = finetune(pristine_data, checkpoints("vit"), learning_rate="1e-3", layer_decay=0.5, freeze_layers=1)
    same = finetune(pristine_data, checkpoints("vit"), learning_rate="1e-3", layer_decay=1, output_dir="same")
    printed = (out / "run.log").read_text() + (same / "run.log").read_text()
    assert "rates       0.001 for the head; 0.0005, 0.00025, 0.000125 for the levels below it\n" in printed
    assert "rates       0.001 for all trainable parameters\n" in printed


def test_blocks_of_deep_backbones_share_levels_so_that_the_stem_learns():
    with torch.device("meta"):
        config = transformers.ConvNextV2Config(depths=[3, 3, 27, 3], hidden_sizes=[8, 8, 8, 8], num_labels=4)
        model = transformers.ConvNextV2ForImageClassification(config)
    levels = parameter_levels(model)
    assert len(find_blocks(model)) == 36 and max(levels.values()) == 1 + 18 + 1
    # A downsampling layer shares the level of the block that follows it.
    stage = "convnextv2.encoder.stages.2"
    assert levels[f"{stage}.downsampling_layer.1.weight"] == levels[f"{stage}.layers.0.dwconv.weight"]


@pytest.mark.parametrize("kind", ["vit", "resnet", "convnext"])
def test_frozen_levels_and_their_batch_norm_statistics_do_not_change(
    kind, pristine_data, checkpoints, finetune, capsys
):
    frozen = 2
    out = finetune(
        pristine_data, checkpoints(kind), learning_rate="1e-2", freeze_layers=frozen, freeze_batch_norm_stats="false"
    )
    start, trained = build(checkpoints(kind)).model, load_trained(str(out / "model"), WNIDS).model
    levels, before, after = parameter_levels(start), start.state_dict(), trained.state_dict()
    for name, level in levels.items():
        if level < frozen:
            assert torch.equal(before[name], after[name]), name
    for level in range(frozen, max(levels.values()) + 1):
        names = [name for name in levels if levels[name] == level]
        assert any(not torch.equal(before[name], after[name]) for name in names)
    statistics = [name for name in before if name.endswith("running_mean")]
    unchanged = [torch.equal(before[n], after[n]) for n in statistics]
    assert unchanged == [levels[n.replace("running_mean", "weight")] < frozen for n in statistics]
    assert "100.00% trainable" not in capsys.readouterr().out


def test_freezing_more_levels_than_there_are_is_refused(checkpoints):
    with pytest.raises(UserError, match="--freeze_layers 9: ViTForImageClassification has 4 levels below its head"):
        freeze_layers(build(checkpoints("vit")).model, 9)


def test_an_encoder_that_is_converted_to_another_class_computes_the_same(checkpoints):
    pixels = torch.rand(2, 3, 32, 32)
    for kind, part, features in (
        ("vit_mae", "vit", lambda out: out.last_hidden_state[:, 1:].sort(1).values),
        ("dinov3_convnext", "convnext", lambda out: out.pooler_output),
    ):
        options = {"mask_ratio": 0.0} if kind == "vit_mae" else {}
        encoder = AutoModel.from_pretrained(checkpoints(kind), **options).eval()
        built = build(checkpoints(kind)).model.eval()
        with torch.no_grad():
            # MAE shuffles its tokens even if it masks none.
            torch.testing.assert_close(features(getattr(built, part)(pixels)), features(encoder(pixels)))


def test_a_naflex_checkpoint_converted_to_siglip_gives_the_same_logits_for_square_images(checkpoints):
    built = build(checkpoints("siglip2"))
    theirs = AutoModelForImageClassification.from_pretrained(checkpoints("siglip2")).eval()
    built.model.classifier = theirs.classifier
    processor = Siglip2ImageProcessor.from_pretrained(checkpoints("siglip2"))
    image = Image.effect_noise((48, 48), 60).convert("RGB")
    with torch.no_grad():
        expected = theirs(**processor(image, return_tensors="pt")).logits
        ours = built.model.eval()(**built.processor(image, return_tensors="pt")).logits
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-4)


def test_dinov3_with_a_head_loads_elsewhere_by_the_code_that_is_saved_beside_it(checkpoints, tmp_path):
    built = build(checkpoints("dinov3_vit")).model.eval()
    built.save_pretrained(tmp_path / "model")
    assert {p.name for p in (tmp_path / "model").iterdir()} == {"config.json", "model.safetensors", "dinov3.py"}
    program = (
        "import torch; from transformers import AutoModelForImageClassification\n"
        "model = AutoModelForImageClassification.from_pretrained('model', trust_remote_code=True).eval()\n"
        "print(type(model).__module__, model(torch.ones(1, 3, 32, 32)).logits.flatten().tolist(), sep='|')\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env=os.environ | {"HF_HOME": str(tmp_path), "HF_MODULES_CACHE": str(tmp_path / "modules")},
        capture_output=True,
        text=True,
        check=True,
    )
    module, logits = ran.stdout.strip().split("|")
    assert module.startswith("transformers_modules")
    with torch.no_grad():
        expected = built(torch.ones(1, 3, 32, 32)).logits.flatten()
    torch.testing.assert_close(torch.tensor(json.loads(logits)), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", FAMILIES)
def test_the_row_of_each_backbone_in_the_docs_is_what_its_code_says(kind, checkpoints):
    built = build(checkpoints(kind))
    row = describe_families({kind: find_pooling(built.model, 32)})[0]
    assert row in (ROOT / "docs" / "backbones.md").read_text(), f"{row}\nrun: python tests/backbones.py"


TIMM = {  # architecture -> arguments that make it tiny
    "vit_tiny_patch16_224": {"depth": 2, "embed_dim": 32, "num_heads": 2, "img_size": 32, "patch_size": 8},
    "eva02_tiny_patch14_224": {"depth": 2, "embed_dim": 32, "num_heads": 2, "img_size": 32, "patch_size": 8},
    "resnet18": {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16]},
}


def save_timm(architecture: str, folder) -> None:
    """Save a tiny random checkpoint in timm's Hub format; skips the test without timm and the torchvision it needs."""
    timm = pytest.importorskip("timm", reason="timm is not installed: pip install timm torchvision")
    try:
        import torchvision  # noqa: F401
    except Exception as fault:  # torchvision's binaries may raise anything
        pytest.skip(f"timm's checkpoints need torchvision, which cannot be imported: {fault}")
    from timm.models import save_for_hf

    torch.manual_seed(0)
    arguments = TIMM[architecture]
    preprocessing = {"input_size": (3, 32, 32), "mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "bicubic"}
    preprocessing |= {"crop_pct": 0.9, "crop_mode": "center"}
    model = timm.create_model(architecture, num_classes=5, pretrained_cfg_overlay=preprocessing, **arguments)
    save_for_hf(model, folder, model_args=arguments, safe_serialization=True)


@pytest.mark.parametrize("architecture", TIMM)
def test_a_timm_checkpoint_trains_at_another_size_reloads_and_predicts_the_same(
    architecture, tmp_path, pristine_data, finetune
):
    save_timm(architecture, tmp_path / "timm")
    check_from_training_to_pipeline(tmp_path / "timm", pristine_data, finetune, image_size=48)
    model = load_trained(str(tmp_path / "out" / "model"), WNIDS).model
    levels = parameter_levels(model)
    assert len(find_blocks(model)) == (4 if architecture == "resnet18" else 2)
    assert max(levels, key=levels.get).startswith(next(iter(head_names(model))).rpartition(".")[0])
    # Fine-tuned once more, the model has the names of the new classes.
    renamed = build_classifier(str(tmp_path / "out" / "model"), ["a", "b"], ["one", "two"], ["one", "two"])
    renamed.model.save_pretrained(tmp_path / "renamed")
    config = transformers.AutoConfig.from_pretrained(tmp_path / "renamed")
    assert config.id2label == {0: "one", 1: "two"}


def test_a_timm_checkpoint_takes_adapters(tmp_path, pristine_data, finetune):
    save_timm("eva02_tiny_patch14_224", tmp_path / "timm")
    out = finetune(pristine_data, tmp_path / "timm", lora_r=2, learning_rate="2e-2")
    start = build(tmp_path / "timm").model.state_dict()
    assert load_trained(str(out / "model"), WNIDS).model.state_dict().keys() == start.keys()
    check_pipeline(out, pristine_data)
