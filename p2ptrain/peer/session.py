"""One peer from start to end: network, run, data, replica, training, and a clean leave.

`bootstrap` and `join` differ in how they learn of the run; from there on all peers are alike. The order matters: what
can fail for a reason of the user's (address, manifest, port, data) comes before anything that takes long.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import math
import os
import queue
import random
import signal
import sys
import time
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar, cast

import msgspec
import torch

from p2ptrain.calls.client import Client
from p2ptrain.calls.handout import RATE_MIN_BYTES
from p2ptrain.calls.messages import Traffic
from p2ptrain.calls.uplink import MOST_KBIT, UplinkMeter
from p2ptrain.chain.admission import Grant
from p2ptrain.config.amounts import format_amount, parse_amount, parse_rate
from p2ptrain.config.home import Home
from p2ptrain.config.manifest import FileConfig, Manifest, open_manifest, sign_manifest
from p2ptrain.config.node import NodeSettings
from p2ptrain.data.obtaining import Share, obtain_text
from p2ptrain.data.preparing import Given
from p2ptrain.data.text import Text
from p2ptrain.data.tokenizer import tokenizer_of_run
from p2ptrain.errors import (
    AddressError,
    HomeError,
    ModelError,
    NoRunError,
    RunChoiceError,
    TransferSpentError,
    UnreachableError,
    UsageError,
)
from p2ptrain.models.gpt import GPT
from p2ptrain.models.of_manifest import check_model, task_of
from p2ptrain.models.own import Beginning, check_length
from p2ptrain.models.task import Task
from p2ptrain.observe.evaluations import History
from p2ptrain.observe.events import EventLog
from p2ptrain.observe.metrics import Metrics, Sink, sinks_of
from p2ptrain.observe.status import Standing, Status
from p2ptrain.peer import joining
from p2ptrain.peer.assembly import Link, Make, Run, driver_parts
from p2ptrain.peer.driver import GOODBYE_SECONDS, RoundDriver
from p2ptrain.peer.file_download import fetch_file
from p2ptrain.peer.machine_use import looker
from p2ptrain.peer.owner import Owner
from p2ptrain.peer.presence import Presence
from p2ptrain.peer.progress import Shown
from p2ptrain.peer.reachability import Reachability, where_it_works
from p2ptrain.peer.reporting import Reporter
from p2ptrain.peer.room import Room
from p2ptrain.peer.supervisor import keep_notified, notify
from p2ptrain.peer.volunteering import Watch
from p2ptrain.peer.waiting import tell_while_waiting, told_while
from p2ptrain.rounds.inbox import TrainerMessage
from p2ptrain.state.checkpoint import Kept
from p2ptrain.state.files import atomic_write
from p2ptrain.state.journal import Journal
from p2ptrain.state.own_log import OwnLog
from p2ptrain.state.pieces import PieceFile
from p2ptrain.state.run_files import RunFile, whole
from p2ptrain.state.seals import SealLog
from p2ptrain.state.transfer import MonthlyTransfer
from p2ptrain.swarm.addresses import parse_addresses
from p2ptrain.swarm.identity import format_peer_id, load_or_create_identity, verify
from p2ptrain.swarm.invitations import Invitation, read_grant
from p2ptrain.swarm.line import Allowed, Line, next_month
from p2ptrain.swarm.meeting import CALLED_ELSEWHERE, IN_VAIN
from p2ptrain.swarm.node import SwarmNode
from p2ptrain.swarm.records import PeerRecord
from p2ptrain.swarm.shelves import find_peer
from p2ptrain.swarm.tasks import cancel_and_wait, failure_logged
from p2ptrain.swarm.thread import NetworkThread
from p2ptrain.training.device import choose_device
from p2ptrain.training.heap import give_back, load_no_compiler
from p2ptrain.training.machine import this_machine
from p2ptrain.training.measuring import HeldOut, Measuring, Method
from p2ptrain.training.needs import flops_a_token, needs_of
from p2ptrain.training.ranks import Beginning as RanksBeginning
from p2ptrain.training.ranks import Ranks
from p2ptrain.training.replica import Replica
from p2ptrain.training.selftest import make_ready
from p2ptrain.training.standing import Books
from p2ptrain.training.starting import place_values
from p2ptrain.training.trainer import Participant, Swarm, Trainer

FINISH_SECONDS = 15.0
"""After the run's last round a peer stays this long for those who lack it."""
PEERS_SECONDS = 20.0
"""Between two times that the peers once seen are written down: who is killed forgets no more than this."""
WAIT_PAUSE_SECONDS = 1.0, 10.0
"""The first and the longest pause between two attempts to meet peers that are not there yet."""
CONNECT_SECONDS = 120.0
"""To start the daemon and meet the DHT: some attempts of seconds each, on a machine that may be busy."""
FIND_RUN_SECONDS = 60.0
"""To ask which run there is: a few peers and the DHT, up to three times."""
READ_RUNS_SECONDS = 15.0
"""To look in the DHT whether a run lives: one look-up, which answers within 10."""
CORPUS_SECONDS = 3600.0
"""For the whole text over a slow line; a peer that falls silent is given up much sooner."""
START_SECONDS = 60.0
"""To take up the journal and begin to answer calls: some thousand rounds may have to be read."""
ASK_SECONDS = 10.0
"""For what the network thread knows without asking anybody: more than it is ever late."""
REACH_SECONDS = 25.0
"""For others to try whether they can dial this peer: two attempts, each of some seconds at a port that is closed."""
FAREWELL_SECONDS = 3.0
"""To publish that this peer leaves: worth one short attempt."""
STOP_SECONDS = 10.0
"""For each of the driver and the node to end: goodbyes and replies under way take 3 of them."""
HURRY_SECONDS = 0.7
"""For replies that others are being handed when this machine is wanted: its memory is to be back within two seconds."""
TRANSFER_LOOK_SECONDS = 1.0
"""Between two looks at whether there is transfer left, where a month's is used up."""
STOPPING_LOOK_SECONDS = 0.1
"""Between two looks at whether Ctrl-C ends the wait for others."""

