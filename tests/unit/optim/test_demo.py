"""DeMo against the paper's rule, between replicas, and as a ledger in which nothing is lost."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
from typing import Any

import numpy as np
import pytest
import scipy.fft
import torch
from numpy.typing import NDArray

from p2ptrain.compression import dct, wire
from p2ptrain.compression.layout import CHUNK_SIZE, SIDE
from p2ptrain.compression.reduce import reduce_part
from p2ptrain.optim.demo import DeMo
from p2ptrain.optim.settling import PartReply, Pending

Shape = tuple[int, ...]
SHAPES: list[Shape] = [(67, 71), (130,), (), (5, 3, 2, 3), (64, 64)]
"""Prime by prime, a vector over three segments, a scalar, four dimensions, one whole chunk."""


def parameters(shapes: list[Shape], seed: int = 0) -> list[torch.nn.Parameter]:
    rng = np.random.default_rng(seed)
    return [torch.nn.Parameter(torch.from_numpy(np.asarray(rng.standard_normal(s), np.float32))) for s in shapes]


def set_gradients(optimizer: DeMo, seed: int, size: float = 1.0) -> None:
    rng = np.random.default_rng(seed)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            gradient = rng.standard_normal(tuple(parameter.shape)) * size
            parameter.grad = torch.from_numpy(np.asarray(gradient, np.float32))


def mixed(seed: int = 0, **changes: Any) -> DeMo:
    """An optimizer over three groups that differ in everything that groups may differ in."""
    matrices, embedding, vectors = parameters([(67, 71), (64, 64)], seed), parameters([(70, 40)], 1), parameters([(9,)])
    groups = [
        {"params": matrices, "topk": 48, "reply_topk": 64},
        {"params": embedding, "topk": 100, "transform": "none", "direction": "rms", "learning_rate_scale": 3.0},
        {"params": vectors, "topk": 5, "direction": "rms"},
    ]
    return DeMo(groups, **{"lr": 0.01, "topk": 32, **changes})


def parameters_of(optimizer: DeMo) -> list[torch.Tensor]:
    return [parameter.detach() for group in optimizer.param_groups for parameter in group["params"]]


def assert_same_parameters(one: DeMo, other: DeMo) -> None:
    for a, b in zip(parameters_of(one), parameters_of(other), strict=True):
        assert torch.equal(a, b)


def ranges(optimizer: DeMo, parts: int) -> list[tuple[int, int]]:
    edges = np.linspace(0, optimizer.layout.chunks, parts + 1).astype(int).tolist()
    return list(itertools.pairwise(edges))


def exchange(
    group: list[DeMo],
    pending: list[Pending],
    *,
    parts: int = 2,
    absent: tuple[int, ...] = (),
    skip: tuple[int, ...] = (),
    clip_ratio: float = 100.0,
) -> list[PartReply]:
    """The replies of one round, through bytes. Who is absent is a member that no reducer heard."""
    replies: list[PartReply] = []
    cut = ranges(group[0], parts)
    codec = dataclasses.replace(group[0].codec, clip_ratio=clip_ratio, weight_cap_ratio=4.0)
    payloads = [one.payloads(sent, cut) for one, sent in zip(group, pending, strict=True)]
    for part, (start, end) in enumerate(cut):
        if part in skip:
            replies.append((start, end, None))
            continue
        heard = [(member, member + 1, of[part]) for member, of in enumerate(payloads) if member not in absent]
        data = reduce_part(heard, codec, start, end, len(group))
        replies.append((start, end, wire.decode_reply(data, codec, start, end, len(group))))
    return replies


class PaperDeMo:
    """Algorithm 1 of arXiv 2411.19870 for one parameter, in float64, with scipy's DCT over squares of 64 by 64, or over
    segments of 64 of a vector padded to a multiple of 4096."""

    def __init__(self, value: torch.Tensor, lr: float, beta: float, topk: int) -> None:
        self.value = value.detach().double().numpy().copy()
        self.lr, self.beta, self.topk = lr, beta, topk
        self.is_vector = self.value.ndim < 2
        self.axes = (2,) if self.is_vector else (1, 2)
        columns = self.value.size if self.is_vector else self.value.size // self.value.shape[0]
        self.rows, self.columns = (1 if self.is_vector else self.value.shape[0]), columns
        unit_rows, unit_columns = (1, CHUNK_SIZE) if self.is_vector else (SIDE, SIDE)
        self.padded = (math.ceil(self.rows / unit_rows) * unit_rows, math.ceil(columns / unit_columns) * unit_columns)
        # The padding has a momentum of its own: what top-k leaves of an edge chunk reaches into it.
        self.delta = np.zeros(self.padded)
        #: how close the nearest calls were: between sent and kept, and between plus and minus
        self.margin = math.inf

    def _chunks(self, matrix: NDArray[np.float64]) -> NDArray[np.float64]:
        if self.is_vector:
            return matrix.reshape(-1, SIDE, SIDE)
        tall, wide = (n // SIDE for n in self.padded)
        return matrix.reshape(tall, SIDE, wide, SIDE).swapaxes(1, 2).reshape(-1, SIDE, SIDE)

    def _matrix(self, chunks: NDArray[np.float64]) -> NDArray[np.float64]:
        if self.is_vector:
            return chunks.reshape(self.padded)
        tall, wide = (n // SIDE for n in self.padded)
        return chunks.reshape(tall, wide, SIDE, SIDE).swapaxes(1, 2).reshape(self.padded)

    def _note(self, distances: NDArray[np.float64], largest: float) -> None:
        self.margin = min(self.margin, float(distances.min()) / largest)

    def step(self, gradient: torch.Tensor) -> None:
        padded = np.zeros(self.padded)
        padded[: self.rows, : self.columns] = gradient.double().numpy().reshape(self.rows, self.columns)
        self.delta = self.beta * self.delta + padded
        transformed = scipy.fft.dctn(self._chunks(self.delta), axes=self.axes, norm="ortho")
        flat = transformed.reshape(-1, CHUNK_SIZE)
        order = np.argsort(-np.abs(flat), axis=1)
        sizes = np.take_along_axis(np.abs(flat), order, 1)
        self._note(sizes[:, self.topk - 1] - sizes[:, self.topk], sizes.max())
        sent = np.zeros_like(flat)
        np.put_along_axis(sent, order[:, : self.topk], np.take_along_axis(flat, order[:, : self.topk], 1), 1)
        inverse = self._matrix(scipy.fft.idctn(sent.reshape(transformed.shape), axes=self.axes, norm="ortho"))
        self.delta -= inverse
        step = inverse[: self.rows, : self.columns]
        # A segment of which nothing was sent does not move at all.
        self._note(np.abs(step[step != 0]), sizes.max())
        self.value -= self.lr * np.sign(step).reshape(self.value.shape)


def test_a_lone_step_is_the_papers_rule() -> None:
    lr, beta, topk, size = 1e-3, 0.95, 24, [1.0, 0.1, 3.0, 1.0, 0.01]
    held = parameters(SHAPES)
    ours = DeMo(held, lr=lr, beta=beta, topk=topk, value_bits=32, exact=False, reply_topk=None)
    theirs = [PaperDeMo(parameter, lr, beta, topk) for parameter in held]
    rng = np.random.default_rng(5)  # one whose calls are not close, as the last line checks
    for _ in range(20):
        for parameter, one, scale in zip(held, theirs, size, strict=True):
            gradient = rng.standard_normal(tuple(parameter.shape)) * scale
            parameter.grad = torch.from_numpy(np.asarray(gradient, np.float32))
            one.step(parameter.grad)
        ours.step()
        for parameter, one in zip(held, theirs, strict=True):
            np.testing.assert_allclose(parameter.detach().numpy(), one.value, atol=1e-6, rtol=1e-6)
    # Float32 may decide what to send and which way to step otherwise than float64 only where a call is closer.
    assert min(one.margin for one in theirs) > 1e-6, [one.margin for one in theirs]


def test_the_loss_of_a_regression_falls() -> None:
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(70, 30, generator=generator)
    weight = torch.nn.Parameter(torch.zeros(70, 30))
    optimizer = DeMo([weight], lr=0.05, beta=0.9, topk=200)

    def closure() -> float:
        optimizer.zero_grad()
        loss = (weight - target).square().mean()
        loss.backward()
        return float(loss.detach())

    losses = [optimizer.step(closure) for _ in range(60)]
    assert losses[-1] < 0.1 * losses[0]


@pytest.mark.parametrize("value_bits", [1, 2, 32])
def test_two_replicas_stay_the_same_to_the_bit(value_bits: int) -> None:
    group = [mixed(value_bits=value_bits), mixed(value_bits=value_bits)]
    first = [p.clone() for p in parameters_of(group[0])]
    for number in range(6):
        pending = []
        for member, one in enumerate(group):
            set_gradients(one, 100 * member + number)
            one.accumulate()
            pending.append(one.select())
        replies = exchange(group, pending, parts=3, skip=(1,) if number == 3 else ())
        for member, one in enumerate(group):
            one.apply(replies, learning_rate=0.01 / (number + 1))
            one.settle(pending[member], replies, member)
        assert_same_parameters(*group)
    for key, tensor in group[0].replicated_state().items():
        assert torch.equal(tensor, group[1].replicated_state()[key])
    assert all(not torch.equal(a, b) for a, b in zip(first, parameters_of(group[0]), strict=True))
    assert not torch.equal(group[0].momentum, group[1].momentum)


def test_a_peer_that_sent_nothing_follows_to_the_bit() -> None:
    group, follower = [mixed(), mixed()], mixed()
    for number in range(3):
        pending = []
        for member, one in enumerate(group):
            set_gradients(one, 100 * member + number)
            one.accumulate()
            pending.append(one.select())
        replies = exchange(group, pending, absent=(1,))
        for one in (*group, follower):
            one.apply(replies)
        for member, one in enumerate(group):
            one.settle(pending[member], replies, member)
    assert_same_parameters(group[0], follower)
    assert_same_parameters(group[1], follower)


def test_a_group_of_one_through_bytes_is_a_lone_step() -> None:
    lone, peer = mixed(), mixed()
    for number in range(3):
        for one in (lone, peer):
            set_gradients(one, number)
        lone.step()
        peer.accumulate()
        pending = peer.select()
        replies = exchange([peer], [pending])
        peer.apply(replies)
        peer.settle(pending, replies, 0)
        assert_same_parameters(lone, peer)
        assert torch.equal(lone.momentum, peer.momentum)


def dense(optimizer: DeMo, pending: Pending) -> NDArray[np.float64]:
    out = np.zeros(tuple(optimizer.momentum.shape))
    out[pending.sent.chunk, pending.sent.index] = pending.sent.value
    return out


def consumed_by(optimizer: DeMo, pending: Pending, replies: list[PartReply], index: int) -> NDArray[np.float64]:
    """What the replies used of a contribution: entry by entry (docs/rounds.md, rule 8)."""
    out = np.zeros(tuple(optimizer.momentum.shape))
    for _, _, content in replies:
        if content is None or index not in content.included:
            continue
        kept = set(zip(content.coefficients.chunk.tolist(), content.coefficients.index.tolist(), strict=True))
        for chunk, place, value in zip(pending.sent.chunk, pending.sent.index, pending.sent.value, strict=True):
            if (int(chunk), int(place)) in kept:
                out[chunk, place] = float(value) * content.clips.get(index, 256) / 256
    return out


def test_nothing_is_lost_or_made_up() -> None:
    """With beta = 1, what gradients brought in is in the momentum, on its way, or was used."""
    group = [mixed(beta=1.0) for _ in range(3)]
    produced = [np.zeros(tuple(one.momentum.shape)) for one in group]
    used = [np.zeros(tuple(one.momentum.shape)) for one in group]
    outstanding: list[list[tuple[Pending, list[PartReply], int | None]]] = [[], [], []]
    faults: list[dict[str, Any]] = [
        {},
        {"skip": (1,)},
        {"skip": (0, 1, 2)},
        {"absent": (2,)},
        {"absent": (0,)},
        {"clip_ratio": 1.0},
        {"clip_ratio": 1.0, "skip": (2,)},
        {},
    ]
    clipped = False
    for number, fault in enumerate(faults):
        pending = []
        for member, one in enumerate(group):
            set_gradients(one, 100 * member + number, size=50.0 if member == 0 else 1.0)
            before = one.momentum.double().numpy().copy()
            one.accumulate()
            produced[member] += one.momentum.double().numpy() - before
            pending.append(one.select())
        replies = exchange(group, pending, parts=3, **fault)
        clipped |= any(content is not None and bool(content.clips) for _, _, content in replies)
        for member, one in enumerate(group):
            one.apply(replies)
            # Member 1 settles a round late; in round 4 member 2 had left by the time its contribution came.
            late = None if number == 4 and member == 2 else member
            outstanding[member].append((pending[member], replies, late))
            while len(outstanding[member]) > (1 if member == 1 else 0):
                sent, decided, index = outstanding[member].pop(0)
                if index is not None:
                    used[member] += consumed_by(one, sent, decided, index)
                one.settle(sent, decided, index)
            on_the_way = sum(dense(one, sent) for sent, _, _ in outstanding[member])
            left = one.momentum.double().numpy() + on_the_way + used[member]
            np.testing.assert_allclose(left, produced[member], atol=1e-5 * np.abs(produced[member]).max(), rtol=0)
    assert clipped
    assert all(np.abs(one).sum() > 0 for one in used)


def one_round(optimizer: DeMo, seed: int) -> Pending:
    set_gradients(optimizer, seed)
    optimizer.accumulate()
    return optimizer.select()


def test_accumulating_and_selecting_in_one_pass_changes_no_bit() -> None:
    apart, together = mixed(), mixed()
    for seed in (1, 2):
        set_gradients(together, seed)
        one, other = one_round(apart, seed), together.accumulate_and_select()
        for ours, theirs in ((other.sent.index, one.sent.index), (other.sent.value, one.sent.value)):
            assert np.array_equal(ours, theirs)
        assert other.decays == one.decays
        assert torch.equal(apart.momentum, together.momentum)


def test_a_late_contribution_stays_in_momentum() -> None:
    on_time, late = mixed(beta=0.5), mixed(beta=0.5)
    set_gradients(on_time, 1)
    on_time.accumulate()
    pending = one_round(late, 1)
    for seed in (2, 3, 4):
        for one in (on_time, late):
            set_gradients(one, seed)
            one.accumulate()
    late.settle(pending, exchange([late], [pending]), None)
    torch.testing.assert_close(late.momentum, on_time.momentum, atol=1e-5, rtol=0)


def test_a_contribution_given_back_was_never_sent() -> None:
    one = mixed()
    set_gradients(one, 1)
    one.accumulate()
    before = one.momentum.clone()
    one.give_back(one.select())
    torch.testing.assert_close(one.momentum, before, atol=1e-6, rtol=0)


def test_what_is_selected_are_the_largest_of_each_chunk() -> None:
    one = mixed(value_bits=32)
    set_gradients(one, 1)
    one.accumulate()
    before = np.abs(one.momentum.numpy().copy())
    sent = one.select().sent
    for chunk, topk in enumerate(one.layout.topk):
        here = sent.chunk == chunk
        assert here.sum() == topk
        assert (np.diff(sent.index[here]) > 0).all()
        assert before[chunk, sent.index[here]].min() >= np.delete(before[chunk], sent.index[here]).max()
        assert not one.momentum[chunk, sent.index[here]].any()


def test_what_quantising_misses_stays_in_momentum() -> None:
    one = mixed(value_bits=1)
    set_gradients(one, 1)
    one.accumulate()
    before = one.momentum.double().numpy().copy()
    pending = one.select()
    np.testing.assert_allclose(one.momentum.numpy() + dense(one, pending), before, atol=1e-5)


@pytest.mark.parametrize("index", [0, None])
@pytest.mark.parametrize("rounds_between", [0, 2])
@pytest.mark.parametrize("rounds_after", [0, 3])
def test_unsettling_undoes_a_settle(index: int | None, rounds_between: int, rounds_after: int) -> None:
    settled_once, never = mixed(beta=0.9), mixed(beta=0.9)
    pending = [one_round(one, 1) for one in (settled_once, never)]
    replies = exchange([settled_once], pending[:1], skip=(1,))
    for seed in range(rounds_between):
        for one in (settled_once, never):
            set_gradients(one, 10 + seed)
            one.accumulate()
    settled = settled_once.settle(pending[0], replies, index)
    assert not torch.allclose(settled_once.momentum, never.momentum, atol=1e-3)
    for seed in range(rounds_after):
        for one in (settled_once, never):
            set_gradients(one, 20 + seed)
            one.accumulate()
    again = settled_once.unsettle(settled)
    torch.testing.assert_close(settled_once.momentum, never.momentum, atol=1e-5, rtol=0)
    for one, of in ((settled_once, again), (never, pending[1])):
        one.settle(of, replies, 0)
    torch.testing.assert_close(settled_once.momentum, never.momentum, atol=1e-5, rtol=0)


def test_settling_tells_the_share_that_was_used() -> None:
    one = mixed()
    pending = one_round(one, 1)
    replies = exchange([one], [pending], parts=2, skip=(1,))
    used = np.abs(consumed_by(one, pending, replies, 0)).sum() / np.abs(pending.sent.value).sum()
    settled = one.settle(pending, replies, 0)
    assert 0 < used < 1
    assert settled.consumed_share == pytest.approx(used, rel=1e-5)


def test_after_a_crash_only_the_rounding_of_what_was_sent_is_gone() -> None:
    running = mixed(beta=0.9)
    set_gradients(running, 1)
    running.accumulate()
    saved, saved_decays = running.momentum.clone(), running.decays
    before = saved.double().numpy().copy()
    pending = running.select()
    restarted = mixed(beta=0.9)
    restarted.momentum.copy_(saved)
    restarted.decays = saved_decays
    again = restarted.restore_sent(pending.sent, pending.decays)
    restarted.give_back(again)
    missing = before - restarted.momentum.double().numpy()
    rounding = np.zeros_like(missing)
    places = (pending.sent.chunk, pending.sent.index)
    rounding[places] = before[places] - pending.sent.value
    np.testing.assert_allclose(missing, rounding, atol=1e-6)


def frozen_pair(who: tuple[int, ...], value_bits: int) -> tuple[list[DeMo], torch.Tensor]:
    """Two replicas after a round, of which `who` then freeze the second parameter; and its momentum at the first."""
    pair = [mixed(beta=0.9, weight_decay=0.1, value_bits=value_bits) for _ in range(2)]
    swarm_round(pair, 0)
    for number in who:
        parameters_of_group(pair[number])[1].requires_grad_(False)
    segment = pair[0].layout.segments[1]
    return pair, pair[0].momentum[segment.start : segment.end].clone()


def parameters_of_group(optimizer: DeMo) -> list[torch.Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def swarm_round(pair: list[DeMo], number: int, *, at_once: bool = True) -> list[Pending]:
    pending = []
    for place, one in enumerate(pair):
        set_gradients(one, 10 * number + place)
        if at_once:
            pending.append(one.accumulate_and_select())
        else:
            one.accumulate()
            pending.append(one.select())
    replies = exchange(pair, pending)
    for place, (one, sent) in enumerate(zip(pair, pending, strict=True)):
        one.apply(replies)
        one.settle(sent, replies, place)
    return pending


@pytest.mark.parametrize("value_bits", [1, 2, 8])
@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize("who", [(0,), (0, 1)])
def test_in_a_swarm_a_frozen_parameter_sends_nothing_and_its_momentum_decays_and_waits(
    who: tuple[int, ...], at_once: bool, value_bits: int
) -> None:
    pair, waiting = frozen_pair(who, value_bits)
    assert waiting.any()
    segment = pair[0].layout.segments[1]
    for number in (1, 2):
        before = parameters_of(pair[0])[1].clone()
        pending = swarm_round(pair, number, at_once=at_once)
        inside = (pending[0].sent.chunk >= segment.start) & (pending[0].sent.chunk < segment.end)
        assert inside.any() and not pending[0].sent.value[inside].any()
        assert pending[0].sent.value[~inside].any()
        assert torch.equal(parameters_of(pair[0])[1], before)
        assert torch.equal(parameters_of(pair[1])[1], before) == (who == (0, 1))
        if who == (0, 1):
            assert_same_replicas(pair)
    left = pair[0].momentum[segment.start : segment.end]
    torch.testing.assert_close(left, waiting * 0.9**2, rtol=1e-6, atol=0)
    parameters_of_group(pair[0])[1].requires_grad_(True)
    again = swarm_round(pair, 3)[0].sent
    assert again.value[(again.chunk >= segment.start) & (again.chunk < segment.end)].any()


def assert_same_replicas(pair: list[DeMo]) -> None:
    assert_same_parameters(*pair)
    for one, other in zip(pair[0].replicated_state().values(), pair[1].replicated_state().values(), strict=True):
        assert torch.equal(one, other)


def test_a_frozen_parameters_momentum_survives_a_crash_after_sending() -> None:
    pair, waiting = frozen_pair((0,), 2)
    segment = pair[0].layout.segments[1]
    saved, saved_decays = pair[0].momentum.clone(), pair[0].decays
    pending = pair[0].accumulate_and_select()
    pair[0].momentum.copy_(saved)
    pair[0].decays = saved_decays
    pair[0].restore_sent(pending.sent, pending.decays)
    torch.testing.assert_close(pair[0].momentum[segment.start : segment.end], waiting * 0.9, rtol=1e-6, atol=0)


@pytest.mark.parametrize("chunks_at_once", [1, 2, 5])
@pytest.mark.parametrize("thread_count", [1, 3])
def test_batches_and_threads_change_no_bit(
    chunks_at_once: int, thread_count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = torch.get_num_threads()
    whole = mixed(weight_decay=0.1)
    monkeypatch.setattr("p2ptrain.optim.threads._CPU_BATCH_CHUNKS", chunks_at_once)
    cut = mixed(weight_decay=0.1)
    try:
        for number in range(4):
            pending = []
            for one, threads in ((whole, 1), (cut, thread_count)):
                torch.set_num_threads(threads)
                pending.append(one_round(one, number))
            replies = exchange([whole], pending[:1], parts=3, skip=(1,) if number == 2 else ())
            for one, sent, threads in ((whole, pending[0], 1), (cut, pending[1], thread_count)):
                torch.set_num_threads(threads)
                one.apply(replies)
                one.settle(sent, replies, 0)
                assert torch.get_num_threads() == threads
            assert_same_parameters(whole, cut)
            assert np.array_equal(pending[0].sent.index, pending[1].sent.index)
        for key, tensor in whole.replicated_state().items():
            assert torch.equal(tensor, cut.replicated_state()[key])
    finally:
        torch.set_num_threads(before)


def test_a_step_is_that_of_whole_parameters() -> None:
    """Decode, direction, decay and step once more, parameter by parameter, with the directions' own `step`."""
    ours = mixed(weight_decay=0.1)
    expected = [p.clone() for p in parameters_of(ours)]
    layout, directions = ours.layout, mixed()._stepper.directions
    for number in range(4):
        pending = one_round(ours, number)
        replies = exchange([ours], [pending], parts=3, skip=(0,) if number == 1 else ())
        values, scale = torch.zeros(layout.chunks, CHUNK_SIZE), torch.zeros(layout.chunks)
        live = torch.zeros(layout.chunks, dtype=torch.bool)
        for start, end, content in replies:
            if content is not None:
                values[content.coefficients.chunk, content.coefficients.index] = torch.from_numpy(content.byte).float()
                scale[start:end], live[start:end] = torch.from_numpy(content.scale.copy()), True
        integers, unit = dct.decode_exact(layout, values)
        update = integers * (unit * scale).unsqueeze(1)
        for segment, parameter, way in zip(layout.segments, expected, directions, strict=True):
            piece = slice(segment.start, segment.end)
            stepped = torch.zeros_like(update)
            stepped[piece] = way.step(update[piece], live[piece])
            rate = 0.01 * segment.treatment.learning_rate_scale
            decay = torch.where(live, 1 - rate * 0.1, 1.0).unsqueeze(1).expand(-1, CHUNK_SIZE).contiguous()
            parameter.mul_(layout.extract(segment, decay)).sub_(layout.extract(segment, stepped) * rate)
        ours.apply(replies)
        ours.settle(pending, replies, 0)
        for a, b in zip(parameters_of(ours), expected, strict=True):
            assert torch.equal(a, b)


