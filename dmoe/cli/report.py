"""`dmoe report RUN`: the HTML report of a run."""

from __future__ import annotations

import argparse
from pathlib import Path

from dmoe.cli.arguments import Parser


def main(args: list[str]) -> int:
    """Write RUN/report.html and RUN/plots/*.png, print the path."""
    parser = Parser(prog="dmoe report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run directory of dmoe train")
    options = parser.parse_args(args)
    from dmoe.observe.report import write_report

    print(write_report(options.run))
    return 0
