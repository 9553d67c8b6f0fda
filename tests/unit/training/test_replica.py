"""Two replicas that apply the same seals are one; a step can be undone to the bit."""

from __future__ import annotations

import gc
import sys
import weakref
from pathlib import Path

import msgspec
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from lone import MANIFEST, Lone, gradient, replica

from p2ptrain import chain
from p2ptrain.chain.sealed import SealedRound
from p2ptrain.state.tensors import TensorFileError
from p2ptrain.training.replica import Replica


@pytest.fixture(scope="module")
def lone() -> Lone:
    made = Lone()
    made.train(6)
    return made


def follow(other: Replica, rounds: list[SealedRound]) -> None:
    for sealed in rounds:
        shape = chain.shape_of(other.chain, other.layout.chunks)
        other.apply(sealed, shape, chain.extend(other.chain, sealed.id, sealed.seal, other.layout.chunks))


def test_who_applies_the_same_rounds_holds_the_same_bits(lone: Lone) -> None:
    other = replica()
    assert other.parameters_sha256() != lone.replica.parameters_sha256()
    follow(other, lone.rounds)
    assert other.parameters_sha256() == lone.replica.parameters_sha256()
    assert other.snapshot() == lone.replica.snapshot()


def test_a_snapshot_stands_in_for_all_rounds_before_it(lone: Lone) -> None:
    first, late = replica(), replica()
    follow(first, lone.rounds[:4])
    late.load_snapshot(first.snapshot())
    assert late.chain == lone.states[4] == late.snapshot_chain(first.snapshot())
    follow(late, lone.rounds[4:])
    assert late.snapshot() == lone.replica.snapshot()
    assert len(late.snapshot()) <= late.snapshot_max_bytes


def test_where_a_snapshot_stands_can_be_told_without_the_replica(lone: Lone) -> None:
    """Another thread asks: it must hold nothing that the trainer changes."""
    made = replica()
    where, held = made.snapshot_chain, weakref.ref(made)
    del made
    gc.collect()
    assert held() is None
    assert where(lone.replica.snapshot()) == lone.states[-1]


def test_the_last_step_can_be_undone_once_and_taken_anew(lone: Lone) -> None:
    other = replica()
    follow(other, lone.rounds[:5])
    before = other.snapshot()
    follow(other, lone.rounds[5:6])
    other.undo()
    assert other.snapshot() == before
    with pytest.raises(ValueError, match="no step"):
        other.undo()
    follow(other, lone.rounds[5:])
    assert other.snapshot() == lone.replica.snapshot()


def test_a_reset_replica_is_a_new_one(lone: Lone) -> None:
    other = replica()
    follow(other, lone.rounds)
    other.reset()
    assert other.snapshot() == replica().snapshot()


def test_snapshots_of_another_run_or_model_are_refused(lone: Lone) -> None:
    data = lone.replica.snapshot()
    elsewhere = Replica(MANIFEST, bytes(32), torch.device("cpu"))
    with pytest.raises(TensorFileError, match="another run"):
        elsewhere.load_snapshot(data)
    larger = msgspec.structs.replace(MANIFEST, model=msgspec.structs.replace(MANIFEST.model, layers=2))
    with pytest.raises(TensorFileError, match="another model"):
        replica(larger).load_snapshot(data)


@pytest.mark.parametrize("undone", [False, True])
@pytest.mark.parametrize("steps", [0, 1, 2, 3])
def test_what_is_written_while_steps_are_taken_is_what_was_there_at_first(lone: Lone, steps: int, undone: bool) -> None:
    """With a disk that takes nothing until they are."""
    made = replica()
    follow(made, lone.rounds[:2])
    gradient(made, 1)
    expected = made.optimizer.momentum.numpy().tobytes() + b"".join(a.tobytes() for a in made.arrays().values())
    frozen = made.freeze(momentum=True)
    for number in range(2, 2 + steps):
        made.momentum_changes()
        gradient(made, number)
        follow(made, lone.rounds[number : number + 1])
    if undone and steps:
        made.undo()
        follow(made, lone.rounds[1 + steps : 2 + steps])
    assert b"".join(map(bytes, frozen.parts())) == expected
    assert frozen.done
