"""The form that a request asks its reply to take, as one grammar."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from edgert.errors import InvalidArgumentError, UnsupportedError
from edgert.structured.call_forms import begun, call_rules
from edgert.structured.constraint import Constraint
from edgert.structured.families.harmony import CHANNEL, MESSAGE, SYNTAX, start_rules
from edgert.structured.formats import call_format, is_harmony, opened_by, reasoning_tags
from edgert.structured.forms import grammar_text, quoted, schema_form
from edgert.structured.tools import Tool, chosen, tools_of

if TYPE_CHECKING:
    from edgert.prompts import Prompts
    from edgert.tokenizer import Tokenizer

_ANY_TEXT = "/(?s:.*)/"
Literal = Callable[[str], str]


def constraint_of(
    texts: "Prompts",
    *,
    response_format: Mapping[str, Any] | None = None,
    tools: Sequence[Mapping[str, Any]] | None = None,
    tool_choice: str | Mapping[str, Any] | None = None,
    parallel_tool_calls: bool = True,
    grammar: str | Mapping[str, Any] | None = None,
    prompt: str = "",
    reasoning: str = "auto",
    tool_format: str = "auto",
) -> Constraint | None:
    """The form that a request asks its reply to take; None where it asks for none. `texts`: a model, or Model.prompts(). Made anew for each of n choices.

    `response_format`: OpenAI's {"type": "text" | "json_object"} or {"type": "json_schema", "json_schema": {"schema": ...}};
    `tools` and `tool_choice` (None, "none", "auto", "required", {"type": "function", "function": {"name": ...}}): OpenAI's;
    `grammar`: Lark's text, or {"type": "lark" | "regex" | "choice" | "json_schema", "value": ...}.
    `prompt`, `reasoning` and `tool_format` as for ReplyParser.of(): reasoning stays free, the form holds what follows it.

    Bounded in time and memory; blocks for up to some seconds, so call it off the event loop. Raises InvalidArgumentError
    for what is malformed or asks for two forms at once, UnsupportedError for what is too large or has no support here.
    """
    functions = tools_of(tools)
    choice, among = chosen(functions, tool_choice)
    forced = choice in ("required", "named")
    body = form_of_response(response_format)
    if forced:
        body = None  # that is the content's, and such a reply has none
    asked = [
        name
        for name, wanted in (
            ("response_format", body is not None),
            ("grammar", grammar is not None),
            ("tool_choice", forced),
        )
        if wanted
    ]
    if len(asked) > 1:
        raise InvalidArgumentError(f"{asked[0]} and {asked[1]}: a reply has one form")
    from edgert.structured.grammar import vocabulary_of

    if grammar is not None:
        is_json = isinstance(grammar, Mapping) and grammar.get("type") == "json_schema"
        return vocabulary_of(texts).constraint(grammar_text(grammar), "grammar", json=is_json)
    calls: list[str] | None = None
    if forced or (choice == "auto" and (body is not None or any(tool.strict for tool in among))):
        many = parallel_tool_calls and choice != "named"
        calls = _call_rules(texts, among, tool_format, reasoning, many, forced, beside_text=body is None)
    if body is None and calls is None:
        return None
    literal = _literals(texts.tokenizer)
    rules = calls or []
    if body is not None:
        if is_harmony(texts.tokenizer, tool_format, reasoning):
            body = f"{literal(f'{CHANNEL}final{MESSAGE}')} {body}"
        if calls is not None:
            rules = ["body: answer | called", calls[0].replace("body:", "called:", 1), *calls[1:]]
        rules = [*rules, f"{'body' if calls is None else 'answer'}: {body}"]
    start = _after_reasoning(texts.tokenizer, prompt, reasoning, tool_format, literal)
    where = "tools" if calls is not None else "response_format"
    return vocabulary_of(texts).constraint("\n".join([*start, *rules]) + "\n", where, json=True)


def form_of_response(given: Mapping[str, Any] | None) -> str | None:
    """What `response_format` asks for, as the right side of a rule. Raises InvalidArgumentError."""
    if given is None:
        return None
    kind = given.get("type") if isinstance(given, Mapping) else None
    if kind == "text":
        return None
    if kind == "json_object":
        return schema_form({"type": "object"}, "response_format")
    if kind == "json_schema":
        described = given.get("json_schema")
        if not isinstance(described, Mapping) or "schema" not in described:
            raise InvalidArgumentError(
                'response_format: json_schema: allowed is {"name", "schema", "strict"}'
            )
        lenient = described.get("strict") is False
        return schema_form(described["schema"], "response_format: json_schema: schema", lenient=lenient)
    raise InvalidArgumentError(
        f"response_format: type: found {kind!r:.60}, allowed are text, json_object and json_schema"
    )


def _call_rules(
    texts: "Prompts",
    tools: Sequence[Tool],
    tool_format: str,
    reasoning: str,
    many: bool,
    forced: bool,
    *,
    beside_text: bool,
) -> list[str] | None:
    """The rule `body` for calls of `tools`, first; None where nothing is to be held. Where they are not `forced`, they may stand
    `beside_text` that is free, or in place of an answer in a form; not so those that look like either at their beginning."""
    tokenizer = texts.tokenizer
    literal = _literals(tokenizer)
    if is_harmony(tokenizer, tool_format, reasoning):
        return None if beside_text and not forced else call_rules(SYNTAX, tools, literal, many=False)
    written = call_format(tokenizer, tool_format)
    if written is None and forced:
        raise UnsupportedError("tool_choice: calls are turned off (tool_format none)")
    if written is None or (written.bare and not forced):
        return None
    if forced or not beside_text:
        return call_rules(written.syntax, tools, literal, many=many)
    # Text is free until a call begins, and after it.
    trigger = written.begins[0]
    text = f"free: {_ANY_TEXT}"
    if trigger in tokenizer.special_tokens():
        told = f"told: free {literal(trigger)}"
    else:
        told = f"told[suffix={quoted(trigger)}]: {_ANY_TEXT}"
    rest = call_rules(begun(written.syntax, trigger), tools, literal, many=many and bool(written.syntax.open))
    repeat = "*" if many else "?"
    return [
        f"body: (told called){repeat} free",
        text,
        told,
        rest[0].replace("body:", "called:", 1),
        *rest[1:],
    ]


def _literals(tokenizer: "Tokenizer") -> Literal:
    """Text in Lark's words: special tokens by their ids, the rest as it is."""
    special = tokenizer.special_tokens()

    def literal(text: str) -> str:
        parts = []
        while text:
            found = min(
                ((text.find(name), -len(name), name) for name in special if name in text), default=None
            )
            before, name = (text, "") if found is None else (text[: found[0]], found[2])
            if before:
                parts.append(quoted(before))
            if name:
                parts.append(f"<[{special[name]}]>")
            text = text[len(before) + len(name) :]
        return " ".join(parts)

    return literal


def _after_reasoning(
    tokenizer: "Tokenizer", prompt: str, reasoning: str, tool_format: str, literal: Literal
) -> list[str]:
    """The rule `start`: reasoning, if the model has it, then `body`."""
    if is_harmony(tokenizer, tool_format, reasoning):
        return start_rules(literal)
    tags = reasoning_tags(tokenizer, reasoning)
    if tags is None or prompt.rstrip().endswith(tags[1]):
        return ["start: body"]
    opens, closes = tags
    if closes in tokenizer.special_tokens():
        rest = f"rest: {_ANY_TEXT} {literal(closes)} gap"
    else:
        rest = f"rest: untold gap\nuntold[suffix={quoted(closes)}]: {_ANY_TEXT}"
    rest += "\ngap: /\\n{0,2}/"
    if opened_by(prompt, tags):
        return ["start: rest body", rest]
    return ["start: thought? body", f"thought: {literal(opens)} rest", rest]
