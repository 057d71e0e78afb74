"""Several processes train and predict what one does."""

import json
import subprocess
import sys

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from conftest import ROOT, write_data_set

from transfer import UserError, augmentation
from transfer.training.processes import share_batch

LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--mixed_precision", "no", "--main_process_port", "0"]
TWO = [*LAUNCH, "--config_file", ROOT / "recipes/accelerate/cpu_2.yaml"]
# The program with whole images as training views, in a process that a test cannot reach into.
PLAIN_VIEWS = """
import sys
import test_processes
from transfer import augmentation
augmentation.draw_crops = test_processes.whole_images
from finetune_vit import main
main(sys.argv[1:])
"""


def whole_images(batch, height, width, min_area, generator):
    """In `draw_crops`' place."""
    nothing = torch.zeros(batch)
    return [nothing, nothing, nothing + height, nothing + width]


@pytest.fixture
def launch(tmp_path, monkeypatch):
    """launch(data, model, output_dir, **arguments) runs the program in two processes; returns what it printed."""
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'tests'}")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    script, recipe = tmp_path / "plain_views.py", tmp_path / "tiny.yaml"
    recipe.write_text("per_device_train_batch_size: 8\nnum_train_epochs: 2\nvalidation_fraction: 0.25\n")
    script.write_text(PLAIN_VIEWS)

    def run(data_dir, model, output_dir, **arguments) -> subprocess.CompletedProcess:
        arguments |= {"data_dir": data_dir, "model_name_or_path": model, "output_dir": tmp_path / output_dir}
        words = [word for name, value in arguments.items() for word in (f"--{name}", str(value))]
        return subprocess.run([*TWO, script, recipe, *words], capture_output=True, text=True, timeout=120)

    return run


def losses(out) -> list[float]:
    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def test_two_processes_train_and_predict_what_one_does(tmp_path, checkpoints, finetune, launch, monkeypatch):
    data = write_data_set(tmp_path, per_class=53, test_images=11)  # 11 and 52 images to predict
    recipe = {
        "learning_rate": "3e-3",
        "num_train_epochs": "2",
        "ema_decay": "0.9",
        "max_steps": "20",
        "per_device_eval_batch_size": "7",
    }
    monkeypatch.setattr(augmentation, "draw_crops", whole_images)
    alone = finetune(data, checkpoints("convnext"), output_dir="alone", **recipe)
    done = launch(data, checkpoints("convnext"), "together", **recipe)
    together = tmp_path / "together"
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("processes   2: a step of 8 images is 4 of each") == 1  # one process speaks
    assert len(losses(together)) == 20
    assert losses(together) == pytest.approx(losses(alone), rel=1e-4)
    assert json.loads((together / "metrics.json").read_text())["validation"]["n"] == 52

    done = launch(data, alone / "model", "predicted", do_train="false")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "predicted" / "submission.csv").read_bytes() == (alone / "submission.csv").read_bytes()


def test_a_mistake_is_said_and_ends_all_processes(pristine_data, checkpoints, launch):
    done = launch(pristine_data, checkpoints("convnext"), "out", per_device_train_batch_size="9")
    assert done.returncode != 0
    assert "error: --per_device_train_batch_size 9: 9 images a step cannot be shared equally by 2" in done.stderr


@pytest.mark.parametrize(
    ("images", "accumulation", "processes", "shared"),
    [
        (64, 1, 2, (32, 1)),
        (16, 4, 2, (16, 2)),  # what fits one device fits each
        (16, 4, 8, (8, 1)),
        (64, 3, 2, (48, 2)),
        (2, 1, 2, (1, 1)),
    ],
)
def test_a_step_is_shared_and_stays_as_large(images, accumulation, processes, shared):
    assert share_batch(images, accumulation, processes) == shared
    assert processes * shared[0] * shared[1] == images * accumulation


def test_a_step_that_cannot_be_shared_equally_names_one_that_can():
    with pytest.raises(UserError, match="64 images a step cannot be shared equally by 3 processes; take 63"):
        share_batch(64, 1, 3)


@pytest.mark.parametrize("path", sorted((ROOT / "recipes" / "accelerate").glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_reads_every_config(path):
    config = load_config_from_file(str(path))
    assert config.num_processes > 0
    assert path.read_text().startswith(f"# accelerate launch --config_file recipes/accelerate/{path.name}")
