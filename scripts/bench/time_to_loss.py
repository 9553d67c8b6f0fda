"""Time to one loss behind slow lines: p2ptrain beside hivemind's Optimizer and torch's DDP, with the same GPT and text.

    python scripts/bench/time_to_loss.py --out docs/results/time_to_loss.json --picture docs/pictures/time_to_loss.png

Time to loss = seconds of a step, timed, times steps to the loss, from training runs without network. As root, on Linux.

Timed: whole steps of 4 real peers, each a process in a network namespace behind a line of --mbit each way, no delay
added: `p2ptrain` itself with and without overlap, hivemind.Optimizer with gradients in 16 bits, DDP over gloo plain and
with its 16-bit hook. Gradients, what is sent, the optimizer's step and all waiting are real, and bytes are those that
the lines' interfaces count. Modelled: computing, which sleeps for --compute seconds a step (lab/synthetic_gpt.py),
since two cores cannot compute for four peers at once; longer computing stands for a slower machine or a larger batch in
the same number of steps. Warm-up steps are left out.

Steps: see lab/curves.py; the best of its learning rates for each method. hivemind and DDP take the same steps
and share a curve. p2ptrain with overlap has curves of its own, where as many sequences of each round are computed
before the last round's step as were in the timing run (of 4, one a micro-batch).

The loss, --loss bits per byte of held-out text, is below what zstd needs for it at its strongest, and far below the
entropy of single tokens: a model that has only learned how frequent words are does not reach it.

Curves and timings in the two files are kept and not made anew; --again makes those timings anew that are asked for.
Where hivemind's delayed modes would hide computing behind averaging altogether, and cost no steps, its time is given
too, as computed. All timings take over an hour, all curves as long; --parts, --methods and --compute make some of them,
and the report has what there is: of a method that no curve fits, steps alone.
Prints one JSON object last.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path

import torch
from lab.curves import MANIFEST, MEMBERS, curves, sequences_per_member, steps_to
from lab.lines import prepare
from lab.report import Figures, finish, merged, note, pyplot, read, save, write
from lab.timed_steps import METHODS, measure

COMPUTE_SECONDS = (1.0, 10.0, 60.0)
PARTS = ("timings", "curves")
P2PTRAIN_STEPS = {1.0: 40, 10.0: 8}
BASELINE_STEPS = 3
"""A baseline's steps take half a minute and more; these must do, and for p2ptrain where computing takes so long."""
LOSS_BITS_PER_BYTE = 2.5
STOP_BELOW_BITS = 0.03
STALE_TOLERANCE = 0.1
"""Of a sequence, on average: the curve with so much less is still taken."""


def best_runs(known: Figures, bits: float) -> list[Figures]:
    """For each optimizer and number of stale sequences the run with the fewest steps to the loss."""
    best = []
    for optimizer, stale in sorted({(run["method"], run["stale"]) for run in known["runs"]}):
        runs = [run for run in known["runs"] if (run["method"], run["stale"]) == (optimizer, stale)]
        reached = [(steps_to(run["heldout_bits_per_byte"], bits), run) for run in runs]
        rates = {f"{run['learning_rate']:g}": steps for steps, run in reached}
        found = min(((s, run) for s, run in reached if s is not None), key=lambda pair: pair[0], default=None)
        if found is not None:
            best.append({"optimizer": optimizer, "stale": stale, "steps": round(found[0], 1), "by_rate": rates})
            best[-1]["curve"] = found[1]["heldout_bits_per_byte"]
    return best


def steps_of(timing: Figures, best: list[Figures]) -> float | None:
    """Steps to the loss of a method, whose gradients were as stale as timed, or more; None: no run got there."""
    stale = timing.get("stale", 0)
    fitting = [b for b in best if b["optimizer"] == METHODS[timing["method"]] and b["stale"] >= stale - STALE_TOLERANCE]
    return float(min(fitting, key=lambda b: b["stale"])["steps"]) if fitting else None


def report(setup: Figures, known: Figures, timings: list[Figures], bits: float) -> Figures:
    """Everything put together."""
    best = best_runs(known, bits)
    table = []
    for timing in timings:
        count = steps_of(timing, best)
        row = {**timing, "steps": count, "time_to_loss_seconds": count and round(timing["step_seconds"] * count, 1)}
        if timing["method"] == "hivemind" and count is not None:
            beside = timing["step_seconds"] - timing["compute_seconds"]
            row["time_to_loss_seconds_if_wholly_overlapped"] = round(max(beside, timing["compute_seconds"]) * count, 1)
        table.append(row)
    table.sort(key=lambda row: (row["compute_seconds"], list(METHODS).index(row["method"])))
    ratios = {}
    for compute in sorted({row["compute_seconds"] for row in table}):
        rows = [row for row in table if row["compute_seconds"] == compute and row["steps"] is not None]
        ours = [row["time_to_loss_seconds"] for row in rows if row["method"].startswith("p2ptrain")]
        if ours:
            ratios[f"{compute:g}"] = {
                row["method"]: round(row["time_to_loss_seconds"] / min(ours), 2)
                for row in rows
                if not row["method"].startswith("p2ptrain")
            }
    return {
        "setup": setup,
        "loss_bits_per_byte": bits,
        "marks_bits_per_byte": {name: round(value, 3) for name, value in known["marks_bits_per_byte"].items()},
        "steps_to_loss": [{key: value for key, value in one.items() if key != "curve"} for one in best],
        "timings": table,
        "times_slower_than_p2ptrain_by_compute_seconds": ratios,
    }


