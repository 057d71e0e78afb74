"""The whole program, in process and through accelerate launch, on tiny data and tiny models."""

import json
import os
import re

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
from accelerate.commands.launch import launch_command, launch_command_parser
from conftest import COLORS, ROOT, WNIDS, draw_picture, stored_pixels, write_data_set
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification, TrainerCallback, pipeline

import data_loading
from data_loading import open_data
from finetune_vit import main
from transfer import runtime
from transfer.data.images import ImageGeometry
from transfer.data.images.store import open_pixel_store
from transfer.errors import UserError
from transfer.runs import timing
from transfer.training import trainer


def labels_of(submission) -> dict[str, int]:
    table = pd.read_csv(submission, dtype={"image_id": str})
    return dict(zip(table["image_id"], table["label"], strict=True))


@pytest.mark.parametrize("kind", ["vit", "swin", "convnext"])
def test_the_saved_model_is_the_best_checkpoint_bit_for_bit(kind, pristine_data, checkpoints, finetune):
    out = finetune(pristine_data, checkpoints(kind), learning_rate="5e-3", save_total_limit=5, num_train_epochs=3)
    state = json.loads((out / "trainer_state.json").read_text())
    saved = load_file(out / "model" / "model.safetensors")
    best = load_file(f"{state['best_model_checkpoint']}/model.safetensors")
    assert saved.keys() == best.keys()
    assert all(torch.equal(saved[name], best[name]) for name in best)
    assert json.loads((out / "metrics.json").read_text())["validation"]["accuracy"] == state["best_metric"]


def test_predictions_of_the_run_are_those_of_the_plain_model_that_it_saves(
    pristine_data, checkpoints, finetune, monkeypatch
):
    changed, prepare = [], trainer.prepare_for_inference

    def watched(model, size):
        changes = prepare(model, size)
        changed.append(not any(isinstance(module, torch.nn.BatchNorm2d) for module in model.modules()))
        return changes

    monkeypatch.setattr(trainer, "prepare_for_inference", watched)
    out = finetune(pristine_data, checkpoints("resnet"), num_train_epochs=1, learning_rate="1e-2")
    assert changed and all(changed)
    with np.load(out / "predictions.npz") as saved:
        files, logits = saved["validation_files"], saved["validation_logits"]
    classify = pipeline("image-classification", model=str(out / "model"), function_to_apply="none", top_k=None)
    plain = [
        {row["label"]: row["score"] for row in rows} for rows in classify([str(pristine_data / f) for f in files])
    ]
    names = classify.model.config.id2label
    expected = [[scores[names[label]] for label in range(len(names))] for scores in plain]
    np.testing.assert_allclose(logits, expected, atol=1e-3)  # the processor rounds pixels in another way


def test_a_worse_last_epoch_is_not_what_is_kept(pristine_data, checkpoints, finetune, monkeypatch):
    """The encoder, not the head alone, must come back from the better epoch (ViT's checkpoints use older names)."""

    class Wreck(TrainerCallback):
        def on_epoch_begin(self, args, state, control, model=None, **kwargs):
            if state.epoch and state.epoch >= 2:
                with torch.no_grad():
                    for parameter in model.parameters():
                        parameter.normal_()

    original = trainer.FinetuningTrainer.__init__

    def with_wreck(self, *args, **kwargs):
        original(self, *args, **kwargs)
        self.add_callback(Wreck())

    monkeypatch.setattr(trainer.FinetuningTrainer, "__init__", with_wreck)
    out = finetune(
        pristine_data, checkpoints("vit"), learning_rate="1e-2", num_train_epochs=3, layer_decay=1, min_crop_scale=1
    )
    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    accuracies = [entry["eval_accuracy"] for entry in history if "eval_accuracy" in entry]
    validation = json.loads((out / "metrics.json").read_text())["validation"]
    assert validation["accuracy"] == max(accuracies) > accuracies[-1]


