"""What this peer has sent, and what became of what it sent before: one file for each round it contributed to.

Written before the first byte leaves, so that after a crash the same bytes are sent again and nothing is counted twice.
Read in order over a checkpoint's momentum, sends and outcomes give the momentum as it was after the last send. A
message of weight 0, sent in the stead of a late trainer, is kept too: it says that nothing of that round was used.

One thread writes and prunes, the network's; any may read meanwhile. An entry is one file, replaced whole, so a reader
finds the entry before, the entry after, or none.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Literal

import msgspec

from p2ptrain.chain import Row
from p2ptrain.chain.sealed import Key
from p2ptrain.state.files import atomic_write

_logger = logging.getLogger(__name__)


class Outcome(msgspec.Struct, frozen=True, array_like=True):
    """What became of one contribution when a round was applied, or undone."""

    kind: Literal["settled", "undone", "given up"]
    """`undone`: its last settling was. `given up`: whether it was used cannot be known; it counts as used."""
    round: int
    """Of the seal that settled it."""
    id: bytes
    """Of that seal."""
    sent_round: int
    sent_base: bytes
    kept: bytes = b""
    """A bit for each coefficient sent, set where it was consumed; as numpy.packbits."""
    clips: tuple[tuple[int, int, int], ...] = ()
    """(first, end, factor in 256ths) of coefficients clipped."""

    @property
    def key(self) -> Key:
        return Key(self.sent_round, self.sent_base)


class OwnEntry(msgspec.Struct, frozen=True, array_like=True):
    """One round's messages of this peer."""

    round: int
    base: bytes
    row: Row
    ranges: tuple[tuple[int, int], ...]
    """Chunks [start, end) of each payload."""
    payloads: tuple[bytes, ...]
    """One a part; all empty where the message had weight 0."""
    decays: int
    """Decays of the momentum at the time of sending."""
    sequences_read: int
    """Sequences this peer had read by then, in all."""
    outcomes: tuple[Outcome, ...] = ()
    """Of earlier contributions, since the entry before."""

    @property
    def key(self) -> Key:
        return Key(self.round, self.base)

    @property
    def stood_in(self) -> bool:
        """A message of weight 0 in the trainer's stead."""
        return not any(self.payloads)


_decoder = msgspec.msgpack.Decoder(OwnEntry)


class OwnLog:
    """The entries in a folder; see the module docstring for who may do what."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def write(self, entry: OwnEntry) -> None:
        """Keep an entry. For the thread that writes."""
        atomic_write(self._path(entry.key), msgspec.msgpack.encode(entry))

    def find(self, key: Key) -> OwnEntry | None:
        """The entry of a round."""
        return self._read(self._path(key))

    def all(self) -> list[OwnEntry]:
        """In the order of sending."""
        entries = [self._read(path) for path in sorted(self._folder.glob("sent-*"))]
        return sorted((e for e in entries if e is not None), key=lambda e: (e.decays, e.round))

    def prune(self, before: int) -> None:
        """Forget the rounds before this one. For the thread that writes."""
        for path in self._folder.glob("sent-*"):
            if int(path.name.split("-")[1]) < before:
                path.unlink(missing_ok=True)

    def _path(self, key: Key) -> Path:
        return self._folder / f"sent-{key.round:012d}-{key.base.hex()[:16]}"

    def _read(self, path: Path) -> OwnEntry | None:
        try:
            return _decoder.decode(path.read_bytes())
        except FileNotFoundError:
            return None
        except msgspec.MsgspecError as error:
            _logger.warning("%s is damaged and left out: %s", path, error)
            return None
