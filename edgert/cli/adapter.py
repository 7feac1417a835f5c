"""edgert adapter: PEFT adapters for a bundle, shown, converted and fused."""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgert.cli.options import Subparsers, add_json, scaled
from edgert.cli.terminal import print_json, say, table
from edgert.errors import InvalidArgumentError
from edgert.units import format_bytes

if TYPE_CHECKING:
    from edgert.adapter_sources import ReadAdapter
    from edgert.bundle import Bundle
    from edgert.vocabulary import AdapterVocabulary


def register(subparsers: Subparsers) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "adapter",
        help="convert, show and fuse adapters",
        description="Adapters as PEFT saves them (LoRA, rsLoRA, DoRA, AdaLoRA, VeRA, SHiRA and IA3) for the model of a bundle. `edgert run --adapter` "
        "also takes a PEFT directory as it is; a converted file loads faster and is checked against its base.",
    )
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    convert = actions.add_parser("convert", help="make an adapter file of a PEFT directory")
    convert.add_argument(
        "adapter", metavar="PEFT_DIR", type=Path, help="a directory that PEFT's save_pretrained() made"
    )
    convert.add_argument("output", metavar="OUTPUT", type=Path, help="the file to write, NAME.adapter")
    convert.add_argument(
        "--compress",
        metavar="DENSITY",
        type=float,
        nargs="?",
        const=0.5,
        help="keep the signs of this share of the largest values, times one number a tensor: some ten times smaller, and not exact "
        "(default: 0.5); what it costs is said",
    )
    convert.add_argument(
        "--weights",
        metavar="CHECKPOINT",
        type=Path,
        help="the checkpoint that the base was made of: what its codes lack at the places of sparse values goes into the file, so that "
        "these run as patches of codes",
    )
    show = actions.add_parser("show", help="what an adapter file or a PEFT directory changes")
    show.add_argument(
        "adapter",
        metavar="ADAPTER",
        type=Path,
        help="an adapter file, a PEFT directory, or the name of one that the package carries",
    )
    fuse = actions.add_parser("fuse", help="make one adapter of several")
    fuse.add_argument(
        "adapters",
        metavar="ADAPTER[:SCALE]",
        type=scaled,
        nargs="+",
        help="files or PEFT directories (scale: 1)",
    )
    fuse.add_argument(
        "--method",
        metavar="METHOD",
        default="sum",
        help="sum (factors side by side, sparse values added), or one that thins the adapters out first and makes a sparse one: "
        "ties (largest values, majority sign), dare (random values, scaled up) or breadcrumbs (large values, not the largest)",
    )
    fuse.add_argument(
        "--density",
        metavar="SHARE",
        type=float,
        default=0.2,
        help="of an adapter's values that stay (default: 0.2)",
    )
    fuse.add_argument(
        "--outliers",
        metavar="SHARE",
        type=float,
        default=0.01,
        help="of the largest values, which breadcrumbs leaves out (default: 0.01)",
    )
    fuse.add_argument("--seed", type=int, default=0, help="of dare's choice (default: 0)")
    fuse.add_argument("-o", "--output", metavar="OUTPUT", type=Path, required=True, help="the file to write")
    for action, run_it in ((convert, _convert), (show, _show), (fuse, _fuse)):
        action.add_argument(
            "--base", metavar="MODEL", help="a bundle of the base (default: the embedded one)"
        )
        add_json(action)
        action.set_defaults(act=run_it)
    return parser


def run(args: argparse.Namespace) -> int:
    args.act(args)
    return 0


def _convert(args: argparse.Namespace) -> None:
    from edgert.converters.adapter_file import write_adapter
    from edgert.converters.compress import compress

    if args.compress is not None and args.weights is not None:
        raise InvalidArgumentError("--weights: signs keep nothing of it; leave --compress or --weights out")
    read, bundle = _read(args.adapter, args.base, args.weights)
    if args.compress is None:
        _write(args, read, bundle)
        return
    small = compress(read.parts, args.compress, bundle.manifest, read.vocabulary.rows)
    write_adapter(
        args.output, read.kind, small.parts, bundle.manifest, small.signs, vocabulary=read.vocabulary
    )
    whole = sum(array.nbytes for part in read.parts for array in part.arrays())
    about = {"bytes": args.output.stat().st_size, "uncompressed_bytes": whole, "error": small.error}
    _report(args, read, bundle, {"path": str(args.output), **about})


def _fuse(args: argparse.Namespace) -> None:
    import numpy as np

    from edgert.adapter_sources import ReadAdapter
    from edgert.converters.fuse import fuse
    from edgert.converters.merging import Thinning, merge
    from edgert.converters.remainders import add_remainders
    from edgert.vocabulary import together

    for path, scale in args.adapters:
        if not math.isfinite(scale):
            raise InvalidArgumentError(f"{path}: scale: found {scale}, allowed is a finite number")
        if args.output.exists() and path.exists() and args.output.samefile(path):
            raise InvalidArgumentError(f"{path}: is to be fused, and the output too; give another")
    thinning = Thinning(args.method, args.density, args.outliers, args.seed)
    if len(args.adapters) > 64:
        raise InvalidArgumentError(f"{len(args.adapters)} adapters; at most 64 are allowed")
    read = [(_read(path, args.base), scale) for path, scale in args.adapters]
    kinds = sorted({one.kind for (one, _), _ in read})
    adapters = [(one.parts, scale) for (one, _), scale in read]
    vocabulary = together(
        {str(path): one.vocabulary for (path, _), ((one, _), _) in zip(args.adapters, read, strict=True)}
    )
    with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is refused
        parts = fuse(adapters) if thinning.method == "sum" else merge(adapters, thinning)
    bundle = read[0][0][1]
    add_remainders(parts, bundle.path, bundle.manifest)
    _write(args, ReadAdapter("+".join(kinds), parts, vocabulary), bundle)


