"""Trying for others whether they can be dialled: where they call from, and nowhere else, and not often."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from google.protobuf.wrappers_pb2 import BytesValue
from hivemind.p2p import P2PContext, ServicerBase

from p2ptrain.calls.messages import TOO_MANY_CALLS, Dial, Dialled, Traffic, decode_message
from p2ptrain.swarm.limits import Allowance, loop_time
from p2ptrain.swarm.reach import dial_back

DIALS_PER_SECOND, DIALS_BURST = 0.2, 4.0
"""To one address, and to all together, for those who ask whether they can be reached."""


class DialBack:
    """Tries, as often as is allowed.

    Args:
        seen_at: returns the IP address that a peer is connected from; "" where it is not, or through a relay.
    """

    def __init__(self, seen_at: Callable[[bytes], Awaitable[str]]) -> None:
        self._seen_at = seen_at
        self._dials = Allowance(DIALS_PER_SECOND, DIALS_BURST, loop_time)

    async def answer(self, peer: bytes, wanted: Dial) -> Dialled:
        """Return whether `peer` can be dialled where it calls from."""
        host = await self._seen_at(peer)
        if not host:
            return Dialled("", "this peer is seen through a relay")
        # Many peers may be behind one address, whose ports are not ours to look through.
        if not (self._dials.take(host) and self._dials.take()):
            return Dialled(host, TOO_MANY_CALLS)
        return Dialled(host, await dial_back(host, wanted.port))


class Dialling(ServicerBase):  # type: ignore[misc, unused-ignore]
    """Answers this one call of a peer, where no run is taken part in."""

    def __init__(self, dial_back: DialBack) -> None:
        self._dial_back = dial_back

    @classmethod
    def _get_handle_name(cls, namespace: str | None, method_name: str) -> str:
        # As those who ask peers of a run call it.
        return f"{namespace}::PeerServicer.{method_name}"

    async def rpc_dial(self, request: BytesValue, context: P2PContext) -> BytesValue:
        """Try whether the caller can be dialled: where it calls from, and nowhere else."""
        wanted = decode_message(request.value, Dial)
        return Traffic().message(await self._dial_back.answer(context.remote_id.to_bytes(), wanted))
