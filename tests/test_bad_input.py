"""Unusual data is read correctly or refused with the reason, and no code in it is run."""

import csv
import io
import json
import os
import pickle
import shutil
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import WNIDS, draw_picture, stored_pixels
from PIL import Image
from transformers import AutoModelForImageClassification
from transformers.models.convnext import ConvNextConfig

from data_loading import load_dataset, main, open_data
from transfer.data.images import ImageGeometry, read_image
from transfer.data.images.store import open_pixel_store
from transfer.data.labels import read_template, render_submission
from transfer.errors import UserError, exits_cleanly
from transfer.models.load import load_checkpoint
from transfer.submission.checker import find_faults

SECRET = "hf_" + "thisIsASecretTokenThatNobodyMaySee"  # in two parts: no file may hold what looks like one


def open_store(data, tmp_path):
    folder = open_data(str(data))
    files = folder.train_files + folder.test_files
    geometry = ImageGeometry((32, 32), (32, 32), "bicubic", mean=(0.5,) * 3, std=(0.5,) * 3)
    return open_pixel_store(folder.root, files, geometry, tmp_path / "store")


def save_as(path: Path, mode: str, kind: str) -> None:
    draw_picture(WNIDS[0], 5).convert(mode).save(path, format=kind)


@pytest.mark.parametrize(
    ("mode", "kind"),
    [("RGB", "PNG"), ("RGBA", "PNG"), ("P", "PNG"), ("1", "PNG"), ("LA", "PNG"), ("P", "GIF"), ("CMYK", "JPEG")],
)
def test_any_content_under_a_jpeg_name_is_decoded_as_what_it_is(mode, kind, data, tmp_path):
    file = f"train/{WNIDS[0]}/images/{WNIDS[0]}_5.JPEG"
    save_as(data / file, mode, kind)
    store = open_store(data, tmp_path)
    expected = np.asarray(Image.open(data / file).convert("RGB"))
    assert np.array_equal(stored_pixels(store, file), expected)


def test_sixteen_bits_under_a_jpeg_name_are_refused(data, tmp_path):
    path = data / "train" / WNIDS[0] / "images" / f"{WNIDS[0]}_5.JPEG"
    Image.fromarray(np.arange(1024, dtype=np.uint16).reshape(32, 32)).save(path, format="PNG")
    with pytest.raises(UserError, match=r"_5\.JPEG: .*more than 8 bits per channel"):
        open_store(data, tmp_path)


def test_whatever_a_decoder_raises_is_a_fault_of_the_file(data, monkeypatch):
    monkeypatch.setattr(Image, "open", lambda _: (_ for _ in ()).throw(IndexError("bytearray index out of range")))
    record, image = read_image(data, f"train/{WNIDS[0]}/images/{WNIDS[0]}_5.JPEG")
    assert image is None and "cannot be read as an image (bytearray index out of range)" in record.fault


ODD_NAMES = ["a b", "a,b", 'a"b', "O'Hara", "=1+1", "été 日本", "NA", "007", "1e5", "x" * 200]


