"""The routes that OpenAI's clients use."""

import functools

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute
from starlette.routing import Route as Path

from edgert.server.openai_chat import chat
from edgert.server.openai_completions import completions
from edgert.server.openai_document import document
from edgert.server.openai_http import Route, dumps
from edgert.server.openai_models import embeddings, list_models, show_model
from edgert.server.openai_requests import CHAT, COMPLETION, EMBEDDING, RESPONSE
from edgert.server.openai_responses import responses
from edgert.server.state import ServerState


def routes(state: ServerState) -> list[BaseRoute]:
    async def models(request: Request) -> Response:
        return await list_models(state)

    async def model(request: Request) -> Response:
        return await show_model(state, request)

    @functools.cache
    def described() -> str:
        return dumps(document())

    async def openapi(request: Request) -> Response:
        return Response(described(), media_type="application/json")

    posts = (
        ("/v1/chat/completions", CHAT, chat),
        ("/v1/completions", COMPLETION, completions),
        ("/v1/embeddings", EMBEDDING, embeddings),
        ("/v1/responses", RESPONSE, responses),
    )
    return [
        *(Path(path, Route(state, fields, handler), methods=["POST"]) for path, fields, handler in posts),
        Path("/v1/models", models, methods=["GET"]),
        Path("/v1/models/{id:path}", model, methods=["GET"]),
        Path("/openapi.json", openapi, methods=["GET"]),
    ]
