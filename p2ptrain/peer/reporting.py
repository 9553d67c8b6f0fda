"""Writes down what happens to a peer: events for its owner, and, by `SealKeeper`, seals for whoever counts.

The driver tells it each event that the machine hears and each effect once it is carried out, the trainer's thread what
a round cost. It decides nothing, and no fault of a disk passes from here: what cannot be written is left out, with one
warning.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable

from p2ptrain import __version__, chain
from p2ptrain.chain import ChainState, SealError
from p2ptrain.config.manifest import Manifest
from p2ptrain.observe import events as told
from p2ptrain.observe.census import LOST_SECONDS
from p2ptrain.observe.evaluations import Evaluation
from p2ptrain.observe.peers import path_of
from p2ptrain.observe.rounds import sealed_event
from p2ptrain.observe.status import Status
from p2ptrain.peer.sealing import SealKeeper
from p2ptrain.rounds import events
from p2ptrain.rounds.inbox import Restore
from p2ptrain.state.journal import Journal
from p2ptrain.state.seals import SealLog
from p2ptrain.swarm.identity import format_peer_id
from p2ptrain.swarm.shelves import Looked

HEARD_AGAIN_SECONDS = 60.0
"""Between two events about a peer that has not changed."""
HEARD_MAX = 512
"""Peers whose records are followed; more may be made up."""


class Reporter:
    """See the module docstring.

    Args:
        log: where events go.
        seals: where seals go.
        chunks: of the model.
        clock: seconds, monotonic.
    """

    def __init__(
        self, log: told.EventLog, seals: SealLog, chunks: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.events, self.keeper, self._chunks, self._clock = log, SealKeeper(seals, chunks), chunks, clock
        #: of the round applied last, from handing its contribution over until all replies were here
        self.exchange_seconds = 0.0
        #: when the contribution to the round under way was sent, and when the last reply came
        self._sent_at: float | None = None
        self._replied_at = 0.0
        #: the round of which the trainer said last what it cost
        self._worked = 0
        #: of each peer what was written of it last, and when
        self._heard: dict[bytes, tuple[tuple[object, ...], float]] = {}

    def started(
        self, manifest: Manifest, run_id: bytes, peer_id: bytes, name: str, device: str, head: ChainState
    ) -> None:
        """Write that this peer begins to take part, standing at `head`."""
        self.events.write(
            told.Started(
                run_id=run_id.hex(),
                run=manifest.name,
                peer_id=format_peer_id(peer_id),
                name=name,
                device=device,
                version=__version__,
                protocol=manifest.protocol,
                round=head.round,
                state_id=head.id.hex(),
                last_round=manifest.last_round,
            )
        )

    def stopped(self, status: Status, why: str, paused: bool = False) -> None:
        """Write that this peer takes no part any more, or, `paused`, not for a while."""
        self.events.write(told.Stopped(round=status.round, why=why, paused=paused))

    def begin(self, head: ChainState, journal: Journal) -> None:
        """Take up the seals where this peer stands; those that the journal has beyond them are added."""
        self.keeper.begin(head, journal)

    def hear(self, what: events.Event | events.Effect | Restore) -> None:
        """Hear an event of the machine, or an effect that was carried out; on the network thread."""
        self.keeper.hear(what)
        match what:
            case events.SendContribution():
                self._sent_at = self._sent_at or self._clock()
            case events.ReplyHeld():
                self._replied_at = self._clock()
            case events.Apply():
                self._applied(what)
            case events.Rollback():
                self.events.write(told.RolledBack(round=what.state.round, state_id=what.state.id.hex()))
            case Restore():
                self._restored(what)
            case events.LeftOut():
                names = ", ".join(format_peer_id(peer)[-8:] for peer in what.members[:8])
                text = f"{format_peer_id(what.sealer)[-8:]} leaves out replies that are there, with the work of {names}"
                self.events.write(told.Noted(what="left_out", text=text))
            case events.Note():
                self.events.write(told.Noted(what=what.kind, text=what.text))
            case events.Resync():
                self.events.write(told.Noted(what="resync", text=what.why))

    def _applied(self, apply: events.Apply) -> None:
        sealed = apply.sealed
        self.exchange_seconds = 0.0 if self._sent_at is None else max(0.0, self._replied_at - self._sent_at)
        self._sent_at = None
        self.events.write(sealed_event(apply.shape, sealed.id, sealed.seal))

    def _restored(self, restore: Restore) -> None:
        state = restore.chain
        self.events.write(told.ChangedChain(round=state.round, state_id=state.id.hex(), common=restore.common))
        self._sent_at = None
        with contextlib.suppress(SealError):
            for sealed in restore.rounds:
                self.events.write(sealed_event(chain.shape_of(state, self._chunks), sealed.id, sealed.seal))
                state = chain.extend(state, sealed.id, sealed.seal, self._chunks)

    # ---- the trainer's thread ---------------------------------------------------------------------------------

    def worked(self, status: Status) -> None:
        """Write what the round applied last cost; of the same round nothing twice."""
        if status.round == self._worked:
            return
        self._worked = status.round
        self.events.write(
            told.Worked(
                round=status.round,
                loss=status.loss,
                bits_per_byte=status.bits_per_byte,
                tokens_per_second=round(status.tokens_per_second, 1),
                computing_seconds=round(status.computing_seconds, 3),
                exchange_seconds=round(status.exchange_seconds, 3),
                disk_seconds=round(status.disk_seconds, 3),
                waiting_seconds=round(status.idle_seconds, 3),
                bytes_sent=status.bytes_sent_per_round,
                bytes_received=status.bytes_received_per_round,
                consumed_share=round(status.consumed_share, 4),
            )
        )

    def measured(self, evaluation: Evaluation) -> None:
        """Write what somebody says of the model."""
        self.events.write(
            told.Measured(
                round=evaluation.round,
                state_id=evaluation.state_id,
                by=evaluation.by,
                figures=evaluation.figures,
                tokens=evaluation.tokens,
            )
        )

    # ---- others -----------------------------------------------------------------------------------------------

    def looked(self, looked: Looked) -> None:
        """Write which peers are new, have changed or are lost, by what a look at their records has shown."""
        for peer, record in list(looked.records.items())[:HEARD_MAX]:
            now = looked.at[peer]
            lost = record.last_seen_seconds(now) > LOST_SECONDS and record.state not in ("leaving", "finished")
            state = "lost" if lost else record.state
            path = path_of(record.addresses)
            key = (record.name, state, record.device, record.version, path)
            said, at = self._heard.get(peer, ((), 0.0))
            if key == said and now - at < HEARD_AGAIN_SECONDS:
                continue
            self._heard[peer] = key, now
            self.events.write(
                told.Heard(
                    peer_id=format_peer_id(peer),
                    name=record.name,
                    state=state,
                    round=record.round,
                    state_id=record.state_id.hex(),
                    tokens_per_second=round(record.tokens_per_second, 1),
                    loss=record.loss,
                    device=record.device,
                    version=record.version,
                    path=path,
                )
            )
        while len(self._heard) > HEARD_MAX:
            del self._heard[next(iter(self._heard))]
