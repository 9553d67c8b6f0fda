"""What members claim of themselves counts within bounds, and what counts follows from the chain alone."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from fractions import Fraction

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2ptrain import chain
from p2ptrain.chain import SEQUENCES_PER_KILOSECOND_MAX, SERVED_MAX, UPLINK_MAX_KBIT, ChainState, Member, Row, Seal

RUN = bytes(32)
CHUNKS = 10_000
RATIO = 4.0
"""The manifest's `weight_cap_ratio` where it says nothing else."""
DSL_KBIT, SERVER_KBIT = 1_000, 100_000


def peer_id(number: int) -> bytes:
    return b"peer" + number.to_bytes(34)


def member(
    number: int,
    *,
    uplink: int = DSL_KBIT,
    throughput: int = 1000,
    served: int = 0,
    absent: int = 0,
    strikes: int = 0,
    standing: int = 1,
) -> Member:
    row = Row(4, throughput, uplink)
    return Member(peer_id(number), row, absent, absent >= 0, strikes=strikes, served=served, standing=standing)


def state_of(*members: Member, round: int = 7) -> ChainState:
    return ChainState(RUN, round, bytes(32), bytes(32), 9, members, members)


def chunks_of(state: ChainState) -> dict[bytes, int]:
    """Peer id -> chunks that it reduces in the round after `state`."""
    shape = chain.shape_of(state, CHUNKS)
    counts = dict.fromkeys((m.peer_id for m in shape.members), 0)
    for part in shape.parts:
        counts[shape.members[part.reducer].peer_id] += part.end - part.start
    return counts


def seal_on(
    state: ChainState, *, without: tuple[int, ...] = (), sealer: int | None = None, standing_in: tuple[int, ...] = ()
) -> ChainState:
    """The state after a seal that includes everybody and has all replies, but those of the members `without`.

    Args:
        sealer: member number; else the first in turn that owes nothing.
        standing_in: members whose message has weight 0.
    """
    shape = chain.shape_of(state, CHUNKS)
    owing = {shape.index(peer_id(number)) for number in without}
    place = next(i for i in shape.sealer_order if i not in owing) if sealer is None else shape.index(peer_id(sealer))
    assert place is not None
    everybody = range(len(shape.members))
    seal = Seal(
        version=chain.SEAL_VERSION,
        run_id=RUN,
        round=state.round + 1,
        parent=state.id,
        total=state.total + len(shape.members),
        sealer=shape.members[place].peer_id,
        solo=False,
        included=chain.bitmap(everybody, len(shape.members)),
        parts=tuple(b"" if part.reducer in owing else hashlib.sha256(b"reply").digest() for part in shape.parts),
        rows=tuple(
            msgspec.structs.replace(m.row, weight=0 if number in standing_in else 4)
            for number, m in enumerate(shape.members)
        ),
        joins=(),
        root=b"",
    )
    return chain.extend(state, chain.seal_id(msgspec.msgpack.encode(seal)), seal, CHUNKS)


def served_by(state: ChainState, number: int) -> int:
    return next(m.served for m in state.following if m.peer_id == peer_id(number))


reducers = st.lists(
    st.tuples(st.integers(1, UPLINK_MAX_KBIT), st.integers(0, SERVED_MAX)), min_size=1, max_size=12
).map(lambda pairs: [member(n, uplink=uplink, served=served) for n, (uplink, served) in enumerate(pairs)])


def reference_limit(middle: int, served: int) -> Fraction:
    """2 to the power of served / 8 times the middle uplink, linear between whole powers."""
    whole, rest = divmod(served, 8)
    return middle * Fraction(2) ** whole * (1 + Fraction(rest, 8))


# ---- parts ----------------------------------------------------------------------------------------------------------


