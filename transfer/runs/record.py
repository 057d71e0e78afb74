"""`--reproduce RUN_JSON`: what has changed since a run, and which of its numbers came out the same.

What a run leaves behind: its folder, files that are written whole or not at all, and run.json.
"""

import hashlib
import importlib.metadata
import json
import os
import platform
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from transfer.errors import UserError
from transfer.files import PROJECT, digest_of_folder, run_git, write_atomically
from transfer.runtime import launched_processes, shards_model
from transfer.training.checkpoints import decides_weights

# What the same bits need: the same machine, the same software, the same weights to start from.
SURROUNDINGS = ("precision", "device", "platform", "processes")
DATA = {"data_fingerprint": "images", "split_fingerprint": "split into training, validation and test images"}
# Arguments that leave the weights as they are, but not the numbers.
OF_NUMBERS = ("do_train", "per_device_eval_batch_size")
OF_A_PART = ("seed", "seeds", "fold")  # what each training of a repeated run has of its own
TIMES = ("samples_per_second", "seconds")  # say how fast, not what
NAMED_PACKAGES = 8


def read_record(path: Path) -> dict:
    """A run.json. Raises `UserError` if it is none."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except OSError as fault:
        raise UserError(f"--reproduce {path}: cannot be read ({fault.strerror})") from None
    except ValueError:
        record = None
    wanted = {"arguments", "versions", "metrics", *DATA}
    if not isinstance(record, dict) or not wanted <= record.keys():
        raise UserError(f"--reproduce {path}: is no run.json of this project; give outputs/<run>/run.json")
    return record


def _changed(then: Mapping, now: Mapping) -> list[str]:
    names = sorted({*then, *now}, key=str.lower)
    return [f"{n} {then.get(n, 'none')} -> {now.get(n, 'none')}" for n in names if then.get(n) != now.get(n)]


def check_data(then: Mapping, now: Mapping) -> None:
    """Refuse other data, on which no number could come out the same. Raises `UserError`."""
    for name, what in DATA.items():
        if then[name] != now[name]:
            raise UserError(
                f"--data_dir {now['arguments']['data_dir']}: the {what} are not those of the run "
                f"({name} {now[name][:12]}, not {then[name][:12]}); nothing was trained"
            )


def _commit(code: Mapping) -> str:
    return f"{code.get('commit')}{' with changes of its own' if code.get('clean') is False else ''}"


def _changed_arguments(then: Mapping, now: Mapping, ignored: Sequence[str]) -> list[str]:
    """Arguments that may have led to other weights or numbers; what only one of two versions knows does not count."""
    shared = [n for n in then if n in now and (decides_weights(n) or n in OF_NUMBERS) and n not in ignored]
    return _changed({n: then[n] for n in shared}, {n: now[n] for n in shared})


def describe_differences(then: Mapping, now: Mapping, part: bool = False) -> list[str]:
    """What is not as it was in the recorded run, a line each; none where the same bits must come out.

    `now` may be `part` of a run: one of its seeds or folds.
    """
    lines = [f"{name} {then.get(name)} -> {now.get(name)}" for name in SURROUNDINGS if then.get(name) != now.get(name)]
    if arguments := _changed_arguments(then["arguments"], now["arguments"], OF_A_PART if part else ()):
        lines.append(f"arguments: {', '.join(arguments)}")
    code, ours = then.get("code") or {}, now["code"]
    if code.get("fingerprint") != ours["fingerprint"]:
        lines.append(f"code: commit {_commit(code)} -> {_commit(ours)}")
    if versions := _changed(then["versions"], now["versions"]):
        lines.append(f"versions: {', '.join(versions)}")
    others = _changed(then.get("packages", {}), now["packages"])
    others = [change for change in others if change not in versions]
    if others:
        more = f" and {len(others) - NAMED_PACKAGES} more" * (len(others) > NAMED_PACKAGES)
        lines.append(f"other packages: {', '.join(others[:NAMED_PACKAGES])}{more}")
    # Of a repeated run it says what all trainings started from.
    if not part and then.get("start_fingerprint") != now["start_fingerprint"]:
        lines.append("the weights to start from (another checkpoint, or a head that was drawn otherwise)")
    if then["arguments"].get("max_minutes"):
        lines.append("--max_minutes ended the run by the clock: how many steps fit depends on the machine")
    return lines


def compare_surroundings(path: Path, now: Mapping, part: bool = False) -> list[str]:
    """What is not as it was in the run whose run.json lies at path, a line each. Raises `UserError` for other data."""
    then = read_record(path)
    check_data(then, now)
    return describe_differences(then, now, part)


@dataclass(frozen=True)
class Comparison:
    """One number of a run, then and now."""

    name: str
    then: object
    now: object
    spread: tuple[float, float] | None = None  # what the run's record would still call the same

    @property
    def verdict(self) -> str:
        if self.then == self.now:
            return "same"
        if self.spread and self.now is not None and self.spread[0] <= self.now <= self.spread[1]:
            return "within"
        return "differs"

    def __str__(self) -> str:
        if self.verdict == "same":
            return f"same        {self.name} {_short(self.then)}"
        where = f", recorded spread {self.spread[0]:.4f} to {self.spread[1]:.4f}" if self.spread else ""
        return f"{self.verdict:<11} {self.name} {_short(self.then)} -> {_short(self.now)}{where}"


def _short(value) -> str:
    return f"{value:.6f}" if isinstance(value, float) else str(value)[:12]


def _numbers(metrics: Mapping, prefix: str = "") -> Iterator[tuple[str, float]]:
    """Dotted name and value of every number that is no time."""
    for name, value in metrics.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{prefix}{name}.")
        elif isinstance(value, (int, float)) and name not in TIMES:
            yield f"{prefix}{name}", value


def _spread_of(name: str, metrics: Mapping) -> tuple[float, float] | None:
    """Two standard deviations over the recorded seeds, or the interval of the validation accuracy."""
    part, _, number = name.rpartition(".")
    deviation = metrics.get("std") or {}
    for step in filter(None, part.split(".")):
        deviation = deviation.get(step, {}) if isinstance(deviation, Mapping) else {}
    if isinstance(deviation, Mapping) and isinstance(deviation.get(number), float):
        value = dict(_numbers(metrics))[name]
        return value - 2 * deviation[number], value + 2 * deviation[number]
    if name == "validation.accuracy" and "accuracy_ci95" in metrics["validation"]:
        return tuple(metrics["validation"]["accuracy_ci95"])
    return None


def compare(then: Mapping, now: Mapping) -> list[Comparison]:
    """Every number of two run.json, and the hashes of the weights and of the csv."""
    found = dict(_numbers(now["metrics"]))
    numbers = [
        Comparison(name, value, found.get(name), _spread_of(name, then["metrics"]))
        for name, value in _numbers(then["metrics"])
    ]
    hashes = ("optimizer_steps", "weights_sha256", "submission_sha256")
    return numbers + [Comparison(name, then[name], now.get(name)) for name in hashes if then.get(name) is not None]


def is_reproduced(differences: list[str], comparisons: list[Comparison]) -> bool:
    """Bit for bit where nothing differs; elsewhere the validation accuracy within its recorded spread."""
    if not differences:
        return all(c.verdict == "same" for c in comparisons)
    return all(c.verdict != "differs" for c in comparisons if c.name == "validation.accuracy")


def describe_outcome(differences: list[str], comparisons: list[Comparison]) -> list[str]:
    """The comparison in words, a line for each number and one in the end."""
    same = sum(c.verdict == "same" for c in comparisons)
    if not differences and is_reproduced(differences, comparisons):
        end = f"reproduced  bit for bit: {same} of {same} numbers and hashes are the same"
    elif is_reproduced(differences, comparisons):
        end = f"reproduced  within the recorded spread: {same} of {len(comparisons)} are the same"
    else:
        end = f"NOT reproduced: {len(comparisons) - same} of {len(comparisons)} numbers and hashes differ" + (
            "" if differences else ", though nothing else does"
        )
    return [*map(str, comparisons), end]


def compare_results(then: Path, now: Path) -> tuple[list[str], bool]:
    """Two run.json compared in words, and whether the second reproduces the first."""
    before, after = read_record(then), read_record(now)
    differences, comparisons = describe_differences(before, after), compare(before, after)
    return describe_outcome(differences, comparisons), is_reproduced(differences, comparisons)


PACKAGES = [
    "torch",
    "transformers",
    "datasets",
    "accelerate",
    "evaluate",
    "huggingface_hub",
    "pandas",
    "numpy",
    "pillow",
    "safetensors",
]


def describe_code() -> dict:
    """Hash of the code that ran; its commit and whether that is all of it, None where there is no git."""
    digests = [digest_of_folder(PROJECT, "*.py"), digest_of_folder(PROJECT / "transfer", "**/*.py")]
    status, commit = run_git("status", "--porcelain", "--untracked-files=no"), run_git("rev-parse", "HEAD")
    return {
        "fingerprint": hashlib.sha256("".join(digests).encode()).hexdigest(),
        "commit": None if commit is None else commit.decode().strip(),
        "clean": None if status is None else not status.strip(),
    }


def describe_device() -> str:
    """The machine's device, as people name it."""
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    threads = torch.get_num_threads()
    return f"CPU, {model}, {threads} thread{'s' * (threads > 1)}"


