"""Several seeds, their mean and spread, ensemble and soup; views averaged in prediction; the probe."""

import contextlib
import dataclasses
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import WNIDS, draw_picture
from fabricated import trained_metrics
from safetensors.torch import load_file
from scipy.special import softmax

from transfer.errors import UserError
from transfer.evaluation.predictions import Predictions, average_probabilities, choose_views
from transfer.runs.repeats import choose_submission, summarize
from transfer.training.linear_probe import fit_head

LEARNING = {"learning_rate": "1e-2", "layer_decay": 1, "min_crop_scale": 0.8}


def metrics_of(out) -> dict:
    return json.loads((out / "metrics.json").read_text())


def test_mean_and_standard_deviation_are_those_of_a_sample():
    runs = [trained_metrics(accuracy) for accuracy in (0.7, 0.8)]
    runs = [
        dataclasses.replace(run, train=dataclasses.replace(run.train, loss=run.validation.accuracy)) for run in runs
    ]
    mean, std = summarize(runs).values()
    assert vars(mean.validation) == {"accuracy": pytest.approx(0.75), "loss": 1.5}
    assert vars(std.validation) == {"accuracy": pytest.approx(0.1 / np.sqrt(2)), "loss": 0.0}
    assert std.train.loss == pytest.approx(0.1 / np.sqrt(2))


def test_an_ensemble_averages_probabilities_not_logits():
    sure, unsure = np.log([[0.9, 0.1]]), np.log([[0.3, 0.7]])
    np.testing.assert_allclose(np.exp(average_probabilities([sure + 5, unsure - 7])), [[0.6, 0.4]])


def test_of_equals_the_simpler_is_handed_in():
    assert choose_submission({"seed 0": 0.8, "soup": 0.8, "ensemble": 0.8}) == "seed 0"
    assert choose_submission({"seed 0": 0.8, "soup": 0.81, "ensemble": 0.81}) == "soup"


def test_a_view_is_kept_only_where_it_helps():
    labels = np.array([0, 1, 0, 1])
    right, wrong = np.eye(2)[labels] * 4, np.eye(2)[1 - labels] * 4
    half = np.where(np.arange(4)[:, None] < 2, right, wrong * 0.5)
    assert choose_views({"plain": half, "flip": right}, labels) == ["plain", "flip"]
    assert choose_views({"plain": right, "flip": wrong, "zoom": right}, labels) == ["plain"]


@pytest.fixture(scope="module")
def seeds_run(tmp_path_factory, pristine_data, checkpoints):
    from finetune_vit import main

    place = tmp_path_factory.mktemp("seeds")
    recipe = place / "tiny.yaml"
    recipe.write_text(
        "per_device_train_batch_size: 8\nnum_train_epochs: 2\nvalidation_fraction: 0.25\nseeds: [3, 5]\n"
    )
    arguments = {"data_dir": pristine_data, "model_name_or_path": checkpoints("vit"), "output_dir": place / "out"}
    words = [w for name, value in (arguments | LEARNING).items() for w in (f"--{name}", str(value))]
    main([str(recipe), *words])
    return [str(recipe), *words], place / "out"


def test_repeated_seeds_report_mean_spread_ensemble_and_soup(seeds_run):
    _, out = seeds_run
    metrics, singles = metrics_of(out), [metrics_of(out / f"seed-{seed}") for seed in (3, 5)]
    assert metrics["seeds"] == singles and singles[0]["train"] != singles[1]["train"]
    accuracies = [single["validation"]["accuracy"] for single in singles]
    assert metrics["mean"]["validation"]["accuracy"] == pytest.approx(np.mean(accuracies))
    assert metrics["std"]["validation"]["accuracy"] == pytest.approx(np.std(accuracies, ddof=1))
    assert metrics["soup"]["accuracy"] >= max(accuracies)
    members = [Predictions.load(out / f"seed-{seed}") for seed in (3, 5)]
    together = average_probabilities([member.validation_logits for member in members])
    hits = (together.argmax(-1) == members[0].validation_labels).mean()
    assert metrics["ensemble"]["accuracy"] == pytest.approx(hits)
    scores = [*accuracies, metrics["soup"]["accuracy"], metrics["ensemble"]["accuracy"]]
    assert metrics["submission"]["validation_accuracy"] == max(scores)


