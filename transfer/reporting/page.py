"""Making report.html: at the end of a run, where nothing in it may harm the run, and from a finished one.

Small pictures of a data set's images, to stand inside the page.

report.html: one self-contained page about a run.
"""

import base64
import hashlib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from transfer.errors import UserError
from transfer.evaluation.comparison import RunResults, look_up, name_base
from transfer.evaluation.metrics import CALIBRATION_BINS, judge_confidence, order_classes, score_interval
from transfer.files import anonymise, leave_out_places, write_atomically
from transfer.reporting.charts import choose_classes, draw_matrix, draw_reliability, percent
from transfer.reporting.curves import draw_curves, from_the_start, list_repeats, list_steps
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


def open_album(run: RunResults, root: Path) -> Album:
    """Pictures of a run's data set."""
    predictions = run.predictions
    return Album(root, find_test_files(root, predictions.test_ids.tolist(), predictions.validation_files.tolist()))


def draw_report(folder: Path, record: Mapping, root: Path) -> None:
    """report.html of a run that is about to end; a fault in drawing it is a warning, and the run goes on."""
    try:
        run = RunResults.read(folder, record)
        write_page(run, open_album(run, root))
    except Exception as fault:  # hours of training are worth more than a picture of them
        reason = " ".join(f"{type(fault).__name__}: {fault}".split())
        print(
            f"warning: {FILE_NAME} could not be drawn ({reason}); the run is whole; "
            f"`python -m transfer.reporting {folder}` draws it again",
            file=sys.stderr,
        )


def redraw_report(folder: Path, data_dir: str | None = None) -> tuple[Path, str | None]:
    """report.html of a finished run; pictures come from `data_dir`, or from where run.json says that the data were.

    Returns its path and why there are no pictures, if there are none. Raises `UserError` where the folder holds no
    finished run, or where a data_dir that was asked for is not the run's.
    """
    run = RunResults.read(folder)
    place = data_dir or run.record.get("arguments", {}).get("data_dir")
    try:
        if place is None:
            raise UserError("run.json does not say where the data were; --data_dir names the place")
        root = find_data_root(str(place), str(run.predictions.validation_files[0]))
    except UserError as absent:
        if data_dir:
            raise
        return write_page(run, Album(None), str(absent)), str(absent)
    return write_page(run, open_album(run, root)), None


HERE = Path(__file__).parent
FILE_NAME = "report.html"

LEADERBOARD_IMAGES = 500  # of the competition's 5,000 test images, what its public leaderboard scores


def foresee_leaderboard(run: RunResults) -> dict | None:
    """What the public leaderboard would show of this model's true accuracy; None without test images."""
    images = min(LEADERBOARD_IMAGES, len(run.predictions.test_ids))
    if not images:
        return None
    hits = run.hits
    return {"images": images, "interval": score_interval(int(hits.sum()), len(hits), images)}


def clock(seconds: float) -> str:
    """A time as people read it."""
    return f"{seconds / 60:.1f} min" if seconds >= 60 else f"{seconds:.1f} s"


def list_tiles(run: RunResults, ece: float, leaderboard: Mapping | None) -> list[tuple[str, str]]:
    """The figures below the headline, as far as the run has them."""
    validation, seconds = run.metrics["validation"], look_up(run.metrics, "train", "seconds")
    shares = {
        "on training images": look_up(run.metrics, "train", "accuracy"),
        "before any training": look_up(run.metrics, "zero_epoch", "accuracy"),
    }
    tiles = [
        ("top-5 accuracy", percent(validation["top5_accuracy"])),
        ("macro F1", f"{validation['macro_f1']:.3f}"),
        ("loss", f"{validation['loss']:.3f}"),
        ("calibration error", percent(ece)),
        *((name, percent(share)) for name, share in shares.items() if share is not None),
    ]
    if seconds is not None:
        tiles.append(("training time", clock(seconds)))
    if leaderboard:
        low, high = leaderboard["interval"]
        tiles.append((f"on {leaderboard['images']} test images*", f"{100 * low:.1f}–{percent(high)}"))
    return tiles


def list_speeds(metrics: Mapping) -> list[tuple[str, str]]:
    """How fast the run was, as far as it was measured."""
    lines = []
    for key, what in (("train", "training, with its evaluations"), ("prediction", "prediction of the test images")):
        rate, seconds = look_up(metrics, key, "samples_per_second"), look_up(metrics, key, "seconds")
        if rate is not None and seconds is not None:
            lines.append((what, f"{rate:,.0f} images/s, {clock(seconds)}"))
    return lines


