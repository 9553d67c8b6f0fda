"""What a contribution and a reply look like as bytes (the payload; `calls/` frames, hashes and signs it).

Both begin with a magic, a version and every count; the rest is one string of bits. docs/protocol.md is the
specification. All counts are fixed by the manifest: a payload that says otherwise is refused, never adapted to, and so
nothing is allocated for what it claims. One content has one form: bytes that an encoder would not write are refused.

Cost: of a coefficient, the entropy of its index or a little more, a sign, and what is left of magnitude and scale; how
many bits that comes to is in docs/log.md.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from p2ptrain.compression import bitmaps, coding
from p2ptrain.compression.bits import BitReader, BitWriter, WireError, sieve_max_bits, symbols_max_bits
from p2ptrain.compression.codec import Codec
from p2ptrain.compression.indices import indices_max_bits, read_indices, write_indices
from p2ptrain.native.compiled import compiled

_CONTRIBUTION = struct.Struct("<4sBBIII")  # magic, version, bits a value, first chunk, end chunk, coefficients
_REPLY = struct.Struct("<4sBIIIHH")  # magic, version, first chunk, end chunk, coefficients, members, clip exceptions
CONTRIBUTION_MAGIC, REPLY_MAGIC = b"P2Tc", b"P2Tr"
VERSION = 2
FLOAT_BITS = 32  # "bits a value" of a contribution with plain float32 values


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


def contribution_max_bytes(codec: Codec, start: int, end: int) -> int:
    """Return the largest length of a contribution for chunks [start, end), in bytes."""
    counts = codec.topk[start:end]
    count = int(sum(counts))
    bits = indices_max_bits(count, max(counts))
    if codec.value_bits == FLOAT_BITS:
        return _CONTRIBUTION.size + (bits + 7) // 8 + 4 * count
    bits += symbols_max_bits(end - start, coding.SCALE_BITS) + count
    bits += {1: 0, 2: sieve_max_bits(count), 8: symbols_max_bits(count, coding.MAGNITUDE_BITS)}[codec.value_bits]
    return _CONTRIBUTION.size + (bits + 7) // 8


def encode_contribution(part: Coefficients, codec: Codec) -> bytes:
    """Encode values that were quantised as they were selected; every chunk holds exactly its top-k count."""
    return _write_contribution(part, codec)[0]


def section_bits(part: Coefficients, codec: Codec) -> dict[str, int]:
    """Count the bits of a contribution: header (padding too), index, scale, sign, magnitude; 32 bits a value: value."""
    return _write_contribution(part, codec)[1]


def _write_contribution(part: Coefficients, codec: Codec) -> tuple[bytes, dict[str, int]]:
    count, counts, value_bits = len(part.chunk), np.array(codec.topk[part.start : part.end]), codec.value_bits
    header = _CONTRIBUTION.pack(CONTRIBUTION_MAGIC, VERSION, value_bits, part.start, part.end, count)
    writer = BitWriter()
    write_indices(writer, counts, part.index)
    sections = {"index": writer.length}
    values = b""
    if value_bits == FLOAT_BITS:
        values = part.value.astype("<f4").tobytes()
        sections["value"] = 8 * len(values)
    else:
        smallest, largest = np.empty((2, len(counts)), np.float32)
        _extremes(counts, part.value, smallest, largest)
        negative = part.value < 0
        if value_bits == 1:
            codes = coding.nearest_scale(smallest)
        elif value_bits == 2:
            codes = _two_bit_scales(smallest, largest)
            large = np.empty(count, np.bool_)
            _above(counts, part.value, coding.scale_table()[codes] * coding.LEVEL_SPLIT_2BIT, large)
        else:
            codes = coding.byte_scale(largest)
            scale = np.repeat(coding.scale_table()[codes], counts)
            size = np.divide(np.abs(part.value), scale, out=np.zeros(count, np.float32), where=scale > 0)
            byte = np.rint(size).astype(np.uint8)
            negative = negative[byte > 0]
        coding.write_scales(writer, codes)
        sections["scale"] = writer.length - sections["index"]
        before = writer.length
        if value_bits == 8:
            writer.symbols(byte, coding.MAGNITUDE_BITS)
            sections["magnitude"] = writer.length - before
        writer.flags(negative)
        sections["sign"] = len(negative)
        if value_bits == 2:
            before = writer.length
            writer.sieve(large)
            sections["magnitude"] = writer.length - before
    data = header + writer.to_bytes() + values
    return data, {"header": 8 * len(data) - sum(sections.values()), **sections}


def _two_bit_scales(smallest: NDArray[np.float32], largest: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Scale codes [chunks] that give quantised values with these extreme magnitudes [chunks] back exactly."""
    table = coding.scale_table()
    low, high = coding.LEVELS_2BIT
    # A chunk at one level alone is read as all low; its scale follows from whichever level it is.
    codes = coding.nearest_scale((smallest / low).astype(np.float32))
    all_high = (largest == smallest) & (table[codes] * low != smallest)
    return np.where(all_high, coding.nearest_scale((smallest / high).astype(np.float32)), codes).astype(np.uint8)


