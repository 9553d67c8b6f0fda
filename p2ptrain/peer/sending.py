"""Sends this peer's contributions to the reducers of their parts.

Lives on the network thread. A contribution is in the own log before its first byte leaves, and what the own log has is
the only message of its round. Each part is sent until its reducer answers with the reply, or the round is over.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import replace

import msgspec

from p2ptrain.calls.client import Client
from p2ptrain.calls.messages import NOT_LISTED, TOO_MANY_CALLS, CallError, ContributionHeader, RefusedError, Tip
from p2ptrain.calls.news import RETRY_SECONDS
from p2ptrain.calls.uplink import Burst
from p2ptrain.chain import RoundShape
from p2ptrain.chain.evidence import reply_max_bytes
from p2ptrain.chain.sealed import Key, SealedRoundError, make_reply
from p2ptrain.compression import wire
from p2ptrain.peer.parts import DriverParts
from p2ptrain.rounds import events
from p2ptrain.rounds.inbox import Dropped
from p2ptrain.state.own_log import OwnEntry
from p2ptrain.swarm.identity import format_peer_id, verify

_TRANSIENT = ("foreign", "too early", TOO_MANY_CALLS, NOT_LISTED)
"""Reasons of a reducer that may pass: it has not seen the last seal yet, or that we were let in."""

_logger = logging.getLogger(__name__)


class Sending:
    """See the module docstring.

    Args:
        parts: of this peer.
        client: calls the reducers.
        dispatch: lets the machine hear an event, and does what it asks for.
        report: hears of each delivery that has ended.
    """

    def __init__(
        self,
        parts: DriverParts,
        client: Client,
        dispatch: Callable[[events.Event], None],
        report: Callable[[asyncio.Task[None]], None],
    ) -> None:
        self._p, self._machine, self._client = parts, parts.machine, client
        self._dispatch, self._report = dispatch, report
        self._me = parts.node.peer_id
        #: the messages of the round under way, for the uplink; who is being sent one of several parts
        self._burst: tuple[Key, Burst] | None = None
        self._turns: dict[bytes, asyncio.Lock] = {}
        #: deliveries under way -> their round
        self.deliveries: dict[asyncio.Task[None], int] = {}

    def contribute(self, ready: events.ContributionReady, entry: OwnEntry) -> None:
        """Send the trainer's contribution to the round under way; it is dropped where it comes too late for it.

        Raises:
            OSError: the own log cannot take it.
        """
        shape = self._machine.shape
        ranges = tuple((part.start, part.end) for part in shape.parts) if shape else ()
        if not self._machine.awaits(ready.key) or entry.ranges != ranges:
            sent = self._p.own_log.find(entry.key)
            if sent is None or sent.decays != entry.decays:
                self._p.inbox.put(Dropped(entry.key, entry.decays, entry.row.weight))
            return
        row = msgspec.structs.replace(ready.row, uplink_kbit=self._p.uplink.declared_kbit)
        ready, entry = replace(ready, row=row), msgspec.structs.replace(entry, row=row)
        if self._p.own_log.find(ready.key) != entry:
            self._p.own_log.write(entry)
        self._dispatch(ready)

    def repeat_own(self, effect: events.StartRound) -> None:
        """Send again what was sent for a round, before a restart or on another branch: its only message.

        At once, before anything could stand in for it: whose message went in as weight 0 must not count as used.
        Raises OSError.
        """
        entry = self._p.own_log.find(effect.key)
        if entry is None:
            return
        parts = effect.shape.parts
        payloads = tuple(b"" for _ in parts)
        if not entry.stood_in:
            codec, before = self._p.codec, zip(entry.payloads, entry.ranges, strict=True)
            sent = wire.join([wire.decode_contribution(payload, codec, *piece) for payload, piece in before])
            payloads = tuple(wire.encode_contribution(sent.cut(p.start, p.end), codec) for p in parts)
            ranges = tuple((part.start, part.end) for part in parts)
            if ranges != entry.ranges:
                self._p.own_log.write(msgspec.structs.replace(entry, ranges=ranges, payloads=payloads))
        self._dispatch(events.ContributionReady(effect.key, entry.row, payloads))

    def send(self, effect: events.SendContribution) -> None:
        """Begin to send one part to its reducer; raises OSError."""
        self._log_stand_in(effect)
        task = asyncio.create_task(self._deliver(effect))
        self.deliveries[task] = effect.key.round
        task.add_done_callback(lambda done: self.deliveries.pop(done, None))
        task.add_done_callback(self._report)

    def end_rounds_before(self, round: int) -> None:
        """Stop sending for rounds that are over."""
        for task in [t for t, of in self.deliveries.items() if of < round]:
            task.cancel()

    def _log_stand_in(self, effect: events.SendContribution) -> None:
        """Journal a message in the trainer's stead before its first byte, as the trainer's are."""
        if effect.row.weight == 0 and self._p.own_log.find(effect.key) is None:
            entry = OwnEntry(effect.key.round, effect.key.base, effect.row, (), (), 0, 0)
            self._p.own_log.write(entry)

    async def _deliver(self, effect: events.SendContribution) -> None:
        """Send one part to its reducer until it answers with the reply; the round's end cancels this."""
        shape = self._machine.shape
        if shape is None or self._machine.exchange_key != effect.key:
            return
        root_round, root = self._machine.newest_root
        spec = shape.parts[effect.part]
        reply_max = reply_max_bytes(self._p.codec, spec.start, spec.end, len(shape.members))
        rules = self._machine.rules
        reply_seconds = rules.max_seconds + rules.round_max_seconds + rules.grace_seconds + rules.reply_timeout_seconds
        burst = self._burst_of(effect.key, shape)
        turn = self._turns.setdefault(effect.reducer, asyncio.Lock())
        attempt = 0
        while self._machine.exchange_key == effect.key:
            header = ContributionHeader(
                run_id=self._p.run_id,
                round=effect.key.round,
                base=effect.key.base,
                part=effect.part,
                row=effect.row,
                signature=effect.signature,
                root_round=root_round,
                root=root,
                tip=Tip.of(self._machine.head),
            )
            try:
                data = await self._client.contribute(
                    effect.reducer, header, effect.payload, reply_max, reply_seconds, turn, burst
                )
                reply = make_reply(data, self._p.codec, shape, effect.part, self._p.run_id, verify)
                if self._machine.shape is shape:
                    self._dispatch(events.ReplyHeld(effect.key, effect.part, reply))
                return
            except RefusedError as error:
                if str(error) not in _TRANSIENT:
                    _logger.info("%s refuses our contribution: %s", format_peer_id(effect.reducer)[-8:], error)
                    return
            except (CallError, SealedRoundError) as error:
                _logger.debug("contribution to %s: %s", format_peer_id(effect.reducer)[-8:], error)
            burst.spoil()
            await asyncio.sleep(RETRY_SECONDS[min(attempt, len(RETRY_SECONDS) - 1)])
            attempt += 1

    def _burst_of(self, key: Key, shape: RoundShape) -> Burst:
        """Return what all messages of one round of ours tell of the line."""
        if self._burst is None or self._burst[0] != key:
            elsewhere = sum(shape.members[part.reducer].peer_id != self._me for part in shape.parts)
            self._burst = key, self._p.uplink.burst(elsewhere)
            self._turns = {peer: turn for peer, turn in self._turns.items() if turn.locked()}
        return self._burst[1]
