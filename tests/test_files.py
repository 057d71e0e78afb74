"""Folders that are built once, free space, and json files of a run."""

import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from transfer import files
from transfer.errors import UserError, exits_cleanly


def test_a_folder_that_cannot_be_built_names_the_variable_that_moves_it(tmp_path):
    def fill_the_disk(folder):
        (folder / "half").touch()
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match=r"No space left on device.*; HF_DATASETS_CACHE chooses another place"):
        files.build_folder_once(tmp_path / "thing", fill_the_disk, "HF_DATASETS_CACHE")
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == []


@pytest.mark.parametrize("fault", [UserError("bad"), KeyboardInterrupt(), MemoryError()])
def test_other_exceptions_of_a_build_pass_and_leave_nothing(tmp_path, fault):
    def fail(folder):
        (folder / "half").touch()
        raise fault

    with pytest.raises(type(fault)):
        files.build_folder_once(tmp_path / "thing", fail)
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == []


def test_a_folder_that_is_there_is_returned_without_the_lock(tmp_path, monkeypatch):
    folder = files.build_folder_once(tmp_path / "thing", lambda folder: (folder / "whole").touch())
    monkeypatch.setattr(files, "FileLock", lambda _: pytest.fail("it asked for the lock"))
    assert files.build_folder_once(folder, lambda folder: pytest.fail("built again")) == folder


def test_a_folder_appears_only_when_it_is_complete(tmp_path):
    place, seen = tmp_path / "thing", []
    files.build_folder_once(place, lambda folder: seen.append(folder != place and not place.exists()))
    assert seen == [True] and place.is_dir()


def test_too_little_space_is_said_in_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(2**30, 0, 2**20))
    files.check_free_space(tmp_path, 2**20, "the cache")
    with pytest.raises(UserError) as refused:
        files.check_free_space(tmp_path, 2**22, "the cache", "HF_HOME chooses another place")
    message = f"the cache needs 4 MiB in {tmp_path}, where 1 MiB are free; HF_HOME chooses another place"
    assert str(refused.value) == message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"cannot be read \(No such file"),
        (b"{", "is not valid json"),
        (b"\xff", "is not valid json"),
        (b"[1]", "holds a list, but a json object is expected"),
    ],
)
def test_a_json_file_that_is_not_one_is_named_with_a_hint(tmp_path, content, message):
    path = tmp_path / "run.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=rf"run\.json: {message}.*; name a run's folder"):
        files.read_json(path, "name a run's folder")


@pytest.fixture
def lock_of(tmp_path):
    """lock_of(**changes): the lock of this process in tmp_path, with some of its facts changed."""

    def write(**changes):
        facts = json.loads(files.FolderLock(tmp_path).content) | changes
        (tmp_path / files.LOCK).write_text(json.dumps(facts))
        return tmp_path / files.LOCK

    return write


def claim(folder):
    """Claim a folder as a command does, which gives it back at its end."""
    exits_cleanly(lambda: files.claim_output_dir(folder, resuming=False))()


def test_a_folder_in_use_names_its_owner_until_the_owner_ends(tmp_path, capsys):
    @exits_cleanly
    def run():
        files.claim_output_dir(tmp_path / "out", resuming=False)
        with pytest.raises(SystemExit) as refused:
            claim(tmp_path / "out")
        assert refused.value.code == 2
        assert f"out: is in use by another run, process {os.getpid()} on " in capsys.readouterr().err
        raise UserError("the owner fails")

    with pytest.raises(SystemExit):
        run()
    assert list((tmp_path / "out").iterdir()) == []
    claim(tmp_path / "out")


