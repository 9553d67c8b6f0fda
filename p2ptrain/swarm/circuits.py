"""A place at a relay, by which a peer that nobody can dial is reached: circuit relay v2 of libp2p, asked for by hand.

The daemon would reserve by itself, but not before it holds itself for unreachable, and with fewer than four relays
three minutes later. Its side of the protocol needs no more than one message; what then comes through the relay the
daemon takes. A relay drops a reservation with the connection, so whoever holds one asks again now and then.
Cost: one message of two bytes, and one answer. A daemon that relays is tried so when it starts, by another daemon,
until one has the caps that it was told: some seconds.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass

from hivemind.p2p import P2P, PeerID
from hivemind.p2p.p2p_daemon_bindings.control import P2PDaemonError

from p2ptrain.errors import UnreachableError

HOP = "/libp2p/circuit/relay/0.2.0/hop"
RESERVE_SECONDS = 5.0
_RESERVE = b"\x02\x08\x00"
"""The protocol's HopMessage of type RESERVE, after its length."""
_ANSWER_MAX_BYTES = 4096
_OK = 100
_REASONS = {200: "it has no room for more reservations", 201: "it has too many of this network's", 401: "it refuses"}


@dataclass(frozen=True, slots=True)
class RelayCaps:
    """What a relay carries for others at most."""

    reservations: int = 128
    """Peers that may be reached through it at a time."""
    circuits: int = 16
    """Connections of each of them at a time."""
    circuit_bytes: int = 1 << 30
    """Carried by one connection each way, before it has to be opened again."""
    circuit_minutes: int = 30
    """That one connection may last, before it has to be opened again."""

    def flags(self) -> dict[str, object]:
        """Return them as p2pd's flags have them."""
        return {
            "relayService": True,
            "relayMaxReservations": self.reservations,
            "relayMaxCircuits": self.circuits,
            "relayDataLimit": self.circuit_bytes,
            "relayTimeLimit": f"{self.circuit_minutes}m",
        }


async def holds(caps: RelayCaps, p2p: P2P, sockets_prefix: str) -> bool:
    """Say whether a daemon that has just started relays with `caps`: ask it for a place, as another peer.

    p2pd starts two relays, one with its flags and one with libp2p's own caps (128 KiB, two minutes a connection), and
    the one that is ready last answers. Which that is, is chance: on two cores the small one won in 4 of 8 starts, with
    eight threads in 7 of 8.

    Args:
        sockets_prefix: a multiaddr that the asking daemon's sockets begin with.
    """

    class Asking(P2P):  # type: ignore[misc, unused-ignore]
        _UNIX_SOCKET_PREFIX = sockets_prefix

    addresses = await p2p.get_visible_maddrs()
    asking = await Asking.create(initial_peers=addresses, no_listen=True, dht_mode="client", nat_port_map=False)
    try:
        return await reserve(asking, p2p.peer_id.to_bytes()) == caps.circuit_bytes
    finally:
        await asking.shutdown()


async def reserve(p2p: P2P, relay: bytes) -> int:
    """Reserve a place at a relay that this peer is connected to, and return what one circuit carries each way [bytes].

    Zero is without end.

    Raises:
        UnreachableError: it relays nothing, or not for us.
    """
    writer = None
    try:
        async with asyncio.timeout(RESERVE_SECONDS):
            _, reader, writer = await p2p._client.stream_open(PeerID(relay), [HOP])
            writer.write(_RESERVE)
            size = shift = 0
            while True:
                byte = (await reader.readexactly(1))[0]
                size |= (byte & 0x7F) << shift
                if byte < 0x80:
                    break
                shift += 7
                if shift > 14:
                    raise ValueError("a length that is none")
            if size > _ANSWER_MAX_BYTES:
                raise ValueError(f"an answer of {size} bytes")
            answer = await reader.readexactly(size)
            status, circuit_bytes = _status(answer), _circuit_bytes(answer)
    except (P2PDaemonError, OSError, EOFError, TimeoutError, ValueError) as error:
        raise UnreachableError(f"{PeerID(relay)} does not relay: {error or type(error).__name__}") from error
    finally:
        if writer is not None:
            writer.close()
    if status != _OK:
        raise UnreachableError(f"{PeerID(relay)} does not relay: {_REASONS.get(status, f'status {status}')}")
    return circuit_bytes


def _status(message: bytes) -> int:
    """Return the status of a HopMessage, its field 5; 0 where it has none. Raises ValueError for what is none."""
    return next((value for field, value in _fields(message) if field == 5 and isinstance(value, int)), 0)


def _circuit_bytes(message: bytes) -> int:
    """Return the data of a HopMessage's Limit, its field 4; 0 where it has none. Raises ValueError for what is none."""
    limit = next((value for field, value in _fields(message) if field == 4 and isinstance(value, bytes)), b"")
    return next((value for field, value in _fields(limit) if field == 2 and isinstance(value, int)), 0)


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yield the fields of a protobuf message with their numbers: what is a number, and what is bytes."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            if at >= len(message) or shift > 63:
                raise ValueError("a message that ends early")
            byte = message[at]
            at += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
            shift += 7

    while at < len(message):
        tag = varint()
        if tag & 7 == 0:
            yield tag >> 3, varint()
        elif tag & 7 == 2:
            length = varint()  # which moves `at` itself
            at += length
            if at > len(message):
                raise ValueError("a message that ends early")
            yield tag >> 3, message[at - length : at]
        else:
            raise ValueError("a message with a field that this protocol does not have")
