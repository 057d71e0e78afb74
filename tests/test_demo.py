"""The page to drop a picture on: its answers, and the page itself in a browser where one is installed."""

import ast
import base64
import json
import os
import shutil
import socket
import subprocess
import sys
import time

import pytest
from conftest import ROOT
from PIL import Image
from transformers import pipeline

from transfer import demo

PATIENCE = 300  # seconds that a busy machine may take
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


@pytest.fixture
def picture(pristine_data):
    return sorted((pristine_data / "test" / "images").glob("*.JPEG"))[0]


def test_the_page_names_a_picture_as_the_pipeline_does(checkpoints, picture):
    name = demo.make_classifier(str(checkpoints("convnext")))
    expected = pipeline("image-classification", model=str(checkpoints("convnext")))(str(picture))
    assert name(Image.open(picture)) == {answer["label"]: pytest.approx(answer["score"]) for answer in expected}
    assert name(Image.open(picture).convert("L").convert("RGBA")) and name(None) == {}


def test_the_demo_needs_nothing_of_the_project_so_that_a_space_can_run_it():
    tree = ast.parse((ROOT / "transfer" / "demo.py").read_text())
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    foreign = {name.split(".")[0] for name in imported} - set(sys.stdlib_module_names)
    assert foreign == {"PIL", "transformers", "gradio"}


def test_without_gradio_the_demo_says_what_to_install(checkpoints, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(SystemExit) as stop:
        demo.main([str(checkpoints("convnext"))])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: the demo needs gradio")
    assert "pip install -r requirements-extras.txt" in error


def test_a_folder_without_a_model_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        demo.main([str(tmp_path)])
    assert stop.value.code == 2 and "holds no config.json; give a run's model folder" in capsys.readouterr().err


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for(app: subprocess.Popen, port: int, seconds: float = PATIENCE) -> None:
    """Until the app answers on its port."""
    for _ in range(int(seconds / 0.2)):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        assert app.poll() is None, "the app ended"
        time.sleep(0.2)
    raise AssertionError(f"no answer in {seconds} s")


DROP = """([zone, name, data]) => {
  const bytes = Uint8Array.from(atob(data), c => c.charCodeAt(0));
  const transfer = new DataTransfer();
  transfer.items.add(new File([bytes], name, {type: "image/jpeg"}));
  zone.dispatchEvent(new DragEvent("drop", {dataTransfer: transfer, bubbles: true, cancelable: true}));
}"""


def test_a_dropped_picture_gets_its_names_in_a_browser(checkpoints, picture, tmp_path):
    """Run as a Space runs it: the file alone, with demo.json beside it."""
    pytest.importorskip("gradio", reason="gradio is an optional extra (requirements-extras.txt)")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is an optional extra")
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"no browser is installed: {', '.join(BROWSERS)}")
    shutil.copy(ROOT / "transfer" / "demo.py", tmp_path / "app.py")
    (tmp_path / "demo.json").write_text(json.dumps({"model": str(checkpoints("convnext")), "revision": None}))
    url = f"http://127.0.0.1:{(port := free_port())}"
    environment = os.environ | {"GRADIO_SERVER_PORT": str(port), "GRADIO_SERVER_NAME": "127.0.0.1"}
    app = subprocess.Popen([sys.executable, "app.py"], cwd=tmp_path, env=environment)
    try:
        with playwright.sync_playwright() as play:
            window = play.chromium.launch(executable_path=browser, args=["--no-sandbox"], timeout=PATIENCE * 1000)
            page = window.new_page()
            wait_for(app, port)
            page.set_default_timeout(PATIENCE * 1000)
            page.goto(url)
            zone = page.wait_for_selector("[data-testid=file-upload]", state="attached")
            page.evaluate(DROP, [zone, picture.name, base64.b64encode(picture.read_bytes()).decode()])
            page.wait_for_selector("[data-testid=label-output-value]")
            shown = page.inner_text("body")
            if place := os.environ.get("DEMO_SCREENSHOT"):
                page.screenshot(path=place)
            window.close()
    finally:
        app.terminate()
        app.wait()
    for answer in pipeline("image-classification", model=str(checkpoints("convnext")))(str(picture)):
        assert answer["label"] in shown and f"{answer['score']:.0%}" in shown