@compiled
def _extremes(
    counts: NDArray[np.int64],
    value: NDArray[np.float32],
    smallest: NDArray[np.float32],
    largest: NDArray[np.float32],
) -> None:
    """The smallest and largest magnitude of each chunk."""
    start = 0
    for chunk in range(len(counts)):
        least = most = abs(value[start])
        for place in range(start + 1, start + counts[chunk]):
            least, most = min(least, abs(value[place])), max(most, abs(value[place]))
        smallest[chunk], largest[chunk] = least, most
        start += counts[chunk]


@compiled
def _above(
    counts: NDArray[np.int64], value: NDArray[np.float32], split: NDArray[np.float32], large: NDArray[np.bool_]
) -> None:
    """Whether each value's magnitude is above its chunk's `split` [chunks]."""
    start = 0
    for chunk in range(len(counts)):
        for place in range(start, start + counts[chunk]):
            large[place] = abs(value[place]) > split[chunk]
        start += counts[chunk]


@compiled
def _of_levels(
    counts: NDArray[np.int64],
    low: NDArray[np.float32],
    high: NDArray[np.float32],
    negative: NDArray[np.bool_],
    large: NDArray[np.bool_],
    value: NDArray[np.float32],
) -> bool:
    """Values [n] from their chunks' levels [chunks]; False where a zero has a sign or a size."""
    start, plain = 0, True
    for chunk in range(len(counts)):
        for place in range(start, start + counts[chunk]):
            level = high[chunk] if large[place] else low[chunk]
            value[place] = -level if negative[place] else level
            plain &= low[chunk] > 0 or not (negative[place] | large[place])
        start += counts[chunk]
    return plain


def decode_contribution(data: bytes, codec: Codec, start: int, end: int) -> Coefficients:
    """Decode a contribution for chunks [start, end).

    Raises:
        WireError: anything but a well-formed contribution of exactly this part.
    """
    counts, value_bits = np.array(codec.topk[start:end]), codec.value_bits
    count = int(counts.sum())
    float_bytes = 4 * count if value_bits == FLOAT_BITS else 0
    longest = contribution_max_bytes(codec, start, end)
    if not _CONTRIBUTION.size + float_bytes <= len(data) <= longest:
        raise WireError(f"contribution of {len(data)} bytes")
    if _CONTRIBUTION.unpack_from(data) != (CONTRIBUTION_MAGIC, VERSION, value_bits, start, end, count):
        raise WireError("contribution header does not match the part")
    chunk = np.repeat(np.arange(start, end), counts)
    bits_end = len(data) - float_bytes
    reader = BitReader(data[:bits_end], _CONTRIBUTION.size)
    index = read_indices(reader, counts)
    if value_bits == FLOAT_BITS:
        reader.close()
        value = np.frombuffer(data, "<f4", count, bits_end).astype(np.float32)
        if not np.isfinite(value).all():
            raise WireError("contribution holds values that are not finite")
        return Coefficients(start, end, chunk, index, value)
    codes = coding.read_scales(reader, end - start)
    scale = coding.scale_table()[codes]
    if value_bits == 8:
        value = _read_bytes(reader, np.repeat(scale, counts))
        reader.close()
        if (coding.byte_scale(np.maximum.reduceat(np.abs(value), np.cumsum(counts) - counts)) != codes).any():
            raise WireError("contribution has scales that its values would not have")
        return Coefficients(start, end, chunk, index, value)
    negative, value = reader.flags(count), np.empty(count, np.float32)
    large = reader.sieve(count) if value_bits == 2 else np.zeros(count, np.bool_)
    reader.close()
    low, high = coding.LEVELS_2BIT if value_bits == 2 else (np.float32(1), np.float32(1))
    if not _of_levels(counts, scale * low, scale * high, negative, large, value):
        raise WireError("contribution gives zeros a sign or a size")
    return Coefficients(start, end, chunk, index, value)


def _read_bytes(reader: BitReader, scale: NDArray[np.float32]) -> NDArray[np.float32]:
    """Values [n] of 8 bits: magnitudes, and signs of those that are not 0."""
    byte = reader.symbols(len(scale), coding.MAGNITUDE_BITS)
    some = np.flatnonzero(byte)
    byte[some] = np.where(reader.flags(len(some)), -byte[some], byte[some])
    return (byte * scale).astype(np.float32)


@dataclass(frozen=True, slots=True)
class Kept:
    """What a reducer keeps of the chunks of a part.

    Attributes:
        counts: [chunks] coefficients of each, at most its `reply_topk`.
        index: [n] index inside the chunk, strictly increasing inside a chunk.
        byte: [n] value in units of its chunk's scale, never 0.
        codes: [chunks] scale of each, as `coding` numbers them.
    """

    counts: NDArray[np.int64]
    index: NDArray[np.int64]
    byte: NDArray[np.int64]
    codes: NDArray[np.uint8]


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


