"""Starts real peers of one method behind lines, and times their steps and counts their bytes.

Step times are by the first peer's own clock, from what it prints after a step; bytes are read from all lines when that
arrives. p2ptrain prints at most once a second, and then the round: shorter steps are averaged over what came between.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import psutil
from lines import Counted, Lines
from time_to_loss_curves import MANIFEST, sequences_per_member

METHODS = {
    "p2ptrain": ("demo", 1),
    "p2ptrain-no-overlap": ("demo", 0),
    "hivemind": ("adamw", 0),
    "ddp": ("adamw", 0),
    "ddp-fp16": ("adamw", 0),
}
"""Whose steps are which curve's: optimizer, overlap."""
SCRIPTS = Path(__file__).parent
START_SECONDS = 180.0
WARM_UP_STEPS = {"p2ptrain": 6, "p2ptrain-no-overlap": 6, "hivemind": 2, "ddp": 1, "ddp-fp16": 1}
"""p2ptrain's peers become members and learn how long to wait; hivemind's first step is one of strangers."""


class Peer:
    """One peer's process, and what it printed."""

    def __init__(self, lines: Lines, number: int, folder: Path) -> None:
        self.number, self.folder = number, folder
        self._lines, self._log = lines, folder / f"peer{number}.log"
        self.said: list[dict[str, Any]] = []
        self.text: list[str] = []
        #: called with each JSON line when it arrives
        self.on_entry: Callable[[dict[str, Any]], None] = lambda entry: None
        self._process: subprocess.Popen[str] | None = None

    def start(self, *command: str) -> None:
        """A script of this folder, behind this peer's line."""
        environment = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "eth0", "TMPDIR": str(self.folder)}
        self._process = subprocess.Popen(
            [*self._lines.inside(self.number), sys.executable, str(SCRIPTS / command[0]), *command[1:]],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, **environment},
            start_new_session=True,
        )
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process is not None and self._process.stdout is not None
        with self._log.open("w") as log:
            for line in self._process.stdout:
                log.write(line)
                log.flush()
                self.text.append(line)
                if line.startswith("{"):
                    with contextlib.suppress(json.JSONDecodeError):
                        entry = json.loads(line)
                        self.on_entry(entry)
                        self.said.append(entry)

    def go_on(self) -> None:
        """Answer what it waits for."""
        assert self._process is not None and self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()

    def wait(self, seconds: float, what: str, found: Callable[[], Any]) -> Any:
        """Until `found` finds something."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            result = found()
            if result:
                return result
            assert self._process is not None
            if self._process.poll() is not None:
                break
            time.sleep(0.05)
        raise SystemExit(f"peer {self.number} did not get as far as: {what}\n{''.join(self.text[-20:])}")

    def entry(self, key: str) -> dict[str, Any] | None:
        """The first with that key."""
        return next((entry for entry in list(self.said) if key in entry), None)

    def kill(self) -> None:
        """It and all that it started."""
        if self._process is None:
            return
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(self._process.pid)
            for one in [*process.children(recursive=True), process]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    one.kill()
        self._process.wait()


class Steps:
    """What the first peer says of its steps, and the lines' counters at each."""

    def __init__(self, lines: Lines, first: Peer, key: str) -> None:
        self._lines, self._key = lines, key
        self.seen: list[tuple[dict[str, Any], list[Counted]]] = []
        first.on_entry = self._on_entry

    def _on_entry(self, entry: dict[str, Any]) -> None:
        if entry.get(self._key):
            self.seen.append((entry, [self._lines.counted(number) for number in range(self._lines.peers)]))

    def reached(self, number: int) -> bool:
        """Whether that step is over."""
        return bool(self.seen) and self.seen[-1][0][self._key] >= number

    def figures(self, first: int) -> dict[str, Any]:
        """From step `first` on."""
        seen = [pair for pair in self.seen if pair[0][self._key] >= first]
        if len(seen) < 2:
            raise SystemExit("too few steps were seen")
        gaps = [
            (after["time"] - before["time"]) / (after[self._key] - before[self._key])
            for (before, _), (after, _) in itertools.pairwise(seen)
        ]
        (begin, counted), (end, counted_after) = seen[0], seen[-1]
        steps = end[self._key] - begin[self._key]
        sent, received = (
            [(b[way] - a[way]) / steps for a, b in zip(counted, counted_after, strict=True)] for way in (0, 1)
        )
        return {
            "steps_timed": steps,
            "step_seconds": round((end["time"] - begin["time"]) / steps, 3),
            "step_seconds_median": round(statistics.median(gaps), 3),
            "step_seconds_spread": [round(min(gaps), 3), round(max(gaps), 3)],
            "bytes_sent_per_peer_and_step": round(statistics.mean(sent)),
            "bytes_received_per_peer_and_step": round(statistics.mean(received)),
            "bytes_sent_most": round(max(sent)),
        }


