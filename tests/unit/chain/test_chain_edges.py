"""Corners of what a seal may say and of what follows from it."""

from __future__ import annotations

import hashlib

import msgspec
import pytest

from p2ptrain import chain
from p2ptrain.chain import ChainState, Join, Member, Row, Seal, SealError, SignedSeal
from p2ptrain.swarm.identity import new_identity, verify

RUN = hashlib.sha256(b"run").digest()
CHUNKS = 30
ADA, GRACE, LINUS, OUTSIDER = (new_identity() for _ in range(4))
ROW = Row(4, 1000, 1000)
PART = b"d" * 32


def state_of(*members: Member, following: tuple[Member, ...] | None = None, round: int = 7) -> ChainState:
    after = members if following is None else following
    return ChainState(
        RUN, round, hashlib.sha256(b"head").digest(), hashlib.sha256(b"parent").digest(), 9, members, after
    )


def member(peer_id: bytes, *, uplink: int = 1000, absent: int = 0, included: bool = True) -> Member:
    return Member(peer_id, Row(4, 1000, uplink), absent, included)


def trio(**first: int) -> ChainState:
    return state_of(member(ADA.peer_id, **first), member(GRACE.peer_id), member(LINUS.peer_id))


def seal_on(state: ChainState, *included: int, **changes: object) -> Seal:
    """A valid seal by the first member; `changes` make it another."""
    shape = chain.shape_of(state, CHUNKS)
    seal = Seal(
        version=chain.SEAL_VERSION,
        run_id=state.run_id,
        round=state.round + 1,
        parent=state.id,
        total=state.total + len(included),
        sealer=ADA.peer_id,
        solo=False,
        included=chain.bitmap(included, len(shape.members)),
        parts=tuple(PART if included else b"" for _ in shape.parts),
        rows=tuple(m.row for m in shape.members),
        joins=(),
        root=b"",
    )
    return msgspec.structs.replace(seal, **changes)


def extend(state: ChainState, seal: Seal) -> ChainState:
    return chain.extend(state, chain.seal_id(msgspec.msgpack.encode(seal)), seal, CHUNKS)


def test_one_seal_has_one_encoding() -> None:
    signed = chain.encode_seal(seal_on(trio(), 0, 1), ADA.sign)
    # The same array of fifteen, in the longer form that msgpack has for it.
    longer = b"\xdc\x00\x0f" + signed.body[1:]
    assert msgspec.msgpack.decode(longer) == msgspec.msgpack.decode(signed.body)
    with pytest.raises(SealError, match="canonical"):
        chain.open_seal(SignedSeal(longer, ADA.sign(chain.seal_id(longer))), verify)


def test_equal_remainders_go_to_the_first() -> None:
    assert chain.partition(5, [1, 1, 1]) == [(0, 2), (2, 4), (4, 5)]


def test_a_lone_peer_that_cannot_be_dialled_reduces_for_itself() -> None:
    assert len(chain.shape_of(state_of(member(ADA.peer_id, uplink=0)), CHUNKS).parts) == 1


def test_more_reducers_than_chunks_leave_some_without_a_part() -> None:
    parts = chain.shape_of(trio(), 2).parts
    assert len(parts) == 2 and all(part.end == part.start + 1 for part in parts)


def test_the_sealer_order_rotates_with_the_round_and_puts_the_included_first() -> None:
    members = [member(bytes([n]) * 38) for n in range(3)] + [
        member(bytes([9]) * 38, included=False),
        member(b"x" * 38, uplink=0),
        member(b"y" * 38, uplink=0),
    ]
    orders = [chain.shape_of(state_of(*members, round=number), CHUNKS).sealer_order for number in range(6)]
    assert all(set(order[:3]) == {0, 1, 2} and set(order[3:5]) == {4, 5} for order in orders)
    assert [order[0] for order in orders] == [1, 2, 0, 1, 2, 0]
    assert [order[3] for order in orders] == [5, 4, 5, 4, 5, 4]
    assert [order[5] for order in orders] == [3] * 6, "nobody waits for a member that was silent"


