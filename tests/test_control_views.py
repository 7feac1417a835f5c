"""What shows a control loop: the terminal's monitor and the report's page."""

import json
import os
from html.parser import HTMLParser
from pathlib import Path

import pytest
from shell import Shell

from edgert.cli import monitor
from edgert.controlling.record import Record


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("home")
    log = home / "run.jsonl"
    done = Shell(home)(
        "run", "-p", "A file", "--max-tokens", "300", "--ignore-eos", "--memory", "11MiB", "--control", "auto",
        "--control-log", log, "--control-window-ms", "20", "--token-interval-ms", "1",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return log


def test_the_users_own_pace_is_kept(record: Path) -> None:
    lines = [json.loads(line) for line in record.read_text().splitlines()[1:]]
    assert len(lines) > 2
    assert all(line["knobs"]["token_interval_ms"] >= 1 for line in lines)


def test_the_monitor_shows_the_last_window_and_the_store(edgert: Shell, record: Path) -> None:
    shown = edgert("monitor", record, "--once").stdout
    for words in ("docs-moe", "p95", "bound", "hits", "slots", "threads", "layer 5"):
        assert words in shown
    assert "■" in shown


def test_the_monitor_follows_a_record_and_ends_with_its_process(edgert: Shell, record: Path) -> None:
    assert "layer 0" in edgert("monitor", record).stdout  # the process is over


def test_a_line_that_is_being_written_is_waited_for(edgert: Shell, record: Path, tmp_path: Path) -> None:
    text = record.read_text().splitlines(keepends=True)
    cut = tmp_path / "cut.jsonl"
    cut.write_text(text[0] + text[1] + text[2][: len(text[2]) // 2])
    assert "layer 0" in edgert("monitor", cut, "--once").stdout


def test_the_monitor_goes_on_with_the_next_part_of_a_record(tmp_path: Path) -> None:
    log = tmp_path / "run.jsonl"
    written = Record(log, {}, {"pid": os.getpid()}, most_bytes=4 * 150)  # the head, and a line or two
    followed, times = monitor._Record(log), []
    for window in range(20):
        written.write({"kind": "urgent", "t": float(window)}, dict)
        lines, more = followed.poll()
        assert more
        times += [line["t"] for line in lines]
    assert times == list(range(20))
    assert (tmp_path / "run.jsonl.3").exists()
    written.close()
    followed.close()


def test_what_is_no_record_is_refused(edgert: Shell, tmp_path: Path) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text('{"format": "something"}\n')
    empty = tmp_path / "empty.jsonl"
    empty.write_text('{"format": "edgert-control"}\n{"signals": {"t": 1}}\n')
    assert "not what a control loop tells" in edgert("monitor", empty, "--once").stderr
    assert "--model" in edgert("monitor", empty, "--model", "x").stderr
    for where in ("https://localhost", "http://", "http://localhost:99999", "http://localhost/x"):
        assert "allowed is http://HOST:PORT" in edgert("monitor", where).stderr
    for command in ("monitor", "report"):
        assert "line 1" in edgert(command, other).stderr
        assert "no such file" in edgert(command, tmp_path / "none").stderr


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.drawings, self.links = 0, 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.drawings += tag == "svg"
        self.links += any(name in ("src", "href") for name, _ in attrs)


def test_the_report_is_one_page_that_needs_nothing_else(edgert: Shell, record: Path, tmp_path: Path) -> None:
    output = tmp_path / "report.html"
    assert edgert("report", record, "-o", output).returncode == 0
    text = output.read_text()
    page = _Page()
    page.feed(text)
    assert page.drawings >= 8
    assert page.links == 0
    assert "nan" not in text.replace("nancy", "")
    assert "experts in memory" in text
    assert os.fspath(record) not in text
