"""python -m transfer.reporting RUN [RUN]: draw the report of a run again, or compare two."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from transfer.errors import UserError, exits_cleanly
from transfer.evaluation.comparison import RunResults, compare_runs, describe_comparison
from transfer.reporting.page import redraw_report


def _say_comparison(first: Path, second: Path) -> None:
    comparison = compare_runs(RunResults.read(first), RunResults.read(second))
    print(*describe_comparison(comparison, str(first), str(second)), sep="\n")


def _say_report(folder: Path, data_dir: str | None) -> None:
    path, without_pictures = redraw_report(folder, data_dir)
    if without_pictures:
        print(f"without pictures: {without_pictures}")
    print(f"{path}  {path.stat().st_size / 2**20:.1f} MiB")


@exits_cleanly
def main(argv: Sequence[str] | None = None) -> None:
    """Draw report.html of one run, or say whether one of two runs is better."""
    parser = argparse.ArgumentParser(
        prog="python -m transfer.reporting",
        description="One run: draw its report.html again. Two runs: say whether one is better on the same held-out "
        "images, or whether the difference is noise (McNemar's exact test).",
        epilog="example: python -m transfer.reporting outputs/offline outputs/vit_base",
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run's output folder; two are compared")
    parser.add_argument("--data_dir", help="where the pictures come from [what run.json says]")
    args = parser.parse_args(argv)
    if len(args.runs) > 2:
        raise UserError(f"{len(args.runs)} runs were named; one is drawn, two are compared")
    if len(args.runs) == 2 and args.data_dir:
        raise UserError("--data_dir is for the pictures of one run's report; leave it out to compare two")
    if len(args.runs) == 2:
        _say_comparison(*args.runs)
    else:
        _say_report(args.runs[0], args.data_dir)


if __name__ == "__main__":
    main()
