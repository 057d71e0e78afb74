"""Opens the datasets of `layouts.py` as a run does, and compares what was read with the truth."""

import csv
import io
import random
import re
import shutil
import traceback
import unicodedata
from collections import Counter
from pathlib import Path

import datasets
import numpy as np

from benchmarks.layouts import DataSet, draw_data_set
from data_loading import draw_splits, open_data
from transfer.errors import UserError
from transfer.submission import fill_submission

# A refusal names a flag, or says what to do.
WAY_OUT = re.compile(r"--[a-z]+_?[a-z]+|\b(move|rename|merge|add|remove|correct|choose|give|write|unpack|restore)\b")
SURE = 50.0  # a logit: its class's probability is 1


def is_shown(path: str, data, root: str) -> bool:
    """Whether a file that is not used stands among those that are listed as unused."""
    parts, name = path.removeprefix(root).split("/"), Path(path).name
    if any(part.startswith((".", "__MACOSX", "@eaDir")) for part in parts[:-1]):
        return any(part in entry for entry in data.ignored for part in parts[:-1])
    folder = "/".join(parts[:-1]) or "."
    wanted = {name, f"*{Path(name).suffix.lower()}", f"../{name}", f"../{name} (lists other images)"}
    return folder in data.unused_images or not wanted.isdisjoint(data.ignored)


def find_silent(d: DataSet, data, used: set[str]) -> list[str]:
    """Files below the root, and tables in the folder above it, that are neither used nor listed."""
    above = "/".join(d.root.split("/")[:-2])
    files = [file.relative_to(d.top).as_posix() for file in d.top.rglob("*") if file.is_file()]
    near = [
        f
        for f in files
        if f.startswith(d.root) or (f.endswith((".csv", ".tsv")) and f"{above}/{Path(f).name}".lstrip("/") == f)
    ]
    silent = [file for file in near if file not in used and not is_shown(file, data, d.root)]
    unused = [file for file in near if file.startswith(d.root) and file not in used]
    listed = data.ignored.total() + data.unused_images.total() - sum(k.startswith("../") for k in data.ignored)
    return silent or ([f"{len(unused)} unused, {listed} listed"] if len(unused) != listed else [])


def find_wrong_labels(d: DataSet, data) -> list[str]:
    """What was read of the files and labels that is not the truth."""
    wanted = [unicodedata.normalize("NFC", name) for name in d.classes]
    if data.class_ids != wanted:
        return [f"classes {data.class_ids}, not {wanted}"]
    labeled = {"train": (data.train_files, data.train_labels), "val": (data.validation_files, data.validation_labels)}
    wrong = []
    for role, (files, labels) in labeled.items():
        read = {f"{d.root}{file}": (role, label) for file, label in zip(files, labels, strict=True)}
        truth = {path: fact for path, fact in d.images.items() if fact[0] == role}
        wrong += [
            f"{role}: {path}: {read.get(path)}, not {truth.get(path)}"
            for path in read | truth
            if read.get(path) != truth.get(path)
        ]
    read_test = {f"{d.root}{file}" for file in data.test_files}
    wrong += [f"test: {path}" for path in read_test ^ set(d.paths("test"))]
    if data.test_labels:
        pairs = zip(data.test_files, data.test_labels, strict=True)
        wrong += [f"test label of {file}" for file, label in pairs if d.images[d.root + file][1] != label]
    splits = draw_splits(data, 0.25, 0, None, None)
    if set(splits["train"][0]) & set(splits["validation"][0]):
        wrong.append("an image is on both sides of the split")
    return wrong


def find_wrong_cells(d: DataSet, data) -> list[str]:
    """What the csv says, with certain predictions, that is not the truth."""
    if not data.test_files:
        return []
    truth = [d.images[d.root + file][1] for file in data.test_files]
    scores = SURE * np.eye(len(d.classes))[truth]
    text = fill_submission(data, data.test_ids, scores, 1.0).decode()
    rows = list(csv.reader(io.StringIO(text), delimiter=d.separator))
    label_of = dict(zip(data.test_ids, truth, strict=True)) | {i: d.images[path][1] for i, path in d.ids.items()}
    wrong = [] if rows[0] == d.header else [f"header {rows[0]}, not {d.header}"]
    ids = [row[0] for row in rows[1:]]
    if ids[: len(d.ids)] != list(d.ids) or len(ids) != len(truth):
        wrong.append(f"ids {ids}, not {list(d.ids)}")
    for name, *cells in rows[1:]:
        label = label_of[name]
        if d.columns:
            values, wanted = [round(float(cell), 6) for cell in cells], [float(c == label) for c in d.columns]
        else:
            values, wanted = cells, [d.words[label]]
        if values != wanted:
            wrong.append(f"row {name}: {values}, not {wanted}")
    return wrong


def judge_data_set(d: DataSet, packed: Path | None, cache: Path) -> tuple[str, str]:
    """(what became of a dataset, details)."""
    datasets.config.HF_DATASETS_CACHE = cache
    try:
        data = open_data(str(packed or d.top), **d.options)
        wrong = find_wrong_labels(d, data) or find_wrong_cells(d, data)
    except UserError as refusal:
        text = str(refusal)
        if "\n" in text or not WAY_OUT.search(text):
            return "refused WITHOUT A WAY OUT", text
        is_justified = any(excuse in text for excuse in d.excuses)
        return ("refused" if is_justified else "refused WITHOUT REASON"), text
    except Exception:
        return "TRACEBACK", traceback.format_exc()
    if not data.root.as_posix().endswith(d.root.rstrip("/")):
        return "WRONG", f"root {data.root}"
    if wrong:
        return "WRONG", "; ".join(wrong[:3])
    used = {d.root + file for file in data.files} | d.read
    silent = find_silent(d, data, used) if packed is None else []
    return ("SILENT", ", ".join(silent[:3])) if silent else ("right", "")


def fuzz_layouts(cases: int, place: Path, seed: int) -> Counter:
    """What became of so many datasets in random layouts; each fault is printed."""
    outcomes: Counter = Counter()
    for case in range(cases):
        rng, here = random.Random(f"{seed}/{case}"), place / f"layout-{case}"
        d = draw_data_set(here, rng)
        is_packed = rng.random() < 0.15 and not any(path.startswith("../") for path in d.read)
        packed = Path(shutil.make_archive(str(here / "set"), "zip", d.top)) if is_packed else None
        outcome, details = judge_data_set(d, packed, here / "cache")
        outcomes[outcome] += 1
        if outcome not in ("right", "refused"):
            print(f"layout {case} ({'; '.join(d.what)}{'; zip' * is_packed}): {outcome}: {details}", flush=True)
        shutil.rmtree(here)
    return outcomes