def describe_command() -> str:
    """The command that a reader would type again."""
    script = [Path(sys.argv[0]).name, *sys.argv[1:]]
    if os.environ.get("ACCELERATE_MIXED_PRECISION") is None:
        return shlex.join(["python", *script])
    launcher = ["accelerate", "launch", "--config_file", "accelerate_config.yaml"]
    if (processes := launched_processes()) > 1:
        kind = "fsdp" if shards_model() else "multi_gpu"
        launcher[-1:] = [f"recipes/accelerate/{kind}.yaml", "--num_processes", str(processes)]
    return shlex.join([*launcher, *script])


def describe_versions() -> Mapping[str, str]:
    """Versions of Python and of the packages that decide the numbers."""
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in PACKAGES}


def describe_packages() -> dict[str, str]:
    """Every installed package with its version, as pip freeze lists them."""
    found = {d.name: d.version for d in importlib.metadata.distributions() if d.name}
    return dict(sorted(found.items(), key=lambda item: item[0].lower()))


def make_record(
    arguments: Mapping, precision: str, data_fingerprint: str, split_fingerprint: str, start_fingerprint: str
) -> dict:
    """What run.json holds of what a run starts from; `start_fingerprint` is that of the weights."""
    return {
        "command": describe_command(),
        "arguments": dict(arguments),
        "precision": precision,
        "local_model": arguments["model_name_or_path"] == "offline" or Path(arguments["model_name_or_path"]).exists(),
        "code": describe_code(),
        "versions": describe_versions(),
        "device": describe_device(),
        "platform": platform.platform(),
        "processes": launched_processes(),
        "packages": describe_packages(),
        "data_fingerprint": data_fingerprint,
        "split_fingerprint": split_fingerprint,
        "start_fingerprint": start_fingerprint,
    }


def write_record(folder: Path, record: Mapping) -> None:
    """run.json, which marks a run as finished."""
    write_atomically(folder / "run.json", json.dumps(record, indent=2) + "\n")


def find_run_of(model: Path) -> Path | None:
    """The folder of the run that left this model folder and nothing else since; None where there is none."""
    try:
        record = json.loads((model.expanduser().parent / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    whole = record.get("weights_sha256") == digest_of_folder(model.expanduser(), "*.safetensors")
    return model.expanduser().parent if whole else None


def extend_record(folder: Path, **facts) -> None:
    """Add to run.json what came to be known after it was written, such as the link of the pushed model."""
    record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    write_record(folder, record | facts)