def test_the_run_leaves_what_the_readme_names_and_nothing_half_written(pristine_data, checkpoints, finetune):
    out = finetune(pristine_data, checkpoints("convnext"))
    left = {path.name for path in out.iterdir() if not path.name.startswith("checkpoint-")} - {"runs"}  # TensorBoard's
    assert left == {
        "submission.csv",
        "metrics.json",
        "run.json",
        "predictions.npz",
        "report.html",
        "run.log",
        "model",
        "trainer_state.json",
    }
    model = {path.name for path in (out / "model").iterdir()}
    assert model == {"config.json", "model.safetensors", "preprocessor_config.json", "README.md"}
    metrics = json.loads((out / "metrics.json").read_text())
    assert set(metrics) == {"validation", "calibration", "zero_epoch", "train", "prediction"}
    wanted = {"accuracy", "accuracy_ci95", "top5_accuracy", "macro_f1", "loss", "n"}
    assert set(metrics["validation"]) == wanted
    assert set(metrics["train"]) == wanted | {"samples_per_second", "seconds"}
    record = json.loads((out / "run.json").read_text())
    assert record["submission_sha256"] and record["data_fingerprint"] and record["versions"]["torch"]
    assert "hub_token" not in record["arguments"]


def test_the_model_learns_the_right_labels_for_unsorted_wnids(pristine_data, checkpoints, finetune):
    """Class order taken from sorted folders anywhere would give the colors other labels."""
    out = finetune(
        pristine_data,
        checkpoints("convnext"),
        learning_rate="2e-2",
        num_train_epochs=12,
        layer_decay=1,
        min_crop_scale=0.8,
    )
    assert json.loads((out / "metrics.json").read_text())["validation"]["accuracy"] > 0.9
    for image_id, label in labels_of(out / "submission.csv").items():
        color = np.asarray(Image.open(pristine_data / "test" / "images" / f"{image_id}.JPEG")).mean((0, 1))
        nearest = min(COLORS, key=lambda wnid: np.abs(color + 15 - COLORS[wnid]).sum())
        assert WNIDS[label] == nearest
    config = AutoModelForImageClassification.from_pretrained(out / "model").config
    assert config.id2label == {0: "red thing", 1: "green thing", 2: "blue thing", 3: "grey"}


@pytest.mark.parametrize("kind", ["deit", "convnext"])
def test_a_plain_pipeline_answers_as_the_run_did_at_another_image_size(kind, pristine_data, checkpoints, finetune):
    out = finetune(pristine_data, checkpoints(kind), learning_rate="5e-3", image_size=48)
    names = json.loads((out / "model" / "config.json").read_text())["id2label"]
    ours = labels_of(out / "submission.csv")
    classify = pipeline("image-classification", model=str(out / "model"))
    for image_id, label in ours.items():
        top = classify(Image.open(pristine_data / "test" / "images" / f"{image_id}.JPEG"))[0]
        assert top["label"] == names[str(label)]


