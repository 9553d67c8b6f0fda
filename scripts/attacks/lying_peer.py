"""A real peer that lies while a file is there: `p2ptrain` with one of its own parts replaced.

    python scripts/attacks/lying_peer.py LIE FILE ARGUMENT...

LIE is one of `LIES`; the arguments are p2ptrain's.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, AsyncIterator, cast  # noqa: UP035 - hivemind knows a stream by this type alone

from google.protobuf.wrappers_pb2 import BytesValue
from hivemind.p2p import P2PContext

from p2ptrain.calls.client import Client
from p2ptrain.calls.messages import CallError, ContributionHeader
from p2ptrain.calls.servicer import PeerServicer
from p2ptrain.calls.uplink import UplinkMeter
from p2ptrain.chain import RoundShape, Row, root_round
from p2ptrain.chain.evidence import Bundle
from p2ptrain.chain.seal import SEQUENCES_PER_KILOSECOND_MAX, UPLINK_MAX_KBIT
from p2ptrain.chain.sealed import Key, Reply
from p2ptrain.peer.answering import Answering
from p2ptrain.peer.auditing import Auditing
from p2ptrain.rounds import events
from p2ptrain.rounds.events import ContributionReceived
from p2ptrain.rounds.exchange import Exchange
from p2ptrain.rounds.machine import RoundMachine
from p2ptrain.simulation import lying
from p2ptrain.simulation.lying import empty_reply, sum_of_opposites
from p2ptrain.training import trainer
from p2ptrain.training.replica import Replica

REPLAYED = 30
"""Contributions that are sent again and again."""
ANSWER = 0x91
"""First byte of an `Answer`: an array of one. What follows a contribution's answers is the reply."""


def withhold(switch: Path) -> None:
    """Take contributions and never reply; hand out no rounds, which would have the reply in them."""
    contribute, rounds = PeerServicer.rpc_contribute, PeerServicer.rpc_rounds

    async def rpc_contribute(
        self: PeerServicer, stream: AsyncIterator[BytesValue], context: P2PContext
    ) -> AsyncIterator[BytesValue]:
        async for frame in contribute(self, stream, context):
            if frame.value[:1] != bytes([ANSWER]):
                await until_gone(switch)
            yield frame

    async def rpc_rounds(self: PeerServicer, request: BytesValue, context: P2PContext) -> AsyncIterator[BytesValue]:
        await until_gone(switch)
        async for frame in rounds(self, request, context):
            yield frame

    put(PeerServicer, "rpc_contribute", rpc_contribute)
    put(PeerServicer, "rpc_rounds", rpc_rounds)


async def until_gone(switch: Path) -> None:
    """Wait while the file is there."""
    while switch.exists():
        await asyncio.sleep(0.1)


def claim_throughput(claimed: int, switch: Path) -> None:
    """Say in each row that it computes so many sequences in 1000 s."""

    def row(weight: int, sequences_per_kilosecond: int, uplink_kbit: int) -> Row:
        return Row(weight, claimed if switch.exists() else sequences_per_kilosecond, uplink_kbit)

    put(trainer, "Row", row)


def claim_uplink(claimed: int, switch: Path) -> None:
    """Say in each row that it sends so fast."""
    truth = cast(property, UplinkMeter.declared_kbit).fget
    assert truth is not None
    put(UplinkMeter, "declared_kbit", property(lambda self: claimed if switch.exists() else truth(self)))


def censor(switch: Path) -> None:
    """Leave one member out, always the same: neither reduce nor seal anything with its work in it."""
    seal, heard = RoundMachine._seal, RoundMachine._on_contribution

    def victim(machine: RoundMachine, shape: RoundShape) -> bytes:
        return min((member.peer_id for member in shape.members if member.peer_id != machine.me), default=b"")

    def _on_contribution(self: RoundMachine, event: ContributionReceived, now: float) -> None:
        shape = self.shape
        if not (switch.exists() and shape is not None and event.peer_id == victim(self, shape)):
            heard(self, event, now)

    def _seal(self: RoundMachine, exchange: Exchange, included: frozenset[int], now: float, *, solo: bool) -> bool:
        if switch.exists() and not solo:
            place = exchange.shape.index(victim(self, exchange.shape))
            for number in [number for number, reply in exchange.replies.items() if place in reply.included]:
                del exchange.replies[number]
            included = frozenset[int]().union(*(reply.included for reply in exchange.replies.values()))
            if included <= {exchange.index}:
                exchange.replies.clear()
                included = frozenset()
        return seal(self, exchange, included, now, solo=solo)

    put(RoundMachine, "_on_contribution", _on_contribution)
    put(RoundMachine, "_seal", _seal)


def seal_of_nothing(switch: Path) -> None:
    """Seal, each time that it may, a round without any reply."""
    seal = RoundMachine._seal

    def _seal(self: RoundMachine, exchange: Exchange, included: frozenset[int], now: float, *, solo: bool) -> bool:
        if switch.exists() and not solo:
            exchange.replies.clear()
            included = frozenset()
        return seal(self, exchange, included, now, solo=solo)

    put(RoundMachine, "_seal", _seal)


