"""Where each parameter's entries lie among the chunks.

A parameter of two or more dimensions is seen as a matrix [shape[0], rest] and cut into 64x64 chunks, padded with zeros
at its right and lower edges. Where it is not transformed, neighbours mean nothing, and its rows are dealt out instead:
the chunks of band t hold rows t, t + bands, t + 2 bands and so on. Every chunk sends as many coefficients, and the rows
of an embedding or head are in the order of the tokenizer's merges, frequent tokens first: next to each other, those of
the first chunks would share what they may send while those of the last have little to say (docs/learning.md has what
that costs). A vector or scalar is cut into segments of 64, 64 of them to a chunk. Padding makes any
shape work (a prime side has no useful divisor), and one chunk size for everything lets the transform, the selection
and the codec run over chunks of many parameters at once; the price is momentum for the padding.

What reads or writes parameters goes batch by batch: so many chunks that a batch and what is made of it stay in a
processor's cache. A batch holds pieces of parameters that are all transformed and stepped alike, and a piece is a
rectangle of its parameter, so that neither copies more than the batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

SIDE = 64
CHUNK_SIZE = SIDE * SIDE

Kind = Literal["matrix", "embedding", "head", "vector"]
Transform = Literal["dct", "none"]
Form = Literal["both", "rows", "none"]
"""How a chunk is transformed: in both dimensions, in each row of 64, or not at all."""


@dataclass(frozen=True, slots=True)
class ParameterSpec:
    """Name, shape and kind of one parameter; the kind decides how it is treated."""

    name: str
    shape: tuple[int, ...]
    kind: Kind


@dataclass(frozen=True, slots=True, kw_only=True)
class Treatment:
    """How parameters of one kind are compressed and stepped."""

    transform: Transform
    direction: str
    learning_rate_scale: float
    topk: int
    """Coefficients a member sends per chunk."""
    reply_topk: int
    """Coefficients a reducer keeps per chunk, at most."""


@dataclass(frozen=True, slots=True)
class Segment:
    """The chunks [start, end) of one parameter."""

    spec: ParameterSpec
    treatment: Treatment
    start: int
    end: int
    rows: int
    """Rows and columns of the parameter as a matrix; a vector has one row."""
    columns: int

    @property
    def is_vector(self) -> bool:
        """Laid out in segments of 64, and transformed along rows only."""
        return len(self.spec.shape) < 2

    @property
    def form(self) -> Form:
        """How its chunks are transformed."""
        if self.treatment.transform == "none":
            return "none"
        return "rows" if self.is_vector else "both"

    @property
    def wide(self) -> int:
        """Chunks side by side in a matrix."""
        return math.ceil(self.columns / SIDE)

    @property
    def bands(self) -> int:
        """Chunks one below the other in a matrix."""
        return math.ceil(self.rows / SIDE)

    @property
    def dealt(self) -> bool:
        """Rows are dealt out among bands, not 64 neighbours to each."""
        return self.treatment.transform == "none" and not self.is_vector


@dataclass(frozen=True, slots=True)
class Piece:
    """Chunks [start, end) of one parameter that form a rectangle of it; of a vector, a range."""

    number: int
    """The parameter's."""
    segment: Segment
    start: int
    end: int

    @property
    def first(self) -> int:
        """Its first chunk, counted from the parameter's first."""
        return self.start - self.segment.start

    def views(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """Its entries of a parameter-shaped tensor, as views if that is contiguous.

        Of a vector [entries], of a matrix [rows, columns]; of one whose rows are dealt out [rows of each band, bands,
        columns], and [bands, columns] of those bands that have a row more, if there are any.
        """
        segment = self.segment
        if segment.is_vector:
            return (tensor.reshape(-1)[self.first * CHUNK_SIZE : (self.end - segment.start) * CHUNK_SIZE],)
        top, left, tall, wide = self._rectangle()
        matrix = tensor.reshape(segment.rows, segment.columns)[:, left * SIDE : (left + wide) * SIDE]
        if not segment.dealt:
            return (matrix[top * SIDE : (top + tall) * SIDE],)
        each, more = self._rows_of_each()
        dealt = matrix[: each * segment.bands].unflatten(0, (each, segment.bands))[:, top : top + tall]
        last = matrix[each * segment.bands + top :][:more]
        return (dealt, last) if more else (dealt,)

    def entries(self, chunks: Tensor) -> tuple[Tensor, ...]:
        """Of `chunks` [end - start, 64 * 64], what lies at `views`, in their shapes; it may share their memory."""
        segment = self.segment
        if segment.is_vector:
            return (chunks.reshape(-1)[: segment.columns - self.first * CHUNK_SIZE],)
        top, left, tall, wide = self._rectangle()
        blocks, columns = self.as_blocks(chunks), segment.columns - left * SIDE
        if not segment.dealt:
            matrix = blocks.transpose(1, 2).reshape(tall * SIDE, wide * SIDE)
            return (matrix[: segment.rows - top * SIDE, :columns],)
        dealt = blocks.permute(2, 0, 1, 3).reshape(SIDE, tall, wide * SIDE)[..., :columns]
        each, more = self._rows_of_each()
        return (dealt[:each], dealt[each, :more]) if more else (dealt[:each],)

    def blocks(self, tensor: Tensor) -> Tensor | None:
        """The same as a view [tall, wide, 64, 64], where that is a matrix of whole chunks; None: it is not."""
        segment = self.segment
        if segment.is_vector:
            return None
        top, left, tall, wide = self._rectangle()
        bottom = segment.bands if segment.dealt else top + tall
        if bottom * SIDE > segment.rows or (left + wide) * SIDE > segment.columns:
            return None
        # One operation in place of six, each of which would give up Python's lock.
        tensor, row = tensor.contiguous(), segment.columns
        first, apart = (top, segment.bands) if segment.dealt else (top * SIDE, 1)
        offset = tensor.storage_offset() + first * row + left * SIDE
        band = row if segment.dealt else SIDE * row
        return tensor.as_strided((tall, wide, SIDE, SIDE), (band, SIDE, apart * row, 1), offset)

    def as_blocks(self, chunks: Tensor) -> Tensor:
        """Its chunks [end - start, 64 * 64] in the order of `blocks`."""
        _, _, tall, wide = self._rectangle()
        return chunks.view(tall, wide, SIDE, SIDE)

    def read(self, tensor: Tensor, chunks: Tensor) -> None:
        """Copy its entries of a parameter-shaped tensor to `chunks` [end - start, 64 * 64], with zeros around them."""
        blocks = self.blocks(tensor)
        if blocks is not None:
            self.as_blocks(chunks).copy_(blocks)
            return
        views = self.views(tensor)
        if self.segment.is_vector:
            chunks.view(-1)[: len(views[0])].copy_(views[0])
            chunks.view(-1)[len(views[0]) :].zero_()
            return
        _, _, tall, wide = self._rectangle()
        if not self.segment.dealt:
            matrix = tensor.new_zeros(tall * SIDE, wide * SIDE)
            matrix[: len(views[0]), : views[0].shape[1]] = views[0]
            self.as_blocks(chunks).copy_(matrix.view(tall, SIDE, wide, SIDE).transpose(1, 2))
            return
        dealt, (each, more) = tensor.new_zeros(SIDE, tall, wide * SIDE), self._rows_of_each()
        dealt[:each, :, : views[0].shape[-1]] = views[0]
        if more:
            dealt[each, :more, : views[1].shape[-1]] = views[1]
        self.as_blocks(chunks).copy_(dealt.view(SIDE, tall, wide, SIDE).permute(1, 2, 0, 3))

    def flat(self, place: Tensor) -> tuple[Tensor, Tensor]:
        """Where `place` [n], of its chunks flattened, lies in a flattened parameter; False for what is padding."""
        segment = self.segment
        if segment.is_vector:
            flat = place + self.first * CHUNK_SIZE
            return flat, flat < segment.columns
        chunk, index = place // CHUNK_SIZE + self.first, place % CHUNK_SIZE
        band, inside = chunk // segment.wide, index // SIDE
        row = inside * segment.bands + band if segment.dealt else band * SIDE + inside
        column = (chunk - band * segment.wide) * SIDE + index % SIDE
        return row * segment.columns + column, (row < segment.rows) & (column < segment.columns)

    def _rows_of_each(self) -> tuple[int, int]:
        """Of a matrix whose rows are dealt out: how many every band has, and how many of our bands have one more."""
        top, _, tall, _ = self._rectangle()
        each, more = divmod(self.segment.rows, self.segment.bands)
        return each, min(max(more - top, 0), tall)

    def _rectangle(self) -> tuple[int, int, int, int]:
        """Top, left, height and width, in chunks."""
        top, left = divmod(self.first, self.segment.wide)
        wide = min(self.end - self.start, self.segment.wide)
        return top, left, (self.end - self.start) // wide, wide


@dataclass(frozen=True, slots=True)
class Batch:
    """Chunks [start, end), of parameters of one form and one treatment."""

    form: Form
    start: int
    end: int
    pieces: tuple[Piece, ...]


class ChunkLayout:
    """Maps parameters, in order, to chunks; a pure function of specs and treatments.

    Args:
        specs: the parameters in the order in which every peer holds them.
        treatments: by kind.
    """

    def __init__(self, specs: Sequence[ParameterSpec], treatments: Mapping[str, Treatment]) -> None:
        segments, start = [], 0
        for spec in specs:
            if len(spec.shape) < 2:
                rows, columns = 1, max(1, math.prod(spec.shape))
                count = math.ceil(columns / CHUNK_SIZE)
            else:
                rows, columns = spec.shape[0], math.prod(spec.shape[1:])
                count = math.ceil(rows / SIDE) * math.ceil(columns / SIDE)
            segments.append(Segment(spec, treatments[spec.kind], start, start + count, rows, columns))
            start += count
        self.segments: tuple[Segment, ...] = tuple(segments)
        self.chunks = start
        self.topk = self._per_chunk(lambda t: t.topk)
        self.reply_topk = self._per_chunk(lambda t: t.reply_topk)
        #: runs of chunks of one form: [start, end)
        self.runs: tuple[tuple[Form, int, int], ...] = ()
        for segment in segments:
            if self.runs and self.runs[-1][0] == segment.form:
                self.runs = (*self.runs[:-1], (segment.form, self.runs[-1][1], segment.end))
            else:
                self.runs = (*self.runs, (segment.form, segment.start, segment.end))
        #: chunks to transform in two dimensions, in one, and not at all
        self.matrix_chunks = self._of_form("both")
        self.row_chunks = self._of_form("rows")
        self.plain_chunks = self._of_form("none")

    def _of_form(self, form: Form) -> Tensor:
        runs = [torch.arange(start, end) for which, start, end in self.runs if which == form]
        return torch.cat(runs) if runs else torch.zeros(0, dtype=torch.int64)

    def _per_chunk(self, of: Callable[[Treatment], int]) -> tuple[int, ...]:
        values: list[int] = []
        for segment in self.segments:
            values += [of(segment.treatment)] * (segment.end - segment.start)
        return tuple(values)

    def batches(self, most: int) -> tuple[Batch, ...]:
        """All chunks, in order, at most `most` at a time."""
        batches: list[Batch] = []
        held: list[Piece] = []

        def close() -> None:
            if held:
                batches.append(Batch(held[0].segment.form, held[0].start, held[-1].end, tuple(held)))
                held.clear()

        for number, segment in enumerate(self.segments):
            if held and (held[0].segment.form, held[0].segment.treatment) != (segment.form, segment.treatment):
                close()
            for start, end in _rectangles(segment, most):
                if held and end - held[0].start > most:
                    close()
                held.append(Piece(number, segment, start, end))
        close()
        return tuple(batches)

    def gather(self, tensors: Sequence[Tensor | None], out: Tensor) -> Tensor:
        """Copy parameter-shaped tensors into chunks; None counts as zeros.

        Args:
            tensors: one per segment, in order.
            out: [chunks, 64 * 64], overwritten.
        """
        for number, (segment, tensor) in enumerate(zip(self.segments, tensors, strict=True)):
            block = out[segment.start : segment.end]
            if tensor is None:
                block.zero_()
            else:
                Piece(number, segment, segment.start, segment.end).read(tensor, block)
        return out

    def extract(self, segment: Segment, chunks: Tensor) -> Tensor:
        """The parameter-shaped tensor that lies in `chunks` [all chunks, 64 * 64]; it may share their memory."""
        entries = Piece(0, segment, segment.start, segment.end).entries(chunks[segment.start : segment.end])
        if segment.dealt:
            entries = tuple(part.reshape(-1, segment.columns) for part in entries)
        return (torch.cat(entries) if len(entries) > 1 else entries[0]).reshape(segment.spec.shape)


def _rectangles(segment: Segment, most: int) -> Iterator[tuple[int, int]]:
    """Chunks of a segment in ranges of at most `most`, each a rectangle."""
    row = 1 if segment.is_vector else segment.wide
    step = most // row * row if row <= most else most
    for band in range(segment.start, segment.end, max(step, row)):
        band_end = min(band + max(step, row), segment.end)
        for start in range(band, band_end, step):
            yield start, min(start + step, band_end)
