"""GGUF files through llama.cpp: against a stand-in for its library, and against the library where it is installed."""

import ctypes
import importlib.util
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

import edgert
from edgert.bundle import Bundle
from edgert.cli.main import main
from edgert.component import verify
from edgert.converters.source import convert_source
from edgert.errors import (
    BudgetError,
    CorruptError,
    InvalidArgumentError,
    NotFoundError,
    UnsupportedError,
)

VOCAB, EOS = 300, 0


def write_gguf(path: Path, architecture: str = "starcoder2") -> Path:
    """A file with the metadata of a dense model that edgert's decoder has no place for, and one tensor."""
    import struct

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    def field(key: str, kind: int, value: bytes) -> bytes:
        return text(key) + struct.pack("<I", kind) + value

    numbers = {
        "block_count": 2,
        "embedding_length": 8,
        "context_length": 64,
        "attention.head_count": 2,
        "vocab_size": VOCAB,
    }
    fields = [field("general.architecture", 8, text(architecture))]
    fields += [field(f"{architecture}.{key}", 4, struct.pack("<I", value)) for key, value in numbers.items()]
    header = struct.pack("<4sIQQ", b"GGUF", 3, 1, len(fields)) + b"".join(fields)
    header += text("token_embd.weight") + struct.pack("<IQQIQ", 2, 8, 4, 0, 0)
    header += b"\0" * (-len(header) % 32)
    path.write_bytes(header + np.ones(32, np.float32).tobytes())
    return path


class _Llama:
    """Logits are a function of all tokens so far, so that a wrong history shows."""

    made: ClassVar[list[dict[str, Any]]] = []

    def __init__(self, **options: Any) -> None:
        if "broken" in options["model_path"]:
            raise ValueError("Failed to load model from file")
        self.made.append(options)
        self.history: list[int] = []
        self.ctx = self

    def n_vocab(self) -> int:
        return VOCAB

    def reset(self) -> None:
        self.history = []

    def eval(self, tokens: Sequence[int]) -> None:
        self.history += tokens

    def close(self) -> None:
        self.history = []

    def row(self) -> Any:
        logits = expected_logits(self.history)
        self.kept = (ctypes.c_float * VOCAB)(*logits.tolist())
        return ctypes.cast(self.kept, ctypes.POINTER(ctypes.c_float))


def expected_logits(tokens: Sequence[int]) -> np.ndarray:
    return np.random.default_rng(list(tokens)).standard_normal(VOCAB).astype(np.float32)


