"""edgert list: the bundles that can be run by name."""

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgert.cli.options import Subparsers, add_json
from edgert.cli.terminal import one_line, print_json, say, table
from edgert.errors import EdgertError
from edgert.units import format_bytes

if TYPE_CHECKING:
    from edgert import caches


def register(subparsers: Subparsers) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "list",
        help="list the bundles that can be run by name",
        description="List the bundles in $EDGERT_HOME/models (~/.local/share/edgert/models) and the embedded one.",
    )
    parser.add_argument(
        "--all",
        action="store_true",
        help="also the models in the caches of Hugging Face, LM Studio and ollama",
    )
    add_json(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    from edgert import caches
    from edgert.bundle import installed, models_dir

    rows = [_row(name, path) for name, path in installed()]
    elsewhere = list(caches.found()) if args.all else []
    if args.json:
        value: dict[str, Any] = {"models_dir": str(models_dir()), "models": rows}
        if args.all:
            value["elsewhere"] = [
                {**dataclasses.asdict(model), "path": str(model.path)} for model in elsewhere
            ]
        print_json(value)
        return 0
    cells = [("NAME", "ARCHITECTURE", "SIZE", "EXPERTS", "PATH")]
    for row in rows:
        if "error" in row:
            cells.append((row["name"], "unreadable", "", "", row["error"]))
        else:
            size, experts = format_bytes(row["bytes"]), str(row["num_experts"])
            cells.append((row["name"], row["architecture"], size, experts, row["path"]))
    say(table(cells, right=(2, 3)) if rows else f"no bundles in {models_dir()}; `edgert convert` makes them")
    if args.all:
        say("\n" + _elsewhere(elsewhere))
    return 0


def _elsewhere(models: "Sequence[caches.Found]") -> str:
    if not models:
        return "no models in the caches of Hugging Face, LM Studio and ollama"
    cells = [("NAME", "KIND", "ARCHITECTURE", "QUANTIZATION", "SIZE", "CONVERTS", "PATH")]
    for model in models:
        about = (model.kind, model.architecture or "unknown", model.quantization or "")
        converts = "yes" if model.convertible else "no"
        cells.append((model.name, *about, format_bytes(model.bytes), converts, str(model.path)))
    return table(cells, right=(4,))


def _row(name: str, path: Path) -> dict[str, Any]:
    from edgert.bundle import Bundle

    try:
        bundle = Bundle.open(path)
    except EdgertError as error:
        return {"name": name, "path": str(path), "error": one_line(error)}
    if bundle.component is not None:
        architecture = f"{bundle.component['architecture']} ({bundle.component['kind']})"
        return {
            "name": name,
            "path": str(path),
            "architecture": architecture,
            "bytes": bundle.bytes,
            "num_experts": 0,
        }
    return {
        "name": name,
        "path": str(path),
        "architecture": bundle.recipe["architecture"],
        "bytes": bundle.bytes,
        "num_experts": bundle.sizes["num_experts"],
    }
