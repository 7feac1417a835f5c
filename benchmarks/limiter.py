"""Memory of one command held to a limit by a cgroup of its own, page cache included; versions 1 and 2.

The group is made below this process's own one (v1), or below the nearest group above it that hands memory on (v2), so
limits that already hold go on holding. It is removed afterwards.
"""

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

CGROUP_VERSION_1, CGROUP_VERSION_2 = 1, 2


class NoLimiterError(Exception):
    """Memory cannot be limited here; the message says why."""


@dataclass(frozen=True)
class Parent:
    """Where a group is made."""

    version: int
    path: Path


@dataclass(frozen=True)
class Group:
    path: Path

    def command(self, command: Sequence[str]) -> list[str]:
        """`command` as a member of the group."""
        return ["sh", "-c", 'echo $$ > "$0" && exec "$@"', str(self.path / "cgroup.procs"), *command]


def find_parent(mounts: str, memberships: str) -> Parent:
    """From the texts of /proc/self/mounts and /proc/self/cgroup. Raises NoLimiterError."""
    member = {}  # of controller: group; the controller of version 2 has no name
    for line in memberships.splitlines():
        _, controllers, group = line.split(":", 2)
        member.update(dict.fromkeys(controllers.split(","), group))
    for line in mounts.splitlines():
        _, mount, kind, options, *_ = line.split()
        if kind == "cgroup" and "memory" in options.split(","):
            return Parent(CGROUP_VERSION_1, _inside(Path(mount), member.get("memory", "/")))
    for line in mounts.splitlines():
        _, mount, kind, *_ = line.split()
        if kind == "cgroup2" and "" in member:
            return Parent(CGROUP_VERSION_2, _that_delegates(Path(mount), _inside(Path(mount), member[""])))
    raise NoLimiterError("no cgroup with the memory controller is mounted")


def _inside(mount: Path, group: str) -> Path:
    """A container sees its own group as the mount, under a name that is the host's."""
    path = mount / group.lstrip("/")
    return path if path.is_dir() else mount


def _that_delegates(mount: Path, own: Path) -> Path:
    """A group of version 2 that has processes hands no controller on, but one above it may."""
    for path in (own, *own.parents):
        try:
            if "memory" in (path / "cgroup.subtree_control").read_text().split():
                return path
        except OSError:
            pass
        if path == mount:
            break
    raise NoLimiterError(f"no group from {own} up to {mount} has memory in its cgroup.subtree_control")


@contextmanager
def limited(parent: Parent, limit: int) -> Iterator[Group]:
    """A new group whose processes have `limit` bytes and no swap. Raises NoLimiterError where it cannot be made."""
    path = parent.path / f"edgert-benchmark-{os.getpid()}"
    try:
        path.mkdir()
    except OSError as error:
        raise NoLimiterError(f"{path}: {error.strerror}") from None
    try:
        _set_limit(path, parent.version, limit)
        yield Group(path)
    finally:
        _remove(path)


def _set_limit(path: Path, version: int, limit: int) -> None:
    names = ("memory.limit_in_bytes", "memory.memsw.limit_in_bytes")
    if version == CGROUP_VERSION_2:
        names = ("memory.max", "memory.swap.max")
    try:
        (path / names[0]).write_text(str(limit))
    except OSError as error:
        raise NoLimiterError(f"{path / names[0]}: {error.strerror}") from None
    if (path / names[1]).exists():  # not where swap is not accounted
        (path / names[1]).write_text(str(limit if version == CGROUP_VERSION_1 else 0))


def _remove(path: Path) -> None:
    """Its processes may take a moment to be gone."""
    for _ in range(50):
        try:
            path.rmdir()
        except OSError:
            time.sleep(0.1)
        else:
            return
