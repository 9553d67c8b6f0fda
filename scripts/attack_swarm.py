"""Attack a swarm of real peers on this machine and measure what becomes of the honest ones.

    python scripts/attack_swarm.py --list
    python scripts/attack_swarm.py --attack offline_chain --peers 3 --seed 1 --seconds 30
    python scripts/attack_swarm.py --attack malformed --messages 1000000
    python scripts/attack_swarm.py --attack all --out docs/results/attacks.json

For each attack a fresh swarm of `p2ptrain` processes trains a small model on the embedded text, over loopback: first in
calm, then while a hostile process (`attacks/`) does what it can for --seconds, then for a while after. A row holds if
no honest peer has crashed or was expelled, all hold one replica by their disks, none took a seal of the attacker's
branch, rounds a minute stay at 0.8 of calm or more and no process has grown by a tenth. Where an honest newcomer comes
during the attack, which then lasts until it is there, it must have come to the others' chain, and to no more memory
than theirs. Rows go to stdout, progress to stderr; exits with 1 if a row does not hold.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "bench"))

from attacks.catalogue import ATTACKS, Spec
from attacks.watched import P2PTRAIN, HostileProcess, NotMeasuredError, Peer
from lab.replayed import replayed
from lab.report import Figures, machine, merged, note, read, write

from p2ptrain.config.home import Home
from p2ptrain.data.corpus import load_embedded
from p2ptrain.swarm.identity import format_peer_id, parse_peer_id

NAMES = ("ada", "grace", "linus", "barbara", "edsger", "frances", "alan", "radia")
START_SECONDS = 90.0
READY_SECONDS = 180.0
SETTLE_SECONDS = 8.0
NEWCOMER_SECONDS = 240.0
"""That a newcomer is given to come to the honest peers' chain, however short the attack."""
MESSAGES_A_SECOND_LEAST = 100
LOOK_SECONDS = 0.5
RATIO_AT_LEAST = 0.8
GROWTH_BELOW = 0.1
TEXT_BYTES = 400_000
"""Of a text that a newcomer has to fetch."""
SETTLED_ROUNDS = 2
"""At the end of a journal, which a fork of depth one may still undo."""
MANIFEST = """\
name = "attacked"
nonce = "{nonce}"

[model]
layers = 1
heads = 2
embedding = 32
context = 32

[round]
min_seconds = 0.4
max_seconds = 1.0
root_interval = 32
"""
"""What is not here has its default, waits above all."""
COLUMNS = (
    "attack",
    "hostile",
    "honest",
    "rounds_per_minute_calm",
    "rounds_per_minute_attack",
    "rounds_per_minute_ratio",
    "loss_ratio",
    "diverged",
    "crashed",
    "taken_over",
    "noticed_after_rounds",
    "expelled",
    "rss_growth",
    "newcomer_seconds",
)


@dataclass
class Window:
    """A stretch of time: its beginning and its end."""

    began: float
    ended: float = 0.0


