"""docs/recipes.md: its recipes run, and what is not built is refused by name."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from edgert import _native
from edgert.errors import CorruptError, UnsupportedError

TEXT = (Path(__file__).parent.parent / "docs" / "recipes.md").read_text()
RECIPES = {
    recipe["architecture"]: recipe
    for recipe in map(json.loads, re.findall(r"```json\n(.*?)```", TEXT, re.DOTALL))
}


def test_all_are_there() -> None:
    assert set(RECIPES) == {"granitemoe", "glm4_moe", "deepseek_v3", "gpt_oss", "qwen3_next"}


@pytest.mark.parametrize("name", RECIPES)
def test_layers_name_blocks(name: str) -> None:
    assert set(RECIPES[name]["layers"]) == set(range(len(RECIPES[name]["blocks"])))


@pytest.mark.parametrize("name", RECIPES)
def test_what_runs(name: str) -> None:
    _native.check_recipe(json.dumps(RECIPES[name]))


@pytest.mark.parametrize(
    ("changes", "operation"),
    [({"kind": "mamba"}, "mamba"), ({"output_gate": "tanh"}, "tanh"), ({"alibi": True}, "alibi")],
)
def test_what_is_not_built_is_refused_by_name(changes: dict[str, object], operation: str) -> None:
    """In a recipe that is otherwise Granite's, which runs."""
    changed = json.loads(json.dumps(RECIPES["granitemoe"]))
    changed["blocks"][0]["mixer"].update(changes)
    with pytest.raises(UnsupportedError, match=operation):
        _native.check_recipe(json.dumps(changed))


IMPOSSIBLE = [
    ("deepseek_v3", {"kv_rank": 500}, "kv_rank"),
    ("deepseek_v3", {"value_head_dim": 8}, "value_head_dim"),
    ("deepseek_v3", {"rope_head_dim": 2}, "inv_freq"),
    ("qwen3_next", {"num_value_heads": 24}, "num_value_heads"),
    ("qwen3_next", {"conv_kernel": 9}, "conv_kernel"),
    ("qwen3_next", {"conv_kernel": 1}, "conv_kernel"),
]


@pytest.mark.parametrize(("name", "changes", "key"), IMPOSSIBLE)
def test_sizes_that_fit_no_operation(name: str, changes: dict[str, int], key: str) -> None:
    changed = json.loads(json.dumps(RECIPES[name]))
    changed["blocks"][0]["mixer"].update(changes)
    with pytest.raises(CorruptError, match=key):
        _native.check_recipe(json.dumps(changed))
