"""An ensemble of finished runs: the mean of their calibrated probabilities, with csv, metrics, report and record.

    python -m transfer.ensemble outputs/lite2 outputs/vit --output_dir outputs/ensemble

The runs may have different backbones and image sizes, but must have the same classes, validation and test images.
Each architecture has the same weight in the mean, however many runs it has. A folder of `--seeds` stands for the runs
of its seeds. Only the runs' folders are read: no data and no model.
"""

import argparse
import contextlib
import os
import shlex
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from transfer.config import SUBMISSION_LABELS
from transfer.data.layouts import DatasetFiles
from transfer.data.listing import natural_key
from transfer.errors import UserError, exits_cleanly
from transfer.evaluation.metrics import EnsembleMembers, RunMetrics, describe_metrics, find_hits, measure
from transfer.evaluation.predictions import (
    FILE_NAME,
    Predictions,
    average_views,
    fit_temperature,
    measure_calibration,
)
from transfer.files import claim_output_dir, is_finished, read_json, write_atomically
from transfer.reporting import RunResults, align_runs
from transfer.reporting.page import redraw_report
from transfer.runs.record import make_record, read_record, write_record
from transfer.runs.repeats import start_of
from transfer.submission import digest_of, fill_submission, look_at
from transfer.submission.checker import check_rows

# The runs


@dataclass(frozen=True)
class Member:
    """A finished run, and what identifies its predictions."""

    name: str  # the end of its path: metrics.json holds no path of this machine
    architecture: str  # such as efficientnet; of a timm model its name, of an ensemble its path
    results: RunResults
    digest: str  # sha256 of predictions.npz

    @classmethod
    def read(cls, folder: Path, name: str) -> "Member":
        """Read a finished run. Raises `UserError` for any other folder."""
        if not is_finished(folder):
            raise UserError(f"{folder}: is not a finished run; name output folders of finished runs")
        results = RunResults.read(folder, read_record(folder / "run.json"))
        if not results.class_ids:
            raise UserError(f"{folder}: its model does not name its classes, so it is not a run of this project")
        logits = results.predictions.validation_logits, results.predictions.test_logits
        if not all(np.isfinite(values).all() for values in logits):
            raise UserError(f"{folder}: its predictions are not finite numbers; leave it out")
        config = {"model_type": name} if "members" in results.record else read_json(folder / "model" / "config.json")
        architecture = config.get("architecture") or config.get("model_type") or ""
        return cls(name, architecture, results, digest_of((folder / FILE_NAME).read_bytes()))

    @property
    def folder(self) -> Path:
        return self.results.folder

    @property
    def class_ids(self) -> list[str]:
        return self.results.class_ids

    @property
    def predictions(self) -> Predictions:
        return self.results.predictions

    @property
    def accuracy(self) -> float:
        """On the validation images."""
        return float(self.predictions.hits.mean())


def list_folders(folders: Sequence[Path]) -> list[Path]:
    """The folders of single runs; a folder of `--seeds` stands for those of its seeds. Raises `UserError`."""
    found: list[Path] = []
    for folder in folders:
        seeds = [path.parent for path in folder.glob("seed-*/run.json")] if is_finished(folder) else []
        found += sorted(seeds, key=lambda path: natural_key(path.name)) or [folder]
    places = [folder.resolve() for folder in found]
    for folder, place in zip(found, places, strict=True):
        if places.count(place) > 1:
            raise UserError(f"{folder}: is given twice; leave one out")
    return found


def check_fit(first: Member, other: Member) -> None:
    """Check that two runs can be averaged. Raises `UserError` with what differs."""
    pair = f"{first.folder} and {other.folder}"
    if first.digest == other.digest:
        raise UserError(f"{pair} have the same predictions; leave one out")
    if first.class_ids != other.class_ids:
        alike = sorted(first.class_ids) == sorted(other.class_ids)
        counts = f"{len(first.class_ids)} and {len(other.class_ids)}"
        raise UserError(f"{pair} have different classes ({'in another order' if alike else counts})")
    align_runs(first.results, other.results)
    ids = set(first.predictions.test_ids) ^ set(other.predictions.test_ids)
    if ids:
        raise UserError(
            f"{pair} have different test images ({len(ids)} are in only one of them, for example {min(ids)})"
        )


