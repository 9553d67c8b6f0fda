"""A turn to measure beside training: the figure is that of its round, and training is the same bits with it."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

from lone import Lone, identity_of
from test_trainer import Home

from p2ptrain.data.text import Part
from p2ptrain.models.gpt import GPT
from p2ptrain.models.own import beginning_of, own_task
from p2ptrain.rounds.events import Rollback
from p2ptrain.training.evaluation import score
from p2ptrain.training.measuring import SHARE, Called, HeldOut, Measuring, checked_figures

TEXT = Part(np.random.default_rng(1).integers(0, 4096, 700).astype(np.uint16), 2400)
TOKENS, WINDOWS = 320, 4


class Measured:
    """A peer's disk and trainer, and a clock that says what a slice takes."""

    def __init__(self, folder: Path, *, every: int, slice_seconds: float = 0.0) -> None:
        folder.mkdir()
        torch.manual_seed(0)
        self.home = Home(folder, Lone())
        self.slice_seconds = slice_seconds
        replica, peer = self.home.trainer.replica, self.home.lone.identity.peer_id
        assert isinstance(replica.model, GPT)
        self.model = replica.model
        method = HeldOut(self.model, TEXT, TOKENS, WINDOWS, self.clock)
        self.measuring = Measuring(every, peer, replica.task, method, clock=self.clock)
        self.home.trainer.measuring = self.measuring
        self.home.now += 1000.0
        self.home.first_round()

    def clock(self) -> float:
        """Each look takes half of a slice's time."""
        self.home.now += self.slice_seconds / 2
        return self.home.now

    def round(self, *, slices: int = 0) -> None:
        """One round, with so many slices after its micro-batch."""
        self.home.hand(self.home.start())
        for _ in range(slices):
            self.home.trainer.measure(waiting=True)
        self.home.hand(self.home.apply(self.home.sealed(), contributed=True))
        self.home.now += 100.0


def test_training_is_the_same_bits_with_measuring_and_the_figure_is_that_of_its_round(tmp_path: Path) -> None:
    plain, measured = Measured(tmp_path / "plain", every=0), Measured(tmp_path / "measured", every=3)
    expected = {}
    for _ in range(7):
        plain.round()
        expected[plain.home.trainer.replica.chain.id] = score(plain.model, TEXT, TOKENS)
        # Two slices a round: most of a measurement is computed when the replica is further.
        measured.round(slices=2)
    assert measured.home.trainer.replica.snapshot() == plain.home.trainer.replica.snapshot()
    assert [ready.payloads for ready in measured.home.swarm.handed] == [r.payloads for r in plain.home.swarm.handed]
    said = measured.home.trainer.status.measured
    assert said is not None and said.tokens == TOKENS
    assert said.figures["bits_per_byte"] == pytest.approx(expected[said.state_id].bits_per_byte, rel=1e-6)
    assert said.figures["perplexity"] == pytest.approx(expected[said.state_id].perplexity, rel=1e-6)
    assert plain.home.trainer.status.measured is None
    figure = said.figures["bits_per_byte"]
    nearest = min(expected, key=lambda state_id: abs(expected[state_id].bits_per_byte - figure))
    assert nearest == said.state_id, "and no other round's"


def test_a_measurement_takes_a_small_share_of_the_time_and_says_on_how_many_tokens_it_is(tmp_path: Path) -> None:
    one = Measured(tmp_path / "one", every=1, slice_seconds=2.0)
    state, said = one.home.lone.states[-1], []
    for _ in range(60):
        one.home.now += 100.0
        one.measuring.reached(state)
        while one.measuring.slice(waiting=True):
            pass
        if one.measuring.measured is not None and one.measuring.measured not in said:
            said.append(one.measuring.measured)
    tokens = [one.tokens for one in said]
    assert len(said) >= 4 and TOKENS / 4 <= min(tokens) < TOKENS
    assert SHARE / 2 < one.measuring.share <= SHARE * 1.1
    again = score(one.model, TEXT, tokens[-1])
    assert again.tokens == tokens[-1], "who asks for as many scores the same windows"
    assert again.bits_per_byte == pytest.approx(said[-1].figures["bits_per_byte"], rel=1e-6)


def test_between_micro_batches_slices_are_rare_and_where_others_are_waited_for_they_are_not(tmp_path: Path) -> None:
    one = Measured(tmp_path / "one", every=1)
    assert one.measuring.under_way
    one.slice_seconds = 0.1
    assert one.measuring.slice(waiting=False)
    assert not one.measuring.slice(waiting=False), "the next after nine times as long"
    assert one.measuring.slice(waiting=True)
    one.home.now += 10.0
    assert one.measuring.slice(waiting=False)


def test_a_round_that_the_chain_has_left_is_not_measured(tmp_path: Path) -> None:
    one = Measured(tmp_path / "one", every=2)
    one.round()
    state = one.home.lone.states[-2]
    assert one.measuring.under_way and one.measuring.turns[-1].round == state.round + 1
    one.home.trainer.take(Rollback(state), one.home.swarm)
    assert not one.measuring.under_way and not one.measuring.turns


