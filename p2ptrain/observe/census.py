"""What `inspect` shows: the run, its peers and the DHT, from records alone. The observer trains nothing, is in no list.

A peer is `lost` when its record is older than `LOST_SECONDS`, or somewhat old and its DHT node does not answer: it
publishes every two seconds while it lives. The run's figures are those of the chain that most live peers are on.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from p2ptrain.observe.evaluations import Summary, evaluation_of, summary_of
from p2ptrain.swarm.crawl import Census
from p2ptrain.swarm.identity import format_peer_id
from p2ptrain.swarm.records import EvaluationRecord, PeerRecord, RefusedRecord

LOST_SECONDS = 6.5
LOST_AND_SILENT_SECONDS = 4.0
_GONE = ("lost", "leaving")


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

    def as_json(self) -> dict[str, Any]:
        """The fixed keys of `inspect --format json`."""
        live = [peer for peer in self.peers if peer["state"] not in _GONE]
        # A learner that is still catching up says nothing about where the run is.
        settled = [peer for peer in live if peer["state"] not in ("joining", "syncing")] or live or list(self.peers)
        round_number, state_id = _majority(settled)
        return {
            "run": {
                "id": self.run_id.hex(),
                "name": self.name,
                "round": round_number,
                "state_id": state_id,
                # One member's word is not enough: its text may be another than theirs.
                "diverged": 2 * sum(peer["diverged"] is not None for peer in live) > len(live),
            },
            "peers": list(self.peers),
            "evaluation": None if self.evaluation is None else self.evaluation.as_json(),
            "dht": {"nodes_alive": self.nodes_alive, "nodes_dead": self.nodes_dead},
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
) -> Inspection:
    """Put together what records and a crawl say at `now` (Unix seconds), for a run of text with that tokenizer."""
    now = time.time() if now is None else now
    peers = [_row(record, census, now) for record in records.values()]
    peers.sort(key=lambda peer: (peer["state"] in _GONE, peer["name"], peer["peer_id"]))
    said = [
        evaluation_of(record.peer_id, record.evaluation, record.time, tokenizer_sha256)
        for record in records.values()
        # A state that its own publisher has not come to is none of this run's yet.
        if record.evaluation is not None and record.evaluation.round <= record.round
    ]
    return Inspection(run_id, name, tuple(peers), len(census.alive), len(census.dead), summary_of(said))


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
        "diverged": record.diverged or None,
        "device": record.device,
        "version": record.version,
        "last_seen_seconds": round(age, 1),
        "addresses": list(record.addresses),
        "refused_branch": None if record.refused is None else _refused(record.refused, age),
    }


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
