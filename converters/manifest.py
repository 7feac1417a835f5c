"""manifest.json of a bundle, as docs/bundle-format.md states it."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from edgert import _native

from .decoder import Decoder
from .formats import Triple
from .layout import Extent, Layout
from .pack import Error, Packed

FORMAT_VERSION = 1


def build_manifest(
    decoder: Decoder,
    layout: Layout,
    packed: Sequence[Packed],
    assets: Mapping[str, bytes],
    about: Mapping[str, Any],
) -> dict[str, Any]:
    """Everything but the checksum. `packed` follows layout.dense and then layout.experts; `about` holds
    provenance, device, defaults and quantization."""
    dense, experts = packed[: len(layout.dense)], packed[len(layout.dense) :]
    combinations: dict[Triple, int] = {}
    by_layer: dict[int, list[list[Any]]] = {}
    for extent, result in zip(layout.experts, experts, strict=True):
        assert extent.expert is not None
        gate, up, down = (part.format for part in extent.parts[:3])
        number = combinations.setdefault((gate, up, down), len(combinations))
        row: list[Any] = [extent.file, extent.offset, extent.bytes, result.checksum, number]
        if extent.split is not None:
            assert result.split_checksums is not None
            row += [extent.split.base_bytes, *result.split_checksums]
        by_layer.setdefault(extent.expert[0], []).append(row)
    manifest: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "bundle_id": "",
        "alignment": layout.alignment,
        "recipe": decoder.recipe,
        "files": [{"name": file.name, "bytes": file.bytes} for file in layout.files],
        "tensors": [_tensor(extent, result) for extent, result in zip(layout.dense, dense, strict=True)],
        "expert_formats": [list(names) for names in combinations],
        "experts": [{"layer": layer, "extents": rows} for layer, rows in by_layer.items()],
        "assets": [
            {"name": name, "bytes": len(content), "checksum": _native.xxh64(content)}
            for name, content in sorted(assets.items())
        ],
        **about,
    }
    if layout.remainder_file is not None:
        manifest["remainders"] = {"file": layout.remainder_file, "tensors": _remainders(layout, packed)}
    manifest["bundle_id"] = hashlib.blake2b(encode(manifest), digest_size=16).hexdigest()
    return manifest


def seal(manifest: Mapping[str, Any]) -> bytes:
    """The bytes of manifest.json: the line with the checksum, then the rest."""
    body = encode(manifest)
    return f'{{"checksum":"{_native.xxh64(body)}",\n'.encode() + body


def quantization_report(
    layout: Layout, packed: Sequence[Packed], options: Mapping[str, Any]
) -> dict[str, Any]:
    """Relative error (root of squared error over squared weight) and largest error, by kind and format."""
    sums: dict[tuple[str, str], list[Error]] = {}
    weights: dict[tuple[str, str], int] = {}
    for extent, result in zip([*layout.dense, *layout.experts], packed, strict=True):
        for part, error in zip(extent.parts, result.errors, strict=True):
            key = (_kind(part.name), part.format)
            sums.setdefault(key, []).append(error)
            weights[key] = weights.get(key, 0) + part.source.rows * part.source.cols
    rows = []
    for (kind, format_name), errors in sums.items():
        squared, weight = sum(e.squared for e in errors), sum(e.squared_weight for e in errors)
        rows.append(
            {
                "kind": kind,
                "format": format_name,
                "weights": weights[kind, format_name],
                "relative_error": float(f"{(squared / weight) ** 0.5 if weight else 0.0:.6g}"),
                "largest_error": float(f"{max(e.largest for e in errors):.6g}"),
            }
        )
    return {"options": dict(options), "tensors": rows}


def encode(manifest: Mapping[str, Any]) -> bytes:
    """The object without its opening brace; one line a tensor or layer, for people to read and compare."""
    lines = []
    for key, value in manifest.items():
        if key in ("tensors", "experts") and value:
            text = "[\n" + ",\n".join(_line(item) for item in value) + "\n]"
        else:
            text = _line(value)
        lines.append(f"{json.dumps(key)}:{text}")
    return (",\n".join(lines) + "\n}\n").encode()


def _line(value: object) -> str:
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


def _tensor(extent: Extent, result: Packed) -> dict[str, Any]:
    part = extent.parts[0]
    return {
        "name": part.name,
        "format": part.format,
        "shape": list(extent.shape),
        "file": extent.file,
        "offset": extent.offset,
        "bytes": extent.bytes,
        "checksum": result.checksum,
        "source": part.source.tensor.name,
    }


def _remainders(layout: Layout, packed: Sequence[Packed]) -> list[list[Any]]:
    rows = []
    for extent, result in zip([*layout.dense, *layout.experts], packed, strict=True):
        for part, checksum in zip(extent.parts, result.remainder_checksums, strict=True):
            if part.remainder_offset is not None:
                rows.append([part.name, part.remainder_offset, part.source.rows * part.source.cols, checksum])
    return rows


def _kind(name: str) -> str:
    """The name without the numbers of layer and expert."""
    return ".".join(word for word in name.split(".") if not word.isdigit() and word != "layers")
