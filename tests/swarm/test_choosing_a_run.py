"""An address means the run of its peer, whatever strangers publish in the same DHT."""

from __future__ import annotations

import asyncio
import time
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from p2ptrain.calls.messages import NAMESPACE, Tip, Traffic, Welcome
from p2ptrain.calls.servicer import PeerServicer
from p2ptrain.config.manifest import PROTOCOL_VERSION, Manifest, open_manifest, sign_manifest
from p2ptrain.errors import AccessError, RunChoiceError
from p2ptrain.peer import joining
from p2ptrain.peer.joining import LISTED_RUNS, find_run
from p2ptrain.swarm.identity import Identity, format_peer_id, new_identity
from p2ptrain.swarm.node import SwarmNode
from p2ptrain.swarm.records import RUN_RECORD_SECONDS, RUNS_KEY, RunRecord, encode_record, subkey_of

if TYPE_CHECKING:
    from conftest import Swarm

STRANGERS = 120


def signed(name: str) -> bytes:
    return sign_manifest(
        Manifest(name=name, nonce="0" * 32), Ed25519PrivateKey.generate(), format_peer_id(new_identity().peer_id)
    )


async def serve(node: SwarmNode, manifest: bytes, *, to_us: bool = True) -> None:
    """Answer hello as a peer in this run does; `to_us`: its list has us, if it has a list."""
    run_id = open_manifest(manifest)[1]
    welcome = Welcome(PROTOCOL_VERSION, run_id, manifest, Tip(0, run_id, 0), "")
    answering: Any = SimpleNamespace(admits=lambda peer: to_us, welcome=lambda: welcome, revocation=lambda peer: None)
    await node.add_servicer(PeerServicer(answering, Traffic()), NAMESPACE)


def listing(identity: Identity, run_id: bytes, name: str) -> RunRecord:
    return RunRecord(
        peer_id=identity.peer_id,
        run_id=run_id,
        time=time.time(),
        name=name,
        protocol=1,
        round=1,
        state_id=run_id,
        members=1,
    )


async def publish_foreign(node: SwarmNode, number: int, name: str = "") -> None:
    """A record of a run in the name of somebody who is not there."""
    identity, expires = new_identity(), time.time() + 60
    record = listing(identity, number.to_bytes(32, "big"), name or f"foreign {number}")
    data = encode_record(identity, RUNS_KEY, record, expires)
    assert await node.dht.store(RUNS_KEY.encode(), data, expires, subkey=subkey_of(identity.peer_id))


def test_foreign_runs_by_the_hundred_change_nothing(swarm: Swarm) -> None:
    ours = signed("ours")

    async def scenario() -> None:
        first = await swarm.node()
        await serve(first, ours)
        await first.publish(RUNS_KEY, listing(first.identity, open_manifest(ours)[1], "ours"), RUN_RECORD_SECONDS)
        foreign = (publish_foreign(first, number, "ours" if number % 2 else "") for number in range(STRANGERS))
        await asyncio.gather(*foreign)
        newcomer = await swarm.node(first)
        addresses = await first.join_addresses()
        assert len(await newcomer.read_runs()) == STRANGERS + 1
        assert await find_run(newcomer, addresses, None) == ours
        # Those of the same name are not meant.
        assert await find_run(newcomer, addresses, "ours") == ours
        with pytest.raises(RunChoiceError, match="no run called 'third'") as caught:
            await find_run(newcomer, addresses, "third")
        assert f"and {STRANGERS + 1 - LISTED_RUNS} more" in str(caught.value)

    swarm.run(scenario())


def test_a_peer_that_does_not_answer_is_in_the_run_that_its_record_names(swarm: Swarm) -> None:
    ours = signed("ours")

    async def scenario() -> None:
        first = await swarm.node()
        await first.store_manifest(ours)
        await first.publish(RUNS_KEY, listing(first.identity, open_manifest(ours)[1], "ours"), RUN_RECORD_SECONDS)
        await publish_foreign(first, 1)
        newcomer = await swarm.node(first)
        assert await find_run(newcomer, await first.join_addresses(), None) == ours

    swarm.run(scenario())


def test_a_home_goes_back_to_its_run_unless_the_address_is_in_another(
    swarm: Swarm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(joining, "RETRY_SECONDS", 0.01)
    ours, others = signed("ours"), signed("others")

    async def scenario() -> None:
        plain = await swarm.node()
        other = await swarm.node(plain)
        same = await swarm.node(plain)
        await serve(other, others)
        await serve(same, ours)
        await publish_foreign(plain, 1)
        home = await swarm.node(plain)
        in_none, in_other, in_ours = [await node.join_addresses() for node in (plain, other, same)]
        assert await find_run(home, in_none, None, ours) == ours
        assert await find_run(home, in_other, None, ours) == others
        assert await find_run(home, in_other + in_ours, None, ours) == ours
        with pytest.raises(RunChoiceError, match="several runs"):
            await find_run(home, in_other + in_ours, None)

    swarm.run(scenario())


def test_a_run_that_is_closed_to_us_is_named_at_once_unless_the_home_knows_its_manifest(
    swarm: Swarm, monkeypatch: pytest.MonkeyPatch
) -> None:
    # It would be noticed if it tried again.
    monkeypatch.setattr(joining, "RETRY_SECONDS", 1000.0)
    closed, ours = signed("closed"), signed("ours")
    closed_id = open_manifest(closed)[1].hex()[:16]

    async def scenario() -> None:
        shut = await swarm.node()
        open_one = await swarm.node(shut)
        await serve(shut, closed, to_us=False)
        await serve(open_one, ours)
        await publish_foreign(shut, 1, "foreign")
        home = await swarm.node(shut)
        in_closed, in_ours = [await node.join_addresses() for node in (shut, open_one)]
        for choice, own in ((None, None), (closed_id, None), ("closed", None), (None, ours)):
            with pytest.raises(AccessError, match=closed_id) as caught:
                await find_run(home, in_closed, choice, own)
            assert "p2ptrain id" in caught.value.hint
        for choice in (None, closed_id, "closed"):
            assert await find_run(home, in_closed, choice, closed) == closed
        assert await find_run(home, in_closed + in_ours, None) == ours

    swarm.run(scenario())
