"""What becomes of a sparse adapter on a quantised base: as patches of its codes, and beside its weights.

python benchmarks/patch_fidelity.py CHECKPOINT TEXT [--formats int8 int4 int3] [--sizes 2 1 0.5 0.25 0.1]

The adapter changes a random --share of the elements of every matrix of attention and of every expert, by normally distributed values
whose deviation is --sizes times that of the matrix. Of each base: the error of the patches, ||realised - intended|| / ||intended||, what they lose to clamping, and how
far the next tokens of TEXT are from those of the unquantised model with the adapter (mean KL divergence, in millinats) as patches, beside
the weights, and without any adapter. The last column is that of the quantised base itself, from the unquantised one.
"""

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from random_adapters import random_sparse

import edgert
from edgert.bundle import Bundle
from edgert.cli.terminal import markdown_table
from edgert.converters.adapter_file import write_adapter
from edgert.converters.adapter_part import Part
from edgert.converters.convert import convert
from edgert.converters.remainders import PackedMatrices, add_remainders

Logits = NDArray[np.float32]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=Path)
    parser.add_argument("text", metavar="TEXT", type=Path)
    parser.add_argument("--formats", nargs="+", default=["int8", "int4", "int3"])
    parser.add_argument("--sizes", nargs="+", type=float, default=[2, 1, 0.5, 0.25, 0.1])
    parser.add_argument("--share", type=float, default=0.01)
    parser.add_argument("--tokens", type=int, default=400)
    args = parser.parse_args(arguments)
    print(markdown_table(list(rows_of(args)), right=range(1, 9)))


def rows_of(args: argparse.Namespace) -> Iterator[tuple[str, ...]]:
    yield (
        "experts",
        "size",
        "error of patches",
        "loss",
        "unchanged",
        "KL patched",
        "KL beside",
        "KL without",
        "KL of the base",
    )
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        exact = directory / "exact.edgert"
        convert(args.checkpoint, exact, dense_format="f32", expert_format="f32")
        adapters = {}
        for size in args.sizes:
            adapters[size] = sized(exact, args.share, size)
            write_adapter(directory / f"{size}.adapter", "SHIRA", adapters[size], Bundle.open(exact).manifest)
        with edgert.load(exact) as model:
            tokens = model.tokenizer.encode(args.text.read_text())[: args.tokens]
            plain = model.logits(tokens)
            wanted = {size: adapted(model, directory / f"{size}.adapter", tokens) for size in adapters}
        for form in args.formats:
            base = directory / f"{form}.edgert"
            convert(args.checkpoint, base, dense_format="int8", expert_format=form)
            bundle = Bundle.open(base)
            with edgert.load(base) as model:
                alone = model.logits(tokens)
                for size, parts in adapters.items():
                    add_remainders(parts, bundle.path, bundle.manifest, args.checkpoint)
                    path = directory / f"{form}-{size}.adapter"
                    write_adapter(path, "SHIRA", parts, bundle.manifest)
                    for part in parts:
                        part.remainders = part.patch_error = None
                    model.load_adapter(path, "a")
                    model.set_adapter("a", mode="patch")
                    patched = model.logits(tokens)
                    counts = model.adapters()[0].patch_counts
                    beside = model.logits(tokens, adapter="a")
                    model.set_adapter(None)
                    model.unload_adapter("a")
                    yield (
                        form,
                        f"{size:g}",
                        f"{counts['fidelity']:.0%}",
                        f"{counts['loss']:.0%}",
                        f"{counts['unchanged'] / counts['values']:.0%}",
                        *(millinats(wanted[size], found) for found in (patched, beside, alone)),
                        millinats(plain, alone),
                    )


def sized(exact: Path, share: float, size: float) -> list[Part]:
    bundle = Bundle.open(exact)
    matrices = PackedMatrices(bundle.path, bundle.manifest)
    parts = [part for part in random_sparse(bundle, share, 0) if part.target != "output"]
    for part in parts:
        matrix = matrices.find(part.target)
        assert matrix is not None and part.values is not None
        part.remainders = part.patch_error = None
        part.values = (
            part.values
            / part.values.std()
            * np.frombuffer(matrix.read(), np.float32).std()
            * np.float32(size)
        )
    return parts


def adapted(model: edgert.Model, path: Path, tokens: list[int]) -> Logits:
    model.load_adapter(path, "a")
    logits = model.logits(tokens, adapter="a")
    model.unload_adapter("a")
    return logits


def millinats(wanted: Logits, found: Logits) -> str:
    p, q = (logits.astype(np.float64) for logits in (wanted, found))
    p, q = (x - np.logaddexp.reduce(x, axis=1, keepdims=True) for x in (p, q))
    return f"{1e3 * float(np.mean(np.sum(np.exp(p) * (p - q), axis=1))):.2f}"


if __name__ == "__main__":
    main()