def test_the_submission_is_what_its_named_source_says(seeds_run):
    _, out = seeds_run
    members = {f"seed {seed}": Predictions.load(out / f"seed-{seed}") for seed in (3, 5)}
    scores = {name: member.test_logits for name, member in members.items()}
    scores |= {"soup": Predictions.load(out).test_logits, "ensemble": average_probabilities(list(scores.values()))}
    named = scores[metrics_of(out)["submission"]["from"]].argmax(-1)
    handed_in = dict(row.split(",") for row in (out / "submission.csv").read_text().splitlines()[1:])
    ids = members["seed 3"].test_ids.tolist()
    assert [int(handed_in[image_id]) for image_id in ids] == named.tolist()


def test_each_seed_leaves_a_whole_run_of_its_own(seeds_run):
    _, out = seeds_run
    for seed in (3, 5):
        record = json.loads((out / f"seed-{seed}" / "run.json").read_text())
        assert record["arguments"]["seed"] == seed and record["arguments"]["seeds"] == []
        assert (out / f"seed-{seed}" / "submission.csv").is_file()
    assert (out / "submission.csv").is_file() and (out / "model" / "model.safetensors").is_file()


def test_finished_seeds_are_not_trained_again_on_resuming(seeds_run, capsys):
    from finetune_vit import main

    command, out = seeds_run
    before = (out / "seed-3" / "model" / "model.safetensors").stat().st_mtime_ns
    first = (out / "submission.csv").read_bytes(), (out / "model" / "model.safetensors").read_bytes()
    with pytest.raises(SystemExit):
        main(command)
    assert "holds a finished run" in capsys.readouterr().err
    smaller = ["--data_dir", "missing", "--per_device_train_batch_size", "4"]
    with pytest.raises(SystemExit):
        main([*command, "--resume_from_checkpoint", "true", *smaller])
    assert "seed-3: was trained with 8 images per optimizer step" in capsys.readouterr().err
    main([*command, "--resume_from_checkpoint", "true"])
    assert (out / "seed-3" / "model" / "model.safetensors").stat().st_mtime_ns == before
    assert first == ((out / "submission.csv").read_bytes(), (out / "model" / "model.safetensors").read_bytes())


