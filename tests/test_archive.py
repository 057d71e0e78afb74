"""A zip is extracted once, atomically, and never outside its folder."""

import multiprocessing
import os
import shutil
import signal
import stat
import sys
import tarfile
import warnings
import zipfile
from collections import Counter, namedtuple
from pathlib import Path

import pytest
from filelock import FileLock

from transfer import files
from transfer.data import sources
from transfer.data.sources import extract_zip
from transfer.errors import UserError

FILES = {"set/wnids.txt": b"n00000001\n", "set/train/a.JPEG": bytes(range(256)), "set/empty.txt": b""}


def write_zip(path: Path, members=FILES, method: int = zipfile.ZIP_STORED) -> Path:
    """A zip of name -> content; names may be ZipInfo, and pairs may repeat a name."""
    pairs = members.items() if isinstance(members, dict) else members
    with warnings.catch_warnings(), zipfile.ZipFile(path, "w", method) as zipped:
        warnings.simplefilter("ignore")  # zipfile warns of duplicate names, which are meant here
        for name, content in pairs:
            zipped.writestr(name, content)
    return path


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def change_content(path: Path, member: str) -> None:
    """Change one byte of a stored member, so that its checksum no longer fits."""
    with zipfile.ZipFile(path) as zipped:
        at = zipped.getinfo(member).header_offset + 30 + len(member)
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def set_flags(path: Path, flags: int) -> None:
    """Set the flag bits of the first member, in its own header and in the directory."""
    data = bytearray(path.read_bytes())
    for signature, offset in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        at = data.index(signature) + offset
        data[at : at + 2] = flags.to_bytes(2, "little")
    path.write_bytes(data)


@pytest.fixture
def cache(tmp_path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def refused(cache):
    """refused(path, *words): the zip is refused with one line of these words, before anything is written."""

    def check(path: Path, *words: str) -> None:
        with pytest.raises(UserError) as refusal:
            extract_zip(path, cache)
        message = str(refusal.value)
        assert message.startswith(f"{path}: ") and "\n" not in message
        for word in words:
            assert word in message
        assert not cache.exists()

    return check


def test_what_is_unpacked_is_what_was_packed(tmp_path, cache):
    content = FILES | {"set/zeros.txt": b"0" * 100_000, "set/große Wörter.txt": "ß".encode()}
    packed = write_zip(tmp_path / "a.zip", content, zipfile.ZIP_DEFLATED)
    assert contents(extract_zip(packed, cache)) == content


def test_folder_members_become_folders(tmp_path, cache):
    packed = write_zip(tmp_path / "a.zip", {"set/": b"", "set/none/": b"", "set/a.txt": b"a"})
    folder = extract_zip(packed, cache)
    assert (folder / "set" / "none").is_dir()
    assert contents(folder) == {"set/a.txt": b"a"}


def test_the_default_place_is_the_datasets_cache(tmp_path):
    import datasets

    folder = extract_zip(write_zip(tmp_path / "my data.zip"))
    assert folder.is_relative_to(datasets.config.HF_DATASETS_CACHE)
    assert folder.name.startswith("my data-")


def test_what_a_mac_adds_is_left_out(tmp_path, cache):
    packed = write_zip(tmp_path / "a.zip", FILES | {"__MACOSX/set/._a.JPEG": b"x"})
    for _ in range(2):  # the second time, the zip is known
        ignored = Counter()
        folder = extract_zip(packed, cache, ignored)
        assert ignored == {"__MACOSX/* (hidden or left by a system)": 1}
        assert contents(folder) == FILES


def test_a_second_call_returns_the_folder_without_unpacking(tmp_path, cache, monkeypatch):
    packed = write_zip(tmp_path / "a.zip")
    folder = extract_zip(packed, cache)
    monkeypatch.setattr(sources, "_extract", lambda *_: pytest.fail("it was unpacked again"))
    assert extract_zip(packed, cache) == folder


def test_a_zip_is_unpacked_again_where_the_cache_lost_its_folder_or_what_it_remembers(tmp_path, cache):
    packed = write_zip(tmp_path / "a.zip")
    shutil.rmtree(extract_zip(packed, cache))
    assert contents(extract_zip(packed, cache)) == FILES
    [memory] = cache.glob(".*.json")
    for damaged in ('{"folder": ', "{}", "[]", "null"):
        memory.write_text(damaged)
        assert contents(extract_zip(packed, cache)) == FILES


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has file names that are not Unicode")
def test_the_name_of_a_zip_may_be_any_bytes(tmp_path, cache):
    packed = write_zip(tmp_path / os.fsdecode(b"caf\xe9.zip"))
    assert contents(extract_zip(packed, cache)) == FILES


def test_an_unpacked_zip_is_found_without_the_lock(tmp_path, cache, monkeypatch):
    packed = write_zip(tmp_path / "a.zip")
    folder = extract_zip(packed, cache)
    # A cache that others filled may be read-only.
    monkeypatch.setattr(files, "FileLock", lambda _: pytest.fail("it asked for the lock"))
    assert extract_zip(packed, cache) == folder


def test_a_copy_of_the_zip_elsewhere_finds_the_same_folder(tmp_path, cache):
    packed = write_zip(tmp_path / "a.zip")
    (tmp_path / "elsewhere").mkdir()
    copy = shutil.copy(packed, tmp_path / "elsewhere" / "a.zip")
    assert extract_zip(Path(copy), cache) == extract_zip(packed, cache)


RENAMED = {("set/other.txt" if name == "set/wnids.txt" else name): content for name, content in FILES.items()}


@pytest.mark.parametrize(
    "changed", [FILES | {"set/wnids.txt": b"n00000002\n"}, FILES | {"set/more.txt": b""}, RENAMED]
)
def test_a_changed_zip_is_unpacked_anew(tmp_path, cache, changed):
    packed = write_zip(tmp_path / "a.zip")
    before = extract_zip(packed, cache)
    write_zip(packed, changed)
    after = extract_zip(packed, cache)
    assert after != before
    assert contents(after) == changed and contents(before) == FILES


def test_a_file_that_is_not_a_zip_is_refused(tmp_path, refused):
    path = tmp_path / "a.zip"
    path.write_text("<html>please log in</html>")
    refused(path, "is not a zip file", "download it again")


@pytest.mark.parametrize("kept", [0.0, 0.3, 0.99])
def test_a_zip_that_was_cut_short_is_refused(tmp_path, refused, kept):
    path = write_zip(tmp_path / "a.zip")
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * kept)])
    refused(path, "truncated", "download it again")


