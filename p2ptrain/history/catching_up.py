"""Getting the rounds that others have and we lack, and handing out ours.

The same calls serve a peer one seal behind, a newcomer, and one that changes to another chain: rounds that continue an
id both know, or a snapshot with the rounds since. Everything is checked before it counts: seals and replies one by one,
pieces under the root, the root against a later seal. Whether the donor's chain is the swarm's is for fork choice to
say (`chain/forks.py`).

Lives on the network thread. Worker threads read and hash for it: what they need is given to them whole, and what they
find is returned.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from pathlib import Path

from p2ptrain import chain
from p2ptrain.calls.client import Client
from p2ptrain.calls.messages import (
    LOCATOR_MAX,
    ROUNDS_MAX,
    SNAPSHOTS_MAX,
    CallError,
    SnapshotOffer,
    Tip,
)
from p2ptrain.chain import ChainState, SealError, SignedSeal
from p2ptrain.chain.forks import PAST_MAX, Mark, Past
from p2ptrain.chain.seal import PROOF_MAX_BYTES
from p2ptrain.chain.sealed import SealedRound, check_continues, decode_sealed
from p2ptrain.compression import wire
from p2ptrain.compression.codec import Codec
from p2ptrain.history.download import Download
from p2ptrain.history.earlier import NOTHING, Earlier, seals_before
from p2ptrain.rounds.events import RoundsFetched
from p2ptrain.rounds.inbox import Restore
from p2ptrain.state.journal import Journal, JournalFile
from p2ptrain.state.pieces import Partials, PieceFile
from p2ptrain.state.seals import Opening, SealLog, Walk, opening_at
from p2ptrain.state.snapshot import SnapshotFile, SnapshotStore
from p2ptrain.state.tensors import TensorFileError, mapped
from p2ptrain.swarm.identity import verify

ROUNDS_ANSWER_BYTES = 64 * 1024 * 1024
"""Sealed rounds in one answer stop here, after at least one."""
SYNC_BYTES = 1024 * 1024 * 1024
"""Rounds held in memory while switching to another chain."""
SEALS_ANSWERS_MAX = 16
"""Of seals, of a fork that is older than its donor's journal: 8 MiB of them in all, of an honest donor."""
SHOWN_SECONDS = 20.0
"""For all these answers, and for checking them."""
SHOWN_MEMBERS_MAX = 2**19
"""Of the marks of such a fork, all together, each counted again where they change: some 32 MiB of memory."""

_logger = logging.getLogger(__name__)


