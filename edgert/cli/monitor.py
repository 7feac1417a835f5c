"""edgert monitor: the control loop of a running process, live in the terminal."""

import argparse
import json
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from edgert.cli.options import Subparsers
from edgert.cli.terminal import clean, say
from edgert.errors import CorruptError, NotFoundError
from edgert.units import format_bytes

_POLL_S = 0.1
_LONGEST_LINE = 1 << 20
_SHADES = " ░▒▓█"
_DIM, _BLUE, _RED, _BOLD, _PLAIN = "\x1b[2m", "\x1b[38;5;74m", "\x1b[38;5;203m", "\x1b[1m", "\x1b[0m"
_HOME, _CLEAR_REST, _CLEAR_BELOW, _HIDE_CURSOR, _SHOW_CURSOR = (
    "\x1b[H",
    "\x1b[K",
    "\x1b[J",
    "\x1b[?25l",
    "\x1b[?25h",
)


def register(subparsers: Subparsers) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "monitor",
        help="watch a running model's control loop",
        description="Show what a model under --control auto --control-log FILE senses and does, as it runs; ends with it.",
    )
    parser.add_argument("file", metavar="FILE", type=Path, help="the record that is being written")
    parser.add_argument("--once", action="store_true", help="show the state that was recorded last, and end")
    return parser


def run(args: argparse.Namespace) -> int:
    if not args.file.is_file():
        raise NotFoundError(f"{args.file}: there is no such file; --control-log writes one")
    with args.file.open(encoding="utf-8") as file:
        head = _parse(file.readline(_LONGEST_LINE))
        if head is None or head.get("format") != "edgert-control":
            raise CorruptError(f"{args.file}, line 1: not the head of a control record")
        if args.once:
            last = None
            for line in _lines(file):
                last = line if line.get("kind") == "window" else last
            say("\n".join(screen(head, last or {}, [], colours=False)))
            return 0
        _follow(file, head)
    return 0


def _follow(file: IO[str], head: Mapping[str, Any]) -> None:
    moves: list[str] = []
    live = sys.stdout.isatty()
    sys.stdout.write(_HIDE_CURSOR + "\x1b[2J" if live else "")
    try:
        while True:
            shown = None
            for line in _lines(file):
                moves = [*moves, *_moved(line)][-6:]
                shown = line if line.get("kind") == "window" else shown
            if shown is not None:
                lines = screen(head, shown, moves, colours=live)
                text = "".join(f"{line}{_CLEAR_REST}\n" for line in lines)
                sys.stdout.write(_HOME + text + _CLEAR_BELOW if live else "\n".join(lines) + "\n\n")
                sys.stdout.flush()
            if not _runs(head["about"]["pid"]):
                return
            time.sleep(_POLL_S)
    finally:
        sys.stdout.write(_SHOW_CURSOR if live else "")
        sys.stdout.flush()


def _lines(file: IO[str]) -> Iterator[dict[str, Any]]:
    """Whole lines that are there; one that is being written is left for the next time."""
    while True:
        place = file.tell()
        text = file.readline(_LONGEST_LINE)
        if not text.endswith("\n"):
            file.seek(place)
            return
        line = _parse(text)
        if line is not None:
            yield line


def _parse(text: str) -> dict[str, Any] | None:
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return line if isinstance(line, dict) else None


def _runs(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def screen(head: Mapping[str, Any], line: Mapping[str, Any], moves: list[str], *, colours: bool) -> list[str]:
    """The picture of one window, a string a line."""
    paint = (lambda colour, text: f"{colour}{text}{_PLAIN}") if colours else (lambda _, text: text)
    about, bounds = head["about"], head["settings"]["bounds"]
    lines = [paint(_BOLD, clean(f"{about['model']}, process {about['pid']}")), ""]
    if not line:
        return [*lines, "no window has been recorded yet"]
    s, counted, knobs = line["signals"], line["counted"], line["knobs"]
    used = counted["expert_hits"] + counted["expert_prefetch_hits"]
    asked = used + counted["expert_misses"]
    seconds, tokens = bounds["window_ms"] / 1000, s["tokens"]
    p95, high = s["p95_ms"], bounds["token_time_high_ms"]
    late = p95 is not None and p95 > high
    lines += [
        f"token      p50 {_of(s['p50_ms'], 'ms')}   p95 {paint(_RED if late else _BLUE, _of(p95, 'ms'))}   bound {high:g} ms   "
        f"{tokens / seconds:.1f} tok/s",
        f"experts    hits {used / asked if asked else 1:.0%}   misses {counted['expert_misses'] / tokens if tokens else 0:.1f} a token   "
        f"waited {1000 * counted['stall_s'] / tokens if tokens else 0:.1f} ms a token   read {format_bytes(counted['bytes_read'] / seconds)}/s",
        f"memory     slots {_bar(counted['slot_bytes'], head['settings']['plant']['most_bytes'])} "
        f"{format_bytes(counted['slot_bytes'])} of {format_bytes(knobs['expert_memory'])}   "
        f"available {'unknown' if line['available_bytes'] is None else format_bytes(line['available_bytes'])}   "
        f"pressure {_of(s['memory_pressure'], '')}",
        f"machine    {s['cores']} cores   waiting for them {_of(s['cpu_pressure'], '')}   temperature {_of(s['temperature'], '°C')} "
        f"(bound {bounds['temperature_high_celsius']:g})",
        f"knobs      {knobs['threads']} threads   a token in at least {knobs['token_interval_ms']:g} ms"
        + "".join(f"   {name} {knobs[name]:g}" for name in knobs if knobs[name] and "_m" in name and name.endswith("misses")),
        "",
    ]  # fmt: skip
    lines += _store(head, line, paint)
    lines += ["", *(clean(move) for move in moves)]
    return lines


def _store(head: Mapping[str, Any], line: Mapping[str, Any], paint: Any) -> list[str]:
    """A row a layer: a cell an expert where they fit, else the share that is resident."""
    size = shutil.get_terminal_size()
    rows = max(1, size.lines - 18) if sys.stdout.isatty() else len(line["resident"])
    room = size.columns - 12
    lines = []
    for index, (count, held) in enumerate(zip(head["about"]["layers"], line["resident"], strict=True)):
        if index == rows:
            lines.append(paint(_DIM, f"and {len(line['resident']) - rows} layers more"))
            break
        store = line.get("store")
        if store is not None and count <= room:
            cells = paint(
                _BLUE, "".join("■" if code == "2" else "□" if code == "1" else "·" for code in store[index])
            )
        else:
            cells = paint(_BLUE, _bar(held, count)) + f" {held} of {count}"
        lines.append(f"{paint(_DIM, f'layer {index:<4}')} {cells}")
    return lines


def _bar(value: float, most: float, width: int = 24) -> str:
    eighths = round(width * (len(_SHADES) - 1) * min(1.0, value / most)) if most else 0
    full, rest = divmod(eighths, len(_SHADES) - 1)
    return (_SHADES[-1] * full + (_SHADES[rest] if rest else "")).ljust(width, "·")


def _of(value: float | None, unit: str) -> str:
    return "-" if value is None else f"{value:.3g} {unit}".rstrip()


def _moved(line: Mapping[str, Any]) -> list[str]:
    moves = [
        f"{name} {made['action']} {'+' if made['direction'] > 0 else '-'} {made['reason']}"
        for name, made in line["decisions"].items()
        if made["action"] != "hold"
    ]
    return [f"{line['t']:.1f} s  {'; '.join(moves)}"] if moves else []
