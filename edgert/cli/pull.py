"""edgert pull: a model of the Hugging Face hub, as a bundle that runs by name."""

import argparse
import dataclasses
import sys
from typing import Any

from edgert.cli.convert import add_formats, conversion_options, describe
from edgert.cli.options import Subparsers, add_json
from edgert.cli.terminal import note, print_json, progress, say


def register(subparsers: Subparsers) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "pull",
        help="fetch a model from the Hugging Face hub and convert it",
        description="Fetch a model and make a bundle of it in $EDGERT_HOME/models, which `edgert run NAME` finds. Shards are "
        "converted one after the other: the disk holds the bundle and one of them. Broken downloads are gone on with; "
        "HF_ENDPOINT, HF_TOKEN, HF_HOME and HF_HUB_OFFLINE are honoured.",
    )
    parser.add_argument(
        "model",
        metavar="hf:ORG/NAME[@REVISION][:FILE]",
        help="FILE: a GGUF file of the repository, its quantisation (Q4_K_M), or an ONNX file",
    )
    parser.add_argument("--name", metavar="NAME", help="of the bundle (default: the repository's)")
    parser.add_argument("--keep", action="store_true", help="leave the download in the Hugging Face cache")
    parser.add_argument("--offline", action="store_true", help="from the Hugging Face cache alone")
    add_formats(parser)
    add_json(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    from huggingface_hub import utils as library_utils

    from edgert.pull import pull

    if not sys.stderr.isatty():
        utils: Any = library_utils  # whose stubs leave this out
        utils.disable_progress_bars()
    with progress("convert") as update:
        report = pull(
            args.model,
            name=args.name,
            keep=args.keep,
            offline=args.offline,
            progress=update,
            tell=note,
            **conversion_options(args),
        )
    if args.json:
        print_json({**dataclasses.asdict(report), "path": str(report.path)})
        return 0
    for line in report.notes:
        note(f"edgert: note: {line}")
    say(describe(report))
    note(f"`edgert run {report.path.name.removesuffix('.edgert')}` runs it")
    return 0
