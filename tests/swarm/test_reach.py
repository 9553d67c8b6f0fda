"""Peers that others cannot dial, in network namespaces of their own: real processes, real daemons, packets dropped.

A closed peer's namespace drops what comes in for the port that it listens on, as a router without a forwarding does.
Answers to what it has opened itself come in, at other ports: libp2p is told not to dial from the port that it listens
on, since a rule of routing knows ports, and not which connection a packet is of.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from peers import Peer, Swarm, eventually, start

from p2ptrain import chain
from p2ptrain.config.home import Home
from p2ptrain.config.manifest import open_manifest
from p2ptrain.state.journal import Journal
from p2ptrain.swarm.identity import verify

PORT = 4001


def ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")


class Networks:
    """A wire, and one namespace on it for each peer."""

    def __init__(self) -> None:
        self._prefix = f"p2pt{os.getpid() % 100_000}"
        self._made: list[str] = []
        self._wire = self._add("w")
        ip("-n", self._wire, "link", "add", "br0", "type", "bridge")
        ip("-n", self._wire, "link", "set", "br0", "up")

    def _add(self, name: str) -> str:
        namespace = self._prefix + name
        ip("netns", "add", namespace)
        self._made.append(namespace)
        ip("-n", namespace, "link", "set", "lo", "up")
        return namespace

    def host(self, number: int, *, closed: bool = False) -> dict[str, Any]:
        """Return where a peer is to run, as `Peer` takes it."""
        namespace, there = self._add(str(number)), f"v{number}"
        ip("-n", self._wire, "link", "add", there, "type", "veth", "peer", "name", "e0", "netns", namespace)
        ip("-n", self._wire, "link", "set", there, "master", "br0", "up")
        ip("-n", namespace, "addr", "add", f"10.77.0.{number}/24", "dev", "e0")
        ip("-n", namespace, "link", "set", "e0", "up")
        environment = {"TEST_NETWORK": namespace}
        if closed:
            # Rules are asked in their order, and that for local addresses, which takes in what is for us, is the first.
            ip("-n", namespace, "rule", "add", "pref", "10", "lookup", "local")
            ip("-n", namespace, "rule", "del", "pref", "0")
            self.close_port(number)
            environment["LIBP2P_TCP_REUSEPORT"] = "false"
        return {"host": f"10.77.0.{number}", "environment": environment}

    def close_port(self, number: int) -> None:
        ip("-n", self._prefix + str(number), "rule", "add", *self._dropped)

    def open_port(self, number: int) -> None:
        ip("-n", self._prefix + str(number), "rule", "del", *self._dropped)

    _dropped = ("pref", "5", "iif", "e0", "ipproto", "tcp", "dport", str(PORT), "blackhole")

    def remove(self) -> None:
        for namespace in self._made:
            subprocess.run(["ip", "netns", "del", namespace], check=False)


@pytest.fixture
def networks() -> Iterator[Networks]:
    if shutil.which("ip") is None:
        pytest.skip("needs the command ip, of iproute2, for network namespaces")
    if os.geteuid():
        pytest.skip("needs root, for network namespaces")
    try:
        made = Networks()
    except OSError as error:
        pytest.skip(f"needs network namespaces, which this machine does not allow: {error}")
    yield made
    made.remove()


@pytest.fixture
def swarm(tmp_path: Path) -> Iterator[Swarm]:
    made = Swarm(tmp_path)
    yield made
    made.close()


def journal_of(peer: Peer) -> Journal:
    home = Home(peer.home)
    return Journal(home.journal, open_manifest(home.manifest.read_bytes())[1], verify)


def rows(peer: Peer) -> tuple[chain.Row, ...]:
    """What the members of its newest round say of themselves."""
    journal = journal_of(peer)
    return journal.read(journal.last).seal.rows


def closed_members_in(peer: Peer, after: int) -> list[tuple[int, bool]]:
    """By round since `after`: how many members say that they cannot be dialled, and whether their work all counts."""
    journal, found = journal_of(peer), []
    for number in range(max(journal.first, after), journal.last + 1):
        seal = journal.read(number).seal
        closed = {index for index, row in enumerate(seal.rows) if not row.uplink_kbit}
        found.append((len(closed), closed <= chain.bits(seal.included, len(seal.rows))))
    return found


def said(peer: Peer, words: str) -> list[str]:
    return [entry["message"] for entry in peer.entries() if words in entry["message"]]


@pytest.mark.long
def test_a_peer_that_nobody_can_dial_says_so_counts_in_full_and_notices_when_its_port_is_opened(
    networks: Networks, swarm: Swarm
) -> None:
    swarm.write_manifest()
    ada = swarm.bootstrap("ada", **networks.host(1))
    address = ada.address()
    assert address.startswith("/ip4/10.77.0.1/tcp/")
    grace = swarm.join("grace", address, **networks.host(2)).started()
    linus = swarm.join("linus", address, "--port", str(PORT), **networks.host(3, closed=True))
    assert linus.process.stdout is not None
    line = linus.process.stdout.readline()
    # By then one of the two may have given it a place to be reached through.
    assert "No other peer can dial this one" in line or "/p2p-circuit/" in line
    (advice,) = said(linus, "others cannot dial this peer")
    assert f"10.77.0.3, TCP port {PORT}" in advice and "firewall" in advice, "its own address: no router forwards it"
    eventually(lambda: any(not row.uplink_kbit for row in rows(ada)), 60, linus.tail())
    begins = ada.round + 1
    ada.reaches(begins + 12)
    found = closed_members_in(ada, begins)
    assert len(found) >= 10 and all(closed == 1 for closed, _ in found), found
    assert sum(counts for _, counts in found) >= 0.95 * len(found), found
    networks.open_port(3)
    eventually(lambda: said(linus, "others can dial this peer now"), 90, linus.tail())
    (line,) = said(linus, "others can join at a new address")
    assert line.endswith(f"p2ptrain join /ip4/10.77.0.3/tcp/{PORT}/p2p/{(line.rpartition('/')[2])}")
    assert not said(grace, "others cannot dial") and not said(ada, "others cannot dial")


def test_two_peers_that_nobody_can_dial_train_through_a_place_to_meet(networks: Networks, swarm: Swarm) -> None:
    swarm.write_manifest()
    where = networks.host(1)
    there = {**os.environ, **where["environment"]}
    with (swarm.folder / "meet.log").open("w") as errors:
        flags = ("--home", str(swarm.folder / "meet"), "--host", "10.77.0.1")
        meeting = start("meet", *flags, stderr=errors, env=there, fresh=False)
    try:
        assert meeting.stdout is not None
        address = meeting.stdout.readline().removeprefix("Meet at:  ").strip()
        assert address.startswith("/ip4/10.77.0.1/tcp/")
        ada = swarm.bootstrap("ada", "--initial-peers", address, "--port", str(PORT), **networks.host(2, closed=True))
        through = ada.address()
        assert through.startswith(address + "/p2p-circuit/p2p/"), through
        grace = swarm.join("grace", through, "--port", str(PORT), **networks.host(3, closed=True))
        assert grace.address().startswith(address + "/p2p-circuit/p2p/")
        eventually(lambda: len(rows(ada)) == 2, 90, ada.tail() + grace.tail())
        begins = ada.round + 2
        ada.reaches(begins + 12)
        grace.reaches(begins + 10)
        found = closed_members_in(ada, begins)
        assert len(found) >= 10 and all(closed == 2 for closed, _ in found), found
        assert sum(counts for _, counts in found) >= 0.9 * len(found), found
    finally:
        meeting.send_signal(signal.SIGINT)
        assert meeting.wait(60) == 0, (swarm.folder / "meet.log").read_text()
        if meeting.stdout is not None:
            meeting.stdout.close()
