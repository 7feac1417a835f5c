"""What a bad checkpoint gets: the contract, and one case a row.

Contract: a typed error that names the file, field or tensor; nothing executed; nothing written, an existing
bundle untouched; at most 64 MiB of extra memory.
"""

from __future__ import annotations

import json
import os
import shutil
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import contents, convert
from checkpoints import TINY_CONFIG, encode, qwen3_moe_shapes, random_weights, tiny_checkpoint, write_weights

import edgert
from edgert.converters.convert import convert as convert_checkpoint
from edgert.errors import CorruptError, EdgertError, NotFoundError, UnsupportedError

MIB = 1 << 20
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
EXPERT = "model.layers.1.mlp.experts.5.up_proj.weight"
Damage = Callable[[Path], Any]


@dataclass
class Row:
    """`damage(directory)` breaks a sound checkpoint of one file; `names` is what the message must name."""

    name: str
    damage: Damage
    names: str
    error: type[EdgertError] = CorruptError


def put(value: Any, key: str, file: str = "config.json") -> Damage:
    """Sets one value of a JSON file."""

    def damage(directory: Path) -> None:
        content = json.loads((directory / file).read_text())
        (directory / file).write_text(json.dumps(content | {key: value}))

    return damage


def edit(file: str, change: Callable[[Any], Any]) -> Damage:
    """Changes a JSON file in place."""

    def damage(directory: Path) -> None:
        content = json.loads((directory / file).read_text())
        change(content)
        (directory / file).write_text(json.dumps(content))

    return damage


def text(file: str, content: str | bytes) -> Damage:
    return lambda directory: (directory / file).write_bytes(
        content if isinstance(content, bytes) else content.encode()
    )


def remove(file: str) -> Damage:
    return lambda directory: (directory / file).unlink()


def replace(file: str, make: Callable[[Path], Any]) -> Damage:
    """Something else in the place of a file."""

    def damage(directory: Path) -> None:
        (directory / file).unlink()
        make(directory / file)

    return damage


def header(change: Callable[[dict[str, Any]], Any]) -> Damage:
    """Changes the header of the weights, whose data stays."""

    def damage(directory: Path) -> None:
        content = (directory / WEIGHTS).read_bytes()
        end = 8 + int.from_bytes(content[:8], "little")
        table = json.loads(content[8:end])
        change(table)
        changed = json.dumps(table).encode()
        (directory / WEIGHTS).write_bytes(len(changed).to_bytes(8, "little") + changed + content[end:])

    return damage


def tensors(change: Callable[[dict[str, np.ndarray]], Any], *, shards: int = 1) -> Damage:
    """Writes the weights again, changed."""

    def damage(directory: Path) -> None:
        weights = random_weights(qwen3_moe_shapes(TINY_CONFIG), 0)
        change(weights)
        (directory / WEIGHTS).unlink()
        write_weights(directory, weights, shards=shards)

    return damage


def sharded(damage: Damage) -> Damage:
    """The same checkpoint in three shards, then damaged."""
    split = tensors(lambda weights: None, shards=3)

    def both(directory: Path) -> None:
        split(directory)
        damage(directory)

    return both


def weight_map(change: Callable[[dict[str, Any]], Any]) -> Damage:
    return sharded(edit(INDEX, lambda index: change(index["weight_map"])))


def set_weight(name: str, value: float) -> Damage:
    def change(weights: dict[str, np.ndarray]) -> None:
        weights[name][7, 3] = value

    return tensors(change)


def second_copy(directory: Path) -> None:
    """A tensor of the second shard in the first as well, which the index then names."""
    first, second = sorted(directory.glob("model-*.safetensors"))[:2]
    name = next(iter(json.loads(second.read_bytes()[8:].split(b"]}}")[0] + b"]}}")))
    content = first.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    table = json.loads(content[8:end])
    size = len(content) - end
    table[name] = {"dtype": "F32", "shape": [1], "data_offsets": [size, size + 4]}
    changed = json.dumps(table).encode()
    first.write_bytes(len(changed).to_bytes(8, "little") + changed + content[end:] + bytes(4))


def merges(change: Callable[[dict[str, Any]], Any]) -> Damage:
    return edit("tokenizer.json", lambda tokenizer: change(tokenizer["model"]))


def pre_tokenizer(pattern: str) -> Damage:
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return edit("tokenizer.json", lambda tokenizer: tokenizer.update(pre_tokenizer=split))


def last_id(tokenizer: dict[str, Any]) -> None:
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary[max(vocabulary, key=vocabulary.get)] = TINY_CONFIG["vocab_size"]


