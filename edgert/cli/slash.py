"""What begins with a slash in a conversation: one table of commands."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgert import settings
from edgert.cli.terminal import note, say, table
from edgert.errors import InvalidArgumentError
from edgert.sampling import SAMPLING
from edgert.units import format_bytes

if TYPE_CHECKING:
    from edgert.cli.conversation import Conversation

_MAX_FILE_BYTES = 64 << 20
_ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class _Command:
    arguments: str
    help: str
    run: Callable[["Conversation", str], None]


def obey(conversation: "Conversation", line: str) -> None:
    """Do what `line` says. Raises InvalidArgumentError for what is no command, EOFError to leave."""
    name, _, rest = line[1:].partition(" ")
    command = COMMANDS.get(_ALIASES.get(name, name))
    if command is None:
        raise InvalidArgumentError(f"/{name[:40]}: no such command; /help names them")
    command.run(conversation, rest.strip())


def _help(conversation: "Conversation", rest: str) -> None:
    rows = [
        ("COMMAND", "DOES"),
        *((f"/{name} {c.arguments}".strip(), c.help) for name, c in COMMANDS.items()),
    ]
    say(table(rows))
    say('\nA line that ends with \\ goes on in the next; """ begins and ends a message of several lines.')


def _set(conversation: "Conversation", rest: str) -> None:
    """As the flags of the same names."""
    if not rest:
        say(table([("SETTING", "VALUE", ""), *_samplings(conversation), *_knobs(conversation)]))
        return
    drawing = {setting.name: setting for setting in SAMPLING}
    live = conversation.model.knobs()
    name, _, value = rest.partition(" ")
    name, value = name.replace("-", "_"), value.strip()
    if name in live:
        _turn(conversation, name, value, f"/set {name}")
    elif name in drawing:
        conversation.sampling[name] = drawing[name].check(value) if value else None
    else:
        there = ", ".join((*drawing, *live))
        raise InvalidArgumentError(f"/set {name[:40]}: no such setting; there are {there}")


def _samplings(conversation: "Conversation") -> Iterator[tuple[str, str, str]]:
    own = conversation.model.sampling_defaults
    for setting in SAMPLING:
        given = conversation.sampling[setting.name]
        shown = own.get(setting.name, setting.default) if given is None else given
        yield setting.name, "" if shown is None else str(shown), setting.help


def _knobs(conversation: "Conversation") -> Iterator[tuple[str, str, str]]:
    """Those that change while the model runs."""
    values = conversation.model.knobs()
    for setting in settings.knobs():
        if setting.name in values:
            value = values[setting.name]
            shown = format_bytes(value) if setting.kind == "bytes" else str(value)
            yield setting.name, shown, setting.help


def _turn(conversation: "Conversation", name: str, value: str, where: str) -> None:
    """Change a knob of the running model, and say what it gives up."""
    from edgert.cli.run import note_lossy

    if not value:
        raise InvalidArgumentError(f"{where}: to what? for example {where} auto")
    before = conversation.model.lossy_modes
    conversation.model.set_knob(name, value)
    if conversation.model.lossy_modes != before:
        note_lossy(conversation.model)


def _system(conversation: "Conversation", rest: str) -> None:
    if not rest:
        say(conversation.system or "(none)")
        return
    if conversation.plain:
        raise InvalidArgumentError("/system: needs a chat template")
    conversation.set_system("" if rest == '""' else rest)


def _clear(conversation: "Conversation", rest: str) -> None:
    conversation.clear()


def _regenerate(conversation: "Conversation", rest: str) -> None:
    temperature = conversation.sampling["temperature"]
    if temperature is None:
        temperature = conversation.model.sampling_defaults.get("temperature", 0)
    if temperature == 0:
        note("temperature is 0, so the same answer comes again; /set temperature 0.8 changes that")
    conversation.regenerate()


def _save(conversation: "Conversation", rest: str) -> None:
    path = _file(rest, "/save")
    value = {"model": conversation.model.name, "messages": conversation.messages}
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    note(f"{len(conversation.messages)} messages in {path}")


