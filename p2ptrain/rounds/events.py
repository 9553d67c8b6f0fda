"""What the round's state machine hears (events) and what it asks for (effects).

Both are plain values: the driver (`peer/driver.py`), over the network or in the simulator, turns messages and timers
into events, and effects into messages, disk writes and tensor work. Payloads and replies are opaque bytes here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from p2ptrain.chain import ChainState, Group, Key, RoundShape, Row, Seal, SignedSeal
from p2ptrain.chain.admission import Statement
from p2ptrain.chain.forks import Mark

if TYPE_CHECKING:
    # Types alone: who looks at a swarm loads no code for payloads.
    from p2ptrain.chain.evidence import Contribution, Verdict
    from p2ptrain.chain.sealed import Reply, SealedRound

# ---- events ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ContributionReady:
    """The trainer's contribution for a round: one payload per part, already journaled; empty where weight is 0."""

    key: Key
    row: Row
    payloads: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class ContributionReceived:
    """A peer's message for one part that we reduce. The driver's side has checked its length, hash and signature."""

    key: Key
    part: int
    peer_id: bytes
    row: Row
    root_round: int
    root: bytes
    payload: bytes
    signature: bytes
    """Of `peer_id`, over what `evidence.contribution_digest` makes of it."""


@dataclass(frozen=True, slots=True)
class CameLate:
    """A peer's message that came late (rule 5): it counts for deadlines alone. Its sender is answered, not refused."""

    key: Key
    part: int
    peer_id: bytes


@dataclass(frozen=True, slots=True)
class ReplyHeld:
    """We now hold the reply for a part: frozen by us, or received whole from its reducer."""

    key: Key
    part: int
    reply: Reply


@dataclass(frozen=True, slots=True)
class SealHeard:
    """A seal that passed `open_seal`, from `source`."""

    id: bytes
    seal: Seal
    signed: SignedSeal
    source: bytes


@dataclass(frozen=True, slots=True)
class TipHeard:
    """A peer says which tip it is on; also its sign of life."""

    peer_id: bytes
    round: int
    id: bytes
    total: int


@dataclass(frozen=True, slots=True)
class PeerLeft:
    """A peer said that it leaves: a hint not to wait for it, never a decision."""

    peer_id: bytes


@dataclass(frozen=True, slots=True)
class JoinReceived:
    """A peer asks to be admitted by our next seal."""

    peer_id: bytes
    row: Row


@dataclass(frozen=True, slots=True)
class StatementHeard:
    """Somebody hands us a statement for the chain: whom to let in, or to shut out."""

    statement: Statement


@dataclass(frozen=True, slots=True)
class RoundsFetched:
    """Answer to `FetchRounds`: sealed rounds that continue `ancestor`; empty when the donor had nothing newer."""

    donor: bytes
    ancestor: bytes | None
    """A state of ours that the rounds continue; None: the donor's journal does not reach back to any that we named."""
    rounds: tuple[SealedRound, ...]
    checked: bool = True
    """Whether the replies were, which takes the state that they continue. Else they tell of a branch and no more."""
    parted_at: bytes = b""
    """Without an ancestor: a state of ours that the donor's chain went through, as it says."""
    shown: tuple[Mark, ...] = ()
    """Of the donor's chain from a state of ours on, by its seals, each checked; none: it does not show them."""


@dataclass(frozen=True, slots=True)
class FetchFailed:
    """The donor did not answer, or answered nonsense."""

    donor: bytes


@dataclass(frozen=True, slots=True)
class Synced:
    """A snapshot was loaded and checked: the chain stands here now."""

    state: ChainState
    past: tuple[Mark, ...] = ()
    """Marks of that chain up to `state`, as far as they were fetched."""


@dataclass(frozen=True, slots=True)
class RootComputed:
    """The trainer hashed its replica at a multiple of the root interval."""

    round: int
    root: bytes


@dataclass(frozen=True, slots=True)
class Doubted:
    """A sealed reply points against what we sent for it, which a mean with us in it hardly ever does."""

    key: Key
    part: int
    shape: RoundShape
    reply: bytes


@dataclass(frozen=True, slots=True)
class Audited:
    """Answer to `Audit`."""

    reducer: bytes
    reply: bytes
    """Its digest."""
    verdict: Verdict
    proof: bytes
    """Where the verdict is `wrong`."""


