"""Tensors as bytes: a small header, some bytes of meaning, and the arrays one after another.

Names, types and shapes are not in the bytes: they follow from the manifest, so a reader knows the length before it
reads, and a stranger's file can claim nothing. Their hash is in the header, so that another model's file is told from a
damaged one. Cost: one copy, or none where a file is mapped: then one array at a time is in memory.
"""

from __future__ import annotations

import hashlib
import mmap
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from p2ptrain.state.frozen import bytes_of

Arrays = dict[str, NDArray[np.float32]]
Shapes = Mapping[str, tuple[int, ...]]
Places = Mapping[str, tuple[int, tuple[int, ...]]]

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


def mapped(path: Path) -> Any:
    """Return a file's bytes as a view of its pages, which the kernel may take back. Raises OSError.

    A file that is replaced or removed meanwhile stays here as it was; one that is cut off must not be mapped.
    """
    with path.open("rb") as file:
        if not path.stat().st_size:
            return b""
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


class ArraysOnDisk(Arrays):
    """Arrays of a mapped file: each is read when it is asked for by name, and its pages are given back.

    Args:
        file: as `mapped` returned it.
        places: by name, where an array begins, and its shape.
    """

    def __init__(self, file: memoryview, places: Places) -> None:
        super().__init__()
        self._file, self._places = file, places

    def __missing__(self, name: str) -> NDArray[np.float32]:
        position, shape = self._places[name]
        count = _values({name: shape})
        array = np.frombuffer(self._file, "<f4", count, position).reshape(shape).copy()
        let_go(self._file, position, position + 4 * count)
        return array


def let_go(file: memoryview, start: int, end: int) -> None:
    """Give the pages of a mapped file that have been read back to the kernel."""
    if isinstance(file.obj, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED") and end > start:
        first = start // mmap.PAGESIZE * mmap.PAGESIZE
        file.obj.madvise(mmap.MADV_DONTNEED, first, min(end, len(file)) - first)


def places_of(shapes: Shapes, position: int) -> Places:
    """Return where arrays of these shapes lie that stand one after another from `position` on."""
    places = {}
    for name, shape in shapes.items():
        places[name] = position, tuple(shape)
        position += 4 * _values({name: shape})
    return places


def unpack_tensors(data: bytes | memoryview, shapes: Shapes) -> tuple[bytes, Arrays]:
    """Inverse of `pack_tensors`, for arrays of exactly these shapes.

    They are read-only views of `data`; of what `mapped` returned each is a copy, made when it is asked for by name.

    Raises:
        TensorFileError: anything else.
    """
    position = _check(bytes(data[: _HEADER.size]), len(data), shapes)
    meta, places = bytes(data[_HEADER.size : position]), places_of(shapes, position)
    if isinstance(data, memoryview):
        return meta, ArraysOnDisk(data, places)
    return meta, {
        name: np.frombuffer(data, "<f4", _values({name: shape}), start).reshape(shape)
        for name, (start, shape) in places.items()
    }
