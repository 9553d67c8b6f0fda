"""Whether a run.toml that says nothing but the size trains: the train loss of its first rounds, alone and with others.

    python scripts/bench/defaults.py --sizes 1M,25M --peers 1,4 --picture docs/pictures/defaults.png

Members are those of `simulation/group.py`: the product's local computing, momentum, codec, reducing and settling, in
rounds in which nothing goes wrong. Rate, warm-up and directions are those that `p2ptrain init --size` writes. Batch and
context are, too, unless --sequences and --context say less; what follows from them then follows from these. A run is
well where no round after the tenth has a higher loss than the first, which is that of knowing nothing.

Runs that --out has are kept. --minutes ends a run sooner, and its row says after how many rounds. Gradients are
computed in bfloat16 with --bfloat16, which is several times as fast on processors that have instructions for it.
"""

from __future__ import annotations

import argparse
import functools
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import msgspec
import numpy as np
import torch
from lab.report import finish, machine, note, pyplot, read, save, write

from p2ptrain.config import strategies
from p2ptrain.config.loading import new_manifest
from p2ptrain.config.manifest import Manifest
from p2ptrain.config.sizes import SIZES, Size
from p2ptrain.data.corpus import load_embedded
from p2ptrain.data.tokenizer import cached_tokens
from p2ptrain.simulation.group import Group

SETTLED_ROUNDS = 10
"""After so many the loss is to be no higher than at the start."""
SMOOTHED_ROUNDS = 10
Row = dict[str, Any]


def manifest_of(size: Size, sequences: int | None, context: int | None, total_rounds: int, seed: int) -> Manifest:
    """Return what `init --size` writes, for rounds in which all members compute equally much."""
    made = new_manifest("bench", size=size)
    batch = min(made.round.target_batch, sequences or made.round.target_batch)
    model = msgspec.structs.replace(made.model, context=min(made.model.context, context or made.model.context))
    optimizer = msgspec.structs.replace(
        made.optimizer, total_rounds=total_rounds, **strategies.of_size(model, batch, total_rounds)
    )
    rules = msgspec.structs.replace(made.round, target_batch=batch)
    return msgspec.structs.replace(made, nonce=f"{seed:032x}", model=model, optimizer=optimizer, round=rules)


def of_members(manifest: Manifest, peers: int) -> Manifest:
    """Return the same with the batch shared among so many."""
    each = max(1, manifest.round.target_batch // peers)
    at_once = min(manifest.round.micro_batch, each)
    rules = msgspec.structs.replace(manifest.round, pace="fixed", sequences_per_peer=each, micro_batch=at_once)
    return msgspec.structs.replace(manifest, round=rules)


def train(manifest: Manifest, peers: int, rounds: int, minutes: float, bfloat16: bool, label: str) -> list[float]:
    """Return the train loss of each round, in nats a token."""
    folder = Path(tempfile.gettempdir()) / "p2ptrain-bench-learning"
    folder.mkdir(parents=True, exist_ok=True)
    tokens = cached_tokens(load_embedded().train, folder)
    group = Group(of_members(manifest, peers), lambda peer_id: tokens)
    if bfloat16:
        plain = group.model.loss
        group.model.loss = functools.partial(_in_bfloat16, plain)  # type: ignore[method-assign]
    members = [f"member {number}".encode() for number in range(peers)]
    parts = group.equal_parts(peers)
    losses: list[float] = []
    began = said = time.monotonic()
    while len(losses) < rounds and time.monotonic() - began < 60 * minutes:
        losses.append(group.play(members, parts).loss)
        if time.monotonic() - said > 20:
            said = time.monotonic()
            note(f"{label}: round {len(losses)} of {rounds}, loss {np.mean(losses[-SMOOTHED_ROUNDS:]):.3f}")
    return losses


def _in_bfloat16(loss: Any, *arguments: Any) -> Any:
    with torch.autocast("cpu", torch.bfloat16):
        return loss(*arguments)


def row_of(manifest: Manifest, size: str, peers: int, losses: Sequence[float]) -> Row:
    """Return what came of a run."""
    later = losses[SETTLED_ROUNDS:]
    return {
        "size": size,
        "peers": peers,
        "parameters": manifest.model.parameters,
        "tokens_a_round": manifest.round.target_batch * manifest.model.context,
        "learning_rate": manifest.optimizer.learning_rate,
        "warmup_rounds": manifest.optimizer.warmup_rounds,
        "rounds": len(losses),
        "start": round(losses[0], 4),
        "worst_later": round(max(later), 4) if later else None,
        "end": round(float(np.mean(losses[-SMOOTHED_ROUNDS:])), 4),
        "well": bool(later) and max(later) <= losses[0],
        "losses": [round(loss, 4) for loss in losses],
    }


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draw loss against rounds, a panel for each size."""
    sizes = list(dict.fromkeys(row["size"] for row in rows))
    figure, panels = pyplot().subplots(1, len(sizes), figsize=(4.5 * len(sizes), 4), squeeze=False)
    for panel, size in zip(panels[0], sizes, strict=True):
        for row in rows:
            if row["size"] == size:
                panel.plot(range(1, len(row["losses"]) + 1), row["losses"], label=f"{row['peers']} peers", linewidth=1)
                panel.axhline(row["start"], linestyle="--", color="grey", linewidth=0.8)
        panel.set(title=f"--size {size}", xlabel="round", ylabel="train loss, nats a token")
        panel.legend()
        panel.grid(alpha=0.3)
    save(figure, path)


def main() -> int:
    """The bench."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/results/defaults.json"), help="rows; %(default)s")
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--sizes", type=lambda text: text.split(","), default=["1M", "25M"], help=", ".join(SIZES))
    parser.add_argument("--peers", type=lambda text: [int(one) for one in text.split(",")], default=[1, 4])
    parser.add_argument("--rounds", type=int, default=300, help="%(default)s")
    parser.add_argument("--total-rounds", type=int, default=2000, help="that the schedule is for; %(default)s")
    parser.add_argument("--sequences", type=int, help="of a round, at most")
    parser.add_argument("--context", type=int, help="tokens of a sequence, at most")
    parser.add_argument("--minutes", type=float, default=1e9, help="of a run, at most")
    parser.add_argument("--bfloat16", action="store_true", help="compute gradients in it")
    parser.add_argument("--seed", type=int, default=1, help="%(default)s")
    options = parser.parse_args()
    unknown = [size for size in options.sizes if size not in SIZES]
    if unknown:
        parser.error(f"no size {unknown[0]}; there are {', '.join(SIZES)}")
    known = read(options.out) or {}
    rows: list[Row] = known.get("rows", [])
    for size in options.sizes:
        manifest = manifest_of(cast(Size, size), options.sequences, options.context, options.total_rounds, options.seed)
        for peers in options.peers:
            label = f"{size}, {peers} peers"
            if any((row["size"], row["peers"]) == (size, peers) for row in rows):
                continue
            losses = train(manifest, peers, options.rounds, options.minutes, options.bfloat16, label)
            rows.append(row_of(manifest, size, peers, losses))
            note(f"{label}: start {rows[-1]['start']}, worst later {rows[-1]['worst_later']}, end {rows[-1]['end']}")
            write(options.out, {"machine": machine(), "bfloat16": options.bfloat16, "rows": rows})
    if options.picture is not None:
        draw(rows, options.picture)
    finish(options.out, {"machine": machine(), "bfloat16": options.bfloat16, "rows": rows})
    return 0 if all(row["well"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
