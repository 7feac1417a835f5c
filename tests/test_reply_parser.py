"""Replies taken apart: reasoning, content and calls of each family, wherever the pieces end."""

import json
from itertools import groupby
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgert.chat import ChatTemplate
from edgert.errors import InvalidArgumentError
from edgert.structured import Delta, ReplyParser
from edgert.structured.formats import CALLS, REASONING

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
                "required": ["city"],
            },
        },
    },
    {"type": "function", "function": {"name": "now"}},
]
PARIS = ("weather", '{"city": "Paris", "days": 2}')
NOW = ("now", "{}")

# One reply of every family: two calls after a few words.
CALLS_OF = {
    "hermes": (
        'Let me see.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Paris", "days": 2}}\n</tool_call>\n'
        '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
    ),
    "qwen3_coder": (
        "Let me see.\n<tool_call>\n<function=weather>\n<parameter=city>\nParis\n</parameter>\n<parameter=days>\n2\n"
        "</parameter>\n</function>\n</tool_call>\n<tool_call>\n<function=now>\n</function>\n</tool_call>"
    ),
    "glm45": (
        "Let me see.\n<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Paris</arg_value>\n<arg_key>days</arg_key>\n"
        "<arg_value>2</arg_value>\n</tool_call>\n<tool_call>now\n</tool_call>"
    ),
    "minimax_m2": (
        'Let me see.\n<minimax:tool_call>\n<invoke name="weather">\n<parameter name="city">Paris</parameter>\n'
        '<parameter name="days">2</parameter>\n</invoke>\n<invoke name="now">\n</invoke>\n</minimax:tool_call>'
    ),
    "kimi_k2": (
        "Let me see.<|tool_calls_section_begin|><|tool_call_begin|>functions.weather:0<|tool_call_argument_begin|>"
        '{"city": "Paris", "days": 2}<|tool_call_end|><|tool_call_begin|>functions.now:1<|tool_call_argument_begin|>{}'
        "<|tool_call_end|><|tool_calls_section_end|>"
    ),
    "deepseek_v3": (
        "Let me see.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n"  # noqa: RUF001
        '{"city": "Paris", "days": 2}\n```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>now\n'  # noqa: RUF001
        "```json\n{}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>"  # noqa: RUF001
    ),
    "deepseek_v31": (
        "Let me see.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather<｜tool▁sep｜>"  # noqa: RUF001
        '{"city": "Paris", "days": 2}<｜tool▁call▁end｜><｜tool▁call▁begin｜>now<｜tool▁sep｜>{}'  # noqa: RUF001
        "<｜tool▁call▁end｜><｜tool▁calls▁end｜>"  # noqa: RUF001
    ),
    "mistral": (
        'Let me see.[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Paris", "days": 2}}, '
        '{"name": "now", "arguments": {}}]'
    ),
    "mistral_args": 'Let me see.[TOOL_CALLS]weather[ARGS]{"city": "Paris", "days": 2}[TOOL_CALLS]now[ARGS]{}',
    "granite": (
        'Let me see.<|tool_call|>[{"name": "weather", "arguments": {"city": "Paris", "days": 2}}, '
        '{"name": "now", "arguments": {}}]'
    ),
    "llama3": '{"name": "weather", "parameters": {"city": "Paris", "days": 2}}; {"name": "now", "parameters": {}}',
    "harmony": (
        "<|channel|>analysis<|message|>They ask.<|end|><|start|>assistant<|channel|>commentary<|message|>Let me see."
        "<|end|><|start|>assistant<|channel|>commentary to=functions.weather <|constrain|>json<|message|>"
        '{"city": "Paris", "days": 2}<|call|><|start|>assistant to=functions.now<|channel|>commentary json<|message|>{}'
        "<|call|>"
    ),
}


def parser(template: str = "", *, special: tuple[str, ...] = (), **options: Any) -> ReplyParser:
    """Of a model of which nothing is known but its chat template and its special tokens, whose ids count from 100."""
    tokenizer = SimpleNamespace(
        chat_template=ChatTemplate(template),
        special_tokens=lambda: {token: 100 + index for index, token in enumerate(special)},
    )
    model: Any = SimpleNamespace(tokenizer=tokenizer)
    return ReplyParser.of(model, **options)