def test_the_coming_shape_is_the_shape_once_the_next_seal_is_there() -> None:
    newcomer = member(OUTSIDER.peer_id, included=False)
    state = state_of(*trio().now, following=(*trio().now, newcomer))
    coming = chain.coming_shape(state, CHUNKS)
    assert chain.shape_of(extend(state, seal_on(state, 0, 1, 2)), CHUNKS) == coming


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"version": 2}, "another run or version"),
        ({"run_id": bytes(32)}, "another run or version"),
        ({"round": 9}, "does not follow"),
        ({"parent": bytes(32)}, "does not follow"),
        ({"parts": (PART,)}, "wrong parts"),
        ({"parts": (PART, b"short", PART)}, "wrong parts"),
        ({"rows": (ROW,)}, "wrong members"),
        ({"root": b"short"}, "wrong members"),
        ({"included": b""}, "bitmap"),
        ({"included": b"\x0b"}, "not there"),
        ({"total": 12}, "total"),
        ({"total": 10}, "total"),
        ({"solo": True}, "alone"),
        ({"sealer": OUTSIDER.peer_id}, "stranger"),
        ({"included": b"\x01", "total": 10}, "must be a solo seal"),
        ({"included": b"\x00", "total": 9}, "includes nobody has replies"),
        ({"joins": (Join(GRACE.peer_id, ROW),)}, "already"),
        ({"joins": (Join(OUTSIDER.peer_id, ROW), Join(OUTSIDER.peer_id, ROW))}, "already"),
    ],
)
def test_what_breaks_a_rule_does_not_extend_the_chain(changes: dict[str, object], why: str) -> None:
    state = trio()
    extend(state, seal_on(state, 0, 1))
    with pytest.raises(SealError, match=why):
        extend(state, seal_on(state, 0, 1, **changes))


def test_a_group_cannot_outgrow_a_seal() -> None:
    crowd = tuple(member(n.to_bytes(38)) for n in range(chain.MEMBERS_MAX))
    state = state_of(member(ADA.peer_id), following=crowd)
    extend(state, seal_on(state, 0))
    with pytest.raises(SealError, match="more newcomers"):
        extend(state, seal_on(state, 0, joins=(Join(OUTSIDER.peer_id, ROW),)))


@pytest.mark.parametrize(("count", "room"), [(1, 1), (4, 1), (7, 1), (8, 2), (40, 10), (400, chain.JOINS_MAX)])
def test_a_seal_admits_no_more_than_a_quarter_newcomers(count: int, room: int) -> None:
    members = (member(ADA.peer_id), *(member(n.to_bytes(38)) for n in range(1, count)))
    state = state_of(*members)
    joins = tuple(Join((1000 + n).to_bytes(38), ROW) for n in range(room + 1))
    after = extend(state, seal_on(state, *range(count), joins=joins[:room]))
    assert sum(m.is_newcomer for m in after.following) == room
    if room < chain.JOINS_MAX:
        with pytest.raises(SealError, match="more newcomers"):
            extend(state, seal_on(state, *range(count), joins=joins))
        assert chain.room_for_newcomers(after.following) == 0, "until a seal has included one of them, or it is out"


def test_a_newcomer_that_never_answers_is_out_after_two_rounds() -> None:
    state = trio()
    state = extend(state, seal_on(state, 0, 1, 2, joins=(Join(OUTSIDER.peer_id, ROW),)))
    rounds = 0
    while any(m.peer_id == OUTSIDER.peer_id for m in state.following):
        state = extend(state, seal_on(state, 0, 1, 2))
        rounds += any(m.peer_id == OUTSIDER.peer_id for m in state.now)
    assert 0 < rounds <= chain.NEWCOMER_ABSENCES_ALLOWED + 1


