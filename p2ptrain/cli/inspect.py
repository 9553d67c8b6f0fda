"""`p2ptrain inspect`: look at a swarm through the DHT, as an observer that trains nothing and is listed nowhere."""

from __future__ import annotations

import asyncio
import json
import signal
import time
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from p2ptrain.cli.options import HomeOption, QuietOption, VerboseOption
from p2ptrain.cli.output import printable, set_up_logging
from p2ptrain.config.home import Home, default_home
from p2ptrain.errors import UnreachableError, UsageError

if TYPE_CHECKING:
    from p2ptrain.config.manifest import Manifest
    from p2ptrain.observe.census import Inspection
    from p2ptrain.swarm.node import SwarmNode

WATCH_SECONDS = 2.0
FILE_COLUMNS = 160
"""Width of the table where it does not go to a terminal."""


def inspect(
    addresses: Annotated[
        list[str] | None,
        typer.Argument(metavar="ADDR...", help="Address of any peer of the swarm; default: the peer of this home."),
    ] = None,
    run: Annotated[
        str | None, typer.Option("--run", metavar="NAME|ID", help="Another run than that of the peer at ADDR.")
    ] = None,
    format: Annotated[Literal["table", "json"], typer.Option("--format", help="Form of the output.")] = "table",
    watch: Annotated[bool, typer.Option("--watch", help="Look again every two seconds, until Ctrl-C.")] = False,
    home: HomeOption = None,
    verbose: VerboseOption = 0,
    quiet: QuietOption = False,
) -> None:
    """Show a swarm: its run, its peers, its DHT."""
    set_up_logging(verbose, quiet)
    from p2ptrain.swarm.addresses import parse_addresses

    here = Home(home or default_home())
    given = addresses or addresses_of(here)
    own = here.manifest.read_bytes() if here.manifest.exists() else None
    parse_addresses(given)
    from p2ptrain.swarm.thread import new_network_loop

    with asyncio.Runner(loop_factory=new_network_loop) as runner:
        if not runner.run(_until_interrupted(_inspect(given, run, own, format, watch))):
            raise typer.Abort


async def _until_interrupted(work: Coroutine[None, None, None]) -> bool:
    """Run `work`; False when Ctrl-C or SIGTERM ended it, after it has cleaned up.

    Handlers of our own, because a shell starts background jobs with SIGINT ignored, and Python then leaves it so.
    """
    task = asyncio.ensure_future(work)
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    try:
        await task
    except asyncio.CancelledError:
        return False
    return True


def addresses_of(home: Home) -> list[str]:
    """How to reach the peer of this home, and those that it has met."""
    from p2ptrain.swarm.identity import format_peer_id, load_or_create_identity

    found: list[str] = []
    port = home.remembered_port()
    if home.identity.exists() and port:
        peer_id = format_peer_id(load_or_create_identity(home.identity).peer_id)
        found.append(f"/ip4/127.0.0.1/tcp/{port}/p2p/{peer_id}")
    try:
        met = json.loads(home.peers.read_text())
        found += [text for text in met if isinstance(text, str)][:16]
    except (OSError, ValueError):
        pass
    if not found:
        raise UsageError(f"home {home.path} has no peer to ask", hint="p2ptrain inspect ADDR")
    return found


async def _inspect(addresses: list[str], choice: str | None, own: bytes | None, format: str, watch: bool) -> None:
    from p2ptrain.swarm.node import SwarmNode

    try:
        node = await SwarmNode.create(None, addresses, observer=True)
    except UnreachableError as error:
        raise UnreachableError(str(error), hint="is a peer running there? Try the address of another") from error
    try:
        manifest, run_id = await _choose_run(node, addresses, choice, own)
        while True:
            began = time.monotonic()
            seen = await look(node, run_id, manifest)
            _show(seen, format, watch)
            if not watch:
                return
            await asyncio.sleep(max(0.0, WATCH_SECONDS - (time.monotonic() - began)))
    finally:
        await node.close()


async def look(node: SwarmNode, run_id: bytes, manifest: Manifest) -> Inspection:
    """One look at a run, through a node that is in its DHT already."""
    from p2ptrain.data.tokenizer import tokenizer_of_run
    from p2ptrain.observe.census import inspect_run

    records = await node.read_peers(run_id, manifest.records_key)
    found, tokenizer = await node.crawl(), tokenizer_of_run(manifest)
    return inspect_run(run_id, manifest.name, records, found, tokenizer_sha256=tokenizer)


async def _choose_run(
    node: SwarmNode, addresses: list[str], choice: str | None, own: bytes | None
) -> tuple[Manifest, bytes]:
    from p2ptrain.config.manifest import open_manifest
    from p2ptrain.peer.joining import find_run

    return open_manifest(await find_run(node, addresses, choice, own))


def _show(seen: Inspection, format: str, watch: bool) -> None:
    if format == "json":
        # With --watch one object a line, for programs that read along.
        print(json.dumps(seen.as_json(), indent=None if watch else 2), flush=True)
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from p2ptrain.observe.evaluations import evaluation_lines

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = FILE_COLUMNS
    if watch and console.is_terminal:
        console.clear()
    shown = seen.as_json()
    run, dht = shown["run"], shown["dht"]
    console.print(
        Text(f"run {printable(run['name'])} ({run['id'][:16]})  round {run['round']}  state {run['state_id'][:16]}  ")
        + Text(f"dht: {dht['nodes_alive']} nodes alive, {dht['nodes_dead']} dead")
    )
    table = Table(box=None, pad_edge=False)
    for title in ("name", "peer", "state", "round", "state id", "tokens/s", "sent/round", "recv/round", "train loss"):
        table.add_column(title, justify="left" if title in ("name", "peer", "state", "state id") else "right")
    for title in ("device", "version", "seen"):
        table.add_column(title)
    for peer in shown["peers"]:
        table.add_row(
            *(
                Text(printable(str(cell)))
                for cell in (
                    peer["name"],
                    peer["peer_id"][-8:],
                    peer["state"],
                    peer["round"],
                    peer["state_id"][:8],
                    f"{peer['tokens_per_second']:,.0f}",
                    f"{peer['bytes_sent_per_round'] / 1000:,.1f} kB",
                    f"{peer['bytes_received_per_round'] / 1000:,.1f} kB",
                    "-" if peer["train_loss"] is None else f"{peer['train_loss']:.3f}",
                    peer["device"],
                    peer["version"],
                    f"{peer['last_seen_seconds']:.0f} s ago",
                )
            )
        )
    console.print(table)
    if seen.evaluation is not None:
        for line in evaluation_lines(seen.evaluation, {peer["peer_id"]: peer["name"] for peer in shown["peers"]}):
            console.print(Text(printable(line)))
    for peer in shown["peers"]:
        if peer["diverged"] is not None:
            console.print(Text(printable(f"{peer['name']} says that the run has diverged: {peer['diverged']}")))
        refused = peer["refused_branch"]
        if refused is not None:
            branch = f"a branch up to round {refused['round']} (total {refused['total']}) that {refused['donor']} has"
            told = f"{peer['name']} refused {branch}, {refused['age_seconds']:.0f} s ago: {refused['why']}"
            console.print(Text(printable(told)))