def test_a_zip_of_an_unknown_version_is_refused(tmp_path, refused):
    path = write_zip(tmp_path / "a.zip")
    data = bytearray(path.read_bytes())
    data[data.index(b"PK\1\2") + 6] = 99  # one damaged byte, too
    path.write_bytes(data)
    refused(path, "zip file version", "download it again")


def test_a_member_without_a_name_is_refused(tmp_path, refused):
    refused(write_zip(tmp_path / "a.zip", [(zipfile.ZipInfo(""), b"x")]), "has no name")


def test_a_missing_zip_is_refused(tmp_path, refused):
    refused(tmp_path / "nowhere.zip", "cannot be read", "No such file")


@pytest.mark.parametrize("members", [{}, {"__MACOSX/._a": b"x"}])
def test_a_zip_without_content_is_refused(tmp_path, refused, members):
    refused(write_zip(tmp_path / "a.zip", members), "empty")


def test_encrypted_members_are_refused(tmp_path, refused):
    path = write_zip(tmp_path / "a.zip")
    set_flags(path, 0x1)
    refused(path, "set/wnids.txt", "encrypted")


@pytest.mark.parametrize("name", ["/etc/a.txt", "C:/a.txt", "C:a.txt", "set\\a.txt", "..\\a.txt"])
def test_absolute_and_non_portable_names_are_refused(tmp_path, refused, name):
    refused(write_zip(tmp_path / "a.zip", FILES | {name: b"x"}), "absolute or non-portable path")


@pytest.mark.parametrize("name", ["../a.txt", "set/../../a.txt", "set/.."])
def test_names_that_lead_outside_are_refused(tmp_path, refused, name):
    refused(write_zip(tmp_path / "a.zip", FILES | {name: b"x"}), name, "outside the folder")
    assert not (tmp_path / "a.txt").exists()


def test_dots_in_a_name_lead_nowhere_and_are_kept(tmp_path, cache):
    folder = extract_zip(write_zip(tmp_path / "a.zip", {"set/a..b.txt": b"x", "set/...": b"y"}), cache)
    assert contents(folder) == {"set/a..b.txt": b"x", "set/...": b"y"}


def test_symbolic_links_are_refused(tmp_path, refused):
    link = zipfile.ZipInfo("set/link")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    packed = write_zip(tmp_path / "a.zip", [*FILES.items(), (link, b"/etc/passwd")])
    refused(packed, "set/link", "symbolic link")


def test_two_members_of_one_name_are_refused(tmp_path, refused):
    packed = write_zip(tmp_path / "a.zip", [*FILES.items(), ("set/wnids.txt", b"other")])
    refused(packed, "set/wnids.txt", "appears 2 times")


