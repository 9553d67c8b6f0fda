"""Whether a swarm is well, in one line: what is the matter, with whom, and what to look at next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Level = Literal["ok", "warn", "fail"]
GONE = ("lost", "leaving")
STALLED_ROUNDS, STALLED_SECONDS = 4.0, 10.0
"""A swarm stands still whose newest seal is older than so many rounds, and than so many seconds."""
OFTEN_LATE = 0.5
"""Share of rounds without a member from which on it is worth a word."""
NAMED = 3
"""Peers that one line names."""


@dataclass(frozen=True, slots=True)
class Health:
    """See the module docstring."""

    level: Level
    text: str

    def as_json(self) -> dict[str, str]:
        """For programs."""
        return {"level": self.level, "text": self.text}


def named(peers: Sequence[str]) -> str:
    """Return the names of some peers in a few words."""
    more = len(peers) - NAMED
    return ", ".join(peers[:NAMED]) + (f" and {more} more" if more > 0 else "")


def health_of(
    peers: Sequence[Mapping[str, Any]],
    branches: Sequence[Mapping[str, Any]],
    *,
    since_seal_seconds: float | None = None,
    round_seconds: float | None = None,
    far_off: bool = False,
) -> Health:
    """Judge a swarm.

    Args:
        peers: the rows of an inspection.
        branches: beside the one that most are on.
        since_seal_seconds: since its newest seal came; None: not known.
        round_seconds: how long its rounds take; None: not known.
        far_off: whether the newest figure of the model is far from those before it.
    """
    live = [peer for peer in peers if peer["state"] not in GONE]
    names = {state: [peer["name"] for peer in peers if peer["state"] == state] for state in {p["state"] for p in peers}}
    at_work = names.get("training", []) + names.get("solo", [])
    if not live:
        return Health("fail", "nobody is there: every record of this run is old")
    if len(names.get("finished", [])) == len(live):
        return Health("ok", f"the run is finished; {len(live)} of its peers are still there")
    if not at_work:
        return Health("fail", f"nobody trains: {_states(live)}")
    limit = max(STALLED_SECONDS, STALLED_ROUNDS * (round_seconds or 0.0))
    if since_seal_seconds is not None and since_seal_seconds > limit:
        lost = f"; lost: {named(names['lost'])}" if "lost" in names else ""
        return Health("fail", f"stands still: no seal for {since_seal_seconds:.0f} s{lost}")
    problems = []
    if branches:
        apart = [name for branch in branches for name in branch["peers"]]
        problems.append(f"{len(branches) + 1} branches: {named(apart)} not on the main one")
    if "lost" in names:
        problems.append(f"lost: {named(names['lost'])}")
    if len(live) > 1 and "solo" in names:
        problems.append(f"alone: {named(names['solo'])}")
    for state, words in (("syncing", "behind"), ("joining", "not in yet"), ("paused", "paused")):
        if state in names:
            problems.append(f"{words}: {named(names[state])}")
    late = [
        peer["name"]
        for peer in live
        if peer.get("rounds") and peer["late"] > OFTEN_LATE * peer["rounds"] and peer["state"] == "training"
    ]
    if late:
        problems.append(f"often late: {named(late)}")
    if far_off:
        problems.append("the newest figure of the model is far off")
    if problems:
        return Health("warn", f"{len(at_work)} of {len(peers)} train; " + "; ".join(problems))
    return Health("ok", f"all is well: {_states(live)}, on one chain")


def _states(live: Sequence[Mapping[str, Any]]) -> str:
    states = [peer["state"] for peer in live]
    counts = {state: states.count(state) for state in dict.fromkeys(states)}
    return ", ".join(f"{count} {state}" for state, count in counts.items())
