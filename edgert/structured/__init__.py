"""Replies in a form: constrained decoding (json_schema, grammars, tool calls), and replies taken apart."""

from edgert.structured.constraint import Constraint
from edgert.structured.reader import Delta
from edgert.structured.reply import ReplyParser
from edgert.structured.request import constraint_of

__all__ = ["Constraint", "Delta", "ReplyParser", "constraint_of"]
