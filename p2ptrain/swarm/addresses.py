"""Peers' addresses (multiaddrs): reading what a person typed, and choosing which of our own to print and publish.

An address to join must name the peer it leads to, /p2p/ID at its end: without it, whoever answers at that host and port
could pose as the peer that was meant.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import re
import socket
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import base58
from multiaddr import Multiaddr

from p2ptrain.errors import AddressError, PortInUseError
from p2ptrain.swarm.identity import format_peer_id, is_ed25519_peer_id

EXAMPLE = "/ip4/203.0.113.7/tcp/40123/p2p/12D3KooW..."

_HOSTS = ("ip4", "ip6", "dns", "dns4", "dns6", "dnsaddr")
_HOST_AND_PORT = re.compile(r"(?P<host>[A-Za-z0-9.-]+|\[[0-9A-Fa-f:.]+\]):(?P<port>[0-9]{1,5})")


@dataclass(frozen=True)
class PeerAddress:
    """One way to reach one peer."""

    peer_id: bytes
    route: str
    """The multiaddr without its last /p2p/ID."""

    def __str__(self) -> str:
        return f"{self.route}/p2p/{format_peer_id(self.peer_id)}"


def parse_address(text: str) -> PeerAddress:
    """Reads a full address such as /ip4/203.0.113.7/tcp/40123/p2p/12D3KooW...

    Any libp2p peer id is accepted, so that a run can meet in a DHT of other software. AddressError says what is wrong.
    """
    text = text.strip()
    parts = _parse(text)
    if parts[-1][0] != "p2p":
        raise AddressError(
            f"{text} does not say which peer it leads to",
            hint="copy the whole line that the peer printed, with /p2p/ and its id at the end",
        )
    return PeerAddress(_any_peer_id(parts[-1][1], text), text[: text.rindex("/p2p/")])


def parse_addresses(texts: Iterable[str], *, own_peer_id: bytes | None = None) -> dict[bytes, list[str]]:
    """Groups full addresses by peer: {peer id: routes}. Addresses of `own_peer_id` are left out.

    AddressError when one cannot be read, or when addresses were given and all of them lead to this peer itself.
    """
    peers: dict[bytes, list[str]] = {}
    given = False
    for text in texts:
        given = True
        address = parse_address(text)
        if address.peer_id != own_peer_id:
            routes = peers.setdefault(address.peer_id, [])
            if address.route not in routes:
                routes.append(address.route)
    if given and not peers:
        raise AddressError(
            "the address given is this peer's own", hint="give the address of another peer, or bootstrap a run"
        )
    return peers


def parse_announced(text: str, own_peer_id: bytes) -> str:
    """An address that others shall dial, as a multiaddr without peer id.

    Accepts a multiaddr, with or without this peer's own /p2p/ID, and HOST:PORT. AddressError otherwise.
    """
    text = text.strip()
    short = _HOST_AND_PORT.fullmatch(text)
    if short:
        text = _short_multiaddr(short)
    parts = _parse(text)
    if parts[-1][0] == "p2p":
        if _any_peer_id(parts[-1][1], text) != own_peer_id:
            raise AddressError(
                f"{text} names another peer than this one",
                hint=f"leave /p2p/... away, or write /p2p/{format_peer_id(own_peer_id)}",
            )
        text = text[: text.rindex("/p2p/")]
        parts = parts[:-1]
    if dict(parts).get("tcp") == "0" or dict(parts).get("udp") == "0":
        raise AddressError(f"{text} announces port 0, which nobody can dial", hint="give the port that others dial")
    return text


def listening_address(host: str, port: int) -> str:
    """The multiaddr to listen on: `host` an IPv4 or IPv6 address of this machine, 0.0.0.0 for all."""
    try:
        version = ipaddress.ip_address(host).version
    except ValueError:
        raise AddressError(
            f"{host!r} is not an IP address of this machine", hint="use --host 0.0.0.0 to listen everywhere"
        ) from None
    return f"/ip{version}/{host}/tcp/{port}"


def is_loopback_host(host: str) -> bool:
    """Whether listening on `host` can be reached from this machine only; False for what is not an IP address."""
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return False


def claim_port(host: str, port: int) -> int:
    """Returns `port` if it can be listened on, or a free one for 0; PortInUseError or AddressError otherwise.

    libp2p sets SO_REUSEPORT, so two daemons would share a port silently: this check, without it, is the only one.
    Between it and the daemon's own bind another process may still take the port.
    """
    listening_address(host, port)
    if not 0 <= port <= 65535:
        raise AddressError(f"{port} is not a port", hint="use a number from 1 to 65535, or 0 for a free one")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise PortInUseError(
                    f"port {port} is in use", hint="stop the program that has it, or choose another with --port"
                ) from error
            if error.errno == errno.EACCES:
                raise PortInUseError(
                    f"port {port} is reserved for the system", hint="choose one above 1023 with --port"
                ) from error
            raise AddressError(
                f"cannot listen on {host}: {error.strerror}", hint="use --host 0.0.0.0 to listen everywhere"
            ) from error
        return int(probe.getsockname()[1])


def order_for_dialling(routes: Sequence[str]) -> list[str]:
    """Routes, without duplicates, those that most others can use first: names and public addresses, local networks,
    relays, and loopback last. Addresses that nobody can dial (0.0.0.0) are left out."""
    ranked = [(rank, route) for route in dict.fromkeys(routes) if (rank := _reach(route)) is not None]
    return [route for _, route in sorted(ranked, key=lambda item: item[0])]


def _reach(route: str) -> int | None:
    if "/p2p-circuit" in route:
        return 3
    _, protocol, host, *_ = route.split("/")
    if protocol not in ("ip4", "ip6"):
        return 0
    address = ipaddress.ip_address(host)
    if address.is_unspecified or address.is_multicast:
        return None
    if address.is_loopback:
        return 4
    # A link-local IPv6 address lacks the zone that would make it usable elsewhere.
    if address.is_link_local:
        return 2
    return 0 if address.is_global else 1


def _parse(text: str) -> list[tuple[str, str]]:
    """[(protocol, value)] of a multiaddr that starts with a host and has a port."""
    if not text.startswith("/"):
        short = _HOST_AND_PORT.fullmatch(text)
        example = f"{_short_multiaddr(short)}/p2p/12D3KooW..." if short else EXAMPLE
        raise AddressError(f"{text!r} is not a peer's address", hint=f"an address looks like {example}")
    try:
        parts = [(protocol.name, value or "") for protocol, value in Multiaddr(text).items()]
    except (ValueError, KeyError) as error:
        reason = re.sub(r"^Invalid MultiAddr '.*?': | \(string: .*\)$", "", str(error))
        raise AddressError(f"{text} is no valid address: {reason}", hint=f"an address looks like {EXAMPLE}") from error
    if not parts or parts[0][0] not in _HOSTS or not {"tcp", "udp"} & {name for name, _ in parts} - {"dnsaddr"}:
        raise AddressError(f"{text} has no host and port", hint=f"an address looks like {EXAMPLE}")
    return parts


def _any_peer_id(value: str, text: str) -> bytes:
    try:
        peer_id = base58.b58decode(value)
    except ValueError:
        peer_id = b""
    # 0x12 0x20: a SHA-256 of an RSA key, what plain hivemind nodes have.
    if is_ed25519_peer_id(peer_id) or (len(peer_id) == 34 and peer_id.startswith(b"\x12\x20")):
        return peer_id
    raise AddressError(f"{text}: {value} is not a peer id", hint="copy the whole address again; ids are case-sensitive")


def _short_multiaddr(short: re.Match[str]) -> str:
    host = short["host"].strip("[]")
    try:
        protocol = f"ip{ipaddress.ip_address(host).version}"
    except ValueError:
        protocol = "dns"
    return f"/{protocol}/{host}/tcp/{short['port']}"
