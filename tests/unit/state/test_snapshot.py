"""Snapshots: the newest three, each under a root that any change of a byte changes."""

from __future__ import annotations

import hashlib
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from p2ptrain.state.snapshot import KEPT, PIECE_BYTES, SnapshotStore, piece_hashes, root_of


def test_the_newest_three_are_kept_and_found_by_their_state(tmp_path: Path) -> None:
    store = SnapshotStore(tmp_path)
    ids = [hashlib.sha256(bytes([n])).digest() for n in range(5)]
    for number, identifier in enumerate(ids):
        store.save(number * 64, identifier, bytes([number]) * 100)
    assert [snapshot.round for snapshot in store.all()] == [256, 192, 128]
    assert len(store.all()) == KEPT
    found = store.find(ids[3])
    assert found is not None and found.read() == b"\x03" * 100
    assert found.root == root_of(100, piece_hashes(found.read()))
    assert store.find(ids[0]) is None


def test_snapshots_of_a_branch_that_was_left_go(tmp_path: Path) -> None:
    store = SnapshotStore(tmp_path)
    for number in (64, 128, 192):
        store.save(number, bytes(32), b"")
    store.drop_after(128)
    assert [snapshot.round for snapshot in store.all()] == [128, 64]


def test_other_files_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "checkpoint").write_bytes(b"")
    (tmp_path / "snapshot-of-my-cat").write_bytes(b"")
    assert SnapshotStore(tmp_path).all() == []


@given(st.integers(0, 2 * PIECE_BYTES), st.integers(0, 7))
def test_any_bit_changes_the_root(position: int, bit: int) -> None:
    data = bytearray(2 * PIECE_BYTES + 1)
    before = root_of(len(data), piece_hashes(bytes(data)))
    data[position] ^= 1 << bit
    assert root_of(len(data), piece_hashes(bytes(data))) != before


def test_the_length_is_under_the_root() -> None:
    assert root_of(10, [bytes(32)]) != root_of(11, [bytes(32)])
