"""edgert/_native.pyi says what the extension has: every name, every parameter, every default."""

import ast
import inspect
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

import edgert
from edgert import _native

STUB = ast.parse(Path(edgert.__file__).with_name("_native.pyi").read_text())
CLASSES = {node.name: node for node in STUB.body if isinstance(node, ast.ClassDef)}
FUNCTIONS = {node.name: node for node in STUB.body if isinstance(node, ast.FunctionDef)}


def names(body: Iterable[ast.stmt]) -> set[str]:
    """What statements of the stub declare."""
    declared = {node.name for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    targets = (node.target for node in body if isinstance(node, ast.AnnAssign))
    return declared | {target.id for target in targets if isinstance(target, ast.Name)}


def parameters(function: ast.FunctionDef) -> list[tuple[str, str | None]]:
    """Names and defaults; those after a ("*", None) are by keyword only."""
    given = function.args
    defaults = [None] * (len(given.args) - len(given.defaults)) + [ast.unparse(d) for d in given.defaults]
    by_keyword = [None if d is None else ast.unparse(d) for d in given.kw_defaults]
    star = [("*", None)] if given.kwonlyargs else []
    return [
        *zip((one.arg for one in given.args), defaults, strict=True),
        *star,
        *zip((one.arg for one in given.kwonlyargs), by_keyword, strict=True),
    ]


def bound_parameters(bound: Any) -> list[tuple[str, str | None]]:
    """The same, of a function of the extension: pybind11 opens its docstring with the signature."""
    (function,) = ast.parse(f"def {bound.__doc__.splitlines()[0]}: ...").body
    assert isinstance(function, ast.FunctionDef)
    return parameters(function)


def test_the_module() -> None:
    there = {name for name in dir(_native) if not name.startswith("__")} | {"__version__"}
    assert names(STUB.body) == there


@pytest.mark.parametrize("name", CLASSES)
def test_the_members_of_a_class(name: str) -> None:
    there = {member for member in dir(getattr(_native, name)) if not member.startswith("_")}
    assert names(CLASSES[name].body) - {"__init__"} == there


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_parameters_of_a_function(name: str) -> None:
    assert parameters(FUNCTIONS[name]) == bound_parameters(getattr(_native, name))


@pytest.mark.parametrize("name", CLASSES)
def test_the_parameters_of_methods(name: str) -> None:
    for node in CLASSES[name].body:
        if isinstance(node, ast.FunctionDef):
            method = inspect.getattr_static(getattr(_native, name), node.name)
            declared, bound = parameters(node), bound_parameters(method)
            if "**kwargs" in method.__doc__.splitlines()[0]:  # checks the names of its settings itself
                declared = declared[: declared.index(("*", None))]
            assert declared == bound, node.name
