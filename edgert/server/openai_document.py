"""The OpenAPI document: requests as they are checked, replies as they are made."""

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
from edgert.server.openai_requests import CHAT, COMPLETION, EMBEDDING, RESPONSE

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

_ROUTES: tuple[tuple[str, str, str, Object | None, Object, bool], ...] = (
    ("/v1/chat/completions", "post", "answer a conversation", CHAT, CHAT_REPLY, True),
    ("/v1/completions", "post", "continue a text", COMPLETION, COMPLETION_REPLY, True),
    ("/v1/embeddings", "post", "embed texts", EMBEDDING, EMBEDDING_REPLY, False),
    ("/v1/responses", "post", "answer, as items", RESPONSE, RESPONSE_REPLY, True),
    ("/v1/models", "get", "the models that a request may name", None, MODELS, False),
    ("/v1/models/{id}", "get", "one of them", None, MODEL, False),
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
    for path, method, summary, request, reply, streams in _ROUTES:
        operation: dict[str, Any] = {
            "summary": summary,
            "operationId": path.removeprefix("/v1/").replace("/", "_").replace("_{id}", "_one"),
            "responses": _replies(components, reply, streams),
        }
        if "{id}" in path:
            operation["parameters"] = [
                {"name": "id", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
            ]
        if request is not None:
            content = {"application/json": {"schema": _reference(components, request)}}
            operation["requestBody"] = {"required": True, "content": content}
        paths[path] = {method: operation}
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


def _replies(components: dict[str, Any], reply: Object, streams: bool) -> dict[str, Any]:
    content: dict[str, Any] = {"application/json": {"schema": _reference(components, reply)}}
    if streams:
        content["text/event-stream"] = {"schema": _EVENT}
    failure = {"application/json": {"schema": _reference(components, ERROR)}}
    return {
        "200": {"description": "done", "content": content},
        **{status: {"description": text, "content": failure} for status, text in _FAILURES.items()},
    }


def _reference(components: dict[str, Any], kind: Object) -> dict[str, Any]:
    assert kind.name is not None
    components[kind.name] = kind.schema()
    return {"$ref": f"#/components/schemas/{kind.name}"}
