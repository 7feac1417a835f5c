"""edgert completion: what the TAB key offers, as a script for the shell."""

import argparse
import sys
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from edgert.cli.options import Subparsers

if TYPE_CHECKING:
    from edgert.cli.tree import Command

# The names that `edgert list` shows, without waiting for Python.
_MODELS = """\
_edgert_models() {
    local folder one
    folder="${EDGERT_HOME:-${XDG_DATA_HOME:-$HOME/.local/share}/edgert}/models"
    printf '%s\\n' docs-moe
    [ -d "$folder" ] || return 0
    command ls "$folder" | command sed 's/\\.edgert$//'
}
"""


def register(subparsers: Subparsers) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "completion",
        help="print a script that completes commands in a shell",
        description="Print a script that lets a shell complete edgert's commands, flags, names of models and files. bash: "
        "edgert completion bash > ~/.local/share/bash-completion/completions/edgert; zsh: edgert completion zsh > a file _edgert in "
        "a folder of $fpath; fish: edgert completion fish > ~/.config/fish/completions/edgert.fish",
    )
    parser.add_argument("shell", metavar="SHELL", choices=tuple(_SCRIPTS), help="bash, zsh or fish")
    return parser


def run(args: argparse.Namespace) -> int:
    from edgert.cli.tree import command_tree

    sys.stdout.write(_SCRIPTS[args.shell](command_tree()))
    return 0


def _bash(tree: "Command") -> str:
    return (
        f"# bash completion for edgert, made by `edgert completion bash`\n{_MODELS}\n"
        "_edgert() {\n"
        '    local at=edgert i words="" files=yes models="" cur="${COMP_WORDS[COMP_CWORD]}"\n'
        "    for ((i = 1; i < COMP_CWORD; i++)); do\n"
        f'        case "$at ${{COMP_WORDS[i]}}" in\n            {_paths(tree)}) at="$at ${{COMP_WORDS[i]}}" ;;\n        esac\n'
        "    done\n"
        '    case "$cur" in\n'
        f'        -*) files=; case "$at" in\n{_each(tree, _flags_of)}        esac ;;\n'
        f'        *) case "$at ${{COMP_WORDS[COMP_CWORD - 1]}}" in\n{_values(tree)}'
        f'            *) case "$at" in\n{_each(tree, _places_of)}            esac ;;\n        esac ;;\n'
        "    esac\n"
        '    [[ $models ]] && words+=" $(_edgert_models)"\n'
        '    COMPREPLY=($(compgen -W "$words" -- "$cur"))\n'
        '    [[ $files ]] && COMPREPLY+=($(compgen -f -- "$cur"))\n'
        "    return 0\n"
        "}\n"
        "complete -o filenames -F _edgert edgert\n"
    )


def _zsh(tree: "Command") -> str:
    return (
        f"#compdef edgert\n# zsh completion for edgert, made by `edgert completion zsh`\n{_MODELS}\n"
        "_edgert() {\n"
        '    local at=edgert i given="" files=yes models=""\n'
        "    local -a described\n"
        "    for ((i = 2; i < CURRENT; i++)); do\n"
        f'        case "$at ${{words[i]}}" in\n            {_paths(tree)}) at="$at ${{words[i]}}" ;;\n        esac\n'
        "    done\n"
        '    case "$PREFIX" in\n'
        f'        -*) files=; case "$at" in\n{_each(tree, _described_flags_of)}        esac ;;\n'
        f'        *) case "$at ${{words[CURRENT - 1]}}" in\n{_values(tree).replace("words=", "given=")}'
        f'            *) case "$at" in\n{_each(tree, _described_places_of)}            esac ;;\n        esac ;;\n'
        "    esac\n"
        "    [[ -n $models ]] && compadd -- $(_edgert_models)\n"
        "    [[ -n $given ]] && compadd -- ${=given}\n"
        "    (( $#described )) && _describe -t edgert edgert described\n"
        "    [[ -n $files ]] && _files\n"
        "    return 0\n"
        "}\n"
        "compdef _edgert edgert\n"
    )


