"""Tensors as bytes: a small header, some bytes of meaning, and the arrays one after another.

Names, types and shapes are not in the bytes: they follow from the manifest, so a reader knows the length before it
reads, and a stranger's file can claim nothing. Their hash is in the header, so that another model's file is told from a
damaged one. Cost: one copy.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Arrays = dict[str, NDArray[np.float32]]
Shapes = Mapping[str, tuple[int, ...]]

_HEADER = struct.Struct("<4sB32sI")  # magic, version, hash of names and shapes, bytes of meta
_MAGIC, _VERSION = b"P2Tt", 1


class TensorFileError(ValueError):
    """Bytes that are not these tensors."""


def _layout_hash(shapes: Shapes) -> bytes:
    return hashlib.sha256(repr([(name, tuple(shape)) for name, shape in shapes.items()]).encode()).digest()


def _values(shapes: Shapes) -> int:
    return sum(int(np.prod(shape, dtype=np.int64)) for shape in shapes.values())


def packed_bytes(shapes: Shapes, meta_bytes: int) -> int:
    """Length of `pack_tensors` of float32 arrays of these shapes."""
    return _HEADER.size + meta_bytes + 4 * _values(shapes)


def pack_head(meta: bytes, shapes: Shapes) -> bytes:
    """Return what stands before the arrays of these shapes."""
    return _HEADER.pack(_MAGIC, _VERSION, _layout_hash(shapes), len(meta)) + meta


def bytes_of(array: NDArray[np.float32]) -> memoryview:
    """Return an array as it stands in the bytes: a view, where it lies so in memory."""
    return np.ascontiguousarray(array, "<f4").data.cast("B")


def pack_tensors(meta: bytes, arrays: Mapping[str, NDArray[np.float32]]) -> bytes:
    """Float32 arrays, in their order, behind `meta`."""
    head = pack_head(meta, {name: array.shape for name, array in arrays.items()})
    return b"".join([head, *map(bytes_of, arrays.values())])


def read_meta(path: Path, max_bytes: int) -> bytes:
    """Return the meta of a file alone, of at most `max_bytes`, where the shapes are not known yet.

    Raises:
        TensorFileError: the file does not begin as one of tensors does.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        _, meta_bytes = _read_head(file.read(_HEADER.size))
        meta = file.read(meta_bytes) if meta_bytes <= max_bytes else b""
    if len(meta) < meta_bytes:
        raise TensorFileError(f"with a meta of {meta_bytes} bytes")
    return meta


def read_tensors(path: Path, shapes: Shapes) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """Yield (name, array) for arrays of exactly these shapes, one of them in memory at a time.

    Raises:
        TensorFileError: the file is anything else; raised before the first array.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        file.seek(_check(file.read(_HEADER.size), path.stat().st_size, shapes))
        for name, shape in shapes.items():
            yield name, np.fromfile(file, "<f4", _values({name: shape})).reshape(shape)


def check_tensors(path: Path, shapes: Shapes) -> None:
    """Refuse a file that `read_tensors` would, without reading its arrays. Raises TensorFileError, OSError."""
    with path.open("rb") as file:
        _check(file.read(_HEADER.size), path.stat().st_size, shapes)


def _read_head(head: bytes) -> tuple[bytes, int]:
    """Return the hash of names and shapes, and the length of the meta. Raises TensorFileError."""
    if len(head) < _HEADER.size:
        raise TensorFileError("too short")
    magic, version, layout, meta_bytes = _HEADER.unpack_from(head)
    if (magic, version) != (_MAGIC, _VERSION):
        raise TensorFileError("of another kind or version")
    return layout, meta_bytes


def _check(head: bytes, length: int, shapes: Shapes) -> int:
    """Return where the arrays of these shapes begin in so many bytes. Raises TensorFileError."""
    layout, meta_bytes = _read_head(head)
    if layout != _layout_hash(shapes):
        raise TensorFileError("of another model")
    if length != packed_bytes(shapes, meta_bytes):
        raise TensorFileError(f"of {length} bytes instead of {packed_bytes(shapes, meta_bytes)}")
    return _HEADER.size + meta_bytes


def unpack_tensors(data: bytes, shapes: Shapes) -> tuple[bytes, Arrays]:
    """Inverse of `pack_tensors`, for arrays of exactly these shapes; the arrays are read-only views of `data`.

    Raises:
        TensorFileError: anything else.
    """
    position = _check(data[: _HEADER.size], len(data), shapes)
    meta, arrays = data[_HEADER.size : position], {}
    for name, shape in shapes.items():
        count = int(np.prod(shape, dtype=np.int64))
        arrays[name] = np.frombuffer(data, "<f4", count, position).reshape(shape)
        position += 4 * count
    return meta, arrays
