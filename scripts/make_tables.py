"""Write the tables of README.md and docs/*.md from docs/results/*.json.

A table goes between `<!-- table: NAME -->` and `<!-- end -->`; NAME is that of a function below. A figure stands in its
result file and nowhere else: run this after a benchmark has written a file anew. `--check` writes nothing, prints what
would change, and exits with 1 if anything would.
"""

from __future__ import annotations

import argparse
import difflib
import json
import re
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs/results"
MARKED = re.compile(r"<!-- table: (\w+) -->\n(?:(?!<!-- table:).)*?<!-- end -->", re.S)

Rows = list[Sequence[str]]

ATTACK_HARM = {"taken_over": "taken over", "diverged": "replicas differ", "crashed": "a crash"}
ATTACK_RATIO, ATTACK_GROWTH = 0.8, 0.1
"""As in attack_swarm.py: at least so many rounds of calm's, and less growth of memory."""
OTHER_DEMOS = ("straightforward", "straightforward_tuned")


def load(name: str) -> Any:
    """Read one result file."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def table(head: Sequence[str], rows: Rows) -> str:
    """Lay out a table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines).replace("|  |", "| |").replace("|  |", "| |")


def mega(count: float) -> str:
    """Say a number of bytes in MB, to three digits at most."""
    return f"{count / 1e6:.2f} MB" if count < 1e7 else f"{count / 1e6:.1f} MB"


def digits(value: float, count: int = 3) -> str:
    """Say a number to `count` significant digits, without an exponent."""
    whole = len(str(int(abs(value)))) if abs(value) >= 1 else 0
    leading = 0
    while 0 < abs(value) * 10**leading < 0.1:
        leading += 1
    return f"{value:.{max(count - whole + leading, 0)}f}"


# ---- the demo ------------------------------------------------------------------------------------------------------


def demo_loss() -> str:
    """Bits per byte of the demo's model, beside compressors."""
    demo = load("demo")
    rows: Rows = [("the swarm's model", f"**{demo['heldout_bits_per_byte']:.3f}**")]
    rows += [(name, f"{bits:.3f}") for name, bits in demo["compressors_bits_per_byte"].items()]
    return table(("Held-out text", "bits per byte"), rows)


def demo_bytes() -> str:
    """What a peer of the demo sends and receives in a round."""
    demo = load("demo")
    sent, received = demo["bytes_sent_per_peer_per_round"], demo["bytes_received_per_peer_per_round"]
    dense = demo["bytes_of_fp16_ring_all_reduce"]
    return table(
        ("Bytes per peer and round", "sent", "received"),
        [
            ("p2ptrain, framing included", f"{sent:,.0f}", f"{received:,.0f}"),
            ("fp16 all-reduce (ring), computed", f"{dense:,}", f"{dense:,}"),
            ("ratio", f"1 : {dense / sent:.0f}", f"1 : {dense / received:.0f}"),
        ],
    )


# ---- the exchange --------------------------------------------------------------------------------------------------


def exchange() -> str:
    """Seconds and bytes of an exchange, beside hivemind's."""
    results = load("round")
    ours, theirs, compared = results["p2ptrain"], results["hivemind"], results["compared"]
    slow = "10 Mbit/s"

    def seconds(of: dict[str, Any], line: str) -> str:
        return f"{digits(of[line]['exchange_seconds']['median'])} s"

    rows: Rows = []
    for peers in ours:
        times = {line: compared[peers][line] for line in ("unlimited", slow)}
        rows.append(
            (
                peers,
                seconds(ours[peers], "unlimited"),
                f"{seconds(theirs[peers], 'unlimited')} ({times['unlimited']['times_less_exchange']:.1f} times)",
                seconds(ours[peers], slow),
                f"{seconds(theirs[peers], slow)} ({times[slow]['times_less_exchange']:.0f} times)",
                f"{ours[peers][slow]['floor']['wire']['seconds']:.3f} s",
                f"{ours[peers][slow]['floor']['wire']['exchange_over_floor']:.2f}",
                mega(ours[peers][slow]["wire_bytes_mean"]),
                f"{times[slow]['times_fewer_bytes']:.0f} times",
            )
        )
    head = ("Peers", "p2ptrain, no limit", "hivemind", f"p2ptrain, {slow} each way", "hivemind", "floor of the line")
    return table((*head, "p2ptrain over floor", "p2ptrain sends", "hivemind sends"), rows)


