"""A model and a loop of one's own: the example of the docs, with real processes, and joiners with other values."""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import psutil
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from peers import eventually, run

import p2ptrain
from p2ptrain.state import checkpoint

EXAMPLES = Path(__file__).parents[2] / "docs/examples"
MANIFEST = """\
name = "pictures"
nonce = "0123456789abcdef0123456789abcdef"
last_round = {last_round}

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

[evaluation]
every_rounds = 10
"""


class Example:
    """A process that runs the example."""

    def __init__(self, script: Path, folder: Path, home: str, seed: int, *command: str) -> None:
        self.home, self.log = folder / home, folder / f"{home}.log"
        flags = ["--home", str(self.home), "--host", "127.0.0.1", "--seed", str(seed)]
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, str(script), *command, *flags],
                stdout=log,
                stderr=log,
                env=environment,
                # Whoever runs the tests in the background has it ignored.
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            )

    def said(self, pattern: str, seconds: float) -> re.Match[str]:
        """Wait until it has printed this."""

        def there() -> re.Match[str] | None:
            found = re.search(pattern, self.log.read_text())
            assert found or self.process.poll() in (None, 0), self.log.read_text()
            return found

        return eventually(there, seconds, f"{pattern} in {self.log.name}")

    def states(self) -> dict[str, str]:
        """State ids that it has been at, and the hash of its parameters at each."""
        return dict(re.findall(r"^round .*: (\w{64}) (\w{64})$", self.log.read_text(), re.M))

    def losses(self) -> list[float]:
        """What it said of its losses."""
        return [float(loss) for loss in re.findall(r"^round .*, train loss (\d\S+): ", self.log.read_text(), re.M)]

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
        self.script = EXAMPLES / "pictures.py"

    def write_manifest(self, last_round: int) -> None:
        """0: the run has no end."""
        self.manifest.write_text(MANIFEST.format(last_round=last_round))

    def start(self, home: str, seed: int, *command: str) -> Example:
        self.started.append(Example(self.script, self._folder, home, seed, *command))
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


@pytest.mark.timeout(400)
@pytest.mark.parametrize("script", ["pictures.py", "llama.py"])
def test_peers_with_a_model_of_their_own_are_bit_identical_and_so_is_one_that_joins_late(
    examples: Examples, script: str
) -> None:
    if script == "llama.py":
        pytest.importorskip("transformers", reason="pip install 'p2ptrain[transformers]'")
    examples.script = EXAMPLES / script
    examples.write_manifest(0)
    ada = examples.start("ada", 0, "bootstrap", str(examples.manifest))
    address = ada.said(r"others join at (\S+)", 90)[1]
    grace = examples.start("grace", 1, "join", address)
    refused = run("join", address, "--home", str(examples.manifest.parent / "plain"), "--host", "127.0.0.1")
    assert refused.returncode == 16 and "p2ptrain.join(ADDR, model=model)" in refused.stderr
    ada.reaches(40)
    linus = examples.start("linus", 2, "join", address)
    peers = (ada, grace, linus)

    def in_common() -> set[str]:
        """States that all have been at, while there were three of them, or nothing."""
        for peer in peers:
            assert peer.process.poll() is None, peer.log.read_text()
        if not re.search("^round .*, 3 members", linus.log.read_text(), re.M):
            return set()
        return set.intersection(*(set(peer.states()) for peer in peers))

    eventually(lambda: len(in_common()) >= 5, 150, f"states in common:\n{linus.log.read_text()}")
    for state in in_common():
        assert len({peer.states()[state] for peer in peers}) == 1, "one state, one hash of the parameters"
    assert len({(peer.home / "beginning").read_bytes() for peer in peers}) == 1
    assert min(ada.losses()[-5:]) < 0.9 * ada.losses()[0]
    linus.process.send_signal(signal.SIGINT)
    linus.process.wait(60)
    assert "KeyboardInterrupt" in linus.log.read_text(), "no handler of its own"
    assert (linus.home / "checkpoints" / checkpoint.NAME).exists()


@pytest.mark.timeout(240)
def test_a_joiner_has_the_whole_of_a_run_though_one_of_its_two_donors_is_killed_half_way(examples: Examples) -> None:
    # A donor hands out at most 1 MiB a second, so two take 4 s, and half is there for 2 s.
    examples.script = Path(__file__).parent / "one_matrix.py"
    examples.write_manifest(0)
    # A snapshot would be outdated before it is fetched: the rounds are so short.
    examples.manifest.write_text(examples.manifest.read_text().replace("root_interval = 8", "root_interval = 10000"))
    ada = examples.start("ada", 0, "bootstrap", str(examples.manifest))
    address = ada.said(r"others join at (\S+)", 90)[1]
    grace = examples.start("grace", 0, "join", address)
    grace.said("others join at", 90)
    linus = examples.start("linus", 1, "join", address)
    length = (ada.home / "beginning").stat().st_size

    def there() -> int:
        """Bytes of the file that is being fetched."""
        partial = [path for path in linus.home.glob("partial-*") if path.suffix != ".hashes"]
        assert linus.process.poll() is None and not (linus.home / "beginning").exists(), linus.log.read_text()
        return sum(path.stat().st_blocks * 512 for path in partial)

    eventually(lambda: there() >= length / 2, 90, "half of the first values")
    for process in (*psutil.Process(grace.process.pid).children(recursive=True), grace.process):
        process.kill()
    assert there() < length
    linus.said("others join at", 60)
    assert (linus.home / "beginning").read_bytes() == (ada.home / "beginning").read_bytes()
    assert not list(linus.home.glob("partial-*")) and ada.process.poll() is None
    linus.reaches(1)


