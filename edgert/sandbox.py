"""Jinja as Hugging Face renders it, for templates that are not trusted.

A template sees plain data and cannot reach Python. Its work is bounded: loop bodies, macros, filters, tests, calls and
text that is written or searched draw on one allowance of steps, and operations that could make something huge at once
are checked beforehand. What is counted is the same on every run; nothing depends on the clock.
"""

import json
from collections.abc import Callable, ItemsView, Iterator, Mapping, Sequence, Sized, ValuesView
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

_MAX_INTEGER_BITS = 1024
_MAX_INDENT = 64
_MAX_PRECISION = 64
_MAX_STRIPPED = 256  # characters that strip() takes at the ends: each one is sought among all of them
_SEARCHED_A_STEP = 64  # characters; looking at text is that much cheaper than writing it

# fmt: off
_FILTERS = (
    "abs", "attr", "capitalize", "count", "d", "default", "dictsort", "e", "escape", "first", "float", "forceescape",
    "groupby", "indent", "int", "items", "join", "last", "length", "list", "lower", "map", "max", "min", "reject",
    "rejectattr", "replace", "reverse", "round", "safe", "select", "selectattr", "sort", "string", "title", "trim",
    "truncate", "unique", "upper", "wordcount",
)
# Filters that look at a list's elements without writing out their text.
_STRUCTURAL = frozenset((
    "attr", "count", "d", "default", "dictsort", "first", "groupby", "items", "last", "length", "list", "map", "max",
    "min", "reject", "rejectattr", "reverse", "select", "selectattr", "sort", "unique",
))
# Tests that look into their operands.
_LOOKING_TESTS = (
    "!=", "<", "<=", "==", ">", ">=", "eq", "equalto", "ge", "greaterthan", "gt", "in", "le", "lessthan", "lower", "lt",
    "ne", "upper",
)
# Methods that can build a huge string from a small number, and those that reach other code.
_FORBIDDEN_METHODS = frozenset((
    "center", "encode", "expandtabs", "format", "format_map", "ljust", "maketrans", "rjust", "to_bytes", "translate",
    "zfill",
))
# fmt: on


class TemplateRefusal(Exception):
    """The template called raise_exception."""


class _Namespace(Namespace):
    """Without what it holds in its text, which a template could nest without end."""

    def __repr__(self) -> str:
        return "<namespace>"


