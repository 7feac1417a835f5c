"""edgert show: what a bundle is, and what it needs."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgert.cli.options import Subparsers, add_json, add_model
from edgert.cli.terminal import print_json, say, table
from edgert.units import format_bytes

if TYPE_CHECKING:
    from edgert.bundle import Bundle


def register(subparsers: Subparsers) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "show",
        help="show what a bundle is",
        description="Show the recipe, formats, sizes and smallest budget of a bundle, or of the one that a GGUF file is run through.",
    )
    add_model(parser)
    add_json(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    from edgert import gguf
    from edgert.bundle import Bundle, locate

    path = Path(args.model or "")
    if gguf.is_gguf(path):
        value = _of_gguf(path)
    else:
        bundle = Bundle.open(locate(args.model))
        if bundle.component is not None:
            return _show_component(bundle, as_json=args.json)
        value = _of_bundle(bundle)
    if args.json:
        print_json(value)
    else:
        say(_text(value))
    return 0


def _of_bundle(bundle: "Bundle") -> dict[str, Any]:
    from edgert.footprint import memory_needs

    needs = memory_needs(bundle)
    return {
        "name": bundle.name,
        "path": str(bundle.path),
        **{
            key: bundle.manifest[key]
            for key in ("bundle_id", "format_version", "alignment", "device", "defaults")
        },
        "bytes": bundle.bytes,
        **bundle.sizes,
        **needs,
        "formats": _formats(bundle),
        "recipe": bundle.recipe,
        "quantization": bundle.manifest["quantization"],
        "provenance": bundle.manifest["provenance"],
    }


def _of_gguf(path: Path) -> dict[str, Any]:
    """What the file's bundle is or would be; nothing is converted to show it."""
    from edgert import gguf
    from edgert.converters.checkpoint import open_checkpoint
    from edgert.converters.convert import layout_of
    from edgert.converters.registry import read_decoder
    from edgert.footprint import sizes_of_decoder

    checkpoint = open_checkpoint(path)
    decoder = read_decoder(checkpoint)
    layout = layout_of(decoder)
    formats: dict[str, dict[str, int]] = {"dense": {}, "experts": {}}
    for kind, extents in (("dense", layout.dense), ("experts", layout.experts)):
        for extent in extents:
            _count(formats[kind], "/".join(dict.fromkeys(p.format for p in extent.parts)), extent.bytes)
    bundle = gguf.kept_bundle(path)
    return {
        "name": gguf.name(path),
        "path": str(path),
        "bundle": str(bundle) if (bundle / "manifest.json").exists() else None,
        "device": None,
        "bytes": sum(file.stat().st_size for _, file in checkpoint.files),
        "num_experts": len(layout.experts),
        **sizes_of_decoder(gguf.name(path), decoder).needs(),
        "formats": formats,
        "recipe": decoder.recipe,
        "provenance": checkpoint.provenance(),
    }


def _show_component(bundle: "Bundle", *, as_json: bool) -> int:
    assert bundle.component is not None
    part = bundle.component
    if as_json:
        about = {
            key: bundle.manifest[key] for key in ("bundle_id", "format_version", "component", "provenance")
        }
        print_json({"name": bundle.name, "path": str(bundle.path), "bytes": bundle.bytes, **about})
        return 0
    rows = [("name", bundle.name), ("path", str(bundle.path)), ("kind", part["kind"])]
    rows += [("architecture", part["architecture"]), ("size", format_bytes(bundle.bytes))]
    if part["kind"] == "onnx":
        rows += [(key, ", ".join(map(_port, part[key]))) for key in ("inputs", "outputs")]
        if part["output"] is not None:
            length = "normalised" if part["normalize"] else "not normalised"
            rows.append(
                (
                    "embeds",
                    f"{part['dimensions'] or 'any'} dimensions, {part['pooling'] or 'pooled by the model'}, {length}",
                )
            )
            rows.append(("context", f"{part['max_length'] or 'any number of'} tokens"))
        if part["prompts"]:
            rows.append(("prompts", ", ".join(sorted(part["prompts"]))))
    say(table(rows))
    return 0


def _port(port: dict[str, Any]) -> str:
    sizes = ", ".join("any" if size is None else str(size) for size in port["shape"])
    return f"{port['name']} {port['type']}[{sizes}]"


def _formats(bundle: "Bundle") -> dict[str, dict[str, int]]:
    """Bytes by kind of tensor and weight format."""
    formats: dict[str, dict[str, int]] = {"dense": {}, "experts": {}}
    for tensor in bundle.manifest["tensors"]:
        _count(formats["dense"], tensor["format"], tensor["bytes"])
    names = ["/".join(dict.fromkeys(row)) for row in bundle.manifest["expert_formats"]]
    for layer in bundle.manifest["experts"]:
        for _, _, size, _, index, *_ in layer["extents"]:
            _count(formats["experts"], names[index], size)
    return formats


def _count(sizes: dict[str, int], name: str, size: int) -> None:
    sizes[name] = sizes.get(name, 0) + size


def _text(value: dict[str, Any]) -> str:
    recipe = value["recipe"]
    layers = [recipe["blocks"][index] for index in recipe["layers"]]
    routed = [block["ffn"] for block in layers if block["ffn"]["kind"] == "moe"]
    experts = "none (dense)"
    if routed:
        counts = sorted({(ffn["num_experts"], ffn["num_experts_per_tok"]) for ffn in routed})
        each = ", ".join(f"{count} (top {top})" for count, top in counts)
        experts = f"{value['num_experts']} in {len(routed)} layers: {each}"
    mixers = ", ".join(sorted({block["mixer"]["kind"] for block in layers}))
    rows = [
        ("name", value["name"]),
        ("path", value["path"]),
        ("architecture", recipe["architecture"]),
        ("layers", f"{len(layers)} ({mixers}), hidden {recipe['hidden_size']}"),
        ("experts", experts),
        ("vocabulary", str(recipe["vocab_size"])),
        ("context", f"{recipe['context_length']} tokens, {value['context']} by default"),
        ("size", format_bytes(value["bytes"])),
        ("dense", _sizes(value["formats"]["dense"])),
        ("expert weights", _sizes(value["formats"]["experts"]) or "none"),
        ("device", value["device"] or "any"),
        ("smallest budget", format_bytes(value["minimum_bytes"])),
        ("all in memory", format_bytes(value["resident_bytes"])),
    ]
    return table(rows)


def _sizes(sizes: dict[str, int]) -> str:
    return ", ".join(f"{name} {format_bytes(size)}" for name, size in sorted(sizes.items()))