def test_a_parameter_that_is_not_contiguous_steps_like_one_that_is() -> None:
    plain = parameters([(70, 130)])
    turned = [torch.nn.Parameter(plain[0].detach().T.contiguous().T)]
    assert not turned[0].is_contiguous()
    for transform, direction in (("dct", "sign"), ("none", "rms")):
        one, other = (DeMo(held, transform=transform, direction=direction, topk=9) for held in (plain, turned))
        for optimizer in (one, other):
            set_gradients(optimizer, 3)
            optimizer.step()
        assert_same_parameters(one, other)


def test_a_state_taken_before_a_step_stays_as_it_was() -> None:
    one = mixed()
    for number in range(3):
        set_gradients(one, number)
        held = one.replicated_state()
        copies = {key: tensor.clone() for key, tensor in held.items()}
        one.step()
        assert all(torch.equal(tensor, copies[key]) for key, tensor in held.items())


def test_a_skipped_part_stays_where_it_is() -> None:
    shape = (64, 128)
    one = DeMo(parameters([shape, (64,)]), lr=0.1, weight_decay=0.5, direction="rms", topk=8)
    before = [p.clone() for p in parameters_of(one)]
    pending = one_round(one, 1)
    replies = exchange([one], [pending], parts=3, skip=(1, 2))
    one.apply(replies)
    matrix, vector = parameters_of(one)
    assert torch.equal(matrix[:, 64:], before[0][:, 64:])
    assert torch.equal(vector, before[1])
    assert (matrix[:, :64] != before[0][:, :64]).all()
    moment = one.replicated_state()["0.second"]
    assert moment[0].all()
    assert not moment[1].any()


