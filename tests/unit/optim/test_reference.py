"""The fast path against `optim/reference.py`: what replicas share to the bit, a peer's own within its rounding."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from p2ptrain.compression import wire
from p2ptrain.compression.reduce import reduce_part
from p2ptrain.optim import reference
from p2ptrain.optim.demo import DeMo
from p2ptrain.optim.directions import DIRECTIONS
from p2ptrain.optim.reference import ENTRIES, Chunks
from p2ptrain.optim.settling import Pending

RMS_BETA, EPSILON, MOMENTUM = CONSTANTS = 0.95, 1e-8, 0.9
_SIDES = st.integers(1, 70) | st.sampled_from([64, 128])
_SHAPES = (
    st.tuples(_SIDES, _SIDES)
    | st.tuples(st.integers(1, 5000))
    | st.just(())
    | st.tuples(st.integers(1, 66), st.integers(1, 5), st.integers(1, 20))
)


@dataclass(frozen=True)
class Case:
    """One parameter's shape, how it is treated, and what two members bring."""

    shape: tuple[int, ...]
    transform: str
    direction: str
    topk: int
    reply_topk: int
    value_bits: int
    weights: tuple[int, int]
    sizes: tuple[float, float]
    seed: int

    @property
    def form(self) -> str:
        if self.transform == "none":
            return "none"
        return "rows" if len(self.shape) < 2 else "both"


@st.composite
def cases(draw: st.DrawFn) -> Case:
    shape = draw(_SHAPES)
    return Case(
        shape,
        draw(st.sampled_from(["dct", "none"])),
        draw(st.sampled_from([way for way in DIRECTIONS if way != "muon" or len(shape) > 1])),
        draw(st.integers(1, 64) | st.sampled_from([300, ENTRIES])),
        draw(st.integers(1, 64) | st.sampled_from([300, ENTRIES])),
        draw(st.sampled_from([1, 2, 8, 32])),
        draw(st.tuples(st.integers(1, 9), st.integers(1, 9))),
        draw(st.tuples(st.sampled_from([1e-6, 0.1, 1.0, 30.0]), st.sampled_from([0.1, 1.0]))),
        draw(st.integers(0, 2**32 - 1)),
    )


def made(case: Case, **changes: Any) -> DeMo:
    value = np.random.default_rng(case.seed).standard_normal(case.shape)
    parameter = torch.nn.Parameter(torch.from_numpy(np.asarray(value, np.float32)))
    return DeMo(
        [parameter],
        lr=0.01,
        beta=0.9,
        weight_decay=0.1,
        transform=case.transform,
        direction=case.direction,
        topk=case.topk,
        reply_topk=case.reply_topk,
        value_bits=case.value_bits,
        rms_beta=RMS_BETA,
        rms_epsilon=EPSILON,
        direction_momentum=MOMENTUM,
        **changes,
    )


def parameter_of(optimizer: DeMo) -> torch.Tensor:
    (parameter,) = optimizer.param_groups[0]["params"]
    return parameter


def gathered(case: Case, optimizer: DeMo, seed: list[int], size: float) -> Pending:
    """What a member selects of a gradient, having been held to the reference on the way."""
    of, parameter = Chunks(case.shape, case.form), parameter_of(optimizer)
    gradient = np.asarray(np.random.default_rng(seed).standard_normal(case.shape) * size, np.float32)
    parameter.grad = torch.from_numpy(gradient)
    before = optimizer.momentum.numpy().copy()
    optimizer.accumulate()
    # An entry is a sum of 64 products of sums of 64, of numbers whose root of squares is the chunk's norm (the basis is
    # orthonormal): each of some 130 roundings, and of a cosine's own, errs by at most 2**-24 of that.
    norm = np.linalg.norm(of.cut(gradient), axis=1, keepdims=True) + np.linalg.norm(before, axis=1, keepdims=True)
    expected = reference.accumulate(of, before, gradient, 0.9)
    assert (np.abs(optimizer.momentum.numpy() - expected) <= 140 * 2.0**-24 * norm + 1e-30).all()
    before = optimizer.momentum.numpy().copy()
    pending = optimizer.select()
    left, index, value = reference.select(before, case.topk, case.value_bits)
    sent_index, sent_value = (part.reshape(index.shape) for part in (pending.sent.index, pending.sent.value))
    sizes = np.sort(np.abs(before), axis=1)[:, ::-1]
    taken = np.sort(np.abs(np.take_along_axis(before, sent_index, 1)), axis=1)[:, ::-1]
    assert np.array_equal(taken, sizes[:, : case.topk])
    # Which of equal ones is taken is not specified.
    clear = [case.topk == ENTRIES or size[case.topk - 1] > size[case.topk] for size in sizes]
    for ours, theirs in ((sent_index, index), (sent_value, value), (optimizer.momentum.numpy(), left)):
        assert np.array_equal(ours[clear], theirs[clear])
    return pending


