"""What happened to a peer, as JSON lines in its home: the one stream that every view of the past draws from.

Each line is an object with `v` (the version of this schema), `t` (Unix seconds when it was written), `kind`, and what
belongs to that kind (docs/watching.md lists them all). Within a version kinds and fields are only added, and a reader
passes over what it does not know. Files are bounded: the newest is `events.jsonl`, full ones are `events-N.jsonl`, and
of those the oldest go.

Cost: one append of half a kilobyte or so a round, and of some hundred bytes whenever another peer changes.
"""

from __future__ import annotations

import contextlib
import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import msgspec

VERSION = 1
FILE_BYTES = 8 * 2**20
FILES_KEPT = 8
NEWEST = "events.jsonl"

_logger = logging.getLogger(__name__)


class Happened(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind"):
    """Base of all events. Peers are named by their ids as text, states by the hexadecimal of theirs."""

    t: float = 0.0
    """Unix seconds; filled in when it is written."""
    v: int = VERSION


class Started(Happened, frozen=True, kw_only=True, tag="started"):
    """This peer begins to take part in a run."""

    run_id: str
    run: str
    peer_id: str
    name: str
    device: str
    version: str
    protocol: int
    round: int
    state_id: str
    last_round: int = 0
    """Of the run; 0: it has none."""


class MemberLine(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """One member of a round, as its seal has it."""

    peer_id: str
    included: bool
    weight: int
    """Sequences behind its contribution."""
    parts: int
    """That it reduced, or was to."""
    owed: int
    """Of them those without a reply."""


class Sealed(Happened, frozen=True, kw_only=True, tag="sealed"):
    """A round was decided, and this peer has taken it in."""

    round: int
    state_id: str
    parent: str
    total: int
    sealer: str
    place: int
    """Of the sealer in the round's order: 0 in its turn, more after those before it were given up; -1: none there."""
    solo: bool
    members: list[MemberLine]
    joins: list[str] = []
    expelled: list[str] = []
    let_in: list[str] = []
    shut_out: list[str] = []
    accused: str = ""
    root: str = ""

    #: what of a round counts as a takeover
    turn: ClassVar[int] = 0


class RolledBack(Happened, frozen=True, kw_only=True, tag="rolled_back"):
    """The last rounds were undone, as another branch is the better one; the chain stands at `round` again."""

    round: int
    state_id: str


class ChangedChain(Happened, frozen=True, kw_only=True, tag="changed_chain"):
    """This peer fetched the state of others, and goes on from there."""

    round: int
    state_id: str
    common: bool
    """Whether its own chain went through that state, too."""


class Worked(Happened, frozen=True, kw_only=True, tag="worked"):
    """What a round cost this peer, and what it came to."""

    round: int
    loss: float | None
    """Train loss in nats a token."""
    bits_per_byte: float | None
    tokens_per_second: float
    computing_seconds: float
    exchange_seconds: float
    disk_seconds: float
    waiting_seconds: float
    """For others and for the seal: what is left of the round."""
    bytes_sent: int
    bytes_received: int
    consumed_share: float


class Heard(Happened, frozen=True, kw_only=True, tag="heard"):
    """What another peer's record says: when that peer is new or has changed, and once a minute."""

    peer_id: str
    name: str
    state: str
    """`lost` where it is too old to be true."""
    round: int
    state_id: str
    tokens_per_second: float
    loss: float | None
    device: str
    version: str
    path: str


class Measured(Happened, frozen=True, kw_only=True, tag="measured"):
    """A peer says what it has measured of the model in its turn."""

    round: int
    state_id: str
    by: str
    figures: dict[str, float]
    tokens: int


class Noted(Happened, frozen=True, kw_only=True, tag="noted"):
    """Something an owner should read: a takeover, a fork, a refusal, a warning."""

    what: str
    """A word for programs: `takeover`, `fork`, `solo`, `refused`, `left_out`, ..."""
    text: str


class Stopped(Happened, frozen=True, kw_only=True, tag="stopped"):
    """This peer takes no part any more, or not for a while."""

    round: int
    why: str
    paused: bool = False
    """It will go on."""


Event = Started | Sealed | RolledBack | ChangedChain | Worked | Heard | Measured | Noted | Stopped
KINDS: tuple[type[Happened], ...] = (
    Started,
    Sealed,
    RolledBack,
    ChangedChain,
    Worked,
    Heard,
    Measured,
    Noted,
    Stopped,
)

_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(Event)


class EventLog:
    """Writes events into a folder; any thread.

    What cannot be written, as on a full disk, is left out with one warning: no peer stops for that.

    Args:
        folder: made when the first event comes.
        clock: Unix seconds.
    """

    def __init__(self, folder: Path, clock: Callable[[], float] = time.time) -> None:
        self.folder, self._clock = folder, clock
        self._lock = threading.Lock()
        #: hear each event once it is written, one at a time
        self.listeners: list[Callable[[Event], None]] = []
        self._failed = False

    def write(self, event: Event) -> None:
        """Append an event, with the time of now unless it has one."""
        stamped = event if event.t else msgspec.structs.replace(event, t=round(self._clock(), 3))
        line = _encoder.encode(stamped) + b"\n"
        with self._lock:
            try:
                self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
                path = self.folder / NEWEST
                with path.open("ab") as file:
                    file.write(line)
                    full = file.tell() >= FILE_BYTES
                if full:
                    self._rotate(path)
            except OSError as error:
                if not self._failed:
                    _logger.warning("events are not written any more: %s", error)
                self._failed = True
            for listener in self.listeners:
                listener(stamped)

    def _rotate(self, path: Path) -> None:
        old = _numbered(self.folder)
        path.rename(self.folder / f"events-{(_number(old[-1]) if old else 0) + 1:08d}.jsonl")
        for oldest in old[: max(0, len(old) + 2 - FILES_KEPT)]:
            oldest.unlink(missing_ok=True)


def read_events(folder: Path, since: float = 0.0) -> Iterator[Event]:
    """Yield what happened, oldest first; nothing where nothing was written.

    Args:
        since: Unix seconds.
    """
    for path in [*_numbered(folder), folder / NEWEST]:
        with contextlib.suppress(OSError), path.open("rb") as file:
            for line in file:
                event = read_line(line)
                if event is not None and event.t >= since:
                    yield event


def read_line(line: bytes) -> Event | None:
    """Decode a line; None: it is cut short, or of a kind that this version does not know."""
    try:
        return _decoder.decode(line)
    except msgspec.MsgspecError:
        return None


class Tail:
    """Reads what is new in a folder of events at each call; a file that was rotated away is read to its end first.

    The first call reads the newest file and the one before it, which together hold some thousands of rounds.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        #: of the file that was read last, and how far; None: nothing was read yet
        self._inode: int | None = None
        self._at = 0

    def read(self) -> list[Event]:
        """Return the events written since the last call, in order."""
        found: list[Event] = []
        for path in [*_numbered(self._folder)[-1:], self._folder / NEWEST]:
            with contextlib.suppress(OSError), path.open("rb") as file:
                inode = _inode(path)
                if path.name != NEWEST and self._inode not in (inode, None):
                    continue
                file.seek(self._at if inode == self._inode else 0)
                data = file.read()
                whole = data.rfind(b"\n") + 1
                self._inode, self._at = inode, file.tell() - len(data) + whole
                found += filter(None, map(read_line, data[:whole].splitlines()))
        return found


def _inode(path: Path) -> int:
    return path.stat().st_ino


def _numbered(folder: Path) -> list[Path]:
    return sorted(folder.glob("events-*.jsonl"))


def _number(path: Path) -> int:
    with contextlib.suppress(ValueError):
        return int(path.stem.partition("-")[2])
    return 0


def schema() -> dict[str, Any]:
    """Return the JSON schema of a line, for docs and programs."""
    return dict(msgspec.json.schema(Event))


def as_json(event: Event) -> dict[str, Any]:
    """Return an event as the object that stands in its line."""
    return dict(json.loads(_encoder.encode(event)))
