"""What an exchange costs with 2, 4 and 8 real peers: seconds and bytes, beside hivemind's averager and the floor.

    python scripts/bench/round.py --out docs/results/round.json --picture docs/pictures/round.png

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
The floor: bytes that a peer sends, on average, over the line's rate, plus 1.5 round trips.

Prints one JSON object last; figures are medians, with the least and the most. Parts of it: --part, --peers.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from lab.crew import Crew
from lab.exchanges import MODEL, Averagers, Rounds, averager_figures, figures_of, round_trip_seconds, with_floor
from lab.lines import Lines, prepare
from lab.report import Figures, Watch, finish, machine, note, pyplot, read, save, write

PARTS = ("p2ptrain", "hivemind", "flatness")
FLATNESS_PEERS = (2, 4, 8, 16)
FLATNESS_ROUNDS = 3
METER_ROUNDS = 40
"""After peers have joined, or a line has changed its rate: they measure theirs, and parts follow. A peer remembers 25
rounds, and one in which it had to send something again does not count."""


def bench_p2ptrain(peers: int, options: argparse.Namespace, folder: Path) -> Figures:
    """One swarm, without limit and behind lines."""
    with Lines(peers, None) as lines, Crew(lines, folder) as crew:
        found: Figures = {}
        rounds = Rounds(crew, peers)
        began = time.monotonic()
        rounds.start()
        note(f"p2ptrain: {peers} members after {time.monotonic() - began:.0f} s")
        idle = rounds.idle()
        found["idle_bytes_per_second"] = round(statistics.median(rate for pair in idle for rate in pair))
        for name, mbit in options.lines:
            for number in range(peers):
                lines.set_rate(number, mbit)
            rtt_seconds = round_trip_seconds(lines)
            rounds.play(METER_ROUNDS, idle)
            unary_seconds = rounds.unary_seconds()
            figures = figures_of(rounds.play(options.rounds, idle))
            if mbit is not None:
                figures = with_floor(figures, mbit, rtt_seconds)
            trips = {"rtt_seconds": round(rtt_seconds, 6), "unary_call_seconds": round(unary_seconds, 5)}
            found[name] = figures | trips
            note(f"p2ptrain, {peers} peers, {name}: {summary(figures)}")
    return found


def summary(figures: Figures) -> str:
    """A line for people."""
    text = f"exchange {figures['exchange_seconds']['median']:.3f} s"
    if "floor" in figures:
        text += f" = {figures['floor']['wire']['exchange_over_floor']:.2f} x floor"
    return f"{text}, {figures['wire_bytes_sent']['median'] / 1000:.0f} kB sent by each"


def bench_flatness(peers: int, options: argparse.Namespace, known: Figures, folder: Path) -> Figures:
    """Payload of so many peers, from figures `known` or else of a few rounds more."""
    name, mbit = options.lines[-1]
    figures = known.get(name)
    if figures is None:
        with Lines(peers, mbit) as lines, Crew(lines, folder) as crew:
            rounds = Rounds(crew, peers)
            rounds.start()
            rounds.play(METER_ROUNDS, [(0.0, 0.0)] * peers)
            figures = figures_of(rounds.play(FLATNESS_ROUNDS, [(0.0, 0.0)] * peers))
    row = {
        "payload_bytes_sent": figures["payload_bytes_sent"],
        "payload_bytes_mean": figures["payload_bytes_mean"],
        "all_gather_bytes_sent": (peers - 1) * figures["contribution_bytes"]["median"],
    }
    note(f"flatness, {peers} peers: {row}")
    return row


def bench_hivemind(peers: int, options: argparse.Namespace, folder: Path) -> Figures:
    """hivemind's averager, over the same lines."""
    found: Figures = {}
    with Lines(peers, None) as lines, Crew(lines, folder) as crew:
        averagers = Averagers(crew, peers)
        averagers.start()
        for name, mbit in options.lines:
            for number in range(peers):
                lines.set_rate(number, mbit)
            if mbit is None:
                averagers.play(1)
                figures = averager_figures(averagers.play(options.averagings))
            else:
                figures = averager_figures(averagers.play(options.averagings_limited))
                figures = with_floor(figures, mbit, round_trip_seconds(lines))
            found[name] = figures
            note(f"hivemind, {peers} peers, {name}: {summary(figures)}")
    return found


# ---- report -------------------------------------------------------------------------------------------------------


def compared(report: Figures) -> Figures:
    """hivemind's figures over ours, by peers and lines."""
    ratios: Figures = {}
    for peers, theirs in report["hivemind"].items():
        ours = report["p2ptrain"].get(peers, {})
        for name in theirs.keys() & ours.keys() - {"load_before", "took_seconds"}:
            ratios.setdefault(peers, {})[name] = {
                "times_fewer_bytes": round(theirs[name]["wire_bytes_mean"] / ours[name]["wire_bytes_mean"], 1),
                "times_less_exchange": round(
                    theirs[name]["exchange_seconds"]["median"] / ours[name]["exchange_seconds"]["median"], 1
                ),
            }
    return ratios


