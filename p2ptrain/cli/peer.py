"""What `bootstrap` and `join` share: the flags of a peer, and one peer's life."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from p2ptrain.cli.output import log_kept, outlive_readers, set_up_logging
from p2ptrain.config.amounts import parse_amount
from p2ptrain.config.node import NodeSettings, resolve_settings
from p2ptrain.errors import UsageError

if TYPE_CHECKING:
    from p2ptrain.config.manifest import Manifest
    from p2ptrain.data.preparing import Given
    from p2ptrain.peer.assembly import Make, Run
    from p2ptrain.peer.session import PeerSession
    from p2ptrain.training.ranks import Ranks


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Until training has handlers of its own: end, and clean up on the way."""
    raise KeyboardInterrupt


def _give_way(settings: NodeSettings) -> None:
    """Hold this process, and those it starts, to what its owner leaves it. Raises UsageError."""
    from p2ptrain.training.machine import limit_memory

    if settings.nice:
        # Before there are other threads, which would keep theirs.
        os.setpriority(os.PRIO_PROCESS, 0, max(settings.nice, os.getpriority(os.PRIO_PROCESS, 0)))
    if memory_bytes := parse_amount(settings.max_memory):
        try:
            limit_memory(memory_bytes)
        except (OSError, ValueError) as error:
            raise UsageError(
                f"{settings.origins['max_memory']} = {settings.max_memory}: this system allows less, or sets no limit",
                hint="ulimit -d shows what it allows, in kB",
            ) from error


def _ranks(settings: NodeSettings) -> Ranks | None:
    """Return the processes that this peer is, where `torchrun` has started several; None: it is one.

    Raises:
        RankGoneError: one of them has ended already.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    from p2ptrain.training.ranks import Ranks

    return Ranks.of_environment(settings.device)


def _check_fits(manifest: Manifest, settings: NodeSettings, force: bool) -> list[str]:
    """Return what a peer of the run needs, for people.

    Raises:
        TooLargeError: this machine has not got it, and nobody insists.
    """
    from p2ptrain.training.machine import free_disk_bytes, this_machine
    from p2ptrain.training.needs import needs_of

    machine = this_machine()
    needs = needs_of(manifest, machine=machine)
    if not force:
        most = parse_amount(settings.max_disk)
        needs.check(machine, settings.home, force="--force to go on", most_disk_bytes=most)
    return list(needs.lines(machine, free_disk_bytes(settings.home)))


def run_peer(
    flags: dict[str, Any],
    *,
    home: Path | None,
    rounds: int | None,
    verbose: int,
    quiet: bool,
    addresses: list[str],
    find_run: Callable[[PeerSession], Run],
    manifest: Manifest | None = None,
    force: bool = False,
    given: Given | None = None,
    share: float | None = None,
    model: Path | None = None,
    make: Make | None = None,
    wait_seconds: float = 0.0,
) -> None:
    """Connect, find the run, fetch what is missing, train, leave.

    Args:
        flags: of the node's settings, by name.
        addresses: to meet at.
        manifest: of the run, where it is known before anybody is asked.
        force: go on where this machine has not got what a peer needs.
        given: the run's text, or this peer's own.
        share: of the run's text that this peer is to hold; None: all.
        model: a copy of the weights that the run starts from.
        make: what trains, and what is trained, where that is not what the manifest says.
        wait_seconds: for the peers at `addresses`, where they are not there yet.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        # Also where a shell started us with SIGINT ignored, as background jobs are; but nohup is to be heeded.
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _interrupt)
    outlive_readers()
    settings = resolve_settings(home, flags)
    set_up_logging(verbose, quiet, settings.log_format)
    _give_way(settings)
    ranks = _ranks(settings)
    if ranks is not None and ranks.rank:
        ranks.follow(settings.threads)
        return
    if manifest is not None:
        # Before anything slow is imported, or made in the home.
        _check_fits(manifest, settings, force)
    if addresses:
        # Before anything slow is imported: a mistyped address is answered at once.
        from p2ptrain.swarm.addresses import parse_addresses

        parse_addresses(addresses)
    from p2ptrain.peer.diagnosis import of_machine, stop_where_unfit, warn
    from p2ptrain.peer.joining import describe
    from p2ptrain.peer.progress import Display
    from p2ptrain.peer.session import PeerSession

    if settings.volunteer.enabled:
        # What it needs is missed before anything is fetched.
        from p2ptrain.peer.machine_use import looker

        looker(settings.volunteer.not_while)
    display = Display(log_format=settings.log_format, quiet=quiet)
    with PeerSession(settings, display, rounds, make, wait_seconds, ranks) as session, log_kept(session.home.log):
        # What would fail later, and may after a long download, is said now.
        stop_where_unfit(of_machine(settings, None))
        session.connect(addresses)
        run = find_run(session)
        needs = _check_fits(run.manifest, settings, force)
        session.enter_run(run)
        # What fails was refused just now, unless this peer's owner insists.
        warn([finding for finding in of_machine(settings, run.manifest) if finding.verdict == "warn"])
        display.say(describe(run.manifest, run.run_id))
        for line in needs:
            display.say(f"needs about {line}")
        text = session.obtain_text(run, given, share)
        session.train(run, text, session.obtain_values(run, model))