@pytest.mark.parametrize("name", ["set//wnids.txt", "set/./wnids.txt"])
def test_two_names_of_one_file_are_refused_and_nothing_is_left(tmp_path, cache, name):
    packed = write_zip(tmp_path / "a.zip", FILES | {name: b"other"})
    with pytest.raises(UserError, match=r"a\.zip: cannot be unpacked, since several members have the same name"):
        extract_zip(packed, cache)
    assert not [p for p in cache.iterdir() if p.is_dir()]


def test_more_than_the_limit_in_total_is_refused(tmp_path, refused, monkeypatch):
    monkeypatch.setattr(sources, "MAX_TOTAL_BYTES", 265)  # the files have 10 + 256
    refused(write_zip(tmp_path / "a.zip"), "would unpack to", "more than the limit of")


def test_a_large_member_that_grows_too_much_is_refused(tmp_path, refused):
    bomb = {"set/bomb": bytes(sources.RATIO_CHECKED_FROM + 1)}  # deflate shrinks zeros a thousandfold
    refused(write_zip(tmp_path / "a.zip", FILES | bomb, zipfile.ZIP_DEFLATED), "set/bomb", "more than 200-fold")


def test_a_small_member_may_grow_as_it_likes(tmp_path, cache):
    zeros = {"set/table.txt": bytes(2**20)}
    assert contents(extract_zip(write_zip(tmp_path / "a.zip", zeros, zipfile.ZIP_DEFLATED), cache)) == zeros


def test_too_little_space_is_refused(tmp_path, cache, monkeypatch):
    usage = namedtuple("usage", "total used free")
    packed = write_zip(tmp_path / "a.zip")
    # Two files with content take a block of 4 KiB each.
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**6, 0, 2 * 4096 - 1))
    with pytest.raises(UserError, match=r"a\.zip: unpacking it needs .* MiB are free"):
        extract_zip(packed, cache)
    assert not [p for p in cache.iterdir() if p.is_dir()]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**6, 0, 2 * 4096))
    assert contents(extract_zip(packed, cache)) == FILES


def test_a_damaged_member_is_named_and_nothing_is_left(tmp_path, cache):
    packed = write_zip(tmp_path / "a.zip")
    change_content(packed, "set/train/a.JPEG")
    with pytest.raises(UserError, match=r"member 'set/train/a\.JPEG' is damaged .*download it again"):
        extract_zip(packed, cache)
    assert not [p for p in cache.iterdir() if p.is_dir()]


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA])
def test_a_damaged_compressed_member_is_named(tmp_path, cache, method):
    packed = write_zip(tmp_path / "a.zip", {"a": bytes(range(256)) * 20}, method)
    data = bytearray(packed.read_bytes())
    data[60:100] = b"\xff" * 40
    packed.write_bytes(data)
    with pytest.raises(UserError, match="member 'a' is damaged"):
        extract_zip(packed, cache)


def test_no_progress_is_drawn_into_a_log(tmp_path, cache, capfd):
    extract_zip(write_zip(tmp_path / "a.zip"), cache)
    assert capfd.readouterr() == ("", "")


def test_a_file_in_the_way_of_a_folder_is_refused_and_nothing_is_left(tmp_path, cache):
    with pytest.raises(UserError, match=r"member 'a/b' cannot be unpacked"):
        extract_zip(write_zip(tmp_path / "a.zip", {"a": b"x", "a/b": b"y"}), cache)
    assert not [p for p in cache.iterdir() if p.is_dir()]


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), MemoryError()])
def test_an_extraction_that_breaks_off_leaves_no_folder(tmp_path, cache, monkeypatch, failure):
    packed = write_zip(tmp_path / "a.zip")

    def write_one_and_fail(path, members, target):
        (target / "half").write_bytes(b"x")
        raise failure

    with monkeypatch.context() as patch:
        patch.setattr(sources, "_extract", write_one_and_fail)
        with pytest.raises(type(failure)):
            extract_zip(packed, cache)
    assert not [p for p in cache.iterdir() if p.is_dir()]
    assert contents(extract_zip(packed, cache)) == FILES


FORK = multiprocessing.get_context("fork")  # nothing is imported or computed again


def be_killed_halfway(packed, cache):
    def write_and_be_killed(path, members, target):
        (target / "set").mkdir()
        (target / "set" / "half").write_bytes(b"x")
        os.kill(os.getpid(), signal.SIGKILL)

    sources._extract = write_and_be_killed
    extract_zip(packed, cache)


def test_what_a_killed_process_left_is_neither_used_nor_kept(tmp_path, cache):
    packed = write_zip(tmp_path / "a.zip")
    process = FORK.Process(target=be_killed_halfway, args=(packed, cache))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert list(cache.rglob("half"))
    folder = extract_zip(packed, cache)
    assert contents(folder) == FILES
    assert [p for p in cache.iterdir() if p.is_dir()] == [folder]


