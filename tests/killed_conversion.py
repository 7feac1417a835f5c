"""Conversions that die at chosen moments; run as a script: SOURCE DIRECTORY EXPERT_FORMAT EXCHANGE MOMENT…

For each moment, a number, a child process converts SOURCE to DIRECTORY/MOMENT/m.edgert and kills itself with SIGKILL
just before that call (the calls that change the file system are counted). Prints the number of calls that a
conversion made which was not killed. EXCHANGE 0 stands for a file system that cannot exchange two names. Nothing is
really synced: a killed process, unlike a power cut, loses nothing that it has written.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edgert.converters import output
from edgert.converters.convert import convert

CALLS = ("mkdir", "open", "ftruncate", "pwrite", "fsync", "rename", "unlink", "rmdir")


class Killer:
    def __init__(self, moment: int) -> None:
        self.moment = moment
        self.calls = 0

    def wrap(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **options: Any) -> Any:
            if self.calls == self.moment:
                os.kill(os.getpid(), signal.SIGKILL)
            self.calls += 1
            return call(*arguments, **options)

        return counted


def convert_and_die(source: str, place: Path, expert_format: str, exchange: bool, moment: int) -> None:
    killer = Killer(moment)
    os.fsync = lambda fd: None
    for name in CALLS:
        setattr(os, name, killer.wrap(getattr(os, name)))
    output._exchange = killer.wrap(output._exchange if exchange else lambda a, b: False)
    convert(source, place, expert_format=expert_format, threads=1)
    print(killer.calls, flush=True)


def main() -> None:
    source, directory, expert_format, exchange, *moments = sys.argv[1:]
    for moment in moments:
        child = os.fork()
        if child == 0:
            place = Path(directory, moment, "m.edgert")
            convert_and_die(source, place, expert_format, exchange == "1", int(moment))
            os._exit(0)
        os.waitpid(child, 0)


if __name__ == "__main__":
    main()
