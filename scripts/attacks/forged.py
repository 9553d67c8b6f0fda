"""What an attacker makes up: identities, and chains that nobody worked for."""

from __future__ import annotations

import random
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from p2ptrain import chain
from p2ptrain.calls.messages import ROUNDS_MAX, Tip
from p2ptrain.chain import ChainState, Join, Row, Seal
from p2ptrain.chain.sealed import SealedRound, decode_sealed, encode_sealed, reply_digest
from p2ptrain.compression.codec import Codec
from p2ptrain.compression.reduce import reduce_part
from p2ptrain.swarm.identity import Identity

PEER_ID_HEADER = b"\x00\x24\x08\x01\x12\x20"


def random_row(chance: random.Random, uplink_kbit: int = 0) -> Row:
    """What an honest member of a small swarm may say of itself."""
    return Row(chance.randint(1, 8), chance.randint(1_000, 20_000), uplink_kbit)


def identity_from(chance: random.Random) -> Identity:
    """An identity that follows from the seed."""
    key = Ed25519PrivateKey.from_private_bytes(chance.randbytes(32))
    return Identity(PEER_ID_HEADER + key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw), key)


def key_from(chance: random.Random, path: Path) -> Identity:
    """The same, in a file as libp2p reads it."""
    made = identity_from(chance)
    private = made.key.private_bytes(Encoding.Raw, PrivateFormat.Raw, NoEncryption())
    path.touch(mode=0o600)
    path.write_bytes(b"\x08\x01\x12\x40" + private + made.peer_id[len(PEER_ID_HEADER) :])
    return made


def made_up_peer_id(chance: random.Random) -> bytes:
    """A peer id whose key nobody needs."""
    return PEER_ID_HEADER + chance.randbytes(32)


class Branch:
    """A chain from a state that honest peers have, and further rounds that were made up."""

    def __init__(self, base: ChainState, codec: Codec) -> None:
        self.state, self._codec = base, codec
        self._ids, self._encoded = [base.id], [b""]
        self._places = {base.id: 0}
        self._states = [base]
        self._empty: dict[tuple[frozenset[int], int, int, int], bytes] = {}

    @property
    def tip(self) -> Tip:
        """Where it stands."""
        return Tip(self.state.round, self.state.id, self.state.total)

    def take(self, encoded: bytes) -> SealedRound:
        """Continue it by a round that somebody handed out. Raises SealError."""
        sealed = decode_sealed(encoded, lambda *_: True)
        self._append(sealed.id, sealed.seal, encoded)
        return sealed

    def back_to_parent(self) -> None:
        """Forget the last round, which others have undone. Raises IndexError at the base."""
        self._states.pop()
        self.state = self._states[-1]
        del self._places[self._ids.pop()], self._encoded[-1]

    def forge(self, sealer: Identity, *, solo: bool = False, joins: tuple[Join, ...] = ()) -> bytes:
        """Seal the next round: it includes all its members, or the sealer alone, and changes no parameter. The id."""
        shape = chain.shape_of(self.state, self._codec.chunks)
        count, mine = len(shape.members), shape.index(sealer.peer_id)
        everyone = frozenset(range(count))
        included = everyone if not solo else frozenset() if mine is None else frozenset({mine})
        replies = tuple(
            self._reply(included, part.start, part.end, count) if included else None for part in shape.parts
        )
        seal = Seal(
            version=chain.SEAL_VERSION,
            run_id=self.state.run_id,
            round=shape.round,
            parent=self.state.id,
            total=self.state.total + len(included),
            sealer=sealer.peer_id,
            solo=solo,
            included=chain.bitmap(included, count),
            parts=tuple(b"" if reply is None else reply_digest(reply) for reply in replies),
            rows=tuple(member.row for member in shape.members),
            joins=joins,
            root=b"",
        )
        signed = chain.encode_seal(seal, sealer.sign)
        identifier = chain.seal_id(signed.body)
        self._append(identifier, seal, encode_sealed(SealedRound(identifier, seal, signed, replies)))
        return identifier

    def after(self, locator: tuple[bytes, ...]) -> tuple[bytes, list[bytes]]:
        """What a donor of this chain answers: the ancestor, and encoded rounds after it."""
        for identifier in locator:
            place = self._places.get(identifier)
            if place is not None:
                return identifier, self._encoded[place + 1 : place + 1 + ROUNDS_MAX]
        return b"", []

    def _reply(self, included: frozenset[int], start: int, end: int, count: int) -> bytes:
        key = (included, start, end, count)
        if key not in self._empty:
            nothing = [(member, 0, b"") for member in sorted(included)]
            self._empty = {key: reduce_part(nothing, self._codec, start, end, count), **self._empty}
        return self._empty[key]

    def _append(self, identifier: bytes, seal: Seal, encoded: bytes) -> None:
        self.state = chain.extend(self.state, identifier, seal, self._codec.chunks)
        self._states.append(self.state)
        self._places[identifier] = len(self._ids)
        self._ids.append(identifier)
        self._encoded.append(encoded)