def exchange_in_short() -> str:
    """The same behind slow lines, seconds and bytes alone."""
    results = load("round")
    slow = "10 Mbit/s"
    rows: Rows = []
    for peers, of in results["p2ptrain"].items():
        theirs, times = results["hivemind"][peers][slow], results["compared"][peers][slow]
        rows.append(
            (
                peers,
                f"**{digits(of[slow]['exchange_seconds']['median'])} s**",
                f"{digits(theirs['exchange_seconds']['median'])} s",
                f"**{mega(of[slow]['wire_bytes_mean'])}**",
                f"{times['times_fewer_bytes']:.0f} times as many",
            )
        )
    return table(("Peers", "p2ptrain takes", "hivemind takes", "each peer sends", "with hivemind"), rows)


def flatness() -> str:
    """Payload that a peer sends in a round, by the number of peers."""
    of = load("round")["flatness"]
    rows: Rows = [
        ("p2ptrain", *(f"{r['payload_bytes_mean'] / 1e3:.0f} kB" for r in of.values())),
        ("an all-gather of the same", *(f"{r['all_gather_bytes_sent'] / 1e3:.0f} kB" for r in of.values())),
    ]
    return table(("Peers", *of), rows)


def standing() -> str:
    """What the line of a peer carries while it does nothing."""
    report = load("standing")
    rows: Rows = []
    for part, name in (("real", "real peers"), ("many", "simulated")):
        for row in sorted(report[part].values(), key=lambda row: int(row["peers"])):
            ways = (row["sent_bytes_per_second"], row["received_bytes_per_second"])
            rates = [way[of] / 1e3 for way in ways for of in ("median", "most")]
            lost = row.get("lost_after_seconds")
            shown = "" if lost is None else f"{lost['most']:.1f} s at most, of {lost['killed']}"
            observer = row.get("observer_received_bytes_per_second")
            looks = "" if observer is None else f"{observer / 1e3:.1f} kB/s"
            rows.append((str(row["peers"]), name, *(f"{rate:.1f} kB/s" for rate in rates), looks, shown))
    columns = (
        "Peers",
        "",
        "sent, median",
        "most",
        "received, median",
        "most",
        "an observer receives",
        "a killed one is shown lost after",
    )
    return table(columns, rows)


def watching() -> str:
    """What an observer and a dashboard cost."""
    report = load("watching")
    rows: Rows = []
    for name, words in (("observer", "`inspect --watch`"), ("dashboard", "`dashboard`, with a page open")):
        of = report[name]
        ways = [of[f"{way}_bytes_per_second"] / 1e3 for way in ("sent", "received")]
        shares = [f"{100 * of[key]:.2f} %" for key in ("core_share", "core_share_of_daemon")]
        rows.append((words, *shares, *(f"{rate:.2f} kB/s" for rate in (*ways, sum(ways)))))
    return table(("", "of a core", "libp2p's daemon alone", "sent", "received", "together"), rows)


def stages() -> str:
    """Core time of one peer's own part of a round of four peers."""
    of = load("round")["p2ptrain"]["4"]["unlimited"]
    rows: Rows = [
        (
            name.replace("_", " "),
            f"{1000 * stage['seconds']['median']:.1f} ms",
            f"{1000 * stage['core_seconds']:.1f} ms",
        )
        for name, stage in of["stages"].items()
    ]
    rows.append(
        ("the exchange, all peers together", "", f"{1000 * of['exchange_core_seconds_of_all']['median']:.0f} ms")
    )
    return table(("Stage", "median", "core time"), rows)


def scale() -> str:
    """Simulated groups of up to 256 members."""
    rows: Rows = [
        (
            str(of["members"]),
            f"{of['payload_bytes_sent_per_peer_per_round'] / 1e3:.0f} kB",
            f"{of['header_bytes_sent_per_peer_per_round'] / 1e3:.0f} kB",
            f"{of['messages_sent_per_peer_per_round']:.0f}",
            f"{of['exchange_seconds']:.2f} s",
            f"{of['seconds_from_first_to_last_peer']:.2f} s",
        )
        for of in load("scale")["sizes"]
    ]
    head = ("Members", "payload sent", "headers sent", "messages sent", "exchange", "from the first to the last peer")
    return table(head, rows)


