"""edgert events: event cameras under the fast/slow law, their files, place recognition, the simulator."""

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgert.cli.options import Subparsers, add_json
from edgert.cli.terminal import note, print_json, say
from edgert.errors import InvalidArgumentError

if TYPE_CHECKING:
    from edgert.events.camera import EventSource
    from edgert.events.tune import Response

_LAWS = ("fast-slow", "published", "fast-only", "slow-only", "fixed", "aimd", "pi")
_SPREAD = 5**0.5  # of a calibrated band, to either side: as wide as the published one


def register(subparsers: Subparsers) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "events",
        help="event cameras: hold the event rate, read files, recognise places, simulate",
        description="Hold an event camera's rate inside a band by its biases, and what belongs to it. What comes from the simulator "
        "is labelled simulated. Needs numpy: pip install 'edgert[events]'.",
    )
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    _add_run(actions)
    _add_simulate(actions)
    _add_replay(actions)
    _add_vpr(actions)
    _add_tune(actions)
    return parser


def run(args: argparse.Namespace) -> int:
    status: int = args.action(args)
    return status


def _source(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source",
        metavar="SOURCE",
        help="an event file, simulated:WORLD, or NAME:ARGUMENT of a driver that is installed",
    )
    parser.add_argument(
        "--window", metavar="SECONDS", type=float, default=0.3, help="length of a window (0.3)"
    )
    parser.add_argument("--windows", metavar="N", type=int, help="stop after so many")


def _add_run(actions: Any) -> None:
    parser = actions.add_parser(
        "run",
        help="hold the rate of a camera; of a file, show what would be decided",
        description="Read window after window, decide, and set the biases, which are restored at the end.",
    )
    _source(parser)
    parser.add_argument("--law", choices=_LAWS, default="fast-slow")
    parser.add_argument(
        "--band",
        nargs=2,
        type=float,
        metavar=("LOW", "HIGH"),
        help="events a second (5e5 2.5e6 for 346 x 260 pixels, in proportion for others)",
    )
    parser.add_argument(
        "--slew", type=int, default=8, metavar="UNITS", help="most that the fast bias moves in a window (8)"
    )
    parser.add_argument("--record", type=Path, metavar="FILE", help="write every decision, to be replayed")
    parser.add_argument("--plot", type=Path, metavar="FILE.html", help="draw the run")
    add_json(parser)
    parser.set_defaults(action=_run)


def _add_simulate(actions: Any) -> None:
    parser = actions.add_parser(
        "simulate",
        help="write the events of a simulated camera",
        description="A camera moves along a textured corridor. OUT.positions.json, beside the file, says where it was. Simulated.",
    )
    parser.add_argument("out", metavar="OUT", type=Path, help="FILE.aedat4, .raw (EVT 3) or .es")
    parser.add_argument("--world", type=int, default=0, metavar="SEED")
    parser.add_argument(
        "--light", type=float, default=1.0, metavar="X", help="1 is a lit room, 0.02 a dark one"
    )
    parser.add_argument("--speed", type=float, default=2.0, metavar="M_PER_S")
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument(
        "--law", choices=("none", *_LAWS), default="none", help="move the biases meanwhile (none)"
    )
    parser.add_argument("--noise", type=int, default=0, metavar="SEED", help="of the sensor")
    add_json(parser)
    parser.set_defaults(action=_simulate)


def _add_replay(actions: Any) -> None:
    parser = actions.add_parser(
        "replay",
        help="make a record's decisions again, bit for bit",
        description="Exit status 1 names the first line and field that differ.",
    )
    parser.add_argument("record", metavar="RECORD", type=Path)
    parser.add_argument("--plot", type=Path, metavar="FILE.html", help="draw it")
    add_json(parser)
    parser.set_defaults(action=_replay)


