"""Seals that are kept, what is counted from them, and moments that events add up to: 90 rounds of real peers."""

from __future__ import annotations

import functools
import statistics
from collections import Counter
from pathlib import Path

import msgspec
import pytest
import torch

from p2ptrain import chain
from p2ptrain.chain import SealError, SignedSeal, evidence
from p2ptrain.chain.sealed import SealedRound, decode_sealed
from p2ptrain.compression import wire
from p2ptrain.config.manifest import Manifest, open_manifest
from p2ptrain.observe.credit import Count, count_for
from p2ptrain.observe.events import (
    FILES_KEPT,
    EventLog,
    Heard,
    Noted,
    RolledBack,
    Sealed,
    Started,
    Stopped,
    Tail,
    read_events,
)
from p2ptrain.observe.projection import RoundsOfHome, moment_at
from p2ptrain.observe.rounds import sealed_event
from p2ptrain.peer.observing import Tally, tally_on
from p2ptrain.state import seals
from p2ptrain.state.seals import Opening, SealLog, Walk, answer_after, opening_at, read_opening, steps
from p2ptrain.swarm.identity import format_peer_id, verify
from p2ptrain.training.replica import Replica

RECORDED = Path(__file__).parents[2] / "recorded"


@functools.cache
def recorded() -> tuple[Manifest, bytes, int, list[SealedRound], list[chain.ChainState]]:
    """Manifest, run id, chunks, sealed rounds, and the state before each and after the last."""
    manifest, run_id = open_manifest((RECORDED / "manifest.signed").read_bytes())
    chunks = Replica(manifest, run_id, torch.device("cpu")).layout.chunks
    rounds = [decode_sealed(path.read_bytes(), verify) for path in sorted((RECORDED / "journal").glob("round-*"))]
    states = [manifest.beginning(run_id)]
    for sealed in rounds:
        states.append(chain.extend(states[-1], sealed.id, sealed.seal, chunks))
    return manifest, run_id, chunks, rounds, states


def kept(folder: Path, upto: int = 90) -> SealLog:
    """A log of the first rounds, with all that befalls one: files that end, a restart after a crash, and a fork."""
    _, run_id, chunks, rounds, states = recorded()
    log = SealLog(folder)
    log.begin(states[0], chunks)
    for number, sealed in enumerate(rounds[:upto], 1):
        log.append(sealed.signed)
        if number == 20:
            # The chain goes back by two rounds, and through them again.
            log.append(rounds[18].signed)
            log.append(rounds[19].signed)
        if log.full:
            log.begin(states[number], chunks)
        if number == 40:
            newest = log.segments()[-1]
            newest.write_bytes(newest.read_bytes() + b"\x99\0\0\0cut short")
            log = SealLog(folder)
            assert log.resume(run_id, chunks)[-1] == states[number].id
    return log


def test_what_is_kept_is_the_chain_through_restarts_and_forks(tmp_path: Path) -> None:
    *_, rounds, states = recorded()
    log = kept(tmp_path)
    assert len(log.segments()) > 1
    found = list(steps(log.since(1), verify))
    assert [step.id for step in found] == [sealed.id for sealed in rounds]
    assert [step.before for step in found] == states[:-1]


def test_credit_is_what_the_replies_say_that_each_member_had_a_part_in(tmp_path: Path) -> None:
    manifest, *_, rounds, states = recorded()
    chunks = recorded()[2]
    expected: Counter[str] = Counter()
    present: Counter[str] = Counter()
    reduced: Counter[str] = Counter()
    for before, sealed in zip(states, rounds, strict=False):
        shape = chain.shape_of(before, chunks)
        members = {format_peer_id(m.peer_id): row for m, row in zip(shape.members, sealed.seal.rows, strict=True)}
        names = list(members)
        included: set[int] = set()
        for part, reply in zip(shape.parts, sealed.replies, strict=True):
            if reply is not None:
                included |= wire.reply_members(evidence.body_of(reply), len(names))
                reduced[names[part.reducer]] += 1
        weights = [members[names[n]].weight for n in included if members[names[n]].weight]
        most = manifest.round.weight_cap_ratio * statistics.median(weights) if weights else 0
        for index in included:
            expected[names[index]] += round(manifest.context * min(members[names[index]].weight, most))
            present[names[index]] += 1
    counted = count_for(manifest).add_all(steps(kept(tmp_path).since(1), verify)).as_json()
    assert counted["complete"] and counted["last_round"] == 90
    peers = {peer["peer_id"]: peer for peer in counted["peers"]}
    assert {peer: row["tokens"] for peer, row in peers.items()} == expected
    assert {peer: row["present_rounds"] for peer, row in peers.items()} == present
    assert {peer: row["parts_reduced"] for peer, row in peers.items() if row["parts_reduced"]} == reduced
    assert sum(row["share"] for row in peers.values()) == pytest.approx(1, abs=1e-5)


