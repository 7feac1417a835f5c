"""edgert eval: perplexity on a text, and distance to a reference."""

import argparse
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgert.cli.options import (
    Subparsers,
    add_adapter,
    add_json,
    add_knobs,
    add_model,
    add_ray,
    cluster_of,
    find_model,
    knob_flags,
    load_adapters,
)
from edgert.cli.run import describe, note_lossy, read_text
from edgert.cli.terminal import note, print_json, progress, say
from edgert.errors import InvalidArgumentError
from edgert.settings import Setting

if TYPE_CHECKING:
    from edgert.evaluate import Evaluation
    from edgert.lossy import Loss
    from edgert.model import Model

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
        "distribution and how often both rank the same token first. A reference computes exactly: against itself a model shows "
        "what its lossy modes cost, token by token (--chunk 1) unless --chunk says otherwise.",
    )
    add_model(parser)
    parser.add_argument("--text", metavar="FILE", type=Path, required=True, help="UTF-8 text")
    parser.add_argument(
        "--reference", metavar="MODEL", help="a bundle of the same vocabulary to compare with"
    )
    for setting in (_STRIDE, _TOKENS):
        parser.add_argument(setting.flag, metavar="N", help=setting.help)
    add_adapter(parser)
    add_ray(parser, "score")
    add_json(parser)
    add_knobs(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    import edgert
    from edgert import lossy
    from edgert.evaluate import encode_text, evaluate
    from edgert.loading import knob_values

    stride = None if args.stride is None else _STRIDE.check(args.stride, "--stride")
    limit = None if args.tokens is None else _TOKENS.check(args.tokens, "--tokens")
    text = read_text(args.text, _MAX_TEXT_BYTES)
    knobs = knob_flags(args)
    if args.ray is not None:
        _say(args, *_on_cluster(args, text, stride, limit, knobs), {})
        return 0
    if lossy.asked_for(knobs) and knob_values(knobs)["chunk"] is None:
        knobs["chunk"] = 1  # what is given up depends on what else a step reads: as in generating
    loss = None
    with edgert.load(find_model(args.model), **knobs) as model:
        note(describe(model))
        load_adapters(model, args.adapter)
        if args.reference is None:
            note_lossy(model)
        tokens = encode_text(model, text, limit)
        with progress("eval", "tokens") as update:
            if args.reference is None:
                result = evaluate(model, tokens, stride=stride, progress=update)
            else:
                exactly = dict.fromkeys(lossy.names(), 0)
                with edgert.load(
                    args.reference, exact=True, **{**knobs, **exactly, "context": model.context}
                ) as reference:
                    result = evaluate(model, tokens, reference=reference, stride=stride, progress=update)
                    if not args.adapter:  # what an adapter changes is no loss
                        loss = _loss(args.text, model, reference, result)
        _say(args, model.name, result, model.lossy_modes)
    if loss is not None and not args.json:
        say(lossy.describe(loss.modes, loss, args.reference))
    return 0


def _say(args: argparse.Namespace, name: str, result: "Evaluation", lossy_modes: Mapping[str, float]) -> None:
    if args.json:
        about = {"model": name, "reference": args.reference, "lossy": lossy_modes}
        print_json({**about, **dataclasses.asdict(result)})
        return
    say(
        f"perplexity {result.perplexity:.4f} over {result.tokens} tokens (windows of {result.context}, stride {result.stride})"
    )
    if result.kl_mean is not None and result.top1_agreement is not None:
        say(
            f"against {args.reference}: KL {result.kl_mean:.6f} nats a token, same first token {result.top1_agreement:.2%}"
        )


def _on_cluster(
    args: argparse.Namespace, text: str, stride: int | None, limit: int | None, knobs: dict[str, Any]
) -> "tuple[str, Evaluation]":
    """The model's name and the result. Here only the tokenizer is read, as the model may not fit."""
    from edgert import lossy
    from edgert.adapter_sources import open_adapter
    from edgert.bundle import Bundle, locate
    from edgert.errors import NotFoundError
    from edgert.evaluate import encode
    from edgert.loading import knob_values
    from edgert.tokenizer import extended_tokenizer, tokenizer_of
    from edgert.vocabulary import together

    for name, where in lossy.asked_for(knobs).items():
        raise InvalidArgumentError(
            f"{where}: what {name} gives up depends on what was read before, and machines of a cluster read apart"
        )
    stated = {name: value for name, value in knob_values(knobs).items() if value is not None}
    bundle = Bundle.open(locate(find_model(args.model)).absolute())
    adapters = [(path.absolute(), scale) for path, scale in args.adapter]
    said = together(
        {
            str(path): open_adapter(path, bundle.path, bundle.manifest).vocabulary
            for path, scale in adapters
            if scale
        }
    )
    tokenizer = tokenizer_of(bundle)
    if tokenizer is None:
        raise NotFoundError(f"{bundle.path}: the bundle has no tokenizer.json")
    if said.tokens:
        tokenizer = extended_tokenizer(bundle, said.tokens)
    with cluster_of(args) as cluster, progress("eval", "tokens") as update:
        assert cluster is not None
        result = cluster.evaluate(
            bundle.path,
            encode(tokenizer, text, limit),
            stated,
            reference=None if args.reference is None else locate(find_model(args.reference)).absolute(),
            adapters=adapters,
            stride=stride,
            progress=update,
        )
    return bundle.name, result


def _loss(text: Path, model: "Model", reference: "Model", result: "Evaluation") -> "Loss | None":
    """What lossy modes cost, kept for other commands to state; None where none is on or the reference is another model."""
    from edgert import lossy
    from edgert.bundle import Bundle

    bundle_id, other = (Bundle.open(one.path).manifest["bundle_id"] for one in (model, reference))
    if not model.lossy_modes or bundle_id != other:
        return None
    assert result.reference_perplexity is not None
    assert result.kl_mean is not None
    assert result.top1_agreement is not None
    loss = lossy.Loss(
        modes=model.lossy_modes,
        budget_bytes=model.stats()["budget_bytes"],
        text=text.name,
        tokens=result.tokens,
        perplexity=result.perplexity,
        exact_perplexity=result.reference_perplexity,
        kl_mean=result.kl_mean,
        top1_agreement=result.top1_agreement,
    )
    lossy.keep(bundle_id, loss)
    return loss