class _Generation(Extension):
    """{% generation %} marks the assistant's words for training; here it is transparent."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class SandboxedEnvironment(ImmutableSandboxedEnvironment):
    """The sandbox, with an allowance of steps."""

    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[loopcontrols, _Generation],
            finalize=self._written,
        )
        self.steps = 0
        self.globals = {
            "namespace": _Namespace,
            "dict": dict,
            "range": self._range,
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
        }
        self.filters = {name: self._counted(name, self.filters[name]) for name in _FILTERS}
        self.filters["tojson"] = self._tojson
        self.tests.update({name: self._looking(self.tests[name]) for name in _LOOKING_TESTS})

    # --- the allowance ------------------------------------------------------------------------------

    def spend(self, steps: int) -> str:
        """Draw on the allowance; every loop body and macro begins with this."""
        self.steps -= steps
        if self.steps < 0:
            raise jinja2.TemplateRuntimeError("it takes too many steps or makes too much text")
        return ""

    def measured(self, value: Any) -> Any:
        """Pay for walking through `value` once."""
        if isinstance(value, int):
            _check_integer(value.bit_length())
        self.spend(1 + (len(value) if isinstance(value, Sized) else 0))
        return value

    def weighed(self, value: Any, text: bool = False) -> Any:
        """Pay for all that `value` contains, as often as it contains it; its strings are written if `text`, else only
        searched."""
        if isinstance(value, str):
            self.spend(1 + (len(value) if text else len(value) // _SEARCHED_A_STEP))
            return value
        self.spend(1)
        if isinstance(value, Mapping):
            for key, item in value.items():
                self.weighed(key, text)
                self.weighed(item, text)
        elif isinstance(value, list | tuple | ItemsView | ValuesView):
            for item in value:
                self.weighed(item, text)
        elif isinstance(value, Sized):  # such as a range
            self.spend(len(value))
        return value

    def join_written(self, *values: Any) -> str:
        """The operator ~."""
        return "".join(str(self._written(value)) for value in values)

    def _written(self, value: Any) -> Any:
        if isinstance(value, jinja2.Undefined):
            return value
        self.weighed(value, text=True)
        return str(value)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        return _Metering(self).visit(tree)  # type: ignore[no-any-return]

    # --- what templates may do ----------------------------------------------------------------------

    def unsafe_undefined(self, obj: Any, attribute: str) -> jinja2.Undefined:
        raise SecurityError(f"{attribute!r} of {type(obj).__name__} is not offered")

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if attr in _FORBIDDEN_METHODS and not isinstance(obj, Mapping):
            return False
        return super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> None:
        """str.format is not offered, so is_safe_attribute may refuse it."""

    def getitem(self, obj: Any, argument: Any) -> Any:
        self.weighed(argument)
        return (
            self.measured(super().getitem(obj, argument))
            if isinstance(argument, slice)
            else super().getitem(obj, argument)
        )

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "%" and isinstance(left, str):
            raise jinja2.TemplateRuntimeError("formatting with % is not allowed")
        if operator == "*":
            for value, times in ((left, right), (right, left)):
                if isinstance(value, Sized) and isinstance(times, int):
                    self.spend(len(value) * max(0, times))
        if isinstance(left, int) and isinstance(right, int):
            bits = (
                left.bit_length() * max(1, right)
                if operator == "**"
                else left.bit_length() + right.bit_length()
            )
            _check_integer(bits)
        return self.measured(super().call_binop(context, operator, left, right))

    def call(self, context: Any, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        owner, name = getattr(function, "__self__", None), getattr(function, "__name__", "")
        if owner is not self:  # the metering itself pays apart
            for value in args:
                self.weighed(value)
            if not isinstance(owner, Mapping):  # whose methods only look up
                self.weighed(owner)
        self._check_replace(owner, name, args)
        if name == "join" and args:
            self._check_join(owner, args[0])
        if name in ("strip", "lstrip", "rstrip") and args:
            _check_stripped(args[0])
        result = super().call(context, function, *args, **kwargs)
        return result if isinstance(result, jinja2.Undefined) else self.measured(result)

    def _check_replace(self, text: Any, name: str, args: Sequence[Any]) -> None:
        if name == "replace" and isinstance(text, str) and len(args) >= 2:
            old, new = str(args[0]), str(args[1])
            self.spend((text.count(old) if old else len(text) + 1) * len(new))

    def _check_join(self, separator: Any, values: Any) -> None:
        if isinstance(values, Sized):
            self.spend(len(values) * len(str(separator)))

    def _counted(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """A filter that pays for its operands and its result."""
        passes = 1 if hasattr(function, "jinja_pass_arg") else 0

        def counted(*args: Any, **kwargs: Any) -> Any:
            text = name not in _STRUCTURAL
            operands = [
                list(value) if text and isinstance(value, Iterator) else value for value in args[passes:]
            ]
            for value in (*operands, *kwargs.values()):
                self.weighed(value, text)

            def option(index: int, keyword: str, default: Any) -> Any:
                return operands[index] if len(operands) > index else kwargs.get(keyword, default)

            if name == "replace":
                self._check_replace(str(operands[0]), name, operands[1:])
            if name == "join":
                self._check_join(option(1, "d", ""), operands[0])
            if name == "indent":
                _check_indent(option(1, "width", 4))
            if name == "round":
                _check_precision(option(1, "precision", 0))
            if name == "trim":
                _check_stripped(option(1, "chars", None))
            return self.measured(function(*args[:passes], *operands, **kwargs))

        if passes:
            counted.jinja_pass_arg = function.jinja_pass_arg  # type: ignore[attr-defined]
        return counted

    def _looking(self, function: Any) -> Callable[..., Any]:
        """A test that pays for its operands."""

        def looking(*operands: Any) -> Any:
            for value in operands:
                self.weighed(value)
            return function(*operands)

        return looking

    def _range(self, *arguments: int) -> range:
        values = range(*arguments)
        if len(values) > self.steps:  # len() itself refuses what does not fit a word
            raise jinja2.TemplateRuntimeError("range is too long")
        return values

    def _tojson(
        self,
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: Any = None,
        sort_keys: bool = False,
    ) -> str:
        _check_indent(indent or 0)
        self.weighed(value, text=True)
        self.weighed(separators, text=True)
        return json.dumps(
            value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
        )


class _Metering(jinja2.visitor.NodeTransformer):
    """Makes loops, macros, the template's own text, comparisons, keys and ~ draw on the allowance."""

    def __init__(self, environment: SandboxedEnvironment) -> None:
        self._environment = environment

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = _call("measured", [node.iter])
        node.body.insert(0, _spend(node.body))
        return node

    def visit_Macro(self, node: nodes.Macro) -> nodes.Node:
        self.generic_visit(node)
        node.body.insert(0, _spend(node.body))
        return node

    def visit_CallBlock(self, node: nodes.CallBlock) -> nodes.Node:
        self.generic_visit(node)
        node.body.insert(0, _spend(node.body))
        return node

    def visit_Output(self, node: nodes.Output) -> list[nodes.Node]:
        self.generic_visit(node)
        text = sum(len(part.data) for part in node.nodes if isinstance(part, nodes.TemplateData))
        return [_pay(text), node] if text else [node]

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        node.expr = _call("weighed", [node.expr])
        for operand in node.ops:
            operand.expr = _call("weighed", [operand.expr])
        return node

    def visit_Pair(self, node: nodes.Pair) -> nodes.Node:
        self.generic_visit(node)
        node.key = _call("weighed", [node.key])  # the hash of a nested key
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _call("join_written", node.nodes)


