"""What volunteers' pauses cost: four real peers, three of them on machines that are wanted at random.

    python scripts/bench/volunteer.py --pauses 50 --seed 1 --out docs/results/volunteer.json

Each peer is a `p2ptrain` process on this machine; a file says of each volunteer's machine whether it is used. First all
four train in calm. Then one volunteer after another, chosen at random, is paused for 3 to 10 s by the use of its
machine, and goes on once that ends. Given are the rounds a minute of the peer that is never paused, in calm and while
somebody is paused; the seconds from the machine's being wanted until its memory was given back, as the peer measures
them and as seen from outside, where the look once a second is in them; how much memory that was; and whether a resume
fetched a snapshot. At the end all leave, and the disks are replayed to one round: state and parameters must be equal.

All peers share this machine's cores, so that a pause leaves more for the others than it would with machines of their
own. Prints one JSON object last; exits with 1 where a replica differs, a peer has ended or a pause has not come.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import secrets
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import psutil
from lab.replayed import replayed
from lab.report import Figures, finish, machine, note

from p2ptrain.config.home import Home
from p2ptrain.config.manifest import open_manifest
from p2ptrain.peer.control import Ask, ask
from p2ptrain.peer.machine_use import VARIABLE
from p2ptrain.state.files import atomic_write
from p2ptrain.state.journal import Journal
from p2ptrain.swarm.identity import verify

PEERS = 4
PAUSE_SECONDS = (3.0, 10.0)
WAIT_SECONDS = 900.0
"""For a peer to start, or to go on, on a machine that may be busy."""
LOOK_SECONDS = 0.05
MANIFEST = """\
name = "volunteer"
nonce = "{nonce}"

[model]
layers = 1
heads = 6
embedding = {embedding}
context = 32

