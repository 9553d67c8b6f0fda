"""Real peers under faults for as long as you like: they must end bit-identical, and leave nothing behind.

    python scripts/bench/soak_swarm.py --peers 6 --minutes 30 --seed 1 --out docs/results/soak_swarm.json
    python scripts/bench/soak_swarm.py --home --minutes 60 --seed 1 --out docs/results/soak_home.json

As root, on Linux: each peer is a `p2ptrain` process in a network namespace of its own, behind a line of --mbit, on one
bridge. First all of them train in calm. Then, every 5 to 20 s, one of all but the first suffers a fault: kill -9 and a
restart from its disk; the same with its home wiped; SIGSTOP for 1 to 60 s; kill -9 of its libp2p daemon; its link down
for 1 to 30 s; another IP address, as a laptop has that changes networks. With --home, what befalls peers at home comes
on top: their machines are wanted for 3 to 30 s, or their owners pause them for as long, or allow 300 kbit to 2 Mbit up
for 10 to 60 s. Such peers are volunteers; a file describes how their machines are used. In the end all must be on one
chain again within --recovery, are asked to leave, and each disk is replayed to one round; no log may have a traceback.
Prints a table on stderr and one JSON object last; exits with 1 when something does not hold.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from lab.forked import Forked, Forks
from lab.lines import Lines, prepare
from lab.replayed import replayed
from lab.report import finish, machine
from rich.console import Console
from rich.table import Table

from p2ptrain.config.home import Home
from p2ptrain.errors import P2PTrainError
from p2ptrain.peer.control import Limit, Pause, Request, Resume, ask
from p2ptrain.peer.machine_use import VARIABLE
from p2ptrain.state.files import atomic_write

FAULTS = ("kill", "wipe", "stop", "daemon", "link", "address")
HOME_FAULTS = (*FAULTS, "use", "pause", "limit")
ANSWER_SECONDS = 120.0
"""For a peer to do what its owner says, which may end a round before, and be busy."""
PAUSE_SECONDS = (5.0, 20.0)
LEAVE_SECONDS = 300.0
START_SECONDS = 600.0
"""For all to start, on a machine that may be busy."""
SAMPLE_SECONDS = 5.0
MANIFEST = """\
name = "soak"
nonce = "{nonce}"

[model]
layers = 2
heads = 2
embedding = 64
context = 64

[round]
min_seconds = 1.0
max_seconds = 2.0
root_interval = 16
"""

console = Console(stderr=True, highlight=False, soft_wrap=True)


class Peer:
    """One peer through all its lives."""

    def __init__(self, folder: Path, number: int, lines: Lines, forks: Forks | None) -> None:
        self._forks = forks
        self.name, self.number, self.folder, self.lines = f"peer{number}", number, folder, lines
        self.home, self.log = folder / f"peer{number}", folder / f"peer{number}.log"
        self.out = folder / f"peer{number}.out"
        self.process: subprocess.Popen[bytes] | Forked | None = None
        self.children: set[psutil.Process] = set()
        #: round lines of all lives: what it logged after each second or so
        self.rounds: list[dict[str, Any]] = []
        #: lines for people: (Unix seconds, text)
        self.said: list[tuple[float, str]] = []
        self._offset = 0
        self.busy = False
        #: says how this peer's machine is used; it is a volunteer
        self.use = folder / f"use{number}.json"
        self.volunteer = False

    def start(self, *command: str) -> None:
        """Begin to live, or again."""
        flags = ["--home", str(self.home), "--name", self.name, "--threads", "1", "-v", "--log-format", "json"]
        if self.volunteer:
            flags.append("--volunteer")
            self.used(ago_seconds=1000.0)
        own = {"OMP_NUM_THREADS": "1", "TMPDIR": str(self.folder), VARIABLE: str(self.use)}
        if self._forks is not None:
            namespace = self.lines.inside(self.number)[-1]
            self.process = self._forks.start(namespace, [*command, *flags], self.out, self.log, own)
            return
        with self.log.open("ab") as log, self.out.open("ab") as out:
            self.process = subprocess.Popen(
                [*self.lines.inside(self.number), sys.executable, "-m", "p2ptrain", *command, *flags],
                stdout=out,
                stderr=log,
                env={**os.environ, **own},
                start_new_session=True,  # Ctrl-C is for the soak
            )

    def used(self, ago_seconds: float) -> None:
        """Have its machine be used so long ago."""
        atomic_write(self.use, json.dumps({"idle_seconds": ago_seconds}).encode())

    def told(self, request: Request) -> None:
        """Give it its owner's command, without waiting for what comes of it; it may be about to end."""

        def give() -> None:
            with contextlib.suppress(P2PTrainError):
                ask(Home(self.home).control, request, ANSWER_SECONDS)

        threading.Thread(target=give, daemon=True).start()

    @property
    def ps(self) -> psutil.Process:
        """The process."""
        assert self.process is not None
        return psutil.Process(self.process.pid)

    def daemon(self) -> psutil.Process | None:
        """Its libp2p daemon."""
        if self.process is None:
            return None
        try:
            children = self.ps.children(recursive=True)
            self.children.update(children)
            return next((child for child in children if child.name().startswith("p2pd")), None)
        except psutil.NoSuchProcess:
            return None

    def kill(self) -> None:
        """SIGKILL."""
        self.daemon()
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def read(self) -> None:
        """What it has logged since."""
        if not self.log.exists():
            return
        with self.log.open("rb") as log:
            log.seek(self._offset)
            for line in log:
                if not line.endswith(b"\n"):
                    break
                self._offset += len(line)
                if line.startswith(b"{"):
                    entry = json.loads(line)
                    if "round" in entry:
                        self.rounds.append(entry)
                    else:
                        # An error that ends a peer has no time.
                        self.said.append((entry.get("time", time.time()), entry["message"]))

    @property
    def round(self) -> int:
        """The newest that it logged."""
        return int(self.rounds[-1]["round"]) if self.rounds else 0

    def address(self) -> str | None:
        """What it printed for others to join with."""
        found = re.search(r"p2ptrain join (\S+)", self.out.read_text())
        return found[1] if found else None


