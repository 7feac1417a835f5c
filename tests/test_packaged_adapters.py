"""The adapters that the package carries switch as patches of codes, and lose nothing by it."""

import json
from pathlib import Path

import numpy as np
import pytest

import edgert
from edgert.adapter_paths import locate_adapter, packaged_adapters
from edgert.cli.main import main
from edgert.errors import NotFoundError

NAMES = [name for name, _ in packaged_adapters()]


def test_there_are_two() -> None:
    assert NAMES == ["rust", "sql"]


@pytest.mark.parametrize("name", NAMES)
def test_every_code_can_be_had_and_is_given_back(name: str) -> None:
    prompt = list(range(40, 72))
    with edgert.load() as model:
        plain = model.logits(prompt)
        model.load_adapter(name)
        model.set_adapter(name)
        patched = model.logits(prompt)
        (info,) = model.adapters()
        assert info.mode == "patch" and info.why == ""
        assert info.patch_counts["values"] > 0
        assert info.patch_counts["unchanged"] == info.patch_counts["clamped"] == 0
        assert not np.array_equal(patched, plain)
        model.set_adapter([])
        np.testing.assert_array_equal(model.logits(prompt), plain)


def test_a_path_goes_before_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert locate_adapter("sql").name == "sql.adapter"
    Path("sql").touch()
    assert locate_adapter("sql").name == "sql"
    assert str(locate_adapter("elsewhere")) == "elsewhere"


def test_a_server_takes_a_name() -> None:
    from edgert.server.configuration import Configuration, served_models
    from edgert.server.opening import check_sources

    check_sources(Configuration(models=served_models(["docs-moe,adapter=sql,adapter=r=rust:0.5"])))
    with pytest.raises(NotFoundError, match="elsewhere: no such adapter"):
        check_sources(Configuration(models=served_models(["docs-moe,adapter=elsewhere"])))


def test_the_demo_switches_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--max-tokens", "4", "--json"]) == 0
    switches = json.loads(capsys.readouterr().out)["adapters"]
    assert [switch["adapter"] for switch in switches] == [None, *NAMES] * 2
    assert all(switch["switch_ms"] > 0 for switch in switches)


def test_show_takes_a_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["adapter", "show", "sql", "--json"]) == 0
    assert "layers.0.attention.q" in capsys.readouterr().out
