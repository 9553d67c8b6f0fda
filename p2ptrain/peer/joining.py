"""What a newcomer needs before it can follow the chain: which run there is, its text, and somebody who has rounds."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from p2ptrain.calls import client
from p2ptrain.calls.messages import KNOWN_ALREADY, CallError, RefusedError, Welcome
from p2ptrain.chain.admission import Grant, Revocation
from p2ptrain.config.manifest import Manifest, open_manifest
from p2ptrain.errors import (
    AccessError,
    HomeError,
    ManifestError,
    NoRunError,
    RevokedError,
    RunChoiceError,
    UnreachableError,
)
from p2ptrain.peer.admission import shuts_out
from p2ptrain.swarm.addresses import parse_addresses
from p2ptrain.swarm.identity import format_peer_id
from p2ptrain.swarm.node import SwarmNode
from p2ptrain.swarm.records import RunRecord
from p2ptrain.swarm.shelves import find_peer

if TYPE_CHECKING:
    from p2ptrain.calls.news import NewsFeed

ATTEMPTS = 3
RETRY_SECONDS = 1.0
"""A peer that has just started, or a DHT that has just lost one, may need a moment."""
SILENCE_SECONDS = 180.0
"""A newcomer that hears nobody who has rounds of its run gives up after so long: time enough to start a peer again."""
SAY_AFTER_SECONDS = 10.0
SAY_EVERY_SECONDS = 30.0
"""How often it says what it waits for."""
LOOK_SECONDS = 0.5
SELF_LOOKS, SELF_LOOK_SECONDS, SELF_FRESH_SECONDS = 6, 1.0, 12.0
"""At this peer's own record, for somebody else who renews it; records are renewed every two seconds."""
LISTED_RUNS = 20
"""Runs that a message lists."""

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Found:
    """What the peers at some addresses say."""

    #: run id -> its signed manifest
    manifests: dict[bytes, bytes] = field(default_factory=dict)
    #: ids of the runs that refuse us
    closed: set[bytes] = field(default_factory=set)
    #: of them those whose owner has shut us out, by what these peers show
    revoked: dict[bytes, Revocation] = field(default_factory=dict)
    #: run id -> why our invitation is refused
    refusals: dict[bytes, str] = field(default_factory=dict)


async def find_run(
    node: SwarmNode, addresses: list[str], choice: str | None, own: bytes | None = None, grant: Grant | None = None
) -> bytes:
    """The signed manifest of the run that the peers at `addresses` are in, or of the one that `choice` names.

    What others publish in the same DHT counts only where those peers are in no run, or not in the one named. Of two
    runs of one name theirs is meant.

    Args:
        choice: name or id of a run.
        own: signed manifest of the run that this home is in. Without a choice the home goes back to it, unless all of
            those peers are in others.
        grant: by which this peer is a guest of a run, or wants to be.

    Raises:
        AccessError: the run is for some peers, and this is none; or the grant is not taken.
        RevokedError: the run's owner has shut this peer out.
        RunChoiceError: no run, several and no choice, or none of that name.
        ManifestError: what a peer hands out as the run's manifest is none.
    """
    found, records = await _look_for_runs(node, addresses, grant)
    manifests, closed = found.manifests, found.closed
    own_id = None
    if own is not None:
        own_manifest, own_id = open_manifest(own)
        shown = found.revoked.get(own_id)
        beginning = own_manifest.beginning(own_id)
        if own_id not in manifests and shown and shuts_out(shown, node.peer_id, grant, beginning):
            raise revoked(own_id)
        if own_id in closed:
            manifests[own_id] = own
    theirs = {run_id: open_manifest(signed, run_id)[0].name for run_id, signed in manifests.items()}
    asked = parse_addresses(addresses).keys()
    for run_id, listed in records.items():
        if any(record.peer_id in asked for record in listed):
            theirs.setdefault(run_id, listed[0].name)
    if choice is None and own is not None and (own_id in theirs or not (theirs or closed)):
        return own
    everyone = {run_id: listed[0].name for run_id, listed in records.items()} | theirs
    at_hand = theirs if choice is None else _named(theirs, choice) or _named(everyone, choice)
    if closed and not at_hand:
        refused = min(closed)
        if refused in found.revoked:
            raise revoked(refused)
        elsewhere = grant is not None and grant.issued.run_id not in (refused, own_id)
        raise not_listed(refused, "it is to another run" if elsewhere else found.refusals.get(refused))
    chosen = _choose(at_hand or everyone, choice)
    if chosen in found.revoked and chosen not in manifests:
        raise revoked(chosen)
    if chosen in manifests:
        return manifests[chosen]
    signed = await node.get_manifest(chosen)
    for record in records.get(chosen, []):
        if signed is not None:
            break
        try:
            await node.connect(record.peer_id)
            signed = (await client.hello(node, record.peer_id)).manifest
            open_manifest(signed, chosen)
        except (CallError, UnreachableError, ManifestError) as error:
            _logger.debug("no manifest from %s: %s", format_peer_id(record.peer_id), error)
            signed = None
    if signed is None:
        raise RunChoiceError(
            f"the manifest of run {everyone[chosen]!r} cannot be had from anyone",
            hint="give the address of a peer in it",
        )
    return signed