# ---- computing -----------------------------------------------------------------------------------------------------

NAMES = {
    "p2ptrain": "p2ptrain",
    "p2ptrain-overlap": "p2ptrain, overlap",
    "hivemind": "hivemind.Optimizer, fp16",
    "ddp-fp16": "DDP over gloo, fp16",
    "ddp": "DDP over gloo",
}


def time_to_loss() -> str:
    """Seconds to one loss, by how long a step computes."""
    results = load("time_to_loss")
    rows: Rows = []
    for seconds in sorted({t["compute_seconds"] for t in results["timings"]}):
        timings = {t["method"]: t for t in results["timings"] if t["compute_seconds"] == seconds}
        ours = timings["p2ptrain"]["time_to_loss_seconds"]
        for method, name in NAMES.items():
            of = timings[method]
            rows.append(
                (
                    f"{seconds:.0f} s" if method == "p2ptrain" else "",
                    name,
                    f"{digits(of['step_seconds'])} s",
                    f"{of['computing_share']:.0%}".replace("%", " %"),
                    mega(of["wire_bytes_sent_per_peer_and_step"]),
                    f"{of['steps']:.0f}",
                    f"{of['time_to_loss_seconds']:,.0f} s",
                    "" if method == "p2ptrain" else f"{of['time_to_loss_seconds'] / ours:.1f} times",
                )
            )
    head = ("Computing a step", "Method", "a step", "of it computing", "sent a step", "steps", "time to the loss")
    return table((*head, "of p2ptrain's"), rows)


def steps_to_loss() -> str:
    """Steps to that loss, by method, staleness and learning rate."""
    rows: Rows = []
    for of in load("time_to_loss")["steps_to_loss"]:
        rates = ", ".join(
            f"{float(rate):g}: {'not reached' if steps is None else f'{steps:.0f}'}"
            for rate, steps in of["by_rate"].items()
        )
        rows.append((of["optimizer"], str(of["stale"]), f"{of['steps']:.0f}", rates))
    return table(("Optimizer", "sequences of four a step old", "steps", "by learning rate"), rows)


def overlap() -> str:
    """A forward and backward pass beside an exchange, and apart."""
    results = load("overlap")
    rows: Rows = []
    for key, name in (("core_to_spare", "a core to spare"), ("no_core_to_spare", "no core to spare")):
        of = results[key]
        slower = [ratio - 1 for ratio in of["ratio_together_during_exchange"]]
        rows.append(
            (
                name,
                f"{of['apart']['mean_ms']:.1f} ms",
                f"{of['together_during_exchange']['mean_ms']:.1f} ms",
                f"{100 * min(slower):.0f} to {100 * max(slower):.0f} % longer",
            )
        )
    return table(("", "apart", "while an exchange is under way", "each of four runs"), rows)


def step_on_a_cpu() -> str:
    """The optimizer's step beside other optimizers', in the same turns."""
    of = load("codec")
    taken = of["step"]["milliseconds"]
    rows: Rows = []
    for key, ending, name in (("ours", "", "through bytes"), ("lone", "_lone", "lone")):
        others = [f"{of[f'speedup_vs_{other}{ending}']:.2f} times" for other in OTHER_DEMOS]
        adamw = [f"{of[f'time_vs_{other}{ending}']:.2f}" for other in ("adamw_foreach", "adamw_fused")]
        rows.append((name, f"**{digits(taken[key]['median'])}**", *others, *adamw))
    rows.append(("lone, of a new run", digits(taken["lone_of_a_new_run"]["median"]), "", "", "", ""))
    head = ("", "ms", "straightforward DeMo takes", "tuned takes")
    return table((*head, "of AdamW foreach", "of AdamW fused"), rows)


def bits_a_coefficient() -> str:
    """What of a contribution's bits is what."""
    of = load("codec")
    sections = ("index", "sign", "magnitude", "scale", "header", "messages")
    rows: Rows = []
    for bits in (2, 1):
        parts = of[f"codec_{bits}bit"]["bits_per_coefficient_by_section"]
        cells = [f"{parts[section]:.2f}" if section in parts else "" for section in sections]
        rows.append((f"{bits}-bit values", *cells, f"**{of[f'bits_per_coefficient_{bits}bit']:.2f}**"))
    return table(("Bits a coefficient", *sections[:4], "payload header", "messages", "whole"), rows)


