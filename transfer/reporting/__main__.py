"""python -m transfer.reporting RUN [RUN] [--html PAGE]: write the report of a run again, or compare two runs."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from transfer.errors import UserError, exits_cleanly
from transfer.reporting import RunResults, compare_runs, describe_comparison
from transfer.reporting.page import redraw_report, write_comparison


def _print_comparison(first: Path, second: Path, html: Path | None, data_dir: str | None) -> None:
    runs = RunResults.read(first), RunResults.read(second)
    comparison = compare_runs(*runs)
    print(*describe_comparison(comparison, str(first), str(second)), sep="\n")
    if html:
        without_pictures = write_comparison(*runs, html, data_dir)
        _print_page(html, without_pictures)


def _print_page(path: Path, without_pictures: str | None) -> None:
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
        epilog="example: python -m transfer.reporting outputs/offline outputs/vit_base --html comparison.html",
    )
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="output folder of a run; two runs are compared"
    )
    parser.add_argument("--html", type=Path, metavar="PAGE", help="with two runs: also write the comparison as a page")
    parser.add_argument("--data_dir", help="dataset to read the pictures from [as in run.json]")
    args = parser.parse_args(argv)
    if len(args.runs) > 2:
        raise UserError(f"{len(args.runs)} runs given; give one to write its report, or two to compare them")
    if len(args.runs) == 2 and args.data_dir and not args.html:
        raise UserError("--data_dir is for the report of one run; leave it out to compare two runs without --html")
    if len(args.runs) == 1 and args.html:
        raise UserError("--html is for two runs; the report of one run is written into its folder")
    if len(args.runs) == 2:
        first, second = args.runs
        _print_comparison(first, second, args.html, args.data_dir)
    else:
        _print_page(*redraw_report(args.runs[0], args.data_dir))


if __name__ == "__main__":
    main()