async def _look_for_runs(
    node: SwarmNode, addresses: list[str], grant: Grant | None
) -> tuple[_Found, dict[bytes, list[RunRecord]]]:
    """What `_ask` hears from the peers at `addresses`, and {run id: its records} of all runs in their DHT."""
    for attempt in range(ATTEMPTS):
        if attempt:
            await asyncio.sleep(RETRY_SECONDS)
        found = await _ask(node, addresses, grant)
        records = await node.read_runs()
        if found.manifests or found.closed or (records and not addresses):
            break
    return found, records


async def _ask(node: SwarmNode, addresses: list[str], grant: Grant | None) -> _Found:
    """Say hello to the peers at `addresses`; show our grant to those whose run it is for, if they refuse us.

    Raises:
        ManifestError: what one hands out is none, and no other is in a run.
    """
    found = _Found()
    malformed: ManifestError | None = None
    peers = parse_addresses(addresses, own_peer_id=node.peer_id)
    # All at once: those that are silent keep nobody waiting for longer than one of them does.
    answers = await asyncio.gather(*(_greet(node, peer, addresses, grant) for peer in peers))
    for peer, answer in zip(peers, answers, strict=True):
        if answer is None:
            continue
        welcome, why = answer
        if why:
            found.refusals[welcome.run_id] = why
        if welcome.refusal:
            found.closed.add(welcome.run_id)
            if welcome.revocation is not None:
                found.revoked[welcome.run_id] = welcome.revocation
            continue
        try:
            open_manifest(welcome.manifest, welcome.run_id)
        except ManifestError as error:
            _logger.warning("%s hands out no manifest that we can read: %s", format_peer_id(peer)[-8:], error)
            malformed = error
        else:
            found.manifests[welcome.run_id] = welcome.manifest
    if malformed is not None and not found.manifests and not found.closed:
        raise malformed
    return found


async def _greet(node: SwarmNode, peer: bytes, addresses: list[str], grant: Grant | None) -> tuple[Welcome, str] | None:
    """What a peer answers to hello, and why it does not take our grant, if we have shown it; None: no answer."""
    why = ""
    try:
        await node.connect(peer, addresses)
        welcome = await client.hello(node, peer)
        if welcome.refusal and grant is not None and welcome.run_id == grant.issued.run_id:
            why = await _show(node, peer, grant)
            welcome = await client.hello(node, peer)
    except (CallError, UnreachableError) as error:
        _logger.debug("%s is in no run: %s", format_peer_id(peer), error)
        return None
    return welcome, why


async def _show(node: SwarmNode, peer: bytes, grant: Grant) -> str:
    """Show a peer our grant; return why it does not take it, or "". Raises CallError."""
    try:
        await client.amend(node, peer, grant.issued.run_id, (grant,))
    except RefusedError as error:
        return "" if str(error) == KNOWN_ALREADY else str(error)
    return ""


def not_listed(run_id: bytes, why: str | None = None) -> AccessError:
    """Make the error for a run that is not for this peer; `why` its invitation was refused, if it showed one."""
    run = run_id.hex()[:16]
    if why:
        return AccessError(
            f"the run {run} does not take this invitation: {why}", hint="ask who invited you for another one"
        )
    return AccessError(
        f"the run {run} is for listed peers only, and this peer is not on its list",
        hint="with an invitation: p2ptrain join ADDR --invite TOKEN; or send the run's owner the id that this prints "
        "(with --home DIR, if you join with it): p2ptrain id",
    )


def revoked(run_id: bytes) -> RevokedError:
    """Make the error for a run whose owner has shut this peer out."""
    return RevokedError(
        f"the owner of the run {run_id.hex()[:16]} has revoked this peer: no peer of the run answers it any more",
        hint="ask the owner; an invitation to another home is good, as it has another peer id: --home DIR",
    )


def _choose(names: dict[bytes, str], choice: str | None) -> bytes:
    if not names:
        raise NoRunError(
            "there is no run in this network", hint="start one: p2ptrain init run.toml; p2ptrain bootstrap run.toml"
        )
    # Anyone can publish any number of runs.
    lines = [f"\n  {run_id.hex()[:16]}  {name}" for run_id, name in sorted(names.items(), key=lambda i: i[1])]
    listing = "".join(lines[:LISTED_RUNS]) + (f"\n  and {len(lines) - LISTED_RUNS} more" * (len(lines) > LISTED_RUNS))
    if choice is None:
        if len(names) > 1:
            raise RunChoiceError(f"there are several runs in this network:{listing}", hint="again with --run NAME|ID")
        return next(iter(names))
    found = _named(names, choice)
    if len(found) != 1:
        problem = "no run" if not found else "several runs"
        raise RunChoiceError(f"{problem} called {choice!r}; there are:{listing}", hint="again with --run ID")
    return next(iter(found))


