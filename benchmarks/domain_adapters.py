"""Adapters of docs-moe's domains: what they gain there, as patches and beside the weights, and what is left when two are fused.

python benchmarks/domain_adapters.py MODEL --text sql=sql.txt rust=rust.txt --adapter shira:sql=PATH shira:rust=PATH lora:sql=PATH ...

A text is of a domain, and held out from training; an adapter of a kind and a domain is a file (`edgert adapter convert`) or a PEFT
directory. Of each domain's text: the perplexity without an adapter, with each kind's own, and with those of all domains fused (their sum).
docs/docs-moe/adapt.py trains such adapters.
"""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import edgert
from edgert.cli.terminal import markdown_table
from edgert.evaluate import encode_text, evaluate
from edgert.model import Model
from edgert.patches import AdapterMode

MODES: tuple[AdapterMode, ...] = ("patch", "overlay")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--text", metavar="DOMAIN=FILE", nargs="+", required=True)
    parser.add_argument("--adapter", metavar="KIND:DOMAIN=PATH", nargs="+", required=True)
    parser.add_argument("--tokens", type=int, default=20000, help="of a text, at most")
    parser.add_argument("--scale", type=float, default=1, help="of every adapter (default: 1)")
    args = parser.parse_args(arguments)
    texts = dict(text.split("=", 1) for text in args.text)
    with edgert.load(args.model) as model:
        tokens = {
            domain: encode_text(model, Path(file).read_text(encoding="utf8"), args.tokens)
            for domain, file in texts.items()
        }
        kinds: dict[str, dict[str, str]] = {}
        for given in args.adapter:
            name, path = given.split("=", 1)
            kind, domain = name.split(":", 1)
            model.load_adapter(path, name)
            kinds.setdefault(kind, {})[domain] = name
        print(
            markdown_table(
                list(rows_of(model, tokens, kinds, args.scale)), right=range(2, 2 + 3 * len(tokens))
            )
        )


def rows_of(
    model: Model,
    tokens: Mapping[str, Sequence[int]],
    kinds: Mapping[str, Mapping[str, str]],
    scale: float,
) -> Iterator[tuple[str, ...]]:
    heads = (f"{domain} {column}" for domain in tokens for column in ("alone", "fused", "fusing costs"))
    yield ("adapter", "runs as", *heads)
    plain = {domain: perplexity(model, ids) for domain, ids in tokens.items()}
    yield ("none", "", *(part for value in plain.values() for part in (f"{value:.3f}", "", "")))
    for kind, names in kinds.items():
        for mode in MODES:
            row = []
            for domain, ids in tokens.items():
                model.set_adapter({names[domain]: scale}, mode=mode)
                if any(info.scale and info.mode != mode for info in model.adapters()):
                    break  # it has nothing that can be a patch
                alone = perplexity(model, ids)
                model.set_adapter(dict.fromkeys(names.values(), scale), mode=mode)
                fused = perplexity(model, ids)
                row += [
                    f"{alone:.3f} ({alone / plain[domain] - 1:+.1%})",
                    f"{fused:.3f}",
                    f"{fused / alone - 1:+.2%}",
                ]
            else:
                yield (kind, mode, *row)
            model.set_adapter([])


def perplexity(model: Model, tokens: Sequence[int]) -> float:
    return evaluate(model, tokens).perplexity


if __name__ == "__main__":
    main()
