"""What is kept of a text: beginnings that prompts share, and sessions in files. The same bits as without."""

from __future__ import annotations

import json
import os
import stat
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import MIB, bits, convert, open_model, transcript
from checkpoints import prompt_tokens
from peft_directories import lora
from shell import Shell
from variants import VARIANTS, by_name, make_checkpoint

import edgert
from edgert.errors import (
    BudgetError,
    CorruptError,
    EdgertError,
    InvalidArgumentError,
    NotFoundError,
    UnsupportedError,
)

KINDS = {
    "attention": "qwen3_moe",
    "window": "qwen3_moe-window",
    "latent attention": "deepseek_v3",
    "gated delta": "qwen3_next",
    "short convolution": "lfm2_moe",
}
STATEFUL = ("gated delta", "short convolution")
VOCAB = 131
PROMPT = prompt_tokens(70, VOCAB)


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def bundle(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("kind")
    source = make_checkpoint(directory / "checkpoint", by_name(VARIANTS, KINDS[kind]))
    return convert(source, directory / "model.edgert")


def drawn(result: edgert.Generation) -> list[Any]:
    return [result.tokens, result.logprobs]


def options(seed: int = 0) -> dict[str, Any]:
    return {"max_tokens": 12, "ignore_eos": True, "temperature": 1.0, "seed": seed, "logprobs": 2}


# --- shared beginnings --------------------------------------------------------------------------------


def test_a_shared_beginning_gives_the_same_bits(kind: str, bundle: Path) -> None:
    _, expected = transcript(open_model(bundle), PROMPT, 5)
    model = open_model(bundle, chunk=7, parallel=3)
    transcript(model, PROMPT, 5)
    sequence = model.sequence(prompt=PROMPT)
    known = sequence.length
    assert known == (0 if kind in STATEFUL else 64)
    logits = bits(model.logits(sequence, PROMPT[known:]))
    assert np.array_equal(logits, expected[known : len(PROMPT)])


def test_generations_use_it_and_say_so(kind: str, bundle: Path) -> None:
    with edgert.load(bundle, memory="64MiB", parallel=2) as fresh:
        expected = [drawn(fresh.generate([*PROMPT, i], **options(i))) for i in range(3)]
    with edgert.load(bundle, memory="64MiB", parallel=2) as model:
        results = [model.generate([*PROMPT, i], **options(i)) for i in range(3)]
    assert [drawn(result) for result in results] == expected
    cached = [result.statistics["cached_tokens"] for result in results]
    assert cached == ([0, 0, 0] if kind in STATEFUL else [0, 64, 64])


def test_adapters_share_only_with_their_equals(tiny_bundle: Path, tmp_path: Path) -> None:
    with edgert.load(tiny_bundle, memory="64MiB", parallel=4) as model:
        for name, seed in (("one", 1), ("again", 1), ("two", 2)):
            model.load_adapter(lora(seed).write(tmp_path / name), name)

        def cached(adapter: Any) -> int:
            result = model.generate(PROMPT, max_tokens=1, adapter=adapter)
            return int(result.statistics["cached_tokens"])

        assert [cached(None), cached("one"), cached({"one": 0.5}), cached("two")] == [0, 0, 0, 0]
        assert [cached(None), cached("one"), cached({"one": 0.5}), cached("again")] == [64, 64, 64, 64]
        model.unload_adapter("two")
        model.load_adapter(tmp_path / "two", "two")
        assert cached("two") == 64


# --- sessions -----------------------------------------------------------------------------------------


def test_a_session_goes_on_as_if_it_had_never_stopped(kind: str, bundle: Path, tmp_path: Path) -> None:
    file = tmp_path / "a.session"
    more = prompt_tokens(9, VOCAB, 4)
    with edgert.load(bundle, memory="64MiB", parallel=2) as model:
        first = model.generate(PROMPT, **options())
        whole = [*PROMPT, *first.tokens, *more]
    with edgert.load(bundle, memory="64MiB", parallel=2) as fresh:
        expected = drawn(fresh.generate(whole, **options(1)))
    with edgert.load(bundle, memory="64MiB", parallel=2) as model, model.session() as session:
        assert drawn(model.generate(PROMPT, session=session, **options())) == drawn(first)
        assert session.tokens == [*PROMPT, *first.tokens]
        session.note["of"] = "this test"
        model.save_session(session, file)
        assert drawn(model.generate(whole, session=session, **options(1))) == expected
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert os.listdir(tmp_path) == ["a.session"]
    with (
        edgert.load(bundle, memory="64MiB", parallel=2) as model,
        model.restore_session(file) as session,
    ):
        assert session.note == {"of": "this test"}
        assert session.tokens == [*PROMPT, *first.tokens]
        result = model.generate(whole, session=session, **options(1))
        assert drawn(result) == expected
        assert result.statistics["cached_tokens"] == (81 if kind in STATEFUL else 80)


def test_a_session_goes_back_to_where_a_prompt_leaves_it(bundle: Path, tmp_path: Path) -> None:
    other = [*PROMPT[:40], *prompt_tokens(20, VOCAB, 8)]
    with edgert.load(bundle, memory="64MiB", parallel=2) as fresh:
        expected = drawn(fresh.generate(other, **options()))
    with edgert.load(bundle, memory="64MiB", parallel=2) as model:
        with model.session() as session:
            model.generate(PROMPT, session=session, **options())
            model.save_session(session, tmp_path / "s")
            assert drawn(model.generate(other, session=session, **options())) == expected
        with model.restore_session(tmp_path / "s") as session:
            assert drawn(model.generate(other, session=session, **options())) == expected


def test_what_a_file_says_is_shared_with_nobody(tiny_bundle: Path, tmp_path: Path) -> None:
    with edgert.load(tiny_bundle, memory="64MiB", parallel=2) as model:
        with model.session() as session:
            model.generate(PROMPT, session=session, max_tokens=1)
            model.save_session(session, tmp_path / "s")
        model.native.forget_prefixes()
        with model.restore_session(tmp_path / "s") as session:
            model.generate([*PROMPT, *prompt_tokens(40, VOCAB)], session=session, max_tokens=1)
            assert model.generate(PROMPT, max_tokens=1).statistics["cached_tokens"] == 0


@pytest.fixture(scope="module")
def saved(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "a.session"
    with edgert.load(tiny_bundle, memory="64MiB") as model, model.session() as session:
        model.generate(PROMPT, session=session, max_tokens=4, ignore_eos=True)
        model.save_session(session, path)
    return path


def header(content: bytes) -> tuple[dict[str, Any], bytes]:
    (size,) = struct.unpack_from("<I", content, 12)
    return json.loads(content[16 : 16 + size]), content[16 + size + 8 :]


def with_header(content: bytes, **changes: Any) -> bytes:
    """With another header whose checksum is right."""
    from edgert import _native

    stated, rest = header(content)
    text = json.dumps({**stated, **changes}).encode()
    start = content[:12] + struct.pack("<I", len(text)) + text
    return start + struct.pack("<Q", int(_native.xxh64(start), 16)) + rest


HOSTILE: dict[str, tuple[Callable[[bytes], bytes], type[EdgertError], str]] = {
    "empty": (lambda c: b"", CorruptError, "ends at byte 0"),
    "no session": (lambda c: b"x" * 100, CorruptError, "is no session"),
    "newer": (lambda c: c[:8] + struct.pack("<I", 2) + c[12:], UnsupportedError, "format 2"),
    "endless header": (lambda c: c[:12] + b"\xff" * 4 + c[16:], CorruptError, "header of 4294967295"),
    "cut in the header": (lambda c: c[:40], CorruptError, "ends at byte 40"),
    "a bit of the header": (lambda c: c[:30] + bytes([c[30] ^ 1]) + c[31:], CorruptError, "checksum"),
    "header is no object": (
        lambda c: with_header(c) and _raw_header(c, b"[]"),
        CorruptError,
        "an object is needed",
    ),
    "cut at the end": (lambda c: c[:-1], CorruptError, "should"),
    "more at the end": (lambda c: c + b"x", CorruptError, "should"),
    "a bit of the last block": (lambda c: c[:-50] + bytes([c[-50] ^ 1]) + c[-49:], CorruptError, "checksum"),
    "tokens by the billion": (lambda c: with_header(c, tokens=2**31 - 1), CorruptError, "should"),
    "fewer tokens than ran": (lambda c: with_header(c, tokens=3), CorruptError, "of 3 tokens"),
    "tokens below zero": (lambda c: with_header(c, tokens=-1), CorruptError, "of -1 tokens"),
    "tokens in words": (lambda c: with_header(c, tokens="74"), CorruptError, "tokens"),
    "length is true": (lambda c: with_header(c, length=True), CorruptError, "tokens"),
    "note is a list": (lambda c: with_header(c, note=[]), CorruptError, "note"),
    "another bundle": (lambda c: with_header(c, bundle_id="0" * 32), InvalidArgumentError, "bundle_id"),
    "other adapters": (lambda c: with_header(c, adapters="1" * 16), InvalidArgumentError, "adapters"),
    "another KV format": (lambda c: with_header(c, kv_format="int8"), InvalidArgumentError, "kv_format"),
    "other sizes": (lambda c: with_header(c, kv_block_bytes=1), InvalidArgumentError, "kv_block_bytes"),
}


def _raw_header(content: bytes, text: bytes) -> bytes:
    from edgert import _native

    start = content[:12] + struct.pack("<I", len(text)) + text
    return start + struct.pack("<Q", int(_native.xxh64(start), 16))


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_session_is_refused_and_leaves_nothing(
    saved: Path, tiny_bundle: Path, tmp_path: Path, case: str
) -> None:
    make, error, complaint = HOSTILE[case]
    bad = tmp_path / "bad.session"
    bad.write_bytes(make(saved.read_bytes()))
    with edgert.load(tiny_bundle, memory="64MiB") as model:
        free = model.stats()["kv_blocks_free"]
        with pytest.raises(error, match=complaint) as raised:
            model.restore_session(bad)
        assert str(bad) in str(raised.value)
        assert model.stats()["kv_blocks_free"] == free
        assert len(model.generate(PROMPT, max_tokens=2, ignore_eos=True).tokens) == 2


def test_a_token_outside_the_vocabulary(saved: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    from edgert import _native

    content = saved.read_bytes()
    stated, rest = header(content)
    size = 4 * stated["tokens"]
    tokens = struct.pack("<i", 10**6) + rest[4:size]
    front = content[: len(content) - len(rest)]
    changed = front + tokens + struct.pack("<Q", int(_native.xxh64(tokens), 16)) + rest[size + 8 :]
    (tmp_path / "bad").write_bytes(changed)
    with edgert.load(tiny_bundle, memory="64MiB") as model, pytest.raises(CorruptError, match="vocabulary"):
        model.restore_session(tmp_path / "bad")


def test_a_session_that_does_not_fit(saved: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    with edgert.load(tiny_bundle, memory="64MiB", context=48) as small:
        with pytest.raises(InvalidArgumentError, match="the context is 48"):
            small.restore_session(saved)
        assert len(small.generate(PROMPT[:20], max_tokens=2, ignore_eos=True).tokens) == 2
    with edgert.load(tiny_bundle, memory="64MiB", context=96) as model:
        with model.restore_session(saved), pytest.raises(BudgetError, match="KV cache is full"):
            model.restore_session(saved)
        with pytest.raises(NotFoundError, match="no such session"):
            model.restore_session(tmp_path / "missing")


def test_an_empty_session_is_one_too(tiny_bundle: Path, tmp_path: Path) -> None:
    with edgert.load(tiny_bundle, memory=64 * MIB) as model:
        expected = model.generate(PROMPT, **options()).tokens
        with model.session() as session:
            model.save_session(session, tmp_path / "s")
        with model.restore_session(tmp_path / "s") as session:
            assert model.generate(PROMPT, session=session, **options()).tokens == expected


# --- the command --------------------------------------------------------------------------------------


def test_run_goes_on_from_a_session(edgert: Shell, tiny_bundle: Path, tmp_path: Path) -> None:
    file = tmp_path / "talk.session"

    def run(*more: object) -> Any:
        return edgert.json("run", tiny_bundle, "--raw", "--max-tokens", 4, "--ignore-eos", *more)

    first = run("-p", "ab", "--session", file)
    second = run("-p", "cd", "--session", file)
    assert second["statistics"]["prompt_tokens"] > first["statistics"]["prompt_tokens"] + 4
    assert file.exists()
    file.write_bytes(b"no session at all")
    done = edgert("run", tiny_bundle, "--raw", "-p", "x", "--session", file)
    assert done.returncode == 1
    assert "is no session" in done.stderr.splitlines()[-1]
