"""A peer for a model and a loop of somebody's own.

    peer = p2ptrain.bootstrap("run.toml", model=model, home="a")      # or p2ptrain.join(ADDR, model=model, home="b")
    with peer:
        for batch in loader:
            loss_of(model, batch).backward()
            peer.optimizer.step(samples=len(batch))
            if peer.ended:
                break

It is the peer that the command line runs, turned inside out: the loop that calls is the trainer's thread, and `step`
returns where the built-in trainer would compute. What is trained is described in `models/own.py`. Nothing here prints,
handles signals or changes torch's settings, except the number of threads where a person has set one.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from types import TracebackType

import msgspec
import torch
from torch import nn

from p2ptrain.api.optimizer import SwarmOptimizer
from p2ptrain.compression.layout import Kind
from p2ptrain.config.loading import load_manifest
from p2ptrain.config.manifest import DataConfig, Manifest, ModelConfig
from p2ptrain.config.node import NodeSettings, resolve_settings
from p2ptrain.errors import ManifestError, UsageError
from p2ptrain.models.own import (
    Beginning,
    FixedEntry,
    beginning_of,
    buffers_of,
    check_buffers,
    check_statistics,
    keepers_of,
    own_task,
)
from p2ptrain.observe.evaluations import Evaluation, said_text
from p2ptrain.observe.metrics import Sink
from p2ptrain.observe.status import Status
from p2ptrain.peer.assembly import Run
from p2ptrain.peer.session import Part, PeerSession
from p2ptrain.swarm.addresses import parse_addresses
from p2ptrain.swarm.invitations import read_invitation
from p2ptrain.training.measuring import Called, Evaluate
from p2ptrain.training.selftest import make_ready
from p2ptrain.training.standing import Books
from p2ptrain.training.trainer import OwnLoop, Participant, Swarm

OWN_DATA = DataConfig(name="own", license="NOASSERTION", private=True)
"""What a manifest says of data that only the loops of its peers know, unless run.toml says more."""

SAY_EVERY_SECONDS = 5.0
"""Between two lines of the log on what is being fetched."""

_logger = logging.getLogger(__name__)


class Peer:
    """Takes part in a run; a context manager, entered once. See the module docstring.

    For one thread at a time, whichever it is: the one that steps is the one that hears `on_round`.

    Args:
        settings: of this machine.
        model: the module to train.
        kinds: {pattern of names: kind}, for a run that begins.
        rounds: stop after having had a part in this many rounds; None: no limit.
        addresses: to meet others at.
        find: finds the run, once the session is connected; it is given the beginning that `model` makes.
        evaluate: measures `model`, in this peer's turns.
        sinks: where figures go, besides what the settings name.
    """

    def __init__(
        self,
        settings: NodeSettings,
        model: nn.Module,
        kinds: Mapping[str, Kind] | None,
        rounds: int | None,
        addresses: Sequence[str],
        find: Callable[[PeerSession, Beginning], Run],
        evaluate: Evaluate | None = None,
        sinks: Sequence[Sink] = (),
    ) -> None:
        self.model, self._sinks = model, list(sinks)
        self._evaluate = evaluate
        #: this peer's part in the run is over: the run has ended, or its `rounds` have
        self.ended = False
        self._settings, self._rounds, self._find = settings, rounds, find
        self._addresses = list(addresses)
        #: before anything slow: what cannot be trained is refused here
        self._beginning: Beginning | None = beginning_of(model, kinds)
        self._heard: list[Callable[[Peer], None]] = []
        self._stack = ExitStack()
        self._session: PeerSession | None = None
        self._part: Part | None = None
        self._optimizer: SwarmOptimizer | None = None
        self._loop: OwnLoop | None = None
        self._keepers = keepers_of(model)
        #: as they were before the first batch, until they were looked at after it
        self._buffers: tuple[FixedEntry, ...] | None = None
        self._following: AbstractContextManager[tuple[Swarm, Callable[[], bool]]] | None = None
        self._swarm: Swarm | None = None
        self._after_round: Callable[[], bool] | None = None
        #: nothing may be saved: a step is under way, or the peer cannot go on
        self._unsound = False

    # ---- what there is to know --------------------------------------------------------------------------------

    @property
    def optimizer(self) -> SwarmOptimizer:
        """Steps `model` with the swarm. Raises RuntimeError before the peer is entered."""
        if self._optimizer is None:
            raise _not_entered()
        return self._optimizer

    @property
    def address(self) -> str | None:
        """Where others can join; None: nobody can dial this peer, and others join elsewhere."""
        return next(iter(self._entered.addresses), None)

    @property
    def round(self) -> int:
        """The round that `model` stands at."""
        return self._entered.trainer.replica.chain.round

    @property
    def state_id(self) -> str:
        """The state that `model` stands at, in hexadecimal: with it, all parameters are the same on every peer."""
        return self._entered.trainer.replica.chain.id.hex()

    @property
    def status(self) -> Status:
        """What this peer says of itself: members, speed, bytes a round and more."""
        return self._entered.status

    @property
    def _entered(self) -> Part:
        if self._part is None:
            raise _not_entered()
        return self._part

    def on_round(self, callback: Callable[[Peer], None]) -> Callable[[Peer], None]:
        """Call `callback(peer)` in `step`, whenever rounds were applied; what it raises comes out of `step`."""
        self._heard.append(callback)
        return callback

    # ---- from start to end ------------------------------------------------------------------------------------

    def __enter__(self) -> Peer:
        if self._session is not None:
            raise RuntimeError("a peer is entered once; make another one")
        with ExitStack() as stack:
            session = PeerSession(self._settings, _Heard(self), self._rounds)
            session.sinks = list(self._sinks)
            self._session = stack.enter_context(session)
            session.connect(self._addresses)
            assert self._beginning is not None
            run = self._find(session, self._beginning)
            session.enter_run(run, own_model=True)
            check_strategy(run.manifest)
            session.fetch_beginning(run, self._beginning)
            self._beginning = None
            self._take_part(session, run)
            stack.push(self._leave)
            assert self._following is not None
            self._swarm, self._after_round = self._following.__enter__()
            if session.reached_end(self._entered.trainer):
                self._end()
            else:
                self._go_on()
            self._stack = stack.pop_all()
        return self

    def _take_part(self, session: PeerSession, run: Run) -> None:
        config = run.manifest.own_model
        assert config is not None
        task = own_task(self.model, session.home.beginning, config)
        if self._settings.threads:
            torch.set_num_threads(self._settings.threads)
        make_ready(task.parameters[0].tensor.device)

        def make(books: Books) -> Participant:
            self._loop = OwnLoop(books, session.inbox, Status())
            return self._loop

        self._buffers = buffers_of(self.model)
        method = None if self._evaluate is None else Called(self._evaluate, task)
        if method is not None and run.manifest.evaluated is None:
            _logger.warning("the run's manifest sets no [evaluation], so evaluate is never called")
        part = self._part = session.take_part(run, task, None, make, method)
        self._optimizer = SwarmOptimizer(task.parameters, run.manifest, self._hand)
        self._show_rate()
        self._following = session.following(part.trainer, part.driver, part.presence, part.status)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    def _leave(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        session, following = self._session, self._following
        assert session is not None
        try:
            if not self._unsound:
                self._end()
                session.finish(self._entered)
            elif following is not None:
                self._following = None
                following.__exit__(kind, error, trace)
        finally:
            session.say_leaving(self._entered)

    def _end(self) -> None:
        """Take no further part; raise why, where that is a failure."""
        self.ended = True
        following, self._following = self._following, None
        if following is not None:
            self._unsound = True
            following.__exit__(None, None, None)
            self._unsound = False

    # ---- steps ------------------------------------------------------------------------------------------------

    def _hand(self, samples: int, nats: float) -> None:
        if self._loop is None:
            raise _not_entered()
        if self.ended:
            raise RuntimeError(
                f"this peer's part in the run has ended, at round {self.round}: leave the loop when peer.ended is true"
            )
        check_statistics(self._keepers)
        if self._buffers is not None:
            # After one batch is time enough: what a forward pass changes, it changes each time.
            check_buffers(self.model, self._buffers)
            self._buffers = None
        self._loop.handed(samples, nats)
        self._go_on()

    def _go_on(self) -> None:
        assert self._loop is not None and self._swarm is not None and self._after_round is not None
        self._unsound = True
        going_on = self._loop.until_batch(self._swarm, self._after_round)
        self._unsound = False
        if not going_on:
            self._end()

    def _applied(self) -> None:
        self._show_rate()
        for callback in self._heard:
            callback(self)

    def _show_rate(self) -> None:
        self.optimizer.show_rate(self._entered.trainer.replica.rate_at(self.round + 1))


class _Heard:
    """What a session says, for those who registered callbacks."""

    def __init__(self, peer: Peer) -> None:
        self._peer = peer
        self._said: dict[str, float] = {}

    def round(self, status: Status, *, last: bool = False) -> None:
        if not last:
            self._peer._applied()

    def evaluated(self, evaluation: Evaluation) -> None:
        _logger.info("%s", said_text(evaluation))

    def transfer(self, what: str, done: int, total: int) -> None:
        now = time.monotonic()
        if done >= total or now - self._said.get(what, 0.0) >= SAY_EVERY_SECONDS:
            self._said[what] = now
            _logger.info("fetching %s: %d of %d", what, done, total)

    def work(self, what: str, done: int, total: int) -> None:
        _logger.debug("%s: %d of %d", what, done, total)

    def say(self, text: str) -> None:
        _logger.info("%s", text)

    def close(self) -> None:
        pass


def _not_entered() -> RuntimeError:
    return RuntimeError("the peer is not running yet: with peer: ...")


# ---- bootstrap and join -------------------------------------------------------------------------------------------


def bootstrap(
    run: str | Path,
    *,
    model: nn.Module,
    home: str | Path | None = None,
    kinds: Mapping[str, Kind] | None = None,
    initial_peers: Sequence[str] = (),
    rounds: int | None = None,
    name: str | None = None,
    port: int | None = None,
    host: str | None = None,
    announce: Sequence[str] = (),
    threads: int | None = None,
    evaluate: Evaluate | None = None,
    metrics: Sequence[str | Sink] = (),
) -> Peer:
    """Return a peer that starts the run which a run.toml describes, with `model` as it is in place of the built-in one.

    Of run.toml, `[model]` does not count, nor does `[data]` unless it is private. In a home that has begun this run
    already, the peer goes on with it, and `model` gets the parameters that the run has come to.

    Args:
        run: path of the run.toml.
        home: directory of identity, checkpoints and journal; default as on the command line.
        kinds: {pattern of parameter names, as in a shell: kind}, where the types of modules do not say it.
        initial_peers: addresses of peers of an existing DHT to meet in.
        rounds: stop after having had a part in this many rounds.
        name, port, host, announce, threads: as the flags of `p2ptrain bootstrap`.
        evaluate: called as `evaluate(model)` when it is this peer's turn to measure, at intervals that the run.toml's
            `[evaluation]` sets; returns up to eight figures by name, which others see as this peer's.
        metrics: where figures of rounds go: what `--metrics` takes, or objects with the methods of `p2ptrain.Sink`.

    Raises:
        ManifestError: the run.toml is none, or not for a loop of one's own.
        ModelError: the model cannot be trained by a swarm.
    """
    wanted = load_manifest(Path(run))
    check_strategy(wanted)
    if wanted.task_config is not None:
        raise ManifestError(f"{run} has a [task], which bootstrap makes of the model", hint=f"take it out of {run}")
    data = wanted.data if wanted.data.private else OWN_DATA
    wanted = msgspec.structs.replace(wanted, model=ModelConfig(), data=data)

    def find(session: PeerSession, beginning: Beginning) -> Run:
        manifest = msgspec.structs.replace(wanted, task=beginning.config())
        own = session.own_run()
        if own is not None and _continues(own.manifest, manifest):
            # What the run begins with lies in this home; the model may have come further since.
            manifest = own.manifest
        return session.found_run(manifest)

    settings = _settings(home, name, port, host, announce, threads, metrics)
    return Peer(settings, model, kinds, rounds, _checked(initial_peers), find, evaluate, _sinks(metrics))


def join(
    *addresses: str,
    model: nn.Module,
    home: str | Path | None = None,
    run: str | None = None,
    invite: str | None = None,
    rounds: int | None = None,
    name: str | None = None,
    port: int | None = None,
    host: str | None = None,
    announce: Sequence[str] = (),
    threads: int | None = None,
    evaluate: Evaluate | None = None,
    metrics: Sequence[str | Sink] = (),
) -> Peer:
    """Return a peer that trains with the swarm at `addresses`, whose `model` gets the swarm's parameters.

    Args:
        addresses: as peers show them; none: the peers that this home has met before.
        model: a module with the names and shapes of the run's; the values that it has do not matter.
        run: name or id of another run than that of the peers at `addresses`.
        invite: invitation to a run that is not open to everyone.
        home, rounds, name, port, host, announce, threads, evaluate, metrics: as of `bootstrap`.

    Raises:
        AddressError: what should be an address is none.
        ModelError: the model cannot be trained by a swarm.
    """
    asked = _checked(addresses)
    invitation = None if invite is None else read_invitation(invite)
    if invitation is not None and not asked:
        raise UsageError("an invitation needs the address of a peer", hint="p2ptrain.join(ADDR, ...)")

    def find(session: PeerSession, beginning: Beginning) -> Run:
        own = session.own_run()
        if asked or run is not None:
            return session.find_run(asked, run, invitation)
        if own is None:
            raise UsageError(f"which swarm? Home {session.home.path} has met none yet", hint="p2ptrain.join(ADDR, ...)")
        return own

    settings = _settings(home, name, port, host, announce, threads, metrics)
    return Peer(settings, model, None, rounds, asked, find, evaluate, _sinks(metrics))


def check_strategy(manifest: Manifest) -> None:
    """Refuse a strategy that takes steps of its own between rounds. Raises ManifestError."""
    optimizer = manifest.optimizer
    if optimizer.gathers_way or optimizer.look_ahead:
        raise ManifestError(
            f"strategy {optimizer.strategy} takes inner steps between rounds, which a loop of one's own does not know",
            hint='use optimizer.strategy = "demo" or "dense"',
        )


def _continues(own: Manifest, wanted: Manifest) -> bool:
    """Say whether a home's run is the one that is wanted, whatever values the model has by now."""
    same = msgspec.structs.replace(wanted, owner=own.owner, founder=own.founder, task=own.task)
    if own.own_model is None or wanted.own_model is None or same != own:
        return False
    return own.own_model.parameters == wanted.own_model.parameters


def _settings(
    home: str | Path | None,
    name: str | None,
    port: int | None,
    host: str | None,
    announce: Sequence[str],
    threads: int | None,
    metrics: Sequence[str | Sink],
) -> NodeSettings:
    named = [where for where in metrics if isinstance(where, str)] or None
    flags = {
        "name": name,
        "port": port,
        "host": host,
        "announce": list(announce),
        "threads": threads,
        "metrics": named,
    }
    return resolve_settings(None if home is None else Path(home).expanduser(), flags)


def _sinks(metrics: Sequence[str | Sink]) -> list[Sink]:
    return [where for where in metrics if not isinstance(where, str)]


def _checked(addresses: Sequence[str]) -> list[str]:
    """Return the addresses, once they are some; a mistyped one is said before anything slow. Raises AddressError."""
    if addresses:
        parse_addresses(list(addresses))
    return list(addresses)