@dataclass
class Measurement:
    """One attack on one swarm."""

    name: str
    spec: Spec
    options: argparse.Namespace
    folder: Path
    peers: list[Peer] = field(default_factory=list)
    hostile: HostileProcess | None = None
    newcomer: Peer | None = None
    memory: dict[str, tuple[int, int]] = field(default_factory=dict)
    peak: dict[str, tuple[int, int]] = field(default_factory=dict)

    def measure(self) -> Figures:
        """Calm, attack, after; the row."""
        try:
            self.found()
            if self.spec.member:
                self.start_hostile()
            self.watch(SETTLE_SECONDS)
            while self.peers[0].rounds[-1]["round"] < self.spec.rounds_before:
                self.watch(LOOK_SECONDS)
            calm = self.watch(self.options.calm)
            self.memory = {peer.name: peer.memory() for peer in self.peers}
            log_bytes = sum(peer.log.stat().st_size for peer in self.peers)
            note(f"{self.name}: calm over at round {self.peers[0].rounds[-1]['round']}")
            if not self.spec.member:
                self.start_hostile()
            assert self.hostile is not None
            self.peak = {peer.name: peer.memory() for peer in self.peers}
            self.hostile.word()
            attack = self.attack()
            note(f"{self.name}: attack over, {self.hostile.did or 'nothing told'}")
            grown = sum(peer.log.stat().st_size for peer in self.peers) - log_bytes
            self.hostile.word()
            after = self.watch(self.options.after)
            self.hostile.close()
            crashed = self.crashed()
            for peer in self.everyone:
                peer.stop()
            for peer in self.everyone:
                peer.ended()
                peer.look()
            return self.row(calm, attack, after, crashed or self.crashed(), grown)
        finally:
            for peer in self.everyone:
                peer.stop()
            if self.hostile is not None and self.hostile.process.returncode is None:
                self.hostile.close()
            for peer in self.everyone:
                peer.ended()

    @property
    def everyone(self) -> list[Peer]:
        """All honest peers, a newcomer too."""
        return [*self.peers, *([self.newcomer] if self.newcomer is not None else [])]

    def found(self) -> None:
        """Start the swarm and wait until all are members."""
        manifest, spec = self.folder / "run.toml", self.spec
        text = MANIFEST.format(nonce=f"{self.options.seed:032x}")
        if spec.access != "open":
            text += f'\n[access]\nmode = "{spec.access}"\n'
        if spec.own_text:
            path = self.folder / "text.txt"
            path.write_bytes(load_embedded().train[:TEXT_BYTES])
            made, home = self.folder / "made.toml", self.folder / NAMES[0]
            command = [*P2PTRAIN, "init", str(made), "--data", str(path), "--license", "CC0-1.0", "--home", str(home)]
            subprocess.run(command, check=True, capture_output=True)
            text += "\n[data]\n" + made.read_text().split("[data]\n")[1].split("\n# What peers compute")[0]
        manifest.write_text(text)
        self.peers.append(Peer(self.folder, NAMES[0], "bootstrap", str(manifest)))
        address = self.peers[0].started()
        for name in NAMES[1 : self.options.peers]:
            self.peers.append(Peer(self.folder, name, "join", address, *self.invitation()))
        for peer in self.peers[1:]:
            peer.started()
        deadline = time.monotonic() + START_SECONDS
        while not all(peer.rounds and peer.rounds[-1]["members"] >= len(self.peers) for peer in self.peers):
            if time.monotonic() > deadline:
                raise NotMeasuredError(f"not all became members within {START_SECONDS:.0f} s; logs in {self.folder}")
            self.watch(LOOK_SECONDS)

    def invitation(self) -> list[str]:
        """Return what a newcomer of a run that is not open needs beside an address."""
        if self.spec.access == "open":
            return []
        command = [*P2PTRAIN, "invite", "--home", str(self.peers[0].home), "--format", "json"]
        return ["--invite", json.loads(subprocess.run(command, check=True, capture_output=True).stdout)["token"]]

    def attack(self) -> Window:
        """Look on while it lasts: so many seconds, once a newcomer has come or all messages are sent."""
        assert self.hostile is not None
        window = Window(time.monotonic())
        if self.spec.newcomer != "none":
            self.start_newcomer()
        least = window.began + self.options.seconds
        longest = window.began + NEWCOMER_SECONDS
        if self.spec.counts_messages:
            longest = window.began + self.options.messages / MESSAGES_A_SECOND_LEAST

        def wanted() -> bool:
            assert self.hostile is not None
            if self.newcomer is not None:
                return self.arrived() is None and self.newcomer.process.poll() is None
            return self.spec.counts_messages and not self.hostile.finished

        while time.monotonic() < least or (wanted() and time.monotonic() < longest):
            if self.newcomer is not None and wanted():
                # It is to stay when it has come.
                least = time.monotonic() + self.options.seconds
            self.watch(LOOK_SECONDS)
            if self.hostile.process.poll() is not None:
                raise NotMeasuredError(f"the attacker has ended: {self.hostile.log.read_text()[-3000:]}")
        window.ended = time.monotonic()
        return window

    def start_newcomer(self) -> None:
        """Have an honest peer come, that is told the attacker's addresses, and one of an honest peer or none."""
        assert self.hostile is not None
        deadline = time.monotonic() + READY_SECONDS
        while not self.hostile.addresses:
            if self.hostile.process.poll() is not None or time.monotonic() > deadline:
                raise NotMeasuredError(f"the attacker says no address: {self.hostile.log.read_text()[-3000:]}")
            self.watch(LOOK_SECONDS)
        honest = [self.peers[0].address] if self.spec.newcomer == "one honest" else []
        told = [*self.hostile.addresses, *honest]
        self.newcomer = Peer(self.folder, "newcomer", "join", *told, *self.invitation())

    def arrived(self) -> float | None:
        """Return how long the newcomer took until it held a seal of the others that was made since it began."""
        assert self.hostile is not None and self.newcomer is not None
        began, branch = self.newcomer.began, self.hostile.branch
        theirs = {seal for peer in self.peers for seal, seen in peer.seals.items() if seen > began} - branch
        return min((seen - began for seal, seen in self.newcomer.seals.items() if seal in theirs), default=None)

    def start_hostile(self) -> None:
        """Start the attacker and wait until it is prepared."""
        addresses = [peer.address for peer in self.peers]
        self.hostile = HostileProcess(
            self.folder / "hostile", self.name, self.options.seed, addresses, self.options.messages
        )
        deadline = time.monotonic() + READY_SECONDS
        while self.hostile.identities is None:
            if self.hostile.process.poll() is not None or time.monotonic() > deadline:
                raise NotMeasuredError(f"the attacker is not ready: {self.hostile.log.read_text()[-3000:]}")
            self.watch(LOOK_SECONDS)

    def watch(self, seconds: float) -> Window:
        """Look on for so long."""
        window = Window(time.monotonic())
        while time.monotonic() < window.began + seconds:
            time.sleep(LOOK_SECONDS)
            for peer in self.peers:
                peer.look()
                if self.peak:
                    now, before = peer.memory(), self.peak[peer.name]
                    self.peak[peer.name] = (max(now[0], before[0]), max(now[1], before[1]))
            if self.newcomer is not None:
                self.newcomer.look()
                self.newcomer.memory()
        window.ended = time.monotonic()
        return window

    def crashed(self) -> bool:
        """Whether a peer has ended by itself, or has logged a traceback."""
        return any(peer.traceback or (peer.process.poll() not in (None, 0) and not peer.hung) for peer in self.everyone)

    # ---- what came of it --------------------------------------------------------------------------------------

    def rate(self, window: Window) -> float:
        """Rounds a minute of the peer in the middle; rounds of the attacker's branch are none."""
        assert self.hostile is not None
        branch = self.hostile.branch
        counts = [
            sum(window.began < seen <= window.ended for seal, seen in peer.seals.items() if seal not in branch)
            for peer in self.peers
        ]
        return statistics.median(counts) / (window.ended - window.began) * 60

    def loss(self, window: Window) -> float | None:
        """Mean over the last third of a window, over all peers."""
        behind = time.time() - time.monotonic()
        since, until = window.began + (window.ended - window.began) * 2 / 3 + behind, window.ended + behind
        losses = [
            entry["train_loss"]
            for peer in self.peers
            for entry in peer.rounds
            if since < entry["time"] <= until and entry["train_loss"] is not None
        ]
        return statistics.fmean(losses) if losses else None

    def noticed(self, attack: Window) -> int | None:
        """Rounds until an honest peer first warned, spoke of a fork or a refusal, or named a hostile peer."""
        assert self.hostile is not None and self.hostile.identities is not None
        names = [format_peer_id(bytes.fromhex(identity))[-8:] for identity in self.hostile.identities]
        for peer in self.peers:
            for entry in peer.said:
                text = str(entry.get("message", ""))
                telling = entry.get("level") in ("warning", "error") or text.startswith(("refused", "fork"))
                if entry["seen"] > attack.began and (telling or any(name in text for name in names)):
                    until = Window(attack.began, entry["seen"])
                    return round(self.rate(until) * (until.ended - until.began) / 60)
        return None

    def diverged(self) -> bool:
        """Whether the disks of two peers hold different replicas at one round."""
        last = [max((int(name.split("-")[1]) for name in names), default=0) for names in self.journals()]
        common = min(last) - SETTLED_ROUNDS
        try:
            return len({replayed(peer.home, common) for peer in self.everyone}) > 1
        except (FileNotFoundError, ValueError) as error:
            note(f"{self.name}: a disk lacks round {common}, the peers ended at {last}: {error}")
            return True

    def expelled(self, whom: set[bytes]) -> bool:
        """Whether an honest peer has said that one of these is expelled."""
        names = [f"{format_peer_id(peer)} is expelled" for peer in whom]
        said = [str(entry.get("message", "")) for peer in self.peers for entry in peer.said]
        return any(name in text for name in names for text in said)

    def newcomer_seconds(self) -> float | None:
        """Return what `arrived` says; None, too, where nobody came."""
        seconds = None if self.newcomer is None else self.arrived()
        return None if seconds is None else round(seconds, 1)

    def newcomer_left_again(self) -> bool:
        """Whether the newcomer had a round of the attacker's after one of the others'.

        The line of a round may come after the next one is in the journal, so lines are compared with lines.
        """
        assert self.hostile is not None
        seconds = None if self.newcomer is None else self.arrived()
        if self.newcomer is None or seconds is None:
            return False
        since = self.newcomer.began + seconds + time.time() - time.monotonic()
        misled = [entry["state_id"] in self.hostile.branch for entry in self.newcomer.rounds if entry["time"] > since]
        return False in misled and any(misled[misled.index(False) :])

    def journals(self) -> list[list[str]]:
        """Names of the files in each peer's journal."""
        return [[path.name for path in Home(peer.home).journal.glob("round-*")] for peer in self.everyone]

    def row(self, calm: Window, attack: Window, after: Window, crashed: bool, log_bytes: int) -> Figures:
        """The figures."""
        assert self.hostile is not None
        calm_rate, attack_rate = self.rate(calm), self.rate(attack)
        calm_loss, after_loss = self.loss(calm), self.loss(after)

        def growth(of: int) -> float:
            grown = [self.peak[name][of] / before[of] - 1 for name, before in self.memory.items() if before[of]]
            if self.newcomer is not None and not of:
                # Of a newcomer there is no calm; it has come when the others had been there for long.
                grown.append(self.newcomer.peak_bytes / max(before[0] for before in self.memory.values()) - 1)
            return round(max(grown), 3)

        return {
            "attack": self.name,
            "hostile": len(self.hostile.identities or ()),
            "honest": len(self.peers),
            "rounds_per_minute_calm": round(calm_rate, 1),
            "rounds_per_minute_attack": round(attack_rate, 1),
            "rounds_per_minute_ratio": round(attack_rate / max(calm_rate, 0.1), 2),
            "loss_ratio": round(after_loss / calm_loss, 3) if after_loss and calm_loss else None,
            "diverged": self.diverged(),
            "crashed": crashed,
            "taken_over": any(seal in self.hostile.branch for peer in self.peers for seal in peer.seals),
            "noticed_after_rounds": self.noticed(attack),
            "expelled": self.expelled({bytes.fromhex(one) for one in self.hostile.identities or ()}),
            "framed": self.expelled({parse_peer_id(peer.address.rpartition("/")[2]) for peer in self.peers}),
            "rss_growth": growth(0),
            "newcomer": self.spec.newcomer,
            "newcomer_seconds": self.newcomer_seconds(),
            "newcomer_left_again": self.newcomer_left_again(),
            "newcomer_misled": self.newcomer is not None and bool(self.hostile.branch & self.newcomer.seals.keys()),
            "rounds_per_minute_after": round(self.rate(after), 1),
            "daemon_rss_growth": growth(1),
            "hung": any(peer.hung for peer in self.everyone),
            "log_bytes": log_bytes,
            "seconds": round(attack.ended - attack.began, 1),
            "seed": self.options.seed,
            "did": self.hostile.did,
        }


