"""Text comes out token by token exactly as the whole sequence decodes, and stop strings cut it exactly."""

import json
from functools import cache

import pytest
import tokenizers_made as made
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken as LibraryToken
from tokenizers import Tokenizer as Library

from edgert.bundle import locate
from edgert.detokenizer import StopStrings
from edgert.errors import CorruptError, EdgertError, InvalidArgumentError, UnsupportedError
from edgert.tokenizer import Tokenizer
from edgert.vocabulary import AddedToken, with_tokens

MAKERS = {
    "byte-level BPE": made.byte_level,
    "SentencePiece with byte fallback": made.sentencepiece,
    "SentencePiece that keeps its first space": lambda: made.sentencepiece("gemma"),
    "Metaspace, always": lambda: made.metaspace("always"),
    "Metaspace, first": lambda: made.metaspace("first"),
    "Metaspace, never": lambda: made.metaspace("never"),
    "words": made.words,
}


def content_of(kind: str) -> bytes:
    return (locate(None) / "tokenizer.json").read_bytes() if kind == "docs-moe" else MAKERS[kind]()


@cache
def pair(kind: str) -> tuple[Tokenizer, Library]:
    """Our tokenizer and the library's own, of one file."""
    content = content_of(kind)
    return Tokenizer(content), Library.from_buffer(content)


def assert_streams_exactly(kind: str, tokens: list[int]) -> None:
    ours, library = pair(kind)
    whole = library.decode(tokens, skip_special_tokens=True)
    stream = ours.stream()
    pieces = [stream.push(token) for token in tokens] + [stream.finish()]
    assert "".join(pieces) == whole
    assert ours.decode(tokens) == whole


@pytest.mark.parametrize("kind", [*MAKERS, "docs-moe"])
@settings(max_examples=150, deadline=None, derandomize=True)
@given(seeds=st.lists(st.integers(0, 2**20), max_size=40))
def test_pieces_joined_are_the_whole_text(kind: str, seeds: list[int]) -> None:
    size = pair(kind)[0].vocab_size + 3  # a few ids past the vocabulary, which have no text
    assert_streams_exactly(kind, [seed % size for seed in seeds])


@pytest.mark.parametrize("kind", [*MAKERS, "docs-moe"])
@settings(max_examples=100, deadline=None, derandomize=True)
@given(text=st.text(st.sampled_from("ab ▁\n é你👩‍👧🇩🇪\ufffd<|im_end|>"), max_size=30))
def test_text_survives_the_way_there_and_back(kind: str, text: str) -> None:
    ours, library = pair(kind)
    tokens = ours.encode(text)
    assert tokens == library.encode(text).ids
    assert_streams_exactly(kind, tokens)


@pytest.mark.parametrize("kind", ["byte-level BPE", "SentencePiece with byte fallback"])
def test_a_character_is_never_split(kind: str) -> None:
    ours, _ = pair(kind)
    stream = ours.stream()
    tokens = ours.encode("🦊 한글")
    pieces = [stream.push(token) for token in tokens] + [stream.finish()]
    assert len(tokens) > 6, "the tokenizer must spell these characters byte by byte"
    assert "".join(pieces).strip() == "🦊 한글"
    assert not any("\ufffd" in piece for piece in pieces)


def test_an_unfinished_character_becomes_one_replacement_at_the_end() -> None:
    ours, _ = pair("byte-level BPE")
    tokens = ours.encode("👩")[:-1]
    stream = ours.stream()
    assert "".join(stream.push(token) for token in tokens) == ""
    assert stream.finish() == "\ufffd"


def test_the_cost_of_a_token_does_not_grow_with_the_text() -> None:
    ours, _ = pair("byte-level BPE")
    stream = ours.stream()
    for _ in range(1000):
        stream.push(5)
    assert not any(
        isinstance(value, str | list) and len(value) > 8 for value in vars(stream._steps[0]).values()
    )


# --- stop strings -----------------------------------------------------------------------------------


def stopped(pieces: list[str], stops: list[str]) -> tuple[str, str | None]:
    watcher = StopStrings(stops)
    return "".join([*map(watcher.push, pieces), watcher.finish()]), watcher.found