def test_a_round_of_skips_changes_no_parameter() -> None:
    one = mixed(weight_decay=0.1)
    before = [p.clone() for p in parameters_of(one)]
    pending = one_round(one, 1)
    one.apply(exchange([one], [pending], skip=(0, 1)))
    assert all(torch.equal(a, b) for a, b in zip(before, parameters_of(one), strict=True))


def test_a_skip_elsewhere_changes_no_bit_of_a_part() -> None:
    whole, holed = (DeMo(parameters([(64, 128), (97, 3)]), lr=0.1, weight_decay=0.3, topk=8) for _ in range(2))
    pending = [one_round(one, 1) for one in (whole, holed)]
    whole.apply(exchange([whole], pending[:1], parts=4))
    holed.apply(exchange([holed], pending[1:], parts=4, skip=(1, 2)))
    (wide, tall), (wide_holed, tall_holed) = parameters_of(whole), parameters_of(holed)
    assert torch.equal(wide[:, :64], wide_holed[:, :64])
    assert torch.equal(tall[64:], tall_holed[64:])
    assert torch.equal(tall_holed[:64], parameters([(64, 128), (97, 3)])[1].detach()[:64])


def test_weight_decay_is_decoupled_from_the_step() -> None:
    held, plain = parameters([(64, 64)]), parameters([(64, 64)])
    before = held[0].detach().clone()
    decayed, bare = DeMo(held, lr=0.1, weight_decay=0.5), DeMo(plain, lr=0.1)
    for one in (decayed, bare):
        set_gradients(one, 1)
        one.step()
    step = before - plain[0].detach()
    torch.testing.assert_close(held[0].detach(), before * (1 - 0.1 * 0.5) - step, atol=1e-6, rtol=0)
    assert torch.equal(decayed.momentum, bare.momentum)


