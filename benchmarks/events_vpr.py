"""Place recognition across brightness under bias controllers, in simulated worlds: python benchmarks/events_vpr.py --json out.json

Each world is a corridor of 100 m that no setting was chosen on. A reference run in full light and query runs at each --light
are simulated under every controller (64 x 64 pixels at 1 m/s, 98 places a metre apart, 66 ms each); the query's sensor noise is
its own. Recall@1 within 1 m (chance 2.3 %) and 5 m; differences between controllers are paired by world, with 95 % bootstrap
bounds. The band is a factor of sqrt(5) around the default's rate in the reference run, as eventcv measures it at its start.
`eventcv` is the controller of that package (1.0.8), which offers it on a live camera only, written out here from its published
source's description. What is in the file is not run again. --authority says instead what the fast bias does to the
rate, by its coarse value. All figures are simulated.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgert.cli.terminal import markdown_table
from edgert.events import DAVIS346, Biases, Corridor, FastSlow, SimulatedCamera
from edgert.events.biases import Bias
from edgert.events.vpr import bootstrap, match, recall

CONTROLLERS = ("default", "fast-only", "fast-only, coarse 6", "published", "eventcv", "fast-slow")
_SIZE = (64, 64)
_SPEED, _FRAME_S, _PLACES = 1.0, 0.066, 98
_SPREAD = 5**0.5


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--worlds", type=int, default=20)
    parser.add_argument(
        "--first", type=int, default=4000, help="seed of the first; those below 4000 chose settings"
    )
    parser.add_argument("--light", type=float, nargs="*", default=[1.0, 0.02, 0.01])
    parser.add_argument("--authority", action="store_true", help="rates over the range of the fast bias")
    parser.add_argument("--json", type=Path, help="write every run as it ends; go on where it was broken off")
    parser.add_argument("--rows", type=Path, nargs="*", default=[], help="add what other runs wrote")
    parser.add_argument("--plot", type=Path, metavar="FILE.svg")
    args = parser.parse_args(arguments)
    if args.authority:
        print(
            markdown_table(
                authority(range(args.first, args.first + args.worlds), args.light), right=range(2, 9)
            )
        )
        return
    written = [args.json] if args.json and args.json.is_file() else []
    rows: list[dict[str, Any]] = [
        row for path in [*args.rows, *written] for row in json.loads(path.read_text())
    ]
    for seed in range(args.first, args.first + args.worlds):
        done = [row["controller"] for row in rows if row["world"] == seed]
        for found in measure(seed, args.light, [name for name in CONTROLLERS if name not in done]):
            rows += found
            if args.json:
                args.json.write_text(json.dumps(rows, indent=1) + "\n")
    print(f"Simulated, {len({row['world'] for row in rows})} worlds.\n")
    print(markdown_table(summary(rows, args.light), right=range(2, 9)))
    print()
    print(markdown_table(compared(rows, args.light), right=range(2, 9)))
    if args.plot:
        args.plot.write_text(drawn(rows, min(args.light)))


def measure(seed: int, lights: Sequence[float], names: Sequence[str]) -> Iterator[list[dict[str, Any]]]:
    """Rows of a world, controller by controller."""
    if not names:
        return
    corridor = Corridor(seed=seed)
    default = traverse(corridor, 1.0, FastSlow("fixed"), 0)
    rate = float(default[2].mean())
    band = (rate / _SPREAD, rate * _SPREAD)
    for name in names:
        reference, reference_m, _ = (
            default if name == "default" else traverse(corridor, 1.0, law(name, band), 0)
        )
        rows = []
        for light in lights:
            frames, metres, rates = traverse(corridor, light, law(name, band), 1)
            distance = match(frames, reference)
            near, far = (recall(distance, metres, reference_m, within) for within in (1.0, 5.0))
            inside = (rates[_PLACES // 3 :] >= band[0]) & (rates[_PLACES // 3 :] <= band[1])
            rows.append(
                {
                    "world": seed,
                    "controller": name,
                    "light": light,
                    "recall_1m": near.at[1],
                    "recall_5m": far.at[1],
                    "in_band": float(inside.mean()),
                    "rate": float(rates.mean()),
                }
            )
        yield rows


def law(name: str, band: tuple[float, float]) -> Any:
    if name == "eventcv":
        return EventCv(band)
    if name == "fast-only, coarse 6":  # where fine values move the rate by a half
        return FastSlow("fast-only", start=replace(DAVIS346, refractory=Bias(6, 25)), band=band)
    return FastSlow("fixed" if name == "default" else name, band=band)


def authority(seeds: Sequence[int], lights: Sequence[float]) -> list[tuple[str, ...]]:
    """Events a second and pixel at fine values along the fast bias's range, at coarse values from the camera's own on."""
    fine = (4, 15, 25, 40, 57)
    table: list[tuple[str, ...]] = [("coarse", "light", *(f"fine {f}" for f in fine), "most to least")]
    for coarse in (3, 4, 5, 6):
        for light in lights:
            means = []
            for f in fine:
                law = FastSlow("fixed", start=replace(DAVIS346, refractory=Bias(coarse, f)))
                runs = [traverse(Corridor(seed=s), light, law, 0, places=12)[2].mean() for s in seeds]
                means.append(sum(runs) / len(runs) / (_SIZE[0] * _SIZE[1]))
            ratio = max(means) / min(means) - 1
            table.append((str(coarse), f"{light:g}", *(f"{m:.2f}" for m in means), f"+{ratio:.1%}"))
    return table


def traverse(
    corridor: Corridor, light: float, controller: Any, seed: int, places: int = _PLACES
) -> tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any]]:
    """(frames, metres, events a second) of a run."""
    start = controller.biases
    camera = SimulatedCamera(
        corridor, light=light, speed_m_per_s=_SPEED, size=_SIZE, biases=start, stride_m=1.0, seed=seed
    )
    frames, metres, rates = [], [], []
    for _ in range(places):
        metres.append(camera.position_m)
        reading = camera.read(_FRAME_S)
        if reading is None:
            break
        events = reading.events
        rates.append(len(events) / _FRAME_S)
        frame = np.zeros((2, _SIZE[1], _SIZE[0]), np.int32)
        np.add.at(frame, (events["on"].astype(int), events["y"], events["x"]), 1)
        frames.append(frame)
        camera.set_biases(controller.step(rates[-1], reading.t))
    return np.array(frames), np.array(metres[: len(frames)]), np.array(rates)


class EventCv:
    """The fast bias follows the rate's place in the band, slew-limited; slow ones step after two windows at a rail, or after
    four reversals out of the band, towards what the hunt delivered on average."""

    _SLEW, _STEP, _PATIENCE = 16, 6, 2
    # Its ladder: every coarse and fine value by growing current.
    _LADDER = sorted(
        (Bias(coarse, fine) for coarse in range(8) for fine in range(1, 256)),
        key=lambda bias: bias.picoamperes,
    )

    def __init__(self, band: tuple[float, float]) -> None:
        self._band, self.biases = band, DAVIS346
        self._rails = self._LADDER.index(Bias(3, 4)), self._LADDER.index(Bias(3, 57))
        self._fast = self._LADDER.index(DAVIS346.refractory)
        self._slow = {
            n: self._LADDER.index(getattr(DAVIS346, n))
            for n in ("photoreceptor", "follower", "on_threshold", "off_threshold")
        }
        self._few = self._many = self._wanted = 0
        self._hunt: list[float] = []
        self._reversals = 0

    def step(self, rate: float, _t: float) -> Biases:
        (low, high), (tight, open_) = self._band, self._rails
        share = min(max((rate - low) / (high - low), 0.0), 1.0)
        target = open_ - round((open_ - tight) * share)
        want = (target > self._fast) - (target < self._fast)
        turned = want != 0 and self._wanted not in (0, want)
        self._wanted = want
        self._fast = min(max(target, self._fast - self._SLEW), self._fast + self._SLEW)
        outside = not low <= rate <= high
        railed = (target >= open_ <= self._fast) or (target <= tight >= self._fast)
        if not outside:
            self._hunt, self._reversals = [], 0
        elif turned or self._reversals:
            self._hunt.append(rate)
        self._few = self._few + 1 if outside and railed and target >= open_ else 0
        self._many = self._many + 1 if outside and railed and target < open_ else 0
        self._reversals += outside and not railed and turned
        if self._few >= self._PATIENCE:
            self._move(1)
        elif self._many >= self._PATIENCE:
            self._move(-1)
        elif self._reversals >= 2 * self._PATIENCE:
            mean = sum(self._hunt) / max(1, len(self._hunt))
            self._move((mean < low) - (mean > high))
            self._hunt, self._reversals = [], 0
        slow = {name: self._LADDER[place] for name, place in self._slow.items()}
        self.biases = Biases(refractory=self._LADDER[self._fast], diff=DAVIS346.diff, **slow)
        return self.biases

    def _move(self, direction: int) -> None:
        self._few = self._many = 0
        for name, place in self._slow.items():
            sign = -1 if name == "on_threshold" else 1
            self._slow[name] = min(max(place + direction * sign * self._STEP, 0), len(self._LADDER) - 1)


def values(rows: list[dict[str, Any]], name: str, light: float, key: str) -> npt.NDArray[Any]:
    return np.array([row[key] for row in rows if row["controller"] == name and row["light"] == light])


def summary(rows: list[dict[str, Any]], lights: Sequence[float]) -> list[tuple[str, ...]]:
    table: list[tuple[str, ...]] = [
        ("light", "controller", "Recall@1, 1 m", "Recall@1, 5 m", "in the band", "kev/s")
    ]
    for light in lights:
        for name in CONTROLLERS:
            near, far, inside, rate = (
                values(rows, name, light, key).mean() for key in ("recall_1m", "recall_5m", "in_band", "rate")
            )
            table.append(
                (f"{light:g}", name, f"{near:.1%}", f"{far:.1%}", f"{inside:.0%}", f"{rate / 1e3:.0f}")
            )
    return table


def compared(rows: list[dict[str, Any]], lights: Sequence[float]) -> list[tuple[str, ...]]:
    pairs = [("fast-slow", "fast-only"), ("fast-only", "default"), ("fast-only, coarse 6", "default"), ("fast-slow", "default"), ("fast-slow", "published"), ("fast-slow", "eventcv")]  # fmt: skip
    table: list[tuple[str, ...]] = [("light", "Recall@1 within 1 m", "points", "95 % bounds")]
    for light in lights:
        for one, other in pairs:
            gain = values(rows, one, light, "recall_1m") - values(rows, other, light, "recall_1m")
            mean, low, high = bootstrap(gain)
            table.append(
                (
                    f"{light:g}",
                    f"{one} less {other}",
                    f"{mean * 100:+.1f}",
                    f"{low * 100:+.1f} to {high * 100:+.1f}",
                )
            )
    return table


def drawn(rows: list[dict[str, Any]], light: float) -> str:
    """Recall@1 by controller: a dot a world, the mean and its bounds."""
    width, row, left = 720, 44, 130
    parts = []
    for i, name in enumerate(CONTROLLERS):
        found, y = values(rows, name, light, "recall_1m"), 40 + row * i
        mean, low, high = bootstrap(found)
        x = [left + share * (width - left - 30) for share in (low, high, mean)]
        parts.append(f'<text x="{left - 8}" y="{y + 4}" text-anchor="end">{name}</text>')
        parts += [
            f'<circle cx="{left + share * (width - left - 30):.1f}" cy="{y + (k % 5 - 2) * 4}" r="2.5" fill="#9bb7d4"/>'
            for k, share in enumerate(found)
        ]
        parts.append(
            f'<line x1="{x[0]:.1f}" x2="{x[1]:.1f}" y1="{y}" y2="{y}" stroke="#c0392b" stroke-width="3"/>'
        )
        parts.append(f'<circle cx="{x[2]:.1f}" cy="{y}" r="5" fill="#c0392b"/>')
    bottom = 40 + row * len(CONTROLLERS)
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        x_tick = left + share * (width - left - 30)
        parts.append(
            f'<line x1="{x_tick}" x2="{x_tick}" y1="18" y2="{bottom - 18}" stroke="#ccc" stroke-width="0.5"/>'
        )
        parts.append(f'<text x="{x_tick}" y="{bottom}" text-anchor="middle">{share:.0%}</text>')
    title = f"Recall@1 within 1 m at light {light:g}, reference at light 1; simulated"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{bottom + 12}" font-family="sans-serif" '
        f'font-size="12"><rect width="100%" height="100%" fill="white"/>{"".join(parts)}'
        f'<text x="{left}" y="14">{title}</text></svg>\n'
    )


if __name__ == "__main__":
    main()
