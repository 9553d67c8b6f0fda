"""A learner gets the swarm's state whatever its donors do, and hands out what it has while it waits for the rest."""

from __future__ import annotations

import asyncio
import random
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from google.protobuf.wrappers_pb2 import BytesValue

sys.path.insert(0, str(Path(__file__).parents[1]))

from lone import RUN_ID, Lone, seal
from virtual import FAST_KBIT, Network, Peer, VirtualLoop, name_of, run

from p2ptrain import chain
from p2ptrain.calls.client import Client
from p2ptrain.calls.handout import SHARE, STREAM_SECONDS, STREAMS_MAX, STREAMS_PER_PEER
from p2ptrain.calls.messages import TOO_MANY_CALLS, CallError, RefusedError, SnapshotOffer, Tip
from p2ptrain.chain.sealed import SealedRound
from p2ptrain.history.catching_up import CatchingUp
from p2ptrain.history.download import STALL_SECONDS, Download
from p2ptrain.rounds.inbox import Restore
from p2ptrain.state.journal import Journal
from p2ptrain.state.snapshot import PIECE_BYTES, piece_hashes, root_of

PIECES = 12
DATA = random.Random(0).randbytes((PIECES - 1) * PIECE_BYTES + 1000)
OTHER_DATA = random.Random(1).randbytes(len(DATA))
ROOT = root_of(len(DATA), piece_hashes(DATA))
OVERHEAD = 1.02
FOUR_MBIT = 4000


@pytest.fixture(scope="module")
def lone() -> Lone:
    """Rounds 1 to 4, and three more, the second of which seals the root of `DATA` at round 4."""
    made = Lone()
    made.train(4)
    sealed = seal(made.states[-1], made.identity, made.chunks, (made.reply(made.replica.optimizer.select()),))
    with_root = msgspec.structs.replace(sealed.seal, root=ROOT)
    signed = chain.encode_seal(with_root, made.identity.sign)
    made.seal(SealedRound(chain.seal_id(signed.body), with_root, signed, sealed.replies))
    made.train(1)
    return made


class World:
    """Donors, which have the snapshot and the rounds since, and learners, which have nothing."""

    def __init__(self, folder: Path, lone: Lone) -> None:
        self.folder, self.lone, self.network = folder, lone, Network()
        state = lone.states[4]
        self.offer = SnapshotOffer(state.round, state.id, ROOT, len(DATA))

    def peer(self, number: int, *, kbit: int = FAST_KBIT) -> Peer:
        made = Peer(
            self.network,
            number,
            self.folder / str(number),
            RUN_ID,
            self.lone.replica.codec,
            snapshot_chain=lambda data: self.lone.states[4],
            kbit=kbit,
        )
        made.tip = Tip(0, RUN_ID, 0)
        return made

    def donor(self, number: int, *, kbit: int = FAST_KBIT, data: bytes = DATA) -> Peer:
        folder, state = self.folder / str(number), self.lone.states[4]
        (folder / "checkpoints").mkdir(parents=True)
        name = f"snapshot-{4:012d}-{state.id.hex()}-{ROOT.hex()}"
        (folder / "checkpoints" / name).write_bytes(data)
        made = self.peer(number, kbit=kbit)
        made.journal.restart_at(state.id)
        for sealed in self.lone.rounds[4:]:
            made.journal.append(sealed)
            made.catching_up.note_root(sealed)
        head = self.lone.states[-1]
        made.tip = Tip(head.round, head.id, head.total)
        return made

    async def fetch(self, learner: Peer, donor: Peer, *others: Peer) -> Restore:
        learner.knows = [other.id for other in others]
        restore, state, _ = await learner.catching_up.change_chain(donor.id)
        assert state == self.lone.states[-1]
        assert restore.snapshot is not None and restore.snapshot == DATA
        assert not list(learner.store.folder.glob("partial-*"))
        return restore


@pytest.fixture
def world(tmp_path: Path, lone: Lone) -> World:
    return World(tmp_path, lone)


def donor_rate(kbit: int) -> float:
    """Bytes a second that a donor with this uplink hands out."""
    return SHARE * kbit * 125


