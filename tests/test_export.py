"""ONNX files: the same answers as the model, for any batch, with what a reader needs to feed them."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor

from transfer import export
from transfer.config import RunArguments, check_bounds
from transfer.errors import UserError


def need_extras():
    for name in export.EXTRAS:
        pytest.importorskip(name, reason=f"{name} is an optional extra (requirements-extras.txt)")


@pytest.fixture
def images(tmp_path):
    rng = np.random.default_rng(0)
    paths = [tmp_path / f"{i}.png" for i in range(export.CHECKED_IMAGES)]
    for path in paths:
        Image.fromarray(rng.integers(0, 256, (40, 36, 3), dtype=np.uint8)).save(path)
    return paths


@pytest.mark.parametrize("kind", ["vit", "convnext"])
def test_an_onnx_file_answers_as_the_model_for_batches_of_any_size(kind, checkpoints, images, tmp_path):
    need_extras()
    import onnx

    said = export.export_onnx(checkpoints(kind), tmp_path / "model.onnx", images)
    assert "the same top label on 64 images" in said
    facts = {entry.key: entry.value for entry in onnx.load(tmp_path / "model.onnx").metadata_props}
    assert json.loads(facts["labels"]) == ["LABEL_0", "LABEL_1"] and "divided by 255" in facts["preprocessing"]
    assert not list(tmp_path.glob(".*"))


def test_a_file_that_answers_otherwise_is_refused_and_removed(checkpoints, images, tmp_path, monkeypatch):
    need_extras()
    write = export._write

    def spoil(model, processor, target):
        write(model, processor, target)
        with torch.no_grad():
            model.classifier.bias += torch.tensor([9.0, 0.0])

    monkeypatch.setattr(export, "_write", spoil)
    with pytest.raises(UserError, match=r"--export onnx: for .* onnxruntime predicts label"):
        export.export_onnx(checkpoints("convnext"), tmp_path / "model.onnx", images)
    assert not list(tmp_path.glob("*.onnx")) and not list(tmp_path.glob(".*"))


def test_what_is_missing_is_said_before_training(monkeypatch):
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs onnx, onnxscript, onnxruntime; pip install -r requirements-extras"):
        export.check_export()
    with pytest.raises(UserError, match="--export tflite: must be onnx"):
        check_bounds(RunArguments(export="tflite"))


def test_the_described_preprocessing_gives_the_models_input(checkpoints, images):
    """Followed by hand with PIL and numpy, the words give what the processor gives."""
    processor = AutoImageProcessor.from_pretrained(checkpoints("convnext"))
    words = export.describe_preprocessing(processor)
    assert words.startswith("RGB; shortest edge to 36 px") and "center crop of 32x32" in words
    cropped = np.asarray(Image.open(images[0]))[4:36, 2:34]  # 40 x 36 pixels: its shortest edge is 36 already
    mean, std = (json.loads(words.split(before)[-1].split("; ")[0]) for before in ("minus ", "divided by "))
    by_hand = ((cropped / 255 - mean) / std).transpose(2, 0, 1)
    theirs = processor(Image.open(images[0]), return_tensors="np")["pixel_values"][0]
    assert np.allclose(by_hand, theirs, atol=1e-5)
