"""The layers of the code, and how large it may get before somebody asks why."""

import ast
import shutil
import subprocess
import sys
from pathlib import Path

from conftest import ROOT

MOST_MODULES = 45
ENTRY_LINES, ENTRY_NAMES = 150, 25


def test_imports_run_down_only():
    command = shutil.which("lint-imports", path=str(Path(sys.executable).parent)) or "lint-imports"
    done = subprocess.run([command, "--no-cache"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_package_stays_small_enough_to_hold_in_the_head():
    modules = [path for path in (ROOT / "transfer").rglob("*.py") if not path.name.startswith("__")]
    assert len(modules) <= MOST_MODULES


def test_the_entry_is_a_story_of_few_names():
    text = (ROOT / "finetune_vit.py").read_text()
    names = [
        name
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in node.names
        if (getattr(node, "module", None) or name.name).split(".")[0] in ("transfer", "data_loading")
    ]
    assert len(text.splitlines()) <= ENTRY_LINES and len(names) <= ENTRY_NAMES
