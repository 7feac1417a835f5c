"""What a bad GGUF file gets: a typed error that names the file and the place, at little cost, and nothing written."""

from __future__ import annotations

import os
import struct
import tracemalloc
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from bundles import contents
from ggufs import (
    QWEN3_MOE,
    STRING,
    TYPES,
    Tensor,
    field,
    gguf,
    gguf_arrays,
    info,
    metadata,
    qwen3_moe_arrays,
    string,
    value,
    write_gguf,
)

from edgert.converters.convert import convert
from edgert.errors import CorruptError, EdgertError, NotFoundError, UnsupportedError

MIB = 1 << 20
HUGE = 2**64 - 1


def header(tensors: int, keys: int, *rest: bytes, magic: bytes = b"GGUF", version: int = 3) -> bytes:
    return magic + struct.pack("<IQQ", version, tensors, keys) + b"".join(rest)


def raw_field(key: str, kind: int, body: bytes) -> bytes:
    return string(key) + struct.pack("<I", kind) + body


def array(kind: int, count: int, body: bytes = b"") -> bytes:
    return raw_field("a.list", 9, struct.pack("<IQ", kind, count) + body)


def tensors(*infos: bytes, data: bytes = b"\0" * 4096, fields: tuple[bytes, ...] = ()) -> bytes:
    head = header(len(infos), len(fields), *fields, *infos)
    return head + b"\0" * (-len(head) % 32) + data


def matrix(
    name: str = "w", shape: tuple[int, ...] = (4, 64), kind: int = TYPES["F32"], offset: int = 0
) -> bytes:
    return info(name, shape, kind, offset)


@dataclass
class Row:
    """`content` is the whole file; `names` what the message must hold beside the file's name."""

    name: str
    content: bytes
    names: str
    error: type[EdgertError] = CorruptError