def test_the_folder_appears_only_when_it_is_complete(tmp_path, cache, monkeypatch):
    packed = write_zip(tmp_path / "a.zip")
    target = extract_zip(packed, cache)
    shutil.rmtree(target)
    seen, write = [], sources._extract

    def write_and_look(*arguments):
        write(*arguments)
        seen.append(target.exists())

    monkeypatch.setattr(sources, "_extract", write_and_look)
    assert extract_zip(packed, cache) == target
    assert seen == [False]


def test_while_another_process_unpacks_this_one_waits(tmp_path, cache, monkeypatch):
    packed = write_zip(tmp_path / "a.zip")
    target = extract_zip(packed, cache)
    shutil.rmtree(target)
    impatient = lambda path: FileLock(path, timeout=0.05)  # noqa: E731
    monkeypatch.setattr(files, "FileLock", impatient)
    lock = FileLock(target.with_name(f".{target.name}.lock"))
    with lock, pytest.raises(UserError, match=r"lock .* could not be acquired"):
        extract_zip(packed, cache)
    assert contents(extract_zip(packed, cache)) == FILES


def test_processes_that_start_together_all_get_the_complete_folder(tmp_path, cache):
    packed = write_zip(tmp_path / "a.zip", {f"set/{i}.txt": str(i).encode() for i in range(2000)})
    ready, counts = FORK.Barrier(2), FORK.SimpleQueue()

    def extract_and_count():
        ready.wait()
        counts.put(len(list(extract_zip(packed, cache).rglob("*.txt"))))

    both = [FORK.Process(target=extract_and_count) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join()
    assert [counts.get(), counts.get()] == [2000, 2000]
    assert len([p for p in cache.iterdir() if p.is_dir()]) == 1


# Archives in archives, and of other kinds


def test_zips_in_a_zip_are_unpacked(tmp_path, cache):
    inner = write_zip(tmp_path / "train.zip", {"train/bee/1.jpg": b"1"}).read_bytes()
    outer = write_zip(tmp_path / "download.zip", {"train.zip": inner, "sample_submission.csv": b"id,label\n"})
    assert contents(extract_zip(outer, cache)) == {
        "train/train/bee/1.jpg": b"1",
        "sample_submission.csv": b"id,label\n",
    }


def test_a_lone_csv_in_a_zip_in_a_zip_gets_no_folder(tmp_path, cache):
    csv = write_zip(tmp_path / "a.zip", {"submission.csv": b"id\n", "__MACOSX/._submission.csv": b"1"}).read_bytes()
    several = write_zip(tmp_path / "b.zip", {"a.csv": b"1", "b.csv": b"2"}).read_bytes()
    members = {"set/sample_submission.csv.zip": csv, "set/train.CSV.ZIP": csv, "more.csv.zip": several, "a.zip": csv}
    assert contents(extract_zip(write_zip(tmp_path / "download.zip", members), cache)) == {
        "set/sample_submission.csv": b"id\n",
        "set/train.CSV": b"id\n",
        "more.csv/a.csv": b"1",
        "more.csv/b.csv": b"2",
        "a/submission.csv": b"id\n",
    }


def test_an_unsafe_zip_in_a_zip_is_refused(tmp_path, cache):
    inner = write_zip(tmp_path / "train.zip", {"../bee.jpg": b"1"}).read_bytes()
    with pytest.raises(UserError, match=r"train\.zip: member '\.\./bee\.jpg' would be written outside the folder"):
        extract_zip(write_zip(tmp_path / "download.zip", {"train.zip": inner}), cache)
    assert not [p for p in cache.iterdir() if p.is_dir()]


@pytest.mark.parametrize(
    ("mode", "name"), [("w:gz", "a.tar.gz"), ("w", "a.tar"), ("w:xz", "a.zip"), ("w:gz", "a.tgz")]
)
def test_a_tar_archive_is_named_as_what_it_is(mode, name, tmp_path, refused):
    (tmp_path / "picture.jpg").write_bytes(b"1")
    with tarfile.open(tmp_path / name, mode) as archive:
        archive.add(tmp_path / "picture.jpg", "picture.jpg")
    kind = "xz file" if name == "a.zip" else "tar archive"
    refused(tmp_path / name, f"is a {kind}, not a zip; unpack it, and give its folder as --data_dir")


def test_zips_in_a_zip_that_are_hidden_or_already_unpacked_stay_as_they_are(tmp_path, cache):
    members = {"._train.zip": b"resource", "train.zip": b"old", "train/bee/1.jpg": b"1"}
    assert contents(extract_zip(write_zip(tmp_path / "download.zip", members), cache)) == members
