"""The hand-in pack, and that nothing private is in what leaves the machine."""

import json
import os
import subprocess
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT

from transfer import bundle, files
from transfer.bundle import main, pack
from transfer.errors import UserError
from transfer.evaluation.metrics import ClassificationMetrics, RunMetrics

USER = "zapho" + "d"  # in two parts: this file is packed too
SECRET = "hf_" + 34 * "x"


@pytest.fixture
def run(tmp_path, monkeypatch, checkpoints, pristine_data):
    """A finished run as its files, of a user whose name is in every path."""
    home = tmp_path / "home" / USER
    out = home / "work" / "tiny"
    out.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("LOGNAME", USER)
    monkeypatch.setenv("HF_TOKEN", SECRET)
    (out / "model").mkdir()
    (out / "model" / "model.safetensors").write_bytes(b"weights")
    (out / "submission.csv").write_text("image_id,label\na,1\n")
    (out / "report.html").write_text(f"<p>{home}/work</p><img src='data:image/png;base64,ab+/{USER[:3]}/cd/ef=='>")
    RunMetrics(ClassificationMetrics(0.75, [0.5, 0.9], 1.0, 0.75, 0.5, n=12)).write(out)
    link = {"url": f"https://huggingface.co/{USER}/tiny/tree/abc", "repo_id": f"{USER}/tiny"}
    record = {
        "command": f"python finetune_vit.py recipes/offline.yaml --data_dir {home}/data.zip --output_dir {out}",
        "arguments": {"data_dir": f"{home}/data.zip", "output_dir": str(out), "logging_dir": f"/mnt/{USER}/logs"},
        "code": {"commit": _head(), "clean": True},
        "device": "CPU, 2 threads",
        "submission_sha256": "5ca1ab1e",
        "model_link": link,
    }
    (out / "run.json").write_text(json.dumps(record))
    return out


def _head() -> str | None:
    done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() or None


def unpack(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}


def test_the_pack_holds_code_numbers_csv_report_and_link_but_no_data_or_weights(run, tmp_path):
    pack(run, tmp_path / "mine.zip")
    files = unpack(tmp_path / "mine.zip")
    own = {"README.md", "submission.csv", "report.html", "metrics.json", "run.json"}
    assert {name for name in files if not name.startswith("code/")} == own
    assert {"code/finetune_vit.py", "code/transfer/bundle.py", "code/README.md", "code/requirements.txt"} <= set(files)
    assert not any(name.endswith((".safetensors", ".onnx", ".JPEG", ".zip")) for name in files)
    assert files["submission.csv"] == (run / "submission.csv").read_bytes()
    cover = files["README.md"].decode()
    assert f"https://huggingface.co/{USER}/tiny/tree/abc" in cover and "0.7500 (95% interval 0.5000 to 0.9000" in cover
    assert "5ca1ab1e" in cover and "python finetune_vit.py recipes/offline.yaml --data_dir '~/data.zip'" not in cover


def test_the_packed_code_is_that_of_the_runs_commit(run, tmp_path):
    if _head() is None:
        pytest.skip("this copy of the project has no git history")
    pack(run, tmp_path / "mine.zip")
    shown = subprocess.run(["git", "show", "HEAD:README.md"], cwd=ROOT, capture_output=True).stdout
    assert unpack(tmp_path / "mine.zip")["code/README.md"] == shown


def test_code_without_git_is_packed_as_it_lies(run, tmp_path, monkeypatch):
    monkeypatch.setattr(bundle, "run_git", lambda *words: None)
    pack(run, tmp_path / "mine.zip")
    files = unpack(tmp_path / "mine.zip")
    assert files["code/finetune_vit.py"] == (ROOT / "finetune_vit.py").read_bytes()
    assert {"code/recipes/sample.yaml", "code/tests/conftest.py", "code/transfer/models/imagenet_1k.txt"} <= set(files)


def test_no_token_home_path_or_user_name_is_in_any_packed_file(run, tmp_path):
    pack(run, tmp_path / "mine.zip")
    for name, data in unpack(tmp_path / "mine.zip").items():
        text = data.decode(errors="replace").replace(f"huggingface.co/{USER}/tiny", "").replace(f'"{USER}/tiny"', "")
        assert SECRET not in text and os.environ["HOME"] not in text, name
        assert USER not in text, name


def test_a_token_in_a_report_is_refused_and_nothing_is_written(run, tmp_path):
    (run / "report.html").write_text(f"<p>{SECRET}</p>")
    with pytest.raises(UserError, match=r"report\.html: holds an access token"):
        pack(run, tmp_path / "mine.zip")
    assert not (tmp_path / "mine.zip").exists()


def test_changes_since_the_commit_are_packed_as_a_patch(run, tmp_path, monkeypatch):
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(record | {"code": {"commit": "abc", "clean": False}}))
    monkeypatch.setattr(bundle, "run_git", lambda *words: b"+ mine\n" if words == ("diff", "abc") else None)
    pack(run, tmp_path / "mine.zip")
    files = unpack(tmp_path / "mine.zip")
    assert files["changes.patch"] == b"+ mine\n" and "abc with changes.patch" in files["README.md"].decode()


def test_one_run_always_gives_the_same_bytes(run, tmp_path):
    pack(run, tmp_path / "a" / "mine.zip")
    pack(run, tmp_path / "b" / "mine.zip")
    assert (tmp_path / "a" / "mine.zip").read_bytes() == (tmp_path / "b" / "mine.zip").read_bytes()


@pytest.mark.parametrize(
    ("folder", "target", "message"),
    [
        ("RUN", "mine.rar", "give the name of a zip, such as mine.zip"),
        ("RUN", "there.zip", "exists already"),
        ("nowhere", "mine.zip", "give the folder of a finished run"),
    ],
)
def test_a_mistake_is_one_line(run, tmp_path, capsys, folder, target, message):
    (tmp_path / "there.zip").touch()
    with pytest.raises(SystemExit) as stop:
        main([str(run if folder == "RUN" else tmp_path / folder), str(tmp_path / target)])
    error = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and error.startswith("error: ") and message in error


def test_a_run_packs_itself_when_asked(pristine_data, checkpoints, finetune, tmp_path):
    target = tmp_path / "mine.zip"
    out = finetune(pristine_data, checkpoints("convnext"), num_train_epochs=1, hand_in=target)
    files = unpack(target)
    assert files["submission.csv"] == (out / "submission.csv").read_bytes()
    assert "not pushed" in files["README.md"].decode() and str(tmp_path) not in files["run.json"].decode()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('"/data/sets/tiny.zip"', '"tiny.zip"'),
        ("--output_dir /mnt/x/out --seed 1", "--output_dir out --seed 1"),
        ("see https://huggingface.co/me/tiny/tree/abc", "see https://huggingface.co/me/tiny/tree/abc"),
        ("outputs/sample/model and 3 images/s", "outputs/sample/model and 3 images/s"),
        ("<p>one</p><p>two</p>", "<p>one</p><p>two</p>"),
    ],
)
def test_places_lose_their_folders_and_everything_else_stays(text, expected):
    assert files.anonymize(text) == expected