def read_members(folders: Sequence[Path]) -> list[Member]:
    """The runs to choose from, the most accurate first. Raises `UserError` unless they fit together."""
    found = list_folders(folders)
    above = os.path.commonpath([folder.resolve().parent for folder in found])
    members = [Member.read(folder, folder.resolve().relative_to(above).as_posix()) for folder in found]
    if len(members) < 2:
        raise UserError(f"{members[0].folder}: is a single run; an ensemble needs two or more")
    for position, other in enumerate(members):
        for first in members[:position]:
            check_fit(first, other)
    return sorted(members, key=lambda member: -member.accuracy)


# Their ensemble


def calibrate(member: Member, first: Member) -> tuple[np.ndarray, np.ndarray, float]:
    """(validation logits, test logits) divided by the temperature that is fitted on validation, and that temperature.

    The images are in the order of the first member.
    """

    def order(names: np.ndarray, wanted: np.ndarray) -> list[int]:
        place = {name: position for position, name in enumerate(names.tolist())}
        return [place[name] for name in wanted.tolist()]

    own, theirs = member.predictions, first.predictions
    temperature = fit_temperature(own.validation_logits.astype(np.float64), own.validation_labels)
    validation = own.validation_logits[order(own.validation_files, theirs.validation_files)]
    test = own.test_logits[order(own.test_ids, theirs.test_ids)]
    return validation / temperature, test / temperature, temperature


def average_members(members: Sequence[Member], logits: Mapping[str, np.ndarray]) -> np.ndarray:
    """The logits of a single run as they are; of several, the log of their mean probabilities.

    The mean is taken over the runs of each architecture first, then over the architectures: runs of the same one make
    similar mistakes.
    """
    alike: dict[str, list[np.ndarray]] = {}
    for member in members:
        alike.setdefault(member.architecture, []).append(logits[member.name])
    return average_views([average_views(group) for group in alike.values()])


def choose_runs(members: Sequence[Member], logits: Mapping[str, np.ndarray], labels: np.ndarray) -> list[Member]:
    """The runs to average: the first, and each later one that does not clearly lower the validation accuracy.

    It may lower it by one standard error of the difference, which is what chance does (Breiman et al. 1984).
    """
    kept, best = [members[0]], find_hits(logits[members[0].name], labels)
    for member in members[1:]:
        hits = find_hits(average_members([*kept, member], logits), labels)
        if best.sum() - hits.sum() <= np.sqrt((hits != best).sum()):
            kept.append(member)
            best = max(best, hits, key=np.sum)
    return kept


def combine(members: Sequence[Member]) -> tuple[RunMetrics, Predictions, dict[str, float]]:
    """The metrics and predictions of the ensemble, and the temperature of each run by its name."""
    first = members[0].predictions
    tried, tested, temperatures = {}, {}, {}
    for member in members:
        tried[member.name], tested[member.name], temperatures[member.name] = calibrate(member, members[0])
    labels = first.validation_labels
    kept = choose_runs(members, tried, labels)
    together, test = average_members(kept, tried), average_members(kept, tested)
    of_all = float(find_hits(average_members(members, tried), labels).mean())
    accuracy = {member.name: member.accuracy for member in members}
    summary = EnsembleMembers([member.name for member in kept], accuracy, of_all)
    metrics = RunMetrics(measure(together, labels), measure_calibration(together, labels), members=summary)
    predictions = Predictions(first.validation_files, labels, together, first.test_ids, test)
    return metrics, predictions, temperatures


