"""What a person sees while a peer works: a live line on a terminal, plain lines elsewhere. All of it on stderr."""

from __future__ import annotations

import json
import logging
import sys
import threading
import time
from typing import Protocol, TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.status import Status as Spinner

from p2ptrain.observe.evaluations import Evaluation, live_text, said_text
from p2ptrain.observe.status import Status

PLAIN_EVERY_SECONDS = 1.0
"""At most one plain line in this time, so that a log of short rounds stays readable."""


KEPT_EVERY_SECONDS = 10.0
"""Between two rounds that a peer on a terminal leaves in its log."""
WORK_EVERY_SECONDS = 2.0
"""Between two plain lines on work that takes long."""

_shown = logging.getLogger("p2ptrain-shown")
_shown.propagate = False


class Shown(Protocol):
    """What a session says while it works. Any thread, one at a time."""

    def round(self, status: Status, *, last: bool = False) -> None:
        """A round was applied, or, with `last`, the peer stops; on the trainer's thread."""

    def evaluated(self, evaluation: Evaluation) -> None:
        """Somebody, or this peer, says what it has measured of the model; on the trainer's thread."""

    def transfer(self, what: str, done: int, total: int) -> None:
        """Progress of a download or a sync: bytes, or rounds where `what` is "rounds"; on the network thread."""

    def work(self, what: str, done: int, total: int) -> None:
        """Progress of something that takes a while here, in bytes, or rounds where `what` ends with "rounds"."""

    def say(self, text: str) -> None:
        """A line for people."""

    def close(self) -> None:
        """Nothing more comes."""