_logger = logging.getLogger(__name__)

T = TypeVar("T")


def _held_out(manifest: Manifest, task: Task, text: Text) -> Method | None:
    """Return what measures a model of text on what is held out; None: there is nothing to predict."""
    evaluated = manifest.evaluated
    if evaluated is None or len(text.heldout.tokens) < 2:
        return None
    model = cast(GPT, task.module)  # or what is used as it is
    # A forward pass over two micro-batches takes less time than forward and backward over one.
    return HeldOut(model, text.heldout, evaluated.tokens, 2 * manifest.round.micro_batch)


@dataclass(frozen=True, slots=True)
class Part:
    """What a session works with once it takes part in a run."""

    trainer: Participant
    driver: RoundDriver
    presence: Presence
    status: Status
    announcing: Future[None]
    reach: Reachability

    @property
    def addresses(self) -> list[str]:
        """Full multiaddrs by which others can join, the best first; empty: nobody can dial this peer."""
        return self.reach.addresses


class PeerSession:
    """A peer's process; a context manager that leaves nothing behind.

    Args:
        display: hears of rounds and transfers.
        rounds: stop after having had a part in this many rounds; None: no limit.
        make: what trains, and what is trained; default: what the manifest says.
        wait_seconds: for peers that are not there yet, from now on.
        ranks: the processes that this peer is; None: it is one.
    """

    def __init__(
        self,
        settings: NodeSettings,
        display: Shown,
        rounds: int | None,
        make: Make | None = None,
        wait_seconds: float = 0.0,
        ranks: Ranks | None = None,
    ) -> None:
        #: until when its first peer is waited for, by the monotonic clock
        self._wait_until = time.monotonic() + wait_seconds
        self.settings, self.display = settings, display
        self.home = Home(settings.home)
        self._rounds, self._make, self._ranks = rounds, make or Make(), ranks
        self._network: NetworkThread | None = None
        self._node: SwarmNode | None = None
        self._driver: RoundDriver | None = None
        self._finished = False
        #: what the owner wants of this peer
        self.owner = Owner(self.home, lambda: self.inbox.put(None))
        #: of this peer's line, also after a pause
        self._uplink: UplinkMeter | None = None
        #: whether others can dial this peer, and the first attempt at finding out
        self._reach: Reachability | None = None
        self._reaching: Future[None] | None = None
        #: what the owner's limits let go; None: not connected yet
        self._line: Line | None = None
        #: when something of the chain was fetched last, by the network thread's clock
        self._fetched_at = -math.inf
        #: where figures go, besides what the settings name
        self.sinks: list[Sink] = []
        #: passes figures on; None: nobody asked for them
        self._metrics: Metrics | None = None
        #: writes down what happens; None: before this peer takes part
        self._reporter: Reporter | None = None
        #: what is known of measurements of the model; None: the run has none
        self._history: History | None = None
        #: by root, the files of the run that are here whole, for others
        self.files: dict[bytes, PieceFile] = {}
        self.inbox: queue.SimpleQueue[TrainerMessage | None] = self._make.inbox()
        #: writes a checkpoint and a snapshot while training goes on
        self._disk = ThreadPoolExecutor(2, thread_name_prefix="p2ptrain-disk")

    def __enter__(self) -> PeerSession:
        self.home.lock()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        first = error
        for what, step in self._steps_to_close():
            try:
                step()
            except TimeoutError:
                _logger.debug("%s takes too long: going on without", what)
            except BaseException as failure:
                # Ctrl-C, too, ends but one step: what comes after it leaves no daemon, and no home in use.
                if first is None:
                    first = failure
                else:
                    _logger.warning("%s has failed, too: %r", what, failure)
        if first is not None and first is not error:
            raise first

    def _steps_to_close(self) -> Iterator[tuple[str, Callable[[], None]]]:
        network, driver, node = self._network, self._driver, self._node
        yield "leaving the terminal", self.display.close
        if self._ranks is not None:
            yield "ending the other processes", self._ranks.close
        if network is not None:
            yield "taking no more commands", lambda: network.run(self.owner.close(), ASK_SECONDS)
        if network is not None and driver is not None:
            yield "saying goodbye", lambda: network.run(driver.stop(), STOP_SECONDS)
        if network is not None and node is not None:
            yield "writing down the peers once seen", lambda: network.run(self._remember_peers(), ASK_SECONDS)
            yield "ending the node", lambda: network.run(node.close(), STOP_SECONDS)
        if network is not None:
            yield "ending the network thread", network.stop
        yield "ending what is being written", self._disk.shutdown
        if self._metrics is not None:
            yield "ending what takes figures", self._metrics.close
        yield "leaving the home", self.home.unlock

    @property
    def network(self) -> NetworkThread:
        """Raises RuntimeError before `connect`."""
        if self._network is None:
            raise RuntimeError("not connected")
        return self._network

    @property
    def node(self) -> SwarmNode:
        """Raises RuntimeError before `connect`."""
        if self._node is None:
            raise RuntimeError("not connected")
        return self._node

    # ---- getting there ----------------------------------------------------------------------------------------

    def connect(self, addresses: list[str]) -> None:
        """Start the network and meet the DHT at `addresses`, or at those that this home remembers.

        Raises:
            AddressError, PortInUseError, UnreachableError, ClockSkewError, HomeError, DaemonError
            TransferSpentError: too little is left of this month's transfer, and no supervisor has started this peer.
        """
        settings = self.settings
        self._line = self.owner.limited = self._make_line()
        supervised = "NOTIFY_SOCKET" in os.environ
        if not supervised:
            self._check_transfer()
        self._network = NetworkThread()
        self._network.run(self.owner.listen(), ASK_SECONDS)
        if supervised:
            self._network.spawn(keep_notified(self.owner.line))
            self._await_transfer(self._line)
        remembered = self._remembered_peers()

        def create(peers: list[str]) -> SwarmNode:
            assert self._network is not None
            making = SwarmNode.create(
                self.home.identity,
                peers,
                host=settings.host,
                port=settings.port,
                announce=list(settings.announce),
                line=self._line,
            )
            return self._network.run(making, CONNECT_SECONDS)

        with self._doing("meeting the swarm"):
            try:
                self._node = self.patiently(lambda: create([*addresses, *remembered]))
            except UnreachableError as error:
                if addresses:
                    self._find_second_self(error, [*addresses, *remembered])
                    raise
                _logger.info("none of the %d peers once seen answers", len(remembered))
                self._node = create([])
                self._network.run(self._keep_trying(self._node, remembered), ASK_SECONDS)
        self.home.remember_port(self._node.port)

    async def _keep_trying(self, node: SwarmNode, remembered: list[str]) -> None:
        """Have the node's upkeep dial peers that do not answer now."""
        with contextlib.suppress(AddressError):
            for peer, routes in parse_addresses(remembered, own_peer_id=node.peer_id).items():
                node.remember(peer, routes)

    def patiently(self, attempt: Callable[[], T]) -> T:
        """Return what `attempt` returns, which is tried again, at growing pauses, while its peers are not there yet.

        Raises: what the last attempt has raised.
        """
        pauses, told = WAIT_PAUSE_SECONDS[0], False
        while True:
            try:
                return attempt()
            except (UnreachableError, NoRunError) as error:
                left = self._wait_until - time.monotonic()
                if left <= 0 or any(text in str(error) for text in IN_VAIN):
                    raise
                if not told:
                    self.display.say(f"{error}; trying again for {left:.0f} s, as --wait says")
                    told = True
                time.sleep(min(pauses * random.uniform(0.8, 1.2), left))
                pauses = min(1.5 * pauses, WAIT_PAUSE_SECONDS[1])

    def _find_second_self(self, error: UnreachableError, addresses: list[str]) -> None:
        """Where nobody could be met, look whether that is because another process is this peer; raises HomeError.

        A peer that knows the other one under this id calls that one back.
        """
        own = self.home.manifest.read_bytes() if self.home.manifest.exists() else None
        if own is None or CALLED_ELSEWHERE not in str(error):
            return
        manifest, run_id = open_manifest(own)
        me = load_or_create_identity(self.home.identity).peer_id

        async def look() -> PeerRecord | None:
            node = await SwarmNode.create(None, addresses, observer=True)
            try:
                return await find_peer(node, run_id, manifest.records_key, me)
            finally:
                await node.close()

        with contextlib.suppress(UnreachableError):
            record = self.network.run(look(), CONNECT_SECONDS)
            fresh = record is not None and record.last_seen_seconds(time.time()) < joining.SELF_FRESH_SECONDS
            if record is not None and fresh and record.state != "leaving":
                raise joining.identity_in_use(me, record.addresses[:1], self.home.identity)

    def _make_line(self) -> Line:
        """Return what holds this peer to its owner's limits, which may change while it runs. Raises HomeError."""
        settings = self.settings
        rates = parse_rate(settings.upload_limit), parse_rate(settings.download_limit)
        allowed = Allowed(*rates, parse_amount(settings.monthly_transfer))
        return Line(allowed, MonthlyTransfer(self.home.transfer, time.time()), self._on_transfer_spent)

    def _on_transfer_spent(self) -> None:
        """End the round under way and leave, as after Ctrl-C; on the network thread."""
        _logger.warning("this month's transfer is used up: leaving after this round")
        self.owner.leave()

    def _check_transfer(self) -> None:
        if self._line is not None and self._line.spent:
            amount, day = format_amount(self._line.allowed.monthly_bytes), next_month(time.time())
            raise TransferSpentError(
                f"of this month's {amount} too little is left to take part: {self._line.describe()}",
                hint=f"start again on {day} (UTC), or allow more with --monthly-transfer",
            )

    def _await_transfer(self, line: Line) -> None:
        """Return once there is transfer left, in the next month or because the owner allows more.

        A supervisor would only start a peer that ends over and over, and nobody would start it when the month is over.
        """
        if not line.spent:
            return
        day, began = next_month(time.time()), time.monotonic()
        self.display.say(f"waits until {day} (UTC): of this month's transfer too little is left: {line.describe()}")
        notify("READY=1")
        with self._doing(f"waiting until {day} (UTC), as this month's transfer is used up"):
            while line.spent:
                time.sleep(TRANSFER_LOOK_SECONDS)
        self._wait_until += time.monotonic() - began

    def own_run(self) -> Run | None:
        """The run that this home is in."""
        try:
            signed = self.home.manifest.read_bytes()
        except FileNotFoundError:
            return None
        manifest, run_id = open_manifest(signed)
        return Run(manifest, run_id, signed, founder=False, grant=self.own_grant(run_id))

    def own_grant(self, run_id: bytes) -> Grant | None:
        """The grant by which this home is in a run, where it is a guest of it."""
        return read_grant(self.home, self.node.peer_id, run_id)

    def enter_run(self, run: Run, *, own_model: bool = False) -> None:
        """Make this home one of that run.

        Args:
            own_model: whether this process brings a model of its own.

        Raises:
            ModelError: the run wants one and there is none, or the other way around; or this machine cannot build it.
            AccessError: the run is for some peers, and this is none of them.
            HomeError: it is one of another.
        """
        if run.manifest.own_model is not None and not own_model:
            raise ModelError(
                f"the run {run.manifest.name!r} trains a model of its owner's own",
                hint="take part from Python, with that model: p2ptrain.join(ADDR, model=model); see docs/own-model.md",
            )
        if run.manifest.own_model is None and own_model:
            raise ModelError(
                f"the run {run.manifest.name!r} trains a model that its manifest describes, not one of one's own",
                hint="p2ptrain join ADDR",
            )
        if run.manifest.task_config is not None:
            check_model(run.manifest.task_config)
        listed = run.manifest.beginning(run.run_id).access.admits(self.node.peer_id)
        if not listed and run.grant is None:
            raise joining.not_listed(run.run_id)
        own = self.own_run()
        if own is not None and own.run_id != run.run_id:
            raise HomeError(
                f"home {self.home.path} is in the run {own.manifest.name!r} ({own.run_id.hex()[:16]})",
                hint="choose another home with --home DIR",
            )
        if own is None:
            atomic_write(self.home.manifest, run.signed, durable=True)
        if run.grant is not None and not listed:
            atomic_write(self.home.grant, msgspec.msgpack.encode(run.grant), durable=True)
        self._reach = Reachability(
            self.node,
            run.run_id,
            run.manifest.records_key,
            announced=bool(self.settings.announce),
            say=self.display.say,
        )
        # Beside what else comes before the first round.
        self._reaching = self.network.spawn(self._look_around(run, self._reach))

    async def _look_around(self, run: Run, reach: Reachability) -> None:
        secret = run.manifest.records_key
        looking = joining.refuse_second_self(self.node, run.run_id, secret, self.home.identity)
        await asyncio.gather(looking, reach.check())

    def found_run(self, manifest: Manifest) -> Run:
        """Sign a manifest with this home's owner key; if such a run lives in the DHT already, this peer joins it."""
        key = self.home.load_or_create_owner_key()
        signed = sign_manifest(manifest, key, format_peer_id(self.node.peer_id))
        opened, run_id = open_manifest(signed)
        records = self.network.run(self.node.read_peers(run_id, opened.records_key), READ_RUNS_SECONDS)
        lives = bool(records.keys() - {self.node.peer_id})
        if not lives and self.node.known_peers and not self.home.manifest.exists():
            looking = joining.same_run_elsewhere(self.node, opened, run_id)
            elsewhere = self.network.run(looking, 2 * READ_RUNS_SECONDS)
            if elsewhere is not None:
                other, address = elsewhere
                raise RunChoiceError(
                    f"this run.toml was bootstrapped by another owner already, and lives here as {other.hex()[:16]}",
                    hint=f"take part in it: p2ptrain join {address or 'ADDR --run ' + other.hex()[:16]}",
                )
        if lives:
            _logger.info("this run lives already: joining it")
        return Run(opened, run_id, signed, founder=not lives)

    def find_run(self, addresses: list[str], choice: str | None, invitation: Invitation | None = None) -> Run:
        """Find the run that the peers at `addresses` are in, or the one of that name or id.

        Without a choice this home goes back to its own, unless all of them are in others.

        Raises:
            RunChoiceError: none, or several and no choice made.
            AccessError: it is for some peers, and this is none; or the invitation is refused, or to another run.
            RevokedError: its owner has shut this peer out.
        """
        own = self.own_run()
        grant = None if own is None else own.grant
        if invitation is not None:
            grant = invitation.grant(self.node.peer_id)

        def find() -> bytes:
            finding = joining.find_run(self.node, addresses, choice, None if own is None else own.signed, grant)
            return self.network.run(finding, FIND_RUN_SECONDS)

        with self._doing("asking which run there is"):
            signed = self.patiently(find)
        manifest, run_id = open_manifest(signed)
        introducers = frozenset(parse_addresses(addresses, own_peer_id=self.node.peer_id))
        if grant is not None and grant.issued.run_id != run_id:
            if invitation is not None:
                raise joining.not_listed(run_id, "it is to another run")
            grant = None
        return Run(manifest, run_id, signed, founder=False, introducers=introducers, grant=grant)

    def obtain_text(self, run: Run, given: Given | None, share: float | None = None) -> Text:
        """The run's text: from here, from what is given, or from the swarm by its root.

        Args:
            share: of the training text that this peer is to hold, from 0 to 1; None: all.

        Raises:
            DataError, HomeError
        """

        def fetch(file: FileConfig, path: Path) -> None:
            self.fetch_file(run, file, path, "text")

        def fetch_pieces(file: FileConfig, path: Path, pieces: Collection[int]) -> Path:
            return self._fetch(run, file, path, "text", pieces).path

        part = None if share is None else Share(share, self.node.peer_id, fetch_pieces)
        return obtain_text(self.home, run.manifest, given, fetch, self.display, part)

    def obtain_values(self, run: Run, model: Path | None = None) -> Path | None:
        """Return where the run's first values lie, from here or from the swarm; None: they follow from its nonce.

        Args:
            model: a copy of the weights that they are made of.

        Raises:
            DataError: nobody hands them out.
            ModelError: the manifest contradicts itself, or `model` is another.
            HomeError: the disk has no room for them.
            UsageError: the run has no such file.
        """
        config = run.manifest.task_config
        if config is None or config.kind == "code":
            if model is not None:
                raise UsageError("this run starts from no file of weights", hint="leave out --model")
            return None
        check_length(config)
        path = self.home.values(config.values.root)
        if not self._has(config.values, path, "first values"):
            if model is not None:
                place_values(self.home, config, model, self.display)
            elif run.founder:
                raise HomeError(
                    f"home {self.home.path} lacks the first values of this run, which p2ptrain init has made",
                    hint="use the home that they were made in, with --home DIR, or give the weights: --model PATH",
                )
            self.fetch_file(run, config.values, path, "first values")
        return path

    def fetch_beginning(self, run: Run, own: Beginning) -> None:
        """Have the beginning of a run of somebody's own model in this home: `own`, if it is that, or the swarm's.

        Raises:
            DataError: nobody hands it out.
            ModelError: the manifest contradicts itself, or `own` changes while it is written.
            HomeError: the disk has no room for it.
        """
        config = run.manifest.own_model
        assert config is not None
        check_length(config)
        if self._has(config.values, self.home.beginning, "first values"):
            return
        if own.config() != config:
            self.fetch_file(run, config.values, self.home.beginning, "first values")
            return
        written, file = own.write(self.home.beginning)
        if written != config:
            raise ModelError("the model changes while its first values are written", hint="train it once it is in")
        self.files[bytes.fromhex(config.values.root)] = file

    def fetch_file(self, run: Run, config: FileConfig, path: Path, what: str) -> None:
        """Have a file of the run at `path` of this home, from there or from the swarm, and hand it out from then on.

        Args:
            what: it is, for people.

        Raises:
            DataError: nobody hands it out.
            HomeError: the disk has no room for it.
        """
        if self._has(config, path, what):
            return
        self.files[bytes.fromhex(config.root)] = self._fetch(run, config, path, what)

    def _fetch(
        self, run: Run, config: FileConfig, path: Path, what: str, pieces: Collection[int] | None = None
    ) -> PieceFile:
        wanted = RunFile(config.bytes, bytes.fromhex(config.root))
        client = Client(self.node, Traffic(line=self._line), run.run_id, grant=run.grant)
        progress, key = self.display.transfer, run.manifest.records_key
        fetching = fetch_file(client, wanted, path, run.introducers, key, progress, what, pieces)
        with self._doing(f"fetching the run's {what}"):
            return self.network.run(fetching, CORPUS_SECONDS + config.bytes / RATE_MIN_BYTES)

    def _has(self, config: FileConfig, path: Path, what: str) -> bool:
        """Say whether a file of the run is at `path` already; if so, it is handed out."""
        wanted = RunFile(config.bytes, bytes.fromhex(config.root))
        file = whole(path, wanted, lambda done, of: self.display.transfer(f"{what}, what is here already", done, of))
        if file is not None:
            self.files[wanted.root] = file
        return file is not None

    # ---- training ---------------------------------------------------------------------------------------------

    def train(self, run: Run, text: Text, values: Path | None) -> None:
        """Take part in the run, with its text, until its end, the round limit, or Ctrl-C.

        Args:
            values: as `obtain_values` returns them.

        Raises:
            DivergenceError: this device does not compute the run's bits.
            HomeError: the checkpoint cannot be used.
            UnreachableError: before this peer had any round, all who had one were gone.
            TransferSpentError: this month's transfer is used up, and this peer has left.
        """
        with self._volunteering():
            if self._may_begin():
                self._train_and_rest(run, text, values)

    def _train_and_rest(self, run: Run, text: Text, values: Path | None) -> None:
        device = choose_device(self.settings.device, parse_amount(self.settings.gpu_memory))
        own_threads = this_machine().threads if self._ranks is None else self._ranks.threads
        torch.set_num_threads(self.settings.threads or own_threads)
        load_no_compiler()
        with self._doing("loading and checking compiled loops, or compiling them"):
            make_ready(device)
        give_back()
        part: Part | None = self._begin(run, text, values, device)
        assert part is not None
        self._print_join_line(part.addresses)
        notify("READY=1")
        with self._signals():
            self._train(part)
            # What ends training without a failure, and is neither of these, is a pause, however short.
            while not self.owner.stopping and not self.reached_end(part.trainer):
                presence, announcing = part.presence, part.announcing
                self._rest(part)
                # Nothing may hold the model any more.
                part = None
                self._give_memory_back()
                if self.owner.wanted:
                    seconds = time.monotonic() - self.owner.wanted_at
                    _logger.info("memory was given back %.1f s after the machine was wanted", seconds)
                self.owner.await_resume(self.inbox)
                if self.owner.stopping:
                    self._say_leaving(presence, announcing)
                    self._check_transfer()
                    return
                announcing.cancel()
                self.owner.paused, self.owner.doing = False, "resuming"
                part = self._begin(run, text, values, device)
                self.display.say(f"resumed at round {part.trainer.replica.chain.round:,}")
                if self.owner.trains_on:
                    self._train(part)
            self.finish(part)
        self.say_leaving(part)
        if not self._finished:
            self._check_transfer()

    def _begin(self, run: Run, text: Text, values: Path | None, device: torch.device) -> Part:
        """Build this home's replica and begin to take part, at the start or after a pause."""
        train, status = text.train, Status()
        # What is left in the old one is of a driver that has ended.
        inbox = self.inbox = self._make.inbox()

        def make(books: Books) -> Participant:
            more: dict[str, Any] = {} if train.mask is None else {"mask": train.mask}
            if self._ranks is not None:
                path = "" if values is None else str(values.resolve())
                self._ranks.begin(RanksBeginning(run.signed, path, device.type, self.settings.recompute))
                more["ranks"] = self._ranks
            trainer = self._make.trainer(books, train.tokens, train.bytes_per_token, inbox, status, **more)
            if self._make == Make():
                # Benchmarks time what they compute themselves.
                trainer.try_out(self.settings, this_machine())
                self._say_pace(run.manifest, trainer.passes.seconds_a_sequence)
            return trainer

        task = task_of(run.manifest, values, self._make.model)
        with self._doing("taking up what this home holds"):
            return self.take_part(run, task, device, make, _held_out(run.manifest, task, text))

    @contextlib.contextmanager
    def _doing(self, what: str) -> Iterator[None]:
        """Have this thread wait for something that may take long, and its owner know."""
        self.owner.doing = what
        with told_while(what, self.display.say):
            yield

    # ---- pausing ----------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _volunteering(self) -> Iterator[None]:
        """Have the owner know at any time whether this machine is wanted, where this peer is a volunteer."""
        self.owner.may_pause = True
        wish = self.settings.volunteer
        if not wish.enabled:
            yield
            return
        use = looker(wish.not_while)
        watch = Watch(wish, use.look, lambda verdict: self.owner.want(verdict.why), use.missing)
        self.owner.volunteering = watch.summary
        watch.start()
        try:
            yield
        finally:
            watch.close()

    def _may_begin(self) -> bool:
        """Return once the machine is not wanted, before anything is built; False: this peer is to leave instead."""
        if self.owner.wanted:
            self.display.say(f"waits until this machine is not wanted: {self.owner.wanted}")
            notify("READY=1")
            self.owner.paused = True
            self.owner.await_resume(self.inbox)
            self.owner.paused = False
        return not self.owner.stopping

    def _rest(self, part: Part) -> None:
        """Save, say goodbye to all, and be listed as paused.

        Others train on at once, as after any goodbye. To stay a member that sends nothing would cost them a wait, and
        to follow the chain their upload.
        """
        why = self.owner.why_paused
        part.trainer.keep_gradient()
        if self._ranks is not None:
            self._ranks.rest()
        self._tell(part.driver, part.presence, part.status)
        self.display.round(part.status, last=True)
        # A checkpoint holds a moment, and rounds that come after it are in the journal: neither waits for the other.
        patience = GOODBYE_SECONDS if self.owner.pause_until is not None else HURRY_SECONDS
        retiring = self.network.spawn(part.driver.retire(patience))
        part.trainer.save()
        try:
            retiring.result(STOP_SECONDS)
        except TimeoutError:
            retiring.cancel()
        self._driver = self.owner.driver = None
        self.network.loop.call_soon_threadsafe(part.presence.rest)
        self.owner.paused = True
        self._report_stop(part.status, why, paused=True)
        goes_on = "go on: p2ptrain resume" if self.owner.pause_until is not None else "it goes on by itself"
        self.display.say(f"paused at round {part.trainer.replica.chain.round:,}: {why}; {goes_on}")

    def _give_memory_back(self) -> None:
        give_back()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()

    def take_part(
        self,
        run: Run,
        task: Task,
        device: torch.device | None,
        make: Callable[[Books], Participant],
        method: Method | None = None,
    ) -> Part:
        """Restore this home's replica of `task`, and begin to take part in the run.

        Args:
            device: where to compute; None: where the task's module is.
            make: of the home's books, who computes gradients.
            method: measures the model in this peer's turns; None: they pass.

        Raises:
            HomeError: the checkpoint cannot be used.
        """
        reach, reaching = self._reach, self._reaching
        assert reach is not None and reaching is not None
        with contextlib.suppress(TimeoutError):
            reaching.result(REACH_SECONDS)
        self.owner.known = {
            "run": run.manifest.name,
            "run_id": run.run_id.hex(),
            "last_round": run.manifest.last_round or None,
            "peer_id": format_peer_id(self.node.peer_id),
            "dialable": reach.tried.dialable,
        }
        line = self._line
        ceiling = (lambda: MOST_KBIT) if line is None else (lambda: line.ceiling_kbit)
        uplink = self._uplink = self._uplink or UplinkMeter(
            dialable=reach.tried.dialable is not False, ceiling_kbit=ceiling
        )
        own_log = OwnLog(self.home.own)
        journal = Journal(self.home.journal, run.run_id, verify)
        replica = Replica(run.manifest, run.run_id, device, task)
        kept = Kept(self.settings.checkpoints_kept, self.settings.checkpoint_kept_every)
        books = Books(replica, self.node.peer_id, self.home.checkpoints, own_log, self._disk.submit, kept)
        trainer = make(books)
        trainer.checkpoint_every = self.settings.checkpoint_every or None
        status = trainer.status
        evaluated = run.manifest.evaluated
        if evaluated is not None:
            every, last = evaluated.every_rounds, run.manifest.last_round
            trainer.measuring = Measuring(every, self.node.peer_id, task, method, last_round=last)
            self._history = History(self.home.evaluations, tokenizer_of_run(run.manifest))
        trainer.restore(journal)
        give_back()
        name = self.settings.name or format_peer_id(self.node.peer_id)[-8:]
        shown_device = str(device or task.parameters[0].tensor.device)
        log = EventLog(self.home.events)
        if self.settings.metrics or self.sinks:
            if self._metrics is None:
                self._metrics = Metrics([*sinks_of(self.settings.metrics, time.time), *self.sinks])
            log.listeners.append(self._metrics)
        reporter = Reporter(log, SealLog(self.home.seals), replica.codec.chunks)
        reporter.started(run.manifest, run.run_id, self.node.peer_id, name, shown_device, replica.chain)
        reporter.begin(replica.chain, journal)
        self._reporter = reporter
        driver = self._start_driver(run, replica, journal, own_log, uplink, reporter)
        presence = Presence(
            self.node,
            driver,
            replace(status),
            run_id=run.run_id,
            run_name=run.manifest.name,
            signed_manifest=run.signed,
            name=name,
            device=shown_device,
            addresses=reach.addresses,
            secret=run.manifest.records_key,
            grant=b"" if run.grant is None else msgspec.msgpack.encode(run.grant),
        )
        presence.told = reporter.looked
        announcing = self.network.spawn(self._announce(presence, reach, uplink))
        return Part(trainer, driver, presence, status, announcing, reach)

    async def _announce(self, presence: Presence, reach: Reachability, uplink: UplinkMeter) -> None:
        """Keep records, and what is known of how others can dial this peer, up to date until cancelled."""

        def changed(before: list[str]) -> None:
            presence.addresses = reach.addresses
            self.owner.known = {**self.owner.known, "dialable": reach.tried.dialable}
            if reach.addresses[:1] != before[:1]:
                self._write_address(reach.addresses)
                for address in reach.addresses[:1]:
                    self.display.say(f"others can join at a new address: p2ptrain join {address}")

        reach.uplink, reach.on_change = uplink, changed
        uplink.dialable = reach.tried.dialable is not False
        presence.addresses = reach.addresses
        self._write_address(reach.addresses)
        beside = asyncio.create_task(reach.run())
        beside.add_done_callback(failure_logged(_logger, "finding out whether others can dial this peer has failed"))
        try:
            await presence.run()
        finally:
            await cancel_and_wait([beside])

    def _write_address(self, addresses: list[str]) -> None:
        with contextlib.suppress(OSError):
            atomic_write(self.home.address, "\n".join(addresses[:1]).encode())

    def _start_driver(
        self,
        run: Run,
        replica: Replica,
        journal: Journal,
        own_log: OwnLog,
        uplink: UplinkMeter,
        reporter: Reporter,
    ) -> RoundDriver:
        parts = driver_parts(
            run,
            self.home,
            self.node,
            replica,
            journal=journal,
            own_log=own_log,
            inbox=self.inbox,
            uplink=uplink,
            files=self.files,
            sync_progress=self._fetching,
            reporter=reporter,
            traffic=Traffic(line=self._line),
            room=self._room(run.manifest, replica.layout.chunks),
        )

        async def start() -> RoundDriver:
            driver = RoundDriver(parts)
            await driver.start()
            return driver

        self._driver = self.owner.driver = self.network.run(start(), START_SECONDS)
        return self._driver

    def _room(self, manifest: Manifest, chunks: int) -> Room | None:
        """Return what keeps this home to the size that its owner allows; None: any."""
        most_bytes = parse_amount(self.settings.max_disk)
        if not most_bytes:
            return None
        task, file = manifest.task_config, manifest.data.token_file
        needed = {file.root for file in (file, None if task is None else task.values) if file is not None}
        return Room(self.home, most_bytes, needs_of(manifest, chunks).next_bytes, frozenset(needed))

    def _fetching(self, what: str, done: int, total: int) -> None:
        self._fetched_at = self.network.loop.time()
        self.display.transfer(what, done, total)

    def _await_chain(self, driver: RoundDriver, manifest: Manifest) -> Future[None]:
        """Begin to watch, until there are rounds, whether anyone has them; if nobody has, the trainer ends."""

        machine = driver.machine
        waiting = self.network.spawn(
            joining.await_chain(
                manifest, driver.feed, lambda: machine.head.round, lambda: self._fetched_at, self.display.say
            )
        )

        def ended(waiting: Future[None]) -> None:
            # Not before the error is there for the trainer's thread to find.
            if not waiting.cancelled() and waiting.exception() is not None:
                self.inbox.put(None)

        waiting.add_done_callback(ended)
        return waiting

    def _train(self, part: Part) -> None:
        trainer = part.trainer
        assert isinstance(trainer, Trainer)
        if not self.reached_end(trainer):
            self._run(trainer, part.driver, part.presence, part.status)

    def _run(self, trainer: Trainer, driver: RoundDriver, presence: Presence, status: Status) -> None:
        with self.following(trainer, driver, presence, status) as (swarm, after_round):
            trainer.run(swarm, after_round)

    @contextlib.contextmanager
    def following(
        self, trainer: Participant, driver: RoundDriver, presence: Presence, status: Status
    ) -> Iterator[tuple[Swarm, Callable[[], bool]]]:
        """Give what `trainer` needs to follow the swarm: whom it hands over to, and what to call after a round.

        Raises:
            HomeError: at the end, if this peer could not write to its home.
            RevokedError: the run's owner has shut this peer out.
            UnreachableError: before this peer had any round, all who had one were gone.
        """
        swarm = Link(self.network.loop.call_soon_threadsafe, driver)
        saved_at = time.monotonic()

        def after_round() -> bool:
            nonlocal saved_at
            ended = self.reached_end(trainer)
            standing = self._tell(driver, presence, status)
            if trainer.replica.chain.round <= standing.head_round:
                self.display.round(status)
            if time.monotonic() - saved_at > PEERS_SECONDS:
                saved_at = time.monotonic()
                # Not waited for: a network thread that is busy must not hold up training.
                self.network.spawn(self._remember_peers()).add_done_callback(
                    failure_logged(_logger, "writing down the peers once seen has failed")
                )
            return self.owner.trains_on and not ended

        waiting = self._await_chain(driver, trainer.replica.manifest)
        telling = self.network.spawn(self._tell_while_waiting(driver))
        try:
            try:
                yield swarm, after_round
            except Exception as error:
                self.network.loop.call_soon_threadsafe(driver.write_decisions, repr(error))
                raise
            failure = driver.standing.failure
            if failure is not None:
                raise HomeError(f"cannot write to home {self.home.path}: {failure}", hint="make room, then start again")
            if driver.standing.revoked:
                raise joining.revoked(trainer.replica.run_id)
            if not waiting.cancel():
                waiting.result()
        finally:
            waiting.cancel()
            telling.cancel()

    async def _tell_while_waiting(self, driver: RoundDriver) -> None:
        """Say what is waited for in rounds; before there are any, `await_chain` does."""
        while not driver.machine.head.round:
            await asyncio.sleep(STOPPING_LOOK_SECONDS)
        await tell_while_waiting(driver, lambda: (driver.machine.head.id, self._fetched_at), self.display.say)

    def _tell(self, driver: RoundDriver, presence: Presence, status: Status) -> Standing:
        """Each thread hears, in a value that is its own, what the other knows."""
        standing = driver.standing
        status.finished = self._finished
        reporter = self._reporter
        if reporter is not None:
            status.exchange_seconds = reporter.exchange_seconds
        status.take(standing)
        if self._history is not None:
            own = () if status.measured is None else ((self.node.peer_id, status.measured),)
            new = self._history.hear((*own, *presence.said))
            status.evaluation = self._history.summary(status.turns)
            for evaluation in new:
                self.display.evaluated(evaluation)
                if reporter is not None:
                    reporter.measured(evaluation)
        if reporter is not None:
            reporter.worked(status)
        self.owner.status = replace(status)
        self.network.loop.call_soon_threadsafe(presence.hear, replace(status))
        return standing

    def reached_end(self, trainer: Participant) -> bool:
        """Say whether the run, or this peer's part in it, is over."""
        last = trainer.replica.manifest.last_round
        self._finished = bool(last) and trainer.replica.chain.round >= last
        return self._finished or (self._rounds is not None and trainer.rounds_applied >= self._rounds)

    def finish(self, part: Part) -> None:
        """Save; after the run's last round stay a while for those who lack it."""
        part.trainer.save()
        if self._finished and part.trainer.measuring is not None and part.trainer.measuring.under_way:
            self.display.say("measuring the model of the run's last round")
            part.trainer.finish_measuring(lambda: self.owner.stopping)
        self._tell(part.driver, part.presence, part.status)
        self._say_end(part.trainer, part.status)
        if self._finished:
            self._linger(part.driver, part.trainer)

    def say_leaving(self, part: Part) -> None:
        """Have others know, which is worth one short attempt."""
        self._report_stop(part.status, "the run is finished" if self._finished else "it was told to")
        self._say_leaving(part.presence, part.announcing)

    def _report_stop(self, status: Status, why: str, paused: bool = False) -> None:
        if self._reporter is not None:
            self._reporter.stopped(status, why, paused)
            self._reporter = None

    def _say_leaving(self, presence: Presence, announcing: Future[None]) -> None:
        announcing.cancel()
        with contextlib.suppress(TimeoutError):
            self.network.run(presence.say_leaving(), FAREWELL_SECONDS)

    def _linger(self, driver: RoundDriver, trainer: Participant) -> None:
        """Stay until those who are there have the last round too: they may lack a reply that we hold."""
        deadline = time.monotonic() + FINISH_SECONDS
        waiting = self.network.spawn(driver.others_reach(trainer.replica.chain.round))
        while time.monotonic() < deadline and not self.owner.stopping:
            with contextlib.suppress(TimeoutError):
                waiting.result(STOPPING_LOOK_SECONDS)
                return
        waiting.cancel()

    def _say_end(self, trainer: Participant, status: Status) -> None:
        self.display.round(status, last=True)
        self.display.close()
        _logger.info(
            "%s at round %d: state %s, parameters sha256 %s",
            "the run is finished" if self._finished else "stopping",
            trainer.replica.chain.round,
            trainer.replica.chain.id.hex(),
            trainer.replica.parameters_sha256(),
        )

    def _say_pace(self, manifest: Manifest, seconds_a_sequence: float) -> None:
        flops = flops_a_token(manifest) * manifest.context / max(seconds_a_sequence, 1e-9)
        self.display.say(needs_of(manifest, machine=this_machine()).pace(flops))

    def _print_join_line(self, addresses: list[str]) -> None:
        """The one line that others need; what scripts read is all of it."""
        if addresses:
            print(f"Join with:  p2ptrain join {addresses[0]}", flush=True)
            where = where_it_works(addresses[0])
            if where:
                self.display.say(where)
        else:
            print("No other peer can dial this one: it takes part, and others join at other peers.", flush=True)

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """First Ctrl-C, SIGTERM or SIGHUP: end the round under way and leave. Second: leave now."""

        def handle(number: int, frame: FrameType | None) -> None:
            if number == signal.SIGHUP and self.owner.stopping:
                return  # a terminal that closes says so after Ctrl-C, too
            if self.owner.stopping:
                raise KeyboardInterrupt
            in_round = self.owner.leave()
            sys.stderr.write("\nleaving after this round; again to leave now\n" if in_round else "\nleaving\n")

        numbers = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as under nohup
            numbers.append(signal.SIGHUP)
        before = {number: signal.signal(number, handle) for number in numbers}
        try:
            yield
        finally:
            for number, old in before.items():
                signal.signal(number, old)

    # ---- peers once seen --------------------------------------------------------------------------------------

    def _remembered_peers(self) -> list[str]:
        try:
            found = json.loads(self.home.peers.read_text())
        except (OSError, ValueError):
            return []
        return [text for text in found if isinstance(text, str)][:32] if isinstance(found, list) else []

    async def _remember_peers(self) -> None:
        """Write them down; on the network thread."""
        known = self.node.known_addresses()[:64]
        if known:
            with contextlib.suppress(OSError):
                atomic_write(self.home.peers, json.dumps(known).encode())
