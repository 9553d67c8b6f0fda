"""A node in a process of its own, for tests that kill it, attack it or set its clock wrong.

Prints one JSON line, {"addresses", "peer_id", "daemon_pid"} or {"error", "message"}, then lives until its
standard input closes.
"""

from __future__ import annotations

import argparse
import json
import sys
import time

import hivemind.dht.protocol as dht_protocol

from p2ptrain.errors import P2PTrainError
from p2ptrain.swarm.identity import format_peer_id
from p2ptrain.swarm.node import SwarmNode
from p2ptrain.swarm.thread import NetworkThread


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--clock-ahead-seconds", type=float, default=0.0)
    parser.add_argument("addresses", nargs="*")
    options = parser.parse_args()
    if options.clock_ahead_seconds:
        dht_protocol.get_dht_time = lambda: time.time() + options.clock_ahead_seconds

    network = NetworkThread()
    try:
        node = network.run(SwarmNode.create(None, options.addresses))
    except P2PTrainError as error:
        print(json.dumps({"error": type(error).__name__, "message": str(error)}), flush=True)
    else:
        report = {
            "addresses": network.run(node.join_addresses()),
            "peer_id": format_peer_id(node.peer_id),
            "daemon_pid": node.daemon_pid,
        }
        print(json.dumps(report), flush=True)
        sys.stdin.read()
        network.run(node.close())
    network.stop()


if __name__ == "__main__":
    main()
