"""edgert ps: what is running, of the daemon and beside it."""

import argparse
from typing import Any

from edgert.cli.options import Subparsers, add_json, add_settings
from edgert.cli.terminal import print_json, say, table
from edgert.processes import DAEMON, Process, ask_daemon, processes
from edgert.settings import Layers
from edgert.units import format_bytes


def register(subparsers: Subparsers) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "ps",
        help="show what is running",
        description="Show the models that a daemon (`edgert serve`) holds, and the processes of this machine that run edgert.",
    )
    add_settings(parser, DAEMON)
    add_json(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    layers = Layers.read()
    found = {s.name: layers.value(s, getattr(args, s.name)) for s in DAEMON}
    host, port, key_file = (found[s.name] if found[s.name] is not None else s.default for s in DAEMON)
    daemon = ask_daemon(host, port, key_file)
    running = list(processes())
    if args.json:
        print_json({"daemon": daemon, "processes": [one.as_object() for one in running]})
        return 0
    say(f"no daemon at {host}:{port}" if daemon is None else _daemon(daemon, f"{host}:{port}"))
    say("\n" + (_processes(running) if running else "no processes"))
    return 0


def _daemon(stats: dict[str, Any], where: str) -> str:
    rows = [("MODEL", "STATE", "REQUESTS", "BUDGET", "IN USE", "PINNED")]
    for model in stats["models"]:
        used = model.get("statistics", {}).get("used_bytes")
        rows.append(
            (
                model["name"],
                model["state"],
                str(model["users"]),
                format_bytes(model["budget_bytes"]) if model.get("budget_bytes") else "",
                format_bytes(used) if used is not None else "",
                "yes" if model["pinned"] else "",
            )
        )
    head = (
        f"daemon at {where}: {stats['state']}, {stats['requests_active']} requests at work, "
        f"budget {format_bytes(stats['budget_bytes'])}, up {_span(stats['uptime_s'])}"
    )
    return f"{head}\n\n{table(rows, right=(2, 3, 4))}"


def _processes(running: list[Process]) -> str:
    rows = [("PID", "COMMAND", "MEMORY", "UP")]
    rows += [(str(p.pid), f"{p.command:.80}", format_bytes(p.rss_bytes), _span(p.up_s)) for p in running]
    return table(rows, right=(0, 2, 3))


def _span(seconds: float) -> str:
    """Two figures: 5 s, 3 min, 2 h 5 min, 4 d 3 h."""
    minutes, hours, days = int(seconds // 60), int(seconds // 3600), int(seconds // 86400)
    if days:
        return f"{days} d {hours % 24} h"
    if hours:
        return f"{hours} h {minutes % 60} min"
    return f"{minutes} min" if minutes else f"{seconds:.0f} s"
