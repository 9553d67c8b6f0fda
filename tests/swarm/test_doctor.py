"""The doctor finds each fault that is planted, names it, and names what mends it. What is well it says is well."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import resource
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

sys.path.insert(0, str(Path(__file__).parent))

from test_node import peer_record

from p2ptrain.calls.messages import NAMESPACE, Tip, Traffic, Welcome
from p2ptrain.calls.servicer import PeerServicer
from p2ptrain.chain.admission import Revocation
from p2ptrain.config.home import Home
from p2ptrain.config.manifest import PROTOCOL_VERSION, Manifest, ModelConfig, open_manifest, sign_manifest
from p2ptrain.config.node import NodeSettings
from p2ptrain.peer import diagnosis
from p2ptrain.peer.diagnosis import Finding
from p2ptrain.swarm.identity import format_peer_id, load_or_create_identity, new_identity
from p2ptrain.swarm.node import SwarmNode
from p2ptrain.training.machine import Machine

if TYPE_CHECKING:
    from conftest import PeerProcess, Swarm

    Start = Callable[..., PeerProcess]

SMALL = Manifest(name="test", nonce="0" * 32, model=ModelConfig(layers=1, heads=1, embedding=16, context=16))
LARGE = Manifest(name="test", nonce="0" * 32, model=ModelConfig(layers=40, heads=16, embedding=2048, context=2048))
"""Needs some 100 GB of memory and of disk."""


def settings(home: Path, **changes: Any) -> NodeSettings:
    return NodeSettings(home=home, origins={}, **{"host": "127.0.0.1", **changes})


def of(findings: Iterator[Finding] | list[Finding], name: str) -> Finding:
    (found,) = [finding for finding in findings if finding.name == name]
    return found


def test_a_machine_that_is_well_is_told_so(tmp_path: Path) -> None:
    well = settings(tmp_path / "home")
    findings = [*diagnosis.of_home(well), *diagnosis.of_machine(well, SMALL), diagnosis.of_port(well)]
    findings += diagnosis.of_device(well, SMALL)
    assert [finding for finding in findings if finding.verdict != "ok"] == []
    assert diagnosis.stop_where_unfit(iter(findings)) == [] and not (tmp_path / "home").exists()


@contextlib.contextmanager
def few_open_files() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (128, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_each_fault_of_the_machine_is_found_with_its_cure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = settings(tmp_path / "home")

    def fault(findings: Any, name: str, text: str, cure: str, verdict: str = "fail") -> None:
        found = of([findings] if isinstance(findings, Finding) else list(findings), name)
        assert found.verdict == verdict and text in found.text and cure in found.cure, found

    with monkeypatch.context() as small:
        # Some machines have room for it.
        small.setattr(diagnosis, "this_machine", lambda: Machine(8 * 10**9, 4 * 10**9, 2.0))
        small.setattr(diagnosis, "free_disk_bytes", lambda home: 10**9)
        fault(diagnosis.of_machine(plain, LARGE), "disk", "a peer of this run takes", "make room")
        fault(diagnosis.of_machine(plain, LARGE), "memory", "this run takes about", "more memory")
    fault(diagnosis.of_machine(settings(tmp_path, threads=1024), None), "cores", "1024 threads", "--threads", "warn")
    with few_open_files():
        fault(diagnosis.of_machine(plain, None), "open files", "128", "ulimit -n")
    file = tmp_path / "file"
    file.write_text("")
    fault(diagnosis.of_home(settings(file)), "home", "cannot use", "--home DIR")
    home = Home(tmp_path / "used")
    home.lock()
    fault(diagnosis.of_home(settings(home.path)), "home", "is in use by process", "stop it")
    home.unlock()
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        fault(diagnosis.of_port(settings(tmp_path, port=port)), "port", f"port {port} is in use", "--port")
    (tmp_path / "sums.loop").write_bytes(b"cut off by a full disk, or a lost power supply")
    fault(diagnosis.of_loops(tmp_path), "compiled loops", "1 of 1", f"rm -r {tmp_path}", "warn")
    fault(diagnosis.of_loops(None), "compiled loops", "nowhere", "NUMBA_CACHE_DIR", "warn")
    if not torch.cuda.is_available():
        fault(diagnosis.of_device(settings(tmp_path, device="cuda"), None), "device", "no cuda device", "--device cpu")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    fault(diagnosis.of_machine(plain, None), "temporary folder", "No such file", "TMPDIR")


@dataclasses.dataclass
class Peer:
    """A peer that others meet, as it answers those who ask before they join."""

    node: SwarmNode
    signed: bytes
    protocol: int = PROTOCOL_VERSION
    closed: bool = False

    def admits(self, peer: bytes) -> bool:
        return not self.closed

    def revocation(self, peer: bytes) -> Revocation | None:
        return None

    def welcome(self) -> Welcome:
        run_id = open_manifest(self.signed)[1]
        return Welcome(self.protocol, run_id, self.signed, Tip(0, run_id, 0), "")

    async def seen_at(self, peer: bytes) -> str:
        return await self.node.seen_at(peer)


def test_each_fault_between_a_peer_and_its_swarm_is_found_with_its_cure(
    swarm: Swarm, peer_process: Start, tmp_path: Path
) -> None:
    signed = sign_manifest(SMALL, Ed25519PrivateKey.generate(), format_peer_id(new_identity().peer_id))
    manifest, run_id = open_manifest(signed)
    home = Home(tmp_path / "home")
    home.create()
    me = load_or_create_identity(home.identity)
    late = peer_process("--clock-ahead-seconds", "30")

    async def look(addresses: list[str], running: Any = None, **changes: Any) -> list[Finding]:
        return await diagnosis.of_swarm(settings(home.path, **changes), addresses, signed, running=running)

    def fault(findings: list[Finding], name: str, text: str, cure: str, verdict: str = "fail") -> None:
        found = of(findings, name)
        assert found.verdict == verdict and text in found.text and cure in found.cure, found

    async def scenario() -> None:
        ada = Peer(await swarm.node(), signed)
        answering: Any = ada
        await ada.node.add_servicer(PeerServicer(answering, Traffic()), NAMESPACE)
        addresses = await ada.node.join_addresses()
        findings = await look(addresses)
        assert [finding for finding in findings if finding.verdict != "ok"] == []
        assert {f.name for f in findings} == {"peers", "clock", "version", "access", "identity", "inbound"}

        route = addresses[0].rpartition("/p2p/")[0]
        gone = f"/ip4/127.0.0.1/tcp/{free_port()}/p2p/{format_peer_id(ada.node.peer_id)}"
        fault(await look([gone]), "peers", "connection refused", "is that peer still running")
        stranger = f"{route}/p2p/{format_peer_id(new_identity().peer_id)}"
        fault(await look([stranger]), "peers", "another peer answers there", "join line of another peer")
        fault(await look([*late.report["addresses"]]), "clock", "30 s behind", "set-ntp true")

        ada.protocol = PROTOCOL_VERSION + 1
        fault(await look(addresses), "version", "this machine", "pip install --upgrade p2ptrain")
        ada.protocol, ada.closed = PROTOCOL_VERSION, True
        fault(await look(addresses), "access", "for listed peers only", "p2ptrain id")
        ada.closed = False
        # A peer that runs, and whose port does not lead to it.
        home.remember_port(free_port())
        findings = await look(addresses, running={"state": "training"})
        fault(findings, "inbound", "refused", "open TCP port", "warn")
        findings = await look(addresses, announce=("foo.invalid:4000",))
        fault(findings, "announced", "does not resolve", "--announce HOST:PORT")

        double = await swarm.node(ada.node, identity_path=home.identity)

        async def go_on_publishing() -> None:
            while True:
                record = peer_record(me, run_id=run_id, addresses=["/ip4/192.0.2.7/tcp/4000"])
                await double.publish_peer(record, manifest.records_key)
                await asyncio.sleep(0.5)

        publishing = asyncio.create_task(go_on_publishing())
        fault(await look(addresses), "identity", "in use elsewhere, at /ip4/192.0.2.7/tcp/4000", "stop one of them")
        publishing.cancel()

    swarm.run(scenario())


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])
