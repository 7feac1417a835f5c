"""POST /v1/completions."""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from starlette.requests import Request

from edgert.errors import ContextLengthError, InvalidArgumentError
from edgert.scoring import score
from edgert.server.models import LoadedModel
from edgert.server.openai_fields import refused
from edgert.server.openai_http import Reply, dumps
from edgert.server.openai_logprobs import CompletionLogprobs
from edgert.server.openai_work import (
    Jobs,
    Usage,
    Work,
    adapter_of,
    check_length,
    constraint_maker,
    fingerprint,
    new_id,
    sampling_of,
    texts_of,
    too_long,
)
from edgert.server.state import ServerState
from edgert.server.threads import on_thread

if TYPE_CHECKING:
    from edgert.adapters import AdapterChoice
    from edgert.generation import Piece
    from edgert.model import Model
    from edgert.prompts import Prompts

_MAX_TOKENS = 16  # where the request does not say, as OpenAI's


@dataclass(frozen=True)
class _Prompt:
    text: str
    tokens: list[int]


@dataclass
class _Choice:
    index: int
    prompt: _Prompt
    logprobs: CompletionLogprobs | None
    texts: list[str] = field(default_factory=list)
    finish_reason: str | None = None

    def push(self, piece: "Piece") -> None:
        self.texts.append(piece.text)
        self.finish_reason = piece.finish_reason
        if self.logprobs is not None and piece.token is not None and piece.logprob is not None:
            self.logprobs.add(piece.token, (piece.logprob, piece.top_logprobs or []))

    def take(self) -> dict[str, Any]:
        """What came since the last time, as OpenAI has it."""
        text = "".join(self.texts)
        self.texts.clear()
        return {
            "index": self.index,
            "text": text,
            "logprobs": None if self.logprobs is None else self.logprobs.take(),
            "finish_reason": self.finish_reason,
        }


async def completions(state: ServerState, request: Request, fields: Mapping[str, Any], reply: Reply) -> None:
    async with state.acquire(fields.get("model")) as loaded:
        model, adapter = loaded.model, adapter_of(fields, loaded)
        wanted = fields.get("max_tokens", _MAX_TOKENS)
        texts = await texts_of(loaded, adapter)
        sampling = sampling_of(fields, model, texts, wanted or 1, fields.get("logprobs"))
        prompts = await on_thread(_prompts, texts, fields["prompt"], wanted)
        choices = _choices(texts, prompts, fields)
        if fields.get("echo"):
            await _echo(model, adapter, choices, fields)
        n = fields.get("n", 1)
        make = constraint_maker(texts, fields)
        works = [
            Work(choice.prompt.tokens, sampling, choice.index % n, primed=True, constraint=make)
            for choice in choices
            if wanted
        ]
        head = _head(fields, loaded)
        if not works:
            for choice in choices:
                choice.finish_reason = "length"
        async with Jobs(loaded, adapter, works, state.metrics) as jobs:
            if not works:
                jobs.usage.prompt_tokens = sum(len(prompt.tokens) for prompt in prompts)
            if fields.get("stream"):
                await _stream(reply, jobs, choices, head, fields.get("stream_options", {}))
                return
            async for batch in jobs.batches():
                for index, piece in batch:
                    choices[index].push(piece)
            made = [choice.take() for choice in choices]
        await reply.json(
            {**head, "choices": made, "usage": jobs.usage.chat()}, large=bool(fields.get("echo"))
        )


async def _stream(
    reply: Reply, jobs: Jobs, choices: Sequence[_Choice], head: Mapping[str, Any], options: Mapping[str, Any]
) -> None:
    await reply.begin_events()
    counted = bool(options.get("include_usage"))
    if counted:
        head = {**head, "usage": None}

    def chunk(choice: _Choice) -> str:
        return f"data: {dumps({**head, 'choices': [choice.take()]})}\n\n"

    begun = [choice for choice in choices if choice.texts or choice.finish_reason]
    if begun:  # the echo, or all where nothing is to be drawn
        await reply.event("".join(map(chunk, begun)))
    async for batch in jobs.batches():
        events = []
        for index, piece in batch:
            choices[index].push(piece)
            events.append(chunk(choices[index]))
        await reply.event("".join(events))
    await reply.event(last_events(head, jobs.usage if counted else None))
    await reply.end()


def last_events(head: Mapping[str, Any], usage: Usage | None) -> str:
    done = "data: [DONE]\n\n"
    if usage is None:
        return done
    return f"data: {dumps({**head, 'choices': [], 'usage': usage.chat()})}\n\n{done}"


def _head(fields: Mapping[str, Any], loaded: LoadedModel) -> dict[str, Any]:
    return {
        "id": new_id("cmpl-"),
        "object": "text_completion",
        "created": int(time.time()),
        "model": loaded.id,
        "system_fingerprint": fingerprint(loaded.model),
    }


def _choices(texts: "Prompts", prompts: Sequence[_Prompt], fields: Mapping[str, Any]) -> list[_Choice]:
    n = fields.get("n", 1)
    wanted = "logprobs" in fields
    return [
        _Choice(place * n + index, prompt, CompletionLogprobs(texts.tokenizer) if wanted else None)
        for place, prompt in enumerate(prompts)
        for index in range(n)
    ]


def _prompts(texts: "Prompts", given: str | list[Any], wanted: int) -> list[_Prompt]:
    """One or several, each as text or as token ids. With nothing to be drawn a prompt may fill the context."""
    several = isinstance(given, list) and not isinstance(given[0], int)
    prompts = []
    for place, one in enumerate(given if several else [given]):
        param = f"prompt[{place}]" if several else "prompt"
        text = one if isinstance(one, str) else texts.tokenizer.decode(one)
        if isinstance(one, list):
            check_length(len(one) - (wanted == 0), texts, param)
        try:
            prompt = _Prompt(text, texts.prompt_tokens(one))
        except ContextLengthError as error:
            raise too_long(error, texts, param) from None
        except InvalidArgumentError as error:
            raise refused(f"{param}: {error}", param) from None
        check_length(len(prompt.tokens) - (wanted == 0), texts, param)
        prompts.append(prompt)
    return prompts


async def _echo(
    model: "Model", adapter: "AdapterChoice", choices: Sequence[_Choice], fields: Mapping[str, Any]
) -> None:
    """Begin every choice with its prompt and, where wanted, with the log-probabilities of it."""
    for choice in choices:
        choice.texts.append(choice.prompt.text)
    if "logprobs" not in fields:
        return
    left = threading.Event()
    n = fields.get("n", 1)
    try:
        for first in range(0, len(choices), n):
            same = choices[first : first + n]
            await on_thread(_score, model, adapter, same, fields["logprobs"], left.is_set)
    finally:
        left.set()


def _score(
    model: "Model",
    adapter: "AdapterChoice",
    choices: Sequence[_Choice],
    top: int,
    stopped: Callable[[], bool],
) -> None:
    """The prompt that these choices share."""
    tokens = choices[0].prompt.tokens
    scored = score(model, tokens, top, adapter=adapter, stopped=stopped)
    for choice in choices:
        assert choice.logprobs is not None
        for token, known in zip(tokens, scored, strict=True):
            choice.logprobs.add(token, known)
