"""`p2ptrain revoke`: shut a peer out of a run, or end an invitation."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from p2ptrain.cli.inspect import addresses_of
from p2ptrain.cli.invite import owner_of, run_of
from p2ptrain.cli.options import HomeOption, QuietOption, VerboseOption
from p2ptrain.cli.output import set_up_logging
from p2ptrain.config.home import Home, default_home
from p2ptrain.errors import AccessError, P2PTrainError, UnreachableError

if TYPE_CHECKING:
    from p2ptrain.chain.admission import Revocation
    from p2ptrain.swarm.node import SwarmNode

SEALED_WITHIN_SECONDS = 120.0
"""A revocation that peers have taken should be in a seal by then: rounds take at most a minute by default."""
LOOK_SECONDS = 0.5
PEERS_MAX = 8
"""Of those that the home has met, so many are told; the others hear of it from them, and by the seal."""


def revoke(
    subject: Annotated[
        str, typer.Argument(metavar="PEER_ID|TOKEN", help="Peer to shut out, by its id; or invitation to end.")
    ],
    addresses: Annotated[
        list[str] | None,
        typer.Argument(metavar="ADDR...", help="Address of any peer of the run; default: those this home knows."),
    ] = None,
    with_guests: Annotated[
        bool, typer.Option("--with-guests", help="Shut out the guests that it has brought as well.")
    ] = False,
    manifest: Annotated[
        Path | None, typer.Option("--manifest", metavar="RUN.TOML", help="Of the run; default: this home's run.")
    ] = None,
    format: Annotated[Literal["text", "json"], typer.Option("--format", help="Form of the output.")] = "text",
    home: HomeOption = None,
    verbose: VerboseOption = 0,
    quiet: QuietOption = False,
) -> None:
    """Sign a revocation with the owner's key, hand it to peers of the run, and wait until a seal has it."""
    set_up_logging(verbose, quiet)
    from p2ptrain.swarm.addresses import parse_addresses
    from p2ptrain.swarm.invitations import revoke as sign
    from p2ptrain.swarm.invitations import subject_of
    from p2ptrain.swarm.thread import new_network_loop

    here = Home(home or default_home())
    run, run_id = run_of(here, manifest)
    owner = owner_of(here, run)
    if owner is None:
        raise AccessError(
            f"home {here.path} does not have the owner's key of the run {run.name!r}",
            hint="use the home that has bootstrapped it (its file owner.key): --home DIR",
        )
    revocation = sign(owner, run_id, subject_of(subject), with_guests=with_guests)
    given = addresses or addresses_of(here)
    parse_addresses(given)
    with asyncio.Runner(loop_factory=new_network_loop) as runner:
        sealed = runner.run(_deliver(given, revocation))
    if format == "json":
        print(json.dumps({"run_id": run_id.hex(), "subject": subject, "with_guests": with_guests, "sealed": sealed}))
    elif sealed:
        print("revoked: the chain has it, and it holds from the second round after")
    else:
        print("peers have taken the revocation, but no seal has it yet; run this again to see that it holds")


async def _deliver(addresses: list[str], revocation: Revocation) -> bool:
    """Hand a revocation to peers of the run until a seal has it, or long enough; returns whether one has."""
    from p2ptrain.swarm.node import SwarmNode

    node = await SwarmNode.create(None, addresses, observer=True)
    try:
        deadline = asyncio.get_running_loop().time() + SEALED_WITHIN_SECONDS
        while True:
            if await _hand_over(node, addresses, revocation):
                return True
            if asyncio.get_running_loop().time() >= deadline:
                return False
            await asyncio.sleep(LOOK_SECONDS)
    finally:
        await node.close()


async def _hand_over(node: SwarmNode, addresses: list[str], revocation: Revocation) -> bool:
    """Hand it to each peer at `addresses` once; returns whether one of them says that a seal has it.

    Raises:
        UnreachableError, AccessError: none of them takes it.
    """
    from p2ptrain.calls.messages import KNOWN_ALREADY, TOO_MANY_CALLS
    from p2ptrain.swarm.addresses import parse_addresses

    peers = list(parse_addresses(addresses))[:PEERS_MAX]
    answers = await asyncio.gather(*(_hand_to(node, peer, addresses, revocation) for peer in peers))
    said = {answer for answer in answers if answer is not None}
    if not said:
        raise UnreachableError("no peer of the run answers", hint="name one that does: p2ptrain revoke PEER_ID ADDR")
    if not said & {"", KNOWN_ALREADY, TOO_MANY_CALLS}:
        raise AccessError(f"the run's peers do not take the revocation: {min(said)}")
    return KNOWN_ALREADY in said


async def _hand_to(node: SwarmNode, peer: bytes, addresses: list[str], revocation: Revocation) -> str | None:
    """Hand it to one peer; returns its refusal or "", and None where it does not answer."""
    from p2ptrain.calls.client import amend
    from p2ptrain.calls.messages import CallError, RefusedError

    try:
        await node.connect(peer, addresses)
        await amend(node, peer, revocation.run_id, (revocation,))
    except RefusedError as error:
        return str(error)
    except (CallError, P2PTrainError):
        return None
    return ""
