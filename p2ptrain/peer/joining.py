"""What a newcomer needs before it can follow the chain: which run there is, its text, and somebody who has rounds."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection

from p2ptrain.calls import client
from p2ptrain.calls.client import Client
from p2ptrain.calls.messages import CallError, Traffic
from p2ptrain.calls.news import NewsFeed
from p2ptrain.config.manifest import Manifest, open_manifest
from p2ptrain.data.corpus import unpack
from p2ptrain.errors import AccessError, DataError, ManifestError, RunChoiceError, UnreachableError
from p2ptrain.peer.corpus_download import CorpusDownload
from p2ptrain.swarm.addresses import parse_addresses
from p2ptrain.swarm.identity import format_peer_id
from p2ptrain.swarm.node import SwarmNode
from p2ptrain.swarm.records import RunRecord

ATTEMPTS = 3
RETRY_SECONDS = 1.0
"""A peer that has just started, or a DHT that has just lost one, may need a moment."""
PACKING_SLACK_BYTES = 1024 * 1024
"""A packed corpus is never longer than the text and this."""
SILENCE_SECONDS = 180.0
"""A newcomer that hears nobody who has rounds of its run gives up after so long: time enough to start a peer again."""
SAY_AFTER_SECONDS = 10.0
SAY_EVERY_SECONDS = 30.0
"""How often it says what it waits for."""
LOOK_SECONDS = 0.5
LISTED_RUNS = 20
"""Runs that a message lists."""

_logger = logging.getLogger(__name__)


async def find_run(node: SwarmNode, addresses: list[str], choice: str | None, own: bytes | None = None) -> bytes:
    """The signed manifest of the run that the peers at `addresses` are in, or of the one that `choice` names.

    What others publish in the same DHT counts only where those peers are in no run, or not in the one named. Of two
    runs of one name theirs is meant.

    Args:
        choice: name or id of a run.
        own: signed manifest of the run that this home is in. Without a choice the home goes back to it, unless all of
            those peers are in others.

    Raises:
        AccessError: the run is for listed peers, and this is none.
        RunChoiceError: no run, several and no choice, or none of that name.
        ManifestError: what a peer hands out as the run's manifest is none.
    """
    manifests, closed, records = await _look_for_runs(node, addresses)
    own_id = None if own is None else open_manifest(own)[1]
    if own is not None and own_id in closed:
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
        raise not_listed(min(closed))
    chosen = _choose(at_hand or everyone, choice)
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
    node: SwarmNode, addresses: list[str]
) -> tuple[dict[bytes, bytes], set[bytes], dict[bytes, list[RunRecord]]]:
    """What `_ask` hears from the peers at `addresses`, and {run id: its records} of all runs in their DHT."""
    for attempt in range(ATTEMPTS):
        if attempt:
            await asyncio.sleep(RETRY_SECONDS)
        manifests, closed = await _ask(node, addresses)
        records = await node.read_runs()
        if manifests or closed or (records and not addresses):
            break
    return manifests, closed, records


async def _ask(node: SwarmNode, addresses: list[str]) -> tuple[dict[bytes, bytes], set[bytes]]:
    """{run id: signed manifest} of the peers at `addresses` that are in a run, and ids of the runs that refuse us.

    Raises:
        ManifestError: what one hands out is none, and no other is in a run.
    """
    manifests: dict[bytes, bytes] = {}
    closed: set[bytes] = set()
    malformed: ManifestError | None = None
    for peer in parse_addresses(addresses, own_peer_id=node.peer_id):
        try:
            await node.connect(peer, addresses)
            welcome = await client.hello(node, peer)
        except (CallError, UnreachableError) as error:
            _logger.debug("%s is in no run: %s", format_peer_id(peer), error)
            continue
        if welcome.refusal:
            closed.add(welcome.run_id)
            continue
        try:
            open_manifest(welcome.manifest, welcome.run_id)
        except ManifestError as error:
            _logger.warning("%s hands out no manifest that we can read: %s", format_peer_id(peer)[-8:], error)
            malformed = error
        else:
            manifests[welcome.run_id] = welcome.manifest
    if malformed is not None and not manifests and not closed:
        raise malformed
    return manifests, closed


def not_listed(run_id: bytes) -> AccessError:
    """Make the error for a run whose access list does not have this peer."""
    return AccessError(
        f"the run {run_id.hex()[:16]} is for listed peers only, and this peer is not on its list",
        hint="send the run's owner the id that this prints (with --home DIR, if you join with it): p2ptrain id",
    )


def _choose(names: dict[bytes, str], choice: str | None) -> bytes:
    if not names:
        raise RunChoiceError(
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


async def fetch_corpus(
    node: SwarmNode,
    run_id: bytes,
    manifest: Manifest,
    introducers: Collection[bytes],
    progress: Callable[[str, int, int], None],
) -> bytes:
    """The packed corpus from any peer of the run that hands it out, of those that `introducers` names first.

    Raises:
        DataError: nobody has it.
    """
    config = manifest.data
    download = CorpusDownload(
        Client(node, Traffic(), run_id),
        node.connect,
        config.bytes + config.heldout_bytes + PACKING_SLACK_BYTES,
        lambda packed: unpack(packed, config),
        lambda done, total: progress("data", done, total),
    )
    for attempt in range(ATTEMPTS):
        if attempt:
            # A stream that breaks once is no reason to send a user away.
            await asyncio.sleep(RETRY_SECONDS)
        # Anyone may publish records, of any number of peers; a person has given the addresses of the first.
        found = await node.read_peers(run_id, manifest.records_key)
        peers = [peer for peer in dict.fromkeys((*introducers, *found)) if peer != node.peer_id]
        packed = await download.run(peers)
        if packed is not None:
            return packed
    raise DataError(
        f"none of {len(peers)} peers hands out the run's text ({config.name})",
        hint="get the text elsewhere and join with --data PATH, or try again later",
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
        f"run {manifest.name} ({run_id.hex()[:16]}): {manifest.model.parameters:,} parameters, "
        f"text {manifest.data.name} ({manifest.data.license})"
    )
