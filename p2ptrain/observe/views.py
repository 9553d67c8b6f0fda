"""What each view shows, as plain values: for programs as they are, for terminals and pages to be drawn.

Nothing is worked out in a view itself, so that all of them say the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

import msgspec

from p2ptrain.config.manifest import Manifest
from p2ptrain.observe.census import Inspection
from p2ptrain.observe.events import Sealed
from p2ptrain.observe.rounds import LATE, faults_of, skipped_parts

View = Literal["overview", "peers", "peer", "rounds", "dht", "manifest", "credit"]
VIEWS: tuple[View, ...] = ("overview", "peers", "peer", "rounds", "dht", "manifest", "credit")
SORTS: dict[str, tuple[str, bool]] = {
    "name": ("name", False),
    "state": ("state", False),
    "round": ("round", True),
    "tokens": ("tokens_per_second", True),
    "share": ("share", True),
    "late": ("late", True),
    "seen": ("last_seen_seconds", False),
}
"""By the word that a person types: the key of a peer's row, and whether the largest comes first."""


def sorted_peers(peers: Iterable[Mapping[str, Any]], by: str) -> list[Mapping[str, Any]]:
    """Return rows of peers in the order of one of `SORTS`."""
    key, largest_first = SORTS[by]
    known = [peer for peer in peers if peer[key] is not None]
    return sorted(known, key=lambda peer: peer[key], reverse=largest_first) + [p for p in peers if p[key] is None]


def round_row(sealed: Sealed, names: Mapping[str, str]) -> dict[str, Any]:
    """Return what is to be seen of one round.

    Args:
        names: of peers, by their ids.
    """

    def name(peer_id: str) -> str:
        return names.get(peer_id) or peer_id[-8:]

    faults = faults_of(sealed)
    return {
        "round": sealed.round,
        "state_id": sealed.state_id,
        "sealer": name(sealed.sealer),
        "place": sealed.place,
        "takeover": sealed.place > 0 and not sealed.solo,
        "solo": sealed.solo,
        "members": len(sealed.members),
        "included": [name(member.peer_id) for member in sealed.members if member.included],
        "late": [name(peer) for peer, fault in faults.items() if fault == LATE],
        "parts": sum(member.parts for member in sealed.members),
        "skipped_parts": skipped_parts(sealed),
        "sequences": sum(member.weight for member in sealed.members),
        "faults": {name(peer): fault for peer, fault in faults.items() if fault != LATE},
        "joins": [name(peer) for peer in sealed.joins],
        "let_in": [name(peer) for peer in sealed.let_in],
        "shut_out": [name(peer) for peer in sealed.shut_out],
        "root": sealed.root,
    }


def rounds_view(seen: Inspection, most: int = 0) -> dict[str, Any]:
    """Return the newest rounds, the newest first; `most` 0: all that are at hand."""
    names = {peer["peer_id"]: peer["name"] for peer in seen.peers}
    rows = [round_row(sealed, names) for sealed in seen.rounds[-most:]]
    return {"run": seen.as_json()["run"], "rounds": rows[::-1]}


def peer_view(seen: Inspection, peer: Mapping[str, Any], most: int = 32) -> dict[str, Any]:
    """Return one peer's row, and how it did in each of the last rounds, the newest first."""
    rounds: list[dict[str, Any]] = []
    for sealed in reversed(seen.rounds):
        member = next((one for one in sealed.members if one.peer_id == peer["peer_id"]), None)
        if member is not None and len(rounds) < most:
            rounds.append(
                {
                    "round": sealed.round,
                    "included": member.included,
                    "sequences": member.weight,
                    "parts": member.parts,
                    "owed": member.owed,
                    "sealed_it": sealed.sealer == member.peer_id,
                    "fault": faults_of(sealed).get(member.peer_id, ""),
                }
            )
    return {"run": seen.as_json()["run"], "peer": dict(peer), "rounds": rounds}


def dht_view(seen: Inspection) -> dict[str, Any]:
    """Return the nodes that were found, those that answer first, and the records of the run with their age."""
    records = [
        {key: peer[key] for key in ("peer_id", "name", "state", "last_seen_seconds", "addresses")}
        for peer in seen.peers
    ]
    return {
        "run": seen.as_json()["run"],
        "dht": {"nodes_alive": seen.nodes_alive, "nodes_dead": seen.nodes_dead},
        "nodes": sorted(seen.nodes, key=lambda node: not node["alive"]),
        "records": records,
    }


def manifest_view(manifest: Manifest, run_id: bytes) -> dict[str, Any]:
    """Return what all peers of a run have agreed on."""
    return {"run": {"id": run_id.hex(), "name": manifest.name}, "manifest": msgspec.to_builtins(manifest)}


def flat(table: Mapping[str, Any], before: str = "") -> list[tuple[str, str]]:
    """Return a nested table as dotted keys and values."""
    rows = []
    for key, value in table.items():
        if isinstance(value, dict):
            rows += flat(value, f"{before}{key}.")
        elif isinstance(value, list | tuple) and value and all(isinstance(one, dict) for one in value):
            for number, one in enumerate(value):
                rows += flat(one, f"{before}{key}[{number}].")
        else:
            rows.append((before + key, ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)))
    return rows
