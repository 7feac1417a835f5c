"""Memory and disk of one command held to limits by a cgroup of its own, page cache included; versions 1 and 2.

Groups are made below this process's own ones (v1), or below the nearest group above it that hands the controllers on (v2),
so limits that already hold go on holding. They are removed afterwards.
"""

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import machine

CGROUP_VERSION_1, CGROUP_VERSION_2 = 1, 2
_NAMES_IN_VERSION_1 = {"memory": "memory", "io": "blkio"}


class NoLimiterError(Exception):
    """A limit cannot be set here; the message says why."""


@dataclass(frozen=True)
class Limits:
    """None: no limit."""

    memory: int | None = None  # bytes, without swap
    read: int | None = None  # bytes a second from each of `disks`
    disks: frozenset[str] = frozenset()  # MAJOR:MINOR

    @property
    def controllers(self) -> list[str]:
        return [name for name, limit in (("memory", self.memory), ("io", self.read)) if limit is not None]


@dataclass(frozen=True)
class Parent:
    """Where a group is made, and for which controllers, in version 2's names."""

    version: int
    path: Path
    controllers: tuple[str, ...]


@dataclass(frozen=True)
class Setting:
    """A limit in a group's file; an optional one goes where the file exists."""

    file: str
    value: str
    optional: bool = False


def disk_number(path: Path, sys: Path = Path("/sys")) -> str:
    """MAJOR:MINOR of the disk that `path` lies on, as reads can be held. Raises NoLimiterError."""
    disk = machine.disk(path, sys)
    if disk is None:
        raise NoLimiterError(
            f"{path} lies on device {machine.device_number(path)}, which is no disk (overlay, tmpfs, btrfs?): "
            "let EDGERT_HOME name a folder on one"
        )
    return (disk / "dev").read_text().strip()


def find_parents(mounts: str, memberships: str, controllers: Sequence[str]) -> list[Parent]:
    """From the texts of /proc/self/mounts and /proc/self/cgroup. Raises NoLimiterError."""
    member = {}  # of controller: group; the controller of version 2 has no name
    for line in memberships.splitlines():
        _, names, group = line.split(":", 2)
        member.update(dict.fromkeys(names.split(","), group))
    rows = [line.split() for line in mounts.splitlines()]
    parents, left = [], list(controllers)
    for _, mount, kind, options, *_ in rows:
        found = [name for name in left if _NAMES_IN_VERSION_1[name] in options.split(",")]
        if kind == "cgroup" and found:
            group = member.get(_NAMES_IN_VERSION_1[found[0]], "/")
            parents.append(Parent(CGROUP_VERSION_1, _inside(Path(mount), group), tuple(found)))
            left = [name for name in left if name not in found]
    if not left:
        return parents
    for _, mount, kind, *_ in rows:
        if kind == "cgroup2" and "" in member:
            path = _that_delegates(Path(mount), _inside(Path(mount), member[""]), left)
            return [*parents, Parent(CGROUP_VERSION_2, path, tuple(left))]
    raise NoLimiterError(f"no cgroup with the controller {' or '.join(left)} is mounted")


def _inside(mount: Path, group: str) -> Path:
    """A container sees its own group as the mount, under a name that is the host's."""
    path = mount / group.lstrip("/")
    return path if path.is_dir() else mount


def _that_delegates(mount: Path, own: Path, controllers: Sequence[str]) -> Path:
    """A group of version 2 that has processes hands no controller on, but one above it may."""
    for path in (own, *own.parents):
        try:
            if set(controllers) <= set((path / "cgroup.subtree_control").read_text().split()):
                return path
        except OSError:
            pass
        if path == mount:
            break
    raise NoLimiterError(
        f"no group from {own} up to {mount} has {' and '.join(controllers)} in its cgroup.subtree_control"
    )


@contextmanager
def limited(parents: Sequence[Parent], limits: Limits) -> Iterator["Groups"]:
    """New groups whose processes have these limits. Raises NoLimiterError where they cannot be made."""
    made: list[Path] = []
    try:
        for parent in parents:
            path = parent.path / f"edgert-benchmark-{os.getpid()}"
            try:
                path.mkdir()
            except OSError as error:
                raise NoLimiterError(f"{path}: {error.strerror}") from None
            made.append(path)
            for setting in settings(parent, limits):
                _set(path, setting)
        yield Groups(tuple(made))
    finally:
        for path in made:
            remove(path)


@dataclass(frozen=True)
class Groups:
    paths: tuple[Path, ...]

    def command(self, command: Sequence[str]) -> list[str]:
        """`command` as a member of the groups."""
        for path in self.paths:
            command = ["sh", "-c", 'echo $$ > "$0" && exec "$@"', str(path / "cgroup.procs"), *command]
        return [*command]


def settings(parent: Parent, limits: Limits) -> list[Setting]:
    """What a group below `parent` is told."""
    first, result = parent.version == CGROUP_VERSION_1, []
    if "memory" in parent.controllers:
        limit = str(limits.memory)
        # Swap is not always accounted; version 1 counts it and memory together.
        result += [
            Setting("memory.limit_in_bytes" if first else "memory.max", limit),
            Setting("memory.memsw.limit_in_bytes", limit, optional=True)
            if first
            else Setting("memory.swap.max", "0", optional=True),
        ]
    if "io" in parent.controllers:
        for disk in sorted(limits.disks):
            result.append(
                Setting("blkio.throttle.read_bps_device", f"{disk} {limits.read}")
                if first
                else Setting("io.max", f"{disk} rbps={limits.read}")
            )
    return result


def _set(path: Path, setting: Setting) -> None:
    file = path / setting.file
    if setting.optional and not file.exists():
        return
    try:
        file.write_text(setting.value)
    except OSError as error:
        raise NoLimiterError(f"{file}: {error.strerror}") from None


def remove(path: Path) -> None:
    """Its processes may take a moment to be gone."""
    for _ in range(50):
        try:
            path.rmdir()
        except OSError:
            time.sleep(0.1)
        else:
            return