def test_a_given_learning_rate_takes_the_place_of_the_groups_but_not_of_their_scale() -> None:
    one, other = mixed(lr=123.0), mixed(lr=0.02)
    pending = [one_round(x, 1) for x in (one, other)]
    replies = exchange([one], pending[:1])
    one.apply(replies, learning_rate=0.02)
    other.apply(replies)
    assert_same_parameters(one, other)
    moved = [(a - b).abs() for a, b in zip(parameters_of(other), parameters_of(mixed()), strict=True)]
    assert moved[0].max() == pytest.approx(0.02, rel=1e-4)
    assert moved[2].max() == pytest.approx(3 * 0.02, rel=1e-4)


def test_a_saved_state_continues_alike() -> None:
    one = mixed(beta=0.9)
    for seed in range(3):
        set_gradients(one, seed)
        one.step()
    other = mixed(seed=5, beta=0.9)
    with torch.no_grad():
        for a, b in zip(parameters_of(other), parameters_of(one), strict=True):
            a.copy_(b)
    other.load_state_dict(copy.deepcopy(one.state_dict()))
    assert other.decays == one.decays == 3
    for seed in range(3, 6):
        for x in (one, other):
            set_gradients(x, seed)
            x.step()
        assert_same_parameters(one, other)
        assert torch.equal(one.momentum, other.momentum)


