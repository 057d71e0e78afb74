"""What must not leave the machine: tokens, and where on whose machine a file lay."""

import getpass
import re
from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import get_token

from transfer import UserError
from transfer.record import write_whole

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
        write_whole(path, anonymise(path.read_text(encoding="utf-8")))


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
