"""The OpenAPI document: requests as they are checked, replies as they are made."""

import re
from dataclasses import dataclass
from typing import Any

import edgert
from edgert.server.openai_fields import (
    AnyOf,
    Anything,
    Choice,
    Kind,
    ListOf,
    MapOf,
    Number,
    Object,
    Text,
    whole,
)
from edgert.server.openai_requests import CHAT, COMPLETION, EMBEDDING, MAX_SCALE, RESPONSE

_ANY = Anything(False)


def _all(fields: dict[str, Kind], *optional: str, name: str | None = None, closed: bool = True) -> Object:
    """An object of which all but `optional` is always there."""
    required = [field for field in fields if field not in optional]
    return Object(fields, required, name, None if closed else _ANY)


class _OrNull(Kind):
    def __init__(self, kind: Kind) -> None:
        self._kind = kind
        self.types = kind.types | {type(None)}

    def check(self, value: Any, where: str) -> Any:
        return None if value is None else self._kind.check(value, where)

    def schema(self) -> dict[str, Any]:
        return {"anyOf": [self._kind.schema(), {"type": "null"}]}

    def allowed(self) -> str:
        return f"{self._kind.allowed()}, or null"


_COUNT = whole(0)
_USAGE = _all(
    {
        "prompt_tokens": _COUNT,
        "completion_tokens": _COUNT,
        "total_tokens": _COUNT,
        "prompt_tokens_details": _all({"cached_tokens": _COUNT}),
        "completion_tokens_details": _all({"reasoning_tokens": _COUNT}),
    }
)
_HEAD: dict[str, Kind] = {"id": Text(1), "created": _COUNT, "model": Text(1), "system_fingerprint": Text(1)}
_SCORED: dict[str, Kind] = {"token": Text(), "logprob": Number(None, 0), "bytes": ListOf(whole(0, 255))}
_ENTRY = _all({**_SCORED, "top_logprobs": ListOf(_all(_SCORED))})
_CALL = _all(
    {"id": Text(1), "type": Choice("function"), "function": _all({"name": Text(), "arguments": Text()})}
)
_MESSAGE = _all(
    {
        "role": Choice("assistant"),
        "content": _OrNull(Text()),
        "refusal": _OrNull(Text()),
        "reasoning_content": Text(),
        "tool_calls": ListOf(_CALL, 1),
    },
    "reasoning_content",
    "tool_calls",
)
_CHAT_CHOICE = _all(
    {
        "index": _COUNT,
        "message": _MESSAGE,
        "logprobs": _OrNull(_all({"content": ListOf(_ENTRY), "refusal": _OrNull(ListOf(_ENTRY))})),
        "finish_reason": Choice("stop", "length", "tool_calls"),
    }
)
CHAT_REPLY = _all(
    {**_HEAD, "object": Choice("chat.completion"), "choices": ListOf(_CHAT_CHOICE, 1), "usage": _USAGE},
    name="ChatCompletion",
)
_COMPLETION_LOGPROBS = _all(
    {
        "tokens": ListOf(Text()),
        "token_logprobs": ListOf(_OrNull(Number(None, 0))),
        "top_logprobs": ListOf(_OrNull(MapOf(Number(None, 0), 101))),
        "text_offset": ListOf(_COUNT),
    }
)
_TEXT_CHOICE = _all(
    {
        "index": _COUNT,
        "text": Text(),
        "logprobs": _OrNull(_COMPLETION_LOGPROBS),
        "finish_reason": Choice("stop", "length"),
    }
)
COMPLETION_REPLY = _all(
    {**_HEAD, "object": Choice("text_completion"), "choices": ListOf(_TEXT_CHOICE, 1), "usage": _USAGE},
    name="Completion",
)
MODEL = _all(
    {
        "id": Text(1),
        "object": Choice("model"),
        "created": _COUNT,
        "owned_by": Text(),
        "parent": _OrNull(Text()),
        "state": Choice("unloaded", "loading", "ready", "failed"),
    },
    name="Model",
)
MODELS = _all({"object": Choice("list"), "data": ListOf(MODEL)}, name="ModelList")
_EMBEDDING = _all(
    {"object": Choice("embedding"), "index": _COUNT, "embedding": AnyOf(Text(1), ListOf(Number(), 1))}
)
EMBEDDING_REPLY = _all(
    {
        "object": Choice("list"),
        "data": ListOf(_EMBEDDING, 1),
        "model": Text(1),
        "usage": _all({"prompt_tokens": _COUNT, "total_tokens": _COUNT}),
    },
    name="EmbeddingList",
)
_ITEM = _all(
    {
        "id": Text(1),
        "type": Choice("message", "reasoning", "function_call"),
        "status": Choice("completed", "incomplete", "in_progress"),
    },
    closed=False,
)
RESPONSE_REPLY = _all(
    {
        "id": Text(1),
        "object": Choice("response"),
        "created_at": _COUNT,
        "status": Choice("completed", "incomplete"),
        "model": Text(1),
        "output": ListOf(_ITEM),
        "usage": _all(
            {
                "input_tokens": _COUNT,
                "output_tokens": _COUNT,
                "total_tokens": _COUNT,
                "input_tokens_details": _all({"cached_tokens": _COUNT, "cache_write_tokens": _COUNT}),
                "output_tokens_details": _all({"reasoning_tokens": _COUNT}),
            }
        ),
    },
    name="Response",
    closed=False,
)
ERROR = _all(
    {"error": _all({"message": Text(1), "type": Text(1), "param": _OrNull(Text()), "code": _OrNull(Text())})},
    name="Error",
)

