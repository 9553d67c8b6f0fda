"""Peers as a user runs them: one `p2ptrain` process each, over real sockets, with a home of its own.

What a test waits for is what a user could see: the peer's log, its journal, `p2ptrain inspect`. Processes are forked
from one that has loaded what they need (`starter.py`), or, where a test says so, are `python -m p2ptrain`.
"""

from __future__ import annotations

import atexit
import functools
import itertools
import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
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


class Starter:
    """`starter.py`."""

    def __init__(self) -> None:
        self._socket, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        script = str(Path(__file__).with_name("starter.py"))
        # With one thread, as peers have: a pool of them would not live on in a fork.
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, script, str(other.fileno())],
            pass_fds=[other.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            env=environment,
        )
        other.close()
        self._started: list[int] = []
        #: pid -> exit code
        self._ended: dict[int, int] = {}

    def start(self, arguments: tuple[str, ...], environment: dict[str, str], stdout: int, stderr: int) -> int:
        """Returns the pid."""
        asked = {"arguments": arguments, "environment": environment}
        socket.send_fds(self._socket, [json.dumps(asked).encode()], [stdout, stderr])
        while not self._started:
            self._hear()
        return self._started.pop()

    def ended(self, pid: int, seconds: float) -> int | None:
        """The exit code of a process that ends within that time."""
        deadline = time.monotonic() + seconds
        while pid not in self._ended:
            if not select.select([self._socket], [], [], max(0.0, deadline - time.monotonic()))[0]:
                return None
            self._hear()
        return self._ended[pid]

    def _hear(self) -> None:
        message = self._socket.recv(1000)
        assert message, f"the starter of peers has ended with {self._process.wait()}"
        match json.loads(message):
            case {"started": pid}:
                self._started.append(pid)
            case {"ended": [pid, code]}:
                self._ended[pid] = code

    def close(self) -> None:
        """End it; not what it has started."""
        self._socket.close()
        self._process.wait()


@functools.cache
def starters() -> Iterator[Starter]:
    """By turns: each has strings' hashes, and so the order of sets, of its own, as two processes of users have."""
    made = [Starter(), Starter()]
    for starter in made:
        atexit.register(starter.close)
    return itertools.cycle(made)


class Forked:
    """A forked process: what tests use of `subprocess.Popen`."""

    def __init__(self, *arguments: str, stdout: int | IO[str], stderr: IO[str], env: dict[str, str]) -> None:
        self.stdout: IO[str] | None = None
        self._starter = next(starters())
        if stdout == subprocess.PIPE:
            reading, writing = os.pipe()
            self.stdout = os.fdopen(reading)
            self.pid = self._starter.start(arguments, env, writing, stderr.fileno())
            os.close(writing)
        else:
            assert not isinstance(stdout, int)
            self.pid = self._starter.start(arguments, env, stdout.fileno(), stderr.fileno())

    def poll(self) -> int | None:
        return self._starter.ended(self.pid, 0.0)

    def wait(self, timeout: float = 120.0) -> int:
        code = self._starter.ended(self.pid, timeout)
        if code is None:
            raise subprocess.TimeoutExpired("p2ptrain", timeout)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def start(*arguments: str, stderr: IO[str], env: dict[str, str], fresh: bool) -> Forked | subprocess.Popen[str]:
    """One command, with its output in a pipe; `fresh`: in a process that loads all itself."""
    if not fresh:
        return Forked(*arguments, stdout=subprocess.PIPE, stderr=stderr, env=env)
    return subprocess.Popen([*P2PTRAIN, *arguments], stdout=subprocess.PIPE, stderr=stderr, text=True, env=env)


