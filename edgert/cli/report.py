"""edgert report: a page of what the control loop recorded."""

import argparse
from pathlib import Path

from edgert.cli.options import Subparsers
from edgert.cli.terminal import note


def register(subparsers: Subparsers) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "report",
        help="draw the record of a control loop",
        description="Draw a record (--control-log) as one HTML file, drawings inside.",
    )
    parser.add_argument("file", metavar="FILE", type=Path, help="the record")
    parser.add_argument("-o", "--output", metavar="FILE", type=Path, default=Path("report.html"))
    return parser


def run(args: argparse.Namespace) -> int:
    from edgert.controlling.report import report_page

    args.output.write_text(report_page(args.file), encoding="utf-8")
    note(f"wrote {args.output}")
    return 0
