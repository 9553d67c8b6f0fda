"""What a long text costs: seconds and peak memory of `init`, `bootstrap` and `join`, beside those of a short one.

    python scripts/bench/text.py --megabytes 1000 --out docs/results/text.json

The text is .jsonl.zst: pieces of the embedded corpus, their sentences in another order each time. Peers run on this
machine, over loopback, until the joiner has had a part in `--rounds` rounds. Peak memory is what the kernel says of the
process (maximum resident set size), which counts pages of mapped tokens that it may take back at any time.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import zstandard
from lab.report import Figures, machine, note, write

from p2ptrain.data.corpus import load_embedded

P2PTRAIN = (sys.executable, "-m", "p2ptrain")
SHORT_MEGABYTES = 1
DOCUMENT_CHARACTERS = 4000
DOCUMENTS_A_GROUP = 2000
LIMIT_SECONDS = 3600.0


def documents(megabytes: float) -> Iterator[str]:
    """Yield documents of some thousand characters, none like another, so many bytes of them."""
    chance, left = random.Random(1), int(megabytes * 1e6)
    whole = load_embedded().train.decode()
    while left > 0:
        start = chance.randrange(len(whole) - DOCUMENT_CHARACTERS)
        sentences = whole[start : start + DOCUMENT_CHARACTERS].split(". ")
        chance.shuffle(sentences)
        text = ". ".join(sentences)
        left -= len(text.encode())
        yield text


def write_text(path: Path, megabytes: float) -> None:
    """Write them as JSON lines, compressed, or where the name ends so as parquet."""
    if path.suffix == ".parquet":
        import pyarrow
        from pyarrow import parquet

        schema = pyarrow.schema([("text", pyarrow.string())])
        with parquet.ParquetWriter(path, schema, compression="zstd") as table:
            left = documents(megabytes)
            while group := list(itertools.islice(left, DOCUMENTS_A_GROUP)):
                table.write_batch(pyarrow.record_batch([group], schema=schema))
        return
    with zstandard.open(path, "wb", cctx=zstandard.ZstdCompressor(level=3)) as file:
        for text in documents(megabytes):
            file.write(json.dumps({"text": text}).encode() + b"\n")


class Measured:
    """A command of this program, with its log, and what it took in the end."""

    def __init__(self, log: Path, *arguments: str) -> None:
        self._began, self._log = time.monotonic(), log
        with log.open("w") as errors:
            self._process = subprocess.Popen([*P2PTRAIN, *arguments], stdout=subprocess.PIPE, stderr=errors, text=True)

    def address(self) -> tuple[str, float]:
        """Wait for its join line; returns the address in it, and the seconds until then."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if found := re.search(r"p2ptrain join (/\S+)", line):
                return found[1], time.monotonic() - self._began
        raise SystemExit(f"no join line:\n{self._log.read_text()[-3000:]}")

    def ended(self) -> Figures:
        """Wait for its end; returns seconds and peak memory."""
        _, status, usage = os.wait4(self._process.pid, 0)
        self._process.returncode = os.waitstatus_to_exitcode(status)
        if self._process.returncode:
            raise SystemExit(f"ended with {self._process.returncode}:\n{self._log.read_text()[-3000:]}")
        return {"seconds": round(time.monotonic() - self._began, 1), "peak_megabytes": round(usage.ru_maxrss / 1024)}

    def stop(self) -> None:
        """End it as Ctrl-C would."""
        self._process.terminate()


def measure(megabytes: float, folder: Path, rounds: int, tokenizer: str) -> Figures:
    """Make the text, then `init`, `bootstrap` and `join` on it."""
    folder.mkdir()
    text, run, homes = folder / "text.jsonl.zst", folder / "run.toml", (folder / "ada", folder / "bob")
    note(f"writing {megabytes:,} MB of text")
    write_text(text, megabytes)
    flags = ("--data", str(text), "--license", "CC0-1.0", "--tokenizer", tokenizer, "--home", str(homes[0]))
    init = Measured(folder / "init.log", "init", str(run), *flags).ended()
    note(f"init: {init}")
    peer = ("--host", "127.0.0.1", "--threads", "1")
    first = Measured(folder / "ada.log", "bootstrap", str(run), "--home", str(homes[0]), "--rounds", "100000", *peer)
    address, bootstrap_seconds = first.address()
    second = Measured(folder / "bob.log", "join", address, "--home", str(homes[1]), "--rounds", str(rounds), *peer)
    _, join_seconds = second.address()
    join = {"seconds_to_begin": round(join_seconds, 1), **second.ended()}
    note(f"join: {join}")
    first.stop()
    bootstrap = {"seconds_to_begin": round(bootstrap_seconds, 1), **first.ended()}
    note(f"bootstrap: {bootstrap}")
    return {
        "text_megabytes": megabytes,
        "packed_megabytes": round(text.stat().st_size / 1e6),
        "tokens_megabytes": round(sum(path.stat().st_size for path in homes[1].glob("data/*.tokens")) / 1e6),
        "init": init,
        "bootstrap": bootstrap,
        "join": join,
    }


def main() -> None:
    """Measure a short text and a long one."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--megabytes", type=float, default=1000)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--tokenizer", default="train:4096")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = [
            measure(megabytes, Path(folder) / str(number), options.rounds, options.tokenizer)
            for number, megabytes in enumerate((SHORT_MEGABYTES, options.megabytes))
        ]
    result = {**machine(), "rows": rows}
    write(options.out, result)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
