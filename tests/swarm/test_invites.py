"""Real processes: a run that takes guests in by invitation, and whose owner shuts peers out, without a new run."""

from __future__ import annotations

import contextlib
import json
import signal
import sys
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from statistics import median

import msgspec
import pytest

sys.path.insert(0, str(Path(__file__).parent))

from peers import Peer, Swarm, eventually, run
from test_mistakes import refused
from test_outsiders import frames_of, requests

from p2ptrain.calls.client import amend, hello
from p2ptrain.calls.messages import (
    KNOWN_ALREADY,
    NOT_LISTED,
    Answer,
    RefusedError,
    SnapshotOffer,
    Welcome,
    decode_message,
)
from p2ptrain.chain import Seal
from p2ptrain.chain.admission import Grant
from p2ptrain.chain.sealed import SealedRound, decode_sealed
from p2ptrain.config.manifest import PROTOCOL_VERSION, open_manifest
from p2ptrain.state.snapshot import SnapshotStore
from p2ptrain.swarm.identity import format_peer_id, parse_peer_id, verify
from p2ptrain.swarm.invitations import invite, read_invitation
from p2ptrain.swarm.node import SwarmNode
from p2ptrain.swarm.records import RUNS_KEY, manifest_key, peers_key
from p2ptrain.swarm.thread import NetworkThread

GRACE_SECONDS = 1.0
"""As the manifest of these runs has it."""


class Invited:
    """A run that Ada owns, and what those who are let in see of it."""

    def __init__(self, swarm: Swarm, mode: str = "invite") -> None:
        self.swarm = swarm
        swarm.write_manifest(root_interval=20)
        swarm.manifest.write_text(swarm.manifest.read_text() + f'\n[access]\nmode = "{mode}"\n')
        self.ada = swarm.bootstrap("ada")
        self.address = self.ada.address()

    def invite(self, *flags: str, by: str = "ada") -> str:
        """A token."""
        done = run("invite", "--home", str(self.swarm.folder / by), *flags)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()[0]

    def join(self, name: str, token: str, address: str = "") -> Peer:
        """Come in with it."""
        return self.swarm.join(name, address or self.address, "--invite", token)

    def revoke(self, subject: str, *flags: str) -> None:
        """As the owner."""
        done = run("revoke", subject, "--home", str(self.swarm.folder / "ada"), *flags)
        assert done.returncode == 0, done.stderr
        assert "the chain has it" in done.stdout

    def id_of(self, name: str) -> bytes:
        """Of a home, which gets one if it has none."""
        home = self.swarm.folder / name
        printed = run("id", "--home", str(home), "--format", "json").stdout
        return parse_peer_id(json.loads(printed)["peer_id"])

    def train(self, *peers: Peer, rounds: int = 5) -> int:
        """Wait for some rounds, after the present one, that include all of these and nobody else; returns the last.

        All have one state id at it.
        """
        after = max(peer.round for peer in peers)

        def there() -> int | None:
            whole = [n for n, seal in seals_of(self.ada).items() if n > after and includes_all(seal, len(peers))]
            return whole[rounds - 1] if len(whole) >= rounds else None

        last: int = eventually(there, 90, f"{rounds} rounds of {[peer.name for peer in peers]}:\n{self.ada.tail()}")
        ids = set()
        for peer in peers:
            peer.reaches(last + 1)
            ids.add(seals_of(peer)[last + 1].parent)
        assert len(ids) == 1
        return last


def sealed_of(peer: Peer) -> list[SealedRound]:
    """What is in a peer's journal, which it prunes meanwhile."""
    found = []
    for path in sorted((peer.home / "journal").glob("round-*")):
        with contextlib.suppress(FileNotFoundError):
            found.append(decode_sealed(path.read_bytes(), verify))
    return found


def seals_of(peer: Peer) -> dict[int, Seal]:
    """The seals in a peer's journal, by round."""
    return {sealed.seal.round: sealed.seal for sealed in sealed_of(peer)}


def includes_all(seal: Seal, count: int) -> bool:
    """Whether a round had so many members and includes each of them."""
    return len(seal.rows) == count == sum(byte.bit_count() for byte in seal.included)


@pytest.fixture
def swarm(tmp_path: Path) -> Iterator[Swarm]:
    made = Swarm(tmp_path)
    yield made
    made.close()


@pytest.fixture
def network() -> Iterator[NetworkThread]:
    made = NetworkThread()
    yield made
    made.stop()


