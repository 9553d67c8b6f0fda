"""What a contribution and a reply look like as bytes (the payload; the averaging layer frames, hashes and signs it).

Both begin with a magic, a version and every count that their length follows from, so that a reader checks the length
before it decodes anything. docs/protocol.md is the specification. All counts are fixed by the manifest: a payload that
says otherwise is refused, never adapted to.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from p2ptrain.compression import coding
from p2ptrain.compression.layout import CHUNK_SIZE

_CONTRIBUTION = struct.Struct("<4sBBIII")  # magic, version, bits a value, first chunk, end chunk, coefficients
_REPLY = struct.Struct("<4sBIIIHH")  # magic, version, first chunk, end chunk, coefficients, members, clip exceptions
CONTRIBUTION_MAGIC, REPLY_MAGIC = b"P2Tc", b"P2Tr"
VERSION = 1
FLOAT_BITS = 32  # "bits a value" of a contribution with plain float32 values


class WireError(ValueError):
    """Bytes that are not a payload of the expected form."""


@dataclass(frozen=True, slots=True)
class Coefficients:
    """Sparse coefficients of the chunks [start, end).

    Attributes:
        chunk: [n] chunk numbers, non-decreasing.
        index: [n] index inside the chunk, strictly increasing inside a chunk.
        value: [n] float32, as every receiver will decode it.
    """

    start: int
    end: int
    chunk: NDArray[np.int64]
    index: NDArray[np.int64]
    value: NDArray[np.float32]

    def cut(self, start: int, end: int) -> Coefficients:
        """Those of chunks [start, end)."""
        low, high = np.searchsorted(self.chunk, (start, end))
        return Coefficients(start, end, self.chunk[low:high], self.index[low:high], self.value[low:high])


def join(parts: Sequence[Coefficients]) -> Coefficients:
    """Coefficients of adjoining ranges, in order, as those of the whole."""
    return Coefficients(
        parts[0].start,
        parts[-1].end,
        np.concatenate([part.chunk for part in parts]),
        np.concatenate([part.index for part in parts]),
        np.concatenate([part.value for part in parts]),
    )


def quantise(chunk: NDArray[np.int64], value: NDArray[np.float32], value_bits: int) -> NDArray[np.float32]:
    """The values [n] that a receiver will see for these; `chunk` [n] non-decreasing. 32 bits: unchanged."""
    if value_bits == FLOAT_BITS or not len(value):
        return value.astype(np.float32)
    starts = np.flatnonzero(np.r_[True, chunk[1:] != chunk[:-1]])
    counts = np.diff(np.r_[starts, len(chunk)])
    magnitude = np.abs(value)
    mean = (np.add.reduceat(magnitude.astype(np.float64), starts) / counts).astype(np.float32)
    scale = np.repeat(coding.scale_table()[coding.nearest_scale(mean)], counts)
    if value_bits == 1:
        level = scale
    else:
        low, high = coding.LEVELS_2BIT
        level = np.where(magnitude > scale * coding.LEVEL_SPLIT_2BIT, scale * high, scale * low).astype(np.float32)
    return np.where(value < 0, -level, level).astype(np.float32)


def contribution_bytes(topk: Sequence[int], start: int, end: int, value_bits: int) -> int:
    """Length of every contribution for chunks [start, end)."""
    count = int(sum(topk[start:end]))
    values = 4 * count if value_bits == FLOAT_BITS else (end - start) + (count * value_bits + 7) // 8
    return _CONTRIBUTION.size + coding.packed_indices_bytes(count) + values


def encode_contribution(part: Coefficients, topk: Sequence[int], value_bits: int) -> bytes:
    """Encode values that `quantise` has been through; every chunk holds exactly its top-k count."""
    count = len(part.chunk)
    out = [_CONTRIBUTION.pack(CONTRIBUTION_MAGIC, VERSION, value_bits, part.start, part.end, count)]
    out.append(coding.pack_indices(part.index))
    if value_bits == FLOAT_BITS:
        return b"".join([*out, part.value.astype("<f4").tobytes()])
    counts = np.asarray(topk[part.start : part.end])
    starts = np.r_[0, np.cumsum(counts)[:-1]]
    magnitude = np.abs(part.value)
    if value_bits == 1:
        codes = coding.nearest_scale(magnitude[starts])
        flags = part.value < 0
    else:
        codes, large = _two_bit_scales(magnitude, starts, counts)
        flags = np.empty(2 * count, np.bool_)
        flags[0::2], flags[1::2] = part.value < 0, large
    return b"".join([*out, codes.tobytes(), coding.pack_bits(flags)])


def _two_bit_scales(
    magnitude: NDArray[np.float32], starts: NDArray[np.int64], counts: NDArray[np.int64]
) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """Scale codes [chunks] and magnitude bits [n] that give these quantised magnitudes back exactly."""
    table = coding.scale_table()
    low, high = coding.LEVELS_2BIT
    largest = np.maximum.reduceat(magnitude, starts)
    smallest = np.minimum.reduceat(magnitude, starts)
    # A chunk at one level alone is read as all low; its scale follows from whichever level it is.
    codes = coding.nearest_scale((smallest / low).astype(np.float32))
    all_high = (largest == smallest) & (table[codes] * low != smallest)
    codes = np.where(all_high, coding.nearest_scale((smallest / high).astype(np.float32)), codes).astype(np.uint8)
    return codes, magnitude > np.repeat(table[codes], counts) * coding.LEVEL_SPLIT_2BIT


def decode_contribution(data: bytes, topk: Sequence[int], start: int, end: int, value_bits: int) -> Coefficients:
    """Decode a contribution for chunks [start, end).

    Raises:
        WireError: anything but a well-formed contribution of exactly this part.
    """
    expected = contribution_bytes(topk, start, end, value_bits)
    if len(data) != expected:
        raise WireError(f"contribution of {len(data)} bytes, expected {expected}")
    magic, version, bits, first, last, count = _CONTRIBUTION.unpack_from(data)
    counts = np.asarray(topk[start:end], np.int64)
    header = (CONTRIBUTION_MAGIC, VERSION, value_bits, start, end, int(counts.sum()))
    if (magic, version, bits, first, last, count) != header:
        raise WireError("contribution header does not match the part")
    position = _CONTRIBUTION.size
    size = coding.packed_indices_bytes(count)
    index = coding.unpack_indices(data[position : position + size], count)
    chunk = np.repeat(np.arange(start, end), counts)
    _check_order(chunk, index)
    position += size
    if value_bits == FLOAT_BITS:
        value = np.frombuffer(data, "<f4", count, position).astype(np.float32)
        if not np.isfinite(value).all():
            raise WireError("contribution holds values that are not finite")
        return Coefficients(start, end, chunk, index, value)
    codes = np.frombuffer(data, np.uint8, end - start, position)
    flags = coding.unpack_bits(data[position + (end - start) :], count * value_bits)
    scale = np.repeat(coding.scale_table()[codes], counts)
    if value_bits == 1:
        negative, level = flags, scale
    else:
        low, high = coding.LEVELS_2BIT
        negative, level = flags[0::2], np.where(flags[1::2], scale * high, scale * low).astype(np.float32)
    return Coefficients(start, end, chunk, index, np.where(negative, -level, level).astype(np.float32))


def _check_order(chunk: NDArray[np.int64], index: NDArray[np.int64]) -> None:
    flat = chunk * CHUNK_SIZE + index
    if (np.diff(flat) <= 0).any():
        raise WireError("indices are not strictly increasing")


@dataclass(frozen=True, slots=True)
class ReplyContent:
    """A reply, decoded.

    Attributes:
        included: indices of the members whose message was summed.
        clips: member index -> factor that its values were multiplied by, in 256ths; absent: 256.
        coefficients: value = quantised byte * scale; `byte` [n] holds the integer itself, for the exact decode.
        scale: [end - start] float32, a chunk's scale.
    """

    included: frozenset[int]
    clips: dict[int, int]
    coefficients: Coefficients
    byte: NDArray[np.int64]
    scale: NDArray[np.float32]


def reply_max_bytes(reply_topk: Sequence[int], start: int, end: int, members: int) -> int:
    """Largest length of a reply for chunks [start, end)."""
    count = int(sum(reply_topk[start:end]))
    fixed = _REPLY.size + (members + 7) // 8 + 3 * members + 3 * (end - start)
    return fixed + coding.packed_indices_bytes(count) + count


def encode_reply(
    start: int,
    end: int,
    members: int,
    included: frozenset[int],
    clips: dict[int, int],
    counts: NDArray[np.int64],
    index: NDArray[np.int64],
    byte: NDArray[np.int64],
    codes: NDArray[np.uint8],
) -> bytes:
    """Encode a reply: `counts` [end - start] coefficients a chunk, `index` and `byte` [n] over all of them."""
    bitmap = bytearray((members + 7) // 8)
    for member in included:
        bitmap[member // 8] |= 1 << (member % 8)
    header = _REPLY.pack(REPLY_MAGIC, VERSION, start, end, len(index), members, len(clips))
    exceptions = b"".join(struct.pack("<HB", member, factor) for member, factor in sorted(clips.items()))
    sizes = counts.astype("<u2").tobytes()
    values = byte.astype(np.int8).tobytes()
    return b"".join([header, bytes(bitmap), exceptions, sizes, codes.tobytes(), coding.pack_indices(index), values])


def decode_reply(data: bytes, reply_topk: Sequence[int], start: int, end: int, members: int) -> ReplyContent:
    """Decode the reply for chunks [start, end) of a round with `members` members.

    Raises:
        WireError: anything but a well-formed reply of exactly this part.
    """
    if not _REPLY.size <= len(data) <= reply_max_bytes(reply_topk, start, end, members):
        raise WireError(f"reply of {len(data)} bytes")
    magic, version, first, last, count, told, exceptions = _REPLY.unpack_from(data)
    if (magic, version, first, last, told) != (REPLY_MAGIC, VERSION, start, end, members) or exceptions > members:
        raise WireError("reply header does not match the part")
    chunks, bitmap_bytes = end - start, (members + 7) // 8
    size = _REPLY.size + bitmap_bytes + 3 * exceptions + 3 * chunks + coding.packed_indices_bytes(count) + count
    if len(data) != size:
        raise WireError(f"reply of {len(data)} bytes, expected {size}")
    position = _REPLY.size
    bits = coding.unpack_bits(data[position : position + bitmap_bytes], 8 * bitmap_bytes)
    included = frozenset(int(i) for i in np.flatnonzero(bits))
    if included and max(included) >= members:
        raise WireError("reply includes members that are not there")
    position += bitmap_bytes
    clips = dict(struct.iter_unpack("<HB", data[position : position + 3 * exceptions]))
    if len(clips) != exceptions or not clips.keys() <= included:
        raise WireError("reply clips members that it does not include")
    position += 3 * exceptions
    counts = np.frombuffer(data, "<u2", chunks, position).astype(np.int64)
    if counts.sum() != count or (counts > np.asarray(reply_topk[start:end])).any():
        raise WireError("reply keeps more coefficients than allowed")
    position += 2 * chunks
    codes = np.frombuffer(data, np.uint8, chunks, position)
    position += chunks
    packed = coding.packed_indices_bytes(count)
    index = coding.unpack_indices(data[position : position + packed], count)
    byte = np.frombuffer(data, np.int8, count, position + packed).astype(np.int64)
    chunk = np.repeat(np.arange(start, end), counts)
    _check_order(chunk, index)
    scale = coding.scale_table()[codes]
    value = (byte * np.repeat(scale, counts)).astype(np.float32)
    return ReplyContent(included, clips, Coefficients(start, end, chunk, index, value), byte, scale)


def reply_members(data: bytes, members: int) -> frozenset[int]:
    """The members that a reply includes, without decoding the rest.

    Raises:
        WireError: too short, or another number of members.
    """
    end = _REPLY.size + (members + 7) // 8
    if len(data) < end or _REPLY.unpack_from(data)[5] != members:
        raise WireError("not a reply of this round")
    bits = np.unpackbits(np.frombuffer(data[_REPLY.size : end], np.uint8), bitorder="little")
    found = frozenset(int(i) for i in np.flatnonzero(bits))
    if found and max(found) >= members:
        raise WireError("reply includes members that are not there")
    return found


def header_bytes(data: bytes) -> int:
    """How much of a payload of our own is neither index, nor scale, nor value."""
    if data[:4] == CONTRIBUTION_MAGIC:
        return _CONTRIBUTION.size
    *_, members, clips = _REPLY.unpack_from(data)
    return _REPLY.size + int((members + 7) // 8 + 3 * clips)
