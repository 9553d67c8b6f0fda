"""The learning rate is a warm-up and a cosine, without anybody's cosine."""

from __future__ import annotations

import math

import pytest

from p2ptrain.optim.schedule import learning_rate

PLAN = {"peak": 0.02, "warmup_rounds": 10, "total_rounds": 210, "final_fraction": 0.1}


def rate(round_number: int, **changes: float) -> float:
    return learning_rate(round_number, **{**PLAN, **changes})  # type: ignore[arg-type]


def test_warm_up_is_linear_and_starts_above_zero() -> None:
    assert [rate(n) for n in range(10)] == pytest.approx([0.002 * (n + 1) for n in range(10)], rel=1e-12)


def test_after_it_the_rate_follows_a_cosine() -> None:
    for n in range(10, 211):
        expected = 0.02 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (n - 10) / 200)))
        assert abs(rate(n) - expected) < 1e-9 * 0.02


def test_it_peaks_at_the_end_of_the_warm_up_and_ends_at_the_final_fraction() -> None:
    assert rate(10) == 0.02
    assert rate(210) == pytest.approx(0.002, rel=1e-12)
    assert rate(211) == rate(10**9) == rate(210)


def test_without_warm_up_the_first_round_has_the_peak() -> None:
    assert rate(0, warmup_rounds=0) == 0.02


def test_a_run_shorter_than_its_warm_up_stays_finite() -> None:
    rates = [rate(n, warmup_rounds=10, total_rounds=5) for n in range(20)]
    assert rates[:10] == [rate(n) for n in range(10)]
    assert all(0.002 * (1 - 1e-12) <= r <= 0.02 for r in rates[10:])