def test_a_stranger_reads_nothing_and_with_an_invitation_two_commands_make_it_a_member(
    swarm: Swarm, network: NetworkThread
) -> None:
    there = Invited(swarm)
    there.ada.reaches(24)
    said = refused(14, "join", there.address, "--home", str(swarm.folder / "eve"), "--host", "127.0.0.1")
    assert "for listed peers only" in said and "--invite" in said
    signed = (there.ada.home / "manifest.signed").read_bytes()
    run_id = open_manifest(signed)[1]
    snapshot = SnapshotStore(there.ada.home / "checkpoints").all()[0]
    offer = SnapshotOffer(snapshot.round, snapshot.id, snapshot.root, snapshot.path.stat().st_size)
    asked = requests(run_id, sealed_of(there.ada)[-1], offer)

    async def stranger() -> None:
        node = await SwarmNode.create(None, [there.address], host="127.0.0.1")
        try:
            ada = there.id_of("ada")
            await node.connect(ada)
            for name, request in asked.items():
                found = await frames_of(node, ada, name, request)
                if name == "rpc_hello":
                    assert decode_message(found[0], Welcome) == Welcome(PROTOCOL_VERSION, run_id, b"", None, NOT_LISTED)
                else:
                    assert [decode_message(data, Answer) for data in found] in ([Answer(NOT_LISTED)], []), name
            # A grant of its own making does not help it.
            made_up = invite(node.identity, run_id, expires=2**40).grant(node.peer_id)
            with pytest.raises(RefusedError, match="may not invite"):
                await amend(node, ada, run_id, (made_up,))
            assert (await hello(node, ada)).refusal == NOT_LISTED
            assert await node.get_manifest(run_id) is None
            assert await node.get(manifest_key(run_id)) == {} == await node.get(RUNS_KEY)
            assert await node.read_runs() == {} == await node.read_peers(run_id)
            for value in (await node.get(peers_key(run_id)) or {}).values():
                assert not any(secret in value for secret in (b"/ip4/", b"training", b'"ada"'))
        finally:
            await node.close()

    network.run(stranger(), 90)
    bob = there.join("bob", there.invite())
    bob.started()
    there.train(there.ada, bob)
    assert "Traceback" not in there.ada.log.read_text()
    # It comes back without the invitation, and without an address.
    bob.process.send_signal(signal.SIGINT)
    bob.ended(40)
    bob = swarm.join("bob")
    bob.started()
    there.train(there.ada, bob)


@pytest.mark.long
def test_a_revoked_peer_is_out_within_two_rounds_and_the_others_do_not_pause(swarm: Swarm) -> None:
    there = Invited(swarm)
    token = there.invite("--uses", "2")
    bob, cyd = there.join("bob", token), there.join("cyd", token)
    last = there.train(there.ada, bob, cyd, rounds=8)
    began = time.monotonic()
    there.revoke(format_peer_id(there.id_of("cyd")))
    print(f"revoked and sealed after {time.monotonic() - began:.1f} s")
    assert cyd.process.wait(30) == 15, cyd.tail()
    assert '"message": "the owner of the run' in cyd.log.read_text() and "Traceback" not in cyd.log.read_text()
    there.train(there.ada, bob)
    sealed = seals_of(there.ada)
    (at,) = [number for number, seal in sealed.items() if seal.amendments and number > last]
    assert all(len(sealed[number].rows) == 3 for number in (at, at + 1))
    assert all(len(seal.rows) == 2 for number, seal in sealed.items() if number > at + 1)
    # Its work is in the last round that it was a member of, and nobody had to wait for it.
    assert includes_all(sealed[at + 1], 3)
    when = {int(p.name.split("-")[1]): p.stat().st_mtime for p in (there.ada.home / "journal").glob("round-*")}
    lengths = {b: when[b] - when[a] for a, b in pairwise(sorted(when)) if b == a + 1}
    usual = median(length for number, length in lengths.items() if number <= at)
    print(f"rounds take {usual:.2f} s; those after the revocation", [f"{lengths[at + n]:.2f}" for n in range(1, 5)])
    # `grace_seconds` is what a silent member would cost.
    assert max(lengths[at + n] for n in range(1, 5)) < usual + GRACE_SECONDS
    # It stays out, with the invitation too; whoever else has that comes in no more, as it is used up.
    home = ("--host", "127.0.0.1", "--home")
    assert "has revoked" in refused(15, "join", there.address, *home, str(cyd.home))
    assert "has revoked" in refused(15, "join", there.address, "--invite", token, *home, str(cyd.home))
    said = refused(14, "join", there.address, "--invite", token, *home, str(swarm.folder / "dan"))
    assert "used up" in said
    # A peer that was away when it was revoked learns of it from the others.
    bob.process.send_signal(signal.SIGINT)
    bob.ended(40)
    there.revoke(format_peer_id(there.id_of("bob")))
    assert swarm.join("bob").process.wait(60) == 15


