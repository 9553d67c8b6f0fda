"""What a peer concludes from those who tried to dial it, what it tells its owner, and how it reads a relay's answer."""

from __future__ import annotations

import pytest

from p2ptrain.calls.messages import TOO_MANY_CALLS, Dialled
from p2ptrain.peer.reachability import advice, conclude, where_it_works
from p2ptrain.swarm.circuits import _circuit_bytes, _status

PORT = 4001
LOCAL = "192.168.1.5"
OUTSIDE = "8.8.8.8"


def said(address: str, failure: str = "", port: int = PORT) -> list[tuple[int, Dialled]]:
    return [(port, Dialled(address, failure))]


def test_most_of_those_who_tried_decide_and_half_is_not_enough() -> None:
    assert conclude([]).dialable is None
    assert conclude([said(LOCAL), said(LOCAL), said(LOCAL, "refused")]).dialable is True
    assert conclude([said(LOCAL), said(LOCAL, "refused")]).dialable is False
    no_word = [said("", "this peer is seen through a relay"), said(LOCAL, TOO_MANY_CALLS)]
    assert conclude(no_word).dialable is None
    assert conclude([*no_word, said(LOCAL)]).dialable is True


def test_those_outside_decide_alone_and_public_addresses_come_first() -> None:
    closed = conclude([said(LOCAL), said(LOCAL), said(OUTSIDE, "no answer")])
    assert closed.dialable is False and closed.seen_at == OUTSIDE and closed.why == "no answer"
    assert closed.routes == (f"/ip4/{LOCAL}/tcp/{PORT}",)
    opened = conclude([said(LOCAL), said(OUTSIDE)])
    assert opened.routes == (f"/ip4/{OUTSIDE}/tcp/{PORT}", f"/ip4/{LOCAL}/tcp/{PORT}")


def test_one_port_that_lets_others_in_is_enough() -> None:
    tried = conclude([[*said(OUTSIDE, "refused", 50_000), *said(OUTSIDE)]])
    assert tried.dialable is True and tried.routes == (f"/ip4/{OUTSIDE}/tcp/{PORT}",)


def test_the_owner_hears_what_to_forward_and_to_where() -> None:
    visible = [f"/ip4/127.0.0.1/tcp/{PORT}/p2p/a", f"/ip4/{LOCAL}/tcp/{PORT}/p2p/a"]
    text = advice(conclude([said(OUTSIDE, "no answer")]), PORT, visible)
    assert f"forward TCP port {PORT} in the router to {LOCAL}, port {PORT}" in text
    text = advice(conclude([said(LOCAL, "no answer")]), PORT, visible)
    assert "firewall" in text and "forward" not in text


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("/ip4/127.0.0.1/tcp/1/p2p/a", "this machine only"),
        (f"/ip4/{LOCAL}/tcp/1/p2p/a", "this network only"),
        (f"/ip4/{OUTSIDE}/tcp/1/p2p/a", ""),
        ("/dns/example.org/tcp/1/p2p/a", ""),
        (f"/ip4/{OUTSIDE}/tcp/1/p2p/b/p2p-circuit/p2p/a", ""),
    ],
)
def test_an_address_says_where_it_works(address: str, words: str) -> None:
    found = where_it_works(address)
    assert words in found and bool(words) == bool(found)


def test_a_relays_answer_is_read_or_refused() -> None:
    # As p2pd sent it: type 2 (status), a reservation of bytes, status 100.
    assert _status(bytes.fromhex("08021a0308c78c2864")) == 100
    assert _status(bytes.fromhex("080228c801")) == 200
    assert _status(b"") == 0
    # A limit of 1,800 s and 2**30 bytes, between bytes and a status.
    limited = bytes.fromhex("08021a0308c78c220908880e10808080800428c801")
    assert _circuit_bytes(limited) == 1 << 30 and _status(limited) == 200
    assert _circuit_bytes(bytes.fromhex("08021a0308c78c2864")) == 0
    for bad in ("08", "28", "1a0308", "0d00000000", "28ffffffffffffffffffffff01"):
        with pytest.raises(ValueError):
            _status(bytes.fromhex(bad))