def _add_vpr(actions: Any) -> None:
    parser = actions.add_parser(
        "vpr",
        help="place recognition of one recording in another: Recall@K",
        description="Frames of 66 ms, those of a still camera and those with most events dropped, equalised, a quarter of the size, "
        "patches of 8 x 8 normalised, mean absolute difference.",
    )
    parser.add_argument("reference", metavar="REFERENCE", type=Path)
    parser.add_argument("query", metavar="QUERY", type=Path)
    parser.add_argument(
        "--metres", type=float, nargs="+", default=[1.0, 5.0], help="a match within is right (1 5)"
    )
    parser.add_argument(
        "--length", type=float, metavar="M", help="of both runs, where no FILE.positions.json is beside"
    )
    parser.add_argument("--network", type=Path, metavar="FILE.onnx", help="describe frames by a network")
    parser.add_argument("--plot", type=Path, metavar="FILE.html", help="draw the distances")
    add_json(parser)
    parser.set_defaults(action=_vpr)


def _add_tune(actions: Any) -> None:
    parser = actions.add_parser(
        "tune",
        help="find the band and the slew limit for a camera or a file",
        description="Measure the rate as it is, a band around it, and, where the source has biases, what the fast one does to it.",
    )
    _source(parser)
    add_json(parser)
    parser.set_defaults(action=_tune)


def _open(args: argparse.Namespace) -> "EventSource":
    from edgert.events.camera import open_source

    _check("--window", args.window, 1e-3, 3600, " seconds")
    if args.windows is not None:
        _check("--windows", args.windows, 1, math.inf)
    is_file = Path(args.source).exists() or ":" not in args.source
    return open_source(f"file:{args.source}" if is_file else args.source)


def _check(flag: str, found: float, least: float, most: float, unit: str = "") -> None:
    if not (math.isfinite(found) and least <= found <= most):
        allowed = f"{least:g} to {most:g}" if math.isfinite(most) else f"{least:g} or more"
        raise InvalidArgumentError(f"{flag}: found {found:g}, allowed is {allowed}{unit}")


def _run(args: argparse.Namespace) -> int:
    from contextlib import ExitStack

    from edgert.control import Record
    from edgert.events import FastSlow
    from edgert.events import camera as cameras

    _check("--slew", args.slew, 1, 53)
    source = _open(args)
    band = (args.band[0], args.band[1]) if args.band else _scaled_band(source.size)
    law = FastSlow(args.law, band=band, slew=args.slew)
    decisions: list[dict[str, Any]] = []

    def listen(reading: Any, decision: dict[str, Any]) -> None:
        decisions.append(decision)
        if not args.json:
            say(
                f"{reading.t:8.2f} s {decision['value'] / 1e3:10.1f} kev/s  refractory {decision['fast']:3}  "
                f"slow {decision['slow']}  {decision['action']}: {decision['reason']}"
            )

    try:
        with ExitStack() as stack:
            record = stack.enter_context(Record(args.record, law.law, law.settings)) if args.record else None
            cameras.run(source, law, seconds=args.window, windows=args.windows, record=record, listen=listen)
    finally:
        source.close()
    simulated = args.source.startswith("simulated:")
    if args.plot:
        _draw(
            args.plot,
            f"{args.source}, {args.law}{' (simulated)' if simulated else ''}",
            law.settings,
            decisions,
        )
    inside = sum(band[0] <= d["value"] <= band[1] for d in decisions)
    moves = sum(d["action"] == "slow" for d in decisions)
    result = {
        "windows": len(decisions),
        "in_band": inside,
        "slow_moves": moves,
        "band": band,
        "simulated": simulated,
    }
    if args.json:
        print_json(result | {"biases": law.biases.as_dict()})
    else:
        label = "; simulated" if simulated else ""
        say(
            f"{len(decisions)} windows, {inside} in {band[0]:.4g} to {band[1]:.4g} events/s, slow moves: {moves}{label}"
        )
    return 0


