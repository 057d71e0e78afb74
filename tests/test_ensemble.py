"""Ensembles of finished runs: which runs are kept, how they are averaged, what is left, and what does not fit."""

import json
import os
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import GLOSSES, WNIDS
from fabricated import some_logits, write_run
from scipy.special import softmax
from test_reporting import Page, labeled_files

import data_loading
from transfer import cli, ensemble
from transfer.evaluation.metrics import RunMetrics
from transfer.evaluation.predictions import Predictions, fit_temperature
from transfer.files import LOCK, FolderLock, is_finished
from transfer.reporting import __main__ as reporting
from transfer.submission import fill_submission

NAMES = [GLOSSES[wnid].split(",")[0] for wnid in WNIDS]


def wrong_on(labels, rows, sharpness=3.0):
    """(N, classes) logits that take the images in `rows` for the next class, and are less sure of it."""
    logits = sharpness * np.eye(len(WNIDS))[labels]
    logits[rows] = np.roll(logits[rows], 1, axis=1) / 2
    return logits + some_logits(labels, len(WNIDS), seed=len(rows), sharpness=0.0) / 10


@pytest.fixture
def make(pristine_data, tmp_path):
    """make(name, rows) is a finished run on the dataset that is wrong on these validation images; changes as given.

    It is unsure of the images in `unsure`. All runs have the same architecture unless another one is given.
    """

    def run(
        name,
        rows=(),
        data=pristine_data,
        files=None,
        labels=None,
        ids=None,
        seed=1,
        sharpness=3.0,
        class_ids=WNIDS,
        unsure=(),
        architecture="vit",
    ):
        found = labeled_files(pristine_data)
        files, labels = files or found[0], np.array(labels if labels is not None else found[1])
        known = data_loading.open_folder(data)
        ids = known.test_ids if ids is None else ids
        logits, record = wrong_on(labels, list(rows), sharpness), {"start_fingerprint": name}
        logits[list(unsure)] /= 10
        folder = write_run(tmp_path / name, data, files, labels, NAMES, logits, test_ids=ids, record=record)
        predictions = Predictions.load(folder)
        tested = some_logits(np.arange(len(ids)) % 4, 4, seed)
        Predictions(predictions.validation_files, labels, predictions.validation_logits, ids, tested).save(folder)
        (folder / "model" / "config.json").write_text(
            json.dumps({"id2label": dict(enumerate(NAMES)), "class_ids": class_ids, "model_type": architecture})
        )
        if sorted(ids) == sorted(known.test_ids) and ids:
            temperature = RunMetrics.read(folder).calibration.temperature
            (folder / "submission.csv").write_bytes(fill_submission(known, ids, np.float32(tested), temperature))
        return folder

    return run


@pytest.fixture
def average(tmp_path):
    """average(*runs) writes their ensemble; returns its folder."""

    def run(*runs, out="together"):
        ensemble.main([*map(str, runs), "--output_dir", str(tmp_path / out)])
        return tmp_path / out

    return run


@pytest.fixture
def refuse(average, tmp_path, capsys):
    """refuse(*runs) is the one line that an ensemble of these runs ends with."""

    def run(*runs):
        with pytest.raises(SystemExit) as stop:
            average(*runs)
        assert stop.value.code == 2 and not (tmp_path / "together" / "run.json").exists()
        [line] = capsys.readouterr().err.splitlines()
        return line

    return run


def calibrated(folder):
    """(validation, test) probabilities of a run at the temperature that fits its validation images."""
    run = Predictions.load(folder)
    temperature = fit_temperature(run.validation_logits.astype(float), run.validation_labels)
    logits = run.validation_logits.astype(float), run.test_logits.astype(float)
    return tuple(softmax(values / temperature, axis=1) for values in logits)


