"""What a person types as an address is understood, or refused with the reason."""

from __future__ import annotations

import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2ptrain.errors import AddressError, PortInUseError
from p2ptrain.simulation.toy import identity_of
from p2ptrain.swarm.addresses import (
    claim_port,
    is_loopback_host,
    listening_address,
    order_for_dialling,
    parse_address,
    parse_addresses,
    parse_announced,
)
from p2ptrain.swarm.identity import format_peer_id

# The same in each process that collects these tests.
PEER = identity_of("ada", 0).peer_id
ID = format_peer_id(PEER)
OTHER_ID = format_peer_id(identity_of("bob", 0).peer_id)
RSA_ID = "QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N"


@pytest.mark.parametrize(
    "route",
    [
        "/ip4/203.0.113.7/tcp/40123",
        "/ip6/2001:db8::1/tcp/40123",
        "/dns4/peer.example.org/tcp/1",
        "/ip4/203.0.113.7/udp/40123/quic-v1",
        f"/ip4/203.0.113.7/tcp/1/p2p/{OTHER_ID}/p2p-circuit",
    ],
)
def test_a_full_address_gives_peer_and_route(route: str) -> None:
    address = parse_address(f"  {route}/p2p/{ID}\n")
    assert (address.peer_id, address.route, str(address)) == (PEER, route, f"{route}/p2p/{ID}")


def test_a_peer_of_other_software_may_be_met() -> None:
    assert len(parse_address(f"/ip4/203.0.113.7/tcp/1/p2p/{RSA_ID}").peer_id) == 34


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "not a peer's address"),
        ("203.0.113.7:40123", "not a peer's address"),
        ("http://example.org", "not a peer's address"),
        ("/", "no valid address|no host"),
        ("/ip4/203.0.113.7/tcp/40123", "which peer"),
        (f"/ip4/203.0.113.999/tcp/1/p2p/{ID}", "203.0.113.999"),
        (f"/ip4/203.0.113.7/tcp/99999/p2p/{ID}", "65536"),
        (f"/ip4/203.0.113.7/p2p/{ID}", "no host and port"),
        (f"/p2p/{ID}", "no host and port"),
        ("/ip4/203.0.113.7/tcp/1/p2p/12D3KooWnope", "p2p|peer id"),
        (f"/ip4/203.0.113.7/tcp/1/p2p/{ID[:-1]}", "p2p|peer id"),
        (f"/nonsense/203.0.113.7/tcp/1/p2p/{ID}", "nonsense"),
    ],
)
def test_a_wrong_address_is_refused_with_the_reason_and_a_hint(text: str, reason: str) -> None:
    with pytest.raises(AddressError, match=reason) as caught:
        parse_address(text)
    assert caught.value.hint


def test_the_hint_completes_a_host_and_port() -> None:
    with pytest.raises(AddressError) as caught:
        parse_address("peer.example.org:40123")
    assert "/dns/peer.example.org/tcp/40123/p2p/" in caught.value.hint


@given(st.text(max_size=40) | st.text("/ip46tcpd2ns0123456789.:", max_size=60))
def test_any_text_is_read_or_refused(text: str) -> None:
    with pytest.raises(AddressError):
        parse_address(text)


def test_addresses_are_grouped_by_peer_and_ones_own_left_out() -> None:
    texts = [f"/ip4/203.0.113.{host}/tcp/1/p2p/{name}" for host, name in ((1, ID), (2, OTHER_ID), (3, ID), (1, ID))]
    assert parse_addresses(texts)[PEER] == ["/ip4/203.0.113.1/tcp/1", "/ip4/203.0.113.3/tcp/1"]
    assert PEER not in parse_addresses(texts, own_peer_id=PEER)
    assert parse_addresses([], own_peer_id=PEER) == {}
    with pytest.raises(AddressError, match="own"):
        parse_addresses(texts[:1], own_peer_id=PEER)


@pytest.mark.parametrize(
    ("text", "route"),
    [
        ("203.0.113.7:40123", "/ip4/203.0.113.7/tcp/40123"),
        ("[2001:db8::1]:40123", "/ip6/2001:db8::1/tcp/40123"),
        ("peer.example.org:40123", "/dns/peer.example.org/tcp/40123"),
        ("/ip4/203.0.113.7/tcp/40123", "/ip4/203.0.113.7/tcp/40123"),
        (f"/ip4/203.0.113.7/tcp/40123/p2p/{ID}", "/ip4/203.0.113.7/tcp/40123"),
    ],
)
def test_an_announced_address_may_be_short(text: str, route: str) -> None:
    assert parse_announced(text, PEER) == route


@pytest.mark.parametrize("text", ["/ip4/203.0.113.7/tcp/0", f"/ip4/203.0.113.7/tcp/1/p2p/{OTHER_ID}", "host", ":1"])
def test_an_announced_address_must_lead_here(text: str) -> None:
    with pytest.raises(AddressError):
        parse_announced(text, PEER)


def test_addresses_that_work_for_most_come_first() -> None:
    routes = [
        "/ip4/127.0.0.1/tcp/1",
        f"/ip4/203.0.113.7/tcp/1/p2p/{OTHER_ID}/p2p-circuit",
        "/ip6/fe80::1/tcp/1",
        "/ip4/192.168.1.5/tcp/1",
        "/ip4/0.0.0.0/tcp/1",
        "/ip4/8.8.8.8/tcp/1",
        "/ip4/192.168.1.5/tcp/1",
        "/dns/peer.example.org/tcp/1",
    ]
    assert order_for_dialling(routes) == [routes[5], routes[7], routes[3], routes[2], routes[1], routes[0]]
    assert order_for_dialling(["/ip4/127.0.0.1/tcp/1"]) == ["/ip4/127.0.0.1/tcp/1"]


def test_a_taken_port_is_refused_and_a_free_one_found() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(PortInUseError, match=str(port)):
            claim_port("127.0.0.1", port)
        assert claim_port("127.0.0.1", 0) not in (0, port)
    assert claim_port("127.0.0.1", port) == port


def test_a_taken_port_is_refused_also_when_it_is_shared() -> None:
    with socket.create_server(("127.0.0.1", 0), reuse_port=True) as server, pytest.raises(PortInUseError):
        claim_port("127.0.0.1", server.getsockname()[1])


@pytest.mark.parametrize(("host", "port"), [("nowhere", 0), ("203.0.113.7", 0), ("127.0.0.1", 70000)])
def test_a_host_that_is_not_here_is_refused(host: str, port: int) -> None:
    with pytest.raises(AddressError):
        claim_port(host, port)


def test_hosts_to_listen_on() -> None:
    assert listening_address("0.0.0.0", 1) == "/ip4/0.0.0.0/tcp/1"
    assert listening_address("::1", 1) == "/ip6/::1/tcp/1"
    assert [is_loopback_host(host) for host in ("127.0.0.1", "::1", "0.0.0.0", "name")] == [True, True, False, False]