PADDING = b"\0" * 256
ROWS = [
    Row("nothing", b"", "not a GGUF file"),
    Row("magic only", b"GGUF", "byte 4.*version"),
    Row("another magic", b"PK\x03\x04" + PADDING, "not a GGUF file"),
    Row("version 1", header(0, 0, PADDING, version=1), "version 1", UnsupportedError),
    Row("version 4", header(0, 0, PADDING, version=4), "version 4", UnsupportedError),
    Row("big-endian", b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian", UnsupportedError),
    Row("2^64-1 tensors", header(HUGE, 0, PADDING), f"byte 8: the number of tensors is {HUGE}"),
    Row("2^64-1 keys", header(0, HUGE, PADDING), f"byte 16: the number of metadata keys is {HUGE}"),
    Row("more tensors than bytes", header(9, 0, PADDING), "the number of tensors is 9"),
    Row("a key past the file", header(0, 1, struct.pack("<Q", HUGE), PADDING), f"a metadata key: length {HUGE}"),
    Row("a key too long", header(0, 1, string("k" * 5000), PADDING), "5000 bytes; at most 1024"),
    Row("a key that is not UTF-8", header(0, 1, string(b"k\xff"), value(1), PADDING), "byte 33.*not UTF-8"),
    Row("a string past the file", header(0, 1, raw_field("a.text", STRING, struct.pack("<Q", 1 << 40))), "a.text"),
    Row("an array past the file", header(0, 1, array(4, 1 << 60), PADDING), "a.list: the number of elements"),
    Row("an array of strings past the file", header(0, 1, array(STRING, 1 << 40), PADDING), "a.list: the number of str"),
    Row("a string of an array past the file", header(0, 1, array(STRING, 1, struct.pack("<Q", 999)), PADDING), "a.list"),
    Row("an array of arrays", header(0, 1, array(9, 1, PADDING)), "a.list: an array of arrays"),
    Row("an unknown value type", header(0, 1, raw_field("a.b", 13, PADDING)), "a.b: value type 13"),
    Row("an unknown element type", header(0, 1, array(77, 1, PADDING)), "a.list: element type 77"),
    Row("a bool of 2", header(0, 1, raw_field("a.b", 7, b"\x02"), PADDING), "a.b: a bool of 2"),
    Row("a key twice", header(0, 2, field("a.b", 1), field("a.b", 1), PADDING), "'a.b' appears twice"),
    *(
        Row(
            f"alignment {alignment}",
            header(0, 1, field("general.alignment", alignment), PADDING),
            f"general.alignment: {alignment}",
        )
        for alignment in (0, 4, 13, 1 << 31)
    ),
    Row("alignment as text", header(0, 1, field("general.alignment", "32"), PADDING), "general.alignment: string"),
    Row("0 dimensions", tensors(matrix(shape=())), "tensor 'w': 0 dimensions"),
    Row("5 dimensions", tensors(matrix(shape=(1, 1, 1, 1, 64))), "tensor 'w': 5 dimensions"),
    Row("2^32-1 dimensions", tensors(string("w") + struct.pack("<I", 2**32 - 1)), f"tensor 'w': {2**32 - 1} dim"),
    Row("a dimension of 0", tensors(matrix(shape=(0, 64))), "tensor 'w': shape"),
    Row("a product beyond 2^64", tensors(matrix(shape=(1 << 33, 1 << 33))), "tensor 'w': shape"),
    Row("a size beyond 2^64", tensors(matrix(shape=(1 << 40, 1 << 23))), "tensor 'w': shape"),
    Row("padding beyond 2^63", tensors(matrix(shape=(1 << 32, 1 << 27))), "past the file"),
    Row("a sum of sizes beyond the file", tensors(matrix("v"), matrix("w", (16, 64), offset=1024)), "'w'.*past the file"),
    Row("an unknown tensor type", tensors(matrix(kind=200)), "tensor 'w': type 200", UnsupportedError),
    Row("a type that is not read", tensors(matrix(shape=(1, 256), kind=16)), "IQ2_XXS", UnsupportedError),
    Row("rows that are no multiple of the block", tensors(matrix(shape=(4, 48), kind=TYPES["Q8_0"])), "'w'.*48.*Q8_0"),
    Row("an offset past the end", tensors(matrix(offset=1 << 40)), "'w'.*leaves a gap"),
    Row("an offset of 2^64-32", tensors(matrix(offset=2**64 - 32)), "'w': offset"),
    Row("an offset that is not aligned", tensors(matrix(offset=8)), "'w': offset 8"),
    Row("overlapping tensors", tensors(matrix("v"), matrix("w", offset=512)), "'w'.*overlaps"),
    Row("a gap between tensors", tensors(matrix("v"), matrix("w", offset=2048)), "'w'.*leaves a gap"),
    Row("a tensor twice", tensors(matrix("w"), matrix("w", offset=1024)), "tensor 'w' appears twice"),
    Row("a tensor's name too long", tensors(matrix("w" * 80)), "a tensor's name: 80 bytes"),
    Row("no architecture", tensors(matrix()), "general.architecture: missing"),
    Row("architecture as a number", tensors(matrix(), fields=(field("general.architecture", 5),)), "architecture.*uint32"),
    Row(
        "an unknown architecture",
        tensors(matrix(), fields=(field("general.architecture", "clip"),)),
        "'clip' is not supported",
        UnsupportedError,
    ),
    Row(
        "an adapter",
        tensors(matrix(), fields=(field("general.type", "adapter"),)),
        "general.type.*adapter",
        UnsupportedError,
    ),
]  # fmt: skip


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_a_malformed_file(row: Row, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(row.content)
    refused(path, row.names, row.error)


def refused(path: Path, names: str, error: type[EdgertError] = CorruptError) -> None:
    """One error that names the file and `names`; nothing written, and little memory taken."""
    before = contents(path.parent)
    tracemalloc.start()
    try:
        with pytest.raises(error, match=rf"(?s)model.*\.gguf.*{names}"):
            convert(path, path.parent / "out.edgert")
        assert tracemalloc.get_traced_memory()[1] < 64 * MIB
    finally:
        tracemalloc.stop()
    assert contents(path.parent) == before


# --- models that are files, but no models ---------------------------------------------------------------


def model(**changes: Any) -> list[bytes]:
    """The metadata of a sound model with `changes` ("__" for dots, None to leave a key out)."""
    renamed = {key.replace("__", "."): item for key, item in changes.items()}
    values = {key: item for key, item in (QWEN3_MOE | renamed).items() if item is not None}
    return metadata("qwen3moe", values)


CONFIGURATIONS: list[tuple[str, dict[str, Any], str, type[EdgertError]]] = [
    ("block_count beyond reason", {"block_count": 10**9}, r"qwen3moe.block_count \(byte \d+\): 1000000000", CorruptError),
    ("block_count 0", {"block_count": 0}, r"qwen3moe.block_count", CorruptError),
    ("block_count as text", {"block_count": "3"}, "qwen3moe.block_count.*string", CorruptError),
    ("one layer more than there are", {"block_count": 4}, r"tensor 'blk.3.attn_norm.weight' is missing", CorruptError),
    ("one layer less", {"block_count": 2}, r"tensor 'blk.2.\w+.weight' is not part", UnsupportedError),
    ("10^9 experts", {"expert_count": 10**9}, r"qwen3moe.expert_count", CorruptError),
    ("more experts than there are", {"expert_count": 9}, "'blk.0.ffn_gate_inp.weight': shape", CorruptError),
    ("top-k above the experts", {"expert_used_count": 9}, "qwen3moe.expert_used_count", CorruptError),
    ("no width", {"embedding_length": None}, "hidden_size|embedding_length", CorruptError),
    ("another width", {"embedding_length": 96}, "shape", CorruptError),
    ("a NaN", {"attention__layer_norm_rms_epsilon": float("nan")}, "layer_norm_rms_epsilon", CorruptError),
    ("unknown rope scaling", {"rope__scaling__type": "longrope"}, "rope.scaling.type.*longrope", UnsupportedError),
    ("half of a head rotated", {"rope__dimension_count": 8}, "rope.dimension_count.*8", UnsupportedError),
    ("values of another length", {"attention__value_length": 8}, "attention.value_length.*8", UnsupportedError),
    ("a window", {"attention__sliding_window": 16}, "attention.sliding_window", UnsupportedError),
    ("sigmoid routing", {"expert_gating_func": 2}, "expert_gating_func.*2", UnsupportedError),
    ("a key of tomorrow", {"attention__tomorrow": 1}, "attention.tomorrow", UnsupportedError),
    ("a text of tomorrow", {"attention__tomorrow": "x"}, "attention.tomorrow", UnsupportedError),
    ("a width a layer", {"feed_forward_length": [96, 96, 64]}, "feed_forward_length.*layer", UnsupportedError),
]  # fmt: skip


@pytest.fixture(scope="module")
def arrays() -> dict[str, Any]:
    return gguf_arrays(qwen3_moe_arrays())


@pytest.mark.parametrize(
    ("name", "changes", "names", "error"), CONFIGURATIONS, ids=[row[0] for row in CONFIGURATIONS]
)
def test_metadata_that_is_no_model(
    name: str,
    changes: dict[str, Any],
    names: str,
    error: type[EdgertError],
    tmp_path: Path,
    arrays: dict[str, Any],
) -> None:
    refused(write_gguf(tmp_path / "model.gguf", model(**changes), arrays), names, error)


def vocabulary(**changes: Any) -> list[bytes]:
    values = {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": ["a", "b", "ab", "<s>"],
        "token_type": [1, 1, 1, 3],
        "merges": ["a b"],
        "bos_token_id": 3,
        "eos_token_id": 3,
    } | changes
    return [field(f"tokenizer.ggml.{key}", item) for key, item in values.items() if item is not None]


VOCABULARIES: list[tuple[str, dict[str, Any], str, type[EdgertError]]] = [
    ("an unknown model", {"model": "bert"}, "tokenizer.ggml.model.*bert", UnsupportedError),
    ("an unknown pre-tokeniser", {"pre": "tomorrow"}, "tokenizer.ggml.pre.*tomorrow", UnsupportedError),
    ("no tokens", {"tokens": None}, "tokenizer.ggml.tokens", CorruptError),
    ("a token twice", {"tokens": ["a", "b", "a", "<s>"]}, "tokenizer.ggml.tokens.*'a' appears twice", CorruptError),
    ("tokens as numbers", {"tokens": [1, 2, 3, 4]}, "tokenizer.ggml.tokens.*uint32 array", CorruptError),
    ("more tokens than rows", {"tokens": [f"t{i}" for i in range(400)], "token_type": None, "merges": ["t1 1"]},
     "has id 399|vocabulary", CorruptError),
    ("types of other tokens", {"token_type": [1]}, "tokenizer.ggml.token_type.*1 for 4", CorruptError),
    ("no merges", {"merges": None}, "tokenizer.ggml.merges: missing", CorruptError),
    ("a merge of one token", {"merges": ["ab"]}, "tokenizer.ggml.merges.*'ab'", CorruptError),
    ("a merge of a missing token", {"merges": ["a x"]}, "merges", CorruptError),
    ("SentencePiece without scores", {"model": "llama"}, "tokenizer.ggml.scores", CorruptError),
    ("a token that is not UTF-8", {"tokens": [b"a", b"b\xff", b"ab", b"<s>"]}, "tokenizer.ggml.tokens.*UTF-8", CorruptError),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "changes", "names", "error"), VOCABULARIES, ids=[row[0] for row in VOCABULARIES]
)
def test_vocabularies(
    name: str,
    changes: dict[str, Any],
    names: str,
    error: type[EdgertError],
    tmp_path: Path,
    arrays: dict[str, Any],
) -> None:
    refused(write_gguf(tmp_path / "model.gguf", model() + vocabulary(**changes), arrays), names, error)


def test_templates_and_texts_that_are_too_long(tmp_path: Path, arrays: dict[str, Any]) -> None:
    fields = [*model(), *vocabulary(), field("tokenizer.chat_template", "x" * (300 << 10))]
    refused(write_gguf(tmp_path / "model.gguf", fields, arrays), "tokenizer.chat_template: 307200 bytes")


# --- damaged files --------------------------------------------------------------------------------------


def test_truncation_at_every_4_kib(tmp_path: Path, arrays: dict[str, Any]) -> None:
    from edgert.converters.gguf import GgufFile

    path = write_gguf(tmp_path / "model.gguf", model() + vocabulary(), arrays)
    content = path.read_bytes()
    assert GgufFile(path).tensors.keys() == arrays.keys()
    cuts = [*range(0, len(content) - 32, 4096), 25, 100, 1000, len(content) - 32]
    for cut in cuts:
        os.truncate(path, cut)
        with pytest.raises(CorruptError, match=r"model\.gguf"):
            GgufFile(path)
        path.write_bytes(content)


def test_not_a_regular_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.gguf")
    with pytest.raises(CorruptError, match=r"model\.gguf: is a FIFO"):
        convert(tmp_path / "model.gguf", tmp_path / "out.edgert")


def test_a_sparse_file_that_claims_a_great_deal(tmp_path: Path) -> None:
    """Counts that a file of 1 TiB could hold are refused by what is reasonable."""
    path = tmp_path / "model.gguf"
    for content, names in [
        (header(1 << 30, 0), "the number of tensors"),
        (header(0, 1 << 30), "the number of metadata keys"),
        (header(0, 1, array(STRING, 1 << 30)), "the number of strings"),
    ]:
        path.write_bytes(content)
        os.truncate(path, 1 << 40)
        with pytest.raises(CorruptError, match=names):
            convert(path, tmp_path / "out.edgert")


# --- split files ----------------------------------------------------------------------------------------


def parts(directory: Path, arrays: dict[str, Any], count: int = 3, total: int | None = None) -> list[Path]:
    """The model in `count` files."""
    names = sorted(arrays)
    paths = []
    for number in range(count):
        split = [field("split.no", number, "uint16"), field("split.count", count, "uint16"),
                 field("split.tensors.count", len(names) if total is None else total, "int32")]  # fmt: skip
        path = directory / f"model-{number + 1:05}-of-{count:05}.gguf"
        fields = [*model(), *vocabulary(), *split] if number == 0 else split
        paths.append(write_gguf(path, fields, {name: arrays[name] for name in names[number::count]}))
    return paths


def test_a_part_is_missing(tmp_path: Path, arrays: dict[str, Any]) -> None:
    parts(tmp_path, arrays)[1].unlink()
    refused(tmp_path / "model-00001-of-00003.gguf", ": missing; model-00001-of-00003.gguf", NotFoundError)


def test_a_part_is_doubled(tmp_path: Path, arrays: dict[str, Any]) -> None:
    paths = parts(tmp_path, arrays)
    paths[2].write_bytes(paths[1].read_bytes())
    refused(paths[0], "part 1 of 3, counted from 0; its name says part 2")


def test_a_tensor_is_in_two_parts(tmp_path: Path, arrays: dict[str, Any]) -> None:
    paths = parts(tmp_path, arrays)
    name = sorted(arrays)[1]
    split = [field("split.no", 2, "uint16"), field("split.count", 3, "uint16")]
    write_gguf(paths[2], split, {name: arrays[name]})
    refused(paths[0], f"'{name}' is also in model-00002-of-00003.gguf")


def test_a_part_lacks_tensors(tmp_path: Path, arrays: dict[str, Any]) -> None:
    refused(parts(tmp_path, arrays, total=99)[0], "split.tensors.count.*99, but the parts hold")


def test_parts_under_other_names(tmp_path: Path, arrays: dict[str, Any]) -> None:
    path = parts(tmp_path, arrays)[0].rename(tmp_path / "model.gguf")
    refused(path, "split.count.*is part of 3 files")


def test_too_many_parts(tmp_path: Path, arrays: dict[str, Any]) -> None:
    fields = [*model(), field("split.count", 60000, "uint16")]
    refused(write_gguf(tmp_path / "model.gguf", fields, arrays), "split.count.*60000")


def test_an_empty_gguf_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(gguf([field("general.architecture", "llama")], {}))
    refused(tmp_path / "model.gguf", "token_embd.weight")


def test_nan_weights(tmp_path: Path, arrays: dict[str, Any]) -> None:
    path = tmp_path / "model.gguf"
    damaged = dict(arrays)
    damaged["blk.1.ffn_up_exps.weight"] = damaged["blk.1.ffn_up_exps.weight"].copy()
    damaged["blk.1.ffn_up_exps.weight"][5, 3, 7] = float("nan")
    write_gguf(path, model(), damaged)
    refused(path, r"'blk.1.ffn_up_exps.weight': element.*row 163, column 7.*byte \d+: NaN")


def test_a_scale_that_is_not_finite(tmp_path: Path, arrays: dict[str, Any]) -> None:
    path = tmp_path / "model.gguf"
    tensors = {name: Tensor.of(array, "Q8_0" if "exps" in name else "F32") for name, array in arrays.items()}
    broken = tensors["blk.0.ffn_gate_exps.weight"]
    data = bytearray(broken.data)
    data[34 * 6 : 34 * 6 + 2] = b"\x00\x7c"  # infinity
    tensors["blk.0.ffn_gate_exps.weight"] = Tensor(broken.shape, "Q8_0", bytes(data))
    path.write_bytes(gguf(model(), tensors))
    refused(path, r"'blk.0.ffn_gate_exps.weight'.*row 3.*Q8_0 block at byte")
