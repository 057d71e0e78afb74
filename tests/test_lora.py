"""LoRA adapters: few parameters, the same outputs once merged, and checkpoints to resume and choose from."""

import json

import pytest
import torch
from conftest import WNIDS
from safetensors.torch import load_file
from test_backbones import build, check_pipeline
from transformers import ViTConfig, ViTForImageClassification

from transfer.errors import UserError
from transfer.models.build import load_trained
from transfer.models.layers import (
    adapted_layers,
    add_adapters,
    check_same_adapters,
    load_adapters,
    merge_adapters,
    parameter_groups,
    trainable_fraction,
)


def adapted(checkpoint, rank=4):
    """A model whose adapters change its outputs: peft initializes them to have no effect."""
    torch.manual_seed(0)
    model = add_adapters(build(checkpoint).model, rank).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return model


@pytest.mark.parametrize("kind", ["vit", "swin", "convnextv2", "siglip", "dinov3_vit"])
def test_the_merged_model_is_plain_and_gives_the_same_outputs(kind, checkpoints, tmp_path):
    model, pixels = adapted(checkpoints(kind)), torch.rand(4, 3, 32, 32)
    with torch.no_grad():
        expected = model(pixels).logits
        before = build(checkpoints(kind)).model.eval()(pixels).logits
        merged = merge_adapters(model)
        merged.save_pretrained(tmp_path)
        build(checkpoints(kind)).processor.save_pretrained(tmp_path)
        reloaded = load_trained(str(tmp_path), WNIDS).model.eval()
        assert (merged.eval()(pixels).logits - expected).abs().max() < 1e-5
        assert (reloaded(pixels).logits - expected).abs().max() < 1e-5
    assert (expected - before).abs().max() > 1e-3
    assert reloaded.state_dict().keys() == build(checkpoints(kind)).model.state_dict().keys()
    assert not (tmp_path / "adapter_config.json").exists()


def test_under_two_percent_of_vit_b_is_trained_including_its_whole_head():
    with torch.device("meta"):
        model = ViTForImageClassification(ViTConfig(num_labels=100))
        plain = sum(p.numel() for p in model.parameters())
        model = add_adapters(model, rank=8)
    trained = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    # 12 blocks of q, k, v, o (768 to 768), fc1 (to 3072) and fc2 (back), each r * (in + out), and the head.
    adapters = 12 * 8 * (4 * (768 + 768) + 2 * (768 + 3072))
    assert sum(trained.values()) == adapters + 768 * 100 + 100
    assert sum(trained.values()) / plain < 0.02 and trainable_fraction(model) < 0.02
    assert {name.rpartition("classifier.")[2] for name in trained if "lora_" not in name} == {
        "modules_to_save.default.weight",
        "modules_to_save.default.bias",
    }


def test_learning_rates_of_adapters_decay_with_depth_from_the_head(checkpoints):
    groups = parameter_groups(adapted(checkpoints("vit")), 1.0, 0.1, 0.5)
    assert [group["lr"] for group in groups if group["weight_decay"]] == [1.0, 0.25, 0.125]


def test_a_run_with_adapters_keeps_its_best_epoch_and_leaves_a_plain_model(
    pristine_data, checkpoints, finetune, capsys
):
    out = finetune(pristine_data, checkpoints("vit"), lora_r=4, learning_rate="2e-2", num_train_epochs=3)
    assert "% trainable" in capsys.readouterr().out
    state = json.loads((out / "trainer_state.json").read_text())
    best = load_file(f"{state['best_model_checkpoint']}/adapter_model.safetensors")
    saved = load_file(out / "model" / "model.safetensors")
    head = next(values for name, values in best.items() if name.endswith("classifier.weight"))
    assert torch.equal(saved["classifier.weight"], head)
    assert json.loads((out / "metrics.json").read_text())["validation"]["accuracy"] == state["best_metric"]
    assert {path.name for path in (out / "model").iterdir()} == {
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
        "README.md",
    }
    again = finetune(pristine_data, out / "model", output_dir="again", do_train="false")
    assert (again / "submission.csv").read_bytes() == (out / "submission.csv").read_bytes()
    check_pipeline(out, pristine_data)


def test_a_run_with_adapters_that_was_stopped_resumes_to_the_same_weights(
    pristine_data, checkpoints, finetune, stops_at_a_checkpoint, tmp_path, capsys
):
    options = {"lora_r": 4, "learning_rate": "2e-2"}
    complete = finetune(pristine_data, checkpoints("vit"), output_dir="complete", **options)

    with stops_at_a_checkpoint(), pytest.raises(SystemExit):
        finetune(pristine_data, checkpoints("vit"), output_dir="stopped", **options)
    for rank in (2, 0):
        wrong = options | {"lora_r": rank, "resume_from_checkpoint": "true"}
        with pytest.raises(SystemExit):
            finetune(pristine_data, checkpoints("vit"), output_dir="stopped", **wrong)
        assert f"--lora_r was 4 and is now {rank}, but its optimizer" in capsys.readouterr().err
    resumed = finetune(
        pristine_data, checkpoints("vit"), output_dir="stopped", resume_from_checkpoint="true", **options
    )
    assert (resumed / "model/model.safetensors").read_bytes() == (complete / "model/model.safetensors").read_bytes()


def test_adapters_learn_under_gradient_checkpointing(pristine_data, checkpoints, finetune):
    out = finetune(pristine_data, checkpoints("vit"), lora_r=4, learning_rate="2e-2", gradient_checkpointing="true")
    start, trained = build(checkpoints("vit")).model, load_trained(str(out / "model"), WNIDS).model
    changed = [n for n, p in start.named_parameters() if not torch.equal(p, trained.get_parameter(n))]
    assert {name for name in changed if not name.startswith("classifier")} == {
        f"{name}.weight" for name in adapted_layers(start, 4)
    }


def test_adapters_that_differ_from_the_chosen_checkpoint_are_an_error(checkpoints, tmp_path):
    model = adapted(checkpoints("vit"))
    model.save_pretrained(tmp_path)
    check_same_adapters(model, tmp_path)
    with torch.no_grad():
        next(p for p in model.parameters() if p.requires_grad).add_(1e-3)
    with pytest.raises(RuntimeError, match="was chosen, but the model differs in"):
        check_same_adapters(model, tmp_path)
    load_adapters(model, tmp_path)
    check_same_adapters(model, tmp_path)


def test_a_backbone_without_linear_layers_gets_advice_instead_of_adapters(checkpoints):
    with pytest.raises(UserError, match=r"--lora_r 4: ResNetFor.* has no linear layers.*freeze_layers"):
        add_adapters(build(checkpoints("resnet")).model, 4)


def test_adapters_cannot_be_combined_with_frozen_levels(pristine_data, checkpoints, finetune, capsys):
    with pytest.raises(SystemExit):
        finetune(pristine_data, checkpoints("vit"), lora_r=4, freeze_layers=1)
    assert "--freeze_layers cannot be combined with --lora_r" in capsys.readouterr().err