class CatchingUp:
    """See the module docstring.

    Args:
        peers: who may have a snapshot too.
        beginning: the chain before its first seal.
        root_interval: rounds between snapshots.
        snapshot_max_bytes: no snapshot of this run is longer.
        snapshot_chain: where on the chain a snapshot's bytes stand; raises TensorFileError. Any thread.
        progress: hears (what, done, of).
        seals: of our chain, for longer than the journal has rounds; None: none are kept.
    """

    def __init__(
        self,
        client: Client,
        codec: Codec,
        journal: Journal,
        snapshots: SnapshotStore,
        partials: Partials,
        peers: Callable[[], list[bytes]],
        beginning: ChainState,
        root_interval: int,
        snapshot_max_bytes: int,
        snapshot_chain: Callable[[bytes], ChainState],
        progress: Callable[[str, int, int], None],
        seals: SealLog | None = None,
    ) -> None:
        self._seals = seals
        self._client, self._codec, self._journal, self._snapshots = client, codec, journal, snapshots
        self._partials, self._peers = partials, peers
        self._beginning = beginning
        self._root_interval, self._snapshot_max_bytes = root_interval, snapshot_max_bytes
        self._snapshot_chain, self._progress = snapshot_chain, progress
        #: what is being fetched, which others may have of us already
        self._download: Download | None = None
        #: whole snapshots handed out lately
        self._whole: dict[Path, PieceFile] = {}
        self._hashing = asyncio.Lock()
        #: round -> root that a seal of our chain names
        self._sealed_roots: dict[int, bytes] = {}
        for number in range(journal.first, journal.last + 1):
            self.note_root(journal.read(number))
        self._round_max_bytes = (
            chain.SEAL_MAX_BYTES
            + 2 * wire.reply_max_bytes(codec, 0, codec.chunks, chain.MEMBERS_MAX)
            + chain.PROOFS_MAX * PROOF_MAX_BYTES
        )

    def note_root(self, sealed: SealedRound) -> None:
        """A round of our chain: remember the root that it seals, if any."""
        if sealed.seal.root:
            self._sealed_roots[self._root_round(sealed)] = sealed.seal.root
            for old in sorted(self._sealed_roots)[:-SNAPSHOTS_MAX]:
                del self._sealed_roots[old]

    def _root_round(self, sealed: SealedRound) -> int:
        """The round that a seal's root is of."""
        return chain.root_round(sealed.seal.round, self._root_interval)

    def _sealed_snapshots(self) -> list[SnapshotFile]:
        """Ours whose root is sealed, newest first: the others may be of a replica gone wrong."""
        return [s for s in self._snapshots.all() if self._sealed_roots.get(s.round) == s.root]

    # ---- handing out ------------------------------------------------------------------------------------------

    async def offer_rounds(self, locator: tuple[bytes, ...]) -> tuple[bytes, list[bytes], tuple[SnapshotOffer, ...]]:
        """(ancestor, encoded rounds after it, snapshots to start from instead)."""
        positions = ((identifier, self._journal.position(identifier)) for identifier in locator)
        ancestor, position = next(((i, p) for i, p in positions if p is not None), (b"", None))
        files = [] if position is None else self._journal.files_after(position, ROUNDS_MAX)
        rounds, offers = await asyncio.to_thread(_read_offer, files, self._snapshots, dict(self._sealed_roots))
        if len(rounds) < min(1, len(files)) or not self._journal.keeps(files[: len(rounds)]):
            return b"", [], offers  # rolled back or pruned meanwhile
        return ancestor, rounds, offers

    async def open_snapshot(self, identifier: bytes, root: bytes) -> PieceFile | None:
        """One of our snapshots, or what there is of the one that we are fetching."""
        # Looked at before waiting: what is being fetched may be in the store, and no download any more, by then.
        download = self._download
        offer = None if download is None else download.offer
        if isinstance(offer, SnapshotOffer) and (offer.id, offer.root) == (identifier, root):
            return None if download is None else download.file
        found = await asyncio.to_thread(_find_whole, self._snapshots, identifier, root)
        if found is None:
            return None
        whole = self._whole.setdefault(found.path, found)
        for old in list(self._whole)[:-SNAPSHOTS_MAX]:
            del self._whole[old]
        return whole

    async def hashes_of(self, file: PieceFile) -> list[bytes]:
        """Of all pieces; one file is read at a time. Raises OSError when it is gone."""
        async with self._hashing:
            return await asyncio.to_thread(file.hashes)

    def forget_partial(self) -> None:
        """We came by the swarm's state in another way: remove what is left of a snapshot being fetched."""
        if self._download is None:
            self._partials.keep_only(None)

    # ---- fetching ---------------------------------------------------------------------------------------------

    async def fetch(
        self,
        donor: bytes,
        locator: tuple[bytes, ...],
        our_round: int,
        known_state: Callable[[bytes], ChainState | None],
        past: Past | None = None,
    ) -> RoundsFetched:
        """Rounds of `donor` that continue one of the ids in `locator`, of which `known_state` has the chain state.

        Args:
            past: of our chain. Where the donor's journal does not reach back to it, or takes more than one answer to
                hand out a fork, this finds where the two chains parted, and the donor's seals since.

        Raises:
            CallError: no answer.
            SealedRoundError: nonsense.
        """
        header, encoded = await self._client.rounds(donor, locator, self._round_max_bytes)
        newer = any(offer.round > our_round for offer in header.snapshots)
        if not header.ancestor or (newer and our_round == 0 and self._is_far(header.tip, our_round)):
            # For a newcomer a snapshot is less to fetch and to compute than all the rounds. Who has sent something
            # needs the rounds: they say what became of it.
            parted_at = header.parted_at
            shown: tuple[Mark, ...] = ()
            if past is not None and not header.ancestor and parted_at in locator:
                parted_at = await self._parted_at(donor, locator, parted_at, past.between)
                shown = await self._shown(donor, past.get(parted_at), our_round)
            return RoundsFetched(donor, None, (), parted_at=parted_at, shown=shown)
        rounds = await asyncio.to_thread(_decode, encoded)
        ids = [header.ancestor, *(sealed.id for sealed in rounds)]
        shown = ()
        if past is not None and rounds and header.tip.round > rounds[-1].seal.round:
            common = past.last_common(ids)
            shown = await self._shown(donor, None if common is None else past.get(ids[common]), our_round)
        for place in range(len(ids) - 1, -1, -1):
            # From the last state of ours that it goes through; what is before that we have.
            state = known_state(ids[place])
            if state is not None:
                await asyncio.to_thread(_check, state, rounds[place:], self._codec)
                return RoundsFetched(donor, ids[place], rounds[place:], shown=shown)
        return RoundsFetched(donor, header.ancestor, rounds, checked=False, shown=shown)

    async def _shown(self, donor: bytes, common: Mark | None, our_round: int) -> tuple[Mark, ...]:
        """Marks of the donor's chain by its seals, from a state of ours on, that one first; none: it does not show it.

        A peer that has gone on from there counts who sealed on its own branch. So that it counts those of the other
        alike, however long ago they sealed, it looks at all seals since, which are kept for longer than rounds are.
        """
        if self._seals is None or common is None or common.round >= our_round:
            return ()
        try:
            start = await asyncio.to_thread(opening_at, self._seals, common.round, common.id, verify)
            if start is None:
                return ()
            walk, marks = Walk(start, verify), [Mark.of(start.state)]
            async with asyncio.timeout(SHOWN_SECONDS):
                for _ in range(SEALS_ANSWERS_MAX):
                    header, seals = await self._client.seals(donor, walk.head.round, walk.head.id, 1)
                    if header.opening:
                        return ()  # its seals do not reach back so far
                    await asyncio.to_thread(_follow, walk, marks, seals)
                    if not seals or walk.head.id == header.tip.id:
                        return tuple(marks)
        except (CallError, SealError, OSError) as error:  # that it took too long is an OSError
            _logger.debug("no seals of a fork: %s", error)
        return ()

    async def _parted_at(
        self,
        donor: bytes,
        locator: tuple[bytes, ...],
        parted_at: bytes,
        between: Callable[[bytes, bytes, int], Sequence[bytes]],
    ) -> bytes:
        """The newest state of our chain that the donor's went through, given the newest in `locator`. CallError."""
        while (place := locator.index(parted_at)) > 0:
            closer = tuple(between(parted_at, locator[place - 1], LOCATOR_MAX))
            if len(closer) <= 1:
                break
            header, _ = await self._client.rounds(donor, closer, self._round_max_bytes)
            if header.ancestor or header.parted_at not in closer:
                break
            # What is newer than these is what they were asked for to be older than.
            locator, parted_at = (locator[place - 1], *closer), header.parted_at
        return parted_at

    async def change_chain(
        self, donor: bytes, parted_at: Mark | None = None
    ) -> tuple[Restore, ChainState, tuple[Mark, ...]]:
        """What it takes to go over to the donor's chain, where that stands, and its last marks, oldest first.

        Starts from what both have: the newest snapshot of ours that the donor's journal continues, or the run's
        beginning; else, or as a newcomer to a long chain, from a snapshot of the donor's, with its seals before that.

        Args:
            parted_at: where our chain and the donor's parted, where that is known.

        Raises:
            CallError: the donor is gone, or has no way for us to its chain.
            SealedRoundError, TensorFileError: nonsense.
        """
        # Those on our chain: what is left of a branch that was undone has nothing to say of what became of our work.
        ours = {s.id: s for s in self._sealed_snapshots() if self._journal.position(s.id) is not None}
        run_id = self._client.run_id
        locator = (*list(ours)[: LOCATOR_MAX - 1], run_id)
        header, encoded = await self._client.rounds(donor, locator, self._round_max_bytes)
        snapshot = ours.get(header.ancestor)
        base_round = snapshot.round if snapshot else 0
        wanted = self._choose(header.snapshots, base_round)
        downloaded = (
            wanted is not None
            and wanted.id not in ours
            and (not header.ancestor or (self._journal.last == 0 and self._is_far(header.tip, base_round)))
        )
        if wanted is not None and downloaded:
            snapshot = await self._fetch_snapshot(donor, wanted)
            header, encoded = await self._client.rounds(donor, (snapshot.id,), self._round_max_bytes)
        if not header.ancestor:
            raise CallError("it has neither our history nor a snapshot to start from")
        base, data = self._beginning, None
        if snapshot is not None:
            data = await asyncio.to_thread(snapshot.read)
            base = self._snapshot_chain(data)
            await asyncio.to_thread(_check_access, base, self._beginning)
        earlier = await self._earlier(donor, base, parted_at) if downloaded else NOTHING
        rounds, state, marks = await self._to_tip(donor, base, earlier.marks, header.tip.round, encoded)
        if snapshot is not None and downloaded and not self._root_is_sealed(snapshot, rounds):
            snapshot.path.unlink(missing_ok=True)
            raise CallError("the root of its snapshot is not sealed")
        return Restore(data, base, rounds, not downloaded, earlier.entries), state, marks

    async def _earlier(self, donor: bytes, base: ChainState, parted_at: Mark | None) -> Earlier:
        """The donor's seals up to its snapshot, from where our chains parted or from the run's beginning. CallError."""
        if self._seals is None:
            return NOTHING
        start = None
        if parted_at is not None and parted_at.round < base.round:
            start = await asyncio.to_thread(opening_at, self._seals, parted_at.round, parted_at.id, verify)
        start = Opening(self._codec.chunks, self._beginning) if start is None else start
        return await seals_before(self._client, donor, start, base)

    def adopt(self, restore: Restore) -> None:
        """Make the fetched chain ours on disk."""
        if self._journal.position(restore.chain.id) is not None:
            self._journal.truncate(restore.chain.round)
        else:
            self._journal.restart_at(restore.chain.id)
        self._snapshots.drop_after(restore.chain.round)
        for sealed in restore.rounds:
            self._journal.append(sealed)
            self.note_root(sealed)

    def _root_is_sealed(self, snapshot: SnapshotFile, rounds: tuple[SealedRound, ...]) -> bool:
        """Whether the rounds after a snapshot name its root, by more sealers than any other root for its round."""
        sealers = defaultdict[bytes, set[bytes]](set)
        for sealed in rounds:
            if sealed.seal.root and self._root_round(sealed) == snapshot.round:
                sealers[sealed.seal.root].add(sealed.seal.sealer)
        ours = sealers.pop(snapshot.root, set())
        return len(ours) > max(map(len, sealers.values()), default=0)

    def _is_far(self, tip: Tip, round: int) -> bool:
        return tip.round - round > 2 * self._root_interval

    def _choose(self, offers: tuple[SnapshotOffer, ...], after: int) -> SnapshotOffer | None:
        """The one after that round which we have begun to fetch, else the newest."""
        begun = [o for o in offers if o.round > after and self._partials.path(o.round, o.id, o.root).exists()]
        return max(begun or offers, key=lambda offer: offer.round, default=None)

    async def _fetch_snapshot(self, donor: bytes, offer: SnapshotOffer) -> SnapshotFile:
        """From the donor, and whoever else has it, into our store; its root may yet turn out not to be sealed."""
        before = await asyncio.to_thread(self._snapshots.find, offer.id)
        if before is not None and before.root == offer.root:
            return before  # its donor was gone before we had the rounds since
        if not 0 < offer.length <= self._snapshot_max_bytes:
            raise CallError(f"a snapshot of {offer.length} bytes, at most {self._snapshot_max_bytes} are possible")

        def progress(done: int, total: int) -> None:
            self._progress("snapshot", done, total)

        download = Download(self._client, offer, self._partials, self._peers, progress)
        self._download = download
        try:
            path = (await download.run(donor)).path
            try:
                state = await asyncio.to_thread(_chain_at, path, self._snapshot_chain)
                if (state.round, state.id) != (offer.round, offer.id):
                    raise CallError("the snapshot stands elsewhere than announced")
            except (CallError, TensorFileError):
                self._partials.keep_only(None)
                raise
            taken = await asyncio.to_thread(self._snapshots.take, path, offer.round, offer.id, offer.root)
            self._partials.keep_only(None)
            return taken
        finally:
            self._download = None

    async def _to_tip(
        self, donor: bytes, base: ChainState, before: Sequence[Mark], tip_round: int, encoded: list[bytes]
    ) -> tuple[tuple[SealedRound, ...], ChainState, tuple[Mark, ...]]:
        """All rounds from `base` on, checked, the chain after them, and the last marks on the way there."""
        rounds: list[SealedRound] = []
        marks = deque(before or [Mark.of(base)], maxlen=PAST_MAX)
        state, size = base, 0
        while encoded:
            batch = await asyncio.to_thread(_decode, encoded)
            for sealed, after in zip(batch, await asyncio.to_thread(_check, state, batch, self._codec), strict=True):
                state = after
                marks.append(Mark.of(state, sealed.seal, marks[-1]))
            rounds += batch
            size += sum(map(len, encoded))
            self._progress("rounds", state.round, max(state.round, tip_round))
            if size > SYNC_BYTES:
                raise CallError("its rounds since the last snapshot are too long")
            header, encoded = await self._client.rounds(donor, (state.id,), self._round_max_bytes)
            if header.ancestor != state.id:
                raise CallError("its chain changed meanwhile")
        return tuple(rounds), state, tuple(marks)


