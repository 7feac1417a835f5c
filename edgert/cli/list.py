"""edgert list: the bundles that can be run by name."""

import argparse
from pathlib import Path
from typing import Any

from edgert.cli.options import Subparsers, add_json
from edgert.cli.terminal import one_line, print_json, say, table
from edgert.errors import EdgertError
from edgert.units import format_bytes


def register(subparsers: Subparsers) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "list",
        help="list the bundles that can be run by name",
        description="List the bundles in $EDGERT_HOME/models (~/.local/share/edgert/models) and the embedded one.",
    )
    add_json(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    from edgert.bundle import installed, models_dir

    rows = [_row(name, path) for name, path in installed()]
    if args.json:
        print_json({"models_dir": str(models_dir()), "models": rows})
        return 0
    cells = [("NAME", "ARCHITECTURE", "SIZE", "EXPERTS", "PATH")]
    for row in rows:
        if "error" in row:
            cells.append((row["name"], "unreadable", "", "", row["error"]))
        else:
            size, experts = format_bytes(row["bytes"]), str(row["num_experts"])
            cells.append((row["name"], row["architecture"], size, experts, row["path"]))
    say(table(cells, right=(2, 3)) if rows else f"no bundles in {models_dir()}; `edgert convert` makes them")
    return 0


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
