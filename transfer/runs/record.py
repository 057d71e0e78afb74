"""run.json: what a run started from, and the comparison of two runs for `--reproduce`."""

import hashlib
import importlib.metadata
import json
import os
import platform
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from transfer.errors import UserError
from transfer.evaluation.metrics import FILE_NAME as METRICS_FILE
from transfer.evaluation.metrics import RunMetrics
from transfer.files import PROJECT, digest_of_folder, hide_home, read_json, run_git, write_atomically
from transfer.models.offline import is_offline
from transfer.runtime import launched_processes, say, shards_model
from transfer.training.checkpoints import decides_weights

PACKAGES = ["torch", "transformers", "datasets", "accelerate", "evaluate", "huggingface_hub", "pandas", "numpy"]
PACKAGES += ["pillow", "safetensors"]

# What else must be equal for bit-for-bit equal results: the machine, arguments, code, versions and initial weights.
ENVIRONMENT = ("precision", "device", "platform", "processes")
DATA = {
    "data_fingerprint": "the images differ",
    "split_fingerprint": "the split into training, validation and test images differs",
}
NUMBER_ARGUMENTS = ("do_train", "per_device_eval_batch_size")  # they change the metrics, but not the weights
REPEAT_ARGUMENTS = ("seed", "seeds", "fold")  # they differ between the trainings of a repeated run
TIMES = ("samples_per_second", "seconds")  # metrics that are not compared
PACKAGES_NAMED = 8  # changed packages that are named one by one


def describe_code() -> dict:
    """The `fingerprint` of the code, its `commit`, and whether it is `clean`: without uncommitted changes.

    Without git, the last two are None.
    """
    digests = [digest_of_folder(PROJECT, "*.py"), digest_of_folder(PROJECT / "transfer", "**/*.py")]
    status, commit = run_git("status", "--porcelain", "--untracked-files=no"), run_git("rev-parse", "HEAD")
    return {
        "fingerprint": hashlib.sha256("".join(digests).encode()).hexdigest(),
        "commit": None if commit is None else commit.decode().strip(),
        "clean": None if status is None else not status.strip(),
    }


def describe_device() -> str:
    """The GPUs, or the CPU with its number of threads."""
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    threads = torch.get_num_threads()
    return f"CPU, {model}, {threads} thread{'s' * (threads > 1)}"


def _place_of(file: str) -> str:
    """One of the project's files as a path from the current folder."""
    try:
        return Path(os.path.relpath(PROJECT / file)).as_posix()
    except ValueError:  # it is on another drive of Windows
        return file


def describe_command(words: Sequence[str]) -> str:
    """The command line that repeats a run with these words in this folder, with the launcher if one started it.

    The run may also have been started by `main(words)`, from Python or a notebook.
    """
    script = [_place_of("finetune_vit.py"), *map(str, words)]
    if os.environ.get("ACCELERATE_MIXED_PRECISION") is None:
        return shlex.join(["python", *script])
    launcher = ["accelerate", "launch", "--config_file", _place_of("accelerate_config.yaml")]
    if (processes := launched_processes()) > 1:
        kind = "fsdp" if shards_model() else "multi_gpu"
        launcher[-1:] = [_place_of(f"recipes/accelerate/{kind}.yaml"), "--num_processes", str(processes)]
    return shlex.join([*launcher, *script])


def describe_versions() -> dict[str, str]:
    """Versions of Python and of the packages that the results depend on."""
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in PACKAGES}


def describe_packages() -> dict[str, str]:
    """Every installed package with its version."""
    found = {d.name: d.version for d in importlib.metadata.distributions() if d.name}
    return dict(sorted(found.items(), key=lambda item: item[0].lower()))


