"""Who may take part in a run: what the manifest says, and the signed statements that seals have added to it.

A grant lets one more peer in. It holds a *pass*, which an inviter has signed and which names the public half of a fresh
key, the *token*; and a signature by the token's secret half over the guest's peer id. So anybody can check a grant, it
is of no use to another peer, and the secret, which is what an invited person is given, never travels between peers. A
revocation is signed by the run's owner. It shuts out a peer, or ends a token.

`Access` is the part of a chain's state that says so: the manifest's word, and all statements on the chain in their
order. What holds after them follows from them alone, so a snapshot's state is checked by adding them up anew. Nothing
here knows the time: whether a pass has expired is for the peers to judge that are handed a grant (docs/rounds.md,
rule 3).

Cost: about 350 bytes in the state for a grant and 130 for a revocation, at most `GRANTS_MAX` and `REVOCATIONS_MAX` of
them; two signatures checked for a grant and one for a revocation, once in a process as long as they are remembered.
"""

from __future__ import annotations

import functools
from collections import Counter
from dataclasses import dataclass
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from p2ptrain.chain.signatures import Hash, PeerId, Signature, verify

AMENDMENTS_MAX = 8
"""Statements in one seal."""
GRANTS_MAX = 1024
REVOCATIONS_MAX = 1024
INVITED_MAX = 32
"""Guests of one member who is not the owner: who was let in once cannot fill the run with identities of its own."""
USES_MAX = 1024
_VERIFIED_MAX = 4096

Mode = Literal["open", "invite", "list"]


class AdmissionError(ValueError):
    """A statement that does not count: forged, of another run, used up, or against a revocation."""