def test_odd_names_keep_their_labels_from_folder_to_csv(data, tmp_path):
    images = data / "test" / "images"
    for path, name in zip(sorted(images.iterdir()), ODD_NAMES, strict=True):
        path.rename(images / f"{name}.JPEG")
    with (data / "submission_sample.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["image_id", "label"], *([name, 0] for name in reversed(ODD_NAMES))])
    dataset = load_dataset(open_data(str(data)))
    store = open_store(data, tmp_path)
    for row in dataset["test"]:
        expected = np.asarray(Image.open(images / f"{row['image_id']}.JPEG").convert("RGB"))
        assert np.array_equal(stored_pixels(store, row["file"]), expected)
    template = read_template(data / "submission_sample.csv")
    labels = {name: position % 4 for position, name in enumerate(ODD_NAMES)}
    (tmp_path / "submission.csv").write_bytes(render_submission(template, labels))
    assert find_faults(tmp_path / "submission.csv", template, 4) == []
    with (tmp_path / "submission.csv").open(newline="", encoding="utf-8") as file:
        assert {i: int(label) for i, label in list(csv.reader(file))[1:]} == labels


def test_windows_words_change_nothing(data):
    before = open_data(str(data)).class_names
    text = (data / "words.txt").read_text()
    (data / "words.txt").write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    assert open_data(str(data)).class_names == before


def test_links_that_lead_back_to_their_folder_are_not_followed(data):
    (data / "train" / WNIDS[0] / "images" / "back").symlink_to(data)
    (data / "test" / "back").symlink_to("..")
    assert len(open_data(str(data)).train_files) == 48


@pytest.mark.parametrize("place", [f"train/{WNIDS[0]}/images/loop.JPEG", "test/images/loop.JPEG", "train/loop"])
def test_links_to_themselves_are_refused(place, data, capsys):
    (data / place).symlink_to(Path(place).name)
    with pytest.raises(SystemExit) as stop:
        main([str(data)])
    message = capsys.readouterr().err
    assert stop.value.code == 2 and "Too many levels of symbolic links" in message and message.count("\n") == 1


def test_a_link_to_nothing_is_refused_by_name(data, tmp_path):
    (data / "train" / WNIDS[0] / "images" / "gone.JPEG").symlink_to("nowhere.JPEG")
    with pytest.raises(UserError, match=r"gone\.JPEG: cannot be read as an image"):
        open_store(data, tmp_path)


def test_nothing_in_the_data_folder_is_run(data, tmp_path, monkeypatch):
    marker = tmp_path / "it was run"
    code = f"open({str(marker)!r}, 'w')\n"
    for name in (f"{data.name}.py", "__init__.py", "conftest.py", "sitecustomize.py", "datasets.py", "wnids.py"):
        (data / name).write_text(code)
    (data / "train" / WNIDS[0] / "images" / "loader.py").write_text(code)
    (data / "data.pkl").write_bytes(pickle.dumps(Bomb(marker)))
    monkeypatch.chdir(data)
    packed = tmp_path / "data.zip"
    with zipfile.ZipFile(packed, "w") as archive:
        for path in sorted(data.rglob("*")):
            archive.write(path, f"{data.name}/{path.relative_to(data)}")
    for place in (data, packed):
        dataset = load_dataset(open_data(str(place)))
        assert len(dataset["train"][0]["image"].size) == 2
    assert not marker.exists()


class Bomb:
    """Unpickled, it makes a file."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return (open, (self.marker, "w"))


@pytest.mark.parametrize("name", ["optimizer.pt", "rng_state.pth"])
def test_a_pickle_in_a_checkpoint_is_refused_and_not_run(name, pristine_data, checkpoints, finetune, tmp_path, capsys):
    out = finetune(pristine_data, checkpoints("convnext"), num_train_epochs=1)
    marker = tmp_path / "it was run"
    torch.save({"state": Bomb(marker)}, out / "checkpoint-5" / name)
    with pytest.raises(SystemExit) as stop:
        finetune(pristine_data, checkpoints("convnext"), num_train_epochs=2, resume_from_checkpoint="true")
    assert stop.value.code == 2 and "checkpoint-5: cannot be loaded" in capsys.readouterr().err
    assert not marker.exists()


def test_a_checkpoint_that_brings_code_needs_leave_to_run_it(checkpoints, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    marker, place = tmp_path / "it was run", shutil.copytree(checkpoints("convnext"), tmp_path / "own-code")
    (place / "own.py").write_text(
        "from transformers import ConvNextConfig, ConvNextForImageClassification\n"
        f"open({str(marker)!r}, 'w')\n"
        "class OwnConfig(ConvNextConfig):\n    model_type = 'own'\n"
        "class Own(ConvNextForImageClassification):\n    config_class = OwnConfig\n"
    )
    config = ConvNextConfig.from_pretrained(place).to_dict() | {
        "model_type": "own",
        "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForImageClassification": "own.Own"},
    }
    (place / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        UserError, match="custom code, which is not run by default; read it, then set --trust_remote_code"
    ):
        load_checkpoint(str(place))
    assert not marker.exists()
    model, _ = load_checkpoint(str(place), trust_remote_code=True)
    assert type(model).__name__ == "Own"
    assert marker.exists()


def test_a_token_reaches_neither_the_output_nor_what_is_printed(
    pristine_data, checkpoints, finetune, monkeypatch, capfd, caplog
):
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY"):
        monkeypatch.setenv(name, SECRET)
    out = finetune(pristine_data, checkpoints("convnext"), num_train_epochs=1, hub_model_id="me/it")
    said = capfd.readouterr()
    assert SECRET not in said.out + said.err + caplog.text
    files = [path for path in out.rglob("*") if path.is_file()]
    assert len(files) > 8
    assert not [path for path in files if SECRET.encode() in path.read_bytes()]


def test_names_from_data_are_text_in_whatever_a_browser_shows(data, checkpoints, finetune):
    (data / "words.txt").write_text("".join(f"{w}\t<script>alert('{w}')</script> & \"co\", x\n" for w in WNIDS))
    out = finetune(data, checkpoints("convnext"), num_train_epochs=1)
    pages = [*out.rglob("*.html"), *out.rglob("*.md")]
    assert pages and not [page for page in pages if "<script>alert" in page.read_text()]
    names = AutoModelForImageClassification.from_pretrained(out / "model").config.id2label
    assert names[0] == f"<script>alert('{WNIDS[0]}')</script> & \"co\""


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "utf-8"])
def test_names_that_the_terminal_cannot_show_are_printed_as_escapes(encoding, monkeypatch):
    written = {name: io.TextIOWrapper(io.BytesIO(), encoding=encoding) for name in ("stdout", "stderr")}
    for name, stream in written.items():
        monkeypatch.setattr(sys, name, stream)

    @exits_cleanly
    def run():
        print("\u732b, \udce9 and \xe9")
        raise UserError("\u732b: is not a class")

    with pytest.raises(SystemExit):
        run()
    for stream in written.values():
        stream.flush()
    shown = "\u732b" if encoding == "utf-8" else "\\u732b"
    assert written["stdout"].buffer.getvalue().decode(encoding).startswith(f"{shown}, \\udce9 and ")
    assert written["stderr"].buffer.getvalue().decode(encoding) == f"error: {shown}: is not a class\n"


@pytest.mark.parametrize("place", ["", f"train/{WNIDS[0]}/images/{WNIDS[0]}_1.JPEG", "test/images/ID.JPEG"])
def test_a_name_that_is_not_valid_utf_8_is_refused_in_a_line(place, data, finetune, checkpoints, capsys):
    path = next((data / "test" / "images").glob("*.JPEG")) if "ID" in place else data / place
    (data / "submission_sample.csv").unlink()
    renamed = Path(os.fsdecode(os.fsencode(path.parent) + b"/caf\xe9" + path.suffix.encode()))
    path.rename(renamed)
    with pytest.raises(SystemExit) as stop:
        finetune(data if place else renamed, checkpoints("convnext"), num_train_epochs=1)
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2 and message.startswith("error: ") and "caf\\udce9" in message
    assert "is not valid UTF-8; rename it" in message or "has unprintable characters; rename the file" in message


def test_another_text_that_cannot_be_encoded_is_not_taken_for_a_file_name():
    @exits_cleanly
    def run():
        "\u732b".encode("ascii")

    with pytest.raises(UnicodeEncodeError):
        run()
