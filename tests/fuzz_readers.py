"""Structure-aware fuzzing of the readers that are written in Python; native/fuzz does it for manifests.

    python tests/fuzz_readers.py safetensors 1000000 [--seed 1]

A round takes a valid file apart, changes one to four things in it, writes it and reads it back. Whatever the file, the
answer is an EdgertError with a short message, or tensors that keep the reader's promises. An input that breaks this is
left at the path that the failure names.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import struct
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm  # type: ignore[import-untyped]

from edgert.converters import safetensors
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
    length, data = None, bytes(39)
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
    assert end in (None, path.stat().st_size)


# --- the loop ---------------------------------------------------------------------------------------

TARGETS: dict[str, tuple[Mutate, Callable[[Path], None]]] = {
    "safetensors": (a_safetensors_file, check_safetensors),
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
