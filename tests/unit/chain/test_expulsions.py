"""Claims about seals that expel and accuse: what they change, and which of them are invalid."""

from __future__ import annotations

import sys
from pathlib import Path

import msgspec
import pytest

sys.path.insert(0, str(Path(__file__).parent))

from test_evidence import CHUNKS, CODEC, IDS, MEMBERS, REDUCER, RUN_ID, SHAPE, flipped, proof_of, reduced

from p2ptrain import chain
from p2ptrain.chain import ChainState, Expulsion, Join, Member, Row, Seal, SealError
from p2ptrain.chain.seal import proof_digest
from p2ptrain.chain.sealed import SealedRound, SealedRoundError, check_continues, decode_sealed, encode_sealed
from p2ptrain.chain.state import EXPELLED_MAX, STRIKES_BORNE
from p2ptrain.swarm.identity import Identity, new_identity, verify

PROOF = proof_of(*flipped())
LIAR = Expulsion(REDUCER.peer_id, proof_digest(PROOF))
ROW = Row(4, 1000, 100)


def group(*members: Identity, strikes: dict[bytes, int] | None = None) -> tuple[Member, ...]:
    return tuple(Member(m.peer_id, ROW, 0, True, (strikes or {}).get(m.peer_id, 0)) for m in members)


def standing(*members: Identity, strikes: dict[bytes, int] | None = None, **changes: object) -> ChainState:
    now = group(*(members or MEMBERS), strikes=strikes)
    state = ChainState(RUN_ID, 10, SHAPE.base, SHAPE.base, 40, now, now)
    return msgspec.structs.replace(state, **changes)


def seal_on(state: ChainState, place: int = 0, **changes: object) -> Seal:
    """A round that includes nobody, by the member in this place of the order."""
    shape = chain.shape_of(state, CHUNKS)
    seal = Seal(
        version=chain.SEAL_VERSION,
        run_id=RUN_ID,
        round=state.round + 1,
        parent=state.id,
        total=state.total,
        sealer=shape.members[shape.sealer_order[place]].peer_id,
        solo=False,
        included=chain.bitmap((), len(shape.members)),
        parts=tuple(b"" for _ in shape.parts),
        rows=tuple(member.row for member in shape.members),
        joins=(),
        root=b"",
    )
    return msgspec.structs.replace(seal, **changes)


def extend(state: ChainState, seal: Seal) -> ChainState:
    return chain.extend(state, chain.seal_id(msgspec.msgpack.encode(seal)), seal, CHUNKS)


def sealer_but(state: ChainState, peer: bytes) -> int:
    """The first place in the order that is not this peer's."""
    shape = chain.shape_of(state, CHUNKS)
    return next(n for n, index in enumerate(shape.sealer_order) if shape.members[index].peer_id != peer)


def expelling(state: ChainState, *expelled: Expulsion, **changes: object) -> Seal:
    return seal_on(state, sealer_but(state, expelled[0].peer_id), expelled=expelled, **changes)


def ids(members: tuple[Member, ...]) -> set[bytes]:
    return {member.peer_id for member in members}


# ---- expulsions -----------------------------------------------------------------------------------------------------


def test_who_is_expelled_is_a_member_of_the_next_round_for_the_last_time() -> None:
    """Its contributions to that round are on their way, keyed by a seal before."""
    after = extend(standing(), expelling(standing(), LIAR))
    assert REDUCER.peer_id in ids(after.now)
    assert ids(after.following) == set(IDS) - {REDUCER.peer_id}
    assert after.expelled == (REDUCER.peer_id,)
    shape = chain.coming_shape(after, CHUNKS)
    assert shape.index(REDUCER.peer_id) is None


def test_who_is_expelled_is_never_admitted_again_and_seals_nothing() -> None:
    after = extend(standing(), expelling(standing(), LIAR))
    place = sealer_but(after, REDUCER.peer_id)
    assert extend(after, seal_on(after, place)).expelled == after.expelled
    for seal in (
        seal_on(after, place, joins=(Join(REDUCER.peer_id, ROW),)),
        seal_on(after, place, sealer=REDUCER.peer_id),
        seal_on(after, place, sealer=REDUCER.peer_id, solo=True),
    ):
        with pytest.raises(SealError, match="expelled"):
            extend(after, seal)


def test_who_is_expelled_is_not_admitted_by_the_same_seal() -> None:
    newcomer = new_identity().peer_id
    state = standing()
    extend(state, expelling(state, LIAR, joins=(Join(newcomer, ROW),)))
    solo = expelling(state, LIAR, solo=True, joins=(Join(REDUCER.peer_id, ROW),))
    with pytest.raises(SealError, match="expelled"):
        extend(state, solo)


def test_members_alone_are_expelled_once_and_nobody_itself() -> None:
    state, stranger = standing(), Expulsion(new_identity().peer_id, bytes(32))
    other = next(peer for peer in IDS if peer != REDUCER.peer_id)
    for seal in (
        expelling(state, stranger),
        expelling(state, LIAR, LIAR),
        expelling(state, LIAR, stranger),
        seal_on(state, expelled=(Expulsion(other, bytes(32)),), sealer=other),
    ):
        with pytest.raises(SealError, match=r"expels|is expelled"):
            extend(state, seal)


def test_a_seal_expels_no_more_than_two() -> None:
    seal = expelling(standing(), *(Expulsion(peer, bytes(32)) for peer in IDS[:3]))
    with pytest.raises(SealError, match="not a seal"):
        chain.open_seal(chain.encode_seal(seal, MEMBERS[3].sign), verify)


def test_the_last_member_is_never_expelled() -> None:
    sealer = MEMBERS[0]
    state = standing(sealer, REDUCER, following=group(REDUCER))
    after = extend(state, seal_on(state, expelled=(LIAR,), sealer=sealer.peer_id))
    assert ids(after.following) == {REDUCER.peer_id}
    assert after.expelled == ()


