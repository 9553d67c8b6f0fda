"""`p2ptrain meet`: where peers find each other, and through which those reach each other that nobody can dial."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from typing import TYPE_CHECKING, Annotated

import typer

from p2ptrain.cli.options import AnnounceOption, HomeOption, HostOption, PortOption, QuietOption, VerboseOption
from p2ptrain.cli.output import outlive_readers, printable, set_up_logging
from p2ptrain.config.home import Home, default_home
from p2ptrain.config.node import resolve_settings

if TYPE_CHECKING:
    from p2ptrain.config.node import NodeSettings
    from p2ptrain.swarm.circuits import RelayCaps

SAY_SECONDS = 60.0


def meet(
    addresses: Annotated[
        list[str] | None,
        typer.Argument(metavar="ADDR...", help="Peers of a network to be part of; none: begin one."),
    ] = None,
    reservations: Annotated[
        int, typer.Option("--reservations", min=0, max=1024, help="Peers to relay for, at most.")
    ] = 128,
    circuits: Annotated[
        int, typer.Option("--circuits", min=1, max=256, help="Relayed connections of each of them, at most.")
    ] = 16,
    megabytes: Annotated[
        int, typer.Option("--megabytes", min=1, max=4096, help="Carried by one connection each way, at most.")
    ] = 1024,
    home: HomeOption = None,
    port: PortOption = None,
    host: HostOption = None,
    announce: AnnounceOption = None,
    verbose: VerboseOption = 0,
    quiet: QuietOption = False,
) -> None:
    """Train nothing: be where peers meet, and relay between those that nobody can dial."""
    outlive_readers()
    set_up_logging(verbose, quiet)
    from p2ptrain.swarm.addresses import parse_addresses
    from p2ptrain.swarm.circuits import RelayCaps
    from p2ptrain.swarm.thread import new_network_loop

    parse_addresses(addresses or [])
    flags = {"port": port, "host": host, "announce": announce}
    # Beside a peer's home, since a machine may have both.
    settings = resolve_settings(home or default_home() / "meet", flags)
    here, caps = Home(settings.home), RelayCaps(reservations, circuits, megabytes << 20)
    here.lock()
    try:
        with asyncio.Runner(loop_factory=new_network_loop) as runner:
            runner.run(_meet(settings, here, addresses or [], caps, quiet))
    finally:
        here.unlock()


async def _meet(settings: NodeSettings, home: Home, addresses: list[str], caps: RelayCaps, quiet: bool) -> None:
    from p2ptrain.calls.dialling import DialBack, Dialling
    from p2ptrain.calls.messages import NAMESPACE
    from p2ptrain.swarm.node import SwarmNode

    ended = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, ended.set)
    node = await SwarmNode.create(
        home.identity,
        addresses,
        host=settings.host,
        port=settings.port,
        announce=list(settings.announce),
        relaying=caps,
    )
    try:
        home.remember_port(node.port)
        await node.add_servicer(Dialling(DialBack(node.seen_at)), NAMESPACE)
        _print_addresses(await node.join_addresses(), caps)
        while not ended.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(SAY_SECONDS):
                    await ended.wait()
            if not quiet and not ended.is_set():
                print(await _standing(node), flush=True)
    finally:
        await node.close()


def _print_addresses(found: list[str], caps: RelayCaps) -> None:
    from p2ptrain.peer.reachability import where_it_works

    if found:
        print(f"Meet at:  {found[0]}", flush=True)
        where = where_it_works(found[0])
        print("begin a run:  p2ptrain bootstrap run.toml --initial-peers ADDRESS")
        print("take part in the run of those who meet here:  p2ptrain join ADDRESS")
        if where:
            print(where)
    print(
        f"relays for at most {caps.reservations} peers, {caps.circuits} connections each, "
        f"{caps.circuit_bytes >> 20:,} MiB each way and {caps.circuit_minutes} minutes a connection",
        flush=True,
    )


async def _standing(node: object) -> str:
    from p2ptrain.swarm.node import SwarmNode

    assert isinstance(node, SwarmNode)
    runs = await node.read_runs()
    names = ", ".join(sorted({records[0].name for records in runs.values()})[:8])
    connected = len(await node.connected())
    text = f"{time.strftime('%H:%M:%S')} {connected} peer{'' if connected == 1 else 's'} connected"
    return printable(f"{text}; runs: {names}" if names else f"{text}; no run yet")