def _decode(encoded: list[bytes]) -> tuple[SealedRound, ...]:
    """Raises SealedRoundError."""
    return tuple(decode_sealed(one, verify) for one in encoded)


def _follow(walk: Walk, marks: list[Mark], seals: Sequence[SignedSeal]) -> None:
    """Take these seals, and the marks of what they lead to. Raises SealError: also, they have too many members."""
    listed = sum(_listed(mark, before) for before, mark in itertools.pairwise(marks))
    for signed in seals:
        deque(walk.take(signed), maxlen=0)
        seal = walk.pending[-1].seal
        while marks and marks[-1].id != seal.parent:
            marks.pop()
        if not marks:
            raise SealError("its chain parts from ours before it says that it does")
        marks.append(Mark.of(walk.head, seal, marks[-1]))
        listed += _listed(marks[-1], marks[-2])
        if listed > SHOWN_MEMBERS_MAX:
            raise SealError("its members change too often to be remembered")


def _listed(mark: Mark, before: Mark) -> int:
    """How many members a mark takes memory for; those that it has as the one before it share theirs."""
    return len(mark.newcomers) + (mark.members is not before.members) * len(mark.members)


def _check(state: ChainState, rounds: tuple[SealedRound, ...], codec: Codec) -> list[ChainState]:
    """The chain after each of `rounds`. Raises SealedRoundError."""
    states = []
    for sealed in rounds:
        state = check_continues(state, sealed, codec, verify)
        states.append(state)
    return states