def test_calibrated_probabilities_are_averaged_and_a_run_that_does_harm_is_left_out(make, average, capsys):
    best = make("best", range(4), sharpness=2.0, unsure=range(20, 48))
    helpful = make("helpful", range(4, 12), seed=2, sharpness=6.0, unsure=range(20, 48))
    alike = make("alike", range(4), seed=3, sharpness=4.0, unsure=range(20, 48))  # wrong where the best is
    harmful = make("harmful", range(34, 48), seed=4)
    out = average(harmful, best, helpful, alike)
    metrics, kept = RunMetrics.read(out), [best, alike, helpful]
    assert metrics.members.kept == ["best", "alike", "helpful"]
    assert list(metrics.members.accuracy.values()) == [44 / 48, 44 / 48, 40 / 48, 34 / 48]
    assert metrics.members.mean_of_all < metrics.validation.accuracy
    expected, tested = (np.mean(values, axis=0) for values in zip(*map(calibrated, kept), strict=True))
    together = Predictions.load(out)
    np.testing.assert_allclose(np.exp(together.validation_logits), expected, atol=1e-6)
    np.testing.assert_allclose(np.exp(together.test_logits), tested, atol=1e-6)
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "member      0.9167  best" and said[3] == "left out    0.7083  harmful"
    assert f"mean        validation accuracy {metrics.members.mean_of_all:.4f} of the mean of all 4 runs" in said
    assert f"validation accuracy {metrics.validation.accuracy:.4f} (95% interval " in said[5]
    assert "slightly optimistic: the members were chosen on these images" in said[6]
    assert said[7] == f"submission  {out / 'submission.csv'} (10 rows, checked)"


def test_a_run_is_left_out_only_for_more_lost_images_than_chance_explains(tmp_path):
    labels = np.zeros(40, dtype=int)

    def member(name):
        return ensemble.Member(name, name, SimpleNamespace(folder=tmp_path), "")

    def chosen(*changed):
        """The runs that are kept, where each gains and loses so many images when it is averaged in."""
        sure, row, logits = [[5.0, 0.0]], 20, {"best": np.tile([2.0, 0.0], (40, 1))}
        logits["best"][:20] *= -1  # half of the images
        for name, (gained, lost) in zip("abc", changed, strict=False):
            logits[name] = np.zeros((40, 2))
            logits[name][:gained] = sure
            logits[name][row : row + lost] = np.negative(sure)
            row += lost
        return [run.name for run in ensemble.choose_runs(list(map(member, logits)), logits, labels)]

    assert chosen((1, 2)) == ["best", "a"]
    assert chosen((0, 5)) == ["best"]
    assert chosen((0, 1), (0, 1)) == ["best", "a"]  # small losses do not add up


def test_each_architecture_has_the_same_weight(make, average):
    runs = [make(f"vit{n}", range(4 * n, 4 * n + 4), seed=n) for n in range(3)]
    other = make("convnext", range(20, 28), seed=9, architecture="convnextv2")
    out = average(other, *runs)
    weights = {member["path"]: member["weight"] for member in json.loads((out / "run.json").read_text())["members"]}
    assert weights == pytest.approx({str(other): 1 / 2, **{str(run): 1 / 6 for run in runs}})
    expected = sum(
        weight * calibrated(folder)[0] for folder, weight in [(other, 1 / 2), *((run, 1 / 6) for run in runs)]
    )
    np.testing.assert_allclose(np.exp(Predictions.load(out).validation_logits), expected, atol=1e-6)


def test_an_ensemble_leaves_a_finished_run_with_the_command_and_its_members(make, average):
    runs = [make("a", range(4)), make("b", range(4, 12), seed=2)]
    out = average(*runs)
    assert is_finished(out) and {"metrics.json", "report.html"} <= {path.name for path in out.iterdir()}
    record = json.loads((out / "run.json").read_text())
    assert record["command"] == f"python -m transfer.ensemble {runs[0]} {runs[1]} --output_dir {out}"
    assert [member["path"] for member in record["members"]] == [str(run) for run in runs]
    assert all(len(member["predictions_sha256"]) == 64 for member in record["members"])
    assert not (out / LOCK).exists()


