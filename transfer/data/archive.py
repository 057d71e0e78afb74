"""Safe extraction of the data set's zip as downloaded."""

import hashlib
import lzma
import shutil
import stat
import zipfile
import zlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import datasets
from filelock import FileLock
from tqdm.auto import tqdm

from transfer import UserError

# The competition's zip holds 0.1 GB; ImageNet itself would be 150 GB, which nobody trains on from a zip.
MAX_TOTAL_BYTES = 20 * 2**30
# Photographs hardly shrink; deflate's limit is 1032. Small members may be tables of zeros.
MAX_RATIO, RATIO_CHECKED_FROM = 200, 10 * 2**20

READ_BYTES = 2**20

# What reading changed bytes raises, besides OSError: a changed version number is taken for an unknown format.
DAMAGE = (
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    EOFError,
    NotImplementedError,
    UnicodeDecodeError,
)


def _list_members(path: Path) -> list[zipfile.ZipInfo]:
    """Members to extract. Raises `UserError` if the file is no whole zip."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except DAMAGE as fault:
        raise UserError(f"{path}: is no zip or was cut short ({fault}); download it again") from None
    except OSError as fault:
        raise UserError(f"{path}: cannot be read ({fault.strerror})") from None
    return [m for m in members if not m.filename.startswith("__MACOSX/")]


def _fault_of(member: zipfile.ZipInfo) -> str | None:
    """Why a member must not be extracted, or None."""
    # ZipInfo turns the system's separators into "/" and cuts at a NUL; the name as stored is the one to judge.
    name = member.orig_filename
    if not name:
        return "has no name"
    if name.startswith("/") or ":" in name or "\\" in name or "\0" in name:
        return "has an absolute or foreign path"
    if ".." in name.split("/"):
        return "would be written outside the folder"
    if stat.S_ISLNK(member.external_attr >> 16):
        return "is a symbolic link"
    if member.flag_bits & 0x1:
        return "is encrypted"
    if member.file_size > RATIO_CHECKED_FROM and member.file_size > MAX_RATIO * max(member.compress_size, 1):
        return f"would grow more than {MAX_RATIO}-fold"
    return None


def _check_members(path: Path, members: Sequence[zipfile.ZipInfo]) -> None:
    """Refuse a zip that could write elsewhere, fill the disk or mean two things. Raises `UserError`."""
    if not members:
        raise UserError(f"{path}: is an empty zip")
    for member in members:
        if fault := _fault_of(member):
            raise UserError(f"{path}: member '{member.filename}' {fault}; nothing was extracted")
    name, count = Counter(m.filename for m in members).most_common(1)[0]
    if count > 1:
        raise UserError(f"{path}: member '{name}' is there {count} times; nothing was extracted")
    total = sum(m.file_size for m in members)
    if total > MAX_TOTAL_BYTES:
        raise UserError(f"{path}: would unpack to {total / 2**30:.0f} GiB; nothing was extracted")


def _check_space(path: Path, members: Sequence[zipfile.ZipInfo], target: Path) -> None:
    # A file takes whole blocks of 4 KiB.
    needed = sum(-(-m.file_size // 4096) * 4096 for m in members)
    free = shutil.disk_usage(target).free
    if needed > free:
        raise UserError(f"{path}: needs {needed / 2**20:.0f} MiB in {target}, where {free / 2**20:.0f} MiB are free")


def _content_key(members: Sequence[zipfile.ZipInfo]) -> str:
    """Hash of the names, sizes and checksums that the zip's directory lists: the same for a copy elsewhere."""
    digest = hashlib.blake2b(digest_size=8)
    for m in members:
        digest.update(f"{m.filename}\0{m.file_size}\0{m.CRC}\n".encode())
    return digest.hexdigest()


def _write_members(path: Path, members: Sequence[zipfile.ZipInfo], target: Path) -> None:
    files = [m for m in members if not m.is_dir()]
    for folder in {target / m.filename if m.is_dir() else (target / m.filename).parent for m in members}:
        folder.mkdir(parents=True, exist_ok=True)
    # What ZipFile.extract does for each member besides (cleaning the name, making folders) was done for all above.
    with zipfile.ZipFile(path) as archive:
        for member in tqdm(files, desc="unpacking", unit=" files", leave=False, disable=None):
            try:
                with archive.open(member) as packed, open(f"{target}/{member.filename}", "xb") as file:  # noqa: PTH123
                    shutil.copyfileobj(packed, file, READ_BYTES)
            except DAMAGE as fault:
                raise UserError(
                    f"{path}: member '{member.filename}' is damaged ({fault}); download it again"
                ) from None


def _extract(path: Path, members: Sequence[zipfile.ZipInfo], target: Path) -> None:
    """Extract beside the target and move it there whole."""
    unfinished = target.with_name(f"{target.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)  # of a process that was killed: the lock is ours
    _check_space(path, members, target.parent)
    try:
        _write_members(path, members, unfinished)
        unfinished.rename(target)
    except OSError as fault:
        raise UserError(f"{path}: cannot be unpacked to {target} ({fault.strerror or fault})") from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def extract_zip(zip_path: Path, cache_dir: Path | None = None) -> Path:
    """Unpack a zip into the datasets cache, once; returns the folder with its content.

    The folder is named after what the zip holds, so that a copy elsewhere finds it and a changed zip does not, and it
    exists only whole. Raises `UserError`, with nothing written, for a zip that is damaged, encrypted, far too large,
    or has members outside the folder, symbolic links or two members of one name.
    """
    members = _list_members(zip_path)
    _check_members(zip_path, members)
    cache_dir = cache_dir or Path(datasets.config.HF_DATASETS_CACHE) / "finetune-vit" / "unpacked"
    target = cache_dir / f"{zip_path.stem}-{_content_key(members)}"
    if target.is_dir():
        return target
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
    except OSError as fault:
        raise UserError(f"{cache_dir}: cannot be made ({fault.strerror}); HF_DATASETS_CACHE names another") from None
    with FileLock(f"{target}.lock"):
        if not target.is_dir():
            _extract(zip_path, members, target)
    return target
