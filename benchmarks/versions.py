"""Run the core tests with the lowest versions that the requirements allow, and with the newest.

    python benchmarks/versions.py               # both, in virtual environments that are removed afterwards
    python benchmarks/versions.py --only lowest --tests tests/test_run.py

torch stays at the version of constraints.txt. This needs the network, but no GPU. The exit code is 1 if an
installation or a test fails. If the lowest versions fail, raise the lower bounds in requirements.txt.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import venv
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BOUND = re.compile(r"(?m)^([\w.-]+)>=([\w.]+)")
# One file for what each library is used for.
CORE = (
    "backbones bad_input card checker cli compatibility data_loading experiment files label_tables layouts lora "
    "predict predictions reporting run submission survival terminal views"
)


def read_requirements(name: str) -> str:
    """The lines of a requirements file and of those that it includes."""
    text = (ROOT / name).read_text(encoding="utf-8")
    return re.sub(r"(?m)^-r (\S+)$", lambda found: read_requirements(found[1]), text)


def write_requirements(kind: str, folder: Path) -> list[str]:
    """Write what is to be installed; returns the arguments of `pip install`."""
    torch = re.search(r"(?m)^torch==.*$", (ROOT / "constraints.txt").read_text(encoding="utf-8"))
    assert torch is not None
    text = re.sub(r"(?m)^torch>=.*$", torch[0], read_requirements("requirements-dev.txt"))
    (folder / "requirements.txt").write_text(BOUND.sub(r"\1==\2 #", text) if kind == "lowest" else text)
    return ["-r", str(folder / "requirements.txt")]


def try_versions(kind: str, tests: Sequence[str]) -> bool:
    """Install the lowest or newest versions and run the tests; returns whether all of them pass."""
    with tempfile.TemporaryDirectory(prefix=f"{kind}-") as place:
        folder = Path(place)
        venv.create(folder / "venv", with_pip=True)
        python = [str(folder / "venv" / ("Scripts" if os.name == "nt" else "bin") / "python"), "-m"]
        environment = os.environ | {"HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "1"}
        for words in (
            ["pip", "install", "--quiet", *write_requirements(kind, folder)],
            ["pip", "list", "--format", "freeze"],
            ["pytest", "-p", "no:cacheprovider", *tests],
        ):
            print(f"{kind:<11} {' '.join(words)}", flush=True)
            if subprocess.run([*python, *words], cwd=ROOT, env=environment).returncode:
                return False
    return True


def main() -> None:
    """Try the versions and report which of them pass."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["lowest", "newest"])
    parser.add_argument("--tests", nargs="+", default=[f"tests/test_{name}.py" for name in CORE.split()])
    args = parser.parse_args()
    kinds = [args.only] if args.only else ["lowest", "newest"]
    passed = {kind: try_versions(kind, args.tests) for kind in kinds}
    for kind, is_good in passed.items():
        print(f"{kind:<11} {'passed' if is_good else 'failed'}")
    sys.exit(not all(passed.values()))


if __name__ == "__main__":
    main()
