"""docs/recipes.md: the form holds architectures to come, and what is not built is refused by name."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from edgert import _native
from edgert.errors import UnsupportedError

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


@pytest.mark.parametrize("name", ["granitemoe", "glm4_moe", "gpt_oss"])
def test_what_runs(name: str) -> None:
    _native.check_recipe(json.dumps(RECIPES[name]))


@pytest.mark.parametrize(
    ("name", "operation"),
    [
        ("deepseek_v3", "latent_attention"),
        ("qwen3_next", "gated_delta"),
    ],
)
def test_what_is_not_built_is_refused_by_name(name: str, operation: str) -> None:
    with pytest.raises(UnsupportedError, match=operation):
        _native.check_recipe(json.dumps(RECIPES[name]))


@pytest.mark.parametrize("key", ["output_gate"])
def test_each_new_key_is_refused_by_itself(key: str) -> None:
    """In a recipe that is otherwise Granite's, which runs."""
    changed = json.loads(json.dumps(RECIPES["granitemoe"]))
    changed["blocks"][0]["mixer"][key] = RECIPES["qwen3_next"]["blocks"][-1]["mixer"][key]
    with pytest.raises(UnsupportedError, match=key):
        _native.check_recipe(json.dumps(changed))
