"""The checkpoint: the replica, and what is this peer's own beside it, in a file of safetensors with its hash in JSON.

Own are the momentum, what was sent and is not settled, and the count of sequences read. A crash loses the momentum
gathered since the last checkpoint and nothing else: seals are in the journal, contributions in the own log.

`checkpoint.json` names the file that counts, its length and its SHA-256, and is replaced in one step once that file is
on disk whole. Any tool reads that: parameters and directions' state by their names in a snapshot, `momentum`, and in
`books` what else there is, as msgpack. Files of older checkpoints stay as `Kept` says, for people: a restart needs the
newest, since the own log goes back no further.

Cost: one pass of SHA-256; memory for one piece, and for what changes before it is written (`state/frozen.py`).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec

from p2ptrain.chain import ChainState
from p2ptrain.errors import HomeError
from p2ptrain.state.files import atomic_write, unfinished
from p2ptrain.state.frozen import Frozen
from p2ptrain.state.own_log import Outcome
from p2ptrain.state.tensors import (
    Arrays,
    ArraysOnDisk,
    Shapes,
    TensorFileError,
    let_go,
    mapped,
    places_of,
    unpack_tensors,
)

NAME = "checkpoint.json"
MOMENTUM = "momentum"
"""Name of this peer's own array, beside those that all replicas hold."""
_BEFORE = "checkpoint"
"""What a home has whose last checkpoint is of a version before safetensors: a hash, then tensors as in a snapshot."""
_FILE = re.compile(r"checkpoint-(\d{12})-[0-9a-f]{16}\.safetensors")
_BOOKS = "books"
_LENGTH = struct.Struct("<Q")
_HEADER_MAX_BYTES = 100_000_000
_HASH_BYTES = 32
_READ_BYTES = 4 * 1024 * 1024
_SYNC_BYTES = 64 * 1024 * 1024
"""So much at a time waits in memory for the disk, which has others to serve too."""
_TRIES = 3


class SentUnsettled(msgspec.Struct, frozen=True, array_like=True):
    """A contribution that no seal had settled when the checkpoint was made."""

    round: int
    base: bytes
    decays: int
    payload: bytes
    """As a contribution for all chunks."""


class CheckpointMeta(msgspec.Struct, frozen=True, array_like=True):
    """What a checkpoint holds beside tensors."""

    run_id: bytes
    chain: ChainState
    decays: int
    sequences_read: int
    pending: tuple[SentUnsettled, ...]
    outcomes: tuple[Outcome, ...] = ()
    """Those since the last entry of the own log; the momentum has them already."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Meta and tensors."""

    meta: CheckpointMeta
    arrays: Arrays


@dataclass(frozen=True, slots=True)
class Kept:
    """Which checkpoints stay."""

    last: int = 1
    """So many, the newest among them."""
    every_rounds: int = 0
    """And the first one in each stretch of so many rounds; 0: none."""


class _Pointer(msgspec.Struct, frozen=True):
    """What `checkpoint.json` says; the rest of it is for people."""

    file: str
    bytes: int
    sha256: str


_decoder = msgspec.msgpack.Decoder(CheckpointMeta)
_pointer_decoder = msgspec.json.Decoder(_Pointer)


def save_checkpoint(folder: Path, checkpoint: Checkpoint, kept: Kept = Kept()) -> int:
    """Write a checkpoint of arrays that nobody changes meanwhile; see `write_checkpoint`."""
    shapes = {name: array.shape for name, array in checkpoint.arrays.items()}
    return write_checkpoint(folder, checkpoint.meta, shapes, Frozen(checkpoint.arrays), kept)


def write_checkpoint(folder: Path, meta: CheckpointMeta, shapes: Shapes, frozen: Frozen, kept: Kept = Kept()) -> int:
    """Replace the checkpoint in `folder`; returns the bytes written.

    Args:
        shapes: of the arrays that are `frozen`, in their order.

    Raises:
        OSError: the disk does not take it; the checkpoint before is then as it was.
    """
    books = msgspec.msgpack.encode(meta)
    head, digest, length = _head(meta, shapes, len(books)), hashlib.sha256(), 0
    with unfinished(folder, durable=True) as file:
        synced = 0
        for part in _joined(head, books, frozen):
            digest.update(part)
            length += file.write(part)
            if length - synced >= _SYNC_BYTES:
                file.flush()
                os.fsync(file.fileno())
                synced = length
        name = f"checkpoint-{meta.chain.round:012d}-{digest.hexdigest()[:16]}.safetensors"
        file.place(folder / name)
    said = {
        "file": name,
        "bytes": length,
        "sha256": digest.hexdigest(),
        "round": meta.chain.round,
        "state_id": meta.chain.id.hex(),
        "run_id": meta.run_id.hex(),
        "sequences_read": meta.sequences_read,
    }
    atomic_write(folder / NAME, json.dumps(said, indent=1).encode() + b"\n", durable=True)
    _remove_others(folder, name, kept)
    return length


