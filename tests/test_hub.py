"""Pushing and loading back with the true client, against a Hub on loopback and everything that goes wrong there."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from conftest import ROOT
from hub_server import CUT, LOST, TOKEN, Repo
from huggingface_hub import SpaceCard
from transformers import AutoModelForImageClassification

from finetune_vit import main
from transfer import hub
from transfer.bundle import pack
from transfer.cli import parse_command_line
from transfer.errors import UserError
from transfer.hub import check_push, make_space, push_model, push_space
from transfer.runs import single
from transfer.runs.single import command_to_push


@pytest.fixture
def images(pristine_data) -> list[Path]:
    return sorted((pristine_data / "test" / "images").glob("*.JPEG"))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def pushed(hub, name: str = "me/tiny", branch: str = "main") -> dict[str, bytes]:
    """The files of a branch, without what the Hub put there."""
    repo = hub.repos["models", name]
    return {path: data for path, data in repo.commits[repo.branches[branch]].items() if path != ".gitattributes"}


def test_a_push_leaves_exactly_the_model_folder_in_one_commit_and_gives_its_link(hub, model, images, capsys):
    pushed_to = push_model(model, "me/tiny", images=images)
    repo = hub.repos["models", "me/tiny"]
    assert pushed(hub) == contents(model) and len(repo.commits) == 2
    assert pushed_to.url == f"{hub.url}/me/tiny/tree/{repo.branches['main']}"
    said = capsys.readouterr().out
    assert "me/tiny is public, the default: everyone sees it; --hub_private_repo true" in said
    assert "read back: 4 files and 10 predictions match the run's" in said
    assert not hub.strangers  # the token goes to the Hub, not to its CDN


def test_pushing_the_same_again_makes_no_second_commit(hub, model):
    first, second = push_model(model, "me/tiny"), push_model(model, "me/tiny")
    assert first == second and len(hub.repos["models", "me/tiny"].commits) == 2


def test_a_later_push_replaces_what_an_earlier_one_left(hub, model):
    (model / "processor_config.json").write_text("{}")
    push_model(model, "me/tiny")
    (model / "processor_config.json").unlink()
    push_model(model, "me/tiny")
    assert pushed(hub) == contents(model)


def test_a_private_repository_is_made_private_and_read_back(hub, model, capsys):
    assert push_model(model, "me/tiny", private=True).private
    assert hub.repos["models", "me/tiny"].private and "private: only its owner" in capsys.readouterr().out


def test_what_must_stay_private_is_not_pushed_to_a_public_repository(hub, model):
    hub.make_repo("models", "me/tiny")
    with pytest.raises(UserError, match=r"--hub_private_repo true: me/tiny exists and is public"):
        push_model(model, "me/tiny", private=True)
    assert pushed(hub) == {}


def test_a_revision_becomes_a_branch_and_main_stays(hub, model):
    for _ in range(2):
        push_model(model, "me/tiny", revision="seed-1")
    assert pushed(hub, branch="seed-1") == contents(model) and pushed(hub) == {}


def test_a_name_that_holds_other_work_is_not_overwritten(hub, model):
    hub.make_repo("models", "me/tiny", files={"config.json": b'{"model_type": "bert"}', "vocab.txt": b""})
    before = pushed(hub)
    with pytest.raises(UserError, match="the name is taken by something else of yours"):
        push_model(model, "me/tiny")
    assert pushed(hub) == before


@pytest.mark.parametrize(
    ("name", "token", "message"),
    [
        ("me/tiny", "hf_wrong", "does not accept the token .*HF_TOKEN"),
        ("me/tiny", None, "there is no token; `hf auth login` or the variable HF_TOKEN"),
        ("someone/tiny", TOKEN, "the token is me's; the owner must be me"),
        ("tiny", TOKEN, "add the owner, as in me/tiny"),
        ("me/tiny model", TOKEN, "is not a valid repository name"),
    ],
)
def test_a_push_that_cannot_succeed_is_refused_before_any_training(hub, name, token, message, monkeypatch):
    monkeypatch.delenv("HF_TOKEN") if token is None else monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(UserError, match=message) as stop:
        check_push(name)
    assert token is None or token not in str(stop.value)


def test_a_hub_that_is_down_before_training_only_gets_a_word(hub, capsys):
    hub.fail("whoami", (503, "back soon"))
    check_push("me/tiny")
    assert "cannot be reached now (back soon); the push is tried when the run is done" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("request_", "fault", "message"),
    [
        ("POST /api/repos/create", (401, "Invalid username or password."), "does not accept the token"),
        ("POST /api/repos/create", (403, "not in this namespace"), "refuses it .*; is the name yours"),
        ("POST .*/preupload", (403, "Private repository storage limit reached"), "storage limit reached"),
        ("POST .*/batch", (413, "Your quota is used up"), "Your quota is used up"),
        ("POST .*/commit", (500, f"we choked on {TOKEN}"), "we choked on <token>"),
        ("PUT /lfs", CUT, "Error while uploading 'model.safetensors'"),
        ("POST /api/repos/create", LOST, "disconnected|closed|reset"),
        ("GET /cdn", (500, "CDN is down"), "CDN is down"),
    ],
)
def test_a_push_that_fails_for_good_says_why_and_leaves_the_model_alone(hub, model, request_, fault, message):
    hub.fail(request_, fault, times=1000)
    before = contents(model)
    with pytest.raises(UserError, match=rf"--push_to_hub me/tiny: .*({message})") as stop:
        push_model(model, "me/tiny")
    assert TOKEN not in str(stop.value) and "\n" not in str(stop.value)
    assert contents(model) == before


@pytest.mark.parametrize(
    ("request_", "fault"),
    [
        ("POST /api/repos/create", (503, "back soon")),
        ("POST /api/repos/create", LOST),
        ("POST .*/preupload", CUT),
        ("PUT /lfs", CUT),
        ("POST .*/commit", CUT),
        ("POST .*/commit", LOST),
        ("GET /cdn", CUT),
        ("GET /api/models/me/tiny/tree", (502, "bad gateway")),
    ],
)
def test_a_fault_that_passes_does_not_show_in_what_is_pushed(hub, model, images, request_, fault):
    hub.fail(request_, fault)
    push_model(model, "me/tiny", images=images[:1])
    assert pushed(hub) == contents(model) and len(hub.repos["models", "me/tiny"].commits) == 2


def test_a_copy_that_differs_from_the_folder_is_noticed(hub, model, monkeypatch):
    keep = Repo.commit

    def spoil(self, branch, files, message):
        return keep(self, branch, files | ({"config.json": b"{}"} if "config.json" in files else {}), message)

    monkeypatch.setattr(Repo, "commit", spoil)
    with pytest.raises(UserError, match=r"the pushed commit differs from .* in config\.json"):
        push_model(model, "me/tiny")


def test_a_model_that_names_images_otherwise_is_noticed(model, images, tmp_path):
    other = AutoModelForImageClassification.from_pretrained(model)
    with torch.no_grad():
        other.classifier.bias += torch.tensor([0.0, 9.0, 0.0, 0.0])
    other.save_pretrained(tmp_path / "other")
    shutil.copy(model / "preprocessor_config.json", tmp_path / "other")
    with pytest.raises(UserError, match="the pushed model predicts"):
        hub._check_predictions(model, tmp_path / "other", images)


def test_a_folder_with_a_token_in_it_is_not_pushed(hub, model):
    (model / "README.md").write_text(f"login with {TOKEN}")
    with pytest.raises(UserError, match=r"--push_to_hub me/tiny: README\.md: holds an access token"):
        push_model(model, "me/tiny")
    assert not hub.requests


def test_a_space_shows_the_pushed_commit_with_the_demo_as_its_app(hub, model):
    link = push_model(model, "me/tiny", private=True)
    said = []
    for _ in range(2):
        assert push_space("me/demo", link, said.append) == f"{hub.url}/spaces/me/demo"
    space = hub.repos["spaces", "me/demo"]
    files = space.commits[space.branches["main"]]
    assert space.private and len(space.commits) == 2 and "needs a secret HF_TOKEN" in said[0]
    assert files["app.py"] == (ROOT / "transfer" / "demo.py").read_bytes()
    assert json.loads(files["demo.json"]) == {"model": "me/tiny", "revision": link.commit}
    assert files["requirements.txt"].split() == [b"torch", b"transformers>=5.20", b"pillow"]
    assert b"\ntimm\n" in make_space(link, ["timm"])["requirements.txt"]
    card = SpaceCard(files["README.md"].decode())
    assert (card.data.sdk, card.data.app_file, card.data.models) == ("gradio", "app.py", ["me/tiny"])


def test_a_card_that_the_hub_refuses_is_said_in_one_line_and_nothing_is_pushed(hub, model):
    (model / "README.md").write_text("---\npipeline_tag: seeing\n---\n")
    with pytest.raises(UserError, match=r"--push_to_hub me/tiny: Invalid metadata in README\.md.*seeing is not known"):
        push_model(model, "me/tiny")
    assert pushed(hub) == {}


def test_another_space_of_that_name_is_not_overwritten(hub, model):
    hub.make_repo("spaces", "me/demo", files={"app.py": b"print('mine')"})
    with pytest.raises(UserError, match="--hub_space_id me/demo: the name is taken by another Space"):
        push_space("me/demo", push_model(model, "me/tiny"))


def test_a_run_whose_push_fails_is_whole_and_its_advice_pushes_it_later(
    hub, pristine_data, checkpoints, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setenv("HOME", str(checkpoints("convnext").parent))  # the checkpoint's path must not be published
    monkeypatch.setenv("LOGNAME", user := Path(os.environ["HOME"]).name)
    recipe, out = tmp_path / "mine.yaml", tmp_path / "out"
    recipe.write_text("per_device_train_batch_size: 8\nnum_train_epochs: 1\nvalidation_fraction: 0.25\n")
    flags = {"data_dir": pristine_data, "model_name_or_path": checkpoints("convnext"), "output_dir": out}
    flags |= {"push_to_hub": "true", "hub_model_id": "me/tiny", "hub_private_repo": "true"}
    words = [str(recipe), *(str(word) for name, value in flags.items() for word in (f"--{name}", value))]
    monkeypatch.setattr(sys, "argv", ["finetune_vit.py", *words])
    hub.fail("POST .*/preupload", (403, "Private repository storage limit reached"))
    with pytest.raises(SystemExit) as stop:
        main()
    said = capsys.readouterr()
    assert stop.value.code == 2 and "storage limit reached" in said.err
    assert {"submission.csv", "metrics.json", "run.json", "model"} <= {path.name for path in out.iterdir()}

    advice = said.err.split("push it again with: ")[1].strip()
    monkeypatch.setattr(sys, "argv", shlex.split(advice.partition("accelerate_config.yaml ")[2]))
    main()
    again = tmp_path / "out-pushed"
    assert (again / "submission.csv").read_bytes() == (out / "submission.csv").read_bytes()
    assert pushed(hub) == contents(again / "model") and hub.repos["models", "me/tiny"].private
    assert json.loads((again / "run.json").read_text())["model_link"]["repo_id"] == "me/tiny"
    everything = "".join([*said, *capsys.readouterr()])
    files = [path.read_bytes() for place in (out, again) for path in place.rglob("*") if path.is_file()]
    assert TOKEN not in everything and not any(TOKEN.encode() in data for data in files)
    assert not any(user.encode() in data for data in pushed(hub).values())
    assert json.loads((out / "run.json").read_text())["model_link"]["repo_id"] == "me/tiny"
    monkeypatch.delenv("HF_TOKEN")  # these tests, which name it, are packed too
    pack(out, tmp_path / "mine.zip")
    with zipfile.ZipFile(tmp_path / "mine.zip") as archive:
        own = [name for name in archive.namelist() if not re.search(r"mine/(code/|changes\.patch)", name)]
        packed = {name: archive.read(name) for name in own}
    assert b"/me/tiny/tree/" in packed["mine/README.md"]  # though it was pushed later
    assert not any(user.encode() in data or TOKEN.encode() in data for data in packed.values())


def test_ctrl_c_while_pushing_says_that_the_run_is_complete(monkeypatch, tmp_path):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(single, "push_model", interrupt)
    context = SimpleNamespace(run=SimpleNamespace(hub_space_id=None), words=["recipes/sample.yaml"])
    args = dict.fromkeys(("hub_model_id", "hub_private_repo", "hub_revision"))
    with pytest.raises(UserError, match="interrupted; the run is finished and complete, push it again with: "):
        single.push_results(context, SimpleNamespace(output_dir=str(tmp_path), **args), [])


def test_several_seeds_are_pushed_as_one_model_whose_card_tells_their_spread(
    hub, pristine_data, checkpoints, tmp_path, monkeypatch
):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    recipe, out = tmp_path / "mine.yaml", tmp_path / "out"
    recipe.write_text(
        "per_device_train_batch_size: 8\nnum_train_epochs: 1\nvalidation_fraction: 0.25\nseeds: [3, 5]\n"
    )
    flags = ["--data_dir", pristine_data, "--model_name_or_path", checkpoints("convnext"), "--output_dir", out]
    command = list(map(str, [recipe, *flags, "--push_to_hub", "true", "--hub_model_id", "me/tiny"]))
    main(command)
    assert pushed(hub) == contents(out / "model") and len(hub.repos["models", "me/tiny"].commits) == 2
    metrics, card = json.loads((out / "metrics.json").read_text()), pushed(hub)["README.md"].decode()
    mean, std = (metrics[name]["validation"]["accuracy"] for name in ("mean", "std"))
    assert f"over 2 seeds, validation: accuracy {mean:.4f} ± {std:.4f}" in card
    assert "(greedy soup)" in card and f"| {metrics['soup']['accuracy']:.4f} |" in card
    assert json.loads((out / "run.json").read_text())["model_link"]["commit"] in hub.repos["models", "me/tiny"].commits


@pytest.mark.parametrize("repeats", ["--seeds 3 5", "--seeds=3", "--kfold 4", "--kfold 4 --fold 2", "--max_minutes 9"])
def test_the_command_to_push_a_run_later_trains_nothing_whatever_the_run_was(repeats, tmp_path):
    (tmp_path / "mine.yaml").write_text("seeds: [1, 2]\nmax_minutes: 5\n")
    said = f"python finetune_vit.py {tmp_path}/mine.yaml --data_dir sample {repeats} --resume_from_checkpoint true"
    words = shlex.split(command_to_push(f"{said} --push_to_hub true --hub_model_id me/tiny", tmp_path / "out"))
    run, args = parse_command_line(words[2:])
    assert (run.seeds, run.kfold, run.fold, run.max_minutes, args.do_train) == ([], None, None, None, False)
    assert args.push_to_hub and args.hub_model_id == "me/tiny" and args.output_dir == f"{tmp_path}/out-pushed"
    assert run.model_name_or_path == f"{tmp_path}/out/model" and run.data_dir == "sample"


CLASSIFY = """
import json, sys
from transformers import pipeline
classify = pipeline("image-classification", model=sys.argv[1], revision=sys.argv[2])
print(json.dumps({path: classify(path)[0]["label"] for path in sys.argv[3:]}))
"""


def test_the_printed_link_gives_the_runs_predictions_in_a_new_process(
    hub, pristine_data, checkpoints, images, finetune, tmp_path, capfd
):
    finetune(pristine_data, checkpoints("convnext"), num_train_epochs=1, push_to_hub="true", hub_model_id="me/tiny")
    printed = "".join(capfd.readouterr())
    commit = printed.split("model link")[1].split()[0].removeprefix(f"{hub.url}/me/tiny/tree/")
    places = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "0"}
    environment = os.environ | places | {"HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-c", CLASSIFY, "me/tiny", commit, *map(str, images)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and TOKEN not in printed + done.stdout + done.stderr, done.stderr
    answers = json.loads(done.stdout.splitlines()[-1])
    names = json.loads((tmp_path / "out" / "model" / "config.json").read_text())["id2label"]
    table = pd.read_csv(tmp_path / "out" / "submission.csv", dtype={"image_id": str})
    expected = dict(zip(table["image_id"], table["label"], strict=True))
    assert {Path(path).stem: label for path, label in answers.items()} == {
        image_id: names[str(label)] for image_id, label in expected.items()
    }
