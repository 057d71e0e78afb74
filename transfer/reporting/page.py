"""Self-contained pages: report.html about a finished run, and the comparison of two runs."""

import base64
import hashlib
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from transfer.errors import UserError
from transfer.evaluation.metrics import RunMetrics, score_interval
from transfer.evaluation.predictions import CALIBRATION_BINS, Reliability, measure_reliability, order_classes
from transfer.files import anonymize, leave_out_places, write_atomically
from transfer.reporting import (
    TOP5_FROM,
    RunResults,
    align_runs,
    base_model_name,
    compare_runs,
    data_name,
    describe_comparison,
)
from transfer.reporting.charts import (
    NUMBERED_CLASSES,
    choose_classes,
    draw_curves,
    draw_matrix,
    draw_reliability,
    list_repeats,
    list_steps,
    percent,
    start_histories,
    tabulate_matrix,
)
from transfer.reporting.findings import (
    Album,
    Findings,
    compare_classes,
    find_data_root,
    find_test_files,
    list_classes,
    list_differing_settings,
    show_differences,
    show_mistakes,
    show_pairs,
    show_test,
    show_training_images,
)

HERE = Path(__file__).parent
FILE_NAME = "report.html"
FEWEST_FOR_CALIBRATION = 200  # validation images; of fewer, most of the measured error is chance
# What stands on the page for a folder that would show others of this machine.
STAND_INS = {
    "PROJECT": "PROJECT by the folder of finetune_vit.py",
    "RUN": "RUN by the folder of this page",
    "RUNS": "RUNS by the folder of the runs",
}
# The competition, by its numbers of classes and of test images, and how many of these its public leaderboard scores.
COMPETITION_CLASSES, COMPETITION_IMAGES, LEADERBOARD_IMAGES = 100, 5000, 500


def format_seconds(seconds: float) -> str:
    """A duration in minutes, or in seconds if it is below one minute."""
    return f"{seconds / 60:.1f} min" if seconds >= 60 else f"{seconds:.1f} s"


def signed(points: float) -> str:
    """A difference with its sign."""
    return f"{points:+.1f}".replace("-", "−")


def sum_up(texts: Sequence[str], most: int = 12) -> str:
    """The first names of a list in one line, and how many more there are."""
    return ", ".join(texts[:most]) + (f" and {len(texts) - most} more" if len(texts) > most else "")


def join_words(parts: Sequence[str]) -> str:
    """The parts as a list in a sentence."""
    return " and ".join(filter(None, [", ".join(parts[:-1]), parts[-1]]))