def _spend(body: Sequence[nodes.Node]) -> nodes.Node:
    return _pay(sum(1 + sum(1 for _ in part.find_all(nodes.Node)) for part in body))


def _pay(steps: int) -> nodes.Node:
    return nodes.ExprStmt(_call("spend", [nodes.Const(max(1, steps))]))


def _call(name: str, arguments: list[Any]) -> nodes.Call:
    return nodes.Call(nodes.EnvironmentAttribute(name), arguments, [], None, None)


def _check_integer(bits: int) -> None:
    if bits > _MAX_INTEGER_BITS:
        raise jinja2.TemplateRuntimeError(f"integers of more than {_MAX_INTEGER_BITS} bits are not allowed")


def _check_precision(digits: Any) -> None:
    if isinstance(digits, int | float) and abs(digits) > _MAX_PRECISION:
        raise jinja2.TemplateRuntimeError(f"rounding to more than {_MAX_PRECISION} digits is not allowed")


def _check_stripped(characters: Any) -> None:
    if isinstance(characters, str) and len(characters) > _MAX_STRIPPED:
        raise jinja2.TemplateRuntimeError(f"stripping more than {_MAX_STRIPPED} characters is not allowed")


def _check_indent(width: Any) -> None:
    if (isinstance(width, str) and len(width) > _MAX_INDENT) or (
        isinstance(width, int) and width > _MAX_INDENT
    ):
        raise jinja2.TemplateRuntimeError(f"an indent of more than {_MAX_INDENT} is not allowed")


def _raise_exception(message: Any) -> None:
    raise TemplateRefusal(str(message)[:400])


def _strftime_now(format: str) -> str:
    if len(format) > 64 or any(character.isdigit() for character in format):
        raise jinja2.TemplateRuntimeError(
            "strftime_now takes a format of at most 64 characters without digits"
        )
    return datetime.now().strftime(format)