def test_the_submission_keeps_the_templates_ids_and_order(pristine_data, checkpoints, finetune):
    out = finetune(pristine_data, checkpoints("convnext"), num_train_epochs=1)
    template = (pristine_data / "submission_sample.csv").read_text().splitlines()
    written = (out / "submission.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in written] == [line.split(",")[0] for line in template]


def test_one_seed_gives_one_result_with_a_cold_cache_and_a_warm_one(
    pristine_data, checkpoints, finetune, monkeypatch, tmp_path
):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    cold, warm = (finetune(pristine_data, checkpoints("convnext"), output_dir=name) for name in ("cold", "warm"))
    for file in ("model/model.safetensors", "submission.csv"):
        assert (cold / file).read_bytes() == (warm / file).read_bytes()


EVERY_INGREDIENT = {
    "mixup_alpha": 0.2,
    "cutmix_alpha": 0.2,
    "trivial_augment": "true",
    "erasing_probability": 0.5,
    "drop_path_rate": 0.3,
    "ema_decay": 0.9,
}


@pytest.mark.parametrize(("kind", "ingredients"), [("vit", {}), ("convnext", EVERY_INGREDIENT)])
def test_one_seed_gives_one_result_whatever_the_number_of_workers(
    kind, ingredients, pristine_data, checkpoints, finetune
):
    def weigh(name, **words):
        out = finetune(pristine_data, checkpoints(kind), output_dir=name, num_train_epochs=1, **words, **ingredients)
        return (out / "model" / "model.safetensors").read_bytes()

    weights = [weigh(f"run{i}", dataloader_num_workers=workers) for i, workers in enumerate((0, 2, 0))]
    assert weights[0] == weights[1] == weights[2] != weigh("other", seed=7)


def test_photographs_train_to_the_same_weights_and_csv_with_the_cache_and_without(data, checkpoints, finetune, capsys):
    for i, size in enumerate([(300, 200), (160, 400), (90, 90)]):
        draw_picture(WNIDS[0], i, size).save(data / "train" / WNIDS[0] / "images" / f"{WNIDS[0]}_{i}.JPEG")
    words = {"num_train_epochs": 1, "trivial_augment": "true", "mixup_alpha": 0.2}
    cached = finetune(data, checkpoints("convnext"), output_dir="cached", **words)
    capsys.readouterr()
    uncached = finetune(data, checkpoints("convnext"), output_dir="uncached", cache_images="false", **words)
    assert "images      are decoded whenever they are needed, about " in (said := capsys.readouterr().out)
    assert "data worker" in said and "(--cache_images false)" in said
    for file in ("model/model.safetensors", "submission.csv"):
        assert (cached / file).read_bytes() == (uncached / file).read_bytes()


@pytest.mark.parametrize("kind", ["vit", "convnext"])
def test_a_run_stopped_after_an_epoch_resumes_to_the_same_weights(
    kind, pristine_data, checkpoints, finetune, stops_at_a_checkpoint, capsys, tmp_path
):
    whole = finetune(pristine_data, checkpoints(kind), output_dir="whole")

    with stops_at_a_checkpoint(), pytest.raises(SystemExit):
        finetune(pristine_data, checkpoints(kind), output_dir="stopped")
    message = capsys.readouterr().err
    assert "error: interrupted after 1.00 epochs; resume with --resume_from_checkpoint true" in message
    (tmp_path / "stopped" / "checkpoint-99").mkdir()  # what a kill leaves of a checkpoint that was being written
    resumed = finetune(pristine_data, checkpoints(kind), output_dir="stopped", resume_from_checkpoint="true")
    for name in ("model/model.safetensors", "submission.csv"):
        assert (resumed / name).read_bytes() == (whole / name).read_bytes()


def test_a_finished_run_is_not_overwritten(pristine_data, checkpoints, finetune, capsys):
    finetune(pristine_data, checkpoints("convnext"), num_train_epochs=1)
    with pytest.raises(SystemExit) as stop:
        finetune(pristine_data, checkpoints("convnext"), num_train_epochs=1)
    assert stop.value.code == 2
    assert "holds a finished run; choose another --output_dir" in capsys.readouterr().err


def test_an_unfinished_run_says_how_to_resume(pristine_data, checkpoints, finetune, tmp_path, capsys):
    (tmp_path / "out" / "checkpoint-3").mkdir(parents=True)
    (tmp_path / "out" / "checkpoint-3" / "trainer_state.json").write_text('{"global_step": 3}')
    with pytest.raises(SystemExit):
        finetune(pristine_data, checkpoints("convnext"))
    assert "--resume_from_checkpoint true" in capsys.readouterr().err


def test_a_loss_that_is_no_number_stops_the_run_and_names_the_step(pristine_data, checkpoints, finetune, capsys):
    with pytest.raises(SystemExit) as stop:
        finetune(pristine_data, checkpoints("vit"), learning_rate="1e30", warmup_steps=0, num_train_epochs=4)
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert "error: the loss became nan by step" in message and "--learning_rate" in message


def test_a_loss_that_was_never_logged_stops_the_run_too(pristine_data, checkpoints, finetune, tmp_path, capsys):
    with pytest.raises(SystemExit):
        finetune(pristine_data, checkpoints("vit"), learning_rate="1e30", warmup_steps=0, logging_steps=500)
    assert "loss became nan" in capsys.readouterr().err
    assert not (tmp_path / "out" / "submission.csv").exists()


def test_choosing_by_loss_keeps_the_smallest(pristine_data, checkpoints, finetune):
    out = finetune(pristine_data, checkpoints("convnext"), metric_for_best_model="loss", learning_rate="5e-3")
    state = json.loads((out / "trainer_state.json").read_text())
    assert state["best_metric"] == min(e["eval_loss"] for e in state["log_history"] if "eval_loss" in e)


def test_mixed_sizes_train_and_the_pipeline_agrees(data, checkpoints, finetune):
    for i, path in enumerate(sorted(data.rglob("*.JPEG"))):
        Image.open(path).resize((40 + i % 7, 36 + i % 5)).save(path)
    out = finetune(data, checkpoints("convnext"), learning_rate="5e-3")
    names = json.loads((out / "model" / "config.json").read_text())["id2label"]
    classify = pipeline("image-classification", model=str(out / "model"))
    for image_id, label in labels_of(out / "submission.csv").items():
        assert classify(str(data / "test" / "images" / f"{image_id}.JPEG"))[0]["label"] == names[str(label)]


def test_gradient_checkpointing_is_refused_where_the_model_has_none(pristine_data, checkpoints, finetune, capsys):
    with pytest.raises(SystemExit):
        finetune(pristine_data, checkpoints("convnext"), gradient_checkpointing="true")
    assert "ConvNextForImageClassification does not support it" in capsys.readouterr().err


def test_resuming_with_another_architecture_is_refused(pristine_data, checkpoints, finetune, capsys):
    finetune(pristine_data, checkpoints("convnext"))
    with pytest.raises(SystemExit):
        finetune(pristine_data, checkpoints("vit"), resume_from_checkpoint="true")
    assert "does not hold this run's model" in capsys.readouterr().err


def test_a_model_of_other_classes_does_not_predict(pristine_data, data, checkpoints, finetune, capsys):
    out = finetune(pristine_data, checkpoints("convnext"), num_train_epochs=1)
    (data / "wnids.txt").write_text("\n".join(sorted(WNIDS)))
    with pytest.raises(SystemExit):
        finetune(data, out / "model", output_dir="again", do_train="false")
    assert "another order of wnids.txt" in capsys.readouterr().err


@pytest.fixture
def small_trials(monkeypatch):
    """Trials of the tests' few images are the same fraction as those of many."""
    monkeypatch.setattr(timing, "FEW_VALIDATION_IMAGES", 1)
    monkeypatch.setattr("transfer.runs.single.MEASURED_IMAGES", 3)


@pytest.mark.parametrize(("flags", "validated"), [({}, 4), ({"max_eval_samples": 9}, 9)])
def test_a_trial_is_validated_on_as_small_a_part_unless_a_flag_says_otherwise(
    flags, validated, pristine_data, checkpoints, finetune, small_trials, capsys
):
    out = finetune(pristine_data, checkpoints("convnext"), num_train_epochs=1, max_train_samples=8, **flags)
    said, metrics = capsys.readouterr().out, json.loads((out / "metrics.json").read_text())
    assert metrics["validation"]["n"] == validated and metrics["train"]["n"] == 3
    why = "--max_eval_samples" if flags else "--max_train_samples"
    assert f"validation  on {validated} of 12 images, because of {why}\n" in said
    assert "before training, on 3 images\n" in said
    assert len(labels_of(out / "submission.csv")) == 10  # the csv is complete


def test_a_small_part_of_the_data_keeps_few_validation_images(pristine_data, checkpoints, finetune, capsys):
    finetune(pristine_data, checkpoints("convnext"), num_train_epochs=1, max_train_samples=8)
    assert "data        tiny-imagenet-100 (4 classes): 8 train, 12 val, 10 test images\n" in capsys.readouterr().out


def test_a_bad_image_stops_the_run_before_training_and_leaves_nothing(data, checkpoints, finetune, tmp_path, capsys):
    bad = data / "train" / WNIDS[0] / "images" / f"{WNIDS[0]}_3.JPEG"
    bad.write_bytes(bad.read_bytes()[:200])
    with pytest.raises(SystemExit) as stop:
        finetune(data, checkpoints("vit"))
    message = capsys.readouterr().err
    assert stop.value.code == 2 and str(bad) in message and "cannot be read as an image" in message
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["run.log"]  # which says why


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "the recipe comes first"),
        (["nothing.yaml"], "nothing.yaml: cannot read this recipe"),
        (["recipes/smaple.yaml"], "did you mean recipes/sample.yaml?"),
        (["sample.yaml"], "did you mean recipes/sample.yaml?"),
        (["RECIPE", "--lerning_rate", "1"], "unknown argument 'lerning_rate'; did you mean learning_rate"),
        (["RECIPE", "--bf16", "true"], "mixed_precision in accelerate_config.yaml"),
        (["RECIPE", "--seed", "many"], "argument --seed: invalid int value: 'many'"),
        (["RECIPE", "stray"], "'stray' does not belong to an argument"),
        (["RECIPE"], "--data_dir is missing"),
        (["RECIPE", "--data_dir", "nowhere"], "nowhere: no such folder or zip"),
        (["RECIPE", "--data_dir", "DATA", "--validation_fraction", "1"], "must be above 0 and below 1"),
        (["RECIPE", "--data_dir", "DATA", "--model_name_or_path", "./none"], "./none: no such folder"),
        (["RECIPE", "--data_dir", "DATA", "--model_name_or_path", "me/none"], "me/none: cannot be loaded"),
        (["RECIPE", "--data_dir", "DATA", "--push_to_hub", "true"], "--push_to_hub needs --hub_model_id"),
        (["RECIPE", "--data_dir", "DATA", "--resume_from_checkpoint", "true"], "holds no checkpoint"),
        (["RECIPE", "--hub_token", "hf_x"], "tokens do not belong on a command line"),
        (["RECIPE", "--dataloader_drop_last", "true"], "every image counts"),
        (["RECIPE", "--data_dir", "DATA", "--metric_for_best_model", "f1"], "must be accuracy, macro_f1 or loss"),
        (["RECIPE", "--data_dir", "DATA", "--per_device_train_batch_size", "0"], "must be at least 1"),
        (["RECIPE", "--data_dir", "DATA", "--seed", "-1"], "must be at least 0"),
        (["RECIPE", "--data_dir", "DATA", "--learning_rate", "nan"], "must be above 0"),
        (["RECIPE", "--data_dir", "DATA", "--max_minutes", "0"], "--max_minutes 0.0: must be above 0"),
        (
            ["RECIPE", "--data_dir", "DATA", "--max_minutes", "1", "--do_train", "false"],
            "cannot be combined with --do_train",
        ),
        (
            ["RECIPE", "--data_dir", "DATA", "--do_train", "false", "--resume_from_checkpoint", "true"],
            "resumes training",
        ),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line_that_says_what_to_do(
    words, message, pristine_data, tmp_path, capsys
):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"output_dir: {tmp_path}/out\n")
    places = {"RECIPE": str(recipe), "DATA": str(pristine_data)}
    with pytest.raises(SystemExit) as stop:
        main([places.get(word, word) for word in words])
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2 and error.startswith("error: ") and message in error


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rat: 1", "unknown argument 'learning_rat'; did you mean learning_rate"),
        ("- a\n- b", "a recipe is a list of `key: value` lines"),
        ("a: [", "not valid yaml"),
        ("fp16: true", "mixed_precision in accelerate_config.yaml"),
    ],
)
def test_a_faulty_recipe_is_refused_by_name(text, message, tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text)
    with pytest.raises(SystemExit):
        main([str(recipe)])
    error = capsys.readouterr().err
    assert error.startswith(f"error: {recipe}") and message in error


