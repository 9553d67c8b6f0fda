"""Find what keeps a peer from training well, and name the command that mends it: this machine, then the swarm.

`of_machine` asks nobody and takes moments, so that starting commands go through it, too, and stop with the same words.
`of_swarm` meets the peers at some addresses: as this home's peer where none runs, so that its port, its access and its
being dialled are tried as they will be, and as an observer beside one that does.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import resource
import socket
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from p2ptrain.config.home import Home
from p2ptrain.config.manifest import PROTOCOL_VERSION, Manifest
from p2ptrain.config.node import NodeSettings
from p2ptrain.errors import HomeError, P2PTrainError
from p2ptrain.training.machine import Machine, free_disk_bytes, this_machine
from p2ptrain.training.needs import Needs, needs_of, size

Verdict = Literal["ok", "warn", "fail"]

DISK_BYTES_BESIDE = 300_000_000
"""The own log, events, seals and the log."""
OPEN_FILES = 256
"""Sockets to the daemon, files of the journal and of the text, and what Python holds open."""
FRESH_SECONDS = 8.0
"""A record older than this is of a peer that is gone."""


_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Finding:
    """What was looked at, how it is, and what to type where it is not well."""

    name: str
    verdict: Verdict
    text: str
    cure: str = ""

    def as_json(self) -> dict[str, str]:
        """Return it for programs."""
        return {"name": self.name, "verdict": self.verdict, "text": self.text, "cure": self.cure}


class UnfitError(P2PTrainError):
    """This machine cannot do what is asked of it, by the same words as the doctor's."""

    exit_code = HomeError.exit_code


def failed(name: str, error: P2PTrainError) -> Finding:
    """Make a finding of an error that a command would end with."""
    return Finding(name, "fail", str(error), error.hint)


def stop_where_unfit(findings: Iterator[Finding]) -> list[Finding]:
    """Return those that are warnings.

    Raises:
        UnfitError: for the first that fails.
    """
    warnings = []
    for finding in findings:
        if finding.verdict == "fail":
            raise UnfitError(f"{finding.name}: {finding.text}", hint=finding.cure)
        if finding.verdict == "warn":
            warnings.append(finding)
    return warnings


def warn(findings: list[Finding]) -> None:
    """Log what is not well and may be borne."""
    for finding in findings:
        _logger.warning("%s: %s; try: %s", finding.name, finding.text, finding.cure)


# ---- this machine -----------------------------------------------------------------------------------------------


def of_machine(settings: NodeSettings, manifest: Manifest | None) -> Iterator[Finding]:
    """Look at this machine, for a peer of a run; None: of no run yet. Takes no network and no torch."""
    machine = this_machine()
    needs = None if manifest is None else needs_of(manifest, machine=machine)
    yield _disk(settings.home, needs)
    yield _memory(machine, needs)
    yield _cores(settings, machine)
    yield _open_files()
    yield _temporary_folder()


def _disk(home: Path, needs: Needs | None) -> Finding:
    free = free_disk_bytes(home.resolve())
    need = DISK_BYTES_BESIDE + (0 if needs is None else needs.disk_bytes)
    text = f"{size(free)} free for {home}, and a peer{' of this run' if needs else ''} takes up to {size(need)}"
    if free < need:
        return Finding("disk", "fail", text, "make room, or choose a home on another disk: --home DIR")
    return Finding("disk", "ok", text)


def _memory(machine: Machine, needs: Needs | None) -> Finding:
    text = f"{size(machine.free_bytes)} of {size(machine.memory_bytes)} available"
    if needs is None:
        return Finding("memory", "ok", text)
    text += f", and this run takes about {size(needs.peak_bytes)}"
    if needs.least_bytes > machine.memory_bytes:
        return Finding("memory", "fail", text, "train it on a machine with more memory, or a smaller model: run.toml")
    if needs.peak_bytes > machine.free_bytes:
        return Finding("memory", "warn", text, "end other programs, or the kernel may end this one")
    return Finding("memory", "ok", text)


