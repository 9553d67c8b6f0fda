"""Claims: a tree reaches everyone once, whatever the group, and following some keeps everyone within a few hops."""

from __future__ import annotations

import hashlib
from collections import Counter

import pytest

from p2ptrain.chain import Member, Row, relay


def group(count: int) -> list[Member]:
    """Every fifth cannot be dialled."""
    peers = [b"\0$" + hashlib.sha256(bytes([n % 256, n // 256])).digest() for n in range(count)]
    return [Member(peer, Row(1, 1, 1000 * (n % 5 != 4)), 0, True) for n, peer in enumerate(peers)]


@pytest.mark.parametrize("count", [1, 2, 16, 17, 18, 64, 256, 1024])
def test_the_tree_reaches_every_member_once_from_who_can_be_dialled(count: int) -> None:
    members = group(count)
    dialable = {m.peer_id for m in members if m.dialable}
    for sealer in {members[0].peer_id, members[count // 2].peer_id, members[-1].peer_id}:
        order = relay.tree(members, sealer)
        depth = {sealer: 0}
        for position, peer in enumerate(order):
            below = relay.branches(position, count)
            assert len(below) <= relay.FAN_OUT
            assert not below or peer in dialable | {sealer}
            for branch in below:
                assert order[branch] not in depth
                depth[order[branch]] = depth[peer] + 1
        assert depth.keys() == {m.peer_id for m in members}
        assert relay.FAN_OUT ** (max(depth.values()) - 1) < count


def test_the_tree_is_the_same_for_all_in_whatever_order_they_know_the_members() -> None:
    members = group(40)
    assert relay.tree(members, members[7].peer_id) == relay.tree(members[::-1], members[7].peer_id)


def test_a_sealer_that_is_no_member_any_more_is_the_root_all_the_same() -> None:
    members, stranger = group(20), bytes(34)
    order = relay.tree(members, stranger)
    assert order[0] == stranger
    assert set(order[1:]) == {m.peer_id for m in members}


@pytest.mark.parametrize("count", [2, 16, 17, 64, 256, 1024])
def test_neighbours_are_few_and_news_reaches_all_in_few_hops(count: int) -> None:
    members = group(count)
    follows = {m.peer_id: relay.neighbours(members, m.peer_id) for m in members}
    if relay.relayed(members):
        assert max(map(len, follows.values())) <= 15
        assert max(Counter(peer for near in follows.values() for peer in near).values()) <= 40
    else:
        assert all(near == set(follows) - {peer} for peer, near in follows.items())
    source = members[0].peer_id
    knows, hops = {source}, 0
    while len(knows) < count:
        hears = {peer for peer, near in follows.items() if near & knows} | knows
        assert hears != knows
        knows, hops = hears, hops + 1
    assert hops <= 6


def test_a_learner_follows_some_of_a_large_group() -> None:
    members = group(64)
    found = relay.neighbours(members, bytes(34))
    assert found < {m.peer_id for m in members}
    assert 6 <= len(found) <= 12
