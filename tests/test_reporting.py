"""report.html: complete, self-contained, safe with any names in the data, and never fatal to a run."""

import base64
import html
import io
import json
import re
import shlex
import shutil
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, WNIDS, draw_picture
from fabricated import ARGUMENTS, seed_metrics, trained_metrics, write_history, write_run
from PIL import Image

from transfer.evaluation.metrics import LinearProbe, RunMetrics, SubmissionSource, TtaMetrics, ZeroEpoch
from transfer.reporting import RunResults, charts
from transfer.reporting import __main__ as command
from transfer.reporting import page as reporting_page
from transfer.reporting.findings import Album, show_training_images

NAMES = ["red thing", "green thing", "blue thing", "grey"]


class Page(HTMLParser):
    """Tags with their attributes, and the text outside of style and script."""

    def __init__(self, path: Path):
        super().__init__()
        self.tags, self.text, self.inside = [], "", None
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.text += " " * (tag in ("td", "th", "tr"))
        self.inside = tag if tag in ("style", "script") else None

    def handle_endtag(self, tag):
        self.inside = None

    def handle_data(self, data):
        if self.inside is None:
            self.text += data

    def pictures(self) -> list[str]:
        return [attributes["src"] for tag, attributes in self.tags if tag == "img"]

    @property
    def words(self) -> str:
        return " ".join(self.text.split())


def labeled_files(root: Path) -> tuple[list[str], list[int]]:
    files = sorted(path.relative_to(root).as_posix() for path in (root / "train").rglob("*.JPEG"))
    return files, [WNIDS.index(file.split("/")[1]) for file in files]


def run_on(data: Path, folder: Path, **changes) -> Path:
    files, labels = labeled_files(data)
    ids = sorted(path.stem for path in (data / "test").rglob("*.JPEG"))
    return write_run(folder, data, files, labels, NAMES, test_ids=ids, **changes)


def draw(*words) -> Page:
    command.main([str(word) for word in words])
    return Page(Path(words[0]) / "report.html")


