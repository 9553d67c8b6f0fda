"""Audits over the network: shows others what this peer summed, asks others what they did, and hands proofs on.

Lives on the network thread; worker threads repeat sums and check proofs. None of it is on a round's path: what is shown
goes at the pace of `calls.handout`, after contributions and replies, and an audit that has to wait is late, not the
round.

Memory: the contributions to our own parts of the last `KEPT_ROUNDS` rounds, `KEPT_BYTES` of them at most, but always
those of the last `KEPT_ROUNDS_MIN`.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from p2ptrain.calls.client import Client
from p2ptrain.calls.messages import CallError, RefusedError
from p2ptrain.calls.news import RETRY_SECONDS
from p2ptrain.chain import evidence
from p2ptrain.chain.evidence import Bundle, EvidenceError, Proof, Verdict
from p2ptrain.chain.seal import proof_digest
from p2ptrain.chain.sealed import Key, reply_digest
from p2ptrain.compression.codec import Codec
from p2ptrain.peer.parts import DriverParts
from p2ptrain.rounds import events
from p2ptrain.rounds.audits import A_REDUCER_MAX
from p2ptrain.swarm.identity import format_peer_id, verify

KEPT_ROUNDS = 16
KEPT_ROUNDS_MIN = 2
KEPT_BYTES = 64 * 1024 * 1024
SHOWN_MAX = 3
"""Times that one member is shown the same: a stream may break."""
AT_ONCE = 2
"""Audits of ours."""
AUDIT_SECONDS = 60.0
"""A reducer that has not shown by then what it summed withholds it."""
ASKED_WITHIN_ROUNDS = KEPT_ROUNDS - 6
"""An audit that could not begin by then is given up, as its reducer may have forgotten by the time it hears of it."""
LIARS_MAX = 256

_logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Kept:
    """What was summed for one reply of ours."""

    key: Key
    members: frozenset[bytes]
    bundle: Bundle
    size: int
    #: member -> times that it was shown this
    shown: Counter[bytes] = field(default_factory=Counter)


class Auditing:
    """See the module docstring.

    Args:
        parts: of this peer.
        client: calls the others.
        dispatch: lets the machine hear an event, and does what it asks for.
    """

    def __init__(self, parts: DriverParts, client: Client, dispatch: Callable[[events.Event], None]) -> None:
        self._p, self._machine, self._client, self._dispatch = parts, parts.machine, client, dispatch
        #: reply's digest -> what it is the sum of, the oldest first
        self._kept: dict[bytes, _Kept] = {}
        self._places = asyncio.Semaphore(AT_ONCE)
        #: peers that are handing us a proof
        self._handing: set[bytes] = set()
        #: peers that have handed us a proof that convicts nobody: no more of theirs is read
        self._liars: dict[bytes, None] = {}

    # ---- what we summed ---------------------------------------------------------------------------------------

    def keep(self, key: Key, digest: bytes, members: Sequence[bytes], bundle: Bundle) -> None:
        """Keep what a reply of ours is the sum of, for those who audit it."""
        size = sum(map(len, bundle.payloads)) + 256 * len(bundle.messages)
        self._kept[digest] = _Kept(key, frozenset(members), bundle, size)
        newest = max(kept.key.round for kept in self._kept.values())
        held = sum(kept.size for kept in self._kept.values())
        for old, kept in list(self._kept.items()):
            age = newest - kept.key.round
            if age >= KEPT_ROUNDS or (held > KEPT_BYTES and age >= KEPT_ROUNDS_MIN):
                held -= kept.size
                del self._kept[old]

    @property
    def kept_bytes(self) -> int:
        """Count what is held of contributions for those who audit."""
        return sum(kept.size for kept in self._kept.values())

    def show(self, digest: bytes, peer: bytes) -> bytes | str:
        """Return what the reply of this digest is the sum of, encoded; or why it is refused."""
        kept = self._kept.get(digest)
        if kept is None:
            return "what was summed for this reply is not here"
        if peer not in kept.members:
            return "not a member of that round"
        others = [one for one in self._kept.values() if one.key == kept.key and one is not kept and one.shown[peer]]
        if len(others) > A_REDUCER_MAX or kept.shown[peer] >= SHOWN_MAX:
            return "shown often enough"
        kept.shown[peer] += 1
        return evidence.encode_bundle(kept.bundle)

    # ---- what others summed -----------------------------------------------------------------------------------

    async def audit(self, effect: events.Audit) -> None:
        """Have a reducer show what it summed, and repeat the sum."""
        codec, part, members = self._p.codec, effect.shape.parts[effect.part], len(effect.shape.members)
        verdict: Verdict = "skipped"
        proof = b""
        async with self._places:
            in_time = self._machine.head.round - effect.key.round <= ASKED_WITHIN_ROUNDS
            if in_time and evidence.may_be_proven(codec, part.start, part.end, members):
                bundle = await self._bundle(effect)
                verdict, proof = await asyncio.to_thread(
                    evidence.audit, effect.reply, bundle, codec, effect.shape, effect.part, self._p.run_id, verify
                )
        if verdict in ("wrong", "withheld"):
            _logger.warning(
                "an audit of %s, round %d part %d: %s",
                format_peer_id(effect.reducer)[-8:],
                effect.key.round,
                effect.part,
                "its reply is not the sum of what it was sent" if proof else "it does not show what it summed",
            )
        self._dispatch(events.Audited(effect.reducer, reply_digest(effect.reply), verdict, proof))

    async def _bundle(self, effect: events.Audit) -> bytes:
        """Return what the reducer shows; nothing where it shows nothing in time."""
        part = effect.shape.parts[effect.part]
        longest = evidence.bundle_max_bytes(self._p.codec, part.start, part.end, len(effect.shape.members))
        try:
            async with asyncio.timeout(AUDIT_SECONDS):
                for attempt in range(SHOWN_MAX):
                    try:
                        return await self._client.audit(effect.reducer, reply_digest(effect.reply), longest)
                    except RefusedError as error:
                        _logger.debug("%s refuses an audit: %s", format_peer_id(effect.reducer)[-8:], error)
                    except CallError as error:
                        _logger.debug("no audit of %s: %s", format_peer_id(effect.reducer)[-8:], error)
                    await asyncio.sleep(RETRY_SECONDS[min(attempt, len(RETRY_SECONDS) - 1)])
        except TimeoutError:
            pass
        return b""

    # ---- proofs -----------------------------------------------------------------------------------------------

    async def hand_on(self, effect: events.SendProof) -> None:
        """Give a proof to a peer that may seal soon."""
        try:
            await self._client.prove(effect.sealer, effect.proof)
        except CallError as error:
            _logger.debug("%s does not take a proof: %s", format_peer_id(effect.sealer)[-8:], error)

    def refuse_proof(self, digest: bytes, peer: bytes) -> str | None:
        """Return why a proof is refused before it is read, or None."""
        if digest in self._machine.audits.proofs:
            return "known"
        if peer not in self._machine.group.members:
            return "not a member"
        if peer in self._liars or peer in self._handing:
            return "no more proofs of this peer now"
        return None

    async def take_proof(self, digest: bytes, peer: bytes, read: Callable[[], Awaitable[bytes]]) -> None:
        """Read a proof that was not refused, and check it. Raises CallError when it does not come."""
        self._handing.add(peer)
        try:
            encoded = await read()
            if proof_digest(encoded) != digest:
                raise CallError("another proof than announced")
            proof = await asyncio.to_thread(_opened, encoded, self._p.run_id, self._p.codec)
        finally:
            self._handing.discard(peer)
        if proof is None:
            self._liars[peer] = None
            while len(self._liars) > LIARS_MAX:
                del self._liars[next(iter(self._liars))]
        elif any(member.peer_id == proof.reducer for member in self._machine.head.following):
            self._dispatch(events.ProofHeard(proof.reducer, encoded))


def _opened(encoded: bytes, run_id: bytes, codec: Codec) -> Proof | None:
    try:
        return evidence.open_proof(encoded, run_id, codec, verify)
    except EvidenceError as error:
        _logger.warning("a proof that convicts nobody: %s", error)
        return None