@given(reducers)
def test_no_uplink_counts_for_more_than_its_owner_has_served_for(members: list[Member]) -> None:
    uplinks = sorted(m.row.uplink_kbit for m in members)
    middle = uplinks[(len(uplinks) - 1) // 2]
    for m, counted in zip(members, chain.counted_uplinks(members), strict=True):
        assert Fraction(counted, 8) == min(m.row.uplink_kbit, reference_limit(middle, m.served))


@given(reducers, st.randoms(use_true_random=False))
def test_what_counts_of_an_uplink_does_not_depend_on_the_order(members: list[Member], chance: object) -> None:
    shuffled = list(members)
    chance.shuffle(shuffled)  # type: ignore[attr-defined]
    counted = dict(zip(map(id, members), chain.counted_uplinks(members), strict=True))
    assert chain.counted_uplinks(shuffled) == [counted[id(m)] for m in shuffled]


@given(reducers)
def test_parts_cover_every_chunk_once_in_proportion_to_what_counts(members: list[Member]) -> None:
    state = state_of(*members)
    chunks = chunks_of(state)
    assert sum(chunks.values()) == CHUNKS
    counted = chain.counted_uplinks(members)
    for m, share in zip(members, counted, strict=True):
        assert abs(chunks[m.peer_id] - Fraction(CHUNKS * share, sum(counted))) < 1


@given(reducers, st.integers(0, SERVED_MAX))
def test_a_boast_raises_nobody_above_the_share_of_who_has_the_middle_line(members: list[Member], served: int) -> None:
    """Beside three or more, a peer that has served as long as the others gets no more for claiming everything."""
    if len(members) < 3:
        return
    honest = [msgspec.structs.replace(m, served=served) for m in members]
    boast = member(99, uplink=UPLINK_MAX_KBIT)
    *_, counted = chain.counted_uplinks([*honest, boast])
    uplinks = sorted(m.row.uplink_kbit for m in [*honest, boast])
    assert Fraction(counted, 8) == uplinks[(len(uplinks) - 1) // 2], (
        "who has not served yet gets the middle one's share"
    )


def test_a_lone_fast_server_among_dsl_lines_gets_its_share_after_some_tens_of_rounds() -> None:
    state = state_of(*(member(n) for n in range(6)), member(6, uplink=SERVER_KBIT))
    shares = []
    for _ in range(80):
        shares.append(chunks_of(state)[peer_id(6)] / CHUNKS)
        state = seal_on(state)
    fair = SERVER_KBIT / (SERVER_KBIT + 6 * DSL_KBIT)
    assert shares[0] == pytest.approx(1 / 7, abs=1e-3), "it begins like all others"
    assert shares[30] > 0.5
    assert shares[70] == pytest.approx(fair, abs=1e-3)


def test_only_rounds_that_another_member_has_sealed_count_as_served() -> None:
    """Else a member that seals again and again, whoever has its replies, would earn its shares by itself."""
    state = state_of(member(0), member(1), member(2))
    for _ in range(5):
        state = seal_on(state, sealer=0)
    assert served_by(state, 0) == 0
    assert served_by(state, 1) >= 3


def test_a_lone_member_earns_nothing() -> None:
    state = state_of(member(0))
    for _ in range(5):
        state = seal_on(state)
    assert served_by(state, 0) == 0


def test_each_strike_for_a_reply_halves_what_a_member_has_served_and_rounds_served_are_bounded() -> None:
    state = state_of(*(member(n, served=SERVED_MAX - 1) for n in range(4)))
    for _ in range(4):
        state = seal_on(state)
    assert {m.served for m in state.following} == {SERVED_MAX}
    assert served_by(seal_on(state, without=(2,)), 2) == SERVED_MAX // 2
    few = state_of(*(member(n, served=19) for n in range(4)))
    assert served_by(seal_on(few, without=(2,)), 2) == 3, "two doublings are gone at least"
    # Place 0 owes a seal: a strike as well, which says nothing of its line.
    shape = chain.shape_of(state, CHUNKS)
    first, second = (shape.members[i].peer_id for i in shape.sealer_order[:2])
    number = next(n for n in range(4) if peer_id(n) == second)
    after = seal_on(state, sealer=number)
    assert next(m.served for m in after.following if m.peer_id == first) == SERVED_MAX


def test_who_comes_back_begins_anew() -> None:
    state = state_of(*(member(n, served=SERVED_MAX) for n in range(3)))
    shape = chain.shape_of(state, CHUNKS)
    solo = Seal(
        version=chain.SEAL_VERSION,
        run_id=RUN,
        round=state.round + 1,
        parent=state.id,
        total=state.total,
        sealer=peer_id(1),
        solo=True,
        included=chain.bitmap((), 3),
        parts=tuple(b"" for _ in shape.parts),
        rows=tuple(m.row for m in shape.members),
        joins=(),
        root=b"",
    )
    after = chain.extend(state, bytes(32), solo, CHUNKS)
    assert [(m.peer_id, m.served) for m in after.now] == [(peer_id(1), 0)]


# ---- standing -------------------------------------------------------------------------------------------------------


def standing_of(state: ChainState) -> list[int]:
    return [m.standing for m in state.following]


def test_a_member_counts_for_an_eighth_more_with_each_seal_that_has_work_of_it_up_to_all() -> None:
    state = state_of(*(member(n) for n in range(3)))
    assert standing_of(state) == [1, 1, 1]
    for sealed in range(1, 10):
        state = seal_on(state, standing_in=(2,))
        assert standing_of(state) == [min(1 + sealed, 8)] * 2 + [1], "a stand-in is no work"
    assert chain.shape_of(state, CHUNKS).group.standing == (8, 8, 1)


def test_who_has_little_work_in_the_seals_neither_reduces_nor_seals_before_the_others() -> None:
    state = state_of(member(0), member(1, standing=4), member(2, standing=8), member(3))
    for _ in range(4):
        shape = chain.shape_of(state, CHUNKS)
        assert {part.reducer for part in shape.parts} == {1, 2}
        assert set(shape.sealer_order[:2]) == {1, 2} and set(shape.sealer_order) == {0, 1, 2, 3}
        # The last never sends any.
        state = seal_on(state, standing_in=(3,))
    assert {part.reducer for part in chain.shape_of(state, CHUNKS).parts} == {0, 1, 2}


def test_where_all_have_little_work_in_the_seals_all_reduce() -> None:
    shape = chain.shape_of(state_of(*(member(n, standing=1 + n) for n in range(3))), CHUNKS)
    assert {part.reducer for part in shape.parts} == {0, 1, 2}


def test_one_that_owes_again_and_again_never_reduces_alone_in_place_of_the_new_ones() -> None:
    for round in range(64):
        members = (member(0, standing=8, strikes=5), member(1), member(2, standing=2))
        shape = chain.shape_of(state_of(*members, round=round), CHUNKS)
        assert {part.reducer for part in shape.parts} >= {1, 2}


def test_a_lone_member_keeps_its_standing_and_who_was_none_has_the_least() -> None:
    lone = state_of(member(0))
    for _ in range(3):
        lone = seal_on(lone)
    assert standing_of(lone) == [4]
    (ours,) = lone.following
    others = chain.ChainState(RUN, 7, bytes(32), bytes(32), 9, (ours, member(1)), (ours, member(1)))
    for sealer, standing in ((0, 5), (2, 1)):
        shape = chain.shape_of(others, CHUNKS)
        seal = Seal(
            version=chain.SEAL_VERSION,
            run_id=RUN,
            round=8,
            parent=others.id,
            total=9 + (sealer == 0),
            sealer=peer_id(sealer),
            solo=True,
            included=chain.bitmap((0,) if sealer == 0 else (), 2),
            parts=tuple(hashlib.sha256(b"reply").digest() if sealer == 0 else b"" for _ in shape.parts),
            rows=tuple(m.row for m in shape.members),
            joins=(),
            root=b"",
        )
        assert standing_of(chain.extend(others, bytes(32), seal, CHUNKS)) == [standing]


@dataclass
class Boaster:
    """A reducer with a line of `kbit` that claims a hundred times as much, among honest ones with lines like its own.

    A round's replies are due when an honest reducer with twice an even share would have sent its own.
    """

    others: int = 5
    kbit: int = DSL_KBIT

    def play(self, rounds: int) -> list[tuple[int, int]]:
        """[(chunks that it was given, strikes afterwards)] of each round."""
        boast = member(self.others, uplink=100 * self.kbit)
        state = state_of(*(member(n, uplink=self.kbit) for n in range(self.others)), boast)
        most = 2 * CHUNKS / (self.others + 1)
        played = []
        for _ in range(rounds):
            given_chunks = chunks_of(state)[boast.peer_id]
            state = seal_on(state, without=(self.others,) if given_chunks > most else ())
            played.append((given_chunks, next(m.strikes for m in state.following if m.peer_id == boast.peer_id)))
        return played


def test_who_claims_a_hundred_times_its_line_is_struck_and_costs_few_parts() -> None:
    played = Boaster().play(400)
    skipped = [chunks for chunks, _ in played if chunks > 2 * CHUNKS / 6]
    assert max(strikes for _, strikes in played) > 0
    assert len(skipped) < len(played) / 7, "rounds in which its parts are lost"
    assert max(skipped) < CHUNKS / 2, "and how many those are"


# ---- pace -----------------------------------------------------------------------------------------------------------

throughputs = st.lists(st.integers(0, SEQUENCES_PER_KILOSECOND_MAX), min_size=1, max_size=12)


def length(*members: Member, target: int = 16, least: float = 0.001, most: float = 1e9) -> float:
    return chain.length_seconds(chain.shape_of(state_of(*members), CHUNKS), target, least, most, RATIO)


@given(throughputs, st.randoms(use_true_random=False))
def test_a_throughput_counts_up_to_the_ratio_times_the_median_of_those_that_claim_any(
    claims: list[int], chance: object
) -> None:
    members = [member(n, throughput=claim) for n, claim in enumerate(claims)]
    known = sorted(claim for claim in claims if claim)
    half = len(known) // 2
    median = Fraction(known[half] + known[~half], 2) if known else Fraction(0)
    counted = sum(min(Fraction(claim), 4 * median) for claim in known)
    assert chain.counted_throughput(members, RATIO) == pytest.approx(float(counted))
    chance.shuffle(members)  # type: ignore[attr-defined]
    assert chain.counted_throughput(members, RATIO) == pytest.approx(float(counted))


@given(st.lists(st.integers(900, 1100), min_size=2, max_size=12), st.integers(0, SEQUENCES_PER_KILOSECOND_MAX))
def test_one_claim_among_three_or_more_changes_a_round_only_so_much(honest: list[int], claim: int) -> None:
    members = [member(n, throughput=throughput) for n, throughput in enumerate(honest)]
    alone, beside = length(*members), length(*members, member(99, throughput=claim))
    count = len(honest)
    assert beside <= alone, "who claims little or nothing is as if it were not there"
    assert beside >= alone * count / (count + RATIO * 1.25), "who claims everything counts for a few"


def test_two_members_are_taken_at_their_word() -> None:
    """A median of two is no witness: a laptop beside a workstation must not make rounds as long as it takes alone."""
    assert length(member(0, throughput=1000), member(1, throughput=100_000)) == pytest.approx(16 / 101)


def test_a_lone_gpu_among_laptops_counts_as_its_weight_does_in_sums() -> None:
    assert length(*(member(n, throughput=1000) for n in range(4)), member(4, throughput=100_000)) == 16 / 8


def test_a_newcomer_has_no_say_in_the_pace() -> None:
    members = [member(n) for n in range(3)]
    for claim in (1, SEQUENCES_PER_KILOSECOND_MAX):
        assert length(*members, member(3, throughput=claim, absent=-2)) == length(*members)


def test_where_nobody_says_what_it_computes_rounds_are_short() -> None:
    assert length(member(0, throughput=0), member(1, throughput=0), least=0.5) == 0.5
    assert length(member(0, throughput=0, absent=-2), least=0.5) == 0.5


# ---- form -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes", [{"served": SERVED_MAX + 1}, {"served": -1}, {"strikes": 9}, {"strikes": 2**40}, {"absent": -3}]
)
def test_a_state_that_no_seals_lead_to_is_refused_before_anything_is_made_of_it(changes: dict[str, int]) -> None:
    """A snapshot's numbers are exponents here: one out of bounds could take all memory."""
    state = state_of(msgspec.structs.replace(member(0), **changes))
    with pytest.raises(msgspec.ValidationError):
        msgspec.msgpack.decode(msgspec.msgpack.encode(state), type=ChainState)
    msgspec.msgpack.decode(msgspec.msgpack.encode(state_of(member(0, served=SERVED_MAX))), type=ChainState)
