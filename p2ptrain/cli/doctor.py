"""`p2ptrain doctor`: find what keeps this machine from training well, and name what mends it."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from p2ptrain.cli.options import (
    AnnounceOption,
    DeviceOption,
    HomeOption,
    HostOption,
    PortOption,
    ThreadsOption,
    VerboseOption,
)
from p2ptrain.cli.output import printable, set_up_logging
from p2ptrain.config.home import Home
from p2ptrain.config.node import resolve_settings
from p2ptrain.errors import NotRunningError, P2PTrainError, UsageError

if TYPE_CHECKING:
    from p2ptrain.peer.diagnosis import Finding

ANSWER_SECONDS = 10.0
FAILS = 1
"""Exit code where something keeps this machine from training."""


def doctor(
    addresses: Annotated[
        list[str] | None,
        typer.Argument(metavar="ADDR...", help="Address of any peer of the swarm; default: those this home has met."),
    ] = None,
    home: HomeOption = None,
    port: PortOption = None,
    host: HostOption = None,
    announce: AnnounceOption = None,
    device: DeviceOption = None,
    threads: ThreadsOption = None,
    format: Annotated[Literal["table", "json"], typer.Option("--format", help="Form of the output.")] = "table",
    verbose: VerboseOption = 0,
) -> int:
    """Look at this machine and, with an address, at its place in the swarm; a line for each thing, and its cure."""
    set_up_logging(verbose, quiet=not verbose)
    from p2ptrain.peer import diagnosis

    flags = {"port": port, "host": host, "announce": announce, "device": device, "threads": threads}
    found: list[Finding] = []

    def tell(findings: Iterable[Finding]) -> None:
        for finding in findings:
            found.append(finding)
            if format == "table":
                print(printable(line_of(finding)), flush=True)

    try:
        settings = resolve_settings(home, flags)
    except P2PTrainError as error:
        tell([diagnosis.failed("settings", error)])
    else:
        tell(_look(diagnosis, settings, addresses or []))
    if format == "json":
        print(json.dumps([finding.as_json() for finding in found], indent=2))
    return FAILS if any(finding.verdict == "fail" for finding in found) else 0


def _look(diagnosis: Any, settings: Any, addresses: list[str]) -> Iterable[Finding]:
    from p2ptrain.config.manifest import open_manifest
    from p2ptrain.peer.control import Ask, ask

    home = Home(settings.home)
    running = None
    with contextlib.suppress(NotRunningError):
        running = ask(home.control, Ask(), ANSWER_SECONDS)
    if running is not None:
        yield diagnosis.Finding("home", "ok", f"{home.path}: a peer runs here, and it is {running['state']}")
    else:
        yield from diagnosis.of_home(settings)
    own = home.manifest.read_bytes() if home.manifest.exists() else None
    manifest = None if own is None else open_manifest(own)[0]
    yield from diagnosis.of_machine(settings, manifest)
    yield from _look_around(diagnosis, settings, addresses, own, running)
    # Last, because they load torch and compute: whoever asks about the network has read that by then.
    from p2ptrain.native import kept

    yield diagnosis.of_loops(kept.folder())
    yield from diagnosis.of_device(settings, manifest)


def _look_around(
    diagnosis: Any, settings: Any, addresses: list[str], own: bytes | None, running: dict[str, Any] | None
) -> Iterable[Finding]:
    """Say what is right and wrong between this machine and the swarm."""
    from p2ptrain.cli.inspect import addresses_of

    port = None
    if running is None:
        port = diagnosis.of_port(settings)
        yield port
    if not addresses:
        try:
            addresses = addresses_of(Home(settings.home))
        except UsageError:
            yield diagnosis.Finding(
                "peers", "warn", "nobody was asked", "p2ptrain doctor ADDR, with any peer's address"
            )
            return
    if port is None or port.verdict != "fail":
        from p2ptrain.swarm.thread import new_network_loop

        with asyncio.Runner(loop_factory=new_network_loop) as runner:
            yield from runner.run(diagnosis.of_swarm(settings, addresses, own, running=running))


def line_of(finding: Finding) -> str:
    """One finding for people, with what mends it below."""
    line = f"{finding.verdict:<5} {finding.name}: {finding.text}"
    return line + (f"\n      try: {finding.cure}" if finding.cure else "")