def test_a_run_writes_its_report_with_pictures_before_its_submission(pristine_data, checkpoints, finetune):
    out = finetune(pristine_data, checkpoints("convnext"), num_train_epochs=1)
    page = Page(out / "report.html")
    assert (out / "report.html").stat().st_mtime_ns <= (out / "submission.csv").stat().st_mtime_ns
    accuracy = json.loads((out / "metrics.json").read_text())["validation"]["accuracy"]
    assert f"{100 * accuracy:.1f}% of 12 validation images correct" in page.words
    assert json.loads((out / "run.json").read_text())["submission_sha256"] in page.words
    assert len(page.pictures()) >= 10  # the test images, all of them least confident ones
    assert "Validation accuracy over time" in page.words
    seen = page.source.partition("Training images as the model saw them")[2].partition("</ul>")[0]
    assert seen.count('src="data:image/jpeg') == 16
    record = json.loads((out / "run.json").read_text())
    assert record["train_counts"] == [9] * 4 and len(record["train_sample"]) == 16
    minutes = json.loads((out / "metrics.json").read_text())["train"]["seconds"]
    assert minutes < record["seconds"] < 600 and "total time" in page.words
    weights = (out / "model" / "model.safetensors").stat().st_size
    figures = dict(re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", page.source))
    assert figures["parameters"] == f"{record['parameters']:,}" and figures["model file"] == f"{weights / 1e3:,.0f} kB"


def test_the_command_on_the_page_repeats_the_run_from_the_folder_that_the_page_names(
    pristine_data, checkpoints, tmp_path, monkeypatch, capsys
):
    from finetune_vit import main

    place = tmp_path / "my project"
    place.mkdir()
    monkeypatch.chdir(place)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    shutil.copytree(pristine_data, tmp_path / "pictures")
    (place / "tiny.yaml").write_text(
        "num_train_epochs: 1\nper_device_train_batch_size: 8\nvalidation_fraction: 0.25\n"
    )
    model = str(checkpoints("convnext"))
    main(["tiny.yaml", "--data_dir", "../pictures", "--model_name_or_path", model, "--output_dir", "runs/a"])
    page = Page(place / "runs" / "a" / "report.html")
    assert "In the folder my project, where the run was started" in page.words
    words = shlex.split(html.unescape(re.search(r"<pre>(accelerate launch .*?)</pre>", page.source)[1]))
    script = next(i for i, word in enumerate(words) if word.endswith(".py"))
    config = Path(words[words.index("--config_file") + 1])
    # In place of the folder of the project, whose parts the page does not show.
    assert words[script] == "PROJECT/finetune_vit.py" and config == Path("PROJECT/accelerate_config.yaml")
    assert "Replace PROJECT by the folder of finetune_vit.py" in page.words
    with pytest.raises(SystemExit) as stop:
        main(words[script + 1 :])
    assert stop.value.code == 0 and "reproduced  bit for bit" in capsys.readouterr().out


def test_in_the_projects_folder_the_command_runs_as_it_stands(pristine_data, tmp_path):
    places = {"data_dir": str(pristine_data), "output_dir": "outputs/made_up"}
    run = run_on(pristine_data, tmp_path / "run", record={"arguments": ARGUMENTS | places, "folder": "project"})
    page = draw(run)
    command_line = shlex.split(re.search(r"<pre>(.*?)</pre>", page.source)[1])
    assert command_line[:2] == ["accelerate", "launch"] and "Replace" not in page.words
    assert command_line[-3:] == ["finetune_vit.py", "--reproduce", "outputs/made_up/run.json"]
    assert all((ROOT / word).is_file() for word in command_line if word.endswith((".py", ".yaml")))


def test_an_output_folder_elsewhere_is_not_shown(pristine_data, tmp_path):
    places = {"data_dir": str(pristine_data), "output_dir": "/home/jane/runs/a"}
    page = draw(run_on(pristine_data, tmp_path / "run", record={"arguments": ARGUMENTS | places}))
    assert "--reproduce RUN/run.json" in page.words and "jane" not in page.text
    assert "Replace RUN by the folder of this page." in page.words


def test_few_classes_get_a_matrix_with_numbers_and_no_figures_that_mean_nothing(pristine_data, tmp_path):
    files, labels = labeled_files(pristine_data)
    logits = np.eye(4)[labels] * 9
    logits[labels.index(2)] = [0, 9, 0, 0]
    ids = sorted(path.stem for path in (pristine_data / "test").rglob("*.JPEG"))
    page = draw(write_run(tmp_path / "run", pristine_data, files, labels, NAMES, logits, test_ids=ids))
    assert re.search(r'<td class="wrong-1" title="blue thing: 1 of 12 predicted as green thing">1</td>', page.source)
    assert page.source.count('class="right-5"') == 4 + 1  # the legend has one
    assert 'id="matrix-data"' not in page.source and "Point at a cell" not in page.words
    assert (
        "Left out because the numbers are too small: top-5 accuracy (4 classes), calibration (48 validation images) "
        "and expected counts of test predictions (10 images of 4 classes)." in page.words
    )
    assert "calibration error" not in page.words and "most unexpected counts" not in page.words
    assert 'href="#calibration"' not in page.source


def test_with_enough_images_and_classes_nothing_is_left_out(tmp_path):
    run = run_of_many_classes(tmp_path / "run", test_images=5000)
    page = draw(run)
    assert "Left out" not in page.words and "most unexpected counts" in page.words
    assert all(figure in page.words for figure in ("top-5 accuracy", "calibration error", "Expected calibration"))


def run_of_many_classes(folder: Path, test_images: int, class_ids=None) -> Path:
    """A made-up run of 100 classes, whose config lists these class ids."""
    labels, names = np.arange(1000) % 100, [f"class {i}" for i in range(100)]
    files, ids = [f"train/{label}/{i}.JPEG" for i, label in enumerate(labels)], [f"t{i}" for i in range(test_images)]
    run = write_run(folder, "nowhere", files, labels, names, test_ids=ids)
    config = {"id2label": dict(enumerate(names))} | ({"class_ids": class_ids} if class_ids else {})
    (run / "model" / "config.json").write_text(json.dumps(config))
    return run


@pytest.mark.parametrize(
    ("class_ids", "test_images", "has_one"),
    [
        ([f"n{i:08}" for i in range(100)], 5000, True),
        ([f"n{i:08}" for i in range(100)], 500, False),  # as in the sample data
        ([f"flower {i}" for i in range(100)], 5000, False),
        (None, 5000, False),
    ],
)
def test_only_the_competition_has_a_leaderboard(class_ids, test_images, has_one, tmp_path):
    words = draw(run_of_many_classes(tmp_path / "run", test_images, class_ids)).words
    assert ("accuracy on 500 of the 5,000 test images, as many as the public leaderboard scores" in words) == has_one
    assert ("leaderboard" in words) == has_one


def test_all_classes_stand_in_one_table_with_their_counts(tmp_path):
    run = run_of_many_classes(tmp_path / "run", test_images=0)
    record = json.loads((run / "run.json").read_text()) | {"train_counts": list(range(100, 200))}
    (run / "run.json").write_text(json.dumps(record))
    table = draw(run).source.partition('<table class="sortable">')[2].partition("</table>")[0]
    rows = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in table.split("</tr>")[1:-1]]
    assert sorted(row[0] for row in rows) == sorted(f"class {i}" for i in range(100))
    assert all(row[1:3] == [str(100 + int(row[0].split()[1])), "10"] for row in rows)
    shares = [float(share) for share in re.findall(r'data-value="([\d.]+)"><span class="meter"', table)]
    assert len(shares) == 100 and shares == sorted(shares)  # without the script too, the worst stand first


