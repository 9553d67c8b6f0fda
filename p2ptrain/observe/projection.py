"""From what happened to what is: the moment that a peer's events add up to, as the same value that a look gives.

Pure: the same events give the same moment, whenever they are replayed. Of others it knows what this peer heard, which
for one that has not changed is up to a minute old.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from p2ptrain.observe.census import Inspection, did_of, ordered
from p2ptrain.observe.evaluations import LOOK_BACK, Evaluation, summary_of
from p2ptrain.observe.events import (
    ChangedChain,
    Event,
    Heard,
    Measured,
    Noted,
    RolledBack,
    Sealed,
    Started,
    Stopped,
    Tail,
    Worked,
    read_events,
)
from p2ptrain.observe.peers import CLIENT, DIRECT, standings

ROUNDS_KEPT = 512
NOTES_KEPT = 64
PEERS_KEPT = 1024


class Projection:
    """The state of a swarm as one peer saw it, after some events.

    Args:
        rounds_kept: of the newest rounds so many are remembered.
    """

    def __init__(self, rounds_kept: int = ROUNDS_KEPT) -> None:
        self.own: Started | None = None
        self.stopped: Stopped | None = None
        self.rounds: deque[Sealed] = deque(maxlen=rounds_kept)
        self.worked: Worked | None = None
        self.peers: dict[str, Heard] = {}
        self.measured: deque[Evaluation] = deque(maxlen=LOOK_BACK)
        self.noted: deque[Noted] = deque(maxlen=NOTES_KEPT)
        #: when the last event was, in Unix seconds
        self.at = 0.0

    @property
    def round(self) -> int:
        """Where this peer's chain stood."""
        return self.rounds[-1].round if self.rounds else 0 if self.own is None else self.own.round

    def apply(self, event: Event) -> None:
        """Take one event more."""
        self.at = max(self.at, event.t)
        match event:
            case Started():
                if self.own is not None and self.own.run_id != event.run_id:
                    self.rounds.clear()
                self.own, self.stopped = event, None
            case Sealed():
                self._back_to(event.round - 1)
                self.rounds.append(event)
            case RolledBack() | ChangedChain():
                self._back_to(event.round)
            case Worked():
                self.worked = event
            case Heard():
                self.peers.pop(event.peer_id, None)
                self.peers[event.peer_id] = event
                if len(self.peers) > PEERS_KEPT:
                    del self.peers[next(iter(self.peers))]
            case Measured():
                self.measured.append(
                    Evaluation(
                        time=event.t,
                        round=event.round,
                        state_id=event.state_id,
                        by=event.by,
                        figures=event.figures,
                        tokens=event.tokens,
                    )
                )
            case Noted():
                self.noted.append(event)
            case Stopped():
                self.stopped = event

    def _back_to(self, round: int) -> None:
        while self.rounds and self.rounds[-1].round > round:
            self.rounds.pop()

    @property
    def names(self) -> dict[str, str]:
        """Names of peers by their ids."""
        own = {} if self.own is None else {self.own.peer_id: self.own.name}
        return {peer: heard.name for peer, heard in self.peers.items()} | own

    def moment(self) -> Inspection:
        """Return how the swarm was when the last event came."""
        own = self.own
        did = standings(self.rounds)
        rows = [_row(heard, self.at) for id, heard in self.peers.items() if own is None or id != own.peer_id]
        if own is not None:
            rows.append(self._own_row(own))
        sealed_at = self.rounds[-1].t if self.rounds else None
        return Inspection(
            run_id=bytes.fromhex(own.run_id) if own is not None else bytes(32),
            name=own.run if own is not None else "",
            peers=tuple(ordered([row | did_of(did, row["peer_id"]) for row in rows])),
            nodes_alive=0,
            nodes_dead=0,
            evaluation=summary_of(self.measured),
            rounds=tuple(self.rounds),
            last_round=0 if own is None else own.last_round,
            since_seal_seconds=None if sealed_at is None else max(0.0, self.at - sealed_at),
            at=self.at,
        )

    def _own_row(self, own: Started) -> dict[str, Any]:
        newest = self.rounds[-1] if self.rounds else None
        worked = self.worked
        member = newest is not None and any(one.peer_id == own.peer_id for one in newest.members)
        if self.stopped is not None and self.stopped.paused:
            state = "paused"
        elif self.stopped is not None:
            state = "finished" if own.last_round and self.round >= own.last_round else "leaving"
        elif newest is not None and (member or newest.sealer == own.peer_id):
            state = "solo" if newest.solo or len(newest.members) == 1 else "training"
        else:
            state = "joining"
        return {
            "peer_id": own.peer_id,
            "name": own.name,
            "state": state,
            "role": "member" if member else "learner",
            "round": self.round,
            "state_id": own.state_id if newest is None else newest.state_id,
            "total": 0 if newest is None else newest.total,
            "tokens_per_second": 0.0 if worked is None or self.stopped is not None else worked.tokens_per_second,
            "bytes_sent_per_round": 0 if worked is None else worked.bytes_sent,
            "bytes_received_per_round": 0 if worked is None else worked.bytes_received,
            "loss": None if worked is None else worked.loss,
            "train_loss": None if worked is None else worked.loss,
            "evaluation": None,
            "round_seconds": None
            if worked is None
            else {
                "computing": worked.computing_seconds,
                "exchange": worked.exchange_seconds,
                "disk": worked.disk_seconds,
                "waiting": worked.waiting_seconds,
            },
            "path": DIRECT,
            "device": own.device,
            "version": own.version,
            "last_seen_seconds": 0.0,
            "addresses": [],
            "refused_branch": None,
            "diverged": None,
        }