def fill_rows(items: int, most: int) -> int:
    """How many of at most `most` columns to use, so that the last row of a gallery lacks the fewest items."""
    return min(range(most, most // 2, -1), key=lambda columns: -items % columns)


def expect_leaderboard(run: RunResults) -> dict | None:
    """The interval of the accuracy on the competition's public leaderboard; None for all other data."""
    images, hits = len(run.predictions.test_ids), run.predictions.hits
    wordnet = all(re.fullmatch(r"n\d{8}", class_id) for class_id in run.class_ids)
    if not wordnet or len(run.class_ids) != COMPETITION_CLASSES or images != COMPETITION_IMAGES:
        return None
    interval = score_interval(int(hits.sum()), len(hits), LEADERBOARD_IMAGES)
    return {"images": LEADERBOARD_IMAGES, "of": images, "interval": interval}


def list_tiles(metrics: RunMetrics, classes: int, ece: float | None, leaderboard: Mapping | None) -> list[tuple]:
    """The figures below the headline that the run has."""
    validation = metrics.validation
    tiles = [("macro F1", f"{validation.macro_f1:.3f}"), ("loss", f"{validation.loss:.3f}")]
    if classes >= TOP5_FROM:
        tiles.insert(0, ("top-5 accuracy", percent(validation.top5_accuracy)))
    if metrics.test:
        tiles.insert(0, ("test accuracy", percent(metrics.test.accuracy)))
    if ece is not None:
        tiles.append(("calibration error", percent(ece)))
    if metrics.train:
        tiles.append(("training accuracy", percent(metrics.train.accuracy)))
    if metrics.zero_epoch:
        tiles.append(("before training", percent(metrics.zero_epoch.accuracy)))
    if leaderboard:
        low, high = leaderboard["interval"]
        tiles.append(("public leaderboard*", f"{100 * low:.1f}–{percent(high)}"))
    return tiles


def list_costs(run: RunResults) -> list[tuple[str, str]]:
    """Time, speed and size, as tiles."""
    metrics, record = run.metrics, run.record
    tiles = []
    if record.get("seconds"):
        tiles.append(("total time", format_seconds(record["seconds"])))
    if metrics.train:
        tiles.append(("training time", format_seconds(metrics.train.seconds)))
        tiles.append(("training images/s", f"{metrics.train.samples_per_second:,.0f}"))
    if metrics.prediction:
        tiles.append(("predicted images/s", f"{metrics.prediction.samples_per_second:,.0f}"))
    if parameters := record.get("parameters"):
        tiles.append(("parameters", f"{parameters / 1e6:,.1f} million" if parameters >= 1e6 else f"{parameters:,}"))
    if weights := sum(path.stat().st_size for path in (run.folder / "model").glob("*.safetensors")):
        tiles.append(("model file", f"{weights / 1e6:,.1f} MB" if weights >= 1e6 else f"{weights / 1e3:,.0f} kB"))
    return tiles


def list_left_out(found: Findings, test: Mapping | None) -> list[str]:
    """What the page leaves out because the numbers behind it are too small, and which they are."""
    classes, validated = len(found.names), len(found.labels)
    left_out = []
    if classes < TOP5_FROM:
        left_out.append(f"top-5 accuracy ({classes} classes)")
    if validated < FEWEST_FOR_CALIBRATION:
        left_out.append(f"calibration ({validated} validation images)")
    if test and not test["deviating"]:
        left_out.append(f"expected counts of test predictions ({test['images']} images of {classes} classes)")
    return left_out


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
    environment.filters |= {"percent": percent, "sum_up": sum_up, "signed": signed, "join_words": join_words}
    environment.filters["fill_rows"] = fill_rows
    return environment


def render(template: str, **values) -> str:
    """A page from one of the templates, with the style and the script that all share."""
    style, script = ((HERE / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    # The page's security policy allows the script with this hash alone.
    script_hash = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    page = open_templates().get_template(template)
    return page.render(style=style, script=script, script_hash=script_hash, **values)


def _stand_in(place: str, name: str) -> str:
    """A path as it was given, or, where it would show folders of this machine, with `name` for its folder."""
    path = PurePosixPath(place.replace("\\", "/"))
    is_absolute = place.startswith(("/", "~")) or place[1:3] in (":\\", ":/")
    is_near = not is_absolute and (".." not in path.parts or len(set(path.parts) - {".."}) <= 2)
    return place if is_near else f"{name}/{path.name}"


def _repeat(words: Sequence[str], out: str) -> list[str] | None:
    """The command that repeats that of a run or an ensemble with this output folder; None for any other command."""
    script = next((i for i, word in enumerate(words) if PurePosixPath(word).name == "finetune_vit.py"), None)
    if script is not None:
        launcher = [_stand_in(word, "PROJECT") for word in words[: script + 1]]
        if launcher[:2] == ["accelerate", "launch"] and "--quiet" not in launcher:
            launcher.insert(2, "--quiet")
        return [*launcher, "--reproduce", _stand_in(f"{out}/run.json", "RUN")]
    if "transfer.ensemble" in words:
        split = [part for word in words for part in (word.split("=", 1) if word.startswith("--") else [word])]
        return [_stand_in(f"{out}-again" if word == out else word, "RUNS") for word in split]
    return None


def describe_repetition(record: Mapping) -> dict | None:
    """The command that repeats a run, with the folder that it is for; None for a record of another version."""
    words, out = shlex.split(record.get("command", "")), record["arguments"].get("output_dir")
    repeated = _repeat(words, out) if out else None
    if repeated is None:
        return None
    command, given = shlex.join(repeated), leave_out_places(record["command"])
    return {
        "folder": record.get("folder"),
        "command": command,
        "stand_ins": [what for name, what in STAND_INS.items() if f"{name}/" in command],
        "given": given,
        "is_cut": given != shlex.join(words),
        "compares": "--reproduce" in repeated,
    }


def _show_confusions(found: Findings, album: Album) -> dict:
    order = choose_classes(found.confusions, order_classes(found.probabilities, found.labels))
    shown: dict = {"matrix": None, "reading": None, "numbers": None}
    if len(found.names) <= NUMBERED_CLASSES:
        shown["numbers"] = tabulate_matrix(found.confusions, found.names, order)
    else:
        shown["matrix"], shown["reading"] = draw_matrix(found.confusions, found.names, order)
    return shown | {
        "matrix_classes": len(order),
        "rows": list_classes(found),
        "pairs": show_pairs(found, album),
        "mistakes": show_mistakes(found, album),
    }


def _show_training(run: RunResults, album: Album) -> dict:
    metrics, arguments = run.metrics, run.record["arguments"]
    repeats = list_repeats(metrics, arguments.get("seeds"))
    if repeats:
        folders = [f"{repeats['kind']}-{name}" for name, _ in repeats["rows"]]
        repeats["links"] = [f"{f}/{FILE_NAME}" if (run.folder / f / FILE_NAME).is_file() else None for f in folders]
    return {
        "trained": metrics.train is not None,
        "steps": list_steps(metrics, arguments),
        "repeats": repeats,
        "curves": draw_curves(start_histories(run.histories, metrics, arguments)),
        "smoothing": arguments.get("label_smoothing_factor"),
        "seen": show_training_images(run, album) if metrics.train else [],
    }


def _show_calibration(run: RunResults, found: Findings) -> dict:
    if len(found.labels) < FEWEST_FOR_CALIBRATION:
        return {"reliability": None}
    reliability = measure_reliability(found.probabilities, found.labels)
    return {
        "reliability": reliability,
        "reliability_chart": draw_reliability(reliability),
        "bins": CALIBRATION_BINS,
        "calibration": run.metrics.calibration,
    }


def render_page(run: RunResults, album: Album, without_pictures: str | None = None) -> str:
    """The page as html; `without_pictures` is the reason why the album is empty."""
    found = Findings(run)
    calibration, leaderboard, test = _show_calibration(run, found), expect_leaderboard(run), show_test(found, album)
    reliability: Reliability | None = calibration["reliability"]
    ece = None if reliability is None else reliability.ece
    return render(
        "page.html",
        name=run.name,
        classes=len(found.names),
        base=base_model_name(run.record),
        data_name=data_name(run.record["arguments"]),
        validation=run.metrics.validation,
        tiles=list_tiles(run.metrics, len(found.names), ece, leaderboard),
        costs=list_costs(run),
        leaderboard=leaderboard,
        left_out=list_left_out(found, test),
        submission=run.metrics.submission,
        members=run.metrics.members,
        copies=run.metrics.copies and run.metrics.copies.text,
        unreadable=run.record.get("unreadable_images", {}),
        counted=found.train_counts is not None,
        test=test,
        without_pictures=without_pictures and anonymize(without_pictures),
        again=describe_repetition(run.record),
        settings=list_settings(run.record),
        links=list_links(run),
        **calibration,
        **_show_training(run, album),
        **_show_confusions(found, album),
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


def _find_album(run: RunResults, data_dir: str | None) -> tuple[Album, str | None]:
    """The pictures of a run, from `data_dir` or the place that run.json names, or the reason why there are none.

    Raises `UserError` if `data_dir` is given and is not the run's dataset.
    """
    place = data_dir or run.record["arguments"].get("data_dir")
    try:
        if place is None:
            raise UserError("run.json does not name the dataset; give it with --data_dir")
        root = find_data_root(str(place), str(run.predictions.validation_files[0]))
    except UserError as absent:
        if data_dir:
            raise
        return Album(None), str(absent)
    return open_album(run, root), None


def redraw_report(folder: Path, data_dir: str | None = None) -> tuple[Path, str | None]:
    """Write report.html of a finished run; returns its path, and the reason if it has no pictures.

    Raises `UserError` if the folder holds no finished run, or if `data_dir` is given and is not the run's dataset.
    """
    run = RunResults.read(folder)
    album, without_pictures = _find_album(run, data_dir)
    return write_page(run, album, without_pictures), without_pictures


def write_comparison(first: RunResults, second: RunResults, path: Path, data_dir: str | None = None) -> str | None:
    """Write a page that compares two runs; returns the reason if it has no pictures. Raises `UserError`."""
    order, other = align_runs(first, second)
    comparison, runs = compare_runs(first, second), (first, second)
    names = [run.name if first.name != second.name else str(run.folder) for run in runs]
    album, without_pictures = _find_album(first, data_dir)
    compared = show_differences(first, second, order, other, album)
    histories = {name: run.histories.get("", []) for name, run in zip(names, runs, strict=True)}
    content = render(
        "comparison.html",
        names=names,
        runs=runs,
        bases=[base_model_name(run.record) for run in runs],
        costs=[dict(list_costs(run)) for run in runs],
        comparison=comparison,
        verdict=describe_comparison(comparison, *names)[-1],
        settings=list_differing_settings(first, second),
        rows=compare_classes(first, second),
        curves=[curve for curve in draw_curves(histories) if curve.title.startswith("Validation")],
        without_pictures=without_pictures and anonymize(without_pictures),
        **compared,
    )
    try:
        write_atomically(path, content)
    except OSError as fault:
        raise UserError(f"--html {path}: cannot be written ({fault.strerror})") from None
    return without_pictures
