"""A run that has diverged is said to have, once; one that spikes or is noisy is not."""

from __future__ import annotations

import math
import random

import pytest

from p2ptrain.observe.diverging import LONG, MEAN_OF, NOT_FINITE, LossWatch


def learning(rounds: int) -> list[float]:
    """As a small model's losses fall, with the noise of small batches."""
    noise = random.Random(1)
    return [2.5 + 5.8 * math.exp(-n / 60) + noise.gauss(0, 0.3) for n in range(rounds)]


def said(losses: list[float]) -> list[int]:
    """After which contributions it says so."""
    watch, found = LossWatch(), []
    for number, nats in enumerate(losses):
        watch.contribution(nats)
        if watch.news():
            found.append(number)
    return found


def test_a_run_that_learns_is_not_called_diverged() -> None:
    assert said(learning(2000)) == []


def test_losses_of_hundreds_of_millions_are_said_once() -> None:
    (only,) = said(learning(100) + [3e8] * 500)
    assert 100 + LONG - 1 <= only <= 100 + LONG + MEAN_OF


@pytest.mark.parametrize("length", [5, LONG - 2 * MEAN_OF])
def test_a_spike_is_got_over(length: int) -> None:
    assert said(learning(300) + [27.0] * length + learning(600)[300:]) == []


def test_a_run_that_begins_by_getting_worse_and_stays_there_has_diverged() -> None:
    assert len(said([8.3] * MEAN_OF + [13.0] * (LONG + MEAN_OF))) == 1


def test_losses_that_are_not_finite_are_told_of_when_they_begin_and_when_they_stay() -> None:
    watch = LossWatch()
    assert [watch.micro_batch(False) for _ in range(3)] == [True, False, False]
    assert not watch.micro_batch(True) and not watch.news()
    for _ in range(NOT_FINITE):
        watch.micro_batch(False)
    assert "finite" in watch.news() and not watch.news()
    assert watch.diverged


def test_a_run_that_comes_back_is_not_shown_as_diverged_any_more() -> None:
    watch = LossWatch()
    for nats in [4.0] * MEAN_OF + [9.0] * (LONG + MEAN_OF):
        watch.contribution(nats)
    assert watch.diverged
    for nats in [4.0] * MEAN_OF:
        watch.contribution(nats)
    assert not watch.diverged