def offsets(table: dict[str, Any], begin: int, end: int) -> None:
    """Moves begin and end of the last tensor."""
    last = max((t for t in table if t != "__metadata__"), key=lambda t: table[t]["data_offsets"])
    table[last]["data_offsets"][0] += begin
    table[last]["data_offsets"][1] += end


def many_keys() -> str:
    return "{" + ",".join(f'"{number}":0' for number in (*range(200_000), 199_999)) + "}"


def twice(directory: Path) -> None:
    content = (directory / WEIGHTS).read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    doubled = content[8:end].rstrip()[:-1] + b"," + content[8:end].rstrip()[1:]
    (directory / WEIGHTS).write_bytes(len(doubled).to_bytes(8, "little") + doubled + content[end:])


def with_header(raw: bytes, length: int | None = None, file_bytes: int = 0) -> Damage:
    def damage(directory: Path) -> None:
        size = len(raw) if length is None else length
        (directory / WEIGHTS).write_bytes(size.to_bytes(8, "little") + raw)
        if file_bytes:
            os.truncate(directory / WEIGHTS, file_bytes)

    return damage


def many_small_values(directory: Path) -> None:
    """A header at the cap whose parsed form would be ten times larger."""
    with_header(b'{"a":[' + b"[]," * ((16 * MIB - 16) // 3) + b"[]]}")(directory)


def pickled(directory: Path) -> None:
    (directory / WEIGHTS).rename(directory / "pytorch_model.bin")


ROWS = [
    # the weights file
    Row("under 8 bytes", text(WEIGHTS, b"1234567"), WEIGHTS),
    Row("header length past the file", with_header(b"{}", 1000), "1000"),
    Row("header length past 2^63", with_header(b"{}", 2**63 + 1), str(2**63 + 1)),
    Row("header length past the cap", with_header(b"{}", 17 * MIB, 18 * MIB), str(16 * MIB)),
    Row("header not UTF-8", with_header(b'{"\xff":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}'), "utf-8"),
    Row("header not JSON", with_header(b"<html>404</html>"), "byte 8"),
    Row("header nested 100k deep", with_header(b'{"a":' * 100_000), "'a'"),
    Row("header of many small values", many_small_values, "'a'"),
    Row("duplicate names", twice, "appears twice"),
    Row("overlapping data", header(lambda t: offsets(t, -4, -4)), "overlaps"),
    Row("gapped data", header(lambda t: offsets(t, 4, 4)), "leaves a gap"),
    Row("begin after end", header(lambda t: t[EXPERT].update(data_offsets=[8, 4])), EXPERT),
    Row("past the end of the file", lambda d: os.truncate(d / WEIGHTS, 300_000), "past the file"),
    Row("shape product overflow", header(lambda t: t[EXPERT].update(shape=[2**62, 8])), EXPERT),
    Row("bytes not shape x dtype", header(lambda t: t[EXPERT].update(shape=[41, 72])), EXPERT),
    Row("negative integer", header(lambda t: t[EXPERT].update(shape=[-40, -72])), EXPERT),
    Row("float integer", header(lambda t: t[EXPERT].update(shape=[40.0, 72])), EXPERT),
    Row("huge integer", header(lambda t: t[EXPERT].update(shape=[10**30, 72])), EXPERT),
    Row("unknown dtype", header(lambda t: t[EXPERT].update(dtype="Q4")), "'Q4'", UnsupportedError),
    Row("integer weights", header(lambda t: t[EXPERT].update(dtype="I32")), EXPERT, UnsupportedError),
    Row("git-LFS pointer", text(WEIGHTS, "version https://git-lfs.github.com/spec/v1\noid sha256:0"), "git lfs pull"),
    Row("symlink out of the checkpoint", replace(WEIGHTS, lambda p: p.symlink_to("/etc/passwd")), "/etc/passwd"),
    Row("symlink to a device", replace(WEIGHTS, lambda p: p.symlink_to("/dev/zero")), "/dev/zero"),
    Row("symlink to itself", replace(WEIGHTS, lambda p: p.symlink_to(p.name)), WEIGHTS),
    Row("FIFO", replace(WEIGHTS, os.mkfifo), "a FIFO"),
    Row("FIFO for a config", replace("config.json", os.mkfifo), "a FIFO"),
    Row("symlink for a tokenizer", replace("tokenizer.json", lambda p: p.symlink_to("/etc/passwd")), "tokenizer.json"),
    Row("no weights", remove(WEIGHTS), WEIGHTS, NotFoundError),
    Row("pickle only", pickled, "pytorch_model.bin", UnsupportedError),
    # the index
    Row("missing shard", sharded(lambda d: sorted(d.glob("model-*"))[1].unlink()), "-00002-of-", NotFoundError),
    Row("index naming another shard", weight_map(lambda m: m.update({EXPERT: "model-00009-of-00009.safetensors"})),
        "model-00009-of-00009", NotFoundError),
    Row("tensor in the wrong shard", weight_map(lambda m: m.update({EXPERT: next(f for f in m.values() if f != m[EXPERT])})),
        EXPERT),
    Row("tensor that no shard has", weight_map(lambda m: m.update(ghost=m[EXPERT])), "ghost"),
    Row("tensor that the index lacks", weight_map(lambda m: m.pop(EXPERT)), EXPERT),
    Row("tensor in two shards", sharded(second_copy), "model-0000"),
    Row("path upwards", weight_map(lambda m: m.update({EXPERT: "../model.safetensors"})), "../model.safetensors"),
    Row("absolute path", weight_map(lambda m: m.update({EXPERT: "/etc/x.safetensors"})), "/etc/x.safetensors"),
    Row("path with NUL", weight_map(lambda m: m.update({EXPERT: "x\0.safetensors"})), EXPERT),
    Row("shard that is no name", weight_map(lambda m: m.update({EXPERT: 7})), EXPERT),
    Row("index without a map", sharded(put([], "weight_map", INDEX)), "weight_map"),
    Row("index nested deep", sharded(text(INDEX, '{"weight_map":' * 100_000)), INDEX),
    # the tensors
    Row("missing expert", tensors(lambda w: w.pop(EXPERT)), EXPERT),
    Row("mis-shaped expert", tensors(lambda w: w.update({EXPERT: w[EXPERT][:39]})), EXPERT),
    Row("transposed expert", tensors(lambda w: w.update({EXPERT: w[EXPERT].T.copy()})), EXPERT),
    Row("tensor too many", tensors(lambda w: w.update({"model.layers.0.self_attn.q_proj.bias": np.zeros(64, "f4")})),
        "q_proj.bias", UnsupportedError),
    Row("layer too many", tensors(lambda w: w.update({"model.layers.3.input_layernorm.weight": np.ones(72, "f4")})),
        "model.layers.3", UnsupportedError),
    Row("NaN", set_weight(EXPERT, np.nan), f"{EXPERT!r}: element {7 * 72 + 3} (row 7, column 3)"),
    Row("infinity", set_weight("model.embed_tokens.weight", np.inf), "row 7, column 3"),
    Row("NaN in the router", set_weight("model.layers.2.mlp.gate.weight", -np.inf), "model.layers.2.mlp.gate"),
    # config.json
    Row("no config", remove("config.json"), "config.json", NotFoundError),
    Row("config not JSON", text("config.json", "{"), "config.json"),
    Row("config not UTF-8", text("config.json", b'{"model_type": "\xff"}'), "not UTF-8"),
    Row("config a list", text("config.json", "[]"), "an object"),
    Row("config nested 30k deep", text("config.json", '{"a":' * 30_000), "deeper than 64"),
    Row("config nested 100k deep", text("config.json", '{"a":' * 100_000), "at most 65536"),
    Row("config with a key twice", text("config.json", '{"model_type":"llama","model_type":"qwen3_moe"}'), "model_type"),
    Row("tokenizer with a key twice, the last of 200k", text("tokenizer.json", many_keys()), "'199999' appears twice"),
    Row("config with NaN", text("config.json", '{"rms_norm_eps":NaN}'), "NaN"),
    Row("config with a long integer", text("config.json", '{"a":' + "9" * 5000 + "}"), "config.json"),
    Row("config too large", text("config.json", b'{"a":"' + b"x" * MIB + b'"}'), "1048576"),
    Row("top-k above the number of experts", put(9, "num_experts_per_tok"), "num_experts_per_tok: 9"),
    Row("0 experts", put(0, "num_experts"), "num_experts: 0"),
    Row("10^9 layers", put(10**9, "num_hidden_layers"), "num_hidden_layers: 1000000000"),
    Row("10^9 experts", put(10**9, "num_experts"), "num_experts: 1000000000"),
    Row("a layer too many", put(4, "num_hidden_layers"), "model.layers.3."),
    Row("an expert too few", put(7, "num_experts"), "mlp.gate.weight"),
    Row("negative size", put(-72, "hidden_size"), "hidden_size: -72"),
    Row("float size", put(72.0, "hidden_size"), "hidden_size: 72.0"),
    Row("wide heads in many layers", edit("config.json", lambda c: c.update(head_dim=1 << 14, num_hidden_layers=1024)),
        "self_attn.q_proj.weight"),
    Row("a head too wide", put(1 << 20, "head_dim"), "head_dim: 1048576"),
    Row("true for a number", put(True, "num_attention_heads"), "num_attention_heads: True"),
    Row("heads that do not divide", put(3, "num_key_value_heads"), "num_key_value_heads"),
    Row("missing key", edit("config.json", lambda c: c.pop("rms_norm_eps")), "rms_norm_eps: missing"),
    Row("key that is not understood", put(30.0, "logit_softcapping"), "logit_softcapping", UnsupportedError),
    Row("neutral key with a value", put(30.0, "final_logit_softcapping"), "final_logit_softcapping", UnsupportedError),
    Row("other activation", put("gelu", "hidden_act"), "'gelu'", UnsupportedError),
    Row("quantised checkpoint", put({"quant_method": "bitsandbytes"}, "quantization_config"), "quantization_config", UnsupportedError),
    Row("unknown rope scaling", put({"rope_type": "spiral", "factor": 2.0}, "rope_scaling"), "'spiral'", UnsupportedError),
    Row("rope scaling with another key", put({"rope_type": "linear", "factor": 2.0, "spread": 3}, "rope_scaling"), "spread",
        UnsupportedError),
    Row("rope scaling of zero", put({"rope_type": "linear", "factor": 0}, "rope_scaling"), "factor: 0"),
    Row("rope base of one", put(1.0, "rope_theta"), "rope_theta: 1.0"),
    Row("unknown model type", put("mamba", "model_type"), "'mamba' is not supported; known are ", UnsupportedError),
    Row("no model type", edit("config.json", lambda c: c.pop("model_type")), "model_type"),
    Row("code of its own", edit("config.json", lambda c: c.update(model_type="own", auto_map={"AutoModel": "evil.Model"})),
        "never run", UnsupportedError),
    # the text side
    Row("token id past the vocabulary", edit("tokenizer.json", last_id), "id 320"),
    Row("negative token id", edit("tokenizer.json", lambda t: t["model"]["vocab"].update(a=-1)), "'a' has id -1"),
    Row("added token past the vocabulary", edit("tokenizer.json", lambda t: t["added_tokens"][0].update(id=999)), "id 999"),
    Row("merge of a missing token", merges(lambda m: m["merges"].append(["zz", "qq"])), "'zz'"),
    Row("merge into a missing token", merges(lambda m: m["merges"].append(["q", "z"])), "'qz'"),
    Row("merge of three", merges(lambda m: m["merges"].append(["q", "z", "z"])), "merges"),
    Row("pathological pattern", pre_tokenizer("(a+)+b"), "tokenizer.json", UnsupportedError),
    Row("no tokenizer at all", text("tokenizer.json", "{}"), "model"),
    Row("tokenizer nested deep", text("tokenizer.json", '{"model":' * 100_000), "deeper than 64"),
    Row("tokenizer of many small values", text("tokenizer.json", "[" + "[]," * (5 << 20) + "[]]"), "values"),
    Row("eos past the vocabulary", put([2, 320], "eos_token_id", "generation_config.json"), "eos_token_id"),
    Row("chat template too large", put("x" * 300_000, "chat_template", "tokenizer_config.json"), "chat_template"),
    Row("chat template that is no text", put(5, "chat_template", "tokenizer_config.json"), "chat_template"),
    Row("chat template that is no template", put("{% if %}", "chat_template", "tokenizer_config.json"), "/checkpoint: chat template"),
    Row("chat template with an unknown filter", put("{{ 1|nosuch }}", "chat_template", "tokenizer_config.json"), "'nosuch'",
        UnsupportedError),
]  # fmt: skip


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound checkpoint and the bundle made of it."""
    directory = tmp_path_factory.mktemp("sound")
    convert(tiny_checkpoint(directory / "checkpoint"), directory / "model.edgert")
    return directory


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_hostile_checkpoint(row: Row, sound: Path, tmp_path: Path) -> None:
    source, place = tmp_path / "checkpoint", tmp_path / "place"
    shutil.copytree(sound / "checkpoint", source)
    shutil.copytree(sound / "model.edgert", place / "model.edgert")
    row.damage(source)
    before = contents(place)
    tracemalloc.start()
    try:
        with pytest.raises(row.error) as raised:
            convert(source, place / "model.edgert")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert type(raised.value) is row.error
    assert row.names in str(raised.value)
    assert peak <= 64 * MIB
    assert contents(place) == before and os.listdir(place) == ["model.edgert"]


def test_auto_map_beside_a_known_type_is_noted_and_never_run(sound: Path, tmp_path: Path) -> None:
    source = tmp_path / "checkpoint"
    shutil.copytree(sound / "checkpoint", source)
    put({"AutoModelForCausalLM": "modeling.Model"}, "auto_map")(source)
    (source / "modeling.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    report = convert_checkpoint(source, tmp_path / "model.edgert")
    assert any("auto_map" in note for note in report.notes)
    assert not (tmp_path / "ran").exists()


def test_an_eos_past_the_vocabulary_that_is_only_a_default_of_the_class_is_left_out(
    sound: Path, tmp_path: Path
) -> None:
    """transformers saves such a file with every small olmoe model of which nobody said otherwise."""
    source = tmp_path / "checkpoint"
    shutil.copytree(sound / "checkpoint", source)
    text("generation_config.json", '{"_from_model_config": true, "eos_token_id": 50279}')(source)
    report = convert_checkpoint(source, tmp_path / "model.edgert")
    assert any("50279; ids from 0 to 319 are allowed; left out" in note for note in report.notes)


def test_absurd_sampling_defaults_are_left_out(sound: Path, tmp_path: Path) -> None:
    source = tmp_path / "checkpoint"
    shutil.copytree(sound / "checkpoint", source)
    (source / "generation_config.json").write_text('{"do_sample": true, "top_k": -1, "top_p": 0.5}')
    report = convert_checkpoint(source, tmp_path / "model.edgert")
    assert any("generation_config.json: top_k: found -1" in note for note in report.notes)
    with edgert.load(tmp_path / "model.edgert") as model:
        assert model.sampling_defaults == {"temperature": 1.0, "top_p": 0.5}


def hub_cache(sound: Path, root: Path, target: str) -> Path:
    """The layout of the Hugging Face cache: files of a snapshot are links to blobs."""
    repository = root / "models--some--model"
    snapshot = repository / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for file in (sound / "checkpoint").iterdir():
        place = repository / "blobs" / file.name[::-1] if target == "blobs" else root / "outside"
        shutil.copy(file, place)
        (snapshot / file.name).symlink_to(os.path.relpath(place, snapshot))
    return snapshot


def test_links_within_the_hub_cache_are_followed(sound: Path, tmp_path: Path) -> None:
    convert(hub_cache(sound, tmp_path, "blobs"), tmp_path / "model.edgert")
    assert contents(tmp_path / "model.edgert") == contents(sound / "model.edgert")


def test_links_out_of_the_hub_cache_are_refused(sound: Path, tmp_path: Path) -> None:
    with pytest.raises(CorruptError, match="outside the checkpoint"):
        convert(hub_cache(sound, tmp_path, "outside"), tmp_path / "model.edgert")


def test_links_within_the_checkpoint_are_followed(sound: Path, tmp_path: Path) -> None:
    source = tmp_path / "checkpoint"
    shutil.copytree(sound / "checkpoint", source)
    (source / WEIGHTS).rename(source / "weights.bin")
    (source / WEIGHTS).symlink_to("weights.bin")
    convert(source, tmp_path / "model.edgert")
    assert contents(tmp_path / "model.edgert") == contents(sound / "model.edgert")


def test_a_file_in_place_of_a_directory(tmp_path: Path) -> None:
    (tmp_path / "x.pth").write_bytes(b"PK")
    with pytest.raises(NotFoundError, match="no such directory"):
        convert(tmp_path / "x.pth", tmp_path / "model.edgert")
    with pytest.raises(NotFoundError, match="nowhere"):
        convert(tmp_path / "nowhere", tmp_path / "model.edgert")


def test_weights_beyond_the_range_of_the_format(sound: Path, tmp_path: Path) -> None:
    """A finite weight that the format cannot hold is refused with its tensor, not made infinite."""
    source = tmp_path / "checkpoint"
    shutil.copytree(sound / "checkpoint", source)
    set_weight(EXPERT, 1e6)(source)
    with pytest.raises(CorruptError, match=EXPERT):
        convert(source, tmp_path / "model.edgert", expert_format="f16")
    assert encode(np.array([1e6], np.float32), "F32") in (source / WEIGHTS).read_bytes()
    convert(source, tmp_path / "model.edgert", expert_format="bf16")
