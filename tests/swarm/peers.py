"""Peers as a user runs them: one `p2ptrain` process each, over real sockets, with a home of its own.

What a test waits for is what a user could see: the peer's log, its journal, `p2ptrain inspect`.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import psutil

from p2ptrain.data.corpus import load_embedded

P2PTRAIN = [sys.executable, "-m", "p2ptrain"]
START_SECONDS = 60.0

MANIFEST = """\
name = "test"
nonce = "{nonce}"
last_round = {last_round}

[model]
layers = 1
heads = 2
embedding = 32
context = 32

[data]
{data}

[optimizer]
warmup_rounds = 4
total_rounds = 100

[round]
micro_batch = 4
target_batch = 16
min_seconds = 0.4
max_seconds = 1.0
round_max_seconds = 4.0
grace_seconds = 1.0
reply_timeout_seconds = 2.0
seal_timeout_seconds = 1.0
alone_after_seconds = 4.0
root_interval = {root_interval}
"""


def run(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """One command to its end."""
    return subprocess.run([*P2PTRAIN, *arguments], capture_output=True, text=True, timeout=120, **options)


def eventually(condition: Callable[[], Any], seconds: float, what: str) -> Any:
    """The condition's value once it is true; fails after `seconds`."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        time.sleep(0.05)
    raise AssertionError(f"not within {seconds:.0f} s: {what}")


class Peer:
    """One running peer."""

    def __init__(self, swarm: Swarm, name: str, *command: str, failpoint: str = "") -> None:
        self.name, self.home = name, swarm.folder / name
        self.log = swarm.folder / f"{name}-{len(swarm.peers)}.log"
        self._err: IO[str] = self.log.open("w")
        self._trigger = swarm.folder / f"{name}-dies"
        environment = {**os.environ, "P2PTRAIN_FAILPOINT": f"{failpoint}@{self._trigger}", "OMP_NUM_THREADS": "1"}
        flags = ["--home", str(self.home), "--name", name, "--host", "127.0.0.1", "--threads", "1", "-v"]
        self.process = subprocess.Popen(
            [*P2PTRAIN, *command, *flags, "--log-format", "json"],
            stdout=subprocess.PIPE,
            stderr=self._err,
            text=True,
            env=environment,
        )
        self._swarm = swarm

    def address(self) -> str:
        """From the line that it prints for others."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            found = re.fullmatch(r"Join with:  p2ptrain join (\S+)\n", line)
            if found:
                self._swarm.children += psutil.Process(self.process.pid).children(recursive=True)
                return found[1]
        raise AssertionError(f"{self.name} printed no join line:\n{self.tail()}")

    def started(self) -> Peer:
        """Wait until it has printed its join line."""
        self.address()
        return self

    def entries(self) -> list[dict[str, Any]]:
        """Its log."""
        return [json.loads(line) for line in self.log.read_text().splitlines() if line.startswith("{")]

    def tail(self) -> str:
        """The end of its log, for a failing test."""
        return self.log.read_text()[-3000:]

    @property
    def round(self) -> int:
        """The newest round in its journal."""
        rounds = [int(path.name.split("-")[1]) for path in (self.home / "journal").glob("round-*")]
        return max(rounds, default=0)

    def reaches(self, round: int, seconds: float = 60.0) -> None:
        """Wait until its journal holds this round."""

        def there() -> bool:
            assert self.process.poll() in (None, 0), f"{self.name} ended with {self.process.poll()}:\n{self.tail()}"
            return self.round >= round

        eventually(there, seconds, f"{self.name} at round {round}; it is at {self.round}:\n{self.tail()}")

    def kill(self) -> float:
        """SIGKILL; returns when, in Unix seconds."""
        self.process.kill()
        self.process.wait()
        return time.time()

    def dies_at_failpoint(self, seconds: float = 60.0) -> float:
        """Arm its failpoint and wait until it has died there; returns when, in Unix seconds."""
        self._trigger.touch()
        assert self.process.wait(seconds) == -signal.SIGKILL, self.tail()
        return time.time()

    def ended(self, seconds: float = 120.0) -> None:
        """Wait for its own end, which must be a good one."""
        assert self.process.wait(seconds) == 0, self.tail()

    def replica(self) -> tuple[str, str]:
        """State id and hash of the parameters that it ended with, by its last word."""
        found = re.findall(r"state (\w{64}), parameters sha256 (\w{64})", self.log.read_text())
        assert found, self.tail()
        return found[-1]

    def close(self) -> None:
        """End it, whatever it does."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()
        self._err.close()


