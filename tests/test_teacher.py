"""`--teacher`: targets are what finished runs say of the student's own views, and the student follows them."""

import contextlib
import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from backbones import FAMILIES
from conftest import WNIDS
from safetensors.torch import load_file, save_file
from test_augmentation_ingredients import photographs
from test_backbones import build

from finetune_vit import main
from transfer import ensemble
from transfer.data.images import ImageGeometry
from transfer.evaluation.predictions import Predictions
from transfer.files import digest_of_folder
from transfer.runs.record import describe_differences
from transfer.transforms.evaluation import EvaluationTransform
from transfer.transforms.training import Mixing, TrainTransform, seeded_generator

ALWAYS = 2  # the label that the teacher of the trainings gives to every image


def teach(classifiers, monkeypatch, share=1.0, mixing=None):
    """The teacher of a student with 32 px views, and the student's own transform."""
    taken = iter(classifiers)
    monkeypatch.setattr(ensemble, "load_teacher", lambda name, context: next(taken))
    evaluation = EvaluationTransform(ImageGeometry(32, (32, 32), "bilinear", (0.5,) * 3, (0.25, 0.3, 0.35)))
    student = SimpleNamespace(
        train_transform=TrainTransform(evaluation, [32], 0.35, mixing=mixing),
        eval_transform=evaluation,
        accelerator=SimpleNamespace(autocast=contextlib.nullcontext),
        args=SimpleNamespace(device=torch.device("cpu")),
    )
    run = SimpleNamespace(teacher=["a run"] * len(classifiers), teacher_share=share)
    return ensemble.Teacher(student, SimpleNamespace(run=run)), student.train_transform


@pytest.mark.parametrize("mixing", [None, Mixing(4, 0.4, 1.0)], ids=["labels", "mixed"])
@pytest.mark.parametrize("share", [1.0, 0.25])
def test_targets_are_the_mean_probabilities_for_the_same_view_and_the_rest_is_the_label(
    mixing, share, checkpoints, monkeypatch
):
    teachers = [build(checkpoints(kind)) for kind in ("convnext", "vit")]
    taught, plain = teach(teachers, monkeypatch, share, mixing)
    images, labels = photographs(6).byte(), torch.arange(6) % 4
    view, targets = taught(images, labels, seeded_generator(3))
    same_view, own = plain(images, labels, seeded_generator(3))
    assert torch.equal(view, same_view)
    pixels = (view * torch.tensor([0.25, 0.3, 0.35]).view(3, 1, 1) + 0.5) * 255
    given = []
    for teacher in teachers:
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (teacher.geometry.mean, teacher.geometry.std))
        with torch.no_grad():
            given.append(teacher.model.eval()((pixels / 255 - mean) / std).logits.softmax(-1))
    own = own if mixing else torch.eye(4)[labels]
    torch.testing.assert_close(targets, share * (given[0] + given[1]) / 2 + (1 - share) * own, atol=1e-4, rtol=0)
    torch.testing.assert_close(targets.sum(1), torch.ones(6))


@pytest.mark.parametrize("kind", FAMILIES)
def test_every_backbone_teaches_views_of_another_size_than_its_own(kind, checkpoints, monkeypatch):
    teacher = build(checkpoints(kind), image_size=64)
    _, targets = teach([teacher], monkeypatch)[0](photographs(2).byte(), torch.arange(2), seeded_generator(0))
    assert targets.shape == (2, 4) and targets.isfinite().all() and not targets.requires_grad


@pytest.fixture(scope="module")
def trained(tmp_path_factory, pristine_data, checkpoints):
    """A folder with a finished run, `teacher`, that takes every image for one class, and a recipe for its students."""
    place = tmp_path_factory.mktemp("taught")
    recipe = place / "tiny.yaml"
    recipe.write_text(
        "per_device_train_batch_size: 8\nnum_train_epochs: 2\nvalidation_fraction: 0.25\nlearning_rate: 5.0e-2\n"
        f"layer_decay: 1\nload_best_model_at_end: false\nreport_to: none\ndata_dir: {pristine_data}\n"
        f"model_name_or_path: {checkpoints('convnext')}\n"
    )
    out = place / "teacher"
    main([str(recipe), "--model_name_or_path", str(checkpoints("vit")), "--max_steps", "1", "--output_dir", str(out)])
    shutil.copytree(out / "model", place / "untouched")
    weights = load_file(out / "model" / "model.safetensors")
    weights["classifier.bias"] = 20 * torch.eye(4)[ALWAYS]
    save_file(weights, out / "model" / "model.safetensors", metadata={"format": "pt"})
    record = json.loads((out / "run.json").read_text())
    record["weights_sha256"] = digest_of_folder(out / "model", "*.safetensors")
    (out / "run.json").write_text(json.dumps(record))
    return place