@pytest.mark.parametrize(("items", "most", "columns"), [(24, 8, 8), (24, 6, 6), (24, 3, 3), (7, 8, 7), (16, 6, 4)])
def test_galleries_fill_their_rows(items, most, columns):
    assert reporting_page.fill_rows(items, most) == columns


def test_pairs_are_shown_with_equally_many_pictures(pristine_data, tmp_path):
    files, labels = labeled_files(pristine_data)
    logits = np.eye(4)[labels] * 9
    logits[[labels.index(2), labels.index(3)]] = [0, 9, 0, 0]
    page = draw(write_run(tmp_path / "run", pristine_data, files, labels, NAMES, logits))
    pairs = page.source.partition('<div class="pairs">')[2].partition('<section id="mistakes">')[0]
    assert [gallery.count("<li>") for gallery in pairs.split("</ul>")[:-1]] == [6, 6]


def test_every_color_of_the_pages_has_a_dark_counterpart():
    light, _, rest = (
        (ROOT / "transfer" / "reporting" / "page.css").read_text().partition("@media (prefers-color-scheme")
    )
    dark, _, rules = rest.partition("* { box-sizing")
    names = [set(re.findall(r"(--[\w-]+): *#", part)) for part in (light, dark)]
    assert len(names[0]) > 30 and names[0] == names[1] and not re.search(r"#[0-9a-f]{3,6}\b", rules)


def views_of(run: Path, data: Path, **arguments) -> list[dict]:
    """The training images of a run with these arguments, as its report shows them."""
    files, labels = labeled_files(data)
    record = json.loads((run / "run.json").read_text())
    record["arguments"] |= arguments
    record["train_sample"] = dict(zip(files[::6], labels[::6], strict=True))
    return show_training_images(RunResults.read(run, record), Album(data))


def mean_color(picture: str) -> np.ndarray:
    image = Image.open(io.BytesIO(base64.b64decode(picture.partition(",")[2]))).convert("RGB")
    return np.asarray(image, dtype=float).mean((0, 1))


def test_training_images_are_shown_after_the_train_transform(pristine_data, data, checkpoints, tmp_path):
    run = run_on(pristine_data, tmp_path / "run")
    shutil.copy(checkpoints("convnext") / "preprocessor_config.json", run / "model")
    plain = views_of(run, pristine_data, min_crop_scale=0.9)
    files, labels = labeled_files(pristine_data)
    assert [view["label"] for view in plain] == [NAMES[label] for label in labels[::6]]
    for view, file in zip(plain, files[::6], strict=True):
        original = np.asarray(Image.open(pristine_data / file).convert("RGB"), dtype=float).mean((0, 1))
        assert np.abs(mean_color(view["picture"]) - original).max() < 12
    for number, file in enumerate(files[::6]):  # photographs of several sizes
        draw_picture(WNIDS[labels[::6][number]], number, (150 + number, 200)).save(data / file, "JPEG")
    photographs = views_of(run, data, min_crop_scale=0.9)
    assert [view["label"] for view in photographs] == [view["label"] for view in plain]
    assert all(np.ptp(mean_color(view["picture"])) > 20 for view in photographs[:2])
    mixed = views_of(run, pristine_data, mixup_alpha=1.0)
    assert any(re.fullmatch(r"[a-z ]+ [\d.]+%, [a-z ]+ [\d.]+%", view["label"]) for view in mixed)
    assert [view["picture"] for view in mixed] != [view["picture"] for view in plain]


