"""A saved model as ONNX, for runtimes without torch, checked against the model it came from."""

import importlib.util
import json
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import AutoImageProcessor, AutoModelForImageClassification, BaseImageProcessor, PreTrainedModel

from transfer.data.images import decode
from transfer.errors import UserError
from transfer.models.load import read_geometry

EXTRAS = ("onnx", "onnxscript", "onnxruntime")
CHECKED_IMAGES = 64
LARGEST_DIFFERENCE = 1e-3  # of logits, which lie around 10


class _Logits(nn.Module):
    """A transformers model as a plain function from pixels (B, 3, S, S) to logits (B, classes)."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.model(pixel_values=pixel_values).logits


def check_export() -> None:
    """Check that the packages for the export are installed. Raises `UserError`."""
    missing = [name for name in EXTRAS if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"--export onnx: needs {', '.join(missing)}; pip install -r requirements-extras.txt")


def describe_preprocessing(processor: BaseImageProcessor) -> str:
    """How an image becomes the model's input, precisely enough to implement it elsewhere."""
    geometry = read_geometry(processor)
    resize = geometry.resize if isinstance(geometry.resize, int) else "x".join(map(str, geometry.resize))
    how = "shortest edge" if isinstance(geometry.resize, int) else "height x width"
    return (
        f"RGB; {how} to {resize} px, {geometry.interpolation} with anti-aliasing; center crop of "
        f"{geometry.crop[0]}x{geometry.crop[1]}; divided by 255; minus {list(geometry.mean)}; "
        f"divided by {list(geometry.std)}; float32, batch x channel x height x width"
    )


def _write(model: PreTrainedModel, processor: BaseImageProcessor, target: Path) -> None:
    """Export the model with a dynamic batch size; labels and preprocessing go into the file's metadata."""
    import onnx

    height, width = read_geometry(processor).crop
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it warns about operators that these models do not use
    # Two images, since torch.export would make a batch size of one a constant.
    torch.onnx.export(
        _Logits(model),
        (torch.zeros(2, 3, height, width),),
        str(target),
        input_names=["pixel_values"],
        output_names=["logits"],
        dynamic_shapes={"pixel_values": {0: torch.export.Dim("batch")}},
        external_data=False,
        dynamo=True,
        verbose=False,
    )
    written = onnx.load(str(target))
    names: dict = model.config.id2label or {}
    labels = [names[label] for label in sorted(names)]
    facts = {"preprocessing": describe_preprocessing(processor), "labels": json.dumps(labels, ensure_ascii=False)}
    onnx.helper.set_model_props(written, facts)
    onnx.save(written, str(target))


def compare(model: nn.Module, processor: BaseImageProcessor, target: Path, images: Sequence[Path]) -> float:
    """The largest difference between torch's and onnxruntime's logits. Raises `UserError` if a top label differs."""
    import onnxruntime

    pictures = [decode(path.read_bytes()).convert("RGB") for path in images]
    pixels = processor(pictures, return_tensors="pt")["pixel_values"]
    with torch.inference_mode():
        expected = model(pixel_values=pixels).logits.numpy()
    session = onnxruntime.InferenceSession(str(target), providers=["CPUExecutionProvider"])
    batches = (pixels.numpy()[:1], pixels.numpy()[1:])  # of two sizes, to test the dynamic batch size
    found = np.concatenate([session.run(["logits"], {"pixel_values": b})[0] for b in batches if len(b)])
    for path, ours, theirs in zip(images, expected.argmax(-1), found.argmax(-1), strict=True):
        if ours != theirs:
            raise UserError(f"--export onnx: for {path} onnxruntime predicts label {theirs}, torch {ours}")
    return float(np.abs(found - expected).max())


def export_onnx(folder: Path, target: Path, images: Sequence[Path]) -> str:
    """Write the model of a folder as one ONNX file and check it on up to 64 images; returns a line to print.

    Raises `UserError`, and leaves no file, if torch cannot export the architecture or the predictions differ.
    """
    model: PreTrainedModel = AutoModelForImageClassification.from_pretrained(folder, dtype=torch.float32).eval()
    processor = AutoImageProcessor.from_pretrained(folder)
    unchecked = target.with_name(f".{target.name}.tmp")
    images = list(images)[:CHECKED_IMAGES]
    try:
        _write(model, processor, unchecked)
        difference = compare(model, processor, unchecked, images)
        if difference > LARGEST_DIFFERENCE:
            raise UserError(f"--export onnx: logits of onnxruntime and torch differ by {difference:.1e}")
        unchecked.replace(target)
    except UserError:
        raise
    except Exception as fault:  # exporter and runtime have no common exception class
        reason = " ".join(str(fault).split())[:300]
        raise UserError(f"--export onnx: {type(model).__name__} cannot be exported: {reason}") from None
    finally:
        unchecked.unlink(missing_ok=True)
    return f"{target}: the same top label on {len(images)} images, logits within {difference:.0e}"
