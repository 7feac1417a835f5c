"""edgert demo: the same prompt with the whole model in memory and with a fraction of it, then adapters switching."""

import argparse
import sys
import time
from typing import TYPE_CHECKING, Any

from edgert.cli.options import Subparsers, add_json, add_model, find_model
from edgert.cli.picture import Picture
from edgert.cli.run import cancelled_by_ctrl_c
from edgert.cli.terminal import print_json, say, table
from edgert.settings import Setting
from edgert.units import format_bytes

if TYPE_CHECKING:
    from edgert.bundle import Bundle
    from edgert.generation import Generation
    from edgert.model import Model

_PROMPT = "The os.path module"
_MAX_TOKENS = Setting("max_tokens", "int", "tokens to generate", 128, 1, 2**31 - 1)
_SHARE = 4  # the paged run holds this part of the experts
_ADAPTER_PROMPTS = ("SELECT", "The function")
_ADAPTER_TOKENS = 16
_FRAME_S = 0.04  # a pace at which the picture can be followed; the speeds shown are not affected

_NEXT = """\
Now with a model of your own:

    edgert convert PATH/TO/CHECKPOINT mine.edgert      a Hugging Face checkpoint becomes a bundle
    edgert show mine.edgert                            what it needs
    edgert run mine.edgert -p "Hello" --memory 4GiB    run it in the memory that you have"""


def register(subparsers: Subparsers) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "demo",
        help="see it work, with the embedded model",
        description="Generate from one prompt twice, with every expert in memory and with a quarter of them, and compare; then "
        "switch adapters on the quantised weights.",
    )
    add_model(parser)
    parser.add_argument("-p", "--prompt", metavar="TEXT", default=_PROMPT, help=f"the prompt ({_PROMPT!r})")
    parser.add_argument(
        "--max-tokens",
        metavar="N",
        default=_MAX_TOKENS.default,
        help=f"tokens to generate ({_MAX_TOKENS.default})",
    )
    add_json(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    import edgert
    from edgert.bundle import Bundle, embedded, locate
    from edgert.footprint import memory_needs

    count = _MAX_TOKENS.check(args.max_tokens, "--max-tokens")
    bundle = Bundle.open(locate(find_model(args.model)))
    needs = memory_needs(bundle)
    paged_bytes = needs["minimum_bytes"] + bundle.sizes["expert_bytes"] // _SHARE
    if not args.json:
        say(
            f"{bundle.name}: {bundle.sizes['num_experts']} experts, {format_bytes(needs['resident_bytes'])} with all of them in memory\n"
        )
    results = []
    for title, memory in (
        ("every expert in memory", needs["resident_bytes"]),
        ("a quarter of the experts", paged_bytes),
    ):
        with edgert.load(bundle.path, memory=memory) as model:
            result = _generate(model, args, count, f"{title}, {format_bytes(memory)}")
        results.append(result)
        if result.finish_reason == "cancelled":
            return 130
    switches = _switch_adapters(bundle) if bundle.path == embedded() else []
    if args.json:
        print_json(_object(bundle.name, results) | {"adapters": switches})
    else:
        say(_comparison(results))
        if switches:
            say("\n" + _switched(switches))
        say("\n" + _NEXT)
    return 0 if results[0].tokens == results[1].tokens else 1


def _generate(model: "Model", args: argparse.Namespace, count: int, title: str) -> "Generation":
    stream = model.stream(args.prompt, max_tokens=count, ignore_eos=True)
    with cancelled_by_ctrl_c(stream):
        if args.json:
            for _ in stream:
                pass
        elif sys.stdout.isatty():
            with Picture(model, title) as picture:
                picture.add(args.prompt)
                for piece in stream:
                    picture.add(piece.text)
                    time.sleep(_FRAME_S)
        else:
            say(f"{title}:\n{args.prompt}", end="")
            for piece in stream:
                say(piece.text, end="")
            say("\n")
    return stream.result


def _comparison(results: "list[Generation]") -> str:
    rows = [("", "MEMORY", "TOK/S", "HITS", "READ", "WAITED")]
    for name, result in zip(("resident", "paged"), results, strict=True):
        s = result.statistics
        rows.append(
            (
                name,
                format_bytes(s["budget_bytes"]),
                f"{s['decode_tokens_per_s']:.0f}",
                f"{s['hit_rate']:.0%}",
                format_bytes(s["bytes_read"]),
                f"{s['stall_s']:.2f} s",
            )
        )
    first, second = (result.tokens for result in results)
    same = sum(a == b for a, b in zip(first, second, strict=False))
    verdict = "identical" if first == second else "DIFFERENT"
    return f"{table(rows, right=(1, 2, 3, 4, 5))}\n\n{verdict}: {same}/{len(first)} tokens"


def _switch_adapters(bundle: "Bundle") -> list[dict[str, Any]]:
    """Turn each adapter that the package carries on by patches of the codes, twice: the first time makes its patches."""
    import edgert
    from edgert.adapter_paths import packaged_adapters

    switches = []
    with edgert.load(bundle.path) as model:
        for name, path in packaged_adapters():
            model.load_adapter(path, name)
        for prompt in _ADAPTER_PROMPTS:
            for info in (None, *model.adapters()):
                for _ in range(2):
                    model.set_adapter([])
                    start = time.perf_counter()
                    model.set_adapter([] if info is None else info.name)
                    switched_s = time.perf_counter() - start
                    text = model.generate(prompt, max_tokens=_ADAPTER_TOKENS, temperature=0).text
                switches.append(
                    {
                        "prompt": prompt,
                        "adapter": None if info is None else info.name,
                        "switch_ms": 1000 * switched_s,
                        "text": text,
                    }
                )
    return switches


def _switched(switches: list[dict[str, Any]]) -> str:
    rows = [("ADAPTER", "SWITCHED IN", "TEXT")]
    for switch in switches:
        text = " ".join((switch["prompt"] + switch["text"]).split())
        took = "" if switch["adapter"] is None else f"{switch['switch_ms']:.2f} ms"
        rows.append((switch["adapter"] or "none", took, text))
    return table(rows, right=(1,))


def _object(name: str, results: "list[Generation]") -> dict[str, Any]:
    return {
        "model": name,
        "identical": results[0].tokens == results[1].tokens,
        "runs": [
            {"name": label, "text": result.text, "tokens": result.tokens, "statistics": result.statistics}
            for label, result in zip(("resident", "paged"), results, strict=True)
        ],
    }
