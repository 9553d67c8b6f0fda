"""The real driver over a network that is not there: what it does with a chain that was fetched whole."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from lone import MANIFEST, RUN_ID, Lone, identity_of, seal
from virtual import FakeNode, Network, run

from p2ptrain import chain
from p2ptrain.calls.uplink import UplinkMeter
from p2ptrain.chain import ChainState
from p2ptrain.chain.sealed import SealedRound
from p2ptrain.config.home import Home
from p2ptrain.peer.assembly import Run, driver_parts
from p2ptrain.peer.driver import RoundDriver
from p2ptrain.rounds import events
from p2ptrain.rounds.inbox import Restore
from p2ptrain.state.journal import Journal
from p2ptrain.state.own_log import OwnLog
from p2ptrain.swarm.identity import verify

ZOE = identity_of("zoe")


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


def driver_of(home: Home, lone: Lone) -> tuple[RoundDriver, Journal, Inbox]:
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
        codec=lone.replica.codec, chain=lone.states[-1], snapshot_max_bytes=1, snapshot_chain=lambda data: None
    )
    parts = driver_parts(
        Run(MANIFEST, RUN_ID, b"", founder=False),
        home,
        node,
        at,
        journal=journal,
        own_log=OwnLog(home.own),
        inbox=inbox,
        uplink=UplinkMeter(dialable=True),
    )
    return RoundDriver(parts), journal, inbox


def goes_over(home: Home, lone: Lone, rounds: list[SealedRound], state: ChainState, *, common: bool = True) -> bool:
    """Whether the driver follows these rounds, the first of all to the last, once they are fetched."""

    async def scenario() -> bool:
        driver, journal, inbox = driver_of(home, lone)
        driver._do(driver.machine.start(driver._now()))
        restore = Restore(None, lone.states[0], tuple(rounds), common)

        async def fetched(donor: bytes) -> tuple[Restore, ChainState]:
            return restore, state

        driver.catching_up.change_chain = fetched  # type: ignore[method-assign]
        head = driver.machine.head
        await driver._resync(events.Resync(ZOE.peer_id, "as the test wants it"))
        followed = driver.machine.head == state != head
        assert (restore in inbox) == followed
        assert journal.position((state if followed else head).id) == journal.last
        await driver.stop()
        return followed

    result = run(scenario())
    assert isinstance(result, bool)
    return result


def test_a_member_does_not_change_to_its_own_chain_with_anothers_solo_seal_of_no_more_work(
    home: Home, lone: Lone
) -> None:
    solo = seal(lone.states[-1], ZOE, lone.chunks, (None,), solo=True)
    after = chain.extend(lone.states[-1], solo.id, solo.seal, lone.chunks)
    assert not goes_over(home, lone, [*lone.rounds, solo], after)


def test_it_does_once_there_is_more_work_after_the_solo_seal(home: Home, lone: Lone) -> None:
    solo = seal(lone.states[-1], ZOE, lone.chunks, (None,), solo=True)
    after = chain.extend(lone.states[-1], solo.id, solo.seal, lone.chunks)
    work = seal(after, ZOE, lone.chunks, (lone.reply(lone.replica.optimizer.select()),))
    assert goes_over(home, lone, [*lone.rounds, solo, work], chain.extend(after, work.id, work.seal, lone.chunks))


def test_a_seal_of_its_own_group_is_followed_with_no_more_work_too(home: Home, lone: Lone) -> None:
    skip = seal(lone.states[-1], lone.identity, lone.chunks, (None,))
    after = chain.extend(lone.states[-1], skip.id, skip.seal, lone.chunks)
    assert goes_over(home, lone, [*lone.rounds, skip], after)


@pytest.mark.parametrize("smaller", [True, False])
def test_a_longer_fork_of_as_much_work_is_followed_by_its_id_alone(home: Home, lone: Lone, smaller: bool) -> None:
    """Each side would change to the other's chain, if one went by length and the other by id."""
    ours, payload = lone.states[-1], lone.reply(lone.replica.optimizer.select())
    for name in "abcdefghijklmnop":
        other, state = identity_of(name), lone.states[-2]
        solo = seal(state, other, lone.chunks, (None,), solo=True)
        state = chain.extend(state, solo.id, solo.seal, lone.chunks)
        work = seal(state, other, lone.chunks, (payload,))
        state = chain.extend(state, work.id, work.seal, lone.chunks)
        if (state.id < ours.id) == smaller:
            break
    assert (state.total, state.round, state.id < ours.id) == (ours.total, ours.round + 1, smaller)
    assert goes_over(home, lone, [*lone.rounds[:-1], solo, work], state) == smaller


def test_its_own_chain_is_fetched_anew_for_a_replica_gone_wrong(home: Home, lone: Lone) -> None:
    async def scenario() -> None:
        driver, _, inbox = driver_of(home, lone)
        driver._do(driver.machine.start(driver._now()))
        restore = Restore(None, lone.states[0], tuple(lone.rounds))

        async def fetched(donor: bytes) -> tuple[Restore, ChainState]:
            return restore, lone.states[-1]

        driver.catching_up.change_chain = fetched  # type: ignore[method-assign]
        await driver._resync(events.Resync(ZOE.peer_id, "as the test wants it"))
        assert restore in inbox
        await driver.stop()

    run(scenario())
