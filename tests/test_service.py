"""The daemon as a service: its units."""

from __future__ import annotations

import configparser
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from shell import Shell, assert_fails

from edgert import service
from edgert.devices import PROFILES


def parsed(text: str) -> configparser.ConfigParser:
    unit = configparser.ConfigParser(strict=False, interpolation=None, delimiters=("=",))
    unit.optionxform = str  # type: ignore[assignment, method-assign]
    unit.read_string(text)
    return unit


def test_the_unit_runs_this_edgert_with_what_is_asked_for(edgert: Shell) -> None:
    done = edgert(
        "service", "print", "docs-moe,name=my model,pin".replace("my model", "m"), "--memory", "2GiB"
    )
    assert done.returncode == 0, done.stderr
    unit = parsed(done.stdout)["Service"]
    assert unit["ExecStart"] == f"{sys.executable} -m edgert serve docs-moe,name=m,pin --memory 2GiB"
    assert int(unit["MemoryMax"]) == (2 << 30) + service.BESIDE_BUDGET_BYTES
    assert unit["Type"] == "notify" and unit["WatchdogSec"]


def test_without_a_stated_budget_the_limit_is_a_share_and_the_budget_follows(edgert: Shell) -> None:
    assert parsed(edgert("service", "print").stdout)["Service"]["MemoryMax"].endswith("%")


def test_the_configuration_file_states_the_budget_too(tmp_path: Path) -> None:
    (tmp_path / "edgert.toml").write_text('memory = "1GiB"\n')
    done = Shell(tmp_path, {"EDGERT_CONFIG": str(tmp_path / "edgert.toml")})("service", "print")
    assert int(parsed(done.stdout)["Service"]["MemoryMax"]) == (1 << 30) + service.BESIDE_BUDGET_BYTES


def test_the_socket_unit_has_the_address(edgert: Shell) -> None:
    done = edgert("service", "--socket", "print", "--host", "::1", "--port", "9000")
    assert "ListenStream=[::1]:9000" in done.stdout


def test_words_are_quoted_for_systemd() -> None:
    text = service.service_unit(["a b", "50%", "$HOME", 'say "x"\\'])
    (line,) = [line for line in text.splitlines() if line.startswith("ExecStart=")]
    assert line.endswith(r'serve "a b" 50%% "$$HOME" "say \"x\"\\"')


def test_paths_are_made_absolute_and_hidden_ones_are_said(edgert: Shell, tmp_path: Path) -> None:
    (tmp_path / "m.edgert").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        assert service.absolute(["m.edgert,pin", "--port", "9", "docs-moe"]) == [
            f"{tmp_path}/m.edgert,pin", "--port", "9", "docs-moe"
        ]  # fmt: skip
    done = edgert("service", "print", "/home/pi/m.edgert")
    assert done.returncode == 0 and "cannot reach /home/pi/m.edgert" in done.stderr


def test_install_and_uninstall_below_a_root(edgert: Shell, tmp_path: Path) -> None:
    root = tmp_path / "image"
    assert edgert("service", "--socket", "--root", root, "install", "docs-moe").returncode == 0
    folder = root / "etc/systemd/system"
    assert sorted(path.name for path in folder.iterdir()) == ["edgertd.service", "edgertd.socket"]
    assert "serve docs-moe" in (folder / "edgertd.service").read_text()
    assert edgert("service", "--root", root, "uninstall").returncode == 0
    assert list(folder.iterdir()) == []
    assert "no service" in edgert("service", "--root", root, "uninstall").stderr


def test_what_serve_refuses_is_not_installed(edgert: Shell, tmp_path: Path) -> None:
    assert_fails(
        edgert("service", "--root", tmp_path / "image", "install", "--host", "0.0.0.0"), "--api-key-file"
    )
    assert not (tmp_path / "image").exists()


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
def test_systemd_knows_every_line(tmp_path: Path) -> None:
    text = (PROFILES / service.SERVICE).read_text().replace("/usr/local/bin/edgert", "/bin/true")
    (tmp_path / service.SERVICE).write_text(text)
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(tmp_path / service.SERVICE)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert service.SERVICE not in done.stderr, done.stderr
