"""Conversions and evaluations on a Ray cluster of two machines' worth of processes: the same bytes and sums."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from bundles import contents
from peft_directories import lora
from shell import Shell, assert_fails

pytest.importorskip("ray")


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Of a cluster of two nodes with a core each."""
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        node = {"num_cpus": 1, "object_store_memory": 80 << 20}
        cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
        try:
            cluster.add_node(**node)
            cluster.wait_for_nodes()
            yield cluster.address
        finally:
            cluster.shutdown()


def test_a_bundle_is_that_of_one_machine_byte_for_byte(
    edgert: Shell, tiny_source: Path, address: str
) -> None:
    for number, flags in enumerate([(), ("--split-experts", "--remainders"), ("--expert-format", "nl3")]):
        here, there = edgert.home / f"here{number}" / "m.edgert", edgert.home / f"there{number}" / "m.edgert"
        for path in (here, there):
            path.parent.mkdir()
        first = edgert.json("convert", tiny_source, here, *flags)
        second = edgert.json("convert", tiny_source, there, *flags, "--ray", address)
        assert contents(here) == contents(there)
        assert first | {"path": ""} == second | {"path": ""}
        assert [path.name for path in there.parent.iterdir()] == ["m.edgert"]


def test_what_a_calibration_says_travels(
    edgert: Shell, tiny_source: Path, tiny_f32_bundle: Path, address: str
) -> None:
    text, calibration = edgert.home / "text.txt", edgert.home / "c.calibration"
    text.write_text("The module reads the file and returns the number of bytes. " * 8)
    assert edgert("calibrate", tiny_f32_bundle, "--text", text, "--out", calibration).returncode == 0
    flags = ("--calibration", calibration, "--expert-bits", "6")
    here, there = edgert.home / "here.edgert", edgert.home / "there.edgert"
    edgert.json("convert", tiny_source, here, *flags)
    edgert.json("convert", tiny_source, there, *flags, "--ray", address)
    assert contents(here) == contents(there)


def test_an_evaluation_is_that_of_one_machine(
    edgert: Shell, tiny_bundle: Path, tiny_f32_bundle: Path, address: str
) -> None:
    text = edgert.home / "text.txt"
    text.write_text("The module reads the file and returns the number of bytes. " * 20)
    adapter = lora().write(edgert.home / "sql")
    windows = ("--text", text, "--context", 64, "--stride", 32)
    for flags in (("--reference", tiny_f32_bundle), ("--adapter", f"{adapter}:0.5")):
        asked = ("eval", tiny_bundle, *windows, *flags)
        assert edgert.json(*asked, "--ray", address) == edgert.json(*asked)


def test_errors_come_back_in_one_line(
    edgert: Shell, tiny_source: Path, tiny_bundle: Path, address: str
) -> None:
    from safetensors.numpy import load_file, save_file

    broken = edgert.home / "broken"
    broken.mkdir()
    for path in tiny_source.iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    tensors = load_file(broken / "model.safetensors")
    name = next(name for name in tensors if "experts.3.up_proj" in name)
    tensors[name][0, 0] = float("nan")
    save_file(tensors, broken / "model.safetensors")
    done = edgert("convert", broken, edgert.home / "m.edgert", "--ray", address)
    assert_fails(done, "NaN or infinity; a weight is a finite number")
    assert name in done.stderr and not (edgert.home / "m.edgert").exists()
    text = edgert.home / "text.txt"
    text.write_text("The module reads the file. " * 20)
    evaluated = edgert("eval", tiny_bundle, "--text", text, "--memory", "10KiB", "--ray", address)
    assert_fails(evaluated, "the smallest that works is")
    assert_fails(
        edgert("eval", tiny_bundle, "--text", text, "--skip-experts", "0.1", "--ray", address),
        "machines of a cluster read apart",
    )


def test_no_cluster_is_one_line(edgert: Shell, tiny_source: Path) -> None:
    done = edgert("convert", tiny_source, edgert.home / "m.edgert", "--ray", "127.0.0.1:1")
    assert done.returncode == 1 and "ray: no cluster at 127.0.0.1:1" in done.stderr.splitlines()[-1]


def test_without_ray_the_extra_is_named(edgert: Shell, tiny_source: Path) -> None:
    script = "import sys; sys.modules['ray'] = None; from edgert.cli.main import main; sys.exit(main(sys.argv[1:]))"
    command = edgert.command("convert", tiny_source, edgert.home / "m.edgert", "--ray", "local")
    done = subprocess.run(
        [command[0], "-c", script, *command[3:]],
        capture_output=True,
        text=True,
        env=edgert.environment,
        check=False,
    )
    assert_fails(done, "this needs the package ray: pip install 'edgert[ray]'")
