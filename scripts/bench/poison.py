"""What hostile members do to learning, by attack and by how reducers sum: held-out bits per byte beside calm.

    python scripts/bench/poison.py --out docs/results/poison.json --attack flip --method bounded --claim 4

Sixteen members train the model of `learning.py` with the default strategy, by rounds of `simulation/group.py`; the last
four are hostile (`simulation/poison.py`). Held-out bits per byte after --tokens tokens stand beside those of a calm run
with sixteen honest members that takes the `mean`, so that what a method costs honest members shows too. Tokens are
those that all sixteen, the hostile ones included, compute gradients for. `fewer` are calm runs of the twelve honest
members alone, for as many rounds: the best that a defence can come to. With --unequal members compute between 1 and 8
sequences a round, as many in all; with --claim hostile ones say that they have computed so many times what they have.

Runs that are in --out are kept, and each is written as it ends. One of 1M tokens takes two minutes of a core, four
fifths of it for gradients. Progress on stderr, the result last.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

import msgspec
import torch
from lab.report import note, read, write
from learning import EMBEDDED, Setting, Text, manifest_of, members_of, rounds_of

from p2ptrain.compression.codec import Robust
from p2ptrain.config.manifest import RoundConfig
from p2ptrain.models.gpt import GPT
from p2ptrain.simulation.group import Forge, Group
from p2ptrain.simulation.poison import ATTACKS, forger, other_text
from p2ptrain.training.replica import build_optimizer

Row = dict[str, Any]

METHODS: tuple[Robust, ...] = get_args(Robust)
CALM, FEWER = "calm", "fewer"
RATE = 0.002
"""What did best with eight members; see docs/learning.md."""
CLIP_RATIO = RoundConfig().clip_ratio
UNEQUAL = (8, 8, 8, 8, 4, 4, 2, 2, 2, 1, 1, 1, 8, 4, 2, 1)
"""Sequences a round of members of unequal speed: 64 in all, as of equal ones. Hostile are the last."""


@dataclass(frozen=True, slots=True)
class Case:
    """A run."""

    attack: str
    robust: Robust
    members: int
    hostile: int
    clip_ratio: float
    tokens: int
    seed: int
    claim: int = 1
    """How many times as many sequences as they compute hostile members claim."""
    unequal: bool = False
    """Members compute `UNEQUAL` sequences a round, as many in all."""


def setting_of(case: Case) -> Setting:
    """The run of `learning.py` that it is like."""
    return Setting(
        method="demo",
        learning_rate=RATE,
        peers=16,
        private=False,
        seed=case.seed,
        corpus=EMBEDDED,
        tokens=case.tokens,
        layers=6,
        embedding=64,
    )


def train(case: Case) -> Row:
    """One run: its row."""
    torch.set_num_threads(1)
    setting = setting_of(case)
    text, manifest = Text.load(setting.corpus), manifest_of(setting)
    rules = msgspec.structs.replace(manifest.round, robust=case.robust, clip_ratio=case.clip_ratio)
    if case.unequal:
        rules = msgspec.structs.replace(rules, micro_batch=max(UNEQUAL))
    manifest = msgspec.structs.replace(manifest, round=rules)
    members = members_of(setting)[: case.members]
    speeds = UNEQUAL[: case.members] if case.unequal else [rules.sequences_per_peer] * case.members
    sequences = dict(zip(members, speeds, strict=True))
    weights = {
        of: (case.claim if of in members[case.members - case.hostile :] else 1) * n for of, n in sequences.items()
    }
    texts = dict.fromkeys(members, text.train)
    forge: Forge = lambda number, selected: {}  # noqa: E731
    if case.hostile:
        codec = build_optimizer(GPT(manifest.model), manifest).codec
        forge = forger(ATTACKS[case.attack], codec, case.hostile)
        if case.attack == "other_task":
            texts |= dict.fromkeys(members[-case.hostile :], other_text(text.train))
    group = Group(
        manifest, texts.__getitem__, forge=forge, sequences=sequences.__getitem__, weights=weights.__getitem__
    )
    parts, began = group.equal_parts(len(members)), time.process_time()
    for _ in range(rounds_of(setting)):
        group.play(members, parts)
    bits = text.scored(group.model)
    return {
        **asdict(case),
        "rounds": group.rounds,
        "parameters": manifest.model.parameters,
        "heldout_bits_per_byte": round(bits, 4) if math.isfinite(bits) else None,
        "cpu_seconds": round(time.process_time() - began),
    }


def wanted(options: argparse.Namespace) -> list[Case]:
    """All runs that the options name."""
    attacks = [CALM, FEWER, *ATTACKS] if options.attack == ["all"] else options.attack
    return [
        Case(
            attack,
            robust,
            options.members - (options.hostile if attack == FEWER else 0),
            0 if attack in (CALM, FEWER) else options.hostile,
            options.clip_ratio,
            options.tokens,
            options.seed,
            options.claim if attack not in (CALM, FEWER) else 1,
            options.unequal,
        )
        for attack in attacks
        for robust in options.method
    ]


def case_of(row: Row) -> Case:
    """Of a row."""
    return Case(**{name: row[name] for name in Case.__slots__})


def beside_calm(rows: list[Row]) -> list[Row]:
    """Each row with the ratio of its bits to those of the calm run of sixteen such members by the mean."""

    def run(row: Row) -> tuple[Any, ...]:
        return row["tokens"], row["seed"], row["unequal"]

    calm = {
        run(row): row["heldout_bits_per_byte"]
        for row in rows
        if (row["attack"], row["robust"], row["clip_ratio"]) == (CALM, "mean", CLIP_RATIO)
    }
    for row in rows:
        bits, beside = row["heldout_bits_per_byte"], calm.get(run(row))
        row["against_calm"] = round(bits / beside - 1, 4) if bits and beside else None
    return rows


def main() -> int:
    """The bench."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def words(text: str) -> list[str]:
        return text.split(",")

    parser.add_argument("--method", type=words, default=list(METHODS), help=", ".join(METHODS))
    parser.add_argument("--attack", type=words, default=["all"], help=f"all, {CALM}, {FEWER}, {', '.join(ATTACKS)}")
    parser.add_argument("--members", type=int, default=16, help="hostile ones included, at most 16; %(default)s")
    parser.add_argument("--hostile", type=int, default=4, help="%(default)s")
    parser.add_argument("--clip-ratio", type=float, default=CLIP_RATIO, help="the manifest's; %(default)s")
    parser.add_argument("--tokens", type=int, default=1_000_000, help="%(default)s")
    parser.add_argument("--claim", type=int, default=1, help="weight that liars claim, over the truth; %(default)s")
    parser.add_argument("--unequal", action="store_true", help=f"members compute {UNEQUAL} sequences a round")
    parser.add_argument("--seed", type=int, default=1, help="%(default)s")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once, a core each; %(default)s")
    parser.add_argument("--out", type=Path, help="rows; those that it has are kept")
    parser.add_argument("--format", choices=("text", "json"), default="text")
    options = parser.parse_args()
    if unknown := [name for name in options.method if name not in METHODS]:
        parser.error(f"no method {unknown[0]}; there are {', '.join(METHODS)}")
    if unknown := [name for name in options.attack if name not in ("all", CALM, FEWER, *ATTACKS)]:
        parser.error(f"no attack {unknown[0]}; there are {', '.join((CALM, FEWER, *ATTACKS))}")
    rows: list[Row] = (read(options.out) or []) if options.out else []
    done = {case_of(row) for row in rows}
    with ProcessPoolExecutor(options.jobs, multiprocessing.get_context("spawn")) as pool:
        runs = [pool.submit(train, case) for case in wanted(options) if case not in done]
        for run in as_completed(runs):
            rows = beside_calm([*rows, run.result()])
            note(f"{rows[-1]['attack']}, {rows[-1]['robust']}: {rows[-1]['heldout_bits_per_byte']}")
            if options.out:
                write(options.out, rows)
    if options.format == "json":
        print(json.dumps(rows, indent=2))
    else:
        for row in rows:
            print(f"{row['attack']:14} {row['robust']:14} {row['heldout_bits_per_byte']}  {row['against_calm']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
