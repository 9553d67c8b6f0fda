"""What a peer's owner wants of it, said by signals or commands, and what it answers.

Wishes come on the main thread (signals) and on the network thread (commands), and the trainer's thread acts on them
after each round. Each wish is one value that is replaced whole, and a None in the trainer's queue wakes it.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import queue
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import msgspec

from p2ptrain import __version__
from p2ptrain.config.amounts import format_amount, parse_amount, parse_rate
from p2ptrain.config.home import Home
from p2ptrain.errors import NotRunningError, UsageError
from p2ptrain.observe.status import Status
from p2ptrain.peer import control
from p2ptrain.peer.driver import RoundDriver
from p2ptrain.peer.waiting import awaited
from p2ptrain.swarm.identity import format_peer_id
from p2ptrain.swarm.line import Allowed, Line
from p2ptrain.swarm.records import ID_END

LEAVE_SECONDS = 15.0
"""A round under way may take this long to end, once the owner wants it to be the last."""
PAUSE_MAX_SECONDS = 366 * 86400.0
LOOK_SECONDS = 0.1
"""Between two looks at whether a command was carried out."""
CLOCK_LOOK_SECONDS = 60.0
"""Between two looks at the clock in a pause: it may be set meanwhile."""
LIMITS = ("upload-limit", "download-limit", "monthly-transfer")
"""Those that can be changed while a peer runs."""
DECISIONS_SHOWN = 40
"""Of the last ones, to an owner who asks why."""

_logger = logging.getLogger(__name__)


class Owner:
    """See the module docstring.

    Args:
        home: where the socket for commands is.
        wake: puts a None in the trainer's queue.
    """

    def __init__(self, home: Home, wake: Callable[[], None]) -> None:
        self._home, self._wake = home, wake
        #: this peer is to leave
        self.stopping = False
        #: until when it is to be paused, by the clock; None: it is to train
        self.pause_until: float | None = None
        #: it is paused
        self.paused = False
        #: why this machine is wanted for something else, where this peer is a volunteer; empty: it is not
        self.wanted = ""
        #: why it was wanted last
        self._why_wanted = ""
        #: since when, by the monotonic clock
        self.wanted_at = 0.0
        #: says what volunteering saw last; None: this peer is no volunteer
        self.volunteering: Callable[[], dict[str, Any]] | None = None
        #: what it does, where it is not in rounds
        self.doing = "starting"
        #: rounds are taken part in by this process's own loop, which can be ended and begun anew
        self.may_pause = False
        #: takes part in rounds; None: not now
        self.driver: RoundDriver | None = None
        #: as the trainer's thread knew it last; never changed
        self.status = Status()
        #: what is known of the run and of this peer, by the names that an answer has
        self.known: dict[str, Any] = {}
        #: holds this peer to its owner's limits; None: not connected yet
        self.limited: Line | None = None
        self._control: control.Control | None = None
        self._began_at = time.time()

    # ---- wishes -----------------------------------------------------------------------------------------------

    @property
    def trains_on(self) -> bool:
        """Whether the next round is to be trained for."""
        return not self.stopping and self.pause_until is None and not self.wanted

    def want(self, why: str) -> None:
        """Take note of why this machine is wanted, empty where it is not, and end training or a pause; any thread.

        A round under way is not waited for. A pause of the owner's own stays.
        """
        before, self.wanted, self._why_wanted = self.wanted, why, why or self._why_wanted
        if bool(before) != bool(why):
            self.wanted_at = time.monotonic()
            self._wake()

    @property
    def why_paused(self) -> str:
        """Why this peer is paused, or is to be."""
        return (
            "its owner has paused it" if self.pause_until is not None else f"this machine is wanted: {self._why_wanted}"
        )

    def leave(self, *, at_once: bool = False) -> bool:
        """Have the round under way be the last, or not even that; any thread. Say whether it is waited for."""
        self.stopping = True
        driver = self.driver
        waits = driver is not None and driver.standing.member and not at_once
        self._end_training_in(LEAVE_SECONDS if waits else 0.0)
        return waits

    def _end_training_in(self, seconds: float) -> None:
        timer = threading.Timer(seconds, self._wake)
        timer.daemon = True
        timer.start()

    def await_resume(self, inbox: queue.SimpleQueue[Any]) -> None:
        """Return when neither the owner nor the machine's use forbids training, or this peer is to leave.

        For the trainer's thread.

        Args:
            inbox: what `wake` puts its None in.
        """
        while not self.stopping and not self.trains_on:
            until = self.pause_until
            left = math.inf if until is None else until - time.time()
            if left <= 0:
                self.pause_until = None
                continue
            try:
                inbox.get(timeout=min(left, CLOCK_LOOK_SECONDS))
            except queue.Empty:
                continue

    # ---- commands, on the network thread ----------------------------------------------------------------------

    async def listen(self) -> None:
        """Take commands from now on, where the home's file system has sockets."""
        listening = control.Control(self._home.control, self._obey)
        try:
            await listening.start()
        except OSError as error:
            _logger.warning("no commands can be given to this peer: %s: %s", self._home.control, error.strerror)
        else:
            self._control = listening

    async def close(self) -> None:
        """Take no more commands."""
        if self._control is not None:
            await self._control.close()

    async def _obey(self, request: control.Request) -> control.Answer:
        match request:
            case control.Ask(why=why):
                return self._answer(why)
            case control.Pause(seconds=seconds):
                return await self._pause(seconds)
            case control.Resume():
                return await self._resume()
            case control.Limit(key=key, value=value):
                return self._limit(key, value)
            case control.Finish() | control.Leave():
                if self.driver is not None or self.paused:
                    self.leave(at_once=isinstance(request, control.Leave))
                else:
                    # It fetches, or compiles, which nothing else cuts short.
                    os.kill(os.getpid(), signal.SIGINT)
                # This process's end is the answer.
                await asyncio.Event().wait()
                return {}

    async def _pause(self, seconds: float | None) -> control.Answer:
        if self.driver is None and not self.paused:
            raise NotRunningError(
                f"this peer does not train yet: it is {self.doing}", hint="again once it trains, or: p2ptrain leave"
            )
        if not self.may_pause:
            raise UsageError("this peer's loop is a program of its owner's", hint="pause it there: stop calling step")
        if seconds is not None and not 0 < seconds <= PAUSE_MAX_SECONDS:
            raise UsageError(f"a pause of {seconds:g} s", hint="p2ptrain pause 30m, or without a time until resume")
        self.pause_until = math.inf if seconds is None else time.time() + seconds
        self._end_training_in(0.0 if self.paused else LEAVE_SECONDS)
        await self._until(lambda: self.paused or self.pause_until is None)
        return self._answer()

    async def _resume(self) -> control.Answer:
        if self.pause_until is None and not self.paused:
            raise UsageError("this peer is not paused", hint="p2ptrain status")
        owners, self.pause_until = self.pause_until is not None, None
        self._wake()
        if self.wanted and not owners:
            raise UsageError(
                f"this machine is wanted: {self.wanted}",
                hint="this peer goes on by itself once it is not; to train all the same, start it without --volunteer",
            )
        await self._until(lambda: self.driver is not None or bool(self.wanted))
        return self._answer()

    def _limit(self, key: str, value: str) -> control.Answer:
        """Change a limit until this peer ends, and say what holds."""
        line = self.limited
        if line is None:
            raise NotRunningError(f"this peer has no line yet: it is {self.doing}", hint="again in some seconds")
        if key:
            line.limit(self._allowed(line, key, value))
        return {**line.summary(), "home": str(self._home.path)}

    def _allowed(self, line: Line, key: str, value: str) -> Allowed:
        """Return the limits with one changed. Raises UsageError."""
        try:
            match key.replace("_", "-"):
                case "upload-limit":
                    return replace(line.allowed, upload_rate=parse_rate(value))
                case "download-limit":
                    return replace(line.allowed, download_rate=parse_rate(value))
                case "monthly-transfer":
                    allowed = replace(line.allowed, monthly_bytes=parse_amount(value))
                case _:
                    raise UsageError(f"there is no limit {key!r}", hint=f"p2ptrain limits {'|'.join(LIMITS)} VALUE")
        except ValueError as error:
            raise UsageError(f"{key} {value}: {error}", hint=f"p2ptrain limits {key} VALUE") from error
        if line.spends(allowed):
            used = format_amount(line.transfer.used_bytes(time.time()))
            raise UsageError(
                f"{used} were carried this month, so that {value} leave too little to take part",
                hint="allow more, or: p2ptrain leave",
            )
        return allowed

    async def _until(self, condition: Callable[[], bool]) -> None:
        while not condition() and not self.stopping:
            await asyncio.sleep(LOOK_SECONDS)

    def _paused_by(self) -> str:
        if self.driver is not None:
            return "disk"
        return "volunteering" if self.pause_until is None else "owner"

    def line(self) -> str:
        """Say in one line how this peer is; the network thread."""
        answer = self._answer()
        round = f", round {answer['round']:,}" if answer["run"] else ""
        return f"{answer['state']}{round}" + (f": {answer['doing']}" if answer["doing"] else "")

    def _answer(self, why: bool = False) -> control.Answer:
        """Say how this peer is; with `why`, also what it heard and decided last."""
        driver, now, until = self.driver, replace(self.status), self.pause_until
        waits_for, doing = "", self.doing
        if self.stopping:
            state, doing = "leaving", ""
        elif self.paused:
            state, doing = "paused", "" if until is not None else self.wanted
        elif driver is not None:
            driver.publish_standing()
            now.take(driver.standing)
            state, doing, waits_for = now.state, driver.held_up, "" if driver.held_up else awaited(driver)
            now.round = driver.standing.head_round
        else:
            state = "starting"
        answer: control.Answer = {
            "state": state,
            "doing": doing,
            "waits_for": waits_for,
            "run": None,
            **self.known,
            "round": now.round,
            "state_id": now.state_id.hex(),
            "members": now.members if state not in ("paused", "starting") else 0,
            "train_loss": now.loss,
            "tokens_per_second": round(now.tokens_per_second, 1) if state in ("training", "solo") else 0.0,
            "paused_by": None if state != "paused" else self._paused_by(),
            "volunteering": None if self.volunteering is None else self.volunteering(),
            "paused_until": until if state == "paused" and until is not None and math.isfinite(until) else None,
            "home": str(self._home.path),
            "pid": os.getpid(),
            "version": __version__,
            "uptime_seconds": round(time.time() - self._began_at, 1),
        }
        if why:
            answer["decisions"] = [] if driver is None else _decisions(driver)
            refused = None if driver is None else driver.standing.refused
            answer["refused_branch"] = None if refused is None else msgspec.to_builtins(refused)
        return answer


def _decisions(driver: RoundDriver) -> list[str]:
    now = asyncio.get_running_loop().time()
    return driver.machine.decisions.lines(lambda p: format_peer_id(p)[-ID_END:], last=DECISIONS_SHOWN, now=now)
