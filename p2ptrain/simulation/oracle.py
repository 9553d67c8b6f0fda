"""A second opinion on every seal: what all parameters must be after it, and what it consumed of whose contribution.

Independent of the optimizer: parameters by plain numpy over the decoded replies, consumption from what was seen to
leave each peer. It knows every chain of the simulation, so that one id stands for one state, whoever applied it.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from fractions import Fraction

import base58
import numpy as np
from numpy.typing import NDArray

from p2ptrain import chain
from p2ptrain.chain import ChainState, RoundShape, Seal
from p2ptrain.chain.admission import Grant, Revocation
from p2ptrain.chain.evidence import body_of
from p2ptrain.chain.sealed import Key, SealedRound
from p2ptrain.compression import decoded
from p2ptrain.compression.codec import Codec
from p2ptrain.config.manifest import Manifest
from p2ptrain.optim.schedule import learning_rate
from p2ptrain.rounds.events import ContributionReady
from p2ptrain.simulation.toy import ENTRIES, Rows, ViolationError, dense


@dataclass(frozen=True, slots=True)
class _Node:
    """One place on a chain."""

    state: ChainState
    parameters: NDArray[np.float32]
    #: peer id -> [chunks, ENTRIES] consumed of its contributions on the way here
    consumed: dict[bytes, Rows]
    #: peers that the manifest or a seal on the way here has let in, and those that one has shut out
    let_in: frozenset[bytes]
    shut_out: frozenset[bytes]
    #: member -> rounds in which another sealed all of its replies, halved when it was struck for one
    served: dict[bytes, int]
    #: member -> seals with work of it since it came
    worked: dict[bytes, int]


class Oracle:
    """See the module docstring."""

    def __init__(self, manifest: Manifest, run_id: bytes, codec: Codec, parameters: NDArray[np.float32]) -> None:
        self._manifest, self._codec = manifest, codec
        listed = frozenset(map(base58.b58decode, manifest.access.peers)) | {manifest.founder_id}
        beginning = _Node(manifest.beginning(run_id), parameters.copy(), {}, listed, frozenset(), {}, {})
        self._nodes: dict[bytes, _Node] = {run_id: beginning}
        #: (peer, round key) -> [chunks, ENTRIES] that left it, and its weight
        self._sent: dict[tuple[bytes, Key], tuple[Rows, int]] = {}
        #: peers whose replies may be anything of the right form
        self.liars: set[bytes] = set()

    @property
    def codec(self) -> Codec:
        """What all peers agree on about payloads."""
        return self._codec

    def state(self, identifier: bytes) -> ChainState:
        """The chain state that an id stands for. Raises ViolationError where nobody applied it."""
        return self._node(identifier).state

    def path(self, identifier: bytes) -> list[bytes]:
        """Ids from the run's beginning to this one."""
        ids = [identifier]
        while self._node(ids[-1]).state.round:
            ids.append(self._node(ids[-1]).state.parent)
        return ids[::-1]

    def path_tail(self, identifier: bytes, length: int) -> list[bytes]:
        """The last `length` ids on the way to this one, the newest first."""
        ids = [identifier]
        while len(ids) < length and self._node(ids[-1]).state.round:
            ids.append(self._node(ids[-1]).state.parent)
        return ids

    def saw_sent(self, peer: bytes, ready: ContributionReady, shape: RoundShape) -> None:
        """A contribution of weight above 0 leaves `peer`. Raises ViolationError when it is not what left it before."""
        key, payloads = ready.key, ready.payloads
        rows = np.zeros((self._codec.chunks, ENTRIES))
        for part, payload in zip(shape.parts, payloads, strict=True):
            sent = decoded.contribution(payload, self._codec, part.start, part.end)
            rows += dense(sent.chunk, sent.index, sent.value, self._codec.chunks)
        if not np.array_equal(self._sent.setdefault((peer, key), (rows, ready.row.weight))[0], rows):
            raise ViolationError(f"round {key.round}: something else was sent again")

    def learn(self, sealed: SealedRound, before: ChainState, after: ChainState, *, made_up: bool = False) -> None:
        """Some peer applies a sealed round, or an adversary has made it up. Raises ViolationError."""
        known = self._nodes.get(after.id)
        if known is not None:
            if known.state != after:
                raise ViolationError(f"round {after.round}: one id, two chain states")
            return
        parent = self._node(sealed.seal.parent)
        if parent.state != before or after.parent != before.id or after.round != before.round + 1:
            raise ViolationError(f"round {after.round}: the seal was applied to another state than its parent")
        if after.total != before.total + len(chain.bits(sealed.seal.included, len(before.now))):
            raise ViolationError(f"round {after.round}: total is wrong")
        shape = chain.shape_of(before, self._codec.chunks)
        if before.round > 1 and [m.peer_id for m in shape.members] != self._members_by_rule(before):
            raise ViolationError(f"round {after.round}: its members are not those of the seal two before")
        self._check_parts(shape)
        served = self._served(parent, sealed, shape)
        if any(member.served != served.get(member.peer_id, 0) for member in after.following):
            raise ViolationError(f"round {after.round}: what members have served is miscounted")
        worked = self._worked(parent, sealed, shape)
        if any(member.standing != min(1 + worked.get(member.peer_id, 0), 8) for member in after.following):
            raise ViolationError(f"round {after.round}: what members count for is miscounted")
        key = Key(shape.round, shape.base)
        config = self._manifest.optimizer
        rate = learning_rate(
            after.round,
            peak=config.learning_rate,
            warmup_rounds=config.warmup_rounds,
            total_rounds=config.total_rounds,
            final_fraction=config.final_fraction,
        )
        parameters, consumed = parent.parameters.copy(), dict(parent.consumed)
        for part, data in zip(shape.parts, sealed.replies, strict=True):
            if data is None:
                continue
            reply = decoded.reply(body_of(data), self._codec, part.start, part.end, len(shape.members))
            kept = reply.coefficients
            step = np.sign(dense(kept.chunk, kept.index, reply.byte.astype(np.float32), self._codec.chunks))
            parameters = parameters - step.astype(np.float32) * np.float32(rate)
            mask = np.zeros((self._codec.chunks, ENTRIES), bool)
            inside = kept.index < ENTRIES
            mask[kept.chunk[inside], kept.index[inside]] = True
            # Who is included and has sent nothing sent a message of weight 0.
            peers = [(member, shape.members[member].peer_id) for member in sorted(reply.included)]
            sent = [(member, peer, *self._sent[peer, key]) for member, peer in peers if (peer, key) in self._sent]
            for member, peer, rows, _ in sent:
                share = np.where(mask, rows, 0.0) * reply.clips.get(member, 256) / 256
                consumed[peer] = consumed.get(peer, 0) + share
            value = dense(kept.chunk, kept.index, kept.value, self._codec.chunks)
            scale = np.zeros((self._codec.chunks, 1))
            scale[part.start : part.end, 0] = reply.scale
            counted = [
                (rows, weight, shape.members[member].standing / 8, reply.clips.get(member, 256))
                for member, _, rows, weight in sent
            ]
            mean = self._mean(part, counted)
            lied = made_up or shape.members[part.reducer].peer_id in self.liars
            if not lied and (abs(value - mean)[mask] > 0.51 * np.broadcast_to(scale, mask.shape)[mask] + 1e-5).any():
                raise ViolationError(f"round {after.round}: a reply is not the mean of what it includes")
        self._nodes[after.id] = _Node(
            after, parameters, consumed, *self._access_after(parent, sealed.seal, after), served, worked
        )

    def _access_after(self, parent: _Node, seal: Seal, after: ChainState) -> tuple[frozenset[bytes], frozenset[bytes]]:
        """Who was let in and shut out on the way to a state, whose members are then those that may be."""
        let_in = parent.let_in | {one.guest for one in seal.amendments if isinstance(one, Grant)}
        shut_out = parent.shut_out | {one.subject for one in seal.amendments if isinstance(one, Revocation)}
        if self._manifest.access.mode == "open":
            return let_in, shut_out
        members = {member.peer_id for member in after.following}
        proven = {member.peer_id for member in after.following if not member.is_newcomer}
        if not members <= let_in or not {join.peer_id for join in seal.joins} <= let_in - shut_out:
            raise ViolationError(f"round {after.round}: a seal brings in a peer that nobody has let in")
        if members & shut_out and proven - shut_out:
            raise ViolationError(f"round {after.round}: a peer that was shut out is a member")
        if seal.solo and seal.sealer in shut_out:
            raise ViolationError(f"round {after.round}: a peer that was shut out seals alone")
        return let_in, shut_out

    def _check_parts(self, shape: RoundShape) -> None:
        """Each reducer's chunks are its share by what of its uplink counts, but for less than one chunk."""
        members = shape.members
        included = [m for m in members if m.included]
        turn = {m.peer_id for i, m in enumerate(members) if (shape.round + i) % 2 ** max(m.strikes - 2, 0) == 0}
        reducers = [m for m in included if m.dialable and m.peer_id in turn]
        # New ones only where nobody of whom nothing bad is known has worked.
        if any(m.strikes <= 2 and m.standing >= 4 for m in reducers):
            reducers = [m for m in reducers if m.strikes > 2 or m.standing >= 4]
        reducers = reducers or [m for m in included if m.dialable]
        reducers = reducers or [m for m in members if m.dialable] or included[:1] or list(members[:1])
        if not reducers:
            return
        middle = sorted(max(m.row.uplink_kbit, 1) for m in reducers)[(len(reducers) - 1) // 2]
        counts = {}
        for m in reducers:
            limit = middle * 2 ** (m.served // 8) * Fraction(8 + m.served % 8, 8)
            counts[m.peer_id] = min(Fraction(max(m.row.uplink_kbit, 1)), limit)
        chunks = dict.fromkeys(counts, 0)
        for part in shape.parts:
            chunks[members[part.reducer].peer_id] += part.end - part.start
        for peer, count in counts.items():
            if abs(chunks[peer] - self._codec.chunks * count / sum(counts.values())) >= 1:
                raise ViolationError(f"round {shape.round}: a reducer has {chunks[peer]} chunks, not its share")

    def _served(self, parent: _Node, sealed: SealedRound, shape: RoundShape) -> dict[bytes, int]:
        """What each member has served after a seal; after a solo seal nobody has."""
        if sealed.seal.solo:
            return {}
        first = shape.members[shape.sealer_order[0]].peer_id
        replied: dict[bytes, bool] = {}
        for part, digest in zip(shape.parts, sealed.seal.parts, strict=True):
            peer = shape.members[part.reducer].peer_id
            replied[peer] = replied.get(peer, True) and bool(digest)
        owes = {peer for peer, all_there in replied.items() if not all_there} | ({first} - {sealed.seal.sealer})
        struck = owes if len(owes) <= len(shape.awaited) / 2 else set()
        served = dict(parent.served)
        for peer in replied:
            if peer in struck and not replied[peer]:
                served[peer] = max(0, min(served.get(peer, 0) // 2, served.get(peer, 0) - 16))
            elif replied[peer] and peer != sealed.seal.sealer:
                served[peer] = min(served.get(peer, 0) + 1, 64)
        # A member that comes back begins anew.
        listed = {member.peer_id for member in parent.state.following}
        return {peer: count for peer, count in served.items() if peer in listed}

    def _worked(self, parent: _Node, sealed: SealedRound, shape: RoundShape) -> dict[bytes, int]:
        """How many seals have work of each member, since it came."""
        seal = sealed.seal
        working = {
            shape.members[i].peer_id for i in chain.bits(seal.included, len(shape.members)) if seal.rows[i].weight
        }
        # A member that comes back begins anew, and so does who carries a run on that it was no member of.
        listed = {m.peer_id for m in parent.state.following}
        if seal.solo:
            listed &= {seal.sealer}
        return {peer: parent.worked.get(peer, 0) + (peer in working) for peer in listed}

    def check_length(self, shape: RoundShape, seconds: float) -> None:
        """Raises ViolationError where a round's length is not what its members' throughputs, as they count, give."""
        rules = self._manifest.round
        claims = [m.row.sequences_per_kilosecond for m in shape.members if m.absent >= 0]
        claims = sorted(claim for claim in claims if claim > 0)
        if claims:
            most = rules.weight_cap_ratio * statistics.fmean(claims[(len(claims) - 1) // 2 : len(claims) // 2 + 1])
            wanted = rules.target_batch * 1000 / sum(min(claim, most) for claim in claims)
        else:
            wanted = rules.min_seconds
        if abs(min(max(wanted, rules.min_seconds), rules.max_seconds) - seconds) > 1e-6 * seconds:
            raise ViolationError(f"round {shape.round} lasts {seconds} s")

    def _members_by_rule(self, before: ChainState) -> list[bytes]:
        """Of the round after `before`: what the seal two rounds before it says, or the last one, if that is solo."""
        parent = self._node(before.parent).state
        alone = len(before.now) == 1 and before.now[0].peer_id not in [m.peer_id for m in parent.following]
        solo = alone or (len(parent.following) > 1 and len(before.now) == 1)
        return [m.peer_id for m in (before.now if solo else parent.following)]

    def _mean(self, part: chain.Part, sent: list[tuple[Rows, int, float, int]]) -> Rows:
        """[chunks, ENTRIES] of (values, weight, standing, clip factor): weights capped, times standing, divided by all
        the weight included."""
        if not sent:
            return np.zeros((self._codec.chunks, ENTRIES))
        weights = np.array([weight for _, weight, _, _ in sent], np.float64)
        weights = np.minimum(weights, self._codec.weight_cap_ratio * np.median(weights))
        if self._codec.robust == "bounded":
            norms = np.array([np.linalg.norm(rows[part.start : part.end]) for rows, _, _, _ in sent])
            norms = np.minimum(norms, self._codec.clip_ratio * np.median(norms))
            most = np.median(weights * norms)
            weights = np.minimum(weights, most / np.maximum(norms, np.finfo(np.float64).tiny))
            # Who points against the others is told by the reply, as all clip factors are.
            weights = np.where([clip == 0 for _, _, _, clip in sent], 0.0, weights)
        weights = weights * np.array([standing for _, _, standing, _ in sent])
        total: Rows = sum(
            (rows * weight * clip / 256 for (rows, _, _, clip), weight in zip(sent, weights, strict=True)),
            np.zeros((self._codec.chunks, ENTRIES)),
        )
        return total / weights.sum()

    def check_parameters(self, identifier: bytes, parameters: NDArray[np.float32]) -> None:
        """Raises ViolationError where a replica at this state is not what it must be."""
        if not np.array_equal(self._node(identifier).parameters, parameters):
            raise ViolationError(f"round {self.state(identifier).round}: a replica differs from the oracle's replay")

    def consumed(self, identifier: bytes, peer: bytes) -> Rows:
        """[chunks, ENTRIES] of the peer's contributions that the chain up to this id has used."""
        nothing = np.zeros((self._codec.chunks, ENTRIES))
        return self._node(identifier).consumed.get(peer, nothing)

    def _node(self, identifier: bytes) -> _Node:
        node = self._nodes.get(identifier)
        if node is None:
            raise ViolationError("a state that no chain of seals leads to")
        return node