def expected_tokens(prompt: Sequence[int], count: int) -> list[int]:
    """Greedy."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(expected_logits(tokens).argmax()))
    return tokens[len(prompt) :]


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> type[_Llama]:
    module = types.ModuleType("llama_cpp")
    functions = {
        "Llama": _Llama,
        "ggml_abort_callback": lambda function: function,
        "llama_set_abort_callback": lambda ctx, callback, data: None,
        "llama_get_logits_ith": lambda ctx, index: ctx.row(),
        "__version__": "0",
    }
    for name, value in functions.items():
        setattr(module, name, value)
    monkeypatch.setitem(sys.modules, "llama_cpp", module)
    _Llama.made.clear()
    return _Llama


def test_it_generates_and_reports(stand_in: type[_Llama], tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf")
    with edgert.load(path, backend="llama.cpp", memory="256MiB", threads=1) as model:
        result = model.generate([5, 6], max_tokens=4, logprobs=2)
        assert result.tokens == expected_tokens([5, 6], 4) and result.finish_reason == "length"
        assert result.logprobs is not None and len(result.logprobs) == 4
        statistics = result.statistics
        assert statistics["prompt_tokens"] == 2 and statistics["generated_tokens"] == 4
        assert statistics["budget_bytes"] == 256 << 20 and "expert_hits" not in statistics
        np.testing.assert_array_equal(
            model.logits([1, 2, 3]),
            [expected_logits([1]), expected_logits([1, 2]), expected_logits([1, 2, 3])],
        )
        with pytest.raises(UnsupportedError, match=r"of edgert's own engine"):
            _ = model.native
        with pytest.raises(NotFoundError, match="no tokenizer"):
            model.generate("text")
        assert (
            model.generate([5], max_tokens=2, temperature=1, seed=1).tokens
            == model.generate([5], max_tokens=2, temperature=1, seed=1).tokens
        )
    assert stand_in.made[0] | {"n_ctx": 64, "use_mmap": False, "n_threads": 1} == stand_in.made[0]
    with pytest.raises(InvalidArgumentError, match="is closed"):
        model.generate([5])


def test_streams_take_turns(stand_in: type[_Llama], tmp_path: Path) -> None:
    model = edgert.load(write_gguf(tmp_path / "model.gguf"), backend="llama.cpp", memory="256MiB")
    streams = [model.stream([3, 4], max_tokens=5), model.stream([9], max_tokens=5)]
    for _ in range(5):
        for stream in streams:
            next(stream)
    assert [stream.result.tokens for stream in streams] == [
        expected_tokens([3, 4], 5),
        expected_tokens([9], 5),
    ]


def test_a_stream_can_be_cancelled(stand_in: type[_Llama], tmp_path: Path) -> None:
    model = edgert.load(write_gguf(tmp_path / "model.gguf"), backend="llama.cpp", memory="256MiB")
    stream = model.stream([3])
    next(stream)
    stream.cancel()
    assert [piece.finish_reason for piece in stream] == ["cancelled"]


def test_what_its_own_decoder_lacks_runs_there_by_itself(
    stand_in: type[_Llama], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: object, *rest: object) -> Path:
        raise UnsupportedError("starcoder2 is not supported")

    monkeypatch.setattr("edgert.loading.locate", refuse)
    path = write_gguf(tmp_path / "model.gguf")
    with (
        pytest.warns(RuntimeWarning, match="because starcoder2 is not supported"),
        edgert.load(path, memory="256MiB") as model,
    ):
        assert model.backend == "llama.cpp"
    with pytest.raises(UnsupportedError, match="starcoder2"):
        edgert.load(path, backend="edgert")


def test_a_bundle_holds_the_file_as_it_is(
    stand_in: type[_Llama], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_gguf(tmp_path / "model.gguf")
    report = convert_source(path, tmp_path / "x.edgert", backend="llama.cpp")
    assert (report.path / "model.gguf").read_bytes() == path.read_bytes()
    assert Bundle.open(report.path).component == {
        "kind": "gguf",
        "file": "model.gguf",
        "architecture": "starcoder2",
    }
    assert verify(report.path) > 0
    with edgert.load(report.path, memory="256MiB") as model:
        assert model.generate([5], max_tokens=3).tokens == expected_tokens([5], 3)
    assert main(["show", str(report.path)]) == 0
    assert "starcoder2" in capsys.readouterr().out
    with pytest.raises(UnsupportedError, match=r"llama\.cpp runs this bundle, not onnx"):
        edgert.load(report.path, backend="onnx")
    with pytest.raises(InvalidArgumentError, match="dense_format: a GGUF file"):
        convert_source(path, tmp_path / "y.edgert", backend="llama.cpp", dense_format="int8")
    (report.path / "model.gguf").write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(CorruptError, match=r"model\.gguf: checksum is"):
        edgert.load(report.path)


def test_the_context_follows_the_knob_and_the_budget(stand_in: type[_Llama], tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf")
    assert edgert.load(path, backend="llama.cpp", memory="256MiB", context=32).context == 32
    with pytest.raises(InvalidArgumentError, match="the model allows 64"):
        edgert.load(path, backend="llama.cpp", memory="256MiB", context=65)
    with pytest.raises(BudgetError, match="the smallest that works is"):
        edgert.load(path, backend="llama.cpp", memory="2MiB")


def test_a_part_that_is_missing_is_named(stand_in: type[_Llama], tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model-00001-of-00002.gguf")
    with pytest.raises(NotFoundError, match="model-00002-of-00002"):
        edgert.load(path, backend="llama.cpp")


def test_what_llama_cpp_refuses(stand_in: type[_Llama], tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "broken.gguf")
    with pytest.raises(UnsupportedError, match=r"llama\.cpp cannot load it: Failed"):
        edgert.load(path, backend="llama.cpp", memory="256MiB")
    path.write_bytes(b"GGUF\x03" + b"\xff" * 40)
    with pytest.raises((CorruptError, UnsupportedError)):
        edgert.load(path, backend="llama.cpp")


def test_without_llama_cpp_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    with pytest.raises(UnsupportedError, match=r"pip install 'edgert\[gguf\]'"):
        edgert.load(write_gguf(tmp_path / "model.gguf"), backend="llama.cpp")


def test_a_backend_that_there_is_not() -> None:
    with pytest.raises(
        InvalidArgumentError, match=r"backend: found 'torch', allowed are edgert, llama\.cpp, onnx"
    ):
        edgert.load(backend="torch")


@pytest.mark.skipif(
    importlib.util.find_spec("llama_cpp") is None or importlib.util.find_spec("gguf") is None,
    reason="needs llama-cpp-python and gguf",
)
def test_logits_are_those_of_the_library_alone(tmp_path: Path) -> None:
    import llama_cpp

    path = real_gguf(tmp_path / "tiny.gguf")
    tokens = [1, 5, 9, 200, 3]
    alone = llama_cpp.Llama(str(path), n_ctx=64, logits_all=True, verbose=False, n_threads=1)
    alone.eval(tokens)
    expected = np.array(alone.scores[: len(tokens)])
    with edgert.load(path, backend="llama.cpp", memory="512MiB", threads=1) as model:
        np.testing.assert_allclose(model.logits(tokens), expected, rtol=1e-4, atol=1e-4)
        assert model.generate(tokens, max_tokens=1).tokens == [int(expected[-1].argmax())]
        assert model.stats()["peak_bytes"] <= 512 << 20


def real_gguf(path: Path) -> Path:
    """A small random dense model of llama's architecture, with a vocabulary of bytes."""
    from gguf import GGUFWriter

    width, hidden, layers, random = 64, 96, 2, np.random.default_rng(2)
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(layers)
    writer.add_context_length(64)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(hidden)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(16)
    writer.add_vocab_size(VOCAB)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"<0x{n:02X}>" if n < 256 else f"t{n}" for n in range(VOCAB)])
    writer.add_token_scores([0.0] * VOCAB)
    writer.add_token_types([6 if n < 256 else 1 for n in range(VOCAB)])

    def add(name: str, *shape: int) -> None:
        value = np.ones(shape) if len(shape) == 1 else random.standard_normal(shape) * 0.1
        writer.add_tensor(f"{name}.weight", value.astype(np.float32))

    add("token_embd", VOCAB, width)
    add("output", VOCAB, width)
    add("output_norm", width)
    for layer in range(layers):
        sizes = {"attn_q": width, "attn_k": width // 2, "attn_v": width // 2, "attn_output": width}
        for name, rows in sizes.items():
            add(f"blk.{layer}.{name}", rows, width)
        for name, shape in {
            "ffn_gate": (hidden, width),
            "ffn_up": (hidden, width),
            "ffn_down": (width, hidden),
        }.items():
            add(f"blk.{layer}.{name}", *shape)
        add(f"blk.{layer}.attn_norm", width)
        add(f"blk.{layer}.ffn_norm", width)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