@dataclass(frozen=True, slots=True)
class ProofHeard:
    """Another peer has handed us a proof that convicts `reducer`; the driver's side has checked it."""

    reducer: bytes
    proof: bytes


@dataclass(frozen=True, slots=True)
class Tick:
    """Time passed; `late`: the timer fired over a second late, as after a suspend."""

    late: bool = False


Event = (
    ContributionReady
    | ContributionReceived
    | CameLate
    | ReplyHeld
    | SealHeard
    | TipHeard
    | PeerLeft
    | JoinReceived
    | StatementHeard
    | RoundsFetched
    | FetchFailed
    | Synced
    | RootComputed
    | Doubted
    | Audited
    | ProofHeard
    | Tick
)

# ---- effects --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class StartRound:
    """We are a member of this round: compute for `seconds`, then say ContributionReady."""

    key: Key
    shape: RoundShape
    index: int
    seconds: float
    length_seconds: float
    """How long members compute for such a round; with overlap the trainer goes on for so long after handing over."""


@dataclass(frozen=True, slots=True)
class StoodIn:
    """A message of weight 0 is sent for this round: what the trainer has computed is for the next."""

    key: Key


@dataclass(frozen=True, slots=True)
class SendContribution:
    """Send this payload to the reducer of `part` until it answers or the round is over, and collect the reply."""

    key: Key
    part: int
    reducer: bytes
    row: Row
    payload: bytes
    signature: bytes


@dataclass(frozen=True, slots=True)
class Reduce:
    """Freeze the reply of one part from these contributions, and attest to it; answer with ReplyHeld."""

    key: Key
    part: int
    start: int
    end: int
    group: Group
    """The round's members."""
    contributions: tuple[Contribution, ...]
    """In members' order."""


@dataclass(frozen=True, slots=True)
class Audit:
    """Have this reducer show what it summed for a sealed reply, and repeat the sum; answer with Audited."""

    key: Key
    part: int
    shape: RoundShape
    reducer: bytes
    reply: bytes


@dataclass(frozen=True, slots=True)
class SendProof:
    """Hand a proof to a peer that may seal soon."""

    sealer: bytes
    reducer: bytes
    proof: bytes


@dataclass(frozen=True, slots=True)
class PublishSeal:
    """We sealed: journal it, then tell every follower."""

    sealed: SealedRound


@dataclass(frozen=True, slots=True)
class Apply:
    """Journal this sealed round and hand it to the trainer."""

    sealed: SealedRound
    state: ChainState
    shape: RoundShape
    index: int | None
    """Our place among the members of that round, or None."""
    contributed: bool
    """Whether the payloads of our ContributionReady were sent (not a weight-0 message in their stead)."""


@dataclass(frozen=True, slots=True)
class Rollback:
    """Undo the last applied seal: the chain stands at `state` again."""

    state: ChainState


@dataclass(frozen=True, slots=True)
class FetchRounds:
    """Ask `donor` for the sealed rounds after the newest id of `locator` that it knows."""

    donor: bytes
    locator: Sequence[bytes]


@dataclass(frozen=True, slots=True)
class Resync:
    """Load a snapshot from `donor`: its chain is better and forks off deeper than we can undo, or roots differ."""

    donor: bytes
    why: str


@dataclass(frozen=True, slots=True)
class SendJoin:
    """Ask this peer to admit us by the next seal."""

    sealer: bytes


@dataclass(frozen=True, slots=True)
class SendStatements:
    """Hand these statements, which the chain lacks, to a peer that may seal soon."""

    sealer: bytes
    statements: tuple[Statement, ...]


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A member seals again and again without most replies, though we hold them: we accuse it."""

    round: int
    sealer: bytes
    members: tuple[bytes, ...]
    """Whose work in these replies no part of the seal has."""


@dataclass(frozen=True, slots=True)
class Note:
    """Something an owner should read: a takeover, a fork, a solo seal."""

    kind: str
    text: str


Effect = (
    StartRound
    | StoodIn
    | SendContribution
    | Reduce
    | Audit
    | SendProof
    | PublishSeal
    | Apply
    | Rollback
    | FetchRounds
    | Resync
    | SendJoin
    | SendStatements
    | LeftOut
    | Note
)
