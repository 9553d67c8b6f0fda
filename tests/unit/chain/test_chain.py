"""Claims about seals, and about what follows from a chain of them."""

from __future__ import annotations

import hashlib
import itertools
from collections import defaultdict
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2ptrain import chain
from p2ptrain.chain import ChainState, Join, Member, Row, Seal, SealError, SignedSeal
from p2ptrain.chain.admission import Access
from p2ptrain.swarm.identity import Identity, new_identity, verify

RUN_ID = bytes(range(32))
CHUNKS = 30
PEERS = [new_identity() for _ in range(4)]


def member(identity: Identity, *, uplink: int = 100, absent: int = 0, included: bool = True) -> Member:
    return Member(identity.peer_id, Row(4, 1000, uplink), absent, included)


def state(*members: Member, round: int = 10, **changes: Any) -> ChainState:
    fields = {"id": b"h" * 32, "parent": b"p" * 32, "total": 40, "now": members, "following": members}
    return ChainState(run_id=RUN_ID, round=round, **(fields | changes))


def seal_on(before: ChainState, by: Identity, members: set[int], **changes: Any) -> tuple[bytes, Seal]:
    shape = chain.shape_of(before, CHUNKS)
    seal = Seal(
        version=chain.SEAL_VERSION,
        run_id=RUN_ID,
        round=before.round + 1,
        parent=before.id,
        total=before.total + len(members),
        sealer=by.peer_id,
        solo=False,
        included=chain.bitmap(members, len(shape.members)),
        parts=tuple(hashlib.sha256(bytes([n])).digest() for n in range(len(shape.parts))),
        rows=tuple(m.row for m in shape.members),
        joins=(),
        root=b"",
    )
    seal = msgspec.structs.replace(seal, **changes)
    return chain.seal_id(msgspec.msgpack.encode(seal)), seal


def test_a_seal_survives_the_wire_and_names_its_content() -> None:
    before = state(*map(member, PEERS))
    identifier, seal = seal_on(before, PEERS[0], {0, 1, 2, 3})
    signed = chain.encode_seal(seal, PEERS[0].sign)
    travelled = chain.decode_signed_seal(msgspec.msgpack.encode(signed))
    assert chain.open_seal(travelled, verify) == (identifier, seal)


@given(st.integers(0, 10_000), st.integers(0, 7))
def test_a_seal_with_any_bit_changed_is_refused(position: int, bit: int) -> None:
    _, seal = seal_on(state(*map(member, PEERS)), PEERS[0], {0, 1})
    signed = chain.encode_seal(seal, PEERS[0].sign)
    body = bytearray(signed.body)
    body[position % len(body)] ^= 1 << bit
    with pytest.raises(SealError):
        chain.open_seal(SignedSeal(bytes(body), signed.signature), verify)


def test_a_seal_signed_by_another_than_it_names_is_refused() -> None:
    _, seal = seal_on(state(*map(member, PEERS)), PEERS[0], {0, 1})
    with pytest.raises(SealError, match="not signed"):
        chain.open_seal(chain.encode_seal(seal, PEERS[1].sign), verify)


def test_a_seal_that_brings_in_a_peer_off_the_list_is_refused() -> None:
    newcomer, row = new_identity(), Row(0, 0, 1)
    listed = tuple(peer.peer_id for peer in PEERS)
    for peers, comes in ((listed, False), ((*listed, newcomer.peer_id), True)):
        before = state(*map(member, PEERS), access=Access("list", listed=peers))
        for seal in (
            seal_on(before, PEERS[0], {0, 1}, joins=(Join(newcomer.peer_id, row),)),
            seal_on(before, newcomer, set(), solo=True, parts=(b"",) * 4),
        ):
            if comes:
                chain.extend(before, *seal, CHUNKS)
            else:
                with pytest.raises(SealError, match="not for"):
                    chain.extend(before, *seal, CHUNKS)


