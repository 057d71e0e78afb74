"""What unpacking a zip must refuse, and that it leaves a whole folder or none."""

import stat
import zipfile

import pytest

from transfer import UserError, archive
from transfer.archive import extract_zip


def make_zip(path, members):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        for member, content in members:
            packed.writestr(member, content)
    return path


def left_in(folder):
    return [p for p in folder.rglob("*") if p.suffix != ".lock"] if folder.exists() else []


def link(name):
    member = zipfile.ZipInfo(name)
    member.external_attr = (stat.S_IFLNK | 0o777) << 16
    return member


REFUSALS = {
    "absolute": ([("/etc/x", b"x")], "has an absolute or foreign path"),
    "drive": ([("C:/x", b"x")], "has an absolute or foreign path"),
    "backslash": ([("a\\..\\x", b"x")], "has an absolute or foreign path"),
    "parent": ([("a/../../x", b"x")], "would be written outside the folder"),
    "link": ([(link("a"), b"/etc/passwd")], "is a symbolic link"),
    "twice": ([("a", b"1"), ("a", b"2")], "member 'a' is there 2 times"),
    "bomb": ([("a", bytes(11 * 2**20))], "would grow more than 200-fold"),
    "empty": ([], "is an empty zip"),
}


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("kind", REFUSALS)
def test_a_dangerous_zip_is_refused_and_nothing_is_written(kind, tmp_path):
    members, message = REFUSALS[kind]
    path = make_zip(tmp_path / "data.zip", members)
    with pytest.raises(UserError, match=message):
        extract_zip(path, tmp_path / "cache")
    assert not left_in(tmp_path / "cache")


def test_a_file_that_is_no_zip_or_was_cut_short_is_refused(tmp_path):
    whole = make_zip(tmp_path / "whole.zip", [("a/b", b"content")]).read_bytes()
    for content in (b"hello", whole[: len(whole) // 2], b""):
        path = tmp_path / "data.zip"
        path.write_bytes(content)
        with pytest.raises(UserError, match="is no zip or was cut short"):
            extract_zip(path, tmp_path / "cache")


def test_an_encrypted_member_is_refused(tmp_path):
    content = bytearray(make_zip(tmp_path / "data.zip", [("a", b"secret")]).read_bytes())
    content[6] |= 1  # the flag in the member's own header
    content[content.index(b"PK\x01\x02") + 8] |= 1  # and in the directory
    (tmp_path / "data.zip").write_bytes(content)
    with pytest.raises(UserError, match="is encrypted"):
        extract_zip(tmp_path / "data.zip", tmp_path / "cache")


def test_a_damaged_member_is_named_and_leaves_nothing(tmp_path):
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as packed:
        packed.writestr("good", b"1" * 100)
        packed.writestr("bad", b"findme" * 100)
    content = (tmp_path / "data.zip").read_bytes().replace(b"findme", b"FINDME", 1)
    (tmp_path / "data.zip").write_bytes(content)
    with pytest.raises(UserError, match="member 'bad' is damaged"):
        extract_zip(tmp_path / "data.zip", tmp_path / "cache")
    assert not left_in(tmp_path / "cache")


def test_a_full_disk_is_noticed_before_unpacking(tmp_path, monkeypatch):
    path = make_zip(tmp_path / "data.zip", [("a", b"x" * 5000)])
    usage = archive.shutil._ntuple_diskusage(10, 9, 1)
    monkeypatch.setattr(archive.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(UserError, match="where 0 MiB are free"):
        extract_zip(path, tmp_path / "cache")


def test_a_zip_is_unpacked_once_and_a_changed_one_anew(tmp_path, monkeypatch):
    path = make_zip(tmp_path / "data.zip", [("a/b", b"1"), ("__MACOSX/a/._b", b"x")])
    first = extract_zip(path, tmp_path / "cache")
    assert [p.name for p in sorted(first.rglob("*"))] == ["a", "b"]
    with monkeypatch.context() as patch:
        patch.setattr(archive, "_write_members", None)
        assert extract_zip(path, tmp_path / "cache") == first
    make_zip(path, [("a/b", b"2")])
    assert extract_zip(path, tmp_path / "cache") != first


def test_a_killed_extraction_is_never_taken_for_a_whole_one(tmp_path, monkeypatch):
    path = make_zip(tmp_path / "data.zip", [("a/b", b"1"), ("a/c", b"2")])
    with monkeypatch.context() as patch:
        # What a kill leaves: the unfinished folder, which nothing tidied up.
        patch.setattr(archive.shutil, "rmtree", lambda *args, **kwargs: None)
        patch.setattr(archive.Path, "rename", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            extract_zip(path, tmp_path / "cache")
    assert left_in(tmp_path / "cache")
    whole = extract_zip(path, tmp_path / "cache")
    assert (whole / "a" / "c").read_bytes() == b"2"
    assert len([p for p in (tmp_path / "cache").iterdir() if p.is_dir()]) == 1