def test_the_lock_of_a_dead_process_is_stale(tmp_path, lock_of):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, dead.pid, os.WEXITED | os.WNOWAIT)
    lock_of(pid=dead.pid, started=files._start_of(os.getpid()))  # a zombie: its launcher has not noticed
    claim(tmp_path)
    dead.wait()
    lock_of(pid=dead.pid)
    claim(tmp_path)
    lock_of(started="1")  # the number went to another process
    claim(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("part", ["seed-1", "fold-2"])
def test_a_part_of_a_run_belongs_to_it(tmp_path, lock_of, part, capsys):
    lock_of()
    with pytest.raises(SystemExit):
        claim(tmp_path / part)
    assert "is in use by another run" in capsys.readouterr().err and not (tmp_path / part).exists()


def test_a_run_waits_for_the_parts_that_others_are_training(tmp_path, lock_of):
    lock = lock_of()
    (tmp_path / "whole" / "seed-1").mkdir(parents=True)
    lock.rename(tmp_path / "whole" / "seed-1" / files.LOCK)
    with pytest.raises(UserError, match="seed-1: is in use by another run"):
        files.lock_output_dir(tmp_path / "whole")


@pytest.mark.parametrize("content", ["elsewhere", "empty"])
def test_a_lock_of_another_machine_is_stale_if_nobody_touches_it(tmp_path, lock_of, content, monkeypatch, capsys):
    lock = lock_of(machine="another boot", host="node7", pid=4711)
    if content == "empty":
        lock.write_text("")
    waited = []
    monkeypatch.setattr(files, "_seconds_untouched", lambda path: 25.0 * len(waited))
    monkeypatch.setattr(files.time, "sleep", waited.append)
    claim(tmp_path)
    assert len(waited) == 3 and capsys.readouterr().out.count("alive?") == 1


def test_a_lock_of_another_machine_that_is_touched_is_refused(tmp_path, lock_of, monkeypatch):
    lock = lock_of(machine="another boot", host="node7", pid=4711)
    monkeypatch.setattr(files.time, "sleep", lambda _: os.utime(lock, (1, lock.stat().st_mtime + 10)))
    with pytest.raises(UserError, match=r"in use by another run, process 4711 on node7 since .*; wait for it"):
        files.lock_output_dir(tmp_path)


def hide_processes(monkeypatch):
    """As /proc that is mounted with hidepid, where another user's processes are not listed."""
    read, myself = Path.read_bytes, Path(f"/proc/{os.getpid()}/stat")

    def read_own(path):
        if path.name == "stat" and path != myself:
            raise FileNotFoundError(path)
        return read(path)

    def refuse(pid, number):
        raise PermissionError

    monkeypatch.setattr(Path, "read_bytes", read_own)
    monkeypatch.setattr(files.os, "kill", refuse)


def test_a_process_that_cannot_be_looked_up_is_alive_while_its_lock_is_touched(tmp_path, lock_of, monkeypatch):
    lock = lock_of(pid=os.getppid(), started="4711")
    hide_processes(monkeypatch)
    monkeypatch.setattr(files.time, "sleep", lambda _: os.utime(lock, (1, lock.stat().st_mtime + 10)))
    with pytest.raises(UserError, match="in use by another run"):
        files.lock_output_dir(tmp_path)
    monkeypatch.setattr(files, "_seconds_untouched", lambda path: 100.0)
    claim(tmp_path)


def test_a_lock_is_touched_while_its_owner_lives(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "HEARTBEAT_SECONDS", 0.01)
    lock, touched = files.FolderLock(tmp_path), threading.Event()
    monkeypatch.setattr(files.os, "utime", lambda path: touched.set())
    lock.acquire()
    assert touched.wait(5)
    lock.release()


def test_of_many_that_find_a_stale_lock_one_gets_the_folder(tmp_path, lock_of):
    lock_of(started="1")
    locks, refused = [files.FolderLock(tmp_path) for _ in range(8)], []

    def acquire(lock):
        try:
            lock.acquire()
        except UserError:
            refused.append(lock)

    threads = [threading.Thread(target=acquire, args=(lock,)) for lock in locks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(refused) == 7
    for lock in locks:
        lock.release()
    assert list(tmp_path.iterdir()) == []
