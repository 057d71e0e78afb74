"""A test of robustness: runs are killed again and again, and data are damaged at random.

    python benchmarks/chaos.py --kills 20     # kills at random moments, of tiny ViTs and ConvNeXts, also in repeats
    python benchmarks/chaos.py --fuzz 500     # byte flips, cuts and renames in data folder, zip and template
    python benchmarks/chaos.py --layouts 500  # small datasets in random layouts, whose truth is known

The kills are SIGKILL, SIGTERM and SIGHUP to the run, to its launcher or to both with the data workers. A killed run is
started again with the same command, or as its error message says; in the end, its weights and csv must equal those of
an undisturbed run. A run that outlives its launcher ends the test. Damaged data must be refused with one line, or read
correctly. In a random layout, every label and every cell of the csv must be right, every file used or listed, and
every refusal justified. The exit code is 1 if anything was lost, wrong, left out silently or half-written. The data
are generated, and no network is needed; the same --seed repeats the damage and the layouts.
"""

import argparse
import contextlib
import io
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import psutil
import torch
import transformers
from PIL import Image
from transformers import ConvNextConfig, ConvNextForImageClassification, ViTConfig, ViTForImageClassification

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import finetune_vit
from benchmarks.layout_check import fuzz_layouts
from data_loading import load_dataset, open_data
from transfer.data.images import ImageGeometry
from transfer.data.images.store import open_pixel_store
from transfer.data.labels import open_template, render_submission
from transfer.errors import UserError
from transfer.files import digest_of_folder
from transfer.runtime import LAUNCHER_VARIABLES
from transfer.submission.checker import find_faults

SIZE = 32
GEOMETRY = ImageGeometry((SIZE, SIZE), (SIZE, SIZE), "bicubic", mean=(0.5,) * 3, std=(0.5,) * 3)
WNIDS = ["n00000007", "n00000003", "n00000009", "n00000001"]
PATIENCE = 120  # seconds to wait for the moment of a kill; then it comes anyway
RECIPE = """
num_train_epochs: 4
per_device_train_batch_size: 8
learning_rate: 3.0e-3
ema_decay: 0.9
mixup_alpha: 0.2
report_to: none
"""
# name -> model and further words; all with a moving average and mixup
KILLED = {
    "vit": ("vit", []),
    "convnext": ("convnext", []),
    "seeds": ("vit", ["--seeds", "1", "2", "--num_train_epochs", "2"]),
    "folds": ("convnext", ["--kfold", "2", "--num_train_epochs", "2", "--dataloader_num_workers", "1"]),
}
RESUME = ["--resume_from_checkpoint", "true"]


def write_data_set(root: Path, per_class: int, test_images: int, rng: np.random.Generator) -> Path:
    """Noise in the competition's layout; most of it JPEG, the first images of each class in other formats."""
    kinds = ["PNG", "GIF", "BMP", "TIFF", "WEBP"]
    for class_id in WNIDS:
        (root / "train" / class_id / "images").mkdir(parents=True)
        for i in range(per_class):
            kind = kinds[i] if i < min(len(kinds), per_class // 2) else "JPEG"
            pixels = rng.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / "train" / class_id / "images" / f"{class_id}_{i}.JPEG", format=kind)
    (root / "test" / "images").mkdir(parents=True)
    ids = [f"{rng.integers(2**60):015x}" for _ in range(test_images)]
    for i in ids:
        pixels = rng.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / "test" / "images" / f"{i}.JPEG")
    (root / "wnids.txt").write_text("\n".join(WNIDS) + "\n")
    (root / "words.txt").write_text("".join(f"{class_id}\tthing {class_id}\n" for class_id in sorted(WNIDS)))
    (root / "submission_sample.csv").write_text("image_id,label\n" + "".join(f"{i},0\n" for i in ids))
    return root


def write_models(folder: Path) -> None:
    """A random ViT and a random ConvNeXt, saved."""
    torch.manual_seed(0)
    vit = ViTConfig(
        image_size=SIZE,
        patch_size=8,
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=128,
    )
    convnext = ConvNextConfig(image_size=SIZE, hidden_sizes=[16, 32], depths=[1, 2], num_stages=2)
    made = {
        "vit": (ViTForImageClassification(vit), transformers.ViTImageProcessor(size={"height": SIZE, "width": SIZE})),
        "convnext": (
            ConvNextForImageClassification(convnext),
            transformers.ConvNextImageProcessor(size={"shortest_edge": SIZE}),
        ),
    }
    for name, parts in made.items():
        for part in parts:
            part.save_pretrained(folder / name)


