"""Writes a run's report: one HTML file that opens from disk in any browser, with everything inside.

    python tools/report.py                                   # the newest run under runs/, also while it trains
    python tools/report.py runs/digits
    python tools/report.py runs/digits runs/digits_flow --out comparison.html

A single run's report is RUN/report.html. Several runs are compared in one page, comparison.html in the first run's
folder: overlaid curves and the differences of their configs.
"""

import argparse
import sys
from pathlib import Path

from mf_dist.runtime.errors import UserError, command_line
from mf_dist.runtime.figures import three_digits
from mf_dist.runtime.outputs import refuse_inside
from mf_dist.runtime.paths import expanded_path


@command_line
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "runs", nargs="*", type=expanded_path, metavar="RUN", help="run folder (default: the newest under runs/)"
    )
    parser.add_argument(
        "--out",
        type=expanded_path,
        help="HTML file to write (default: report.html, or comparison.html for several, in the first run's folder)",
    )
    args = parser.parse_args()
    if args.out and (args.out.suffix.lower() not in (".html", ".htm") or args.out.is_dir()):
        raise UserError(f"--out {str(args.out)!r} must be a file name ending in .html")
    from mf_dist.report.collect import newest_run
    from mf_dist.report.page import write_report

    runs = args.runs or [newest_run(Path("runs"))]
    out = args.out or runs[0] / ("report.html" if len(runs) == 1 else "comparison.html")
    for run in runs:
        refuse_inside([out], run / "checkpoints")
    write_report(runs, out)
    print(f"{', '.join(map(str, runs))}: {out} ({three_digits(out.stat().st_size / 1e6)} MB)")


if __name__ == "__main__":
    sys.exit(main())
