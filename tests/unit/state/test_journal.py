"""The journal keeps a gapless chain, whatever happened while it was written."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from lone import RUN_ID, Lone, seal

from p2ptrain.chain.sealed import decode_sealed
from p2ptrain.state.journal import Journal
from p2ptrain.swarm.identity import verify


@pytest.fixture(scope="module")
def lone() -> Lone:
    made = Lone()
    made.train(5)
    return made


def filled(folder: Path, lone: Lone) -> Journal:
    journal = Journal(folder, RUN_ID, verify)
    for sealed in lone.rounds:
        journal.append(sealed)
    return journal


def test_what_was_appended_is_read_back_also_by_the_next_process(tmp_path: Path, lone: Lone) -> None:
    filled(tmp_path, lone)
    journal = Journal(tmp_path, RUN_ID, verify)
    assert (journal.first, journal.last) == (1, 6)
    assert [journal.read(number) for number in range(1, 7)] == lone.rounds
    files = journal.files_after(2, 100)
    assert [decode_sealed(file.path.read_bytes(), verify) for file in files] == lone.rounds[2:]
    assert [file.id for file in files] == [sealed.id for sealed in lone.rounds[2:]]
    assert journal.files_after(2, 1) == files[:1] and journal.keeps(files)


def test_a_position_is_that_of_every_id_that_later_rounds_continue(tmp_path: Path, lone: Lone) -> None:
    journal = filled(tmp_path, lone)
    assert [journal.position(state.id) for state in lone.states] == list(range(7))
    assert journal.position(bytes(32)) is None


def test_a_reply_is_only_for_the_fork_that_the_round_is_of(tmp_path: Path, lone: Lone) -> None:
    journal = filled(tmp_path, lone)
    for number in range(3, 7):
        base = lone.states[number - 2].id
        assert journal.reply(number, base, 0) == lone.rounds[number - 1].replies[0] is not None
        assert journal.reply(number, base, 1) is None
        assert journal.reply(number, hashlib.sha256(base).digest(), 0) is None
        assert journal.reply(number, lone.states[number - 1].id, 0) is None
    assert journal.reply(7, lone.states[5].id, 0) is None


def test_a_gap_is_refused(tmp_path: Path, lone: Lone) -> None:
    journal = Journal(tmp_path, RUN_ID, verify)
    journal.append(lone.rounds[0])
    with pytest.raises(ValueError, match="does not follow"):
        journal.append(lone.rounds[2])


def test_another_round_of_the_same_number_replaces_it_and_all_after_it(tmp_path: Path, lone: Lone) -> None:
    journal = filled(tmp_path, lone)
    other = seal(lone.states[3], lone.identity, lone.chunks, (None,))
    journal.append(other)
    assert (journal.last, journal.read(4)) == (4, other)
    assert journal.position(lone.states[5].id) is None


def test_after_pruning_the_parent_of_the_oldest_round_is_still_a_position(tmp_path: Path, lone: Lone) -> None:
    journal = filled(tmp_path, lone)
    journal.prune(4)
    for kept in (journal, Journal(tmp_path, RUN_ID, verify)):
        assert (kept.first, kept.last) == (4, 6)
        assert kept.position(lone.states[3].id) == 3
        assert kept.ids == {number: lone.states[number].id for number in range(3, 7)}
        assert kept.position(lone.states[2].id) is None


def test_the_newest_round_is_never_pruned(tmp_path: Path, lone: Lone) -> None:
    journal = filled(tmp_path, lone)
    journal.prune(100)
    assert (journal.first, journal.last) == (6, 6)


def test_a_journal_may_start_anew_at_a_snapshot(tmp_path: Path, lone: Lone) -> None:
    journal = filled(tmp_path, lone)
    journal.restart_at(lone.states[4].id)
    journal.append(lone.rounds[4])
    assert journal.position(lone.states[4].id) == 4 and (journal.first, journal.last) == (5, 5)


@pytest.mark.parametrize("damage", ["missing", "cut short", "one bit"])
def test_of_a_damaged_journal_the_rounds_before_the_damage_remain(tmp_path: Path, lone: Lone, damage: str) -> None:
    filled(tmp_path, lone)
    path = sorted(tmp_path.glob("round-*"))[3]
    data = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    elif damage == "cut short":
        path.write_bytes(data[:-10])
    else:
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    journal = Journal(tmp_path, RUN_ID, verify)
    assert (journal.first, journal.last) == (1, 3)
    journal.append(lone.rounds[3])
    assert len(list(tmp_path.iterdir())) == 4