def test_a_lone_member_goes_on_beside_newcomers_that_are_silent() -> None:
    newcomer = Member(OUTSIDER.peer_id, ROW, -2, False)
    state = state_of(member(ADA.peer_id), newcomer)
    after = extend(state, seal_on(state, 0))
    assert after.total == state.total + 1
    proven = state_of(member(ADA.peer_id), member(GRACE.peer_id))
    with pytest.raises(SealError, match="solo"):
        extend(proven, seal_on(proven, 0))


def test_a_member_that_owes_replies_again_and_again_gets_parts_ever_more_rarely() -> None:
    """One of three never reduces; the gaps between its turns double until they are as long as they get."""
    state, gaps, gap = trio(), [], 0
    for _ in range(300):
        shape = chain.shape_of(state, CHUNKS)
        silent = shape.index(LINUS.peer_id)
        owing = [n for n, part in enumerate(shape.parts) if part.reducer == silent]
        replies = tuple(b"" if n in owing else bytes(32) for n in range(len(shape.parts)))
        first = next(i for i in shape.sealer_order if i != silent)
        state = extend(state, seal_on(state, 0, 1, 2, parts=replies, sealer=shape.members[first].peer_id))
        gap = 0 if owing else gap + 1
        gaps.append(gap)
    assert max(gaps) == 2**6 - 1
    assert sum(gap == 0 for gap in gaps) < 15


def test_a_seal_that_skips_most_of_the_parts_strikes_nobody() -> None:
    state = trio()
    shape = chain.shape_of(state, CHUNKS)
    replies = tuple(bytes(32) if part.reducer == 0 else b"" for part in shape.parts)
    after = extend(state, seal_on(state, 0, 1, 2, parts=replies))
    assert sum(m.strikes for m in after.following if m.peer_id != GRACE.peer_id) <= 2


def test_a_row_that_a_seal_tells_is_the_members_from_then_on() -> None:
    state, row = trio(), Row(9, 77, 5)
    after = extend(state, seal_on(state, 0, 1, rows=(ROW, row, ROW)))
    assert after.following[1].row == row


def test_reducers_that_keep_owing_a_reply_are_absent_and_nobody_else_is() -> None:
    state = state_of(member(ADA.peer_id, uplink=0), member(GRACE.peer_id, uplink=0), member(LINUS.peer_id))
    # The first two rounds were shaped while its last work was in a seal.
    for absences in (0, 0, 1, 2, None):
        state = extend(state, seal_on(state))
        assert state.total == 9
        assert [m.absent for m in state.following[:2]] == [0, 0]
        assert {m.absent for m in state.following if m.peer_id == LINUS.peer_id} == ({absences} - {None})


def test_a_chain_never_loses_its_last_member() -> None:
    gone = member(GRACE.peer_id, absent=2)
    state = state_of(member(ADA.peer_id), member(GRACE.peer_id, absent=2, included=False), following=(gone,))
    after = extend(state, seal_on(state))
    assert after.following


def test_the_first_seal_is_a_solo_seal_by_whoever_bootstraps() -> None:
    start = chain.genesis(RUN)
    assert start.id == RUN and chain.shape_of(start, CHUNKS).members == ()
    first = extend(start, seal_on(start, solo=True))
    assert [m.peer_id for m in first.now] == [ADA.peer_id]
    with pytest.raises(SealError, match="stranger"):
        extend(start, seal_on(start))


def test_nobody_but_the_founder_makes_the_first_seal() -> None:
    start = chain.genesis(RUN, ADA.peer_id)
    first = seal_on(start, solo=True)
    assert [m.peer_id for m in extend(start, first).now] == [ADA.peer_id]
    with pytest.raises(SealError, match="founder"):
        extend(start, msgspec.structs.replace(first, sealer=GRACE.peer_id))
    # A run whose manifest names nobody is begun by whoever comes first.
    extend(chain.genesis(RUN), msgspec.structs.replace(first, sealer=GRACE.peer_id))
