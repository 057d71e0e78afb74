"""The model link: a saved model folder pushed to the Hugging Face Hub in one commit, and read back."""

import json
import re
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelInfo, get_token
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # of whichever httpx the client is built on
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
)
from huggingface_hub.utils import validate_repo_id
from huggingface_hub.utils.sha import sha_fileobj
from transformers import pipeline

from transfer.errors import UserError
from transfer.files import refuse_secrets

# Seconds before another try where the client does not try again itself; its own 23 s come on top where it does.
WAITS = (2, 8, 20)
TRANSIENT_STATUS = frozenset({408, 429, 500, 502, 503, 504})
# hf_xet, which transfers large files, tells only in words what went wrong.
XET_STATUS = re.compile(r"HTTP status (?:client|server) error \((\d{3}) ")
XET_CUT = re.compile(r"error (?:sending request|decoding response body)")

TOKEN_ADVICE = "`hf auth login` or the variable HF_TOKEN gives one with write permission"
HUB_OWN = {".gitattributes"}  # what a repository has from the start

# Scores of one model on one machine differ by rounding alone.
SCORE_TOLERANCE = 1e-4


@dataclass(frozen=True)
class ModelLink:
    """Where a pushed model lies, to the commit."""

    repo_id: str
    commit: str
    url: str
    private: bool


def _status_of(fault: BaseException) -> int | None:
    """The HTTP status with which a request was refused, if it was answered at all."""
    if isinstance(fault, HfHubHTTPError):
        return fault.response.status_code
    told = XET_STATUS.search(str(fault))
    return int(told[1]) if told else None


def is_transient(fault: BaseException | None) -> bool:
    """Whether trying again may help: the fault is the network's or the server's, not the request's."""
    while fault is not None:
        if status := _status_of(fault):
            return status in TRANSIENT_STATUS
        if isinstance(fault, OfflineModeIsEnabled):
            return False
        if isinstance(fault, (HTTPError, ConnectionError, TimeoutError)) or XET_CUT.search(str(fault)):
            return True
        fault = fault.__cause__  # the client wraps what a transfer raised
    return False


def _one_line(fault: object) -> str:
    """A fault's text on one line, without the token that a server or a client might repeat."""
    text, token = " ".join(str(fault).split()), get_token()
    return text.replace(token, "<token>") if token else text


