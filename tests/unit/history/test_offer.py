"""Rounds are handed out as one chain, though a worker reads them while the chain changes."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "rounds"))

from lone import RUN_ID, Lone, identity_of, seal
from virtual import FakeNode, Network, name_of

from p2ptrain import chain
from p2ptrain.calls.client import Client
from p2ptrain.calls.messages import CallError, RoundsHeader, SealsHeader, SnapshotOffer, Tip, Traffic
from p2ptrain.chain import Join, Row, SealError, SignedSeal
from p2ptrain.chain.admission import Access, Grant
from p2ptrain.chain.forks import Mark, Past
from p2ptrain.chain.sealed import SealedRoundError, decode_sealed, encode_sealed
from p2ptrain.history import catching_up
from p2ptrain.history.catching_up import CatchingUp
from p2ptrain.history.download import Download
from p2ptrain.simulation.forged import Branch
from p2ptrain.state.journal import Journal
from p2ptrain.state.pieces import Partials
from p2ptrain.state.seals import Opening, SealLog, Walk
from p2ptrain.state.snapshot import SnapshotStore, piece_hashes, root_of
from p2ptrain.swarm.identity import Identity, verify
from p2ptrain.swarm.invitations import invite

DATA = b"a snapshot" * 100


@pytest.fixture(scope="module")
def lone() -> Lone:
    made = Lone()
    made.train(4)
    return made


def offering(
    folder: Path, lone: Lone, access: Access = Access(), claimed: Access = Access()
) -> tuple[CatchingUp, Journal, SnapshotStore]:
    """`access`: what the manifest says; `claimed`: what a snapshot's state does."""
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
        chain.genesis(RUN_ID, access=access),
        4,
        1_000_000,
        lambda data: msgspec.structs.replace(lone.states[4], access=claimed),
        lambda what, done, of: None,
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


def _grant(owner: Identity, guest: bytes) -> Grant:
    return invite(owner, RUN_ID, expires=1).grant(guest)


OWNER, OTHER = identity_of("owner"), identity_of("other")
CLOSED = Access("invite", OWNER.peer_id, (OTHER.peer_id,))


@pytest.mark.parametrize(
    ("claimed", "why"),
    [
        (Access(), "without a word"),
        (CLOSED, "never for"),
        (Access("invite", OTHER.peer_id, CLOSED.listed), "without a word"),
        (Access("list", *(CLOSED.owner, CLOSED.listed)), "without a word"),
        (Access("invite", CLOSED.owner, (OTHER.peer_id, Lone().identity.peer_id)), "without a word"),
    ],
    ids=["of an open run", "without its member's grant", "of another owner", "of another mode", "of another list"],
)
def test_a_snapshot_with_a_member_that_nobody_has_let_in_is_no_beginning_of_a_chain(
    tmp_path: Path, lone: Lone, claimed: Access, why: str
) -> None:
    with pytest.raises(CallError, match=why):
        goes_over_to(claimed, tmp_path, lone)


@pytest.mark.parametrize("bad", ["inviter", "guest", "signature", "proof", "twice"])
def test_a_snapshot_with_a_guest_whose_grant_is_bad_is_no_beginning_of_a_chain(
    tmp_path: Path, lone: Lone, bad: str
) -> None:
    me = lone.identity.peer_id
    good = _grant(OWNER, me)
    grants = {
        "inviter": (_grant(lone.identity, me),),
        "guest": (msgspec.structs.replace(_grant(OWNER, OTHER.peer_id), guest=me),),
        "signature": (msgspec.structs.replace(good, signature=bytes(64)),),
        "proof": (msgspec.structs.replace(good, proof=_grant(OWNER, me).proof),),
        "twice": (good, _grant(OWNER, me)),
    }
    for amendments, comes in ((grants[bad], False), ((good,), True)):
        claimed = Access(CLOSED.mode, CLOSED.owner, CLOSED.listed, amendments)
        folder = tmp_path / str(comes)
        folder.mkdir()
        # What is looked for after that is a root in a later seal, which no donor has here.
        with pytest.raises(CallError, match="not sealed" if comes else "without a word"):
            goes_over_to(claimed, folder, lone)


