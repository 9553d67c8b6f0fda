"""A newcomer gets a file of the run whatever its donors do, and whatever an earlier process left of it."""

from __future__ import annotations

import asyncio
import random
import shutil
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from google.protobuf.wrappers_pb2 import BytesValue

sys.path.insert(0, str(Path(__file__).parents[1]))

from lone import RUN_ID, Lone
from virtual import FAST_KBIT, Network, Peer, run

from p2ptrain.calls import servicer
from p2ptrain.calls.messages import TOO_MANY_CALLS, RefusedError
from p2ptrain.errors import DataError, HomeError
from p2ptrain.history import download
from p2ptrain.history.download import STALL_SECONDS
from p2ptrain.peer import file_download
from p2ptrain.peer.file_download import ATTEMPTS, fetch_file
from p2ptrain.state.pieces import PieceFile
from p2ptrain.state.run_files import RunFile, make, named
from p2ptrain.state.snapshot import PIECE_BYTES

PIECES = 12
DATA = random.Random(0).randbytes((PIECES - 1) * PIECE_BYTES + 1000)
OTHER_DATA = random.Random(1).randbytes(len(DATA))
FILE = named([DATA])
OVERHEAD = 1.02
FOUR_MBIT = 4000
FRAMES_A_PIECE = 11
"""The answer, what is held, the blob's header and its frames."""
Touch = Callable[[AsyncIterator[BytesValue]], AsyncIterator[BytesValue]]


@pytest.fixture(scope="module")
def lone() -> Lone:
    return Lone()


class World:
    """Donors that have the file, and a newcomer that has nothing."""

    def __init__(self, folder: Path, lone: Lone) -> None:
        self.folder, self.lone, self.network = folder, lone, Network()
        self.path = folder / "0" / "home" / "file"
        self.path.parent.mkdir(parents=True)
        self.progress: list[tuple[str, int, int]] = []

    def peer(self, number: int, *, kbit: int = FAST_KBIT) -> Peer:
        folder = self.folder / str(number)
        return Peer(
            self.network, number, folder, RUN_ID, self.lone.replica.codec, snapshot_chain=lambda data: None, kbit=kbit
        )

    def donor(self, number: int, *, kbit: int = FAST_KBIT, data: bytes = DATA) -> Peer:
        made = self.peer(number, kbit=kbit)
        file = make(self.folder / str(number) / "file", [data])[1]
        made.files[FILE.root] = file
        return made

    async def fetch(
        self, newcomer: Peer, *introducers: Peer, file: RunFile = FILE, wanted: set[int] | None = None
    ) -> PieceFile:
        ids = [peer.id for peer in introducers]
        return await fetch_file(
            newcomer.client, file, self.path, ids, b"", lambda *heard: self.progress.append(heard), "tokens", wanted
        )

    def there(self) -> bool:
        """Whether the file is there, and nothing else but its hashes."""
        names = {path.name for path in self.path.parent.iterdir()}
        return names == {"file", "file.hashes"} and self.path.read_bytes() == DATA


@pytest.fixture
def world(tmp_path: Path, lone: Lone) -> World:
    return World(tmp_path, lone)


def touched(change: Callable[[int], Any]) -> Touch:
    """Every call's frames as they come, after `change` was awaited with the frame's number in all calls together."""
    count = 0

    async def frames(frames: AsyncIterator[BytesValue]) -> AsyncIterator[BytesValue]:
        nonlocal count
        async for frame in frames:
            await change(count)
            count += 1
            yield frame

    return frames


def test_a_file_comes_from_several_donors_at_once_though_only_one_was_named(world: World) -> None:
    donors, newcomer = [world.donor(n, kbit=FOUR_MBIT) for n in (1, 2, 3, 4)], world.peer(0)

    async def scenario() -> float:
        await world.fetch(newcomer, donors[0])
        return asyncio.get_running_loop().time()

    alone = len(DATA) / (FOUR_MBIT * 125 / 2)
    assert run(scenario()) < alone / 2.5
    assert world.there() and world.progress[-1] == ("tokens", len(DATA), len(DATA))
    assert min(donor.traffic.sent for donor in donors) > 2 * PIECE_BYTES
    assert newcomer.traffic.received < OVERHEAD * len(DATA) + 100_000