def make_record(
    command: str,
    arguments: Mapping,
    precision: str,
    data_fingerprint: str,
    split_fingerprint: str,
    start_fingerprint: str,
) -> dict:
    """The part of run.json that is known before training; `start_fingerprint` is that of the initial weights."""
    name = arguments["model_name_or_path"]
    return {
        "command": command,
        "folder": Path(hide_home(str(Path.cwd()))).name,  # where the command was given
        "arguments": dict(arguments),
        "precision": precision,
        "local_model": is_offline(name) or Path(name).exists(),
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
    """Write run.json, which marks a run as finished."""
    write_atomically(folder / "run.json", json.dumps(record, indent=2) + "\n")


def extend_record(folder: Path, **facts) -> None:
    """Add facts to a written run.json, such as the link of the pushed model."""
    write_record(folder, read_json(folder / "run.json") | facts)


def read_record(path: Path) -> dict:
    """Read the run.json of a finished run. Raises `UserError` if it is not one, or has no metrics.json beside it."""
    hint = "give the run.json of a finished run, such as outputs/sample/run.json"
    record = read_json(path, hint)
    if not {"arguments", "versions", *DATA} <= record.keys():
        raise UserError(f"{path}: is not a run.json of this project; {hint}")
    if not path.with_name(METRICS_FILE).is_file():
        raise UserError(f"{path}: the run's {METRICS_FILE} is not in the same folder; copy both files")
    return record


def find_run_of(model: Path) -> Path | None:
    """The folder of the run that made a model folder; None if there is none, or if the weights have changed since."""
    folder = model.expanduser().parent
    try:
        record = read_json(folder / "run.json")
    except UserError:
        return None
    unchanged = record.get("weights_sha256") == digest_of_folder(model.expanduser(), "*.safetensors")
    return folder if unchanged else None


def check_data(then: Mapping, now: Mapping) -> None:
    """Refuse to reproduce a run with other data. Raises `UserError`."""
    for name, what in DATA.items():
        if then[name] != now[name]:
            raise UserError(
                f"--data_dir {now['arguments']['data_dir']}: {what} from the recorded run "
                f"({name} {now[name][:12]}, recorded {then[name][:12]}); nothing was trained"
            )


def _commit(code: Mapping) -> str:
    return f"{code.get('commit')}{' with uncommitted changes' if code.get('clean') is False else ''}"


def _changed(then: Mapping, now: Mapping) -> list[str]:
    names, missing = sorted({*then, *now}, key=str.lower), "not installed"
    return [f"{n} {then.get(n, missing)} -> {now.get(n, missing)}" for n in names if then.get(n) != now.get(n)]


def _changed_arguments(then: Mapping, now: Mapping, ignored: Sequence[str]) -> list[str]:
    """Changed arguments that may change the results; those that only one version of the project has are left out."""
    shared = [n for n in then if n in now and (decides_weights(n) or n in NUMBER_ARGUMENTS) and n not in ignored]
    return _changed({n: then[n] for n in shared}, {n: now[n] for n in shared})


def _changed_packages(then: Mapping, now: Mapping) -> list[str]:
    """Lines about changed versions: of the packages that the results depend on, and of all others."""
    lines = []
    if versions := _changed(then["versions"], now["versions"]):
        lines.append(f"versions: {', '.join(versions)}")
    packages = _changed(then.get("packages", {}), now["packages"])
    if others := [change for change in packages if change not in versions]:
        more = f" and {len(others) - PACKAGES_NAMED} more" * (len(others) > PACKAGES_NAMED)
        lines.append(f"other packages: {', '.join(others[:PACKAGES_NAMED])}{more}")
    return lines


def describe_differences(then: Mapping, now: Mapping, part: bool = False) -> list[str]:
    """What differs from the recorded run, one line each; empty if the results must be equal bit for bit.

    `now` may be `part` of a run: one of its seeds or folds.
    """
    lines = [f"{name} {then.get(name)} -> {now.get(name)}" for name in ENVIRONMENT if then.get(name) != now.get(name)]
    if arguments := _changed_arguments(then["arguments"], now["arguments"], REPEAT_ARGUMENTS if part else ()):
        lines.append(f"arguments: {', '.join(arguments)}")
    if unknown := sorted(then["arguments"].keys() - now["arguments"].keys()):
        lines.append(f"arguments that this version does not have: {', '.join(unknown)}")
    code = then.get("code") or {}
    if code.get("fingerprint") != now["code"]["fingerprint"]:
        lines.append(f"code: commit {_commit(code)} -> {_commit(now['code'])}")
    lines += _changed_packages(then, now)
    # A repeated run records the initial weights of all its trainings together.
    if not part and then.get("start_fingerprint") != now["start_fingerprint"]:
        lines.append("initial weights: a different checkpoint, or a head that was initialized differently")
    if then["arguments"].get("max_minutes"):
        lines.append("--max_minutes: the number of training steps depends on the speed of the machine")
    return lines


def compare_environment(path: Path, now: Mapping, part: bool = False) -> list[str]:
    """What differs from the run with the run.json at `path`, one line each. Raises `UserError` for other data."""
    then = read_record(path)
    check_data(then, now)
    return describe_differences(then, now, part) or ["nothing: the results must be the same bit for bit"]


def _short(value) -> str:
    return f"{value:.6f}" if isinstance(value, float) else str(value)[:12]


@dataclass(frozen=True)
class NumberComparison:
    """A number or hash of the recorded run, and the same of the new one."""

    name: str
    then: object
    now: object
    spread: tuple[float, float] | None = None  # recorded range in which another value counts as reproduced

    @property
    def verdict(self) -> str:
        if self.then == self.now:
            return "same"
        if self.spread and isinstance(self.now, (int, float)) and self.spread[0] <= self.now <= self.spread[1]:
            return "within"
        return "differs"

    def __str__(self) -> str:
        if self.verdict == "same":
            return f"same        {self.name} {_short(self.then)}"
        where = f", recorded spread {self.spread[0]:.4f} to {self.spread[1]:.4f}" if self.spread else ""
        return f"{self.verdict:<11} {self.name} {_short(self.then)} -> {_short(self.now)}{where}"


def _flatten(content: Mapping, prefix: str = "") -> Iterator[tuple[str, float]]:
    """Dotted name and value of every number, without times and without the numbers of each seed or fold."""
    for name, value in content.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{name}.")
        elif isinstance(value, (int, float)) and name not in TIMES:
            yield f"{prefix}{name}", value


def _spreads(metrics: RunMetrics) -> dict[str, tuple[float, float]]:
    """By dotted name: two standard deviations over repeats, or the interval of a single run's validation accuracy."""
    low, high = metrics.validation.accuracy_ci95
    spreads, numbers = {"validation.accuracy": (low, high)}, dict(_flatten(metrics.to_json()))
    for name, value in numbers.items():
        if (deviation := numbers.get(f"std.{name}")) is not None:
            spreads[name] = value - 2 * deviation, value + 2 * deviation
    return spreads


def compare_metrics(then: RunMetrics, now: RunMetrics) -> list[NumberComparison]:
    """Every number of the recorded metrics, compared with the same of the new ones."""
    found, spreads = dict(_flatten(now.to_json())), _spreads(then)
    return [
        NumberComparison(name, value, found.get(name), spreads.get(name)) for name, value in _flatten(then.to_json())
    ]


def compare_records(then: Mapping, now: Mapping) -> list[NumberComparison]:
    """The training steps and the hashes of weights and csv of two run.json."""
    names = ("optimizer_steps", "weights_sha256", "submission_sha256")
    return [NumberComparison(name, then[name], now.get(name)) for name in names if then.get(name) is not None]


def is_reproduced(differences: Sequence[str], comparisons: Sequence[NumberComparison]) -> bool:
    """Whether everything is equal, or, if something differs, the validation accuracy is within its recorded spread."""
    if not differences:
        return all(c.verdict == "same" for c in comparisons)
    return all(c.verdict != "differs" for c in comparisons if c.name == "validation.accuracy")


def describe_outcome(differences: Sequence[str], comparisons: Sequence[NumberComparison]) -> list[str]:
    """One line per comparison, and a last line with the outcome."""
    same, total = sum(c.verdict == "same" for c in comparisons), len(comparisons)
    if not is_reproduced(differences, comparisons):
        alone = "" if differences else ", although data, code, arguments and environment are the same"
        end = f"not reproduced: {total - same} of {total} numbers and hashes differ{alone}"
    elif differences:
        end = f"reproduced  within the recorded spread: {same} of {total} numbers and hashes are the same"
    else:
        end = f"reproduced  bit for bit: all {total} numbers and hashes are the same"
    return [*map(str, comparisons), end]


def report_reproduction(then: Path, now: Path) -> int:
    """Print the comparison of two runs, given their run.json; returns the exit code: 0 if the first is reproduced."""
    before, after = read_record(then), read_record(now)
    differences = describe_differences(before, after)
    comparisons = compare_metrics(RunMetrics.read(then.parent), RunMetrics.read(now.parent))
    comparisons += compare_records(before, after)
    say(*describe_outcome(differences, comparisons))
    return 0 if is_reproduced(differences, comparisons) else 1