def step_on_a_gpu() -> str:
    """The optimizer's step of a billion parameters."""
    results = load("codec_cuda")
    rows: Rows = []
    for key, name in (("signs", "signs, 32 coefficients"), ("of_a_new_run", "a new run's directions")):
        phases = {phase: of["median"] for phase, of in results[key]["phases_ms"].items()}
        cells = [digits(phases[phase]) for phase in ("accumulate_and_select", "apply", "settle")]
        beside = [f"{phases[phase]:,.0f}" for phase in ("encode", "reduce", "decode")]
        share = f"{100 * results[key]['share_of_bandwidth']:.1f} %"
        rows.append((name, *cells, f"**{digits(results[key]['step_ms'])}**", share, *beside))
    rows.append(("AdamW fused", "", "", "", digits(results["adamw_fused_ms"]["median"]), "", "", "", ""))
    head = ("ms", "accumulate and select", "apply", "settle", "step", "of the memory's bandwidth")
    return table((*head, "encode, on the host", "reduce, on the host", "decode, on the host"), rows)


# ---- learning ------------------------------------------------------------------------------------------------------


def learned(**wanted: Any) -> list[dict[str, Any]]:
    """Return the training runs of learning.json that have these values, and else the usual ones."""
    usual = {"peers": 8, "layers": 6, "embedding": 64, "private": False}
    return [run for run in load("learning") if all(run[key] == value for key, value in (usual | wanted).items())]


def bits(run: dict[str, Any]) -> float:
    """Return the bits that a peer sends and receives, a parameter and inner step."""
    return float(run["bits_per_parameter_sent"] + run["bits_per_parameter_received"])


