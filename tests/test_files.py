"""Folders that are built once, free space, and json files of a run."""

import shutil

import pytest

from transfer import files
from transfer.errors import UserError


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
