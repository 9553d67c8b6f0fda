"""What a forward and backward pass costs while the exchange is under way: real peers, real computing, `overlap = 1`.

    python scripts/bench/overlap.py --out docs/results/overlap.json

Two peers train one GPT of 10 million parameters behind lines of 10 Mbit/s, a thread each, and time each of their
micro-batches; then the same two without each other, each in a swarm of its own, so that only the exchange differs.
Alternating, a few times, on a machine of two cores

- with a core to spare: one of the two peers only sleeps as long as it would compute, so that network threads, p2pd and
  kernel have the other core, as they have beside a GPU;
- with none: both compute, and whatever else there is to do takes its time from them.

Micro-batches of peers that are together are told apart: those that began while the peer's last contribution was on its
way, so with the network at work beside them, and all of them. Rounds are short on purpose: those of `sequences` take
not much longer than the exchange. As root, on Linux, with nothing else going on.

Progress on stderr, one JSON object last; about ten minutes.
"""

from __future__ import annotations

import argparse
import functools
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import msgspec
import torch
from lab.crew import Crew
from lab.curves import MANIFEST
from lab.lines import Lines, prepare
from lab.report import Figures, Watch, finish, machine, note, say
from lab.step_peer import end_with_stdin
from lab.synthetic_gpt import SyntheticGPT

from p2ptrain.config.loading import render

PEERS = 2
ARRANGEMENTS = ("apart", "together")
START_SECONDS = 120.0
PAUSE_SECONDS = 60.0
"""Without a word of anybody's, at most."""
SLEEP_SECONDS = 0.08
"""What a sequence takes of a core."""
WARM_UP = 20
"""Micro-batches of each peer that are not counted."""


# ---- a peer -------------------------------------------------------------------------------------------------------


def run_peer(sleep_seconds: float, command: list[str]) -> None:
    """The command line, with a trainer that says what each micro-batch took; until stdin ends.

    Args:
        sleep_seconds: of a sequence, in place of computing it; 0: none.
    """
    from lab.peer import run_with

    from p2ptrain.peer.assembly import Make
    from p2ptrain.rounds.events import Apply
    from p2ptrain.training.trainer import Trainer

    class TimedTrainer(Trainer):
        """See above."""

        _members = 0
        _on_its_way = False
        """A contribution whose seal has not arrived: an exchange is under way."""

        def _micro_batch(self) -> None:
            during, began = self._on_its_way, time.perf_counter()
            super()._micro_batch()
            say(seconds=time.perf_counter() - began, during=during, members=self._members)

        def _contribute(self, start: Any, swarm: Any) -> None:
            super()._contribute(start, swarm)
            self._on_its_way = True

        def take(self, message: Any, swarm: Any) -> None:
            if isinstance(message, Apply):
                self._members, self._on_its_way = len(message.shape.members), False
            super().take(message, swarm)

    torch.set_num_threads(1)
    end_with_stdin()
    sleeping = functools.partial(SyntheticGPT, seconds_per_sequence=sleep_seconds)
    run_with(Make(TimedTrainer, sleeping) if sleep_seconds else Make(TimedTrainer), command)


# ---- the bench ----------------------------------------------------------------------------------------------------


def run_toml(sequences: int) -> str:
    """The model of the other benches, in short rounds of a fixed length."""
    rules = msgspec.structs.replace(
        MANIFEST.round, pace="fixed", sequences_per_peer=sequences, micro_batch=1, min_seconds=0.05, overlap=1
    )
    return render(msgspec.structs.replace(MANIFEST, nonce=os.urandom(16).hex(), round=rules))


def timed(arrangement: str, spare: bool, options: argparse.Namespace, folder: Path) -> list[Figures]:
    """What micro-batches of each peer that computes took, once all are where they should be."""
    together, heard = arrangement == "together", [0] * PEERS
    with Lines(PEERS, options.mbit) as lines, Crew(lines, folder) as crew:
        join = None
        for number in range(PEERS):
            manifest = folder / f"run{number}.toml"
            manifest.write_text(run_toml(options.sequences))
            home = ["--home", str(folder / f"home{number}"), "--host", lines.address(number), "--threads", "1", "-v"]
            command = ["join", join] if together and join else ["bootstrap", str(manifest)]
            sleep = SLEEP_SECONDS if spare and number else 0.0
            crew.start(number, "overlap.py", "--peer", str(sleep), *command, *home)
            while together and join is None:
                join = crew.hear(START_SECONDS)[1].get("join", [None])[0]
        found: list[Figures] = []
        while min(heard) < WARM_UP + options.micro_batches:
            number, message = crew.hear(START_SECONDS if min(heard) == 0 else PAUSE_SECONDS)
            if message.get("members") == (PEERS if together else 1):
                heard[number] += 1
                # All are counted over the same time.
                if min(heard) >= WARM_UP and not (spare and number):
                    found.append(message)
        return found


def summary(seconds: list[float]) -> Figures:
    """In milliseconds."""
    in_order = sorted(1000 * one for one in seconds)
    return {
        "count": len(in_order),
        "mean_ms": round(statistics.mean(in_order), 2),
        "median_ms": round(statistics.median(in_order), 2),
        "spread_ms": [round(in_order[len(in_order) * share // 100], 2) for share in (5, 95)],
    }


def compared(spare: bool, options: argparse.Namespace) -> Figures:
    """Peers together beside peers apart, alternating."""
    seconds: dict[str, list[list[float]]] = {"apart": [], "together": [], "together_during_exchange": []}
    for repetition in range(options.repetitions):
        # Each comes first as often as the other.
        for arrangement in ARRANGEMENTS if repetition % 2 == 0 else ARRANGEMENTS[::-1]:
            with tempfile.TemporaryDirectory() as folder:
                found = timed(arrangement, spare, options, Path(folder))
            seconds[arrangement].append([one["seconds"] for one in found])
            if arrangement == "together":
                seconds["together_during_exchange"].append([one["seconds"] for one in found if one["during"]])
            mean = statistics.mean(seconds[arrangement][-1])
            note(f"spare core: {spare}: {arrangement}: {1000 * mean:.1f} ms")
    ratios = {
        f"ratio_{name}": [
            round(statistics.mean(ours) / statistics.mean(theirs), 4)
            for ours, theirs in zip(seconds[name], seconds["apart"], strict=True)
        ]
        for name in ("together", "together_during_exchange")
    }
    return {name: summary([one for run in runs for one in run]) for name, runs in seconds.items()} | ratios


def main() -> int:
    """The bench."""
    if sys.argv[1:2] == ["--peer"]:
        run_peer(float(sys.argv[2]), sys.argv[3:])
        return 0
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mbit", type=float, default=10.0, help="of each line, each way; %(default)s")
    parser.add_argument("--sequences", type=int, default=4, help="of a peer and round; %(default)s")
    parser.add_argument("--micro-batches", type=int, default=150, help="of a peer and arrangement; %(default)s")
    parser.add_argument("--repetitions", type=int, default=4, help="of both arrangements; %(default)s")
    parser.add_argument("--out", type=Path, help="write the result there too")
    options = parser.parse_args()
    prepare(parser)
    watch = Watch()
    asked = {name: value for name, value in vars(options).items() if name != "out"}
    figures: Figures = {**machine(), "parameters": MANIFEST.model.parameters, **asked}
    for name, spare in (("core_to_spare", True), ("no_core_to_spare", False)):
        figures[name] = compared(spare, options)
    finish(options.out, figures | watch.figures())
    return 0


if __name__ == "__main__":
    sys.exit(main())