@pytest.mark.parametrize(
    "template",
    [
        None,
        "image_id,label\n{0},grey\n{1},red thing\n",
        "Id,Class\n{0},n00000010\n{1},n00000010\n",
        "id;grey;red thing;blue thing;green thing\n{0};0.25;0.25;0.25;0.25\n{1};0.25;0.25;0.25;0.25\n",
    ],
)
def test_the_csv_is_the_one_that_a_run_on_the_dataset_would_write(template, data, make, average):
    path = data / "submission_sample.csv"
    if template:
        ids = [row.split(",")[0] for row in path.read_text().splitlines()[1:]][::-1]
        head, first, second = template.splitlines()
        rows = [(first if turn % 2 else second).replace("{0}", "{}").replace("{1}", "{}") for turn in range(len(ids))]
        path.write_text("\n".join([head, *(row.format(i) for row, i in zip(rows, ids, strict=True)), ""]))
    out = average(make("a", range(4), data), make("b", range(4, 12), data, seed=2))
    known, together = data_loading.open_folder(data), Predictions.load(out)
    temperature = RunMetrics.read(out).calibration.temperature
    expected = fill_submission(known, together.test_ids.tolist(), together.test_logits, temperature)
    assert (out / "submission.csv").read_bytes() == expected


def test_images_in_another_order_are_joined_by_name(make, average, pristine_data):
    files, labels = labeled_files(pristine_data)
    ids = data_loading.open_folder(pristine_data).test_ids
    first, other = make("first", range(4)), make("other", range(4, 12), seed=2)
    turned = make("turned", seed=2, files=files[::-1], labels=labels[::-1], ids=ids[::-1])
    there = Predictions.load(other)
    Predictions(files[::-1], labels[::-1], there.validation_logits[::-1], ids[::-1], there.test_logits[::-1]).save(
        turned
    )
    together, again = (Predictions.load(average(first, run, out=run.name + "+")) for run in (other, turned))
    np.testing.assert_allclose(together.validation_logits, again.validation_logits, atol=1e-5)
    np.testing.assert_allclose(together.test_logits, again.test_logits, atol=1e-5)
    assert together.test_ids.tolist() == again.test_ids.tolist() == ids


def test_runs_without_test_images_have_an_ensemble_without_a_csv(make, average, capsys):
    out = average(make("a", range(4), ids=[]), make("b", range(4, 12), ids=[]))
    assert is_finished(out) and not (out / "submission.csv").exists()
    assert "submission" not in capsys.readouterr().out


def test_a_folder_of_seeds_stands_for_the_runs_of_its_seeds(make, average, tmp_path):
    parent = make("seeds", range(1))
    for n in (2, 10):
        shutil.move(make(f"seed-{n}", range(n, n + 4), seed=n), parent / f"seed-{n}")
    assert list(RunMetrics.read(average(parent)).members.accuracy) == ["seed-2", "seed-10"]
    other = make("other", range(20, 30))
    kept = RunMetrics.read(average(other, parent, out="all")).members.kept
    assert kept[:2] == ["seeds/seed-2", "seeds/seed-10"]


def test_a_finished_ensemble_is_not_overwritten_and_one_that_is_in_use_is_left_alone(make, average, refuse, capsys):
    runs = make("a", range(4)), make("b", range(4, 12))
    lock = FolderLock(average(*runs, out="together"))
    before = (lock.folder / "run.json").read_bytes()
    with pytest.raises(SystemExit) as stop:
        average(*runs)
    said = capsys.readouterr().err
    assert stop.value.code == 2 and "holds a finished run; choose another --output_dir or remove it\n" in said
    assert (lock.folder / "run.json").read_bytes() == before
    shutil.rmtree(lock.folder)
    lock.folder.mkdir()
    lock.acquire()
    assert f"is in use by another run, process {os.getpid()}" in refuse(*runs)
    lock.release()