def test_a_report_that_cannot_be_drawn_does_not_lose_the_run(
    pristine_data, checkpoints, finetune, monkeypatch, capsys
):
    def fail(*_):
        raise ZeroDivisionError("no picture\ntoday")

    monkeypatch.setattr(reporting_page, "write_page", fail)
    out = finetune(pristine_data, checkpoints("convnext"), num_train_epochs=1)
    said = capsys.readouterr().err
    assert (
        "warning: report.html could not be written (ZeroDivisionError: no picture today); all other results are "
        f"complete; `python -m transfer.reporting {out}` writes it again" in said
    )
    assert (out / "submission.csv").is_file() and not (out / "report.html").exists()


HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=http://evil.example onerror=alert(1)>',
    "</title>{{ 7 * 7 }}",
    "&amp;",
]


def page_with_names(data: Path, folder: Path, names: list[str], file: str, test_id: str, command_line: str) -> Page:
    """The page of a run in which these names stand everywhere: two images of the first class are mistakes."""
    draw_picture(WNIDS[0], 99).save(data / file, "JPEG")
    draw_picture(WNIDS[0], 98).save(data / "test" / "images" / f"{test_id}.JPEG", "JPEG")
    files, labels = labeled_files(data)
    logits = np.eye(len(names))[labels] * 9
    for mistake in (files.index(file), 0):
        logits[mistake] = np.roll(logits[mistake], 1)
    record = {"command": command_line, "device": command_line}
    record["arguments"] = ARGUMENTS | {"data_dir": str(data), "model_name_or_path": command_line}
    return draw(write_run(folder, data, files, labels, names, logits, test_ids=[test_id], record=record))


@pytest.mark.parametrize("others", [0, 20], ids=["matrix with numbers", "matrix as a picture"])
def test_names_from_the_data_stay_text_wherever_they_stand(others, data, tmp_path):
    folder, further = f"train/{WNIDS[0]}/images", [f"class {number}" for number in range(others)]
    plain_data = shutil.copytree(data, tmp_path / "plain")
    plain = page_with_names(plain_data, tmp_path / "run", NAMES + further, f"{folder}/x.JPEG", "y", "python x.py")
    evil_file, command_line = f'{folder}/x" onload="alert(1)\'<b>.JPEG', "python '<script>alert(2)</script>'"
    page = page_with_names(data, tmp_path / "<i>run", HOSTILE + further, evil_file, "<b>y", command_line)
    # Not one tag more or less than with harmless names.
    assert Counter(tag for tag, _ in page.tags) == Counter(tag for tag, _ in plain.tags)
    assert [sorted(attributes) for _, attributes in page.tags] == [sorted(attributes) for _, attributes in plain.tags]
    assert page.pictures() and all(src.startswith("data:image/jpeg;base64,") for src in page.pictures())
    assert all(name in page.text for name in HOSTILE) and "<script>alert(2)</script>" in page.text
    source = (tmp_path / "<i>run" / "report.html").read_text()
    if others:  # too many classes for numbers: page.js shows the counts
        reading = re.search(r'id="matrix-data">(.*?)</script>', source, re.S).group(1)
        assert sorted(json.loads(reading)["names"]) == sorted(HOSTILE + further) and "<" not in reading