def read(parser: ReplyParser, pieces: list[str]) -> list[Delta]:
    """All deltas; those of text, of one kind after another, as one."""
    deltas = [delta for piece in pieces for delta in parser.push(piece)] + parser.finish()
    joined: list[Delta] = []
    for kind, run in groupby(deltas, lambda delta: delta.kind):
        some = list(run)
        joined += some if kind == "tool_call" else [Delta(kind, "".join(delta.text for delta in some))]
    return joined


def calls_in(deltas: list[Delta]) -> list[tuple[str | None, str]]:
    return [(delta.name, delta.text) for delta in deltas if delta.kind == "tool_call"]


def content_of(deltas: list[Delta]) -> str:
    return "".join(delta.text for delta in deltas if delta.kind == "content")


@pytest.mark.parametrize("family", [*CALLS, "harmony"])
def test_calls_of_each_family(family: str) -> None:
    deltas = read(parser(tools=TOOLS, tool_format=family), [CALLS_OF[family]])
    assert calls_in(deltas) == [PARIS, NOW]
    assert [delta.index for delta in deltas if delta.kind == "tool_call"] == [0, 1]
    assert content_of(deltas) == ("" if family == "llama3" else "Let me see.")


@pytest.mark.parametrize("family", [*CALLS, "harmony"])
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_pieces_may_end_anywhere(family: str, data: st.DataObject) -> None:
    """Of a text made of what confuses, too: parts of markers, halves of calls, reasoning twice."""
    whole = CALLS_OF[family]
    scraps = [
        "<think>",
        "</think>",
        "</thi",
        "<",
        "{",
        "]",
        "\n",
        " ",
        "text",
        "}",
        whole[11:30],
        whole[-14:],
        whole,
    ]
    parts = data.draw(st.lists(st.sampled_from(scraps), max_size=8))
    text = "".join(parts)
    places = data.draw(st.lists(st.integers(0, len(text)), max_size=12).map(sorted))
    pieces = [text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)]
    options: dict[str, Any] = {"tools": TOOLS, "tool_format": family, "reasoning": "think"}
    if family == "harmony":
        del options["reasoning"]
    assert read(parser(**options), pieces) == read(parser(**options), [text])
    assert read(parser(**options), list(text)) == read(parser(**options), [text])


@given(st.text(alphabet="<think>/tool_cal{}\"name': \n\\u12ab😀", max_size=80))
def test_any_text_comes_out_again(text: str) -> None:
    deltas = read(parser(tools=TOOLS, tool_format="hermes", reasoning="none"), list(text))
    if not calls_in(deltas):
        kept = "".join(content_of(deltas).split())
        assert kept == "".join(text.split())


@pytest.mark.parametrize("name", list(REASONING))
def test_reasoning_comes_first(name: str) -> None:
    opens, closes = REASONING[name]
    for pieces in ([f"{opens}\nWell.\n{closes}\n\nYes."], list(f"{opens}\nWell.\n{closes}\n\nYes.")):
        assert read(parser(f"{opens} {closes}"), pieces) == [
            Delta("reasoning", "Well."),
            Delta("content", "Yes."),
        ]


def test_reasoning_that_the_prompt_opens() -> None:
    template, prompt = "<think></think>", "user: hello\nassistant: <think>\n"
    assert read(parser(template, prompt=prompt), ["We", "ll.</th", "ink>\n\nYes."]) == [
        Delta("reasoning", "Well."),
        Delta("content", "Yes."),
    ]
    assert read(parser(template, prompt=prompt), ["cut off "]) == [Delta("reasoning", "cut off")]
    assert read(parser(template, prompt="<think>\n\n</think>\n\n"), ["Yes."]) == [Delta("content", "Yes.")]
    assert read(parser(template), ["Yes, ", "<think>", "."]) == [Delta("content", "Yes, <think>.")]


def test_reasoning_before_a_call() -> None:
    reply = f"<think>Well.</think>\n{CALLS_OF['hermes']}"
    deltas = read(parser("<think></think><tool_call>", tools=TOOLS), list(reply))
    assert [delta.kind for delta in deltas] == ["reasoning", "content", "tool_call", "tool_call"]


def test_special_tokens_are_markers() -> None:
    special = ("<|channel|>", "<|message|>", "<|end|>", "<|start|>")
    harmony = parser("<|channel|>", special=special)
    pieces = [
        ("", 100),
        ("analysis", 1),
        ("", 101),
        ("Well.", 2),
        ("", 102),
        ("", 103),
        ("assistant", 3),
        ("", 100),
    ]
    pieces += [("final", 4), ("", 101), ("Yes.", 5), ("", 77)]
    deltas = [delta for text, token in pieces for delta in harmony.push(text, token)] + harmony.finish()
    assert deltas == [Delta("reasoning", "Well."), Delta("content", "Yes.")]