def goes_over_to(claimed: Access, folder: Path, lone: Lone) -> None:
    """Have a peer of a closed run change to the chain of a donor, from a snapshot whose state says `claimed`."""
    made, _, snapshots = offering(folder, lone, CLOSED, claimed)
    saved = snapshots.save(8, bytes(32), DATA)
    tip = Tip.of(lone.states[4])
    offer = SnapshotOffer(saved.round, saved.id, saved.root, len(DATA))

    async def rounds(donor: bytes, locator: tuple[bytes, ...], limit: int) -> tuple[RoundsHeader, list[bytes]]:
        return RoundsHeader(saved.id if saved.id in locator else b"", 0, tip, (offer,)), []

    client: Any = SimpleNamespace(rounds=rounds, run_id=RUN_ID)
    made._client = client
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


@pytest.mark.parametrize("fault", ["", "a gap", "another parting", "a signature", "no end", "no answer"])
def test_the_seals_of_a_fork_older_than_the_donors_journal_are_asked_for_and_checked(
    tmp_path: Path, lone: Lone, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They begin where both chains parted, by what this peer itself kept; what is wrong with them leaves the rest."""
    made, _, _ = offering(tmp_path, lone)
    log = SealLog(tmp_path / "seals")
    log.begin(lone.states[0], lone.chunks)
    for sealed in lone.rounds:
        log.append(sealed.signed)
    made._seals = log
    other, states = [], [lone.states[2]]
    for _ in range(4):
        skips = (None,) * len(chain.shape_of(states[-1], lone.chunks).parts)
        other.append(seal(states[-1], lone.identity, lone.chunks, skips))
        states.append(chain.extend(states[-1], other[-1].id, other[-1].seal, lone.chunks))
    tip = Tip.of(states[-1])
    pieces = {states[n].id: [s.signed for s in other[n : n + 2]] for n in (0, 2)}
    if fault == "a gap":
        del pieces[states[2].id]
    elif fault == "another parting":
        pieces[states[0].id] = [lone.rounds[1].signed]
    elif fault == "a signature":
        pieces[states[0].id] = [msgspec.structs.replace(other[0].signed, signature=bytes(64))]
    elif fault == "no end":
        pieces[states[0].id] = [other[0].signed, lone.rounds[2].signed] * 2
        pieces[lone.states[3].id] = [other[0].signed, lone.rounds[2].signed]

    elif fault == "no answer":
        monkeypatch.setattr(catching_up, "SHOWN_SECONDS", 0.05)

    async def rounds(*_: object) -> tuple[RoundsHeader, list[bytes]]:
        return RoundsHeader(b"", 0, tip, (), states[0].id), []

    async def seals(_: bytes, round: int, known: bytes, newest: int) -> tuple[SealsHeader, list[SignedSeal]]:
        if fault == "no answer":
            await asyncio.Event().wait()
        return SealsHeader(b"" if known in pieces else b"elsewhere", lone.chunks, tip), pieces.get(known, [])

    made._client = SimpleNamespace(rounds=rounds, seals=seals, run_id=RUN_ID)  # type: ignore[assignment]
    past = Past([Mark.of(state) for state in lone.states])
    fetched = asyncio.run(made.fetch(b"donor", (lone.states[-1].id, states[0].id), lone.states[-1].round, {}.get, past))
    assert fetched.ancestor is None and fetched.parted_at == states[0].id
    assert [mark.id for mark in fetched.shown] == ([] if fault else [state.id for state in states])
    assert fault or [mark.sealer for mark in fetched.shown[1:]] == [lone.identity.peer_id] * 4


def test_what_seals_show_takes_bounded_memory_however_often_their_members_change(
    lone: Lone, monkeypatch: pytest.MonkeyPatch
) -> None:
    branch = Branch(lone.states[4], lone.replica.codec)
    for number in range(3):
        branch.forge(lone.identity, joins=() if number else (Join(OTHER.peer_id, Row(4, 1000, 0)),))
    shown = branch.seals_after(lone.states[4].id)
    assert shown is not None

    def follow() -> list[Mark]:
        marks = [Mark.of(lone.states[4])]
        catching_up._follow(Walk(Opening(lone.chunks, lone.states[4]), verify), marks, shown)
        return marks

    marks = follow()
    distinct = {id(names): len(names) for mark in marks[1:] for names in (mark.members, mark.newcomers)}
    distinct.pop(id(marks[0].members), None)
    monkeypatch.setattr(catching_up, "SHOWN_MEMBERS_MAX", sum(distinct.values()))
    assert [mark.id for mark in follow()] == [mark.id for mark in marks]
    monkeypatch.setattr(catching_up, "SHOWN_MEMBERS_MAX", sum(distinct.values()) - 1)
    with pytest.raises(SealError, match="change too often"):
        follow()
