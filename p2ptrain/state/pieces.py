"""A snapshot's file piece by piece: read from for others, written to while it is being fetched.

What is being fetched lies beside the snapshots as `partial-ROUND-ID-ROOT`, at its full length with holes, its pieces'
hashes in a second file. A process that was killed finds out what it has by hashing it anew, so nothing need be synced.

Cost: one piece in memory; a bit a piece; one pass of SHA-256 over the file to resume it, and one to hand out hashes.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from p2ptrain.compression import bitmaps
from p2ptrain.state.files import atomic_write
from p2ptrain.state.snapshot import PIECE_BYTES, root_of

_HASHES = ".hashes"


def pieces_of(length: int) -> int:
    """How many pieces a snapshot of `length` bytes has."""
    return -(-length // PIECE_BYTES)


def piece_length(length: int, number: int) -> int:
    """Bytes of one piece: the last may be short."""
    return min(PIECE_BYTES, length - number * PIECE_BYTES)


def bit(bitmap: bytes | bytearray, number: int) -> bool:
    """Whether a bitmap, least significant bit first, has this bit; an empty one has all."""
    return not bitmap or bitmaps.has(bitmap, number)


class PieceFile:
    """A whole snapshot's file, or one being fetched. Any thread; one at a time may write.

    Args:
        hashes: of all pieces, where they are known.
        held: bitmap of the pieces that are there; empty: all.
    """

    def __init__(self, path: Path, length: int, hashes: list[bytes] | None = None, held: bytes = b"") -> None:
        self.path, self.length, self.pieces = path, length, pieces_of(length)
        self._hashes, self._held = hashes, bytearray(held)

    @property
    def held(self) -> bytes:
        """Bitmap of the pieces that are there; empty: all."""
        return bytes(self._held)

    def has(self, number: int) -> bool:
        """Whether a piece is there."""
        return 0 <= number < self.pieces and bit(self._held, number)

    def read(self, number: int) -> bytes:
        """One piece. Raises OSError when the file is gone."""
        handle = os.open(self.path, os.O_RDONLY)
        try:
            return os.pread(handle, piece_length(self.length, number), number * PIECE_BYTES)
        finally:
            os.close(handle)

    def hashes(self) -> list[bytes]:
        """SHA-256 of each piece; read from disk where they are not known yet. Raises OSError when the file is gone."""
        if self._hashes is None:
            self._hashes = list(self.read_hashes())
        return self._hashes

    def read_hashes(self) -> Iterator[bytes]:
        """SHA-256 of each piece as it is on disk now. Raises OSError when the file is gone."""
        with self.path.open("rb") as file:
            for _ in range(self.pieces):
                yield hashlib.sha256(file.read(PIECE_BYTES)).digest()

    def write(self, number: int, data: bytes) -> None:
        """Put a piece, which was checked, in its place. Raises OSError."""
        handle = os.open(self.path, os.O_WRONLY)
        try:
            view, position = memoryview(data), number * PIECE_BYTES
            while view:
                written = os.pwrite(handle, view, position)
                view, position = view[written:], position + written
        finally:
            os.close(handle)
        bitmaps.add(self._held, number)


class Partials:
    """What is being fetched, in the folder of the snapshots: one at a time."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def path(self, round: int, identifier: bytes, root: bytes) -> Path:
        """Where a snapshot lies while it is being fetched."""
        return self._folder / f"partial-{round:012d}-{identifier.hex()}-{root.hex()}"

    def begin(self, path: Path, length: int, hashes: list[bytes]) -> PieceFile:
        """A file for the pieces of these hashes, none there yet; all other unfinished ones go. Raises OSError."""
        self.keep_only(None)
        atomic_write(_beside(path), b"".join(hashes))
        with path.open("wb") as file:
            file.truncate(length)
        return PieceFile(path, length, hashes, bytes(-(-len(hashes) // 8)))

    def resume(self, path: Path, length: int, root: bytes) -> PieceFile | None:
        """What an earlier process left, every piece looked at; None when it is of no use. Raises OSError."""
        self.keep_only(path)
        try:
            joined = _beside(path).read_bytes()
            hashes = [joined[i : i + 32] for i in range(0, len(joined), 32)]
            if path.stat().st_size != length or root_of(length, hashes) != root:
                return None
            found = enumerate(PieceFile(path, length).read_hashes())
            held = bitmaps.pack((number for number, of in found if of == hashes[number]), len(hashes))
        except FileNotFoundError:
            return None
        return PieceFile(path, length, hashes, held)

    def keep_only(self, path: Path | None) -> None:
        """Remove all unfinished files but this one and its hashes."""
        kept = (path, _beside(path)) if path else ()
        for other in self._folder.glob("partial-*"):
            if other not in kept:
                other.unlink(missing_ok=True)


def _beside(path: Path) -> Path:
    return path.with_name(path.name + _HASHES)
