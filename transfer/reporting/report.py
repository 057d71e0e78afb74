"""Making report.html: at the end of a run, where nothing in it may harm the run, and from a finished one."""

import sys
from collections.abc import Mapping
from pathlib import Path

from transfer import UserError
from transfer.reporting.page import FILE_NAME, write_page
from transfer.reporting.pictures import Album, find_data_root, find_test_files
from transfer.reporting.results import RunResults


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
