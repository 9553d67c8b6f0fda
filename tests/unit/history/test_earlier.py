"""The seals before a snapshot: 90 rounds of real peers, from donors that have them, have not, or lie."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "observe"))

from test_seals_and_events import kept, recorded

from p2ptrain.calls.messages import CallError, SealsHeader, Tip
from p2ptrain.chain import ChainState, SignedSeal
from p2ptrain.chain.forks import Mark
from p2ptrain.history import earlier
from p2ptrain.history.earlier import NOTHING, Earlier, seals_before
from p2ptrain.history.remembered import past_of
from p2ptrain.peer.sealing import SealKeeper
from p2ptrain.rounds.inbox import Restore
from p2ptrain.state import seals as kept_seals
from p2ptrain.state.journal import Journal
from p2ptrain.state.seals import Opening, SealLog, answer_after, opening_at, steps
from p2ptrain.state.snapshot import SnapshotStore
from p2ptrain.swarm.identity import verify


class Donor:
    """Hands out what a log holds; `touched` may lie about it."""

    def __init__(self, log: SealLog) -> None:
        self.log, self.asked = log, 0

    async def seals(
        self, _: bytes, round: int, known: bytes, newest: int
    ) -> tuple[SealsHeader, tuple[SignedSeal, ...]]:
        self.asked += 1
        chunks, states = recorded()[2], recorded()[4]
        opening, handed = await asyncio.to_thread(answer_after, self.log, round, known, newest, 90)
        return SealsHeader(opening, chunks, Tip.of(states[-1])), self.touched(tuple(handed))

    def touched(self, handed: tuple[SignedSeal, ...]) -> tuple[SignedSeal, ...]:
        return handed


def fetched(donor: Donor, start: int, end: ChainState) -> Earlier:
    chunks, states = recorded()[2], recorded()[4]
    client: Any = donor
    return asyncio.run(seals_before(client, b"donor", Opening(chunks, states[start]), end))


@pytest.mark.parametrize("start", [0, 3, 64])
@pytest.mark.parametrize("end", [65, 80])
def test_who_starts_from_a_snapshot_can_hand_out_the_seals_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start: int, end: int
) -> None:
    """What it fetched goes into its own log, which then answers as its donor's does; that chain went back, too."""
    _, run_id, chunks, rounds, states = recorded()
    monkeypatch.setattr(kept_seals, "ANSWER_BYTES", 8_000)
    donor = Donor(kept(tmp_path / "donor"))
    found = fetched(donor, start, states[end])
    assert (donor.asked > 1) == (start < 64) and donor.asked <= earlier.ANSWERS_MAX
    assert [mark.id for mark in found.marks] == [state.id for state in states[max(start, 1) : end + 1]]
    assert [mark.sealer for mark in found.marks[1:]] == [r.seal.sealer for r in rounds[max(start, 1) : end]]

    log = kept(tmp_path / "learner", start) if start else SealLog(tmp_path / "learner")
    keeper = SealKeeper(log, chunks)
    keeper.hear(Restore(b"", states[end], tuple(rounds[end:85]), False, found.entries))
    assert [step.id for step in steps(log.since(1), verify)] == [sealed.id for sealed in rounds[:85]]
    begins = opening_at(log, 40, states[40].id, verify) if start <= 40 else opening_at(log, 70, states[70].id, verify)
    assert begins is not None
    monkeypatch.setattr(kept_seals, "ANSWER_BYTES", 10**6)
    opening, handed = answer_after(log, start, states[start].id, 1, 85)
    assert opening == b"" and [s.body for s in handed] == [sealed.signed.body for sealed in rounds[start:85]]

    # After a restart it remembers as far back, though its journal begins at the snapshot.
    for name in ("journal", "checkpoints"):
        (tmp_path / name).mkdir()
    journal = Journal(tmp_path / "journal", run_id, verify)
    journal.restart_at(states[end].id)
    for sealed in rounds[end:85]:
        journal.append(sealed)
    snapshots = SnapshotStore(tmp_path / "checkpoints")
    past = past_of(states[85], states[0], journal, snapshots, lambda data: states[end], chunks, log)
    assert [mark.id for mark in past] == [state.id for state in states[1:86]]
    assert past_of(states[85], states[0], journal, snapshots, lambda data: states[end], chunks) == [Mark.of(states[85])]
    assert past_of(states[86], states[0], journal, snapshots, lambda data: states[end], chunks, log) == [
        Mark.of(states[86])
    ]


class Liar(Donor):
    def __init__(self, log: SealLog, lie: str) -> None:
        super().__init__(log)
        self.lie = lie

    def touched(self, handed: tuple[SignedSeal, ...]) -> tuple[SignedSeal, ...]:
        match self.lie:
            case "a signature":
                return (msgspec.structs.replace(handed[0], signature=bytes(64)), *handed[1:])
            case "a gap":
                return handed[1:]
            case "none":
                return ()
            case "the same again":
                return handed[:1]
        return handed


@pytest.mark.parametrize("lie", ["a signature", "a gap", "none", "the same again", "no answer", "not from there on"])
def test_a_donor_without_all_of_them_is_believed_nothing_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lie: str
) -> None:
    chunks, states = recorded()[2], recorded()[4]
    log = kept(tmp_path)
    if lie == "not from there on":
        log = SealLog(tmp_path / "later")
        log.begin(states[5], chunks)
        for sealed in recorded()[3][5:]:
            log.append(sealed.signed)
    donor = Liar(log, lie)
    if lie == "no answer":
        monkeypatch.setattr(earlier, "ALL_SECONDS", 0.05)

        async def silent(*_: object) -> object:
            return await asyncio.Event().wait()

        monkeypatch.setattr(donor, "seals", silent)
    assert fetched(donor, 0, states[80]) == NOTHING
    assert donor.asked <= earlier.ANSWERS_MAX


def test_of_a_run_with_more_seals_than_are_taken_over_no_more_than_one_answer_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept_seals, "ANSWER_BYTES", 1_000)
    donor = Donor(kept(tmp_path))
    assert fetched(donor, 0, recorded()[4][80]) == NOTHING
    assert donor.asked == 1


def test_a_snapshot_whose_state_is_not_what_its_seals_lead_to_is_refused(tmp_path: Path) -> None:
    """Its members are what forks will be judged by."""
    end = recorded()[4][80]
    made_up = msgspec.structs.replace(end, following=end.following[:-1])
    with pytest.raises(CallError, match="not what its seals lead to"):
        fetched(Donor(kept(tmp_path)), 0, made_up)


def test_a_donor_that_keeps_no_seals_leads_on_from_its_snapshot_alone() -> None:
    async def refuses(*_: object) -> object:
        raise CallError("this peer keeps no seals")

    client: Any = SimpleNamespace(seals=refuses)
    chunks, states = recorded()[2], recorded()[4]
    assert asyncio.run(seals_before(client, b"donor", Opening(chunks, states[0]), states[80])) == NOTHING