def _check_access(state: ChainState, beginning: ChainState) -> None:
    """Check whom a snapshot's state has let in, by the statements in it alone. Raises CallError."""
    if not state.access.continues(beginning.access, state.run_id):
        raise CallError("its snapshot has let in or shut out peers without a word of whom it takes")
    if not all(state.access.knows(member.peer_id) for member in state.now + state.following):
        raise CallError("its snapshot has members that the run was never for")


def _chain_at(path: Path, snapshot_chain: Callable[[bytes], ChainState]) -> ChainState:
    """Where on the chain the snapshot in a file stands. Raises TensorFileError."""
    return snapshot_chain(mapped(path))


def _read_offer(
    files: list[JournalFile], snapshots: SnapshotStore, sealed_roots: dict[int, bytes]
) -> tuple[list[bytes], tuple[SnapshotOffer, ...]]:
    """What these files hold, as far as they are there and fit an answer, and the snapshots whose root is sealed."""
    offers, rounds = [], []
    for snapshot in snapshots.all():
        if sealed_roots.get(snapshot.round) == snapshot.root:
            # The trainer removes old ones meanwhile.
            with contextlib.suppress(FileNotFoundError):
                length = snapshot.path.stat().st_size
                offers.append(SnapshotOffer(snapshot.round, snapshot.id, snapshot.root, length))
    size = 0
    for file in files:
        try:
            rounds.append(file.path.read_bytes())
        except FileNotFoundError:
            return [], tuple(offers)
        size += len(rounds[-1])
        if size > ROUNDS_ANSWER_BYTES:
            break
    return rounds, tuple(offers)


def _find_whole(snapshots: SnapshotStore, identifier: bytes, root: bytes) -> PieceFile | None:
    """A snapshot that is there whole."""
    found = snapshots.find(identifier)
    if found is None or found.root != root:
        return None
    try:
        return PieceFile(found.path, found.path.stat().st_size)
    except FileNotFoundError:
        return None