@given(st.binary(max_size=200))
def test_noise_is_no_seal(data: bytes) -> None:
    with pytest.raises(SealError):
        chain.open_seal(SignedSeal(data, bytes(64)), verify)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"version": 2}, "version"),
        ({"run_id": bytes(32)}, "another run"),
        ({"round": 12}, "does not follow"),
        ({"parent": bytes(32)}, "does not follow"),
        ({"total": 41}, "total"),
        ({"parts": ()}, "parts"),
        ({"parts": (b"short",) * 4}, "parts"),
        ({"rows": ()}, "members"),
        ({"root": b"short"}, "members"),
        ({"included": b"\xff"}, "not there"),
        ({"included": b"\x0f\x00"}, "bitmap"),
        ({"sealer": new_identity().peer_id}, "stranger"),
        ({"solo": True}, "alone"),
        ({"included": b"\x01", "total": 41}, "solo seal"),
        ({"included": b"\x00", "total": 40}, "nobody"),
        ({"joins": (Join(PEERS[1].peer_id, Row(0, 0, 1)),)}, "member already"),
        ({"joins": (Join(b"n" * 38, Row(0, 0, 1)),) * 2}, "member already"),
    ],
)
def test_a_seal_that_breaks_a_rule_is_refused(changes: dict[str, Any], why: str) -> None:
    before = state(*map(member, PEERS))
    identifier, seal = seal_on(before, PEERS[0], {0, 1, 2, 3}, **changes)
    with pytest.raises(SealError, match=why):
        chain.extend(before, identifier, seal, CHUNKS)


def test_a_seal_of_skips_alone_is_valid_and_counts_nobody_as_absent() -> None:
    before = state(*(member(peer, absent=2) for peer in PEERS))
    identifier, seal = seal_on(before, PEERS[1], set(), parts=(b"",) * 4)
    after = chain.extend(before, identifier, seal, CHUNKS)
    assert after.total == before.total
    assert [m.absent for m in after.following] == [2, 2, 2, 2]
    assert len(chain.shape_of(after, CHUNKS).parts) == 4


def test_the_third_absence_in_a_row_ends_a_membership_and_one_presence_starts_the_count_anew() -> None:
    before = state(*map(member, PEERS))
    for included in ({0, 1}, {0, 1, 2}, {0, 1}):
        identifier, seal = seal_on(before, PEERS[0], included)
        before = chain.extend(before, identifier, seal, CHUNKS)
    assert [m.peer_id for m in before.following] == [peer.peer_id for peer in PEERS[:3]]
    # A seal shapes the round after the next: the one dropped is a member for one round more.
    assert len(before.now) == 4


def test_who_is_admitted_is_a_member_two_rounds_later_with_its_row() -> None:
    before = state(*map(member, PEERS[:2]))
    join = Join(PEERS[2].peer_id, Row(0, 0, 77))
    identifier, seal = seal_on(before, PEERS[0], {0, 1}, joins=(join,))
    after = chain.extend(before, identifier, seal, CHUNKS)
    assert PEERS[2].peer_id not in {m.peer_id for m in after.now}
    identifier, seal = seal_on(after, PEERS[0], {0, 1})
    later = chain.extend(after, identifier, seal, CHUNKS)
    assert later.now[2] == Member(PEERS[2].peer_id, Row(0, 0, 77), -chain.NEWCOMER_ABSENCES_ALLOWED, False)


def test_after_a_solo_seal_its_sealer_is_the_only_member_at_once() -> None:
    before = state(*map(member, PEERS))
    stranger = new_identity()
    for sealer, included in ((PEERS[2], {2}), (stranger, set())):
        identifier, seal = seal_on(before, sealer, included, solo=True, parts=(b"",) * 4)
        after = chain.extend(before, identifier, seal, CHUNKS)
        assert [m.peer_id for m in after.now] == [m.peer_id for m in after.following] == [sealer.peer_id]