def test_no_seal_can_be_changed_or_made_up(tmp_path: Path) -> None:
    _, _, chunks, rounds, states = recorded()
    seal = rounds[5].seal
    richer = msgspec.structs.replace(seal, rows=tuple(msgspec.structs.replace(row, weight=10**6) for row in seal.rows))
    forged = SignedSeal(msgspec.msgpack.encode(richer), rounds[5].signed.signature)
    walk = Walk(Opening(chunks, states[5]), verify)
    with pytest.raises(SealError, match="not signed"):
        list(walk.take(forged))
    with pytest.raises(SealError, match="continues nothing"):
        list(walk.take(rounds[7].signed))


def test_seals_after_a_state_are_those_of_the_chain_that_a_snapshot_led_back_to(tmp_path: Path) -> None:
    """Rounds that were undone with it are none of the answer; what continues nothing is no answer."""
    *_, chunks, rounds, states = recorded()
    log = kept(tmp_path, 60)
    log.begin(states[50], chunks)
    for sealed in rounds[50:55]:
        log.append(sealed.signed)
    opening, handed = answer_after(log, 45, states[45].id, 1, 55)
    assert opening == b"" and [seal.body for seal in handed] == [sealed.signed.body for sealed in rounds[45:55]]
    found = opening_at(log, 45, states[45].id, verify)
    assert found is not None and found.state == states[45]
    log.begin(states[80], chunks)
    assert answer_after(log, 45, states[45].id, 1, 80)[0], "with a gap"
    assert opening_at(log, 45, bytes(32), verify) is None


def test_a_reader_gets_all_by_asking_again_and_only_what_is_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest, run_id, chunks, rounds, states = recorded()
    monkeypatch.setattr(seals, "ANSWER_BYTES", 8_000)
    log = kept(tmp_path)
    walk, count, asked = Walk(Opening(chunks, states[0]), verify), count_for(manifest), 0
    while walk.head.round < 90:
        opening, handed = answer_after(log, walk.head.round, walk.head.id, 0, 90)
        assert opening == b"" and handed
        for signed in handed:
            count.add_all(walk.take(signed))
        asked += 1
    assert asked > 3 and walk.head == states[90]
    whole = count_for(manifest).add_all(steps(log.since(1), verify))
    assert count.add_all(walk.rest()) == whole
    assert answer_after(log, 90, states[90].id, 0, 90) == (b"", [])
    # Whoever comes without any gets the newest rounds, and the state that they continue.
    opening, handed = answer_after(log, 0, b"", 10, 90)
    begun = read_opening(opening)
    assert (
        begun.state in states
        and begun.state.round <= 80
        and chain.seal_id(handed[0].body) in {sealed.id for sealed in rounds[begun.state.round :]}
    )
    assert isinstance(whole, Count) and run_id == begun.state.run_id


def test_a_count_that_goes_on_is_at_any_time_that_of_all_seals(tmp_path: Path) -> None:
    manifest, _, chunks, rounds, states = recorded()
    log, tally = SealLog(tmp_path), None
    log.begin(states[0], chunks)
    counted: list[Count] = []
    for number, sealed in enumerate(rounds, 1):
        log.append(sealed.signed)
        if number in (50, 84):
            # The chain goes back by two rounds, and through them again.
            for again in rounds[number - 2 : number]:
                log.append(again.signed)
        if log.full:
            log.begin(states[number], chunks)
        if number % 7 == 0:
            known, at = (b"", 0) if tally is None else (tally.walk.head.id, tally.walk.head.round)
            opening, handed = answer_after(log, at, known, 0, number)
            assert len(handed) <= 9, "what is counted is not handed out again"
            tally = tally_on(tally, manifest, read_opening(opening) if opening else None, handed)
            assert tally.now() == count_for(manifest).add_all(steps(log.since(1), verify))
            counted.append(tally.now())
    assert [count.last for count in counted] == list(range(7, 91, 7)), "and none changes afterwards"
    # Of another chain, or one with a gap, it begins anew.
    late = tally_on(tally, manifest, Opening(chunks, states[10]), [sealed.signed for sealed in rounds[10:20]])
    assert isinstance(tally, Tally) and late is not tally and (late.now().first, late.now().last) == (11, 20)