class Observer:
    """`p2ptrain inspect --watch --format json`: what it printed last."""

    def __init__(self, address: str, log: Path) -> None:
        self._log = log
        with log.open("w") as errors:
            self.process = subprocess.Popen(
                [*P2PTRAIN, "inspect", address, "--watch", "--format", "json", "-v"],
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        self._latest: dict[str, Any] | None = None
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._latest = json.loads(line)

    def sees(self, states: dict[str, str], seconds: float) -> dict[str, Any]:
        """Wait until the peers, by name, are in these states; those not named may be in any."""

        def matching() -> dict[str, Any] | None:
            latest = self._latest
            if latest is None:
                assert self.process.poll() is None, f"inspect ended:\n{self._log.read_text()}"
                return None
            found = {peer["name"]: peer["state"] for peer in latest["peers"]}
            return latest if states.items() <= found.items() else None

        try:
            return eventually(matching, seconds, "")
        except AssertionError as error:
            raise AssertionError(f"inspect shows {states}: {self._latest}\n{self._log.read_text()}") from error

    def close(self) -> None:
        """End it as Ctrl-C does."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            self.process.wait(15)
        self._reader.join()


class Swarm:
    """The peers of one test, and the manifest of their run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.peers: list[Peer] = []
        self.observers: list[Observer] = []
        #: every process that a peer started
        self.children: list[psutil.Process] = []
        self.manifest = folder / "run.toml"
        self.text = folder / "addresses.txt"

    def write_manifest(self, *, last_round: int = 0, root_interval: int = 8, own_text: bool = True) -> None:
        """A small run on real text: 400 kB of addresses, or all of them."""
        data = self.own_text("ada") if own_text else ""
        text_of = MANIFEST.format(
            nonce=os.urandom(16).hex(), last_round=last_round, data=data, root_interval=root_interval
        )
        self.manifest.write_text(text_of)

    def own_text(self, name: str) -> str:
        """400 kB of addresses in the file `self.text`, and in the home of the peer who will bootstrap; what a manifest
        says of them."""
        self.text.write_bytes(load_embedded().train[:400_000])
        made = self.folder / "made.toml"
        flags = ["--license", "LicenseRef-Public-Domain", "--home", str(self.folder / name)]
        done = run("init", str(made), "--data", str(self.text), *flags)
        assert done.returncode == 0, done.stderr
        return re.split(r"\n\[", made.read_text().split("[data]\n")[1])[0]

    def bootstrap(self, name: str, *flags: str, failpoint: str = "") -> Peer:
        """Start the run."""
        return self._add(Peer(self, name, "bootstrap", str(self.manifest), *flags, failpoint=failpoint))

    def join(self, name: str, *addresses: str, failpoint: str = "") -> Peer:
        """Join it with an address."""
        return self._add(Peer(self, name, "join", *addresses, failpoint=failpoint))

    def _add(self, peer: Peer) -> Peer:
        self.peers.append(peer)
        return peer

    def watch(self, address: str) -> Observer:
        """Have somebody look on from now on."""
        self.observers.append(Observer(address, self.folder / f"observer-{len(self.observers)}.log"))
        return self.observers[-1]

    def close(self) -> None:
        """End all, and check that nothing of them is left."""
        for peer in (*self.observers, *self.peers):
            peer.close()
        self.nothing_runs()

    def nothing_runs(self) -> None:
        """What peers that have ended, however they did, had started has ended too."""
        of_the_living = [
            child.pid
            for peer in self.peers
            if peer.process.poll() is None
            for child in psutil.Process(peer.process.pid).children(recursive=True)
        ]
        left = [child for child in self.children if child.pid not in of_the_living]
        _, alive = psutil.wait_procs(left, timeout=10)
        assert alive == []