def _cores(settings: NodeSettings, machine: Machine) -> Finding:
    cores = machine.threads
    if settings.threads > cores:
        text = f"{settings.threads} threads on {cores} core{'' if cores == 1 else 's'} are slower than {cores}"
        return Finding("cores", "warn", text, f"--threads {cores}, or 0 for as many as there are cores")
    return Finding("cores", "ok", f"{settings.threads or cores} of {cores}")


def _open_files() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < OPEN_FILES:
        text = f"this user may open {hard} files at once, and a peer needs {OPEN_FILES}"
        return Finding("open files", "fail", text, f"ulimit -Hn {4 * OPEN_FILES}, as root, or LimitNOFILE= in a unit")
    if soft != resource.RLIM_INFINITY and soft < OPEN_FILES:
        text = f"this shell allows {soft} open files, and a peer needs {OPEN_FILES}"
        return Finding("open files", "fail", text, f"ulimit -n {4 * OPEN_FILES}")
    return Finding("open files", "ok", f"{soft} allowed")


def _temporary_folder() -> Finding:
    folder = tempfile.gettempdir()
    try:
        with tempfile.NamedTemporaryFile(prefix="p2ptrain-", dir=folder):
            pass
    except OSError as error:
        return Finding(
            "temporary folder", "fail", f"{folder}: {error.strerror}", "TMPDIR=DIR with one that you may write"
        )
    return Finding("temporary folder", "ok", folder)


def of_home(settings: NodeSettings) -> Iterator[Finding]:
    """Say whether the home can be used, and what runs in it; for a caller that holds no lock on it."""
    home = Home(settings.home)
    if not home.path.exists():
        # A look leaves nothing behind.
        yield _new_home(home.path)
        return
    try:
        home.lock()
    except HomeError as error:
        yield failed("home", error)
        return
    home.unlock()
    yield Finding("home", "ok", str(home.path))


def _new_home(path: Path) -> Finding:
    above = next(parent for parent in path.absolute().parents if parent.exists())
    if above.is_dir() and os.access(above, os.W_OK | os.X_OK):
        return Finding("home", "ok", f"{path} will be made by the first start")
    return Finding("home", "fail", f"{path} cannot be made: {above} may not be written", "another one: --home DIR")


def of_port(settings: NodeSettings) -> Finding:
    """Say whether the port can be listened on."""
    from p2ptrain.swarm.addresses import claim_port

    try:
        port = claim_port(settings.host, settings.port)
    except P2PTrainError as error:
        return failed("port", error)
    if not settings.port:
        return Finding("port", "ok", "a free one will be taken, and remembered in the home")
    return Finding("port", "ok", f"{port} is free")


def of_loops(place: Path | None) -> Finding:
    """Say whether compiled loops are kept, and whole, where `native.kept.folder` says."""
    if place is None:
        text = "there is nowhere to keep compiled loops, so each start compiles them for half a minute and more"
        return Finding("compiled loops", "warn", text, "NUMBA_CACHE_DIR=DIR with one that you alone may write")
    files = sorted(place.glob("*.loop"))
    # A hash of the rest stands before it, as `native/kept.py` writes it.
    damaged = [path for path in files if hashlib.sha256((data := path.read_bytes())[32:]).digest() != data[:32]]
    if damaged:
        text = f"{len(damaged)} of {len(files)} in {place} are damaged; the next start compiles them again"
        return Finding("compiled loops", "warn", text, f"rm -r {place}")
    if not files:
        return Finding("compiled loops", "ok", "none yet: the first start compiles them, once a version")
    return Finding("compiled loops", "ok", f"{len(files)} in {place}")


