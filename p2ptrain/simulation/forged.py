"""Chains that nobody worked for: what an attacker makes up, in the form that honest peers accept."""

from __future__ import annotations

from p2ptrain import chain
from p2ptrain.calls.messages import ROUNDS_MAX, Tip
from p2ptrain.chain import ChainState, Join, Key, RoundShape, Seal, SignedSeal
from p2ptrain.chain.evidence import attest
from p2ptrain.chain.sealed import SealedRound, decode_sealed, encode_sealed, reply_digest
from p2ptrain.compression.codec import Codec
from p2ptrain.compression.reduce import reduce_part
from p2ptrain.swarm.identity import Identity


class Branch:
    """A chain from a state that honest peers have: rounds that were handed out, and further ones that are made up."""

    def __init__(self, base: ChainState, codec: Codec) -> None:
        self._codec = codec
        self._states = [base]
        self._encoded = [b""]
        self._signed: list[SignedSeal] = []
        self._places = {base.id: 0}

    @property
    def state(self) -> ChainState:
        """Where it stands."""
        return self._states[-1]

    @property
    def beginning(self) -> bytes:
        """Id of the state that its rounds come after."""
        return self._states[0].id

    @property
    def tip(self) -> Tip:
        """The same, as it is said to others."""
        return Tip.of(self.state)

    def take(self, encoded: bytes) -> SealedRound:
        """Continue it by a round that somebody handed out. Raises SealError."""
        sealed = decode_sealed(encoded, lambda *_: True)
        self._append(sealed, encoded)
        return sealed

    def back_to_parent(self) -> None:
        """Forget the last round, which others have undone. Raises IndexError at the base."""
        if len(self._states) == 1:
            raise IndexError("at the base")
        del self._places[self._states.pop().id], self._encoded[-1], self._signed[-1]

    def forge(
        self, sealer: Identity, *, solo: bool = False, joins: tuple[Join, ...] = (), root: bytes = b""
    ) -> SealedRound:
        """Seal the next round: it includes all its members, or the sealer alone, and changes no parameter.

        Replies of others cannot be made up: their parts are skipped, and where no part is the sealer's own, nobody is
        included.

        Raises:
            SealError: the rules allow no such seal.
        """
        shape = chain.shape_of(self.state, self._codec.chunks)
        count, mine = len(shape.members), shape.index(sealer.peer_id)
        own = {number for number, part in enumerate(shape.parts) if part.reducer == mine}
        included = frozenset({mine} if solo else range(count)) if own and mine is not None else frozenset()
        replies = tuple(
            self._nothing(sealer, shape, number, included) if number in own else None
            for number in range(len(shape.parts))
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
            root=root,
        )
        signed = chain.encode_seal(seal, sealer.sign)
        identifier = chain.seal_id(signed.body)
        sealed = SealedRound(identifier, seal, signed, replies)
        self._append(sealed, encode_sealed(sealed))
        return sealed

    def _nothing(self, reducer: Identity, shape: RoundShape, part: int, included: frozenset[int]) -> bytes:
        """A reply of a part that the forger reduces, to members that sent nothing."""
        spec, nothing = shape.parts[part], [(m, 0, b"") for m in sorted(included)]
        body = reduce_part(nothing, self._codec, spec.start, spec.end, len(shape.members))
        key = Key(shape.round, shape.base)
        return attest(reducer.sign, self.state.run_id, key, part, shape.group, body, ())

    def after(self, locator: tuple[bytes, ...]) -> tuple[bytes, list[bytes]]:
        """What a donor of this chain answers: the ancestor, and encoded rounds after it."""
        for identifier in locator:
            place = self._places.get(identifier)
            if place is not None:
                return identifier, self._encoded[place + 1 : place + 1 + ROUNDS_MAX]
        return b"", []

    def went_through(self, locator: tuple[bytes, ...]) -> bytes:
        """Return the first of these ids that it goes through, or nothing."""
        return next((identifier for identifier in locator if identifier in self._places), b"")

    def seals_after(self, known: bytes) -> tuple[SignedSeal, ...] | None:
        """What a donor of this chain answers who wants seals alone; None: it does not go through `known`."""
        place = self._places.get(known)
        return None if place is None else tuple(self._signed[place:])

    def _append(self, sealed: SealedRound, encoded: bytes) -> None:
        state = chain.extend(self.state, sealed.id, sealed.seal, self._codec.chunks)
        self._places[sealed.id] = len(self._states)
        self._states.append(state)
        self._encoded.append(encoded)
        self._signed.append(sealed.signed)
