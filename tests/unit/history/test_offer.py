"""Rounds are handed out as one chain, though a worker reads them while the chain changes."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "rounds"))

from lone import RUN_ID, Lone, seal
from virtual import FakeNode, Network, name_of

from p2ptrain import chain
from p2ptrain.calls.client import Client
from p2ptrain.calls.messages import CallError, RoundsHeader, SnapshotOffer, Tip, Traffic
from p2ptrain.chain.sealed import SealedRoundError, decode_sealed, encode_sealed
from p2ptrain.history import catching_up
from p2ptrain.history.catching_up import CatchingUp
from p2ptrain.history.download import Download
from p2ptrain.state.journal import Journal
from p2ptrain.state.pieces import Partials
from p2ptrain.state.snapshot import SnapshotStore, piece_hashes, root_of
from p2ptrain.swarm.identity import verify

DATA = b"a snapshot" * 100


@pytest.fixture(scope="module")
def lone() -> Lone:
    made = Lone()
    made.train(4)
    return made


def offering(
    folder: Path, lone: Lone, admits: chain.Admits = chain.anyone
) -> tuple[CatchingUp, Journal, SnapshotStore]:
    (folder / "journal").mkdir()
    (folder / "checkpoints").mkdir()
    journal, snapshots = Journal(folder / "journal", RUN_ID, verify), SnapshotStore(folder / "checkpoints")
    for sealed in lone.rounds:
        journal.append(sealed)
    made = CatchingUp(
        Client(FakeNode(Network(), name_of(1)), Traffic(), RUN_ID),  # type: ignore[arg-type]
        lone.replica.codec,
        journal,
        snapshots,
        Partials(snapshots.folder),
        list,
        chain.genesis(RUN_ID),
        4,
        1_000_000,
        lambda data: lone.states[4],
        lambda what, done, of: None,
        admits,
    )
    return made, journal, snapshots


def test_rounds_after_the_newest_id_known_are_offered(tmp_path: Path, lone: Lone) -> None:
    made, _, _ = offering(tmp_path, lone)
    ancestor, rounds, _ = asyncio.run(made.offer_rounds((bytes(32), lone.states[2].id, RUN_ID)))
    assert ancestor == lone.states[2].id
    assert [decode_sealed(one, verify) for one in rounds] == lone.rounds[2:]


def test_rounds_that_are_rolled_back_while_a_worker_reads_them_are_not_offered(
    tmp_path: Path, lone: Lone, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, journal, _ = offering(tmp_path, lone)
    skip = seal(lone.states[3], lone.identity, lone.chunks, (None,))
    # The same number of rounds on another branch: no file is missing.
    after = chain.extend(lone.states[3], skip.id, skip.seal, lone.chunks)
    others = [skip, seal(after, lone.identity, lone.chunks, (None,))]
    read = catching_up._read_offer

    async def scenario() -> None:
        loop, changed = asyncio.get_running_loop(), asyncio.Event()

        def change() -> None:
            for sealed in others:
                journal.append(sealed)
            changed.set()

        def slow(*arguments: object) -> object:
            found = read(*arguments)  # type: ignore[arg-type]
            asyncio.run_coroutine_threadsafe(changed_on_the_loop(), loop).result(10)
            return found

        async def changed_on_the_loop() -> None:
            change()

        monkeypatch.setattr(catching_up, "_read_offer", slow)
        assert (await made.offer_rounds((RUN_ID,)))[:2] == (b"", [])
        assert changed.is_set()
        monkeypatch.setattr(catching_up, "_read_offer", read)
        ancestor, rounds, _ = await made.offer_rounds((RUN_ID,))
        assert ancestor == RUN_ID
        assert [decode_sealed(one, verify) for one in rounds] == lone.rounds[:3] + others

    asyncio.run(scenario())


def test_a_snapshot_that_the_trainer_removes_meanwhile_is_left_out(
    tmp_path: Path, lone: Lone, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, _, snapshots = offering(tmp_path, lone)
    root = root_of(len(DATA), piece_hashes(DATA))
    saved = snapshots.save(4, lone.states[4].id, DATA)
    made._sealed_roots[4] = root
    _, _, offers = asyncio.run(made.offer_rounds((RUN_ID,)))
    assert [offer.root for offer in offers] == [root]
    everything = snapshots.all

    def gone_after() -> list[object]:
        found = everything()
        saved.path.unlink(missing_ok=True)
        return list(found)

    monkeypatch.setattr(snapshots, "all", gone_after)
    ancestor, rounds, offers = asyncio.run(made.offer_rounds((RUN_ID,)))
    assert (ancestor, len(rounds), offers) == (RUN_ID, 5, ())
    assert asyncio.run(made.open_snapshot(saved.id, root)) is None


def test_what_is_being_fetched_is_handed_out_though_it_is_whole_before_the_worker_has_looked(
    tmp_path: Path, lone: Lone, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, _, snapshots = offering(tmp_path, lone)
    hashes = piece_hashes(DATA)
    offer = SnapshotOffer(4, lone.states[4].id, root_of(len(DATA), hashes), len(DATA))
    partials = Partials(snapshots.folder)
    download = Download(made._client, offer, partials, list, lambda done, of: None)
    path = partials.path(offer.round, offer.id, offer.root)
    download.file = partials.begin(path, offer.length, hashes)
    download.file.write(0, DATA)
    made._download = download
    look = catching_up._find_whole

    async def scenario() -> None:
        loop = asyncio.get_running_loop()

        async def end() -> None:
            # As where a download ends: it is in the store first.
            snapshots.take(path, offer.round, offer.id, offer.root)
            made._download = None

        def slow(*arguments: object) -> object:
            found = look(*arguments)  # type: ignore[arg-type]
            asyncio.run_coroutine_threadsafe(end(), loop).result(10)
            return found

        monkeypatch.setattr(catching_up, "_find_whole", slow)
        there = await made.open_snapshot(offer.id, offer.root)
        assert there is not None and there.has(0)
        monkeypatch.setattr(catching_up, "_find_whole", look)
        if made._download is not None:
            await end()
        whole = await made.open_snapshot(offer.id, offer.root)
        assert whole is not None and whole.read(0) == DATA

    asyncio.run(scenario())


def test_a_snapshot_with_a_member_off_the_list_is_no_beginning_of_a_chain(
    tmp_path: Path, lone: Lone, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, _, snapshots = offering(tmp_path, lone, lambda peer: peer != lone.identity.peer_id)
    saved = snapshots.save(8, bytes(32), DATA)
    tip = Tip.of(lone.states[4])
    offer = SnapshotOffer(saved.round, saved.id, saved.root, len(DATA))

    async def rounds(donor: bytes, locator: tuple[bytes, ...], limit: int) -> tuple[RoundsHeader, list[bytes]]:
        return RoundsHeader(saved.id if saved.id in locator else b"", 0, tip, (offer,)), []

    client: Any = SimpleNamespace(rounds=rounds, run_id=RUN_ID)
    made._client = client
    with pytest.raises(CallError, match="not on the run's list"):
        asyncio.run(made.change_chain(name_of(2)))


@pytest.mark.parametrize("back", [0, 1, 2, 3])
def test_replies_are_checked_from_the_last_state_of_ours_that_the_rounds_go_through(
    tmp_path: Path, lone: Lone, back: int
) -> None:
    """A donor that names an older ancestor, and our own rounds after it, hides nothing behind them."""
    made, _, _ = offering(tmp_path, lone)
    harmful = seal(lone.states[-1], lone.identity, lone.chunks, (b"no reply of this part",))
    ours = lone.rounds[len(lone.rounds) - back :]
    ancestor = lone.states[-1 - back].id
    known = {state.id: state for state in lone.states[-2:]}

    async def answer(*_: object) -> tuple[RoundsHeader, list[bytes]]:
        tip = Tip(harmful.seal.round, harmful.id, harmful.seal.total)
        rounds = [encode_sealed(sealed) for sealed in (*ours, harmful)]
        return RoundsHeader(ancestor, len(rounds), tip, ()), rounds

    made._client = SimpleNamespace(rounds=answer, run_id=RUN_ID)  # type: ignore[assignment]
    with pytest.raises(SealedRoundError):
        asyncio.run(made.fetch(b"donor", (ancestor,), 4, known.get))
    # Where none of its states is one that can be gone on from, they are told as unchecked.
    fetched = asyncio.run(made.fetch(b"donor", (ancestor,), 4, lambda identifier: None))
    assert not fetched.checked
