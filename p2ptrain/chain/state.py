"""The state of the chain that follows from its seals.

Everything here is a pure function of seals: two peers that applied the same seals hold the same `ChainState`, to the
byte, and therefore agree on the members, the partition, the sealer order and the pace of the next two rounds without
asking anybody. `shape(t)` comes from seal t-2, so that contributions of round t survive a fork of depth one at t-1.

All arithmetic is in integers. The partition in particular is a largest-remainder apportionment rather than a linear
program: it must come out the same on every machine, and floating-point solvers promise no such thing.

What members say of themselves, nobody can check. So no claim counts without bounds: a throughput counts in relation to
those of the others, an uplink in relation to the others' and to how long its owner has been seen to reduce.
"""

from __future__ import annotations

import functools
import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import msgspec
from msgspec import Meta

from p2ptrain.chain.admission import Access, AdmissionError
from p2ptrain.chain.seal import (
    HASH_BYTES,
    JOINS_MAX,
    MEMBERS_MAX,
    SEAL_VERSION,
    Hash,
    PeerId,
    Row,
    Seal,
    SealError,
    bits,
)
from p2ptrain.compression.codec import STANDING_FULL

ABSENCES_ALLOWED = 3  # consecutive seals without a member before it is no longer one
NEWCOMER_ABSENCES_ALLOWED = 2  # the same for a member that no seal has included yet
STRIKES_A_TIME = 1  # for owing something; a turn to seal on which nothing is owed takes one back
STRIKES_ACCUSED = 2  # for an accusation, to the accused
STRIKES_TO_ACCUSE = 2  # and to the accuser, who must not lose its turns by it
STRIKES_BORNE = 2  # what is owed once may have been a moment late
STANDING_TRUSTED = 4  # work in three seals, before a member reduces, and seals among the first
STRIKES_MAX = 8  # a member struck so often has a turn in one round of 2**6
SERVED_MAX = 64  # an uplink counts up to 2**8 times the middle one then
SERVED_DOUBLES = 8  # served rounds after which twice as much of an uplink counts
PART_CHUNKS_MIN = 1024  # a reducer's range is not cut into smaller parts
PARTS_PER_REDUCER_MAX = 8
EXPELLED_MAX = 256  # the oldest are forgotten beyond
PARTS_MAX = 256  # cut no further beyond; a reducer has one part at least


