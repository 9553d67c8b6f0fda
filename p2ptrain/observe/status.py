"""What a peer says of itself: to its owner's terminal and, in records, to everyone.

Written by the trainer and the network thread, a field at a time; read by whoever shows it.
"""

from __future__ import annotations

from dataclasses import dataclass

from p2ptrain.swarm.records import PeerState


@dataclass(slots=True)
class Status:
    """One peer at this moment."""

    state: PeerState = "joining"
    role: str = "learner"
    round: int = 0
    state_id: bytes = bytes(32)
    total: int = 0
    members: int = 0
    #: nats a token, on what it trained on in the last round
    loss: float | None = None
    #: the same in bits a byte of text
    bits_per_byte: float | None = None
    tokens_per_second: float = 0.0
    #: in the last round, framing included, to itself excluded
    bytes_sent_per_round: int = 0
    bytes_received_per_round: int = 0
    #: of the last round
    computing_seconds: float = 0.0
    waiting_seconds: float = 0.0
    #: share of the last contribution that the group used
    consumed_share: float = 0.0
    #: computed by this peer in all its lives, and how many of them may be in vain, since the chain changed
    sequences_read: int = 0
    sequences_given_up: int = 0
    #: since this process began
    snapshots_fetched: int = 0