def run_toml(compute_seconds: float, overlap: int) -> str:
    """The curves' manifest with a fixed number of sequences a round, and time to compute them."""
    rules = msgspec.structs.replace(
        MANIFEST.round,
        pace="fixed",
        sequences_per_peer=sequences_per_member(),
        micro_batch=sequences_per_member(),
        min_seconds=compute_seconds,
        max_seconds=max(compute_seconds, MANIFEST.round.max_seconds),
        overlap=overlap,
    )
    model, settings = (
        "\n".join(f"{key} = {json.dumps(value)}" for key, value in msgspec.to_builtins(table).items())
        for table in (MANIFEST.model, rules)
    )
    return f'name = "time to loss"\nnonce = "{os.urandom(16).hex()}"\n[model]\n{model}\n[round]\n{settings}\n'


def start_p2ptrain(peers: list[Peer], compute_seconds: float, overlap: int) -> str:
    """All of them members; the key of a step."""
    manifest = peers[0].folder / "run.toml"
    manifest.write_text(run_toml(compute_seconds, overlap))
    join_line = re.compile(r"p2ptrain join (\S+)")
    address = ""
    for peer in peers:
        home = ["--home", str(peer.folder / f"peer{peer.number}"), "--name", f"peer{peer.number}"]
        flags = [*home, "--threads", "1", "-v", "--log-format", "json"]
        command = ["join", address] if address else ["bootstrap", str(manifest)]
        peer.start("synthetic_peer.py", str(compute_seconds / sequences_per_member()), *command, *flags)
        found = peer.wait(START_SECONDS, "a line to join with", lambda peer=peer: join_line.search("".join(peer.text)))
        address = address or found[1]
    everyone = len(peers)
    deadline = START_SECONDS + 10 * compute_seconds
    for peer in peers:
        peer.wait(
            deadline,
            "all are members",
            lambda peer=peer: any(entry.get("members") == everyone for entry in list(peer.said)),
        )
    return "round"


def start_baseline(method: str, lines: Lines, peers: list[Peer], compute_seconds: float) -> str:
    """All of them about to step; the key of a step."""
    model = json.dumps(msgspec.to_builtins(MANIFEST.model))
    flags = ["--model", model, "--peers", str(len(peers)), "--compute-seconds", str(compute_seconds)]
    flags += ["--sequences", str(sequences_per_member()), "--master", lines.address(0)]
    for peer in peers:
        mine = ["--rank", str(peer.number), "--address", lines.address(peer.number)]
        if method == "hivemind" and peer is not peers[0]:
            mine += ["--join", peers[0].said[0]["join"][0]]
        peer.start("baseline_peer.py", method, *flags, *mine)
        if method == "hivemind":
            peer.wait(START_SECONDS, "ready", lambda peer=peer: peer.entry("ready"))
    if method == "hivemind":
        for seen in (None, "sees"):
            for peer in peers:
                if seen:
                    peer.wait(START_SECONDS, "sees the others", lambda peer=peer: peer.entry("sees"))
            for peer in peers:
                peer.go_on()
    return "step"


def measure(method: str, lines: Lines, compute_seconds: float, steps: int, folder: Path) -> dict[str, Any]:
    """Seconds and bytes of so many steps, after some to warm up."""
    peers = [Peer(lines, number, folder) for number in range(lines.peers)]
    try:
        if method.startswith("p2ptrain"):
            key = start_p2ptrain(peers, compute_seconds, METHODS[method][1])
            first = peers[0].said[-1].get("round") or peers[0].entry("round")["round"]  # type: ignore[index]
        else:
            key = start_baseline(method, lines, peers, compute_seconds)
            first = 0
        observed = Steps(lines, peers[0], key)
        first += WARM_UP_STEPS[method]
        patience = START_SECONDS + (steps + WARM_UP_STEPS[method]) * (3 * compute_seconds + 120.0)
        peers[0].wait(patience, f"step {first + steps}", lambda: observed.reached(first + steps))
        figures = observed.figures(first)
    finally:
        for peer in peers:
            peer.kill()
    figures |= {"computing_share": round(compute_seconds / figures["step_seconds"], 4)}
    if method == "hivemind":
        figures["group_sizes"] = [
            int(size) for size in re.findall(r"Averaged gradients with (\d+) peers", "".join(peers[0].text))
        ]
    return {"method": method, "compute_seconds": compute_seconds, **figures}
