"""Which way of writing calls and reasoning a model has, by its chat template."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from edgert.errors import InvalidArgumentError
from edgert.structured.families import deepseek, elements, granite, harmony, hermes, kimi, llama, mistral
from edgert.structured.families.format import CallFormat

if TYPE_CHECKING:
    from edgert.tokenizer import Tokenizer

HARMONY = "harmony"
CALLS: Mapping[str, CallFormat] = {
    one.name: one
    for one in (
        elements.QWEN_CODER,
        elements.GLM,
        elements.MINIMAX,
        kimi.FORMAT,
        deepseek.FENCED,
        deepseek.PLAIN,
        mistral.ONE,
        mistral.LIST,
        granite.FORMAT,
        hermes.FORMAT,
        llama.FORMAT,
    )
}
# What a template that writes calls of a kind says; the first that fits counts.
_CALLS_SAY = (
    ("qwen3_coder", ("<function=", "<parameter=")),
    ("glm45", ("<tool_call>", "<arg_key>")),
    ("minimax_m2", ("<minimax:tool_call>",)),
    ("kimi_k2", (kimi.FORMAT.markers[0],)),
    ("deepseek_v3", (*deepseek.FENCED.begins, "```json")),
    ("deepseek_v31", deepseek.PLAIN.begins),
    ("mistral_args", ("[TOOL_CALLS]", "[ARGS]")),
    ("mistral", ("[TOOL_CALLS]",)),
    ("granite", ("<|tool_call|>",)),
    ("hermes", ("<tool_call>",)),
    ("llama3", ('"parameters":', "ipython")),
)
REASONING: Mapping[str, tuple[str, str]] = {
    "think": ("<think>", "</think>"),
    "mistral": ("[THINK]", "[/THINK]"),
    "seed": ("<seed:think>", "</seed:think>"),
    "kimi": ("◁think▷", "◁/think▷"),
    "thought": ("<thought>", "</thought>"),
    "cohere": ("<|START_THINKING|>", "<|END_THINKING|>"),
}


def _template(tokenizer: "Tokenizer") -> str:
    return "" if tokenizer.chat_template is None else tokenizer.chat_template.source


def is_harmony(tokenizer: "Tokenizer", tool_format: str, reasoning: str) -> bool:
    if HARMONY in (tool_format, reasoning):
        return True
    return tool_format == "auto" and harmony.CHANNEL in _template(tokenizer)


def call_format(tokenizer: "Tokenizer", name: str) -> CallFormat | None:
    """By name, or "auto": that of the chat template, "hermes" where it says nothing of calls; "none" is None. Raises
    InvalidArgumentError for an unknown name."""
    if name == "none":
        return None
    if name == "auto":
        template = _template(tokenizer)
        fitting = (one for one, words in _CALLS_SAY if all(word in template for word in words))
        return CALLS[next(fitting, "hermes")]
    if name not in CALLS:
        raise InvalidArgumentError(
            f"tool_format: found {name!r:.60}, allowed are auto, none, {HARMONY}, {', '.join(CALLS)}"
        )
    return CALLS[name]


def reasoning_tags(tokenizer: "Tokenizer", name: str) -> tuple[str, str] | None:
    """What opens and closes reasoning; by name, or "auto": that of the chat template; "none" is None. Raises
    InvalidArgumentError for an unknown name."""
    if name == "none":
        return None
    if name == "auto":
        template = _template(tokenizer)
        return next((tags for tags in REASONING.values() if all(tag in template for tag in tags)), None)
    if name not in REASONING:
        raise InvalidArgumentError(
            f"reasoning: found {name!r:.60}, allowed are auto, none, {HARMONY}, {', '.join(REASONING)}"
        )
    return REASONING[name]


def opened_by(prompt: str, tags: tuple[str, str] | None) -> bool:
    """Whether `prompt` ends inside reasoning."""
    return tags is not None and prompt.rstrip().endswith(tags[0])
