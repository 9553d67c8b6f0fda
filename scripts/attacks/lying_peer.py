"""A real peer that lies while a file is there: `p2ptrain` with one of its own parts replaced.

    python scripts/attacks/lying_peer.py LIE FILE ARGUMENT...

LIE is one of `LIES`; the arguments are p2ptrain's.
"""

from __future__ import annotations

import asyncio
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

from p2ptrain.calls.servicer import PeerServicer
from p2ptrain.calls.uplink import UplinkMeter
from p2ptrain.chain import Row
from p2ptrain.chain.evidence import Bundle
from p2ptrain.chain.seal import SEQUENCES_PER_KILOSECOND_MAX, UPLINK_MAX_KBIT
from p2ptrain.chain.sealed import Key, Reply
from p2ptrain.peer.answering import Answering
from p2ptrain.peer.auditing import Auditing
from p2ptrain.rounds import events
from p2ptrain.simulation import lying
from p2ptrain.simulation.lying import empty_reply, sum_of_opposites
from p2ptrain.training import trainer

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


def lie_about_sums(switch: Path, *, show: bool) -> None:
    """Reply with the sums' opposites; with `show` let auditors see what was summed."""
    reduced, shown = Answering._reduced, Auditing.show

    def _reduced(self: Answering, effect: events.Reduce) -> tuple[bytes, Bundle]:
        return sum_of_opposites(self, effect)[:2] if switch.exists() else reduced(self, effect)

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
}

if __name__ == "__main__":
    LIES[sys.argv[1]](Path(sys.argv[2]))
    sys.argv[1:] = sys.argv[3:]
    runpy.run_module("p2ptrain", run_name="__main__", alter_sys=True)