def test_nothing_is_fetched_from_anywhere(pristine_data, tmp_path):
    page = draw(run_on(pristine_data, tmp_path / "run"))
    policies = [a["content"] for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert len(policies) == 1 and policies[0].startswith("default-src 'none'; img-src data:;")
    assert not [tag for tag, _ in page.tags if tag in ("link", "iframe", "object", "embed", "form", "base")]
    fetched = [a[k] for tag, a in page.tags for k in ("src", "srcset", "xlink:href", "poster") if k in a]
    assert all(place.startswith("data:") for place in fetched)
    assert "url(" not in (tmp_path / "run" / "report.html").read_text()


def test_links_lead_to_files_that_exist(pristine_data, tmp_path):
    run = run_on(pristine_data, tmp_path / "run")
    (run / "submission.csv").touch()
    (run / "model" / "README.md").touch()
    links = [a["href"] for tag, a in draw(run).tags if tag == "a" and not a["href"].startswith("#")]
    assert {"submission.csv", "metrics.json", "model/README.md"} <= set(links)
    assert all((run / link).is_file() for link in links)


def test_every_place_that_the_page_names_is_on_it(pristine_data, tmp_path):
    page = draw(run_on(pristine_data, tmp_path / "run"))
    ids = {a["id"] for _, a in page.tags if "id" in a}
    assert {a["href"][1:] for tag, a in page.tags if tag == "a" and a["href"].startswith("#")} <= ids


def test_without_the_data_the_report_says_so_and_goes_on(data, tmp_path, capsys):
    run = run_on(data, tmp_path / "run")
    shutil.rmtree(data)
    page = draw(run)
    # The page may be handed on; the terminal is the user's own.
    assert f"Without pictures: {data.name}: no such folder or zip" in page.words
    assert not page.pictures() and "Most confident mistakes" in page.words
    assert f"without pictures: {data}: " in capsys.readouterr().out


def test_pictures_come_from_the_place_that_is_named_and_from_a_zip(data, tmp_path, capsys):
    run = run_on(data, tmp_path / "run")
    packed = shutil.make_archive(tmp_path / "packed", "zip", data.parent, data.name)
    shutil.rmtree(data)
    assert draw(run, "--data_dir", packed).pictures()
    with pytest.raises(SystemExit) as stop:
        command.main([str(run), "--data_dir", str(tmp_path / "run")])
    assert stop.value.code == 2 and "is not this run's dataset" in capsys.readouterr().err


def test_a_file_name_that_leads_out_of_the_data_set_is_not_shown(data, tmp_path):
    draw_picture(WNIDS[0], 1).save(tmp_path / "secret.JPEG")
    album = Album(data)
    assert album.show("../secret.JPEG") is None and album.show(str(tmp_path / "secret.JPEG")) is None
    assert album.show(labeled_files(data)[0][0]).startswith("data:image/jpeg")


def test_a_hundred_classes_and_thousands_of_images_stay_under_5_mb(tmp_path):
    rng = np.random.default_rng(0)
    labels = np.arange(3000) % 100
    names = [f"a class with a long name, number {i}" for i in range(100)]
    files = [f"train/{label}/{i}.JPEG" for i, label in enumerate(labels)]
    run = write_run(tmp_path / "run", "nowhere", files, labels, names, rng.normal(size=(3000, 100)) * 3)
    draw(run)
    # The pictures that are missing here: at most 112 at about 6 kB.
    assert (run / "report.html").stat().st_size < 1_000_000


def test_a_run_that_measured_little_is_drawn_all_the_same(pristine_data, tmp_path):
    run = run_on(pristine_data, tmp_path / "run", train=None, zero_epoch=None)
    page = draw(run)
    assert "Nothing was trained in this run" in page.words and "before training" not in page.words
    assert "evaluated on" in page.words and "fine-tuned" not in page.words
    assert "with predictions of 10 test images. Nothing was trained" in page.words
    assert "too high if the model was trained on these images" in page.words and 'id="training"' not in page.source


def test_metrics_of_another_version_are_drawn_without_the_stages_that_are_unknown_or_missing(pristine_data, tmp_path):
    run = run_on(pristine_data, tmp_path / "run")
    written = json.loads((run / "metrics.json").read_text())
    del written["calibration"], written["zero_epoch"]
    written |= {"fine_tuned": {"accuracy": 0.5}, "views": {"kept": ["plain"]}}
    written["validation"]["balanced_accuracy"] = 0.3
    (run / "metrics.json").write_text(json.dumps(written))
    words = draw(run).words
    assert "% of 48 validation images correct" in words and "before training" not in words


def test_metrics_without_what_every_run_writes_are_refused(pristine_data, tmp_path, capsys):
    run = run_on(pristine_data, tmp_path / "run")
    written = json.loads((run / "metrics.json").read_text())
    del written["validation"]["macro_f1"]
    (run / "metrics.json").write_text(json.dumps(written))
    with pytest.raises(SystemExit) as stop:
        command.main([str(run)])
    assert stop.value.code == 2
    assert "metrics.json: 'validation.macro_f1' is missing" in capsys.readouterr().err


def test_folds_stand_in_the_report_as_a_cross_validation(pristine_data, tmp_path):
    folds = [trained_metrics(accuracy) for accuracy in (0.7, 0.8)]
    ensemble = SubmissionSource("ensemble of 2 folds")
    words = draw(run_on(pristine_data, tmp_path / "run", folds=folds, submission=ensemble)).words
    assert "submission.csv comes from the ensemble of 2 folds. Everything below is about the folds" in words
    assert "2 80.00% 1.5000" in words and "cross-validation" in words and "seeds 8" not in words


def test_seeds_and_stages_stand_in_the_report_with_mean_and_spread(pristine_data, tmp_path):
    run = run_on(
        pristine_data,
        tmp_path / "run",
        **seed_metrics([0.7, 0.71, 0.72], soup=0.75, ensemble=0.76, members=[5, 7]),
        linear_probe=LinearProbe(0.4375),
        submission=SubmissionSource("ensemble", 0.76),
        record={"arguments": ARGUMENTS | {"data_dir": str(pristine_data), "seeds": [5, 6, 7]}},
    )
    for seed in range(3):
        write_history(run / f"seed-{seed + 5}", offset=seed / 100)
    words = draw(run).words
    assert "7 72.00% 1.5000 90.00% 0.5000 1.3 mean 71.00% 1.5000 90.00% 0.5000 – standard deviation 1.00%" in words
    assert "before training 12.5%" in words and "linear probe 43.8% (+31.2)" in words
    assert "soup of the seeds 75.0% (+4.0)" in words and "ensemble of the seeds 76.0% (+1.0)" in words
    assert "seed 5 seed 6 seed 7" in words
    assert "submission.csv comes from the ensemble, which has the best validation accuracy, 76.0%." in words


def test_a_soup_with_and_without_tta_stands_before_the_ensemble_which_has_none(pristine_data, tmp_path):
    views = TtaMetrics(kept=["plain", "flip"], accuracy={"plain": 0.75, "flip": 0.7})
    seeds = seed_metrics([0.69, 0.71], soup=0.78, ensemble=0.76, members=[0])
    words = draw(run_on(pristine_data, tmp_path / "run", tta=views, **seeds)).words
    steps = (
        "soup of the seeds without TTA 75.0% (+5.0) soup of the seeds with TTA (plain, flip) 78.0% (+3.0)"
        " ensemble of the seeds 76.0% (−2.0)"
    )
    assert f"mean of the seeds 70.0% (+57.5) {steps}" in words


def test_curves_begin_with_what_was_measured_before_training(pristine_data, tmp_path):
    run = run_on(pristine_data, tmp_path / "run", zero_epoch=ZeroEpoch(0.0625))
    write_history(run)
    assert "validation accuracy: 6.2% at 0 epoch" in draw(run).text
    replace(RunMetrics.read(run), linear_probe=LinearProbe(0.25, 1e-3, 2.0)).write(run)
    assert "validation accuracy: 25.0% at 0 minutes" in draw(run).text


@pytest.mark.parametrize("rate", [2.5e-4, 2e-3, 1.0])
def test_no_number_of_an_axis_is_cut_off_where_letters_are_large(pristine_data, tmp_path, rate):
    run = run_on(pristine_data, tmp_path / "run")
    history = [{"epoch": step / 4, "learning_rate": rate * (4 - step) / 4, "loss": 1e3 - step} for step in range(5)]
    (run / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    draw(run)
    texts = re.findall(
        r'<text class="tick (end|mid)" x="([\d.]+)" y="[\d.]+">([^<]*)</text>', (run / "report.html").read_text()
    )
    assert len(texts) > 20
    for side, x, number in texts:
        width = 0.6 * 14.5 * len(number)  # as on a phone
        start = float(x) - (width if side == "end" else width / 2)
        assert start >= 0 and start + width <= charts.WIDTH, number


def test_views_and_averaged_weights_stand_in_the_report(pristine_data, tmp_path):
    views = TtaMetrics(kept=["plain", "flip"], accuracy={"plain": 0.25, "flip": 0.125})
    run = run_on(pristine_data, tmp_path / "run", tta=views)
    logged = {"epoch": 1, "eval_accuracy": 0.5, "eval_ema_accuracy": 0.6}
    (run / "trainer_state.json").write_text(json.dumps({"log_history": [logged]}))
    page = draw(run)
    assert "fine-tuned without TTA 25.0%" in page.words and "fine-tuned with TTA (plain, flip)" in page.words
    assert "weights averaged weights (EMA)" in page.words
    assert "averaged weights (EMA): 60.0% at 1 epoch" in page.text


def test_a_suspected_wrong_label_is_marked_and_its_file_listed(pristine_data, tmp_path):
    files, labels = labeled_files(pristine_data)
    logits = np.eye(4)[labels] * 4 + np.linspace(0, 0.5, 4)
    logits[5] = [-6, 9, 0, 0]  # its label, of the first class in wnids order, is the least likely of all
    labels = np.array(labels)
    labels[5] = 0
    run = write_run(tmp_path / "run", pristine_data, files, labels, NAMES, logits)
    words = draw(run).words
    assert "Suspected wrong labels among all mistakes: 1, marked label?" in words
    assert f"{files[5]} red thing green thing 100.0%" in words


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere"], "nowhere: no such folder; name a run's output folder"),
        (["EMPTY"], "run.json: cannot be read (No such file or directory); is EMPTY a finished run?"),
        (["RUN", "RUN", "RUN"], "3 runs given; give one to write its report, or two to compare them"),
        (["RUN", "RUN", "--data_dir", "x"], "--data_dir is for the report of one run"),
    ],
)
def test_a_mistake_is_one_line(words, message, pristine_data, tmp_path, capsys):
    places = {"RUN": str(run_on(pristine_data, tmp_path / "run")), "EMPTY": str(tmp_path / "empty")}
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit) as stop:
        command.main([places.get(word, word) for word in words])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: ") and len(error.splitlines()) == 1
    assert message.replace("EMPTY", places["EMPTY"]) in error


