"""Processes behind lines that say a JSON object a line and do as a line on their stdin says: peers of benchmarks."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
from lab.lines import Lines

END_SECONDS = 10.0


class Crew:
    """One process for each line; ended, with all that they started, when the context is left.

    Args:
        folder: for their logs.
    """

    def __init__(self, lines: Lines, folder: Path) -> None:
        self.lines, self.folder = lines, folder
        self._processes: dict[int, subprocess.Popen[str]] = {}
        self._said: queue.SimpleQueue[tuple[int, dict[str, Any] | None]] = queue.SimpleQueue()

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, *_: object) -> None:
        family = [child for one in self._processes.values() for child in _family(one.pid)]
        for process in self._processes.values():
            with contextlib.suppress(OSError):
                assert process.stdin is not None
                process.stdin.close()
        deadline = time.monotonic() + END_SECONDS
        for process in self._processes.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        for left in psutil.wait_procs(family, timeout=END_SECONDS)[1]:
            left.kill()

    def start(self, number: int, script: str, *arguments: str) -> None:
        """Start a script, named by its path in the benchmarks' folder, behind line `number`."""
        path = Path(__file__).parents[1] / script
        with (self.folder / f"{number}.log").open("w") as log:
            process = subprocess.Popen(
                [*self.lines.inside(number), sys.executable, str(path), *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                start_new_session=True,
            )
        self._processes[number] = process
        threading.Thread(target=self._read, args=(number, process), daemon=True).start()

    def _read(self, number: int, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            address = re.search(r"p2ptrain join (\S+)", line)
            if line.startswith("{"):
                self._said.put((number, json.loads(line)))
            elif address:
                self._said.put((number, {"join": [address[1]]}))
        self._said.put((number, None))

    def tell(self, number: int, line: str) -> None:
        """One line for its stdin."""
        stdin = self._processes[number].stdin
        assert stdin is not None
        stdin.write(f"{line}\n")
        stdin.flush()

    def hear(self, seconds: float) -> tuple[int, dict[str, Any]]:
        """Who said what next. Raises SystemExit when nobody says anything for so long, or one has ended."""
        try:
            number, message = self._said.get(timeout=seconds)
        except queue.Empty:
            raise SystemExit(f"nobody said anything for {seconds:.0f} s; {self._tail(0)}") from None
        if message is None:
            raise SystemExit(f"peer {number} has ended; {self._tail(number)}")
        return number, message

    def hear_all(self, key: str, seconds: float) -> dict[int, dict[str, Any]]:
        """One message with `key` of each; others are passed over."""
        found: dict[int, dict[str, Any]] = {}
        while len(found) < len(self._processes):
            number, message = self.hear(seconds)
            if key in message:
                found[number] = message
        return found

    def _tail(self, number: int) -> str:
        return f"the end of its log:\n{(self.folder / f'{number}.log').read_text()[-2000:]}"


def _family(pid: int) -> list[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).children(recursive=True)
    return []
