"""The daemon as a service of systemd: its units, with what depends on the machine filled in."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from edgert.devices import PROFILES
from edgert.errors import InvalidArgumentError, StorageError

SERVICE = "edgertd.service"
SOCKET = "edgertd.socket"
HIDDEN = ("/home/", "/root/", "/run/user/", "/tmp/", "/var/tmp/")  # ProtectHome, PrivateTmp
FOLDER = Path("etc/systemd/system")
# Interpreter, libraries, tokenizer tables in use, requests under way: docs/daemon.md has the figures.
BESIDE_BUDGET_BYTES = 192 << 20


def service_unit(arguments: Sequence[str] = (), memory_bytes: int | None = None) -> str:
    """The unit that runs `edgert serve ARGUMENTS` by this interpreter; `memory_bytes` is the budget, None: auto."""
    words = [sys.executable, "-m", "edgert", "serve", *arguments]
    values = {"ExecStart": " ".join(map(_word, words))}
    if memory_bytes is not None:
        values["MemoryMax"] = str(memory_bytes + BESIDE_BUDGET_BYTES)
    return filled((PROFILES / SERVICE).read_text(encoding="utf-8"), values)


def absolute(words: Sequence[str]) -> list[str]:
    """The arguments of `edgert serve` with the paths that are here as they are everywhere: a service begins in "/"."""
    result = []
    for word in words:
        path, comma, options = word.partition(",")
        there = not path.startswith("-") and os.path.exists(path)
        result.append(os.path.abspath(path) + comma + options if there else word)
    return result


def unreachable(words: Sequence[str]) -> list[str]:
    """Those of them that the service's sandbox hides."""
    return [word for word in words if word.startswith(HIDDEN)]


def socket_unit(host: str, port: int) -> str:
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    return filled((PROFILES / SOCKET).read_text(encoding="utf-8"), {"ListenStream": address})


def filled(unit: str, values: Mapping[str, str]) -> str:
    """`unit` with other values of these keys, which it has once each."""
    for key, value in values.items():
        unit, count = re.subn(rf"(?m)^{key}=.*$", lambda _, k=key, v=value: f"{k}={v}", unit)  # type: ignore[misc]
        assert count == 1, key
    return unit


def install(units: Mapping[str, str], root: Path) -> list[Path]:
    """Write units below `root`; those of "/" are started and come up with the machine. Raises StorageError."""
    folder = root / FOLDER
    written = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in units.items():
            beside = folder / f".{name}.new"
            beside.write_text(text, encoding="utf-8")
            beside.replace(folder / name)
            written.append(folder / name)
    except OSError as error:
        raise StorageError(f"{folder}: cannot be written: {error.strerror} (run it as root)") from None
    if root == Path("/"):
        _systemctl("daemon-reload")
        _systemctl("enable", "--now", SOCKET if SOCKET in units else SERVICE)
    return written


def uninstall(root: Path) -> list[Path]:
    """Stop the service and remove its units; models and configuration stay. Raises StorageError."""
    there = [root / FOLDER / name for name in (SOCKET, SERVICE) if (root / FOLDER / name).exists()]
    if there and root == Path("/"):
        _systemctl("disable", "--now", *(path.name for path in there))
    try:
        for path in there:
            path.unlink()
    except OSError as error:
        raise StorageError(
            f"{error.filename}: cannot be removed: {error.strerror} (run it as root)"
        ) from None
    if there and root == Path("/"):
        _systemctl("daemon-reload")
    return there


def _systemctl(*words: str) -> None:
    if shutil.which("systemctl") is None:
        raise StorageError("systemctl: there is no systemd here; `edgert service print` shows the unit")
    done = subprocess.run(["systemctl", *words], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise StorageError(f"systemctl {' '.join(words)}: {done.stderr.strip() or done.returncode}")


def _word(text: str) -> str:
    """A word of ExecStart: quoted, and without what systemd would replace in it."""
    if re.search(r"[\x00-\x1f]", text):
        raise InvalidArgumentError(f"{text!r:.80}: allowed are words without control characters")
    text = text.replace("%", "%%").replace("$", "$$")
    return text if shlex.quote(text) == text else '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
