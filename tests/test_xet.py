"""Pushing and loading back through Xet storage, which the client takes unless it is told not to."""

from pathlib import Path

import pytest
import xet_server  # noqa: F401  its routes belong to the server
from hub_server import CUT, LOST, TOKEN
from huggingface_hub import constants
from transformers import pipeline

from transfer.errors import UserError
from transfer.hub import push_model


@pytest.fixture
def storage(hub, monkeypatch, tmp_path):
    """The Hub with its Xet storage; hf_xet tries once, so that our own tries are seen."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    monkeypatch.setenv("HF_XET_XORB_COMPRESSION_POLICY", "none")
    monkeypatch.setenv("HF_XET_CLIENT_RETRY_MAX_ATTEMPTS", "1")
    monkeypatch.setenv("HF_XET_CLIENT_RETRY_BASE_DELAY", "10ms")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    return hub


def pushed(storage) -> dict[str, bytes]:
    repo = storage.repos["models", "me/tiny"]
    return {path: data for path, data in repo.commits[repo.branches["main"]].items() if path != ".gitattributes"}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def tries(storage, request: str) -> int:
    return sum(request in line for line in storage.requests)


def test_weights_go_and_come_back_through_the_storage_without_the_hubs_token(storage, model, pristine_data):
    image = str(min((pristine_data / "test" / "images").glob("*.JPEG")))
    pushed_to = push_model(model, "me/tiny")
    assert pushed(storage) == contents(model) and len(storage.repos["models", "me/tiny"].commits) == 2
    assert tries(storage, "POST /xet/v1/xorbs") and tries(storage, "GET /xorbs") and not tries(storage, "/lfs")
    assert not storage.strangers
    answers = pipeline("image-classification", model="me/tiny", revision=pushed_to.commit)(image)
    assert answers == pipeline("image-classification", model=str(model))(image)


@pytest.mark.parametrize(
    ("request_", "status", "message"),
    [
        ("GET .*/xet-write-token", 401, "does not accept the token .*HF_TOKEN"),
        ("GET .*/xet-write-token", 403, "refuses it .*may the token write"),
        ("POST /xet/v1/xorbs", 403, "refuses it"),
        ("POST /xet/v1/shards", 507, "507 Insufficient Storage"),
    ],
)
def test_what_the_storage_refuses_is_said_at_once(storage, model, request_, status, message):
    storage.fail(request_, (status, "no"), times=1000)
    before = contents(model)
    with pytest.raises(UserError, match=rf"--push_to_hub me/tiny: .*({message})") as stop:
        push_model(model, "me/tiny")
    assert tries(storage, "xet-write-token") == 1  # what is refused once is refused again
    assert TOKEN not in str(stop.value) and "\n" not in str(stop.value) and contents(model) == before


@pytest.mark.parametrize(
    ("request_", "fault"),
    [
        ("GET .*/xet-write-token", (503, "back soon")),
        ("GET .*/xet-write-token", CUT),
        ("POST /xet/v1/xorbs", (500, "we choked")),
        ("POST /xet/v1/xorbs", CUT),
        ("POST /xet/v1/shards", LOST),
        ("GET /xet/v1/reconstructions", (502, "bad gateway")),
        ("GET /xet/v1/reconstructions", CUT),
        ("GET /xorbs", CUT),
        ("GET /xorbs", LOST),
    ],
)
def test_a_fault_of_the_storage_that_passes_does_not_show_in_what_is_pushed(storage, model, request_, fault):
    storage.fail(request_, fault, times=2)  # one of them is the storage client's own to try again
    push_model(model, "me/tiny")
    assert pushed(storage) == contents(model) and len(storage.repos["models", "me/tiny"].commits) == 2