def explain(fault: BaseException) -> str:
    """One line on what a client's exception means for the user."""
    status = _status_of(fault)
    said = _one_line(getattr(fault, "server_message", None) or fault)
    if isinstance(fault, LocalTokenNotFoundError):
        return f"there is no token; {TOKEN_ADVICE}"
    if isinstance(fault, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set; unset it to reach the Hub"
    if status == 401:
        return f"the Hub does not accept the token ({said}); {TOKEN_ADVICE}"
    if status == 403:
        return f"the Hub refuses it ({said}); is the name yours, and may the token write?"
    cause = fault.__cause__ if status is None else None  # a transfer's fault comes wrapped
    return f"{said} ({explain(cause)})" if cause else said


def retry(action: Callable, say: Callable[[str], None]):
    """What `action` returns; after a fault that may pass it is called again, so it must be harmless to repeat."""
    for wait in (*WAITS, None):
        try:
            return action()
        except Exception as fault:
            if wait is None or not is_transient(fault):
                raise
            say(f"hub         {explain(fault)}; trying again in {wait} s")
            time.sleep(wait)


def _check_name(name: str, flag: str) -> None:
    try:
        validate_repo_id(name)
    except HFValidationError as fault:
        raise UserError(f"{flag} {name}: is no name for a repository: {_one_line(fault)}") from None
    if "/" not in name:
        raise UserError(f"{flag} {name}: give the owner too, as in me/{name}")


def check_push(repo_id: str, space_id: str | None = None, say: Callable[[str], None] = print) -> None:
    """Refuse a push that cannot succeed before hours are spent on training. Raises `UserError`.

    A Hub that cannot be reached now may be at the end of the run: that is only said.
    """
    names = {"--hub_model_id": repo_id} | ({"--hub_space_id": space_id} if space_id else {})
    for flag, name in names.items():
        _check_name(name, flag)
    try:
        who = HfApi().whoami()
    except Exception as fault:
        if not is_transient(fault):
            raise UserError(f"--push_to_hub {repo_id}: {explain(fault)}") from None
        say(f"hub         cannot be reached now ({explain(fault)}); the push is tried when the run is done")
        return
    own = [who["name"], *(org["name"] for org in who.get("orgs", []))]
    for flag, name in names.items():
        if name.split("/")[0] not in own:
            raise UserError(f"{flag} {name}: the token is {who['name']}'s; the owner must be {' or '.join(own)}")


def _open_model(api: HfApi, repo_id: str, private: bool | None, revision: str | None) -> ModelInfo:
    """Make repository and branch where they are missing; what is there then."""
    api.create_repo(repo_id, private=private, exist_ok=True)
    if revision not in (None, "main") and not revision.startswith("refs/"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    return api.model_info(repo_id, revision=revision)


def _refuse_foreign(api: HfApi, info: ModelInfo) -> None:
    """Refuse to replace what this project did not make: a name may be taken by another work of the same owner."""
    names = {file.rfilename for file in info.siblings} - HUB_OWN - {"README.md"}
    if not names:
        return
    try:
        with tempfile.TemporaryDirectory() as place:
            config = Path(api.hf_hub_download(info.id, "config.json", revision=info.sha, local_dir=place))
            ours = not {"class_ids", "wnids"}.isdisjoint(json.loads(config.read_text(encoding="utf-8")))
    except (RemoteEntryNotFoundError, ValueError):
        ours = False
    if not ours:
        raise UserError(
            f"--hub_model_id {info.id}: the name is taken by something else of yours ({', '.join(sorted(names)[:3])}"
            f"{', ...' * (len(names) > 3)}); give another name, or another --hub_revision"
        )


def _describe_visibility(info: ModelInfo, private: bool | None) -> str:
    if info.private:
        return "private: only its owner sees it"
    if private is None:
        return "public, the default: everyone sees it; --hub_private_repo true makes a new one private"
    return "public: everyone sees it"


def _list_files(folder: Path) -> dict[str, Path]:
    """Every file of a folder by its path inside, without what client and Hub keep for themselves."""
    paths = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {name: path for name, path in paths.items() if not name.startswith(".cache/") and name not in HUB_OWN}


def _commit(
    api: HfApi, repo_id: str, files: Mapping[str, Path | bytes], revision: str | None = None, kind: str = "model"
) -> str:
    """The hash of the one commit after which the repository holds these files and nothing else.

    upload_folder may split an upload into several commits. If the files are there already, that is the last commit.
    """
    # Asked anew at every try: a commit whose answer was lost has moved the branch.
    info = api.repo_info(repo_id, repo_type=kind, revision=revision)
    stale = [file.rfilename for file in info.siblings if file.rfilename not in files.keys() | HUB_OWN]
    operations = [CommitOperationDelete(path) for path in stale]
    operations += [CommitOperationAdd(path, content) for path, content in files.items()]
    commit = api.create_commit(
        repo_id,
        operations,
        commit_message=f"Upload {kind}",
        repo_type=kind,
        revision=revision,
        parent_commit=info.sha,
    )
    return commit.oid


def _digests(folder: Path) -> dict[str, str]:
    """sha256 of every file of a folder."""
    digests = {}
    for name, path in _list_files(folder).items():
        with path.open("rb") as file:
            digests[name] = sha_fileobj(file).hex()
    return digests


def _check_predictions(folder: Path, copy: Path, images: Sequence[Path]) -> None:
    """Refuse a copy that does not name images as the folder's model does."""
    ours, theirs = (
        pipeline("image-classification", model=str(place), device="cpu")([str(image) for image in images], top_k=1)
        for place in (folder, copy)
    )
    for image, (expected, *_), (found, *_) in zip(images, ours, theirs, strict=True):
        if found["label"] != expected["label"] or abs(found["score"] - expected["score"]) > SCORE_TOLERANCE:
            raise UserError(f"what was pushed takes {image.name} for {found['label']}, not {expected['label']}")


def read_back(api: HfApi, repo_id: str, commit: str, folder: Path, images: Sequence[Path]) -> None:
    """Download a pushed commit and compare it with the folder: names, hashes, predictions. Raises `UserError`."""
    with tempfile.TemporaryDirectory() as place:
        copy = Path(api.snapshot_download(repo_id, revision=commit, local_dir=place))
        sent, found = _digests(folder), _digests(copy)
        differing = sorted(name for name in sent | found if sent.get(name) != found.get(name))
        if differing:
            raise UserError(f"what the Hub gives back differs from {folder} in {', '.join(differing)}")
        if images:
            _check_predictions(folder, copy, images)


def push_model(
    folder: Path,
    repo_id: str,
    private: bool | None = None,
    revision: str | None = None,
    images: Sequence[Path] = (),
    say: Callable[[str], None] = print,
) -> ModelLink:
    """Push a model folder so that its repository holds exactly it, in one commit, and read that commit back.

    A repository that does not exist is made, public unless `private`; so is the branch `revision`. The model that is
    read back must name the `images` as the folder's does. Network faults are tried again. Raises `UserError`, also
    for a repository that holds something else, or is public where `private` is asked; the folder is never changed.
    """
    api, files = HfApi(), _list_files(folder)
    try:
        refuse_secrets(files)
        info = retry(lambda: _open_model(api, repo_id, private, revision), say)
        if private and not info.private:
            raise UserError(f"--hub_private_repo true: {repo_id} exists and is public; give another name")
        retry(lambda: _refuse_foreign(api, info), say)
        say(f"hub         {repo_id} is {_describe_visibility(info, private)}")
        oid = retry(lambda: _commit(api, repo_id, files, revision), say)
        retry(lambda: read_back(api, repo_id, oid, folder, images), say)
    except UserError as fault:
        raise UserError(str(fault) if str(fault).startswith("--") else f"--push_to_hub {repo_id}: {fault}") from None
    except Exception as fault:  # whatever client and network raise, a finished run must not end in a traceback
        raise UserError(f"--push_to_hub {repo_id}: {explain(fault)}") from None
    say(f"hub         read back: {len(files)} files and {len(images)} predictions are the run's own")
    return ModelLink(repo_id, oid, f"{api.endpoint}/{repo_id}/tree/{oid}", bool(info.private))


def make_space(link: ModelLink) -> dict[str, bytes]:
    """The files of a Space: the demo as its app, told by demo.json which commit of which model to show."""
    card = {"title": link.repo_id.split("/")[1], "sdk": "gradio", "app_file": "app.py", "models": [link.repo_id]}
    model = {"model": link.repo_id, "revision": link.commit}
    return {
        "README.md": f"---\n{yaml.safe_dump(card, sort_keys=False)}---\n\nA demo of {link.url}\n".encode(),
        "app.py": Path(__file__).with_name("demo.py").read_bytes(),
        "demo.json": (json.dumps(model, indent=2) + "\n").encode(),
        "requirements.txt": b"torch\ntransformers>=5.20\npillow\n",
    }


def push_space(space_id: str, link: ModelLink, say: Callable[[str], None] = print) -> str:
    """Make or renew the Space that shows a pushed model; returns its address. Raises `UserError`."""
    api, files = HfApi(), make_space(link)

    def push() -> None:
        api.create_repo(space_id, repo_type="space", space_sdk="gradio", private=link.private, exist_ok=True)
        there = {file.rfilename for file in api.space_info(space_id).siblings}
        if "app.py" in there and "demo.json" not in there:
            raise UserError("the name is taken by another Space of yours; give another name")
        _commit(api, space_id, files, kind="space")

    try:
        retry(push, say)
    except Exception as fault:
        reason = fault if isinstance(fault, UserError) else explain(fault)
        raise UserError(f"--hub_space_id {space_id}: {reason}") from None
    if link.private:
        say(f"hub         {link.repo_id} is private: {space_id} needs a secret HF_TOKEN that may read it")
    return f"{api.endpoint}/spaces/{space_id}"