def test_some_pieces_are_fetched_alone_and_the_rest_later(world: World) -> None:
    donor, newcomer = world.donor(1), world.peer(0)
    for wanted in ({0}, {0, 3, PIECES - 1}):
        before = newcomer.traffic.received
        part = run(world.fetch(newcomer, donor, wanted=wanted))
        assert [number for number in range(PIECES) if part.has(number)] == sorted(wanted)
        assert all(part.read(number) == DATA[number * PIECE_BYTES :][:PIECE_BYTES] for number in wanted)
        assert newcomer.traffic.received - before < OVERHEAD * 2 * PIECE_BYTES
        assert not world.path.exists()
    before = newcomer.traffic.received
    run(world.fetch(newcomer, donor))
    assert world.there()
    assert newcomer.traffic.received - before < OVERHEAD * (len(DATA) - 2 * PIECE_BYTES) + 100_000


def test_a_donor_that_dies_half_way_costs_the_piece_that_it_was_sending(world: World) -> None:
    first, second, newcomer = world.donor(1, kbit=FOUR_MBIT), world.donor(2, kbit=FOUR_MBIT), world.peer(0)

    async def dies(count: int) -> None:
        if count > 30:
            world.network.servicers.pop(second.id, None)
            raise OSError("its daemon is gone")

    world.network.touch[second.id] = touched(dies)
    run(world.fetch(newcomer, first, second))
    assert world.there() and second.traffic.sent > PIECE_BYTES
    assert newcomer.traffic.received < OVERHEAD * (len(DATA) + PIECE_BYTES) + 100_000


@pytest.mark.parametrize("about", ["the hashes", "a piece", "its length"])
def test_a_donor_that_lies_is_dropped_for_good(world: World, about: str) -> None:
    honest, liar, newcomer = world.donor(1), world.donor(2), world.peer(0)
    path = world.folder / "2" / "file"
    match about:
        case "the hashes":
            liar.files[FILE.root] = make(path, [OTHER_DATA])[1]
        case "a piece":
            path.write_bytes(OTHER_DATA)  # its hashes stay
        case _:
            liar.files[FILE.root] = make(path, [DATA[: PIECE_BYTES + 5]])[1]
    if about != "a piece":

        async def slow(count: int) -> None:
            await asyncio.sleep(0.05)

        world.network.touch[honest.id] = touched(slow)
    run(world.fetch(newcomer, liar, honest))
    assert world.there()
    assert liar.traffic.sent < OVERHEAD * PIECE_BYTES + 100_000


@pytest.mark.parametrize(
    "file",
    [RunFile(len(DATA), bytes(32)), RunFile(len(DATA) + PIECE_BYTES, FILE.root), RunFile(len(DATA) - 1, FILE.root)],
    ids=["another root", "longer", "shorter"],
)
def test_what_nobody_has_ends_with_one_error_and_nothing_on_the_disk(world: World, file: RunFile) -> None:
    newcomer, donor = world.peer(0), world.donor(1)
    donor.files[file.root] = donor.files[FILE.root]
    with pytest.raises(DataError, match="hands out the run's tokens") as caught:
        run(world.fetch(newcomer, donor, file=file))
    assert "what has come is kept" in caught.value.hint
    assert list(world.path.parent.iterdir()) == []


def test_donors_that_fall_silent_are_waited_for_and_then_said(world: World) -> None:
    donor, newcomer = world.donor(1), world.peer(0)

    async def hangs(count: int) -> None:
        if count > 3 * FRAMES_A_PIECE:
            await asyncio.sleep(3600.0)

    world.network.touch[donor.id] = touched(hangs)

    async def scenario() -> float:
        with pytest.raises(DataError):
            await world.fetch(newcomer, donor)
        return asyncio.get_running_loop().time()

    assert run(scenario()) < (ATTEMPTS + 2) * (STALL_SECONDS + 10)
    assert len(list(world.path.parent.glob("partial-*"))) == 2, "what has come is kept"


def test_what_a_killed_newcomer_had_is_not_fetched_again(world: World) -> None:
    donor, killed = world.donor(1, kbit=FOUR_MBIT), world.peer(0)

    async def until_half() -> None:
        fetching = asyncio.create_task(world.fetch(killed, donor))
        while not world.progress or world.progress[-1][1] < len(DATA) / 2:
            await asyncio.sleep(0.1)
        fetching.cancel()

    run(until_half())
    (partial,) = (p for p in world.path.parent.glob("partial-*") if p.suffix != ".hashes")
    data = bytearray(partial.read_bytes())
    on_disk = [
        n for n in range(PIECES) if data[n * PIECE_BYTES :][:PIECE_BYTES] == DATA[n * PIECE_BYTES :][:PIECE_BYTES]
    ]
    assert len(on_disk) >= PIECES // 2 and not world.path.exists()
    # A crash may leave anything: one of the pieces is damaged.
    data[on_disk[0] * PIECE_BYTES] ^= 1
    partial.write_bytes(data)
    (partial.parent / "partial-of-another").write_bytes(b"left by another download")
    world.progress.clear()
    again = world.peer(0)
    run(world.fetch(again, donor))
    assert world.there()
    assert again.traffic.received < OVERHEAD * (PIECES - len(on_disk) + 1) * PIECE_BYTES + 100_000
    assert world.progress[PIECES - 1] == ("tokens, what is here already", len(DATA), len(DATA))


