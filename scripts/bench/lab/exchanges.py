"""Swarms of real peers and of hivemind's averagers that exchange when told to, and what each exchange took.

Used by bench/round.py, whose help says what is timed.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable

from lab.crew import Crew
from lab.lines import Lines
from lab.report import Figures

from p2ptrain.config.manifest import ModelConfig

MODEL = ModelConfig(layers=10, heads=4, embedding=256, context=256)
START_SECONDS = 300.0
GROUP_SECONDS = 120.0
JOINING_ROUND_SECONDS = 1.0
QUIET_SECONDS = 0.3
"""Before each exchange: what the peers have just computed is over."""
IDLE_SECONDS = 5.0
STAGES = ("accumulate_and_select", "encode", "apply", "settle")
MANIFEST = """\
name = "bench"
nonce = "{nonce}"
[model]
layers = {model.layers}
heads = {model.heads}
embedding = {model.embedding}
context = {model.context}
[round]
pace = "fixed"
sequences_per_peer = 1
micro_batch = 1
round_max_seconds = 120.0
grace_seconds = 10.0
reply_timeout_seconds = 30.0
seal_timeout_seconds = 10.0
alone_after_seconds = 60.0
root_interval = 1000
"""
"""Of the rest, what a new run gets."""


def spread(values: Iterable[float], digits: int = 4) -> Figures:
    """Median, least and most."""
    ordered = sorted(values)
    named = {"median": statistics.median(ordered), "least": ordered[0], "most": ordered[-1]}
    return {name: round(value, digits) for name, value in named.items()}


def round_trip_seconds(lines: Lines) -> float:
    """Of one byte over TCP between the first two lines: the median of 20."""
    server = "import socket; s = socket.create_server(('', 9)); print(flush=True); c = s.accept()[0]\n"
    server += "while c.recv(1): c.sendall(b'x')"
    client = "import socket, statistics, sys, time; c = socket.create_connection((sys.argv[1], 9)); took = []\n"
    client += (
        "for _ in range(20): b = time.monotonic(); c.sendall(b'x'); c.recv(1); took.append(time.monotonic() - b)\n"
    )
    client += "print(statistics.median(took))"
    answering = subprocess.Popen([*lines.inside(0), sys.executable, "-c", server], stdout=subprocess.PIPE)
    try:
        assert answering.stdout is not None
        answering.stdout.readline()
        asking = [*lines.inside(1), sys.executable, "-c", client, lines.address(0)]
        return float(subprocess.run(asking, check=True, capture_output=True, text=True).stdout)
    finally:
        answering.kill()
        answering.wait()
        if answering.stdout is not None:
            answering.stdout.close()


def with_floor(figures: Figures, mbit: float, rtt_seconds: float) -> Figures:
    """With the least that the bytes could have taken, if each peer had as many to send as the others."""
    floors = {}
    for name in ("wire", "payload"):
        if f"{name}_bytes_mean" in figures:
            seconds = figures[f"{name}_bytes_mean"] * 8 / (mbit * 1e6) + 1.5 * rtt_seconds
            ratio = figures["exchange_seconds"]["median"] / seconds
            floors[name] = {"seconds": round(seconds, 4), "exchange_over_floor": round(ratio, 3)}
    return figures | {"floor": floors}


# ---- p2ptrain -----------------------------------------------------------------------------------------------------


class Rounds:
    """A swarm of real peers whose rounds go on when told to."""

    def __init__(self, crew: Crew, peers: int) -> None:
        self.crew, self.peers = crew, peers
        #: peer -> what it said of the contribution that it holds back
        self._ready: dict[int, Figures] = {}

    def start(self) -> None:
        """Until all are members and hold back a contribution to the same round."""
        manifest = self.crew.folder / "run.toml"
        manifest.write_text(MANIFEST.format(nonce=os.urandom(16).hex(), model=MODEL))
        self._start(0, "--manifest", str(manifest))
        number, message = self.crew.hear(START_SECONDS)
        while "join" not in message:
            number, message = self.crew.hear(START_SECONDS)
        for number in range(1, self.peers):
            self._start(number, "--join", message["join"][0])
        while not self._all_ready():
            self._hear()
            members = {said["members"] for said in self._ready.values()}
            together = len({said["ready"] for said in self._ready.values()}) == 1
            if together and members == {len(self._ready)} and len(self._ready) < self.peers:
                self._go(JOINING_ROUND_SECONDS)

    def _start(self, number: int, *how: str) -> None:
        home, host = self.crew.folder / f"home{number}", self.crew.lines.address(number)
        self.crew.start(number, "lab/round_peer.py", "--home", str(home), "--host", host, *how)

    def _hear(self) -> tuple[int, Figures]:
        number, message = self.crew.hear(START_SECONDS)
        if "ready" in message:
            self._ready[number] = message
        return number, message

    def _all_ready(self) -> bool:
        return len(self._ready) == self.peers and len({said["ready"] for said in self._ready.values()}) == 1

    def _go(self, after_seconds: float) -> float:
        at = time.monotonic() + after_seconds
        numbers, self._ready = list(self._ready), {}
        for number in numbers:
            self.crew.tell(number, f"go {at}")
        return at

    def idle(self) -> list[tuple[float, float]]:
        """What each line carries when nothing goes on [bytes/s, sent and received]."""
        counted = [self.crew.lines.counted(number) for number in range(self.peers)]
        time.sleep(IDLE_SECONDS)
        later = [self.crew.lines.counted(number) for number in range(self.peers)]
        pairs = zip(counted, later, strict=True)
        return [((b.sent - a.sent) / IDLE_SECONDS, (b.received - a.received) / IDLE_SECONDS) for a, b in pairs]

    def unary_seconds(self) -> float:
        """A unary call of libp2p from one peer to another, over a connection that stands."""
        self.crew.tell(0, "hello")
        while True:
            _, message = self._hear()
            if "unary_seconds" in message:
                return statistics.median(message["unary_seconds"])

    def play(self, count: int, idle: list[tuple[float, float]]) -> list[dict[int, Figures]]:
        """So many rounds; what each peer said of each."""
        rounds = []
        for _ in range(count):
            at = self._go(QUIET_SECONDS)
            said: dict[int, Figures] = {}
            ended: dict[int, float] = {}
            while len(said) < self.peers or not self._all_ready():
                number, message = self._hear()
                if "round" in message:
                    said[number] = message
                elif "ready" in message:
                    ended[number] = time.monotonic()
            for number, figures in said.items():
                seconds = ended[number] - at
                carried = zip(self._ready[number]["line"], figures["line"], idle[number], strict=True)
                figures["wire"] = [max(0.0, after - before - rate * seconds) for after, before, rate in carried]
                figures["at"] = at
            if len({figures["state"] for figures in said.values()}) != 1:
                raise SystemExit("the peers have come to different states")
            if any(figures["included"] < self.peers or figures["skipped"] for figures in said.values()):
                raise SystemExit(f"a round left somebody or something out: {said[0]}")
            rounds.append(said)
        return rounds


def figures_of(rounds: list[dict[int, Figures]]) -> Figures:
    """What rounds took."""

    def last(when: Callable[[Figures], float]) -> Figures:
        return spread(max(when(one) - one["at"] for one in said.values()) for said in rounds)

    def each(of: Callable[[Figures], float], digits: int = 4) -> Figures:
        return spread((of(one) for said in rounds for one in said.values()), digits)

    def mean(of: Callable[[Figures], float]) -> int:
        return round(statistics.mean(of(one) for said in rounds for one in said.values()))

    stages = {
        stage: {
            "seconds": each(lambda one, s=stage: one["stages"][s][0]),  # type: ignore[misc]
            "core_seconds": each(lambda one, s=stage: one["stages"][s][1])["median"],  # type: ignore[misc]
        }
        for stage in STAGES
    }
    exchange = last(lambda one: one["held"])
    return {
        "rounds": len(rounds),
        "parts": rounds[0][0]["parts"],
        "share_reduced": each(lambda one: one["share"]),
        "exchange_seconds": exchange,
        "exchange_until": {
            "last_contribution_in": last(lambda one: one["marks"].get("contributions", one["at"]))["median"],
            "all_hold_a_reply": last(lambda one: one["marks"]["first_reply"])["median"],
            "last_reply_held": last(lambda one: one["marks"]["replies"])["median"],
            "sealed_and_held": exchange["median"],
        },
        "exchange_seconds_of_one": each(lambda one: one["held"] - one["at"]),
        "exchange_core_seconds_of_all": spread(
            sum(one["exchange_core_seconds"] for one in said.values()) for said in rounds
        ),
        "stages": stages,
        "round_seconds": each(lambda one: one["held"] - one["at"] + sum(one["stages"][stage][0] for stage in STAGES)),
        "round_core_seconds_beside_exchange": round(sum(stage["core_seconds"] for stage in stages.values()), 4),
        "wire_bytes_sent": each(lambda one: one["wire"][0], 0),
        "wire_bytes_received": each(lambda one: one["wire"][1], 0),
        "wire_bytes_mean": mean(lambda one: one["wire"][0]),
        "counted_bytes_sent": each(lambda one: one["traffic"][0], 0),
        "counted_bytes_received": each(lambda one: one["traffic"][1], 0),
        "payload_bytes_sent": each(lambda one: one["payload_sent"], 0),
        "payload_bytes_mean": mean(lambda one: one["payload_sent"]),
        "contribution_bytes": each(lambda one: one["contribution_bytes"], 0),
        "handed_over_late_seconds": each(lambda one: one["late_seconds"])["most"],
    }


# ---- hivemind -----------------------------------------------------------------------------------------------------


class Averagers:
    """hivemind's averagers, whose all-reduce is triggered when told to."""

    def __init__(self, crew: Crew, peers: int) -> None:
        self.crew, self.peers = crew, peers

    def start(self) -> None:
        """Until all are there."""
        size = ["--peers", str(self.peers), "--parameters", str(MODEL.parameters)]
        join: list[str] = []
        for number in range(self.peers):
            host = self.crew.lines.address(number)
            self.crew.start(number, "lab/averager_peer.py", "--host", host, *size, *join)
            if number == 0:
                join = [f"--join={address}" for address in self.crew.hear(START_SECONDS)[1]["join"]]
        for _ in range(self.peers - 1):
            self.crew.hear(START_SECONDS)

    def play(self, count: int) -> list[dict[int, Figures]]:
        """So many averagings, each in a group of all; what each peer said of each."""
        return [self._average() for _ in range(count)]

    def _average(self) -> dict[int, Figures]:
        for number in range(self.peers):
            self.crew.tell(number, "group")
        grouped = self.crew.hear_all("grouped_seconds", GROUP_SECONDS)
        at = time.monotonic() + QUIET_SECONDS
        for number in range(self.peers):
            self.crew.tell(number, f"go {at}")
        done = self.crew.hear_all("held", START_SECONDS)
        if any(one["members"] != self.peers for one in done.values()):
            raise SystemExit(f"groups of {[one['members'] for one in done.values()]} were formed")
        return {number: one | grouped[number] | {"at": at} for number, one in done.items()}


def averager_figures(averagings: list[dict[int, Figures]]) -> Figures:
    """What averagings took."""
    return {
        "averagings": len(averagings),
        "exchange_seconds": spread(max(one["held"] - one["at"] for one in said.values()) for said in averagings),
        "matchmaking_seconds": spread(max(one["grouped_seconds"] for one in said.values()) for said in averagings),
        "exchange_core_seconds_of_all": spread(
            sum(one["core_seconds"] for one in said.values()) for said in averagings
        ),
        "wire_bytes_sent": spread((one["line"][0] for said in averagings for one in said.values()), 0),
        "wire_bytes_received": spread((one["line"][1] for said in averagings for one in said.values()), 0),
        "wire_bytes_mean": round(statistics.mean(one["line"][0] for said in averagings for one in said.values())),
    }