def _scaled_band(size: tuple[int, int]) -> tuple[float, float]:
    """The published band belongs to 346 x 260 pixels."""
    from edgert.events.fast_slow import BAND

    share = size[0] * size[1] / (346 * 260)
    return BAND[0] * share, BAND[1] * share


def _draw(path: Path, title: str, settings: dict[str, Any], decisions: list[dict[str, Any]]) -> None:
    from edgert.events.plot import decisions_page

    path.write_text(decisions_page(title, settings, decisions), encoding="utf-8")
    note(f"edgert: drawn in {path}")


def _simulate(args: argparse.Namespace) -> int:
    import numpy as np

    from edgert.events import Corridor, FastSlow, SimulatedCamera
    from edgert.events.files import save_events
    from edgert.events.stream import EVENT

    for flag, least, most in (("world", 0, math.inf), ("noise", 0, math.inf), ("light", 1e-6, 1e3), ("speed", 0, 100), ("seconds", 1e-3, 3600)):  # fmt: skip
        _check(f"--{flag}", getattr(args, flag), least, most)
    camera = SimulatedCamera(
        Corridor(args.world), light=args.light, speed_m_per_s=args.speed, seed=args.noise
    )
    law = None if args.law == "none" else FastSlow(args.law, band=_scaled_band(camera.size))
    parts, times, metres = [np.empty(0, EVENT)], [0.0], [0.0]
    while camera.t < args.seconds - 1e-9:
        reading = camera.read(min(0.066, args.seconds - camera.t))
        if reading is None:
            break
        parts.append(reading.events)
        times.append(camera.t)
        metres.append(camera.position_m)
        if law is not None:
            camera.set_biases(law.step(len(reading.events) / 0.066, reading.t))
    events = np.concatenate(parts)
    save_events(args.out, events, camera.size)
    _positions_file(args.out).write_text(
        json.dumps({"simulated": True, "seconds": times, "metres": metres}) + "\n"
    )
    result = {
        "path": str(args.out),
        "events": len(events),
        "seconds": camera.t,
        "metres": camera.position_m,
        "simulated": True,
    }
    if args.json:
        print_json(result)
    else:
        end = "" if camera.t > args.seconds - 1e-6 else "; the corridor ends here"
        say(
            f"{args.out}: {len(events):,} simulated events in {camera.t:.2f} s, {camera.position_m:.2f} m{end}"
        )
    return 0


def _positions_file(path: Path) -> Path:
    return path.with_name(path.name + ".positions.json")


def _replay(args: argparse.Namespace) -> int:
    from edgert import control

    count = control.replay(args.record)
    if args.plot:
        kind, settings, decisions = control.read(args.record)
        _draw(args.plot, f"{args.record.name}, {kind}", settings, list(decisions))
    if args.json:
        print_json({"decisions": count, "equal": True})
    else:
        say(f"{args.record}: {count} decisions, made again bit for bit")
    return 0


def _vpr(args: argparse.Namespace) -> int:
    from edgert.events import vpr
    from edgert.events.frames import descriptors

    for metres in args.metres:
        _check("--metres", metres, 0, math.inf)
    if args.length is not None:
        _check("--length", args.length, 1e-3, math.inf)
    describe: Callable[[Any], Any] = vpr.network(args.network) if args.network else descriptors
    reference, reference_m = _frames(args.reference, args.length)
    query, query_m = _frames(args.query, args.length)
    distance = vpr.match(query, reference, describe)
    found = [vpr.recall(distance, query_m, reference_m, metres) for metres in args.metres]
    if args.plot:
        from edgert.events.plot import matrix_page

        facts = "; ".join(
            f"Recall@1 within {r.metres:g} m {r.at[1]:.1%}, chance {r.chance:.1%}" for r in found
        )
        args.plot.write_text(
            matrix_page(f"{args.query.name} in {args.reference.name}", facts, distance), encoding="utf-8"
        )
    if args.json:
        results = [{"metres": r.metres, "recall": r.at, "chance": r.chance} for r in found]
        print_json({"references": len(reference), "queries": len(query), "results": results})
        return 0
    for r in found:
        recalls = ", ".join(f"Recall@{k} {share:.1%}" for k, share in r.at.items())
        say(f"within {r.metres:g} m: {recalls}; chance {r.chance:.1%}")
    say(f"{len(query)} frames in {len(reference)}")
    return 0


