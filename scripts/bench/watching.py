"""What looking costs: an observer (`inspect --watch`) and a dashboard with a page open, on five real peers in rounds.

    python scripts/bench/watching.py --out docs/results/watching.json

As root, on Linux. Peers, observer and dashboard are processes in network namespaces of their own (lab/lines.py). Once
both have looked for a while, two figures of each are taken over --seconds: the processor time of its processes, with
that of the libp2p daemon, as a share of one core; and the bytes that its line carried, both ways, with all headers down
to Ethernet's. The page is a reader of the dashboard's events on the dashboard's own machine: what goes to it is no part
of the line, and given beside it. Prints one JSON object last; exits with 1 where a goal is not met.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import tempfile
import time
from pathlib import Path

import psutil
from lab.commands import Command, Peers
from lab.lines import Lines, prepare
from lab.report import Figures, Watch, finish, machine, note

NAMES = ("ada", "grace", "linus", "mary", "edith")
OBSERVER, DASHBOARD = len(NAMES), len(NAMES) + 1
SETTLE_SECONDS = 30.0
"""After both have begun: what meeting the swarm took is over."""
CORE_SHARE, BYTES_PER_SECOND = 0.01, 2000
"""The goals, of each."""
PAGE = """\
import sys, urllib.request
count = 0
with urllib.request.urlopen(sys.argv[1] + "api/events", timeout=60) as stream:
    for line in stream:
        count += len(line)
        print(count, flush=True)
"""


class Looked:
    """What one looker has used so far."""

    def __init__(self, command: Command, lines: Lines, number: int) -> None:
        self._process = psutil.Process(command.process.pid)
        self._lines, self._number = lines, number
        self._before = self._now()
        self._began = time.monotonic()

    def _now(self) -> Figures:
        family = [self._process, *self._process.children(recursive=True)]
        busy: dict[str, float] = {"program": 0.0, "daemon": 0.0}
        for process in family:
            times = process.cpu_times()
            busy["daemon" if process.name() == "p2pd" else "program"] += times.user + times.system
        counted = self._lines.counted(self._number)
        return busy | {"sent": counted.sent, "received": counted.received}

    def figures(self) -> Figures:
        """Since this was made: shares of a core, bytes a second."""
        seconds, now = time.monotonic() - self._began, self._now()
        rate = {name: (now[name] - before) / seconds for name, before in self._before.items()}
        return {
            "core_share": round(rate["program"] + rate["daemon"], 4),
            "core_share_of_daemon": round(rate["daemon"], 4),
            "sent_bytes_per_second": round(rate["sent"]),
            "received_bytes_per_second": round(rate["received"]),
        }


def bench(seconds: float, folder: Path) -> Figures:
    """Both, on five peers."""
    with contextlib.ExitStack() as undo:
        lines = undo.enter_context(Lines(len(NAMES) + 2, None))
        hosts = {name: (lines.address(number), lines.inside(number)) for number, name in enumerate(NAMES)}
        peers = undo.enter_context(Peers(folder, hosts))
        note("five peers have started")
        peers.train(5, 900)
        out = undo.enter_context((folder / "seen.txt").open("w"))
        looking = ("inspect", peers.address, "--watch", "--home", str(folder / "nobody"))
        observer = Command("observer", folder, *looking, before=lines.inside(OBSERVER), out=out)
        undo.callback(observer.stop)
        showing = ("dashboard", peers.address, "--home", str(folder / "nobody"))
        dashboard = Command("dashboard", folder, *showing, before=lines.inside(DASHBOARD))
        undo.callback(dashboard.stop)
        url = dashboard.says(r"(http://\S+)")
        read = undo.enter_context((folder / "page.txt").open("w"))
        page = psutil.Popen([*lines.inside(DASHBOARD), sys.executable, "-c", PAGE, url], stdout=read)
        undo.callback(page.wait)
        undo.callback(page.kill)
        time.sleep(SETTLE_SECONDS)
        note("both have looked for a while")
        rounds = peers.rounds(NAMES[0])
        looked = {
            "observer": Looked(observer, lines, OBSERVER),
            "dashboard": Looked(dashboard, lines, DASHBOARD),
        }
        to_page = page_bytes(folder)
        time.sleep(seconds)
        found: Figures = {name: one.figures() for name, one in looked.items()}
        found["dashboard"]["to_page_bytes_per_second"] = round((page_bytes(folder) - to_page) / seconds)
        done = peers.rounds(NAMES[0]) - rounds
        if not done:
            raise SystemExit("no round was sealed meanwhile")
        return found | {"peers": len(NAMES), "seconds": seconds, "round_seconds": round(seconds / done, 2)}


def page_bytes(folder: Path) -> int:
    """What the page has read so far."""
    counts = (folder / "page.txt").read_text().split()
    return int(counts[-1]) if counts else 0


def missed(report: Figures) -> list[str]:
    """The goals that are not met, in words."""
    words = []
    for name in ("observer", "dashboard"):
        of = report[name]
        rate = of["sent_bytes_per_second"] + of["received_bytes_per_second"]
        if of["core_share"] > CORE_SHARE:
            words.append(f"{name}: {of['core_share']:.2%} of a core")
        if rate > BYTES_PER_SECOND:
            words.append(f"{name}: {rate} bytes a second")
    return words


def main() -> int:
    """Measure, and say whether the goals are met."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0, help="that are measured")
    parser.add_argument("--repeats", type=int, default=1, help="that often; of each figure the middle one is given")
    parser.add_argument("--out", type=Path, help="the report")
    options = parser.parse_args()
    prepare(parser)
    watch, found = Watch(), []
    for _ in range(options.repeats):
        with tempfile.TemporaryDirectory(prefix="p2ptrain-watching-", dir="/tmp") as folder:
            found.append(bench(options.seconds, Path(folder)))
    report = middle(found) | machine() | watch.figures()
    finish(options.out, report)
    words = missed(report)
    for word in words:
        note(f"more than the goal: {word}")
    return 1 if words else 0


def middle(rows: list[Figures]) -> Figures:
    """Of each figure the middle one."""
    return {
        key: middle([row[key] for row in rows])
        if isinstance(value, dict)
        else statistics.median(row[key] for row in rows)
        for key, value in rows[0].items()
    }


if __name__ == "__main__":
    sys.exit(main())
