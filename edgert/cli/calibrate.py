"""edgert calibrate: what a model does on a text, for conversions and predictors that go by it."""

import argparse
import os
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgert.cli.options import Subparsers, add_json, add_knobs, add_model, find_model, knob_flags
from edgert.cli.run import read_text
from edgert.cli.terminal import note, print_json, progress, say, table
from edgert.settings import Setting
from edgert.units import format_bytes

if TYPE_CHECKING:
    from edgert.calibration import Calibration

_MAX_TEXT_BYTES = 256 << 20
_SUFFIX = ".calibration"
_TOKENS = Setting("tokens", "int", "run the text's first N tokens only", None, 2, 2**62)
_BARS = "▁▂▃▄▅▆▇█"
_STRIP = 32  # cells of a layer's picture at most
_UNUSED = "·"
_FEW = 32  # tokens of an expert


def register(subparsers: Subparsers) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "calibrate",
        help="measure which experts a text uses",
        description="Run a text through a model, in windows of --context tokens, and record which experts it uses and how "
        "much they count, which are used together and after one another, and second moments of the inputs of matrices: "
        "what `edgert convert --calibration` and predictors of experts go by.",
    )
    add_model(parser)
    parser.add_argument("--text", metavar="FILE", type=Path, required=True, help="UTF-8 text")
    parser.add_argument(
        "--out", metavar="FILE", type=Path, help=f"where to write (default: the model's name and {_SUFFIX})"
    )
    parser.add_argument(_TOKENS.flag, metavar="N", help=_TOKENS.help)
    parser.add_argument(
        "--moments",
        choices=("auto", "full", "diagonal"),
        default="auto",
        help="whole matrices of second moments, only their diagonals, or (auto) whole ones as far as 1 GiB goes",
    )
    add_json(parser)
    add_knobs(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    import edgert

    limit = None if args.tokens is None else _TOKENS.check(args.tokens, "--tokens")
    text = read_text(args.text, _MAX_TEXT_BYTES)
    model = find_model(args.model)
    out = args.out or Path(default_name(model))
    _check_place(out)
    begin = time.monotonic()
    with progress("calibrate", "tokens") as update:
        calibration = edgert.calibrate(
            model, text, tokens=limit, moments=args.moments, progress=update, **knob_flags(args)
        )
    seconds = time.monotonic() - begin
    calibration.save(out)
    if args.json:
        print_json(
            {"path": str(out), "bytes": out.stat().st_size, "seconds": seconds, **summary(calibration)}
        )
        return 0
    note(
        f"{calibration.tokens} tokens in windows of {calibration.window}, {seconds:.1f} s with loading; "
        f"kept as {out}, {format_bytes(out.stat().st_size)}"
    )
    if calibration.model.moe:
        say(picture(calibration))
    return 0


def summary(calibration: "Calibration") -> dict[str, Any]:
    """What scripts want to know at once; the rest is in the file."""
    layers = []
    for m, row in enumerate(calibration.model.moe):
        frequency = calibration.frequency[m]
        layers.append(
            {
                "layer": row.layer,
                "experts": row.num_experts,
                "experts_per_token": row.num_experts_per_tok,
                "effective_experts": round(calibration.effective_experts[m], 3),
                "unused": [e for e in range(row.num_experts) if frequency[e] == 0],
                "frequency": [round(float(share), 6) for share in frequency],
                "gate_weight": [round(float(weight), 6) for weight in calibration.gate_weight[m]],
            }
        )
    moments = sorted({name.rpartition(".")[2] for name in calibration.tensors} & {"triangle", "diagonal"})
    return {
        "tokens": calibration.tokens,
        "window": calibration.window,
        "moments": ["full" if form == "triangle" else form for form in moments],
        "layers": layers,
    }


def default_name(model: str | Path | None) -> str:
    """NAME.calibration for a bundle, a GGUF file, or a name of either."""
    from edgert.bundle import EMBEDDED

    name = EMBEDDED if model is None else re.split(r"[/:\\\\]", str(model))[-1]
    return name.removesuffix(".edgert").removesuffix(".gguf") + _SUFFIX


def _check_place(path: Path) -> None:
    """Before the work: that the result can be written, and replaces nothing but another calibration."""
    from edgert.calibration_file import is_calibration
    from edgert.errors import InvalidArgumentError, NotFoundError

    folder = Path(os.path.abspath(path)).parent
    if not folder.is_dir():
        raise NotFoundError(f"{folder}: no such directory to put the calibration into")
    if os.path.lexists(path) and not is_calibration(path):
        raise InvalidArgumentError(
            f"{path}: exists and is no calibration; only one of these is replaced: choose another --out"
        )


def picture(calibration: "Calibration") -> str:
    """For people: how uses fall on the experts of each layer."""
    rows = [("layer", "effective", "uses, most used first", "most used", "least used", "unused")]
    for m, row in enumerate(calibration.model.moe):
        frequency = calibration.frequency[m]
        order = sorted(range(row.num_experts), key=lambda e: (-frequency[e], e))
        used = [e for e in order if frequency[e] > 0]
        rows.append(
            (
                str(row.layer),
                f"{calibration.effective_experts[m]:.1f} of {row.num_experts}",
                _strip([float(frequency[e]) for e in order]),
                _shares(used[:3], frequency),
                _shares(used[:-4:-1], frequency),
                _listed(order[len(used) :]),
            )
        )
    return "\n".join(
        (
            table(rows, right=(0, 1)),
            "",
            "Percentages are the share of tokens that used an expert, effective is the exponential of their entropy.",
            *_warning(calibration),
        )
    )


def _warning(calibration: "Calibration") -> list[str]:
    tokens = [int(count) for layer in calibration.expert_tokens for count in layer]
    few = sum(count < _FEW for count in tokens)
    if few == 0:
        return []
    return [
        f"{few} of {len(tokens)} experts met fewer than {_FEW} tokens: more text would tell more of them."
    ]


def _strip(shares: list[float]) -> str:
    """Shares in descending order as bars, some together where they are many."""
    size = -(-len(shares) // _STRIP)
    cells = [sum(part) / len(part) for part in (shares[i : i + size] for i in range(0, len(shares), size))]
    return "".join(_BARS[round(7 * cell / cells[0])] if cell > 0 else _UNUSED for cell in cells)


def _shares(experts: list[int], frequency: Any) -> str:
    return "  ".join(f"{e} {_percent(frequency[e])}" for e in experts)


def _percent(share: float) -> str:
    return f"{share:.0%}" if share >= 0.0995 else f"{share:.1%}" if share >= 0.0005 else "<0.1%"


def _listed(experts: list[int]) -> str:
    shown = " ".join(map(str, sorted(experts)[:6]))
    return "" if not experts else shown if len(experts) <= 6 else f"{shown} and {len(experts) - 6} more"
