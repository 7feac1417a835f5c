"""edgert.load and what it returns, on a small model made on the fly."""

import math
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import edit_manifest

import edgert
from edgert import _native
from edgert.benchmark import benchmark
from edgert.errors import (
    BudgetError,
    CorruptError,
    InvalidArgumentError,
    NotFoundError,
    UnsupportedError,
)
from edgert.evaluate import encode_text, evaluate

PROMPT = "The module reads the file"
STATISTICS = {
    "prompt_tokens",
    "generated_tokens",
    "prefill_tokens_per_s",
    "decode_tokens_per_s",
    "budget_bytes",
    "peak_bytes",
    "expert_hits",
    "expert_misses",
    "bytes_read",
    "stall_s",
}


@pytest.fixture(autouse=True)
def no_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("EDGERT_CONFIG", raising=False)


@pytest.fixture(scope="module")
def model(tiny_bundle: Path) -> Iterator[edgert.Model]:
    with edgert.load(tiny_bundle, memory="64MiB", threads=1, parallel=4) as loaded:
        yield loaded


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = "import edgert, sys; print({'numpy', 'tokenizers', 'jinja2', 'edgert._native'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"


# --- generation -------------------------------------------------------------------------------------


def test_generate_returns_text_tokens_and_statistics(model: edgert.Model) -> None:
    result = model.generate(PROMPT, max_tokens=20, ignore_eos=True)
    assert len(result.tokens) == 20
    assert result.finish_reason == "length"
    assert result.logprobs is None
    assert result.statistics.keys() >= STATISTICS
    assert result.statistics["prompt_tokens"] == len(model.tokenizer.encode(PROMPT))
    assert result.statistics["generated_tokens"] == 20
    assert 0 < result.statistics["peak_bytes"] <= result.statistics["budget_bytes"]
    assert result.statistics["prefill_tokens_per_s"] > 0 and result.statistics["decode_tokens_per_s"] > 0


def test_bytes_read_add_up_over_generations_and_loading(tiny_bundle: Path) -> None:
    with edgert.load(tiny_bundle, memory="64MiB", threads=1) as model:
        loading = model.stats()["bytes_read"]
        assert loading >= (tiny_bundle / "dense.bin").stat().st_size
        first = model.generate(PROMPT, max_tokens=8).statistics["bytes_read"]
        second = model.generate(PROMPT, max_tokens=8).statistics["bytes_read"]
        assert first >= loading
        assert first + second == model.stats()["bytes_read"]


def test_pieces_are_the_text_token_by_token(model: edgert.Model) -> None:
    whole = model.generate(PROMPT, max_tokens=20, ignore_eos=True)
    stream = model.stream(PROMPT, max_tokens=20, ignore_eos=True)
    pieces = list(stream)
    assert [piece.token for piece in pieces] == whole.tokens
    assert "".join(piece.text for piece in pieces) == whole.text == stream.result.text
    assert [piece.finish_reason for piece in pieces] == [None] * 19 + ["length"]


def test_runs_repeat_and_seeds_differ(model: edgert.Model) -> None:
    def tokens(**options: Any) -> list[int]:
        return model.generate(PROMPT, max_tokens=24, ignore_eos=True, temperature=1.0, **options).tokens

    assert tokens() == tokens(seed=0)
    assert tokens(seed=1) == tokens(seed=1)
    assert tokens(seed=1) != tokens(seed=2)


def test_text_and_token_ids_are_the_same_prompt(model: edgert.Model) -> None:
    ids = model.tokenizer.encode(PROMPT)
    assert model.generate(ids, max_tokens=8).tokens == model.generate(PROMPT, max_tokens=8).tokens
    assert model.generate(np.array(ids), max_tokens=8).tokens == model.generate(ids, max_tokens=8).tokens  # type: ignore[arg-type]


def test_the_end_of_sequence_token_stops_and_has_no_text(model: edgert.Model) -> None:
    (end,) = model.eos_token_ids
    result = model.generate(PROMPT, logit_bias={end: 1e4})
    assert (result.tokens, result.text, result.finish_reason) == ([end], "", "stop")
    assert model.generate(PROMPT, logit_bias={end: 1e4}, ignore_eos=True, max_tokens=3).tokens == [end] * 3


def test_a_stop_string_is_cut_off_wherever_tokens_end(model: edgert.Model) -> None:
    whole = model.generate(PROMPT, max_tokens=40, ignore_eos=True).text
    for start in range(3, 12):
        stop = whole[start : start + 3]
        result = model.generate(PROMPT, max_tokens=40, ignore_eos=True, stop=["never said", stop])
        assert result.text == whole[: whole.find(stop)]
        assert result.finish_reason == "stop"