def _frames(path: Path, length: float | None) -> tuple[Any, Any]:
    """Frames that count, and the metres where each was taken."""
    import numpy as np

    from edgert.errors import CorruptError
    from edgert.events import event_frames, open_events
    from edgert.events.frames import FRAME_S, kept_frames

    with open_events(path) as file:
        events = file.read()
    frames = event_frames(events, file.size, start=0 if _positions_file(path).is_file() else None)
    middle = (np.arange(len(frames)) + 0.5) * FRAME_S
    if _positions_file(path).is_file():
        try:
            known = json.loads(_positions_file(path).read_text())
            metres = np.interp(middle, np.array(known["seconds"], float), np.array(known["metres"], float))
        except (ValueError, KeyError, TypeError) as error:
            raise CorruptError(
                f"{_positions_file(path)}: needed are seconds and metres, two lists alike"
            ) from error
    elif length is not None:
        metres = middle / (len(frames) * FRAME_S) * length
    else:
        raise InvalidArgumentError(f"{path}: needs {_positions_file(path).name} beside it, or --length")
    keep = kept_frames(frames, metres)
    if not keep.any():
        raise InvalidArgumentError(f"{path}: has no frame of {FRAME_S} s that counts")
    return frames[keep], metres[keep]


def _tune(args: argparse.Namespace) -> int:
    from edgert.events.camera import restored_biases
    from edgert.events.tune import fast_response

    source = _open(args)
    try:
        rates = []
        for _ in range(args.windows or 4):
            reading = source.read(args.window)
            if reading is None:
                break
            rates.append(len(reading.events) / args.window)
        if not rates or sum(rates) == 0:
            raise InvalidArgumentError(f"{args.source}: no events in the first {args.windows or 4} windows")
        mean = sum(rates) / len(rates)
        band = (mean / _SPREAD, mean * _SPREAD)
        with restored_biases(source) as before:
            response = None if before is None else fast_response(source, before, args.window)
    finally:
        source.close()
    told = _told(response, band) if response else {}
    if args.json:
        print_json({"rate": mean, "band": band} | told)
        return 0
    say(f"rate {mean:.4g} events/s; --band {band[0]:.3g} {band[1]:.3g}")
    if response is None:
        return 0
    for fine, rate in response.rates.items():
        say(f"  refractory {fine:3}: {rate:.4g} events/s")
    change = f"{math.expm1(response.effect):+.0%}"
    if not response.rates:
        say("the source ended before the refractory bias was swept often enough to tell what it does")
    elif response.authority == "inert":
        say(
            f"the refractory bias changes the rate by {change} over its range: here only the slow biases help"
        )
    elif response.authority == "unclear":
        least, most = (math.expm1(response.effect + side * response.error) for side in (-1, 1))
        say(
            f"the refractory bias changes the rate by {least:+.0%} to {most:+.0%} over its range, for the scene changes too: "
            "hold the camera on one scene that moves, or measure with a longer --window"
        )
    else:
        say(f"the refractory bias changes the rate by {change} over its range")
        say(f"--slew {told['slew']}: at the steepest a third of the band")
    return 0


def _told(response: "Response", band: tuple[float, float]) -> dict[str, Any]:
    slew = None
    if response.authority == "some" and response.steepest:
        slew = max(1, min(53, math.floor((band[1] - band[0]) / 3 / response.steepest)))
    interval = (
        [math.expm1(response.effect + side * response.error) for side in (-1, 0, 1)] if response.rates else []
    )
    return {
        "response": [list(pair) for pair in response.rates.items()],
        "change": interval,
        "authority": response.authority,
        "slew": slew,
    }
