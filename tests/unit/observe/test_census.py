"""What `inspect` says of a run, from records and a crawl."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from lone import RUN_ID, identity_of

from p2ptrain.cli.inspect import show_overview
from p2ptrain.observe.census import LOST_AND_SILENT_SECONDS, LOST_SECONDS, inspect_run
from p2ptrain.swarm.crawl import Census
from p2ptrain.swarm.identity import format_peer_id
from p2ptrain.swarm.records import EvaluationRecord, PeerRecord, RefusedRecord

NOW = 1_000_000.0
A, B = bytes([1]) * 32, bytes([2]) * 32


def record(
    name: str,
    *,
    age: float = 0.5,
    state: Any = "training",
    round: int = 7,
    state_id: bytes = A,
    refused: RefusedRecord | None = None,
    evaluation: EvaluationRecord | None = None,
    diverged: str = "",
) -> PeerRecord:
    return PeerRecord(
        peer_id=identity_of(name).peer_id,
        run_id=RUN_ID,
        time=NOW - age,
        name=name,
        state=state,
        role="member",
        round=round,
        state_id=state_id,
        total=20,
        refused=refused,
        evaluation=evaluation,
        diverged=diverged,
    )


def look(*records: PeerRecord, silent: tuple[str, ...] = ()) -> dict[str, Any]:
    dead = frozenset(identity_of(name).peer_id for name in silent)
    alive = frozenset(one.peer_id for one in records) - dead
    found = {one.peer_id: one for one in records}
    return inspect_run(RUN_ID, "run", found, Census(alive, dead), NOW).as_json()


def states(seen: dict[str, Any]) -> dict[str, str]:
    return {peer["name"]: peer["state"] for peer in seen["peers"]}


def test_the_keys_are_those_that_programs_rely_on() -> None:
    seen = look(record("ada"))
    assert {"run", "peers", "evaluation", "dht", "health", "overview", "branches", "time"} == seen.keys()
    assert seen["evaluation"] is None
    run = {"id": RUN_ID.hex(), "name": "run", "round": 7, "state_id": A.hex(), "diverged": False}
    assert seen["run"] == run
    assert seen["dht"] == {"nodes_alive": 1, "nodes_dead": 0}
    (peer,) = seen["peers"]
    assert peer["peer_id"] == format_peer_id(identity_of("ada").peer_id)
    assert peer["last_seen_seconds"] == 0.5 and peer["loss"] is None
    promised = (
        "peer_id name state round state_id tokens_per_second bytes_sent_per_round bytes_received_per_round loss device "
        "version last_seen_seconds"
    )
    assert set(promised.split()) <= peer.keys()


def test_the_branch_that_a_peer_has_refused_isshow_overviewn_with_its_age() -> None:
    refused = RefusedRecord(round=90, total=400, donor="8Jkwp3Zq", why="0 of 3 members behind it", age_seconds=12)
    peers = {peer["name"]: peer for peer in look(record("ada", age=1.5, refused=refused), record("grace"))["peers"]}
    assert peers["grace"]["refused_branch"] is None
    assert peers["ada"]["refused_branch"] == {
        "round": 90,
        "total": 400,
        "donor": "8Jkwp3Zq",
        "why": "0 of 3 members behind it",
        "age_seconds": 13.5,
    }


def test_the_table_says_it_in_a_line_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    refused = RefusedRecord(round=90, total=400, donor="8Jkwp3Zq", why="0 of 3 members behind it", age_seconds=12)
    found = {one.peer_id: one for one in (record("ada", refused=refused), record("grace"))}
    show_overview(inspect_run(RUN_ID, "run", found, Census(frozenset(found), frozenset()), NOW), "table", watch=False)
    *_, line = capsys.readouterr().out.splitlines()
    told = "ada refused a branch up to round 90 (total 400) that 8Jkwp3Zq has, 12 s ago: 0 of 3 members behind it"
    assert line.strip() == told


def says(round: int, bits: float, state_id: bytes = A) -> EvaluationRecord:
    return EvaluationRecord(round=round, state_id=state_id, figures={"bits_per_byte": bits}, tokens=64)


def test_what_peers_have_measured_isshow_overviewn_as_what_they_say(capsys: pytest.CaptureFixture[str]) -> None:
    records = [
        record("ada", round=40, evaluation=says(10, 1.62)),
        record("grace", round=40, evaluation=says(20, 1.60)),
        record("linus", round=40, evaluation=says(40, 0.2)),
        # Of a round that it has not come to itself.
        record("mallory", round=40, evaluation=says(2**62, 0.1)),
        record("edsger", round=40),
    ]
    seen = look(*records)
    told = seen["evaluation"]
    assert (told["round"], told["median"], told["measurers"], told["far_off"]) == (40, 1.60, 3, True)
    assert told["by"] == format_peer_id(identity_of("linus").peer_id)
    peers = {peer["name"]: peer for peer in seen["peers"]}
    assert peers["ada"]["evaluation"]["figures"] == {"bits_per_byte": 1.62} and peers["edsger"]["evaluation"] is None
    found = {one.peer_id: one for one in records}
    seen_by = inspect_run(RUN_ID, "run", found, Census(frozenset(found), frozenset()), NOW, "ab" * 32)
    show_overview(seen_by, "table", watch=False)
    out = capsys.readouterr().out
    end = told["by"][-8:]
    assert f"held-out: 0.200 bits/byte on 64 tokens at round 40, says linus ({end})" in out and "train loss" in out
    assert f"  median of the newest figures of 3 peers: 1.600 bits/byte: linus ({end}) IS FAR OFF" in out
    assert "nobody has checked it; a home that holds the round can: p2ptrain eval --round 40" in out


def test_who_has_said_nothing_for_long_is_lost() -> None:
    assert states(look(record("ada", age=LOST_SECONDS + 0.1), record("grace"))) == {"ada": "lost", "grace": "training"}


def test_who_does_not_answer_either_is_lost_sooner() -> None:
    age = LOST_AND_SILENT_SECONDS + 0.1
    seen = look(record("ada", age=age), record("grace", age=age), silent=("ada",))
    assert states(seen) == {"ada": "lost", "grace": "training"}
    assert seen["dht"] == {"nodes_alive": 1, "nodes_dead": 1}


@pytest.mark.parametrize("state", ["leaving", "finished"])
def test_who_said_goodbye_is_not_lost(state: str) -> None:
    assert states(look(record("ada", age=20, state=state))) == {"ada": state}


def test_records_that_were_read_some_time_ago_do_not_say_where_the_run_is_now() -> None:
    old = [record(name, round=9, age=60.0) for name in "abc"]
    found = {one.peer_id: one for one in [*old, record("d", round=30, state_id=B), record("e", round=29)]}
    # Each was new when it was looked at.
    looked_at = {peer: one.time for peer, one in found.items()}
    seen = inspect_run(RUN_ID, "run", found, Census(frozenset(found), frozenset()), NOW, looked_at=looked_at).as_json()
    assert set(states(seen).values()) == {"training"} and seen["run"]["round"] == 30


def test_the_run_stands_where_most_live_peers_are() -> None:
    seen = look(
        record("a", round=9, state_id=B, age=LOST_SECONDS + 1),
        record("b", round=9, state_id=B, age=LOST_SECONDS + 1),
        record("c", round=5, state_id=A),
        record("d", round=5, state_id=A),
        record("e", round=6, state_id=B),
        record("f", round=0, state_id=RUN_ID, state="syncing"),
        record("g", round=0, state_id=RUN_ID, state="joining"),
        record("h", round=0, state_id=RUN_ID, state="joining"),
    )
    assert (seen["run"]["round"], seen["run"]["state_id"]) == (5, A.hex())


def test_of_chains_with_equal_support_the_furthest_isshow_overviewn() -> None:
    assert look(record("a", round=5), record("b", round=6, state_id=B))["run"]["round"] == 6


def test_a_run_whose_peers_are_all_gone_still_has_a_round() -> None:
    assert look(record("a", age=20, round=5))["run"]["round"] == 5
    assert look()["run"] == {"id": RUN_ID.hex(), "name": "run", "round": 0, "state_id": "", "diverged": False}


def test_who_says_that_the_run_has_diverged_is_shown_and_the_run_has_where_most_say_so(
    capsys: pytest.CaptureFixture[str],
) -> None:
    why = "the train loss has been far above its best for 64 rounds"
    one, two = record("ada", diverged=why), record("bob")
    assert not look(one, two)["run"]["diverged"]
    assert look(one, two, record("eve", diverged=why))["run"]["diverged"]
    show_overview(inspect_run(RUN_ID, "run", {one.peer_id: one}, Census(frozenset(), frozenset()), NOW), "table", False)
    assert f"ada says that the run has diverged: {why}" in capsys.readouterr().out
