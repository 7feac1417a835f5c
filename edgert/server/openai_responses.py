"""POST /v1/responses, in its basic form: nothing is kept between requests."""

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from starlette.requests import Request

from edgert.server import errors
from edgert.server.openai_chat import Answer, answers_of
from edgert.server.openai_http import Reply, dumps
from edgert.server.openai_messages import Conversation, conversation_of, joined, prompt_of
from edgert.server.openai_response_events import ResponseEvents
from edgert.server.openai_work import (
    Jobs,
    Usage,
    Work,
    adapter_of,
    constraint_maker,
    new_id,
    sampling_of,
    texts_of,
)
from edgert.server.state import ServerState
from edgert.server.threads import on_thread

if TYPE_CHECKING:
    from edgert.sampling import Sampling


async def responses(state: ServerState, request: Request, fields: Mapping[str, Any], reply: Reply) -> None:
    asked = as_chat(fields)
    conversation = conversation_of(asked)
    scored = "message.output_text.logprobs" in fields.get("include", ()) or "top_logprobs" in fields
    async with state.acquire(fields.get("model")) as loaded:
        model = loaded.model
        top = fields.get("top_logprobs", 0) if scored else None
        adapter = adapter_of(fields, loaded)
        texts = await texts_of(loaded, adapter)
        sampling = sampling_of(fields, model, texts, fields.get("max_output_tokens"), top)
        prompt = await on_thread(prompt_of, texts, conversation, "input")
        make = constraint_maker(texts, asked, conversation, prompt.text)
        (answer,) = answers_of(texts, conversation, prompt, 1, scored)
        events = ResponseEvents(_head(fields, loaded.id, sampling, conversation))
        works = [Work(prompt.tokens, sampling, constraint=make)]
        async with Jobs(loaded, adapter, works, state.metrics) as jobs:
            if fields.get("stream"):
                await _stream(reply, jobs, answer, events)
                return
            async for batch in jobs.batches():
                for _, piece in batch:
                    events.push(*answer.push(piece))
        events.end(answer.finish_reason, _usage(jobs.usage, answer))
        await reply.json(events.response)


async def _stream(reply: Reply, jobs: Jobs, answer: Answer, events: ResponseEvents) -> None:
    await reply.begin_events()
    await reply.event(_written(events.begin()))
    try:
        async for batch in jobs.batches():
            made: list[dict[str, Any]] = []
            for _, piece in batch:
                made += events.push(*answer.push(piece))
            if made:
                await reply.event(_written(made))
    except Exception as error:
        if not reply.can_fail:
            raise
        told = errors.of(error)
        await reply.event(_written(events.fail(told.code or told.kind, told.message)))
    else:
        await reply.event(_written(events.end(answer.finish_reason, _usage(jobs.usage, answer))))
    await reply.end()


def _written(events: Sequence[Mapping[str, Any]]) -> str:
    return "".join(f"event: {event['type']}\ndata: {dumps(event)}\n\n" for event in events)


def _usage(usage: Usage, answer: Answer) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": answer.reasoning_tokens},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }


def _head(
    fields: Mapping[str, Any], model: str, sampling: "Sampling", conversation: Conversation
) -> dict[str, Any]:
    reasoning = fields.get("reasoning", {})
    return {
        "id": new_id("resp_"),
        "object": "response",
        "created_at": int(time.time()),
        "status": "in_progress",
        "background": False,
        "error": None,
        "incomplete_details": None,
        "instructions": fields.get("instructions"),
        "max_output_tokens": fields.get("max_output_tokens"),
        "metadata": fields.get("metadata", {}),
        "model": model,
        "output": [],
        "parallel_tool_calls": fields.get("parallel_tool_calls", True),
        "previous_response_id": None,
        "reasoning": {"effort": reasoning.get("effort"), "summary": None},
        "service_tier": "default",
        "store": False,
        "temperature": sampling.temperature,
        "text": {"format": fields.get("text", {}).get("format", {"type": "text"})},
        "tool_choice": fields.get("tool_choice", "auto"),
        "tools": fields.get("tools", []),
        "top_logprobs": fields.get("top_logprobs", 0),
        "top_p": sampling.top_p,
        "truncation": "disabled",
        "usage": None,
        "user": fields.get("user"),
    }


# --- the request as one for a chat ------------------------------------------------------------------


def as_chat(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The same request in the fields of /v1/chat/completions, as far as they make the prompt and the form of the reply."""
    given = fields["input"]
    items = [{"type": "message", "role": "user", "content": given}] if isinstance(given, str) else given
    messages = _messages(items)
    if "instructions" in fields:
        messages.insert(0, {"role": "system", "content": fields["instructions"]})
    asked: dict[str, Any] = {"messages": messages}
    for name in ("parallel_tool_calls", "chat_template_kwargs"):
        if name in fields:
            asked[name] = fields[name]
    if "tools" in fields:
        asked["tools"] = [
            {"type": "function", "function": {name: part for name, part in tool.items() if name != "type"}}
            for tool in fields["tools"]
        ]
    choice = fields.get("tool_choice")
    if choice is not None:
        named = isinstance(choice, Mapping)
        asked["tool_choice"] = {"type": "function", "function": {"name": choice["name"]}} if named else choice
    if "effort" in fields.get("reasoning", {}):
        asked["reasoning_effort"] = fields["reasoning"]["effort"]
    form = fields.get("text", {}).get("format")
    if form is not None:
        rest = {name: part for name, part in form.items() if name != "type"}
        asked["response_format"] = {"type": form["type"], **({"json_schema": rest} if rest else {})}
    return asked


def _messages(items: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Items that one answer consists of (reasoning, text, calls) become one message again."""
    messages: list[dict[str, Any]] = []
    answer: dict[str, Any] | None = None
    for item in items:
        kind = item["type"]
        is_answer = kind in ("reasoning", "function_call") or item.get("role") == "assistant"
        if not is_answer:
            answer = None
            messages.append(_other(item))
            continue
        if (
            answer is None
            or (kind == "reasoning" and len(answer) > 1)
            or (kind == "message" and "content" in answer)
        ):
            answer = {"role": "assistant"}
            messages.append(answer)
        if kind == "reasoning":
            parts = item.get("content") or item.get("summary") or []
            answer["reasoning_content"] = joined(parts)
        elif kind == "message":
            answer["content"] = _text(item["content"])
        else:
            call = {"name": item["name"], "arguments": item["arguments"]}
            answer.setdefault("tool_calls", []).append(
                {"id": item["call_id"], "type": "function", "function": call}
            )
    return messages


def _other(item: Mapping[str, Any]) -> dict[str, Any]:
    if item["type"] == "function_call_output":
        return {"role": "tool", "tool_call_id": item["call_id"], "content": _text(item["output"])}
    return {"role": item["role"], "content": _text(item["content"])}


def _text(content: str | Sequence[Mapping[str, Any]]) -> str:
    return content if isinstance(content, str) else joined(content)
