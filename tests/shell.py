"""The command line, run in an environment of its own."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_PATIENCE_S = 120.0
_CTRL_C = "\x03"


@dataclass
class Shell:
    """Runs edgert in an environment of its own."""

    home: Path
    variables: dict[str, str] = field(default_factory=dict)

    @property
    def environment(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("EDGERT_", "XDG_"))}
        return {**kept, "HOME": str(self.home), "EDGERT_HOME": str(self.home / "data"), **self.variables}

    def __call__(self, *arguments: object, stdin: bytes = b"") -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            self.command(*arguments), input=stdin, capture_output=True, env=self.environment, check=False
        )
        return subprocess.CompletedProcess(
            done.args, done.returncode, done.stdout.decode(), done.stderr.decode()
        )

    def json(self, *arguments: object) -> Any:
        done = self(*arguments, "--json")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    @staticmethod
    def command(*arguments: object) -> list[str]:
        return [sys.executable, "-m", "edgert", *map(str, arguments)]


def assert_fails(done: subprocess.CompletedProcess[str], complaint: str, status: int = 1) -> None:
    assert done.returncode == status
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("edgert: error: ") and complaint in line, line


def on_a_terminal(
    command: list[str],
    environment: Mapping[str, str],
    typed: Sequence[str] = (),
    *,
    prompt: str = ">>> ",
    status: int = 0,
) -> str:
    """All that `command` writes to a terminal of 100 columns; `typed` is typed, each after a new prompt. A Ctrl-C that
    nothing follows is typed once more, as people do: Python sees none between the prompt and its wait for a key."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
    # Ctrl-C reaches it, also where these tests are run in the background, deaf to it.
    owning_it = ["env", "--default-signal=INT", "setsid", "--ctty", *command]
    process = subprocess.Popen(owning_it, stdin=theirs, stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    shown, answered, keys, last = b"", 0, list(typed), ""
    until = time.monotonic() + _PATIENCE_S
    try:
        while time.monotonic() < until:
            if not select.select([ours], [], [], 2.0)[0]:
                if last.endswith(_CTRL_C):
                    os.write(ours, _CTRL_C.encode())
                continue
            chunk = os.read(ours, 4096)
            if not chunk:
                break
            shown += chunk
            if keys and prompt.encode() in shown[answered:]:  # an escape may follow it
                answered = len(shown)
                last = keys.pop(0)
                os.write(ours, last.encode())
        else:
            process.kill()
    except OSError:  # Linux says EIO when the last writer is gone
        pass
    os.close(ours)
    assert process.wait() == status, shown
    return shown.decode()