def test_the_end_of_the_context_is_a_length(model: edgert.Model) -> None:
    prompt = [5] * (model.context - 3)
    result = model.generate(prompt, ignore_eos=True)
    assert (len(result.tokens), result.finish_reason) == (3, "length")


def test_logprobs_are_of_the_plain_distribution(model: edgert.Model) -> None:
    result = model.generate(PROMPT, max_tokens=4, ignore_eos=True, logprobs=3, temperature=0.5)
    logits = model.logits(model.tokenizer.encode(PROMPT) + result.tokens[:-1]).astype(np.float64)[-4:]
    expected = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    assert result.logprobs is not None
    for (own, best), token, row in zip(result.logprobs, result.tokens, expected, strict=True):
        assert own == pytest.approx(row[token], abs=1e-4)
        assert [candidate for candidate, _ in best] == list(np.argsort(-row, kind="stable")[:3])


def test_chat_applies_the_template(model: edgert.Model) -> None:
    messages = [{"role": "user", "content": "Hello"}]
    prompt = model.tokenizer.apply_chat_template(messages)
    assert prompt == "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    ids = model.tokenizer.encode(prompt)
    answer = model.chat("Hello", max_tokens=8)
    assert answer.tokens == model.generate(ids, max_tokens=8).tokens
    assert answer.tokens == [piece.token for piece in model.chat(messages, stream=True, max_tokens=8)]


def test_a_cancelled_stream_ends_in_order_and_leaves_the_model_usable(model: edgert.Model) -> None:
    expected = model.generate(PROMPT, max_tokens=20, ignore_eos=True)
    stream = model.stream(PROMPT, max_tokens=20, ignore_eos=True)
    first = [next(stream) for _ in range(3)]
    stream.cancel()
    (last,) = stream
    assert (last.token, last.finish_reason) == (None, "cancelled")
    assert stream.result.tokens == [piece.token for piece in first] == expected.tokens[:3]
    assert stream.result.statistics["generated_tokens"] == 3
    assert model.generate(PROMPT, max_tokens=20, ignore_eos=True).tokens == expected.tokens


def test_cancel_stops_a_step_under_way(model: edgert.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = model.stream([5] * 100, ignore_eos=True)
    step = model.step

    def cancelled_within(*arguments: Any) -> Any:
        model.cancel()
        model.native.cancel()  # which model.cancel() does once the step is under way
        return step(*arguments)

    monkeypatch.setattr(model, "step", cancelled_within)
    assert [(piece.token, piece.finish_reason) for piece in stream] == [(None, "cancelled")]


def test_a_cancellation_that_came_too_late_harms_nobody(model: edgert.Model) -> None:
    expected = model.generate(PROMPT, max_tokens=4, ignore_eos=True)
    model.native.cancel()  # hits the next step, whoever's it is
    assert model.generate(PROMPT, max_tokens=4, ignore_eos=True).tokens == expected.tokens


def test_threads_share_a_model(model: edgert.Model) -> None:
    expected = model.generate(PROMPT, max_tokens=16, ignore_eos=True).tokens
    results: list[list[int]] = []

    def work() -> None:
        results.append(model.generate(PROMPT, max_tokens=16, ignore_eos=True).tokens)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [expected] * 4


# --- bad prompts ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "prompt", [[], [-1], [10**9], [1.5], ["a"], [None], np.ones((2, 2), int), 7, None, b"text"]
)
def test_token_ids_are_checked(model: edgert.Model, prompt: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="token ids"):
        model.generate(prompt)


def test_an_empty_text_begins_with_the_beginning_of_sequence_token(model: edgert.Model) -> None:
    assert model.tokenizer.bos_token_id is not None
    empty, explicit = (
        model.generate("", max_tokens=4),
        model.generate([model.tokenizer.bos_token_id], max_tokens=4),
    )
    assert empty.tokens == explicit.tokens


def test_a_prompt_past_the_context_names_both_numbers(model: edgert.Model) -> None:
    with pytest.raises(InvalidArgumentError, match=f"found 1000 tokens, allowed are {model.context - 1}"):
        model.generate([5] * 1000)
    with pytest.raises(InvalidArgumentError, match=r"found [0-9]* tokens, allowed are"):
        model.generate(PROMPT * 200)