def test_a_finished_training_of_other_data_is_noticed_before_the_next_one(seeds_run, tmp_path, capsys):
    from finetune_vit import main

    command, out = seeds_run
    shutil.copytree(out / "seed-3", tmp_path / "out" / "seed-3")
    data = Path(shutil.copytree(command[command.index("--data_dir") + 1], tmp_path / "data"))
    draw_picture(WNIDS[0], 77).save(data / "train" / WNIDS[0] / "images" / f"{WNIDS[0]}_5.JPEG")
    words = ["--output_dir", str(tmp_path / "out"), "--resume_from_checkpoint", "true", "--data_dir", str(data)]
    with pytest.raises(SystemExit) as stop:
        main([*command, *words])
    assert stop.value.code == 2
    assert "seed-3: was made with other images; restore the data and the split" in capsys.readouterr().err
    assert not (tmp_path / "out" / "seed-5").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--seeds", "1"], "two or more different seeds"),
        (["--seeds", "1", "1"], "two or more different seeds"),
        (["--seeds", "1", "2", "--do_train", "false"], "cannot be combined with --do_train false"),
        (["--tta", "upside_down"], "--tta upside_down: must be flip, zoom, zoom_flip or corners"),
        (["--ema_decay", "1"], "must be at least 0 and below 1"),
        (["--mixup_alpha", "-1"], "--mixup_alpha -1.0: must be at least 0"),
        (["--train_image_size", "32", "4"], "must be at least 8"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_anything_is_read(words, message, tmp_path, capsys):
    from finetune_vit import main

    recipe = tmp_path / "r.yaml"
    recipe.write_text("data_dir: nowhere\n")
    with pytest.raises(SystemExit) as ended:
        main([str(recipe), "--output_dir", str(tmp_path / "out"), *words])
    assert ended.value.code == 2 and message in capsys.readouterr().err


def test_views_are_tried_and_kept_views_decide_the_submission(pristine_data, checkpoints, finetune):
    out = finetune(pristine_data, checkpoints("convnext"), tta="flip", **LEARNING)
    views = metrics_of(out)["tta"]
    assert set(views["accuracy"]) == {"plain", "flip"} and views["kept"][0] == "plain"
    assert metrics_of(out)["validation"]["accuracy"] >= views["accuracy"]["plain"]


def test_a_probe_separates_what_is_separable_and_keeps_its_start_under_a_strong_penalty():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(200) % 4
    features = torch.randn(200, 16, generator=generator) + 3 * torch.eye(16)[labels]
    weight, bias = torch.randn(4, 16, generator=generator), torch.zeros(4)
    fitted = fit_head(features, labels, weight, bias, 1e-4)
    assert (torch.nn.functional.linear(features, *fitted).argmax(1) == labels).float().mean() > 0.98
    held, _ = fit_head(features, labels, weight, bias, 1e4)
    torch.testing.assert_close(held, weight, atol=1e-2, rtol=0)


@pytest.mark.parametrize("kind", ["deit", "convnext"])
def test_a_probe_alone_hands_in_a_submission_and_leaves_the_backbone(kind, pristine_data, checkpoints, finetune):
    out = finetune(pristine_data, checkpoints(kind), linear_probe_only="true")
    metrics = metrics_of(out)
    assert metrics["validation"]["accuracy"] == metrics["linear_probe"]["accuracy"] > metrics["zero_epoch"]["accuracy"]
    before, after = (load_file(place / "model.safetensors") for place in (checkpoints(kind), out / "model"))
    backbone = [name for name in before if "classifier" not in name]
    assert backbone and all(torch.equal(before[name], after[name]) for name in backbone)
    assert (out / "submission.csv").is_file()


def test_fine_tuning_starts_from_the_probe(pristine_data, checkpoints, finetune):
    arguments = {"learning_rate": "1e-12", "num_train_epochs": 1, "warmup_steps": 0}
    out = finetune(pristine_data, checkpoints("convnext"), linear_probe="true", **arguments)
    metrics = metrics_of(out)
    assert metrics["validation"]["accuracy"] == metrics["linear_probe"]["accuracy"]


@pytest.fixture(scope="module")
def folds_run(tmp_path_factory, pristine_data, checkpoints):
    from finetune_vit import main

    place = tmp_path_factory.mktemp("folds")
    recipe = place / "tiny.yaml"
    recipe.write_text("per_device_train_batch_size: 8\nnum_train_epochs: 2\nkfold: 3\n")
    arguments = {"data_dir": pristine_data, "model_name_or_path": checkpoints("convnext"), "output_dir": place / "out"}
    words = [w for name, value in (arguments | LEARNING).items() for w in (f"--{name}", str(value))]
    with (place / "said").open("w") as said, contextlib.redirect_stdout(said):
        main([str(recipe), *words])
    return [str(recipe), *words], place / "out"


def test_every_image_is_judged_by_the_fold_that_had_not_seen_it(folds_run):
    _, out = folds_run
    whole, members = Predictions.load(out), [Predictions.load(out / f"fold-{fold}") for fold in (1, 2, 3)]
    assert len(set(whole.validation_files)) == len(whole.validation_files) == 48
    assert all((np.bincount(member.validation_labels) == 4).all() for member in members)  # stratified
    hits = [(m.validation_logits.argmax(-1) == m.validation_labels).mean() for m in members]
    metrics = metrics_of(out)
    assert metrics["validation"]["n"] == 48 and metrics["validation"]["accuracy"] == pytest.approx(np.mean(hits))
    assert metrics["mean"]["validation"]["accuracy"] == pytest.approx(np.mean(hits))
    assert metrics["std"]["validation"]["accuracy"] == pytest.approx(np.std(hits, ddof=1))
    assert metrics["folds"] == [metrics_of(out / f"fold-{fold}") for fold in (1, 2, 3)]
    said = (out.parent / "said").read_text()
    assert "fold-2      training 2 of 3: train 32, validation 16, test 10\n" in said and "splits" not in said
    assert re.search(r"all images, each predicted by the fold that left it out: [\d.]+ \(95% .*n=48\)", said)


def test_the_submission_of_a_cross_validation_is_its_ensembles(folds_run):
    _, out = folds_run
    members = [Predictions.load(out / f"fold-{fold}") for fold in (1, 2, 3)]
    expected = np.mean([softmax(member.test_logits.astype(np.float64), axis=-1) for member in members], 0).argmax(-1)
    handed_in = dict(row.split(",") for row in (out / "submission.csv").read_text().splitlines()[1:])
    assert [int(handed_in[image_id]) for image_id in members[0].test_ids] == expected.tolist()
    page, card = (out / "report.html").read_text(), (out / "model" / "README.md").read_text()
    assert "ensemble of 3 folds" in page and "<h3>Folds</h3>" in page and "mean of the seeds" not in page
    assert "over 3 folds, validation" in card and "each predicted by the fold that left it out" in card


def test_a_fold_can_be_trained_alone_and_is_not_trained_again(folds_run, tmp_path):
    from finetune_vit import main

    command, out = folds_run
    main([*command, "--fold", "2", "--output_dir", str(tmp_path / "alone")])
    weights = "model/model.safetensors"
    assert (tmp_path / "alone" / weights).read_bytes() == (out / "fold-2" / weights).read_bytes()
    before = (out / "fold-1" / weights).stat().st_mtime_ns
    main([*command, "--resume_from_checkpoint", "true"])
    assert (out / "fold-1" / weights).stat().st_mtime_ns == before


def test_folds_that_were_killed_go_on_and_come_to_what_they_would_have(folds_run, tmp_path, capsys):
    from finetune_vit import main

    command, out = folds_run
    killed = tmp_path / "killed"
    shutil.copytree(out / "fold-1", killed / "fold-1")
    shutil.copytree(out / "fold-2", killed / "fold-2", ignore=shutil.ignore_patterns("*.json", "*.csv", "model"))
    [earlier, _] = sorted((out / "fold-2").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    shutil.copytree(earlier, killed / "fold-2" / earlier.name, dirs_exist_ok=True)  # the later one is left cut short
    command = [*command, "--output_dir", str(killed)]
    with pytest.raises(SystemExit):
        main(command)
    assert "holds an unfinished run; resume it with --resume_from_checkpoint true" in capsys.readouterr().err
    refuse = [*command, "--resume_from_checkpoint", "true", "--data_dir", "missing", "--optim", "sgd"]
    message = "--optim was adamw_torch_fused and is now sgd"
    with pytest.raises(SystemExit):
        main(refuse)
    assert f"fold-1: {message}" in capsys.readouterr().err
    (killed / "fold-1").rename(tmp_path / "fold-1")
    with pytest.raises(SystemExit):
        main(refuse)
    assert f"fold-2/{earlier.name}: {message}" in capsys.readouterr().err
    (tmp_path / "fold-1").rename(killed / "fold-1")
    main([*command, "--resume_from_checkpoint", "true"])
    for name in ("model/model.safetensors", "submission.csv", "fold-2/model/model.safetensors"):
        assert (killed / name).read_bytes() == (out / name).read_bytes()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--kfold", "1"], "--kfold 1: must be at least 2"),
        (["--kfold", "2", "--seeds", "1", "2"], "--kfold and --seeds cannot be combined"),
        (["--kfold", "2", "--do_train", "false"], "--kfold repeats the training"),
        (["--kfold", "13"], "--kfold 13: the class of .* has only 12 images"),
        (["--fold", "1"], "--fold 1: must be 1 to --kfold, which is missing"),
        (["--kfold", "2", "--fold", "3"], "--fold 3: must be 1 to --kfold, which is 2"),
    ],
)
def test_a_cross_validation_that_cannot_be_is_refused(
    flags, message, pristine_data, checkpoints, finetune, capsys, tmp_path
):
    from finetune_vit import main

    recipe = tmp_path / "r.yaml"
    recipe.write_text("per_device_train_batch_size: 8\n")
    with pytest.raises(SystemExit) as stopped:
        main([str(recipe), "--data_dir", str(pristine_data), "--model_name_or_path", str(checkpoints("vit")), *flags])
    assert stopped.value.code == 2
    assert re.search(message, capsys.readouterr().err)


def test_data_with_validation_images_of_their_own_are_not_folded(pristine_data):
    from data_loading import load_dataset, open_data

    folder = open_data(str(pristine_data))
    published = dataclasses.replace(folder, validation_files=folder.train_files[:4], validation_labels=[0, 1, 2, 3])
    with pytest.raises(UserError, match="--kfold: this dataset has its own validation images"):
        load_dataset(published, fold=(1, 3))


def test_the_ensemble_of_a_folder_of_seeds_is_a_finished_run(seeds_run, tmp_path, capsys):
    from transfer import ensemble

    _, out = seeds_run
    ensemble.main([str(out), "--output_dir", str(tmp_path / "together")])
    metrics, said = metrics_of(tmp_path / "together"), capsys.readouterr().out
    accuracies = [metrics_of(out / f"seed-{seed}")["validation"]["accuracy"] for seed in (3, 5)]
    assert sorted(metrics["members"]["accuracy"].values()) == sorted(accuracies)
    assert metrics["validation"]["accuracy"] >= max(accuracies) and "(10 rows, checked)" in said
    handed_in = (tmp_path / "together" / "submission.csv").read_text().splitlines()
    template = (out / "submission.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in handed_in] == [row.split(",")[0] for row in template]
