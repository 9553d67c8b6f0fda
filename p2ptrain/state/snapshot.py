"""Snapshots: what all replicas hold alike after a round, in hashed pieces under one root.

A snapshot holds the chain's state, the parameters and the directions' replicated state. Its root goes into a later
seal, so that a newcomer can check each piece from anyone against the chain. The newest `KEPT` are on disk, each with
the journal since; peers with nothing of a chain in common but a snapshot can still tell where they parted.

Cost: one write of the parameters every `root_interval` rounds.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from p2ptrain.state.failpoints import failpoint
from p2ptrain.state.files import unfinished
from p2ptrain.state.tensors import mapped

KEPT = 3
PIECE_BYTES = 512 * 1024
_NAME = re.compile(r"snapshot-(\d{12})-([0-9a-f]{64})-([0-9a-f]{64})")


@dataclass(frozen=True, slots=True, order=True)
class SnapshotFile:
    """One snapshot on disk."""

    round: int
    id: bytes
    """State id it stands at."""
    root: bytes
    path: Path

    def read(self) -> Any:
        """Return its bytes as a view of the file, which stays as it is when its name goes. Raises OSError."""
        return mapped(self.path)


def piece_hashes(data: bytes) -> list[bytes]:
    """SHA-256 of each `PIECE_BYTES` of a snapshot."""
    return [hashlib.sha256(data[i : i + PIECE_BYTES]).digest() for i in range(0, len(data), PIECE_BYTES)]


def root_of(size: int, hashes: list[bytes]) -> bytes:
    """The root over a snapshot of `size` bytes [32 bytes]."""
    return hashlib.sha256(b"p2ptrain root 1\0" + size.to_bytes(8, "little") + b"".join(hashes)).digest()


class PieceHasher:
    """Hashes pieces of what comes in parts of any length."""

    def __init__(self) -> None:
        self._hashes: list[bytes] = []
        self._piece, self._room = hashlib.sha256(), PIECE_BYTES
        self.length = 0

    def update(self, data: bytes | memoryview) -> None:
        """Take the next bytes."""
        view = memoryview(data).cast("B")
        self.length += len(view)
        while len(view):
            part, view = view[: self._room], view[self._room :]
            self._piece.update(part)
            self._room -= len(part)
            if not self._room:
                self._end_piece()

    def ended(self) -> list[bytes]:
        """Return the hashes of all pieces, once all has come."""
        if self._room < PIECE_BYTES:
            self._end_piece()
        return self._hashes

    def _end_piece(self) -> None:
        self._hashes.append(self._piece.digest())
        self._piece, self._room = hashlib.sha256(), PIECE_BYTES


class SnapshotStore:
    """The newest snapshots in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def all(self) -> list[SnapshotFile]:
        """Newest first."""
        found = []
        for path in self.folder.glob("snapshot-*"):
            match = _NAME.fullmatch(path.name)
            if match:
                found.append(SnapshotFile(int(match[1]), bytes.fromhex(match[2]), bytes.fromhex(match[3]), path))
        return sorted(found, reverse=True)

    def find(self, identifier: bytes) -> SnapshotFile | None:
        """The snapshot that stands at this state id."""
        return next((snapshot for snapshot in self.all() if snapshot.id == identifier), None)

    def save(self, round: int, identifier: bytes, data: bytes | Iterable[bytes | memoryview]) -> SnapshotFile:
        """Keep a snapshot, whole or as it comes in parts, and of the older ones those that belong to the newest.

        Raises:
            OSError: the disk does not take it.
        """
        hasher = PieceHasher()
        failpoint("before_write")
        with unfinished(self.folder) as file:
            for part in (data,) if isinstance(data, bytes) else data:
                hasher.update(part)
                file.write(part)
            root = root_of(hasher.length, hasher.ended())
            path = self._path(round, identifier, root)
            file.place(path)
        failpoint("after_write")
        return self._kept(SnapshotFile(round, identifier, root, path))

    def take(self, path: Path, round: int, identifier: bytes, root: bytes) -> SnapshotFile:
        """Keep a file, which was checked, as a snapshot: it moves here in one step. Raises OSError."""
        os.replace(path, self._path(round, identifier, root))
        return self._kept(SnapshotFile(round, identifier, root, self._path(round, identifier, root)))

    def _path(self, round: int, identifier: bytes, root: bytes) -> Path:
        return self.folder / f"snapshot-{round:012d}-{identifier.hex()}-{root.hex()}"

    def _kept(self, newest: SnapshotFile) -> SnapshotFile:
        # One that was fetched may be older than those of the branch that is left for it.
        others = [snapshot for snapshot in self.all() if snapshot.path != newest.path]
        for old in others[KEPT - 1 :]:
            old.path.unlink(missing_ok=True)
        return newest

    def drop_after(self, round: int) -> None:
        """Forget the snapshots of a branch that was left at `round`."""
        for snapshot in self.all():
            if snapshot.round > round:
                snapshot.path.unlink(missing_ok=True)