@given(st.integers(1, 5000), st.lists(st.integers(0, 10**7), min_size=1, max_size=40))
def test_a_partition_covers_every_chunk_once_in_proportion_to_the_uplinks(chunks: int, uplinks: list[int]) -> None:
    ranges = chain.partition(chunks, uplinks)
    assert ranges[0][0] == 0 and ranges[-1][1] == chunks
    assert all(one[1] == other[0] for one, other in itertools.pairwise(ranges))
    shares = [max(uplink, 1) for uplink in uplinks]
    for (start, end), share in zip(ranges, shares, strict=True):
        assert abs((end - start) - chunks * share / sum(shares)) < 1


def test_those_who_reduce_are_dialable_and_were_included_and_the_sealers_rotate() -> None:
    members = (
        member(PEERS[0]),
        member(PEERS[1], uplink=0),
        member(PEERS[2], included=False),
        member(PEERS[3], uplink=300),
    )
    shape = chain.shape_of(state(*members, round=10), CHUNKS)
    assert [(part.reducer, part.end - part.start) for part in shape.parts] == [(0, 15), (3, 15)]
    served = (*members[:3], msgspec.structs.replace(members[3], served=8))
    parts = chain.shape_of(state(*served, round=10), CHUNKS).parts
    assert [(part.reducer, part.end - part.start) for part in parts] == [(0, 10), (3, 20)]
    assert shape.sealer_order == (3, 0, 1, 2)  # rotated by round 11: [0, 3] by 1; then 1, then 2, which is silent
    assert chain.shape_of(state(*members, round=11), CHUNKS).sealer_order == (0, 3, 1, 2)


def test_when_nobody_was_included_all_that_are_dialable_reduce() -> None:
    members = [member(peer, included=False, uplink=uplink) for peer, uplink in zip(PEERS, (1, 0, 1, 1), strict=True)]
    assert [part.reducer for part in chain.shape_of(state(*members), CHUNKS).parts] == [0, 2, 3]


@given(st.sets(st.integers(0, 99)), st.integers(100, 130))
def test_a_bitmap_is_what_went_into_it(members: set[int], size: int) -> None:
    assert chain.bits(chain.bitmap(members, size), size) == members


@given(*[st.tuples(st.integers(0, 3), st.binary(min_size=1, max_size=1))] * 3)
def test_fork_choice_is_a_total_order(a: tuple[int, bytes], b: tuple[int, bytes], c: tuple[int, bytes]) -> None:
    assert [chain.better(*a, *b), chain.better(*b, *a), a == b].count(True) == 1
    if chain.better(*a, *b) and chain.better(*b, *c):
        assert chain.better(*a, *c)


def test_a_round_lasts_as_long_as_the_target_batch_takes_within_bounds() -> None:
    shape = chain.shape_of(state(*map(member, PEERS)), CHUNKS)  # four times one sequence a second
    assert chain.length_seconds(shape, 12, 0.5, 60, 4.0) == 3
    assert chain.length_seconds(shape, 1, 0.5, 60, 4.0) == 0.5
    assert chain.length_seconds(shape, 1000, 0.5, 60, 4.0) == 60


@given(st.integers(1, 300_000), st.sampled_from([1, 2, 7, 40, 300]))
def test_a_range_is_cut_into_few_parts_of_nearly_equal_size(chunks: int, reducers: int) -> None:
    members = tuple(chain.Member(bytes([n % 256, n // 256]) * 19, Row(4, 1000, 1000), 0, True) for n in range(reducers))
    state = msgspec.structs.replace(chain.genesis(RUN_ID), now=members, round=5)
    parts = chain.shape_of(state, chunks).parts
    assert [part.start for part in parts[1:]] == [part.end for part in parts[:-1]], "no gaps"
    assert (parts[0].start, parts[-1].end) == (0, chunks)
    assert len(parts) <= max(chain.PARTS_MAX, reducers)
    sizes = defaultdict[int, list[int]](list)
    for part in parts:
        sizes[part.reducer].append(part.end - part.start)
    for pieces in sizes.values():
        assert len(pieces) <= chain.PARTS_PER_REDUCER_MAX
        assert max(pieces) - min(pieces) <= 1
        assert len(pieces) == 1 or min(pieces) >= chain.PART_CHUNKS_MIN
