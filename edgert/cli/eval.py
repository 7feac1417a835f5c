"""edgert eval: perplexity on a text, and distance to a reference."""

import argparse
import dataclasses
from pathlib import Path

from edgert.cli.options import Subparsers, add_json, add_knobs, add_model, find_model, knob_flags
from edgert.cli.run import describe, read_text
from edgert.cli.terminal import note, print_json, progress, say
from edgert.settings import Setting

_MAX_TEXT_BYTES = 256 << 20
_STRIDE = Setting(
    "stride", "int", "tokens from one window to the next (half the context)", None, 1, 2**31 - 1
)
_TOKENS = Setting("tokens", "int", "evaluate the text's first N tokens only", None, 2, 2**62)


def register(subparsers: Subparsers) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "eval",
        help="measure perplexity",
        description="Perplexity on a text, by windows of --context tokens that begin every --stride tokens; each token is "
        "scored once, in the first window that holds it. With --reference also the KL divergence from the reference's "
        "distribution and how often both rank the same token first.",
    )
    add_model(parser)
    parser.add_argument("--text", metavar="FILE", type=Path, required=True, help="UTF-8 text")
    parser.add_argument(
        "--reference", metavar="MODEL", help="a bundle of the same vocabulary to compare with"
    )
    for setting in (_STRIDE, _TOKENS):
        parser.add_argument(setting.flag, metavar="N", help=setting.help)
    add_json(parser)
    add_knobs(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    import edgert
    from edgert.evaluate import encode_text, evaluate

    stride = None if args.stride is None else _STRIDE.check(args.stride, "--stride")
    limit = None if args.tokens is None else _TOKENS.check(args.tokens, "--tokens")
    text = read_text(args.text, _MAX_TEXT_BYTES)
    with edgert.load(find_model(args.model), **knob_flags(args)) as model:
        note(describe(model))
        tokens = encode_text(model, text, limit)
        with progress("eval", "tokens") as update:
            if args.reference is None:
                result = evaluate(model, tokens, stride=stride, progress=update)
            else:
                with edgert.load(
                    args.reference, **{**knob_flags(args), "context": model.context}
                ) as reference:
                    result = evaluate(model, tokens, reference=reference, stride=stride, progress=update)
        if args.json:
            print_json({"model": model.name, "reference": args.reference, **dataclasses.asdict(result)})
            return 0
    say(
        f"perplexity {result.perplexity:.4f} over {result.tokens} tokens (windows of {result.context}, stride {result.stride})"
    )
    if result.kl_mean is not None and result.top1_agreement is not None:
        say(
            f"against {args.reference}: KL {result.kl_mean:.6f} nats a token, same first token {result.top1_agreement:.2%}"
        )
    return 0
