"""The application: routes behind the guard."""

from starlette.applications import Starlette

from edgert.server.state import ServerState


def create_app(state: ServerState) -> Starlette:
    from edgert.server import openai_routes  # type: ignore[import-not-found]

    app = Starlette(routes=[*openai_routes.routes(state)])
    app.state.server = state
    return app
