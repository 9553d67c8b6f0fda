"""What the network thread tells the trainer: the messages of the one queue between the two threads.

Each message is a whole, immutable value. The trainer hears of rounds through these alone, and answers through
`training.trainer.Swarm`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from p2ptrain.chain import ChainState, SignedSeal
from p2ptrain.chain.sealed import Key, SealedRound
from p2ptrain.rounds.events import Apply, Rollback, StartRound, StoodIn


@dataclass(frozen=True, slots=True)
class Restore:
    """For the trainer: go to a snapshot, or the run's beginning, and apply these rounds from there."""

    snapshot: bytes | None
    """In memory, as its file may be gone by the time that the trainer comes to it."""
    chain: ChainState
    rounds: tuple[SealedRound, ...]
    common: bool = True
    """Whether our chain, too, went through the place where this starts."""
    earlier: tuple[ChainState | SignedSeal, ...] = ()
    """How the chain came to that place, for whoever keeps seals; nothing where it is not known."""


@dataclass(frozen=True, slots=True)
class Dropped:
    """For the trainer: its contribution to this round came too late and never left."""

    key: Key
    decays: int
    """Of the momentum at its sending, which tell it from another one for the same round."""
    weight: int


TrainerMessage = StartRound | StoodIn | Dropped | Apply | Rollback | Restore


class Inbox(Protocol):
    """The trainer's queue."""

    def put(self, message: TrainerMessage | None, /) -> None: ...