def test_flags_override_the_recipe(tmp_path):
    from transfer.cli import parse_command_line

    recipe = tmp_path / "mine.yaml"
    recipe.write_text("data_dir: sample\nlearning_rate: 1.0e-3\nseed: 1\n")
    _, args = parse_command_line([str(recipe), "--seed", "5"])
    assert (args.learning_rate, args.seed, args.output_dir) == (1e-3, 5, "outputs/mine")


def test_a_list_in_a_recipe_is_emptied_by_its_flag_or_by_an_empty_list(tmp_path, capsys):
    from transfer.cli import parse_command_line

    recipe = tmp_path / "mine.yaml"
    recipe.write_text("data_dir: sample\ntta: [flip]\ntrain_image_size: [96, 128]\nseeds: [1, 2]\n")
    lists = ("tta", "train_image_size", "seeds")
    run, _ = parse_command_line([str(recipe), *(f"--{name}" for name in lists), "--seed", "5"])
    assert [getattr(run, name) for name in lists] == [[], [], []]
    recipe.write_text("data_dir: sample\ntta: []\nreport_to: []\n")
    run, args = parse_command_line([str(recipe)])
    assert run.tta == args.report_to == []
    with pytest.raises(SystemExit):
        main(["--help"])
    printed = " ".join(capsys.readouterr().out.split())
    assert "To empty a list, give its flag without a value, such as `--tta`, or set it to [] in the recipe." in printed