def _fish(tree: "Command") -> str:
    lines = [
        "# fish completion for edgert, made by `edgert completion fish`",
        "function __edgert_models",
        "    set -l folder $HOME/.local/share/edgert/models",
        "    set -q XDG_DATA_HOME; and set folder $XDG_DATA_HOME/edgert/models",
        "    set -q EDGERT_HOME; and set folder $EDGERT_HOME/models",
        "    echo docs-moe",
        "    test -d $folder; and command ls $folder | command sed 's/\\.edgert$//'",
        "end",
        "function __edgert_at",
        "    set -l at edgert",
        "    for word in (commandline -opc)[2..-1]",
        '        switch "$at $word"',
        f"            case {' '.join(_quoted(' '.join(one.words)) for one in tree.all() if one is not tree)}",
        '                set at "$at $word"',
        "        end",
        "    end",
        '    test "$at" = "$argv"',
        "end",
    ]
    for command in tree.all():
        here = f"complete -c edgert -n '__edgert_at {' '.join(command.words)}'"
        lines += [f"{here} -f -a {below.words[-1]} -d {_quoted(below.summary)}" for below in command.commands]
        for argument in command.arguments:
            if argument.choices:
                lines.append(f"{here} -f -a {_quoted(' '.join(argument.choices))}")
            elif _is_model(argument.name):
                lines.append(f"{here} -a '(__edgert_models)'")
        if not command.arguments:
            lines.append(f"{here} -f")
        for option in command.options:
            names = [f"-l {flag[2:]}" if flag.startswith("--") else f"-s {flag[1:]}" for flag in option.flags]
            takes = "" if option.value is None else " -r" if option.takes_file else " -x"
            if option.choices:
                takes += f" -a {_quoted(' '.join(option.choices))}"
            lines.append(f"{here} {' '.join(names)}{takes} -d {_quoted(option.help)}")
    return "\n".join(lines) + "\n"


_SCRIPTS: dict[str, Callable[["Command"], str]] = {"bash": _bash, "zsh": _zsh, "fish": _fish}


def _paths(tree: "Command") -> str:
    return "|".join(f'"{" ".join(one.words)}"' for one in tree.all() if one is not tree)


def _each(tree: "Command", body: Callable[["Command"], str]) -> str:
    return "".join(f'            "{" ".join(one.words)}") {body(one)} ;;\n' for one in tree.all())


def _flags_of(command: "Command") -> str:
    return f'words="{" ".join(flag for option in command.options for flag in option.flags)}"'


def _places_of(command: "Command") -> str:
    """What stands where no flag does: a command, a choice, a model or a file."""
    if command.commands:
        return f'files=; words="{" ".join(below.words[-1] for below in command.commands)}"'
    choices = [choice for argument in command.arguments for choice in argument.choices]
    if choices:
        return f'files=; words="{" ".join(choices)}"'
    if any(_is_model(argument.name) for argument in command.arguments):
        return "models=yes"
    return "files=yes" if command.arguments else "files="


def _values(tree: "Command") -> str:
    """What follows the flags that take something."""
    lines = []
    for command in tree.all():
        for option in command.options:
            if option.value is not None and not option.takes_file:
                flags = "|".join(f'"{" ".join(command.words)} {flag}"' for flag in option.flags)
                lines.append(f'            {flags}) files=; words="{" ".join(option.choices)}" ;;\n')
            elif option.value is not None:
                flags = "|".join(f'"{" ".join(command.words)} {flag}"' for flag in option.flags)
                lines.append(f"            {flags}) ;;\n")
    return "".join(lines)


def _described_flags_of(command: "Command") -> str:
    return _described((flag, option.help) for option in command.options for flag in option.flags)


def _described_places_of(command: "Command") -> str:
    if command.commands:
        return f"files=; {_described((below.words[-1], below.summary) for below in command.commands)}"
    return _places_of(command).replace("words=", "given=")


def _described(rows: Iterable[tuple[str, str]]) -> str:
    return f"described=({' '.join(_quoted(f'{name}:{about}') for name, about in rows)})"


def _quoted(text: str) -> str:
    """In single quotes, which bash, zsh and fish read alike where the text holds neither quote nor backslash."""
    return "'" + text.replace("\\", "").replace("'", "") + "'"


def _is_model(name: str) -> bool:
    return name.startswith("MODEL")
