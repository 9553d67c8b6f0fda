"""How fast a learner gets a snapshot from 1, 2 and 4 donors, and what handing out costs a donor that trains.

    python scripts/bench/state_transfer.py --out docs/results/state_transfer.json

Real peers on loopback. Donors of the first part pace what they hand out as behind a line of --kbit, so figures are
those of such lines as long as this machine's cores suffice. The donor that trains is one `p2ptrain bootstrap` process
for each of --rates, which is what it hands out at most, by --upload-limit; its own bound while it trains,
`handout.BUSY_BYTES_A_CORE`, is lifted. Alone in its swarm its line is not shared with rounds. Its rounds are of a fixed
size, so that rounds a minute are its speed, with and without two learners that download without end, by turns.
`handed_out_bytes_per_second` is what the learners got.
Takes 16 minutes on two cores that have other work too, less on a quiet machine.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from lab.report import Figures, Watch, finish, machine, merged, note, read, write

from p2ptrain.calls.client import Client
from p2ptrain.calls.handout import BUSY_BYTES_A_CORE, Handout
from p2ptrain.calls.messages import NAMESPACE, SnapshotOffer, Traffic
from p2ptrain.calls.servicer import PeerServicer
from p2ptrain.chain import genesis
from p2ptrain.config.manifest import Manifest, ModelConfig, open_manifest
from p2ptrain.history.catching_up import CatchingUp
from p2ptrain.history.download import Download
from p2ptrain.state.journal import Journal
from p2ptrain.state.pieces import Partials
from p2ptrain.state.snapshot import SnapshotStore
from p2ptrain.swarm.identity import verify
from p2ptrain.swarm.node import SwarmNode
from p2ptrain.swarm.thread import new_network_loop
from p2ptrain.training.replica import Replica

PARTS = ("donors", "training")
SNAPSHOT_BYTES = 12 * 1024 * 1024
LINE_KBIT = 16_000
"""Of each donor of the first part: 1 MB/s for snapshots."""
CROWD = 4
TURNS = 3
TURN_SECONDS = 7.0
RATES_BYTES = tuple(factor * BUSY_BYTES_A_CORE for factor in (1, 2, 4, 8))
"""Of the donor that trains: the most of one on as many cores."""
MANIFEST = """\
name = "bench"
nonce = "{nonce}"
[model]
layers = 2
heads = 4
embedding = 256
context = 128
[round]
pace = "fixed"
sequences_per_peer = 8
micro_batch = 4
root_interval = 64
"""


class Peer:
    """As much of a peer as hands out and fetches snapshots."""

    def __init__(self, node: SwarmNode, folder: Path, run_id: bytes, kbit: int) -> None:
        folder.mkdir(parents=True)
        self.node, self.store, self.partials = node, SnapshotStore(folder), Partials(folder)
        self.knows: list[bytes] = []
        self.handout, self.traffic = Handout(lambda: kbit), Traffic()
        self.client = Client(node, self.traffic, run_id, self.handout)
        tiny = Manifest(name="tiny", nonce="0" * 32, model=ModelConfig(layers=1, heads=2, embedding=16, context=16))
        self.catching_up = CatchingUp(
            self.client,
            Replica(tiny, run_id, torch.device("cpu")).codec,
            Journal(folder, run_id, verify),
            self.store,
            self.partials,
            lambda: self.knows,
            genesis(run_id),
            64,
            2**40,
            lambda data: None,  # type: ignore[arg-type, return-value]
            lambda what, done, of: None,
        )

    def admits(self, peer: bytes) -> bool:
        """Everybody may have it."""
        return True

    def wrong_run(self, run_id: bytes) -> str | None:
        """Every run is ours."""
        return None

    def parted_at(self, locator: tuple[bytes, ...]) -> bytes:
        """Return nothing: what is not in the journal is not remembered."""
        return b""

    async def fetch(self, offer: SnapshotOffer, donor: bytes) -> float:
        """Seconds that it takes."""
        began = time.monotonic()
        download = Download(self.client, offer, self.partials, lambda: self.knows, lambda done, of: None)
        self.catching_up._download = download
        await download.run(donor)
        return time.monotonic() - began


async def peers_of(count: int, folder: Path, first: list[str], run_id: bytes, kbit: int) -> list[Peer]:
    """So many, each of which can reach all."""
    made: list[Peer] = []
    addresses = list(first)
    for number in range(count):
        node = await SwarmNode.create(None, addresses)
        addresses += await node.join_addresses()
        peer = Peer(node, folder / str(number), run_id, kbit)
        answering: Any = peer
        await node.add_servicer(PeerServicer(answering, peer.traffic), NAMESPACE)
        made.append(peer)
    for one in made:
        for other in made:
            if one is not other:
                await one.node.connect(other.node.peer_id, await other.node.join_addresses())
    return made


async def by_donors(folder: Path, kbit: int) -> dict[str, Any]:
    """Download times by the number of donors, and of a crowd at one donor."""
    run_id, identifier = bytes(32), bytes(31) + b"\1"
    peers = await peers_of(4 + CROWD, folder, [], run_id, kbit)
    donors, learners = peers[:4], peers[4:]
    data = os.urandom(SNAPSHOT_BYTES)
    for donor in donors:
        snapshot = donor.store.save(64, identifier, data)
    offer = SnapshotOffer(64, identifier, snapshot.root, len(data))
    seconds: dict[str, float] = {}
    for count in (1, 2, 4):
        learner = learners[0]
        learner.knows = [donor.node.peer_id for donor in donors[:count]]
        seconds[str(count)] = round(await learner.fetch(offer, learner.knows[0]), 2)
        learner.catching_up._download = None
        learner.partials.keep_only(None)
    sent = donors[0].traffic.sent
    for learner in learners:
        learner.knows = [other.node.peer_id for other in learners]
    crowd = await asyncio.gather(*(learner.fetch(offer, donors[0].node.peer_id) for learner in learners))
    for peer in peers:
        await peer.node.close()
    return {
        "snapshot_bytes": SNAPSHOT_BYTES,
        "donor_bytes_per_second": round(donors[0].handout.rate),
        "seconds_by_donors": seconds,
        "crowd_of": CROWD,
        "crowd_seconds": round(max(crowd), 2),
        "crowd_snapshots_sent_by_donor": round((donors[0].traffic.sent - sent) / SNAPSHOT_BYTES, 2),
    }


class TrainingDonor:
    """A peer that trains alone, as a user starts it, and hands out at `rate` bytes a second."""

    def __init__(self, folder: Path, rate: int) -> None:
        folder.mkdir()
        manifest = folder / "run.toml"
        manifest.write_text(MANIFEST.format(nonce=os.urandom(16).hex()))
        self.home = folder / "home"
        code = "from p2ptrain.calls import handout; "
        # Looked for by name, since to set what a module does not read would vary nothing.
        code += "assert 'BUSY_BYTES_A_CORE' in vars(handout); handout.BUSY_BYTES_A_CORE = 2**40; "
        code += "from p2ptrain.cli.main import run; run()"
        flags = ["--home", str(self.home), "--host", "127.0.0.1", "--threads", "1"]
        flags += ["--upload-limit", f"{rate * 8 // 1000}kbit"]
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, "bootstrap", str(manifest), *flags],
            stdout=subprocess.PIPE,
            stderr=(folder / "log").open("w"),
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert self.process.stdout is not None
        found = re.search(r"p2ptrain join (\S+)", self.process.stdout.readline())
        if found is None:
            raise SystemExit(f"it did not start: {(folder / 'log').read_text()}")
        self.address = found[1]

    def sealed_at(self) -> dict[int, float]:
        """When each round that is still in its journal was sealed [s]."""
        found = {}
        for path in (self.home / "journal").glob("round-*"):
            try:
                found[int(path.name.split("-")[1])] = path.stat().st_mtime
            except FileNotFoundError:
                continue  # pruned meanwhile
        return found

    def serving_seconds(self) -> float:
        """CPU time so far of all but the thread that trains: the network thread and the libp2p daemon [core-s]."""
        process = psutil.Process(self.process.pid)
        threads = [t for t in process.threads() if t.id != process.pid]
        children = [t for child in process.children(recursive=True) for t in child.threads()]
        return sum(t.user_time + t.system_time for t in (*threads, *children))

    def stop(self) -> None:
        """End it."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


