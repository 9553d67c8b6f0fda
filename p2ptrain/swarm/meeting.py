"""Meeting the first peers of a DHT: dial, ask the time, be listed; and saying why it failed when it did.

Done here and not by the daemon's own bootstrap or by `DHTNode.create`, which stop at the first bad address, take one
wrong clock among many for ours, and give one message for everything that can go wrong. Cost: one round trip once a
connection stands; bounded by `timeout_seconds` when nobody answers, `STRAGGLER_SECONDS` after the first who does.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping, Sequence

from hivemind.dht import DHTNode
from hivemind.dht.protocol import ValidationError
from hivemind.p2p import P2P, PeerID
from hivemind.p2p.p2p_daemon_bindings.control import P2PDaemonError
from multiaddr import Multiaddr

from p2ptrain.errors import ClockSkewError, UnreachableError
from p2ptrain.swarm.addresses import PeerAddress

STRAGGLER_SECONDS = 0.5
CALLED_ELSEWHERE = "cannot call this peer back"
IN_VAIN = ("another peer answers there: the address is of an old identity", CALLED_ELSEWHERE)
"""Reasons why nobody was met that waiting does not cure."""
_DIAL_FAILURE = re.compile(r"\* \[(?P<route>[^\]]+)\] (?P<reason>[^\n]+)")
_CLOCKS = re.compile(r"local: (?P<local>[\d.]+), peer: (?P<peer>[\d.]+)")


async def dial(p2p: P2P, peer_id: bytes, routes: Sequence[str], timeout_seconds: float) -> None:
    """Opens a connection, by `routes` (without /p2p/ID) or, if there are none, by what the daemon can find out.

    UnreachableError says why each route failed.
    """
    goal = f"{PeerAddress(peer_id, routes[0])}" if routes else str(PeerID(peer_id))
    try:
        # hivemind's own multiaddr class cannot encode Ed25519 ids; the daemon only wants the bytes.
        addresses = [Multiaddr(route) for route in routes]
        async with asyncio.timeout(timeout_seconds):
            await p2p._client.connect(PeerID(peer_id), addresses)
    except TimeoutError:
        raise UnreachableError(f"no answer from {goal} within {timeout_seconds:.0f} s", hint=_UNREACHABLE) from None
    except (P2PDaemonError, OSError, EOFError) as error:
        raise UnreachableError(f"cannot reach {goal}: {_why(str(error))}", hint=_UNREACHABLE) from error


async def meet(node: DHTNode, peers: Mapping[bytes, Sequence[str]], timeout_seconds: float) -> set[bytes]:
    """Joins the DHT through any of `peers` {peer id: routes}; returns those that answered in time.

    Raises UnreachableError when none does, ClockSkewError when all who answer find this machine's clock wrong.
    """
    meetings = {
        asyncio.ensure_future(_meet_one(node, peer_id, routes, timeout_seconds)): peer_id
        for peer_id, routes in peers.items()
    }
    pending = set(meetings)
    met: set[bytes] = set()
    failures: list[UnreachableError | ClockSkewError] = []
    try:
        while pending:
            patience = STRAGGLER_SECONDS if met else None
            done, pending = await asyncio.wait(pending, timeout=patience, return_when=asyncio.FIRST_COMPLETED)
            if not done:
                break
            for task in done:
                error = task.exception()
                if error is None:
                    met.add(meetings[task])
                elif isinstance(error, UnreachableError | ClockSkewError):
                    failures.append(error)
                else:
                    raise error
    finally:
        for task in pending:
            task.cancel()
    if met:
        return met
    failures.sort(key=lambda failure: isinstance(failure, UnreachableError))
    if len(failures) > 1 and isinstance(failures[0], UnreachableError):
        reasons = "".join(f"\n  {failure}" for failure in failures[:8])
        raise UnreachableError(f"none of {len(failures)} peers can be reached:{reasons}", hint=_UNREACHABLE)
    raise failures[0]


async def _meet_one(node: DHTNode, peer_id: bytes, routes: Sequence[str], timeout_seconds: float) -> None:
    await dial(node.p2p, peer_id, routes, timeout_seconds)
    try:
        answer = await node.protocol.call_ping(PeerID(peer_id), validate=True, strict=True)
    except ValidationError as error:
        clocks = _CLOCKS.search(str(error))
        if clocks is None:
            raise UnreachableError(
                f"{PeerID(peer_id)} answers, but {CALLED_ELSEWHERE}",
                hint="check --host and --announce, and the firewall",
            ) from error
        ahead = float(clocks["local"]) - float(clocks["peer"])
        raise ClockSkewError(
            f"this machine's clock is {abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} the swarm's",
            hint="set the clock, for example with: sudo timedatectl set-ntp true",
        ) from error
    if answer is None:
        raise UnreachableError(
            f"{PeerID(peer_id)} accepts connections, but does not speak the swarm's DHT",
            hint="is that program p2ptrain, and is it still starting? try again in some seconds",
        )


_UNREACHABLE = "is that peer still running, and is its port open? otherwise use the join line of another peer"


def _why(message: str) -> str:
    """The reasons in libp2p's report, one a route, without its nesting."""
    if "no good addresses" in message:
        return "the name does not resolve, or leads nowhere that libp2p can dial"
    reasons = []
    for found in _DIAL_FAILURE.finditer(message):
        reason = found["reason"]
        if "peer id mismatch" in reason:
            reason = IN_VAIN[0]
        reasons.append(reason.rsplit(": ", 1)[-1] if "connect: " in reason else reason)
    return "; ".join(dict.fromkeys(reasons)) or message.removeprefix("Connect failed. msg=")
