"""Every entry of every parameter has one place among the chunks, whatever its shape."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from p2ptrain.compression.layout import CHUNK_SIZE, SIDE, ChunkLayout, Kind, ParameterSpec, Transform, Treatment

SHAPES = [(), (1,), (97,), (4096,), (4099,), (64, 64), (127, 131), (1, 200), (200, 1), (5, 3, 2, 7)]
KINDS: tuple[Kind, ...] = ("matrix", "embedding", "vector")


def treatment(topk: int = 3, reply_topk: int = 5, transform: Transform = "dct") -> Treatment:
    return Treatment(
        transform=transform,
        direction="sign",
        learning_rate_scale=1.0,
        topk=topk,
        reply_topk=reply_topk,
    )


def layout_of(shapes: list[tuple[int, ...]], transform: Transform = "dct") -> ChunkLayout:
    """With transform `none` rows are dealt out."""
    specs = [ParameterSpec(str(i), s, "matrix") for i, s in enumerate(shapes)]
    return ChunkLayout(specs, {"matrix": treatment(transform=transform)})


TRANSFORMS: tuple[Transform, ...] = ("dct", "none")


def numbered(shape: tuple[int, ...], first: int) -> torch.Tensor:
    """A tensor of which no two entries, nor any padding, are equal."""
    return (torch.arange(math.prod(shape)) + first).to(torch.float32).reshape(shape)


@given(
    st.lists(st.lists(st.integers(1, 80), max_size=2).map(tuple), min_size=1, max_size=4), st.sampled_from(TRANSFORMS)
)
@settings(max_examples=80)
def test_extract_gives_back_what_gather_took(shapes: list[tuple[int, ...]], transform: Transform) -> None:
    layout = layout_of(shapes, transform)
    tensors = [numbered(shape, 1) for shape in shapes]
    chunks = layout.gather(tensors, torch.full((layout.chunks, CHUNK_SIZE), torch.nan))
    for segment, tensor in zip(layout.segments, tensors, strict=True):
        assert torch.equal(layout.extract(segment, chunks), tensor)


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_each_shape_survives_between_two_others(shape: tuple[int, ...], transform: Transform) -> None:
    layout = layout_of([(70, 3), shape, (5,)], transform)
    tensors = [numbered(s, 10_000 * i + 1) for i, s in enumerate([(70, 3), shape, (5,)])]
    chunks = layout.gather(tensors, torch.empty(layout.chunks, CHUNK_SIZE))
    for segment, tensor in zip(layout.segments, tensors, strict=True):
        assert torch.equal(layout.extract(segment, chunks), tensor)


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_all_but_the_entries_is_zero(shape: tuple[int, ...], transform: Transform) -> None:
    layout = layout_of([shape], transform)
    chunks = layout.gather([numbered(shape, 1)], torch.full((layout.chunks, CHUNK_SIZE), torch.nan))
    assert int(torch.count_nonzero(chunks)) == math.prod(shape)


def test_a_matrix_is_cut_into_squares_row_by_row() -> None:
    rows, columns = 127, 131
    layout = layout_of([(rows, columns)])
    matrix = numbered((rows, columns), 1)
    chunks = layout.gather([matrix], torch.empty(layout.chunks, CHUNK_SIZE))
    assert layout.chunks == 2 * 3
    for row in (0, 63, 64, 126):
        for column in (0, 63, 64, 127, 128, 130):
            chunk = row // SIDE * 3 + column // SIDE
            assert chunks[chunk, row % SIDE * SIDE + column % SIDE] == matrix[row, column]


@pytest.mark.parametrize("rows", [1, 63, 64, 127, 128, 193, 256])
@pytest.mark.parametrize("columns", [64, 70])
def test_rows_of_what_is_not_transformed_are_dealt_out(rows: int, columns: int) -> None:
    layout = layout_of([(rows, columns)], "none")
    matrix = numbered((rows, columns), 1)
    chunks = layout.gather([matrix], torch.empty(layout.chunks, CHUNK_SIZE))
    bands, wide = math.ceil(rows / SIDE), math.ceil(columns / SIDE)
    assert layout.chunks == bands * wide
    blocks = chunks.view(bands, wide, SIDE, SIDE)
    for row in range(rows):
        padded = torch.zeros(wide * SIDE)
        padded[:columns] = matrix[row]
        assert torch.equal(blocks[row % bands, :, row // bands].flatten(), padded)


def test_a_vector_lies_in_order() -> None:
    layout = layout_of([(4099,)])
    vector = numbered((4099,), 1)
    chunks = layout.gather([vector], torch.empty(layout.chunks, CHUNK_SIZE))
    assert layout.chunks == 2
    assert torch.equal(chunks.flatten()[:4099], vector)


def test_more_than_two_dimensions_are_seen_as_rows_of_the_first() -> None:
    tensor = numbered((5, 3, 2, 7), 1)
    whole, flat = layout_of([(5, 3, 2, 7)]), layout_of([(5, 42)])
    out = torch.empty(1, CHUNK_SIZE)
    assert torch.equal(whole.gather([tensor], out.clone()), flat.gather([tensor.reshape(5, 42)], out.clone()))


def test_a_missing_gradient_counts_as_zeros() -> None:
    layout = layout_of([(3, 3), (3,)])
    chunks = layout.gather([None, torch.ones(3)], torch.full((2, CHUNK_SIZE), torch.nan))
    assert chunks[0].count_nonzero() == 0
    assert chunks[1].sum() == 3


def test_half_precision_gradients_become_float32() -> None:
    layout = layout_of([(3, 70)])
    gradient = torch.randn(3, 70).to(torch.bfloat16)
    chunks = layout.gather([gradient], torch.empty(2, CHUNK_SIZE))
    assert torch.equal(layout.extract(layout.segments[0], chunks), gradient.float())


@given(
    st.lists(st.lists(st.integers(1, 300), max_size=2).map(tuple), min_size=1, max_size=4),
    st.integers(1, 9),
    st.sampled_from(TRANSFORMS),
)
@settings(max_examples=80)
def test_batches_are_all_chunks_in_order_and_pieces_rectangles(
    shapes: list[tuple[int, ...]], most: int, transform: Transform
) -> None:
    layout = layout_of(shapes, transform)
    tensors = [numbered(shape, 1) for shape in shapes]
    expected = layout.gather(tensors, torch.empty(layout.chunks, CHUNK_SIZE))
    read = torch.full((layout.chunks, CHUNK_SIZE), torch.nan)
    position = 0
    for batch in layout.batches(most):
        assert batch.start == position
        assert 0 < batch.end - batch.start <= most
        for piece in batch.pieces:
            assert piece.start == position
            position = piece.end
            block, tensor = read[piece.start : piece.end], tensors[piece.number]
            piece.read(tensor, block)
            assert all(map(torch.equal, piece.entries(block), piece.views(tensor)))
            assert sum(map(torch.numel, piece.entries(block))) == sum(map(torch.numel, piece.views(tensor)))
            blocks = piece.blocks(tensor)
            if blocks is not None:
                assert torch.equal(piece.as_blocks(block), blocks)
            flat, there = piece.flat(torch.arange(block.numel()))
            assert torch.equal(tensor.flatten()[flat[there]], block.flatten()[there])
            assert not block.flatten()[~there].any()
        assert batch.end == position
    assert position == layout.chunks
    assert torch.equal(read, expected)


def test_a_batch_is_of_one_form_and_treatment() -> None:
    kinds = {"matrix": treatment(), "embedding": treatment(3, 5, "none"), "vector": treatment(2)}
    specs = [
        ParameterSpec(f"{kind}{n}", shape, kind) for kind, shape in zip(KINDS, SHAPES[5:8], strict=True) for n in "ab"
    ]
    layout = ChunkLayout(specs, kinds)
    batches = layout.batches(100)
    assert [[piece.segment.spec.kind for piece in batch.pieces] for batch in batches] == [[k, k] for k in KINDS]
    assert [batch.form for batch in batches] == ["both", "none", "both"]


def test_chunks_carry_the_counts_and_transform_of_their_kind() -> None:
    specs = [ParameterSpec(kind, shape, kind) for kind, shape in zip(KINDS, [(65, 64), (3, 3), (5000,)], strict=True)]
    layout = ChunkLayout(
        specs, {"matrix": treatment(2, 9), "embedding": treatment(7, 8, "none"), "vector": treatment(1, 4)}
    )
    assert layout.topk == (2, 2, 7, 1, 1)
    assert layout.reply_topk == (9, 9, 8, 4, 4)
    assert layout.matrix_chunks.tolist() == [0, 1]
    assert layout.plain_chunks.tolist() == [2]
    assert layout.row_chunks.tolist() == [3, 4]


def test_the_layout_is_a_function_of_its_arguments() -> None:
    one, two = layout_of(SHAPES), layout_of(SHAPES)
    assert one.segments == two.segments
    assert one.topk == two.topk
