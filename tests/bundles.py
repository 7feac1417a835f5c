"""Bundles for the tests: made, opened, run, and edited by hand."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from checkpoints import TINY_CONFIG, prompt_tokens

F32: dict[str, Any] = {
    "dense_format": "f32",
    "expert_format": "f32",
    "embedding_format": "f32",
    "output_format": "f32",
}
MIB = 1 << 20
EXPERTS = "experts-00000.bin"
LONG = prompt_tokens(200, TINY_CONFIG["vocab_size"])  # meets every expert of every layer of the tiny model


def convert(source: Path, output: Path, **formats: Any) -> Path:
    from edgert.converters.convert import convert as convert_checkpoint

    convert_checkpoint(source, output, **formats)
    return output


def contents(directory: Path) -> dict[str, bytes]:
    """The files of a folder, by their names in it."""
    return {
        str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()
    }


def bundle_id(bundle: Path) -> str:
    return str(read_manifest(bundle)["bundle_id"])


def open_model(
    path: Path, *, memory: int = 256 * MIB, threads: int = 1, isa: str = "", **options: Any
) -> Any:
    """The native model; `memory` in bytes bounds everything that it allocates."""
    from edgert import _native

    runtime = _native.Runtime(memory, threads=threads, isa=isa)
    return _native.Model(runtime, str(path), **options)


def minimum_bytes(path: Path, **options: Any) -> int:
    return int(open_model(path, **options).minimum_bytes)


def runnable_isas() -> list[str]:
    """The instruction sets of this machine; none before the extension is built, so that collection works."""
    try:
        from edgert import _native
    except ImportError:
        return []
    return list(_native.runnable_isas())


def bits(logits: np.ndarray) -> np.ndarray:
    """f32 as integers: equal where, and only where, every bit is."""
    return np.ascontiguousarray(logits, np.float32).view(np.uint32)


def draw(logits: np.ndarray, rng: random.Random) -> int:
    """A token from the softmax of one row; a function of the row's bits and of `rng` alone."""
    weights = np.exp((logits - logits.max()).astype(np.float64))
    return int(np.searchsorted(np.cumsum(weights), rng.random() * weights.sum()))


def transcript(
    model: Any, prompt: Sequence[int], generated: int, *, seed: int = 0
) -> tuple[list[int], np.ndarray]:
    """`generated` tokens drawn one by one after `prompt`, and the bits of the logits at every position."""
    rng = random.Random(seed)
    sequence = model.sequence()
    rows = [model.logits(sequence, list(prompt))]
    tokens: list[int] = []
    for _ in range(generated):
        tokens.append(draw(rows[-1][-1], rng))
        rows.append(model.logits(sequence, tokens[-1:]))
    sequence.close()
    return tokens, bits(np.concatenate(rows))


def answer(model: Any, tokens: list[int] = LONG) -> np.ndarray:
    sequence = model.sequence()
    try:
        return bits(model.logits(sequence, tokens))
    finally:
        sequence.close()


def use(bundle: Path) -> None:
    """Load the bundle and run a prompt that meets every expert."""
    import edgert

    model = edgert.load(bundle, memory="64MiB", threads=1)
    model.logits(LONG[: model.context])


# --- manifests by hand --------------------------------------------------------------------------------


def read_manifest(bundle: Path) -> dict[str, Any]:
    """The manifest without its checksum line."""
    text = (bundle / "manifest.json").read_bytes()
    manifest: dict[str, Any] = json.loads(text)
    manifest.pop("checksum")
    return manifest


def seal(bundle: Path, body: bytes) -> None:
    """Write manifest.json: the checksum line, then `body`, which is a JSON object without its opening brace."""
    checksum = xxhash.xxh64(body, seed=0).hexdigest()
    (bundle / "manifest.json").write_bytes(f'{{"checksum":"{checksum}",\n'.encode() + body)


def edit_manifest(bundle: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    """Change the manifest and give it a checksum that is right, so that only the change is wrong."""
    manifest = read_manifest(bundle)
    edit(manifest)
    seal(bundle, json.dumps(manifest).encode()[1:])


def flip_bit(file: Path, offset: int, bit: int = 0) -> None:
    with file.open("r+b") as f:
        f.seek(offset)
        byte = f.read(1)[0]
        f.seek(offset)
        f.write(bytes([byte ^ (1 << bit)]))


def extents(bundle: Path) -> list[tuple[int, int]]:
    """(offset, bytes) of every expert in the first expert file."""
    return [(e[1], e[2]) for row in read_manifest(bundle)["experts"] for e in row["extents"]]


def first_tensor(bundle: Path) -> int:
    return int(read_manifest(bundle)["tensors"][0]["offset"])
