"""Arrays as they are at one moment, for a thread that writes them while others change them.

Nothing is copied at first: a piece is copied when its turn to be written comes, `PIECE_BYTES` at a time. Whoever is
about to change an array says so (`keep`), and what of it is not written yet is copied then; or it says where the same
values lie from then on (`moved`). So what lies in memory twice is what changes before the disk has taken it.

Cost: a copy of each piece, one more piece in memory, and a lock for as long as one is copied.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
PIECE_BYTES = 4 * 1024 * 1024


@dataclass(slots=True)
class _Piece:
    """Bytes of one array, from `start` on."""

    name: str
    start: int
    data: memoryview
    kept: bool = False


def bytes_of(array: Floats) -> memoryview:
    """Return an array as its bytes, little-endian: a view, where it lies so in memory."""
    return np.ascontiguousarray(array, "<f4").reshape(-1).data.cast("B") if array.size else memoryview(b"")


class Frozen:
    """Holds arrays as they are now. `parts` is for the thread that writes, everything else for those who change them.

    Args:
        arrays: in the order in which they are written; views of what will change.
        changing: False: they are copies already, which nobody changes.
    """

    def __init__(self, arrays: Mapping[str, Floats], *, changing: bool = True) -> None:
        self._lock = threading.Lock()
        self._next = 0
        self._pieces = [
            _Piece(name, start, data[start : start + PIECE_BYTES], not changing)
            for name, array in arrays.items()
            for data in (bytes_of(array),)
            for start in range(0, len(data), PIECE_BYTES)
        ]
        self.bytes = sum(len(piece.data) for piece in self._pieces)

    def parts(self) -> Iterator[memoryview]:
        """Yield all bytes in order; each part is good until the next one is asked for."""
        room = bytearray(min(self.bytes, PIECE_BYTES))
        while True:
            with self._lock:
                if self._next >= len(self._pieces):
                    return
                piece = self._pieces[self._next]
                length = len(piece.data)
                room[:length] = piece.data
                piece.data = memoryview(b"")
                self._next += 1
            yield memoryview(room)[:length]

    @property
    def done(self) -> bool:
        """Whether nothing is left to write."""
        return self._next >= len(self._pieces)

    def let_go(self) -> None:
        """Forget what is not written: nobody will write it."""
        with self._lock:
            self._pieces = []

    def keep(self, names: Collection[str] | None = None) -> int:
        """Copy what is not written of these arrays (None: of all), which are about to change; returns the bytes."""
        copied = 0
        with self._lock:
            for piece in self._pieces[self._next :]:
                if not piece.kept and (names is None or piece.name in names):
                    piece.data, piece.kept = memoryview(bytes(piece.data)), True
                    copied += len(piece.data)
        return copied

    def moved(self, arrays: Mapping[str, Floats]) -> None:
        """What is not written of these arrays is written from here instead, where the same values lie from now on."""
        views = {name: bytes_of(array) for name, array in arrays.items()}
        with self._lock:
            for piece in self._pieces[self._next :]:
                if not piece.kept and piece.name in views:
                    piece.data = views[piece.name][piece.start : piece.start + len(piece.data)]
