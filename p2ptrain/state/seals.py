"""The seals of a run without their replies, kept for far longer than the journal keeps rounds.

Who took part in what follows from seals alone, and each is signed. So whoever has them from the run's beginning on
counts for itself who did how much, and needs nobody's word. Files hold `SEGMENT_ROUNDS` seals each, after the chain's
state that they continue. They are appended to: a seal of a round that is there already means that the chain went back,
and the reader drops what it replaces. Of a line that a crash cut short, nothing is read.

Cost: one append of a seal a round, half a kilobyte and some 35 bytes for each part and 12 for each member; at most
`KEPT_BYTES` of disk, after which the oldest go.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from p2ptrain import chain
from p2ptrain.chain import ChainState, RoundShape, Seal, SealError, SignedSeal, Verify

SEGMENT_ROUNDS = 64
KEPT_BYTES = 128 * 2**20
ANSWER_BYTES = 512 * 1024
"""Of seals in one answer to another peer; at least one seal."""
REMEMBERED = 64
"""So many rounds back a chain may have gone."""
_NAME = "seals-{:012d}"

_encoder = msgspec.msgpack.Encoder()


class Opening(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What seals continue: the state before the first, and how many chunks the model has."""

    chunks: int
    state: ChainState


class Frame(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One entry of a file: an opening at its start, then seals."""

    opening: Opening | None
    seal: SignedSeal | None


_frames = msgspec.msgpack.Decoder(Frame)
_openings = msgspec.msgpack.Decoder(Opening)


@dataclass(frozen=True, slots=True)
class SealedStep:
    """One round as the chain went through it."""

    before: ChainState
    shape: RoundShape
    id: bytes
    seal: Seal


class Walk:
    """Follow a chain by its seals, each checked for its signature and against the chain's rules.

    Args:
        opening: where it begins.
        verify: checks signatures.
    """

    def __init__(self, opening: Opening, verify: Verify) -> None:
        self.chunks, self._verify = opening.chunks, verify
        self._states: deque[ChainState] = deque([opening.state], maxlen=REMEMBERED)
        self._steps: deque[SealedStep] = deque()

    @property
    def pending(self) -> tuple[SealedStep, ...]:
        """The newest rounds, which may still be undone."""
        return tuple(self._steps)

    @property
    def head(self) -> ChainState:
        """The state that the chain stands at."""
        return self._states[-1]

    def restart(self, opening: Opening) -> None:
        """Go on from another state, as after a chain was left that has nothing to do with the next."""
        self.chunks = opening.chunks
        if not self._go_back(opening.state.id):
            while self._steps and self._steps[-1].seal.round > opening.state.round:
                self._steps.pop()
            self._states.clear()
            self._states.append(opening.state)

    def take(self, signed: SignedSeal) -> Iterator[SealedStep]:
        """Continue the chain by one seal; yield the rounds that are too far back to be gone back to.

        Raises:
            SealError: malformed, not signed by its sealer, or none that continues this chain.
        """
        identifier, seal = chain.open_seal(signed, self._verify)
        if not self._go_back(seal.parent):
            raise SealError(f"the seal of round {seal.round} continues nothing that is known")
        before = self.head
        after = chain.extend(before, identifier, seal, self.chunks)
        self._steps.append(SealedStep(before, chain.shape_of(before, self.chunks), identifier, seal))
        self._states.append(after)
        if len(self._steps) >= REMEMBERED:
            yield self._steps.popleft()

    def rest(self) -> Iterator[SealedStep]:
        """Yield the rounds up to the head that were not yielded yet."""
        while self._steps:
            yield self._steps.popleft()

    def _go_back(self, identifier: bytes) -> bool:
        if all(state.id != identifier for state in self._states):
            return False
        while self.head.id != identifier:
            self._states.pop()
            if self._steps:
                self._steps.pop()
        return True


class SealLog:
    """The seals in a folder. One process writes; others may read meanwhile."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        #: where the next seal is appended, and how many seals that has; None: before `begin` or `resume`
        self._path: Path | None = None
        self._count = 0

    # ---- writing ----------------------------------------------------------------------------------------------

    def begin(self, state: ChainState, chunks: int) -> None:
        """Start a new file at a state; what was kept of rounds after it is of a chain that was left.

        Raises:
            OSError
        """
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        for path in self.segments():
            if _first(path) > state.round + 1:
                path.unlink(missing_ok=True)
        path = self.folder / _NAME.format(state.round + 1)
        path.write_bytes(_framed(Frame(Opening(chunks, state), None)))
        self._path, self._count = path, 0
        self._prune()

    def append(self, signed: SignedSeal) -> None:
        """Keep a seal. `begin` or `resume` came before. Raises OSError."""
        assert self._path is not None
        with self._path.open("ab") as file:
            file.write(_framed(Frame(None, signed)))
        self._count += 1

    @property
    def full(self) -> bool:
        """Whether the next seal belongs into a new file."""
        return self._count >= SEGMENT_ROUNDS

    def resume(self, run_id: bytes, chunks: int) -> list[bytes]:
        """Go on at the end of what is kept.

        Returns:
            The ids of the states in the newest file, in its order; none: there is nothing to go on from.
        """
        newest = next(iter(reversed(self.segments())), None)
        if newest is None:
            return []
        opening, seals = read_file(newest)
        if opening is None or opening.state.run_id != run_id or opening.chunks != chunks:
            return []
        self._path, self._count = newest, len(seals)
        # What a crash cut short would hide what comes after it.
        whole = len(_framed(Frame(opening, None))) + sum(len(_framed(Frame(None, seal))) for seal in seals)
        with newest.open("r+b") as file:
            file.truncate(whole)
        return [opening.state.id, *(chain.seal_id(seal.body) for seal in seals)]

    def _prune(self) -> None:
        sizes = {path: path.stat().st_size for path in self.segments()}
        for path in list(sizes)[:-1]:
            if sum(sizes.values()) <= KEPT_BYTES:
                return
            path.unlink(missing_ok=True)
            del sizes[path]

    # ---- reading ----------------------------------------------------------------------------------------------

    def segments(self) -> list[Path]:
        """The files, oldest first."""
        return sorted(self.folder.glob("seals-*"))

    def since(self, round: int) -> Iterator[Opening | SignedSeal]:
        """Yield openings and seals from the newest file on that begins at or before this round; else all."""
        paths = self.segments()
        begun = [number for number, path in enumerate(paths) if _first(path) <= max(1, round)]
        for path in paths[begun[-1] if begun else 0 :]:
            opening, seals = read_file(path)
            if opening is not None:
                yield opening
                yield from seals


def steps(entries: Iterable[Opening | SignedSeal], verify: Verify) -> Iterator[SealedStep]:
    """Walk over what a log holds, in order.

    Raises:
        SealError: something in it is no seal that continues it.
    """
    walk: Walk | None = None
    for entry in entries:
        if isinstance(entry, Opening):
            if walk is None:
                walk = Walk(entry, verify)
            else:
                walk.restart(entry)
        elif walk is not None:
            yield from walk.take(entry)
    if walk is not None:
        yield from walk.rest()


def read_file(path: Path) -> tuple[Opening | None, list[SignedSeal]]:
    """Return what a file begins with and its seals, as far as it is whole; (None, []): it is none or has gone."""
    opening, seals = None, []
    with contextlib.suppress(OSError, msgspec.MsgspecError):
        data = path.read_bytes()
        at = 0
        while at + 4 <= len(data):
            end = at + 4 + int.from_bytes(data[at : at + 4], "little")
            if end > len(data):
                break
            frame = _frames.decode(data[at + 4 : end])
            if frame.opening is not None:
                opening = frame.opening
            elif frame.seal is not None:
                seals.append(frame.seal)
            at = end
    return opening, seals


def answer_after(log: SealLog, round: int, known: bytes, newest: int, head: int) -> tuple[bytes, list[SignedSeal]]:
    """Return what another peer is handed: an encoded opening, or nothing, and as many seals as one answer takes.

    Args:
        round, known: a state that it stands at; seals after it are wanted. Where it is none of ours, or `known` is
            empty, those of the last `newest` rounds are.
        newest: 0: all that there are.
        head: our round.
    """
    if known:
        # After `known`: the id of the state that each leads to, and the seal.
        found: list[tuple[bytes, SignedSeal]] | None = None
        last = b""
        for entry in log.since(round + 1):
            if isinstance(entry, SignedSeal):
                last = chain.seal_id(entry.body)
                if found is not None:
                    found.append((last, entry))
            elif entry.state.id != last:
                last = entry.state.id
                # The chain went back to here by a snapshot.
                while found and found[-1][0] != last:
                    found.pop()
                # Else there is a gap, or it is another chain: what follows continues nothing before it.
                found = found or None
            if last == known:
                found = []
        if found is not None:
            return b"", _capped([seal for _, seal in found])
    opening: Opening | None = None
    seals: list[SignedSeal] = []
    for entry in log.since(max(1, head - newest + 1) if newest else 1):
        if isinstance(entry, SignedSeal):
            seals.append(entry)
        elif opening is None or entry.state.id != (chain.seal_id(seals[-1].body) if seals else opening.state.id):
            # What came before is of another chain, or there is a gap.
            opening, seals = entry, []
    return b"" if opening is None else _encoder.encode(opening), _capped(seals)


def opening_at(log: SealLog, round: int, identifier: bytes, verify: Verify) -> Opening | None:
    """Return what continues from a state that the log's chain went through; None: the log does not reach it."""
    walk: Walk | None = None
    with contextlib.suppress(SealError):
        for entry in log.since(round + 1):
            if isinstance(entry, SignedSeal):
                if walk is not None:
                    deque(walk.take(entry), maxlen=0)
            elif walk is None:
                walk = Walk(entry, verify)
            else:
                walk.restart(entry)
            if walk is not None and walk.head.id == identifier:
                return Opening(walk.chunks, walk.head)
    return None


def read_opening(data: bytes) -> Opening:
    """Decode an opening from another peer. Raises SealError: malformed."""
    try:
        return _openings.decode(data)
    except msgspec.MsgspecError as error:
        raise SealError(f"not a state of a chain: {error}") from error


def _capped(seals: Sequence[SignedSeal]) -> list[SignedSeal]:
    kept: list[SignedSeal] = []
    room = ANSWER_BYTES
    for seal in seals:
        room -= len(seal.body) + 96
        if kept and room < 0:
            break
        kept.append(seal)
    return kept


def _first(path: Path) -> int:
    return int(path.name.rpartition("-")[2])


def _framed(frame: Frame) -> bytes:
    data = _encoder.encode(frame)
    return len(data).to_bytes(4, "little") + data