def _load(conversation: "Conversation", rest: str) -> None:
    from edgert.cli.run import read_text

    path = _file(rest, "/load")
    try:
        value = json.loads(read_text(path, _MAX_FILE_BYTES))
    except (ValueError, RecursionError) as error:
        if isinstance(error, InvalidArgumentError):
            raise
        raise InvalidArgumentError(f"{path}: not valid JSON: {error}") from None
    messages = value.get("messages") if isinstance(value, dict) else None
    if not isinstance(messages, list) or not all(map(_is_message, messages)):
        raise InvalidArgumentError(f"{path}: messages: allowed is what /save writes")
    conversation.messages, conversation.last = messages, None
    note(f"{len(messages)} messages from {path}")


def _adapter(conversation: "Conversation", rest: str) -> None:
    """Names of those that are loaded go before paths."""
    from edgert.cli.options import load_adapters, scaled

    model = conversation.model
    loaded = [adapter.name for adapter in model.adapters()]
    if rest == "off":
        model.disable_adapters()
    elif rest:
        path, scale = scaled(rest)
        if str(path) in loaded:
            model.set_adapter({str(path): scale})
        else:
            load_adapters(model, [(path, scale)])
    rows = [("ADAPTER", "KIND", "SIZE", "SCALE")]
    rows += [
        (one.name, one.kind, format_bytes(one.bytes), f"{one.scale:g}" if one.scale else "off")
        for one in model.adapters()
    ]
    say(table(rows, right=(2, 3)) if rows[1:] else "no adapters; /adapter PATH loads one")


def _memory(conversation: "Conversation", rest: str) -> None:
    model = conversation.model
    if rest:
        model.set_knob("memory", rest)
    stats = model.stats()
    rows = [("MEMORY", "")]
    for name, key in (("budget", "budget_bytes"), ("in use", "used_bytes"), ("most so far", "peak_bytes")):
        if key in stats:
            rows.append((name, format_bytes(stats[key])))
    if model.minimum_bytes:
        rows.append(("the smallest to load it in", format_bytes(model.minimum_bytes)))
    rows.append(("experts", "all in memory" if model.resident else "read as they are needed"))
    say(table(rows))


def _stats(conversation: "Conversation", rest: str) -> None:
    from edgert.cli.run import summary

    if conversation.last is None:
        raise InvalidArgumentError("/stats: nothing was answered yet")
    say(summary(conversation.last))


def _model(conversation: "Conversation", rest: str) -> None:
    from edgert.cli.run import describe

    if rest:
        conversation.change_model(rest)
    else:
        say(describe(conversation.model))


def _bye(conversation: "Conversation", rest: str) -> None:
    raise EOFError


def _file(text: str, command: str) -> Path:
    if not text:
        raise InvalidArgumentError(f"{command}: which file? for example {command} talk.json")
    return Path(text).expanduser()


def _is_message(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and value.keys() == {"role", "content"}
        and value["role"] in _ROLES
        and isinstance(value["content"], str)
    )


COMMANDS = {
    "help": _Command("", "these lines", _help),
    "set": _Command(
        "[NAME [VALUE]]",
        "change how answers are drawn (without a value: as the model states), or a knob",
        _set,
    ),
    "system": _Command("[TEXT]", 'show or change the system message; "" for none', _system),
    "clear": _Command("", "begin anew; the system message stays", _clear),
    "regenerate": _Command("", "answer the last question again, with the next seed", _regenerate),
    "save": _Command("FILE", "write the conversation", _save),
    "load": _Command("FILE", "go on with a conversation that /save wrote", _load),
    "adapter": _Command("[NAME[:SCALE]|PATH[:SCALE]|off]", "show or change the adapters", _adapter),
    "memory": _Command("[SIZE]", "what the model takes of its budget, or another budget", _memory),
    "stats": _Command("", "figures of the last answer", _stats),
    "model": _Command("[NAME]", "show the model, or go on with another", _model),
    "bye": _Command("", "leave, as Ctrl-D does", _bye),
}
_ALIASES = {"?": "help", "exit": "bye", "quit": "bye", "regen": "regenerate"}
