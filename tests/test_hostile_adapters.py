"""Adapters that are wrong: a typed error that names file and field or tensor, and a model that goes on as before."""

from __future__ import annotations

import json
import pickle
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import bits, convert
from peft_directories import LAYERS, PREFIX, Adapter, base_weights, fused_lora, ia3, lora, shira, vera
from shell import Shell, assert_fails

import edgert
from edgert._native import xxh64
from edgert.errors import (
    CorruptError,
    EdgertError,
    InvalidArgumentError,
    NotFoundError,
    StorageError,
    UnsupportedError,
)

TOKENS = list(range(3, 23))
Q = f"{PREFIX}model.layers.0.self_attn.q_proj"
Change = Callable[[Adapter], None]


@pytest.fixture(scope="module")
def loaded(tiny_bundle: Path) -> tuple[Any, np.ndarray]:
    """A model that is loaded all along, and what it answers."""
    model = edgert.load(tiny_bundle, memory="64MiB", threads=1)
    return model, bits(model.logits(TOKENS))


@pytest.fixture(scope="module")
def keeping(tiny_source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with remainders."""
    path = tmp_path_factory.mktemp("base") / "keeping.edgert"
    return convert(tiny_source, path, dense_format="int8", expert_format="int4", remainders=True)


@pytest.fixture(autouse=True)
def as_before(loaded: tuple[Any, np.ndarray]) -> Any:
    """Whatever a case did: nothing was loaded, no memory is gone, the answers are the same."""
    model, answer = loaded
    used = model.stats()["used_bytes"]
    yield
    assert model.adapters() == []
    assert model.stats()["used_bytes"] == used
    np.testing.assert_array_equal(bits(model.logits(TOKENS)), answer)


def refused(loaded: tuple[Any, np.ndarray], path: Path, kind: type[EdgertError]) -> str:
    """As it is loaded, or, where its header is fine, as its numbers are first needed; then again and again."""
    model = loaded[0]

    def load_and_use() -> None:
        model.load_adapter(path, "bad")
        with pytest.raises(kind):
            model.logits(TOKENS, adapter="bad")
        model.logits(TOKENS, adapter="bad")

    with pytest.raises(EdgertError) as caught:
        load_and_use()
    for info in model.adapters():
        model.unload_adapter(info.name)
    assert type(caught.value) is kind, repr(caught.value)
    return str(caught.value)


def tensor(name: str, array: Any) -> Change:
    def change(made: Adapter) -> None:
        assert name in made.tensors
        made.tensors[name] = np.ascontiguousarray(array(made.tensors[name]) if callable(array) else array)

    return change


def renamed(old: str, new: str) -> Change:
    """Every tensor of a module goes to another."""

    def change(made: Adapter) -> None:
        made.tensors = {name.replace(old, new): array for name, array in made.tensors.items()}

    return change


def dropped(name: str) -> Change:
    return lambda made: made.tensors.__delitem__(name)


def option(name: str, value: object) -> Change:
    return lambda made: made.config.__setitem__(name, value)


def index(row: int, value: int, dtype: type = np.int32) -> Change:
    def put(indices: np.ndarray) -> np.ndarray:
        indices = indices.astype(dtype)
        indices[row, 7] = value
        return indices

    return tensor(f"{Q}.shira_indices", put)


def doubled(indices: np.ndarray) -> np.ndarray:
    indices[:, 7] = indices[:, 3]
    return indices


def holed(array: np.ndarray) -> np.ndarray:
    array.reshape(-1)[5] = np.nan
    return array


def saved(name: str, shape: tuple[int, ...], value: float = 0.5) -> Change:
    """A tensor of a module that modules_to_save names."""

    def change(made: Adapter) -> None:
        made.config["modules_to_save"] = [name.rpartition(".")[0].rpartition(".")[2]]
        made.tensors[f"{PREFIX}{name}"] = np.full(shape, value, np.float32)

    return change


def with_rows(value: float) -> Change:
    """The base's head with a row more."""

    def change(made: Adapter) -> None:
        own = base_weights()["lm_head.weight"]
        made.tensors[f"{PREFIX}lm_head.weight"] = np.vstack([own, np.full((1, 72), value, np.float32)])

    return change


def tokens(ids: list[int]) -> Change:
    def change(made: Adapter) -> None:
        made.config["trainable_token_indices"] = ids
        made.tensors[f"{PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta"] = np.ones(
            (2, 72), np.float32
        )

    return change


def prompt(kind: str, shape: tuple[int, int]) -> Change:
    def change(made: Adapter) -> None:
        made.config = {"peft_type": kind, "num_virtual_tokens": shape[0]}
        made.tensors = {"prompt_embeddings": np.ones(shape, np.float32)}

    return change


FACTORS = (f"{Q}.lora_A.weight", f"{Q}.lora_B.weight")
CASES: dict[str, tuple[Callable[[], Adapter], Change, type[EdgertError], str]] = {
    "inputs of another size": (lora, tensor(FACTORS[0], lambda a: a[:, :60]), InvalidArgumentError, "/bad: layers.0.attention.q: A is of 60 numbers"),
    "outputs of another size": (lora, tensor(FACTORS[1], lambda b: b[:60]), InvalidArgumentError, "layers.0.attention.q: B is of 60 numbers"),
    "factors of two ranks": (lora, tensor(FACTORS[1], lambda b: b[:, :1]), CorruptError, "lora_A has rank 2, lora_B 1"),
    "three dimensions": (lora, tensor(FACTORS[0], lambda a: a[None]), CorruptError, "shape [1, 2, 72]; 2 dimensions"),
    "rank 0": (lora, tensor(FACTORS[0], lambda a: a[:0]), CorruptError, "shape [0, 72]; 2 dimensions, none of them 0"),
    "a factor alone": (lora, dropped(FACTORS[1]), CorruptError, "q_proj.lora_B.weight' is missing"),
    "a factor too many": (lora, dropped(FACTORS[0]), UnsupportedError, "q_proj.lora_B.weight': has no place in a LORA adapter"),
    "NaN": (lora, tensor(FACTORS[0], holed), CorruptError, "q_proj.lora_A.weight': holds a number that is not finite"),
    "bytes for numbers": (lora, tensor(FACTORS[0], lambda a: a.astype(np.uint8)), UnsupportedError, "q_proj.lora_A.weight': dtype U8"),
    "an unknown layer": (lora, renamed("layers.0.", f"layers.{LAYERS}."), InvalidArgumentError, f"module 'model.layers.{LAYERS}.self_attn."),
    "an unknown module": (lora, renamed("layers.0.self_attn.q_proj", "layers.0.self_attn.x_proj"), InvalidArgumentError, "self_attn.x_proj': the base tiny.edgert"),
    "an unknown expert": (lora, renamed("experts.3.up", "experts.8.up"), InvalidArgumentError, "'layers.1.experts.8.up'"),
    "a norm": (lora, renamed("layers.0.self_attn.q_proj", "layers.0.self_attn.q_norm"), InvalidArgumentError, "self_attn.q_norm'"),
    "a norm for VeRA": (vera, renamed("layers.0.self_attn.q_proj", "layers.0.self_attn.q_norm"), InvalidArgumentError, "self_attn.q_norm'"),
    "embeddings": (lora, renamed("model.layers.0.self_attn.q_proj", "model.embed_tokens"), UnsupportedError, "adapters of embeddings"),
    "a long name beyond ASCII": (lora, renamed("experts.3.up_proj", "é" * 150), InvalidArgumentError, "has no matrix of this name"),
    "a module twice": (lora, lambda made: made.tensors.update({name.replace("layers.0", "layers.00"): made.tensors[name] for name in FACTORS}), CorruptError, "layers.00.self_attn.q_proj: stands twice"),
    "a negative row": (shira, index(0, -1), CorruptError, "q_proj.shira_indices: holds -1, which is no index"),
    "a negative column of 64 bits": (shira, index(1, -(2**63), np.int64), CorruptError, "holds -9223372036854775808"),
    "a row beyond the matrix": (shira, index(0, 64), InvalidArgumentError, "layers.0.attention.q: value 7 stands at [64, "),
    "a column beyond the matrix": (shira, index(1, 72), InvalidArgumentError, ", 72], the matrix is [64, 72]"),
    "an index beyond int32": (shira, index(0, 2**32, np.int64), CorruptError, "holds 4294967296"),
    "half an index": (shira, tensor(f"{Q}.shira_indices", lambda i: i.astype(np.float32) + np.float32(0.5)), CorruptError, "which is no index"),
    "an element twice": (shira, tensor(f"{Q}.shira_indices", doubled), InvalidArgumentError, "layers.0.attention.q: two values stand at ["),
    "fewer values than indices": (shira, tensor(f"{Q}.shira_weight", lambda v: v[:-1]), CorruptError, "shape [2, 90], needed is [2, 89]"),
    "NaN among sparse values": (shira, tensor(f"{Q}.shira_weight", holed), CorruptError, "not finite"),
    "gains of another size": (ia3, tensor(f"{PREFIX}model.layers.0.self_attn.k_proj.ia3_l", lambda g: g[:-1]), InvalidArgumentError, "attention.k: gain is of 31 numbers, the base's matrix is [32, 72]"),
    "gains along the other side": (ia3, tensor(f"{PREFIX}model.layers.0.self_attn.k_proj.ia3_l", lambda g: g.T), CorruptError, "ia3_l: shape [1, 32]"),
    "VeRA without its projections": (vera, dropped("base_model.vera_A"), UnsupportedError, "save_projection"),
    "magnitudes of another size": (lambda: lora(magnitudes=True), tensor(f"{Q}.lora_magnitude_vector", lambda m: m[:-1]), InvalidArgumentError, "the base's matrix is [64, 72]"),
    "experts of another number": (fused_lora, tensor(f"{PREFIX}model.layers.1.mlp.experts.lora_A.weight", lambda a: a[:-1]), UnsupportedError, "gate_up_proj and down_proj"),
    "experts of another size": (fused_lora, tensor(f"{PREFIX}model.layers.1.mlp.experts.lora_A.weight", lambda a: a[:, :-1]), InvalidArgumentError, "mlp.experts.down_proj: A and B make [72, 39]"),
    "no alpha": (lora, option("lora_alpha", None), CorruptError, "lora_alpha: found 'None'"),
    "an alpha beyond reason": (lora, option("lora_alpha", 10**400), CorruptError, "lora_alpha: found"),
    "patterns that are none": (lora, option("alpha_pattern", ["q_proj"]), CorruptError, "alpha_pattern: an object is needed"),
    "a regular expression": (lora, option("alpha_pattern", {"(?=a)b": 1}), UnsupportedError, "alpha_pattern: '(?=a)b' is a regular expression"),
    "an unknown kind": (lora, option("peft_type", "OFT"), UnsupportedError, "peft_type: found 'OFT'; read are ADALORA, BEFT"),
    "a kind that is no word": (lora, option("peft_type", {"a": 1}), UnsupportedError, "peft_type: found"),
    "a layer trained whole that is not there": (lora, saved("model.layers.9.self_attn.q_proj.weight", (64, 72)), InvalidArgumentError, "module 'model.layers.9.self_attn."),
    "a layer trained whole of another size": (lora, saved("model.layers.0.mlp.gate.weight", (64, 70)), InvalidArgumentError, "the weights are [64, 70], the base's are [8, 72]"),
    "a layer trained whole that nobody names": (lora, lambda made: made.tensors.update({f"{PREFIX}model.layers.0.mlp.gate.weight": np.zeros((8, 72), np.float32)}), UnsupportedError, "gate.weight': has no place in a LORA adapter"),
    "new rows with NaN": (lora, with_rows(np.nan), CorruptError, "lm_head.weight': holds a number that is not finite"),
    "new rows with NaN, trained": (lora, saved("lm_head.weight", (321, 72), np.nan), CorruptError, "lm_head.weight': holds a number that is not finite"),
    "an embedding that is not the base's": (lora, lambda made: made.tensors.update({f"{PREFIX}model.embed_tokens.weight": np.ones((320, 72), np.float32)}), InvalidArgumentError, "the weights are not the base's"),
    "a norm of another size": (lora, saved("model.layers.0.input_layernorm.weight", (70,)), InvalidArgumentError, "the weights are [70], the base's are [72]"),
    "a norm inside attention": (lora, saved("model.layers.0.self_attn.q_norm.weight", (16,)), UnsupportedError, "changed weights of layers.0.attention.q_norm are not run"),
    "a bias of a module without one": (lora, saved("model.layers.0.self_attn.o_proj.bias", (72,)), InvalidArgumentError, "self_attn.o_proj.bias'"),
    "a norm with NaN": (lora, saved("model.norm.weight", (72,), np.nan), CorruptError, "model.norm.weight': holds a number that is not finite"),
    "tokens of another number": (lora, tokens([1, 2, 3]), CorruptError, "needs 2 different token ids, found [1, 2, 3]"),
    "tokens twice": (lora, tokens([7, 7]), CorruptError, "needs 2 different token ids, found [7, 7]"),
    "tokens that are none": (lora, tokens([1, -2]), CorruptError, "needs 2 different token ids, found [1, -2]"),
    "tokens far past the vocabulary": (lora, tokens([1, 2**31 - 1]), CorruptError, "2147483327 rows behind the base's 320 are not saved; at most 4096 are allowed"),
    "a soft prompt of another width": (lora, prompt("PROMPT_TUNING", (4, 70)), InvalidArgumentError, "prompt_embeddings are [4, 70]; the base's hidden size is 72"),
    "a prefix of another width": (lora, prompt("PREFIX_TUNING", (4, 70)), InvalidArgumentError, "prompt_embeddings are [4, 70]; the base's keys and values of 3 layers are 192"),
    "a soft prompt beyond reason": (lora, prompt("PROMPT_TUNING", (4097, 72)), CorruptError, "at most 4096 tokens are allowed"),
    "an empty soft prompt": (lora, prompt("PROMPT_TUNING", (0, 72)), CorruptError, "none of them 0"),
    "layers more than once": (lora, option("layer_replication", [[0, 2]]), UnsupportedError, "layer_replication"),
    "another variant of LoRA": (lora, option("use_qalora", True), UnsupportedError, "use_qalora"),
    "transposed": (lora, option("fan_in_fan_out", True), UnsupportedError, "fan_in_fan_out"),
    "factors that belong to changed weights": (lora, option("init_lora_weights", "pissa_niter_16"), UnsupportedError, "init_lora_weights: found 'pissa_niter_16'"),
    "nothing": (lora, lambda made: made.tensors.clear(), CorruptError, "holds no tensor of an adapter"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_wrong_adapter_is_refused(loaded: tuple[Any, np.ndarray], tmp_path: Path, case: str) -> None:
    make, change, kind, complaint = CASES[case]
    made = make()
    change(made)
    message = refused(loaded, made.write(tmp_path / "bad"), kind)
    assert complaint in message, message
    assert str(tmp_path / "bad") in message


def test_indices_in_any_order_are_fine(tiny_bundle: Path, tmp_path: Path) -> None:
    """And as floats, as PEFT on Windows writes them."""
    made, backwards = shira(), shira()
    for name, array in made.tensors.items():
        backwards.tensors[name] = np.ascontiguousarray(array[..., ::-1].astype(np.float32))
    with edgert.load(tiny_bundle, memory="64MiB", threads=1) as model:
        model.load_adapter(made.write(tmp_path / "one"))
        model.load_adapter(backwards.write(tmp_path / "two"))
        one, two = (bits(model.logits(TOKENS, adapter=name)) for name in ("one", "two"))
    np.testing.assert_array_equal(one, two)


def test_a_rank_of_a_million_is_not_read(loaded: tuple[Any, np.ndarray], tmp_path: Path) -> None:
    directory = lora().write(tmp_path / "bad")
    shapes = {FACTORS[0]: (1_000_000, 72), FACTORS[1]: (64, 1_000_000)}
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 4 * shape[0] * shape[1]
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with (directory / "adapter_model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert "rank 1000000; at most 4096" in refused(loaded, directory, CorruptError)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10


@pytest.mark.parametrize("kept", [0, 4, 100, -1])
def test_a_truncated_adapter(loaded: tuple[Any, np.ndarray], tmp_path: Path, kept: int) -> None:
    directory = lora().write(tmp_path / "bad")
    weights = directory / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:kept])
    assert str(weights) in refused(loaded, directory, CorruptError)


class _Bomb:
    """What runs where somebody unpickles it."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (pytest.fail, ("the pickle was executed",))


def test_a_pickle_is_never_read(loaded: tuple[Any, np.ndarray], tmp_path: Path) -> None:
    directory = lora().write(tmp_path / "bad")
    weights = directory / "adapter_model.safetensors"
    weights.write_bytes(pickle.dumps(_Bomb()))
    refused(loaded, directory, CorruptError)
    weights.rename(directory / "adapter_model.bin")
    assert "adapters are read from safetensors" in refused(loaded, directory, NotFoundError)
    refused(loaded, directory / "adapter_model.bin", CorruptError)


@pytest.mark.parametrize(
    "text", [b"", b"[]", b'{"peft_type": ', b"[" * 100_000, b'{"r": 1, "r": 2}', b"\xff"]
)
def test_a_configuration_that_is_none(loaded: tuple[Any, np.ndarray], tmp_path: Path, text: bytes) -> None:
    directory = lora().write(tmp_path / "bad")
    (directory / "adapter_config.json").write_bytes(text)
    assert "adapter_config.json" in refused(loaded, directory, CorruptError)


def test_an_adapter_of_another_model(loaded: tuple[Any, np.ndarray], tmp_path: Path) -> None:
    made = fused_lora(hidden_size=80)
    assert "the base's matrix is" in refused(loaded, made.write(tmp_path / "bad"), InvalidArgumentError)


# --- converted ones -----------------------------------------------------------------------------------


@pytest.fixture
def file(tiny_bundle: Path, tmp_path: Path) -> Path:
    from edgert.adapter_sources import read_adapter
    from edgert.bundle import Bundle
    from edgert.converters.adapter_file import write_adapter

    manifest = Bundle.open(tiny_bundle).manifest
    read = read_adapter(shira().write(tmp_path / "peft"), tiny_bundle, manifest)
    kind, parts = read.kind, read.parts
    write_adapter(tmp_path / "a.adapter", kind, parts, manifest)
    return tmp_path / "a.adapter"


def rewrite(path: Path, change: Callable[[dict[str, Any], dict[str, np.ndarray]], None]) -> Path:
    """`change` what the metadata say, and the tensors."""
    from safetensors import safe_open
    from safetensors.numpy import save_file

    with safe_open(path, "np") as opened:
        about = json.loads(opened.metadata()["edgert.adapter"])
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    change(about, tensors)
    save_file(tensors, path, {"edgert.adapter": json.dumps(about)})
    if "checksum" in about:
        content = path.read_bytes()
        about["checksum"] = xxh64(content[8 + int.from_bytes(content[:8], "little") :])
    save_file(tensors, path, {"edgert.adapter": json.dumps(about)})
    return path


def coded(
    about: dict[str, Any], tensors: dict[str, np.ndarray], name: str, data: bytes, rows: int = 40
) -> None:
    """One sign, in a stream that ends where the header says."""
    header = {"rows": rows, "cols": 72, "count": 1, "rice": 0, "unary_bits": 8, "value": 0.5}
    about["signs"] = {name: header}
    tensors[name] = np.frombuffer(data, np.uint8).copy()


ROWS = "layers.0.attention.q.shira_rows"
FILE_CASES: dict[str, tuple[Callable[[dict[str, Any], dict[str, np.ndarray]], Any], type[EdgertError], str]] = {
    "a newer format": (lambda about, _: about.update(version=4), UnsupportedError, "format version 4, this edgert reads up to 3"),
    "version 0": (lambda about, _: about.update(version=0), CorruptError, "version: found 0, allowed is 1 to 3"),
    "no version": (lambda about, _: about.pop("version"), CorruptError, "version, kind and base are needed"),
    "another base": (lambda about, _: about["base"].update(final_norm="0" * 16), InvalidArgumentError, "made for another model"),
    "no checksum": (lambda about, _: about.pop("checksum"), CorruptError, "checksum is needed"),
    "no base": (lambda about, _: about.update(base={}), InvalidArgumentError, "made for another model"),
    "a stranger": (lambda _, t: t.update(x=t[ROWS]), CorruptError, "tensor 'x' [90]: has no place in an adapter"),
    "rows that are no integers": (lambda _, t: t.update({ROWS: t[ROWS].astype(np.float32)}), CorruptError, "dtype F32, allowed is I32"),
    "rows of 64 bits": (lambda _, t: t.update({ROWS: t[ROWS].astype(np.int64)}), CorruptError, "dtype I64, allowed is I32"),
    "no rows": (lambda _, t: t.pop(ROWS), CorruptError, "shira_weight, shira_rows and shira_cols go together"),
    "fewer rows": (lambda _, t: t.update({ROWS: t[ROWS][:-1].copy()}), InvalidArgumentError, "shira_rows': shape [89]; n is 90"),
    "a row that is not there": (lambda _, t: t[ROWS].__setitem__(0, -5), InvalidArgumentError, "value 0 stands at [-5, "),
    "an unknown matrix": (lambda _, t: t.update({"layers.9.attention.q.gain": np.ones(64, np.float32)}), InvalidArgumentError, "'layers.9.attention.q'"),
    "a long name beyond ASCII": (lambda _, t: t.update({"x" + "é" * 150 + ".gain": np.ones(64, np.float32)}), InvalidArgumentError, "this model has no matrix 'xéé"),
    "half a pair of factors": (lambda _, t: t.update({"output.lora_A": np.ones((1, 72), np.float32)}), CorruptError, "output: lora_A and lora_B go together"),
    "factors of two types": (lambda _, t: t.update({"output.lora_A": np.ones((1, 72), np.float32), "output.lora_B": np.ones((320, 1), np.float16)}), CorruptError, "output: its factors and weights are of one dtype"),
    "factors of another size": (lambda _, t: t.update({"output.lora_A": np.ones((1, 71), np.float32), "output.lora_B": np.ones((320, 1), np.float32)}), InvalidArgumentError, "output.lora_A': shape [1, 71]; cols is 72"),
    "a rank beyond reason": (lambda _, t: t.update({"output.lora_A": np.ones((5000, 72), np.float32), "output.lora_B": np.ones((320, 5000), np.float32)}), InvalidArgumentError, "output: rank 5000"),
    "a scale alone": (lambda _, t: t.update({"output.lora_scale": np.ones(1, np.float32)}), CorruptError, "output: lora_scale stands beside lora_A"),
    "a scale that is none": (lambda _, t: t.update({"output.lora_A": np.ones((1, 72), np.float32), "output.lora_B": np.ones((320, 1), np.float32), "output.lora_scale": np.array([np.inf], np.float32)}), InvalidArgumentError, "output: the scale of its factors is not finite"),
    "rows of weights that are not there": (lambda _, t: t.update({"output.weight": np.ones((2, 72), np.float32), "output.weight_rows": np.array([1, 320], np.int32)}), InvalidArgumentError, "output: row 320 is given weights"),
    "rows of weights that do not ascend": (lambda _, t: t.update({"output.weight": np.ones((2, 72), np.float32), "output.weight_rows": np.array([1, 1], np.int32)}), InvalidArgumentError, "output: rows that are given weights must ascend"),
    "fewer weights than rows": (lambda _, t: t.update({"output.weight": np.ones((2, 72), np.float32)}), InvalidArgumentError, "output: weight has 2 rows, the matrix 320"),
    "NaN among weights": (lambda _, t: t.update({"output.weight": np.full((320, 72), np.nan, np.float32)}), InvalidArgumentError, "output: "),
    "NaN": (lambda _, t: t["layers.0.attention.q.shira_weight"].__setitem__(3, np.nan), InvalidArgumentError, "value 3 is not finite"),
    "signs that are no object": (lambda about, _: about.update(signs=[1]), CorruptError, "signs are of tensors that are there"),
    "signs of nothing": (lambda about, _: about.update(signs={"output.lora_A": {}}), CorruptError, "signs are of tensors that are there"),
    "signs of another length": (lambda about, t: coded(about, t, "layers.1.attention.q.shira_signs", bytes(99)), CorruptError, "shira_signs' [99]: has no place in an adapter"),

    "signs of another matrix": (lambda about, t: coded(about, t, "layers.1.experts.0.gate.shira_signs", b"\x01\x00", rows=41), InvalidArgumentError, "rows is 40"),
    "signs beside values": (lambda about, t: coded(about, t, "layers.0.attention.q.shira_signs", b"\x80\x01"), CorruptError, "layers.0.attention.q has sparse values already"),
    "two gains": (lambda _, t: t.update({"output.gain": np.ones(320, np.float32), "output.gain_without_bias": np.ones(320, np.float32)}), CorruptError, "output has a gain already"),
}  # fmt: skip


@pytest.mark.parametrize("case", FILE_CASES)
def test_a_wrong_file_is_refused(loaded: tuple[Any, np.ndarray], file: Path, case: str) -> None:
    change, kind, complaint = FILE_CASES[case]
    message = refused(loaded, rewrite(file, change), kind)
    assert complaint in message, message
    assert str(file) in message


def sparse_file(bundle: Path, path: Path, target: str, rows: list[int]) -> Path:
    from edgert.bundle import Bundle
    from edgert.converters.adapter_file import write_adapter
    from edgert.converters.adapter_part import Part

    part = Part(target, rows=np.array(rows, np.int32), cols=np.arange(len(rows), dtype=np.int32))
    part.values = np.ones(len(rows), np.float32)
    write_adapter(path, "SHIRA", [part], Bundle.open(bundle).manifest)
    return path


# Without a model whose header they would have to fit first.
SHOWN = {
    ("layers.0.attention.q", 64): "layers.0.attention.q: value 1 stands at [64, 1], the matrix is [64, 72]",
    ("layers.0.attention.q", -1): "layers.0.attention.q: value 0 stands at [-1, 1]",
    ("layers.0.experts.8.gate", 1): "the base has no matrix 'layers.0.experts.8.gate'",
    ("layers.9.experts.0.gate", 1): "the base has no matrix",
    ("layers.0.experts.0.gate.x", 1): "the base has no matrix",
    ("a.experts.b", 1): "the base has no matrix",
    ("x", 1): "the base has no matrix 'x'",
}


@pytest.mark.parametrize("case", SHOWN)
def test_a_file_that_does_not_fit_is_not_shown(
    edgert: Shell, keeping: Path, tmp_path: Path, case: tuple[str, int]
) -> None:
    target, row = case
    file = sparse_file(keeping, tmp_path / "a.adapter", target, [1, row])
    assert_fails(edgert("adapter", "show", file, "--base", keeping), f"{file}: {SHOWN[case]}")


def test_a_directory_that_does_not_fit_is_not_converted(
    edgert: Shell, tiny_bundle: Path, tmp_path: Path
) -> None:
    made = lora()
    made.tensors[FACTORS[0]] = made.tensors[FACTORS[0]][:, :60].copy()
    done = edgert(
        "adapter", "convert", made.write(tmp_path / "bad"), tmp_path / "a.adapter", "--base", tiny_bundle
    )
    assert_fails(done, "bad: layers.0.attention.q: A is of 60 numbers, the base's matrix is [64, 72]")
    assert not (tmp_path / "a.adapter").exists()


@pytest.mark.parametrize("row", [64, -1, 2**31 - 1])
def test_a_row_beyond_the_remainders_of_a_base(keeping: Path, tmp_path: Path, row: int) -> None:
    file = sparse_file(keeping, tmp_path / "a.adapter", "layers.0.attention.q", [1, row])
    with edgert.load(keeping, memory="64MiB", threads=1) as model:
        model.load_adapter(file, "a")
        for call in (lambda: model.set_adapter("a", mode="patch"), lambda: model.logits(TOKENS, adapter="a")):
            with pytest.raises(
                InvalidArgumentError, match=r"a\.adapter: layers\.0\.attention\.q: value [01] stands at"
            ):
                call()


def test_a_file_of_something_else(loaded: tuple[Any, np.ndarray], file: Path, tmp_path: Path) -> None:
    weights = tmp_path / "peft" / "adapter_model.safetensors"
    assert "not an adapter file" in refused(loaded, weights, CorruptError)
    file.write_bytes(file.read_bytes()[:-1])
    refused(loaded, file, CorruptError)
    refused(loaded, tmp_path / "gone.adapter", NotFoundError)


def test_a_flipped_bit(loaded: tuple[Any, np.ndarray], file: Path) -> None:
    """Of a number: found when the numbers are read, which is when they are needed."""
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    assert "checksum of its numbers differs" in refused(loaded, file, CorruptError)


def test_a_file_that_changes_once_it_is_loaded(tiny_bundle: Path, file: Path, tmp_path: Path) -> None:
    """What left the memory must come back as it was, or not at all."""
    other = tmp_path / "other.adapter"
    other.write_bytes(file.read_bytes())
    with edgert.load(tiny_bundle, memory="64MiB", threads=1, adapter_memory="8KiB") as model:
        model.load_adapter(file, "one")
        model.load_adapter(other, "two")
        answer = bits(model.logits(TOKENS, adapter="one"))
        model.logits(TOKENS, adapter="two")  # there is room for one
        assert {info.name: info.resident for info in model.adapters()} == {"one": False, "two": True}
        np.testing.assert_array_equal(bits(model.logits(TOKENS, adapter="one")), answer)
        model.logits(TOKENS, adapter="two")
        rewrite(file, lambda _, tensors: tensors["layers.0.attention.q.shira_weight"].__setitem__(0, 9.0))
        with pytest.raises(CorruptError, match="checksum of its numbers differs"):
            model.logits(TOKENS, adapter="one")
        file.unlink()
        with pytest.raises(NotFoundError, match="no such file"):
            model.logits(TOKENS, adapter="one")


def test_an_adapter_is_unloaded_while_it_is_in_use(tiny_bundle: Path, file: Path) -> None:
    """What runs with it runs on, to the same end; then its memory is free."""
    with edgert.load(tiny_bundle, memory="64MiB", threads=1) as model:
        used = model.stats()["used_bytes"]
        model.load_adapter(file, "one")
        options: dict[str, Any] = {"adapter": "one", "max_tokens": 12, "temperature": 0, "ignore_eos": True}
        expected = model.generate(TOKENS, **options).tokens
        stream = model.stream(TOKENS, **options)
        next(stream)
        model.unload_adapter("one")
        with pytest.raises(NotFoundError):
            model.generate(TOKENS, **options)
        for _ in stream:
            pass
        assert stream.result.tokens == expected
        del stream
        model.load_adapter(file, "one")
        model.unload_adapter("one")
        assert model.stats()["used_bytes"] == used


def test_a_place_that_cannot_be_written(tiny_bundle: Path, tmp_path: Path) -> None:
    from edgert.bundle import Bundle
    from edgert.converters.adapter_file import write_adapter

    with pytest.raises(StorageError, match="cannot be written"):
        write_adapter(tmp_path / "gone" / "a.adapter", "LORA", [], Bundle.open(tiny_bundle).manifest)


# --- how long it takes --------------------------------------------------------------------------------


def test_patterns_by_the_thousand(
    loaded: tuple[Any, np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names are looked up, the first of those that match counts, and expressions are compared so often only."""
    from edgert.converters import peft_reader
    from edgert.converters.peft import read_peft

    made = lora()
    names = {f"model.layers.{i}.self_attn.q_proj": 1 for i in range(3, 15_000)}
    made.config["alpha_pattern"] = {
        **names,
        "layers.0.self_attn.(q|k)_proj": 2,
        "q_proj": 8,
        "layers.1.self_attn.q_proj": 4,
    }
    scales = {delta.module: delta.scale for delta in read_peft(made.write(tmp_path / "names")).deltas}
    assert [scales[f"model.layers.{i}.self_attn.q_proj"] for i in range(3)] == [2 / 2, 8 / 2, 8 / 2]

    monkeypatch.setattr(peft_reader, "_MAX_MATCHES", 1000)
    made.config["alpha_pattern"] = {f"(a|b)*c{i}": 1 for i in range(200)}
    message = refused(loaded, made.write(tmp_path / "expressions"), UnsupportedError)
    assert "alpha_pattern: 200 regular expressions for this many modules" in message

    made = lora()
    made.config["modules_to_save"] = [f"m{i}" for i in range(300)]
    assert "300 names; at most 256" in refused(loaded, made.write(tmp_path / "saved"), CorruptError)


# --- in the Hugging Face cache ------------------------------------------------------------------------


def test_a_snapshot_of_the_cache_links_to_its_blobs_and_nowhere_else(
    loaded: tuple[Any, np.ndarray], tmp_path: Path
) -> None:
    model, plain = loaded
    snapshot, blobs = tmp_path / "models--a" / "snapshots" / "main", tmp_path / "models--a" / "blobs"
    lora().write(snapshot)
    blobs.mkdir()
    for number, file in enumerate(sorted(snapshot.iterdir())):
        file.rename(blobs / str(number))
        file.symlink_to(f"../../blobs/{number}")
    model.load_adapter(snapshot, "cached")
    assert not np.array_equal(bits(model.logits(TOKENS, adapter="cached")), plain)
    model.unload_adapter("cached")

    weights = snapshot / "adapter_model.safetensors"
    elsewhere = weights.resolve().rename(tmp_path / "elsewhere")
    weights.unlink()
    weights.symlink_to(elsewhere)
    assert "adapter_model.safetensors: is a symbolic link to" in refused(loaded, snapshot, CorruptError)
