"""Each attack in simulation over many seeds: does the swarm hold, at what pace, and when does it notice?

    python scripts/bench/soak_adversaries.py --seeds 200 --out docs/results/soak_adversaries.json

Seeds differ in the number of peers too. With even seeds, chains that somebody makes up are played amid all faults; with
odd ones in calm, where the pace is compared with that of the same seed without them. Silence, boasting, floods and
liars come upon a swarm in calm. Resumable: an attack is added to --out when all its seeds are played, and attacks that
are there are not played again. Exits with 1 when anything that must hold did not.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "simulation"))

from histories import MANIFEST, scenario
from lab.report import note, read, write

from p2ptrain.config.manifest import RoundConfig
from p2ptrain.peer import assembly
from p2ptrain.simulation.adversaries import ADVERSARIES, OUTSIDERS
from p2ptrain.simulation.lying import LIES, Lying
from p2ptrain.simulation.misbehaving import MISBEHAVIOURS, Attacked
from p2ptrain.simulation.world import Scenario, simulate

ENOUGH = 0.8
"""Of the rounds in calm."""
AUDITS_BY_DEFAULT = 0.089
"""Of each part, with the default strategy's payloads; those of the toy are of plain floats, and long."""
DEFAULTS = msgspec.structs.replace(MANIFEST, round=RoundConfig(target_batch=256))
"""Rounds of some seconds, whose length the members' throughputs decide; all waits are the manifest's own."""
Figures = dict[str, Any]


def chain(kind: str, seed: int) -> Figures:
    """Somebody who wants the swarm on a chain of its making."""
    usual = replace(scenario(seed), adversaries=(kind,))
    if kind not in OUTSIDERS:
        usual = replace(usual, peers=max(5, usual.peers))
    if seed % 2 == 0:
        return {"violations": simulate(usual).violations}
    calm, attacked = (simulate(replace(usual, faults=(), adversaries=those)) for those in ((), (kind,)))
    pace = [report.rounds / report.virtual_seconds for report in (calm, attacked)]
    return {"violations": calm.violations + attacked.violations, "pace": pace[1] / pace[0]}


def misbehaviour(kind: str, seed: int) -> Figures:
    """Somebody who costs the others time."""
    played = Scenario(manifest=DEFAULTS, seed=seed, peers=3 + seed % 4, faults=(), even_speeds=True)
    with tempfile.TemporaryDirectory() as folder:
        swarm = Attacked(played, Path(folder), kind, calm_seconds=30.0, attack_seconds=60.0, recovery_seconds=20.0)
        report = swarm.run()
    measured = swarm.measured
    figures: Figures = {
        "violations": report.violations,
        "pace": measured.share,
        "pace_afterwards": measured.recovered_rounds / measured.calm_rounds,
        "least_included": min(measured.included.values()),
    }
    return figures | {"noticed_after_rounds": measured.noticed_after_rounds} if kind == "censor" else figures


def lie(kind: str, seed: int) -> Figures:
    """A reducer or an auditor that lies."""
    assembly.audits_a_part = lambda codec: AUDITS_BY_DEFAULT
    played = Scenario(manifest=MANIFEST, seed=seed, peers=3 + seed % 4, faults=(), even_speeds=True)
    with tempfile.TemporaryDirectory() as folder:
        swarm = Lying(played, Path(folder), kind, rounds=40)
        report = swarm.run()
    outcome = swarm.outcome
    figures: Figures = {
        "violations": report.violations,
        "least_reduced_by_an_honest_member": min(outcome.reduced.values(), default=1.0),
        "reduced_by_the_liar": outcome.liars_reduced["liar0"],
    }
    return figures | {"expelled_after_rounds": outcome.rounds_until_expelled} if kind == "wrong_sum" else figures


_KINDS: tuple[tuple[Callable[[str, int], Figures], tuple[str, ...]], ...] = (
    (chain, ADVERSARIES),
    (lie, LIES),
    (misbehaviour, tuple(kind for kind in MISBEHAVIOURS if kind != "nothing")),
)
ATTACKS = {kind: played for played, kinds in _KINDS for kind in kinds}


def play(task: tuple[str, int]) -> tuple[int, Figures]:
    """One history of one attack."""
    torch.set_num_threads(1)
    return task[1], ATTACKS[task[0]](*task)


def row(attack: str, played: dict[int, Figures]) -> Figures:
    """What all seeds of one attack came to; of each figure its least, fifth hundredth, median and greatest value."""
    violations = {str(seed): figures["violations"] for seed, figures in sorted(played.items()) if figures["violations"]}
    result: Figures = {"attack": attack, "seeds": len(played), "violations": violations}
    for name in sorted({name for figures in played.values() for name in figures} - {"violations"}):
        all_values = [figures[name] for figures in played.values() if name in figures]
        values = sorted(value for value in all_values if value is not None)
        figure: Figures = {"seeds": len(values)}
        if values:
            at = {"least": 0, "fifth_percentile": len(values) // 20, "median": len(values) // 2, "greatest": -1}
            figure |= {what: round(values[place], 3) for what, place in at.items()}
        if len(values) < len(all_values):
            figure["never"] = len(all_values) - len(values)
        if name in ("pace", "pace_afterwards", "least_included"):
            figure["under_0_8"] = sum(value < ENOUGH for value in values)
        result[name] = figure
    return result


def main() -> int:
    """Play what --out lacks."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--attack", action="append", choices=list(ATTACKS), help="may be given several times")
    parser.add_argument("--seeds", type=int, default=200)
    parser.add_argument("--out", type=Path, default=Path("soak-adversaries.json"))
    options = parser.parse_args()
    began = time.monotonic()
    rows: list[Figures] = read(options.out) or []
    done = {row["attack"] for row in rows if row["seeds"] >= options.seeds}
    with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool:
        for attack in (name for name in options.attack or ATTACKS if name not in done):
            tasks = [(attack, seed) for seed in range(options.seeds)]
            rows = [other for other in rows if other["attack"] != attack]
            rows.append(row(attack, dict(pool.imap_unordered(play, tasks))))
            write(options.out, rows)
            note(f"{time.monotonic() - began:.0f} s: {json.dumps(rows[-1])[:400]}")
    return 1 if any(row["violations"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
