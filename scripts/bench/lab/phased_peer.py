"""One peer, as the command line starts it, that notes what each of its phases takes in memory and time.

    python phased_peer.py PHASES.jsonl bootstrap RUN.TOML --home DIR ...

Without a command it imports what a peer does, and ends.
A line of JSON a phase: its name, seconds, when it ended, and resident memory: the most while it lasted and what there
was at its end. The kernel keeps the most that a process ever held; it forgets that at each beginning and end of a
phase, so nothing that is short is missed, and phases of several threads may overlap. Nothing of the peer is replaced
but names, by functions that call what had the name.
"""

from __future__ import annotations

import argparse
import functools
import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
FORGET_PEAK = "5"


def resident() -> dict[str, int]:
    """Bytes: the most since it was forgotten, now, and of these what is no page of a file."""
    fields = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
    names = {"peak_bytes": "VmHWM", "resident_bytes": "VmRSS", "anonymous_bytes": "RssAnon"}
    return {ours: 1024 * int(fields[theirs].split()[0]) for ours, theirs in names.items()}


class Phases:
    """Notes phases as they end; for any thread."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a")
        self._lock = threading.Lock()
        #: phases under way -> the most memory since their beginning
        self._peaks: dict[object, int] = {}

    def begin(self) -> tuple[object, float]:
        """Begin a phase; returns what `end` wants."""
        with self._lock:
            self._look()
            key = object()
            self._peaks[key] = resident()["resident_bytes"]
        return key, time.monotonic()

    def end(self, name: str, begun: tuple[object, float]) -> None:
        """End a phase and note it."""
        with self._lock:
            found = self._look()
            row = {"phase": name, "seconds": round(time.monotonic() - begun[1], 4), "at": time.time()}
            self._file.write(json.dumps(row | found | {"peak_bytes": self._peaks.pop(begun[0])}) + "\n")
            self._file.flush()

    def _look(self) -> dict[str, int]:
        found = resident()
        CLEAR.write_text(FORGET_PEAK)
        self._peaks = {key: max(peak, found["peak_bytes"]) for key, peak in self._peaks.items()}
        return found

    def wrap(self, owner: Any, attribute: str, name: str) -> None:
        """Have each call of a method be a phase."""
        inner: Callable[..., Any] = getattr(owner, attribute)

        @functools.wraps(inner)
        def phased(*args: Any, **options: Any) -> Any:
            begun = self.begin()
            try:
                return inner(*args, **options)
            finally:
                self.end(name, begun)

        setattr(owner, attribute, phased)


def main() -> None:
    """Import all, note what that takes, and be a peer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("phases", type=Path, help="a line of JSON for each that has ended is added to it")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="bootstrap or join, with its flags")
    options = parser.parse_args()
    phases = Phases(options.phases)
    start = phases.begin()
    imports = phases.begin()
    from p2ptrain.cli.main import run
    from p2ptrain.peer.session import PeerSession
    from p2ptrain.training.standing import Books
    from p2ptrain.training.trainer import Participant, Trainer

    phases.end("import", imports)
    if not options.command:
        return
    phases.wrap(Books, "restore", "restore")
    phases.wrap(Books, "save", "checkpoint")
    phases.wrap(Books, "save_snapshot", "snapshot")
    phases.wrap(Books, "apply", "apply")
    phases.wrap(Trainer, "compute", "compute")
    phases.wrap(Participant, "_contribute", "contribute")
    phases.wrap(Participant, "_on_restore", "take the swarm's state")
    joined = PeerSession._print_join_line
    round_begun = [start]

    @functools.wraps(joined)
    def started(*args: Any) -> None:
        phases.end("start", start)
        round_begun[0] = phases.begin()
        joined(*args)

    PeerSession._print_join_line = started  # type: ignore[method-assign, assignment]
    applied = Participant._on_apply

    @functools.wraps(applied)
    def round_applied(*args: Any) -> None:
        applied(*args)
        phases.end("round", round_begun[0])
        round_begun[0] = phases.begin()

    Participant._on_apply = round_applied  # type: ignore[method-assign, assignment]
    run(options.command)


if __name__ == "__main__":
    main()
