"""How the daemon starts, stops, and tells the service manager of it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest
from daemons import START_S, Daemon, running, wait_until
from shell import Shell, assert_fails

LONG = {
    "model": "docs-moe",
    "prompt": "The os module",
    "max_tokens": 300,
    "temperature": 0,
    "ignore_eos": True,
}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_lets_running_requests_end_and_refuses_new_ones(tmp_path: Path, number: int) -> None:
    with running(tmp_path, "docs-moe", "--memory", "64MiB") as daemon:
        daemon.ready()
        with daemon.client.stream("POST", "/v1/completions", json={**LONG, "stream": True}) as reply:
            lines = reply.iter_lines()
            next(lines)
            daemon.process.send_signal(number)
            wait_until(lambda: daemon.log("stopping"))
            if daemon.process.poll() is None:
                refused = daemon.client.post("/v1/completions", json=LONG)
                assert refused.status_code == 503 and refused.headers["retry-after"]
                assert daemon.client.get("/ready").status_code == 503
                assert daemon.client.get("/health").json() == {"status": "stopping"}
            assert [line for line in lines if line][-1] == "data: [DONE]"
        assert daemon.process.wait(START_S) == 0


def test_what_does_not_end_in_time_is_cancelled(tmp_path: Path) -> None:
    with running(tmp_path, "docs-moe", "--memory", "64MiB", "--drain-timeout", "0") as daemon:
        daemon.ready()
        with daemon.client.stream("POST", "/v1/completions", json={**LONG, "stream": True}) as reply:
            lines = reply.iter_lines()
            next(lines)
            begun = time.monotonic()
            assert daemon.stop() == 0
            assert time.monotonic() - begun < 30
            assert sum(1 for line in lines if line) < 300


def test_a_stop_while_loading_ends_in_order(tmp_path: Path) -> None:
    with running(tmp_path, "docs-moe", "--memory", "64MiB") as daemon:
        assert daemon.stop() == 0


def test_killed_it_comes_up_again_and_its_bundle_is_as_it_was(tmp_path: Path) -> None:
    from edgert import _native
    from edgert.bundle import embedded

    packaged = embedded()
    assert packaged is not None
    bundle = Path(shutil.copytree(packaged, tmp_path / "copy.edgert"))
    before = {path.name: path.read_bytes() for path in bundle.iterdir()}
    with running(tmp_path, bundle, "--memory", "64MiB") as daemon:
        daemon.ready()
        with daemon.client.stream(
            "POST", "/v1/completions", json={**LONG, "model": "copy", "stream": True}
        ) as reply:
            next(reply.iter_lines())
            daemon.process.kill()
            daemon.process.wait()
    with running(tmp_path, bundle, "--memory", "64MiB") as daemon:
        daemon.ready()
        assert daemon.client.post("/v1/completions", json={**LONG, "model": "copy"}).status_code == 200
    assert {path.name: path.read_bytes() for path in bundle.iterdir()} == before
    assert _native.verify_bundle(str(bundle)) > 0


def test_a_busy_port_is_said(edgert: Shell) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert_fails(edgert("serve", "docs-moe", "--port", taken.getsockname()[1]), "Address already in use")


def test_an_only_model_that_cannot_be_loaded_ends_it_with_the_reason(tmp_path: Path) -> None:
    done = Shell(tmp_path)("serve", "docs-moe", "--port", 0, "--memory", "1MiB")
    assert done.returncode == 1
    assert "the smallest that works is" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["nothing-here"], "nothing-here"),
        (["/nowhere/model.edgert"], "/nowhere/model.edgert"),
        (["docs-moe,colour=red"], "colour=red"),
        (["docs-moe", "docs-moe"], "comes twice"),
        (["docs-moe", "--port", "65536"], "port"),
        (["docs-moe", "--port", "x"], "port"),
        (["docs-moe", "--keep-alive", "-1"], "keep_alive"),
        (["docs-moe", "--memory", "4GBx"], "memory"),
        (["docs-moe", "--device", "no-such-device"], "no-such-device"),
        (["docs-moe", "--cors-origins", "javascript:1"], "cors_origins"),
        (["docs-moe,adapter=/nowhere/a.adapter"], "/nowhere/a.adapter"),
    ],
)
def test_settings_that_cannot_be_are_refused(edgert: Shell, arguments: list[str], complaint: str) -> None:
    assert_fails(edgert("serve", *arguments), complaint)


def test_the_file_configures_it_and_a_flag_goes_first(tmp_path: Path) -> None:
    file = tmp_path / "edgert.toml"
    file.write_text('models = ["docs-moe,name=first"]\nlog_format = "json"\nmemory = "40MiB"\nqueue = 3\n')
    with running(tmp_path, "--memory", "50MiB", EDGERT_CONFIG=str(file)) as daemon:
        stats = daemon.ready().stats()
        assert [model["name"] for model in stats["models"]] == ["first"]
        assert stats["budget_bytes"] == 50 << 20
        events = [json.loads(line)["event"] for line in daemon.lines]
        assert events[0] == "listening" and "ready" in events


class Manager:
    """What systemd is to a service."""

    def __init__(self, folder: Path) -> None:
        self.address = str(folder / "notify")
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(self.address)
        self._socket.settimeout(START_S)

    def wait_for(self, line: str) -> None:
        while line not in self._socket.recv(4096).decode().splitlines():
            pass


def test_the_service_manager_is_told(tmp_path: Path) -> None:
    manager = Manager(tmp_path)
    told = {"NOTIFY_SOCKET": manager.address, "WATCHDOG_USEC": "300000"}
    with running(tmp_path, "docs-moe", "--memory", "64MiB", **told) as daemon:
        manager.wait_for("READY=1")
        assert daemon.client.get("/ready").status_code == 200
        manager.wait_for("WATCHDOG=1")
        manager.wait_for("WATCHDOG=1")
        daemon.process.send_signal(signal.SIGTERM)
        manager.wait_for("STOPPING=1")
        assert daemon.process.wait(START_S) == 0


def test_it_takes_the_socket_that_is_handed_over(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as passed:
        number = passed.fileno()
        script = 'exec 3<&"$0"; export LISTEN_FDS=1 LISTEN_PID=$$; exec "$@"'
        shell = Shell(tmp_path)
        process = subprocess.Popen(
            ["bash", "-c", script, str(number), *shell.command("serve", "docs-moe", "--memory", "64MiB")],
            env=shell.environment,
            pass_fds=[number],
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            daemon = Daemon(process).ready()
            assert daemon.port == passed.getsockname()[1]
            assert daemon.stop() == 0
        finally:
            process.kill()
            process.wait()


def test_what_it_holds_beyond_the_budget_is_little(tmp_path: Path) -> None:
    """Its own memory, with the model's as it is counted; the promise is 60 MiB."""
    with running(tmp_path, "docs-moe", "--memory", "64MiB") as daemon:
        daemon.ready()
        for _ in range(3):
            assert daemon.client.post("/v1/completions", json=LONG).status_code == 200
        stats = daemon.stats()
        beyond = stats["rss_bytes"] - stats["models"][0]["statistics"]["used_bytes"]
        assert beyond <= 60 << 20, f"{beyond / 2**20:.1f} MiB"


def test_a_full_log_stops_nothing(tmp_path: Path) -> None:
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full")
    shell = Shell(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with open("/dev/full", "w", encoding="ascii") as full:
        process = subprocess.Popen(
            shell.command("serve", "docs-moe", "--memory", "64MiB", "--port", port),
            env=shell.environment,
            stderr=full,
        )
        try:
            import httpx

            def answers() -> bool:
                try:
                    return httpx.get(f"http://127.0.0.1:{port}/ready").status_code == 200
                except httpx.TransportError:
                    return False

            wait_until(answers)
            process.terminate()
            assert process.wait(START_S) == 0
        finally:
            process.kill()
            process.wait()
