"""One look at a swarm: the run, its peers and the DHT, from records and seals. Every view draws this.

A peer is `lost` when its record is older than `LOST_SECONDS`, or somewhat old and its DHT node does not answer: it
publishes every three seconds while it lives. The run's figures are those of the chain that most live peers are on.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from p2ptrain.observe.evaluations import Summary, evaluation_of, summary_of
from p2ptrain.observe.events import Sealed
from p2ptrain.observe.health import GONE, Health, health_of
from p2ptrain.observe.peers import Standing, path_of, standings
from p2ptrain.swarm.crawl import Census
from p2ptrain.swarm.identity import format_peer_id
from p2ptrain.swarm.records import EvaluationRecord, PeerRecord, RefusedRecord, RoundTime

LOST_SECONDS = 7.0
LOST_AND_SILENT_SECONDS = 5.0
NEW_SECONDS = 10.0
"""Records so much older than the newest do not say where the run is now: of many, a look reads a few anew."""
_SETTLED_NOT = ("joining", "syncing")


@dataclass(frozen=True, slots=True)
class Inspection:
    """One look at a run."""

    run_id: bytes
    name: str
    peers: tuple[dict[str, Any], ...]
    nodes_alive: int
    nodes_dead: int
    evaluation: Summary | None = None
    """Of what the peers say they have measured. Whose turn it was, an observer cannot tell."""
    rounds: tuple[Sealed, ...] = ()
    """The newest, as far as seals are at hand, oldest first."""
    last_round: int = 0
    """Of the run; 0: it has none."""
    since_seal_seconds: float | None = None
    """Since its newest seal came; None: not known."""
    at: float = 0.0
    """Unix seconds."""
    nodes: tuple[dict[str, Any], ...] = ()
    """Of the DHT, each with whether it answers and whether it has a record in this run."""
    newest: frozenset[str] | None = None
    """Ids of the peers whose records are new; None: of all."""

    def as_json(self) -> dict[str, Any]:
        """The fixed keys of `inspect --format json`."""
        settled = self._settled
        newest = [peer for peer in settled if self.newest is None or peer["peer_id"] in self.newest]
        round_number, state_id = _majority(newest or settled)
        return {
            "run": {
                "id": self.run_id.hex(),
                "name": self.name,
                "round": round_number,
                "state_id": state_id,
                # One member's word is not enough: its text may be another than theirs.
                "diverged": 2 * sum(peer["diverged"] is not None for peer in self._live) > len(self._live),
            },
            "time": round(self.at, 3),
            "health": self.health.as_json(),
            "overview": self._overview(round_number),
            "branches": self.branches,
            "peers": list(self.peers),
            "evaluation": None if self.evaluation is None else self.evaluation.as_json(),
            "dht": {"nodes_alive": self.nodes_alive, "nodes_dead": self.nodes_dead},
        }

    @property
    def _live(self) -> list[dict[str, Any]]:
        return [peer for peer in self.peers if peer["state"] not in GONE]

    @property
    def _settled(self) -> list[dict[str, Any]]:
        """The peers that say where the run is: a learner that is still catching up does not."""
        live = self._live
        return [peer for peer in live if peer["state"] not in _SETTLED_NOT] or live or list(self.peers)

    @property
    def branches(self) -> list[dict[str, Any]]:
        """The branches beside the main one, each with who is on it, as far as seals and equal rounds tell."""
        main = {sealed.round: sealed.state_id for sealed in self.rounds}
        settled = self._settled
        for number in {peer["round"] for peer in settled} - main.keys():
            main[number] = _majority([peer for peer in settled if peer["round"] == number])[1]
        found: dict[tuple[int, str], list[str]] = {}
        for peer in settled:
            if peer["state"] not in GONE and main[peer["round"]] != peer["state_id"]:
                found.setdefault((peer["round"], peer["state_id"]), []).append(peer["name"])
        return [{"round": number, "state_id": id, "peers": names} for (number, id), names in sorted(found.items())]

    @property
    def round_seconds(self) -> dict[str, float] | None:
        """Where a round of those who train goes, in the middle of them; None: nobody says."""
        said = [peer["round_seconds"] for peer in self._settled if peer["round_seconds"] is not None]
        if not said:
            return None
        return {part: round(statistics.median(one[part] for one in said), 3) for part in said[0]}

    @property
    def health(self) -> Health:
        """How the swarm is."""
        spent = self.round_seconds
        return health_of(
            self.peers,
            self.branches,
            since_seal_seconds=self.since_seal_seconds,
            round_seconds=None if spent is None else sum(spent.values()),
            far_off=self.evaluation is not None and self.evaluation.far_off,
        )

    def _overview(self, round_number: int) -> dict[str, Any]:
        live = self._live
        losses = [peer["train_loss"] for peer in live if peer["train_loss"] is not None]
        spent = self.round_seconds
        length = sum(spent.values()) if spent else None
        left = max(0, self.last_round - round_number) if self.last_round else None
        states = [peer["state"] for peer in self.peers]
        return {
            "last_round": self.last_round or None,
            "eta_seconds": None if left is None or length is None else round(left * length),
            "train_loss": statistics.median(losses) if losses else None,
            "tokens_per_second": round(sum(peer["tokens_per_second"] for peer in live), 1),
            "round_seconds": spent,
            "since_seal_seconds": None if self.since_seal_seconds is None else round(self.since_seal_seconds, 1),
            "peers": {state: states.count(state) for state in dict.fromkeys(states)},
        }


def _majority(peers: list[dict[str, Any]]) -> tuple[int, str]:
    """Round and state id of the chain that most are on: of those of equal support, the furthest."""
    if not peers:
        return 0, ""
    votes = Counter((peer["round"], peer["state_id"]) for peer in peers)
    # Peers a round apart are on one chain as far as records tell: the most frequent, else the newest.
    return max(votes, key=lambda tip: (votes[tip], tip[0], tip[1]))


def inspect_run(
    run_id: bytes,
    name: str,
    records: Mapping[bytes, PeerRecord],
    census: Census,
    now: float | None = None,
    tokenizer_sha256: str = "",
    *,
    looked_at: Mapping[bytes, float] | None = None,
    rounds: Sequence[Sealed] = (),
    last_round: int = 0,
    since_seal_seconds: float | None = None,
) -> Inspection:
    """Put together what records, a crawl and seals say at `now` (Unix seconds), for a run of text with that tokenizer.

    Args:
        looked_at: of each peer, when its record was looked for (Unix seconds); without an entry, `now`.
        rounds: the newest, as far as seals are at hand, oldest first.
        last_round: of the run; 0: it has none.
        since_seal_seconds: since its newest seal came; None: not known.
    """
    now = time.time() if now is None else now
    did, at = standings(rounds), looked_at or {}
    peers = ordered(
        [_row(record, census, at.get(id, now)) | did_of(did, format_peer_id(id)) for id, record in records.items()]
    )
    said = [
        evaluation_of(record.peer_id, record.evaluation, record.time, tokenizer_sha256)
        for record in records.values()
        # A state that its own publisher has not come to is none of this run's yet.
        if record.evaluation is not None and record.evaluation.round <= record.round
    ]
    newest = max((record.time for record in records.values()), default=0.0) - NEW_SECONDS
    return Inspection(
        run_id,
        name,
        tuple(peers),
        len(census.alive),
        len(census.dead),
        summary_of(said),
        rounds=tuple(rounds),
        last_round=last_round,
        since_seal_seconds=since_seal_seconds,
        at=now,
        newest=frozenset(format_peer_id(id) for id, record in records.items() if record.time >= newest),
        nodes=tuple(_node(id, id in census.alive, records.get(id), now) for id in sorted(census.alive | census.dead)),
    )


def ordered(peers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return rows of peers as they are shown: who is gone comes last."""
    return sorted(peers, key=lambda peer: (peer["state"] in GONE, peer["name"], peer["peer_id"]))


