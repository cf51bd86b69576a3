"""`dmoe report RUN`: the HTML report of a run, or of two side by side."""

from __future__ import annotations

import argparse
from pathlib import Path

from dmoe.cli.arguments import Parser


def main(args: list[str]) -> int:
    """Write RUN/report.html, report.json and plots/*.png, or with --against those of the comparison; print the path."""
    parser = Parser(prog="dmoe report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run directory of dmoe train")
    parser.add_argument("--against", type=Path, metavar="RUN2", help="compare with this run: RUN/against-RUN2.html")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON instead of the page's path")
    parser.add_argument("--no-png", action="store_true", help="leave plots/*.png out, which is half of the time")
    options = parser.parse_args(args)
    from dmoe.observe.report import write_comparison, write_report

    if options.against is not None:
        page = write_comparison(options.run, options.against, png=not options.no_png)
    else:
        page = write_report(options.run, png=not options.no_png)
    print(page.with_suffix(".json").read_text(encoding="utf-8") if options.json else page)
    return 0
