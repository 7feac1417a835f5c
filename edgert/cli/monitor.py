"""edgert monitor: the control loop of a running process, live in the terminal."""

import argparse
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import IO, Any, Protocol
from urllib.parse import urlsplit

from edgert.cli.options import Subparsers, add_settings
from edgert.cli.terminal import clean, say
from edgert.errors import CorruptError, InvalidArgumentError, NotFoundError, StorageError
from edgert.processes import DAEMON, ask_daemon
from edgert.settings import Layers
from edgert.units import format_bytes

_LONGEST_LINE = 1 << 20
_PATIENCE = 3  # times that a daemon does not answer
_MOST_SHOWN = 4096  # experts, one by one
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
        description="Show what a model under --control auto senses and does, as it runs; ends with it. Without a FILE it is a "
        "model of the daemon.",
    )
    parser.add_argument(
        "where",
        metavar="WHERE",
        nargs="?",
        help="a file, the record that is being written (--control-log), or a daemon, such as http://127.0.0.1:8343",
    )
    parser.add_argument(
        "--model", metavar="NAME", help="which of the daemon's models (the first that is controlled)"
    )
    parser.add_argument("--once", action="store_true", help="show the state that was recorded last, and end")
    add_settings(parser, DAEMON)
    return parser


def run(args: argparse.Namespace) -> int:
    at_daemon = args.where is None or args.where.startswith(("http://", "https://"))
    if args.model is not None and not at_daemon:
        raise InvalidArgumentError("--model: is of a daemon; a record is of one model")
    with closing(_daemon(args) if at_daemon else _Record(Path(args.where))) as source:
        try:
            if args.once:
                lines, _ = source.poll()
                windows = [line for line in lines if line.get("signals")]
                say("\n".join(screen(source.head, windows[-1] if windows else {}, [], colours=False)))
            else:
                _follow(source)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CorruptError(f"{source.name}: not what a control loop tells: {error!r:.200}") from error
    return 0


class _Source(Protocol):
    """Where the loop's lines come from."""

    name: str
    pause_s: float  # from poll to poll
    head: Mapping[str, Any]

    def poll(self) -> tuple[list[dict[str, Any]], bool]:
        """What has come since, and whether more can come."""

    def close(self) -> None: ...


class _Record:
    """A file that is being written, in parts: FILE is the latest."""

    pause_s = 0.1

    def __init__(self, path: Path) -> None:
        self.name, self._path = str(path), path
        if not path.is_file():
            raise NotFoundError(f"{path}: there is no such file; --control-log writes one")
        self._open()

    def _open(self) -> None:
        self._file = self._path.open(encoding="utf-8")
        head = _parse(self._file.readline(_LONGEST_LINE))
        if head is None or head.get("format") != "edgert-control":
            self._file.close()
            raise CorruptError(f"{self._path}, line 1: not the head of a control record")
        self.head: Mapping[str, Any] = head

    def poll(self) -> tuple[list[dict[str, Any]], bool]:
        runs = _runs(self.head["about"]["pid"])
        anew = self._is_anew()
        lines = list(_lines(self._file))
        if anew:
            self.close()
            self._open()
            lines += _lines(self._file)
        return lines, runs

    def _is_anew(self) -> bool:
        try:
            return not os.path.samestat(os.stat(self._path), os.fstat(self._file.fileno()))
        except FileNotFoundError:  # between two parts
            return False

    def close(self) -> None:
        self._file.close()


class _Daemon:
    """A model of a daemon, by /stats."""

    pause_s = 0.25

    def __init__(self, host: str, port: int, key_file: str | None, model: str | None) -> None:
        self.name, self._address, self._model = f"{host}:{port}", (host, port, key_file), model
        self._last_t, self._silent = -math.inf, 0
        stats = ask_daemon(*self._address)
        if stats is None:
            raise NotFoundError(
                f"no daemon at {self.name}; `edgert serve --control auto` is one, FILE names a record"
            )
        self._next: dict[str, Any] | None = self._found(stats)
        self.head: Mapping[str, Any] = self._next

    def _found(self, stats: Mapping[str, Any]) -> dict[str, Any]:
        """The state of the model's loop, and its store."""
        for model in stats["models"]:
            if self._model not in (None, model["name"]) or "control" not in model:
                continue
            rows = [bytes.fromhex(row) for row in model.get("store", [])]
            store = ["".join(str(code) for code in row) for row in rows]
            return {**model["control"], **({"store": store} if sum(map(len, store)) <= _MOST_SHOWN else {})}
        which = "no model is" if self._model is None else f"{self._model!r:.80} is not"
        raise NotFoundError(f"{self.name}: {which} loaded and controlled (edgert serve --control auto)")

    def poll(self) -> tuple[list[dict[str, Any]], bool]:
        state, self._next = self._next, None
        if state is None:
            try:
                stats = ask_daemon(*self._address)
                if stats is None:
                    return [], False
                state = self._found(stats)
            except NotFoundError:  # until it is loaded again
                return [], True
            except StorageError:  # it is about to end, or at its limit
                self._silent += 1
                if self._silent >= _PATIENCE:
                    raise
                return [], True
            self._silent = 0
        if state.get("t", self._last_t) == self._last_t:
            return [], True
        self._last_t = state["t"]
        return [state], True

    def close(self) -> None:
        pass


def _daemon(args: argparse.Namespace) -> _Daemon:
    layers = Layers.read()
    found = {s.name: layers.value(s, getattr(args, s.name)) for s in DAEMON}
    host, port, key_file = (found[s.name] if found[s.name] is not None else s.default for s in DAEMON)
    if args.where is not None:
        parts = urlsplit(args.where)
        try:
            host, port = parts.hostname, parts.port or port
        except ValueError:
            host = None
        if parts.scheme != "http" or not host or parts.path not in ("", "/"):
            raise InvalidArgumentError(f"{args.where!r:.200}: allowed is http://HOST:PORT, or a file")
    return _Daemon(host, port, key_file, args.model)


def _follow(source: _Source) -> None:
    moves: list[str] = []
    live = sys.stdout.isatty()
    sys.stdout.write(_HIDE_CURSOR + "\x1b[2J" if live else "")
    try:
        while True:
            shown = None
            lines, more = source.poll()
            for line in lines:
                moves = [*moves, *_moved(line)][-6:]
                shown = line if line.get("signals") else shown
            if shown is not None:
                picture = screen(source.head, shown, moves, colours=live)
                text = "".join(f"{line}{_CLEAR_REST}\n" for line in picture)
                sys.stdout.write(_HOME + text + _CLEAR_BELOW if live else "\n".join(picture) + "\n\n")
                sys.stdout.flush()
            if not more:
                return
            time.sleep(source.pause_s)
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
    if not line.get("signals"):
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
