"""Who may use the daemon: addresses, keys, origins."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from daemons import Daemon, running
from shell import Shell, assert_fails

KEYS = ("first-key-0123456789", "second-key-0123456789")


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    home = tmp_path_factory.mktemp("home")
    keys = home / "keys"
    keys.write_text(f"# of the tests\n{KEYS[0]}\n\n{KEYS[1]}\n")
    given = (
        "--api-key-file",
        keys,
        "--cors-origins",
        "http://app.example",
        "--allowed-hosts",
        "board.example",
    )
    with running(home, "docs-moe", "--memory", "64MiB", *given) as one:
        yield one.ready()


@pytest.mark.parametrize("key", KEYS)
def test_either_header_takes_a_key(guarded: Daemon, key: str) -> None:
    for headers in (
        {"Authorization": f"Bearer {key}"},
        {"authorization": f"bearer {key}"},
        {"X-Api-Key": key},
    ):
        assert guarded.client.get("/stats", headers=headers).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Bearer wrong"},
        {"Authorization": f"Basic {KEYS[0]}"},
        {"Authorization": "Bearer"},
        {"Authorization": f"Bearer {KEYS[0][:-1]}"},
        {"Authorization": f"Bearer {KEYS[0]}x"},
        {"X-Api-Key": ""},
    ],
)
def test_without_a_right_key_nothing_is_told(guarded: Daemon, headers: dict[str, str]) -> None:
    for path in ("/stats", "/metrics", "/lora-adapters", "/v1/models", "/v1/nothing"):
        reply = guarded.client.get(path, headers=headers)
        assert reply.status_code == 401
        assert reply.json()["error"]["code"] == "invalid_api_key"
        assert reply.headers["www-authenticate"] == "Bearer"
    assert not any(key in line for line in guarded.lines for key in KEYS)


def test_health_and_the_empty_page_need_no_key(guarded: Daemon) -> None:
    for path in ("/", "/health", "/ready"):
        assert guarded.client.get(path).status_code == 200


def test_allowed_origins_get_their_headers(guarded: Daemon) -> None:
    asked = {"Origin": "http://app.example", "Access-Control-Request-Method": "POST"}
    preflight = guarded.client.options("/v1/completions", headers=asked)
    assert preflight.status_code == 204
    assert preflight.headers["access-control-allow-origin"] == "http://app.example"
    assert "authorization" in preflight.headers["access-control-allow-headers"]
    headers = {"Origin": "http://app.example", "X-Api-Key": KEYS[0]}
    reply = guarded.client.get("/stats", headers=headers)
    assert reply.headers["access-control-allow-origin"] == "http://app.example"
    assert reply.headers["vary"] == "origin"


def test_an_allowed_name_is_taken(guarded: Daemon) -> None:
    assert guarded.client.get("/health", headers={"Host": "board.example:8343"}).status_code == 200


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "board.example"])
def test_another_address_needs_a_key_or_a_word(edgert: Shell, host: str) -> None:
    assert_fails(edgert("serve", "docs-moe", "--host", host), "--api-key-file")


def test_with_the_word_every_address_is_served(tmp_path: Path) -> None:
    with running(tmp_path, "docs-moe", "--host", "0.0.0.0", "--allow-unauthenticated") as daemon:
        assert ":0.0.0.0:" not in daemon.url
        assert daemon.raw(b"GET /health HTTP/1.0\r\nHost: 127.0.0.1\r\n\r\n").startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize(
    "content", [b"", b"# nothing\n", b"short\n", b"with a space inside\n", b"nul\x00nul\x00nul\n"]
)
def test_key_files_that_protect_nothing_are_refused(edgert: Shell, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "keys").write_bytes(content)
    assert_fails(edgert("serve", "docs-moe", "--api-key-file", tmp_path / "keys"), "api_key_file")


def test_a_key_file_that_is_not_there_is_refused(edgert: Shell) -> None:
    assert_fails(edgert("serve", "docs-moe", "--api-key-file", "/nowhere/keys"), "there is no file")
