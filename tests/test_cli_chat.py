"""edgert chat: messages, slash commands, history; over a pipe and on a terminal."""

from __future__ import annotations

import json
import stat
import subprocess
from pathlib import Path

import pytest
from peft_directories import lora
from shell import Shell, on_a_terminal

FLAGS = ("--max-tokens", 4, "--ignore-eos")


def talk(
    edgert: Shell, bundle: Path, *messages: str, flags: tuple[object, ...] = FLAGS
) -> subprocess.CompletedProcess[str]:
    done = edgert("chat", bundle, *flags, stdin="".join(f"{line}\n" for line in messages).encode())
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    return done


def said(
    edgert: Shell, bundle: Path, *messages: str, flags: tuple[object, ...] = FLAGS
) -> list[dict[str, str]]:
    """The conversation after `messages`."""
    file = edgert.home / "talk.json"
    talk(edgert, bundle, *messages, f"/save {file}", flags=flags)
    value = json.loads(file.read_text())
    assert value["model"] == "tiny"
    messages_: list[dict[str, str]] = value["messages"]
    return messages_


def test_answers_alone_go_to_stdout(edgert: Shell, tiny_bundle: Path) -> None:
    done = talk(edgert, tiny_bundle, "The module", "", "reads the file")
    answers = [
        m["content"]
        for m in said(edgert, tiny_bundle, "The module", "reads the file")
        if m["role"] == "assistant"
    ]
    assert done.stdout == "".join(f"{answer}\n" for answer in answers)
    assert done.stderr.count("[4 tokens at") == 2 and ">>>" not in done.stderr


def test_an_answer_depends_on_what_was_said_before(edgert: Shell, tiny_bundle: Path) -> None:
    *_, after = said(edgert, tiny_bundle, "The module", "reads")
    *_, alone = said(edgert, tiny_bundle, "reads")
    *_, anew = said(edgert, tiny_bundle, "The module", "/clear", "reads")
    assert anew == alone and after["role"] == "assistant"
    assert len(said(edgert, tiny_bundle, "The module", "/clear", "reads")) == 2


@pytest.mark.parametrize(
    "typed", [("a module \\", "reads"), ('"""a module', 'reads"""'), ('"""', "a module", "reads", '"""')]
)
def test_a_message_of_several_lines(edgert: Shell, tiny_bundle: Path, typed: tuple[str, ...]) -> None:
    question, _ = said(edgert, tiny_bundle, *typed)
    assert question["content"].replace(" \n", "\n") == "a module\nreads"


def test_the_system_message_stays(edgert: Shell, tiny_bundle: Path) -> None:
    messages = said(
        edgert,
        tiny_bundle,
        "file",
        "/clear",
        "/system Be long.",
        "file",
        flags=(*FLAGS, "--system", "Be brief."),
    )
    assert [(m["role"], m["content"]) for m in messages[:2]] == [("system", "Be long."), ("user", "file")]
    assert said(edgert, tiny_bundle, '/system ""', flags=(*FLAGS, "--system", "Be brief.")) == []


def test_regenerate_draws_with_the_next_seed(edgert: Shell, tiny_bundle: Path) -> None:
    warm = (*FLAGS, "--temperature", 1, "--seed")
    _, again = said(edgert, tiny_bundle, "file", "/regenerate", flags=(*warm, 1))
    _, other = said(edgert, tiny_bundle, "file", flags=(*warm, 2))
    assert again == other
    cold = talk(edgert, tiny_bundle, "file", "/regenerate", flags=(*FLAGS, "--temperature", 0))
    first, second = cold.stdout.splitlines()
    assert first == second and "temperature is 0" in cold.stderr
    assert "nothing was asked yet" in talk(edgert, tiny_bundle, "/regenerate").stderr


def test_set_as_the_flags(edgert: Shell, tiny_bundle: Path) -> None:
    done = talk(
        edgert, tiny_bundle, "/set max_tokens 2", "file", "/set", "/set max-tokens 0", "/set colour red"
    )
    assert "[2 tokens at" in done.stderr and "max_tokens            2 " in done.stdout
    assert "max_tokens: found '0'" in done.stderr and "/set colour: no such setting" in done.stderr


