"""Fixtures: a small dataset in the competition's layout, and tiny random checkpoints, all in temporary folders."""

import os

# Caches of the tests stay apart from the user's, and nothing asks a hub.
os.environ["HF_HUB_OFFLINE"] = "1"
if "PYTEST_XDIST_WORKER" in os.environ:
    # The workers share the cores, as the processes of a run do: threads that wait for a core multiply the time.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ["LOCAL_WORLD_SIZE"] = os.environ["PYTEST_XDIST_WORKER_COUNT"]

import contextlib
import gc
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import datasets
import numpy as np
import pytest
from huggingface_hub import constants
from PIL import Image
from transformers import AutoModelForImageClassification, TrainerCallback

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from backbones import save_tiny  # noqa: E402  it needs the path
from hub_server import TOKEN, running_hub  # noqa: E402

if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup ignores it, and tests send it

WNIDS = ["n00000030", "n00000010", "n00000040", "n00000020"]  # not sorted, as the competition's are
GLOSSES = {"n00000030": "red thing, ruby", "n00000010": "green thing", "n00000040": "blue thing", "n00000020": "grey"}
COLORS = {
    "n00000030": (220, 40, 40),
    "n00000010": (40, 200, 40),
    "n00000040": (40, 60, 220),
    "n00000020": (128,) * 3,
}


def pytest_collection_finish():
    """Leave what is imported out of garbage collections: accelerate collects several times in every training."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _own_caches(tmp_path_factory, monkeypatch):
    """Decoded pixels and unpacked zips of a test never meet those of another run of the tests."""
    cache = tmp_path_factory.getbasetemp() / "cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache / "datasets")
    monkeypatch.setattr(constants, "HF_HOME", str(cache))


def stored_pixels(store, file: str, whole: bool = False) -> np.ndarray:
    """(H, W, 3) pixels that a store has of one file."""
    values, shapes = store.take(np.array([store.rows[file]]), whole)
    return values.reshape(*shapes[0], 3)


def draw_picture(wnid: str, seed: int, size: tuple[int, int] = (32, 32)) -> Image.Image:
    """A picture of one class: its color with noise, a gradient and a dark bar."""
    rng = np.random.default_rng([int(wnid[1:]), seed])
    width, height = size
    pixels = np.array(COLORS[wnid]) + rng.normal(0, 25, (height, width, 3))
    pixels += np.linspace(-30, 30, width)[None, :, None] * rng.choice([-1, 1])
    pixels[rng.integers(height) :, : rng.integers(1, width)] -= 40
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def write_data_set(parent: Path, per_class: int = 12, test_images: int = 10) -> Path:
    """A dataset in the competition's layout with all its quirks; returns its root."""
    root = parent / "tiny-imagenet-100"
    for wnid in WNIDS:
        images = root / "train" / wnid / "images"
        images.mkdir(parents=True)
        (root / "train" / wnid / f"{wnid}_boxes.txt").write_text("0 0 31 31\n")
        for i in range(per_class):
            picture = draw_picture(wnid, i)
            (picture.convert("L") if i == 0 else picture).save(images / f"{wnid}_{i}.JPEG")
    (root / "test" / "images").mkdir(parents=True)
    (root / "test" / ".DS_Store").write_bytes(b"\0")
    rng = random.Random(0)
    ids = ["".join(rng.choices("abcdefghij0123456789", k=16)) for _ in range(test_images)]
    for i, image_id in enumerate(ids):
        draw_picture(WNIDS[i % len(WNIDS)], 1000 + i).save(root / "test" / "images" / f"{image_id}.JPEG")
    rows = "".join(f"{image_id},0\n" for image_id in ids)
    (root / "submission_sample.csv").write_text("image_id,label\n" + rows)
    (root / "wnids.txt").write_text("\n".join(WNIDS))
    extra = "n99999999\tsomething else\n"
    (root / "words.txt").write_text("".join(f"{w}\t{g}\n" for w, g in sorted(GLOSSES.items())) + extra)
    return root


@pytest.fixture(scope="session")
def pristine_data(tmp_path_factory) -> Path:
    """A dataset that no test changes."""
    return write_data_set(tmp_path_factory.mktemp("data"))


@pytest.fixture
def data(pristine_data, tmp_path) -> Path:
    """A dataset of the test's own."""
    return Path(shutil.copytree(pristine_data, tmp_path / pristine_data.name))


ARCHITECTURES = ["vit", "deit", "swin", "convnext", "convnextv2"]


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """checkpoints(kind) is a folder with a tiny random checkpoint of that architecture."""
    made = {}

    def make(kind: str) -> Path:
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp(kind.replace(" ", "_"))
            save_tiny(kind, made[kind])
        return made[kind]

    return make


@pytest.fixture
def finetune(tmp_path, monkeypatch):
    """finetune(data, model, **arguments) runs the program in process; returns its output folder."""
    from finetune_vit import main

    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text("per_device_train_batch_size: 8\nnum_train_epochs: 2\nvalidation_fraction: 0.25\n")

    def run(data_dir, model, output_dir: str = "out", **arguments) -> Path:
        out = tmp_path / output_dir
        arguments |= {"data_dir": data_dir, "model_name_or_path": model, "output_dir": out}
        main([str(recipe), *(word for name, value in arguments.items() for word in (f"--{name}", str(value).strip()))])
        return out

    return run


@pytest.fixture
def stops_at_a_checkpoint(monkeypatch):
    """`with stops_at_a_checkpoint():` every training is interrupted after its first checkpoint."""
    from transfer.training.trainer import FinetuningTrainer

    class Stop(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            raise KeyboardInterrupt

    original = FinetuningTrainer.__init__

    def with_stop(self, *args, **kwargs):
        original(self, *args, **kwargs)
        self.add_callback(Stop())

    @contextlib.contextmanager
    def stopping():
        with monkeypatch.context() as patch:
            patch.setattr(FinetuningTrainer, "__init__", with_stop)
            yield

    return stopping


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub that the client of this process talks to as its owner, by plain LFS; nobody waits for another try."""
    with running_hub() as server:
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr(time, "sleep", lambda seconds: None)
        yield server


@pytest.fixture
def model(checkpoints, tmp_path) -> Path:
    """A model folder as a run leaves it."""
    folder = tmp_path / "model"
    trained = AutoModelForImageClassification.from_pretrained(
        checkpoints("convnext"), num_labels=4, ignore_mismatched_sizes=True
    )
    trained.config.class_ids = WNIDS
    trained.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_bytes(
        (checkpoints("convnext") / "preprocessor_config.json").read_bytes()
    )
    (folder / "README.md").write_text("---\nlibrary_name: transformers\n---\n\n# tiny\n")
    return folder