def test_a_prompt_far_past_the_context_is_refused_by_its_beginning(
    model: edgert.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths: list[int] = []
    encode = model.tokenizer.encode

    def counted(text: str, **options: Any) -> list[int]:
        lengths.append(len(text))
        return encode(text, **options)

    monkeypatch.setattr(model.tokenizer, "encode", counted)
    with pytest.raises(InvalidArgumentError, match="found more than [0-9]* tokens"):
        model.generate("word " * 10**6)
    assert sum(lengths) < 64 * model.context


@pytest.mark.parametrize(
    "option", [{"temperature": math.nan}, {"max_tokens": 0}, {"top_p": 2}, {"nonsense": 1}]
)
def test_bad_sampling_is_refused(model: edgert.Model, option: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgumentError, match=next(iter(option))):
        model.generate(PROMPT, **option)


def test_a_forked_process_is_told_to_load_the_model_itself(
    model: edgert.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "getpid", lambda: 1)
    with pytest.raises(InvalidArgumentError, match="before this process was forked; load it here"):
        model.generate(PROMPT)


FORKED = """
import os, sys, edgert
for backend in sys.argv[1:]:
    model = edgert.load(io_backend=backend)
    before = model.generate("A", max_tokens=2).tokens
    child = os.fork()
    if child == 0:
        model.close()
        os._exit(7)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 7
    assert model.generate("A", max_tokens=2).tokens == before
"""


def test_a_forked_process_can_let_go_of_a_model_and_leaves_it_whole() -> None:
    subprocess.run([sys.executable, "-c", FORKED, *_native.usable_io_backends()], check=True, timeout=120)


# --- logits and measures ----------------------------------------------------------------------------


def test_logits_have_one_row_a_token(model: edgert.Model) -> None:
    logits = model.logits([5, 6, 7])
    assert (logits.shape, logits.dtype.name) == ((3, model.vocab_size), "float32")
    assert np.array_equal(logits[:2], model.logits([5, 6]))


def test_perplexity_of_one_window_is_that_of_the_logits(model: edgert.Model) -> None:
    tokens = model.tokenizer.encode(PROMPT * 4)
    logits = model.logits(tokens[:-1]).astype(np.float64)
    logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    expected = np.exp(-logprobs[np.arange(len(tokens) - 1), tokens[1:]].mean())
    result = evaluate(model, tokens)
    assert result.perplexity == pytest.approx(expected, rel=1e-9)
    assert result.tokens == len(tokens) - 1


def test_every_token_is_scored_once_whatever_the_windows(model: edgert.Model) -> None:
    tokens = model.tokenizer.encode(PROMPT * 8)
    seen = []
    for context, stride in ((8, 7), (16, 8), (16, 1), (64, 63)):
        result = evaluate(
            model,
            tokens,
            context=context,
            stride=stride,
            progress=lambda done, total: seen.append((done, total)),
        )
        assert result.tokens == len(tokens) - 1
        assert seen[-1] == (len(tokens) - 1, len(tokens) - 1)


def test_a_long_text_is_encoded_in_parts(model: edgert.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "A line of text.\n" * 100
    whole = model.tokenizer.encode(text)
    monkeypatch.setattr("edgert.evaluate._PART_CHARACTERS", 50)
    assert list(encode_text(model, text)) == whole
    assert list(encode_text(model, text, 7)) == whole[:7]
    assert model.tokenizer.decode(encode_text(model, "x" * 1000)) == "x" * 1000


def test_a_model_agrees_with_itself_and_less_with_a_coarser_one(
    tiny_bundle: Path, tiny_f32_bundle: Path
) -> None:
    with edgert.load(tiny_bundle, threads=1) as model, edgert.load(tiny_f32_bundle, threads=1) as exact:
        tokens = model.tokenizer.encode(PROMPT * 4)
        same = evaluate(exact, tokens, reference=exact)
        assert (same.kl_mean, same.top1_agreement) == (0.0, 1.0)
        coarse = evaluate(model, tokens, reference=exact)
        assert coarse.kl_mean is not None and coarse.kl_mean > 0
        assert coarse.top1_agreement is not None and 0.5 < coarse.top1_agreement <= 1


@pytest.mark.parametrize(
    ("count", "options"), [(1, {}), (9, {"context": 10**6}), (9, {"stride": 0x10000}), (9, {"context": 1})]
)
def test_windows_are_checked(model: edgert.Model, count: int, options: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgumentError, match="found"):
        evaluate(model, [5] * count, **options)


def test_a_benchmark_fits_itself_into_a_small_context(tiny_bundle: Path) -> None:
    with edgert.load(tiny_bundle, context=20) as model:
        assert [row["tokens"] for row in benchmark(model, repetitions=1)["results"]] == [12, 6]
        with pytest.raises(InvalidArgumentError, match="found 21, allowed are 19"):
            benchmark(model, prompt_tokens=15)


def test_a_benchmark_measures_both_phases(model: edgert.Model) -> None:
    report = benchmark(model, prompt_tokens=16, decode_tokens=4, repetitions=2)
    assert {"model", "threads", "budget_bytes"} <= report.keys()
    assert [row["phase"] for row in report["results"]] == ["prefill", "decode"]
    for row in report["results"]:
        assert row["repetitions"] == 2 and row["tokens_per_s"] > 0 and row["spread"] >= 0
        assert 0 <= row["hit_rate"] <= 1 and row["bytes_read_per_token"] >= 0


# --- loading ----------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_too_small_a_budget_names_the_smallest_that_works(tiny_bundle: Path) -> None:
    with edgert.load(tiny_bundle, threads=1) as model:
        smallest = model.minimum_bytes
        expected = model.generate(PROMPT, max_tokens=12, ignore_eos=True).tokens
    for memory in ("1KiB", smallest - 1):
        with pytest.raises(BudgetError, match=f"the smallest that works is {smallest} bytes"):
            edgert.load(tiny_bundle, memory=memory, threads=1)
    with edgert.load(tiny_bundle, memory=smallest, threads=1) as model:
        assert model.generate(PROMPT, max_tokens=12, ignore_eos=True).tokens == expected
        assert model.stats()["peak_bytes"] <= smallest


def test_a_budget_below_one_token_s_experts_is_warned_about(tmp_path: Path) -> None:
    from bundles import convert
    from checkpoints import tiny_checkpoint

    bundle = convert(tiny_checkpoint(tmp_path / "source", num_experts_per_tok=4), tmp_path / "four.edgert")
    with edgert.load(bundle, threads=1) as model:
        smallest = model.minimum_bytes
    with pytest.warns(RuntimeWarning, match="every token will wait for storage"):
        edgert.load(bundle, memory=smallest, threads=1).close()


def test_knobs_come_from_argument_variable_bundle_and_default(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = shutil.copytree(tiny_bundle, tmp_path / "tiny.edgert")
    edit_manifest(bundle, lambda manifest: manifest.update(defaults={"context": 48}))

    def context(**knobs: Any) -> int:
        with edgert.load(bundle, threads=1, **knobs) as model:
            return model.context

    assert context() == 48
    monkeypatch.setenv("EDGERT_CONTEXT", "64")
    assert context() == 64
    assert context(context=32) == 32
    assert context(context="auto") == 512


def test_an_unknown_knob_lists_the_known_ones(tiny_bundle: Path) -> None:
    with pytest.raises(InvalidArgumentError, match="unknown knob 'memroy'; the knobs are .*memory"):
        edgert.load(tiny_bundle, memroy="1GiB")


def test_bundles_are_found_by_name(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGERT_HOME", str(tmp_path))
    shutil.copytree(tiny_bundle, tmp_path / "models/mine.edgert")
    with edgert.load("mine", threads=1) as model:
        assert model.name == "mine"
    for name in ("absent", "../models/absent", "a/../../b", ""):
        with pytest.raises(NotFoundError):
            edgert.load(name)


def test_a_checkpoint_is_not_a_bundle(tiny_source: Path) -> None:
    with pytest.raises(NotFoundError, match="it is a checkpoint; `edgert convert"):
        edgert.load(tiny_source)


def test_assets_are_checked(tiny_bundle: Path, tmp_path: Path) -> None:
    bundle = shutil.copytree(tiny_bundle, tmp_path / "tiny.edgert")
    content = bytearray((bundle / "tokenizer.json").read_bytes())
    content[len(content) // 2] ^= 1
    (bundle / "tokenizer.json").write_bytes(content)
    with pytest.raises(CorruptError, match=r"tokenizer\.json: checksum"):
        edgert.load(bundle, threads=1)


def test_without_a_tokenizer_token_ids_still_work(tiny_bundle: Path, tmp_path: Path) -> None:
    bundle = shutil.copytree(tiny_bundle, tmp_path / "tiny.edgert")
    edit_manifest(bundle, lambda manifest: manifest.update(assets=[]))
    with edgert.load(bundle, threads=1) as model:
        assert len(model.generate([5, 6], max_tokens=3).tokens) == 3
        with pytest.raises(NotFoundError, match=r"no tokenizer\.json"):
            model.generate("text")
        with pytest.raises(UnsupportedError, match="stop strings need a tokenizer"):
            model.generate([5, 6], stop="x")


def test_a_closed_model_says_so(tiny_bundle: Path) -> None:
    with edgert.load(tiny_bundle, threads=1) as model:
        stream = model.stream(PROMPT)
        next(stream)
    for use in (lambda: model.generate(PROMPT), lambda: model.logits([5]), model.stats):
        with pytest.raises(InvalidArgumentError, match="is closed"):
            use()
    assert [piece.finish_reason for piece in stream] == ["cancelled"]
    model.close()
