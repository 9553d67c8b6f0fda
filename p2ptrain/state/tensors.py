"""Tensors as bytes: a small header, some bytes of meaning, and the arrays one after another.

Names, types and shapes are not in the bytes: they follow from the manifest, so a reader knows the length before it
reads, and a stranger's file can claim nothing. Their hash is in the header, so that another model's file is told from a
damaged one. Cost: one copy.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping

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


def pack_tensors(meta: bytes, arrays: Mapping[str, NDArray[np.float32]]) -> bytes:
    """Float32 arrays, in their order, behind `meta`."""
    shapes = {name: array.shape for name, array in arrays.items()}
    head = _HEADER.pack(_MAGIC, _VERSION, _layout_hash(shapes), len(meta))
    return b"".join([head, meta, *(np.ascontiguousarray(array, "<f4").data.cast("B") for array in arrays.values())])


def meta_of(data: bytes, max_bytes: int) -> bytes:
    """Return the meta alone, of at most `max_bytes`, where the shapes are not known yet. Raises TensorFileError."""
    if len(data) < _HEADER.size:
        raise TensorFileError("too short")
    magic, version, _, meta_bytes = _HEADER.unpack_from(data)
    if (magic, version) != (_MAGIC, _VERSION):
        raise TensorFileError("of another kind or version")
    if meta_bytes > max_bytes or len(data) < _HEADER.size + meta_bytes:
        raise TensorFileError(f"with a meta of {meta_bytes} bytes")
    return data[_HEADER.size : _HEADER.size + meta_bytes]


def unpack_tensors(data: bytes, shapes: Shapes) -> tuple[bytes, Arrays]:
    """Inverse of `pack_tensors`, for arrays of exactly these shapes; the arrays are read-only views of `data`.

    Raises:
        TensorFileError: anything else.
    """
    if len(data) < _HEADER.size:
        raise TensorFileError("too short")
    magic, version, layout, meta_bytes = _HEADER.unpack_from(data)
    if (magic, version) != (_MAGIC, _VERSION):
        raise TensorFileError("of another kind or version")
    if layout != _layout_hash(shapes):
        raise TensorFileError("of another model")
    if len(data) != packed_bytes(shapes, meta_bytes):
        raise TensorFileError(f"of {len(data)} bytes instead of {packed_bytes(shapes, meta_bytes)}")
    position = _HEADER.size + meta_bytes
    meta, arrays = data[_HEADER.size : position], {}
    for name, shape in shapes.items():
        count = int(np.prod(shape, dtype=np.int64))
        arrays[name] = np.frombuffer(data, "<f4", count, position).reshape(shape)
        position += 4 * count
    return meta, arrays