def test_knobs_change_between_answers_and_the_answers_stay(edgert: Shell, tiny_bundle: Path) -> None:
    done = talk(
        edgert,
        tiny_bundle,
        "file", "/clear",
        "/memory 48MiB", "/set threads 1", "/set prefetch-depth 1", "/set",
        "file",
        "/memory 1KiB", "/memory much", "/set threads", "/set threads 999", "/set skip_experts 0.5",
        flags=(*FLAGS, "--memory", "64MiB", "--threads", 2),
    )  # fmt: skip
    lines = done.stdout.splitlines()
    assert lines[0] == lines[-1]  # the two answers
    rows = {line.split()[0]: line for line in lines if line}
    assert rows["budget"].split()[1:] == ["48.0", "MiB"]
    assert rows["threads"].split()[1] == rows["prefetch_depth"].split()[1] == "1"
    assert rows["memory"].split()[1:3] == ["48.0", "MiB"]
    for words in ("memory: found 'much'", "threads: to what?", "threads: found 999", "skip_experts"):
        assert words in done.stderr


def test_what_was_saved_is_loaded(edgert: Shell, tiny_bundle: Path) -> None:
    file = edgert.home / "first.json"
    whole = said(edgert, tiny_bundle, "The module", "reads")
    talk(edgert, tiny_bundle, "The module", f"/save {file}")
    assert said(edgert, tiny_bundle, f"/load {file}", "reads") == whole


def test_what_save_does_not_write_is_not_loaded(edgert: Shell, tiny_bundle: Path) -> None:
    contents = (
        "{",
        "[]",
        '{"messages": [{"role": "root", "content": "x"}]}',
        '{"messages": [7]}',
        "[" * 100_000,
    )
    files = [edgert.home / f"{number}.json" for number in range(len(contents))]
    for file, content in zip(files, contents, strict=True):
        file.write_text(content)
    errors = talk(
        edgert, tiny_bundle, *(f"/load {file}" for file in files), "/load nowhere.json"
    ).stderr.splitlines()[1:]
    assert [
        file.name in error and error.startswith("edgert: error: ")
        for file, error in zip(files, errors, strict=False)
    ] == [True] * 5
    assert errors[5:] == ["edgert: error: nowhere.json: No such file or directory"]


def test_adapters_are_loaded_scaled_and_turned_off(edgert: Shell, tiny_bundle: Path) -> None:
    adapter = lora().write(edgert.home / "sql")
    done = talk(
        edgert,
        tiny_bundle,
        "/adapter",
        f"/adapter {adapter}:0.5",
        "/adapter sql:2",
        "/adapter off",
        "/adapter absent",
    )
    rows = [line.split()[-1] for line in done.stdout.splitlines() if line.startswith("sql")]
    assert done.stdout.startswith("no adapters") and rows == ["0.5", "2", "off"]
    assert "absent" in done.stderr


def test_the_model_can_be_changed(edgert: Shell, tiny_bundle: Path, other_bundle: Path) -> None:
    done = talk(
        edgert,
        tiny_bundle,
        "/model nosuch",
        "/model",
        f"/model {other_bundle}",
        "/model",
        "/memory",
        "file",
        "/stats",
    )
    first, second = [line for line in done.stdout.splitlines() if "budget" in line and "context" in line]
    assert first.startswith("tiny:") and second.startswith("other:")
    assert "nosuch: no such path" in done.stderr
    assert "the smallest to load it in" in done.stdout and "expert look-ups" in done.stdout


def test_errors_end_no_conversation(edgert: Shell, tiny_bundle: Path) -> None:
    done = talk(edgert, tiny_bundle, "/nonsense", "/stats", "word " * 600, "file", "/bye", "never said")
    assert "/nonsense: no such command" in done.stderr and "nothing was answered" in done.stderr
    assert "prompt: found" in done.stderr and done.stderr.count("[4 tokens at") == 1
    assert "/regenerate" in talk(edgert, tiny_bundle, "/help").stdout


def test_on_a_terminal_there_is_a_history(edgert: Shell, tiny_bundle: Path) -> None:
    command = edgert.command("chat", tiny_bundle, *FLAGS)
    shown = on_a_terminal(
        command, edgert.environment, ["The module\n", "half a line\x03", "/sta\t\n", "\x04"]
    )
    assert "Ctrl-C stops" in shown and "(Ctrl-D or /bye leaves)" in shown and "expert look-ups" in shown
    history = edgert.home / "data/state/chat_history"
    assert history.read_text().splitlines() == ["The module", "/stats"]
    assert stat.S_IMODE(history.stat().st_mode) == 0o600
    on_a_terminal([*command, "--no-history"], edgert.environment, ["secret\n", "\x04"])
    assert "secret" not in history.read_text()
