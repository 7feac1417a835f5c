"""Mixtures in which every token chooses, matrix by matrix, the adapters whose gates suit its input best (PHATGOOSE)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import bits
from peft_directories import PREFIX, Adapter, base_weights, loaded, lora, shira

import edgert
from edgert.errors import InvalidArgumentError

TOKENS = list(range(3, 43))
NAMES = ("one", "two", "three")


def gated(made: Adapter, seed: int) -> Adapter:
    """With a gate of each module that it changes."""
    rng = np.random.default_rng(seed)
    base = base_weights()
    modules = {
        name.removeprefix(PREFIX).rpartition(".lora_A")[0] for name in made.tensors if ".lora_A" in name
    }
    modules |= {
        name.removeprefix(PREFIX).rpartition(".")[0] for name in made.tensors if "shira_weight" in name
    }
    for module in sorted(modules):
        inputs = base[f"{module}.weight"].shape[1]
        gate = np.asarray(rng.standard_normal(inputs) * 3 + 1, np.float32)
        made.tensors[f"{PREFIX}{module}.gate_vector"] = gate
    return made


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("gated")
    made = (gated(lora(1), 1), gated(lora(2), 2), gated(shira(), 3))
    return {name: one.write(place / name) for name, one in zip(NAMES, made, strict=True)}


@pytest.fixture
def model(tiny_f32_bundle: Path, directories: dict[str, Path]) -> Any:
    with loaded(tiny_f32_bundle, directories) as model:
        yield model


def reference(
    made: dict[str, tuple[Adapter, float]], tokens: list[int], top_k: int, directory: Path
) -> np.ndarray:
    """Logits of transformers, with the mixture computed by hooks in PyTorch."""
    import torch
    from checkpoints import tiny_checkpoint
    from reference import Reference

    base = base_weights()
    network = Reference.load(tiny_checkpoint(directory)).model

    def share(module: str, x: Any) -> dict[str, Any]:
        there = [name for name, (one, _) in made.items() if f"{PREFIX}{module}.gate_vector" in one.tensors]

        def norm(v: Any) -> Any:
            return torch.nn.functional.layer_norm(v, v.shape[-1:])

        gates = [torch.tensor(made[name][0].tensors[f"{PREFIX}{module}.gate_vector"]) for name in there]
        scores = torch.stack([norm(x) @ norm(gate) for gate in gates], -1) / x.shape[-1] ** 0.5
        kept, which = scores.topk(min(top_k, len(there)), -1)
        shares = torch.zeros_like(scores).scatter(-1, which, kept.softmax(-1))
        return {name: shares[..., n : n + 1] for n, name in enumerate(there)}

    def added(module: str, x: Any) -> Any:
        total = 0
        for name, of_it in share(module, x).items():
            one, scale = made[name]
            delta = torch.tensor(one.weights[f"{module}.weight"] - base[f"{module}.weight"])
            total = total + of_it * scale * (x @ delta.T)
        return total

    def hook(module: str) -> Any:
        def hooked(_: Any, given: Any, out: Any) -> Any:
            return out + added(module, given[0])

        return hooked

    for layer in range(network.config.num_hidden_layers):
        for part in ("q_proj", "k_proj", "v_proj", "o_proj"):
            module = f"model.layers.{layer}.self_attn.{part}"
            network.get_submodule(module).register_forward_hook(hook(module))
    with torch.no_grad():
        logits: np.ndarray = network(torch.tensor([tokens])).logits[0].numpy()
    return logits


def of_attention(made: Adapter) -> Adapter:
    for table in (made.tensors, made.weights):
        for name in [name for name in table if ".mlp." in name]:
            del table[name]
    return made


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_logits_equal_those_of_the_mixture_in_pytorch(
    tiny_f32_bundle: Path, tmp_path: Path, top_k: int
) -> None:
    pytest.importorskip("torch")
    made = {
        "one": (of_attention(gated(lora(1), 1)), 1.0),
        "two": (of_attention(gated(lora(2), 2)), 0.5),
        "three": (of_attention(gated(shira(), 3)), 2.0),
    }
    expected = reference(made, TOKENS, top_k, tmp_path / "base")
    with edgert.load(tiny_f32_bundle, memory="64MiB", threads=1) as model:
        plain = model.logits(TOKENS)
        for name, (one, _) in made.items():
            model.load_adapter(one.write(tmp_path / name), name)
        model.set_adapter({name: scale for name, (_, scale) in made.items()}, mode="gated", top_k=top_k)
        actual = model.logits(TOKENS)
    scale = np.abs(expected).max()
    assert np.abs(actual - expected).max() < 1e-5 * scale
    assert np.abs(plain - expected).max() > 1e-2 * scale


def test_of_one_adapter_a_mixture_is_that_adapter(model: Any) -> None:
    alone = bits(model.logits(TOKENS, adapter="one"))
    model.set_adapter("one", mode="gated")
    np.testing.assert_array_equal(bits(model.logits(TOKENS)), alone)


@pytest.mark.filterwarnings("ignore:.*every token will wait")
def test_experts_in_storage_threads_and_chunks_change_no_bit(
    model: Any, tiny_f32_bundle: Path, directories: dict[str, Path]
) -> None:
    model.set_adapter(NAMES, mode="gated")
    expected = bits(model.logits(TOKENS))
    room: dict[str, Any] = {"adapter_memory": "2MiB", "chunk": 8, "threads": 2}
    with edgert.load(tiny_f32_bundle, memory="64MiB", **room) as resident:
        least = resident.minimum_bytes
    with loaded(tiny_f32_bundle, directories, memory=least, **room) as paged:
        assert not paged.resident
        paged.set_adapter(NAMES, mode="gated")
        np.testing.assert_array_equal(bits(paged.logits(TOKENS)), expected)


def test_requests_of_one_batch_get_what_they_get_alone(
    tiny_f32_bundle: Path, directories: dict[str, Path]
) -> None:
    import queue

    from edgert.engine import Engine
    from edgert.sampling import Sampling

    prompts = [TOKENS[:n] for n in (5, 9, 14, 7)]
    choices = (None, None, None, "two")  # what is on, and one beside it
    with loaded(tiny_f32_bundle, directories, context=256, parallel=4) as model:
        model.set_adapter(NAMES, mode="gated")
        alone = [
            model.generate(prompt, adapter=choice, max_tokens=6, ignore_eos=True).tokens
            for prompt, choice in zip(prompts, choices, strict=True)
        ]
        model.native.forget_prefixes()
        engine = Engine(model)
        options = Sampling(max_tokens=6, ignore_eos=True)
        pieces: list[queue.Queue[Any]] = [queue.Queue() for _ in prompts]
        jobs = [
            engine.submit(prompt, options, into.put, adapter=choice)
            for prompt, choice, into in zip(prompts, choices, pieces, strict=True)
        ]
        assert all(job.done.wait(60) for job in jobs)
        engine.close()
        found = [[piece.token for piece in into.queue if piece.token is not None] for into in pieces]
        assert found == alone


def test_how_it_runs_is_told_and_ends(model: Any, tmp_path: Path) -> None:
    model.set_adapter(NAMES, mode="gated", top_k=1)
    assert {(info.mode, info.why) for info in model.adapters()} == {("gated", "tokens choose by their gates")}
    first = bits(model.logits(TOKENS))
    model.set_adapter(NAMES, mode="gated")
    assert not np.array_equal(bits(model.logits(TOKENS)), first)  # also of what the KV cache remembers
    model.unload_adapter("three")
    assert {info.mode for info in model.adapters()} == {"gated"}
    left = bits(model.logits(TOKENS))
    model.set_adapter(NAMES[:2], mode="overlay")
    assert not np.array_equal(bits(model.logits(TOKENS)), left)


def test_a_file_keeps_the_gates(
    model: Any, tiny_f32_bundle: Path, directories: dict[str, Path], tmp_path: Path
) -> None:
    from edgert.adapter_sources import read_adapter
    from edgert.bundle import Bundle
    from edgert.converters.adapter_file import write_adapter

    manifest = Bundle.open(tiny_f32_bundle).manifest
    for name, path in directories.items():
        read = read_adapter(path, tiny_f32_bundle, manifest)
        write_adapter(tmp_path / f"{name}.adapter", read.kind, read.parts, manifest)
        model.load_adapter(tmp_path / f"{name}.adapter", f"{name} again")
    model.set_adapter(NAMES, mode="gated")
    expected = bits(model.logits(TOKENS))
    model.set_adapter([f"{name} again" for name in NAMES], mode="gated")
    np.testing.assert_array_equal(bits(model.logits(TOKENS)), expected)


def test_an_adapter_without_gates_is_refused_by_name(model: Any, tmp_path: Path) -> None:
    model.load_adapter(lora(4).write(tmp_path / "plain"))
    before = bits(model.logits(TOKENS))
    with pytest.raises(InvalidArgumentError, match="adapter plain: layers.*has no gate"):
        model.set_adapter(["one", "plain"], mode="gated")
    np.testing.assert_array_equal(bits(model.logits(TOKENS)), before)
    with pytest.raises(InvalidArgumentError, match="top_k: found 0"):
        model.set_adapter("one", mode="gated", top_k=0)


def test_a_gate_that_belongs_to_nothing_is_refused(model: Any, tmp_path: Path) -> None:
    made = gated(lora(1), 1)
    made.tensors[f"{PREFIX}model.layers.0.mlp.gate.gate_vector"] = np.ones(72, np.float32)
    with pytest.raises(edgert.errors.UnsupportedError, match="gate_vector.*has no place"):
        model.load_adapter(made.write(tmp_path / "stray"))
    made = gated(lora(1), 1)
    made.tensors[f"{PREFIX}model.layers.0.self_attn.q_proj.gate_vector"] = np.ones(70, np.float32)
    with pytest.raises(InvalidArgumentError, match="gate is of 70 numbers, the base's matrix is"):
        model.load_adapter(made.write(tmp_path / "short"))
