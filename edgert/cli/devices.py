"""edgert devices: the device profiles, and the one that this machine resembles."""

import argparse
import dataclasses

from edgert.cli.options import Subparsers, add_json
from edgert.cli.terminal import print_json, say, table
from edgert.units import format_bytes


def register(subparsers: Subparsers) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "devices",
        help="list device profiles",
        description="List the profiles for `edgert convert --device`; * marks the one that this machine resembles.",
    )
    add_json(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    from edgert.devices import device_names, load_device, resemble, this_machine

    devices = [load_device(name) for name in device_names()]
    machine, similar = this_machine(), resemble().name
    if args.json:
        print_json(
            {
                "this_machine": dataclasses.asdict(machine) | {"resembles": similar},
                "devices": [dataclasses.asdict(device) for device in devices],
            }
        )
        return 0
    rows = [("", "NAME", "CPU", "MEMORY", "STORAGE", "FORMATS", "")]
    rows += [
        (
            "*" if device.name == similar else "",
            device.name,
            f"{device.cpu.cores} x {device.cpu.arch}",
            format_bytes(device.memory.total_mib << 20),
            f"{device.storage.kind} {device.storage.random_read_mb_per_s:.0f} MB/s",
            f"{device.bundle.dense_format}, experts {device.bundle.expert_format}",
            device.title,
        )
        for device in devices
    ]
    say(table(rows))
    say(
        f"\nthis machine: {machine.cores} x {machine.arch}, {format_bytes(machine.memory_bytes)}; resembles {similar}"
    )
    return 0
