"""Whether a peer keeps its owner's limits: three real peers, each behind a line, one of them with limits.

    python scripts/bench/limits.py --out docs/results/limits.json
    python scripts/bench/limits.py --minutes 60

As root, on Linux. Each peer is a process in a network namespace of its own (lab/lines.py), and what counts is what the
counters of its interface say, read ten times a second by a process of its own: every packet of the daemon is in it,
headers of IP and TCP included, those of Ethernet taken off. Of each part the most in any 10 s is given, as a share of
the limit, beside rounds a minute and the share of the limited peer's rounds that have its contribution:

- calm: no limits;
- upload: `--upload-limit`, while one newcomer after another downloads the run's state, from that peer too;
- download: a newcomer with `--download-limit` comes, fetches the state and trains;
- month: `--monthly-transfer` such that what is left of the month allows --month-rate, both ways together, and
  `--upload-limit`. What was carried is also compared with what the month allowed until then: its even rate, of which
  ten minutes' worth may be used at once.

Prints one JSON object last. Exit code 1: a limit did not hold, or a peer trained no more.
"""

from __future__ import annotations

import argparse
import bisect
import contextlib
import json
import os
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from lab.counted import work_of
from lab.lines import Lines, prepare
from lab.report import Figures, finish, machine, note

from p2ptrain.config.amounts import parse_rate
from p2ptrain.state.transfer import month_ends_at
from p2ptrain.swarm.line import MONTH_BURST_SECONDS

PARTS = ("calm", "upload", "download", "month")
LINE_MBIT = 100.0
WINDOW_SECONDS = 10.0
MARGIN = 1.05
ETHERNET_BYTES = 14
NEWCOMER_SECONDS = 300.0
"""A peer comes with an empty home, fetches all, trains, and leaves when the next one comes."""
PEERS = 4
LIMITED, NEWCOMER = 2, 3
MANIFEST = """\
name = "limits"
nonce = "{nonce}"

[model]
layers = 2
heads = 2
embedding = {embedding}
context = 32

[optimizer]
warmup_rounds = 4
total_rounds = 1000

[round]
pace = "fixed"
sequences_per_peer = 4
micro_batch = 4
min_seconds = 4.0
max_seconds = 8.0
round_max_seconds = 20.0
grace_seconds = 3.0
reply_timeout_seconds = 8.0
root_interval = 32
"""
SAMPLER = """\
import sys, time
files = [open(f"/sys/class/net/eth0/statistics/{w}_{u}") for w in ("tx", "rx") for u in ("bytes", "packets")]
while True:
    figures = []
    for file in files:
        file.seek(0)
        figures.append(file.read().strip())
    print(time.time(), *figures, flush=True)
    time.sleep(0.1)
"""


class Samples:
    """What one line has carried, ten times a second."""

    def __init__(self, lines: Lines, number: int) -> None:
        #: when, bytes sent and received until then
        self.at: list[float] = []
        self.sent: list[int] = []
        self.received: list[int] = []
        self._process = subprocess.Popen(
            [*lines.inside(number), sys.executable, "-c", SAMPLER], stdout=subprocess.PIPE, text=True
        )
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            when, sent, sent_packets, received, received_packets = (float(word) for word in line.split())
            self.sent.append(int(sent - ETHERNET_BYTES * sent_packets))
            self.received.append(int(received - ETHERNET_BYTES * received_packets))
            self.at.append(when)

    def most_in_window(self, carried: Sequence[float], since: float = 0.0) -> float:
        """The most bytes a second over any `WINDOW_SECONDS`."""
        most = 0.0
        for i in range(bisect.bisect_left(self.at, since), len(self.at)):
            j = bisect.bisect_left(self.at, self.at[i] + WINDOW_SECONDS)
            if j < len(self.at):
                most = max(most, (carried[j] - carried[i]) / (self.at[j] - self.at[i]))
        return most

    def mean(self, carried: Sequence[float]) -> float:
        """Bytes a second over all of it."""
        return (carried[-1] - carried[0]) / (self.at[-1] - self.at[0])

    def close(self) -> None:
        """End the process that reads."""
        self._process.kill()
        self._process.wait()