def of_device(settings: NodeSettings, manifest: Manifest | None) -> Iterator[Finding]:
    """Say where it computes, and how fast beside what the run needs. Loads torch."""
    import torch

    from p2ptrain.training.device import choose_device

    try:
        device = choose_device(settings.device)
    except HomeError as error:
        yield failed("device", error)
        return
    if device.type == "cpu" and Path("/dev/nvidia0").exists():
        text = "this machine has an NVIDIA GPU that torch cannot use"
        yield Finding("device", "warn", text, "pip install --force-reinstall torch, and see that nvidia-smi works")
    else:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        yield Finding("device", "ok", name)
    if manifest is None or manifest.task_config is not None:
        return
    torch.set_num_threads(settings.threads or this_machine().threads)
    seconds = _micro_batch_seconds(manifest, device)
    tokens = manifest.round.micro_batch * manifest.context
    longest = manifest.round.max_seconds
    text = f"{tokens / seconds:,.0f} tokens/s; a micro-batch takes {seconds:.1f} s of a round's {longest:g}"
    if seconds > manifest.round.max_seconds:
        yield Finding("speed", "fail", f"{text}: too slow to be in time", "a faster device: --device, --threads")
    elif 2 * seconds > manifest.round.max_seconds:
        yield Finding("speed", "warn", f"{text}: often late", "more threads, or nothing else on this machine")
    else:
        yield Finding("speed", "ok", text)


def _micro_batch_seconds(manifest: Manifest, device: Any) -> float:
    import torch

    from p2ptrain.models.gpt import GPT

    model = GPT(manifest.model).to(device)
    tokens = torch.zeros(manifest.round.micro_batch, manifest.context + 1, dtype=torch.long, device=device)
    times = []
    for _ in range(2):  # the first one warms up
        began = time.monotonic()
        model.loss(tokens, None).backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.monotonic() - began)
    return min(times)


# ---- the swarm --------------------------------------------------------------------------------------------------


async def of_swarm(
    settings: NodeSettings, addresses: list[str], own: bytes | None, *, running: Mapping[str, Any] | None
) -> list[Finding]:
    """Meet the peers at `addresses`, and return what is right and wrong between them and this peer.

    Args:
        own: the signed manifest of the run that this home is in.
        running: what the peer that runs in this home says of itself; None: none does.
    """
    from p2ptrain.errors import ClockSkewError
    from p2ptrain.swarm.addresses import parse_addresses
    from p2ptrain.swarm.node import SwarmNode

    findings: list[Finding] = []
    home = Home(settings.home)
    identity = home.identity if running is None and home.identity.exists() else None
    try:
        parse_addresses(addresses)
        node = await SwarmNode.create(
            identity,
            addresses,
            host=settings.host,
            port=settings.port if running is None else 0,
            announce=list(settings.announce) if running is None else [],
            observer=running is not None,
        )
    except ClockSkewError as error:
        return [failed("clock", error)]
    except P2PTrainError as error:
        return [failed("peers", error)]
    try:
        findings.append(Finding("peers", "ok", f"{len(node.known_peers)} of those asked answer"))
        findings.append(Finding("clock", "ok", "within what the swarm allows"))
        findings += await _run(node, addresses, own, as_home=identity is not None)
        findings += await _identity(node, home, running, own)
        findings += await _reachable(node, settings, running)
    finally:
        await node.close()
    return findings


async def _run(node: Any, addresses: list[str], own: bytes | None, *, as_home: bool) -> list[Finding]:
    """Version and protocol of the peers at `addresses`, and whether their run is for this peer."""
    from p2ptrain.calls import client
    from p2ptrain.calls.messages import REVOKED, CallError
    from p2ptrain.peer import joining
    from p2ptrain.swarm.addresses import parse_addresses

    findings = []
    for peer in parse_addresses(addresses, own_peer_id=node.peer_id):
        try:
            welcome = await client.hello(node, peer)
        except CallError as error:
            text = f"a peer there is in no run, or of a version that this one cannot read: {error}"
            findings.append(Finding("run", "warn", text, "the line that a peer of the run prints: p2ptrain join ADDR"))
            continue
        if welcome.protocol != PROTOCOL_VERSION:
            older = "this machine's p2ptrain" if welcome.protocol > PROTOCOL_VERSION else "that peer's p2ptrain"
            text = f"the swarm speaks protocol {welcome.protocol} and this machine {PROTOCOL_VERSION}"
            findings.append(Finding("version", "fail", text, f"upgrade {older}: pip install --upgrade p2ptrain"))
        else:
            findings.append(Finding("version", "ok", f"protocol {welcome.protocol}, as this machine's"))
        if welcome.refusal == REVOKED:
            findings.append(failed("access", joining.revoked(welcome.run_id)))
        elif welcome.refusal and (as_home or own is None):
            findings.append(failed("access", joining.not_listed(welcome.run_id)))
        elif welcome.refusal:
            findings.append(Finding("access", "ok", "the run is closed; the peer that runs here is in it"))
        else:
            findings.append(Finding("access", "ok", f"the run {welcome.run_id.hex()[:16]} is for this peer"))
        break
    return findings


