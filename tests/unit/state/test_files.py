"""Files are replaced whole or not at all."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from p2ptrain.state.files import atomic_write, remove_unfinished


@pytest.mark.parametrize("durable", [False, True])
def test_the_new_content_replaces_the_old_with_the_mode_asked_for(tmp_path: Path, durable: bool) -> None:
    path = tmp_path / "file"
    atomic_write(path, b"old", durable=durable)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    atomic_write(path, b"new", mode=0o644, durable=durable)
    assert path.read_bytes() == b"new"
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_that_fails_leaves_the_old_content_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    atomic_write(path, b"old")

    def disk_is_full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", disk_is_full)
    with pytest.raises(OSError, match="No space"):
        atomic_write(path, b"new", durable=True)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_reader_that_opened_the_old_file_keeps_it_whole(tmp_path: Path) -> None:
    path = tmp_path / "file"
    atomic_write(path, b"old")
    with path.open("rb") as reader:
        atomic_write(path, b"new and longer")
        assert reader.read() == b"old"


def test_leftovers_of_killed_writers_are_removed_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / ".tmp-1").write_bytes(b"half")
    (tmp_path / "kept").write_bytes(b"whole")
    remove_unfinished(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