def _show(args: argparse.Namespace) -> None:
    read, bundle = _read(args.adapter, args.base)
    about = {"patch_bytes": read.patch_bytes} if read.patch_bytes else {}
    _report(args, read, bundle, {"path": str(args.adapter), **about})


def _read(path: Path, base: str | None, weights: Path | None = None) -> "tuple[ReadAdapter, Bundle]":
    from edgert.adapter_paths import locate_adapter
    from edgert.adapter_sources import read_adapter
    from edgert.bundle import Bundle, locate

    bundle = Bundle.open(locate(base))
    return read_adapter(locate_adapter(path), bundle.path, bundle.manifest, weights), bundle


def _write(args: argparse.Namespace, read: "ReadAdapter", bundle: "Bundle") -> None:
    from edgert.converters.adapter_file import write_adapter
    from edgert.converters.stored_patches import pack_patches

    patches = pack_patches(read.parts, bundle.path, bundle.manifest)
    write_adapter(
        args.output, read.kind, read.parts, bundle.manifest, patches=patches, vocabulary=read.vocabulary
    )
    about: dict[str, Any] = {"path": str(args.output), "bytes": args.output.stat().st_size}
    if patches is not None:
        about["patch_bytes"] = sum(map(len, patches.packed.values()))
    _report(args, read, bundle, about)


def _report(args: argparse.Namespace, read: "ReadAdapter", bundle: "Bundle", about: dict[str, Any]) -> None:
    from edgert.converters.remainders import patch_report

    parts, vocabulary = read.parts, read.vocabulary

    # Of signs nothing is known before they are read.
    patches = [] if "error" in about else patch_report(parts, bundle.path, bundle.manifest)
    rows = [{"target": part.target, **part.sizes()} for part in sorted(parts, key=lambda part: part.target)]
    if args.json:
        said = {"vocabulary": vocabulary.as_json()} if vocabulary else {}
        print_json({**about, "kind": read.kind, "matrices": rows, "patches": patches, **said})
        return
    shown = [("MATRIX", "RANK", "SPARSE VALUES", "GAIN", "SHIFT", "ROWS")]
    shown += [
        (
            row["target"],
            str(row["rank"] or ""),
            f"{row['values']:,}" if row["values"] else "",
            "yes" if row["gain"] else "",
            "yes" if row["shift"] else "",
            f"{row['weights']:,}" if row["weights"] else "",
        )
        for row in rows[:40]
    ]
    if len(rows) > 40:
        shown.append((f"... and {len(rows) - 40} more", "", "", "", "", ""))
    size = f", {format_bytes(about['bytes'])}" if "bytes" in about else ""
    if "error" in about:
        size += f", {about['uncompressed_bytes'] / about['bytes']:.1f}x smaller; what it adds differs by {about['error']:.1%}"
    say(f"{table(shown, right=(1, 2, 5))}\n\n{about['path']}: {read.kind}, {len(rows)} matrices{size}")
    if vocabulary:
        say(_text_line(vocabulary))
    if patches:
        say(_patch_table(patches))
    if "patch_bytes" in about:
        say(
            f"\nThe file has the patches, {format_bytes(about['patch_bytes'])}: alone and at scale 1 nothing else of it is read."
        )


def _text_line(vocabulary: "AdapterVocabulary") -> str:
    """What it says of text."""
    tokens = [f"{token.content} ({token.id})" for token in vocabulary.tokens[:8]]
    more = len(vocabulary.tokens) - len(tokens)
    said = [
        f"{vocabulary.rows} rows more than the base's" if vocabulary.rows else "",
        f"added tokens {', '.join(tokens)}{f' and {more} more' if more else ''}" if tokens else "",
        "a chat template of its own" if vocabulary.chat_template else "",
        f"{vocabulary.eos_token} ends an answer" if vocabulary.eos_token else "",
        f"tokens {', '.join(map(str, vocabulary.eos_token_ids))} end an answer"
        if vocabulary.eos_token_ids
        else "",
    ]
    return "vocabulary: " + "; ".join(one for one in said if one)


def _patch_table(patches: "Sequence[dict[str, Any]]") -> str:
    """What becomes of sparse values in packed codes, by kind of matrix."""
    shown = [
        (
            "SPARSE VALUES AS PATCHES",
            "PATCHED",
            "UNCHANGED",
            "CLAMPED",
            "LOSS",
            "ERROR",
            "BESIDE THE WEIGHTS",
        )
    ]
    for row in patches:
        patched = row["fidelity"] is not None
        shown.append(
            (
                row["kind"],
                f"{row['patched']} of {row['matrices']}",
                f"{row['unchanged'] / row['values']:.1%}" if patched else "",
                f"{row['clamped'] / row['values']:.1%}" if patched else "",
                f"{row['loss']:.1%}" if patched else "",
                f"{row['fidelity']:.0%}" if patched else "",
                "; ".join(row["not"]),
            )
        )
    return "\n" + table(shown, right=(1, 2, 3, 4, 5))
