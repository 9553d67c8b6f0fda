"""What the manifest fixes about rounds."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundRules:
    """What the manifest fixes about rounds; durations in seconds."""

    chunks: int
    target_batch: int
    min_seconds: float
    max_seconds: float
    fixed_pace: bool
    overlap: bool
    """Members compute for the next round while their messages and replies of this one are on their way."""
    round_max_seconds: float
    grace_seconds: float
    reply_timeout_seconds: float
    seal_timeout_seconds: float
    alone_after_seconds: float
    root_interval: int
    last_round: int
    """The run ends with it; 0: never."""
    audits_a_part: float
    """Expected audits of each part of a round, by all members together (rule 14)."""
    weight_cap_ratio: float
    """Of a member's throughput this many times the median counts."""
