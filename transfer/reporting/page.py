"""report.html: one self-contained page about a finished run."""

import base64
import hashlib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from transfer.errors import UserError
from transfer.evaluation.metrics import RunMetrics, score_interval
from transfer.evaluation.predictions import CALIBRATION_BINS, measure_reliability, order_classes
from transfer.files import anonymize, leave_out_places, write_atomically
from transfer.reporting import RunResults, base_model_name
from transfer.reporting.charts import (
    choose_classes,
    draw_curves,
    draw_matrix,
    draw_reliability,
    list_repeats,
    list_steps,
    percent,
    start_histories,
)
from transfer.reporting.findings import (
    Album,
    Findings,
    find_data_root,
    find_test_files,
    list_classes,
    show_mistakes,
    show_pairs,
    show_test,
)

HERE = Path(__file__).parent
FILE_NAME = "report.html"
LEADERBOARD_IMAGES = 500  # test images that the competition's public leaderboard scores, of 5,000


def format_seconds(seconds: float) -> str:
    """A duration in minutes, or in seconds if it is below one minute."""
    return f"{seconds / 60:.1f} min" if seconds >= 60 else f"{seconds:.1f} s"


def signed(points: float) -> str:
    """A difference with its sign."""
    return f"{points:+.1f}".replace("-", "−")


def sum_up(texts: Sequence[str], most: int = 12) -> str:
    """The first names of a list in one line, and how many more there are."""
    return ", ".join(texts[:most]) + (f" and {len(texts) - most} more" if len(texts) > most else "")


def expect_leaderboard(run: RunResults) -> dict | None:
    """How many test images a public leaderboard scores, and the interval of its accuracy; None without test images."""
    images, hits = min(LEADERBOARD_IMAGES, len(run.predictions.test_ids)), run.predictions.hits
    if not images:
        return None
    return {"images": images, "interval": score_interval(int(hits.sum()), len(hits), images)}


def list_tiles(metrics: RunMetrics, ece: float, leaderboard: Mapping | None) -> list[tuple[str, str]]:
    """The figures below the headline that the run has."""
    validation = metrics.validation
    tiles = [
        ("top-5 accuracy", percent(validation.top5_accuracy)),
        ("macro F1", f"{validation.macro_f1:.3f}"),
        ("loss", f"{validation.loss:.3f}"),
        ("calibration error", percent(ece)),
    ]
    if metrics.test:
        tiles.insert(0, ("test accuracy", percent(metrics.test.accuracy)))
    if metrics.train:
        tiles.append(("training accuracy", percent(metrics.train.accuracy)))
    if metrics.zero_epoch:
        tiles.append(("accuracy before training", percent(metrics.zero_epoch.accuracy)))
    if metrics.train:
        tiles.append(("training time", format_seconds(metrics.train.seconds)))
    if leaderboard:
        low, high = leaderboard["interval"]
        tiles.append((f"on {leaderboard['images']} test images*", f"{100 * low:.1f}–{percent(high)}"))
    return tiles


def list_speeds(metrics: RunMetrics) -> list[tuple[str, str]]:
    """How fast the run was, for what it did."""
    measured = {"training, including evaluation": metrics.train, "prediction of the test images": metrics.prediction}
    return [
        (what, f"{speed.samples_per_second:,.0f} images/s, {format_seconds(speed.seconds)}")
        for what, speed in measured.items()
        if speed
    ]


def list_links(run: RunResults) -> list[tuple[str, str]]:
    """Links to the files of the run, and to its models on the Hub."""
    files = ["metrics.json", "run.json", "predictions.npz", "model/README.md", "trainer_state.json"]
    # run.json and submission.csv are written after the report.
    links = [(name, name) for name in files if (run.folder / name).is_file() or name == "run.json"]
    if len(run.predictions.test_ids):
        links.insert(0, ("submission.csv", "submission.csv"))
    arguments = run.record["arguments"]
    if arguments.get("push_to_hub") and arguments.get("hub_model_id"):
        name = arguments["hub_model_id"]
        links.append((f"model {name}", f"https://huggingface.co/{name}"))
    if not run.record.get("local_model", True):
        base = arguments["model_name_or_path"]
        links.append((f"base model {base}", f"https://huggingface.co/{base}"))
    return links


def list_settings(record: Mapping) -> list[tuple[str, str]]:
    """What decides whether another run gives the same results."""
    code, versions = record.get("code", {}), record.get("versions", {})
    commit = code.get("commit") or "unknown"
    state = ", with uncommitted changes" if code.get("clean") is False else ""
    settings = [
        ("commit", f"{commit}{state}"),
        ("precision", str(record.get("precision", "unknown")).removeprefix("precision: ")),
        ("hardware", record.get("device", "unknown")),
        ("versions", ", ".join(f"{name} {version}" for name, version in versions.items())),
        ("data fingerprint", record.get("data_fingerprint")),
        ("split fingerprint", record.get("split_fingerprint")),
        ("sha256 of submission.csv", record.get("submission_sha256")),
    ]
    return [(name, str(value)) for name, value in settings if value]


