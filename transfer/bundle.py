"""The bundle to hand in: one zip with a run's code, csv, metrics and model link, without data or weights.

python -m transfer.bundle outputs/sample sample.zip
"""

import argparse
import io
import tarfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from transfer.errors import UserError, exits_cleanly
from transfer.evaluation.metrics import RunMetrics
from transfer.files import PROJECT, anonymize, hide_home, read_json, refuse_secrets, run_git, write_atomically

# The project's files, where git cannot list them.
SOURCES = (
    "*.py",
    "*.md",
    "LICENSE",
    "docs/**/*.*",
    "outputs/README.md",
    "*.yaml",
    "*.toml",
    "requirements*.txt",
    "constraints.txt",
    ".ci/*",
    "transfer/**/*.py",
    "transfer/models/*.txt",
    "transfer/reporting/*.html",
    "transfer/reporting/*.css",
    "transfer/reporting/*.js",
    "recipes/**/*.yaml",
    "recipes/**/*.sh",
    "benchmarks/*.py",
    "tests/*.py",
)

COVER = """# {title}

| | |
|---|---|
| model link | {link} |
| validation accuracy | {accuracy:.4f} (95% interval {low:.4f} to {high:.4f}, n={n}) |
| sha256 of submission.csv | {digest} |
| commit | {commit} |
| hardware | {device} |

{contents}

## Run it again

In `code/`, with the competition's data at the path in the command:

```bash
pip install -r requirements.txt -c constraints.txt
{command}
```
"""

CONTENTS = {
    "submission.csv": "the labels, as uploaded to Kaggle",
    "report.html": "the run's charts and metrics; open it in a browser",
    "metrics.json": "the run's metrics",
    "run.json": "the run's command, arguments, versions and fingerprints",
    "changes.patch": "uncommitted changes to the code",
    "code/": "the code at the run's commit",
}


def list_code(commit: str | None) -> dict[str, bytes]:
    """The project's files by name: those of a commit, or those on the disk without git."""
    archive = run_git("archive", "--format=tar", commit) if commit else None
    if archive is None:
        paths = sorted({path for pattern in SOURCES for path in PROJECT.glob(pattern) if path.is_file()})
        return {path.relative_to(PROJECT).as_posix(): path.read_bytes() for path in paths}
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        opened = ((member.name, tar.extractfile(member)) for member in tar)
        return {name: file.read() for name, file in opened if file}  # None for a folder


def _write_cover(record: Mapping, metrics: RunMetrics, title: str, files: Sequence[str]) -> str:
    validation, code = metrics.validation, record["code"]
    low, high = validation.accuracy_ci95
    listed = [f"- `{name}`: {what}" for name, what in CONTENTS.items() if name in files or name == "code/"]
    return COVER.format(
        title=title,
        link=record.get("model_link", {}).get("url", "not pushed: `--push_to_hub true --hub_model_id me/name` does"),
        accuracy=validation.accuracy,
        low=low,
        high=high,
        n=validation.n,
        digest=record.get("submission_sha256", "no test images, so no submission"),
        commit=(code["commit"] or "no git") + (" with changes.patch" if "changes.patch" in files else ""),
        device=record["device"],
        contents="\n".join(listed),
        command=anonymize(record["command"]),
    )


def collect(output_dir: Path) -> dict[str, bytes]:
    """The bundle's files by name. Raises `UserError` for a folder without a finished run."""
    record = read_json(output_dir / "run.json", "give the folder of a finished run, such as outputs/sample")
    metrics = RunMetrics.read(output_dir)
    files = {name: (output_dir / name).read_bytes() for name in CONTENTS if (output_dir / name).is_file()}
    files["run.json"] = anonymize(files["run.json"].decode()).encode()
    if "report.html" in files:
        files["report.html"] = hide_home(files["report.html"].decode()).encode()
    commit = record["code"]["commit"]
    changes = run_git("diff", commit) if commit and record["code"]["clean"] is False else None
    if changes:
        files["changes.patch"] = hide_home(changes.decode(errors="replace")).encode()
    files["README.md"] = _write_cover(record, metrics, output_dir.name, list(files)).encode()
    return files | {f"code/{name}": content for name, content in list_code(commit).items()}


def check_target(target: Path) -> None:
    """Check that the target is the name of a new zip. Raises `UserError`."""
    if target.suffix != ".zip":
        raise UserError(f"--hand_in {target}: give the name of a zip, such as {target.stem or 'hand_in'}.zip")
    if target.exists():
        raise UserError(f"--hand_in {target}: exists already; remove it or give another name")


def pack(output_dir: Path, target: Path) -> int:
    """Write the bundle atomically, with the same bytes for the same run; returns the number of its files.

    Raises `UserError` if a file holds an access token or the path of the home folder.
    """
    check_target(target)
    files = collect(output_dir)
    refuse_secrets(files)
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            entry = zipfile.ZipInfo(f"{target.stem}/{name}")  # with a fixed date, for reproducible bytes
            entry.compress_type, entry.external_attr = zipfile.ZIP_DEFLATED, 0o644 << 16
            archive.writestr(entry, data)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(target, content.getvalue())
    except OSError as fault:
        raise UserError(f"--hand_in {target}: cannot be written ({fault.strerror})") from None
    return len(files)


@exits_cleanly
def main(argv: Sequence[str] | None = None) -> None:
    """Write the bundle of a finished run."""
    parser = argparse.ArgumentParser(
        prog="python -m transfer.bundle", description="Pack a finished run to hand it in, without data or weights."
    )
    parser.add_argument("output_dir", type=Path, help="the run's folder, such as outputs/sample")
    parser.add_argument("target", type=Path, help="the zip to write")
    args = parser.parse_args(argv)
    print(f"hand-in     {args.target}: {pack(args.output_dir, args.target)} files")


if __name__ == "__main__":
    main()
