"""The notebook runs from top to bottom, and is committed without outputs."""

import os
import sys
from pathlib import Path

import nbformat
import pandas as pd
import pytest
from conftest import ROOT, write_data_set
from nbclient import NotebookClient

NOTEBOOK = ROOT / "notebooks" / "tiny_imagenet_100.ipynb"
SECONDS = 240.0  # for a cell, on a busy machine

# One short epoch of a tiny model.
SETTINGS = """
REPOSITORY = HUB_MODEL_ID = ""
DATA, RECIPE, OUTPUT = "{data}", "recipes/sample.yaml", "{output}"
OPTIONS = ["--model_name_or_path", "{model}", "--num_train_epochs", "1", "--image_size", "32"]
OPTIONS += ["--per_device_train_batch_size", "16"]
"""


def read_outputs(cell) -> str:
    """All text of a cell's outputs: what was printed, and text and html that it shows."""
    texts = []
    for output in cell.outputs:
        texts += [output.get("text", ""), *(str(value) for value in output.get("data", {}).values())]
    return "".join(texts)


def test_the_notebook_is_committed_without_outputs():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in cells)
    assert [cell.metadata.get("tags") for cell in cells].count(["parameters"]) == 1


@pytest.fixture(scope="module")
def executed(tmp_path_factory, checkpoints):
    """The cells' outputs after a run on a small dataset, and the run's folder."""
    folder = tmp_path_factory.mktemp("notebook") / "run"
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    [settings] = [cell for cell in notebook.cells if cell.metadata.get("tags") == ["parameters"]]
    data = write_data_set(folder.parent, test_images=12)
    settings.source = SETTINGS.format(data=data, model=checkpoints("convnext"), output=folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
        patch.setenv("HF_HOME", str(tmp_path_factory.getbasetemp() / "cache"))  # as in the other tests
        client = NotebookClient(notebook, timeout=SECONDS, resources={"metadata": {"path": str(NOTEBOOK.parent)}})
        client.execute()
    if keep := os.environ.get("EXECUTED_NOTEBOOK"):  # to look at it
        nbformat.write(notebook, keep)
    return [read_outputs(cell) for cell in notebook.cells if cell.cell_type == "code"], folder


def test_every_cell_shows_what_it_promises(executed):
    [settings, _, check, estimate, training, report, predictions, submission, push], folder = executed
    assert settings == "" and "this dataset can be used" in check
    assert "per epoch" in estimate and "validation accuracy" in training
    assert training.count("<table") == 1, "the Trainer's own table is shown, too"
    assert "&lt;!doctype html&gt;" in report and "data:image" in report
    assert "12 pictures in" in predictions and "12 predictions" in predictions
    assert "submission.csv" in submission and "label" in submission and "not shared" in push
    rows = pd.read_csv(folder / "predictions.csv")
    assert len(rows) == 12 and rows["confidence"].between(0, 1).all()
