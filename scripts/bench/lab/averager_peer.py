"""One peer of hivemind's averager, whose all-reduce waits for a word: for bench/round.py.

    python scripts/bench/lab/averager_peer.py --host IP --peers 4 --parameters 10000000 [--join ADDRESS]

A `DecentralizedAverager` with Float16Compression over one tensor of noise, its DHT in a process of its own, as hivemind
has it. On stdin: `group` has it look for a group, with all-reduce to be triggered; `go SECONDS` triggers it at that
moment of time.monotonic. On stdout, a JSON object a line: the address to join at; the seconds that matchmaking took and
how many it found; when all-reduce was over, what the line carried and what it took of the processor.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import hivemind
import psutil
import torch
from hivemind.averaging.control import AveragingStage
from hivemind.compression import Float16Compression
from lab.lines import counted_here
from lab.report import say

MATCHMAKING_SECONDS = 3.0
REQUEST_SECONDS = 2.0
"""Of a follower to a leader; hivemind wants it below the matchmaking time."""
TIMEOUT_SECONDS = 300.0
POLL_SECONDS = 0.005


def core_seconds() -> float:
    """Of this process, its DHT, its averager and its libp2p daemon."""
    here = psutil.Process()
    return sum(sum(one.cpu_times()[:2]) for one in (here, *here.children(recursive=True)))


def main() -> None:
    """Until stdin closes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--host", required=True, help="address to listen on")
    parser.add_argument("--peers", type=int, required=True)
    parser.add_argument("--parameters", type=int, required=True)
    parser.add_argument("--join", action="append", default=[], help="address of a peer's DHT")
    options = parser.parse_args()
    torch.set_num_threads(1)
    dht = hivemind.DHT(
        initial_peers=options.join,
        host_maddrs=[f"/ip4/{options.host}/tcp/0"],
        use_relay=False,
        use_auto_relay=False,
        nat_port_map=False,
        auto_nat=False,
        start=True,
    )
    averager = hivemind.DecentralizedAverager(
        [torch.randn(options.parameters)],
        dht,
        prefix="bench",
        target_group_size=options.peers,
        min_group_size=options.peers,
        min_matchmaking_time=MATCHMAKING_SECONDS,
        request_timeout=REQUEST_SECONDS,
        averaging_alpha=1.0,
        compression=Float16Compression(),
        start=True,
    )
    say(join=[str(address) for address in dht.get_visible_maddrs()])
    control: Any = None
    for line in sys.stdin:
        word, *rest = line.split()
        match word:
            case "group":
                began = time.monotonic()
                control = averager.step(wait=False, require_trigger=True, timeout=TIMEOUT_SECONDS)
                while control.stage != AveragingStage.AWAITING_TRIGGER:
                    if control.done():
                        control.result()
                    time.sleep(POLL_SECONDS)
                say(grouped_seconds=time.monotonic() - began)
            case "go":
                time.sleep(max(0.0, float(rest[0]) - time.monotonic()))
                line_before, cores_before = counted_here(), core_seconds()
                control.allow_allreduce()
                group = control.result(TIMEOUT_SECONDS)
                held = time.monotonic()
                say(
                    held=held,
                    members=len(group),
                    line=[after - before for after, before in zip(counted_here(), line_before, strict=True)],
                    core_seconds=core_seconds() - cores_before,
                )
            case _:
                break
    sys.stdout.flush()
    # Its processes end with this group of processes, which whoever started this kills; waiting for them takes long.
    os._exit(0)


if __name__ == "__main__":
    main()
