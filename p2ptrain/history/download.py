"""Fetches one snapshot, or one file of the run, from everybody who has it, or has some of it.

`PiecePlan` decides who is asked for what; here are the calls, and the file that the pieces go to. Each piece is checked
against the root before it is written, so donors need no trust, and the file is good for others from the first piece on.

The hashes of all pieces come first, `HASHES_MAX` at a time, because a long file has many: 6 MB of them for 100 GB.
They prove to be right only when all of one donor's are there.

Cost: at most `DONORS_MAX` pieces in memory, and before them the hashes of `HASHES_FROM` donors; a small call to some
known peers every `ASK_AROUND_SECONDS`.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Awaitable, Callable, Collection, Coroutine
from typing import Any

from p2ptrain.calls.client import Client, PiecesAnswer
from p2ptrain.calls.messages import (
    HASHES_MAX,
    PIECES_MAX,
    TOO_MANY_CALLS,
    CallError,
    RefusedError,
    SnapshotOffer,
)
from p2ptrain.errors import P2PTrainError
from p2ptrain.history.piece_plan import PiecePlan
from p2ptrain.state.pieces import Partials, PieceFile, pieces_of
from p2ptrain.state.run_files import RunFile
from p2ptrain.state.snapshot import root_of
from p2ptrain.swarm.identity import format_peer_id

ASK_AROUND_SECONDS = 4.0
ASKED_AROUND = 16
"""Peers that are asked each time what they hold, those not asked for longest first."""
HASHES_SECONDS = 60.0
HASHES_FROM = 3
"""Donors asked for the hashes of all pieces at a time."""
STALL_SECONDS = 60.0
"""Without any piece for so long, the download is given up; what is there stays for the next."""
_TICK_SECONDS = 0.25
"""How late a pause's end or a crawling donor may be noticed."""

_logger = logging.getLogger(__name__)


