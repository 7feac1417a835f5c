"""edgert doctor: what this machine lacks, and the line that mends it."""

import argparse
from dataclasses import asdict

from edgert.cli.options import Subparsers, add_json
from edgert.cli.terminal import print_json, say


def register(subparsers: Subparsers) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "doctor",
        help="name what this machine lacks, and what mends it",
        description="Look for what models larger than memory need of a machine: limits and pressure that can be seen, storage, "
        "pages, swap, frequencies, sensors.",
    )
    add_json(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    from edgert import settings
    from edgert.doctor import examine

    findings = examine(bundles=settings.home())
    if args.json:
        print_json([{**asdict(finding), "good": finding.good} for finding in findings])
        return 0
    width = max(len(finding.name) for finding in findings)
    for finding in findings:
        say(f"{'ok  ' if finding.good else 'LACK'}  {finding.name:<{width}}  {finding.found}")
        if not finding.good:
            say(f"      {'':<{width}}  {finding.why}")
            say(f"      {'':<{width}}  fix: {finding.fix}")
    return 0
