"""The command line and what is around it: signals, pipes, closed streams, terminals."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from shell import Shell, on_a_terminal

PROMPT = "The module reads the file"


INTERRUPTED = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever was inherited
from edgert.__main__ import main
from edgert.cli import run
calls = []
def interrupted(*args, **options):
    calls.append(args)
    if len(calls) == {call}:
        os.kill(os.getpid(), signal.SIGINT)
run.{function} = interrupted
sys.exit(main())
"""


def interrupted_in(
    edgert: Shell, function: str, call: int, *arguments: object
) -> subprocess.CompletedProcess[str]:
    """Run edgert; Ctrl-C comes in the given call of a function of edgert.cli.run."""
    script = INTERRUPTED.format(function=function, call=call)
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=edgert.environment, check=False)


def test_ctrl_c_ends_with_the_statistics_so_far(edgert: Shell, tiny_bundle: Path) -> None:
    done = interrupted_in(edgert, "say", 3, "run", tiny_bundle, "-p", PROMPT, "--ignore-eos")
    assert done.returncode == 130
    assert "generated 3 at" in done.stderr and "(cancelled)" in done.stderr and "Traceback" not in done.stderr


def test_ctrl_c_before_the_first_token(edgert: Shell, tiny_bundle: Path) -> None:
    done = interrupted_in(edgert, "describe", 1, "run", tiny_bundle, "-p", PROMPT)
    assert done.returncode == 130
    assert done.stderr.splitlines()[-1] == "edgert: interrupted"


# An import in the midst of the command line's is as far as it gets.
WHILE_IMPORTING = """
import sys
class Interrupting:
    def find_spec(self, name, path=None, target=None):
        if name == "edgert.cli.run":
            raise KeyboardInterrupt
sys.meta_path.insert(0, Interrupting())
"""


@pytest.mark.parametrize("way", ["module", "script"])
def test_ctrl_c_while_the_command_line_is_imported(edgert: Shell, tmp_path: Path, way: str) -> None:
    (tmp_path / "sitecustomize.py").write_text(WHILE_IMPORTING)
    command = edgert.command("--version")
    if way == "script":  # as pip installs it
        project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())
        module, function = project["project"]["scripts"]["edgert"].split(":")
        command = [
            sys.executable,
            "-c",
            f"import sys; from {module} import {function}; sys.exit({function}())",
        ]
    environment = edgert.environment | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "edgert: interrupted\n")


def test_a_reader_that_went_away_is_no_error(edgert: Shell, tiny_bundle: Path) -> None:
    process = subprocess.Popen(
        edgert.command("run", tiny_bundle, "-p", PROMPT, "--ignore-eos"),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=edgert.environment,
    )  # fmt: skip
    assert process.stdout and process.stderr
    process.stdout.close()
    errors = process.stderr.read().decode()
    process.stderr.close()
    assert process.wait() == 141
    assert "Traceback" not in errors and "Exception" not in errors


@pytest.mark.parametrize("closed", [0, 1, 2])
def test_a_closed_stream_is_no_fault(edgert: Shell, tiny_bundle: Path, closed: int) -> None:
    command = edgert.command("run", tiny_bundle, "--raw", "--max-tokens", 3, "--json")
    script = f'exec "$@" {("<&-", ">&-", "2>&-")[closed]}'
    done = subprocess.run(
        ["sh", "-c", script, "sh", *command],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        env=edgert.environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert b"Traceback" not in done.stderr
    if closed != 1:
        assert json.loads(done.stdout)["statistics"]["generated_tokens"] == 3


def test_progress_is_shown_on_a_terminal_only(edgert: Shell, tiny_source: Path) -> None:
    assert edgert("convert", tiny_source, edgert.home / "a.edgert").stderr == ""
    assert "convert" in on_a_terminal(
        edgert.command("convert", tiny_source, edgert.home / "b.edgert"), edgert.environment
    )


def test_the_picture_of_the_store_is_drawn_on_a_terminal(edgert: Shell, tiny_bundle: Path) -> None:
    shown = on_a_terminal(edgert.command("demo", tiny_bundle, "--max-tokens", "4"), edgert.environment)
    assert "layer 2" in shown and "just read" in shown and "identical: 4/4 tokens" in shown
    assert shown.rstrip().endswith("memory that you have")


def test_without_a_prompt_a_terminal_gets_a_conversation(edgert: Shell, tiny_bundle: Path) -> None:
    command = edgert.command("run", tiny_bundle, "--max-tokens", 3, "--ignore-eos")
    typed = ["Hello\n", "/clear\n", "word " * 600 + "\n", "\x04"]
    shown = on_a_terminal(command, edgert.environment, typed)
    assert shown.count(">>> ") >= 4 and "[3 tokens at" in shown
    assert "prompt: found" in shown  # too long for the context, which does not end the conversation