class Download:
    """See the module docstring. To be run once, on the network thread.

    Args:
        offer: what to fetch; nothing of a file depends on who says so, as the manifest names it.
        peers: whom to ask, as they come to be known.
        progress: hears (bytes on disk, of).
        looked: hears (bytes, of) while what an earlier process left is looked at. On another thread.
        reach: makes sure of a connection to a peer before it is asked what it holds; may raise P2PTrainError.
        wanted: the pieces to fetch; None: all.
    """

    def __init__(
        self,
        client: Client,
        offer: SnapshotOffer | RunFile,
        partials: Partials,
        peers: Callable[[], list[bytes]],
        progress: Callable[[int, int], None],
        looked: Callable[[int, int], None] = lambda done, of: None,
        reach: Callable[[bytes], Awaitable[None]] | None = None,
        wanted: Collection[int] | None = None,
    ) -> None:
        self.offer = offer
        self._unwanted = frozenset(range(pieces_of(offer.length)) if wanted is not None else ()) - {*(wanted or ())}
        #: what there is of it; None before the hashes of its pieces are known
        self.file: PieceFile | None = None
        self._partials, self._peers, self._progress, self._reach = partials, peers, progress, reach
        self._looked = looked
        self._fetch: Callable[..., Coroutine[Any, Any, PiecesAnswer]]
        if isinstance(offer, RunFile):
            self._what, self._path = "file", partials.path_of_file(offer.root)
            self._fetch = lambda peer, *numbers, **options: client.file(peer, offer, *numbers, **options)
        else:
            self._what, self._path = "snapshot", partials.path(offer.round, offer.id, offer.root)
            self._fetch = lambda peer, *numbers, **options: client.snapshot(peer, offer, *numbers, **options)
        self._me = client.node.peer_id
        self._plan = PiecePlan(pieces_of(offer.length), self._me)
        #: calls for hashes or a piece under way -> donor, one each
        self._calls: dict[asyncio.Task[PiecesAnswer], bytes] = {}
        #: calls that were given up because another was faster
        self._outrun: list[asyncio.Task[PiecesAnswer]] = []
        #: calls that ask what a peer holds
        self._questions: dict[asyncio.Task[PiecesAnswer], bytes] = {}
        #: peer -> when it was asked last what it holds
        self._asked_at: dict[bytes, float] = {}
        #: donor -> the hashes that it has sent so far
        self._lists: dict[bytes, bytearray] = {}
        self._ask_due = self._came_at = 0.0
        #: pieces that came
        self.came = 0

    async def run(self, donor: bytes | None = None) -> PieceFile:
        """Fetch it, from `donor` and whoever else has it, and return the file, its pieces checked, still a partial one.

        Raises:
            CallError: nobody hands it out, or it comes no further.
            OSError: the disk does not take it.
        """
        if pieces_of(self.offer.length) > PIECES_MAX:
            raise CallError(f"a {self._what} of {self.offer.length} bytes has too many pieces")
        wanted = self._path, self.offer.length, self.offer.root
        self._use(await asyncio.to_thread(self._partials.resume, *wanted, self._looked))
        self._came_at = self._now()
        if donor is not None:
            self._ask(donor)
        try:
            while not self._plan.done:
                self._ask_around()
                self._hand_out_work()
                under_way = [*self._questions, *self._calls]
                if under_way:
                    await asyncio.wait(under_way, timeout=_TICK_SECONDS, return_when=asyncio.FIRST_COMPLETED)
                else:
                    await asyncio.sleep(_TICK_SECONDS)
                await self._take_answers()
                if self._plan.hopeless and not self._questions and not self._calls:
                    raise CallError(f"nobody hands out the {self._what} any more")
                if self._now() - self._came_at > STALL_SECONDS:
                    raise CallError(f"no piece of the {self._what} came for {STALL_SECONDS:.0f} s")
        finally:
            left = [*self._questions, *self._calls, *self._outrun]
            for task in left:
                task.cancel()
            await asyncio.gather(*left, return_exceptions=True)
        assert self.file is not None
        return self.file

    def _now(self) -> float:
        return asyncio.get_running_loop().time()

    # ---- asking -----------------------------------------------------------------------------------------------

    def _ask_around(self) -> None:
        """From time to time: what do others hold?"""
        now = self._now()
        if now < self._ask_due:
            return
        self._ask_due = now + ASK_AROUND_SECONDS
        under_way = list(self._questions.values())
        peers = [p for p in self._peers() if p != self._me and p not in under_way and self._plan.wants_news_of(p)]
        # Learners that come together ask each other in different orders.
        peers.sort(key=lambda peer: (self._asked_at.get(peer, 0.0), hashlib.sha256(self._me + peer).digest()))
        for peer in peers[: max(0, ASKED_AROUND - len(under_way))]:
            self._ask(peer)
        self._asked_at = {peer: at for peer, at in self._asked_at.items() if peer in peers or peer in under_way}

    def _ask(self, peer: bytes) -> None:
        self._asked_at[peer] = self._now()
        self._questions[self._start(self._question(peer))] = peer

    async def _question(self, peer: bytes) -> PiecesAnswer:
        if self._reach is not None:
            try:
                await self._reach(peer)
            except P2PTrainError as error:
                raise CallError(str(error)) from error
        return await self._fetch(peer)

    def _hand_out_work(self) -> None:
        now = self._now()
        busy = list(self._calls.values())
        for donor in self._plan.idle(now):
            if donor in busy:
                continue
            if self.file is None:
                if len(self._calls) < HASHES_FROM:
                    first = len(self._lists.get(donor, b"")) // 32
                    end = min(first + HASHES_MAX, pieces_of(self.offer.length))
                    call = self._fetch(donor, first, end, hashes=True, timeout_seconds=HASHES_SECONDS)
                    self._calls[self._start(call)] = donor
                continue
            piece = self._plan.next_for(donor, now)
            if piece is not None:
                seconds = self._plan.deadline_seconds
                call = self._fetch(donor, piece, piece + 1, timeout_seconds=seconds)
                self._calls[self._start(call)] = donor

    def _start(self, call: Coroutine[Any, Any, PiecesAnswer]) -> asyncio.Task[PiecesAnswer]:
        return asyncio.create_task(call)

    # ---- hearing ----------------------------------------------------------------------------------------------

    async def _take_answers(self) -> None:
        for task in [task for task in self._questions if task.done()]:
            peer = self._questions.pop(task)
            try:
                self._plan.holds(peer, task.result().held)
            except CallError as error:
                _logger.debug("%s has nothing of the %s: %s", format_peer_id(peer)[-8:], self._what, error)
        for task in [task for task in self._calls if task.done()]:
            donor = self._calls.pop(task, None)
            if donor is None:
                continue  # it lost its race just now
            try:
                answer = task.result()
            except CallError as error:
                self._disappointed(donor, error)
                continue
            if answer.pieces:
                await self._take_piece(donor, answer)
            elif self.file is None:
                await self._take_hashes(donor, answer)

    def _disappointed(self, donor: bytes, error: CallError) -> None:
        _logger.debug("%s hands out no piece: %s", format_peer_id(donor)[-8:], error)
        if not isinstance(error, RefusedError):
            self._plan.failed(donor, self._now())
        elif str(error) == TOO_MANY_CALLS:
            self._plan.later(donor, self._now())
        else:
            self._plan.gone(donor)

    async def _take_hashes(self, donor: bytes, answer: PiecesAnswer) -> None:
        known, pieces = self._lists.setdefault(donor, bytearray()), pieces_of(self.offer.length)
        known += answer.hashes
        if len(known) < 32 * pieces and len(answer.hashes) == 32 * HASHES_MAX:
            self._came_at = self._now()
            return
        hashes = [bytes(known[i : i + 32]) for i in range(0, len(known), 32)]
        if len(known) != 32 * pieces or root_of(self.offer.length, hashes) != self.offer.root:
            del self._lists[donor]
            self._lied(donor, "hashes")
            return
        self._lists.clear()
        self._use(await asyncio.to_thread(self._partials.begin, self._path, self.offer.length, hashes))
        self._came_at = self._now()

    def _use(self, file: PieceFile | None) -> None:
        self.file = file
        for number in range(file.pieces if file else 0):
            if file is not None and (number in self._unwanted or file.has(number)):
                self._plan.have(number)

    async def _take_piece(self, donor: bytes, answer: PiecesAnswer) -> None:
        assert self.file is not None
        number = self._plan.asked_of(donor)
        (data,) = answer.pieces
        assert number is not None
        if hashlib.sha256(data).digest() != self.file.hashes()[number]:
            self._lied(donor, "a piece")
            return
        rivals = self._plan.rivals(donor)
        first = self._plan.arrived(donor, self._now())
        self._plan.holds(donor, answer.held)
        for task, rival in list(self._calls.items()):
            if rival in rivals:
                del self._calls[task]
                task.cancel()
                self._outrun = [*(t for t in self._outrun if not t.done()), task]
                self._plan.outrun(rival, self._now())
        if first:
            await asyncio.to_thread(self.file.write, number, data)
            self._came_at, self.came = self._now(), self.came + 1
            wanted = self.file.pieces - len(self._unwanted)
            length = self.offer.length * wanted // self.file.pieces
            self._progress(length * (wanted - self._plan.missing) // wanted, length)

    def _lied(self, donor: bytes, what: str) -> None:
        _logger.warning("%s handed out %s that the root does not have", format_peer_id(donor), what)
        self._plan.lied(donor)
