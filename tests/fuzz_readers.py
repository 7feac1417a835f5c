"""Structure-aware fuzzing of the readers that are written in Python; native/fuzz does it for manifests.

    python tests/fuzz_readers.py safetensors 1000000 [--seed 1]

A round takes a valid file apart, changes one to four things in it, writes it and reads it back. Whatever the file, the
answer is an EdgertError with a short message, or tensors that keep the reader's promises; what they hold is read, and
packed where it is quantised. An input that breaks this is left at the path that the failure names.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import struct
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import ggufs
from tqdm import tqdm  # type: ignore[import-untyped]

from edgert import _native
from edgert.converters import gguf, safetensors
from edgert.converters.tensor import CarryingReader, Tensor
from edgert.errors import EdgertError

Mutate = Callable[[random.Random], bytes]

INTEGERS = (0, 1, -1, 2, 3, 4, 8, 13, 31, 32, 33, 255, 256, 65535, 1 << 20, 1 << 31, 1 << 32, (1 << 63) - 1, 1 << 63, (1 << 64) - 1, 1 << 70)  # fmt: skip
VALUES: tuple[Any, ...] = (
    None,
    True,
    0.5,
    1e300,
    "",
    "F32",
    "BF16",
    "F8_E4M3",
    "\udc80",
    "x" * 5000,
    [],
    {},
    [[]],
    [1],
    ["F32"],
)


def changed_bytes(data: bytes, dice: random.Random) -> bytes:
    """One to four bytes changed, cut out or doubled."""
    out = bytearray(data)
    for _ in range(dice.randint(1, 4)):
        if not out:
            break
        at = dice.randrange(len(out))
        match dice.randrange(4):
            case 0:
                out[at] = dice.randrange(256)
            case 1:
                del out[at : at + dice.randint(1, 16)]
            case 2:
                out[at:at] = out[dice.randrange(len(out)) :][: dice.randint(1, 16)]
            case _:
                del out[at:]
    return bytes(out)


def any_integer(dice: random.Random, near: int = 0) -> int:
    return dice.choice(
        (dice.choice(INTEGERS), near + dice.choice((-1, 1, 8, -8)), near ^ (1 << dice.randrange(64)))
    )


def read_all(tensor: Tensor) -> None:
    """The weights, and the codes where there are any."""
    tensor.check()
    rows, cols = math.prod(tensor.shape[:-1]), tensor.shape[-1] if tensor.shape else 1
    if not rows * cols or rows * cols > 1 << 16:
        return
    with tensor.open() as reader:
        raw, kind = reader.floats(0, rows)
        assert len(raw) == rows * cols * (4 if kind == "f32" else 2)
        if isinstance(reader, CarryingReader) and tensor.stored_format is not None:
            packed = bytearray(_native.packed_bytes(tensor.stored_format, rows, cols))
            reader.carry(0, rows, packed)
            held = _native.unpack(tensor.stored_format, packed, rows, cols)
            assert held == bytes(raw)


# --- safetensors ------------------------------------------------------------------------------------

_SAFETENSORS = {
    "__metadata__": {"format": "pt"},
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
    "c": {"dtype": "I8", "shape": [], "data_offsets": [32, 33]},
    "d": {"dtype": "U8", "shape": [0, 7], "data_offsets": [33, 33]},
    "e": {"dtype": "F8_E4M3", "shape": [3, 1, 2], "data_offsets": [33, 39]},
}


def a_safetensors_file(dice: random.Random) -> bytes:
    header: dict[str, Any] = json.loads(json.dumps(_SAFETENSORS))
    length, data = None, dice.randbytes(39)
    for _ in range(dice.choice((0, 1, 1, 2, 4))):
        name = dice.choice(list(header) or ["a"])
        entry = header.get(name)
        match dice.randrange(7):
            case 0:
                header[name] = dice.choice(VALUES)
            case 1:
                header[dice.choice(("f", "", "é\n", "__metadata__"))] = entry
            case 2:
                header.pop(name, None)
            case 3:
                data = bytes(dice.choice((0, 38, 40, 4096)))
            case 4:
                length = any_integer(dice, len(json.dumps(header))) % (1 << 64)
            case _ if isinstance(entry, dict) and entry:
                field = dice.choice(list(entry))
                value = entry[field]
                if isinstance(value, list) and value and dice.random() < 0.8:
                    at = dice.randrange(len(value))
                    value[at] = any_integer(dice, value[at] if isinstance(value[at], int) else 0)
                else:
                    entry[field] = dice.choice((*VALUES, any_integer(dice)))
    text = json.dumps(header, ensure_ascii=dice.random() < 0.5).encode("utf-8", "surrogatepass")
    file = struct.pack("<Q", len(text) if length is None else length) + text + data
    return changed_bytes(file, dice) if dice.random() < 0.2 else file


def check_safetensors(path: Path) -> None:
    end = None
    for tensor in safetensors.read_header(path):
        elements = 1
        for dimension in tensor.shape:
            elements *= dimension
        assert elements * safetensors.DTYPE_BITS[tensor.dtype] == 8 * (tensor.end - tensor.begin)
        assert end in (None, tensor.begin)
        end = tensor.end
        with suppress(EdgertError):
            read_all(tensor)
    assert end in (None, path.stat().st_size)


# --- GGUF -------------------------------------------------------------------------------------------


def _a_value(dice: random.Random) -> Any:
    return dice.choice(
        ("", "text", "\0", "x" * 300, 7, True, 0.5, [], [1, 2, 3], ["a", "b"], [[1], [2]], [0.5] * 9)
    )


def _an_entry(name: str, dice: random.Random) -> bytes:
    """A key of the metadata, seldom with a type or a length that is not its own."""
    item = _a_value(dice)
    entry = bytearray(ggufs.field(name, item))
    if dice.random() < 0.2:
        at = len(ggufs.string(name)) + dice.choice((0, 4, 8))
        entry[at : at + 8] = struct.pack("<Q", any_integer(dice, len(entry)) % (1 << 64))
    return bytes(entry)


def a_gguf_file(dice: random.Random) -> bytes:
    fields = {
        "general.architecture": ggufs.field("general.architecture", "llama"),
        "llama.block_count": ggufs.field("llama.block_count", 2),
        "tokenizer.ggml.tokens": ggufs.field("tokenizer.ggml.tokens", ["a", "b", "é"]),
        "tokenizer.ggml.scores": ggufs.field("tokenizer.ggml.scores", [0.5, 1.5, -2.5]),
    }
    tensors: dict[str, tuple[list[int], int, int]] = {}  # shape, type, offset
    offset = 0
    for name, shape, kind, size in (
        ("a", [3, 32], 2, 54),
        ("b", [5], 0, 20),
        ("c", [2, 1, 256], 12, 288),
        ("d", [4, 4], 30, 32),
    ):
        tensors[name] = (shape, kind, offset)
        offset += -(-size // 32) * 32
    alignment, version, counts, data = 32, 3, [len(tensors), len(fields)], dice.randbytes(offset)
    for _ in range(dice.choice((0, 1, 1, 2, 4))):
        name = dice.choice(list(tensors))
        shape, kind, offset = tensors[name]
        match dice.randrange(9):
            case 0:
                key = dice.choice((*fields, "new", "", "general.alignment"))
                fields[key] = _an_entry(key, dice)
                counts[1] = len(fields)
            case 1:
                fields["twice"] = _an_entry(dice.choice(list(fields)), dice)
                counts[1] = len(fields)
            case 2:
                alignment = dice.choice((0, 1, 8, 13, 64, 1 << 16, 1 << 31))
                fields["general.alignment"] = ggufs.field("general.alignment", alignment)
                counts[1] = len(fields)
            case 3:
                shape = [
                    any_integer(dice, size) % (1 << 64) if dice.random() < 0.5 else size for size in shape
                ]
                tensors[name] = (dice.choice((shape, [*shape, 1], shape[1:], [1] * 5)), kind, offset)
            case 4:
                tensors[name] = (shape, dice.choice((*range(42), any_integer(dice) % (1 << 32))), offset)
            case 5:
                tensors[name] = (shape, kind, any_integer(dice, offset) % (1 << 64))
            case 6:
                counts[dice.randrange(2)] = any_integer(dice, 4) % (1 << 64)
            case 7:
                version = dice.choice((0, 1, 2, 3, 4, 3 << 24))
            case _:
                data = bytes(dice.choice((0, 1, max(len(data) - 1, 0), len(data) + 1, 4096)))
    file = b"GGUF" + struct.pack("<IQQ", version, *counts) + b"".join(fields.values())
    for name, (shape, kind, offset) in tensors.items():
        file += ggufs.info(name, shape, kind, offset)
    file += bytes(-len(file) % (alignment if 0 < alignment <= 1 << 16 else 32)) + data
    return changed_bytes(file, dice) if dice.random() < 0.2 else file


def check_gguf(path: Path) -> None:
    file = gguf.GgufFile(path)
    for tensor in file.tensors.values():
        rows = math.prod(tensor.shape[:-1])
        assert tensor.begin > 0 and tensor.begin + rows * tensor.row_bytes <= path.stat().st_size
        with suppress(EdgertError):
            read_all(tensor)
    for key, field in file.fields.items():
        with suppress(EdgertError):
            if field.kind == "string":
                file.text(key, 1 << 10)
            elif field.kind == "string array":
                assert len(file.texts(key) or ()) == field.count
            elif field.kind.endswith("array"):
                assert len(file.numbers(key) or ()) == field.count


# --- the loop ---------------------------------------------------------------------------------------

TARGETS: dict[str, tuple[Mutate, Callable[[Path], None]]] = {
    "safetensors": (a_safetensors_file, check_safetensors),
    "gguf": (a_gguf_file, check_gguf),
}


def fuzz(
    target: str, executions: int, seed: int, directory: Path, *, progress: bool = False
) -> dict[str, int]:
    """Returns how many files were read and how many refused."""
    make, check = TARGETS[target]
    path = directory / f"{target}-{os.getpid()}-{seed}"
    counts = {"read": 0, "refused": 0}
    dice = random.Random(f"{target} {seed}")
    for _ in tqdm(range(executions), disable=not progress, mininterval=5):
        path.write_bytes(make(dice))
        try:
            check(path)
            counts["read"] += 1
        except EdgertError as error:
            assert len(str(error)) < 4096, f"{path}: a message of {len(str(error))} characters"
            counts["refused"] += 1
        except BaseException as error:
            raise AssertionError(f"{path}: {type(error).__name__}: {error}") from error
    path.unlink(missing_ok=True)
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("executions", type=int)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    directory = Path(
        tempfile.mkdtemp(prefix="edgert-fuzz-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None)
    )
    print(fuzz(options.target, options.executions, options.seed, directory, progress=sys.stderr.isatty()))
    directory.rmdir()


if __name__ == "__main__":
    main()