def _row(heard: Heard, now: float) -> dict[str, Any]:
    return {
        "peer_id": heard.peer_id,
        "name": heard.name,
        "state": heard.state,
        "role": "member" if heard.state in ("training", "solo") else "learner",
        "round": heard.round,
        "state_id": heard.state_id,
        "total": 0,
        "tokens_per_second": heard.tokens_per_second,
        "bytes_sent_per_round": 0,
        "bytes_received_per_round": 0,
        "loss": heard.loss,
        "train_loss": heard.loss,
        "evaluation": None,
        "round_seconds": None,
        "path": heard.path or CLIENT,
        "device": heard.device,
        "version": heard.version,
        "last_seen_seconds": round(max(0.0, now - heard.t), 1),
        "addresses": [],
        "refused_branch": None,
        "diverged": None,
    }


def moment_at(events: Iterable[Event], round: int | None = None) -> Projection:
    """Return the state after all of these events, or, with `round`, just before the first round after it was sealed.

    Where the chain went back and through that round again, the last time counts.
    """
    kept = list(events)
    if round is not None:
        last = max(
            (n for n, event in enumerate(kept) if isinstance(event, Sealed) and event.round == round), default=-1
        )
        end = next(
            (n for n, event in enumerate(kept) if n > last and isinstance(event, Sealed | RolledBack | ChangedChain)),
            len(kept),
        )
        kept = kept[: end if last >= 0 else 0]
    projection = Projection()
    for event in kept:
        projection.apply(event)
    return projection


class RoundsOfHome:
    """The newest rounds that the peer of a home went through, read on from its events at each call.

    Args:
        folder: of events.
    """

    def __init__(self, folder: Path) -> None:
        self._tail, self._projection = Tail(folder), Projection()

    def read(self) -> tuple[Sealed, ...]:
        """Return them, oldest first."""
        for event in self._tail.read():
            self._projection.apply(event)
        return tuple(self._projection.rounds)


def names_of(folder: Path) -> dict[str, str]:
    """Return the names of peers, by their ids, that the events in a folder tell."""
    names: dict[str, str] = {}
    for event in read_events(folder):
        if isinstance(event, Heard | Started):
            names[event.peer_id] = event.name
    return names