def run_in_child(words: list[str], cache: Path, log: Path) -> None:
    """The program in a forked process of its own, its output in a file."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    datasets.config.HF_DATASETS_CACHE = cache
    os.environ["ACCELERATE_MIXED_PRECISION"] = "no"
    finetune_vit.main(words)


def launch(words: list[str], cache: Path, log: Path, pid_file: Path) -> None:
    """Start the program in a child, wait for it, and pass on its exit code, as accelerate launch does."""
    os.setsid()  # a kill of the group takes the data workers too
    child = os.fork()
    if not child:
        os.environ[LAUNCHER_VARIABLES[0]] = "NO"
        return run_in_child(words, cache, log)
    pid_file.write_text(str(child))
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    sys.exit(code if code >= 0 else 128 - code)


def appeared(folder: Path, since: float, *patterns: str) -> list[Path]:
    """What was written after a time; what an earlier kill has left is not."""
    try:
        return [path for pattern in patterns for path in folder.glob(pattern) if path.stat().st_mtime > since]
    except FileNotFoundError:  # what is being looked at may be deleted meanwhile
        return []


def half_a_checkpoint(out: Path, since: float) -> bool:
    return any(not (place / "trainer_state.json").exists() for place in appeared(out, since, "**/checkpoint-*"))


# What is being done when the kill comes; `cache` starts from an empty one.
MOMENTS: dict[str, Callable[[Path, Path, float], object] | None] = {
    "any moment": None,
    "cache": lambda out, cache, since: appeared(cache, since, "finetune-vit/*/.*.tmp"),
    "checkpoint": lambda out, cache, since: half_a_checkpoint(out, since),
    "model or csv": lambda out, cache, since: appeared(out, since, "**/.*.tmp", "**/model/model.safetensors"),
}


# Who gets which signal.
ENDS = [("group", signal.SIGKILL), ("group", signal.SIGTERM), ("child", signal.SIGKILL), ("child", signal.SIGTERM)]
ENDS += [("launcher", signal.SIGKILL), ("launcher", signal.SIGTERM), ("launcher", signal.SIGHUP)]


class Victim:
    """One run: started, killed and started again until it is done."""

    def __init__(self, words: list[str], place: Path):
        self.place, self.out, self.cache = place, place / "out", place / "cache"
        place.mkdir(parents=True)
        self.words = [*words, "--output_dir", str(self.out)]
        self.log, self.pid_file = place / "log.txt", place / "pid.txt"
        self.context = multiprocessing.get_context("fork")

    def start(self, words: list[str] | None = None) -> multiprocessing.Process:
        self.pid_file.unlink(missing_ok=True)
        process = self.context.Process(target=launch, args=(words or self.words, self.cache, self.log, self.pid_file))
        process.start()
        while not self.pid_file.exists() or not self.pid_file.read_text():
            time.sleep(0.001)
        return process

    def finish(self, process: multiprocessing.Process) -> int:
        """Exit code of the run, which is started again as its error says."""
        process.join()
        if process.exitcode == 2 and RESUME[0] in self.log.read_text():
            process = self.start(self.words + RESUME)
            process.join()
        return process.exitcode

    def kill(self, moment: str, wait: float, whom: str, number: int) -> bool:
        """Start the run, again as its error says, and kill it; False if it was done before."""
        if moment == "cache":
            shutil.rmtree(self.cache, ignore_errors=True)
        for words in (self.words, self.words + RESUME):
            process = self.start(words)
            self._await(process, MOMENTS[moment], wait)
            child = int(self.pid_file.read_text())
            with contextlib.suppress(ProcessLookupError):
                if whom == "group":
                    os.killpg(process.pid, number)
                else:
                    os.kill(child if whom == "child" else process.pid, number)
            process.join()
            self._await_end(child)
            if process.exitcode != 2 or RESUME[0] not in self.log.read_text():
                break
        return process.exitcode < 0 or process.exitcode > 128

    def _await_end(self, child: int) -> None:
        """A run ends with its launcher; its data workers end a little later."""
        start = time.monotonic()
        with contextlib.suppress(psutil.NoSuchProcess):
            while psutil.Process(child).status() != psutil.STATUS_ZOMBIE:
                if time.monotonic() - start > PATIENCE:
                    raise SystemExit(f"process {child} has outlived its launcher: {self.log.read_text()[-500:]}")
                time.sleep(0.01)

    def _await(self, process, condition, wait: float) -> None:
        start, since = time.monotonic(), time.time()
        while process.is_alive() and time.monotonic() - start < PATIENCE:
            if condition is None and time.monotonic() - start > wait:
                return
            if condition and condition(self.out, self.cache, since):
                time.sleep(wait % 0.01)  # not always at its beginning
                return
            time.sleep(0.0005)

    def leftovers(self) -> list[str]:
        """Half-written files and folders."""
        return [path.name for path in self.out.glob(".*tmp")]

    def results(self) -> tuple[str, ...]:
        files = ((self.out / "model", "*.safetensors"), (self.out, "submission.csv"))
        return *(digest_of_folder(*place) for place in files), *self.leftovers()


def kill_runs(kind: str, words: list[str], kills: int, place: Path, rng: random.Random) -> tuple[int, int]:
    """(kills, kills survived) of runs of one model against one that nobody kills."""
    calm = Victim(words, place / "calm")
    start = time.monotonic()
    if calm.finish(calm.start()):
        raise SystemExit(f"the undisturbed run failed: {calm.log.read_text()[-500:]}")
    seconds = time.monotonic() - start
    killed = survived = number = 0
    while killed < kills:
        number += 1
        victim, here, moments = Victim(words, place / f"run-{number}"), 0, []
        while killed + here < kills and here < 5:
            moment, (whom, number_sent) = rng.choice(list(MOMENTS)), rng.choice(ENDS)
            if not victim.kill(moment, rng.uniform(0, seconds), whom, number_sent):
                break
            here, moments = here + 1, [*moments, f"{moment}: {number_sent.name} to {whom}"]
        # A finished run that was resumed from its last checkpoint and killed again has a csv and half a model.
        is_done = (victim.out / "submission.csv").exists() and not victim.leftovers()
        code = 0 if is_done else victim.finish(victim.start())
        same = victim.results() == calm.results()
        killed, survived = killed + here, survived + here * same
        said = "same weights and csv" if same else f"DIFFERS (exit code {code}): {victim.log.read_text()[-300:]}"
        print(f"{kind:<9} {here} kills ({', '.join(moments)}): {said}", flush=True)
        shutil.rmtree(victim.place)
    return killed, survived


def flip_bytes(path: Path, rng: random.Random) -> None:
    data = bytearray(path.read_bytes())
    for _ in range(rng.choice([1, 1, 4, 30])):
        if data:
            data[rng.randrange(len(data))] = rng.randrange(256)
    path.write_bytes(data)


def cut(path: Path, rng: random.Random) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: rng.randrange(len(data) + 1)])


def rename(path: Path, rng: random.Random) -> None:
    odd = [f"{path.stem}.png", f"{path.stem} copy{path.suffix}", "a,b.JPEG", ".hidden.JPEG", "x" * 250, "é\n.JPEG"]
    path.rename(path.with_name(rng.choice(odd)))


def damage(root: Path, rng: random.Random) -> tuple[Path, str]:
    """Damage one file of the dataset; returns which and how."""
    texts = [root / name for name in ("wnids.txt", "words.txt", "submission_sample.csv")]
    images = sorted(path for path in root.rglob("*.JPEG"))
    path = rng.choice(texts) if rng.random() < 0.4 else rng.choice(images)
    how = rng.choice([flip_bytes, flip_bytes, cut, rename])
    how(path, rng)
    return path, how.__name__


def pack(root: Path, path: Path) -> Path:
    return Path(shutil.make_archive(str(path), "zip", root.parent, root.name))


def read_everything(place: Path, cache: Path) -> tuple[Path, dict[str, int], dict[str, np.ndarray], bytes, list[str]]:
    """What the program understands: root, label of each file, pixels, a csv, and that csv's faults."""
    folder = open_data(str(place))
    dataset = load_dataset(folder, 0.25)
    files = folder.train_files + folder.test_files
    store = open_pixel_store(folder.root, files, GEOMETRY, cache / "pixels")
    labels = {row["file"]: row["label"] for split in ("train", "validation") for row in _rows(dataset[split])}
    pixels = {
        file: store.take(np.array([row]), whole=False)[0].reshape(SIZE, SIZE, 3) for file, row in store.rows.items()
    }
    template = open_template(folder.template_path, folder.test_ids)
    csv = render_submission(template, {i: len(i) % 4 for i in folder.test_ids})
    (cache / "submission.csv").write_bytes(csv)
    return folder.root, labels, pixels, csv, find_faults(cache / "submission.csv", template, 4)