@pytest.mark.long
def test_a_peer_that_was_killed_goes_on_with_its_home_whatever_its_model_begins_with(examples: Examples) -> None:
    examples.write_manifest(40)
    ada = examples.start("ada", 0, "bootstrap", str(examples.manifest))
    ada.reaches(15)
    ada.process.kill()
    ada.process.wait()
    kept = [ada.home / name for name in ("manifest.signed", "beginning")]
    before = [path.read_bytes() for path in kept]
    again = examples.start("ada", 5, "bootstrap", str(examples.manifest))
    end = again.said(r"(\S+) % of new pictures right at (\w+ \w+)", 120)
    assert again.process.wait(60) == 0
    assert [path.read_bytes() for path in kept] == before
    # It has measured the model in its turns, in both lives, and the last round as the example itself does.
    measured = [json.loads(line) for line in (ada.home / "evaluations.jsonl").read_text().splitlines()]
    assert [one["round"] for one in measured] == sorted({one["round"] for one in measured}) and len(measured) >= 2
    assert measured[0]["round"] < 20 and measured[-1]["round"] == 40
    assert f"{100 * measured[-1]['figures']['right']:.1f}" == end[1]
    assert max(map(int, re.findall(r"^round (\d+)", again.log.read_text(), re.M))) == 40
    # What is over stays as it was.
    once_more = examples.start("ada", 6, "bootstrap", str(examples.manifest))
    assert once_more.process.wait(90) == 0
    assert once_more.said(r"right at (\w+ \w+)", 1)[1] == end[2]


def test_the_snippets_of_the_docs_run_as_they_stand(
    sockets_in: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (EXAMPLES.parent / "python.md").read_text()
    start, _, alone = re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)
    monkeypatch.chdir(tmp_path)
    assert run("init", str(tmp_path / "run.toml")).returncode == 0
    made = (tmp_path / "run.toml").read_text()
    for key, value in (("last_round", "3"), ("alone_after_seconds", "1.0")):
        made, changes = re.subn(rf"^{key} = .*$", f"{key} = {value}", made, flags=re.M)
        assert changes == 1
    (tmp_path / "run.toml").write_text(made)
    model = torch.nn.Linear(4, 1)
    names = {
        "model": model,
        "loader": itertools.repeat(torch.ones(8, 4)),
        "loss_of": lambda model, batch: model(batch).square().mean(),
    }
    exec(start, names)
    address, end = capsys.readouterr().out.splitlines()
    assert address.startswith("/ip4/") and re.fullmatch(r"\w{64} \w{64}", end)
    assert (tmp_path / "a" / "beginning").exists()
    exec("import p2ptrain\n" + alone, names)
    optimizer = names["optimizer"]
    assert isinstance(optimizer, torch.optim.Optimizer)
    model(torch.ones(8, 4)).square().mean().backward()
    optimizer.step()


class Kept:
    """A sink of a program's own."""

    def __init__(self) -> None:
        self.labels: dict[str, str] = {}
        self.rounds: dict[int, dict[str, float]] = {}
        self.closed = False

    def begin(self, labels: Mapping[str, str]) -> None:
        self.labels = dict(labels)

    def figures(self, values: Mapping[str, float], round: int) -> None:
        self.rounds.setdefault(round, {}).update(values)

    def close(self) -> None:
        self.closed = True


def test_figures_of_rounds_go_where_a_program_wants_them(tmp_path: Path) -> None:
    kept, path, run_toml = Kept(), tmp_path / "metrics.jsonl", tmp_path / "run.toml"
    run_toml.write_text(MANIFEST.format(last_round=3).replace("= 512", "= 8"))
    model = torch.nn.Linear(3, 2)
    settings = {"home": tmp_path / "home", "host": "127.0.0.1", "name": "ada"}
    with p2ptrain.bootstrap(run_toml, model=model, metrics=[kept, str(path)], **settings) as peer:
        while not peer.ended:
            model(torch.ones(8, 3)).square().mean().backward()
            peer.optimizer.step(samples=8)
            peer.optimizer.zero_grad()
    assert kept.closed and kept.labels["run"] == "pictures" and kept.labels["name"] == "ada"
    written: dict[int, dict[str, float]] = {}
    for line in map(json.loads, path.read_text().splitlines()):
        if "round" in line:
            figures = {name: value for name, value in line.items() if name not in ("round", "time")}
            written.setdefault(line["round"], {}).update(figures)
    assert written == kept.rounds and {1, 2, 3} <= written.keys()
    assert written[3]["members"] == 1 and written[3]["sequences"] > 0
