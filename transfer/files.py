"""Files and folders: atomic writes, free space, digests, who owns an output folder, and what must stay private."""

import contextlib
import getpass
import hashlib
import json
import os
import platform
import re
import secrets
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import datasets
from filelock import FileLock
from huggingface_hub import constants, get_token

from transfer.errors import UserError, at_end

PROJECT = Path(__file__).resolve().parent.parent  # the folder that holds finetune_vit.py
READ_BYTES = 2**20

# What an interrupted run leaves in its output folder, and in those of its seeds or folds.
PARTS = ("seed", "fold")
UNFINISHED = ["checkpoint-*/trainer_state.json", *(f"{part}-*/**/trainer_state.json" for part in PARTS)]

LOCK = ".run.lock"  # in the output folder of a run that is alive
HEARTBEAT_SECONDS = 10.0  # how often a run touches its lock
STALE_SECONDS = 60.0  # a lock that was touched less recently, and whose process cannot be looked up, is stale

# Weights hold no text, so they are not searched for secrets.
UNSEARCHED_SUFFIXES = frozenset({".safetensors", ".onnx"})
HUB_TOKEN = re.compile(rb"\bhf_[A-Za-z0-9]{30,}\b")
# A web address, or an absolute path of at least two parts, with its last part as a group.
ABSOLUTE_PATH = re.compile(r"(https?://\S+)|(?<![\w:/.~<-])/(?:[^\s\"',:;/]+/)+([^\s\"',:;/]*)")


def cache_folder() -> Path:
    """The folder for what is built once and kept: beside the Hub's own cache, so that HF_HOME moves both."""
    return Path(constants.HF_HOME) / "finetune-vit"


def name_of(place: str) -> str:
    """The last part of a path, also of `.`."""
    return Path(place).name or Path(place).resolve().name


def datasets_cache(name: str) -> Path:
    """This project's folder of that name in the datasets cache, which HF_DATASETS_CACHE moves."""
    return Path(datasets.config.HF_DATASETS_CACHE) / "finetune-vit" / name


