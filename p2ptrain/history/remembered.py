"""What fork choice needs to remember through a restart: the chain up to the head, and who was last on it with us.

The chain is computed anew from the seals that were kept, or from the journal where that and a snapshot under it reach
back further. With whom this peer last shared a state is a small file of its own: alone, a peer seals rounds of which
nobody else knows, and when it meets the others those members are all there is to judge by (docs/rounds.md, rule 9).
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from pathlib import Path

import msgspec

from p2ptrain import chain
from p2ptrain.chain import ChainState, PeerId, SealError
from p2ptrain.chain.forks import PAST_MAX, Mark
from p2ptrain.chain.sealed import SealedRoundError
from p2ptrain.state.files import atomic_write
from p2ptrain.state.journal import Journal
from p2ptrain.state.seals import Opening, SealLog, Walk
from p2ptrain.state.snapshot import SnapshotStore
from p2ptrain.state.tensors import TensorFileError
from p2ptrain.swarm.identity import verify

_logger = logging.getLogger(__name__)
_decoder = msgspec.msgpack.Decoder(tuple[PeerId, ...])


def past_of(
    head: ChainState,
    beginning: ChainState,
    journal: Journal,
    snapshots: SnapshotStore,
    snapshot_chain: Callable[[bytes], ChainState],
    chunks: int,
    seals: SealLog | None = None,
) -> list[Mark]:
    """Return the last marks of the chain that ends at `head`, oldest first, as far back as is known from the disk.

    Args:
        beginning: the chain before its first seal.
        snapshot_chain: where on the chain a snapshot's bytes stand; raises TensorFileError.
        seals: those of this peer's chain; None: none are kept.
    """
    try:
        marks = _from_journal(journal, _base(journal, snapshots, snapshot_chain, beginning), chunks)
    except (SealError, SealedRoundError, TensorFileError, OSError) as error:
        _logger.warning("of the chain up to here nothing but its end is known: %s", error)
        marks = []
    known = marks if marks and marks[-1].id == head.id else [Mark.of(head)]
    return max(known, [] if seals is None else _from_seals(seals, head), key=len)


def _from_seals(log: SealLog, head: ChainState) -> list[Mark]:
    """The marks up to the head, but for that of the run's beginning; none where the seals do not lead to it."""
    marks: list[Mark] = []
    walk: Walk | None = None
    try:
        for entry in log.since(head.round - PAST_MAX):
            if isinstance(entry, Opening):
                walk = walk or Walk(entry, verify)
                walk.restart(entry)
                _cut(marks, entry.state.id)
                marks = marks or [Mark.of(entry.state)]
            elif walk is not None:
                deque(walk.take(entry), maxlen=0)
                seal = walk.pending[-1].seal
                _cut(marks, seal.parent)
                marks.append(Mark.of(walk.head, seal, marks[-1]))
    except SealError as error:
        _logger.warning("of the seals that were kept not all can be read: %s", error)
    _cut(marks, head.id)
    return [mark for mark in marks[-PAST_MAX:] if mark.round]


def _cut(marks: list[Mark], identifier: bytes) -> None:
    """Drop all after the mark of this id; all of them where it is not there."""
    while marks and marks[-1].id != identifier:
        marks.pop()


def _base(
    journal: Journal, snapshots: SnapshotStore, snapshot_chain: Callable[[bytes], ChainState], beginning: ChainState
) -> ChainState | None:
    """The oldest state that the journal continues and of which the members are at hand."""
    if journal.position(beginning.id) == 0:
        return beginning
    ours = [snapshot for snapshot in snapshots.all() if journal.position(snapshot.id) == snapshot.round]
    return snapshot_chain(ours[-1].read()) if ours else None


def _from_journal(journal: Journal, base: ChainState | None, chunks: int) -> list[Mark]:
    if base is None:
        return []
    state, marks = base, [Mark.of(base)]
    for number in range(base.round + 1, journal.last + 1):
        sealed = journal.read(number)
        state = chain.extend(state, sealed.id, sealed.seal, chunks)
        marks.append(Mark.of(state, sealed.seal, marks[-1]))
    return marks


def write_company(path: Path, members: frozenset[bytes]) -> None:
    """Keep the members of the last state that was shared with another peer. Raises OSError."""
    atomic_write(path, msgspec.msgpack.encode(sorted(members)))


def read_company(path: Path) -> frozenset[bytes]:
    """Return what `write_company` kept; nobody where there is none, or a file that cannot be read."""
    try:
        return frozenset(_decoder.decode(path.read_bytes()))
    except FileNotFoundError:
        return frozenset()
    except (OSError, msgspec.MsgspecError) as error:
        _logger.warning("%s cannot be read: %s", path, error)
        return frozenset()