def test_the_oldest_expelled_are_forgotten_beyond_a_bound() -> None:
    before = tuple(new_identity().peer_id for _ in range(EXPELLED_MAX))
    after = extend(standing(expelled=before), expelling(standing(), LIAR))
    assert after.expelled == (*before[1:], REDUCER.peer_id)


# ---- proofs travel with the round ----------------------------------------------------------------------------------


def sealed_with(*proofs: bytes, expelled: tuple[Expulsion, ...] = (LIAR,)) -> SealedRound:
    state = standing()
    shape = chain.shape_of(state, CHUNKS)
    place = sealer_but(state, expelled[0].peer_id)
    seal = seal_on(state, place, expelled=expelled)
    signed = chain.encode_seal(seal, MEMBERS[shape.sealer_order[place]].sign)
    return SealedRound(chain.seal_id(signed.body), seal, signed, tuple(None for _ in seal.parts), proofs)


def test_a_round_with_its_proof_counts_and_survives_the_wire() -> None:
    sealed = decode_sealed(encode_sealed(sealed_with(PROOF)), verify)
    assert sealed == sealed_with(PROOF)
    assert check_continues(standing(), sealed, CODEC, verify).expelled == (REDUCER.peer_id,)


@pytest.mark.parametrize("proofs", [(), (PROOF, PROOF), (PROOF[:-1],), (b"",)])
def test_a_round_without_the_proofs_that_it_names_does_not_count(proofs: tuple[bytes, ...]) -> None:
    with pytest.raises(SealedRoundError, match="proofs"):
        decode_sealed(encode_sealed(sealed_with(*proofs)), verify)


def test_a_seal_that_expels_without_a_proof_is_invalid() -> None:
    honest = proof_of(*reduced())
    of_the_liar = Expulsion(REDUCER.peer_id, proof_digest(honest))
    sealed = decode_sealed(encode_sealed(sealed_with(honest, expelled=(of_the_liar,))), verify)
    with pytest.raises(SealedRoundError, match="without proof"):
        check_continues(standing(), sealed, CODEC, verify)


def test_a_proof_expels_the_peer_that_it_convicts() -> None:
    other = next(peer for peer in IDS if peer != REDUCER.peer_id)
    sealed = sealed_with(PROOF, expelled=(Expulsion(other, LIAR.proof),))
    with pytest.raises(SealedRoundError, match="another peer"):
        check_continues(standing(), decode_sealed(encode_sealed(sealed), verify), CODEC, verify)


# ---- accusations ----------------------------------------------------------------------------------------------------


def strikes_of(state: ChainState) -> dict[bytes, int]:
    return {member.peer_id: member.strikes for member in state.following}


def accusing(state: ChainState, accused: bytes, place: int = 0) -> Seal:
    """Of a round in which everybody answered, so that nobody owes anything else."""
    shape = chain.shape_of(state, CHUNKS)
    everybody = range(len(shape.members))
    return seal_on(
        state,
        place,
        accused=accused,
        total=state.total + len(everybody),
        included=chain.bitmap(everybody, len(shape.members)),
        parts=tuple(bytes(32) for _ in shape.parts),
    )


def first_of(state: ChainState, place: int = 0) -> bytes:
    shape = chain.shape_of(state, CHUNKS)
    return shape.members[shape.sealer_order[place]].peer_id


def test_an_accusation_costs_both_the_same() -> None:
    state = standing()
    accuser, accused = first_of(state), first_of(state, 2)
    before, after = strikes_of(state), strikes_of(extend(state, accusing(state, accused)))
    assert {peer for peer in after if after[peer] != before[peer]} == {accuser, accused}
    assert after[accuser] == after[accused] == STRIKES_BORNE


def test_only_the_first_sealer_accuses_and_only_another_member() -> None:
    state = standing()
    solo = msgspec.structs.replace(seal_on(state, accused=first_of(state, 1)), solo=True)
    for seal in (
        accusing(state, first_of(state, 2), place=1),
        accusing(state, first_of(state)),
        accusing(state, new_identity().peer_id),
        solo,
    ):
        with pytest.raises(SealError, match="accuses"):
            extend(state, seal)


def test_who_has_strikes_accuses_nobody() -> None:
    accuser = first_of(standing())
    state = standing(strikes={accuser: 1})
    with pytest.raises(SealError, match="accuses once more"):
        extend(state, accusing(state, first_of(state, 2)))


@pytest.mark.parametrize("members", [3, 4])
def test_one_member_that_accuses_whenever_it_may_takes_no_turn_from_another(members: int) -> None:
    """Over hundreds of rounds in which everybody answers and seals in turn."""
    state = standing(*MEMBERS[:members])
    liar, victim = state.now[0].peer_id, state.now[1].peer_id
    accusations = 0
    for _ in range(300):
        may = first_of(state) == liar and chain.state.may_accuse(state, liar)
        accusations += may
        state = extend(state, accusing(state, victim if may else b""))
        assert strikes_of(state)[victim] <= STRIKES_BORNE
    assert accusations > 300 / members / 4, "it did accuse"
    reducers = {state.now[part.reducer].peer_id for part in chain.shape_of(state, CHUNKS).parts}
    assert victim in reducers


def test_who_owes_everybody_an_answer_soon_reduces_nothing() -> None:
    state = standing()
    withholding = state.now[0].peer_id
    for _ in range(8):
        may = first_of(state) != withholding and chain.state.may_accuse(state, first_of(state))
        state = extend(state, accusing(state, withholding if may else b""))
    assert strikes_of(state)[withholding] > STRIKES_BORNE
