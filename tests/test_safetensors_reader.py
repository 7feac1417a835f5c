"""The safetensors reader: what it accepts, and that every departure from the format is refused by name."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import write_safetensors

from edgert.converters import safetensors
from edgert.converters.files import InputFile
from edgert.converters.safetensors import read_header
from edgert.errors import CorruptError, NotFoundError, UnsupportedError


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def write(
    path: Path, header: bytes | dict[str, Any], data: bytes = bytes(8), length: int | None = None
) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def test_tensors_come_in_the_order_of_their_data(tmp_path: Path) -> None:
    header = {
        "__metadata__": {"format": "pt", "note": "{}[]"},
        "b": entry(offsets=[4, 12]),
        "a": entry("I8", [2, 2], [0, 4]),
    }
    path = write(tmp_path / "x.safetensors", header, bytes(12))
    base = 8 + len(json.dumps(header))
    a, b = read_header(path)
    assert (a.name, a.dtype, a.shape, a.begin, a.end) == ("a", "I8", (2, 2), base, base + 4)
    assert (b.name, b.begin, b.end, b.path) == ("b", base + 4, base + 12, path)


def test_a_written_tensor_reads_back(tmp_path: Path) -> None:
    values = np.random.default_rng(0).standard_normal((3, 5), np.float32)
    write_safetensors(tmp_path / "x.safetensors", {"other": np.ones(7, np.float32), "värde\n": values})
    tensor = next(t for t in read_header(tmp_path / "x.safetensors") if t.name == "värde\n")
    with InputFile(tensor.path) as file:
        assert bytes(file.read(tensor.begin, tensor.end - tensor.begin)) == values.tobytes()


def test_the_reference_library_agrees(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    tensors = {f"t{i}": np.arange(i * 3, dtype=np.float16).reshape(i, 3) for i in range(1, 5)}
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    with InputFile(tmp_path / "x.safetensors") as file:
        for tensor in read_header(tmp_path / "x.safetensors"):
            assert tensor.shape == tensors[tensor.name].shape
            assert bytes(file.read(tensor.begin, tensor.end - tensor.begin)) == tensors[tensor.name].tobytes()


@pytest.mark.parametrize("header", [b"{}", b'{"__metadata__":{}}', b"{ }   \n"])
def test_no_tensors(tmp_path: Path, header: bytes) -> None:
    assert read_header(write(tmp_path / "x.safetensors", header, b"")) == []


def test_empty_tensors_and_scalars(tmp_path: Path) -> None:
    header = {"none": entry(shape=[0, 4], offsets=[0, 0]), "one": entry(shape=[], offsets=[0, 4])}
    names = [tensor.name for tensor in read_header(write(tmp_path / "x.safetensors", header, bytes(4)))]
    assert names == ["none", "one"]


def raw(text: str) -> bytes:
    """A header with one tensor whose three values are given as text."""
    return ('{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}').replace("[2]", text).encode()


MALFORMED: dict[str, tuple[bytes | dict[str, Any], str]] = {
    "not JSON": (b"hello, world", "expected '{'"),
    "not UTF-8 in a name": (b'{"\xff\xfe":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', "utf-8"),
    "not UTF-8 outside": (b"\xff{}", "expected '{'"),
    "half a surrogate pair": (b'{"\\ud800":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', "surrogate"),
    "unfinished": (b'{"a":{"dtype":"F32","shape":[2]', "'a'"),
    "followed by something": (raw("[2]") + b" x", "follows"),
    "comma at the end": (raw("[2]")[:-1] + b",}", "a tensor name"),
    "name that is no string": (b"{1:2}", "a tensor name"),
    "duplicate name": (raw("[2]")[:-1] + b"," + raw("[2]")[1:], "'a' appears twice"),
    "metadata twice": (b'{"__metadata__":{},"__metadata__":{}}', "twice"),
    "metadata that is no text": (b'{"__metadata__":{"a":1}}', "metadata value"),
    "nested 100k deep": (b"[" * 100_000, "expected '{'"),
    "value nested 100k deep": (b'{"a":' + b"[" * 100_000, "'a'"),
    "shape nested deep": (raw("[" * 1000 + "]" * 1000), "'a'"),
    "metadata nested deep": (b'{"__metadata__":' + b'{"a":' * 10_000, "metadata value"),
    "entry that is a list": ({"a": [1, 2]}, "'a'"),
    "entry without shape": ({"a": {"dtype": "F32", "data_offsets": [0, 8]}}, "'a'"),
    "entry with another key": ({"a": entry() | {"order": "F"}}, "order"),
    "key twice in an entry": (b'{"a":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}', "dtype"),
    "begin after end": ({"a": entry(offsets=[8, 0])}, "[8, 0]"),
    "three offsets": ({"a": entry(offsets=[0, 8, 8])}, "[0, 8, 8]"),
    "end past the file": ({"a": entry(shape=[4], offsets=[0, 16])}, "past the file"),
    "begin far past the file": ({"a": entry(offsets=[2**40, 2**40 + 8])}, "leaves a gap"),
    "gap": ({"a": entry(shape=[1], offsets=[0, 4]), "b": entry(shape=[], offsets=[8, 12])}, "leaves a gap"),
    "gap at the start": ({"a": entry(shape=[1], offsets=[4, 8])}, "leaves a gap"),
    "gap at the end": ({"a": entry(shape=[1], offsets=[0, 4])}, "belong to no tensor"),
    "overlap": ({"a": entry(), "b": entry(shape=[1], offsets=[4, 8])}, "overlaps"),
    "the same data twice": ({"a": entry(), "b": entry()}, "overlaps"),
    "shape overflows": ({"a": entry(shape=[2**31, 2**31, 2**31])}, "overflows"),
    "shape wraps around to the right size": ({"a": entry(shape=[2**62, 2, 2, 2])}, "overflows"),
    "zero times overflow is still checked": ({"a": entry(shape=[2**63, 0], offsets=[0, 0])}, "2^63-1"),
    "bytes that disagree with the shape": ({"a": entry(shape=[3])}, "needs 12"),
    "negative dimension": ({"a": entry(shape=[-2])}, "-2"),
    "two negative dimensions": ({"a": entry(shape=[-1, -2])}, "-1"),
    "negative offset": ({"a": entry(offsets=[-8, 0])}, "-8"),
    "float": (raw("[2.0]"), "2.0"),
    "exponent": (raw("[2e0]"), "2e0"),
    "infinity": (raw("[Infinity]"), "Infinity"),
    "true": (raw("[true]"), "integers"),
    "text": (raw('["2"]'), "integers"),
    "null": (raw("null"), "'a'"),
    "a thousand digits": (raw("[" + "9" * 1000 + "]"), "999"),
    "five thousand digits": (raw("[" + "9" * 5000 + "]"), "'a'"),
    "nine dimensions": ({"a": entry(shape=[2, 1, 1, 1, 1, 1, 1, 1, 1])}, "9 dimensions"),
    "dtype that is no text": ({"a": entry(dtype=[1])}, "'a'"),
}  # fmt: skip


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_header(tmp_path: Path, name: str) -> None:
    header, fragment = MALFORMED[name]
    path = write(tmp_path / "x.safetensors", header)
    with pytest.raises(CorruptError) as raised:
        read_header(path)
    assert str(path) in str(raised.value) and fragment in str(raised.value)


def test_unknown_dtype_is_named(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="'a'.*'F16_WEIRD'.*BF16"):
        read_header(write(tmp_path / "x.safetensors", {"a": entry(dtype="F16_WEIRD")}))


FILES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "empty": (lambda path: path.write_bytes(b""), "0 bytes"),
    "seven bytes": (lambda path: path.write_bytes(bytes(7)), "7 bytes"),
    "header past the file": (lambda path: write(path, b"{}", b"", length=3), "3, but only 2"),
    "header past 2^63": (lambda path: write(path, b"{}", b"", length=2**64 - 1), str(2**64 - 1)),
    "LFS pointer": (
        lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n"),
        "git lfs pull",
    ),
    "FIFO": (os.mkfifo, "a FIFO"),
    "directory": (Path.mkdir, "a directory"),
    "link": (lambda path: path.symlink_to("/dev/zero"), "a symbolic link"),
}


@pytest.mark.parametrize("name", FILES)
def test_bad_file(tmp_path: Path, name: str) -> None:
    make, fragment = FILES[name]
    path = tmp_path / "x.safetensors"
    make(path)
    with pytest.raises(CorruptError) as raised:
        read_header(path)
    assert str(path) in str(raised.value) and fragment in str(raised.value)


def test_device_file() -> None:
    with pytest.raises(CorruptError, match="/dev/zero: is a character device"):
        read_header(Path("/dev/zero"))


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="x.safetensors"):
        read_header(tmp_path / "x.safetensors")


def test_header_past_the_cap_is_refused_unread(tmp_path: Path) -> None:
    path = write(tmp_path / "x.safetensors", b"{}", b"", length=safetensors.MAX_HEADER_BYTES + 1)
    os.truncate(path, 1 << 30)
    with pytest.raises(CorruptError, match=f"at most {safetensors.MAX_HEADER_BYTES}"):
        read_header(path)


def test_number_of_tensors_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safetensors, "MAX_TENSORS", 3)
    header = {f"t{i}": entry(shape=[0], offsets=[0, 0]) for i in range(4)}
    with pytest.raises(CorruptError, match="more than 3 tensors"):
        read_header(write(tmp_path / "x.safetensors", header, b""))


def test_a_file_cut_after_its_header_was_read(tmp_path: Path) -> None:
    path = write(tmp_path / "x.safetensors", {"a": entry()})
    tensor = read_header(path)[0]
    os.truncate(path, tensor.end - 3)
    with InputFile(path) as file, pytest.raises(CorruptError, match=f"ends at byte {tensor.end - 3}"):
        file.read(tensor.begin, 8)