def did_of(standings: Mapping[str, Standing], peer_id: str) -> dict[str, Any]:
    """Return the keys of a peer's row that follow from seals; of one that is in none of them they are empty."""
    did = standings.get(peer_id)
    return {
        "share": None if did is None else round(did.share, 4),
        "rounds": 0 if did is None else did.rounds,
        "late": 0 if did is None else did.late,
        "parts": 0 if did is None else did.parts,
        "fault": "" if did is None else did.fault,
        "fault_round": 0 if did is None else did.fault_round,
    }


def _row(record: PeerRecord, census: Census, now: float) -> dict[str, Any]:
    age = record.last_seen_seconds(now)
    lost = age > LOST_SECONDS or (age > LOST_AND_SILENT_SECONDS and record.peer_id not in census.alive)
    state = "lost" if lost and record.state not in ("leaving", "finished") else record.state
    return {
        "peer_id": format_peer_id(record.peer_id),
        "name": record.name,
        "state": state,
        "role": record.role,
        "round": record.round,
        "state_id": record.state_id.hex(),
        "total": record.total,
        "tokens_per_second": round(record.tokens_per_second, 1),
        "bytes_sent_per_round": record.bytes_sent_per_round,
        "bytes_received_per_round": record.bytes_received_per_round,
        "loss": record.loss,
        "train_loss": record.loss,
        "evaluation": None if record.evaluation is None else _said(record.evaluation),
        "round_seconds": None if record.round_time is None else _seconds(record.round_time),
        "path": path_of(record.addresses),
        "diverged": record.diverged or None,
        "device": record.device,
        "version": record.version,
        "last_seen_seconds": round(age, 1),
        "addresses": list(record.addresses),
        "refused_branch": None if record.refused is None else _refused(record.refused, age),
    }


def _node(peer_id: bytes, alive: bool, record: PeerRecord | None, now: float) -> dict[str, Any]:
    return {
        "peer_id": format_peer_id(peer_id),
        "alive": alive,
        "name": "" if record is None else record.name,
        "record_age_seconds": None if record is None else round(record.last_seen_seconds(now), 1),
    }


def _seconds(spent: RoundTime) -> dict[str, float]:
    return {name: value / 1000 for name, value in msgspec.structs.asdict(spent).items()}


def _said(evaluation: EvaluationRecord) -> dict[str, Any]:
    return {
        "round": evaluation.round,
        "state_id": evaluation.state_id.hex(),
        "figures": dict(evaluation.figures),
        "tokens": evaluation.tokens,
        "seconds": round(evaluation.seconds, 3),
    }


def _refused(refused: RefusedRecord, record_age_seconds: float) -> dict[str, Any]:
    return {
        "round": refused.round,
        "total": refused.total,
        "donor": refused.donor,
        "why": refused.why,
        "age_seconds": round(refused.age_seconds + record_age_seconds, 1),
    }
