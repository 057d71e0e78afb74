"""python -m transfer.reporting RUN [RUN]: write the report of a run again, or compare two runs."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from transfer.errors import UserError, exits_cleanly
from transfer.reporting import RunResults, compare_runs, describe_comparison
from transfer.reporting.page import redraw_report


def _print_comparison(first: Path, second: Path) -> None:
    comparison = compare_runs(RunResults.read(first), RunResults.read(second))
    print(*describe_comparison(comparison, str(first), str(second)), sep="\n")


def _print_report(folder: Path, data_dir: str | None) -> None:
    path, without_pictures = redraw_report(folder, data_dir)
    if without_pictures:
        print(f"without pictures: {without_pictures}")
    print(f"{path}  {path.stat().st_size / 2**20:.1f} MiB")


@exits_cleanly
def main(argv: Sequence[str] | None = None) -> None:
    """Write report.html of one run, or compare two runs."""
    parser = argparse.ArgumentParser(
        prog="python -m transfer.reporting",
        description="With one run: write its report.html again. With two runs: test whether one is better on the same "
        "validation images, or whether the difference is noise (McNemar's exact test).",
        epilog="example: python -m transfer.reporting outputs/offline outputs/vit_base",
    )
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="output folder of a run; two runs are compared"
    )
    parser.add_argument("--data_dir", help="dataset to read the pictures from [as in run.json]")
    args = parser.parse_args(argv)
    if len(args.runs) > 2:
        raise UserError(f"{len(args.runs)} runs given; give one to write its report, or two to compare them")
    if len(args.runs) == 2 and args.data_dir:
        raise UserError("--data_dir is for the report of one run; leave it out to compare two runs")
    if len(args.runs) == 2:
        _print_comparison(*args.runs)
    else:
        _print_report(args.runs[0], args.data_dir)


if __name__ == "__main__":
    main()
