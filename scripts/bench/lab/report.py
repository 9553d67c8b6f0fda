"""What benchmarks have in common beside what they measure: the machine, results as JSON, progress and pictures."""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from p2ptrain.state.files import atomic_write

Figures = dict[str, Any]


def note(text: str) -> None:
    """Progress, on stderr: stdout is the result's."""
    print(text, file=sys.stderr, flush=True)


def say(**what: object) -> None:
    """One JSON object as a line on stdout, for whoever started this process."""
    print(json.dumps(what), flush=True)


def machine() -> Figures:
    """What timings depend on and a result should name."""
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "cores": os.cpu_count(),
        "processor": _processor(),
        "device": device,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _processor() -> str:
    """Its name, as far as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


class Watch:
    """How busy the machine was when this was made, and the time since."""

    def __init__(self) -> None:
        self._began, self._load = time.monotonic(), os.getloadavg()[0]

    @property
    def seconds(self) -> float:
        """So far."""
        return round(time.monotonic() - self._began, 1)

    def figures(self) -> Figures:
        """Both, for a result."""
        return {"load_before": round(self._load, 2), "took_seconds": self.seconds}


def read(path: Path | None) -> Any:
    """What an earlier call has left at `path`; None where there is nothing."""
    return json.loads(path.read_bytes() or b"null") if path is not None and path.exists() else None


def write(path: Path | None, result: Figures | Sequence[Figures]) -> None:
    """As JSON, in one step, so that a call that is ended leaves what it had; a list of rows has a line for each.

    Args:
        path: None: nothing is written.
    """
    if path is None:
        return
    if isinstance(result, dict):
        text = json.dumps(result, indent=1)
    else:
        text = "[" + ",\n ".join(json.dumps(row) for row in result) + "]"
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, f"{text}\n".encode(), mode=0o644)


def finish(path: Path | None, result: Figures) -> None:
    """Write the result and print it, as the last that a benchmark does."""
    write(path, result)
    print(json.dumps(result, indent=1))


def merged(rows: Iterable[Figures], fresh: Figures, keys: Sequence[str]) -> list[Figures]:
    """`rows` with a fresh one, in place of those that have the same `keys`."""
    return [row for row in rows if any(row[key] != fresh[key] for key in keys)] + [fresh]


def pyplot() -> Any:
    """The module of that name, for pictures without a screen."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as found

    return found


def save(figure: Any, path: Path) -> None:
    """A picture."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, bbox_inches="tight")