_STATUS = _all({"status": Text(1), "message": Text()}, "message", name="Status")
_STATISTICS = Object({}, (), "Statistics", _ANY)
_ADAPTERS = ListOf(
    _all(
        {
            "id": _COUNT,
            "name": Text(1),
            "path": Text(1),
            "kind": Text(1),
            "scale": Number(),
        }
    )
)
_SCALES = ListOf(Object({"id": _COUNT, "scale": Number(-MAX_SCALE, MAX_SCALE)}, ["id", "scale"]))


@dataclass(frozen=True)
class _Route:
    path: str
    method: str
    summary: str
    request: Kind | None
    reply: Kind | None  # None: text
    streams: bool = False
    of_model: bool = False  # ?model=NAME


_ROUTES = (
    _Route("/v1/chat/completions", "post", "answer a conversation", CHAT, CHAT_REPLY, streams=True),
    _Route("/v1/completions", "post", "continue a text", COMPLETION, COMPLETION_REPLY, streams=True),
    _Route("/v1/embeddings", "post", "embed texts", EMBEDDING, EMBEDDING_REPLY),
    _Route("/v1/responses", "post", "answer, as items", RESPONSE, RESPONSE_REPLY, streams=True),
    _Route("/v1/models", "get", "the models that a request may name", None, MODELS),
    _Route("/v1/models/{id}", "get", "one of them", None, MODEL),
    _Route("/lora-adapters", "get", "the adapters of a model", None, _ADAPTERS, of_model=True),
    _Route("/lora-adapters", "post", "turn adapters on and off", _SCALES, _ADAPTERS, of_model=True),
    _Route("/health", "get", "whether the process answers", None, _STATUS),
    _Route("/ready", "get", "whether it takes requests", None, _STATUS),
    _Route("/stats", "get", "what the daemon does, for people and programs", None, _STATISTICS),
    _Route("/metrics", "get", "the same for Prometheus", None, None),
)
_EVENT = {
    "type": "object",
    "description": "one event; `data` holds a chunk's JSON, an error's, or [DONE]",
    "properties": {"event": {"type": "string"}, "data": {"type": "string"}},
    "required": ["data"],
}
_FAILURES = {
    "400": "the request is not as it should be; `param` names the place",
    "401": "a key is needed",
    "403": "this host or origin may not ask",
    "404": "no such model or adapter",
    "408": "the body took too long",
    "413": "the body is too large",
    "503": "no room now; Retry-After says when to ask again",
}


def document() -> dict[str, Any]:
    """OpenAPI 3.1."""
    components: dict[str, Any] = {}
    paths: dict[str, Any] = {}
    for route in _ROUTES:
        paths.setdefault(route.path, {})[route.method] = _operation(components, route)
    return {
        "openapi": "3.1.0",
        "info": {"title": "edgert", "version": edgert.__version__},
        "paths": paths,
        "components": {
            "schemas": dict(sorted(components.items())),
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],
    }


def _operation(components: dict[str, Any], route: _Route) -> dict[str, Any]:
    name = re.sub(r"[^a-z]+", "_", route.path.removeprefix("/v1")).strip("_")
    operation: dict[str, Any] = {
        "summary": route.summary,
        "operationId": f"{route.method}_{name}",
        "responses": _replies(components, route),
    }
    if "{id}" in route.path:
        schema = {"type": "string", "minLength": 1}
        operation["parameters"] = [{"name": "id", "in": "path", "required": True, "schema": schema}]
    if route.of_model:
        operation["parameters"] = [{"name": "model", "in": "query", "schema": {"type": "string"}}]
    if route.request is not None:
        content = {"application/json": {"schema": _reference(components, route.request)}}
        operation["requestBody"] = {"required": True, "content": content}
    return operation


def _replies(components: dict[str, Any], route: _Route) -> dict[str, Any]:
    content: dict[str, Any] = {"text/plain": {"schema": {"type": "string"}}}
    if route.reply is not None:
        content = {"application/json": {"schema": _reference(components, route.reply)}}
    if route.streams:
        content["text/event-stream"] = {"schema": _EVENT}
    failure = {"application/json": {"schema": _reference(components, ERROR)}}
    replies = {"200": {"description": "done", "content": content}}
    replies |= {status: {"description": text, "content": failure} for status, text in _FAILURES.items()}
    if route.reply is _STATUS:
        replies["503"] = {"description": "it does not, and why", "content": content}
    return replies


def _reference(components: dict[str, Any], kind: Kind) -> dict[str, Any]:
    if not isinstance(kind, Object) or kind.name is None:
        return kind.schema()
    components[kind.name] = kind.schema()
    return {"$ref": f"#/components/schemas/{kind.name}"}
