"""What a peer's line carries while it does nothing: records, news, upkeep; with few real peers, with many simulated.

    python scripts/bench/standing.py --out docs/results/standing.json --picture docs/pictures/standing.png

Real peers, as root on Linux: each a process of its own in a network namespace, the bytes of whose interface are counted
for --seconds while no round goes on. Many peers: lab/many_nodes.py, whose help says what is real in it. Takes about 40
minutes; parts of it: --part, --real, --many. Prints one JSON object last.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from lab.crew import Crew
from lab.exchanges import Rounds
from lab.lines import Lines, prepare
from lab.report import Figures, Watch, finish, machine, note, pyplot, read, save, write

SETTLE_SECONDS = 20.0
"""After the last has joined: what joining took is over."""
PARTS = ("real", "many")


def numbers(text: str) -> list[int]:
    """Sizes of swarms, from `8,12`."""
    return [int(one) for one in text.split(",")]


def bench_real(peers: int, seconds: float, folder: Path) -> Figures:
    """What each line of so many carries, a second."""
    with Lines(peers, None) as lines, Crew(lines, folder) as crew:
        rounds = Rounds(crew, peers)
        rounds.start()
        time.sleep(SETTLE_SECONDS)
        before = [lines.counted(number) for number in range(peers)]
        time.sleep(seconds)
        after = [lines.counted(number) for number in range(peers)]
    found: Figures = {"peers": peers}
    for way in ("sent", "received"):
        rates = [(getattr(b, way) - getattr(a, way)) / seconds for a, b in zip(before, after, strict=True)]
        found[f"{way}_bytes_per_second"] = {"median": round(statistics.median(rates)), "most": round(max(rates))}
    return found


def bench_many(peers: int, seconds: float) -> Figures:
    """The same of many, on a virtual clock."""
    script = Path(__file__).parent / "lab/many_nodes.py"
    command = [sys.executable, str(script), "--peers", str(peers), "--seconds", str(seconds)]
    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    found: Figures = json.loads(printed)
    return found


def draw(report: Figures, path: Path) -> None:
    """Bytes a second by the number of peers."""
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(7, 4))
    for part, marker in zip(PARTS, ("o", "s"), strict=True):
        rows = sorted(report[part].values(), key=lambda row: int(row["peers"]))
        if not rows:
            continue
        sizes = [row["peers"] for row in rows]
        name = "real peers" if part == "real" else "simulated"
        for of, style in (("median", "-"), ("most", ":")):
            rates = [row["sent_bytes_per_second"][of] / 1000 for row in rows]
            axes.plot(sizes, rates, style, marker=marker, label=f"{name}, {of}")
    axes.axhline(5, color="grey", linewidth=0.8)
    axes.set(xscale="log", xlabel="peers", ylabel="kB/s sent by each while idle", ylim=(0, None))
    shown = sorted({int(row["peers"]) for part in PARTS for row in report[part].values()})
    axes.set_xticks(shown, [str(size) for size in shown])
    axes.minorticks_off()
    axes.legend()
    save(figure, path)


def main() -> int:
    """All parts, or some."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=PARTS, action="append", help="this part alone; repeatable")
    parser.add_argument("--real", type=numbers, default=[2, 4, 8, 12])
    parser.add_argument("--many", type=numbers, default=[8, 64, 256, 1000])
    parser.add_argument("--seconds", type=float, default=60.0, help="that are counted")
    parser.add_argument("--out", type=Path, help="the report; sizes that are in it and not measured now stay")
    parser.add_argument("--picture", type=Path)
    options = parser.parse_args()
    parts = options.part or PARTS
    if "real" in parts:
        prepare(parser)
    report: Figures = read(options.out) or {part: {} for part in PARTS}
    report |= {"seconds": options.seconds, **machine()}
    for part in parts:
        for peers in getattr(options, part):
            watch = Watch()
            if part == "real":
                with tempfile.TemporaryDirectory(prefix="p2ptrain-standing-", dir="/tmp") as folder:
                    figures = bench_real(peers, options.seconds, Path(folder))
            else:
                figures = bench_many(peers, options.seconds)
            note(f"{part}, {peers} peers: {figures['sent_bytes_per_second']} B/s sent by each")
            report[part][str(peers)] = figures | watch.figures()
            write(options.out, report)
    if options.picture is not None:
        draw(report, options.picture)
    finish(options.out, report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
