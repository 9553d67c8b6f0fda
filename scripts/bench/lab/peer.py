"""Run a real peer whose trainer or model is a benchmark's own."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from p2ptrain.cli.peer import run_peer
from p2ptrain.config.loading import load_manifest
from p2ptrain.peer.assembly import Make


def run_with(make: Make, command: Sequence[str]) -> None:
    """Run `bootstrap RUN.TOML` or `join ADDR` with the flags that benchmarks use, until the peer is told to stop."""
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers(dest="command", required=True)
    bootstrap, join = commands.add_parser("bootstrap"), commands.add_parser("join")
    bootstrap.add_argument("manifest", type=Path)
    join.add_argument("address")
    for each in (bootstrap, join):
        each.add_argument("--home", type=Path, required=True)
        each.add_argument("--host", required=True)
        each.add_argument("--threads", type=int, required=True)
        each.add_argument("-v", dest="verbose", action="count", default=0)
    options = parser.parse_args(command)
    manifest = load_manifest(options.manifest) if options.command == "bootstrap" else None
    addresses = [] if options.command == "bootstrap" else [options.address]
    run_peer(
        {"host": options.host, "threads": options.threads},
        home=options.home,
        rounds=None,
        verbose=options.verbose,
        quiet=False,
        addresses=addresses,
        find_run=lambda peer: peer.found_run(manifest) if manifest else peer.find_run(addresses, None),
        make=make,
    )
