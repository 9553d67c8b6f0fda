"""Figures of a peer for the tools that people already look at: Prometheus, TensorBoard, a file of JSON lines, trackers.

A sink hears the events that the peer writes down, so it knows nothing that the events do not. What a sink cannot do, as
when a disk is full or a server is gone, is said once and stops nobody. Libraries are loaded when they are asked for.
"""

from __future__ import annotations

import importlib
import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from p2ptrain.errors import UsageError
from p2ptrain.observe.events import Event, Measured, Sealed, Started, Worked

_ADDRESS = re.compile(r"(?P<host>\[[0-9a-fA-F:]+\]|[\w.-]*):(?P<port>\d{1,5})")
TRACKERS = ("wandb", "trackio")

_logger = logging.getLogger(__name__)


class Sink(Protocol):
    """Where figures go. Any thread, one at a time."""

    def begin(self, labels: Mapping[str, str]) -> None:
        """Hear whose figures come: `run`, `run_id`, `peer_id`, `name`, `device`, `version`."""

    def figures(self, values: Mapping[str, float], round: int) -> None:
        """Take figures of a round, by their names; of one round they come in several calls."""

    def close(self) -> None:
        """Nothing more comes."""


def figures_of(event: Event, me: str) -> dict[str, float]:
    """Return the figures that an event tells, by their names; none: it tells none.

    Args:
        me: this peer's id.
    """
    match event:
        case Worked():
            given = {
                "train_loss": event.loss,
                "train_bits_per_byte": event.bits_per_byte,
                "tokens_per_second": event.tokens_per_second,
                "computing_seconds": event.computing_seconds,
                "exchange_seconds": event.exchange_seconds,
                "disk_seconds": event.disk_seconds,
                "waiting_seconds": event.waiting_seconds,
                "sent_bytes": event.bytes_sent,
                "received_bytes": event.bytes_received,
                "consumed_share": event.consumed_share,
            }
            return {name: float(value) for name, value in given.items() if value is not None}
        case Sealed():
            own = next((member for member in event.members if member.peer_id == me), None)
            return {
                "members": len(event.members),
                "members_included": sum(member.included for member in event.members),
                "sequences": sum(member.weight for member in event.members),
                "parts_skipped": sum(member.owed for member in event.members),
                "takeover": float(event.place > 0 and not event.solo),
                "included": float(own is not None and own.included),
            }
        case Measured():
            return {f"heldout_{name}": value for name, value in event.figures.items()}
        case _:
            return {}


class Metrics:
    """Passes on to sinks what events tell; called as a listener of an `EventLog`."""

    def __init__(self, sinks: Sequence[Sink]) -> None:
        self._sinks = list(sinks)
        self._me = ""

    def __call__(self, event: Event) -> None:
        """Hear an event."""
        if isinstance(event, Started):
            if self._me:
                return  # after a pause
            self._me = event.peer_id
            wanted = ("run", "run_id", "peer_id", "name", "device", "version")
            labels = {name: str(getattr(event, name)) for name in wanted}
            self._each(lambda sink: sink.begin(labels))
            return
        values = figures_of(event, self._me)
        if values and isinstance(event, Worked | Sealed | Measured):
            self._each(lambda sink: sink.figures(values, event.round))

    def close(self) -> None:
        """End all sinks."""
        self._each(lambda sink: sink.close())

    def _each(self, work: Callable[[Sink], None]) -> None:
        for sink in list(self._sinks):
            try:
                work(sink)
            except Exception as error:
                # Somebody else's library: whatever it raises, the peer trains on.
                _logger.warning("no figures go to %s any more: %r", type(sink).__name__, error)
                self._sinks.remove(sink)


class JsonLines:
    """A file with one object a line: `time`, `round`, and figures."""

    def __init__(self, path: Path, clock: Callable[[], float]) -> None:
        self._path, self._clock = path, clock

    def begin(self, labels: Mapping[str, str]) -> None:
        self._append({"started": dict(labels)})

    def figures(self, values: Mapping[str, float], round: int) -> None:
        self._append({"round": round, **values})

    def _append(self, entry: Mapping[str, Any]) -> None:
        line = json.dumps({"time": self._clock(), **entry})
        with self._path.open("a") as file:
            file.write(line + "\n")

    def close(self) -> None:
        pass