def _rows(split):
    return split.remove_columns("image")


def is_right(root: Path, labels: dict[str, int], pixels: dict[str, np.ndarray], faults: list[str]) -> bool:
    """Whether what was understood is what PIL and the lines of wnids.txt say, read in another way."""
    lines = (root / "wnids.txt").read_bytes().decode("utf-8-sig").split("\n")
    order = [line.strip() for line in lines if line.strip()]
    for file, label in labels.items():
        if order[label] != file.split("/")[1]:
            return False
    for file, values in pixels.items():
        with Image.open(root / file) as image:
            expected = np.asarray(image.convert("RGB").resize((SIZE, SIZE)))
        if not np.array_equal(values, expected):
            return False
    return not faults


def tree(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def left_behind(cache: Path) -> list[Path]:
    """What a refusal must not leave: anything but locks and empty folders."""
    kept = ("unpacked", "pixels")
    wholes = [path for path in cache.rglob("*-*") if path.is_dir()]
    return [
        path
        for path in cache.rglob("*")
        if path.is_file() and path.suffix != ".lock" and not any(whole in path.parents for whole in wholes)
    ] + [path for path in wholes if path.name.endswith(".tmp") and path.parent.name in kept]


def judge(place: Path, original: dict[str, bytes] | None, cache: Path) -> str:
    """What became of a damaged dataset; `original` is what an accepted zip must hold, byte for byte."""
    datasets.config.HF_DATASETS_CACHE = cache
    cache.mkdir(parents=True)
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            root, labels, pixels, _, faults = read_everything(place, cache)
    except UserError as refusal:
        if left_behind(cache):
            return "PARTIAL FILES"
        return "refused" if "\n" not in str(refusal) else "TRACEBACK (more than a line)"
    except Exception as fault:
        return f"TRACEBACK {type(fault).__name__}: {fault}"
    if original is not None and tree(root) != original:
        return "accepted, WRONG"
    return "accepted, right" if is_right(root, labels, pixels, faults) else "accepted, WRONG"


def fuzz(cases: int, place: Path, rng: random.Random) -> Counter:
    """What became of so many damaged datasets: folders, and zips damaged as a whole."""
    pristine = write_data_set(place / "data" / "set", 6, 6, np.random.default_rng(0))
    packed, outcomes = pack(pristine, place / "pristine"), Counter()
    for case in range(cases):
        here = place / f"case-{case}"
        if case % 3 == 0:
            here.mkdir()
            target = Path(shutil.copy(packed, here / "set.zip"))
            how = rng.choice([flip_bytes, flip_bytes, cut])
            how(target, rng)
            outcome, what = judge(target, tree(pristine), here / "cache"), f"zip, {how.__name__}"
        else:
            root = Path(shutil.copytree(pristine, here / "set"))
            path, how = damage(root, rng)
            outcome, what = judge(root, None, here / "cache"), f"{path.relative_to(root)}, {how}"
        outcomes[outcome.split(" ")[0] if outcome.startswith("TRACEBACK") else outcome] += 1
        if outcome not in ("refused", "accepted, right"):
            print(f"case {case} ({what}): {outcome}", flush=True)
        shutil.rmtree(here)
    return outcomes


def main(argv: list[str] | None = None) -> None:
    """Kill and damage as often as asked, and say what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--kills", type=int, default=0, help=f"number of kills of each of the runs: {', '.join(KILLED)}"
    )
    parser.add_argument("--fuzz", type=int, default=0, help="number of damaged datasets")
    parser.add_argument("--layouts", type=int, default=0, help="number of datasets in random layouts")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments, the damage and the layouts")
    args = parser.parse_args(argv)
    rng, lost = random.Random(args.seed), 0
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        if args.kills:
            data = write_data_set(place / "data" / "set", 60, 40, np.random.default_rng(0))
            recipe = place / "chaos.yaml"
            recipe.write_text(RECIPE)
            # In a process of its own: forked ones would hang on the threads that torch starts to compute.
            maker = multiprocessing.get_context("fork").Process(target=write_models, args=(place / "models",))
            maker.start()
            maker.join()
            for kind, (model, more) in KILLED.items():
                words = [str(recipe), "--data_dir", str(data), "--model_name_or_path", str(place / "models" / model)]
                words += more
                killed, survived = kill_runs(kind, words, args.kills, place / kind, rng)
                print(f"{kind:<9} {survived} of {killed} kills survived, weights and csv bit for bit", flush=True)
                lost += killed - survived
        if args.fuzz:
            outcomes = fuzz(args.fuzz, place / "fuzz", rng)
            print("fuzz      " + ", ".join(f"{count} {what}" for what, count in sorted(outcomes.items())))
            lost += sum(count for what, count in outcomes.items() if what not in ("refused", "accepted, right"))
        if args.layouts:
            outcomes = fuzz_layouts(args.layouts, place / "layouts", args.seed)
            print("layouts   " + ", ".join(f"{count} {what}" for what, count in sorted(outcomes.items())))
            lost += sum(count for what, count in outcomes.items() if what not in ("refused", "right"))
    sys.exit(1 if lost else 0)


if __name__ == "__main__":
    main()
