"""POST /v1/chat/completions."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from starlette.requests import Request

from edgert.server.openai_completions import last_events
from edgert.server.openai_fields import refused
from edgert.server.openai_http import Reply, dumps
from edgert.server.openai_logprobs import entry
from edgert.server.openai_messages import Conversation, Prompt, conversation_of, prompt_of
from edgert.server.openai_work import (
    Jobs,
    Work,
    adapter_of,
    constraint_maker,
    fingerprint,
    new_id,
    sampling_of,
    texts_of,
)
from edgert.server.state import ServerState
from edgert.server.threads import on_thread
from edgert.structured import Delta, ReplyParser

if TYPE_CHECKING:
    from edgert.generation import Piece
    from edgert.prompts import Prompts


@dataclass
class Answer:
    """One choice as it comes: pieces in, the parts of a message out."""

    texts: "Prompts"
    parser: ReplyParser
    wants_logprobs: bool
    content: list[str] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    calls: list[dict[str, Any]] = field(default_factory=list)
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    reasoning_tokens: int = 0
    finish_reason: str | None = None

    def push(self, piece: "Piece") -> tuple[list[Delta], list[dict[str, Any]]]:
        """What a piece adds: parts, and log-probabilities where they are wanted."""
        deltas = self.parser.push(piece.text, piece.token)
        if piece.finish_reason is not None:
            deltas = [*deltas, *self.parser.finish()]
        for delta in deltas:
            self._add(delta)
        if any(delta.kind == "reasoning" for delta in deltas):
            self.reasoning_tokens += 1
        if piece.finish_reason is not None:
            called = self.calls and piece.finish_reason == "stop"
            self.finish_reason = "tool_calls" if called else piece.finish_reason
        ended = piece.finish_reason == "stop" and piece.token in self.texts.eos_token_ids
        if not self.wants_logprobs or piece.token is None or ended:
            return deltas, []
        self.logprobs.append(entry(self.texts.tokenizer, piece))
        return deltas, self.logprobs[-1:]

    def _add(self, delta: Delta) -> None:
        if delta.kind == "content":
            self.content.append(delta.text)
        elif delta.kind == "reasoning":
            self.reasoning.append(delta.text)
        else:
            call = {"name": delta.name or "", "arguments": delta.text}
            self.calls.append({"id": delta.id or new_id("call_"), "type": "function", "function": call})

    def message(self) -> dict[str, Any]:
        content = "".join(self.content)
        message: dict[str, Any] = {
            "role": "assistant",
            "content": None if self.calls and not content else content,
            "refusal": None,
        }
        if self.reasoning:
            message["reasoning_content"] = "".join(self.reasoning)
        if self.calls:
            message["tool_calls"] = self.calls
        return message


def answers_of(
    texts: "Prompts", conversation: Conversation, prompt: Prompt, count: int, wants_logprobs: bool
) -> list[Answer]:
    return [
        Answer(texts, ReplyParser.of(texts, prompt=prompt.text, tools=conversation.tools), wants_logprobs)
        for _ in range(count)
    ]


async def chat(state: ServerState, request: Request, fields: Mapping[str, Any], reply: Reply) -> None:
    conversation = conversation_of(fields)
    wants_logprobs = bool(fields.get("logprobs"))
    if "top_logprobs" in fields and not wants_logprobs:
        raise refused("top_logprobs: is given without logprobs: true", "top_logprobs")
    async with state.acquire(fields.get("model")) as loaded:
        model = loaded.model
        most = fields.get("max_completion_tokens", fields.get("max_tokens"))
        adapter = adapter_of(fields, loaded)
        texts = await texts_of(loaded, adapter)
        top = fields.get("top_logprobs", 0) if wants_logprobs else None
        sampling = sampling_of(fields, model, texts, most, top)
        prompt = await on_thread(prompt_of, texts, conversation, "messages")
        make = constraint_maker(texts, fields, conversation, prompt.text)
        count = fields.get("n", 1)
        works = [Work(prompt.tokens, sampling, index, constraint=make) for index in range(count)]
        answers = answers_of(texts, conversation, prompt, count, wants_logprobs)
        head = {
            "id": new_id("chatcmpl-"),
            "object": "chat.completion.chunk" if fields.get("stream") else "chat.completion",
            "created": int(time.time()),
            "model": loaded.id,
            "system_fingerprint": fingerprint(model),
        }
        async with Jobs(loaded, adapter, works, state.metrics) as jobs:
            if fields.get("stream"):
                await _stream(reply, jobs, answers, head, fields.get("stream_options", {}))
                return
            async for batch in jobs.batches():
                for index, piece in batch:
                    answers[index].push(piece)
        jobs.usage.reasoning_tokens = sum(answer.reasoning_tokens for answer in answers)
        choices = [
            {
                "index": index,
                "message": answer.message(),
                "logprobs": {"content": answer.logprobs, "refusal": None} if wants_logprobs else None,
                "finish_reason": answer.finish_reason,
            }
            for index, answer in enumerate(answers)
        ]
        await reply.json({**head, "choices": choices, "usage": jobs.usage.chat()})


async def _stream(
    reply: Reply, jobs: Jobs, answers: Sequence[Answer], head: Mapping[str, Any], options: Mapping[str, Any]
) -> None:
    await reply.begin_events()
    counted = bool(options.get("include_usage"))
    if counted:
        head = {**head, "usage": None}
    chunks = _Chunks(head)
    await reply.event(
        "".join(chunks.of(index, {"role": "assistant", "content": ""}) for index in range(len(answers)))
    )
    async for batch in jobs.batches():
        events: list[str] = []
        for index, piece in batch:
            answer = answers[index]
            deltas, logprobs = answer.push(piece)
            events += _events(chunks, index, answer, deltas, logprobs)
            if answer.finish_reason is not None:
                events.append(chunks.of(index, {}, None, answer.finish_reason))
        if events:
            await reply.event("".join(events))
    jobs.usage.reasoning_tokens = sum(answer.reasoning_tokens for answer in answers)
    await reply.event(last_events(head, jobs.usage if counted else None))
    await reply.end()


class _Chunks:
    """The events of one stream; what they share is written once."""

    def __init__(self, head: Mapping[str, Any]) -> None:
        self._before = f'data: {dumps(head)[:-1]},"choices":[{{"index":'

    def of(
        self,
        index: int,
        delta: Mapping[str, Any],
        logprobs: list[dict[str, Any]] | None = None,
        finish_reason: str | None = None,
    ) -> str:
        scored = "null" if logprobs is None else dumps({"content": logprobs, "refusal": None})
        reason = "null" if finish_reason is None else f'"{finish_reason}"'
        return f'{self._before}{index},"delta":{dumps(delta)},"logprobs":{scored},"finish_reason":{reason}}}]}}\n\n'


def _events(
    chunks: _Chunks, index: int, answer: Answer, deltas: Sequence[Delta], logprobs: list[dict[str, Any]]
) -> list[str]:
    """One event a part; log-probabilities come with the first, or alone."""
    parts: list[dict[str, Any]] = []
    calls = sum(delta.kind == "tool_call" for delta in deltas)
    for delta in deltas:
        if delta.kind == "content":
            parts.append({"content": delta.text})
        elif delta.kind == "reasoning":
            parts.append({"reasoning_content": delta.text})
        else:
            place = len(answer.calls) - calls
            calls -= 1
            parts.append({"tool_calls": [{"index": place, **answer.calls[place]}]})
    if logprobs and not parts:
        parts.append({"content": ""})
    events = []
    for place, part in enumerate(parts):
        events.append(chunks.of(index, part, logprobs if logprobs and place == 0 else None))
    return events