# Norms of 32 to 1: a clip of 198/256 exactly, which a sum of squares in another order makes 197.
@example(Case((21, 1, 1), "dct", "sign", 300, 1, 1, (1, 1), (30.0, 1.0), 160))
@settings(max_examples=60, deadline=None)
@given(case=cases())
def test_a_round_of_two_is_that_of_the_reference(case: Case) -> None:
    of, group, state = Chunks(case.shape, case.form), [made(case), made(case)], {}
    direct = partial(reference.directed, case.direction, state=state, constants=CONSTANTS)
    chunks, limit = group[0].layout.chunks, case.reply_topk
    expected = parameter_of(group[0]).detach().numpy().copy()
    for number in range(3):
        pending = [
            gathered(case, one, [case.seed, number, member], case.sizes[member]) for member, one in enumerate(group)
        ]
        index = np.stack([sent.sent.index.reshape(chunks, -1) for sent in pending])
        value = np.stack([sent.sent.value.reshape(chunks, -1) for sent in pending])
        share, clips = reference.shares([one.sent.value for one in pending], list(case.weights), 1.5, 4.0)
        reply = reference.reduce(index, value, share, limit)
        codec = replace(group[0].codec, clip_ratio=1.5, weight_cap_ratio=4.0)
        payloads = [one.payloads(sent, [(0, chunks)])[0] for one, sent in zip(group, pending, strict=True)]
        contributions = [(member, case.weights[member], payload) for member, payload in enumerate(payloads)]
        data = reduce_part(contributions, codec, 0, chunks, 2)
        places, bytes_ = (np.concatenate(reply[which]) for which in (0, 1))
        kept = wire.Kept(np.array([len(place) for place in reply[0]]), places, bytes_, reply[2])
        assert data == wire.encode_reply(kept, codec, 0, 2, frozenset({0, 1}), clips)
        content = wire.decode_reply(data, codec, 0, chunks, 2)
        expected = reference.step(of, expected, reply, direct, 0.01, 0.1)
        for member, one in enumerate(group):
            one.apply([(0, chunks, content)])
            assert np.array_equal(parameter_of(one).detach().numpy(), expected)
            ours = one.replicated_state()
            assert ours.keys() == {f"0.{key}" for key in state}
            for key, held in state.items():
                assert np.array_equal(ours[f"0.{key}"].numpy(), held), key
            before = one.momentum.numpy().copy()
            one.settle(pending[member], [(0, chunks, content)], member)
            settled = reference.settle(before, index[member], value[member], reply[0], clips.get(member, 256))
            assert np.array_equal(one.momentum.numpy(), settled)


def test_the_reference_refuses_a_direction_that_it_does_not_have() -> None:
    with pytest.raises(ValueError, match="no direction 'lion'"):
        reference.directed("lion", np.ones((1, 4096), np.float32), {}, CONSTANTS)


@settings(max_examples=25, deadline=None)
@given(case=cases())
def test_a_lone_step_is_that_of_the_reference(case: Case) -> None:
    """The passes made one, and the bytes left out, step as the phases do, which the test above holds to the
    reference."""
    lone, apart = made(case), made(case)
    of, state = Chunks(case.shape, case.form), {}
    direct = partial(reference.directed, case.direction, state=state, constants=CONSTANTS)
    expected = parameter_of(lone).detach().numpy().copy()
    chunks, share = lone.layout.chunks, np.ones(1, np.float32)
    for number in range(2):
        pending = gathered(case, apart, [case.seed, number], case.sizes[1])
        sent = [part.reshape(1, chunks, -1) for part in (pending.sent.index, pending.sent.value)]
        reply = reference.reduce(sent[0], sent[1], share, case.reply_topk)
        expected = reference.step(of, expected, reply, direct, 0.01, 0.1)
        settled = reference.settle(apart.momentum.numpy(), sent[0][0], sent[1][0], reply[0], 256)
        apart.momentum.copy_(torch.from_numpy(settled))
        parameter_of(lone).grad = parameter_of(apart).grad
        lone.step()
        assert np.array_equal(parameter_of(lone).detach().numpy(), expected)
        for key, held in state.items():
            assert np.array_equal(lone.replicated_state()[f"0.{key}"].numpy(), held), key
        assert np.array_equal(lone.momentum.numpy(), settled)


def test_the_reference_is_short_enough_to_be_read_at_one_sitting() -> None:
    assert len(Path(reference.__file__).read_text().splitlines()) <= 200