async def training(folder: Path, rate: int) -> dict[str, Any]:
    """A donor's rounds a minute with and without two learners."""
    donor = TrainingDonor(folder / "donor", rate)
    try:
        _, run_id = open_manifest((donor.home / "manifest.signed").read_bytes())
        learners = await peers_of(2, folder / "learners", [donor.address], run_id, LINE_KBIT)
        peer_id = next(p for p in learners[0].node.known_peers if p not in [one.node.peer_id for one in learners])
        offers: tuple[SnapshotOffer, ...] = ()
        while not offers:
            await asyncio.sleep(0.5)
            header, _ = await learners[0].client.rounds(peer_id, (bytes(32),), 2**30)
            offers = header.snapshots
        speeds: dict[bool, list[float]] = {True: [], False: []}
        serving: dict[bool, list[float]] = {True: [], False: []}
        received, seconds = 0, 0.0
        for turn in range(2 * TURNS):
            busy = turn % 2 == 1
            served = donor.serving_seconds()
            before, began, wall = sum(one.traffic.received for one in learners), time.monotonic(), time.time()
            fetching = [asyncio.create_task(fetch_without_end(one, peer_id)) for one in learners] if busy else []
            await asyncio.sleep(TURN_SECONDS)
            for task in fetching:
                task.cancel()
            ended = await asyncio.gather(*fetching, return_exceptions=True)
            faults = [fault for fault in ended if not isinstance(fault, asyncio.CancelledError)]
            if faults:
                raise SystemExit(f"a download failed: {faults}")
            serving[busy].append((donor.serving_seconds() - served) / (time.monotonic() - began))
            times = sorted(at for at in donor.sealed_at().values() if at >= wall)
            speeds[busy].append(60.0 * (len(times) - 1) / (times[-1] - times[0]))
            if busy:
                received += sum(one.traffic.received for one in learners) - before
                seconds += time.monotonic() - began
        for one in learners:
            await one.node.close()
    finally:
        donor.stop()
    alone, handing_out = statistics.median(speeds[False]), statistics.median(speeds[True])
    return {
        "rate_bytes_per_second": rate,
        "snapshot_bytes": offers[0].length,
        "rounds_per_minute_alone": round(alone, 1),
        "rounds_per_minute_handing_out": round(handing_out, 1),
        "speed_kept": round(handing_out / alone, 3),
        "speed_kept_by_turn": [round(b / a, 3) for a, b in zip(speeds[False], speeds[True], strict=True)],
        "handed_out_bytes_per_second": round(received / seconds),
        "donor_cores_for_it": round(statistics.mean(serving[True]) - statistics.mean(serving[False]), 3),
    }