def seal_out_of_turn(switch: Path) -> None:
    """Seal each round as soon as every reply is there, whoever's turn it is."""
    seal_from = RoundMachine._seal_from

    def _seal_from(self: RoundMachine, exchange: Exchange) -> float:
        complete = switch.exists() and exchange.complete_at is not None
        return float("-inf") if complete else seal_from(self, exchange)

    put(RoundMachine, "_seal_from", _seal_from)


def false_root(switch: Path) -> None:
    """Hold snapshots of a state that is nobody's, send their roots, and name them in seals."""
    snapshot, majority = Replica.snapshot, RoundMachine._majority_root

    def altered(self: Replica) -> bytes:
        data = snapshot(self)
        # The last parameter, or number that a direction keeps.
        return data[:-4] + b"\0\0\0\x3f" if switch.exists() else data

    def _majority_root(self: RoundMachine, shape: RoundShape) -> bytes:
        mine = self.roots.own.get(root_round(shape.round, self.rules.root_interval), b"")
        return mine if switch.exists() else majority(self, shape)

    put(Replica, "snapshot", altered)
    put(RoundMachine, "_majority_root", _majority_root)


def replay(switch: Path) -> None:
    """Send each contribution again, and then those of the rounds before, as often as they are answered."""
    contribute = Client.contribute
    before: list[tuple[bytes, ContributionHeader, bytes]] = []

    async def again(self: Client, peer: bytes, header: ContributionHeader, payload: bytes, *rest: Any) -> bytes:
        reply = await contribute(self, peer, header, payload, *rest)
        before.append((peer, header, payload))
        del before[:-REPLAYED]
        for earlier in before if switch.exists() else ():
            with contextlib.suppress(CallError):
                reply_max_bytes, _, turn, burst = rest
                # Not waited for any longer than a moment: of a round that is over there is no reply.
                await contribute(self, *earlier, reply_max_bytes, 0.2, turn, burst)
        return reply

    put(Client, "contribute", again)


def lie_about_sums(switch: Path, *, show: bool) -> None:
    """Reply with the sums' opposites; with `show` let auditors see what was summed."""
    reduced, shown = Answering._reduced, Auditing.show

    async def _reduced(self: Answering, effect: events.Reduce) -> tuple[bytes, Bundle]:
        return (await sum_of_opposites(self, effect))[:2] if switch.exists() else await reduced(self, effect)

    def hide(self: Auditing, digest: bytes, peer: bytes) -> bytes | str:
        return "not today" if switch.exists() else shown(self, digest, peer)

    # `sum_of_opposites` begins with what the class itself makes of the contributions.
    lying.Answering = SimpleNamespace(_reduced=reduced)  # type: ignore[assignment, misc]
    put(Answering, "_reduced", _reduced)
    if not show:
        put(Auditing, "show", hide)


def reply_twice(switch: Path) -> None:
    """Give every other peer another reply than the rest."""
    frozen, calls = Answering.frozen_reply, itertools.count()

    async def frozen_reply(self: Answering, key: Key, part: int) -> Reply | None:
        reply = await frozen(self, key, part)
        other = reply is not None and switch.exists() and next(calls) % 2
        return empty_reply(self, key, part, reply) if reply is not None and other else reply

    put(Answering, "frozen_reply", frozen_reply)


def record_joins(switch: Path) -> None:
    """Write down each call to join, beside the switch; nothing else is a lie."""
    take = PeerServicer.rpc_join

    async def rpc_join(self: PeerServicer, request: BytesValue, context: P2PContext) -> BytesValue:
        with switch.with_name("joins").open("a") as joins:
            joins.write(request.value.hex() + "\n")
        return await take(self, request, context)

    put(PeerServicer, "rpc_join", rpc_join)


def put(owner: Any, name: str, lie: Any) -> None:
    """Replace a part that must be there."""
    assert hasattr(owner, name), f"{owner} has no {name} any more"
    setattr(owner, name, lie)


LIES: dict[str, Callable[[Path], None]] = {
    "withhold": withhold,
    "wrong_sum": functools.partial(lie_about_sums, show=True),
    "wrong_sum_withheld": functools.partial(lie_about_sums, show=False),
    "two_replies": reply_twice,
    "no_throughput": functools.partial(claim_throughput, 0),
    "endless_throughput": functools.partial(claim_throughput, SEQUENCES_PER_KILOSECOND_MAX),
    "endless_uplink": functools.partial(claim_uplink, UPLINK_MAX_KBIT),
    "censor": censor,
    "seal_of_nothing": seal_of_nothing,
    "seal_out_of_turn": seal_out_of_turn,
    "false_root": false_root,
    "replay": replay,
    "record_joins": record_joins,
}

if __name__ == "__main__":
    LIES[sys.argv[1]](Path(sys.argv[2]))
    sys.argv[1:] = sys.argv[3:]
    runpy.run_module("p2ptrain", run_name="__main__", alter_sys=True)
