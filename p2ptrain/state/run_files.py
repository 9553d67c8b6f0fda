"""Files that every peer of a run needs, which the manifest names by length and root: whole, with hashes beside them.

The root is that of a snapshot of the same bytes (`state/snapshot.py`), so one file may be checked piece by piece, and
comes from anyone. The hashes of the pieces are kept beside the file as `NAME.hashes`: with them a peer hands out pieces
at once, and at its next start it reads the file anew only where that was written to since.

Cost: 32 bytes a piece of 512 KiB on disk and two to three times as much in memory, 14 MB for 100 GB; one pass of
SHA-256 when a file is made, and none when it was fetched. Given up: a disk that changes bytes and says nothing is not
noticed here; whoever fetches such a piece refuses it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from p2ptrain.state.files import atomic_writer, sync_folder
from p2ptrain.state.pieces import PieceFile, keep_hashes, kept_hashes
from p2ptrain.state.snapshot import PIECE_BYTES, PieceHasher, root_of

Buffer = bytes | memoryview
Looked = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class RunFile:
    """A file as the manifest names it."""

    length: int
    root: bytes


def _ended(hasher: PieceHasher) -> tuple[RunFile, list[bytes]]:
    """Return what the manifest says of what was hashed, and the hashes of all pieces."""
    hashes = hasher.ended()
    return RunFile(hasher.length, root_of(hasher.length, hashes)), hashes


def named(parts: Iterable[Buffer]) -> RunFile:
    """Return what the manifest says of a file of these bytes."""
    hasher = PieceHasher()
    for part in parts:
        hasher.update(part)
    return _ended(hasher)[0]


def read_parts(path: Path, looked: Looked = lambda done, of: None) -> Iterator[bytes]:
    """Yield a file's bytes, a piece at a time; `looked` hears (bytes so far, of). Raises OSError."""
    length, done = path.stat().st_size, 0
    with path.open("rb") as file:
        while part := file.read(PIECE_BYTES):
            yield part
            done += len(part)
            looked(done, length)


def hashed(path: Path, looked: Looked = lambda done, of: None) -> tuple[RunFile, PieceFile]:
    """Return what the manifest says of a file that is to become one of the run, for `take` to move. Raises OSError."""
    hasher = PieceHasher()
    for part in read_parts(path, looked):
        hasher.update(part)
    found, hashes = _ended(hasher)
    return found, PieceFile(path, found.length, hashes)


def make(path: Path, parts: Iterable[Buffer]) -> tuple[RunFile, PieceFile]:
    """Write a file of these bytes, in one step, and return what the manifest says of it. Raises OSError."""
    hasher = PieceHasher()
    with atomic_writer(path, durable=True) as file:
        for part in parts:
            hasher.update(part)
            file.write(part)
    made, hashes = _ended(hasher)
    keep_hashes(path, hashes)
    return made, PieceFile(path, made.length, hashes)


def whole(path: Path, wanted: RunFile, looked: Looked = lambda done, of: None) -> PieceFile | None:
    """Return the file at `path`, if it is the one that the manifest names; it is read only where that is in doubt.

    Args:
        looked: hears (bytes read, of), where it is read.

    Raises:
        OSError: it cannot be read.
    """
    hashes = kept_hashes(path, wanted.length, wanted.root, since=True)
    if hashes is None:
        if not path.exists() or path.stat().st_size != wanted.length:
            return None
        hasher = PieceHasher()
        for part in read_parts(path, looked):
            hasher.update(part)
        found, hashes = _ended(hasher)
        if found != wanted:
            return None
        keep_hashes(path, hashes)
    return PieceFile(path, wanted.length, hashes)


def take(fetched: PieceFile, path: Path) -> PieceFile:
    """Move a file whose pieces were all checked to its place, in one step; it survives a power cut. Raises OSError."""
    handle = os.open(fetched.path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
    os.replace(fetched.path, path)
    sync_folder(path.parent)
    keep_hashes(path, fetched.hashes())
    return PieceFile(path, fetched.length, fetched.hashes())