async def fetch_without_end(learner: Peer, donor: bytes) -> None:
    """One newest snapshot after another, until cancelled."""
    while True:
        header, _ = await learner.client.rounds(donor, (bytes(32),), 2**30)
        learner.knows = [donor]
        await learner.fetch(max(header.snapshots, key=lambda offer: offer.round), donor)
        learner.catching_up._download = None
        learner.partials.keep_only(None)


def main() -> int:
    """The benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kbit", type=int, default=LINE_KBIT, help="line of a donor that only hands out; %(default)s")
    parser.add_argument(
        "--rates",
        type=lambda text: [int(rate) for rate in text.split(",")],
        default=RATES_BYTES,
        help="of the donor that trains, in bytes a second; %(default)s",
    )
    parser.add_argument("--part", choices=PARTS, action="append", help="this part alone; repeatable")
    parser.add_argument("--out", type=Path, help="the result; what is in it and not measured now stays")
    options = parser.parse_args()
    parts = options.part or PARTS
    result: Figures = {"training_donor": []} | (read(options.out) or {}) | machine()
    with (
        tempfile.TemporaryDirectory(prefix="p2pbench-") as name,
        asyncio.Runner(loop_factory=new_network_loop) as runner,
    ):
        if "donors" in parts:
            watch = Watch()
            result["donors"] = runner.run(by_donors(Path(name) / "donors", options.kbit)) | watch.figures()
            note(str(result["donors"]))
            write(options.out, result)
        for rate in options.rates if "training" in parts else ():
            watch, folder = Watch(), Path(name) / str(rate)
            folder.mkdir()
            row = runner.run(training(folder, rate)) | watch.figures()
            note(str(row))
            result["training_donor"] = merged(result["training_donor"], row, ("rate_bytes_per_second",))
            write(options.out, result)
    finish(options.out, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
