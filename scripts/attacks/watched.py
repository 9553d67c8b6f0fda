"""The processes of an attack as the one who measures sees them: an honest peer, and the attacker.

A peer is seen from outside: its log, its journal, its memory.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil

from p2ptrain.chain.sealed import SealedRoundError, decode_sealed
from p2ptrain.config.home import Home

P2PTRAIN = [sys.executable, "-m", "p2ptrain"]
HOSTILE = Path(__file__).with_name("hostile.py")
END_SECONDS = 40.0


class NotMeasuredError(Exception):
    """The swarm did not come about, or the attacker was not ready."""


class Peer:
    """One honest peer, and what can be seen of it from outside."""

    def __init__(self, folder: Path, name: str, *command: str) -> None:
        self.name, self.home, self.log = name, folder / name, folder / f"{name}.log"
        self._err = self.log.open("w")
        flags = ["--home", str(self.home), "--name", name, "--host", "127.0.0.1", "--threads", "1"]
        self.process = subprocess.Popen(
            [*P2PTRAIN, *command, *flags, "--log-format", "json"],
            stdout=subprocess.PIPE,
            stderr=self._err,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            start_new_session=True,  # Ctrl-C is for the one who measures
        )
        self.address = ""
        self.began = time.monotonic()
        #: the most memory that it had when it was looked at
        self.peak_bytes = 0
        #: id of each seal that its journal ever held -> when that was seen
        self.seals: dict[str, float] = {}
        self.hostile_seals = 0
        self._files: dict[str, int] = {}
        #: what it has logged: round lines, and all else
        self.rounds: list[dict[str, Any]] = []
        self.said: list[dict[str, Any]] = []
        self._offset = 0
        self.traceback = False
        #: it did not leave when asked, and was killed
        self.hung = False
        self._children: list[psutil.Process] = []

    def started(self) -> str:
        """Wait for the address that it prints."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            found = re.search(r"p2ptrain join (\S+)", line)
            if found:
                self.address = found[1]
                return self.address
        raise NotMeasuredError(f"{self.name} did not start: {self.log.read_text()[-2000:]}")

    def look(self) -> None:
        """Take in what is new in its log and its journal."""
        now = time.monotonic()
        with self.log.open("rb") as log:
            log.seek(self._offset)
            for line in log:
                if not line.endswith(b"\n"):
                    break
                self._offset += len(line)
                self._heard(line)
        for path in sorted(Home(self.home).journal.glob("round-*")):
            # It may have been pruned, or be replaced, at any moment.
            with contextlib.suppress(FileNotFoundError, SealedRoundError):
                written = path.stat().st_mtime_ns
                if self._files.get(path.name) != written:
                    sealed = decode_sealed(path.read_bytes(), lambda *_: True)
                    self._files[path.name] = written
                    self.seals.setdefault(sealed.id.hex(), now)

    def _heard(self, line: bytes) -> None:
        if b"Traceback" in line:
            self.traceback = True
        with contextlib.suppress(ValueError):
            entry = json.loads(line)
            if "logger" not in entry and "round" in entry:
                self.rounds.append(entry)
            else:
                self.said.append({**entry, "seen": time.monotonic()})

    def memory(self) -> tuple[int, int]:
        """RSS of its process and of its libp2p daemon."""
        try:
            process = psutil.Process(self.process.pid)
            self._children = process.children(recursive=True)
            daemons = [child.memory_info().rss for child in self._children if child.name().startswith("p2pd")]
            rss = process.memory_info().rss
            self.peak_bytes = max(self.peak_bytes, rss)
            return rss, sum(daemons)
        except psutil.NoSuchProcess:
            return 0, 0

    def stop(self) -> None:
        """Ask it to leave."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)

    def ended(self) -> None:
        """Wait for its end; kill it, and what it started, if it does not come."""
        try:
            self.process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            self.hung = True
            self.process.kill()
            self.process.wait()
        for child in psutil.wait_procs(self._children, timeout=5)[1]:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        if self.process.stdout is not None:
            self.process.stdout.close()
        self._err.close()


class HostileProcess:
    """The attacker, and what it says."""

    def __init__(self, folder: Path, attack: str, seed: int, addresses: list[str], messages: int = 0) -> None:
        folder.mkdir()
        self.log = folder / "hostile.log"
        self._err = self.log.open("w")
        peers = [word for address in addresses for word in ("--peer", address)]
        command = ["--attack", attack, "--seed", str(seed), "--folder", str(folder), *peers]
        command += ["--messages", str(messages)]
        self.process = subprocess.Popen(
            [sys.executable, str(HOSTILE), *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._err,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )
        self.identities: list[str] | None = None
        self.branch: set[str] = set()
        #: where newcomers find it
        self.addresses: list[str] = []
        self.did: dict[str, Any] = {}
        self.finished = False
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with contextlib.suppress(ValueError):
                told = json.loads(line)
                self.branch.update(told.get("branch", ()))
                self.identities = told.get("ready", self.identities)
                self.addresses = told.get("addresses", self.addresses)
                self.finished = told.get("finished", self.finished)
                self.did |= told.get("did", {})

    def word(self) -> None:
        """It begins, or ends."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write("\n")
            self.process.stdin.flush()

    def close(self) -> None:
        """End it and all that it started."""
        children: list[psutil.Process] = []
        with contextlib.suppress(psutil.NoSuchProcess):
            children = psutil.Process(self.process.pid).children(recursive=True)
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            self.process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        for child in psutil.wait_procs(children, timeout=5)[1]:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        self._reader.join()
        self._err.close()
