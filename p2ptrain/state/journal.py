"""The journal: sealed rounds with their replies, one file a round, in order and without gaps.

A round is on disk before it is applied, so a peer that was killed stands, after a restart, where its last seal left it.
Files are replaced whole; a round that was rolled back is overwritten or removed, the newest first.

One thread uses a journal. Another may read the files that `files_after` names; whether they still were those rounds
then, `keeps` tells afterwards.

Cost: one small write a round, and a read of all at start.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import NamedTuple

from p2ptrain.chain import Verify
from p2ptrain.chain.sealed import SealedRound, SealedRoundError, decode_sealed, encode_sealed
from p2ptrain.state.files import atomic_write

_logger = logging.getLogger(__name__)


class JournalFile(NamedTuple):
    """Where a sealed round lies, encoded."""

    round: int
    id: bytes
    path: Path


class Journal:
    """The rounds of one chain in a folder.

    Args:
        run_id: the id of round 0.
        verify: checks seals' signatures.
    """

    def __init__(self, folder: Path, run_id: bytes, verify: Verify) -> None:
        self._folder, self._verify = folder, verify
        #: round -> id, and the parent of the first round kept
        self._ids: dict[int, bytes] = {}
        self._rounds: dict[bytes, int] = {}
        self._parent_of_first = run_id
        self._load()

    @property
    def first(self) -> int:
        """The oldest round kept; 1 beyond the newest, or 1, when there is none."""
        return min(self._ids, default=1)

    @property
    def last(self) -> int:
        """The newest round kept; 0 when there is none."""
        return max(self._ids, default=0)

    def position(self, identifier: bytes) -> int | None:
        """The round that this id is of, where every later round up to the newest is kept; else None."""
        if identifier == self._parent_of_first:
            return self.first - 1
        return self._rounds.get(identifier)

    @property
    def ids(self) -> dict[int, bytes]:
        """Round -> its id, of the one before the first, too."""
        return {self.first - 1: self._parent_of_first} | self._ids

    def files_after(self, round: int, most: int) -> list[JournalFile]:
        """The next rounds after this one, in order, `most` at most."""
        end = min(self.last, round + most) + 1
        return [JournalFile(number, self._ids[number], self._path(number)) for number in range(round + 1, end)]

    def keeps(self, files: list[JournalFile]) -> bool:
        """Whether all of these are still the rounds they were."""
        return all(self._ids.get(file.round) == file.id for file in files)

    def read(self, round: int) -> SealedRound:
        """One round that is kept."""
        return decode_sealed(self._path(round).read_bytes(), self._verify)

    def reply(self, round: int, base: bytes, part: int) -> bytes | None:
        """The sealed reply of a part of the round shaped by the seal `base`; None where this chain has none.

        A base that is not ours is another fork's, and so is its round, whatever its number.
        """
        if not self.first <= round <= self.last or self.position(base) != round - 2:
            return None
        replies = self.read(round).replies
        return replies[part] if part < len(replies) else None

    def append(self, sealed: SealedRound) -> None:
        """Keep a round; one of the same number, and all after it, were rolled back and go.

        Raises:
            ValueError: it does not follow what is kept.
        """
        number = sealed.seal.round
        if self._ids and not self.first <= number <= self.last + 1:
            raise ValueError(f"round {number} does not follow round {self.last}")
        self.truncate(number - 1)
        if not self._ids:
            self._parent_of_first = sealed.seal.parent
        atomic_write(self._path(number), encode_sealed(sealed))
        self._remember(number, sealed.id)

    def truncate(self, round: int) -> None:
        """Forget every round after this one, newest first: a crash in between leaves no gap."""
        for number in range(self.last, round, -1):
            self._forget(number)

    def prune(self, before: int) -> None:
        """Forget the rounds before this one, oldest first; the newest stays."""
        for number in range(self.first, min(before, self.last)):
            self._parent_of_first = self._ids[number]
            self._forget(number)

    def restart_at(self, identifier: bytes) -> None:
        """Forget all: the next round to be kept continues `identifier`."""
        self.truncate(0)
        self._parent_of_first = identifier

    def _path(self, round: int) -> Path:
        return self._folder / f"round-{round:012d}"

    def _remember(self, number: int, identifier: bytes) -> None:
        self._ids[number] = identifier
        self._rounds[identifier] = number

    def _forget(self, number: int) -> None:
        identifier = self._ids.pop(number, None)
        if identifier is not None:
            del self._rounds[identifier]
            self._path(number).unlink(missing_ok=True)

    def _load(self) -> None:
        """Take up what is on disk as far as it is a gapless chain; remove the rest."""
        paths = sorted(self._folder.glob("round-*"))
        for position, path in enumerate(paths):
            try:
                sealed = decode_sealed(path.read_bytes(), self._verify)
                number, follows = sealed.seal.round, self._ids.get(sealed.seal.round - 1)
                if path.name != self._path(number).name or (self._ids and sealed.seal.parent != follows):
                    raise SealedRoundError("it does not follow the round before")
            except (SealedRoundError, OSError) as error:
                _logger.warning("%s is left out of the journal, with all after it: %s", path, error)
                for rest in reversed(paths[position:]):
                    rest.unlink(missing_ok=True)
                return
            if not self._ids:
                self._parent_of_first = sealed.seal.parent
            self._remember(number, sealed.id)
