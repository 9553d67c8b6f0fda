"""Thousands of simulated histories with every fault: none may break an invariant.

    python scripts/bench/soak_simulation.py --seeds 10000 --out docs/results/soak_simulation.json

Resumable: a piece of `PIECE` seeds is added to --out when it is done, and a later call goes on from there. Seeds are
played as `tests/simulation/histories.py` plays them. The file holds, for each piece, a hash over the histories of its
seeds, what happened in them, every violation with its seed, and the version of the protocol: pieces of other versions
are played again. Exits with 1 when there is any violation.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "simulation"))

from histories import play_all
from lab.report import note, read, write

from p2ptrain.config.manifest import PROTOCOL_VERSION

PIECE = 250


def main() -> int:
    """Play what --out lacks."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=10_000)
    parser.add_argument("--out", type=Path, default=Path("soak-simulation.json"))
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no piece after this time")
    options = parser.parse_args()
    began = time.monotonic()
    pieces: list[dict[str, Any]] = (read(options.out) or {"pieces": []})["pieces"]
    pieces = [piece for piece in pieces if piece.get("protocol_version") == PROTOCOL_VERSION]
    while len(pieces) * PIECE < options.seeds and time.monotonic() - began < options.seconds:
        first = len(pieces) * PIECE
        pieces.append(play_piece(first, min(first + PIECE, options.seeds)))
        write(options.out, summary(pieces))
        note(f"{pieces[-1]['end']} seeds, {time.monotonic() - began:.0f} s")
    result = summary(pieces)
    print(json.dumps({key: value for key, value in result.items() if key != "pieces"}))
    return 1 if result["violations"] else 0


def play_piece(first: int, end: int) -> dict[str, Any]:
    """Seeds [first, end)."""
    reports = sorted(play_all(range(first, end)), key=lambda report: report.seed)
    coverage: Counter[str] = Counter()
    for report in reports:
        coverage.update(report.coverage)
    return {
        "first": first,
        "end": end,
        "protocol_version": PROTOCOL_VERSION,
        "histories_sha256": hashlib.sha256("".join(report.digest for report in reports).encode()).hexdigest(),
        "slowest_convergence_seconds": max(report.convergence_seconds or 0.0 for report in reports),
        "rounds": sum(report.rounds for report in reports),
        "coverage": dict(sorted(coverage.items())),
        "violations": {str(report.seed): report.violations for report in reports if report.violations},
    }


def summary(pieces: list[dict[str, Any]]) -> dict[str, Any]:
    """Of all pieces, and the pieces."""
    coverage: Counter[str] = Counter()
    violations: dict[str, list[str]] = {}
    for piece in pieces:
        coverage.update(piece["coverage"])
        violations |= piece["violations"]
    return {
        "seeds": pieces[-1]["end"] if pieces else 0,
        "violations": violations,
        "rounds": sum(piece["rounds"] for piece in pieces),
        "slowest_convergence_seconds": max((piece["slowest_convergence_seconds"] for piece in pieces), default=0.0),
        "coverage": dict(sorted(coverage.items())),
        "pieces": pieces,
    }


if __name__ == "__main__":
    sys.exit(main())