class Display:
    """See the module docstring. Any thread, one at a time: the network thread shows transfers, the trainer's rounds.

    Args:
        log_format: "json" makes each line one JSON object.
        quiet: show nothing.
    """

    def __init__(self, *, log_format: str = "text", quiet: bool = False, stream: TextIO | None = None) -> None:
        self._json, self._quiet = log_format == "json", quiet
        self._console = Console(file=stream or sys.stderr, highlight=False, soft_wrap=True)
        self._live = self._console.is_terminal and not quiet and not self._json
        self._spinner: Spinner | None = None
        self._bars: Progress | None = None
        self._tasks: dict[str, TaskID] = {}
        self._printed_at = 0.0
        self._said: dict[str, float] = {}
        self._drawing = threading.RLock()

    def round(self, status: Status, *, last: bool = False) -> None:
        """A round was applied; `last`: say so whatever was said a moment ago."""
        with self._drawing:
            self._end_bars()
            if self._quiet:
                return
            now = time.monotonic()
            if self._live:
                if self._spinner is None:
                    self._spinner = self._console.status("")
                    self._spinner.start()
                self._spinner.update("\n".join(lines_of(status)))
                if last or now - self._printed_at >= KEPT_EVERY_SECONDS:
                    self._printed_at = now
                    _shown.info("  ".join(lines_of(status)))
                return
            if last or now - self._printed_at >= PLAIN_EVERY_SECONDS:
                self._printed_at = now
                self._say("  ".join(lines_of(status)), status)

    def evaluated(self, evaluation: Evaluation) -> None:
        """Somebody, or this peer, says what it has measured; a terminal shows the newest beside the rounds."""
        with self._drawing:
            if not self._quiet and not self._live:
                self._say(said_text(evaluation), evaluation=evaluation.as_json())

    def transfer(self, what: str, done: int, total: int) -> None:
        """Progress of a download or a sync: bytes, or rounds where `what` is "rounds"."""
        with self._drawing:
            if self._quiet:
                return
            if self._live:
                self._bar(f"fetching {what}", done, total)
                return
            now = time.monotonic()
            if done >= total or now - self._said.get(what, 0.0) >= PLAIN_EVERY_SECONDS:
                self._said[what] = now
                unit = "" if _in_rounds(what) else " bytes"
                self._say(f"fetching {what}: {done:,} of {total:,}{unit}")

    def work(self, what: str, done: int, total: int) -> None:
        """Progress of something that takes a while here, in bytes or rounds; what is done at once is worth no line."""
        with self._drawing:
            if self._quiet:
                return
            now = time.monotonic()
            began = self._said.setdefault(what, now)
            if done >= total:
                self._end_bars()
                del self._said[what]
            elif self._live:
                if what in self._tasks or now - began >= PLAIN_EVERY_SECONDS:
                    self._bar(what, done, total)
            elif now - began >= WORK_EVERY_SECONDS:
                self._said[what] = now
                self._say(f"{what}: {done:,} of {total:,}{'' if _in_rounds(what) else ' bytes'}")

    def say(self, text: str) -> None:
        """A line for people."""
        with self._drawing:
            if not self._quiet:
                self._say(text)

    def close(self) -> None:
        """Leave the terminal as it was."""
        with self._drawing:
            self._end_bars()
            if self._spinner is not None:
                self._spinner.stop()
                self._spinner = None

    def _say(self, text: str, status: Status | None = None, **more: object) -> None:
        _shown.info(text)
        if self._json:
            entry: dict[str, object] = {"time": round(time.time(), 3), "level": "info", "message": text, **more}
            if status is not None:
                entry |= {
                    "round": status.round,
                    "state_id": status.state_id.hex(),
                    "state": status.state,
                    "train_loss": status.loss,
                    "diverged": status.diverged or None,
                    "train_bits_per_byte": status.bits_per_byte,
                    "tokens_per_second": round(status.tokens_per_second, 1),
                    "members": status.members,
                    "bytes_sent_per_round": status.bytes_sent_per_round,
                    "bytes_received_per_round": status.bytes_received_per_round,
                    "computing_seconds": round(status.computing_seconds, 3),
                    "waiting_seconds": round(status.waiting_seconds, 3),
                    "sequences_read": status.sequences_read,
                    "sequences_given_up": status.sequences_given_up,
                    "snapshots_fetched": status.snapshots_fetched,
                    "measuring_share": round(status.measuring_share, 4),
                }
            text = json.dumps(entry)
        else:
            text = f"{time.strftime('%H:%M:%S')} {text}"
        self._console.print(text, markup=False)

    def _bar(self, what: str, done: int, total: int) -> None:
        if self._bars is None:
            amount = MofNCompleteColumn() if _in_rounds(what) else DownloadColumn()
            self._bars = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                amount,
                TimeRemainingColumn(),
                console=self._console,
                transient=True,
            )
            self._bars.start()
        if what not in self._tasks:
            self._tasks[what] = self._bars.add_task(what, total=total)
        self._bars.update(self._tasks[what], completed=done, total=total)
        if done >= total:
            self._end_bars()

    def _end_bars(self) -> None:
        if self._bars is not None:
            self._bars.stop()
            self._bars, self._tasks = None, {}


def _in_rounds(what: str) -> bool:
    return what.endswith("rounds")


def lines_of(status: Status) -> tuple[str, ...]:
    """One round in two lines of less than 80 columns each, and what was measured of the model in a third."""
    loss = "-" if status.loss is None else f"{status.loss:.3f}"
    bits = "" if status.bits_per_byte is None else f" ({status.bits_per_byte:.3f} bits/byte)"
    members = f"{status.members} member{'' if status.members == 1 else 's'}"
    sent, received = status.bytes_sent_per_round / 1000, status.bytes_received_per_round / 1000
    state = "diverged" if status.diverged else status.state
    lines = (
        f"round {status.round}  {state}  train loss {loss}{bits}  {status.tokens_per_second:,.0f} tokens/s",
        f"{members}  sent {sent:,.1f} kB  received {received:,.1f} kB  "
        f"computed {status.computing_seconds:.1f} s  waited {status.waiting_seconds:.1f} s",
    )
    return lines if status.evaluation is None else (*lines, live_text(status.evaluation))
