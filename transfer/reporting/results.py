"""A run's results as its output folder holds them."""

import json
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from transfer import UserError
from transfer.predictions import Predictions


def read_json(path: Path) -> dict:
    """A json object that a run wrote. Raises `UserError`."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as fault:
        raise UserError(f"{path}: cannot be read ({fault.strerror}); is {path.parent} a finished run?") from None
    except ValueError as fault:
        raise UserError(f"{path}: is not valid json ({fault})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}, where a run writes an object")
    return content


def _require(content, names: Sequence[str], path: Path) -> None:
    """Refuse a file in which a run would have written more. Raises `UserError`."""
    missing = [name for name in names if not isinstance(content, Mapping) or name not in content]
    if missing:
        raise UserError(f"{path}: lacks {missing[0]!r}, which every run writes; is it of this project?")


def read_class_names(folder: Path) -> list[str]:
    """Names of the classes in label order, as the saved model has them. Raises `UserError`."""
    path = folder / "model" / "config.json"
    config = read_json(path)
    names = config.get("id2label", config.get("label_names"))  # timm's configs have a list
    try:
        return [str(names[str(label) if isinstance(names, Mapping) else label]) for label in range(len(names))]
    except (TypeError, KeyError):
        raise UserError(f"{path}: its id2label does not name the classes from 0 on") from None


def read_histories(folder: Path) -> dict[str, list[dict]]:
    """The Trainer's log of each seed or fold, or the one log of a run; empty where nothing was trained."""
    states = [path for kind in ("seed", "fold") for path in folder.glob(f"{kind}-*/trainer_state.json")]
    states.sort(key=lambda path: (len(path.parent.name), path))
    if not states and (folder / "trainer_state.json").is_file():
        states = [folder / "trainer_state.json"]
    names = ["" if path.parent == folder else path.parent.name.replace("-", " ") for path in states]
    return dict(zip(names, (read_json(path).get("log_history", []) for path in states), strict=True))


def look_up(entry, *keys: str):
    """A finite number deep in metrics.json, or None where a run has none of that name."""
    for key in keys:
        entry = entry.get(key) if isinstance(entry, Mapping) else None
    return entry if isinstance(entry, (int, float)) and math.isfinite(entry) else None


def name_base(record: Mapping) -> str:
    """The checkpoint that a run started from: a Hub id, or a folder's name without its place."""
    name = str(record["arguments"]["model_name_or_path"])
    if name == "offline":
        return "EfficientNet-Lite0 (ImageNet-1k)"
    return Path(name).name if record["local_model"] else name


def leave_out_places(command: str) -> str:
    """The command with files named as a stranger has them: no folder of this machine, no user's name."""

    def shorten(word: str) -> str:
        flag, mark, value = word.partition("=") if word.startswith("--") else ("", "", word)
        foreign = value.startswith(("/", "~", "..")) or value[1:3] in (":\\", ":/")
        return flag + mark + (Path(value.replace("\\", "/")).name or "." if foreign else value)

    return shlex.join(shorten(word) for word in shlex.split(command))


@dataclass(frozen=True)
class RunResults:
    """What a finished run's folder says; everything a report or a comparison is made from."""

    folder: Path
    metrics: Mapping
    record: Mapping
    predictions: Predictions
    class_names: list[str]
    histories: Mapping[str, list[dict]]

    @classmethod
    def read(cls, folder: Path, record: Mapping | None = None) -> "RunResults":
        """Read a run's folder; `record` stands for a run.json that is not written yet. Raises `UserError`."""
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder; name a run's output folder, for example outputs/sample")
        record = read_json(folder / "run.json") if record is None else record
        _require(record, ["arguments", "local_model"], folder / "run.json")
        _require(record["arguments"], ["model_name_or_path"], folder / "run.json")
        names, predictions = read_class_names(folder), Predictions.load(folder)
        if predictions.validation_logits.shape[1] != len(names):
            raise UserError(
                f"{folder}: predictions.npz has {predictions.validation_logits.shape[1]} classes and model/ "
                f"{len(names)}; they are not of one run"
            )
        metrics = read_json(folder / "metrics.json")
        kept = ["accuracy", "accuracy_ci95", "top5_accuracy", "macro_f1", "loss", "n"]
        _require(metrics.get("validation"), kept, folder / "metrics.json")
        return cls(folder, metrics, record, predictions, names, read_histories(folder))

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def hits(self) -> np.ndarray:
        """(N,) bool: which validation images were right."""
        return self.predictions.validation_logits.argmax(-1) == self.predictions.validation_labels