def list_links(run: RunResults) -> list[tuple[str, str]]:
    """Files beside the page that exist or are about to, and where the models are on the Hub."""
    beside = ["metrics.json", "run.json", "predictions.npz", "model/README.md", "trainer_state.json"]
    links = [(name, name) for name in beside if (run.folder / name).is_file() or name == "run.json"]
    if len(run.predictions.test_ids):
        links.insert(0, ("submission.csv", "submission.csv"))
    arguments = run.record["arguments"]
    if arguments.get("push_to_hub") and arguments.get("hub_model_id"):
        links.append(
            (f"the model, {arguments['hub_model_id']}", f"https://huggingface.co/{arguments['hub_model_id']}")
        )
    if not run.record.get("local_model", True):
        base = arguments["model_name_or_path"]
        links.append((f"started from {base}", f"https://huggingface.co/{base}"))
    return links


def list_settings(record: Mapping) -> list[tuple[str, str]]:
    """What somebody needs to get the same numbers again."""
    code, versions = record.get("code", {}), record.get("versions", {})
    commit = code.get("commit") or "unknown"
    state = {True: "", False: ", with uncommitted changes", None: ""}[code.get("clean")]
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


def sum_up(texts: Sequence[str], most: int = 12) -> str:
    """Names in a line, the rest of a long list counted."""
    return ", ".join(texts[:most]) + (f" and {len(texts) - most} more" if len(texts) > most else "")


def signed(points: float) -> str:
    """A difference with its sign."""
    return f"{points:+.1f}".replace("-", "−")


def _hash_of(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def open_templates() -> Environment:
    """Templates in which everything is escaped and every name must exist."""
    environment = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": percent, "sum_up": sum_up, "signed": signed}
    return environment


def _data_name(run: RunResults) -> str:
    arguments = run.record["arguments"]
    return arguments.get("dataset_name") or Path(str(arguments.get("data_dir"))).name


def render_page(run: RunResults, album: Album, without_pictures: str | None = None) -> str:
    """The page; `without_pictures` says why the album is empty."""
    found, script = Findings(run), (HERE / "page.js").read_text(encoding="utf-8")
    order = order_classes(found.probabilities, found.labels)
    shown = choose_classes(found.confusions, order)
    matrix, reading = draw_matrix(found.confusions, found.names, shown)
    reliability = judge_confidence(found.probabilities, found.labels)
    leaderboard, arguments = foresee_leaderboard(run), run.record["arguments"]
    return (
        open_templates()
        .get_template("page.html")
        .render(
            name=run.name,
            style=(HERE / "page.css").read_text(encoding="utf-8"),
            script=script,
            script_hash=_hash_of(script),
            classes=len(found.names),
            base=name_base(run.record),
            data_name=_data_name(run),
            handed_in=run.metrics.get("submission"),
            trained="train" in run.metrics,
            smoothing=arguments.get("label_smoothing_factor"),
            temperature=look_up(run.metrics, "calibration", "temperature"),
            scaled=look_up(run.metrics, "calibration", "ece_scaled"),
            validation=run.metrics["validation"],
            tiles=list_tiles(run, reliability.ece, leaderboard),
            leaderboard=leaderboard,
            steps=list_steps(run.metrics, arguments),
            repeats=list_repeats(run.metrics, arguments.get("seeds")),
            curves=draw_curves(from_the_start(run.histories, run.metrics, arguments)),
            class_tables=list_classes(found),
            matrix=matrix,
            reading=reading,
            matrix_classes=len(shown),
            pairs=show_pairs(found, album),
            mistakes=show_mistakes(found, album),
            reliability=reliability,
            reliability_chart=draw_reliability(reliability),
            bins=CALIBRATION_BINS,
            test=show_test(found, album),
            speeds=list_speeds(run.metrics),
            command=leave_out_places(run.record.get("command", "")),
            settings=list_settings(run.record),
            links=list_links(run),
            without_pictures=without_pictures and anonymise(without_pictures),
        )
    )


def write_page(run: RunResults, album: Album, without_pictures: str | None = None) -> Path:
    """report.html in the run's folder, whole or not at all."""
    path = run.folder / FILE_NAME
    write_atomically(path, render_page(run, album, without_pictures))
    return path