async def _identity(node: Any, home: Home, running: Mapping[str, Any] | None, own: bytes | None) -> list[Finding]:
    """Whether somebody else is this peer."""
    from p2ptrain.config.manifest import open_manifest
    from p2ptrain.swarm.identity import format_peer_id, load_or_create_identity
    from p2ptrain.swarm.shelves import find_peer

    if own is None or not home.identity.exists():
        return []
    manifest, run_id = open_manifest(own)
    me = load_or_create_identity(home.identity).peer_id
    record = await find_peer(node, run_id, manifest.records_key, me)
    cure = f"stop one of them, or make this home another peer: rm {home.identity}"
    if record is None or record.last_seen_seconds(time.time()) > FRESH_SECONDS or record.state == "leaving":
        return [Finding("identity", "ok", f"{format_peer_id(me)} is used nowhere else")]
    if running is None:
        where = ", ".join(record.addresses[:2]) or "an address that nobody can dial"
        return [Finding("identity", "fail", f"this home's identity is in use elsewhere, at {where}", cure)]
    return [Finding("identity", "ok", f"{format_peer_id(me)} is the peer that runs here")]


async def _reachable(node: Any, settings: NodeSettings, running: Mapping[str, Any] | None) -> list[Finding]:
    """Whether the others can dial this peer, as one of them has tried, and where it sends those who want to join."""
    from p2ptrain.calls.client import dialled
    from p2ptrain.calls.messages import CallError

    port = node.port if running is None else Home(settings.home).remembered_port()
    findings = []
    for peer in list(node.known_peers)[:3]:
        try:
            answer = await dialled(node, peer, port)
        except CallError:
            continue
        if not answer.failure:
            findings.append(Finding("inbound", "ok", f"another peer has reached port {port} at {answer.address}"))
        else:
            text = f"another peer cannot reach port {port} at {answer.address}: {answer.failure}"
            cure = f"open TCP port {port} in the firewall, and forward it in the router to {_own_host()}"
            findings.append(Finding("inbound", "warn", f"{text}; this peer trains, and reduces nothing", cure))
        break
    else:
        text = "nobody who was asked tries to dial this peer"
        findings.append(
            Finding("inbound", "warn", text, "give the address of a peer in training: p2ptrain doctor ADDR")
        )
    findings += await announced(settings, node)
    return findings


async def announced(settings: NodeSettings, node: Any) -> list[Finding]:
    """Whether the addresses that this peer hands out lead to it, as far as this machine can see."""
    from p2ptrain.swarm.addresses import parse_announced
    from p2ptrain.swarm.reach import host_and_port

    findings = []
    for text in settings.announce:
        route = parse_announced(text, node.peer_id)
        host, port = host_and_port(route)
        try:
            socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except OSError:
            findings.append(
                Finding(
                    "announced", "fail", f"{text}: the name {host} does not resolve", "correct --announce HOST:PORT"
                )
            )
    return findings


def _own_host() -> str:
    """Return the address of this machine in its own network, as its route to elsewhere has it; no packet is sent."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))
        return str(probe.getsockname()[0])
    return "this machine"
