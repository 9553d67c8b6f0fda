"""Files of a run: one root for the same bytes however they come, and no file that is not the one that was named."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2ptrain.state import run_files
from p2ptrain.state.pieces import Partials, kept_hashes
from p2ptrain.state.run_files import RunFile, make, named, read_parts, take, whole
from p2ptrain.state.snapshot import PIECE_BYTES

DATA = bytes(range(256)) * (PIECE_BYTES // 128) + b"the end"


def root_by_hand(data: bytes) -> bytes:
    """As docs/protocol.md says it."""
    hashes = b"".join(hashlib.sha256(data[i : i + 524288]).digest() for i in range(0, len(data), 524288))
    return hashlib.sha256(b"p2ptrain root 1\0" + len(data).to_bytes(8, "little") + hashes).digest()


@settings(max_examples=20, deadline=None)
@given(
    st.lists(st.sampled_from([0, 1, 4096, PIECE_BYTES - 1, PIECE_BYTES, PIECE_BYTES + 1, 2 * PIECE_BYTES]), max_size=4),
    st.binary(min_size=1, max_size=8),
)
def test_the_root_is_that_of_the_bytes_however_they_are_parted(lengths: list[int], pattern: bytes) -> None:
    parts = [(pattern * (length // len(pattern) + 1))[:length] for length in lengths]
    data = b"".join(parts)
    assert named(parts) == named([memoryview(data)]) == RunFile(len(data), root_by_hand(data))


def test_a_file_that_was_made_is_the_one_that_is_named_and_so_is_one_that_is_read(tmp_path: Path) -> None:
    heard: list[tuple[int, int]] = []
    made, file = make(tmp_path / "file", [DATA[:1000], DATA[1000:]])
    assert (tmp_path / "file").read_bytes() == DATA
    assert made == RunFile(len(DATA), root_by_hand(DATA))
    assert b"".join(read_parts(tmp_path / "file", lambda done, of: heard.append((done, of)))) == DATA
    assert heard == [(min(len(DATA), n * PIECE_BYTES), len(DATA)) for n in range(1, file.pieces + 1)]
    assert b"".join(map(file.read, range(file.pieces))) == DATA and not file.has(file.pieces)
    assert file.hashes() == [hashlib.sha256(file.read(n)).digest() for n in range(file.pieces)]


def test_a_whole_file_is_not_read_again_until_it_was_written_to(tmp_path: Path) -> None:
    path, heard = tmp_path / "file", list[int]()
    made, file = make(path, [DATA])

    def looked(done: int, of: int) -> None:
        heard.append(done)

    again = whole(path, made, looked)
    assert again is not None and again.hashes() == file.hashes() and not heard
    path.with_name("file.hashes").unlink()
    assert whole(path, made, looked) is not None and heard[-1] == len(DATA)
    heard.clear()
    assert whole(path, made, looked) is not None and not heard
    path.write_bytes(DATA[:-1] + b"?")
    later = path.stat().st_mtime_ns + 10**9
    os.utime(path, ns=(later, later))
    assert whole(path, made, looked) is None and heard


@pytest.mark.parametrize(
    "wanted",
    [RunFile(len(DATA) + 1, root_by_hand(DATA)), RunFile(len(DATA), bytes(32)), RunFile(0, root_by_hand(DATA))],
    ids=["longer", "another root", "empty"],
)
def test_a_file_of_another_length_or_root_is_another(tmp_path: Path, wanted: RunFile) -> None:
    make(tmp_path / "file", [DATA])
    assert whole(tmp_path / "file", wanted) is None
    assert whole(tmp_path / "not there", wanted) is None
    assert kept_hashes(tmp_path / "file", wanted.length, wanted.root) is None


def test_hashes_beside_a_file_that_are_not_its_own_count_for_nothing(tmp_path: Path) -> None:
    path = tmp_path / "file"
    made, _ = make(path, [DATA])
    for spoiled in (b"", bytes(32), bytes(33), path.with_name("file.hashes").read_bytes() + bytes(32)):
        path.with_name("file.hashes").write_bytes(spoiled)
        assert kept_hashes(path, made.length, made.root) is None
        found = whole(path, made)
        assert found is not None and found.hashes() == [hashlib.sha256(found.read(n)).digest() for n in range(3)]


def test_what_cannot_be_written_leaves_what_was_there(tmp_path: Path) -> None:
    made, _ = make(tmp_path / "file", [DATA])

    def breaks() -> object:
        yield b"a part"
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space"):
        run_files.make(tmp_path / "file", breaks())  # type: ignore[arg-type]
    assert whole(tmp_path / "file", made) is not None
    assert {path.name for path in tmp_path.iterdir()} == {"file", "file.hashes"}


def test_a_fetched_file_moves_to_its_place_and_is_whole_there(tmp_path: Path) -> None:
    partials, wanted = Partials(tmp_path), named([DATA])
    hashes = [hashlib.sha256(DATA[i : i + PIECE_BYTES]).digest() for i in range(0, len(DATA), PIECE_BYTES)]
    partial = partials.begin(partials.path_of_file(wanted.root), wanted.length, hashes)
    for number in reversed(range(partial.pieces)):
        partial.write(number, DATA[number * PIECE_BYTES : (number + 1) * PIECE_BYTES])
    taken = take(partial, tmp_path / "file")
    heard: list[int] = []
    there = whole(tmp_path / "file", wanted, lambda done, of: heard.append(done))
    assert there is not None and taken.read(1) == there.read(1) == DATA[PIECE_BYTES : 2 * PIECE_BYTES] and not heard