def holds(row: Figures) -> bool:
    """Whether the honest peers have withstood it."""
    harmed = row["diverged"] or row["crashed"] or row["taken_over"] or row["framed"]
    lost = row["newcomer"] != "none" and (row["newcomer_seconds"] is None or row["newcomer_left_again"])
    if harmed or lost or row["did"].get("let_in"):
        return False
    return bool(row["rounds_per_minute_ratio"] >= RATIO_AT_LEAST and row["rss_growth"] < GROWTH_BELOW)


def show(rows: list[Figures]) -> str:
    """The rows for people."""
    cells = [list(COLUMNS), *([str(row[column]) for column in COLUMNS] for row in rows)]
    widths = [max(len(line[place]) for line in cells) for place in range(len(COLUMNS))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in cells)


def main() -> int:
    """All attacks asked for, one after the other."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--attack", metavar="NAME|all", action="append", help="may be given several times")
    parser.add_argument("--list", action="store_true", help="say which attacks there are")
    parser.add_argument("--peers", type=int, default=3, help=f"honest peers, {len(NAMES)} at most")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--calm", type=float, default=20.0, help="seconds of calm that are measured")
    parser.add_argument("--seconds", type=float, default=30.0, help="seconds of attack")
    parser.add_argument("--messages", type=int, default=1_000_000, help="malformed ones that `malformed` sends")
    parser.add_argument("--after", type=float, default=15.0, help="seconds after it")
    parser.add_argument("--format", choices=("table", "json"), default="table")
    parser.add_argument("--out", type=Path, help="put the rows into this file, in place of those of the same attacks")
    parser.add_argument("--keep", action="store_true", help="keep homes and logs, also of rows that hold")
    options = parser.parse_args()
    if options.list:
        for name, spec in ATTACKS.items():
            print(f"{name:<30} {spec.attacker}: {spec.what}")
        return 0
    asked = list(ATTACKS) if "all" in (options.attack or ()) else options.attack or []
    unknown = [name for name in asked if name not in ATTACKS]
    if not asked or unknown or not 2 <= options.peers <= len(NAMES):
        parser.error(f"no such attack: {', '.join(unknown)}" if unknown else "--attack NAME|all, --peers 2 to 8")
    # A handler of our own, because a shell starts background jobs with SIGINT ignored.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    rows: list[Figures] = []
    failed = False
    try:
        for name in asked:
            folder = Path(tempfile.mkdtemp(prefix="attack-", dir="/tmp"))
            keep = options.keep
            try:
                row = Measurement(name, ATTACKS[name], options, folder).measure()
                rows.append(row)
                keep = keep or not holds(row)
                note(f"{name}: {'holds' if holds(row) else 'does not hold'}")
            except NotMeasuredError as error:
                failed = keep = True
                note(f"{name}: not measured: {error}")
                continue
            finally:
                if keep:
                    note(f"{name}: homes and logs: {folder}")
                else:
                    shutil.rmtree(folder, ignore_errors=True)
            if options.out is not None:
                before = read(options.out) or {"rows": []}
                write(options.out, {**machine(), "rows": merged(before["rows"], row, ["attack"])})
    except KeyboardInterrupt:
        note("interrupted")
        return 130
    finally:
        if rows:
            print(show(rows) if options.format == "table" else json.dumps(rows, indent=1))
    return int(failed or not all(map(holds, rows)))


if __name__ == "__main__":
    sys.exit(main())