@dataclass
class Fault:
    """One that struck, and how it ended."""

    kind: str
    peer: str
    at: float
    """Unix seconds, as all here."""
    over: float = 0.0
    """When what it needs is there again."""
    recovered: float | None = None
    """When it had applied a round that the spared peer's chain had not reached at `over`."""
    sequences_lost: int = 0
    """That it had computed, and did not know of when it came back; those of the round under way are counted whole."""


@dataclass
class Sample:
    """Of a process tree."""

    at: float
    rss_bytes: int
    daemon_rss_bytes: int
    descriptors: int
    daemon_descriptors: int


@dataclass
class Soak:
    """See the module docstring."""

    options: argparse.Namespace
    folder: Path
    lines: Lines
    peers: list[Peer]
    faults: list[Fault] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    #: (when, what) still to do
    due: list[tuple[float, Callable[[], None]]] = field(default_factory=list)
    sampled_at: float = 0.0
    #: round -> state id, as the spared peer logged it
    chain: dict[int, str] = field(default_factory=dict)
    #: of each peer, in the order in which they are waited for: seconds until it had ended
    left_after: list[float] = field(default_factory=list)
    address: str = ""
    began: float = field(default_factory=time.time)

    @property
    def spared(self) -> Peer:
        """The founder."""
        return self.peers[0]

    def step(self) -> None:
        """What there is to do and to see now."""
        now = time.time()
        for item in [item for item in self.due if item[0] <= now]:
            self.due.remove(item)
            item[1]()
        for peer in self.peers:
            before = len(peer.rounds)
            peer.read()
            for entry in peer.rounds[before:]:
                self.saw(peer, entry)
            if peer.process is not None and not peer.busy and peer.process.poll() is not None:
                self.wrong.append(f"{peer.name} ended by itself with {peer.process.poll()}")
                raise SystemExit(f"{self.wrong[-1]}; see {peer.log}")
        if now - self.sampled_at >= SAMPLE_SECONDS:
            self.sampled_at = now
            self.samples.append(self.sample(self.spared))
            for peer in self.peers[1:]:
                peer.daemon()
        time.sleep(0.1)

    def saw(self, peer: Peer, entry: dict[str, Any]) -> None:
        """A round line."""
        number, state = entry["round"], entry["state_id"]
        if peer is self.spared:
            self.chain[number] = state
        for fault in self.faults:
            if fault.peer != peer.name or fault.recovered is not None or not fault.over:
                continue
            theirs = self.chain.get(number, state)  # the spared peer may not have logged it yet
            if entry["time"] >= fault.over and number > self.round_at(fault.over) and theirs == state:
                fault.recovered = entry["time"]
                peer.busy = False

    def round_at(self, when: float) -> int:
        """Of the spared peer."""
        return max((int(e["round"]) for e in self.spared.rounds if e["time"] <= when), default=0)

    def sample(self, peer: Peer) -> Sample:
        """Memory and descriptors."""
        daemon = peer.daemon()
        return Sample(
            time.time(),
            peer.ps.memory_info().rss,
            daemon.memory_info().rss if daemon else 0,
            peer.ps.num_fds(),
            daemon.num_fds() if daemon else 0,
        )

    def wait(self, seconds: float, until: Callable[[], bool] = lambda: False) -> bool:
        """Go on for so long, or until something is true."""
        deadline = time.time() + seconds
        while time.time() < deadline:
            self.step()
            if until():
                return True
        return until()

    # ---- faults -----------------------------------------------------------------------------------------------

    def strike(self, kind: str, peer: Peer, chance: random.Random) -> None:
        """One fault begins; its end is due later."""
        fault = Fault(kind, peer.name, time.time())
        self.faults.append(fault)
        peer.busy = True
        match kind:
            case "kill" | "wipe":
                before, last = ([0, 0] + [entry["sequences_read"] for entry in peer.rounds[-2:]])[-2:]
                lost_from = last + max(0, last - before)  # what it computed since is not logged
                peer.kill()
                if kind == "wipe":
                    shutil.rmtree(peer.home)

                def back() -> None:
                    peer.start("join", self.address)
                    fault.over = time.time()
                    if kind == "kill":
                        self.due.append((time.time() + 20.0, lambda: self.count_lost(peer, fault, lost_from)))

                self.due.append((time.time() + chance.uniform(0.0, 10.0), back))
            case "stop":
                stopped = peer.ps
                stopped.suspend()

                def go_on() -> None:
                    stopped.resume()
                    fault.over = time.time()

                self.due.append((time.time() + chance.uniform(1.0, 60.0), go_on))
            case "daemon":
                daemon = peer.daemon()
                if daemon is not None:
                    daemon.kill()
                fault.over = time.time()
            case "link":
                self.lines.set_link(peer.number, up=False)

                def link_up() -> None:
                    self.lines.set_link(peer.number, up=True)
                    fault.over = time.time()

                self.due.append((time.time() + chance.uniform(1.0, 30.0), link_up))
            case "address":
                self.lines.readdress(peer.number)
                fault.over = time.time()
            case "use":
                peer.used(ago_seconds=1.0)

                def idle() -> None:
                    peer.used(ago_seconds=1000.0)
                    fault.over = time.time()

                self.due.append((time.time() + chance.uniform(3.0, 30.0), idle))
            case "pause":
                peer.told(Pause())

                def resume() -> None:
                    peer.told(Resume())
                    fault.over = time.time()

                self.due.append((time.time() + chance.uniform(3.0, 30.0), resume))
            case "limit":
                peer.told(Limit("upload-limit", chance.choice(("300kbit", "1Mbit", "2Mbit"))))

                def free() -> None:
                    peer.told(Limit("upload-limit", "0"))
                    fault.over = time.time()

                self.due.append((time.time() + chance.uniform(10.0, 60.0), free))

    def count_lost(self, peer: Peer, fault: Fault, before: int) -> None:
        """How far behind what it had computed a peer came back."""
        for at, text in reversed(peer.said):
            found = re.search(r"with (\d+) sequences read", text)
            if found and at > fault.at:
                fault.sequences_lost = max(0, before - int(found[1]))
                return
        fault.sequences_lost = before

    # ---- the run ----------------------------------------------------------------------------------------------

    def run(self) -> dict[str, Any]:
        """All of it; the report."""
        options = self.options
        manifest = self.folder / "run.toml"
        manifest.write_text(MANIFEST.format(nonce=os.urandom(16).hex()))
        self.address = self.found(manifest)
        for peer in self.peers[1:]:
            peer.start("join", self.address)
        self.expect(START_SECONDS, self.all_members, "all peers are members")
        console.print(
            f"{len(self.peers)} members after {time.time() - self.began:.0f} s; calm for {options.calm:.0f} s"
        )
        self.wait(20.0)  # imports, first roots
        calm = self.rate(options.calm)
        calm_sample = self.samples[-1]
        console.print(f"calm: {calm:.1f} rounds a minute; now faults for {options.minutes:g} minutes")
        faulty_from = time.time()
        chance = random.Random(options.seed)
        rounds_before = self.spared.round
        last_said = 0.0
        while time.time() < faulty_from + 60 * options.minutes:
            self.wait(chance.uniform(*PAUSE_SECONDS))
            free = [peer for peer in self.peers[1:] if not peer.busy]
            kind = chance.choice(options.faults)
            if free:
                self.strike(kind, chance.choice(free), chance)
            self.give_up_on()
            if time.time() - last_said > 60:
                last_said = time.time()
                minutes = (time.time() - faulty_from) / 60
                rate = (self.spared.round - rounds_before) / minutes
                console.print(f"{minutes:4.1f} min: {len(self.faults)} faults, {rate:.1f} rounds a minute")
        seconds = time.time() - faulty_from
        faulty = (self.spared.round - rounds_before) / seconds * 60
        self.expect(options.recovery, lambda: not self.due, "all faults are over")
        healed_at = time.time()
        self.expect(options.recovery, self.all_well, "all peers are members of one chain again")
        convergence = time.time() - healed_at
        self.wait(30.0)
        self.samples.append(self.sample(self.spared))
        end_sample = self.samples[-1]
        finals = self.leave()
        report = self.report(calm, faulty, faulty_from, convergence, calm_sample, end_sample, finals)
        report["wrong"] = self.wrong
        return report

    def found(self, manifest: Path) -> str:
        """Start the founder; the address to join it at."""
        founder = self.spared
        founder.start("bootstrap", str(manifest))
        self.expect(START_SECONDS, lambda: founder.round >= 1, "the founder's first round")
        address = founder.address()
        assert address is not None
        return address

    def expect(self, seconds: float, condition: Callable[[], bool], what: str) -> None:
        """It comes true in time, or all is lost."""
        if not self.wait(seconds, condition):
            self.wrong.append(f"not within {seconds:.0f} s: {what}")
            rounds = ", ".join(f"{peer.name} at {peer.round}" for peer in self.peers)
            raise SystemExit(f"{self.wrong[-1]}; {rounds}; logs in {self.folder}")

    def all_members(self) -> bool:
        """By what the spared peer logs."""
        return bool(self.spared.rounds) and self.spared.rounds[-1]["members"] == len(self.peers)

    def all_well(self) -> bool:
        """Everyone has recovered, and is a member."""
        newest = self.spared.round
        near = all(newest - peer.round <= 2 and peer.rounds[-1]["members"] == len(self.peers) for peer in self.peers)
        return near and self.all_members()

    def give_up_on(self) -> None:
        """A peer that has not recovered from its fault for long is wrong; say so once."""
        for fault in self.faults:
            late = fault.recovered is None and fault.over and time.time() - fault.over > self.options.recovery
            if late and not any(fault.peer in what for what in self.wrong):
                self.wrong.append(f"{fault.peer} has not recovered from {fault.kind} at {fault.at - self.began:.0f} s")
                console.print(f"[red]{self.wrong[-1]}[/red]")

    def rate(self, seconds: float) -> float:
        """Rounds a minute from now on."""
        before, began = self.spared.round, time.time()
        self.wait(seconds)
        return (self.spared.round - before) / (time.time() - began) * 60

    def leave(self) -> list[tuple[int, str, str]]:
        """All are asked to end; (round, state id, parameter hash) by the last word of each."""
        began = time.time()
        for peer in self.peers:
            peer.daemon()
            peer.busy = True
            peer.ps.terminate()
        finals = []
        for peer in self.peers:
            assert peer.process is not None
            try:
                code = peer.process.wait(LEAVE_SECONDS)
            except subprocess.TimeoutExpired:
                self.wrong.append(f"{peer.name} has not ended within {LEAVE_SECONDS:.0f} s")
                peer.kill()
                code = 0
            self.left_after.append(round(time.time() - began, 1))
            if code != 0:
                self.wrong.append(f"{peer.name} ended with {code}")
            peer.read()
            said = " ".join(text for _, text in peer.said[-5:])
            found = re.search(r"at round (\d+): state (\w{64}), parameters sha256 (\w{64})", said)
            if found is None:
                self.wrong.append(f"{peer.name} did not say where it ended")
            else:
                finals.append((int(found[1]), found[2], found[3]))
        return finals

    def report(
        self,
        calm: float,
        faulty: float,
        faulty_from: float,
        convergence: float,
        calm_sample: Sample,
        end_sample: Sample,
        finals: list[tuple[int, str, str]],
    ) -> dict[str, Any]:
        """What came of it, and whether it is right."""
        common = min(number for number, _, _ in finals)
        disks = [replayed(peer.home, common) for peer in self.peers]
        for number, state, parameters in finals:
            if replayed(self.spared.home, number) != (state, parameters) and number <= finals[0][0]:
                self.wrong.append(f"the replica that ended at round {number} is not the one of the spared peer's chain")
        if len(set(disks)) != 1:
            self.wrong.append(f"the disks differ at round {common}: {disks}")
        orphans = psutil.wait_procs([c for peer in self.peers for c in peer.children], timeout=10)[1]
        self.hold(not orphans, f"orphans: {orphans}")
        left = [path.name for path in self.folder.glob("p2ptrain-*")]
        self.hold(not left, f"left behind: {left}")
        self.hold(faulty >= 0.6 * calm, f"{faulty:.1f} rounds a minute, {calm:.1f} in calm")
        flat = self.flatness(faulty_from)
        self.hold(flat["process_growth"] <= 0.10, f"memory of the spared peer: {flat}")
        grown = end_sample.descriptors - calm_sample.descriptors
        self.hold(grown <= 4, f"{grown} more descriptors than in calm")
        daemon_grown = end_sample.daemon_descriptors - calm_sample.daemon_descriptors
        lines = [
            json.loads(line) for peer in self.peers for line in peer.log.read_text().splitlines() if line[:1] == "{"
        ]
        tracebacks = sum(peer.log.read_text().count("Traceback (most recent") for peer in self.peers)
        self.hold(not tracebacks, f"{tracebacks} tracebacks in the logs")
        return {
            "peers": len(self.peers),
            "minutes": self.options.minutes,
            "seed": self.options.seed,
            "recovery_seconds_allowed": self.options.recovery,
            "mbit": self.options.mbit,
            "state_id": disks[0][0],
            "parameters_sha256": disks[0][1],
            "replicas_identical_at_round": common,
            "ended_at": [{"round": n, "state_id": s, "parameters_sha256": p} for n, s, p in finals],
            "rounds_per_minute_calm": round(calm, 2),
            "rounds_per_minute_under_faults": round(faulty, 2),
            "share_of_calm": round(faulty / calm, 3),
            "convergence_seconds": round(convergence, 1),
            "left_after_seconds": self.left_after,
            "memory": flat,
            "descriptors": {"calm": calm_sample.descriptors, "end": end_sample.descriptors},
            "daemon_descriptors": {"calm": calm_sample.daemon_descriptors, "grown": daemon_grown},
            "orphans": len(orphans),
            "snapshots_downloaded": self.counted("snapshots_fetched"),
            "sequences_computed": sum(self.computed(peer) for peer in self.peers),
            "sequences_given_up_by_the_living": self.counted("sequences_given_up"),
            "sequences_lost_in_crashes": sum(fault.sequences_lost for fault in self.faults),
            "tracebacks": tracebacks,
            "limits_set": sum(line.get("message", "").startswith("limits: at most") for line in lines),
            "pauses": sum(line.get("message", "").startswith("paused at round") for line in lines),
            "errors_logged": sum(line.get("level") in ("error", "critical") for line in lines),
            "faults": self.by_kind(),
            "first_loss": next((e["train_loss"] for e in self.spared.rounds if e["train_loss"] is not None), None),
            "last_loss": self.spared.rounds[-1]["train_loss"],
        }

    def hold(self, condition: bool, what: str) -> None:
        """Or it is wrong."""
        if not condition:
            self.wrong.append(what)

    def lives(self, peer: Peer) -> Iterator[list[dict[str, Any]]]:
        """Round lines by life: a counter of this process that falls begins a new one."""
        starts = [0.0]
        starts += [fault.over for fault in self.faults if fault.peer == peer.name and fault.kind in ("kill", "wipe")]
        for begin, end in zip(starts, [*starts[1:], float("inf")], strict=True):
            yield [entry for entry in peer.rounds if begin <= entry["time"] < end]

    def counted(self, key: str) -> int:
        """A counter, summed over all lives."""
        return sum(life[-1][key] for peer in self.peers for life in self.lives(peer) if life)

    def computed(self, peer: Peer) -> int:
        """Sequences, over all lives, homes wiped included."""
        homes = [0.0]
        homes += [fault.over for fault in self.faults if fault.peer == peer.name and fault.kind == "wipe"]
        total = 0
        for begin, end in zip(homes, [*homes[1:], float("inf")], strict=True):
            total += max((e["sequences_read"] for e in peer.rounds if begin <= e["time"] < end), default=0)
        return total

    def flatness(self, faulty_from: float) -> dict[str, Any]:
        """Memory over the last two thirds of the faults: its end beside its beginning, medians of a tenth each."""
        seconds = 60 * self.options.minutes
        window = [s for s in self.samples if faulty_from + seconds / 3 <= s.at <= faulty_from + seconds]
        tenth = max(1, len(window) // 10)
        report: dict[str, Any] = {}
        for name in ("rss_bytes", "daemon_rss_bytes"):
            first, last = (statistics.median(getattr(s, name) for s in w) for w in (window[:tenth], window[-tenth:]))
            kind = "daemon" if name.startswith("daemon") else "process"
            report |= {f"{kind}_mb": [round(first / 1e6, 1), round(last / 1e6, 1)]}
            report |= {f"{kind}_growth": round(last / max(first, 1) - 1, 4)}
        return report

    def by_kind(self) -> dict[str, Any]:
        """Faults and the seconds to recover from them."""
        table = {}
        for kind in self.options.faults:
            struck = [fault for fault in self.faults if fault.kind == kind]
            took = sorted(fault.recovered - fault.over for fault in struck if fault.recovered is not None)
            table[kind] = {
                "count": len(struck),
                "recovered": len(took),
                "median_seconds": round(statistics.median(took), 1) if took else None,
                "worst_seconds": round(took[-1], 1) if took else None,
                "sequences_lost": sum(fault.sequences_lost for fault in struck),
            }
        return table


def show(report: dict[str, Any]) -> None:
    """The table of faults."""
    table = Table("fault", "count", "recovered", "median s", "worst s", "sequences lost", box=None, pad_edge=False)
    for kind, row in report["faults"].items():
        table.add_row(kind, *(str(row[key]) for key in list(row)))
    console.print(table)


def main() -> int:
    """The soak."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--peers", type=int, default=6)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--calm", type=float, default=120.0, help="seconds of calm before the faults")
    parser.add_argument("--recovery", type=float, default=120.0, help="seconds that a peer may take after a fault")
    parser.add_argument("--mbit", type=float, default=20.0, help="each peer's line, both ways")
    parser.add_argument("--home", action="store_true", help="with what befalls peers at home, see above")
    parser.add_argument("--faults", type=lambda text: text.split(","), help=",".join(HOME_FAULTS))
    parser.add_argument("--out", type=Path, help="write the report there too")
    parser.add_argument("--keep", action="store_true", help="keep homes and logs, also where all went well")
    options = parser.parse_args()
    options.faults = options.faults or list(HOME_FAULTS if options.home else FAULTS)
    prepare(parser)
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp(prefix="soak-", dir="/tmp"))
    wrong = True
    try:
        with Lines(options.peers, options.mbit) as lines, contextlib.ExitStack() as undo:
            # So many come back, and so often, that what they import would be most of what they compute.
            forks = undo.enter_context(Forks()) if options.home else None
            peers = [Peer(folder, number, lines, forks) for number in range(options.peers)]
            for peer in peers[1:]:
                peer.volunteer = options.home
            soak = Soak(options, folder, lines, peers)
            try:
                report = soak.run()
            finally:
                for peer in peers:
                    if peer.process is not None and peer.process.poll() is None:
                        with contextlib.suppress(psutil.NoSuchProcess):
                            peer.ps.send_signal(signal.SIGCONT)
                        peer.kill()
        show(report)
        wrong = bool(report["wrong"])
    finally:
        if wrong or options.keep:
            console.print(f"homes and logs: {folder}")
        else:
            shutil.rmtree(folder, ignore_errors=True)
    finish(options.out, {**machine(), **report})
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