def test_what_is_under_way_is_measured_to_its_end_unless_the_run_is_over(tmp_path: Path) -> None:
    one = Measured(tmp_path / "one", every=1)
    one.measuring.slice(waiting=True)
    one.round()
    while one.measuring.slice(waiting=True):
        pass
    assert one.measuring.measured is not None and one.measuring.measured.round == 1
    one.round()
    one.measuring._last_round = 4
    one.round()
    one.home.trainer.finish_measuring(lambda: False)
    assert one.home.trainer.status.measured is not None and one.home.trainer.status.measured.round == 4


def test_another_members_turn_costs_nothing(tmp_path: Path) -> None:
    one = Measured(tmp_path / "one", every=1)
    replica = one.home.trainer.replica
    other = Measuring(1, identity_of("grace").peer_id, replica.task, HeldOut(one.model, TEXT, TOKENS, WINDOWS))
    other.reached(one.home.lone.states[-1])
    assert not other.under_way and other.turns[-1].peer_id == one.home.lone.identity.peer_id


def test_held_out_text_of_another_vocabulary_is_said_and_training_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    one = Measured(tmp_path / "one", every=1)
    wrong = Part(np.full(700, 4096, np.uint16), 2400)
    replica, peer = one.home.trainer.replica, one.home.lone.identity.peer_id
    one.home.trainer.measuring = Measuring(1, peer, replica.task, HeldOut(one.model, wrong, TOKENS, WINDOWS))
    one.round()
    assert one.home.trainer.measure(waiting=True) and not one.home.trainer.measuring.under_way
    assert "holds 4096, which is no token of 4,096" in caplog.text


# ---- a model of somebody's own --------------------------------------------------------------------------------------


class Owned:
    """A net, measured by a function, in a lone member's chain."""

    def __init__(self, folder: Path, evaluate: Any) -> None:
        self.net = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 2))
        self.net[0].train(False)
        config, _ = beginning_of(self.net).write(folder / "beginning")
        task = own_task(self.net, folder / "beginning", config)
        self.lone = Lone()
        self.now = 0.0
        self.measuring = Measuring(
            1, self.lone.identity.peer_id, task, Called(evaluate, task, self.clock), clock=self.clock
        )

    def clock(self) -> float:
        return self.now

    def turn(self) -> None:
        self.measuring.reached(self.lone.states[-1])
        while self.measuring.slice(waiting=True):
            pass


def test_a_function_of_ones_own_leaves_modes_gradients_random_numbers_and_parameters_as_they_were(
    tmp_path: Path,
) -> None:
    def evaluate(net: nn.Module) -> dict[str, float]:
        assert not any(part.training for part in net.modules()) and not torch.is_grad_enabled()
        torch.rand(3)
        with torch.enable_grad():
            net(torch.ones(2, 3)).sum().backward()
        for parameter in net.parameters():
            parameter.requires_grad_(False)
            parameter.mul_(2.0)
        net.train()
        return {"accuracy": 0.5, "top-5": np.float32(0.75)}

    one = Owned(tmp_path, evaluate)
    first = one.net[0].weight
    first.grad = torch.ones_like(first)
    before, modes = [p.detach().clone() for p in one.net.parameters()], [part.training for part in one.net.modules()]
    torch.manual_seed(5)
    state = torch.get_rng_state()
    one.turn()
    said = one.measuring.measured
    assert said is not None and said.figures == {"accuracy": 0.5, "top-5": 0.75} and said.tokens == 0
    assert (said.round, said.state_id) == (one.lone.states[-1].round, one.lone.states[-1].id)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(now, then) for now, then in zip(one.net.parameters(), before, strict=True))
    assert [part.training for part in one.net.modules()] == modes
    assert torch.equal(first.grad, torch.ones_like(first)) and one.net[2].weight.grad is None
    assert all(parameter.requires_grad for parameter in one.net.parameters())


def test_a_slow_function_is_called_as_often_as_a_small_share_of_the_time_allows(tmp_path: Path) -> None:
    called = []

    def evaluate(net: nn.Module) -> dict[str, float]:
        called.append(one.now)
        one.now += 3.0
        return {"loss": 1.0}

    one = Owned(tmp_path, evaluate)
    for _ in range(100):
        one.now += 10.0
        one.turn()
    assert 8 <= len(called) <= 12 and one.measuring.share < SHARE * 1.2


@pytest.mark.parametrize(
    "figures",
    [
        None,
        {},
        0.5,
        {str(n): 1.0 for n in range(9)},
        {"loss": math.nan},
        {"loss": math.inf},
        {"loss": "low"},
        {"\x1b[2J": 1.0},
        {"x" * 33: 1.0},
        {3: 1.0},
    ],
)
def test_what_is_no_figure_is_refused_and_training_goes_on(
    tmp_path: Path, figures: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ValueError, match=r"evaluate\(model\)"):
        checked_figures(figures)
    one = Owned(tmp_path, lambda net: figures)
    one.turn()
    assert one.measuring.measured is None and "cannot measure round 1: ValueError" in caplog.text
