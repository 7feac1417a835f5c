"""What the daemon tells: health, statistics, metrics, adapters, the dashboard."""

from __future__ import annotations

import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from daemons import Daemon, running, wait_until
from peft_directories import lora
from shell import Shell

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
ASK = {"model": "tiny", "prompt": [1, 2, 3, 4], "max_tokens": 12, "temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def daemon(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """The tiny model with two adapters, and the embedded one beside it."""
    home = tmp_path_factory.mktemp("home")
    first, second = lora().write(home / "first"), lora(seed=2).write(home / "second")
    tiny = f"{tiny_bundle},memory=64MiB,adapter={first},adapter=other={second}"
    with running(home, tiny, "docs-moe", "--memory", "128MiB", "--control", "auto") as one:
        yield one.ready()


def complete(daemon: Daemon, **asked: Any) -> httpx.Response:
    return daemon.client.post("/v1/completions", json={**ASK, "logprobs": 0, **asked})


def tokens(daemon: Daemon, **asked: Any) -> Any:
    reply = complete(daemon, **asked)
    assert reply.status_code == 200, reply.text
    return reply.json()["choices"][0]["logprobs"]["token_logprobs"]


def test_it_is_healthy_and_ready(daemon: Daemon) -> None:
    assert daemon.client.get("/health").json() == {"status": "ok"}
    assert daemon.client.get("/ready").json() == {"status": "ready"}
    assert daemon.client.head("/health").status_code == 200


def test_metrics_are_prometheus_text_that_grows_with_work(daemon: Daemon) -> None:
    before = metrics(daemon)
    tokens(daemon)
    counted = "edgert_request_seconds_count"  # once the reply is out
    wait_until(lambda: metrics(daemon)[counted] > before[counted])
    after = metrics(daemon)
    tiny = '{model="tiny"}'
    for name, rise in (("generated", 12), ("prompt", 4)):
        assert (
            after[f"edgert_{name}_tokens_total{tiny}"] - before.get(f"edgert_{name}_tokens_total{tiny}", 0)
            == rise
        )
    for name in ("edgert_time_to_first_token_seconds_count", "edgert_request_seconds_count"):
        assert after[name] == before[name] + 1
    assert after["edgert_inter_token_seconds_count"] == before["edgert_inter_token_seconds_count"] + 11
    looked_up = sum(
        after[f"edgert_expert_{kind}_total{tiny}"] for kind in ("hits", "prefetch_hits", "misses")
    )
    assert looked_up > 0
    assert after[f"edgert_used_bytes{tiny}"] <= after[f"edgert_budget_bytes{tiny}"] == 64 << 20
    assert after[f"edgert_stall_seconds_total{tiny}"] >= 0
    assert after[f"edgert_requests_waiting{tiny}"] == 0
    assert after['edgert_knob{model="tiny",knob="context"}'] > 0
    assert after['edgert_adapter_scale{model="tiny",adapter="first"}'] == 0
    assert after["edgert_server_budget_bytes"] == 128 << 20
    for name in ("adapters", "adapter_bytes", "kv_blocks_free"):  # they fall, too
        assert f"edgert_{name}{tiny}" in after


def test_the_monitor_shows_a_model_of_the_daemon(daemon: Daemon, tmp_path: Path) -> None:
    tokens(daemon)
    wait_until(lambda: daemon.stats()["models"][0]["control"]["decisions"])
    shell = Shell(tmp_path)
    shown = shell("monitor", daemon.url, "--once").stdout
    for words in ("tiny, process", "p95", "bound", "hits", "threads", "layer 0"):
        assert words in shown
    by_port = shell("monitor", "--port", daemon.port, "--model", "tiny", "--once")
    assert "■" in by_port.stdout
    assert "'none' is not loaded" in shell("monitor", daemon.url, "--model", "none").stderr
    nobody = shell("monitor", "http://127.0.0.1:1", "--once")
    assert "no daemon at 127.0.0.1:1" in nobody.stderr


def test_the_monitor_ends_with_the_daemon(tmp_path: Path) -> None:
    with running(tmp_path, "docs-moe", "--memory", "64MiB", "--control", "auto") as daemon:
        daemon.ready()
        wait_until(lambda: daemon.stats()["models"][0]["control"]["decisions"])
        shell = Shell(tmp_path)
        watching = subprocess.Popen(
            shell.command("monitor", daemon.url), env=shell.environment, stdout=subprocess.PIPE, text=True
        )
        assert watching.stdout is not None
        assert "docs-moe, process" in watching.stdout.readline()
        daemon.stop()
        assert "layer 0" in watching.communicate()[0]
        assert watching.returncode == 0


def test_the_control_loop_tells_what_it_senses_and_decides(daemon: Daemon) -> None:
    wait_until(lambda: daemon.stats()["models"][0]["control"]["decisions"])
    control = daemon.stats()["models"][0]["control"]
    assert control["decisions"]["memory"]["action"] in ("hold", "fast", "slow", "recentre")
    after = metrics(daemon)
    assert after['edgert_control_signal{model="tiny",signal="cores"}'] >= 1
    assert any(name.startswith('edgert_control_action{model="tiny",law="memory",') for name in after)
    assert after['edgert_knob{model="tiny",knob="threads"}'] >= 1


def metrics(daemon: Daemon) -> dict[str, float]:
    """The samples, each line checked."""
    reply = daemon.client.get("/metrics")
    assert reply.headers["content-type"].startswith("text/plain; version=0.0.4")
    samples, types = {}, set()
    for line in reply.text.splitlines():
        if line.startswith("#"):
            assert re.fullmatch(r"# (HELP [a-z_]+ .+|TYPE [a-z_]+ (counter|gauge|histogram))", line), line
            if line.startswith("# TYPE"):
                assert line.split()[2] not in types, "one family comes twice"
                types.add(line.split()[2])
            continue
        match = re.fullmatch(r'([a-z_]+(?:\{(?:[a-z]+="[^"]*",?)+\})?) ([0-9.e+-]+)', line)
        assert match is not None, line
        assert match[1] not in samples, "one sample comes twice"
        samples[match[1]] = float(match[2])
    return samples


def test_statistics_show_the_store(daemon: Daemon) -> None:
    tokens(daemon)
    tiny, other = daemon.stats()["models"]
    assert (tiny["name"], tiny["state"], other["name"]) == ("tiny", "ready", "docs-moe")
    states = [int(layer[2 * index + 1]) for layer in tiny["store"] for index in range(len(layer) // 2)]
    assert len(states) == tiny["statistics"]["experts_total"]
    assert states.count(2) == tiny["statistics"]["experts_resident"] > 0


def test_adapters_are_listed_set_and_named(daemon: Daemon) -> None:
    plain = tokens(daemon)
    listed = daemon.client.get("/lora-adapters").json()
    assert [(row["id"], row["name"], row["scale"]) for row in listed] == [(0, "first", 0), (1, "other", 0)]
    named = tokens(daemon, model="tiny:first")
    assert named != plain
    try:
        reply = daemon.client.post("/lora-adapters", json=[{"id": 0, "scale": 1.0}])
        assert [row["scale"] for row in reply.json()] == [1, 0]
        assert tokens(daemon) == named
        daemon.client.post("/lora-adapters", json=[{"id": 1, "scale": 0.5}])
        assert tokens(daemon) not in (plain, named)
        assert tokens(daemon, model="tiny:first") == named
    finally:
        assert daemon.client.post("/lora-adapters", json=[]).status_code == 200
    assert tokens(daemon) == plain


@pytest.mark.parametrize(
    "body",
    [
        b"{}",
        b"[1]",
        b'[{"id": 2, "scale": 1}]',
        b'[{"id": -1, "scale": 1}]',
        b'[{"id": true, "scale": 1}]',
        b'[{"id": 0, "scale": "1"}]',
        b'[{"id": 0, "scale": NaN}]',
        b'[{"id": 0, "scale": 1e999}]',
        b'[{"id": 0}]',
        b'[{"id": 0, "scale": 1}, {"id": 0, "scale": 0.5}]',
        b'[{"id": 0, "scale": 1, "file": "/etc/passwd"}]',
    ],
)
def test_scales_that_are_none_are_refused(daemon: Daemon, body: bytes) -> None:
    reply = daemon.client.post("/lora-adapters", content=body)
    assert reply.status_code == 400 and reply.json()["error"]["message"]
    assert [row["scale"] for row in daemon.client.get("/lora-adapters").json()] == [0, 0]


def test_adapters_of_another_model_are_its_own(daemon: Daemon) -> None:
    assert daemon.client.get("/lora-adapters", params={"model": "docs-moe"}).json() == []
    assert daemon.client.get("/lora-adapters", params={"model": "none"}).status_code == 404


def test_the_page_may_run_its_own_script_and_reach_nothing_else(daemon: Daemon) -> None:
    reply = daemon.client.get("/")
    policy = reply.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy and "unsafe" not in policy
    assert not re.search(r"(src|href)=.https?:|@import|url\(", reply.text)


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_a_browser_shows_live_numbers(daemon: Daemon, tmp_path: Path) -> None:
    done = threading.Event()

    def work() -> None:
        with httpx.Client(base_url=daemon.url, timeout=60) as client:
            while not done.is_set():
                client.post("/v1/completions", json={**ASK, "max_tokens": 40})

    worker = threading.Thread(target=work)
    worker.start()
    try:
        options = (
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            f"--user-data-dir={tmp_path}",
            "--virtual-time-budget=6000",
        )
        shown = subprocess.run(
            [str(CHROMIUM), *options, "--dump-dom", daemon.url],
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        ).stdout
    finally:
        done.set()
        worker.join()
    assert re.search(r'id="state"[^>]*>ready<', shown)
    (rate,) = re.findall(r'id="decode">([0-9.]+)<small>tokens/s', shown)
    assert float(rate) > 0
    assert re.search(r"Expert store: [1-9]\d* of \d+ experts in memory", shown)
    assert "first" in shown and "scale 0" in shown
