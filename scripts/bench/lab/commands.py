"""Peers as people run them: `p2ptrain` processes with homes of their own, on this machine or behind lines."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

P2PTRAIN = [sys.executable, "-m", "p2ptrain"]
END_SECONDS = 30.0
MANIFEST = """\
name = "{name}"
nonce = "{nonce}"

[model]
layers = 1
heads = 4
embedding = 64
context = 64

[optimizer]
warmup_rounds = 4
total_rounds = 1000

[round]
micro_batch = 4
target_batch = 40
min_seconds = {round_seconds}
max_seconds = {round_seconds}
root_interval = 20

[evaluation]
every_rounds = 10
tokens = 512
"""


class Command:
    """One `p2ptrain` process.

    Args:
        before: what comes before the command, as `Lines.inside` gives it.
        out: where it prints; None: to `says`, and it prints little else.
    """

    def __init__(
        self, name: str, folder: Path, *command: str, before: Sequence[str] = (), out: IO[str] | None = None
    ) -> None:
        self.name, self.log = name, folder / f"{name}.log"
        self._errors: IO[str] = self.log.open("a")
        self.process = subprocess.Popen(
            [*before, *P2PTRAIN, *command],
            stdout=out or subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    def says(self, pattern: str) -> str:
        """The group in the first line that it prints which is like this."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if found := re.search(pattern, line):
                return found[1]
        raise SystemExit(f"{self.name} has ended:\n{self.log.read_text()[-3000:]}")

    def kill(self) -> None:
        """At once."""
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        """As Ctrl-C does, and harder after a while."""
        if self.process.poll() is None:
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(END_SECONDS)
        if self.process.poll() is None:
            self.kill()
        self._errors.close()


class Peers:
    """A swarm; ended when the context is left.

    Args:
        hosts: of each peer, by name, its address and what comes before its command.
        round_seconds: how long rounds take, at least.
    """

    def __init__(
        self, folder: Path, hosts: Mapping[str, tuple[str, Sequence[str]]], round_seconds: float = 2.0
    ) -> None:
        self.folder, self._hosts = folder, hosts
        self.peers: dict[str, Command] = {}
        manifest = folder / "run.toml"
        nonce = secrets.token_hex(16)
        manifest.write_text(MANIFEST.format(name="speeches", nonce=nonce, round_seconds=round_seconds))
        self._manifest = manifest

    def home(self, name: str) -> Path:
        """Of a peer."""
        return self.folder / name

    def __enter__(self) -> Peers:
        with contextlib.ExitStack() as undo:
            undo.callback(self._stop)
            first, *others = self._hosts
            self._start(first, "bootstrap", str(self._manifest))
            self.address = self.peers[first].says(r"p2ptrain join (\S+)")
            for name in others:
                self._start(name, "join", self.address)
            for name in others:
                self.peers[name].says(r"p2ptrain join (\S+)")
            undo.pop_all()
        return self

    def _start(self, name: str, *command: str) -> None:
        host, before = self._hosts[name]
        flags = ["--home", str(self.home(name)), "--name", name, "--host", host, "--threads", "1"]
        self.peers[name] = Command(name, self.folder, *command, *flags, before=before)

    def rounds(self, name: str) -> int:
        """The newest round that a peer has."""
        found = [int(path.name.split("-")[1]) for path in (self.home(name) / "journal").glob("round-*")]
        return max(found, default=0)

    def train(self, rounds: int, seconds: float) -> None:
        """Wait until the last that has joined has been through so many rounds more. Raises SystemExit."""
        *_, last = self._hosts
        until, goal = time.monotonic() + seconds, self.rounds(last) + rounds
        while self.rounds(last) < goal:
            if time.monotonic() > until:
                raise SystemExit(f"{last} is at round {self.rounds(last)}:\n{self.peers[last].log.read_text()[-3000:]}")
            time.sleep(0.2)

    def __exit__(self, *_: object) -> None:
        self._stop()

    def _stop(self) -> None:
        for peer in self.peers.values():
            if peer.process.poll() is None:
                peer.process.terminate()
        for peer in self.peers.values():
            peer.stop()