@pytest.mark.parametrize("name", ["metrics.json", "run.json", "predictions.npz", "model/config.json"])
def test_a_damaged_file_of_a_run_is_named(name, pristine_data, tmp_path, capsys):
    run = run_on(pristine_data, tmp_path / "run")
    (run / name).write_text("[]")
    with pytest.raises(SystemExit):
        command.main([str(run)])
    assert capsys.readouterr().err.startswith(f"error: {run / name}: ")


def test_the_command_that_is_shown_names_no_folder_of_this_machine():
    from transfer.files import leave_out_places

    command_line = (
        "python finetune_vit.py recipes/a.yaml --data_dir '/home/me/my data/tiny.zip' --output_dir=/home/me/x"
    )
    assert leave_out_places(command_line + " --seed 1 --init ~/m/ck ../../home/me/y") == (
        "python finetune_vit.py recipes/a.yaml --data_dir tiny.zip --output_dir=x --seed 1 --init ck y"
    )


def test_a_run_with_seeds_and_every_ingredient_is_drawn_and_carded(
    pristine_data, checkpoints, tmp_path, monkeypatch, capsys
):
    from finetune_vit import main

    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    recipe, out = tmp_path / "all.yaml", tmp_path / "out"
    recipe.write_text(
        "num_train_epochs: 1\nvalidation_fraction: 0.25\nper_device_train_batch_size: 8\nseeds: [3, 5]\n"
        "linear_probe: true\n"
        "ema_decay: 0.5\ntta: [flip]\n"
    )
    places = ["--data_dir", pristine_data, "--model_name_or_path", checkpoints("convnext"), "--output_dir", out]
    main([str(recipe), *map(str, places)])
    assert "could not be written" not in capsys.readouterr().err
    page, metrics = Page(out / "report.html"), json.loads((out / "metrics.json").read_text())
    for seed, run in zip((3, 5), metrics["seeds"], strict=True):
        assert f"{seed} {100 * run['validation']['accuracy']:.2f}% {run['validation']['loss']:.4f}" in page.words
    source = metrics["submission"]["from"]
    assert f"submission.csv comes from {'' if source.startswith('seed') else 'the '}{source}, which has" in page.words
    assert {"seed-3/report.html", "seed-5/report.html"} <= {a["href"] for tag, a in page.tags if tag == "a"}
    assert "linear probe" in Page(out / "seed-3" / "report.html").words and "averaged weights (EMA)" in page.words
    card = (out / "model" / "README.md").read_text()
    mean, std = (metrics[name]["validation"]["accuracy"] for name in ("mean", "std"))
    assert f"over 2 seeds, validation: accuracy {mean:.4f} ± {std:.4f}" in card and "| ema_decay | 0.5 |" in card
    assert "| seeds | 3, 5 |" in card
