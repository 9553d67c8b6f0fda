"""What a peer takes: memory by phase, seconds of its phases, and bytes written, by the size of the model.

    python scripts/bench/size.py --out docs/results/size.json

Two real peers on loopback, of --threads threads each: one begins the run, the other joins when the chain is so long
that it takes a snapshot. Then the first is stopped as Ctrl-C stops it and started again from its home. Sequences are
short and rounds of one sequence a peer, so that a round is what the optimizer takes; memory of activations comes on
top, for as long as a micro-batch lasts.

Memory is what the kernel says is resident, pages of mapped files included, most of each phase and, `steady`, the median
at the ends of rounds; the libp2p daemon, a process of its own, is apart. `bytes_per_parameter` is above what the
imports take, which is measured first. Takes some minutes with 91M parameters.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import psutil
from lab.report import Figures, Watch, finish, machine, merged, note, read, write

from p2ptrain.config.loading import load_manifest

PEER = (sys.executable, str(Path(__file__).parent / "lab" / "phased_peer.py"))
SIZES = {"1M": (2, 4, 128), "25M": (8, 8, 480), "91M": (12, 12, 768), "350M": (24, 16, 1056)}
"""Layers, heads and width; the first is what `init` writes and the demo trains."""
INTERVAL = 16
"""Rounds between snapshots."""
ROUNDS = 34
"""Of the first peer before another joins, so many that it takes a snapshot, and of the joiner: two snapshots."""
SEQUENCES = {"1M": 64, "25M": 4}
"""A peer and round, so that a round takes a second at least; elsewhere one."""
LIMIT_SECONDS = 1800.0
MANIFEST = """\
name = "size"
nonce = "{nonce}"
[model]
layers = {layers}
heads = {heads}
embedding = {embedding}
context = 64
[round]
pace = "fixed"
sequences_per_peer = {sequences}
micro_batch = 1
root_interval = {interval}
"""


class Peer:
    """A peer's process, what it said, and its phases."""

    def __init__(self, folder: Path, name: str, threads: int, *arguments: str) -> None:
        self.home, self._phases, self._log = folder / name, folder / f"{name}.phases", folder / f"{name}.log"
        self._phases.touch()
        self._seen = len(self.phases())
        flags = ("--home", str(self.home), "--host", "127.0.0.1", "--threads", str(threads), "--log-format", "json")
        with self._log.open("a") as log:
            self.process = subprocess.Popen(
                [*PEER, str(self._phases), *arguments, *flags], stdout=subprocess.PIPE, stderr=log, text=True
            )

    def address(self) -> str:
        """Wait for its join line; returns the address in it."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if found := re.search(r"p2ptrain join (/\S+)", line):
                return found[1]
        raise SystemExit(f"no join line:\n{self._log.read_text()[-3000:]}")

    def phases(self) -> list[Figures]:
        """Those that have ended, of this process and those of the same home before it."""
        return [json.loads(line) for line in self._phases.read_text().splitlines(keepends=True) if line.endswith("\n")]

    def fresh(self) -> list[Figures]:
        """Those of this process alone."""
        return self.phases()[self._seen :]

    def wait(self, enough: Callable[[list[Figures]], bool]) -> None:
        """Until its phases are so many."""
        until = time.monotonic() + LIMIT_SECONDS
        while not enough(self.fresh()):
            if self.process.poll() is not None or time.monotonic() > until:
                raise SystemExit(f"the peer has ended, or takes too long:\n{self._log.read_text()[-3000:]}")
            time.sleep(0.2)

    def rounds(self, count: int) -> None:
        """Wait until so many rounds more are applied."""
        before = counted(self.fresh(), "round")
        self.wait(lambda phases: counted(phases, "round") >= before + count)

    def daemon_bytes(self) -> int:
        """Resident memory of its libp2p daemon."""
        return sum(child.memory_info().rss for child in psutil.Process(self.process.pid).children(recursive=True))

    def written_bytes(self) -> int:
        """What it has handed to the kernel to write to files, network included, so far."""
        return int(psutil.Process(self.process.pid).io_counters().write_bytes)

    def stop(self) -> None:
        """End it as Ctrl-C would."""
        self.process.send_signal(signal.SIGINT)
        if self.process.wait(LIMIT_SECONDS):
            raise SystemExit(f"ended with {self.process.returncode}:\n{self._log.read_text()[-3000:]}")


def counted(phases: list[Figures], name: str) -> int:
    """How many phases of a name there are."""
    return sum(phase["phase"] == name for phase in phases)


def summed_up(phases: list[Figures], parameters: int, bare_bytes: int) -> Figures:
    """Memory and seconds by phase, and the steady memory."""

    def above(found: float) -> float:
        return round((found - bare_bytes) / parameters, 1)

    by_phase: Figures = {}
    for name in dict.fromkeys(phase["phase"] for phase in phases if phase["phase"] != "import"):
        of = [phase for phase in phases if phase["phase"] == name]
        peak = max(phase["peak_bytes"] for phase in of)
        by_phase[name] = {
            "count": len(of),
            "peak_megabytes": round(peak / 1e6),
            "peak_bytes_per_parameter": above(peak),
            "seconds": round(statistics.median(phase["seconds"] for phase in of), 3),
            "seconds_most": round(max(phase["seconds"] for phase in of), 3),
        }
    rounds = [phase["resident_bytes"] for phase in phases if phase["phase"] == "round"]
    if not rounds:
        return {"phases": by_phase}
    steady = statistics.median(rounds)
    return {
        "steady_megabytes": round(steady / 1e6),
        "steady_bytes_per_parameter": above(steady),
        "phases": by_phase,
    }


def measure(name: str, folder: Path, threads: int) -> Figures:
    """One size."""
    layers, heads, embedding = SIZES[name]
    run = folder / "run.toml"
    text = MANIFEST.format(
        nonce=os.urandom(16).hex(),
        layers=layers,
        heads=heads,
        embedding=embedding,
        interval=INTERVAL,
        sequences=SEQUENCES.get(name, 1),
    )
    run.write_text(text)
    parameters = load_manifest(run).parameters
    bare = folder / "bare"
    subprocess.run([*PEER, str(bare)], check=True)
    bare_bytes = json.loads(bare.read_text())["resident_bytes"]
    note(f"{name}: {parameters:,} parameters; imports take {bare_bytes / 1e6:.0f} MB")
    ada = Peer(folder, "ada", threads, "bootstrap", str(run))
    bob: Peer | None = None
    try:
        address = ada.address()
        ada.rounds(ROUNDS)
        wrote, began = ada.written_bytes(), time.monotonic()
        bob = Peer(folder, "bob", threads, "join", address)
        bob.address()
        bob.rounds(ROUNDS)
        hours = (time.monotonic() - began) / 3600
        found = {
            "size": name,
            "parameters": parameters,
            "imports_megabytes": round(bare_bytes / 1e6),
            "daemon_megabytes": round(ada.daemon_bytes() / 1e6),
            "written_gigabytes_an_hour": round((ada.written_bytes() - wrote) / hours / 1e9, 2),
        }
        bob.stop()
        ada.stop()
        found["first"] = summed_up(ada.phases(), parameters, bare_bytes)
        found["joined"] = summed_up(bob.phases(), parameters, bare_bytes)
        ada = Peer(folder, "ada", threads, "bootstrap", str(run))
        ada.address()
        ada.rounds(2)
        found["started_again"] = summed_up(ada.fresh(), parameters, bare_bytes)
        ada.stop()
    finally:
        for peer in (ada, bob):
            if peer is not None and peer.process.poll() is None:
                peer.process.kill()
                peer.process.wait()
    return found


def main() -> int:
    """All sizes, or some."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, action="append", help="this size alone; repeatable")
    parser.add_argument("--threads", type=int, default=1, help="of each peer; %(default)s")
    parser.add_argument("--folder", type=Path, help="where homes are; default: a temporary folder")
    parser.add_argument("--out", type=Path, help="the result; sizes that are in it and not measured now stay")
    options = parser.parse_args()
    result: Figures = {"rows": []} | (read(options.out) or {}) | machine()
    for name in options.size or ("1M", "25M", "91M"):
        watch = Watch()
        with tempfile.TemporaryDirectory(prefix="p2ptrain-size-", dir=options.folder) as folder:
            row = measure(name, Path(folder), options.threads) | watch.figures()
        note(json.dumps(row, indent=1))
        result["rows"] = merged(result["rows"], row, ("size",))
        write(options.out, result)
    finish(options.out, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