def open_templates() -> Environment:
    """The templates of this folder; they escape every value and fail on unknown names."""
    environment = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": percent, "sum_up": sum_up, "signed": signed}
    return environment


def _data_name(arguments: Mapping) -> str:
    return arguments.get("dataset_name") or Path(str(arguments.get("data_dir"))).name


def _show_script() -> dict[str, str]:
    """page.js, and the hash with which the page's security policy allows it."""
    script = (HERE / "page.js").read_text(encoding="utf-8")
    return {"script": script, "script_hash": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}


def _show_confusions(found: Findings, album: Album) -> dict:
    shown = choose_classes(found.confusions, order_classes(found.probabilities, found.labels))
    matrix, reading = draw_matrix(found.confusions, found.names, shown)
    return {
        "matrix": matrix,
        "reading": reading,
        "matrix_classes": len(shown),
        "class_tables": list_classes(found),
        "pairs": show_pairs(found, album),
        "mistakes": show_mistakes(found, album),
    }


def _show_training(run: RunResults) -> dict:
    metrics, arguments = run.metrics, run.record["arguments"]
    return {
        "trained": metrics.train is not None,
        "steps": list_steps(metrics, arguments),
        "repeats": list_repeats(metrics, arguments.get("seeds")),
        "curves": draw_curves(start_histories(run.histories, metrics, arguments)),
        "smoothing": arguments.get("label_smoothing_factor"),
    }


def _show_record(run: RunResults) -> dict:
    return {
        "speeds": list_speeds(run.metrics),
        "command": leave_out_places(run.record.get("command", "")),
        "settings": list_settings(run.record),
        "links": list_links(run),
    }


def render_page(run: RunResults, album: Album, without_pictures: str | None = None) -> str:
    """The page as html; `without_pictures` is the reason why the album is empty."""
    found = Findings(run)
    reliability = measure_reliability(found.probabilities, found.labels)
    leaderboard = expect_leaderboard(run)
    return (
        open_templates()
        .get_template("page.html")
        .render(
            name=run.name,
            style=(HERE / "page.css").read_text(encoding="utf-8"),
            classes=len(found.names),
            base=base_model_name(run.record),
            data_name=_data_name(run.record["arguments"]),
            validation=run.metrics.validation,
            tiles=list_tiles(run.metrics, reliability.ece, leaderboard),
            leaderboard=leaderboard,
            submission=run.metrics.submission,
            members=run.metrics.members,
            copies=run.metrics.copies and run.metrics.copies.text,
            unreadable=run.record.get("unreadable_images", {}),
            calibration=run.metrics.calibration,
            reliability=reliability,
            reliability_chart=draw_reliability(reliability),
            bins=CALIBRATION_BINS,
            test=show_test(found, album),
            without_pictures=without_pictures and anonymize(without_pictures),
            **_show_script(),
            **_show_training(run),
            **_show_confusions(found, album),
            **_show_record(run),
        )
    )


def write_page(run: RunResults, album: Album, without_pictures: str | None = None) -> Path:
    """Write report.html into the run's folder, atomically; returns its path."""
    path = run.folder / FILE_NAME
    write_atomically(path, render_page(run, album, without_pictures))
    return path


def open_album(run: RunResults, root: Path) -> Album:
    """The pictures of a run's dataset, whose root is given."""
    predictions = run.predictions
    return Album(root, find_test_files(root, predictions.test_ids.tolist(), predictions.validation_files.tolist()))


def draw_report(folder: Path, record: Mapping, root: Path) -> None:
    """Write report.html at the end of a run; a failure is only a warning, so that the run goes on."""
    try:
        run = RunResults.read(folder, record)
        write_page(run, open_album(run, root))
    except Exception as fault:  # a report is not worth the loss of a finished training
        reason = " ".join(f"{type(fault).__name__}: {fault}".split())
        print(
            f"warning: {FILE_NAME} could not be written ({reason}); all other results are complete; "
            f"`python -m transfer.reporting {folder}` writes it again",
            file=sys.stderr,
        )


def redraw_report(folder: Path, data_dir: str | None = None) -> tuple[Path, str | None]:
    """Write report.html of a finished run, with pictures from `data_dir`, or from the place that run.json names.

    Returns its path, and the reason if it has no pictures. Raises `UserError` if the folder holds no finished run, or
    if `data_dir` is given and is not the run's dataset.
    """
    run = RunResults.read(folder)
    place = data_dir or run.record["arguments"].get("data_dir")
    try:
        if place is None:
            raise UserError("run.json does not name the dataset; give it with --data_dir")
        root = find_data_root(str(place), str(run.predictions.validation_files[0]))
    except UserError as absent:
        if data_dir:
            raise
        return write_page(run, Album(None), str(absent)), str(absent)
    return write_page(run, open_album(run, root)), None