@pytest.mark.parametrize("spoiled", [b"", bytes(33), bytes(32 * PIECES)], ids=["none", "of no length", "others"])
def test_what_is_left_without_its_hashes_is_fetched_anew(world: World, spoiled: bytes) -> None:
    partial = world.path.with_name(f"partial-{FILE.root.hex()}")
    partial.write_bytes(OTHER_DATA)
    partial.with_name(partial.name + ".hashes").write_bytes(spoiled)
    run(world.fetch(world.peer(0), world.donor(1)))
    assert world.there()


def test_the_hashes_of_a_long_file_come_in_several_answers_and_a_lie_in_the_last_is_found(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (servicer, download):
        monkeypatch.setattr(module, "HASHES_MAX", 5)
    honest, liar, newcomer = world.donor(1), world.donor(2), world.peer(0)
    theirs = liar.files[FILE.root].hashes()
    liar.files[FILE.root]._hashes = [*theirs[:-1], bytes(32)]

    async def slow(count: int) -> None:
        await asyncio.sleep(0.05)

    world.network.touch[honest.id] = touched(slow)
    run(world.fetch(newcomer, liar, honest))
    assert world.there() and liar.traffic.sent < 5000
    with pytest.raises(RefusedError, match="not all"):
        run(newcomer.client.file(honest.id, FILE, 0, 6, hashes=True))


def test_a_file_for_which_there_is_no_room_is_not_begun(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    donor = world.donor(1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=len(DATA) - 1))
    with pytest.raises(HomeError, match="does not fit"):
        run(world.fetch(world.peer(0), donor))
    assert donor.traffic.sent == 0 and list(world.path.parent.iterdir()) == []


def test_a_disk_that_is_full_half_way_is_said(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: PieceFile, number: int, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(PieceFile, "write", full)
    with pytest.raises(HomeError, match="No space left"):
        run(world.fetch(world.peer(0), world.donor(1)))


# ---- the donor's side ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "end", "hashes"),
    [(0, 17, False), (PIECES, PIECES + 1, False), (0, 2**20, True), (PIECES - 1, PIECES + 1, True)],
)
def test_more_than_there_is_or_a_call_may_ask_is_refused(world: World, first: int, end: int, hashes: bool) -> None:
    donor, newcomer = world.donor(1), world.peer(0)
    with pytest.raises(RefusedError, match="not all"):
        run(newcomer.client.file(donor.id, FILE, first, end, hashes=hashes))


def test_a_donor_says_whether_it_has_a_file_to_anyone_and_hands_it_out_to_a_few(world: World) -> None:
    donor, newcomer = world.donor(1, kbit=FOUR_MBIT), world.peer(0)

    async def scenario() -> None:
        calls = [newcomer.client.file(donor.id, FILE, n, n + 1) for n in range(3)]
        asking = newcomer.client.file(donor.id, FILE)
        one, two, three, asked = await asyncio.gather(*calls, asking, return_exceptions=True)
        assert one.pieces == [DATA[:PIECE_BYTES]] and len(two.pieces) == 1 and asked.held == b""
        assert isinstance(three, RefusedError) and str(three) == TOO_MANY_CALLS
        with pytest.raises(RefusedError, match="no such file"):
            await newcomer.client.file(donor.id, RunFile(1, bytes(32)))

    run(scenario())


def test_a_file_that_is_gone_from_the_donors_disk_is_no_end_of_the_fetch(world: World) -> None:
    honest, bare = world.donor(1), world.donor(2)
    (world.folder / "2" / "file").unlink()
    run(world.fetch(world.peer(0), bare, honest))
    assert world.there()


def test_donors_are_looked_for_again_while_it_is_fetched(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_download, "LOOK_SECONDS", 1.0)
    slow, newcomer = world.donor(1, kbit=FOUR_MBIT // 4), world.peer(0)
    later: list[Peer] = []

    async def scenario() -> None:
        fetching = asyncio.create_task(world.fetch(newcomer, slow))
        while not world.progress:
            await asyncio.sleep(0.1)
        later.append(world.donor(2))
        await fetching

    run(scenario())
    assert world.there() and later[0].traffic.sent > 4 * PIECE_BYTES
