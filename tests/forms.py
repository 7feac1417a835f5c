"""Forms that tests of constrained decoding ask for, and whether a form lets a text through."""

from typing import Any

from edgert.model import Model
from edgert.structured import Constraint

POINT = {
    "type": "object",
    "properties": {"x": {"type": "integer", "minimum": 0, "maximum": 99}, "y": {"enum": ["a", "b"]}},
    "required": ["x", "y"],
    "additionalProperties": False,
}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "strict": True,
            "parameters": {
                "type": "object",
                "properties": {"city": {"enum": ["Paris", "Rome"]}, "days": {"enum": [1, 2]}},
                "required": ["city"],
                "additionalProperties": False,
            },
        },
    },
    {"type": "function", "function": {"name": "now"}},
]


def json_schema(schema: object, **options: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "form", "schema": schema, **options}}


def allows(constraint: Constraint, model: Model, text: str) -> bool:
    """Whether `text` may come, and the reply may end there."""
    left = model.tokenizer.encode(text, add_special_tokens=False)
    while left:
        token = left.pop(0)
        if not allowed(constraint, token):
            return False
        if not constraint.accept(token):
            return not left
    return any(allowed(constraint, token) for token in model.eos_token_ids)


def allowed(constraint: Constraint, token: int) -> bool:
    mask = constraint.mask()
    return mask is None or bool(mask[token // 8] >> token % 8 & 1)
