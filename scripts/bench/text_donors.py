"""Whether a joiner gets a long text although a peer that hands it out is killed half way, each behind its own line.

    python scripts/bench/text_donors.py --megabytes 20 --joiner-mbit 1 --out docs/results/text_donors.json
    python scripts/bench/text_donors.py --megabytes 1000 --joiner-mbit 100 --out docs/results/text_donors.json

As root, on Linux: peers are processes in network namespaces (lab/lines.py). One bootstraps, a second joins and gets
all of the text; a third joins on its own line, and once half of the text is there the first is killed. The third goes
on until it is some rounds further. Peak memory is what the kernel says of the process (`VmHWM`), which counts pages of
mapped tokens that it may take back at any time. The result has a row for each length and line.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import tempfile
import time
from pathlib import Path

from lab.lines import Lines, prepare
from lab.report import Figures, finish, machine, merged, note, read
from limits import Peer
from text import Measured, write_text

OTHERS_MBIT = 100.0
ROUNDS = 5
LIMIT_SECONDS = 3600.0
_CAME = re.compile(r"fetching text: ([\d,]+) of ([\d,]+) bytes")


def peak_megabytes(peer: Peer) -> int:
    """Return the most memory that a running peer has held."""
    status = Path(f"/proc/{peer.process.pid}/status").read_text()
    found = re.search(r"^VmHWM:\s+(\d+) kB$", status, re.M)
    assert found is not None
    return int(found[1]) // 1024


def wait_for_half(peer: Peer) -> tuple[int, int]:
    """Wait until half of the text is there; returns bytes there, and of how many."""
    until = time.monotonic() + LIMIT_SECONDS
    while time.monotonic() < until and peer.process.poll() is None:
        # The text may be long, and lines of the log are not.
        came = [tuple(int(part.replace(",", "")) for part in found) for found in _CAME.findall(peer.log.read_text())]
        if came and 2 * came[-1][0] >= came[-1][1]:
            return came[-1][0], came[-1][1]
        time.sleep(0.1)
    raise SystemExit(f"half of the text never came:\n{peer.log.read_text()[-3000:]}")


def measure(megabytes: float, form: str, joiner_mbit: float, folder: Path) -> Figures:
    """Make the text, and let a peer join that loses a donor."""
    text, run = folder / f"text.{form}", folder / "run.toml"
    note(f"writing {megabytes:,} MB of text")
    write_text(text, megabytes)
    flags = ("--data", str(text), "--license", "CC0-1.0", "--tokenizer", "train:4096", "--home", str(folder / "0"))
    init = Measured(folder / "init.log", "init", str(run), *flags).ended()
    note(f"init: {init}")
    with contextlib.ExitStack() as undo:
        lines = undo.enter_context(Lines(3, OTHERS_MBIT))
        lines.set_rate(2, joiner_mbit)

        def peer(number: int, *command: str) -> Peer:
            made = Peer(lines, number, folder, *command)
            undo.callback(made.stop)
            return made

        first = peer(0, "bootstrap", str(run))
        second = peer(1, "join", first.address())
        address = second.address()
        note("two peers have the text")
        began = time.monotonic()
        third = peer(2, "join", address)
        there, whole = wait_for_half(third)
        half_seconds = time.monotonic() - began
        first.process.kill()
        note(f"{there:,} of {whole:,} bytes after {half_seconds:.0f} s; the first peer is killed")
        third.address()
        all_seconds = time.monotonic() - began
        came = lines.counted(2).received
        note(f"in the run after {all_seconds:.0f} s")
        third.reaches(third.round + ROUNDS, LIMIT_SECONDS)
        return {
            "text_megabytes": megabytes,
            "form": form,
            "tokens_megabytes": round(whole / 1e6, 1),
            "joiner_mbit": joiner_mbit,
            "init": init,
            "seconds_to_half": round(half_seconds, 1),
            "seconds_to_begin": round(all_seconds, 1),
            "seconds_of_the_line_for_the_text": round(whole * 8 / (joiner_mbit * 1e6), 1),
            "received_megabytes": round(came / 1e6, 1),
            "peak_megabytes": {"second": peak_megabytes(second), "joiner": peak_megabytes(third)},
        }


def main() -> None:
    """Measure one length of text."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--megabytes", type=float, default=20)
    parser.add_argument("--form", choices=("jsonl.zst", "parquet"), default="jsonl.zst")
    parser.add_argument("--joiner-mbit", type=float, default=1.0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    prepare(parser)
    with tempfile.TemporaryDirectory(prefix="p2ptrain-text-") as folder:
        row = measure(options.megabytes, options.form, options.joiner_mbit, Path(folder))
    before = (read(options.out) or {}).get("rows", [])
    finish(options.out, {**machine(), "rows": merged(before, row, ["text_megabytes", "form", "joiner_mbit"])})


if __name__ == "__main__":
    main()