def test_a_loaded_learning_rate_holds_and_can_be_changed() -> None:
    saved = DeMo(parameters([(64, 64)]), lr=0.5).state_dict()
    held = parameters([(64, 64)])
    optimizer = DeMo(held, lr=0.001)
    optimizer.load_state_dict(saved)
    for rate in (0.5, 0.25):
        optimizer.param_groups[0]["lr"] = rate
        before = held[0].detach().clone()
        set_gradients(optimizer, 1)
        optimizer.step()
        assert (held[0].detach() - before).abs().median() == pytest.approx(rate, rel=1e-4)


def test_torchs_schedulers_set_the_rate() -> None:
    held = parameters([(64, 64)])
    optimizer = DeMo(held, lr=0.5)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    for rate in (0.5, 0.25, 0.125):
        before = held[0].detach().clone()
        set_gradients(optimizer, 1)
        optimizer.step()
        scheduler.step()
        assert (held[0].detach() - before).abs().median() == pytest.approx(rate, rel=1e-4)


@pytest.mark.parametrize("changes", [{"topk": 0}, {"topk": 4097}, {"beta": 1.1}, {"lr": -1.0}, {"value_bits": 3}])
def test_settings_out_of_range_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="out of range"):
        DeMo(parameters([(3, 3)]), **changes)
