"""A chain of one real member: real gradients, payloads, replies and signed seals, without a network."""

from __future__ import annotations

import hashlib

import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from p2ptrain import chain
from p2ptrain.chain import ChainState, Row, Seal
from p2ptrain.chain.evidence import Contribution, reduce_and_attest, sign_contribution
from p2ptrain.chain.sealed import Key, SealedRound, reply_digest
from p2ptrain.config.manifest import Manifest, ModelConfig, OptimizerConfig, RoundConfig
from p2ptrain.optim.settling import Pending
from p2ptrain.swarm.identity import Identity
from p2ptrain.training.replica import Replica

RUN_ID = hashlib.sha256(b"run").digest()
MANIFEST = Manifest(
    name="test",
    nonce="0" * 32,
    model=ModelConfig(layers=1, heads=2, embedding=16, context=16),
    optimizer=OptimizerConfig(beta=1.0),
    round=RoundConfig(root_interval=4),
)
ROW = Row(4, 1000, 100)


def identity_of(name: str) -> Identity:
    """The same for the same name."""
    key = Ed25519PrivateKey.from_private_bytes(hashlib.sha256(name.encode()).digest())
    return Identity(bytes.fromhex("002408011220") + key.public_key().public_bytes_raw(), key)


def replica(manifest: Manifest = MANIFEST) -> Replica:
    return Replica(manifest, RUN_ID, torch.device("cpu"))


def gradient(of: Replica, seed: int) -> None:
    """A gradient that is the same for the same seed, added to the momentum."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in of.model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    of.optimizer.accumulate()
    of.optimizer.zero_grad(set_to_none=True)


def seal(
    state: ChainState, sealer: Identity, chunks: int, replies: tuple[bytes | None, ...], *, solo: bool = False
) -> SealedRound:
    """The sealed round after `state`, by its only member."""
    shape = chain.shape_of(state, chunks)
    included = {0} if any(replies) else set()
    made = Seal(
        version=chain.SEAL_VERSION,
        run_id=RUN_ID,
        round=shape.round,
        parent=state.id,
        total=state.total + len(included),
        sealer=sealer.peer_id,
        solo=solo,
        included=chain.bitmap(included, len(shape.members)),
        parts=tuple(reply_digest(reply) if reply else b"" for reply in replies),
        rows=tuple(ROW for _ in shape.members),
        joins=(),
        root=b"",
    )
    signed = chain.encode_seal(made, sealer.sign)
    return SealedRound(chain.seal_id(signed.body), made, signed, replies)


class Lone:
    """The member, with everything it has sealed."""

    def __init__(self, name: str = "ada") -> None:
        self.identity = identity_of(name)
        self.replica = replica()
        self.chunks = self.replica.layout.chunks
        self.rounds: list[SealedRound] = []
        self.states: list[ChainState] = [self.replica.chain]
        self.seal(seal(self.states[0], self.identity, self.chunks, (), solo=True))

    @property
    def key(self) -> Key:
        """Of the round that comes next."""
        return self._key_after(self.states[-1])

    def _key_after(self, state: ChainState) -> Key:
        shape = chain.shape_of(state, self.chunks)
        return Key(shape.round, shape.base)

    def reply(self, sent: Pending, after: ChainState | None = None, member: Identity | None = None) -> bytes:
        """What the only member makes of its own contribution, in the round after this state or the one that comes next.

        Args:
            member: another than this one.
        """
        by = member or self.identity
        (payload,) = self.replica.optimizer.payloads(sent, [(0, self.chunks)])
        key, sign = self._key_after(after or self.states[-1]), by.sign
        signature = sign_contribution(sign, RUN_ID, key, 0, ROW, payload)
        reply, _ = reduce_and_attest(
            [Contribution(0, ROW, payload, signature)],
            self.replica.codec,
            0,
            self.chunks,
            sign=sign,
            run_id=RUN_ID,
            key=key,
            part=0,
            group=chain.Group((by.peer_id,), (1,)),
        )
        return reply

    def seal(self, sealed: SealedRound) -> None:
        """Apply a sealed round."""
        state = self.states[-1]
        shape = chain.shape_of(state, self.chunks)
        self.states.append(chain.extend(state, sealed.id, sealed.seal, self.chunks))
        self.replica.apply(sealed, shape, self.states[-1])
        self.rounds.append(sealed)

    def train(self, rounds: int) -> None:
        """So many rounds of gradient, contribution, reply, seal and step; nothing is settled."""
        for _ in range(rounds):
            gradient(self.replica, len(self.rounds))
            self.seal(seal(self.states[-1], self.identity, self.chunks, (self.reply(self.replica.optimizer.select()),)))