def draw(result: Figures, known: Figures, path: Path) -> None:
    """Curves by step on the left, time to the loss by seconds of computing on the right."""
    figure, (left, right) = pyplot().subplots(1, 2, figsize=(11, 4))
    for one in best_runs(known, result["loss_bits_per_byte"]):
        label = "AdamW (hivemind, DDP)" if one["optimizer"] == "adamw" else "p2ptrain"
        label += f", {one['stale']} of {sequences_per_member()} sequences a step old" if one["stale"] else ""
        left.plot(*zip(*one["curve"], strict=True), label=label)
    left.axhline(result["loss_bits_per_byte"], color="black", linestyle=":", linewidth=1)
    for name in ("unigram", "xz"):
        left.axhline(result["marks_bits_per_byte"][name], color="grey", linestyle="--", linewidth=0.8)
        left.text(0, result["marks_bits_per_byte"][name], f" {name}", va="bottom", fontsize=8, color="grey")
    left.set(xlabel="steps", ylabel="bits per byte of held-out text", title="Steps, best learning rates")
    left.legend(fontsize=8)
    for method in METHODS:
        rows = [r for r in result["timings"] if r["method"] == method and r["steps"] is not None]
        rows.sort(key=lambda r: r["compute_seconds"])
        if rows:
            xs, ys = zip(*((r["compute_seconds"], r["time_to_loss_seconds"] / 3600) for r in rows), strict=True)
            right.plot(xs, ys, "o-", label=method)
    right.set(xscale="log", yscale="log", xlabel="seconds of computing in a step", ylabel="hours to the loss")
    right.set_title(f"4 peers behind {result['setup']['mbit']:g} Mbit/s")
    right.legend(fontsize=8)
    for axes in (left, right):
        axes.grid(alpha=0.3)
    save(figure, path)


def time_steps(options: argparse.Namespace, setup: Figures) -> list[Figures]:
    """Timings of all methods and lengths of computing asked for, and those that the report at --out has."""
    before = read(options.out) or {}
    timings: list[Figures] = before.get("timings", []) if before.get("setup") == setup else []
    for compute, method in itertools.product(options.compute, options.methods):
        kept = [t for t in timings if (t["method"], t["compute_seconds"]) == (method, compute)]
        if kept and not options.again:
            continue
        usual = P2PTRAIN_STEPS.get(compute, BASELINE_STEPS) if method.startswith("p2ptrain") else BASELINE_STEPS
        folder = Path(tempfile.mkdtemp(prefix="time-to-loss-", dir="/tmp"))
        began = time.monotonic()
        try:
            timing = measure(method, MEMBERS, options.mbit, compute, options.steps or usual, folder)
        finally:
            if options.keep:
                note(f"homes and logs: {folder}")
            else:
                shutil.rmtree(folder, ignore_errors=True)
        note(f"{json.dumps(timing)} in {time.monotonic() - began:.0f} s")
        timings = merged(timings, timing, ("method", "compute_seconds"))
        write(options.out, {**before, "setup": setup, "timings": timings})
    return timings


def main() -> int:
    """Timings, curves, and both together."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--curves", type=Path, default=Path("docs/results/time_to_loss_curves.json"))
    parser.add_argument("--out", type=Path, help="the report; timings that are in it are kept")
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--parts", type=lambda text: text.split(","), default=list(PARTS), help=",".join(PARTS))
    parser.add_argument("--jobs", type=int, default=1, help="training runs at once, a core each; %(default)s")
    parser.add_argument("--loss", type=float, default=LOSS_BITS_PER_BYTE, help="bits per byte")
    parser.add_argument("--methods", type=lambda text: text.split(","), default=list(METHODS), help=",".join(METHODS))
    parser.add_argument("--compute", type=lambda text: [float(n) for n in text.split(",")], default=COMPUTE_SECONDS)
    parser.add_argument("--steps", type=int, help="to time; default: by method and computing")
    parser.add_argument("--mbit", type=float, default=10.0, help="each peer's line, both ways")
    parser.add_argument("--again", action="store_true", help="time also what --out has")
    parser.add_argument("--keep", action="store_true", help="keep homes and logs")
    options = parser.parse_args()
    torch.set_num_threads(1)
    setup = {
        "mbit": options.mbit,
        "peers": MEMBERS,
        "parameters": MANIFEST.model.parameters,
        "sequences_per_peer_and_step": sequences_per_member(),
        "context": MANIFEST.model.context,
    }
    timings: list[Figures] = []
    if "timings" in options.parts:
        prepare(parser)
        timings = time_steps(options, setup)
    result: Figures = {"setup": setup, "timings": timings}
    known: Figures | None = read(options.curves)
    if "curves" in options.parts:
        cache = Path(tempfile.gettempdir()) / "p2ptrain-time-to-loss"
        known = curves(options.curves, cache, options.loss - STOP_BELOW_BITS, options.jobs)
    if known is not None:
        result = report(setup, known, timings, options.loss)
        if options.picture is not None:
            draw(result, known, options.picture)
    finish(options.out if known is not None and timings else None, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
