"""Push a model folder to the Hugging Face Hub in one commit, check the commit by downloading it, and make a Space."""

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
    HTTPError,  # from the httpx that the client uses
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
)
from huggingface_hub.utils import validate_repo_id
from huggingface_hub.utils.sha import sha_fileobj
from transformers import pipeline

from transfer.errors import UserError
from transfer.files import refuse_secrets

# Seconds before each retry. The client retries some requests itself, for another 23 s.
WAITS = (2, 8, 20)
TRANSIENT_STATUS = frozenset({408, 429, 500, 502, 503, 504})
# hf_xet, which transfers large files, gives the status only in the text of its exceptions.
XET_STATUS = re.compile(r"HTTP status (?:client|server) error \((\d{3}) ")
XET_CUT = re.compile(r"error (?:sending request|decoding response body)")

TOKEN_ADVICE = "`hf auth login` or the variable HF_TOKEN gives one with write permission"
HUB_OWN = {".gitattributes"}  # files that the Hub puts into a new repository

# Scores of the same model on the same machine differ only by rounding.
SCORE_TOLERANCE = 1e-4


@dataclass(frozen=True)
class ModelLink:
    """The repository and commit of a pushed model."""

    repo_id: str
    commit: str
    url: str
    private: bool


def _status_of(fault: BaseException) -> int | None:
    """The HTTP status in a fault; None if there was no answer."""
    if isinstance(fault, HfHubHTTPError):
        return fault.response.status_code
    found = XET_STATUS.search(str(fault))
    return int(found[1]) if found else None


def is_transient(fault: BaseException | None) -> bool:
    """Whether a retry may help, because the fault lies with the network or the server and not with the request."""
    while fault is not None:
        if status := _status_of(fault):
            return status in TRANSIENT_STATUS
        if isinstance(fault, OfflineModeIsEnabled):
            return False
        if isinstance(fault, (HTTPError, ConnectionError, TimeoutError)) or XET_CUT.search(str(fault)):
            return True
        fault = fault.__cause__  # the client wraps exceptions of a transfer
    return False


def _one_line(fault: object) -> str:
    """A fault's text on one line, without the token, which a server or a client might repeat."""
    text, token = " ".join(str(fault).split()), get_token()
    return text.replace(token, "<token>") if token else text


