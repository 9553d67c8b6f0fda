"""What all peers of a run agree on about payloads: a run's manifest says it, and no payload is read without it."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Literal

Robust = Literal["bounded", "mean", "centered_clip", "trimmed"]
"""How a reducer sums contributions; see `reduce.py`."""
STANDING_FULL = 8
"""Rounds with its work in them, the next one included, after which a member counts in full."""


@dataclass(frozen=True)
class Codec:
    """How many coefficients a chunk's contribution and reply hold, in how many bits, and what a sender counts for.

    Made with an optimizer, which knows the chunks; `training.replica.build_optimizer` takes the rest from the manifest.

    Attributes:
        topk: [chunks] coefficients of each chunk in a contribution.
        reply_topk: [chunks] coefficients of each chunk in a reply, at most.
        value_bits: of a contribution's value: 1, 2, 8, or 32 for plain float32.
        clip_ratio: a sender's norm is clipped to this many times the median norm.
        weight_cap_ratio: a sender's weight counts for at most this many times the median weight.
        robust: how contributions are summed.
    """

    topk: tuple[int, ...]
    reply_topk: tuple[int, ...]
    value_bits: int
    clip_ratio: float = math.inf
    weight_cap_ratio: float = math.inf
    robust: Robust = "mean"

    @property
    def chunks(self) -> int:
        """Count the chunks of all parameters."""
        return len(self.topk)

    @functools.cached_property
    def _hash(self) -> int:
        """Pass over all chunks once: `decoded` looks payloads up by their codec."""
        rules = self.clip_ratio, self.weight_cap_ratio, self.robust
        return hash((self.topk, self.reply_topk, self.value_bits, *rules))

    def __hash__(self) -> int:
        return self._hash