def test_an_ensemble_is_reported_compared_and_not_reproduced_as_a_training(make, average, capsys):
    runs = make("a", range(4)), make("b", range(4, 12))
    out = average(*runs)
    reporting.main([str(out), str(runs[0])])
    assert "McNemar's exact test" in capsys.readouterr().out
    (out / "report.html").unlink()
    reporting.main([str(out)])
    page = Page(out / "report.html")
    assert "Ensemble of 2 of 2 runs on" in page.words and "This is an ensemble" in page.words
    assert "Nothing was trained" not in page.words and "Members" in page.words and "mean of all runs" in page.words
    assert "The members were chosen on the same images" in page.words and len(page.pictures()) >= 10
    assert "Training images as the model saw them" not in page.words and "too high if" not in page.words
    assert re.search(
        r"<pre>python -m transfer\.ensemble RUNS/a RUNS/b --output_dir RUNS/together-again</pre>", page.source
    )
    with pytest.raises(ensemble.UserError, match="is the record of an ensemble; its own command makes it again: pyth"):
        cli.parse_command_line(["--reproduce", str(out / "run.json")])


def test_a_run_on_its_own_and_a_run_given_twice_are_refused(make, refuse, tmp_path):
    a = make("a", range(4))
    assert f"{a}: is a single run; an ensemble needs two or more" in refuse(a)
    assert f"{a}: is given twice; leave one out" in refuse(a, a)
    assert "have the same predictions; leave one out" in refuse(a, shutil.copytree(a, tmp_path / "copy"))


def test_a_folder_that_is_not_a_run_is_refused(make, refuse, tmp_path, pristine_data):
    a = make("a", range(4))
    for other in (pristine_data, tmp_path / "nowhere"):
        assert f"{other}: is not a finished run" in refuse(a, other)
    (b := make("b", range(4, 12)) / "predictions.npz").unlink()
    assert f"{b}: does not exist; the run was not finished" in refuse(a, b.parent)


def test_a_run_whose_predictions_are_not_numbers_is_refused(make, refuse):
    a, b = make("a", range(4)), make("b", range(4, 12))
    predictions = Predictions.load(b)
    predictions.test_logits[0] = np.nan
    predictions.save(b)
    assert f"{b}: its predictions are not finite numbers; leave it out" in refuse(a, b)


def test_a_csv_that_is_not_from_the_predictions_is_refused(make, refuse):
    a, b = make("a", range(4)), make("b", range(4, 12))
    csv = a / "submission.csv"
    text = csv.read_text()
    csv.write_text(text.replace(",1\n", ",2\n"))
    assert csv.read_text() != text
    assert "submission.csv: was not made from predictions.npz beside it" in refuse(a, b)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"files": "other"}, "have different validation images (2 are in only one of them, for example "),
        ({"labels": "turned"}, "have different labels for "),
        ({"class_ids": WNIDS[::-1]}, "have different classes (in another order)"),
        ({"class_ids": WNIDS[:3]}, "have different classes (4 and 3)"),
        ({"ids": ["x", "y"]}, "have different test images (12 are in only one of them, for example "),
        ({"ids": []}, "have different test images (10 are in only one of them, for example "),
    ],
)
def test_runs_on_other_images_or_classes_are_refused_with_what_differs(change, message, make, refuse, pristine_data):
    files, labels = labeled_files(pristine_data)
    if "files" in change:
        change = {"files": ["train/n00000010/images/other.JPEG", *files[1:]], "labels": labels}
    if "labels" in change and "files" not in change:
        change = {"files": files, "labels": np.roll(labels, 1)}
    first, other = make("first", range(4)), make("other", range(4, 12), **change)
    said = refuse(first, other)
    assert said.startswith(f"error: {first} and {other} ") and message in said