[round]
micro_batch = 4
min_seconds = 1.0
max_seconds = 2.0
root_interval = 64
"""


class Peer:
    """One peer; a volunteer where `use` is given."""

    def __init__(self, folder: Path, number: int, command: list[str], *, volunteer: bool) -> None:
        self.name, self.home, self.use = f"peer{number}", folder / f"peer{number}", folder / f"use{number}.json"
        self.log, self.out = folder / f"peer{number}.log", folder / f"peer{number}.out"
        self.idle(1000.0)
        flags = ["--home", str(self.home), "--name", self.name, "--threads", "1", "--host", "127.0.0.1"]
        flags += ["-v", "--log-format", "json", *(["--volunteer"] if volunteer else [])]
        with self.log.open("w") as log, self.out.open("w") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "p2ptrain", *command, *flags],
                stdout=out,
                stderr=log,
                env={**os.environ, "OMP_NUM_THREADS": "1", VARIABLE: str(self.use)},
                start_new_session=True,
            )

    def idle(self, seconds: float) -> None:
        """Have the machine be used so long ago."""
        atomic_write(self.use, json.dumps({"idle_seconds": seconds}).encode())

    def status(self) -> dict[str, Any]:
        """What it answers; {} where it does not yet."""
        try:
            return ask(Home(self.home).control, Ask(), 30.0)
        except Exception:
            return {}

    def said(self, text: str) -> list[str]:
        """What it has logged with this in it."""
        entries = [json.loads(line) for line in self.log.read_text().splitlines() if line.startswith("{")]
        return [entry["message"] for entry in entries if text in entry.get("message", "")]

    @property
    def rss(self) -> int:
        """Resident bytes of its process."""
        return int(psutil.Process(self.process.pid).memory_info().rss)

    def trains(self) -> bool:
        """Whether it has a part in rounds."""
        return self.status().get("state") == "training"

    def until(self, condition: Callable[[], Any], what: str) -> Any:
        """Wait for it. Raises RuntimeError."""
        deadline = time.monotonic() + WAIT_SECONDS
        while time.monotonic() < deadline and self.process.poll() is None:
            if value := condition():
                return value
            time.sleep(LOOK_SECONDS)
        raise RuntimeError(f"{self.name}: not {what}:\n{self.log.read_text()[-2000:]}")


def pause(peer: Peer, seconds: float) -> Figures:
    """Have the machine of a volunteer be used for so long, and return what came of it."""
    before, held = len(peer.said("memory was given back")), peer.rss
    began = time.monotonic()
    peer.idle(1.0)
    peer.until(lambda: len(peer.said("memory was given back")) > before, "paused")
    seen = time.monotonic() - began
    freed = held - peer.rss
    told = float(re.findall(r"given back ([\d.]+) s", peer.said("memory was given back")[-1])[0])
    time.sleep(seconds)
    snapshots = len(peer.said("snapshot"))
    peer.idle(1000.0)
    back = time.monotonic()
    peer.until(peer.trains, "back")
    return {
        "peer": peer.name,
        "given_back_after_seconds": told,
        "seen_from_outside_after_seconds": round(seen, 2),
        "freed_bytes": freed,
        "resumed_after_seconds": round(time.monotonic() - back, 2),
        "fetched_a_snapshot": len(peer.said("snapshot")) > snapshots,
    }


def play(options: argparse.Namespace, folder: Path) -> Figures:
    """Calm, pauses, the end."""
    chance = random.Random(options.seed)
    run_toml = folder / "run.toml"
    run_toml.write_text(MANIFEST.format(nonce=secrets.token_hex(16), embedding=options.embedding))
    spared = Peer(folder, 0, ["bootstrap", str(run_toml)], volunteer=False)
    peers = [spared]
    try:
        found = spared.until(lambda: re.search(r"p2ptrain join (\S+)", spared.out.read_text()), "started")
        for number in range(1, PEERS):
            peers.append(Peer(folder, number, ["join", found[1]], volunteer=True))
        for peer in peers:
            peer.until(partial(_in_a_group_of_all, peer), "in a group of all")
        note(f"{PEERS} peers train")

        def rounds_a_minute(work: Callable[[], Any]) -> tuple[float, Any]:
            first, began = spared.status()["round"], time.monotonic()
            result = work()
            return 60 * (spared.status()["round"] - first) / (time.monotonic() - began), result

        calm, _ = rounds_a_minute(lambda: time.sleep(options.calm_seconds))
        note(f"calm: {calm:.1f} rounds a minute")
        pauses: list[Figures] = []

        def all_pauses() -> None:
            for number in range(options.pauses):
                pauses.append(pause(chance.choice(peers[1:]), chance.uniform(*PAUSE_SECONDS)))
                note(f"pause {number + 1} of {options.pauses}: {pauses[-1]}")

        paused, _ = rounds_a_minute(all_pauses)
        ended = [peer.name for peer in peers if peer.process.poll() is not None]
        for peer in reversed(peers):
            peer.process.send_signal(signal.SIGINT)
            peer.process.wait(WAIT_SECONDS)
    finally:
        for peer in peers:
            if peer.process.poll() is None:
                peer.process.kill()
                peer.process.wait()
    common = min(_last_round(peer.home) for peer in peers)
    replicas = {replayed(peer.home, common) for peer in peers}
    gone = [message for peer in peers for message in peer.said("given up") + peer.said("Traceback")]
    return {
        **machine(),
        "peers": PEERS,
        "pauses": len(pauses),
        "rounds_a_minute_in_calm": round(calm, 2),
        "rounds_a_minute_with_pauses": round(paused, 2),
        "given_back_after_seconds": _spread([one["given_back_after_seconds"] for one in pauses]),
        "seen_from_outside_after_seconds": _spread([one["seen_from_outside_after_seconds"] for one in pauses]),
        "resumed_after_seconds": _spread([one["resumed_after_seconds"] for one in pauses]),
        "freed_bytes": _spread([one["freed_bytes"] for one in pauses]),
        "snapshots_fetched": sum(one["fetched_a_snapshot"] for one in pauses),
        "replayed_to_round": common,
        "replicas_at_that_round": len(replicas),
        "peers_that_ended": ended,
        "contributions_given_up": gone,
        "ok": len(replicas) == 1 and not ended and not gone,
    }


def _in_a_group_of_all(peer: Peer) -> bool:
    return peer.trains() and bool(peer.status()["members"] == PEERS)


def _last_round(home: Path) -> int:
    held = Home(home)
    _, run_id = open_manifest(held.manifest.read_bytes())
    return Journal(held.journal, run_id, verify).last


def _spread(values: list[float]) -> Figures:
    return {"median": statistics.median(values), "most": max(values), "least": min(values)}


def main() -> None:
    """Play it and print what came of it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pauses", type=int, default=50)
    parser.add_argument("--calm-seconds", type=float, default=60.0)
    parser.add_argument("--embedding", type=int, default=384)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="volunteer-") as folder:
        figures = play(options, Path(folder))
    finish(options.out, figures)
    if not figures["ok"]:
        sys.exit(1)


if __name__ == "__main__":
    main()
