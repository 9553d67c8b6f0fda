"""Starts real peers of one method behind lines, and times their steps and counts their bytes.

A step is over when the last peer has taken it; bytes are what the peers' interfaces counted between their own steps.
Lines are without limit until the group stands, so that nobody waits for what is sent once.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import statistics
from pathlib import Path

import msgspec
from lab.crew import Crew
from lab.curves import MANIFEST, sequences_per_member
from lab.lines import Lines
from lab.report import Figures

from p2ptrain.config.loading import render

METHODS = {"p2ptrain": "demo", "p2ptrain-overlap": "demo", "hivemind": "adamw", "ddp": "adamw", "ddp-fp16": "adamw"}
"""Whose steps are which curve's."""
START_SECONDS = 300.0
STEP_SECONDS = 300.0
"""Beside computing, at most."""
WARM_UP_STEPS = {"p2ptrain": 3, "p2ptrain-overlap": 3, "hivemind": 1, "ddp": 1, "ddp-fp16": 1}
"""Behind limited lines; the step under way when they become so apart."""


def run_toml(compute_seconds: float, overlap: int) -> str:
    """The curves' manifest, with a fixed number of sequences a round and time enough for them."""
    rules = msgspec.structs.replace(
        MANIFEST.round,
        pace="fixed",
        sequences_per_peer=sequences_per_member(),
        micro_batch=1,
        min_seconds=compute_seconds,
        max_seconds=max(compute_seconds, MANIFEST.round.max_seconds),
        overlap=overlap,
    )
    return render(msgspec.structs.replace(MANIFEST, nonce=os.urandom(16).hex(), round=rules))


class Steps:
    """What peers said of their steps."""

    def __init__(self, crew: Crew, peers: int) -> None:
        self._crew = crew
        #: peer -> step -> what it said
        self._said: list[dict[int, Figures]] = [{} for _ in range(peers)]

    def hear(self, seconds: float) -> tuple[int, Figures]:
        """What somebody says next."""
        number, message = self._crew.hear(seconds)
        if "step" in message:
            self._said[number][message["step"]] = message
        return number, message

    @property
    def reached(self) -> int:
        """The last step that all have taken."""
        return min(max(said, default=0) for said in self._said)

    def figures(self, first: int, last: int) -> Figures:
        """Of the steps after `first`, up to `last`."""
        taken = [n for n in range(first, last + 1) if all(n in said for said in self._said)]
        over = {n: max(said[n]["at"] for said in self._said) for n in taken}
        gaps = [(over[after] - over[before]) / (after - before) for before, after in itertools.pairwise(taken)]
        steps = taken[-1] - taken[0]
        carried = [
            [(said[taken[-1]]["line"][way] - said[taken[0]]["line"][way]) / steps for said in self._said]
            for way in (0, 1)
        ]
        ours = {
            key: [said[n][key] for said in self._said for n in taken[1:] if key in said[n]]
            for key in ("included", "stale")
        }
        return {
            "steps_timed": steps,
            "step_seconds": round((over[taken[-1]] - over[taken[0]]) / steps, 3),
            "step_seconds_median": round(statistics.median(gaps), 3),
            "step_seconds_spread": [round(min(gaps), 3), round(max(gaps), 3)],
            "wire_bytes_sent_per_peer_and_step": round(statistics.mean(carried[0])),
            "wire_bytes_received_per_peer_and_step": round(statistics.mean(carried[1])),
            "wire_bytes_sent_most": round(max(carried[0])),
            **{key: round(statistics.mean(values), 3) for key, values in ours.items() if values},
        }


def start_p2ptrain(crew: Crew, steps: Steps, common: list[str], peers: int, manifest: str) -> int:
    """Until all of them are in one round; its number."""
    (crew.folder / "run.toml").write_text(manifest)
    command = ["bootstrap", str(crew.folder / "run.toml")]
    for number in range(peers):
        home = ["--home", str(crew.folder / f"home{number}"), "--host", crew.lines.address(number)]
        crew.start(
            number, "lab/step_peer.py", "p2ptrain", *common, "--command", *command, *home, "--threads", "1", "-v"
        )
        while True:
            heard, message = steps.hear(START_SECONDS)
            if heard == number and "join" in message:
                break
        command = ["join", message["join"][0]] if number == 0 else command
    while True:
        _, message = steps.hear(START_SECONDS)
        if message.get("included") == peers:
            return int(message["step"])


def start_baseline(method: str, crew: Crew, steps: Steps, common: list[str], peers: int) -> int:
    """Until all of them have stepped, or hivemind's are about to; how many steps they have taken."""
    join: list[str] = []
    for number in range(peers):
        host = ["--host", crew.lines.address(number), "--rank", str(number), "--master", crew.lines.address(0)]
        crew.start(number, "lab/step_peer.py", method, *common, *host, *join)
        if method == "hivemind":
            _, message = crew.hear(START_SECONDS)
            join = join or ["--join", message["join"][0]]
    if method == "hivemind":
        for number in range(peers):
            crew.tell(number, "report a sample")
        crew.hear_all("sees", START_SECONDS)
        for number in range(peers):
            crew.tell(number, "go on")
        return 0
    while steps.reached < 1:
        steps.hear(START_SECONDS)
    return 1


def measure(method: str, peers: int, mbit: float, compute_seconds: float, count: int, folder: Path) -> Figures:
    """Seconds and bytes of so many steps behind lines of `mbit`, after some to warm up."""
    common = ["--model", json.dumps(msgspec.to_builtins(MANIFEST.model)), "--peers", str(peers)]
    common += ["--sequences", str(sequences_per_member()), "--compute-seconds", str(compute_seconds)]
    with Lines(peers, None) as lines, Crew(lines, folder) as crew:
        steps = Steps(crew, peers)
        if method.startswith("p2ptrain"):
            manifest = run_toml(compute_seconds, int(method == "p2ptrain-overlap"))
            first = start_p2ptrain(crew, steps, common, peers, manifest)
        else:
            first = start_baseline(method, crew, steps, common, peers)
        for number in range(peers):
            lines.set_rate(number, mbit)
        first += 1 + WARM_UP_STEPS[method]
        while steps.reached < first + count:
            steps.hear(compute_seconds + STEP_SECONDS)
        figures = steps.figures(first, first + count)
        if method == "hivemind":
            log = (folder / "0.log").read_text()
            figures["group_sizes"] = [int(size) for size in re.findall(r"Averaged gradients with (\d+) peers", log)]
    figures["computing_share"] = round(compute_seconds / figures["step_seconds"], 4)
    return {"method": method, "compute_seconds": compute_seconds, **figures}