@pytest.mark.parametrize(
    ("template", "family"),
    [
        ("<tool_call>", "hermes"),
        ("<tool_call><function=f><parameter=p>", "qwen3_coder"),
        ("<tool_call><arg_key>", "glm45"),
        ("<minimax:tool_call>", "minimax_m2"),
        ("<|tool_call_begin|>", "kimi_k2"),
        ("<｜tool▁calls▁begin｜> ```json", "deepseek_v3"),  # noqa: RUF001
        ("<｜tool▁calls▁begin｜>", "deepseek_v31"),  # noqa: RUF001
        ("[TOOL_CALLS] [ARGS]", "mistral_args"),
        ("[TOOL_CALLS]", "mistral"),
        ("<|tool_call|>", "granite"),
        ('ipython "parameters":', "llama3"),
        ("<|channel|>", "harmony"),
        ("says nothing of calls", "hermes"),
    ],
)
def test_the_chat_template_tells_the_family(template: str, family: str) -> None:
    found = read(parser(template, tools=TOOLS), [CALLS_OF[family]])
    assert calls_in(found) == [PARIS, NOW]


@pytest.mark.parametrize(
    "reply",
    [
        "<tool_call>{}</tool_call>",
        '<tool_call>{"name": 3}</tool_call>',
        '<tool_call>{"name": "weather", "arguments": [1]}</tool_call>',
        '<tool_call>{"name": "weather", "arguments": {"days": NaN}}</tool_call>',
        '<tool_call>{"name": "unknown", "arguments": {}}</tool_call>',
        '<tool_call>{"name": "weather", "argum',
        "<tool_call>" + "[" * 5000 + "</tool_call>",
        "<tool_call><tool_call><tool_call>",
        "</tool_call>",
    ],
)
def test_what_is_malformed_is_content(reply: str) -> None:
    for pieces in ([reply], list(reply)):
        assert read(parser(tools=TOOLS, tool_format="hermes"), pieces) == [Delta("content", reply)]


def test_a_call_after_a_malformed_one() -> None:
    good = '<tool_call>{"name": "now", "arguments": {}}</tool_call>'
    deltas = read(parser(tools=TOOLS, tool_format="hermes"), list(f"<tool_call>oh</tool_call>{good}"))
    assert deltas == [Delta("content", "<tool_call>oh</tool_call>"), Delta("tool_call", "{}", 0, "now")]


def test_an_end_within_a_string_is_none() -> None:
    reply = '<tool_call>{"name": "weather", "arguments": {"city": "</tool_call>"}}</tool_call>'
    for pieces in ([reply], list(reply)):
        assert calls_in(read(parser(tools=TOOLS), pieces)) == [("weather", '{"city": "</tool_call>"}')]


def test_without_tools_nothing_is_a_call() -> None:
    for family in (*CALLS, "harmony"):
        assert not calls_in(read(parser(tool_format=family), [CALLS_OF[family]]))


def test_arguments_can_be_sent_on() -> None:
    """A lone surrogate, which JSON can write and UTF-8 cannot, stays escaped; a string of JSON is the object it holds."""
    reply = r'<tool_call>{"name": "weather", "arguments": "{\"city\": \"\\ud800 é\"}"}</tool_call>'
    (call,) = read(parser(tools=TOOLS), [reply])
    assert call.text.encode() and json.loads(call.text) == {"city": "\ud800 é"}


def test_plain_elements_follow_the_schema() -> None:
    reply = CALLS_OF["glm45"].replace("Paris", "75001").replace("<arg_value>2<", "<arg_value>two<")
    deltas = read(parser(tools=TOOLS, tool_format="glm45"), [reply])
    assert calls_in(deltas)[0] == ("weather", '{"city": "75001", "days": "two"}')


def test_names_that_are_unknown() -> None:
    with pytest.raises(InvalidArgumentError, match="tool_format: found 'klingon'"):
        parser(tools=TOOLS, tool_format="klingon")
    with pytest.raises(InvalidArgumentError, match="reasoning: found 'deep'"):
        parser(reasoning="deep")
