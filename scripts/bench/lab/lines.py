"""Lines for processes on this machine: network namespaces on one bridge, each behind a line of a given rate both ways.

As root, on Linux. A process started with `inside(number)` before its command sees one interface, eth0, with an address
that the others can reach, and nothing of the host's network. A limited line is a token bucket in each direction; what
waits, waits in a buffer of a second's length. The bucket holds 5 KB: at 10 Mbit/s no more than 4 ms of the rate come
at once (100 kB came at 10.0 Mbit/s, 1 MB at 9.1; with a bucket of 64 KB, 100 kB came at 24). Given up: rates over about
100 Mbit/s, which need a larger bucket, and delays and losses of the way between the lines.

On a limited line each packet is a frame of its own, as on a wire, and counters count Ethernet frames with their
headers. On one without limit the kernel passes up to 64 KiB as one frame: some 4 % of what a wire would carry is not
counted.
"""

from __future__ import annotations

import argparse
import contextlib
import ipaddress
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

DEVICE = "eth0"
NETWORK = ipaddress.ip_network("10.231.0.0/16")
BURST_BYTES = 5000
BUFFER_MILLISECONDS = 1000
UNSPLIT_SEGMENTS = 65535
STATISTICS = Path("/sys/class/net", DEVICE, "statistics")


class Counted(NamedTuple):
    """Bytes of a line since it was made, as its peer sees it."""

    sent: int
    received: int


def counted_here() -> Counted:
    """Of the line that this process is behind: to be called inside a namespace, and cheap."""
    return Counted(*(int((STATISTICS / f"{way}_bytes").read_text()) for way in ("tx", "rx")))


def prepare(parser: argparse.ArgumentParser) -> None:
    """Before lines are made: only root may, and who interrupts or ends this program must leave none behind."""
    if os.geteuid() != 0:
        parser.error("it makes network namespaces: run it as root")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: sys.exit("stopped"))


def ip(*arguments: str) -> str:
    """What one `ip` command prints."""
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout


class Lines:
    """One bridge, in a namespace of its own, and a line to it for each peer; gone when the context is left."""

    def __init__(self, peers: int, mbit: float | None) -> None:
        """Of so many Mbit/s each way, each; None: as fast as the kernel copies."""
        self.peers, self._mbit = peers, mbit
        self._run = f"p2pt{os.getpid()}"
        self._made: list[str] = []
        self._addresses: Iterator[str] = (str(address) for address in NETWORK.hosts())
        self._address: dict[int, str] = {}

    def __enter__(self) -> Lines:
        with contextlib.ExitStack() as undo:
            undo.callback(self._remove)
            switch = self._namespace("switch")
            ip("-n", switch, "link", "add", "br0", "type", "bridge")
            ip("-n", switch, "link", "set", "br0", "up")
            for number in range(self.peers):
                name, port = self._namespace(str(number)), f"peer{number}"
                ip("-n", name, "link", "add", DEVICE, "type", "veth", "peer", "name", port, "netns", switch)
                ip("-n", switch, "link", "set", port, "master", "br0", "up")
                self.readdress(number)
                self.set_rate(number, self._mbit)
                self.set_link(number, up=True)
            undo.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._remove()

    def _remove(self) -> None:
        for name in self._made:
            with contextlib.suppress(subprocess.CalledProcessError):
                ip("netns", "del", name)

    def _namespace(self, name: str) -> str:
        full = f"{self._run}-{name}"
        ip("netns", "add", full)
        self._made.append(full)
        ip("-n", full, "link", "set", "lo", "up")
        return full

    def inside(self, number: int) -> list[str]:
        """What comes before a command that is to run behind one peer's line."""
        return ["ip", "netns", "exec", f"{self._run}-{number}"]

    def address(self, number: int) -> str:
        """One peer's IPv4 address."""
        return self._address[number]

    def set_link(self, number: int, *, up: bool) -> None:
        """Of one peer."""
        ip("-n", f"{self._run}-{number}", "link", "set", DEVICE, "up" if up else "down")

    def set_rate(self, number: int, mbit: float | None) -> None:
        """Of one peer's line, both ways, from now on; also while it is in use."""
        for where, device in ((str(number), DEVICE), ("switch", f"peer{number}")):
            name = f"{self._run}-{where}"
            segments = UNSPLIT_SEGMENTS if mbit is None else 1
            ip("-n", name, "link", "set", device, "gso_max_segs", str(segments))
            command = ["tc", "-n", name, "qdisc", "replace", "dev", device, "root"]
            if mbit is None:
                command += ["noqueue"]
            else:
                size = ["burst", str(BURST_BYTES), "latency", f"{BUFFER_MILLISECONDS}ms"]
                command += ["tbf", "rate", f"{mbit}mbit", *size]
            subprocess.run(command, check=True, capture_output=True)

    def readdress(self, number: int) -> None:
        """Give one peer an address that nobody has had."""
        name, old = f"{self._run}-{number}", self._address.get(number)
        if old is not None:
            ip("-n", name, "addr", "del", f"{old}/{NETWORK.prefixlen}", "dev", DEVICE)
        self._address[number] = next(self._addresses)
        ip("-n", name, "addr", "add", f"{self._address[number]}/{NETWORK.prefixlen}", "dev", DEVICE)

    def counted(self, number: int) -> Counted:
        """Bytes so far on one peer's line."""
        (link,) = json.loads(ip("-n", f"{self._run}-{number}", "-s", "-j", "link", "show", DEVICE))
        return Counted(link["stats64"]["tx"]["bytes"], link["stats64"]["rx"]["bytes"])