def best_rate(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the runs, one a seed, at the learning rate that did best on seed 1."""
    first = min((run for run in runs if run["seed"] == 1), key=lambda run: run["bits_per_byte"])
    return sorted((r for r in runs if r["learning_rate"] == first["learning_rate"]), key=lambda run: run["seed"])


def learning(layers: int = 6, embedding: int = 64) -> str:
    """Bits per byte by method, beside AdamW without a network."""
    size = {"layers": layers, "embedding": embedding}
    methods = (
        "muon",
        "demo",
        "demo-signs",
        "demo-normalised",
        "dense",
        "adamw",
        "local_demo",
        "diloco",
        "sparse_diloco",
    )
    found = {m: best_rate(runs) for m in methods if (runs := learned(method=m, **size))}
    means = {method: statistics.mean(run["bits_per_byte"] for run in runs) for method, runs in found.items()}
    rows: Rows = []
    for method in sorted(found, key=lambda method: means[method]):
        runs = found[method]
        losses = [run["bits_per_byte"] for run in runs]
        spread = f" ({min(losses):.3f} to {max(losses):.3f})" if len(losses) > 1 else ""
        over = "" if method == "adamw" else f"{100 * (means[method] / means['adamw'] - 1):+.1f} %"
        sent, whole = "", ""
        if runs[0]["bits_per_parameter_sent"] is not None:
            mean = statistics.mean(bits(run) for run in runs)
            unit = "an inner step" if runs[0]["inner_steps"] > 1 else "a round"
            sent = f"{digits(mean)} {unit}"
            whole = f"{mean * runs[0]['rounds'] * runs[0]['inner_steps']:,.0f}"
        rows.append(
            (
                f"`{method}`",
                f"{runs[0]['learning_rate']:g}",
                str(len(runs)),
                f"{means[method]:.3f}{spread}",
                over,
                sent,
                whole,
            )
        )
    head = ("Method", "Rate", "Seeds", "Bits per byte", "over AdamW", "Bits a parameter, sent and received")
    return table((*head, "of the whole run"), rows)


def learning_large() -> str:
    """The same with 26M parameters."""
    return learning(7, 512)


def learning_rates(layers: int = 6, embedding: int = 64) -> str:
    """Bits per byte of seed 1 by learning rate."""
    runs = [run for run in learned(layers=layers, embedding=embedding) if run["seed"] == 1]
    rates = sorted({run["learning_rate"] for run in runs})
    rows: Rows = []
    for method in dict.fromkeys(run["method"] for run in runs if run["method"] != "demo-normalised"):
        of = {run["learning_rate"]: run["bits_per_byte"] for run in runs if run["method"] == method}
        if len(of) > 1:
            best = min(of.values())
            cells = [f"{of[rate]:.3f}" if rate in of else "" for rate in rates]
            rows.append((f"`{method}`", *(f"**{cell}**" if cell == f"{best:.3f}" else cell for cell in cells)))
    return table(("Learning rate", *(f"{rate:g}" for rate in rates)), rows)


def learning_rates_large() -> str:
    """The same with 26M parameters."""
    return learning_rates(7, 512)


def members() -> str:
    """Bits per byte of seed 1 by the number of members."""
    rows: Rows = []
    adamw = statistics.mean(run["bits_per_byte"] for run in best_rate(learned(method="adamw")))
    for peers in (2, 4, 8, 16):
        row = [str(peers)]
        for method in ("demo", "local_demo"):
            runs = [run for run in learned(method=method, peers=peers) if run["seed"] == 1]
            if not runs:
                row += ["", "", ""]
                continue
            run = min(runs, key=lambda run: run["bits_per_byte"])
            over = f"{100 * (run['bits_per_byte'] / adamw - 1):+.1f} %"
            row += [f"{run['bits_per_byte']:.3f}", over, f"{digits(bits(run), 2)}"]
        rows.append(row)
    head = ("Members", "`demo`", "over AdamW", "bits a round", "`local_demo`", "over AdamW", "bits an inner step")
    return table(head, rows)


def inner_steps() -> str:
    """Shorter rounds than those of `local_demo`, and its matrices without the DCT."""
    rate = 0.002
    names = ("local_demo-1", "local_demo-5", "local_demo", "local_demo-untransformed")
    rows: Rows = []
    for name in names:
        for run in learned(method=name, seed=1, learning_rate=rate):
            rows.append((f"`{name}`", str(run["inner_steps"]), digits(bits(run)), f"{run['bits_per_byte']:.3f}"))
    return table(("Method", "Inner steps a round", "Bits an inner step", "Bits per byte"), rows)


def own_text() -> str:
    """Where every member reads a text of its own."""
    rows: Rows = []
    for alone in learned(private=True):
        shared = learned(method=alone["method"], seed=alone["seed"], learning_rate=alone["learning_rate"])
        for run in shared:
            over = f"{100 * (alone['bits_per_byte'] / run['bits_per_byte'] - 1):+.1f} %"
            rows.append((f"`{run['method']}`", f"{run['bits_per_byte']:.3f}", f"{alone['bits_per_byte']:.3f}", over))
    return table(("Strategy", "all read all of the text", "each reads an eighth of its own", ""), rows)


def other_text() -> str:
    """Bits per byte on another text."""
    runs = load("learning_botocore")
    adamw = next(run["bits_per_byte"] for run in runs if run["method"] == "adamw")
    rows: Rows = []
    for run in runs:
        over = "" if run["method"] == "adamw" else f"{100 * (run['bits_per_byte'] / adamw - 1):+.1f} %"
        sent = "" if run["bits_per_parameter_sent"] is None else digits(bits(run))
        rows.append((f"`{run['method']}`", f"{run['bits_per_byte']:.3f}", over, sent))
    return table(("Method", "Bits per byte", "over AdamW", "Bits a parameter and step, sent and received"), rows)


# ---- faults --------------------------------------------------------------------------------------------------------


def soak_swarm() -> str:
    """Real peers under faults."""
    results = load("soak_swarm")
    rows: Rows = [
        (
            name,
            str(of["count"]),
            str(of["recovered"]),
            f"{of['median_seconds']:.1f} s",
            f"{of['worst_seconds']:.1f} s",
            f"{of['sequences_lost']:,}",
        )
        for name, of in results["faults"].items()
    ]
    return table(("Fault", "count", "recovered", "median", "worst", "sequences lost"), rows)


def soak_swarm_speed() -> str:
    """What the same swarm did meanwhile."""
    of = load("soak_swarm")
    alike = sum(ended["parameters_sha256"] == of["parameters_sha256"] for ended in of["ended_at"])
    computed, lost = of["sequences_computed"], of["sequences_lost_in_crashes"]
    return table(
        ("Real peers under faults", ""),
        [
            ("peers, minutes, Mbit/s each", f"{of['peers']}, {of['minutes']:.0f}, {of['mbit']:.0f}"),
            ("rounds a minute, calm", f"{of['rounds_per_minute_calm']:.1f}"),
            ("rounds a minute, under faults", f"{of['rounds_per_minute_under_faults']:.1f}"),
            ("of the calm speed", f"{100 * of['share_of_calm']:.0f} %"),
            ("replicas with the same parameters at the end", f"{alike} of {of['peers']}"),
            ("sequences computed, lost in crashes", f"{computed:,}, {lost:,}"),
            ("errors logged", str(of["errors_logged"])),
            ("processes left behind", str(of["orphans"])),
            (
                "growth of memory, process and daemon",
                " and ".join(f"{100 * of['memory'][key]:.1f} %" for key in ("process_growth", "daemon_growth")),
            ),
        ],
    )


REACH = {
    "calm": "three that everybody can dial",
    "one_behind_nat": "one of three behind NAT",
    "two_behind_nat": "two of three behind NAT",
    "all_behind_nat": "two behind NAT, and `p2ptrain meet`",
    "address_changes": "one of three changes its address twice",
    "ipv6_alone": "three with IPv6 alone",
    "loss": "one of three loses a fifth of what comes, for a minute",
}


def reach() -> str:
    """Peers that are hard to reach."""
    results = load("reach")
    rows: Rows = []
    for name, what in REACH.items():
        if name not in results:
            continue
        of = results[name]
        joined = sum(one["trains"] for one in of["joined"])
        relayed = of.get("relayed_bytes_per_round")
        rows.append(
            (
                what,
                f"{of['members']}, {of['members_that_nobody_can_dial']}",
                f"{100 * min(of['share_that_counts'].values()):.0f} %",
                str(of["rounds"]),
                f"{joined} of {len(of['joined'])}",
                f"{relayed / 1000:.1f} kB" if relayed else "",
            )
        )
    head = (
        "Swarm",
        "members, not dialable",
        "counts, at least",
        "of rounds",
        "lines that led in",
        "relayed a round",
    )
    return table(head, rows)


def limits() -> str:
    """What limits of the line held to, for an hour each."""
    results = load("limits")
    rows: Rows = []
    for name, what in (
        ("upload", "`--upload-limit 1Mbit`"),
        ("month", "`--monthly-transfer` and `--upload-limit 1Mbit`"),
    ):
        of = results[name]
        rows.append(
            (
                what,
                f"{of['minutes']:.0f}",
                f"{100 * of['most_in_10_s_of_limit']:.1f} %",
                f"{100 * of['carried_of_month_so_far']:.0f} %" if "carried_of_month_so_far" in of else "",
                f"{of['rounds_per_minute']:.1f}",
                f"{100 * of['share_of_its_rounds_that_count']:.1f} %",
                str(of["newcomers"]),
            )
        )
    head = (
        "Limits",
        "minutes",
        "most in 10 s, of the limit",
        "of the month so far",
        "rounds a minute",
        "counts",
        "newcomers",
    )
    return table(head, rows)


def volunteer() -> str:
    """Volunteers whose machines are wanted again and again."""
    of = load("volunteer")

    def spread(key: str, number: Callable[[float], str]) -> str:
        return f"{number(of[key]['median'])} ({number(of[key]['least'])} to {number(of[key]['most'])})"

    def seconds(value: float) -> str:
        return f"{value:.1f} s"

    rows: Rows = [
        ("pauses", str(of["pauses"])),
        ("from the machine's being wanted until the memory is free", spread("given_back_after_seconds", seconds)),
        ("until others see the pause", spread("seen_from_outside_after_seconds", seconds)),
        ("memory that was free after it", spread("freed_bytes", mega)),
        ("from the machine's being idle until it trains on", spread("resumed_after_seconds", seconds)),
        ("snapshots fetched to go on", str(of["snapshots_fetched"])),
        ("contributions given up", str(len(of["contributions_given_up"]))),
        ("different states on the four disks in the end", str(of["replicas_at_that_round"])),
        (
            "rounds a minute of the swarm: in calm, with the pauses",
            f"{of['rounds_a_minute_in_calm']:.1f}, {of['rounds_a_minute_with_pauses']:.1f}",
        ),
    ]
    return table(("A volunteer among four peers", "median (least to most)"), rows)


def soak_home() -> str:
    """Peers at home, and all that befalls them."""
    results = load("soak_home")
    rows: Rows = [
        (
            name,
            str(of["count"]),
            str(of["recovered"]),
            *(f"{of[key]:.1f} s" if of[key] is not None else "" for key in ("median_seconds", "worst_seconds")),
        )
        for name, of in results["faults"].items()
    ]
    return table(("What befell a peer", "count", "recovered", "median", "worst"), rows)


def soak_simulation() -> str:
    """Simulated histories, and what they covered."""
    of = load("soak_simulation")
    covered = of["coverage"]
    names = {
        "sealed": "seals",
        "takeovers": "takeovers",
        "skips": "skipped parts",
        "rounds_of_skips_only": "rounds of skips only",
        "even_splits": "even splits",
        "merges_of_solos": "merges of two solos",
        "forks_older_than_the_journal": "forks older than the journal",
        "restores_from_snapshot": "restores from a snapshot",
    }
    rows: Rows = [
        ("histories", f"{of['seeds']:,}"),
        ("violations", str(len(of["violations"]))),
        ("rounds", f"{of['rounds']:,}"),
        ("slowest convergence, virtual time", f"{of['slowest_convergence_seconds']:.0f} s"),
        *((name, f"{covered[key]:,}") for key, name in names.items()),
        ("solo seals", f"{covered['solo_by_member'] + covered['solo_by_learner']:,}"),
        ("rollbacks", f"{covered['rollbacks_of_depth_one'] + covered['deep_rollbacks']:,}"),
    ]
    return table(("Simulated histories", ""), rows)


# ---- attacks -------------------------------------------------------------------------------------------------------


def attacks() -> str:
    """What became of honest peers under attack."""
    rows: Rows = []
    for of in load("attacks")["rows"]:
        harm = [name for key, name in ATTACK_HARM.items() if of[key]]
        if of.get("newcomer", "none") != "none" and of["newcomer_seconds"] is None:
            harm.append("a newcomer stayed away")
        if of.get("newcomer_left_again"):
            harm.append("a newcomer left again")
        if of["did"].get("let_in"):
            harm.append("an outsider was let in")
        ratio = of["rounds_per_minute_ratio"]
        rows.append(
            (
                f"`{of['attack']}`",
                "yes" if not harm and ratio >= ATTACK_RATIO and of["rss_growth"] < ATTACK_GROWTH else "**no**",
                ", ".join(harm) or "none",
                f"{of['rounds_per_minute_calm']:.0f}",
                f"{of['rounds_per_minute_attack']:.0f}",
                f"{of['rounds_per_minute_after']:.0f}",
                f"{100 * of['rss_growth']:+.0f} %",
            )
        )
    return table(("Attack", "holds", "harm", "rounds a minute in calm", "under attack", "after it", "memory"), rows)


def simulated_attacks() -> str:
    """What became of simulated swarms under attack, over many seeds of each."""

    def least_and_median(figure: dict[str, Any] | None) -> str:
        return f"{figure['least']:.2f}, {figure['median']:.2f}" if figure and figure["seeds"] else ""

    rows: Rows = []
    for of in load("soak_adversaries"):
        pace = of.get("pace")
        late = of.get("noticed_after_rounds") or of.get("expelled_after_rounds")
        rows.append(
            (
                f"`{of['attack']}`",
                f"{of['seeds']}",
                f"{len(of['violations'])}",
                least_and_median(pace),
                f"{pace['under_0_8']} of {pace['seeds']}" if pace else "",
                least_and_median(of.get("least_included") or of.get("least_reduced_by_an_honest_member")),
                f"{late['median']}, {late['greatest']}; {late.get('never', 0)} never" if late else "",
            )
        )
    head = ("Attack", "seeds", "violations", "pace: least, median", "pace under 0.8")
    return table((*head, "honest member's share: least, median", "noticed after rounds: median, most"), rows)


def long_text() -> str:
    """What a long text costs, beside a short one."""
    short, long = load("text")["rows"]
    rows: Rows = []
    for name in ("init", "bootstrap", "join"):
        seconds = [of[name].get("seconds_to_begin") or of[name]["seconds"] for of in (short, long)]
        memory = [of[name]["peak_megabytes"] for of in (short, long)]
        rows.append((f"`{name}`", *(f"{one:.0f} s" for one in seconds), *(f"{one} MB" for one in memory)))
    of_short, of_long = (f"{of['text_megabytes']:,.0f} MB" for of in (short, long))
    return table(("", f"{of_short} of text", of_long, f"peak memory, {of_short}", of_long), rows)


POISON = {
    "calm": "none: 16 honest members",
    "fewer": "none: the 12 honest members alone",
    "flip": "`flip`: what training gives, its sign flipped",
    "noise": "`noise`: random coefficients",
    "common": "`common`: one random direction, the same of all liars in all rounds",
    "other_task": "`other_task`: what training gives on another text",
    "against": "`against`: the honest members' sum, its sign flipped",
    "little": "`little`: honest coefficients' mean less 1.5 deviations",
    "concentrated": "`concentrated`: `flip`, nearly all of it on the same one in 32 chunks",
}
POISON_METHODS = {
    ("bounded", 3.0): "`bounded`",
    ("mean", 3.0): "`mean`",
    ("mean", 1.0): "`mean`, `clip_ratio = 1`",
    ("centered_clip", 3.0): "`centered_clip`",
    ("trimmed", 3.0): "`trimmed`",
}


def poison(tokens: int = 1_000_000) -> str:
    """Held-out bits per byte under poison, by how reducers sum; a cell is the mean of its seeds."""
    cells: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in load("poison"):
        if row["tokens"] == tokens:
            case = row["attack"], row["unequal"], row["claim"]
            cells.setdefault((*case, row["robust"], row["clip_ratio"]), []).append(row)

    def cell(*case: object) -> str:
        if not (of := cells.get(case, [])):
            return ""
        if any(row["heldout_bits_per_byte"] is None for row in of):
            return "diverged"
        bits, more = (statistics.mean(row[key] for row in of) for key in ("heldout_bits_per_byte", "against_calm"))
        return f"{bits:.2f} ({100 * more:+.1f} %)"

    found: Rows = []
    for attack, text in POISON.items():
        for unequal, claim in sorted({case[1:3] for case in cells if case[0] == attack}):
            said = text + ", of unequal speed" * unequal + f"; they claim {claim} times their weight" * (claim > 1)
            found.append((said, *(cell(attack, unequal, claim, *method) for method in POISON_METHODS)))
    return table(("What four of sixteen members send", *POISON_METHODS.values()), found)


def poison_briefly() -> str:
    """The same after a fifth of the tokens."""
    return poison(200_000)


TABLES: dict[str, Callable[[], str]] = {
    make.__name__: make
    for make in (
        demo_loss,
        demo_bytes,
        exchange,
        exchange_in_short,
        flatness,
        standing,
        watching,
        stages,
        scale,
        time_to_loss,
        steps_to_loss,
        overlap,
        step_on_a_cpu,
        bits_a_coefficient,
        step_on_a_gpu,
        learning,
        learning_large,
        learning_rates,
        learning_rates_large,
        members,
        inner_steps,
        own_text,
        other_text,
        soak_swarm,
        soak_swarm_speed,
        soak_home,
        reach,
        limits,
        volunteer,
        soak_simulation,
        attacks,
        simulated_attacks,
        long_text,
        poison,
        poison_briefly,
    )
}


def filled(text: str, where: str) -> str:
    """Return a document with its tables made anew.

    Raises:
        SystemExit: it names a table that is not there.
    """

    def fill(match: re.Match[str]) -> str:
        if match[1] not in TABLES:
            raise SystemExit(f"{where} asks for the table {match[1]}; there are {', '.join(sorted(TABLES))}")
        return f"<!-- table: {match[1]} -->\n\n{TABLES[match[1]]()}\n\n<!-- end -->"

    markers = len(re.findall(r"^<!-- table:", text, re.M))
    if markers != len(MARKED.findall(text)):
        raise SystemExit(f"{where} has {markers} markers of tables, of which some are misspelt or have no end")
    return MARKED.sub(fill, text)


def main() -> None:
    """Write or check all documents."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a table is out of date")
    check = parser.parse_args().check
    stale = False
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        name = str(path.relative_to(ROOT))
        text = path.read_text()
        made = filled(text, name)
        if made == text:
            continue
        stale = True
        if check:
            sys.stdout.writelines(difflib.unified_diff(text.splitlines(True), made.splitlines(True), name, name))
        else:
            path.write_text(made)
            print(f"wrote the tables of {name}")
    if check and stale:
        sys.exit(1)


if __name__ == "__main__":
    main()
