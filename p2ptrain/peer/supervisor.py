"""Tell systemd that this process is ready, and that it is not stuck: datagrams to the socket that it names.

As sd_notify(3) has it. Where no supervisor asked for it, nothing is sent.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Callable


def notify(message: str) -> None:
    """Send one message, as "READY=1"; a supervisor that is gone hears nothing."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as to:
        to.connect("\0" + address[1:] if address.startswith("@") else address)
        to.send(message.encode())


def watchdog_seconds() -> float:
    """Return within which time the supervisor wants to hear of this process, or 0 where it does not."""
    meant_for = os.environ.get("WATCHDOG_PID", "")
    if meant_for and meant_for != str(os.getpid()):
        return 0.0
    try:
        return int(os.environ.get("WATCHDOG_USEC", "0")) / 1e6
    except ValueError:
        return 0.0


async def keep_notified(status: Callable[[], str]) -> None:
    """Say that the loop that this runs on is alive, and how the peer is, until cancelled."""
    within = watchdog_seconds()
    while True:
        notify(f"WATCHDOG=1\nSTATUS={status()}")
        await asyncio.sleep(within / 3 if within else 10.0)