class Pass(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What an inviter signs."""

    run_id: Hash
    inviter: PeerId
    """The owner's id, or that of a member that may invite."""
    token: PeerId
    """Id of the token: its public half."""
    expires: Annotated[int, Meta(ge=0, le=2**48)]
    """Unix seconds, by the clock of whoever is handed a grant."""
    uses: Annotated[int, Meta(ge=1, le=USES_MAX)]
    """How many guests it may bring."""
    peer_id: Annotated[bytes, Meta(max_length=64)]
    """The only peer that it is for; empty: whoever has the token."""
    may_invite: bool
    """Whether guests may invite others."""


class Grant(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag=1):
    """Lets a peer in that has a token."""

    issued: Pass
    signature: Signature
    """The inviter's, of the pass."""
    guest: PeerId
    proof: Signature
    """The token's, of the guest's peer id in this run."""


class Revocation(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag=2):
    """Shuts a peer out, or ends a token; the owner's word."""

    run_id: Hash
    subject: PeerId
    """A peer's id, or a token's."""
    with_guests: bool
    """Shut out the guests that it has brought as well."""
    signature: Signature


Statement = Grant | Revocation


def pass_message(issued: Pass) -> bytes:
    """Return what an inviter signs."""
    return b"p2ptrain pass 1\0" + msgspec.msgpack.encode(issued)


def proof_message(run_id: bytes, guest: bytes) -> bytes:
    """Return what a token signs."""
    return b"p2ptrain grant 1\0" + run_id + guest


def revocation_message(run_id: bytes, subject: bytes, with_guests: bool) -> bytes:
    """Return what an owner signs."""
    return b"p2ptrain revocation 1\0" + msgspec.msgpack.encode((run_id, subject, with_guests))


@functools.lru_cache(maxsize=_VERIFIED_MAX)
def is_signed(statement: Statement, owner: bytes) -> bool:
    """Whether all signatures of a statement are those of whom it names; of a revocation, the owner's."""
    if isinstance(statement, Revocation):
        message = revocation_message(statement.run_id, statement.subject, statement.with_guests)
        return verify(owner, message, statement.signature)
    issued = statement.issued
    return verify(issued.inviter, pass_message(issued), statement.signature) and verify(
        issued.token, proof_message(issued.run_id, statement.guest), statement.proof
    )


@dataclass(frozen=True, slots=True)
class _Standing:
    """What the statements come to."""

    guests: dict[bytes, Grant]
    #: ids that the owner has revoked: of peers and of tokens
    revoked: dict[bytes, Revocation]
    #: the same, and the guests that go with them -> the revocation
    out: dict[bytes, Revocation]
    #: token -> guests that it has brought
    used: Counter[bytes]
    #: inviter -> guests that it has brought
    invited: Counter[bytes]


class Access(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, dict=True):
    """Who may take part, as far as a chain has come."""

    mode: Mode = "open"
    owner: Annotated[bytes, Meta(max_length=64)] = b""
    """Id of the run's owner; empty: it has none, and no statement counts but those of members."""
    listed: Annotated[tuple[PeerId, ...], Meta(max_length=512)] = ()
    """The manifest's founder and list."""
    amendments: Annotated[tuple[Statement, ...], Meta(max_length=GRANTS_MAX + REVOCATIONS_MAX)] = ()
    """What seals have added, in their order."""

    @functools.cached_property
    def _standing(self) -> _Standing:
        grants = [statement for statement in self.amendments if isinstance(statement, Grant)]
        revoked: dict[bytes, Revocation] = {}
        for statement in self.amendments:
            if isinstance(statement, Revocation) and (statement.with_guests or statement.subject not in revoked):
                revoked[statement.subject] = statement
        out = dict(revoked)
        for grant in grants:
            for by in (grant.issued.token, grant.issued.inviter):
                if by in revoked and revoked[by].with_guests:
                    out.setdefault(grant.guest, revoked[by])
        return _Standing(
            {grant.guest: grant for grant in grants},
            revoked,
            out,
            Counter(grant.issued.token for grant in grants),
            Counter(grant.issued.inviter for grant in grants),
        )

    @property
    def guests(self) -> frozenset[bytes]:
        """Peers that a grant has let in and that are not shut out."""
        return frozenset(self._standing.guests.keys() - self._standing.out.keys())

    def admits(self, peer_id: bytes) -> bool:
        """Whether a peer may take part and read anything of the run."""
        return peer_id not in self._standing.out and (self.mode == "open" or self.knows(peer_id))

    def knows(self, peer_id: bytes) -> bool:
        """Whether a peer was ever let in, shut out since or not."""
        return self.mode == "open" or peer_id in self.listed or peer_id in self._standing.guests

    def revocation(self, peer_id: bytes) -> Revocation | None:
        """Return the statement that shuts a peer out, if one does."""
        return self._standing.out.get(peer_id)

    def has(self, statement: Statement) -> bool:
        """Whether a statement is on the chain, or another that says as much."""
        if isinstance(statement, Grant):
            return statement.guest in self._standing.guests
        known = self._standing.revoked.get(statement.subject)
        return known is not None and known.with_guests >= statement.with_guests

    def may_invite(self, peer_id: bytes) -> bool:
        """Whether the passes of a peer count, the owner's id being one."""
        if self.owner and peer_id == self.owner:
            return self.mode != "open"
        if self.mode != "invite" or not self.admits(peer_id):
            return False
        grant = self._standing.guests.get(peer_id)
        return peer_id in self.listed or (grant is not None and grant.issued.may_invite)

    def amended(self, statement: Statement, run_id: bytes) -> Access:
        """Add a statement that counts.

        Raises:
            AdmissionError: it does not count here, and why.
        """
        why = self.refusal(statement, run_id)
        if why is not None:
            raise AdmissionError(why)
        return Access(self.mode, self.owner, self.listed, (*self.amendments, statement))

    def refusal(self, statement: Statement, run_id: bytes) -> str | None:
        """Return why a statement does not count here, or None. What is cheap to see is looked at first."""
        if isinstance(statement, Revocation):
            why = self._refusal_of_revocation(statement, run_id)
        else:
            why = self._refusal_of_grant(statement, run_id)
        if why is None and not is_signed(statement, self.owner):
            return "not signed by whom it names"
        return why

    def _refusal_of_revocation(self, revocation: Revocation, run_id: bytes) -> str | None:
        if revocation.run_id != run_id:
            return "of another run"
        if self.has(revocation):
            return "revoked already"
        if len(self.amendments) - len(self._standing.guests) >= REVOCATIONS_MAX:
            return "the run's owner has revoked as many as a chain can hold"
        return None

    def _refusal_of_grant(self, grant: Grant, run_id: bytes) -> str | None:
        standing, issued = self._standing, grant.issued
        by_owner = bool(self.owner) and issued.inviter == self.owner
        if issued.run_id != run_id:
            return "the invitation is to another run"
        if self.mode == "open":
            return "the run is open to everyone"
        if issued.peer_id not in (b"", grant.guest):
            return "the invitation is for another peer"
        if not standing.out.keys().isdisjoint((grant.guest, issued.token)):
            return "the run's owner has revoked it"
        if self.knows(grant.guest):
            return "let in already"
        if not self.may_invite(issued.inviter):
            return "its inviter may not invite"
        if self.mode == "list" and not issued.peer_id:
            return "the run takes invitations for one peer only"
        if issued.may_invite and not by_owner:
            return "nobody but the owner lets guests invite others"
        if standing.used[issued.token] >= issued.uses:
            return "the invitation is used up"
        if not by_owner and standing.invited[issued.inviter] >= INVITED_MAX:
            return "its inviter has invited as many as one member may"
        if len(standing.guests) >= GRANTS_MAX:
            return "the run has let in as many guests as a chain can hold"
        return None

    def continues(self, beginning: Access, run_id: bytes) -> bool:
        """Whether this may have come of `beginning`, the manifest's word: each statement counted where it stands."""
        if (self.mode, self.owner, self.listed) != (beginning.mode, beginning.owner, beginning.listed):
            return False
        access = beginning
        try:
            for statement in self.amendments[len(beginning.amendments) :]:
                access = access.amended(statement, run_id)
        except AdmissionError:
            return False
        return access == self
