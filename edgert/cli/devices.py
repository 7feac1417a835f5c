"""edgert devices: the device profiles, this machine beside them, and measuring it."""

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgert.cli.options import Subparsers, add_json
from edgert.cli.terminal import note, print_json, progress, say, table
from edgert.units import format_bytes

if TYPE_CHECKING:
    from edgert.machine import MachineProfile


def register(subparsers: Subparsers) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "devices",
        help="list device profiles; `devices probe` measures this machine",
        description="List the profiles for `edgert convert --device`; * marks the one that this machine resembles.",
    )
    add_json(parser)
    parser.set_defaults(action=_list)
    actions = parser.add_subparsers(title="actions", metavar="ACTION")
    probe = actions.add_parser(
        "probe",
        help="measure this machine",
        description="Measure memory, int8 arithmetic and storage, in about a minute, and keep the result where the engine "
        "and `edgert plan` find it. A temporary file of up to 2 GiB is written.",
    )
    probe.add_argument(
        "--path",
        metavar="DIR",
        type=Path,
        help="measure the storage of this directory (default: the bundles')",
    )
    probe.add_argument("--output", metavar="FILE", type=Path, help="write the profile there instead")
    add_json(probe)
    probe.set_defaults(action=_probe)
    return parser


def run(args: argparse.Namespace) -> int:
    status: int = args.action(args)
    return status


def _list(args: argparse.Namespace) -> int:
    from edgert.devices import device_names, load_device, resemble, this_machine
    from edgert.machine import load_machine

    devices = [load_device(name) for name in device_names()]
    machine, similar, measured = this_machine(), resemble().name, load_machine()
    if args.json:
        print_json(
            {
                "this_machine": dataclasses.asdict(machine)
                | {"resembles": similar, "measured": None if measured is None else profile_object(measured)},
                "devices": [dataclasses.asdict(device) for device in devices],
            }
        )
        return 0
    rows: list[tuple[str, ...]] = [("", "NAME", "CPU", "MEMORY", "STORAGE", "FORMATS", "")]
    rows += [
        (
            "*" if device.name == similar else "",
            device.name,
            f"{device.cpu.cores} x {device.cpu.arch}",
            f"{format_bytes(device.memory.total_mib << 20)}, {device.memory.bandwidth_mb_per_s / 1e3:.0f} GB/s",
            f"{device.storage.kind}, {device.storage.random_read_mb_per_s:.0f} MB/s",
            f"{device.bundle.dense_format}, experts {device.bundle.expert_format}",
            device.title,
        )
        for device in devices
    ]
    if measured is not None:
        rows.append(_measured_row(measured))
    say(table(rows))
    say(
        f"\nthis machine: {machine.cores} x {machine.arch}, {format_bytes(machine.memory_bytes)}; resembles {similar}"
    )
    if measured is None:
        say("not measured yet: `edgert devices probe` takes about a minute")
    elif not measured.is_this_machine:
        say(
            "its profile comes from another machine and is not used: `edgert devices probe` measures this one"
        )
    else:
        say(f"measured {measured.describe_age()}")
    return 0


def _probe(args: argparse.Namespace) -> int:
    from edgert.bundle import models_dir
    from edgert.machine import check_writable, machine_file, save_machine
    from edgert.probe import probe
    from edgert.settings import home

    directory = args.path or (models_dir() if models_dir().is_dir() else home())
    if args.path is None:
        directory.mkdir(parents=True, exist_ok=True)
    output = args.output or machine_file()
    check_writable(output)  # before a minute of measuring
    with progress("probe", unit="steps") as update:
        profile = probe(directory, progress=update)
    save_machine(profile, output)
    if args.json:
        print_json({"path": str(output), **profile_object(profile)})
    else:
        say(_text(profile))
        if profile.storage.filesystem in ("tmpfs", "ramfs"):
            note(f"edgert: note: {profile.storage.path} is memory, not storage; --path names another place")
        say(f"\nwritten to {output}")
    return 0


def profile_object(profile: "MachineProfile") -> dict[str, Any]:
    return dataclasses.asdict(profile) | {
        "probed": profile.probed.isoformat(),
        "is_this_machine": profile.is_this_machine,
    }


def _measured_row(measured: "MachineProfile") -> tuple[str, ...]:
    machine, most = measured.machine, measured.threads[-1]
    return (
        "",
        "(measured)",
        f"{machine.cores} x {machine.arch}",
        f"{format_bytes(machine.memory_mib << 20)}, {most.memory_read_mb_per_s / 1e3:.0f} GB/s",
        f"{measured.storage.filesystem}, {measured.storage.read_mb_per_s(1 << 20, 4):.0f} MB/s",
        "",
        f"{machine.cpu}, int8 {most.int8_gops:.0f} GOPS",
    )


def _text(profile: "MachineProfile") -> str:
    speeds = [("THREADS", "MEMORY READ", "INT8")]
    speeds += [
        (str(row.threads), f"{row.memory_read_mb_per_s / 1e3:.1f} GB/s", f"{row.int8_gops:.0f} GOPS")
        for row in profile.threads
    ]
    storage = profile.storage
    depths = sorted({row.depth for row in storage.reads})
    reads: list[tuple[str, ...]] = [("RANDOM READS, MB/s", *(f"DEPTH {depth}" for depth in depths))]
    for block in sorted({row.block_kib for row in storage.reads}):
        cells = (f"{storage.read_mb_per_s(block << 10, depth):.0f}" for depth in depths)
        reads.append((format_bytes(block << 10), *cells))
    how = f"{storage.io_backend}, {'direct' if storage.direct_io == 'on' else 'through the page cache'}"
    return (
        f"{table(speeds, right=(0, 1, 2))}\n\n{table(reads, right=range(1, len(depths) + 1))}\n"
        f"sequential: {storage.sequential_mb_per_s:.0f} MB/s; {storage.filesystem} at {storage.path}, {how}"
    )
