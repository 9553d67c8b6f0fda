"""Learning rate by round, the same float on every machine: only + - * / of doubles, no libm."""

from __future__ import annotations

_PI = 3.141592653589793


def _cosine(x: float) -> float:
    """cos(x) for 0 <= x <= pi by its Taylor series; every operation is IEEE, so every machine gets these bits."""
    total = term = 1.0
    for n in range(1, 16):
        term = -term * x * x / ((2 * n - 1) * (2 * n))
        total += term
    return total


def learning_rate(
    round_number: int, *, peak: float, warmup_rounds: int, total_rounds: int, final_fraction: float
) -> float:
    """Linear warm-up to `peak`, then a cosine to `final_fraction * peak` at `total_rounds`, flat after it."""
    if round_number < warmup_rounds:
        return peak * (round_number + 1) / warmup_rounds
    span = max(total_rounds - warmup_rounds, 1)
    progress = min((round_number - warmup_rounds) / span, 1.0)
    return peak * (final_fraction + (1.0 - final_fraction) * 0.5 * (1.0 + _cosine(_PI * progress)))
