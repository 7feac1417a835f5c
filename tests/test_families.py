"""What each family makes of its configuration: the recipe, the tensors it asks for, and what it refuses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from families import Requests, describe, ffns, mixers

from edgert.converters.registry import FAMILIES
from edgert.errors import CorruptError, EdgertError, UnsupportedError


@pytest.mark.parametrize("family", FAMILIES)
def test_the_engine_takes_every_recipe(family: str) -> None:
    import json

    from edgert import _native

    _native.check_recipe(json.dumps(describe(family).recipe))


def test_frame() -> None:
    recipe = describe("llama", rms_norm_eps=1e-5).recipe
    assert (recipe["vocab_size"], recipe["hidden_size"], recipe["context_length"]) == (320, 64, 512)
    assert recipe["final_norm_eps"] == 1e-5 and recipe["blocks"][0]["norm_eps"] == 1e-5
    assert recipe["layers"] == [0, 0, 0, 0] and len(recipe["blocks"]) == 1
    assert recipe["output"] == {"tied": False, "scale": 1.0}


def test_llama_attention() -> None:
    mixer = mixers(describe("llama"))[0]
    assert (mixer["num_heads"], mixer["num_kv_heads"], mixer["head_dim"], mixer["scale"]) == (4, 2, 16, 0.25)
    assert not mixer["qkv_bias"] and not mixer["output_bias"] and mixer["qk_norm"] is None


def test_head_dim_apart() -> None:
    tensors = Requests()
    assert mixers(describe("llama", tensors, head_dim=32))[0]["head_dim"] == 32
    assert tensors.shapes["model.layers.0.self_attn.q_proj.weight"] == (128, 64)
    assert tensors.shapes["model.layers.0.self_attn.o_proj.weight"] == (64, 128)
    assert mixers(describe("qwen3", head_dim=None))[0]["head_dim"] == 128  # the family's default


def test_kv_heads_default_to_heads() -> None:
    assert mixers(describe("olmoe", num_key_value_heads=None))[0]["num_kv_heads"] == 4


@pytest.mark.parametrize("family", ["llama", "qwen3", "qwen3_moe", "olmoe"])
def test_attention_bias(family: str) -> None:
    tensors = Requests()
    mixer = mixers(describe(family, tensors, attention_bias=True))[0]
    assert mixer["qkv_bias"] and mixer["output_bias"]
    assert "model.layers.3.self_attn.o_proj.bias" in tensors.shapes


def test_qwen2_moe_has_biases_on_q_k_and_v_only() -> None:
    mixer = mixers(describe("qwen2_moe"))[0]
    assert mixer["qkv_bias"] and not mixer["output_bias"]
    assert not mixers(describe("qwen2_moe", qkv_bias=False))[0]["qkv_bias"]


def test_qk_norm() -> None:
    heads, rows = Requests(), Requests()
    assert mixers(describe("qwen3_moe", heads))[0]["qk_norm"] == "head"
    assert heads.shapes["model.layers.0.self_attn.q_norm.weight"] == (32,)
    assert mixers(describe("olmoe", rows))[0]["qk_norm"] == "row"
    assert rows.shapes["model.layers.0.self_attn.q_norm.weight"] == (64,)
    assert rows.shapes["model.layers.0.self_attn.k_norm.weight"] == (32,)


def test_clip_qkv() -> None:
    assert mixers(describe("olmoe", clip_qkv=8.0))[0]["clip_qkv"] == 8.0
    assert mixers(describe("olmoe", clip_qkv=None))[0]["clip_qkv"] is None


@pytest.mark.parametrize(
    ("family", "normalize"), [("qwen3_moe", False), ("qwen2_moe", False), ("olmoe", False), ("mixtral", True)]
)
def test_gates_by_default(family: str, normalize: bool) -> None:
    router = ffns(describe(family))[0]["router"]
    assert router == {"scoring": "softmax", "normalize": normalize, "scale": 1.0}


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen2_moe", "olmoe"])
def test_norm_topk_prob(family: str) -> None:
    assert ffns(describe(family, norm_topk_prob=True))[0]["router"]["normalize"]


def test_shared_expert() -> None:
    tensors = Requests()
    assert ffns(describe("qwen2_moe", tensors))[0]["shared"] == {"intermediate_size": 80, "gate": "sigmoid"}
    assert tensors.shapes["model.layers.0.mlp.shared_expert.down_proj.weight"] == (64, 80)
    assert tensors.shapes["model.layers.0.mlp.shared_expert_gate.weight"] == (1, 64)
    assert ffns(describe("qwen3_moe"))[0]["shared"] is None


def test_dense_layers_between_sparse_ones() -> None:
    def kinds(**changes: Any) -> str:
        return "".join(ffn["kind"][0] for ffn in ffns(describe("qwen3_moe", **changes)))

    assert kinds() == "mmmm"
    assert kinds(decoder_sparse_step=2) == "dmdm"
    assert kinds(mlp_only_layers=[0, 3]) == "dmmd"
    assert kinds(decoder_sparse_step=2, mlp_only_layers=[1]) == "dddm"
    dense = describe("qwen3_moe", mlp_only_layers=[1])
    assert ffns(dense)[1] == {"kind": "dense", "intermediate_size": 96, "activation": "silu"}
    assert {expert.layer for expert in dense.experts} == {0, 2, 3}


def test_width_of_experts() -> None:
    assert ffns(describe("qwen3_moe"))[0]["moe_intermediate_size"] == 48
    assert ffns(describe("olmoe"))[0]["moe_intermediate_size"] == 96
    assert ffns(describe("mixtral"))[0]["moe_intermediate_size"] == 96


def test_both_names_of_the_number_of_experts() -> None:
    renamed = describe("qwen3_moe", num_experts=None, num_local_experts=8)
    assert ffns(renamed) == ffns(describe("qwen3_moe"))
    with pytest.raises(CorruptError, match="num_local_experts: 4, but num_experts is 8"):
        describe("qwen3_moe", num_local_experts=4)


def windows(family: str, **changes: Any) -> list[int | None]:
    return [mixer["window"] for mixer in mixers(describe(family, **changes))]


SLIDING: dict[str, Any] = {"use_sliding_window": True, "sliding_window": 100}


def test_windows() -> None:
    assert windows("mixtral", sliding_window=100) == [100] * 4
    assert windows("mixtral", sliding_window=None) == [None] * 4
    assert windows("qwen3_moe", **SLIDING) == [100] * 4
    assert windows("qwen3", **SLIDING, max_window_layers=1) == [None, 100, 100, 100]
    assert windows("qwen3", **SLIDING, max_window_layers=28) == [None] * 4
    assert windows("qwen2_moe", **SLIDING, max_window_layers=3) == [100, None, 100, None]
    types = ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]
    assert windows("qwen3", **SLIDING, layer_types=types) == [100, None, None, 100]
    assert windows("qwen2_moe", **SLIDING, layer_types=types) == [100, None, None, 100]


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe", "qwen2_moe"])
def test_a_window_that_is_switched_off(family: str) -> None:
    assert windows(family, use_sliding_window=False, sliding_window=4096, max_window_layers=2) == [None] * 4
    assert windows(family, use_sliding_window=False, sliding_window=0) == [None] * 4


def test_layer_types_are_checked() -> None:
    for types in (["full_attention"], ["linear_attention"] * 4, "full_attention"):
        with pytest.raises(CorruptError, match="layer_types"):
            describe("qwen3", layer_types=types)
    with pytest.raises(CorruptError, match="use_sliding_window is false"):
        describe("qwen3", sliding_window=8, layer_types=["sliding_attention"] * 4)


def test_layers_that_differ_get_blocks_of_their_own() -> None:
    decoder = describe("qwen2_moe", **SLIDING, max_window_layers=4, mlp_only_layers=[3])
    assert decoder.recipe["layers"] == [0, 1, 0, 2] and len(decoder.recipe["blocks"]) == 3


def test_tied_embeddings() -> None:
    tied = describe("llama", tie_word_embeddings=True)
    assert tied.recipe["output"]["tied"] and "output" not in [tensor.name for tensor in tied.dense]
    both = describe("llama", Requests(present=("lm_head.weight",)), tie_word_embeddings=True)
    assert [(a.name, b.name) for a, b in both.same] == [("model.embed_tokens.weight", "lm_head.weight")]
    untied = describe("llama")
    assert next(t for t in untied.dense if t.name == "output").source.tensor.name == "lm_head.weight"


def test_canonical_names() -> None:
    names = {tensor.name for tensor in describe("qwen2_moe", num_hidden_layers=1).dense}
    layer = (
        "attention_norm attention.q attention.k attention.v attention.o attention.q_bias attention.k_bias "
    )
    layer += "attention.v_bias ffn_norm router shared.gate shared.up shared.down shared.router"
    assert names == {"embedding", "output", "final_norm"} | {f"layers.0.{name}" for name in layer.split()}


def test_names_of_experts() -> None:
    expert = describe("qwen3_moe").experts[8 + 5]
    assert (expert.layer, expert.index) == (1, 5)
    assert expert.up.tensor.name == "model.layers.1.mlp.experts.5.up_proj.weight"
    expert = describe("mixtral").experts[3]
    names = [source.tensor.name.split(".")[-2] for source in (expert.gate, expert.up, expert.down)]
    assert names == ["w1", "w3", "w2"] and ".block_sparse_moe." in expert.gate.tensor.name


def test_fused_experts_are_slices() -> None:
    tensors = Requests(fused=True)
    expert = describe("qwen3_moe", tensors).experts[5]
    assert tensors.shapes["model.layers.0.mlp.experts.gate_up_proj"] == (8, 96, 64)
    assert tensors.shapes["model.layers.0.mlp.experts.down_proj"] == (8, 64, 48)
    assert (expert.gate.first_row, expert.gate.rows, expert.gate.cols) == (5 * 96, 48, 64)
    assert (expert.up.first_row, expert.up.rows) == (5 * 96 + 48, 48)
    assert (expert.down.first_row, expert.down.rows, expert.down.cols) == (5 * 64, 64, 48)
    assert expert.up.tensor.address(expert.up.first_row, 0) == f"byte {1000 + (5 * 96 + 48) * 64 * 2}"


def test_layers_for_multi_token_prediction_are_left_out() -> None:
    class With(Requests):
        def leave_out(self, prefix: str) -> int:
            return 7 if prefix == "model.layers.4." else 0

    decoder = describe("glm4_moe", With(), num_nextn_predict_layers=1)
    assert len(decoder.recipe["layers"]) == 4
    assert decoder.notes == ["7 tensors for multi-token prediction are left out"]
    assert not describe("glm4_moe", num_nextn_predict_layers=1).notes


def test_corrected_router() -> None:
    tensors = Requests()
    changes = {"routed_scaling_factor": 2.5, "norm_topk_prob": False, "n_group": 4, "topk_group": 2}
    ffn = ffns(describe("glm4_moe", tensors, **changes))[1]
    assert ffn["router"] == {
        "scoring": "sigmoid", "normalize": False, "norm_epsilon": 1e-20, "scale": 2.5, "bias": "selection",
        "groups": {"count": 4, "keep": 2, "score": "sum_of_top_2"},
    }  # fmt: skip
    assert tensors.shapes["model.layers.1.mlp.gate.e_score_correction_bias"] == (8,)
    assert ffns(describe("glm4_moe"))[0]["kind"] == "dense"
    assert "groups" not in ffns(describe("glm4_moe"))[1]["router"]  # one group


def test_gpt_oss_experts_lie_by_turns_and_transposed() -> None:
    class Plain(Requests):
        def is_plain(self, name: str) -> bool:
            return True

    plain, quantised = Plain(fused=True), Requests(fused=True)
    expert = describe("gpt_oss", plain).experts[8 + 3]
    assert plain.shapes["model.layers.1.mlp.experts.gate_up_proj"] == (8, 64, 192)
    assert plain.shapes["model.layers.1.mlp.experts.down_proj"] == (8, 96, 64)
    assert expert.gate.tensor.shape == (8, 192, 64) and expert.down.tensor.shape == (8, 64, 96)
    describe("gpt_oss", quantised)
    assert quantised.shapes["model.layers.1.mlp.experts.gate_up_proj"] == (8, 192, 64)
    rows = [(source.first_row, source.rows, source.step) for source in (*expert.sources, *expert.biases)]
    assert rows == [(576, 96, 2), (577, 96, 2), (192, 64, 1)] * 2


def test_granite_scales() -> None:
    scales: dict[str, Any] = {
        "embedding_multiplier": 12,
        "logits_scaling": 8.0,
        "residual_multiplier": 0.25,
        "attention_multiplier": 0.5,
    }
    recipe = describe("granitemoe", **scales).recipe
    assert (recipe["embedding"]["scale"], recipe["output"]["scale"]) == (12, 0.125)
    assert (recipe["blocks"][0]["residual_scale"], recipe["blocks"][0]["mixer"]["scale"]) == (0.25, 0.5)


def test_ministral3_queries_grow_with_the_position() -> None:
    (mixer, *_) = mixers(describe("ministral3"))
    assert mixer["temperature"] == {"floor": 128, "scale": 0.1, "offset": 0}
    assert mixer["rope"]["attention_factor"] == 1.0 and mixer["head_dim"] == 128


def test_gemma4_layers() -> None:
    tensors = Requests()
    decoder = describe("gemma4_text", tensors)
    sliding, full = mixers(decoder)[0], mixers(decoder)[3]
    assert (sliding["head_dim"], sliding["num_kv_heads"], sliding["window"]) == (16, 2, 64)
    assert (full["head_dim"], full["num_kv_heads"], full["window"]) == (32, 1, None)
    assert full["values_are_keys"] and "values_are_keys" not in sliding
    assert np.count_nonzero(full["rope"]["inv_freq"]) == 4 and len(full["rope"]["inv_freq"]) == 16
    assert "model.layers.3.self_attn.v_proj.weight" not in tensors.shapes
    assert tensors.shapes["model.layers.0.router.scale"] == (64,)
    assert decoder.recipe["embedding"]["scale"] == 8.0


def test_llama4_layers() -> None:
    decoder = describe(
        "llama4_text", interleave_moe_layer_step=2, attention_chunk_size=64, floor_scale=32, attn_scale=0.2
    )
    attends = mixers(decoder)
    assert [m.get("chunk") for m in attends] == [64, 64, 64, None]
    assert [m["rope"] is None for m in attends] == [False, False, False, True]
    assert [m["qk_norm"] for m in attends] == ["unit", "unit", "unit", None]
    assert [m.get("temperature") for m in attends] == [None, None, None, {"floor": 32, "scale": 0.2}]
    assert [(ffn["kind"], ffn.get("intermediate_size")) for ffn in ffns(decoder)][:1] == [("dense", 128)]
    assert [ffn["kind"] for ffn in ffns(decoder)] == ["dense", "moe", "dense", "moe"]
    assert ffns(decoder)[1]["shared"] == {"intermediate_size": 96, "gate": None}
    older = describe("llama4_text", attn_temperature_tuning=0, no_rope_layers=[1, 0, 1, 0], moe_layers=[0])
    assert [m["rope"] is None for m in mixers(older)] == [False, True, False, True]
    assert not any("temperature" in m for m in mixers(older))
    assert [ffn["kind"] for ffn in ffns(older)] == ["moe", "dense", "dense", "dense"]


def test_llama4_with_images_is_its_text() -> None:
    assert describe("llama4").recipe | {"architecture": "llama4_text"} == describe("llama4_text").recipe | {
        "architecture": "llama4_text"
    }


REFUSED: list[tuple[str, dict[str, Any], type[EdgertError], str]] = [
    ("llama", {"mlp_bias": True}, UnsupportedError, "mlp_bias"),
    ("llama", {"sliding_window": 100}, UnsupportedError, "sliding_window"),
    ("llama", {"partial_rotary_factor": 0.5}, UnsupportedError, "partial_rotary_factor"),
    ("llama", {"hidden_act": "relu"}, UnsupportedError, "relu"),
    ("llama", {"norm_topk_prob": True}, UnsupportedError, "norm_topk_prob"),
    ("mixtral", {"attention_bias": True}, UnsupportedError, "attention_bias"),
    ("olmoe", {"sliding_window": 100}, UnsupportedError, "sliding_window"),
    ("olmoe", {"shared_expert_intermediate_size": 100}, UnsupportedError, "shared_expert_intermediate_size"),
    ("qwen3_moe", {"routed_scaling_factor": 2.5}, UnsupportedError, "routed_scaling_factor"),
    ("qwen3_moe", {"decoder_sparse_step": 0}, CorruptError, "decoder_sparse_step"),
    ("qwen3_moe", {"mlp_only_layers": [-1]}, CorruptError, "mlp_only_layers"),
    ("qwen3_moe", {"num_experts_per_tok": 9}, CorruptError, "num_experts_per_tok"),
    ("qwen3_moe", {"norm_topk_prob": 1}, CorruptError, "norm_topk_prob"),
    ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 0}, CorruptError, "sliding_window"),
    ("qwen2_moe", {"shared_expert_intermediate_size": 0}, CorruptError, "shared_expert_intermediate_size"),
    ("qwen3", {"head_dim": 33}, CorruptError, "head_dim"),
    ("qwen3_moe", {"use_qk_norm": False}, CorruptError, "use_qk_norm"),
    ("olmoe", {"use_qk_norm": True}, UnsupportedError, "use_qk_norm"),
    ("llama", {"use_mrope": True}, UnsupportedError, "use_mrope"),
    ("gpt_oss", {"experts_per_token": 3}, CorruptError, "experts_per_token"),
    ("gpt_oss", {"swiglu_limit": 0}, CorruptError, "swiglu_limit"),
    ("glm4_moe", {"n_group": 3}, CorruptError, "n_group"),
    ("glm4_moe", {"partial_rotary_factor": 0.2}, CorruptError, "partial_rotary_factor"),
    ("glm4_moe", {"scoring_func": "softmax"}, UnsupportedError, "scoring_func"),
    ("ernie4_5", {"use_bias": True}, UnsupportedError, "use_bias"),
    ("ernie4_5_moe", {"moe_gate": "hash"}, UnsupportedError, "moe_gate"),
    ("ernie4_5_moe", {"use_rmsnorm": False}, UnsupportedError, "use_rmsnorm"),
    ("granitemoe", {"logits_scaling": 0}, CorruptError, "logits_scaling"),
    ("granitemoe", {"position_embedding_type": "nope"}, UnsupportedError, "position_embedding_type"),
    ("phimoe", {"num_experts_per_tok": 3}, UnsupportedError, "num_experts_per_tok"),
    ("llama4_text", {"layer_types": ["sliding_attention"] * 4}, CorruptError, "layer_types"),
    ("gemma4_text", {"hidden_size_per_layer_input": 8}, UnsupportedError, "hidden_size_per_layer_input"),
    ("gemma4_text", {"num_kv_shared_layers": 2}, UnsupportedError, "num_kv_shared_layers"),
    ("gemma4_text", {"use_bidirectional_attention": "all"}, UnsupportedError, "use_bidirectional_attention"),
    ("gemma4_text", {"per_layer_config": {"1": {"head_dim": 8}}}, UnsupportedError, "per_layer_config"),
    ("llama4_text", {"no_rope_layers": [1]}, CorruptError, "no_rope_layers"),
    ("llama4", {"tie_word_embeddings": True}, CorruptError, "tie_word_embeddings"),
    ("llama4", {"text_config": None}, CorruptError, "text_config"),
    ("mistral", {"attention_bias": True}, UnsupportedError, "attention_bias"),
    ("granite", {"mlp_bias": True}, UnsupportedError, "mlp_bias"),
    ("mistral3", {"text_config": {"model_type": "pixtral"}}, UnsupportedError, "pixtral"),
    ("ministral3", {"sliding_window": 8}, UnsupportedError, "sliding_window"),
]  # fmt: skip


@pytest.mark.parametrize(("family", "changes", "error", "names"), REFUSED)
def test_what_changes_the_model_and_is_not_understood(
    family: str, changes: dict[str, Any], error: type[EdgertError], names: str
) -> None:
    with pytest.raises(error, match=names):
        describe(family, **changes)


@pytest.mark.parametrize("family", FAMILIES)
def test_keys_without_effect(family: str) -> None:
    without_effect: dict[str, Any] = {
        "torch_dtype": "bfloat16",
        "use_cache": False,
        "attention_dropout": 0.1,
        "architectures": ["X"],
    }
    neutral: dict[str, Any] = {"final_logit_softcapping": None, "quantization_config": None}
    if family not in ("glm4_moe", "qwen3_next", "qwen3_5_moe_text"):  # of which a part rotates otherwise
        neutral["partial_rotary_factor"] = 1.0
    assert describe(family, **without_effect, **neutral).recipe == describe(family).recipe


def test_the_keys_of_qwen3_coder() -> None:
    stated: dict[str, Any] = {"use_qk_norm": True, "qkv_bias": False, "shared_expert_intermediate_size": 0}
    assert describe("qwen3_moe", **stated).recipe == describe("qwen3_moe").recipe