def cut_by_definition(text: str, stops: list[str]) -> tuple[str, str | None]:
    """At the first character where a stop string ends; of those that end there, the longest."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            longest = max(found, key=len)
            return text[: end - len(longest)], longest
    return text, None


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    pieces=st.lists(st.text("abc", max_size=4), max_size=12),
    stops=st.lists(st.text("abc", min_size=1, max_size=5), max_size=3),
)
def test_stop_strings_cut_exactly_whatever_the_pieces(pieces: list[str], stops: list[str]) -> None:
    assert stopped(pieces, stops) == cut_by_definition("".join(pieces), stops)


def test_text_that_may_become_a_stop_string_is_held_back() -> None:
    watcher = StopStrings(["\n\nUser:"])
    assert watcher.push("Yes.\n") == "Yes."
    assert watcher.push("\nUs") == ""
    assert watcher.push("ually") == "\n\nUsually"
    assert watcher.push("\n\nUser: no") == ""
    assert watcher.found == "\n\nUser:"
    assert watcher.push("more") == "" and watcher.finish() == ""


# --- hostile files ----------------------------------------------------------------------------------


def altered(**changes: object) -> bytes:
    return json.dumps({**json.loads(made.byte_level()), **changes}).encode()


@pytest.mark.parametrize(
    "content",
    [b"", b"{}", b"\xff", b"[" * 100_000, b'{"version": "1.0"}', altered(model={"type": "BPE", "vocab": {"a": -1}, "merges": []}),
     altered(model={"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "missing"]]})],
)  # fmt: skip
def test_what_is_no_tokenizer_is_refused(content: bytes) -> None:
    with pytest.raises(CorruptError, match="tokenizer.json"):
        Tokenizer(content)


@pytest.mark.parametrize("pattern", ["(a+)+b", "(a|a?)+$", r"^(\w+\s?)*$"])
def test_a_pathological_pattern_is_refused_when_loaded(pattern: str) -> None:
    with pytest.raises(
        UnsupportedError, match="tokenizer.json: the tokenizer failed on this text: Onig: .*limit"
    ):
        Tokenizer(made.with_pattern(pattern))


def test_words_of_unbounded_work_are_refused() -> None:
    model = {
        "type": "WordPiece",
        "vocab": {"a": 0, "b": 1},
        "unk_token": "b",
        "continuing_subword_prefix": "##",
    }
    with pytest.raises(UnsupportedError, match="max_input_chars_per_word: allowed are 0 to 1000"):
        Tokenizer(altered(model={**model, "max_input_chars_per_word": 10**6}))


def test_normalisation_that_multiplies_text_is_refused() -> None:
    step = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 10}
    with pytest.raises(UnsupportedError, match="normalizer: makes text more than"):
        Tokenizer(altered(normalizer={"type": "Sequence", "normalizers": [step] * 9}))


@pytest.mark.parametrize(
    "decoder",
    [
        {"type": "WordPiece", "prefix": "##", "cleanup": True},
        {"type": "CTC", "pad_token": "", "word_delimiter_token": "|", "cleanup": True},
    ],
)
def test_a_decoder_that_cannot_be_streamed_is_named(decoder: dict[str, object]) -> None:
    with pytest.raises(UnsupportedError, match=f"decoder: found '{decoder['type']}'"):
        Tokenizer(altered(decoder=decoder))


def test_padding_and_truncation_in_the_file_do_not_apply() -> None:
    padding = {
        "strategy": {"Fixed": 10**9},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "<s>",
    }
    truncation = {"direction": "Right", "max_length": 1, "strategy": "LongestFirst", "stride": 0}
    plain = Tokenizer(made.byte_level()).encode("hello world")
    assert Tokenizer(altered(padding=padding, truncation=truncation)).encode("hello world") == plain


@pytest.mark.parametrize("text", ["\ud800", 7, None, b"bytes"])
def test_only_text_can_be_encoded(text: object) -> None:
    with pytest.raises(InvalidArgumentError, match="text: "):
        pair("words")[0].encode(text)  # type: ignore[arg-type]


def test_ids_without_a_token_have_no_text() -> None:
    assert pair("words")[0].decode([4, -1, 2**40, 999, 5]) == "a b"


def test_without_a_template_there_is_no_chat() -> None:
    with pytest.raises(EdgertError, match="no chat template"):
        pair("words")[0].apply_chat_template([{"role": "user", "content": "hi"}])


def test_the_estimate_of_memory_depends_on_the_file_alone() -> None:
    assert Tokenizer(made.byte_level()).memory_bytes == Tokenizer(made.byte_level()).memory_bytes
    assert Tokenizer(made.words()).memory_bytes < Tokenizer(made.byte_level()).memory_bytes


# --- added tokens -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*MAKERS, "docs-moe"])
def test_added_tokens_are_those_of_the_library(kind: str) -> None:
    """Which transformers' add_tokens and add_special_tokens hand them to."""
    content = content_of(kind)
    theirs = Library.from_buffer(content)
    flags: dict[str, dict[str, bool]] = {
        "<|turn|>": {"special": True, "normalized": False},
        "<note>": {"normalized": True},
        "<left>": {"lstrip": True, "rstrip": True, "normalized": False},
        "word": {"single_word": True},  # which some have as a token like any other
    }
    theirs.add_tokens([LibraryToken(content, **own) for content, own in flags.items()])
    numbers = theirs.get_vocab()
    added = [AddedToken(numbers[content], content, **own) for content, own in flags.items()]
    ours = Tokenizer(with_tokens(content, added))
    for text in (
        "<|turn|>The module<|turn|>",
        "a <note>b<note> c",
        "one <left> two<left>three",
        "word words sword, word",
        "The module reads <the> file",
        "<|turn|><note><left>word",
    ):
        ids = theirs.encode(text).ids
        assert ours.encode(text) == ids
        assert ours.decode(ids) == theirs.decode(ids)
    assert [ours.token_id(token.content) for token in added] == [token.id for token in added]


def test_an_added_token_may_stand_behind_a_gap() -> None:
    tokenizer = Tokenizer(with_tokens(content_of("byte-level BPE"), [AddedToken(5000, "<far>")]))
    assert tokenizer.encode("a<far>") == [*tokenizer.encode("a"), 5000]
    assert tokenizer.token_bytes()[5000] == b"<far>"
