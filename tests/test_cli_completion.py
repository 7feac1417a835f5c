"""What the TAB key offers, asked of the shells themselves."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from shell import Shell

from edgert.cli.completion import _SCRIPTS
from edgert.cli.tree import command_tree

Offers = Callable[..., list[str]]


def in_bash(script: Path, edgert: Shell, words: list[str]) -> list[str]:
    asked = f'source {script}; shift; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _edgert; printf \'%s\\n\' "${{COMPREPLY[@]}}"'
    return answered(["bash", "--norc", "-c", asked, "bash", "", *words], edgert)


def in_fish(script: Path, edgert: Shell, words: list[str]) -> list[str]:
    asked = f"source {script}; complete -C '{' '.join(words)}'"
    return [line.split("\t")[0] for line in answered(["fish", "--no-config", "-c", asked], edgert)]


# What zsh's editor provides, which needs a terminal: here each prints what it is given.
ZSH = """
compdef() {}
compadd() { shift; print -l -- $@ }
_describe() { print -l -- ${${(P)4}%%:*} }
_files() { print -l -- *(N) }
"""


def in_zsh(script: Path, edgert: Shell, words: list[str]) -> list[str]:
    asked = f'{ZSH}\nsource {script}; words=("$@"); CURRENT=$#; PREFIX=$words[-1]; _edgert'
    offered = answered(["zsh", "-f", "-c", asked, "zsh", *words], edgert)
    return [one for one in offered if one.startswith(words[-1])]


def answered(command: list[str], edgert: Shell) -> list[str]:
    done = subprocess.run(
        command, capture_output=True, text=True, env=edgert.environment, cwd=edgert.home, check=True
    )
    assert not done.stderr
    return [line for line in done.stdout.split("\n") if line]


@pytest.fixture(params=["bash", "fish", "zsh"])
def offers(request: pytest.FixtureRequest, edgert: Shell) -> Offers:
    """What the shell offers for the last of some words; a model and a file are at home."""
    shell: str = request.param
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    (edgert.home / "data/models/mine.edgert").mkdir(parents=True)
    (edgert.home / "prompt.txt").touch()
    script = edgert.home / "script"
    script.write_text(_SCRIPTS[shell](command_tree()))
    ask = {"bash": in_bash, "fish": in_fish, "zsh": in_zsh}[shell]
    return lambda *words: ask(script, edgert, ["edgert", *words])


def test_commands_flags_choices_models_and_files(offers: Offers) -> None:
    assert {"run", "rm"} <= set(offers("r"))
    assert {"convert", "show", "fuse"} <= set(offers("adapter", ""))
    assert offers("run", "mine", "--backe") == ["--backend"]
    assert "--base" in offers("adapter", "convert", "--b") and "--base" not in offers("run", "--b")
    assert {"edgert", "llama.cpp", "onnx"} == set(offers("run", "--backend", ""))
    assert {"bash", "zsh", "fish"} == set(offers("completion", ""))
    assert "mine" in offers("show", "mi")
    assert "prompt.txt" in offers("run", "mine", "-f", "prom")
    assert offers("run", "mine", "--memory", "") == []


def test_the_command_prints_the_script(edgert: Shell) -> None:
    assert edgert("completion", "bash").stdout == _SCRIPTS["bash"](command_tree())
    assert edgert("completion", "csh").returncode == 2
