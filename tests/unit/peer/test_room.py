"""What goes first in a home that holds more than its owner allows, and what stays whatever happens."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from p2ptrain.config.home import Home
from p2ptrain.peer.room import HomeFullError, Room, held_bytes
from p2ptrain.state import files

MB = 1_000_000
NEEDED, OTHER = "a" * 64, "b" * 64


@pytest.fixture
def home(tmp_path: Path) -> Home:
    """One with ten files of 1 MB, of which five may go."""
    made = Home(tmp_path / "home")
    for folder in (made.checkpoints, made.seals, made.events, made.data, made.journal):
        folder.mkdir(parents=True)
    for round in (30, 20, 10):
        _fill(made.checkpoints / f"snapshot-{round:012d}-{OTHER}-{OTHER}")
    (made.checkpoints / "checkpoint.json").write_text(json.dumps({"round": 15}))
    for path in (made.seals / "seals-000000000001", made.seals / "seals-000000000065"):
        _fill(path)
    for path in (made.events / "events-00000001.jsonl", made.events / "events.jsonl"):
        _fill(path)
    for path in (made.tokens(NEEDED), made.tokens(OTHER), made.own_tokens):
        _fill(path)
    return made


def _fill(path: Path) -> None:
    path.write_bytes(os.urandom(MB))


def test_a_home_is_as_large_as_du_says_and_holes_take_nothing(home: Home) -> None:
    with (home.data / "partial").open("wb") as file:
        file.truncate(100 * MB)
    files = [line.split() for line in _du(home.path) if Path(line.split()[1]).is_file()]
    assert held_bytes(home.path) == sum(int(size) for size, _ in files)


def _du(path: Path) -> list[str]:
    # Of files alone: what a folder's own entries take is no more than some kB.
    done = subprocess.run(["du", "--all", "--block-size=1", str(path)], check=True, capture_output=True, text=True)
    return done.stdout.splitlines()


@pytest.mark.parametrize("spare", range(6))
def test_what_is_missed_least_goes_first_and_no_more_than_has_to(home: Home, spare: int) -> None:
    pruned: list[int] = []
    room = Room(home, held_bytes(home.path) + 2 * MB - spare * MB, 2 * MB, frozenset({NEEDED}))
    room.look()
    assert bool(room.missing_bytes) == bool(spare)
    room.make(pruned.append)
    order = [
        home.checkpoints / f"snapshot-{10:012d}-{OTHER}-{OTHER}",
        home.seals / "seals-000000000001",
        home.events / "events-00000001.jsonl",
        home.tokens(OTHER),
    ]
    assert [path.exists() for path in order] == [False] * min(spare, 4) + [True] * (4 - min(spare, 4))
    assert room.removed == [path.name for path in order[:spare]]
    # The checkpoint is older than the snapshot that stays, and a restart needs the rounds after it.
    assert pruned == ([16] if spare else [])
    assert home.tokens(NEEDED).exists() and home.own_tokens.exists() and (home.events / "events.jsonl").exists()
    if spare <= 4:
        room.check()
    else:
        with pytest.raises(HomeFullError, match=r"--max-disk allows") as full:
            room.check()
        assert files.is_full(full.value), "it pauses a peer as a full disk does"
    before = room.held_bytes
    room.look()
    assert room.held_bytes == before
