"""A model and a loop of one's own: the example of the docs, with real processes, and joiners with other values."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

sys.path.insert(0, str(Path(__file__).parent))

from peers import eventually, run

EXAMPLE = Path(__file__).parents[2] / "docs/examples/pictures.py"
LAST_ROUND = 120
MANIFEST = f"""\
name = "pictures"
nonce = "0123456789abcdef0123456789abcdef"
last_round = {LAST_ROUND}

[optimizer]
warmup_rounds = 4
total_rounds = 100

[round]
target_batch = 512
min_seconds = 0.4
max_seconds = 1.0
round_max_seconds = 4.0
grace_seconds = 1.0
reply_timeout_seconds = 2.0
seal_timeout_seconds = 1.0
alone_after_seconds = 4.0
root_interval = 8
"""


class Example:
    """A process that runs the example."""

    def __init__(self, folder: Path, home: str, seed: int, *command: str) -> None:
        self.home, self.log = folder / home, folder / f"{home}.log"
        flags = ["--home", str(self.home), "--host", "127.0.0.1", "--seed", str(seed)]
        with self.log.open("w") as log:
            self.process = subprocess.Popen([sys.executable, str(EXAMPLE), *command, *flags], stdout=log, stderr=log)

    def said(self, pattern: str, seconds: float) -> re.Match[str]:
        """Wait until it has printed this."""

        def there() -> re.Match[str] | None:
            found = re.search(pattern, self.log.read_text())
            assert found or self.process.poll() in (None, 0), self.log.read_text()
            return found

        return eventually(there, seconds, f"{pattern} in {self.log.name}")

    def reaches(self, round: int, seconds: float = 90.0) -> None:
        """Wait until its journal holds this round."""
        journal = self.home / "journal"
        eventually(
            lambda: any(int(path.name.split("-")[1]) >= round for path in journal.glob("round-*")),
            seconds,
            f"round {round}:\n{self.log.read_text()}",
        )


class Examples:
    """The processes of one test."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.started: list[Example] = []
        self.manifest = folder / "run.toml"
        self.manifest.write_text(MANIFEST)

    def start(self, home: str, seed: int, *command: str) -> Example:
        self.started.append(Example(self._folder, home, seed, *command))
        return self.started[-1]


@pytest.fixture
def examples(tmp_path: Path) -> Iterator[Examples]:
    made = Examples(tmp_path)
    yield made
    for example in made.started:
        if example.process.poll() is None:
            for child in psutil.Process(example.process.pid).children(recursive=True):
                child.kill()
            example.process.kill()
        example.process.wait()


def test_peers_with_a_net_of_their_own_end_bit_identical_and_so_does_one_that_joins_late(examples: Examples) -> None:
    ada = examples.start("ada", 0, "bootstrap", str(examples.manifest))
    address = ada.said(r"others join at (\S+)", 90)[1]
    grace = examples.start("grace", 1, "join", address)
    refused = run("join", address, "--home", str(examples.manifest.parent / "plain"), "--host", "127.0.0.1")
    assert refused.returncode == 16 and "p2ptrain.join(ADDR, model=model)" in refused.stderr
    grace.said("others join at", 90)
    ada.reaches(40)
    linus = examples.start("linus", 2, "join", address)
    ends = [
        peer.said(rf"round {LAST_ROUND}, 3 members: (\S+) %[^\n]*\n(state .*)", 120) for peer in (ada, grace, linus)
    ]
    assert [peer.process.wait(60) for peer in (ada, grace, linus)] == [0, 0, 0]
    assert len({end[2] for end in ends}) == 1, "the same state and the same parameters"
    assert float(ends[0][1]) > 85, "of four kinds of pictures"
    assert {(peer.home / "beginning").read_bytes() for peer in (ada, grace, linus)} == {
        (ada.home / "beginning").read_bytes()
    }
    assert any((linus.home / "checkpoints").glob("snapshot-*"))


def test_a_peer_that_was_killed_goes_on_with_its_home_whatever_its_model_begins_with(examples: Examples) -> None:
    examples.manifest.write_text(MANIFEST.replace(f"last_round = {LAST_ROUND}", "last_round = 40"))
    ada = examples.start("ada", 0, "bootstrap", str(examples.manifest))
    ada.reaches(15)
    ada.process.kill()
    ada.process.wait()
    signed, beginning = ((ada.home / name).read_bytes() for name in ("manifest.signed", "beginning"))
    again = examples.start("ada", 5, "bootstrap", str(examples.manifest))
    end = again.said(r"round 40, 1 members[^\n]*\nstate (\w+), parameters (\w+)", 120)
    assert again.process.wait(60) == 0
    assert ((again.home / "manifest.signed").read_bytes(), (again.home / "beginning").read_bytes()) == (
        signed,
        beginning,
    )
    # What is over stays as it was.
    once_more = examples.start("ada", 6, "bootstrap", str(examples.manifest))
    assert once_more.process.wait(90) == 0
    assert once_more.said(r"state (\w+), parameters (\w+)", 1).groups() == end.groups()
