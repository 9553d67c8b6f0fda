"""What a peer says of itself: to its owner's terminal and, in records, to everyone.

Each of a peer's two threads has a `Status` of its own. What one thread knows and the other shows is handed over whole:
`Standing` by the network thread, a copy of its `Status` by the trainer's.
"""

from __future__ import annotations

from dataclasses import dataclass

from p2ptrain.observe.evaluations import Summary
from p2ptrain.observe.turns import Turn
from p2ptrain.swarm.records import EvaluationRecord, PeerState, RefusedRecord


@dataclass(frozen=True, slots=True)
class Standing:
    """What the network thread knows of this peer; never changed once made."""

    #: where its machine's chain stands
    head_round: int = 0
    #: a member of the round under way, and of how many
    member: bool = False
    members: int = 0
    #: of them those that others can dial
    dialable: int = 0
    #: others are further, or their state is being fetched
    syncing: bool = False
    leaving: bool = False
    #: the disk is full, and nothing is done until there is room
    paused: bool = False
    #: in the last round, framing included, to itself excluded
    bytes_sent_per_round: int = 0
    bytes_received_per_round: int = 0
    #: the branch that fork choice refused last
    refused: RefusedRecord | None = None
    #: why this peer cannot go on
    failure: str | None = None
    #: the run's owner has shut this peer out
    revoked: bool = False


@dataclass(slots=True)
class Status:
    """One peer at this moment, as the thread that holds this knows it."""

    state: PeerState = "joining"
    role: str = "learner"
    round: int = 0
    state_id: bytes = bytes(32)
    total: int = 0
    members: int = 0
    #: of them those that others can dial
    dialable: int = 0
    #: nats a token, on what it trained on in the last round: the train loss
    loss: float | None = None
    #: the same in bits a byte of text
    bits_per_byte: float | None = None
    #: why the run has diverged, by this peer's losses; empty: it has not
    diverged: str = ""
    tokens_per_second: float = 0.0
    #: in the last round, framing included, to itself excluded
    bytes_sent_per_round: int = 0
    bytes_received_per_round: int = 0
    #: of the last round
    computing_seconds: float = 0.0
    waiting_seconds: float = 0.0
    #: of the waiting: until all replies to our contribution were here, and for checkpoint and snapshot
    exchange_seconds: float = 0.0
    disk_seconds: float = 0.0
    #: share of the last contribution that the group used
    consumed_share: float = 0.0
    #: computed by this peer in all its lives, and how many of them may be in vain, since the chain changed
    sequences_read: int = 0
    sequences_given_up: int = 0
    #: since this process began
    snapshots_fetched: int = 0
    #: what this peer has measured last, on text that nobody trains on
    measured: EvaluationRecord | None = None
    #: share of this process's time that measuring has taken
    measuring_share: float = 0.0
    #: whose turns the last ones to measure were, oldest first
    turns: tuple[Turn, ...] = ()
    #: what this peer and others have measured
    evaluation: Summary | None = None
    #: the run is over, and this peer has all of it
    finished: bool = False

    @property
    def idle_seconds(self) -> float:
        """Of the last round, what went into nothing of our own: waiting for others and for the seal."""
        return max(0.0, self.waiting_seconds - self.exchange_seconds - self.disk_seconds)

    def take(self, standing: Standing) -> None:
        """Fill in what the network thread knows."""
        if not self.finished:
            # After the last round there is no group; the last one stays on show.
            self.members, self.dialable = standing.members, standing.dialable
            self.role = "member" if standing.member else "learner"
        self.bytes_sent_per_round = standing.bytes_sent_per_round
        self.bytes_received_per_round = standing.bytes_received_per_round
        if standing.leaving:
            self.state = "leaving"
        elif standing.paused:
            self.state = "paused"
        elif self.finished:
            self.state = "finished"
        elif standing.member:
            self.state = "solo" if standing.members == 1 else "training"
        else:
            self.state = "syncing" if standing.syncing else "joining"
