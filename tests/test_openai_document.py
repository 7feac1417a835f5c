"""The daemon's OpenAPI document is true: schemathesis makes requests of it, good and bad, and compares the replies.

What a schema allows may still be refused with 400: a token id past this model's vocabulary, a choice among tools of one
that is not among them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance
from serving import Daemon, served, words

from edgert.bundle import locate

_MOST = {"max_tokens": 3, "max_completion_tokens": 3, "max_output_tokens": 3, "n": 2}


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    with served(
        {"docs-moe": locate(None), "words": words(tmp_path_factory.mktemp("words"))}, parallel=8
    ) as daemon:
        yield daemon


OPERATIONS = [
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/completions"),
    ("POST", "/v1/embeddings"),
    ("POST", "/v1/responses"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/{id}"),
    ("GET", "/lora-adapters"),
    ("POST", "/lora-adapters"),
    ("GET", "/health"),
    ("GET", "/ready"),
    ("GET", "/stats"),
    ("GET", "/metrics"),
]


GOOD, BAD = GenerationMode.POSITIVE, GenerationMode.NEGATIVE


@pytest.mark.parametrize(
    ("method", "path", "mode"),
    # Of a GET nothing could be wrong.
    [(*one, mode) for one in OPERATIONS for mode in (GOOD, BAD) if mode is GOOD or one[0] == "POST"],
)
def test_no_reply_contradicts_the_document(
    daemon: Daemon, method: str, path: str, mode: GenerationMode
) -> None:
    described = schemathesis.openapi.from_url(f"{daemon.url}/openapi.json")
    operation = described[path][method]

    @settings(
        max_examples=30,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def ask(case: Any) -> None:
        if mode is GOOD:
            _shorten(path, case.body)
        case.call_and_validate(excluded_checks=[positive_data_acceptance])

    ask()


def test_every_operation_is_asked(daemon: Daemon) -> None:
    paths = daemon.http.get("/openapi.json").json()["paths"]
    assert {(method.upper(), path) for path in paths for method in paths[path]} == set(OPERATIONS)


def _shorten(path: str, body: Any) -> None:
    """Work for a moment, at a model that there is."""
    if not isinstance(body, dict):
        return
    for name, most in _MOST.items():
        if type(body.get(name)) is int:
            body[name] = min(body[name], most)
    if body.get("model") or path == "/v1/embeddings":
        body["model"] = "words" if path == "/v1/embeddings" else "docs-moe"
    if "messages" in body:
        body.setdefault("max_tokens", 3)
    if path == "/v1/responses":
        body.setdefault("max_output_tokens", 3)
