"""The real driver over a network that is not there: what it does with a chain that was fetched whole."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from lone import MANIFEST, ROW, RUN_ID, Lone, identity_of, seal
from virtual import FakeNode, Network, run

from p2ptrain import chain
from p2ptrain.calls.messages import RoundsHeader, Tip
from p2ptrain.calls.uplink import UplinkMeter
from p2ptrain.chain import ChainState
from p2ptrain.chain.forks import Mark
from p2ptrain.chain.sealed import SealedRound, SealedRoundError, encode_sealed
from p2ptrain.config.home import Home
from p2ptrain.config.manifest import AccessConfig, Manifest
from p2ptrain.peer.assembly import Run, driver_parts
from p2ptrain.peer.driver import RoundDriver
from p2ptrain.rounds import events
from p2ptrain.rounds.inbox import Restore
from p2ptrain.state.journal import Journal
from p2ptrain.state.own_log import OwnEntry, OwnLog
from p2ptrain.swarm.identity import format_peer_id, verify

BOB, ZOE = identity_of("bob"), identity_of("zoe")


class Inbox(list[Any]):
    put = list.append


@pytest.fixture(scope="module")
def lone() -> Lone:
    made = Lone()
    made.train(4)
    return made


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Home]:
    for folder in ("journal", "own", "checkpoints"):
        (tmp_path / folder).mkdir()
    yield Home(tmp_path)


def driver_of(home: Home, lone: Lone, manifest: Manifest = MANIFEST) -> tuple[RoundDriver, Journal, Inbox]:
    """One that stands where `lone` does, whose only member it is."""

    async def nothing(*arguments: object) -> None:
        pass

    journal, inbox = Journal(home.journal, RUN_ID, verify), Inbox()
    for sealed in lone.rounds:
        journal.append(sealed)
    identity = lone.identity
    node: Any = FakeNode(Network(), identity.peer_id)
    node.identity, node.add_servicer = identity, nothing
    at: Any = SimpleNamespace(
        codec=lone.replica.codec,
        chain=msgspec.structs.replace(lone.states[-1], access=manifest.beginning(RUN_ID).access),
        snapshot_max_bytes=1,
        snapshot_chain=lambda data: None,
    )
    parts = driver_parts(
        Run(manifest, RUN_ID, b"", founder=False),
        home,
        node,
        at,
        journal=journal,
        own_log=OwnLog(home.own),
        inbox=inbox,
        uplink=UplinkMeter(dialable=True),
    )
    return RoundDriver(parts), journal, inbox


def marks_of(lone: Lone, rounds: list[SealedRound]) -> tuple[Mark, ...]:
    """Of the chain of these rounds from the beginning on."""
    state = lone.states[0]
    marks = [Mark.of(state)]
    for sealed in rounds:
        state = chain.extend(state, sealed.id, sealed.seal, lone.chunks)
        marks.append(Mark.of(state, sealed.seal, marks[-1]))
    return tuple(marks)


def goes_over(home: Home, lone: Lone, rounds: list[SealedRound], state: ChainState, *, common: bool = True) -> bool:
    """Whether the driver follows these rounds, the first of all to the last, once they are fetched."""

    async def scenario() -> bool:
        driver, journal, inbox = driver_of(home, lone)
        driver._do(driver.machine.start(driver._now()))
        restore = Restore(None, lone.states[0], tuple(rounds), common)

        async def fetched(donor: bytes, parted_at: Mark | None) -> tuple[Restore, ChainState, tuple[Mark, ...]]:
            return restore, state, marks_of(lone, rounds)

        driver.catching_up.change_chain = fetched  # type: ignore[method-assign]
        head = driver.machine.head
        await driver._resync(events.Resync(ZOE.peer_id, "as the test wants it"))
        followed = driver.machine.head == state != head
        assert (restore in inbox) == followed
        driver.publish_standing()
        refused = driver.standing.refused
        if followed:
            assert refused is None
        else:
            assert refused is not None and refused.donor == format_peer_id(ZOE.peer_id)[-8:]
            assert (refused.round, refused.total, refused.age_seconds) == (state.round, state.total, 0)
            assert refused.why
        assert journal.position((state if followed else head).id) == journal.last
        await driver.stop()
        return followed

    result = run(scenario())
    assert isinstance(result, bool)
    return result


@pytest.mark.parametrize("work", [0, 1, 5])
def test_a_member_does_not_change_to_its_own_chain_with_a_strangers_seals(home: Home, lone: Lone, work: int) -> None:
    solo = seal(lone.states[-1], ZOE, lone.chunks, (None,), solo=True)
    state, rounds = chain.extend(lone.states[-1], solo.id, solo.seal, lone.chunks), [*lone.rounds, solo]
    for _ in range(work):
        reply = lone.reply(lone.replica.optimizer.select(), state, ZOE)
        rounds.append(seal(state, ZOE, lone.chunks, (reply,)))
        state = chain.extend(state, rounds[-1].id, rounds[-1].seal, lone.chunks)
    assert not goes_over(home, lone, rounds, state)


def test_a_member_does_not_leave_its_own_seals_for_a_strangers(home: Home, lone: Lone) -> None:
    state, rounds = lone.states[-2], lone.rounds[:-1]
    for number in range(9):
        replies = (lone.reply(lone.replica.optimizer.select(), state, ZOE),) if number else (None,)
        rounds = [*rounds, seal(state, ZOE, lone.chunks, replies, solo=not number)]
        state = chain.extend(state, rounds[-1].id, rounds[-1].seal, lone.chunks)
    assert state.total > lone.states[-1].total
    assert not goes_over(home, lone, rounds, state)


def test_a_seal_of_its_own_group_is_followed_with_no_more_work_too(home: Home, lone: Lone) -> None:
    skip = seal(lone.states[-1], lone.identity, lone.chunks, (None,))
    after = chain.extend(lone.states[-1], skip.id, skip.seal, lone.chunks)
    assert goes_over(home, lone, [*lone.rounds, skip], after)


def test_a_peer_whose_disk_fails_amid_a_change_of_chains_stops(home: Home, lone: Lone) -> None:
    """What its journal says by then is not what its machine believes."""

    async def scenario() -> None:
        driver, journal, inbox = driver_of(home, lone)
        driver._do(driver.machine.start(driver._now()))
        restore = Restore(None, lone.states[0], tuple(lone.rounds))

        async def fetched(donor: bytes, parted_at: Mark | None) -> tuple[Restore, ChainState, tuple[Mark, ...]]:
            return restore, lone.states[-1], marks_of(lone, lone.rounds)

        def full(sealed: SealedRound) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        driver.catching_up.change_chain = fetched  # type: ignore[method-assign]
        journal.append = full  # type: ignore[method-assign]
        await driver._resync(events.Resync(ZOE.peer_id, "as the test wants it"))
        assert driver.failure is not None and driver.failure.errno == errno.ENOSPC
        assert restore not in inbox and driver.leaving
        await driver.stop()

    run(scenario())


def test_its_own_chain_is_fetched_anew_for_a_replica_gone_wrong(home: Home, lone: Lone) -> None:
    async def scenario() -> None:
        driver, _, inbox = driver_of(home, lone)
        driver._do(driver.machine.start(driver._now()))
        restore = Restore(None, lone.states[0], tuple(lone.rounds))

        async def fetched(donor: bytes, parted_at: Mark | None) -> tuple[Restore, ChainState, tuple[Mark, ...]]:
            return restore, lone.states[-1], marks_of(lone, lone.rounds)

        driver.catching_up.change_chain = fetched  # type: ignore[method-assign]
        await driver._resync(events.Resync(ZOE.peer_id, "as the test wants it"))
        assert restore in inbox
        await driver.stop()

    run(scenario())


def test_a_driver_follows_nobody_off_the_list_and_takes_no_seal_that_names_one(home: Home, lone: Lone) -> None:
    access = AccessConfig(mode="list", peers=(format_peer_id(lone.identity.peer_id), format_peer_id(BOB.peer_id)))
    solo = seal(lone.states[-1], ZOE, lone.chunks, (None,), solo=True)
    encoded = [encode_sealed(solo)]

    async def scenario() -> None:
        driver, _, _ = driver_of(home, lone, msgspec.structs.replace(MANIFEST, access=access))
        assert driver.feed.would_follow(BOB.peer_id) and not driver.feed.would_follow(ZOE.peer_id)
        # One who is on the list passes on the seal of one who is not.
        driver.feed.take_relayed(BOB.peer_id, Tip(solo.seal.round, solo.id, solo.seal.total), solo.signed)
        assert driver.machine.head.id == lone.states[-1].id
        assert not driver.machine.fetching.waiting
        header = RoundsHeader(lone.states[-1].id, 1, Tip.of(lone.states[-1]), ())

        async def rounds(*arguments: object) -> tuple[RoundsHeader, list[bytes]]:
            return header, encoded

        driver.catching_up._client = SimpleNamespace(rounds=rounds)  # type: ignore[assignment]
        with pytest.raises(SealedRoundError, match="that the run is not for"):
            await driver.catching_up.fetch(BOB.peer_id, (header.ancestor,), 4, driver.machine.known_state)
        await driver.feed.close()

    run(scenario())


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Home]:
    """A home on a disk of 256 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("may not mount a small disk")
    try:
        for name in ("journal", "own", "checkpoints"):
            (folder / name).mkdir()
        yield Home(folder)
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_pauses_a_peer_and_it_goes_on_when_there_is_room(
    small_disk: Home, caplog: pytest.LogCaptureFixture
) -> None:
    ada = Lone()
    ada.train(1)
    key, shape = ada.key, chain.shape_of(ada.states[-1], ada.chunks)
    ranges = tuple((part.start, part.end) for part in shape.parts)
    optimizer = ada.replica.optimizer
    payloads = optimizer.payloads(optimizer.select(), ranges)
    entry = OwnEntry(key.round, key.base, ROW, ranges, payloads, optimizer.decays, 4)

    def said() -> list[str]:
        return [record.message for record in caplog.records if "disk" in record.message]

    async def scenario() -> None:
        driver, _, inbox = driver_of(small_disk, ada)
        filler, told = small_disk.path / "filler", list[object]()
        driver._p = dataclasses.replace(driver._p, told=told.append)
        driver._do(driver.machine.start(driver._now()))
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
            while file.write(bytes(1024)):
                pass
        heard = len(inbox)
        driver.contribute(events.ContributionReady(key, ROW, payloads), entry)
        told.clear()
        await asyncio.sleep(5)
        assert driver.standing.paused and not driver.leaving and driver.failure is None
        assert driver._p.own_log.find(key) is None and len(inbox) == heard
        # What comes of a peer's own work is said once: it is heard later; what others say is not.
        driver.dispatch(events.FetchFailed(ZOE.peer_id))
        driver.dispatch(events.PeerLeft(ZOE.peer_id))
        assert not told
        assert len(said()) == 1 and "pauses until there is room" in said()[0]
        filler.unlink()
        await asyncio.sleep(2)
        assert not driver.standing.paused
        found = driver._p.own_log.find(key)
        assert found is not None and found.payloads == payloads
        assert events.FetchFailed(ZOE.peer_id) in told and events.PeerLeft(ZOE.peer_id) not in told
        assert len(said()) == 2 and "going on" in said()[1]
        await driver.stop()

    with caplog.at_level("INFO"):
        run(scenario())