def explain(fault: BaseException) -> str:
    """What an exception of the client means for the user, in one line."""
    status = _status_of(fault)
    text = _one_line(getattr(fault, "server_message", None) or fault)
    if isinstance(fault, LocalTokenNotFoundError):
        return f"there is no token; {TOKEN_ADVICE}"
    if isinstance(fault, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set; unset it to reach the Hub"
    if status == 401:
        return f"the Hub does not accept the token ({text}); {TOKEN_ADVICE}"
    if status == 403:
        return f"the Hub refuses it ({text}); is the name yours, and may the token write?"
    cause = fault.__cause__ if status is None else None  # the client wraps exceptions of a transfer
    return f"{text} ({explain(cause)})" if cause else text


def retry(action: Callable, say: Callable[[str], None]):
    """Return `action()`, called again after transient faults; it must be safe to repeat."""
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
        raise UserError(f"{flag} {name}: is not a valid repository name: {_one_line(fault)}") from None
    if "/" not in name:
        raise UserError(f"{flag} {name}: add the owner, as in me/{name}")


def check_push(repo_id: str, space_id: str | None = None, say: Callable[[str], None] = print) -> None:
    """Check before training that a push can succeed. Raises `UserError`.

    If the Hub cannot be reached now, this only says so: it may be reachable at the end of the run.
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
    """Create the repository and the branch if they are missing; returns what the Hub knows of them."""
    api.create_repo(repo_id, private=private, exist_ok=True)
    if revision not in (None, "main") and not revision.startswith("refs/"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    return api.model_info(repo_id, revision=revision)


def _file_names(info) -> set[str]:
    return {file.rfilename for file in info.siblings or ()}


def _refuse_foreign(api: HfApi, info: ModelInfo) -> None:
    """Check that the repository is empty or holds a model of this project, so that nothing else is overwritten."""
    names = _file_names(info) - HUB_OWN - {"README.md"}
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
    """The files of a folder by relative path, without those that the client or the Hub adds."""
    paths = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {name: path for name, path in paths.items() if not name.startswith(".cache/") and name not in HUB_OWN}


def _commit(
    api: HfApi, repo_id: str, files: Mapping[str, Path | bytes], revision: str | None = None, kind: str = "model"
) -> str:
    """Commit the files and delete all others; returns the hash of the one commit, the last one if nothing changes.

    upload_folder is not used because it may split an upload into several commits.
    """
    # Ask again at every retry: a commit whose answer was lost has moved the branch.
    info = api.repo_info(repo_id, repo_type=kind, revision=revision)
    stale = sorted(_file_names(info) - files.keys() - HUB_OWN)
    operations: list[CommitOperationAdd | CommitOperationDelete] = [CommitOperationDelete(path) for path in stale]
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
    """sha256 of every file of a folder, by name."""
    digests = {}
    for name, path in _list_files(folder).items():
        with path.open("rb") as file:
            digests[name] = sha_fileobj(file).hex()
    return digests


def _check_predictions(folder: Path, copy: Path, images: Sequence[Path]) -> None:
    """Check that the model in the copy predicts the same as the one in the folder. Raises `UserError`."""
    ours, theirs = (
        pipeline("image-classification", model=str(place), device="cpu")([str(image) for image in images], top_k=1)
        for place in (folder, copy)
    )
    for image, (expected, *_), (found, *_) in zip(images, ours, theirs, strict=True):
        if found["label"] != expected["label"] or abs(found["score"] - expected["score"]) > SCORE_TOLERANCE:
            raise UserError(f"the pushed model predicts {found['label']} for {image.name}, not {expected['label']}")


def read_back(api: HfApi, repo_id: str, commit: str, folder: Path, images: Sequence[Path]) -> None:
    """Download a pushed commit and compare names, hashes and predictions with the folder. Raises `UserError`."""
    with tempfile.TemporaryDirectory() as place:
        copy = Path(api.snapshot_download(repo_id, revision=commit, local_dir=place))
        sent, found = _digests(folder), _digests(copy)
        differing = sorted(name for name in sent | found if sent.get(name) != found.get(name))
        if differing:
            raise UserError(f"the pushed commit differs from {folder} in {', '.join(differing)}")
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
    """Push a model folder in one commit, so that the repository holds nothing else, and check the commit.

    The repository is created if it is missing, public unless `private`, and so is the branch `revision`. The pushed
    model must predict the same for the `images`. Transient faults are retried. Raises `UserError`, also if the
    repository holds something else, or is public although `private` is set. The folder never changes.
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
    except Exception as fault:  # a finished run must not end in a traceback, whatever the client raises
        raise UserError(f"--push_to_hub {repo_id}: {explain(fault)}") from None
    say(f"hub         read back: {len(files)} files and {len(images)} predictions match the run's")
    return ModelLink(repo_id, oid, f"{api.endpoint}/{repo_id}/tree/{oid}", bool(info.private))


def make_space(link: ModelLink, packages: Sequence[str] = ()) -> dict[str, bytes]:
    """The files of a Space: the demo as its app, and demo.json with the model and its commit."""
    card = {"title": link.repo_id.split("/")[1], "sdk": "gradio", "app_file": "app.py", "models": [link.repo_id]}
    model = {"model": link.repo_id, "revision": link.commit}
    return {
        "README.md": f"---\n{yaml.safe_dump(card, sort_keys=False)}---\n\nA demo of {link.url}\n".encode(),
        "app.py": Path(__file__).with_name("demo.py").read_bytes(),
        "demo.json": (json.dumps(model, indent=2) + "\n").encode(),
        "requirements.txt": "\n".join(["torch", "transformers>=5.20", "pillow", *packages, ""]).encode(),
    }


def push_space(
    space_id: str, link: ModelLink, say: Callable[[str], None] = print, packages: Sequence[str] = ()
) -> str:
    """Create or update the Space with a demo of a pushed model, which may need more packages; returns its address.

    Raises `UserError`.
    """
    api, files = HfApi(), make_space(link, packages)

    def push() -> None:
        api.create_repo(space_id, repo_type="space", space_sdk="gradio", private=link.private, exist_ok=True)
        names = _file_names(api.space_info(space_id))
        if "app.py" in names and "demo.json" not in names:
            raise UserError("the name is taken by another Space of yours; give another name")
        _commit(api, space_id, files, kind="space")

    try:
        retry(push, say)
    except Exception as fault:
        reason = fault if isinstance(fault, UserError) else explain(fault)
        raise UserError(f"--hub_space_id {space_id}: {reason}") from None
    if link.private:
        say(f"hub         {link.repo_id} is private: {space_id} needs a secret HF_TOKEN with read access to it")
    return f"{api.endpoint}/spaces/{space_id}"
