"""python -m transfer.predict: the pipeline's labels for any pictures, a csv, and a line for what cannot be read."""

import copy
import csv
import json
import random
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from backbones import save_tiny
from conftest import WNIDS
from PIL import Image
from test_reporting import Page
from transformers import AutoModelForImageClassification, pipeline

from benchmarks import predict_speed
from transfer import predict
from transfer.files import read_json
from transfer.models.cpu_kernels import prepare_for_inference

ENDINGS = ["jpg", "png", "webp", "bmp", "gif", "tif", "JPEG"]
MODES = ["RGB", "RGB", "L", "P", "RGBA", "LA", "1", "CMYK"]
SAVES = {"jpg": {"RGB", "L", "CMYK"}, "JPEG": {"RGB", "L", "CMYK"}, "bmp": {"RGB", "L", "P", "1"}}


def draw_mixed(folder: Path, count: int) -> None:
    """Pictures of many sizes, modes and formats, in folders of their own; some are turned by their EXIF data."""
    choices, noise = random.Random(1), np.random.default_rng(1)
    for i in range(count):
        width, height = choices.randint(5, 150), choices.randint(5, 150)
        colors = Image.fromarray(noise.integers(0, 256, (4, 4, 3), dtype=np.uint8)).resize((width, height))
        ending = choices.choice(ENDINGS)
        mode = choices.choice(MODES)
        mode = mode if mode in SAVES.get(ending, {"RGB", "L", "P", "RGBA"}) else "RGB"
        exif = Image.Exif()
        exif[0x0112] = choices.choice([1, 1, 6, 8])
        path = folder / f"part {i % 3}" / f"{i}.{ending}"
        path.parent.mkdir(parents=True, exist_ok=True)
        colors.convert(mode).save(path, **({"exif": exif} if ending in ("jpg", "JPEG", "png", "webp") else {}))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    draw_mixed(folder, 200)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A finished run with a tiny model whose logits differ clearly, and a fitted temperature of 2."""
    folder = tmp_path_factory.mktemp("outputs") / "tiny"
    folder.mkdir()
    save_tiny("convnext", folder / "backbone")
    torch.manual_seed(0)
    model = AutoModelForImageClassification.from_pretrained(
        folder / "backbone",
        num_labels=4,
        ignore_mismatched_sizes=True,
        id2label=dict(enumerate(["red, ruby", "green", "blü", "grey"])),
    )
    torch.nn.init.normal_(model.classifier.weight, std=2.0)
    model.config.class_ids = WNIDS
    model.save_pretrained(folder / "model")
    shutil.copy(folder / "backbone" / "preprocessor_config.json", folder / "model")
    (folder / "metrics.json").write_text(json.dumps({"calibration": {"temperature": 2.0, "ece": 0.1}}))
    (folder / "run.json").write_text("{}")
    return folder


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(predict, "tune_malloc", lambda: None)  # it would last for all other tests


def read_rows(path: str = "predictions.csv") -> list[dict]:
    return list(csv.DictReader(Path(path).read_text(encoding="utf-8").splitlines()))


def test_the_first_label_is_the_pipelines_for_every_picture(run, pictures):
    predict.main([str(run), str(pictures), "--batch_size", "32"])
    rows = read_rows()
    assert [row["file"] for row in rows] == sorted((row["file"] for row in rows), key=predict.natural_key)
    classify = pipeline("image-classification", model=str(run / "model"))
    expected = [classify(Image.open(row["file"]), top_k=1)[0]["label"] for row in rows]
    assert len(rows) == 200 and [row["name"] for row in rows] == expected
    assert len(set(expected)) > 1
    names = read_json(run / "model" / "config.json")["id2label"]
    assert all(names[row["label"]] == row["name"] for row in rows)


def test_confidence_is_calibrated_only_where_the_run_knows_how(run, pictures, capsys, tmp_path):
    file = next((pictures / "part 1").glob("*.jpg"))
    predict.main([str(run), str(file), "--top_k", "9"])
    assert "calibrated with temperature 2.00" in capsys.readouterr().out
    [row] = read_rows()
    assert "label_4" in row and "label_5" not in row  # there are four classes
    copied = shutil.copytree(run / "model", tmp_path / "elsewhere")
    predict.main([str(copied), str(file), "--output", "plain.csv"])
    assert "confidence not calibrated" in capsys.readouterr().out
    [plain] = read_rows("plain.csv")
    assert "label_3" in plain and "label_4" not in plain
    classify = pipeline("image-classification", model=str(copied))
    [first, second, *_] = classify(Image.open(file), top_k=4)
    assert float(plain["confidence"]) == pytest.approx(first["score"], abs=1e-4)
    # Half the logits: the root of the ratio of two probabilities.
    ratio = float(row["confidence"]) / float(row["confidence_2"])
    assert ratio == pytest.approx((first["score"] / second["score"]) ** 0.5, rel=0.01)


def test_each_bad_input_is_a_line_and_the_others_are_predicted(run, pictures, capsys, tmp_path):
    good = next((pictures / "part 0").glob("*.png"))
    shutil.copytree(pictures / "part 1", "folder")
    count = len(list(Path("folder").iterdir()))
    Path("folder/notes.txt").write_text("no picture, and not meant as one")
    Path("folder/.hidden.png").write_text("nor this")
    Path("folder/torn.jpg").write_bytes(next(Path("folder").glob("*.jpg")).read_bytes()[:200])
    Path("folder/fake.png").write_text("text")
    Path("folder/phone.HEIC").write_bytes(b"\0\0\0\x18ftypheic")
    Image.fromarray(np.zeros((9, 9), dtype=np.uint16)).save("folder/deep.png")
    Path("empty").mkdir()
    predict.main([str(run), "folder", str(good), str(good), "empty", "gone.jpg", "*.none", "folder/notes.txt"])
    captured = capsys.readouterr()
    faults = captured.err.splitlines()
    assert all(line.startswith("unreadable: ") for line in faults)
    for words in (
        "empty: holds no pictures",
        "gone.jpg: no such file",
        "*.none: matches no file",
        "folder/torn.jpg: cannot be read",
        "folder/fake.png: cannot be read as an image (unknown format)",
        "folder/phone.HEIC: cannot be read as an image (unknown format); convert it to JPEG",
        "folder/deep.png: cannot be read as an image (more than 8 bits",
        "folder/notes.txt: cannot be read",
    ):
        assert sum(words in line for line in faults) == 1, words
    assert len(faults) == 8 and len(read_rows()) == count + 1
    assert f"{count + 1} pictures in" in captured.out


def test_a_glob_and_a_file_name_with_brackets_are_understood(run, pictures):
    source = next((pictures / "part 2").glob("*.bmp"))
    for name in ("a10.bmp", "a9.bmp", "[x].bmp"):
        shutil.copy(source, name)
    predict.main([str(run), "a*.bmp", "[x].bmp"])
    assert [row["file"] for row in read_rows()] == ["a9.bmp", "a10.bmp", "[x].bmp"]


def test_what_a_folder_and_odd_paths_hold_is_predicted_once(run, pictures, capsys):
    source = next((pictures / "part 2").glob("*.bmp"))
    for name in ("photos/a.bmp", "photos/@eaDir/a.bmp/thumb.bmp", "elsewhere/b.bmp", "~tmp.bmp"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, name)
    Path("photos/link").symlink_to("../elsewhere")
    Path("photos/loop").symlink_to("..")
    predict.main([str(run), "photos", str(Path("photos/a.bmp").absolute()), "~tmp.bmp", "x" * 300])
    assert [row["file"] for row in read_rows()] == ["photos/a.bmp", "photos/link/b.bmp", "~tmp.bmp"]
    assert capsys.readouterr().err.splitlines() == [f"unreadable: {'x' * 300}: no such file or folder"]


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("config.json", {"num_channels": 1}, "takes images of 1 channels; use a checkpoint for RGB"),
        ("config.json", {"num_channels": "3"}, "cannot be loaded: "),
        ("config.json", {"hidden_sizes": "none"}, "cannot be loaded: "),
        ("preprocessor_config.json", {"image_mean": None}, "image_mean is not set"),
        ("preprocessor_config.json", {"resample": None}, "resample is not set"),
    ],
)
def test_a_model_that_cannot_be_used_is_one_error_line(file, change, message, run, pictures, capsys, tmp_path):
    model = shutil.copytree(run / "model", tmp_path / "changed")
    (model / file).write_text(json.dumps(read_json(model / file) | change))
    with pytest.raises(SystemExit):
        predict.main([str(model), str(next((pictures / "part 2").glob("*.bmp")))])
    [last] = capsys.readouterr().err.splitlines()[-1:]
    assert last.startswith("error: ") and message in last


def test_a_model_of_damaged_weights_is_refused_and_class_names_may_be_numbers(run, pictures, capsys, tmp_path):
    picture = str(next((pictures / "part 2").glob("*.bmp")))
    model = AutoModelForImageClassification.from_pretrained(run / "model")
    torch.nn.init.constant_(model.classifier.bias, float("nan"))
    damaged = shutil.copytree(run / "model", tmp_path / "damaged")
    model.save_pretrained(damaged)
    with pytest.raises(SystemExit):
        predict.main([str(damaged), picture])
    assert "error: the model gives numbers that are not finite" in capsys.readouterr().err
    assert not Path("predictions.csv").exists()
    numbered = shutil.copytree(run / "model", tmp_path / "numbered")
    config = read_json(numbered / "config.json")
    changed = config | {"id2label": {number: int(number) + 1 for number in config["id2label"]}}
    (numbered / "config.json").write_text(json.dumps(changed))
    predict.main([str(numbered), picture])
    [row] = read_rows()
    assert row["name"] == str(int(row["label"]) + 1)


def test_a_few_pictures_make_an_aligned_table_that_fits_the_terminal(run, pictures, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    predict.main([str(run), str(pictures)])
    lines = capsys.readouterr().out.splitlines()
    table = lines[: predict.ROWS_SHOWN]
    assert lines[predict.ROWS_SHOWN] == "... and 180 more"
    assert all(len(line) <= 60 for line in table) and len({line.index("%") for line in table}) == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["outputs/sampel", "fake.png"], "outputs/sampel: no such folder"),
        (["./a/b/c", "fake.png"], "./a/b/c: no such folder"),
        ([".", "."], ".: holds no model; give a finished run"),
        (["{run}", "gone.jpg"], "there are no pictures to predict"),
        (["{run}", "fake.png"], "none of the pictures can be read"),
        (["{run}", "fake.png", "--output", "fake.png"], "fake.png: is one of the pictures"),
        (["{run}", "fake.png", "--output", "outputs/../fake.png"], "fake.png: is one of the pictures"),
        (["{run}", "fake.png", "--output", "new/x.csv"], "new/x.csv: there is no folder new"),
        (["{run}", "fake.png", "--output", "/dev/null"], "/dev/null: is not a regular file"),
        (["{run}", "fake.png", "--html", "predictions.csv"], "--html predictions.csv: is the --output, too"),
        (["{run}", "fake.png", ""], "one of the paths is empty"),
        (["{run}", "fake.png", "--top_k", "0"], "--top_k 0: must be at least 1"),
        (["{run}/backbone", "fake.png"], "has no trained classification head"),
    ],
)
def test_what_cannot_work_is_one_error_line_and_exit_code_2(run, words, message, capsys):
    Path("fake.png").write_text("text")
    Path("outputs").mkdir()
    if words[0] == "{run}/backbone":  # an encoder alone, as many Hub models are
        encoder = transformers.AutoModel.from_pretrained(run / "backbone")
        encoder.save_pretrained("encoder")
        shutil.copy(run / "backbone" / "preprocessor_config.json", "encoder")
        words = ["./encoder", *words[1:]]
    with pytest.raises(SystemExit) as stop:
        predict.main([word.format(run=run) for word in words])
    [last] = capsys.readouterr().err.splitlines()[-1:]
    assert stop.value.code == 2 and last.startswith("error: ") and message in last
    assert not Path("predictions.csv").exists() and Path("fake.png").read_text() == "text"


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has file names that are not Unicode")
def test_a_file_name_that_is_not_unicode_is_written_as_valid_text(run, pictures):
    shutil.copy(next((pictures / "part 2").glob("*.bmp")), b"caf\xe9.bmp")
    predict.main([str(run), "."])
    assert [row["file"] for row in read_rows()] == ["caf\N{REPLACEMENT CHARACTER}.bmp"]


def test_the_page_holds_pictures_names_and_bars_and_asks_for_nothing_else(run, pictures, monkeypatch, tmp_path):
    monkeypatch.setattr(predict, "PICTURES_ON_PAGE", 30)
    renamed = Path(shutil.copytree(run / "model", "renamed"))
    config = read_json(renamed / "config.json")
    config["id2label"] = dict.fromkeys("0123", "<script>alert(1)</script>")
    (renamed / "config.json").write_text(json.dumps(config))
    Path("<img src=x>.png").write_text("text")
    predict.main(["renamed", str(pictures), "<img src=x>.png", "--html", "page.html", "--top_k", "2"])
    text = Path("page.html").read_text(encoding="utf-8")
    page = Page(Path("page.html"))
    assert len(page.pictures()) == 30 and all(src.startswith("data:image/jpeg;base64,") for src in page.pictures())
    assert "200 predictions" in page.words and "The first 30; the csv has all." in page.words
    assert "<img src=x>.png: cannot be read as an image" in page.words
    assert not {tag for tag, _ in page.tags} & {"script", "link", "a", "iframe"} and "://" not in text
    bars = re.findall(r'width:([\d.]+)%"', text)
    assert len(bars) >= 2 * 30 and all(0 <= float(width) <= 100 for width in bars)
    assert "default-src 'none'" in text and "prefers-color-scheme: dark" in text and str(tmp_path) not in text


def test_the_page_of_a_single_picture_has_no_counts(run, pictures):
    file = next((pictures / "part 1").glob("*.png"))
    predict.main([str(run), str(file), "--html", "page.html"])
    words = Page(Path("page.html")).words
    assert "1 prediction " in words and "by tiny; confidence calibrated with temperature 2.00" in words
    assert "Classes" not in words and f"part 1/{file.name}" in words


class NormFirst(torch.nn.Module):
    """Lists a convolution before a batch norm, and calls them the other way round."""

    def __init__(self):
        super().__init__()
        self.convolution, self.norm = torch.nn.Conv2d(3, 3, 1), torch.nn.BatchNorm2d(3)

    def forward(self, pixel_values):
        return SimpleNamespace(logits=self.convolution(self.norm(pixel_values)).mean((2, 3)))


class ReadTwice(torch.nn.Module):
    """Also reads what its activation would overwrite, as a residual does."""

    def __init__(self):
        super().__init__()
        self.convolution, self.activation = torch.nn.Conv2d(3, 3, 1), torch.nn.ReLU()

    def forward(self, pixel_values):
        images = self.convolution(pixel_values)
        return SimpleNamespace(logits=(self.activation(images) + images).mean((2, 3)))


class PadsLess(torch.nn.Module):
    """Lists padding before a convolution that does without."""

    def __init__(self):
        super().__init__()
        self.pad, self.convolution = torch.nn.ZeroPad2d(1), torch.nn.Conv2d(3, 3, 3, groups=3)

    def forward(self, pixel_values):
        return SimpleNamespace(logits=(self.convolution(pixel_values) + pixel_values[..., 1:-1, 1:-1]).mean((2, 3)))


class Parametrized(torch.nn.Module):
    """Computes the weight of its convolution from others, and its norm has no statistics."""

    def __init__(self):
        super().__init__()
        self.pad, convolution = torch.nn.ZeroPad2d(1), torch.nn.Conv2d(3, 3, 3, groups=3)
        self.convolution = torch.nn.utils.parametrizations.weight_norm(convolution)
        self.norm = torch.nn.BatchNorm2d(3)
        self.convolution_2, self.norm_2 = torch.nn.Conv2d(3, 3, 1), torch.nn.BatchNorm2d(3, track_running_stats=False)

    def forward(self, pixel_values):
        images = self.norm(self.convolution(self.pad(pixel_values)))
        return SimpleNamespace(logits=self.norm_2(self.convolution_2(images)).square().mean((2, 3)))


def describe(model) -> tuple[int, int, int]:
    """Numbers of batch norms, of activations that overwrite their input, and of modules that pad images."""
    modules = list(model.modules())
    norms, pads = (
        sum(isinstance(module, kind) for module in modules) for kind in (torch.nn.BatchNorm2d, torch.nn.ZeroPad2d)
    )
    return norms, sum(getattr(module, "inplace", False) for module in modules), pads


@torch.no_grad()
@pytest.mark.parametrize("kind", ["efficientnet", NormFirst, ReadTwice, PadsLess, Parametrized])
def test_a_model_is_changed_for_inference_unless_that_changes_the_logits(checkpoints, kind):
    torch.manual_seed(0)
    known = isinstance(kind, str)
    model = AutoModelForImageClassification.from_pretrained(checkpoints(kind)) if known else kind()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d) and module.track_running_stats:
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    images, plain, state = torch.randn(2, 3, 32, 32), describe(model), copy.deepcopy(model.state_dict())
    logits = model.eval()(pixel_values=images).logits
    with prepare_for_inference(model, (32, 32)):
        torch.testing.assert_close(model(pixel_values=images).logits, logits)
        norms, in_place, pads = describe(model)
        assert norms == 0 and in_place > 0 and pads < plain[2] if known else (norms, in_place, pads) == plain
    assert describe(model) == plain and list(model.state_dict()) == list(state)
    assert all(torch.equal(values, state[name]) for name, values in model.state_dict().items())
    assert torch.equal(model(pixel_values=images).logits, logits)


@torch.no_grad()
@pytest.mark.parametrize("sides", [(0, 1, 0, 1), (2, 0, 1, 3), (1, 1, 2, 2)])
def test_a_convolution_pads_unevenly_as_the_module_before_it_did(sides):
    torch.manual_seed(0)
    layers = torch.nn.Sequential(torch.nn.ZeroPad2d(sides), torch.nn.Conv2d(3, 3, 3, stride=2, groups=3))

    class Padded(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = layers

        def forward(self, pixel_values):
            return SimpleNamespace(logits=self.layers(pixel_values).flatten(1))

    model, images = Padded(), torch.randn(2, 3, 20, 13)
    logits = model(pixel_values=images).logits
    with prepare_for_inference(model, (20, 13)):
        assert describe(model)[2] == 0
        torch.testing.assert_close(model(pixel_values=images).logits, logits)


@torch.no_grad()
def test_a_model_is_not_changed_for_inference_in_autocast(checkpoints):
    model = AutoModelForImageClassification.from_pretrained(checkpoints("efficientnet"))
    plain = describe(model)
    with torch.autocast("cpu", torch.bfloat16), prepare_for_inference(model, (32, 32)):
        assert describe(model) == plain


def test_the_benchmark_compares_with_the_forward_pass(run, monkeypatch, tmp_path):
    monkeypatch.setattr(predict_speed, "tune_malloc", lambda: None)
    words = [str(run), "--pictures", "20", "--batch_size", "8", "--repeats", "2", "--json", "found.json"]
    monkeypatch.setattr(sys, "argv", ["predict_speed.py", *words])
    predict_speed.main()
    found = json.loads(Path("found.json").read_text())
    assert found["pictures"] == 20 and found["ratio"] > 0 and min(found["images_per_second"].values()) > 0
