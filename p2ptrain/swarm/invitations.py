"""Invitations as people hand them on: one line of text with a pass and its token's secret, and what is made of them.

What peers check of all this is in `chain/admission.py`. Who has the text can come in with it, until it has expired or
is used up; so it goes to the invited person by a way that nobody else reads.
"""

from __future__ import annotations

import logging
from typing import Annotated

import base58
import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from msgspec import Meta

from p2ptrain.chain.admission import Grant, Pass, Revocation, pass_message, proof_message, revocation_message
from p2ptrain.chain.signatures import Signature, verify
from p2ptrain.config.home import Home
from p2ptrain.errors import UsageError
from p2ptrain.swarm.identity import Identity, identity_of_key, new_identity, parse_peer_id

TEXT_MAX = 1024
"""Characters of an invitation; longer ones are not looked at."""
_SECRET_BYTES = 32


class Invitation(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What is in the text."""

    issued: Pass
    signature: Signature
    """The inviter's, of the pass."""
    secret: Annotated[bytes, Meta(min_length=_SECRET_BYTES, max_length=_SECRET_BYTES)]
    """The token's private key."""

    def text(self) -> str:
        """Return it as one line, for `read_invitation`."""
        return base58.b58encode(msgspec.msgpack.encode(self)).decode()

    def grant(self, guest: bytes) -> Grant:
        """Use it in a peer's name."""
        token = _token(self.secret)
        return Grant(self.issued, self.signature, guest, token.sign(proof_message(self.issued.run_id, guest)))


_decoder = msgspec.msgpack.Decoder(Invitation)
_grant_decoder = msgspec.msgpack.Decoder(Grant)
_logger = logging.getLogger(__name__)


def invite(
    inviter: Identity,
    run_id: bytes,
    *,
    expires: int,
    uses: int = 1,
    peer_id: bytes = b"",
    may_invite: bool = False,
) -> Invitation:
    """Make an invitation.

    Args:
        inviter: the owner, or a member that may invite.
        expires: Unix seconds.
        uses: how many guests it may bring.
        peer_id: the only peer that it is for; empty: anyone.
        may_invite: whether guests may invite others; the owner's to say.
    """
    token = new_identity()
    issued = Pass(run_id, inviter.peer_id, token.peer_id, expires, uses, peer_id, may_invite)
    return Invitation(issued, inviter.sign(pass_message(issued)), token.key.private_bytes_raw())


def read_invitation(text: str) -> Invitation:
    """Read the text of an invitation, which may come from anywhere.

    Raises:
        UsageError: it is none.
    """
    try:
        if len(text) > TEXT_MAX:
            raise ValueError("too long")
        invitation = _decoder.decode(base58.b58decode(text.strip()))
    except (ValueError, msgspec.MsgspecError) as error:
        raise UsageError(
            "this is not an invitation, or not all of it", hint="copy the whole line that `p2ptrain invite` printed"
        ) from error
    issued = invitation.issued
    signed = verify(issued.inviter, pass_message(issued), invitation.signature)
    if not signed or _token(invitation.secret).peer_id != issued.token:
        raise UsageError("the invitation is damaged", hint="copy the whole line that `p2ptrain invite` printed")
    return invitation


def revoke(owner: Identity, run_id: bytes, subject: bytes, *, with_guests: bool) -> Revocation:
    """Sign that a peer, or a token, is let in no more."""
    message = revocation_message(run_id, subject, with_guests)
    return Revocation(run_id, subject, with_guests, owner.sign(message))


def subject_of(text: str) -> bytes:
    """Return the id that a person means by a peer's id or by the text of an invitation.

    Raises:
        UsageError: neither.
    """
    try:
        return parse_peer_id(text)
    except ValueError:
        return read_invitation(text).issued.token


def decode_grant(encoded: bytes) -> Grant | None:
    """Return a grant as records and homes hold it; None for anything else."""
    try:
        return _grant_decoder.decode(encoded)
    except msgspec.MsgspecError:
        return None


def read_grant(home: Home, guest: bytes, run_id: bytes) -> Grant | None:
    """Return the grant by which a home's peer is a guest of a run; None where it is none, or the file is damaged."""
    try:
        grant = decode_grant(home.grant.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        _logger.warning("%s cannot be read: %s", home.grant, error)
        return None
    if grant is None:
        _logger.warning("%s is not a grant", home.grant)
    return grant if grant and (grant.guest, grant.issued.run_id) == (guest, run_id) else None


def _token(secret: bytes) -> Identity:
    return identity_of_key(Ed25519PrivateKey.from_private_bytes(secret))
