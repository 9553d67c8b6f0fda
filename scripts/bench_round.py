"""What an exchange costs with 2, 4 and 8 real peers: seconds and bytes, beside hivemind's averager and the floor.

    python scripts/bench_round.py --out docs/results/round.json --picture docs/pictures/round.png

As root, on Linux. Each peer is a process of its own in a network namespace, behind a line: first without limit, then of
--mbit both ways. The model has 10 million parameters, gradients are noise. What is timed, over --rounds rounds:

- exchange: from the moment at which all peers hand over contributions that are encoded, the group standing, until the
  last of them has the sealed round in its journal, and so all replies to take its step from. Within it, own log and
  journal are written, messages cross, parts are reduced, the seal is made and checked;
- the rest of a round, of each peer, apart: accumulate, select and encode before, apply and settle after. With more
  peers than cores these are in each other's way, so their seconds of processor are given too.

Rounds are of pace "fixed", one sequence a peer, so that nobody is left out and no deadline is waited for. hivemind's
DecentralizedAverager averages one tensor of as many parameters in fp16; its all-reduce is triggered at one moment, its
group standing too, and is timed until the last peer has its result; matchmaking apart. Bytes are those of the peer's
interface while this went on, less what it carries when nothing goes on; payload is indices, scales and values alone.
The floor: bytes of the peer that sends or gets most over the line's rate, plus 1.5 round trips.

Prints one JSON object last; figures are medians, with the least and the most. Parts of it: --part, --peers.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from crew import Crew
from lines import Lines
from rich.console import Console

from p2ptrain.config.manifest import ModelConfig
from p2ptrain.state.files import atomic_write

PARTS = ("p2ptrain", "hivemind", "flatness")
FLATNESS_PEERS = (2, 4, 8, 16)
FLATNESS_ROUNDS = 3
MODEL = ModelConfig(layers=10, heads=4, embedding=256, context=256)
START_SECONDS = 300.0
ROUND_SECONDS = 120.0
JOINING_ROUND_SECONDS = 1.0
QUIET_SECONDS = 0.3
"""Before each exchange: what the peers have just computed is over."""
IDLE_SECONDS = 5.0
STAGES = ("accumulate", "select", "encode", "apply", "settle")
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

console = Console(stderr=True, highlight=False, soft_wrap=True)
Figures = dict[str, Any]


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
        self.crew.start(number, "round_peer.py", "--home", str(home), "--host", host, *how)

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
        "exchange_seconds": exchange,
        "exchange_until": {
            "last_contribution_in": last(lambda one: one["marks"].get("contributions", one["at"]))["median"],
            "first_reply_of_the_last": last(lambda one: one["marks"]["first_reply"])["median"],
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
        "counted_bytes_sent": each(lambda one: one["traffic"][0], 0),
        "counted_bytes_received": each(lambda one: one["traffic"][1], 0),
        "payload_bytes_sent": each(lambda one: one["payload_sent"], 0),
        "contribution_bytes": each(lambda one: one["contribution_bytes"], 0),
        "handed_over_late_seconds": each(lambda one: one["late_seconds"])["most"],
    }


def with_floor(figures: Figures, mbit: float, rtt_seconds: float) -> Figures:
    """The least that the bytes could have taken."""
    floors = {}
    for name, keys in (
        ("wire", ("wire_bytes_sent", "wire_bytes_received")),
        ("payload", ("payload_bytes_sent",)),
    ):
        most = max(figures[key]["most"] for key in keys)
        seconds = most * 8 / (mbit * 1e6) + 1.5 * rtt_seconds
        ratio = figures["exchange_seconds"]["median"] / seconds
        floors[name] = {"bytes": most, "seconds": round(seconds, 4), "exchange_over_floor": round(ratio, 3)}
    return figures | {"floor": floors}


def bench_p2ptrain(peers: int, options: argparse.Namespace, folder: Path) -> Figures:
    """One swarm, without limit and behind lines."""
    with Lines(peers, None) as lines, Crew(lines, folder) as crew:
        found: Figures = {"rtt_seconds": round(round_trip_seconds(lines), 6)}
        rounds = Rounds(crew, peers)
        began = time.monotonic()
        rounds.start()
        console.print(f"p2ptrain: {peers} members after {time.monotonic() - began:.0f} s")
        idle = rounds.idle()
        found["idle_bytes_per_second"] = round(statistics.median(rate for pair in idle for rate in pair))
        for name, mbit in options.lines:
            for number in range(peers):
                lines.set_rate(number, mbit)
            rounds.play(options.warm_up, idle)
            unary = round(rounds.unary_seconds(), 5)
            figures = figures_of(rounds.play(options.rounds, idle))
            if mbit is not None:
                figures = with_floor(figures, mbit, found["rtt_seconds"])
            found[name] = figures | {"unary_call_seconds": unary}
            console.print(f"p2ptrain, {peers} peers, {name}: {summary(figures)}")
    return found


def summary(figures: Figures) -> str:
    """A line for people."""
    text = f"exchange {figures['exchange_seconds']['median']:.3f} s"
    if "floor" in figures:
        text += f" = {figures['floor']['wire']['exchange_over_floor']:.2f} x floor"
    return f"{text}, {figures['wire_bytes_sent']['median'] / 1000:.0f} kB sent by each"


def bench_flatness(peers: int, known: Figures, folder: Path) -> Figures:
    """Payload of so many peers, from figures that are there or a few rounds more."""
    figures = known.get("unlimited")
    if figures is None:
        with Lines(peers, None) as lines, Crew(lines, folder) as crew:
            rounds = Rounds(crew, peers)
            rounds.start()
            figures = figures_of(rounds.play(FLATNESS_ROUNDS, [(0.0, 0.0)] * peers))
    row = {
        "payload_bytes_sent": figures["payload_bytes_sent"],
        "all_gather_bytes_sent": (peers - 1) * figures["contribution_bytes"]["median"],
    }
    console.print(f"flatness, {peers} peers: {row}")
    return row


# ---- hivemind -----------------------------------------------------------------------------------------------------


def bench_hivemind(peers: int, options: argparse.Namespace, folder: Path) -> Figures:
    """Its averager, over the same lines."""
    found: Figures = {}
    with Lines(peers, None) as lines, Crew(lines, folder) as crew:
        join: list[str] = []
        for number in range(peers):
            how = [f"--join={address}" for address in join]
            size = ["--peers", str(peers), "--parameters", str(MODEL.parameters)]
            crew.start(number, "averager_peer.py", "--host", lines.address(number), *size, *how)
            if number == 0:
                join = crew.hear(START_SECONDS)[1]["join"]
        for _ in range(peers - 1):
            crew.hear(START_SECONDS)
        console.print(f"hivemind: {peers} peers are there")
        for name, mbit in options.lines:
            for number in range(peers):
                lines.set_rate(number, mbit)
            times = options.averagings if mbit is None else options.averagings_limited
            averagings = [averaging(crew, peers) for _ in range(times + (mbit is None))][mbit is None :]
            found[name] = {
                "averagings": times,
                "exchange_seconds": spread(max(one["held"] - one["at"] for one in a.values()) for a in averagings),
                "matchmaking_seconds": spread(max(one["grouped_seconds"] for one in a.values()) for a in averagings),
                "exchange_core_seconds_of_all": spread(
                    sum(one["core_seconds"] for one in a.values()) for a in averagings
                ),
                "wire_bytes_sent": spread((one["line"][0] for a in averagings for one in a.values()), 0),
                "wire_bytes_received": spread((one["line"][1] for a in averagings for one in a.values()), 0),
            }
            console.print(f"hivemind, {peers} peers, {name}: {summary(found[name])}")
    return found


def averaging(crew: Crew, peers: int) -> dict[int, Figures]:
    """One; in a group of all, or it is no use."""
    for number in range(peers):
        crew.tell(number, "group")
    grouped = crew.hear_all("grouped_seconds", ROUND_SECONDS)
    at = time.monotonic() + QUIET_SECONDS
    for number in range(peers):
        crew.tell(number, f"go {at}")
    done = crew.hear_all("held", START_SECONDS)
    if any(one["members"] != peers for one in done.values()):
        raise SystemExit(f"groups of {[one['members'] for one in done.values()]} were formed")
    return {number: one | grouped[number] | {"at": at} for number, one in done.items()}


# ---- report -------------------------------------------------------------------------------------------------------


def compared(report: Figures) -> Figures:
    """hivemind's figures over ours, by peers and lines."""
    ratios: Figures = {}
    for peers, theirs in report["hivemind"].items():
        ours = report["p2ptrain"].get(peers, {})
        for name in theirs.keys() & ours.keys():
            ratios.setdefault(peers, {})[name] = {
                "times_fewer_bytes": round(
                    theirs[name]["wire_bytes_sent"]["median"] / ours[name]["wire_bytes_sent"]["median"], 1
                ),
                "times_less_exchange": round(
                    theirs[name]["exchange_seconds"]["median"] / ours[name]["exchange_seconds"]["median"], 1
                ),
            }
    return ratios