class Peer:
    """`p2ptrain` behind one line."""

    def __init__(self, lines: Lines, number: int, folder: Path, *command: str) -> None:
        self.number, self.home, self.log = number, folder / str(number), folder / f"{number}.log"
        flags = ["--home", str(self.home), "--name", f"peer{number}", "--host", lines.address(number), "-v"]
        flags += ["--threads", "1", "--log-format", "json"]
        self.began = time.time()
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        with self.log.open("a") as errors:
            self.process = subprocess.Popen(
                [*lines.inside(number), sys.executable, "-m", "p2ptrain", *command, *flags],
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=environment,
            )

    def address(self) -> str:
        """From the line that it prints for others."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if found := re.fullmatch(r"Join with:  p2ptrain join (\S+)\n", line):
                return found[1]
        raise SystemExit(f"peer {self.number} printed no join line:\n{self.log.read_text()[-3000:]}")

    @property
    def round(self) -> int:
        """The newest round in its journal."""
        rounds = [int(path.name.split("-")[1]) for path in (self.home / "journal").glob("round-*")]
        return max(rounds, default=0)

    def reaches(self, round: int, seconds: float) -> None:
        """Wait for a round."""
        until = time.monotonic() + seconds
        while self.round < round:
            if self.process.poll() is not None or time.monotonic() > until:
                raise SystemExit(f"peer {self.number} is at round {self.round}:\n{self.log.read_text()[-3000:]}")
            time.sleep(0.2)

    def stop(self) -> None:
        """As Ctrl-C does, and harder after a while."""
        if self.process.poll() is None:
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(30)
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()


@contextlib.contextmanager
def swarm(options: argparse.Namespace, *limits: str) -> Iterator[tuple[Lines, Path, list[Peer], str]]:
    """Two peers without limits and one with `limits`, all of them in rounds."""
    began = time.monotonic()
    with contextlib.ExitStack() as undo:
        folder = Path(undo.enter_context(tempfile.TemporaryDirectory(prefix="p2ptrain-limits-", dir=options.scratch)))
        lines = undo.enter_context(Lines(PEERS, LINE_MBIT))
        manifest = folder / "run.toml"
        manifest.write_text(MANIFEST.format(nonce=secrets.token_hex(16), embedding=options.embedding))
        peers = [Peer(lines, 0, folder, "bootstrap", str(manifest))]
        undo.callback(peers[0].stop)
        address = peers[0].address()
        for number in (1, LIMITED):
            peers.append(Peer(lines, number, folder, "join", address, *(limits if number == LIMITED else ())))
            undo.callback(peers[-1].stop)
        note("three peers have started")
        peers[LIMITED].reaches(peers[0].round + 2, 600)
        note(f"in rounds after {time.monotonic() - began:.0f} s")
        yield lines, folder, peers, address


def warnings(peer: Peer) -> list[str]:
    """What its log warned of, the first five."""
    entries = [json.loads(line) for line in peer.log.read_text().splitlines() if line.startswith("{")]
    return [entry["message"] for entry in entries if entry.get("level") == "warning"][:5]


def run_part(part: str, options: argparse.Namespace) -> Figures:
    """One part's figures."""
    seconds = 60.0 * options.minutes
    limits: tuple[str, ...] = ()
    if part == "upload":
        limits = ("--upload-limit", options.upload_limit)
    if part == "month":
        whole = int(options.month_rate * (month_ends_at(time.time()) - time.time()))
        limits = ("--monthly-transfer", f"{whole / 1e6:.3f}MB", "--upload-limit", options.upload_limit)
    with swarm(options, *limits) as (lines, folder, peers, address):
        limited = peers[LIMITED]
        if part == "download":
            limited = Peer(lines, NEWCOMER, folder, "join", address, "--download-limit", options.download_limit)
        samples = Samples(lines, limited.number)
        first, began = peers[0].round, time.monotonic()
        newcomer: Peer | None = None
        newcomers, next_comes = 0, began
        try:
            while time.monotonic() - began < seconds:
                if part != "download" and time.monotonic() >= next_comes:
                    if newcomer is not None:
                        newcomer.stop()
                        # Where all cores are taken it may not have got as far as to make it.
                        shutil.rmtree(newcomer.home, ignore_errors=True)
                    newcomer = Peer(lines, NEWCOMER, folder, "join", address)
                    newcomers, next_comes = newcomers + 1, next_comes + NEWCOMER_SECONDS
                if limited.process.poll() is not None:
                    raise SystemExit(f"the limited peer has ended:\n{limited.log.read_text()[-3000:]}")
                time.sleep(0.5)
            rounds, minutes = peers[0].round - first, (time.monotonic() - began) / 60
        finally:
            samples.close()
            for peer in (newcomer, limited):
                if peer is not None:
                    peer.stop()
        both = [sent + received for sent, received in zip(samples.sent, samples.received, strict=True)]
        found: Figures = {
            "minutes": round(minutes, 2),
            "newcomers": newcomers,
            "rounds_per_minute": round(rounds / minutes, 2),
            "limited_peer_is_behind_rounds": peers[0].round - limited.round,
            "up_mean_kbit": round(samples.mean(samples.sent) * 8e-3, 1),
            "up_most_kbit_in_10_s": round(samples.most_in_window(samples.sent) * 8e-3, 1),
            "down_mean_kbit": round(samples.mean(samples.received) * 8e-3, 1),
            "down_most_kbit_in_10_s": round(samples.most_in_window(samples.received) * 8e-3, 1),
            "both_mean_kbit": round(samples.mean(both) * 8e-3, 1),
            "share_of_its_rounds_that_count": work_of(limited.home, peers[0].home, first, peers[0].round).share,
            "warnings": warnings(limited),
        }
        if part != "calm":
            limit = parse_rate(options.download_limit if part == "download" else options.upload_limit)
            carried = samples.received if part == "download" else samples.sent
            found["most_in_10_s_of_limit"] = round(samples.most_in_window(carried) / limit, 4)
            found["holds"] = found["most_in_10_s_of_limit"] <= MARGIN
        if part == "month":
            kept = json.loads((limited.home / "transfer.json").read_text())
            counted, carried_bytes = kept["sent_bytes"] + kept["received_bytes"], both[-1]
            # Since the peer's first packet: its line is its namespace's, and nobody used that before.
            allowed = options.month_rate * (samples.at[-1] - limited.began + MONTH_BURST_SECONDS)
            found["month_rate_kbit"] = options.month_rate * 8e-3
            found["counted_bytes"], found["carried_bytes"] = counted, carried_bytes
            found["carried_of_month_so_far"] = round(carried_bytes / allowed, 4)
            found["holds"] = found["holds"] and carried_bytes <= MARGIN * allowed
        return found


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=2.0, help="of each part (default: 2; the long form: 60)")
    parser.add_argument("--upload-limit", default="1Mbit")
    parser.add_argument("--download-limit", default="2Mbit")
    parser.add_argument("--month-rate", type=float, default=60_000, help="bytes a second that the month is to allow")
    parser.add_argument("--embedding", type=int, default=256, help="of the model, and so what a round carries")
    parser.add_argument("--part", choices=PARTS, action="append")
    parser.add_argument("--scratch", type=Path, help="folder for homes and logs")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    prepare(parser)
    found: Figures = {"line_mbit": LINE_MBIT}
    for part in options.part or PARTS:
        note(f"{part}: {options.minutes:g} minutes")
        found[part] = run_part(part, options)
        note(json.dumps(found[part]))
    finish(options.out, {"machine": machine(), **found})
    return int(any(part.get("holds") is False for part in found.values() if isinstance(part, dict)))


if __name__ == "__main__":
    sys.exit(main())