def test_help_teaches_without_loading_anything(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    assert all(name in text for name in ("--data_dir", "--model_name_or_path", "--max_train_samples", "recipes/"))


@pytest.fixture
def launch(tmp_path, monkeypatch, capfd):
    """launch(data, model, *flags, launcher=flags): what the program prints as `accelerate launch` starts it."""
    recipe = tmp_path / "launched.yaml"
    recipe.write_text("per_device_train_batch_size: 8\nnum_train_epochs: 1\nvalidation_fraction: 0.25\n")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(ROOT)

    def run(data_dir, model, *flags, launcher=()):
        words = ["--config_file", "accelerate_config.yaml", *launcher, "finetune_vit.py", str(recipe)]
        words += ["--data_dir", str(data_dir), "--model_name_or_path", str(model), *flags]
        launch_command(launch_command_parser().parse_args(words))
        return capfd.readouterr()

    return run


def test_accelerate_launch_sets_the_precision_and_the_figures_are_those_of_fp32(
    pristine_data, checkpoints, tmp_path, finetune, launch
):
    said = launch(pristine_data, checkpoints("convnext"), "--output_dir", str(tmp_path / "launched"))
    assert "torchvision" not in said.err  # transformers warns of it wherever a processor is imported by name
    assert "accelerate config" in said.out.splitlines()[1]
    again = finetune(pristine_data, tmp_path / "launched" / "model", do_train="false")
    assert (again / "submission.csv").read_bytes() == (tmp_path / "launched" / "submission.csv").read_bytes()
    losses = [
        json.loads((place / "metrics.json").read_text())["validation"]["loss"]
        for place in (tmp_path / "launched", again)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_training_is_in_mixed_precision_after_figures_in_fp32(pristine_data, checkpoints, finetune, monkeypatch):

    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setattr(runtime, "_has_bf16_units", lambda: True)
    seen, step = set(), trainer.FinetuningTrainer.training_step

    def watched(self, model, *args, **kwargs):
        hook = model.classifier.register_forward_hook(lambda head, inputs, logits: seen.add(logits.dtype))
        result = step(self, model, *args, **kwargs)
        hook.remove()
        return result

    monkeypatch.setattr(trainer.FinetuningTrainer, "training_step", watched)
    finetune(pristine_data, checkpoints("convnext"))
    assert seen == {torch.bfloat16}


def test_a_mistake_under_quiet_accelerate_launch_shows_no_traceback(checkpoints, tmp_path, launch, capfd):
    with pytest.raises(SystemExit) as stop:
        launch(tmp_path / "absent", checkpoints("convnext"), launcher=["--quiet"])
    error = capfd.readouterr().err
    assert "error: " in error and "no such folder or zip" in error and "Traceback" not in error
    assert stop.value.code == 1  # the launcher's own


def test_a_device_without_fast_units_gets_another_precision(monkeypatch):

    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert runtime.resolve_mixed_precision().startswith("precision: fp16, not the accelerate config's bf16")
    assert os.environ["ACCELERATE_MIXED_PRECISION"] == "fp16"


def test_an_estimate_says_time_and_memory_and_leaves_nothing(pristine_data, checkpoints, finetune, capsys):
    out = finetune(pristine_data, checkpoints("convnext"), estimate="true")
    said = capsys.readouterr().out
    assert "per epoch of 36 images" in said and "for 10 images" in said and "GiB at batch 8" in said
    advised = re.findall(r"up to about (\d+) images per batch", said)
    assert all(int(images) <= 36 for images in advised)  # there are no more
    assert not out.exists()


def test_an_estimate_counts_steps_and_repeated_trainings(pristine_data, checkpoints, finetune, monkeypatch):
    found = []
    monkeypatch.setattr(timing, "describe_estimate", lambda estimate, *_: [str(found.append(estimate))])
    for words in ({}, {"kfold": 4}, {"max_steps": 50}):
        finetune(pristine_data, checkpoints("convnext"), estimate="true", num_train_epochs=100, **words)
    one, folds, steps = (estimate.run / estimate.epoch for estimate in found)  # 5 steps an epoch
    assert folds > 2 * one and steps < one / 2


def test_an_estimate_of_a_batch_that_does_not_fit_says_what_to_do(
    pristine_data, checkpoints, finetune, monkeypatch, capsys
):
    from transfer.training.trainer import FinetuningTrainer

    def run_out(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(FinetuningTrainer, "compute_loss", run_out)
    with pytest.raises(SystemExit):
        finetune(pristine_data, checkpoints("vit"), estimate="true")
    message = capsys.readouterr().err
    assert "a batch of 8 does not fit" in message
    assert "--per_device_train_batch_size 2 --gradient_accumulation_steps 4" in message


def test_every_core_is_used_where_the_launcher_allows_one(monkeypatch):
    from transfer.runtime import use_all_cores

    before, asked = torch.get_num_threads(), []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)), raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    use_all_cores()
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    use_all_cores()
    assert asked == [3] and torch.get_num_threads() == before


def test_copies_are_counted_in_the_output_the_metrics_the_report_and_the_card(data, checkpoints, finetune, capsys):
    images = data / "train" / WNIDS[0] / "images"
    (images / f"{WNIDS[0]}_3.JPEG").write_bytes((images / f"{WNIDS[0]}_4.JPEG").read_bytes())
    out = finetune(data, checkpoints("convnext"), num_train_epochs=1)
    text = "1 picture occurs more than once in train (2 images), 0 of them with several labels"
    assert text in capsys.readouterr().out
    assert json.loads((out / "metrics.json").read_text())["copies"]["images"] == 2
    assert text in (out / "report.html").read_text() and text in (out / "model" / "README.md").read_text()


def test_an_unreadable_test_image_gets_the_most_frequent_class_and_a_warning(data, checkpoints, finetune, capsys):
    for i in range(3):  # the third class is the largest
        (data / "train" / WNIDS[2] / "images" / f"{WNIDS[2]}_{i}.JPEG").rename(data / "train" / WNIDS[2] / f"{i}.jpg")
    for wnid in (WNIDS[0], WNIDS[1], WNIDS[3]):
        (data / "train" / wnid / "images" / f"{wnid}_7.JPEG").unlink()
    ids = [line.split(",")[0] for line in (data / "submission_sample.csv").read_text().split()[1:]]
    broken = data / "test" / "images" / f"{ids[4]}.JPEG"
    whole = finetune(data, checkpoints("convnext"), output_dir="whole", num_train_epochs=1)
    broken.write_bytes(broken.read_bytes()[:300])
    for name in ("cold", "warm"):
        capsys.readouterr()
        out = finetune(data, checkpoints("convnext"), output_dir=name, num_train_epochs=1)
        said = capsys.readouterr().out
        assert "1 of 10 test images cannot be read; each gets the most frequent class of train, blue" in said
        assert str(broken) in said
        labels, others = labels_of(out / "submission.csv"), labels_of(whole / "submission.csv")
        assert labels.pop(ids[4]) == 2 and labels.items() <= others.items() and len(labels) == 9
    data_loading.main([str(data)])
    said = capsys.readouterr().out
    assert "1 test image cannot be read" in said and str(broken) in said and "ok " in said


def test_a_store_built_with_an_unreadable_test_image_does_not_serve_a_run_that_needs_it(data, tmp_path):
    folder = open_data(str(data))
    (data / folder.test_files[0]).write_bytes(b"broken")
    geometry = ImageGeometry((32, 32), (32, 32), "bicubic", mean=(0.5,) * 3, std=(0.5,) * 3)
    store = open_pixel_store(data, folder.files, geometry, tmp_path / "store", folder.test_files)
    assert list(store.unreadable) == folder.test_files[:1] and not stored_pixels(store, folder.test_files[0]).any()
    with pytest.raises(UserError, match=r"cannot be read as an image.*1 of 58 images cannot be used"):
        open_pixel_store(data, folder.files, geometry, tmp_path / "store")


def thin_out(data, kept: int = 1) -> None:
    """Leave a few images of the last class."""
    for path in sorted((data / "train" / WNIDS[3] / "images").iterdir())[kept:]:
        path.unlink()


def test_class_weights_change_the_training_only_where_they_are_asked_for(data, checkpoints, finetune):
    thin_out(data, kept=3)
    plain, none, balanced = (
        finetune(data, checkpoints("convnext"), output_dir=f"run{i}", num_train_epochs=1, **words)
        for i, words in enumerate([{}, {"class_weights": "none"}, {"class_weights": "balanced"}])
    )
    weights = [(out / "model" / "model.safetensors").read_bytes() for out in (plain, none, balanced)]
    assert weights[0] == weights[1] != weights[2]
    assert "| class_weights | balanced |" in (balanced / "model" / "README.md").read_text()
    assert "| class_weights |" not in (plain / "model" / "README.md").read_text()


def test_the_check_and_the_run_say_which_classes_are_uneven(data, checkpoints, finetune, capsys):
    thin_out(data)
    for i in range(3):
        Image.new("RGB", (32, 32), (i, 0, 0)).save(data / "train" / WNIDS[0] / "images" / f"more_{i}.JPEG")
    data_loading.main([str(data)])
    assert f"class {WNIDS[0]} has 13 training images, {WNIDS[3]} has 1: consider" in capsys.readouterr().out
    finetune(data, checkpoints("convnext"), num_train_epochs=1)
    assert f"class {WNIDS[0]} has 11 training images, {WNIDS[3]} has 1: consider" in capsys.readouterr().out


def test_class_weights_make_every_class_count_alike():
    labels = np.array([0] * 8 + [1] * 2)
    weights = trainer.balance_classes(labels, 3)
    assert torch.equal(weights[:2] * torch.tensor([8.0, 2.0]), torch.tensor([5.0, 5.0]))
    assert float(weights[torch.from_numpy(labels)].mean()) == pytest.approx(1)


def test_balanced_class_weights_reach_the_linear_probe(data, checkpoints, finetune):
    thin_out(data, kept=3)
    runs = [
        finetune(data, checkpoints("convnext"), output_dir=name, class_weights=name, linear_probe_only="true")
        for name in ("none", "balanced")
    ]
    assert len({(out / "model" / "model.safetensors").read_bytes() for out in runs}) == 2


def test_choosing_by_macro_f1_keeps_the_highest(pristine_data, checkpoints, finetune):
    out = finetune(
        pristine_data, checkpoints("convnext"), metric_for_best_model="macro_f1", learning_rate="5e-3", ema_decay=0.9
    )
    log = json.loads((out / "trainer_state.json").read_text())
    scores = [entry.get(name) for entry in log["log_history"] for name in ("eval_macro_f1", "eval_ema_macro_f1")]
    assert log["best_metric"] == max(score for score in scores if score is not None)
    assert json.loads((out / "metrics.json").read_text())["validation"]["macro_f1"] == log["best_metric"]


def test_a_run_of_few_steps_and_few_validation_images_says_so_before_training(data, checkpoints, finetune, capsys):
    def warnings_of(name, **words):
        finetune(data, checkpoints("convnext"), output_dir=name, **words)
        before = capsys.readouterr().out.partition("zero epoch")[0]
        return [line for line in before.splitlines() if line.startswith("warning ")]

    steps, images = warnings_of("short")
    assert "10 optimizer steps are few: use recipes/small_folder.yaml" in steps
    assert "12 validation images are few" in images and "--kfold 5" in images
    (said,) = warnings_of("probe", linear_probe_only="true")
    assert "optimizer steps" not in said and "12 validation images are few" in said


def test_the_foreseen_steps_are_those_of_the_trainer(pristine_data, checkpoints, finetune, capsys):
    out = finetune(pristine_data, checkpoints("convnext"), num_train_epochs=1.5, gradient_accumulation_steps=2)
    steps = json.loads((out / "trainer_state.json").read_text())["global_step"]
    assert f"{steps} optimizer steps are few" in capsys.readouterr().out


def test_a_run_with_enough_steps_and_validation_images_warns_of_nothing(tmp_path, checkpoints, finetune, capsys):
    root = write_data_set(tmp_path, per_class=104)
    finetune(root, checkpoints("convnext"), num_train_epochs=1, per_device_train_batch_size=4)
    assert "are few" not in capsys.readouterr().out