def draw(report: Figures, path: Path) -> None:
    """Seconds, bytes and flatness by members."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(14, 4))
    for name, style in (("unlimited", "--"), (f"{report['mbit']:g} Mbit/s", "-")):
        for of, colour in (("hivemind", "tab:orange"), ("p2ptrain", "tab:blue")):
            rows = {int(peers): row[name] for peers, row in report[of].items() if name in row}
            x = sorted(rows)
            label = f"{of}, {name}"
            left.plot(x, [rows[n]["exchange_seconds"]["median"] for n in x], f"o{style}", color=colour, label=label)
            if style == "-":
                sent = [rows[n]["wire_bytes_sent"]["median"] / 1e6 for n in x]
                middle.plot(x, sent, "o-", color=colour, label=of)
            if style == "-" and of == "p2ptrain":
                floors = [rows[n]["floor"]["wire"]["seconds"] for n in x]
                left.plot(x, floors, ":", color="black", label="floor of p2ptrain's bytes")
    left.set(ylabel="s", title="Exchange", yscale="log")
    middle.set(ylabel="MB sent by each peer, on the wire", title="Bytes a round", yscale="log")
    rows = {int(peers): row for peers, row in report["flatness"].items()}
    x = sorted(rows)
    right.plot(x, [rows[n]["payload_bytes_sent"]["median"] / 1000 for n in x], "o-", label="sent")
    right.plot(x, [rows[n]["all_gather_bytes_sent"] / 1000 for n in x], "s--", label="all-gather would send")
    right.set(ylabel="kB payload by each peer and round", title="Flatness")
    right.set_ylim(bottom=0)
    for axes in (left, middle, right):
        axes.set_xlabel("peers")
        axes.grid(alpha=0.3, which="both")
        if axes.lines:
            axes.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, bbox_inches="tight")


def main() -> int:
    """All parts, or some."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=PARTS, action="append", help="this part alone; repeatable")
    parser.add_argument("--peers", type=lambda text: [int(n) for n in text.split(",")], default=[2, 4, 8])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--warm-up", type=int, default=2, help="rounds before, on each kind of line")
    parser.add_argument(
        "--mbit", type=float, default=10.0, help="of the limited lines, both ways; 0: unlimited ones alone"
    )
    parser.add_argument("--averagings", type=int, default=3, help="of hivemind, after one more")
    parser.add_argument("--averagings-limited", type=int, default=1, help="behind limited lines; 20 to 30 s each")
    parser.add_argument("--out", type=Path, help="the report; parts that are in it and not measured now stay")
    parser.add_argument("--picture", type=Path)
    options = parser.parse_args()
    if os.geteuid() != 0:
        parser.error("it makes network namespaces: run it as root")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: sys.exit("stopped"))
    options.lines = [("unlimited", None)]
    if options.mbit:
        options.lines.append((f"{options.mbit:g} Mbit/s", options.mbit))
    parts = options.part or PARTS
    began, load = time.monotonic(), os.getloadavg()[0]
    report: Figures = {part: {} for part in PARTS}
    if options.out is not None and options.out.exists():
        report = json.loads(options.out.read_text())
    report |= {"parameters": MODEL.parameters, "mbit": options.mbit, "cores": os.cpu_count()}
    folder = Path(tempfile.mkdtemp(prefix="p2ptrain-round-", dir="/tmp"))

    def run(part: str, peers: int, bench: Callable[[Path], Figures]) -> None:
        place = folder / f"{part}-{peers}"
        place.mkdir()
        report[part][str(peers)] = bench(place)
        shutil.rmtree(place)

    for peers in options.peers:
        if "p2ptrain" in parts:
            run("p2ptrain", peers, lambda place, n=peers: bench_p2ptrain(n, options, place))  # type: ignore[misc]
        if "hivemind" in parts:
            run("hivemind", peers, lambda place, n=peers: bench_hivemind(n, options, place))  # type: ignore[misc]
    if "flatness" in parts:
        for peers in FLATNESS_PEERS:
            known = report["p2ptrain"].get(str(peers), {})
            run("flatness", peers, lambda place, n=peers, k=known: bench_flatness(n, k, place))  # type: ignore[misc]
    shutil.rmtree(folder, ignore_errors=True)
    report |= {"compared": compared(report), "load_before": round(load, 2)}
    report["seconds"] = round(time.monotonic() - began, 1)
    text = json.dumps(report, indent=2)
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(options.out, f"{text}\n".encode(), mode=0o644)
    if options.picture is not None:
        draw(report, options.picture)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
