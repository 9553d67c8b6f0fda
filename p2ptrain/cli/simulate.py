"""`p2ptrain simulate`: a whole swarm in this process, on a virtual clock, with every fault there is.

What it prints on stdout follows from manifest, flags and seed alone: the same command prints the same bytes.
"""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from p2ptrain.cli.options import QuietOption, VerboseOption
from p2ptrain.cli.output import set_up_logging
from p2ptrain.config.loading import load_manifest
from p2ptrain.errors import UsageError

VIOLATION_EXIT_CODE = 13
_RATE = re.compile(r"(\d+(?:\.\d+)?)(k|M|G)bit")
_DELAY = re.compile(r"(\d+(?:\.\d+)?)(ms|s)")


def simulate(
    manifest: Annotated[Path, typer.Argument(metavar="RUN.TOML", help="The run whose rounds to simulate.")],
    peers: Annotated[int, typer.Option("--peers", min=1, max=1024, help="Peers.")] = 5,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Decides all that chance decides.")] = 0,
    rounds: Annotated[
        int, typer.Option("--rounds", min=1, help="Rounds of the swarm under faults; calm ones come after them.")
    ] = 40,
    faults: Annotated[
        str, typer.Option("--faults", metavar="none|all|NAME,...", help="What befalls peers, links and streams.")
    ] = "all",
    adversaries: Annotated[
        str, typer.Option("--adversaries", metavar="none|all|NAME,...", help="Who wants the swarm on another chain.")
    ] = "none",
    uplink: Annotated[str, typer.Option("--uplink", metavar="RATE", help="Each peer's line, both ways.")] = "10Mbit",
    delay: Annotated[str, typer.Option("--delay", metavar="TIME", help="From one peer to another.")] = "40ms",
    format: Annotated[Literal["text", "json"], typer.Option("--format", help="Form of the output.")] = "text",
    verbose: VerboseOption = 0,
    quiet: QuietOption = False,
) -> None:
    """Simulate a swarm under faults, and check that nothing is lost and no replica diverges."""
    set_up_logging(verbose, quiet)
    from p2ptrain.simulation.adversaries import ADVERSARIES, OUTSIDERS
    from p2ptrain.simulation.faults import CORRUPT, FAULTS, GUESTS
    from p2ptrain.simulation.world import Scenario
    from p2ptrain.simulation.world import simulate as play

    wanted = _wanted("faults", faults, FAULTS, (*FAULTS, CORRUPT, GUESTS))
    hostile = _wanted("adversaries", adversaries, OUTSIDERS, ADVERSARIES)
    scenario = Scenario(
        manifest=load_manifest(manifest),
        seed=seed,
        peers=peers,
        rounds=rounds,
        faults=wanted,
        adversaries=hostile,
        chunks=max(12, 2 * peers),
        uplink_bytes_per_second=_bits_per_second(uplink) / 8,
        delay_seconds=_seconds(delay),
    )
    report = play(scenario)
    shown: dict[str, Any] = {
        "seed": seed,
        "peers": peers,
        "faults": list(wanted),
        "adversaries": list(hostile),
        "rounds": report.rounds,
        "state_id": report.state_id,
        "virtual_seconds": report.virtual_seconds,
        "convergence_seconds": report.convergence_seconds,
        "bytes_sent_per_peer_per_round": report.bytes_per_peer_per_round,
        "messages_sent_per_peer_per_round": report.messages_per_peer_per_round,
        "coverage": dict(sorted(report.coverage.items())),
        "violations": report.violations,
        "history_sha256": report.digest,
    }
    if format == "json":
        print(json.dumps(shown, indent=2))
    else:
        for name, value in shown.items():
            print(f"{name:34} {value}")
    if report.violations:
        sys.stdout.flush()
        for violation in report.violations:
            print(f"violated {violation}", file=sys.stderr)
        flags = ["--peers", str(peers), "--seed", str(seed), "--rounds", str(rounds), "--faults", faults]
        flags += ["--adversaries", adversaries]
        again = ["p2ptrain", "simulate", str(manifest), *flags, "--uplink", uplink, "--delay", delay]
        print(shlex.join(again), file=sys.stderr)
        raise typer.Exit(VIOLATION_EXIT_CODE)


def _wanted(flag: str, asked: str, all_of_them: tuple[str, ...], known: tuple[str, ...]) -> tuple[str, ...]:
    if asked in ("all", "none"):
        return all_of_them if asked == "all" else ()
    wanted = tuple(name.strip() for name in asked.split(","))
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise UsageError(f"--{flag}: {unknown[0]!r} is none", hint=f"--{flag} none, all, or of: {','.join(known)}")
    return wanted


def _bits_per_second(text: str) -> float:
    found = _RATE.fullmatch(text)
    if not found or not float(found[1]):
        raise UsageError(f"--uplink {text} is not a rate", hint="--uplink 10Mbit")
    return float(found[1]) * {"k": 1e3, "M": 1e6, "G": 1e9}[found[2]]


def _seconds(text: str) -> float:
    found = _DELAY.fullmatch(text)
    if not found:
        raise UsageError(f"--delay {text} is not a time", hint="--delay 40ms")
    return float(found[1]) * {"ms": 1e-3, "s": 1.0}[found[2]]