def told() -> list[Sealed]:
    """The rounds as events, a second apart."""
    _, _, chunks, rounds, states = recorded()
    made = [sealed_event(chain.shape_of(b, chunks), s.id, s.seal) for b, s in zip(states, rounds, strict=False)]
    return [msgspec.structs.replace(event, t=1000.0 + event.round) for event in made]


def test_a_past_moment_is_as_it_was_whatever_came_later(tmp_path: Path) -> None:
    *_, states = recorded()
    rounds, run_id = told(), recorded()[1].hex()
    log = EventLog(tmp_path)
    me, other = (member.peer_id for member in rounds[60].members[:2])
    log.write(
        Started(
            t=1000.0,
            run_id=run_id,
            run="recorded",
            peer_id=me,
            name="ada",
            device="cpu",
            version="1",
            protocol=10,
            round=0,
            state_id=run_id,
        )
    )
    seen = Heard(
        t=1030.5,
        peer_id=other,
        name="bo",
        state="training",
        round=30,
        state_id=rounds[29].state_id,
        tokens_per_second=7.0,
        loss=1.5,
        device="cuda",
        version="1",
        path="direct",
    )
    for event in rounds[:70]:
        log.write(event)
        if event.round == 30:
            log.write(seen)
        if event.round == 50:
            log.write(RolledBack(t=1050.1, round=48, state_id=rounds[47].state_id))
            log.write(rounds[48])
            log.write(rounds[49])
        if event.round == 60:
            log.write(msgspec.structs.replace(seen, t=1060.5, state="lost"))
    with (tmp_path / "events.jsonl").open("ab") as file:
        file.write(b'{"kind": "of a later version", "v": 1}\n{"kind": "sealed", "cut sho')
    past = list(read_events(tmp_path))
    for number, state in ((30, "training"), (59, "training"), (60, "lost"), (70, "lost")):
        moment = moment_at(past, number).moment()
        shown = moment.as_json()
        assert (shown["run"]["name"], moment.rounds[-1].round) == ("recorded", number)
        assert moment.rounds[-1].state_id == states[number].id.hex()
        assert {peer["name"]: peer["state"] for peer in shown["peers"]}["bo"] == state
    assert [event.round for event in moment_at(past).rounds] == list(range(1, 71))
    assert "lost: bo" in moment_at(past).moment().health.text
    assert moment_at(past, 71).own is None


def test_the_rounds_of_a_home_are_read_on_as_they_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("p2ptrain.observe.events.FILE_BYTES", 8000)
    log, rounds = EventLog(tmp_path), told()
    for event in rounds[:20]:
        log.write(event)
    home = RoundsOfHome(tmp_path)
    first = home.read()
    assert first[-1].round == 20 and len(first) > 5, "also of the file before the newest"
    for event in (*rounds[20:40], RolledBack(round=38, state_id=rounds[37].state_id), rounds[38]):
        log.write(event)
    assert home.read() == (*first, *rounds[20:39]) and home.read()[-1].round == 39


def test_a_peer_that_is_paused_has_not_left(tmp_path: Path) -> None:
    rounds, run_id = told(), recorded()[1].hex()
    beginning = Started(
        run_id=run_id, run="", peer_id="me", name="ada", device="cpu", version="1", protocol=1, round=0, state_id=run_id
    )
    paused = Stopped(round=3, why="its owner has paused it", paused=True)
    for stopped, state in ((paused, "paused"), (Stopped(round=3, why="it was told to"), "leaving")):
        (row,) = moment_at([beginning, *rounds[:3], stopped]).moment().peers
        assert (row["state"], row["tokens_per_second"]) == (state, 0.0)


def test_events_are_bounded_and_a_reader_that_follows_misses_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("p2ptrain.observe.events.FILE_BYTES", 1000)
    log, tail, heard = EventLog(tmp_path), Tail(tmp_path), []
    for number in range(400):
        log.write(Noted(what="test", text=f"{number}"))
        if number % 3 == 0:
            heard += [event.text for event in tail.read() if isinstance(event, Noted)]
    heard += [event.text for event in tail.read() if isinstance(event, Noted)]
    assert heard == [str(number) for number in range(400)]
    files = sorted(tmp_path.iterdir())
    assert len(files) <= FILES_KEPT and sum(path.stat().st_size for path in files) < FILES_KEPT * 1100
    kept_ones = [event.text for event in read_events(tmp_path) if isinstance(event, Noted)]
    assert kept_ones == [str(number) for number in range(400 - len(kept_ones), 400)]


def test_a_disk_that_takes_no_events_stops_nobody(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    log = EventLog(tmp_path / "file" / "events")
    for _ in range(3):
        log.write(Noted(what="test", text=""))
    assert len(caplog.records) == 1
