"""What fork choice needs to remember through a restart: the chain up to the head, and who was last on it with us.

The chain is computed anew from the journal, as far as that and a snapshot under it reach. With whom this peer last
shared a state is a small file of its own: alone, a peer seals rounds on which the journal of others has nothing, and
when it meets them again those members are all there is to judge by (docs/rounds.md, rule 9).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import msgspec

from p2ptrain import chain
from p2ptrain.chain import ChainState, PeerId, SealError
from p2ptrain.chain.forks import Mark
from p2ptrain.chain.sealed import SealedRoundError
from p2ptrain.state.files import atomic_write
from p2ptrain.state.journal import Journal
from p2ptrain.state.snapshot import SnapshotStore
from p2ptrain.state.tensors import TensorFileError

_logger = logging.getLogger(__name__)
_decoder = msgspec.msgpack.Decoder(tuple[PeerId, ...])


def past_of(
    head: ChainState,
    beginning: ChainState,
    journal: Journal,
    snapshots: SnapshotStore,
    snapshot_chain: Callable[[bytes], ChainState],
    chunks: int,
) -> list[Mark]:
    """Return the marks of the chain that ends at `head`, oldest first, as far back as journal and snapshots reach.

    Args:
        beginning: the chain before its first seal.
        snapshot_chain: where on the chain a snapshot's bytes stand; raises TensorFileError.
    """
    try:
        marks = _from_journal(journal, _base(journal, snapshots, snapshot_chain, beginning), chunks)
    except (SealError, SealedRoundError, TensorFileError, OSError) as error:
        _logger.warning("of the chain up to here nothing but its end is known: %s", error)
        marks = []
    return marks if marks and marks[-1].id == head.id else [Mark.of(head)]


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