def _joined(head: bytes, books: bytes, frozen: Frozen) -> Iterator[bytes | memoryview]:
    yield head
    yield books
    yield from frozen.parts()


def _head(meta: CheckpointMeta, shapes: Shapes, books_bytes: int) -> bytes:
    """Return what a file of safetensors begins with: https://github.com/huggingface/safetensors#format."""
    header: dict[str, object] = {
        "__metadata__": {"format": "pt", "round": str(meta.chain.round), "state_id": meta.chain.id.hex()},
        _BOOKS: {"dtype": "U8", "shape": [books_bytes], "data_offsets": [0, books_bytes]},
    }
    for name, (start, shape) in places_of(shapes, books_bytes).items():
        end = start + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return _LENGTH.pack(len(text)) + text


def _remove_others(folder: Path, newest: str, kept: Kept) -> None:
    found = sorted((match[1], match[0]) for path in folder.iterdir() if (match := _FILE.fullmatch(path.name)))
    names = [name for _, name in found if name != newest]
    stay = {newest, *names[len(names) - max(kept.last - 1, 0) :]}
    if kept.every_rounds:
        first_of: dict[int, str] = {}
        for round, name in found:
            first_of.setdefault(int(round) // kept.every_rounds, name)
        stay |= set(first_of.values())
    for name in names:
        if name not in stay:
            (folder / name).unlink(missing_ok=True)
    (folder / _BEFORE).unlink(missing_ok=True)


def load_checkpoint(folder: Path, shapes: Shapes) -> Checkpoint | None:
    """The checkpoint in `folder`, or None when there is none; its arrays are read from disk, each when asked for.

    Raises:
        HomeError: damaged, or of another model.
    """
    path = folder / NAME
    for attempt in range(_TRIES):
        try:
            pointer = _pointer_decoder.decode(path.read_bytes())
            path = folder / pointer.file
            if not _FILE.fullmatch(pointer.file):
                raise TensorFileError("it names no checkpoint")
            return _opened(path, pointer, shapes)
        except FileNotFoundError as error:
            if path.name == NAME:
                return _load_before(folder, shapes)
            if attempt + 1 == _TRIES:
                raise _unusable(path, error) from error
            # The peer whose home it is has replaced it meanwhile.
            path = folder / NAME
        except (TensorFileError, msgspec.MsgspecError, ValueError, KeyError, OSError) as error:
            raise _unusable(path, error) from error
    return None


def _unusable(path: Path, error: Exception) -> HomeError:
    pointer = path.with_name(NAME)
    aside = pointer if pointer.exists() else path
    return HomeError(f"{path} cannot be used: {error}", hint=f"set it aside: mv {aside} {aside}.old")


def _opened(path: Path, pointer: _Pointer, shapes: Shapes) -> Checkpoint:
    """Check a file and return what is in it. Raises TensorFileError, OSError."""
    file = memoryview(mapped(path))
    if len(file) != pointer.bytes or _hash(file, 0).hex() != pointer.sha256:
        raise TensorFileError("damaged")
    (length,) = _LENGTH.unpack(file[: _LENGTH.size])
    if length > min(_HEADER_MAX_BYTES, len(file)):
        raise TensorFileError("damaged")
    start = _LENGTH.size + length
    header = json.loads(bytes(file[_LENGTH.size : start]))
    header.pop("__metadata__", None)
    books = start + header[_BOOKS]["data_offsets"][0], start + header.pop(_BOOKS)["data_offsets"][1]
    places = {name: (start + entry["data_offsets"][0], tuple(entry["shape"])) for name, entry in header.items()}
    if {name: shape for name, (_, shape) in places.items()} != dict(shapes):
        raise TensorFileError("of another model")
    return Checkpoint(_decoder.decode(file[slice(*books)]), ArraysOnDisk(file, places))


def _hash(file: memoryview, start: int) -> bytes:
    """SHA-256 of a mapped file from `start` on, a piece of it in memory at a time."""
    digest = hashlib.sha256()
    for position in range(start, len(file), _READ_BYTES):
        digest.update(file[position : position + _READ_BYTES])
        let_go(file, position, position + _READ_BYTES)
    return digest.digest()


def _load_before(folder: Path, shapes: Shapes) -> Checkpoint | None:
    """The checkpoint of a version before safetensors, or None. Raises HomeError."""
    path = folder / _BEFORE
    try:
        file = memoryview(mapped(path))
    except FileNotFoundError:
        return None
    try:
        if _hash(file, _HASH_BYTES) != bytes(file[:_HASH_BYTES]):
            raise TensorFileError("damaged")
        # There the momentum came last.
        ordered = {name: shape for name, shape in shapes.items() if name != MOMENTUM} | {MOMENTUM: shapes[MOMENTUM]}
        meta, arrays = unpack_tensors(file[_HASH_BYTES:], ordered)
        return Checkpoint(_decoder.decode(meta), arrays)
    except (TensorFileError, msgspec.MsgspecError) as error:
        raise _unusable(path, error) from error
