"""The daemon as a process of its own, on a port that the system picks."""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
from shell import Shell

START_S = 60.0  # of a loaded machine


class Daemon:
    """A running `edgert serve`. Its lines on stderr are in `lines`."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.lines: list[str] = []
        self.url = ""
        self._listening = threading.Event()
        threading.Thread(target=self._read, daemon=True).start()
        if not self._listening.wait(START_S) or not self.url:
            process.kill()
            raise AssertionError("\n".join(self.lines))
        self.client = httpx.Client(base_url=self.url, timeout=START_S)

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line.rstrip("\n"))
            if "listening" in line and not self.url:
                self.url = (
                    line.split()[-1]
                    if line.startswith("edgert")
                    else line.split('"message": "')[1].split('"')[0]
                )
                self._listening.set()
        self._listening.set()

    @property
    def port(self) -> int:
        return int(self.url.rstrip("/").rpartition(":")[2])

    def ready(self) -> Daemon:
        wait_until(lambda: self.client.get("/ready").status_code == 200)
        return self

    def stats(self) -> Any:
        return self.client.get("/stats").json()

    def log(self, event: str) -> list[str]:
        return [line for line in self.lines if line.startswith(f"edgert: {event}:")]

    def stop(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(START_S)

    def raw(self, data: bytes, *, end: bool = False) -> bytes:
        """What the daemon answers to these bytes, up to the end of the connection or a second of silence."""
        with self.connect() as connection:
            connection.sendall(data)
            if end:
                connection.shutdown(socket.SHUT_WR)
            return received(connection)

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=START_S)


def received(connection: socket.socket, silence_s: float = 1.0) -> bytes:
    connection.settimeout(silence_s)
    parts = []
    with contextlib.suppress(TimeoutError, ConnectionResetError):
        while part := connection.recv(1 << 16):
            parts.append(part)
    return b"".join(parts)


@contextlib.contextmanager
def running(home: Path, *arguments: object, **variables: str) -> Iterator[Daemon]:
    """`edgert serve --port 0 ARGUMENTS`; killed at the end if it is still there."""
    shell = Shell(home, variables)
    process = subprocess.Popen(
        shell.command("serve", "--port", 0, *arguments),
        env=shell.environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield Daemon(process)
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


def wait_until(condition: Any, within_s: float = START_S) -> None:
    until = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < until, "it did not come to be"
        time.sleep(0.01)
