"""What systemd and a service tell each other: sd_notify, the watchdog, and sockets that systemd has opened."""

import os
import socket

_FIRST_FD = 3


def notify(text: str) -> bool:
    """Tell the service manager, such as "READY=1"; False where there is none."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if address[:1] not in ("/", "@"):
        return False
    if address.startswith("@"):
        address = "\0" + address[1:]
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as out:
            out.sendto(text.encode(), address)
    except OSError:
        return False
    return True


def watchdog_interval_s() -> float | None:
    """How often to notify "WATCHDOG=1": a third of what the manager waits; None where it watches no one."""
    stated, pid = os.environ.get("WATCHDOG_USEC", ""), os.environ.get("WATCHDOG_PID", "")
    if not stated.isdigit() or int(stated) == 0 or (pid and pid != str(os.getpid())):
        return None
    return int(stated) / 3e6


def activation_sockets() -> list[socket.socket]:
    """The listening sockets that were passed on (LISTEN_FDS), once; none where the daemon is to open its own."""
    count, pid = os.environ.pop("LISTEN_FDS", ""), os.environ.pop("LISTEN_PID", "")
    os.environ.pop("LISTEN_FDNAMES", None)
    if not count.isdigit() or pid != str(os.getpid()):
        return []
    sockets = []
    for number in range(_FIRST_FD, _FIRST_FD + int(count)):
        os.set_inheritable(number, False)
        one = socket.socket(fileno=number)
        one.setblocking(False)
        sockets.append(one)
    return sockets
