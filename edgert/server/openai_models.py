"""GET /v1/models and /v1/models/{id}; POST /v1/embeddings."""

import base64
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from starlette.requests import Request
from starlette.responses import Response

from edgert.errors import UnsupportedError
from edgert.server.models import ModelCard, UnknownModelError
from edgert.server.openai_fields import refused
from edgert.server.openai_http import Reply, dumps
from edgert.server.state import ServerState
from edgert.server.threads import on_thread

if TYPE_CHECKING:
    import numpy
    import numpy.typing

    from edgert.model import Model

_TEXTS_AT_ONCE = 32


def card(one: ModelCard) -> dict[str, Any]:
    return {
        "id": one.id,
        "object": "model",
        "created": one.created,
        "owned_by": "edgert",
        "parent": one.parent,
        "state": one.state,
    }


async def list_models(state: ServerState) -> Response:
    cards = [card(one) for one in state.models.cards()]
    return Response(dumps({"object": "list", "data": cards}), media_type="application/json")


async def show_model(state: ServerState, request: Request) -> Response:
    name = request.path_params["id"]
    for one in state.models.cards():
        if one.id == name:
            return Response(dumps(card(one)), media_type="application/json")
    raise UnknownModelError(f"model {name!r:.120}: is not served here")


async def embeddings(state: ServerState, request: Request, fields: Mapping[str, Any], reply: Reply) -> None:
    async with state.acquire(fields.get("model")) as loaded:
        texts = [fields["input"]] if isinstance(fields["input"], str) else fields["input"]
        vectors: list[numpy.typing.NDArray[numpy.float32]] = []
        tokens = 0
        for first in range(0, len(texts), _TEXTS_AT_ONCE):  # a client that leaves ends it here
            some = texts[first : first + _TEXTS_AT_ONCE]
            made, count = await on_thread(_embed, loaded.model, some, first, fields.get("dimensions"))
            vectors.extend(made)
            tokens += count
        state.metrics.prompt_tokens.add(tokens, loaded.model.name)
        as_asked = _base64 if fields.get("encoding_format") == "base64" else _floats
        rows = [
            {"object": "embedding", "index": index, "embedding": as_asked(vector)}
            for index, vector in enumerate(vectors)
        ]
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        await reply.json({"object": "list", "data": rows, "model": loaded.id, "usage": usage}, large=True)


def _embed(
    model: "Model", texts: list[str], first: int, dimensions: int | None
) -> "tuple[numpy.typing.NDArray[numpy.float32], int]":
    """Vectors, and how many tokens they have. What is longer than the model takes is refused, not cut."""
    if model.backend != "onnx":
        raise UnsupportedError(f"model {model.name}: embeds no text; see /v1/models for one that does")
    tokens = 0
    for index, text in enumerate(texts):
        length = len(model.tokenizer.encode(text))
        if model.context and length > model.context:
            raise refused(
                f"input[{first + index}]: this model's maximum context length is {model.context} tokens, and the text has {length}",
                "input",
                "context_length_exceeded",
            )
        tokens += length
    return model.embed(texts, dimensions=dimensions), tokens


def _floats(vector: "numpy.typing.NDArray[numpy.float32]") -> list[float]:
    numbers: list[float] = vector.tolist()
    return numbers


def _base64(vector: "numpy.typing.NDArray[numpy.float32]") -> str:
    """Little-endian float32."""
    return base64.b64encode(vector.astype("<f4").tobytes()).decode()