def find_form(member: Member) -> DatasetFiles:
    """What a submission needs to know of the dataset, with the run's own csv as its template.

    Labels are written in the way that makes that csv from the run's own predictions. Raises `UserError`.
    """
    path, predictions, names = member.folder / "submission.csv", member.predictions, member.results.class_names
    data = DatasetFiles(
        kind="",
        root=Path(),
        class_ids=member.class_ids,
        synonyms=names,
        class_names=names,
        label_order="",
        train_files=[],
        train_labels=[],
        validation_files=[],
        validation_labels=[],
        test_files=[],
        test_ids=predictions.test_ids.tolist(),
        template_path=path,
    )
    calibration, content = member.results.metrics.calibration, path.read_bytes()
    temperature = calibration.temperature if calibration else 1.0
    for asked in (None, *SUBMISSION_LABELS):
        found = replace(data, submission_labels=asked)
        with contextlib.suppress(UserError):
            if fill_submission(found, data.test_ids, predictions.test_logits, temperature) == content:
                return found
    shown = look_at(path)
    if len(shown.columns) == 1 and not shown.has_fractions:
        raise UserError(f"{path}: was not made from {FILE_NAME} beside it, so how it writes labels is unknown")
    return replace(data, submission_labels="probability")  # whose last digits may differ between machines


# What it leaves


def describe_ensemble(
    words: Sequence[str], out: Path, members: Sequence[Member], kept: Sequence[str], temperatures: dict[str, float]
) -> dict:
    """The content of run.json."""
    best = members[0].results
    arguments = {name: best.record["arguments"].get(name) for name in ("data_dir", "dataset_name")}
    arguments |= {"model_name_or_path": f"Ensemble of {len(kept)} of {len(members)} runs", "output_dir": str(out)}
    record = make_record(
        shlex.join(["python", "-m", "transfer.ensemble", *words]),
        arguments,
        "precision: the runs' own; averaged in fp64",
        best.record["data_fingerprint"],
        best.record["split_fingerprint"],
        start_of([member.folder for member in members]),
    )
    runs_of = Counter(member.architecture for member in members if member.name in kept)
    listed = [
        {
            "path": str(member.folder),
            "weight": 1 / len(runs_of) / runs_of[member.architecture] if member.name in kept else 0,
            "temperature": temperatures[member.name],
            "predictions_sha256": member.digest,
            "weights_sha256": member.results.record.get("weights_sha256"),
        }
        for member in members
    ]
    classes = {"class_ids": members[0].class_ids, "class_names": best.class_names}
    counts = [member.results.record.get("train_counts") for member in members]
    if counts[0] and all(own == counts[0] for own in counts):
        classes["train_counts"] = counts[0]
    return record | {"local_model": True, "members": listed} | classes


def write_ensemble(words: Sequence[str], out: Path, members: Sequence[Member]) -> list[str]:
    """Write all results; returns the summary, as lines to print."""
    metrics, predictions, temperatures = combine(members)
    assert metrics.members and metrics.calibration
    record = describe_ensemble(words, out, members, metrics.members.kept, temperatures)
    data, csv = find_form(members[0]) if len(predictions.test_ids) else None, out / "submission.csv"
    if data:
        scores, temperature = predictions.test_logits, metrics.calibration.temperature
        submission = fill_submission(data, data.test_ids, scores, temperature)
        record["submission_sha256"] = digest_of(submission)
    predictions.save(out)
    metrics.write(out)
    write_record(out, record)
    lines = describe_metrics(metrics)
    if data:
        write_atomically(csv, submission)
        lines.append(f"submission  {csv} ({check_rows(csv, data):,} rows, checked)")
    report, without_pictures = redraw_report(out)  # last: if it fails, everything else is there
    lines.append(f"report      {report}")
    return [*lines, f"            without pictures: {without_pictures}"] if without_pictures else lines


@exits_cleanly
def main(argv: Sequence[str] | None = None) -> None:
    """Write the ensemble of the runs that the command line names."""
    words = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(
        prog="python -m transfer.ensemble",
        description="Average the calibrated probabilities of finished runs on the same split, of any backbones and "
        "image sizes. Each architecture has the same weight, and a run that clearly lowers the validation accuracy is "
        "left out. Writes submission.csv, predictions.npz, metrics.json, report.html and run.json.",
        epilog="example: python -m transfer.ensemble outputs/offline outputs/vit_base --output_dir outputs/ensemble",
    )
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="finished run; a folder of --seeds stands for its seeds"
    )
    parser.add_argument("--output_dir", type=Path, required=True, help="folder to write; must not hold a run")
    args = parser.parse_args(words)
    members = read_members(args.runs)
    claim_output_dir(args.output_dir, resuming=False)
    print(*write_ensemble(words, args.output_dir, members), sep="\n")


if __name__ == "__main__":
    main()