def draw(report: Figures, path: Path) -> None:
    """Seconds, bytes and flatness by members."""
    figure, (left, middle, right) = pyplot().subplots(1, 3, figsize=(14, 4), layout="constrained")
    for name, style in (("unlimited", "--"), (f"{report['mbit']:g} Mbit/s", "-")):
        for of, colour in (("hivemind", "tab:orange"), ("p2ptrain", "tab:blue")):
            rows = {int(peers): row[name] for peers, row in report[of].items() if name in row}
            x = sorted(rows)
            label = f"{of}, {name}"
            left.plot(x, [rows[n]["exchange_seconds"]["median"] for n in x], f"o{style}", color=colour, label=label)
            if style == "-":
                sent = [rows[n]["wire_bytes_mean"] / 1e6 for n in x]
                middle.plot(x, sent, "o-", color=colour, label=of)
            if style == "-" and of == "p2ptrain":
                floors = [rows[n]["floor"]["wire"]["seconds"] for n in x]
                left.plot(x, floors, ":", color="black", label="floor of p2ptrain's bytes")
    left.set(ylabel="seconds", title="Exchange", yscale="log")
    left.set_ylim(top=left.get_ylim()[1] * 60)  # room for the legend above the curves
    middle.set(ylabel="MB sent by each peer", title="Bytes on the wire a round", yscale="log")
    rows = {int(peers): row for peers, row in report["flatness"].items()}
    x = sorted({int(peers) for part in PARTS for peers in report[part]})
    measured = sorted(rows)
    right.plot(measured, [rows[n]["payload_bytes_mean"] / 1000 for n in measured], "o-", label="sent, on average")
    gathered = [rows[n]["all_gather_bytes_sent"] / 1000 for n in measured]
    right.plot(measured, gathered, "s--", label="all-gather would send")
    right.set(ylabel="kB sent by each peer", title="Payload a round")
    right.set_ylim(bottom=0)
    for axes in (left, middle, right):
        axes.set_xscale("log", base=2)
        axes.set_xlim(x[0] / 1.2, x[-1] * 1.2)
        axes.set_xticks(x, [str(peers) for peers in x])
        axes.set_xlabel("peers")
        axes.grid(alpha=0.3, which="both")
        if axes.lines:
            axes.legend(fontsize=8, loc="upper left" if axes is not middle else "center right")
    save(figure, path)


def plan(parts: Sequence[str], sizes: Sequence[int]) -> Iterator[tuple[str, int]]:
    """What to measure, in order: flatness last, which takes what figures are there already."""
    for peers in sizes:
        yield from ((part, peers) for part in parts if part != "flatness")
    if "flatness" in parts:
        yield from (("flatness", peers) for peers in FLATNESS_PEERS)


def main() -> int:
    """All parts, or some."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=PARTS, action="append", help="this part alone; repeatable")
    parser.add_argument("--peers", type=lambda text: [int(n) for n in text.split(",")], default=[2, 4, 8])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument(
        "--mbit", type=float, default=10.0, help="of the limited lines, both ways; 0: unlimited ones alone"
    )
    parser.add_argument("--averagings", type=int, default=3, help="of hivemind, after one more")
    parser.add_argument("--averagings-limited", type=int, default=1, help="behind limited lines; 20 to 30 s each")
    parser.add_argument("--out", type=Path, help="the report; parts that are in it and not measured now stay")
    parser.add_argument("--picture", type=Path)
    options = parser.parse_args()
    prepare(parser)
    options.lines = [("unlimited", None)]
    if options.mbit:
        options.lines.append((f"{options.mbit:g} Mbit/s", options.mbit))
    parts = options.part or PARTS
    report: Figures = read(options.out) or {part: {} for part in PARTS}
    report |= {"parameters": MODEL.parameters, "mbit": options.mbit, **machine()}
    for part, peers in plan(parts, options.peers):
        watch = Watch()
        with tempfile.TemporaryDirectory(prefix="p2ptrain-round-", dir="/tmp") as folder:
            if part == "p2ptrain":
                figures = bench_p2ptrain(peers, options, Path(folder))
            elif part == "hivemind":
                figures = bench_hivemind(peers, options, Path(folder))
            else:
                figures = bench_flatness(peers, options, report["p2ptrain"].get(str(peers), {}), Path(folder))
        report[part][str(peers)] = figures | watch.figures()
        report["compared"] = compared(report)
        write(options.out, report)
    if options.picture is not None:
        draw(report, options.picture)
    finish(options.out, report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