@pytest.mark.long
def test_a_guest_that_may_invites_others_and_goes_with_its_guests(swarm: Swarm, network: NetworkThread) -> None:
    there = Invited(swarm)
    bob = there.join("bob", there.invite("--may-invite"))
    there.train(there.ada, bob)
    # What Bob signs counts at Ada's; Cyd knows nobody but Bob.
    token = there.invite("--uses", "2", by="bob")
    cyd = there.join("cyd", token, bob.address())
    there.train(there.ada, bob, cyd)
    # Cyd may not invite, Bob not for others to invite.
    for home, flags in (("cyd", ()), ("bob", ("--may-invite",))):
        assert "may not invite" in refused(14, "invite", "--home", str(swarm.folder / home), *flags)
    # Cyd's grant is of no use to Eve, who shows it as it is, or in her own name.
    copied = msgspec.msgpack.decode((cyd.home / "grant").read_bytes(), type=Grant)
    run_id = copied.issued.run_id

    async def eve() -> None:
        node = await SwarmNode.create(None, [there.address], host="127.0.0.1")
        try:
            ada = there.id_of("ada")
            await node.connect(ada)
            for grant in (copied, msgspec.structs.replace(copied, guest=node.peer_id)):
                with pytest.raises(RefusedError, match=f"{KNOWN_ALREADY}|not signed"):
                    await amend(node, ada, run_id, (grant,))
                assert (await hello(node, ada)).refusal == NOT_LISTED
        finally:
            await node.close()

    network.run(eve(), 60)
    # The owner ends Bob's invitations, and Bob with those who came by him.
    there.revoke(format_peer_id(there.id_of("bob")), "--with-guests")
    assert [peer.process.wait(60) for peer in (bob, cyd)] == [15, 15]
    there.train(there.ada)
    flags = ("--home", str(swarm.folder / "eve"), "--host", "127.0.0.1")
    said = refused(14, "join", there.address, "--invite", token, *flags)
    assert "revoked" in said or "may not invite" in said


@pytest.mark.long
def test_an_invitation_that_is_no_good_is_refused_with_the_reason(swarm: Swarm) -> None:
    there = Invited(swarm)
    token = there.invite()
    other = run("invite", str(swarm.manifest), "--home", str(swarm.folder / "zoe")).stdout.split()[0]
    for flags, says in (
        (("--for", format_peer_id(there.id_of("ada"))), "for another peer"),
        (("--expires", "1s"), "expired"),
    ):
        bad = there.invite(*flags)
        if "--expires" in flags:
            until = read_invitation(bad).issued.expires
            eventually(lambda until=until: time.time() > until + 0.1, 5, "the invitation has expired")
        said = refused(14, "join", there.address, "--invite", bad, "--home", str(swarm.folder / "eve"))
        assert says in said
    flags = ("--home", str(swarm.folder / "eve"), "--host", "127.0.0.1")
    assert "another run" in refused(14, "join", there.address, "--invite", other, *flags)
    assert "not all of it" in refused(2, "join", there.address, "--invite", token[:-4], *flags)


@pytest.mark.long
def test_in_a_run_with_a_list_the_owner_adds_a_peer_by_its_id(swarm: Swarm) -> None:
    there = Invited(swarm, mode="list")
    assert "one peer only" in refused(2, "invite", "--home", str(there.ada.home))
    bob = there.join("bob", there.invite("--for", format_peer_id(there.id_of("bob"))))
    there.train(there.ada, bob)


@pytest.mark.long
def test_in_an_open_run_the_owner_bans_a_peer_by_its_id(swarm: Swarm) -> None:
    there = Invited(swarm, mode="open")
    assert "open to everyone" in refused(2, "invite", "--home", str(there.ada.home))
    bob = swarm.join("bob", there.address)
    there.train(there.ada, bob)
    there.revoke(format_peer_id(there.id_of("bob")))
    assert bob.process.wait(60) == 15
    there.train(there.ada)
    assert "has revoked" in refused(15, "join", there.address, "--home", str(bob.home), "--host", "127.0.0.1")