def run(*arguments: str, fresh: bool = False) -> subprocess.CompletedProcess[str]:
    """One command to its end; `fresh`: in a process that loads all itself."""
    if fresh:
        return subprocess.run([*P2PTRAIN, *arguments], capture_output=True, text=True, timeout=120)
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        process = Forked(*arguments, stdout=out, stderr=errors, env=dict(os.environ))
        try:
            code = process.wait()
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise
        out.seek(0)
        errors.seek(0)
        return subprocess.CompletedProcess(arguments, code, out.read(), errors.read())


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

    def __init__(
        self,
        swarm: Swarm,
        name: str,
        *command: str,
        failpoint: str = "",
        host: str = "127.0.0.1",
        environment: Mapping[str, str] = {},
    ) -> None:
        self.name, self.home = name, swarm.folder / name
        self.log = swarm.folder / f"{name}-{len(swarm.peers)}.log"
        self._err: IO[str] = self.log.open("w")
        self._trigger = swarm.folder / f"{name}-dies"
        own = {"P2PTRAIN_FAILPOINT": f"{failpoint}@{self._trigger}", "OMP_NUM_THREADS": "1"}
        flags = ["--home", str(self.home), "--name", name, "--host", host, "--threads", "1", "-v"]
        self.process = start(
            *command,
            *flags,
            "--log-format",
            "json",
            stderr=self._err,
            env={**os.environ, **own, **environment},
            fresh=swarm.fresh,
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

    def __init__(self, address: str, log: Path, *, fresh: bool) -> None:
        self._log = log
        command = ("inspect", address, "--watch", "--format", "json", "-v")
        with log.open("w") as errors:
            self.process = start(*command, stderr=errors, env=dict(os.environ), fresh=fresh)
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
        assert self.process.stdout is not None
        self.process.stdout.close()


class Swarm:
    """The peers of one test, and the manifest of their run; `fresh`: each process loads all itself."""

    def __init__(self, folder: Path, *, fresh: bool = False) -> None:
        self.folder, self.fresh = folder, fresh
        self.peers: list[Peer] = []
        self.observers: list[Observer] = []
        #: every process that a peer started
        self.children: list[psutil.Process] = []
        self.manifest = folder / "run.toml"
        self.text = folder / "addresses.txt"

    def write_manifest(
        self, *, last_round: int = 0, root_interval: int = 8, own_text: bool = True, evaluated_every: int = 0
    ) -> None:
        """A small run on real text: 400 kB of addresses, or all of them."""
        data = self.own_text("ada") if own_text else ""
        text_of = MANIFEST.format(
            nonce=os.urandom(16).hex(), last_round=last_round, data=data, root_interval=root_interval
        )
        if evaluated_every:
            text_of += f"\n[evaluation]\nevery_rounds = {evaluated_every}\ntokens = 256\n"
        self.manifest.write_text(text_of)

    def own_text(self, name: str) -> str:
        """400 kB of addresses in the file `self.text`, and in the home of the peer who will bootstrap; what a manifest
        says of them."""
        self.text.write_bytes(load_embedded().train[:400_000])
        made = self.folder / "made.toml"
        flags = ["--license", "LicenseRef-Public-Domain", "--home", str(self.folder / name)]
        done = run("init", str(made), "--data", str(self.text), *flags, fresh=self.fresh)
        assert done.returncode == 0, done.stderr
        return made.read_text().split("[data]\n")[1].split("\n# What peers compute")[0]

    def bootstrap(self, name: str, *flags: str, **more: Any) -> Peer:
        """Start the run; `more` as `Peer` takes it."""
        return self._add(Peer(self, name, "bootstrap", str(self.manifest), *flags, **more))

    def join(self, name: str, *addresses: str, **more: Any) -> Peer:
        """Join it with an address; `more` as `Peer` takes it."""
        return self._add(Peer(self, name, "join", *addresses, **more))

    def _add(self, peer: Peer) -> Peer:
        self.peers.append(peer)
        return peer

    def watch(self, address: str) -> Observer:
        """Have somebody look on from now on."""
        log = self.folder / f"observer-{len(self.observers)}.log"
        self.observers.append(Observer(address, log, fresh=self.fresh))
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
