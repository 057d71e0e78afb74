"""What a run leaves behind: its folder, files that are written whole or not at all, and run.json."""

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from transfer import UserError
from transfer.training.processes import launched_processes, shards_model

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


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def save_whole_folder(place: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a new folder and put it in its place, over what was there, only when it is whole."""
    unfinished, replaced = (place.with_name(f".{place.name}.{end}") for end in ("tmp", "old.tmp"))
    for leftover in (unfinished, replaced):
        shutil.rmtree(leftover, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        write(unfinished)
        if place.exists():
            place.rename(replaced)  # deleted in its place, it would be half a folder for a while
        unfinished.rename(place)
        shutil.rmtree(replaced, ignore_errors=True)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


# What a stopped run leaves.
UNFINISHED = ["checkpoint-*/trainer_state.json", *(f"{part}-*/**/trainer_state.json" for part in ("seed", "fold"))]


def is_finished(folder: Path) -> bool:
    """Whether a run wrote all that it leaves into a folder: the model and, where there is one, the csv of its record.

    One that went on from its end and was killed leaves the record and the csv of before beside a newer model.
    """
    try:
        record = json.loads((folder / "run.json").read_text())
        submission = (folder / "submission.csv").read_bytes() if "submission_sha256" in record else None
    except (OSError, ValueError):
        return False
    if submission is not None and hashlib.sha256(submission).hexdigest() != record["submission_sha256"]:
        return False
    weights = record.get("weights_sha256")
    return weights is None or digest_of_folder(folder / "model", "*.safetensors") == weights


def claim_output_dir(folder: Path, resuming: bool) -> None:
    """Make the output folder, refusing one in which another run lies. Raises `UserError`."""
    if not resuming and is_finished(folder):
        raise UserError(
            f"{folder}: holds a finished run; choose another --output_dir or remove it "
            "(--resume_from_checkpoint true goes on from its last checkpoint)"
        )
    if not resuming and any(any(folder.glob(state)) for state in UNFINISHED):
        raise UserError(
            f"{folder}: holds an unfinished run; go on with --resume_from_checkpoint true, or remove the folder"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as fault:
        raise UserError(f"--output_dir {folder}: cannot be written ({fault.strerror})") from None


def digest_of_folder(folder: Path, pattern: str) -> str:
    """sha256 over the files of a folder that fit a pattern, by name and content."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob(pattern)):
        digest.update(f"{path.name}\n".encode())
        with path.open("rb") as file:
            while block := file.read(2**20):
                digest.update(block)
    return digest.hexdigest()


def _git(*words: str) -> str | None:
    root = Path(__file__).resolve().parent.parent
    try:
        return subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def describe_code() -> dict:
    """Hash of the code that ran; its commit and whether that is all of it, None where there is no git."""
    root = Path(__file__).resolve().parent.parent
    digests = [digest_of_folder(root, "*.py"), digest_of_folder(root / "transfer", "*.*")]
    status = _git("status", "--porcelain", "--untracked-files=no")
    return {
        "fingerprint": hashlib.sha256("".join(digests).encode()).hexdigest(),
        "commit": _git("rev-parse", "HEAD"),
        "clean": None if status is None else status == "",
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


def describe_arguments(*groups) -> dict:
    """Dataclass arguments as plain values; tokens are left out."""
    values = {}
    for group in groups:
        for field in dataclasses.fields(group):
            value = getattr(group, field.name)
            if field.init and "token" not in field.name:
                values[field.name] = value if isinstance(value, (bool, int, float, type(None))) else _plain(value)
    return values


def _plain(value):
    try:
        return json.loads(json.dumps(value))
    except TypeError:
        return str(value)


def describe_versions() -> Mapping[str, str]:
    """Versions of Python and of the packages that decide the numbers."""
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in PACKAGES}


def describe_packages() -> dict[str, str]:
    """Every installed package with its version, as pip freeze lists them."""
    found = {d.name: d.version for d in importlib.metadata.distributions() if d.name}
    return dict(sorted(found.items(), key=lambda item: item[0].lower()))


def fingerprint_of_weights(model: torch.nn.Module) -> str:
    """Hash of every parameter and buffer, by name and bit for bit."""
    digest = hashlib.blake2b(digest_size=16)
    for name, values in sorted(model.state_dict().items()):
        digest.update(f"{name} {values.dtype} {tuple(values.shape)}\n".encode())
        digest.update(values.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


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
    write_whole(folder / "run.json", json.dumps(record, indent=2) + "\n")


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
