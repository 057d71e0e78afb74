"""What must not leave the machine: tokens, and where on whose machine a file lay.

What a run leaves behind: its folder, files that are written whole or not at all, and run.json.

What a machine without a hub starts from: a real ImageNet backbone from PyPI, and generated sample data.

A run's results as its output folder holds them.
"""

import getpass
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path

from filelock import FileLock
from huggingface_hub import constants, get_token

from transfer.errors import UserError

PROJECT = Path(__file__).resolve().parent.parent  # where the code lies

# Weights hold no text that anybody wrote.
UNREAD_SUFFIXES = frozenset({".safetensors", ".onnx"})
# The Hub's tokens, whoever's.
TOKEN = re.compile(rb"\bhf_[A-Za-z0-9]{30,}\b")
# A web address, or an absolute path of two parts or more and its last part.
ABSOLUTE_PATH = re.compile(r"(https?://\S+)|(?<![\w:/.~<-])/(?:[^\s\"',:;/]+/)+([^\s\"',:;/]*)")


def _user_name() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container's user without a name
        return ""


def hide_home(text: str) -> str:
    """Text with "~" for the home folder."""
    home = str(Path.home())
    return re.sub(rf"{re.escape(home)}(?![\w.-])", "~", text) if len(home) > 1 else text


def anonymise(text: str) -> str:
    """Text without the home folder, other absolute paths but for their last part, and the user's name in paths.

    Web addresses stay: who owns a pushed model is no secret. For prose and JSON, not for encoded pictures.
    """
    text = re.sub(ABSOLUTE_PATH, lambda found: found[1] or found[2], hide_home(text))
    user = _user_name()
    if not user:
        return text
    return re.sub(rf"(https?://\S+)|(?<=/){re.escape(user)}(?![\w.-])", lambda found: found[1] or "user", text)


def anonymise_file(path: Path) -> None:
    """`anonymise` a text file, if it is there."""
    if path.is_file():
        write_atomically(path, anonymise(path.read_text(encoding="utf-8")))


def refuse_secrets(files: Mapping[str, Path | bytes]) -> None:
    """Refuse files that hold a token or the path of the home folder. Raises `UserError` naming the first."""
    token, home = (get_token() or "").encode(), str(Path.home()).encode()
    for name, content in files.items():
        if Path(name).suffix in UNREAD_SUFFIXES:
            continue
        data = content if isinstance(content, bytes) else content.read_bytes()
        if TOKEN.search(data) or (token and token in data):
            raise UserError(f"{name}: holds an access token, which must not leave this machine; remove it")
        if len(home) > 1 and re.search(re.escape(home) + rb"(?![\w.-])", data):
            raise UserError(f"{name}: holds the path of your home folder, which need not be public; remove it")


def write_atomically(path: Path, content: str | bytes) -> None:
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


def write_folder_atomically(place: Path, write: Callable[[Path], object]) -> None:
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


def run_git(*words: str) -> bytes | None:
    """What a git command prints in the project's folder; None where there is no git or no repository."""
    try:
        return subprocess.run(["git", *words], cwd=PROJECT, capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None


def cache_folder() -> Path:
    """Where both are kept unless told: beside the Hub's own cache, moved with it by HF_HOME."""
    return Path(constants.HF_HOME) / "finetune-vit"


def _built_once(folder: Path, build: Callable[[Path], object]) -> Path:
    """Return `folder`, made by `build(partial)` where it is missing: whole or not at all, by one process."""
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.parent / f".{folder.name}.lock"):
            if not folder.is_dir():  # another process may have built it while this one waited
                _build_and_rename(folder, build)
    except OSError as error:
        raise UserError(f"{folder} cannot be built: {error}; HF_HOME chooses another place") from error
    return folder


def _build_and_rename(folder: Path, build: Callable[[Path], object]) -> None:
    partial = folder.parent / f".{folder.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)  # left by a process that was killed
    partial.mkdir()
    try:
        build(partial)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def leave_out_places(command: str) -> str:
    """The command with files named as a stranger has them: no folder of this machine, no user's name."""

    def shorten(word: str) -> str:
        flag, mark, value = word.partition("=") if word.startswith("--") else ("", "", word)
        foreign = value.startswith(("/", "~", "..")) or value[1:3] in (":\\", ":/")
        return flag + mark + (Path(value.replace("\\", "/")).name or "." if foreign else value)

    return shlex.join(shorten(word) for word in shlex.split(command))
