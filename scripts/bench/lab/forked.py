"""`p2ptrain` commands as forks of one process that has loaded all, each in a network namespace of its own.

A command of its own takes seconds of a core to import what it needs, so that on a small machine a swarm of them has a
slow start. A fork needs none of that. Threads would not live on in it, so the process that is forked has but one: it is
another one than the benchmark's, and does what lines on its stdin say.
"""

from __future__ import annotations

import ctypes
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

_CLONE_NEWNET = 0x40000000


class Forks:
    """Starts commands; a context manager that leaves none of them running."""

    def __enter__(self) -> Forks:
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        return self

    def __exit__(self, *_: object) -> None:
        # At the end of its stdin it ends those that still run.
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def _ask(self, **what: object) -> object:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(what) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the process that is forked has ended with {self._process.wait()}")
        return json.loads(line)

    def start(self, namespace: str, arguments: list[str], out: Path, log: Path, environment: dict[str, str]) -> Forked:
        """Start `p2ptrain` with these arguments, appending to two files."""
        pid = self._ask(
            start=arguments, namespace=namespace, out=str(out), log=str(log), environment={**os.environ, **environment}
        )
        assert isinstance(pid, int)
        return Forked(self, pid)

    def code(self, pid: int) -> int | None:
        """Return the exit code of a command that has ended; None: it runs."""
        code = self._ask(code=pid)
        return code if isinstance(code, int) else None


class Forked:
    """One command: what benchmarks use of `subprocess.Popen`."""

    def __init__(self, forks: Forks, pid: int) -> None:
        self._forks, self.pid = forks, pid

    def poll(self) -> int | None:
        """Return its exit code; None: it runs."""
        return self._forks.code(self.pid)

    def wait(self, timeout: float | None = None) -> int:
        """Return its exit code once it has ended. Raises subprocess.TimeoutExpired."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while (code := self.poll()) is None:
            if deadline is not None and time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("p2ptrain", timeout or 0.0)
            time.sleep(0.05)
        return code

    def kill(self) -> None:
        """SIGKILL."""
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)

    def end(self, seconds: float) -> int:
        """Have it end as Ctrl-C does, and harder after a while; return its exit code."""
        if self.poll() is None:
            os.kill(self.pid, signal.SIGINT)
        try:
            return self.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            return self.wait()


def _serve() -> list[str] | None:
    """Do as stdin says; return the arguments in a process that was started, and None in this one at its end."""
    codes: dict[int, int | None] = {}
    # Lines are read by hand: what a buffer has read ahead would be read again in a fork.
    while line := _line():
        asked = json.loads(line)
        if "code" in asked:
            pid = asked["code"]
            if codes[pid] is None:
                ended, status = os.waitpid(pid, os.WNOHANG)
                codes[pid] = os.waitstatus_to_exitcode(status) if ended else None
            os.write(1, json.dumps(codes[pid]).encode() + b"\n")
            continue
        pid = os.fork()
        if not pid:
            os.setsid()
            os.environ.clear()
            os.environ.update(asked["environment"])
            with open(f"/run/netns/{asked['namespace']}") as file:
                if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), _CLONE_NEWNET):
                    raise OSError(ctypes.get_errno(), "setns", asked["namespace"])
            for number, path in ((1, asked["out"]), (2, asked["log"])):
                os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), number)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            tempfile.tempdir = None  # as the environment has it
            arguments: list[str] = asked["start"]
            return arguments
        codes[pid] = None
        os.write(1, f"{pid}\n".encode())
    for pid, code in codes.items():
        if code is None:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    return None


def _line() -> bytes:
    line = bytearray()
    while not line.endswith(b"\n"):
        byte = os.read(0, 1)
        if not byte:
            return b""
        line += byte
    return bytes(line)


def main() -> None:
    """Load what commands need, and serve."""
    import hivemind  # noqa: F401
    import torch

    import p2ptrain.cli.main
    import p2ptrain.observe.census
    import p2ptrain.peer.session  # noqa: F401
    from p2ptrain.training.selftest import make_ready

    torch.set_num_threads(1)
    make_ready(torch.device("cpu"))
    while len(os.listdir("/proc/self/task")) > 1:
        time.sleep(0.01)
    arguments = _serve()
    if arguments is not None:
        sys.argv[1:] = arguments
        runpy.run_module("p2ptrain", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