class Member(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One peer of the group, as the chain lists it."""

    peer_id: PeerId
    row: Row
    absent: Annotated[int, Meta(ge=-NEWCOMER_ABSENCES_ALLOWED, le=2**48)]
    """Consecutive seals of its membership that left it out. Below 0 no seal has included it yet, and at 0 it is out."""
    included: bool
    """Whether the last seal included it."""
    strikes: Annotated[int, Meta(ge=0, le=STRIKES_MAX)] = 0
    """One for each round in which it owed replies or a seal, less one for each turn to seal without owing anything."""
    served: Annotated[int, Meta(ge=0, le=SERVED_MAX)] = 0
    """Rounds in which it reduced and another member sealed all of its replies; half of them, or less, after each strike
    for a reply."""
    standing: Annotated[int, Meta(ge=1, le=STANDING_FULL)] = 1
    """One more than the seals of its membership that have work of it: so many eighths of what it sends count."""

    @property
    def dialable(self) -> bool:
        return self.row.uplink_kbit > 0

    @property
    def is_newcomer(self) -> bool:
        """Whether no seal has included it yet."""
        return self.absent < 0


class ChainState(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Where a chain stands after a seal. Part of every snapshot, under its root."""

    run_id: Hash
    round: int
    id: Hash
    parent: Hash
    total: int
    now: Annotated[tuple[Member, ...], Meta(max_length=MEMBERS_MAX)]
    """Members of round `round + 1`."""
    following: Annotated[tuple[Member, ...], Meta(max_length=MEMBERS_MAX)]
    """Members of round `round + 2`, as far as this seal knows."""
    access: Access = Access()
    """Who may take part from here on."""
    expelled: tuple[PeerId, ...] = ()
    """Peers that proofs have convicted, the latest at the end: never members again."""


class Group(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """The members of a round, in order, as the signature under a reply names them."""

    peer_ids: Annotated[tuple[PeerId, ...], Meta(max_length=MEMBERS_MAX)]
    standing: Annotated[tuple[Annotated[int, Meta(ge=1, le=STANDING_FULL)], ...], Meta(max_length=MEMBERS_MAX)]


@dataclass(frozen=True, slots=True)
class Part:
    """The contiguous chunks [start, end) that one reducer (an index into the round's members) reduces."""

    reducer: int
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class RoundShape:
    """Everything of a round that is fixed before it starts."""

    round: int
    base: bytes
    """id(t-2): what a contribution to this round names."""
    members: tuple[Member, ...]
    parts: tuple[Part, ...]
    sealer_order: tuple[int, ...]
    """Indices into `members`, place 0 first."""
    awaited: frozenset[int]
    """Indices of the members that seal t-2 included, or of all where it included nobody: those to wait for."""

    @property
    def group(self) -> Group:
        return Group(tuple(m.peer_id for m in self.members), tuple(m.standing for m in self.members))

    def index(self, peer_id: bytes) -> int | None:
        """Position of `peer_id` among the members, or None."""
        for position, member in enumerate(self.members):
            if member.peer_id == peer_id:
                return position
        return None


def genesis(run_id: bytes, founder: bytes = b"", access: Access = Access()) -> ChainState:
    """The chain before its first seal: round 1 has no members, so that seal is a solo seal, by the founder.

    Args:
        founder: peer id; empty: whoever bootstraps first.
        access: who may take part, as the manifest says.
    """
    following = (Member(founder, Row(0, 0, 1), absent=0, included=False),) if founder else ()
    return ChainState(
        run_id=run_id, round=0, id=run_id, parent=run_id, total=0, now=(), following=following, access=access
    )


def counted_uplinks(reducers: Sequence[Member]) -> list[int]:
    """As much of each reducer's uplink as counts, in eighths of kbit/s.

    An uplink counts up to the middle one, of an even number the smaller of the middle two. Each `SERVED_DOUBLES` rounds
    in which its owner has served double that limit, and it grows linearly in between. So who claims much gets much once
    it has been seen to carry half as much.
    """
    if not reducers:
        return []
    claims = [max(member.row.uplink_kbit, 1) for member in reducers]
    middle = statistics.median_low(claims)
    limits = []
    for member in reducers:
        doublings, rest = divmod(member.served, SERVED_DOUBLES)
        limits.append((middle * (SERVED_DOUBLES + rest)) << doublings)
    return [min(SERVED_DOUBLES * claim, limit) for claim, limit in zip(claims, limits, strict=True)]


def partition(chunks: int, shares: Sequence[int]) -> list[tuple[int, int]]:
    """Contiguous chunk ranges [start, end) in proportion to `shares`, by largest remainder, in integers."""
    shares = [max(share, 1) for share in shares]
    whole = sum(shares)
    sizes = [chunks * share // whole for share in shares]
    remainders = sorted(range(len(shares)), key=lambda i: (-(chunks * shares[i] % whole), i))
    for i in remainders[: chunks - sum(sizes)]:
        sizes[i] += 1
    ranges, start = [], 0
    for size in sizes:
        ranges.append((start, start + size))
        start += size
    return ranges


def cut(start: int, end: int, most: int) -> list[tuple[int, int]]:
    """One reducer's range as at most `most` parts [start, end) of nearly equal size.

    In pieces, because a part is reduced and its reply on its way while the next one is still coming; few and large
    ones, because each costs every member a header and the seal a hash.
    """
    count = min(max(1, (end - start) // PART_CHUNKS_MIN), most)
    edges = [start + (end - start) * n // count for n in range(count + 1)]
    return [(a, b) for a, b in itertools.pairwise(edges) if b > a]


def _rotated(indices: list[int], by: int) -> list[int]:
    if not indices:
        return []
    by %= len(indices)
    return indices[by:] + indices[:by]


def _on_trial(member: Member, number: int) -> bool:
    return number % 2 ** (member.strikes - STRIKES_BORNE) == 0


def shape_of(state: ChainState, chunks: int) -> RoundShape:
    """The round that follows `state`, for a model of `chunks` chunks."""
    return _shape(state.round + 1, state.parent, state.now, chunks)


def coming_shape(state: ChainState, chunks: int) -> RoundShape:
    """The round after that, unless the next seal is a solo seal."""
    return _shape(state.round + 2, state.id, state.following, chunks)


@functools.lru_cache(maxsize=16)  # asked for at every event of a round
def _shape(number: int, base: bytes, members: tuple[Member, ...], chunks: int) -> RoundShape:
    included = [i for i, m in enumerate(members) if m.included]
    awaited = included or list(range(len(members)))
    answering = [i for i in included if members[i].dialable]
    # A member that has owed something again and again is tried in one round of four, of eight, and so on.
    borne = [i for i in answering if members[i].strikes <= STRIKES_BORNE]
    # Who comes, and dies as soon as others wait for it, has to work first; where all are new, somebody must reduce.
    trusted = [i for i in borne if members[i].standing >= STANDING_TRUSTED] or borne
    tried = [i for i in answering if i not in borne and _on_trial(members[i], number + i)]
    dialable = [i for i, m in enumerate(members) if m.dialable]
    # A lone peer that cannot be dialled still reduces for itself.
    reducers = sorted(tried + trusted) or answering or dialable or awaited[:1]
    ranges = partition(chunks, counted_uplinks([members[i] for i in reducers])) if reducers else []
    most = min(PARTS_PER_REDUCER_MAX, max(1, PARTS_MAX // max(1, len(reducers))))
    pieces = [(i, piece) for i, (start, end) in zip(reducers, ranges, strict=True) for piece in cut(start, end, most)]
    parts = tuple(Part(i, start, end) for i, (start, end) in pieces)
    # Those on trial come first, so that one turn shows whether they reduce and seal.
    order = _rotated(tried, number >> STRIKES_MAX) + _rotated(trusted, number)
    for others in (awaited, range(len(members))):
        order += _rotated([i for i in others if i not in order], number)
    return RoundShape(number, base, members, parts, tuple(order), frozenset(awaited))


def counted_throughput(members: Sequence[Member], cap_ratio: float) -> float:
    """Sequences in 1000 s that a group computes, as far as its members' claims count.

    A claim counts up to `cap_ratio` times the median, as a weight does in a sum (`compression/reduce.py`): what a
    member computes beyond that would make rounds shorter, and no sum better. Who claims nothing, or has done nothing
    yet, is left out of the median as well.
    """
    claims = [m.row.sequences_per_kilosecond for m in members if not m.is_newcomer and m.row.sequences_per_kilosecond]
    cap = cap_ratio * statistics.median(claims) if claims else 0.0
    return float(sum(min(claim, cap) for claim in claims))


def length_seconds(
    shape: RoundShape, target_batch: int, min_seconds: float, max_seconds: float, cap_ratio: float
) -> float:
    """How long every member computes in this round: the target batch over the group's throughput, within bounds."""
    sequences_per_second = counted_throughput(shape.members, cap_ratio) / 1000
    if sequences_per_second <= 0:
        return min_seconds
    return min(max(target_batch / sequences_per_second, min_seconds), max_seconds)


def extend(state: ChainState, identifier: bytes, seal: Seal, chunks: int) -> ChainState:
    """The chain after one more seal.

    Raises:
        SealError: the seal does not continue this chain, or breaks a rule (docs/rounds.md, rule 1).
    """
    shape = shape_of(state, chunks)
    count = len(shape.members)
    if seal.version != SEAL_VERSION or seal.run_id != state.run_id:
        raise SealError("seal of another run or version")
    if seal.round != state.round + 1 or seal.parent != state.id:
        raise SealError("seal does not follow this chain")
    if len(seal.parts) != len(shape.parts) or any(len(part) not in (0, HASH_BYTES) for part in seal.parts):
        raise SealError("seal lists the wrong parts")
    if len(seal.rows) != count or len(seal.root) not in (0, HASH_BYTES):
        raise SealError("seal lists the wrong members")
    included = bits(seal.included, count)
    if seal.total != state.total + len(included):
        raise SealError("seal's total is not its parent's plus the members included")
    sealer = shape.index(seal.sealer)
    if not state.round and state.following and seal.sealer != state.following[0].peer_id:
        raise SealError("the first seal is not the founder's")
    if seal.solo:
        if included - {sealer}:
            raise SealError("a solo seal includes its sealer alone")
    elif sealer is None:
        raise SealError("sealed by a stranger")
    elif included == {sealer} and shape.awaited - {sealer}:
        raise SealError("a seal of its sealer alone must be a solo seal")
    if not included and any(seal.parts):
        raise SealError("a seal that includes nobody has replies")
    listed = {m.peer_id for m in state.following}
    newcomers = [join.peer_id for join in seal.joins]
    if len(set(newcomers)) != len(newcomers) or (not seal.solo and listed & set(newcomers)):
        raise SealError("seal admits a peer that is a member already")
    access = _amended(state, seal)
    convicted = _convicted(state, seal)
    _check_accusation(state, shape, seal)

    if seal.solo:
        row = seal.rows[sealer] if sealer is not None else Row(0, 0, 1)
        worked = bool(included) and row.weight > 0
        standing = next((_standing_after(m, worked) for m in state.following if m.peer_id == seal.sealer), 1)
        alone = Member(seal.sealer, row, absent=0, included=True, standing=standing)
        now: tuple[Member, ...] = (alone,)
        following: tuple[Member, ...] = (alone,)
    else:
        now = state.following
        rows = {m.peer_id: row for m, row in zip(shape.members, seal.rows, strict=True)}
        present = {shape.members[i].peer_id for i in included}
        # A round of SKIPs alone, its reducers dead, says nothing about who is there. A reducer that owes a reply again
        # and again does count as absent: else survivors that cannot be dialled would seal SKIPs for ever.
        reducers = {shape.members[part.reducer] for part in shape.parts}
        owing = {m.peer_id for m in reducers if not m.included and m.peer_id != seal.sealer}
        missed = rows.keys() - present if included else owing
        struck, forgiven = _struck_and_forgiven(shape, seal)
        serving, failing = _serving_and_failing(shape, seal)
        accusing = {seal.sealer} if seal.accused else set()
        listed_on, remaining = [], []
        for m in state.following:
            absent = 0 if m.peer_id in present else m.absent + (m.peer_id in missed)
            strikes = m.strikes + STRIKES_A_TIME * (m.peer_id in struck) + STRIKES_ACCUSED * (m.peer_id == seal.accused)
            strikes += STRIKES_TO_ACCUSE * (m.peer_id in accusing) - (m.peer_id in forgiven - accusing)
            served = m.served + (m.peer_id in serving)
            if m.peer_id in struck & failing:
                # So that no more than a quarter of its uplink counts that did before.
                served = min(m.served // 2, max(m.served - 2 * SERVED_DOUBLES, 0))
            after = Member(
                m.peer_id,
                rows.get(m.peer_id, m.row),
                absent,
                m.peer_id in present,
                min(max(strikes, 0), STRIKES_MAX),
                min(served, SERVED_MAX),
                _standing_after(m, m.peer_id in present and rows[m.peer_id].weight > 0),
            )
            listed_on.append(after)
            if absent < ABSENCES_ALLOWED and (not m.is_newcomer or absent < 0 or after.included):
                remaining.append(after)
        # Never to the last: a group of nobody could not seal any more.
        following = _without_those_shut_out(tuple(remaining or listed_on), access)
        following = tuple(m for m in following if m.peer_id not in convicted) or following
    gone = convicted - {m.peer_id for m in following}
    expelled = (*state.expelled, *sorted(gone))[-EXPELLED_MAX:]
    admitted = [Member(j.peer_id, j.row, -NEWCOMER_ABSENCES_ALLOWED, False) for j in seal.joins]
    if len(admitted) > room_for_newcomers(following):
        raise SealError("seal admits more newcomers than may come at once")
    following += tuple(m for m in admitted if m.peer_id != seal.sealer)
    if len(following) > MEMBERS_MAX:
        raise SealError("too many members")
    return ChainState(state.run_id, seal.round, identifier, state.id, seal.total, now, following, access, expelled)


def _standing_after(member: Member, worked: bool) -> int:
    """A member's standing after a seal; `worked` says whether the seal has work of it."""
    return min(member.standing + worked, STANDING_FULL)


def _amended(state: ChainState, seal: Seal) -> Access:
    """Return who may take part after a seal, which must not bring in anybody else (docs/rounds.md, rule 3).

    Members come into a chain as newcomers in a seal, or as the sealer of a solo seal.

    Raises:
        SealError: a statement in it does not count, or it brings in a peer that the run is not for.
    """
    access = state.access
    try:
        for statement in seal.amendments:
            access = access.amended(statement, state.run_id)
    except AdmissionError as error:
        raise SealError(f"seal has an amendment that does not count: {error}") from error
    brought = [join.peer_id for join in seal.joins] + ([seal.sealer] if seal.solo else [])
    if not all(map(access.admits, brought)):
        raise SealError("seal brings in a peer that the run is not for")
    return access


def _without_those_shut_out(members: tuple[Member, ...], access: Access) -> tuple[Member, ...]:
    """Leave out members that the owner has revoked, unless no proven one were left, who could seal."""
    remaining = tuple(m for m in members if access.admits(m.peer_id))
    return remaining if any(not m.is_newcomer for m in remaining) else members


def _convicted(state: ChainState, seal: Seal) -> set[bytes]:
    """Return the peers that a seal expels. Whether its proofs convict them is for `sealed.check_proofs` to say.

    Raises:
        SealError: it is an expelled peer's, admits one, or expels one that is no member.
    """
    convicted = {expulsion.peer_id for expulsion in seal.expelled}
    if seal.sealer in state.expelled or seal.sealer in convicted:
        raise SealError("sealed by a peer that is expelled")
    if any(join.peer_id in state.expelled or join.peer_id in convicted for join in seal.joins):
        raise SealError("seal admits a peer that is expelled")
    # Members alone, so that nobody fills the list with identities that were never there.
    if len(convicted) != len(seal.expelled) or not convicted <= {m.peer_id for m in state.following}:
        raise SealError("seal expels a peer twice, or one that is no member")
    return convicted


def _check_accusation(state: ChainState, shape: RoundShape, seal: Seal) -> None:
    """Check that an accusation is of another member, in turn, by one that can bear what it costs.

    So nobody makes one more than every third turn: alone it takes no turn from a member that owes nothing.

    Raises:
        SealError: it is not.
    """
    if not seal.accused:
        return
    accused, sealer = shape.index(seal.accused), shape.index(seal.sealer)
    if seal.solo or accused is None or accused == sealer or sealer != shape.sealer_order[0]:
        raise SealError("seal accuses out of turn, or one that is no member")
    if not may_accuse(state, seal.sealer):
        raise SealError("seal accuses once more than its sealer may")


def may_accuse(state: ChainState, peer: bytes) -> bool:
    """Say whether an accusation by this member would leave it its turns."""
    strikes = {member.peer_id: member.strikes for member in state.following}
    return strikes.get(peer, STRIKES_MAX) + STRIKES_TO_ACCUSE <= STRIKES_BORNE


def room_for_newcomers(members: Sequence[Member]) -> int:
    """How many peers a seal may admit to these members.

    So that those that no seal has included yet are at most a quarter of the others, or one: who asks for admission
    without end costs the others little.
    """
    newcomers = sum(m.is_newcomer for m in members)
    return max(0, min(max(1, (len(members) - newcomers) // 4) - newcomers, JOINS_MAX, MEMBERS_MAX - len(members)))


def _struck_and_forgiven(shape: RoundShape, seal: Seal) -> tuple[set[bytes], set[bytes]]:
    """Who owed something in a round that was sealed like this, and whose turn it was and who owed nothing.

    A reducer owes the replies to its parts, and place 0 a seal. Where more than half of those awaited would have owed
    something, it was the network, or the sealer lies: then nobody has.
    """
    first = shape.sealer_order[0]
    owing = {part.reducer for part, digest in zip(shape.parts, seal.parts, strict=True) if not digest}
    if shape.members[first].peer_id != seal.sealer:
        owing.add(first)
    forgiven = {first} - owing
    if 2 * len(owing) > len(shape.awaited):
        owing = set()
    return {shape.members[i].peer_id for i in owing}, {shape.members[i].peer_id for i in forgiven}


def _serving_and_failing(shape: RoundShape, seal: Seal) -> tuple[set[bytes], set[bytes]]:
    """Reducers with all of whose replies the round was sealed, but for the sealer, and those that owe some.

    The sealer has its own replies in any case, whether or not its line carries them to others.
    """
    reducers = {part.reducer for part in shape.parts}
    owing = {part.reducer for part, digest in zip(shape.parts, seal.parts, strict=True) if not digest}
    serving, failing = ({shape.members[i].peer_id for i in some} for some in (reducers - owing, owing))
    return serving - {seal.sealer}, failing


def root_round(round: int, interval: int) -> int:
    """The round that the root in the seal of `round` is of: the last multiple of `interval` at least two before it.

    All whose messages are in a round agree on the chain up to two rounds before; the root of a round that may yet be
    undone would be another one on another branch.
    """
    return max(0, (round - 2) // interval * interval)


def better(total: int, identifier: bytes, than_total: int, than_identifier: bytes) -> bool:
    """Fork choice: the larger total; at a tie the smaller id."""
    return (-total, identifier) < (-than_total, than_identifier)
