"""Say who passes a seal on to whom in groups too large for all to hear all (docs/rounds.md, rule 6).

Up to `RELAY_ABOVE` members everyone follows everyone, and a sealer tells all. Beyond, a seal goes down a tree of
`FAN_OUT` branches whose root is its sealer: a seal names every part and every member, so that telling hundreds would
fill the sealer's line for seconds. Everybody computes the tree from the members alone; those who cannot be dialled are
its leaves. Who is missed all the same hears of the tip from a neighbour within a second and fetches the round.
Neighbours are members that can be dialled, at fixed distances in the order of ids: three for each power of four.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from p2ptrain.chain import Member

RELAY_ABOVE = 16
FAN_OUT = 8


def relayed(members: Collection[object]) -> bool:
    """Whether seals go down a tree in a group of these."""
    return len(members) > RELAY_ABOVE


def tree(members: Sequence[Member], sealer: bytes) -> list[bytes]:
    """Ids in the order of the sealer's tree, its own first; `branches` gives the positions below one."""
    dialable = sorted(m.peer_id for m in members if m.dialable and m.peer_id != sealer)
    others = sorted(m.peer_id for m in members if not m.dialable and m.peer_id != sealer)
    start = sum(peer < sealer for peer in dialable)
    return [sealer, *dialable[start:], *dialable[:start], *others]


def branches(position: int, count: int) -> range:
    """Positions right below one, in a tree of `count`."""
    first = FAN_OUT * position + 1
    return range(min(first, count), min(first + FAN_OUT, count))


def neighbours(members: Sequence[Member], me: bytes) -> frozenset[bytes]:
    """Whose news a peer follows: all in a small group; else those 1, 2, 3, 4, 8, 12, 16, 32, 48... places after it."""
    if not relayed(members):
        return frozenset(m.peer_id for m in members) - {me}
    order = sorted({m.peer_id for m in members if m.dialable} | {me})
    mine, found, step = order.index(me), set(), 1
    while step < len(order):
        found |= {order[(mine + times * step) % len(order)] for times in (1, 2, 3) if times * step < len(order)}
        step *= 4
    return frozenset(found) - {me}
