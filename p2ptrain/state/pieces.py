"""A file piece by piece, a snapshot's or one of the run: read from for others, written to while it is being fetched.

What is being fetched lies in the folder that it is for, as `partial-ROUND-ID-ROOT` or `partial-ROOT`, at its full
length with holes, its pieces' hashes in a second file. A process that was killed finds out what it has by hashing it
anew, so nothing need be synced.

Cost: one piece in memory; a bit and a hash a piece, 6 MB for 100 GB; one pass of SHA-256 over the file to resume it,
and one to hand out hashes that are not known.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from p2ptrain.compression import bitmaps
from p2ptrain.state.files import atomic_write
from p2ptrain.state.snapshot import PIECE_BYTES, root_of

_HASHES = ".hashes"


def pieces_of(length: int) -> int:
    """How many pieces a file of `length` bytes has."""
    return -(-length // PIECE_BYTES)


def piece_length(length: int, number: int) -> int:
    """Bytes of one piece: the last may be short."""
    return min(PIECE_BYTES, length - number * PIECE_BYTES)


def bit(bitmap: bytes | bytearray, number: int) -> bool:
    """Whether a bitmap, least significant bit first, has this bit; an empty one has all."""
    return not bitmap or bitmaps.has(bitmap, number)


class PieceFile:
    """A whole file, or one being fetched. Any thread; one at a time may write.

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
    """What is being fetched into a folder: one at a time."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def path(self, round: int, identifier: bytes, root: bytes) -> Path:
        """Where a snapshot lies while it is being fetched."""
        return self._folder / f"partial-{round:012d}-{identifier.hex()}-{root.hex()}"

    def path_of_file(self, root: bytes) -> Path:
        """Where a file of the run lies while it is being fetched."""
        return self._folder / f"partial-{root.hex()}"

    def begin(self, path: Path, length: int, hashes: list[bytes]) -> PieceFile:
        """A file for the pieces of these hashes, none there yet; all other unfinished ones go. Raises OSError."""
        self.keep_only(None)
        keep_hashes(path, hashes)
        with path.open("wb") as file:
            file.truncate(length)
        return PieceFile(path, length, hashes, bytes(-(-len(hashes) // 8)))

    def resume(
        self, path: Path, length: int, root: bytes, looked: Callable[[int, int], None] = lambda done, of: None
    ) -> PieceFile | None:
        """What an earlier process left, every piece looked at; None when it is of no use. Raises OSError.

        Args:
            looked: hears (bytes looked at, of), on this thread.
        """
        self.keep_only(path)
        hashes = kept_hashes(path, length, root)
        if hashes is None:
            return None
        held = bytearray(-(-len(hashes) // 8))
        for number, of in enumerate(PieceFile(path, length).read_hashes()):
            if of == hashes[number]:
                bitmaps.add(held, number)
            looked(min(length, (number + 1) * PIECE_BYTES), length)
        return PieceFile(path, length, hashes, bytes(held))

    def keep_only(self, path: Path | None) -> None:
        """Remove all unfinished files but this one and its hashes."""
        kept = (path, _beside(path)) if path else ()
        for other in self._folder.glob("partial-*"):
            if other not in kept:
                other.unlink(missing_ok=True)


def keep_hashes(path: Path, hashes: list[bytes]) -> None:
    """Write the hashes of a file's pieces beside it. Raises OSError."""
    atomic_write(_beside(path), b"".join(hashes))


def kept_hashes(path: Path, length: int, root: bytes, *, since: bool = False) -> list[bytes] | None:
    """Return the hashes beside a file of this length, where they give this root; None: there are none.

    Args:
        since: none either where the file was written to after they were.

    Raises:
        OSError: they cannot be read.
    """
    try:
        joined, file, beside = _beside(path).read_bytes(), path.stat(), _beside(path).stat()
    except FileNotFoundError:
        return None
    hashes = [joined[i : i + 32] for i in range(0, len(joined), 32)]
    if file.st_size != length or len(joined) != 32 * pieces_of(length) or root_of(length, hashes) != root:
        return None
    return None if since and file.st_mtime_ns > beside.st_mtime_ns else hashes


def _beside(path: Path) -> Path:
    return path.with_name(path.name + _HASHES)