def _named(names: dict[bytes, str], choice: str) -> dict[bytes, str]:
    """Those of `names` {run id: name} that `choice` (a name, or the beginning of an id) may mean."""
    wanted = choice.lower()
    return {
        run_id: name
        for run_id, name in names.items()
        if name == choice or (len(wanted) >= 4 and run_id.hex().startswith(wanted))
    }


async def same_run_elsewhere(node: SwarmNode, manifest: Manifest, run_id: bytes) -> tuple[bytes, str] | None:
    """Look for a run of the same run.toml, by name and nonce, that somebody else has bootstrapped.

    Returns: its id, and an address of one of its peers ("" where none can be dialled); None: there is none to be seen.
    """
    for other, listed in (await node.read_runs()).items():
        if other == run_id or all(record.name != manifest.name for record in listed):
            continue
        signed = await node.get_manifest(other)
        if signed is None or open_manifest(signed, other)[0].nonce != manifest.nonce:
            continue
        peers = await node.read_peers(other)
        return other, next((address for record in peers.values() for address in record.addresses), "")
    return None


async def refuse_second_self(node: SwarmNode, run_id: bytes, secret: bytes, identity: Path) -> None:
    """Look whether another process is this peer in the run: a home that was copied.

    A record that this peer left behind a moment ago looks the same, but nobody renews it.

    Raises:
        HomeError: there is one.
    """
    before: float | None = None
    for attempt in range(SELF_LOOKS):
        if attempt:
            await asyncio.sleep(SELF_LOOK_SECONDS)
        record = await find_peer(node, run_id, secret, node.peer_id)
        if record is None or record.state == "leaving" or record.last_seen_seconds(time.time()) > SELF_FRESH_SECONDS:
            return
        if before is not None and record.time > before:
            raise identity_in_use(node.peer_id, record.addresses[:1], identity)
        before = record.time


def identity_in_use(peer_id: bytes, addresses: Sequence[str], identity: Path) -> HomeError:
    """Make the error for a home whose identity another process has."""
    where = f", at {addresses[0]}" if addresses else ""
    return HomeError(
        f"another process takes part as this peer already, {format_peer_id(peer_id)}{where}: was this home copied?",
        hint=f"stop the other one, or make this home another peer: rm {identity}",
    )


async def await_chain(
    manifest: Manifest,
    feed: NewsFeed,
    head_round: Callable[[], int],
    fetched_at: Callable[[], float],
    say: Callable[[str], None],
) -> None:
    """Return once this peer has rounds of the run, which nobody but its founder can begin; say what is waited for.

    Whoever says that it has rounds, and whatever is fetched, is a sign of life, however long the rest takes.

    Args:
        head_round: where this peer stands.
        fetched_at: the loop's time when something of the chain came last.
        say: shows a line.

    Raises:
        UnreachableError: no sign of life for `SILENCE_SECONDS`.
    """
    now = asyncio.get_running_loop().time
    began, say_due = now(), now() + SAY_AFTER_SECONDS
    while not head_round():
        silent = now() - max(began, feed.heard_at, fetched_at())
        if silent >= SILENCE_SECONDS:
            raise _nobody_left(manifest, feed.furthest)
        # What is being fetched is on show already.
        if now() >= say_due and now() - fetched_at() >= SAY_AFTER_SECONDS:
            say_due = now() + SAY_EVERY_SECONDS
            if silent < SAY_AFTER_SECONDS:
                say(f"waiting for the run's rounds: others say that they have them, up to round {feed.furthest:,}")
            else:
                say(
                    f"waiting for the run's rounds: no answer for {silent:.0f} s from anyone who has them; "
                    f"giving up after {SILENCE_SECONDS:.0f} s"
                )
        await asyncio.sleep(LOOK_SECONDS)


def _nobody_left(manifest: Manifest, furthest: int) -> UnreachableError:
    nobody = f"no answer from anyone who has its rounds for {SILENCE_SECONDS:.0f} s"
    if manifest.last_round and furthest >= manifest.last_round:
        return UnreachableError(
            f"the run {manifest.name!r} is finished, as others said, and {nobody}",
            hint="whoever took part has the model; there: p2ptrain sample",
        )
    return UnreachableError(
        f"the run {manifest.name!r} has no peer left that we can find: {nobody}",
        hint="start a peer that was in it again, and take the line that it prints: p2ptrain join ADDR",
    )


def describe(manifest: Manifest, run_id: bytes) -> str:
    """One line on a run, for people."""
    return (
        f"run {manifest.name} ({run_id.hex()[:16]}): {manifest.parameters:,} parameters, "
        f"text {manifest.data.name} ({manifest.data.license})"
    )