def run_git(*words: str) -> bytes | None:
    """Output of a git command in the project's folder; None without git or without a repository."""
    try:
        return subprocess.run(["git", *words], cwd=PROJECT, capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None


def read_json(path: Path, hint: str = "") -> dict:
    """Read a json object. Raises `UserError`, which ends with the hint, if it is missing or is something else."""
    hint = f"; {hint}" if hint else ""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as fault:
        raise UserError(f"{path}: cannot be read ({fault.strerror}){hint}") from None
    except ValueError as fault:
        raise UserError(f"{path}: is not valid json ({fault}){hint}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}, but a json object is expected{hint}")
    return content


def digest_of_folder(folder: Path, pattern: str) -> str:
    """sha256 over the files of a folder that match a glob pattern, by name and content."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob(pattern)):
        digest.update(f"{path.name}\n".encode())
        with path.open("rb") as file:
            while block := file.read(READ_BYTES):
                digest.update(block)
    return digest.hexdigest()


def check_free_space(folder: Path, needed_bytes: int, what: str, advice: str = "") -> None:
    """Check that a folder's disk has room for `what`. Raises `UserError`, which ends with the advice, if not."""
    free = shutil.disk_usage(folder).free
    if needed_bytes > free:
        raise UserError(
            f"{what} needs {needed_bytes / 2**20:.0f} MiB in {folder}, where {free / 2**20:.0f} MiB are free"
            f"{f'; {advice}' if advice else ''}"
        )


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file atomically: a reader, or a later run, sees the old content or the new, never a part."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def recall(path: Path) -> Any:
    """Return what `remember` wrote; None if it is not there, or another process is writing it."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None


def remember(path: Path, content: Any) -> None:
    """Write json into a cache, unless the cache is full or read-only."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(content))


def write_folder_atomically(folder: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a new, empty folder, then move it to `folder`, replacing what was there.

    If `write` raises, `folder` stays as it was and nothing else is left. What a killed process left is removed.
    """
    unfinished, replaced = (folder.with_name(f".{folder.name}.{end}") for end in ("tmp", "old.tmp"))
    for leftover in (unfinished, replaced):
        shutil.rmtree(leftover, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        write(unfinished)
        if folder.exists():
            folder.rename(replaced)  # rmtree takes a while, in which the folder would be incomplete
        unfinished.rename(folder)
        shutil.rmtree(replaced, ignore_errors=True)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def build_folder_once(
    folder: Path,
    build: Callable[[Path], object],
    variable: str = "HF_HOME",
    is_valid: Callable[[], bool] = lambda: True,
) -> Path:
    """Return `folder`; if it is missing or not valid, let `build` fill an empty folder and move that there atomically.

    Processes that ask at the same time wait for the one that builds. A valid folder is returned without the
    lock, so the cache may be read-only. If `build` raises, nothing is left: an `OSError` becomes a `UserError` that
    names the environment variable that chooses another place, every other exception passes.
    """
    if folder.is_dir() and is_valid():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f".{folder.name}.lock")):
            if not (folder.is_dir() and is_valid()):  # another process may have built it while this one waited
                write_folder_atomically(folder, build)
    except OSError as fault:
        raise UserError(f"{folder}: cannot be built ({fault}); {variable} chooses another place") from None
    return folder


def is_finished(folder: Path) -> bool:
    """Whether a folder holds a finished run: its record, and the model and the csv that the record names.

    A run that was resumed from its last checkpoint and then killed leaves the earlier record beside a newer model.
    """
    try:
        record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        submission = (folder / "submission.csv").read_bytes() if "submission_sha256" in record else None
    except (OSError, ValueError):
        return False
    if submission is not None and hashlib.sha256(submission).hexdigest() != record["submission_sha256"]:
        return False
    weights = record.get("weights_sha256")
    return weights is None or digest_of_folder(folder / "model", "*.safetensors") == weights


def _start_of(pid: int) -> str | None:
    """When a process of this machine started, in clock ticks since boot; None if there is none.

    A process that got the number of a dead one has another start. Where the system does not tell, as macOS, and Linux
    for other users' processes if /proc is mounted with hidepid, "" stands for it.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()  # the name may hold anything
        return None if fields[0] in (b"Z", b"X") else fields[19].decode()  # a zombie has ended
    except OSError:
        pass
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except OSError:  # somebody else's
        pass
    return ""


def _machine() -> str:
    """What must be equal for a process number to mean the same process: the boot, and the container."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return platform.node()


class FolderLock:
    """The right of one run to write into a folder: a file in it that names the run's process.

    A file that must not exist yet is made atomically on network file systems too. A lock whose process has ended is
    stale. The process of another machine or container cannot be looked up, and that of another user sometimes not:
    its lock is stale if it is not touched any more.
    """

    def __init__(self, folder: Path):
        self.folder, self.path = folder, folder / LOCK
        facts = {"host": platform.node(), "pid": os.getpid(), "started": _start_of(os.getpid()), "machine": _machine()}
        self.content = json.dumps(facts | {"token": secrets.token_hex(8), "since": time.strftime("%Y-%m-%d %H:%M")})
        self.released = threading.Event()

    def acquire(self) -> None:
        """Take the lock. Raises `UserError` if a run that is alive holds it, and `OSError` as `open` does."""
        place = hashlib.sha256(str(self.folder.resolve()).encode()).hexdigest()[:16]
        # Of this machine's runs that find a stale lock, one after the other looks at it: a run that has looked must
        # not remove the lock that another one has made meanwhile.
        with FileLock(Path(tempfile.gettempdir()) / f"finetune-vit-{_user_name()}-{place}.lock"):
            while True:
                try:
                    self._create()
                    break
                except FileExistsError:
                    self._remove_stale(refuse_owned(self.folder))
        threading.Thread(target=self._keep_fresh, daemon=True).start()

    def _create(self) -> None:
        """Make the lock with its content at once, by a hard link where the file system has them."""
        whole = self.path.with_name(f"{LOCK}.{secrets.token_hex(4)}")
        whole.write_text(self.content)
        try:
            os.link(whole, self.path)
        except FileExistsError:
            raise
        except OSError:
            with self.path.open("x") as file:
                file.write(self.content)
        finally:
            whole.unlink(missing_ok=True)

    def release(self) -> None:
        """Remove the lock, unless this is a fork of the process that took it."""
        if json.loads(self.content)["pid"] == os.getpid() and not self.released.is_set():
            self.released.set()
            if _read_text(self.path) == self.content:
                self.path.unlink(missing_ok=True)

    def _remove_stale(self, stale: str | None) -> None:
        """Remove a stale lock; renaming it first, because another run may have replaced it by its own meanwhile."""
        aside = self.path.with_name(f"{LOCK}.{secrets.token_hex(4)}")
        try:
            self.path.rename(aside)
        except FileNotFoundError:
            return
        if _read_text(aside) != stale and not self.path.exists():
            aside.rename(self.path)
        aside.unlink(missing_ok=True)

    def _keep_fresh(self) -> None:
        while not self.released.wait(HEARTBEAT_SECONDS):
            try:
                content = self.path.read_text()
                os.utime(self.path)
            except OSError:  # the folder was deleted, or its server does not answer
                continue
            if content not in (self.content, "") and not self.released.is_set():  # this run was suspended for long
                print(f"error: {self.folder}: another run has taken this folder over", file=sys.stderr, flush=True)
                os._exit(2)


def _read_text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return None


def _seconds_untouched(path: Path) -> float:
    """How long ago a file was touched, by the clock of its file system. Raises `OSError`."""
    probe = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
    try:
        probe.touch()
        with path.open():  # a network file system then asks its server
            return probe.stat().st_mtime - path.stat().st_mtime
    finally:
        probe.unlink(missing_ok=True)


def _is_touched(path: Path, owner: str) -> bool:
    """Whether somebody touches a lock; takes as long as it may be untouched, and says so."""
    try:
        first, said = path.stat().st_mtime, False
        while (age := _seconds_untouched(path)) <= STALE_SECONDS:
            if path.stat().st_mtime != first:
                return True
            if not said:
                print(f"waiting     {path.parent}: is {owner} alive? last seen {age:.0f} s ago", flush=True)
                said = True
            time.sleep(1)
    except FileNotFoundError:
        pass
    return False


def refuse_owned(folder: Path) -> str | None:
    """Raise `UserError` that names the owner if a run that is alive holds a folder's lock.

    Returns the text of a lock that is stale.
    """
    path = folder / LOCK
    if (content := _read_text(path)) is None:
        return None
    try:
        facts = json.loads(content)
        pid, host, since = int(facts["pid"]), str(facts["host"]), facts["since"]
    except (ValueError, KeyError, TypeError):  # its maker was killed before it wrote, or is about to write
        facts, pid, host, since = {}, 0, "", ""
    owner = f"process {pid} on {host}" if pid else "the run that made it"
    start = _start_of(pid) if facts.get("machine") == _machine() else ""
    alive = start == facts["started"] if start and facts.get("started") else start == "" and _is_touched(path, owner)
    if alive:
        raise UserError(
            f"{folder}: is in use by another run, {owner}{f' since {since}' if since else ''}; wait for it, stop it, "
            "or choose another --output_dir"
        )
    return content


def lock_output_dir(folder: Path) -> None:
    """Make the output folder, check that it can be written, and hold its lock until the command ends.

    The folders of seeds and folds belong to the run that makes them. Raises `UserError` if a run that is alive holds
    this folder, one that this is a part of, or a part of it.
    """
    parts = [path.parent for part in PARTS for path in folder.glob(f"{part}-*/{LOCK}")]
    if folder.name.partition("-")[0] in PARTS:
        parts.append(folder.parent)
    for place in parts:
        refuse_owned(place)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FolderLock(folder)
        lock.acquire()
    except OSError as fault:
        raise UserError(f"--output_dir {folder}: cannot be written ({fault.strerror})") from None
    at_end(lock.release)


def claim_output_dir(folder: Path, resuming: bool) -> None:
    """Lock the output folder, made if it is missing. Raises `UserError` if another run holds it or is held by it."""
    lock_output_dir(folder)
    has_checkpoint = any(any(folder.glob(state)) for state in UNFINISHED)
    if not resuming and is_finished(folder):
        way = " (--resume_from_checkpoint true resumes from its last checkpoint)" * has_checkpoint
        raise UserError(f"{folder}: holds a finished run; choose another --output_dir or remove it{way}")
    if not resuming and has_checkpoint:
        raise UserError(
            f"{folder}: holds an unfinished run; resume it with --resume_from_checkpoint true, or remove the folder"
        )


def _user_name() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container's user without a name
        return ""


def hide_home(text: str) -> str:
    """The text with "~" in place of the home folder."""
    home = str(Path.home())
    return re.sub(rf"{re.escape(home)}(?![\w.-])", "~", text) if len(home) > 1 else text


def anonymize(text: str) -> str:
    """The text with absolute paths cut to their last part, the home folder to "~" and the user's name to "user".

    Web addresses stay, since the owner of a pushed model is public. For prose and json, not for encoded pictures.
    """
    text = re.sub(ABSOLUTE_PATH, lambda found: found[1] or found[2], hide_home(text))
    user = _user_name()
    if not user:
        return text
    return re.sub(rf"(https?://\S+)|(?<=/){re.escape(user)}(?![\w.-])", lambda found: found[1] or "user", text)


def anonymize_file(path: Path) -> None:
    """Apply `anonymize` to a text file, if it exists."""
    if path.is_file():
        write_atomically(path, anonymize(path.read_text(encoding="utf-8")))


def leave_out_places(command: str) -> str:
    """The command with absolute paths, and those that start with ~ or .., cut to their last part."""

    def shorten(word: str) -> str:
        flag, mark, value = word.partition("=") if word.startswith("--") else ("", "", word)
        foreign = value.startswith(("/", "~", "..")) or value[1:3] in (":\\", ":/")
        return flag + mark + (Path(value.replace("\\", "/")).name or "." if foreign else value)

    return shlex.join(shorten(word) for word in shlex.split(command))


def refuse_secrets(files: Mapping[str, Path | bytes]) -> None:
    """Refuse files that hold an access token or the path of the home folder. Raises `UserError` for the first."""
    token, home = (get_token() or "").encode(), str(Path.home()).encode()
    for name, content in files.items():
        if Path(name).suffix in UNSEARCHED_SUFFIXES:
            continue
        data = content if isinstance(content, bytes) else content.read_bytes()
        if HUB_TOKEN.search(data) or (token and token in data):
            raise UserError(f"{name}: holds an access token, which must not leave this machine; remove it")
        if len(home) > 1 and re.search(re.escape(home) + rb"(?![\w.-])", data):
            raise UserError(f"{name}: holds the path of your home folder, which need not be public; remove it")