class Prometheus:
    """An endpoint that Prometheus reads: `/metrics` at an address.

    Raises:
        UsageError: the library is not there, or the address is taken.
    """

    def __init__(self, host: str, port: int) -> None:
        self._library = _library("prometheus_client", "metrics")
        self._registry = self._library.CollectorRegistry()
        self._gauges: dict[str, Any] = {}
        self._labels: dict[str, str] = {}
        self._rounds = self._library.Counter(
            "p2ptrain_rounds", "Rounds taken in since this peer started", ["run", "peer"], registry=self._registry
        )
        try:
            self._server, self._thread = self._library.start_http_server(port, host, registry=self._registry)
        except OSError as error:
            raise UsageError(
                f"--metrics {host}:{port}: {error.strerror or error}", hint=f"--metrics {host}:PORT with another port"
            ) from error

    @property
    def port(self) -> int:
        """Where it answers."""
        return int(self._server.server_port)

    def begin(self, labels: Mapping[str, str]) -> None:
        self._labels = {"run": labels["run"], "peer": labels["name"]}
        info = self._library.Info("p2ptrain_peer", "This peer", registry=self._registry)
        info.info(dict(labels))

    def figures(self, values: Mapping[str, float], round: int) -> None:
        if "members" in values:
            self._rounds.labels(**self._labels).inc()
        for name, value in {**values, "round": float(round)}.items():
            gauge = self._gauges.get(name)
            if gauge is None:
                help = name.replace("_", " ")
                gauge = self._library.Gauge(f"p2ptrain_{name}", help, ["run", "peer"], registry=self._registry)
                self._gauges[name] = gauge
            gauge.labels(**self._labels).set(value)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class TensorBoard:
    """Event files for TensorBoard in a folder, in one of their own for each peer.

    Raises:
        UsageError: the library is not there.
    """

    def __init__(self, folder: Path) -> None:
        _library("tensorboard", "metrics")
        self._folder = folder
        self._writer: Any = None

    def begin(self, labels: Mapping[str, str]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(self._folder / f"{labels['run']}-{labels['name']}"), flush_secs=10)

    def figures(self, values: Mapping[str, float], round: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, round)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


class Tracker:
    """Weights & Biases, or trackio, which has the same calls: one run of theirs for each start of the peer.

    Args:
        name: of the library.
        project: of theirs.

    Raises:
        UsageError: the library is not there.
    """

    def __init__(self, name: str, project: str) -> None:
        self._module = _library(name, name)
        self._project = project

    def begin(self, labels: Mapping[str, str]) -> None:
        self._module.init(project=self._project, name=labels["name"], config=dict(labels))

    def figures(self, values: Mapping[str, float], round: int) -> None:
        # Figures of one round come in several calls, and a step that is over takes no more: the round is a figure, too.
        self._module.log({"round": round, **values})

    def close(self) -> None:
        self._module.finish()


def sinks_of(wanted: Sequence[str], clock: Callable[[], float]) -> list[Sink]:
    """Make what `--metrics` names: HOST:PORT, PATH.jsonl, tensorboard:FOLDER, wandb:PROJECT or trackio:PROJECT.

    Args:
        clock: Unix seconds.

    Raises:
        UsageError: it is none of these, or its library is not there.
    """
    made: list[Sink] = []
    for text in wanted:
        kind, _, rest = text.partition(":")
        address = _ADDRESS.fullmatch(text)
        if kind in TRACKERS:
            made.append(Tracker(kind, rest or "p2ptrain"))
        elif kind == "tensorboard":
            made.append(TensorBoard(Path(rest or "tensorboard").expanduser()))
        elif text.endswith(".jsonl"):
            made.append(JsonLines(Path(text).expanduser(), clock))
        elif address is not None and int(address["port"]) < 65536:
            made.append(Prometheus(address["host"].strip("[]") or "127.0.0.1", int(address["port"])))
        else:
            raise UsageError(
                f"--metrics {text}: neither HOST:PORT, PATH.jsonl, tensorboard:FOLDER, wandb:PROJECT nor "
                "trackio:PROJECT",
                hint="--metrics 127.0.0.1:9464",
            )
    return made


def _library(name: str, extra: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        what = f"pip install 'p2ptrain[{extra}]'" if extra == "metrics" else f"pip install {name}"
        raise UsageError(f"--metrics needs {name}, which is not installed", hint=what) from error
