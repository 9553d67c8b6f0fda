"""The own log: one thread writes and prunes while another reads."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from p2ptrain.chain import Row
from p2ptrain.chain.sealed import Key
from p2ptrain.state.own_log import OwnEntry, OwnLog

BASE = bytes(range(32))
TURNS = 600


def entry(round: int, decays: int) -> OwnEntry:
    return OwnEntry(round, BASE, Row(4, 1000, 100), ((0, 3),), (decays.to_bytes(4, "big") * 500,), decays, 0)


@pytest.fixture
def taking_turns() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def test_an_entry_is_found_until_its_round_is_pruned(tmp_path: Path) -> None:
    log = OwnLog(tmp_path)
    for round in (3, 1, 2):
        log.write(entry(round, round))
    assert [found.round for found in log.all()] == [1, 2, 3]
    log.prune(3)
    assert log.find(Key(2, BASE)) is None and log.find(Key(3, BASE)) == entry(3, 3)


def test_a_reader_finds_a_whole_entry_or_none_while_another_thread_writes_and_prunes(
    tmp_path: Path, taking_turns: None
) -> None:
    log = OwnLog(tmp_path)

    def write() -> None:
        for turn in range(TURNS):
            log.write(entry(1, turn))
            log.write(entry(1, turn + 1))
            log.prune(2)

    with ThreadPoolExecutor(1) as writer:
        writing = writer.submit(write)
        while not writing.done():
            for found in (log.find(Key(1, BASE)), *log.all()):
                assert found is None or found == entry(1, found.decays)
    writing.result()