def reply_max_bytes(codec: Codec, start: int, end: int, members: int) -> int:
    """Return the largest length of a reply for chunks [start, end) of a round with `members` members, in bytes."""
    counts = codec.reply_topk[start:end]
    count, chunks, most = int(sum(counts)), end - start, max(counts)
    bits = symbols_max_bits(chunks, most.bit_length()) + symbols_max_bits(chunks, coding.SCALE_BITS)
    bits += indices_max_bits(count, most) + count + symbols_max_bits(count, coding.MAGNITUDE_BITS)
    return _REPLY.size + (members + 7) // 8 + 3 * members + (bits + 7) // 8


def encode_reply(
    kept: Kept, codec: Codec, start: int, members: int, included: frozenset[int], clips: dict[int, int]
) -> bytes:
    """Encode a reply for the chunks from `start` on; see `ReplyContent` for the rest."""
    end = start + len(kept.counts)
    header = _REPLY.pack(REPLY_MAGIC, VERSION, start, end, len(kept.index), members, len(clips))
    exceptions = b"".join(struct.pack("<HB", member, factor) for member, factor in sorted(clips.items()))
    limits = np.array(codec.reply_topk[start:end])
    writer = BitWriter()
    writer.symbols(limits - kept.counts, int(limits.max()).bit_length())
    coding.write_scales(writer, kept.codes)
    write_indices(writer, kept.counts, kept.index)
    writer.flags(kept.byte < 0)
    writer.symbols((np.abs(kept.byte) - 1).astype(np.uint8), coding.MAGNITUDE_BITS)
    return b"".join([header, bitmaps.pack(included, members), exceptions, writer.to_bytes()])


def decode_reply(data: bytes, codec: Codec, start: int, end: int, members: int) -> ReplyContent:
    """Decode the reply for chunks [start, end) of a round with `members` members.

    Raises:
        WireError: anything but a well-formed reply of exactly this part.
    """
    if not _REPLY.size <= len(data) <= reply_max_bytes(codec, start, end, members):
        raise WireError(f"reply of {len(data)} bytes")
    magic, version, first, last, count, told, exceptions = _REPLY.unpack_from(data)
    if (magic, version, first, last, told) != (REPLY_MAGIC, VERSION, start, end, members) or exceptions > members:
        raise WireError("reply header does not match the part")
    included = reply_members(data, members)
    position = _REPLY.size + (members + 7) // 8
    if len(data) < position + 3 * exceptions:
        raise WireError("reply ends too early")
    told_clips = list(struct.iter_unpack("<HB", data[position : position + 3 * exceptions]))
    clips = dict(told_clips)
    if sorted(clips.items()) != told_clips or not clips.keys() <= included:
        raise WireError("reply clips members out of order, or such as it does not include")
    limits = np.array(codec.reply_topk[start:end])
    reader = BitReader(data, position + 3 * exceptions)
    counts = limits - reader.symbols(end - start, int(limits.max()).bit_length())
    if counts.sum() != count or (counts < 0).any():
        raise WireError("reply keeps another number of coefficients than it says or may")
    codes = coding.read_scales(reader, end - start)
    index = read_indices(reader, counts)
    negative = reader.flags(count)
    size = reader.symbols(count, coding.MAGNITUDE_BITS) + 1
    reader.close()
    return reply_content(Kept(counts, index, np.where(negative, -size, size), codes), start, included, clips)


def reply_content(kept: Kept, start: int, included: frozenset[int], clips: dict[int, int]) -> ReplyContent:
    """Return what a reply of these holds, for the chunks from `start` on."""
    end = start + len(kept.counts)
    chunk = np.repeat(np.arange(start, end), kept.counts)
    scale = coding.scale_table()[kept.codes]
    value = (kept.byte * np.repeat(scale, kept.counts)).astype(np.float32)
    return ReplyContent(included, clips, Coefficients(start, end, chunk, kept.index, value), kept.byte, scale)


def reply_members(data: bytes, members: int) -> frozenset[int]:
    """The members that a reply includes, without decoding the rest.

    Raises:
        WireError: too short, or another number of members.
    """
    end = _REPLY.size + (members + 7) // 8
    if len(data) < end or _REPLY.unpack_from(data)[5] != members:
        raise WireError("not a reply of this round")
    try:
        return bitmaps.unpack(data[_REPLY.size : end], members)
    except ValueError as error:
        raise WireError(f"reply includes members that are not there: {error}") from error


def reply_chunks(data: bytes) -> tuple[int, int]:
    """The chunks [start, end) that a reply says it is for.

    Raises:
        WireError: too short.
    """
    if len(data) < _REPLY.size:
        raise WireError("reply ends too early")
    _, _, start, end, *_ = _REPLY.unpack_from(data)
    return start, end


def header_bytes(data: bytes) -> int:
    """How much of a payload of our own is neither index, nor scale, nor value."""
    if data[:4] == CONTRIBUTION_MAGIC:
        return _CONTRIBUTION.size
    *_, members, clips = _REPLY.unpack_from(data)
    return _REPLY.size + int((members + 7) // 8 + 3 * clips)