def study(place, name, *words):
    out = place / name
    main([str(place / "tiny.yaml"), "--teacher", str(place / "teacher"), "--output_dir", str(out), *words])
    return out


@pytest.fixture(scope="module")
def student(trained):
    return study(trained, "student")


def test_the_student_follows_its_teacher_instead_of_the_labels(student):
    log = json.loads((student / "trainer_state.json").read_text())["log_history"]
    losses = [entry["loss"] for entry in log if "loss" in entry]
    assert losses[-1] < losses[0] / 3  # of the teacher's probabilities
    assert (Predictions.load(student).validation_logits.argmax(1) == ALWAYS).mean() > 0.7  # a quarter has that label


def test_a_student_that_was_interrupted_ends_with_the_same_weights(student, trained, stops_at_a_checkpoint):
    with stops_at_a_checkpoint(), pytest.raises(SystemExit):
        study(trained, "stopped")
    out = study(trained, "stopped", "--resume_from_checkpoint", "true")
    model = "model/model.safetensors"
    assert (out / model).read_bytes() == (student / model).read_bytes()


def test_the_record_has_the_teacher_and_a_change_of_it_is_said(student, trained):
    record = json.loads((student / "run.json").read_text())
    assert record["arguments"]["teacher"] == [str(trained / "teacher")]
    [fingerprint] = record["arguments"]["teacher_fingerprints"]
    assert digest_of_folder(trained / "teacher" / "model", "*.safetensors").startswith(fingerprint)
    assert describe_differences(record, record) == []
    other = record | {"arguments": record["arguments"] | {"teacher_fingerprints": ["other"]}}
    assert describe_differences(record, other) == [f"arguments: teacher_fingerprints ['{fingerprint}'] -> ['other']"]
    assert f"| teacher | {trained.name}" not in (student / "model" / "README.md").read_text()
    assert "| teacher | teacher |" in (student / "model" / "README.md").read_text()


def refused(place, capsys, *words) -> str:
    with pytest.raises(SystemExit) as stop:
        main([str(place / "tiny.yaml"), "--output_dir", str(place / "refused"), *words])
    assert stop.value.code == 2
    shutil.rmtree(place / "refused", ignore_errors=True)
    return capsys.readouterr().err


def test_a_missing_teacher_is_refused_before_data_are_read(trained, capsys):
    said = refused(trained, capsys, "--teacher", "nowhere", "--data_dir", "nowhere either")
    assert said == "error: --teacher nowhere: is not a finished run; give the output folder of one\n"


def test_a_teacher_that_may_have_seen_the_validation_images_is_refused(trained, capsys):
    teacher = str(trained / "teacher")
    said = refused(trained, capsys, "--teacher", teacher, "--split_seed", "1")
    assert f"--teacher {teacher}: did not hold out " in said and "--split_seed" in said


def test_a_teacher_of_other_classes_is_refused(trained):
    context = SimpleNamespace(
        dataset={"validation": {"file": Predictions.load(trained / "teacher").validation_files[:1].tolist()}},
        data=SimpleNamespace(class_ids=WNIDS[::-1]),
    )
    with pytest.raises(ensemble.UserError, match=r"^--teacher .*: was trained on other classes or another order"):
        ensemble.load_teacher(str(trained / "teacher"), context)


def test_without_a_teacher_its_share_changes_no_byte(trained, checkpoints):
    words = ["--model_name_or_path", str(checkpoints("vit")), "--max_steps", "1", "--teacher_share", "0.5"]
    main([str(trained / "tiny.yaml"), *words, "--output_dir", str(trained / "alone")])
    alone, first = ((trained / name / "model.safetensors").read_bytes() for name in ("alone/model", "untouched"))
    assert alone == first
