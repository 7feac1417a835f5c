"""Patterns of PEFT configurations match what Python's engine would, and no pattern takes long."""

from __future__ import annotations

import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from edgert.converters.patterns import Pattern
from edgert.errors import UnsupportedError

NAMES = (
    "model.layers.0.self_attn.q_proj",
    "model.layers.11.mlp.experts.gate_up_proj",
    "model.layers.1.mlp.gate.weight",
    "lm_head",
    "a.b",
)


@pytest.mark.parametrize(
    "pattern",
    [
        "q_proj",
        "self_attn.q_proj",
        r"^model\.layers\.0\.self_attn\.q_proj$",
        r".*\.gate_up_proj",
        r"layers\.\d+\.self_attn\.(q|k)_proj",
        r".*\.(0|11)\..*_proj",
        r"layers\.[0-9]{1,2}\.mlp\..*",
        r"layers\.[^1].*",
        r"(?:gate|lm_head)(\.weight)?",
        r"\w+?",
        r"(a|b|\.)+",
        r"layers\.1{2}\..*",
        r"[]a.-]+b",
        "",
    ],
)
def test_a_pattern_matches_as_peft_matches_it(pattern: str) -> None:
    for name in NAMES:
        expected = re.match(rf"(.*\.)?({pattern})$", name) is not None
        assert Pattern(pattern, "x").matches_end(name) == expected, name
        assert Pattern(pattern, "x").matches(name) == (re.fullmatch(pattern, name) is not None), name


@given(st.text("ab._", min_size=1, max_size=6), st.text("ab._", max_size=9))
def test_plain_patterns_match_the_end_as_pythons_do(pattern: str, name: str) -> None:
    expected = re.match(rf"(?:.*\.)?({pattern})$", name) is not None
    assert Pattern(pattern, "x").matches_end(name) == expected


PARTS = st.recursive(
    st.sampled_from(["a", "b", ".", r"\.", "[ab]", "[^a]", r"\w"]),
    lambda inner: st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map(lambda two: f"({two[0]}|{two[1]})"),
        st.tuples(inner, st.sampled_from(["*", "+", "?", "{1,2}", "{2}"])).map(
            lambda one: f"({one[0]}){one[1]}"
        ),
    ),
    max_leaves=5,
)


@given(PARTS, st.text("ab.", max_size=6))
@example("(a|ab)(b*)", "abb")
def test_any_pattern_matches_what_pythons_engine_matches(pattern: str, text: str) -> None:
    assert Pattern(pattern, "x").matches(text) == (re.fullmatch(pattern, text) is not None)


@pytest.mark.parametrize(
    "pattern", ["(a+)+b", "(a|a)*b", "((a*)*)*b", "((()*){512}){512}b", "(a?){500}a{500}"]
)
def test_no_pattern_takes_long(pattern: str) -> None:
    try:
        assert not Pattern(pattern, "x").matches("a" * 400)
    except UnsupportedError as error:
        assert "regular expression" in str(error)


@pytest.mark.parametrize(
    "pattern",
    [
        "(",
        ")",
        "a)",
        "[a",
        "*a",
        "a**",
        "(?=a)",
        "(?P<x>a)",
        r"\1",
        r"\b",
        "a{",
        "a{9999}",
        "\\",
        "(" * 40 + ")" * 40,
        "a" * 600,
    ],
)
def test_others_are_refused(pattern: str) -> None:
    with pytest.raises(UnsupportedError, match="regular expression"):
        Pattern(pattern, "adapter_config.json: alpha_pattern")