def frames_touched(
    change: Callable[[int], Any],
) -> Callable[[AsyncIterator[BytesValue]], AsyncIterator[BytesValue]]:
    """Every call's frames as they come, after `change` was awaited with the frame's number in all calls together."""
    count = 0

    async def touched(frames: AsyncIterator[BytesValue]) -> AsyncIterator[BytesValue]:
        nonlocal count
        async for frame in frames:
            await change(count)
            count += 1
            yield frame

    return touched


def test_worker_threads_touch_nothing_of_the_network_threads(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    trespasses: set[tuple[str, str]] = set()

    def belongs(kind: type) -> None:
        def look_up(self: Any, name: str) -> Any:
            if VirtualLoop.working and not name.startswith("__"):
                trespasses.add((kind.__name__, name))
            return object.__getattribute__(self, name)

        monkeypatch.setattr(kind, "__getattribute__", look_up, raising=False)

    donor, learner, behind = world.donor(1), world.peer(2), world.peer(3)
    for sealed in world.lone.rounds[:4]:
        behind.journal.append(sealed)
    state = world.lone.states[4]
    for kind in (CatchingUp, Download, Client, Journal):
        belongs(kind)

    async def scenario() -> None:
        await world.fetch(learner, donor)
        fetched = await behind.catching_up.fetch(donor.id, (state.id,), state.round, {state.id: state}.get)
        assert list(fetched.rounds) == world.lone.rounds[4:]
        assert (await donor.catching_up.offer_rounds((state.id,)))[0] == state.id

    run(scenario())
    assert trespasses == set()


def test_the_state_is_that_of_the_donors_with_the_rounds_since(world: World) -> None:
    learner, donor = world.peer(0), world.donor(1)
    restore = run(world.fetch(learner, donor))
    assert [sealed.id for sealed in restore.rounds] == [sealed.id for sealed in world.lone.rounds[4:]]
    assert learner.progress[-2][1:] == (len(DATA), len(DATA))
    assert learner.traffic.received < OVERHEAD * len(DATA) + 100_000


def test_several_donors_are_fetched_from_at_once(world: World) -> None:
    async def scenario() -> tuple[float, list[int]]:
        donors = [world.donor(n, kbit=FOUR_MBIT) for n in (1, 2, 3, 4)]
        await world.fetch(world.peer(0), *donors)
        return asyncio.get_running_loop().time(), [donor.traffic.sent for donor in donors]

    seconds, sent = run(scenario())
    alone = len(DATA) / donor_rate(FOUR_MBIT)
    assert seconds < alone / 2.5
    assert min(sent) > 2 * PIECE_BYTES


def test_a_donor_that_dies_inside_a_piece_costs_that_piece(world: World) -> None:
    first, second = world.donor(1, kbit=FOUR_MBIT), world.donor(2, kbit=FOUR_MBIT)

    async def dies_later(count: int) -> None:
        if count > 30:
            world.network.servicers.pop(second.id, None)
            raise OSError("its daemon is gone")

    world.network.touch[second.id] = frames_touched(dies_later)
    learner = world.peer(0)
    run(world.fetch(learner, first, second))
    assert second.traffic.sent > PIECE_BYTES
    assert learner.traffic.received < OVERHEAD * (len(DATA) + PIECE_BYTES) + 100_000


@pytest.mark.parametrize("liar_first", [True, False], ids=["about the hashes", "about a piece"])
def test_a_donor_that_lies_is_dropped_for_good(world: World, liar_first: bool) -> None:
    liar, honest = world.donor(1, data=OTHER_DATA), world.donor(2)

    async def slow(count: int) -> None:
        if liar_first:
            await asyncio.sleep(0.05)

    world.network.touch[honest.id] = frames_touched(slow)
    learner = world.peer(0)
    run(world.fetch(learner, honest, liar))
    # At most the hashes and one piece are had of it.
    assert liar.traffic.sent < OVERHEAD * PIECE_BYTES + 100_000


def test_a_liar_alone_does_not_get_anything_onto_the_disk(world: World) -> None:
    learner, liar = world.peer(0), world.donor(1, data=OTHER_DATA)
    with pytest.raises(CallError, match="nobody hands out"):
        run(world.fetch(learner, liar))
    assert learner.store.all() == []


def test_a_donor_that_crawls_holds_nothing_up(world: World) -> None:
    crawling, honest = world.donor(1), world.donor(2)

    async def crawl(count: int) -> None:
        if count > 5:  # what it holds and what it should be it says at once
            await asyncio.sleep(5.0)

    world.network.touch[crawling.id] = frames_touched(crawl)
    learner = world.peer(0)

    async def scenario() -> float:
        await world.fetch(learner, honest, crawling)
        return asyncio.get_running_loop().time()

    # A piece of the crawling donor's would take 50 s.
    assert run(scenario()) < 8.0


def test_what_a_killed_learner_had_is_not_fetched_again(world: World) -> None:
    donor = world.donor(1, kbit=FOUR_MBIT)
    killed = world.peer(0)

    async def until_half() -> None:
        fetching = asyncio.create_task(world.fetch(killed, donor))
        while not killed.progress or killed.progress[-1][1] < len(DATA) / 2:
            await asyncio.sleep(0.1)
        fetching.cancel()

    run(until_half())
    (partial,) = (p for p in killed.store.folder.glob("partial-*") if p.suffix != ".hashes")
    on_disk = [n for n in range(PIECES) if piece_at(partial, n) == DATA[n * PIECE_BYTES : (n + 1) * PIECE_BYTES]]
    assert len(on_disk) >= PIECES // 2
    # A crash may leave anything: one of the pieces is damaged.
    damaged = bytearray(partial.read_bytes())
    damaged[on_disk[0] * PIECE_BYTES] ^= 1
    partial.write_bytes(damaged)
    (partial.parent / f"partial-{8:012d}-of-another").write_bytes(b"left by another download")
    again = world.peer(0)
    run(world.fetch(again, donor))
    assert again.traffic.received < OVERHEAD * (PIECES - len(on_disk) + 1) * PIECE_BYTES + 100_000
    assert len(list(again.store.folder.iterdir())) == 1


def piece_at(path: Path, number: int) -> bytes:
    return path.read_bytes()[number * PIECE_BYTES : (number + 1) * PIECE_BYTES]


def test_a_learner_hands_out_the_pieces_it_has_while_it_waits_for_the_rest(world: World) -> None:
    donor, first, second = world.donor(1, kbit=FOUR_MBIT), world.peer(2), world.peer(3)
    released = asyncio.Event()

    async def silent_after_most(count: int) -> None:
        if count > 11 * PIECES * 0.85:
            await released.wait()

    world.network.touch[donor.id] = frames_touched(silent_after_most)
    heard: list[int] = []

    async def scenario() -> None:
        fetching = asyncio.create_task(world.fetch(first, donor))
        while not first.progress or first.progress[-1][1] < len(DATA) * 0.7:
            await asyncio.sleep(0.1)
        download = Download(
            second.client, world.offer, second.partials, lambda: [first.id], lambda done, of: heard.append(done)
        )
        joining = asyncio.create_task(download.run(donor.id))
        while len(heard) < len([entry for entry in first.progress if entry[0] == "snapshot"]):
            await asyncio.sleep(0.1)
        assert await first.catching_up.open_snapshot(world.offer.id, ROOT) is not None and not fetching.done()
        with pytest.raises(RefusedError, match="not all"):
            await second.client.snapshot(first.id, world.offer, 0, PIECES)
        released.set()
        await fetching
        assert (await joining).path.read_bytes() == DATA

    run(scenario())


def test_a_flash_crowd_serves_itself(world: World) -> None:
    donor = world.donor(1, kbit=FOUR_MBIT)
    crowd = [world.peer(n, kbit=FOUR_MBIT) for n in range(10, 16)]

    async def scenario() -> float:
        await asyncio.gather(*(world.fetch(learner, donor, *crowd) for learner in crowd))
        return asyncio.get_running_loop().time()

    seconds = run(scenario())
    alone = len(DATA) / donor_rate(FOUR_MBIT)
    assert seconds < 2.5 * alone, "less than half of what the donor would need for all of them"
    assert donor.traffic.sent < 3 * len(DATA)
    assert sum(learner.traffic.sent for learner in crowd) > 3 * len(DATA)


def test_a_snapshot_whose_root_no_later_seal_has_does_not_count(world: World, lone: Lone) -> None:
    learner, donor = world.peer(0), world.donor(1)
    before = lone.states[4]
    reply = lone.reply(lone.replica.optimizer.select(), before)
    other = seal(before, lone.identity, lone.chunks, (reply,))

    async def scenario() -> None:
        async def chain_changes(count: int) -> None:
            if count == 60:
                donor.journal.append(other)

        world.network.touch[donor.id] = frames_touched(chain_changes)
        await learner.catching_up.change_chain(donor.id)

    with pytest.raises(CallError, match="not sealed"):
        run(scenario())
    assert learner.store.all() == []


def test_a_download_that_comes_no_further_ends(world: World) -> None:
    learner, donor = world.peer(0), world.donor(1)

    async def hangs(count: int) -> None:
        if count > 60:
            await asyncio.sleep(7.0)

    world.network.touch[donor.id] = frames_touched(hangs)

    async def scenario() -> float:
        with pytest.raises(CallError):
            await world.fetch(learner, donor)
        return asyncio.get_running_loop().time()

    assert run(scenario()) < 2 * STALL_SECONDS


# ---- the donor's side ---------------------------------------------------------------------------------------------


def test_a_donor_has_few_streams_at_once_and_says_so(world: World) -> None:
    donor = world.donor(1, kbit=FOUR_MBIT)
    learners = [world.peer(n) for n in range(10, 10 + STREAMS_MAX + 1)]

    async def scenario() -> list[Any]:
        calls = [learner.client.snapshot(donor.id, world.offer, 0, 1) for learner in learners]
        more = [learners[0].client.snapshot(donor.id, world.offer, 0, 1) for _ in range(STREAMS_PER_PEER)]
        asking = learners[-1].client.snapshot(donor.id, world.offer)
        return await asyncio.gather(*calls[:1], *more, *calls[1:], asking, return_exceptions=True)

    *calls, asking = run(scenario())
    refused = [isinstance(answer, RefusedError) and str(answer) == TOO_MANY_CALLS for answer in calls]
    assert refused == [False] * STREAMS_PER_PEER + [True] + [False] * (STREAMS_MAX - STREAMS_PER_PEER) + [True] * 2
    assert asking.held == b"", "what it holds it says to anyone"


def test_who_does_not_read_does_not_keep_a_stream(world: World) -> None:
    donor = world.donor(1)
    handout = donor.handout

    async def scenario() -> None:
        with handout.stream(b"a") as one, handout.stream(b"a") as two, handout.stream(b"a") as three:
            assert one is not None and two is not None and three is None and one()
            await asyncio.sleep(STREAM_SECONDS)
            assert not one() and not two()
            with handout.stream(b"a") as again:
                assert again is not None

    run(scenario())


def test_what_is_handed_out_leaves_a_tenth_of_the_uplink_and_waits_for_what_a_round_needs(world: World) -> None:
    donor, learner = world.donor(1, kbit=FOUR_MBIT), world.peer(0)

    async def scenario() -> tuple[float, float]:
        loop = asyncio.get_running_loop()
        began = loop.time()
        await learner.client.snapshot(donor.id, world.offer, 0, 4, timeout_seconds=60.0)
        quiet = loop.time() - began
        began = loop.time()
        with donor.handout.urgent():
            await learner.client.snapshot(donor.id, world.offer, 0, 4, timeout_seconds=60.0)
        return quiet, loop.time() - began

    quiet, urgent = run(scenario())
    assert quiet == pytest.approx(4 * PIECE_BYTES / donor_rate(FOUR_MBIT), rel=0.15)
    assert urgent > 2 * quiet


@pytest.mark.parametrize(("first", "end"), [(0, 17), (PIECES, PIECES + 1), (0, 2**20)])
def test_more_than_there_is_or_a_call_may_ask_is_refused(world: World, first: int, end: int) -> None:
    donor, learner = world.donor(1), world.peer(0)
    with pytest.raises(RefusedError, match="not all"):
        run(learner.client.snapshot(donor.id, world.offer, first, end))


def test_a_snapshot_of_another_root_is_not_the_one_asked_for(world: World) -> None:
    donor, learner = world.donor(1), world.peer(0)
    other = msgspec.structs.replace(world.offer, root=bytes(32))
    with pytest.raises(RefusedError, match="no such snapshot"):
        run(learner.client.snapshot(donor.id, other))


def test_nobody_there_is_a_failed_call(world: World) -> None:
    with pytest.raises(CallError, match="nobody there"):
        run(world.peer(0).client.snapshot(name_of(9), world.offer))
