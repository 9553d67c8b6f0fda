"""An owner's commands to a peer that runs: each does what it says, and the others train on meanwhile."""

from __future__ import annotations

import gc
import json
import stat
import sys
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

sys.path.insert(0, str(Path(__file__).parent))

from peers import Peer, Swarm, eventually, run

from p2ptrain.config.home import Home
from p2ptrain.config.manifest import TOKENIZER_VOCABULARY, Manifest, ModelConfig, RoundConfig
from p2ptrain.config.node import NodeSettings
from p2ptrain.data import text as tokens
from p2ptrain.data.text import Text
from p2ptrain.data.tokenizer import shipped_tokenizer
from p2ptrain.peer import control
from p2ptrain.peer.progress import Display
from p2ptrain.peer.session import Part, PeerSession
from p2ptrain.state.journal import Journal
from p2ptrain.swarm.identity import verify
from p2ptrain.training.replica import Replica

MANIFEST = Manifest(
    name="test",
    nonce="0" * 32,
    model=ModelConfig(layers=1, heads=1, embedding=16, context=16),
    round=RoundConfig(pace="fixed", sequences_per_peer=4, micro_batch=4, root_interval=4),
)


def test_a_peer_lets_go_of_its_model_in_a_pause_and_goes_on_where_it_stood(tmp_path: Path, sockets_in: Path) -> None:
    """One process; its owner is another thread."""
    settings = NodeSettings(home=tmp_path / "ada", origins={}, host="127.0.0.1", threads=1, name="ada")
    address, models = Home(settings.home).control, weakref.WeakSet[Replica]()
    told: list[control.Answer] = []

    def ask(request: control.Request) -> control.Answer:
        return control.ask(address, request, 60.0)

    def reached(round: int) -> bool:
        answer = ask(control.Ask(why=True))
        return bool(answer["state"] == "solo" and answer["round"] >= round)

    def command() -> None:
        eventually(lambda: address.exists() and reached(3), 120, "three rounds")
        told.append(ask(control.Pause()))
        gc.collect()
        told.append({"models": len(models)})
        told.append(ask(control.Pause(3600.0)))
        told.append(ask(control.Resume()))
        eventually(lambda: reached(told[0]["round"] + 2), 60, "two rounds more")
        told.append(ask(control.Pause(0.5)))
        eventually(lambda: reached(told[-1]["round"] + 2), 60, "two rounds more, by itself")
        told.append(ask(control.Finish()))

    class Counted(PeerSession):
        def _begin(self, *arguments: Any) -> Part:
            part = super()._begin(*arguments)
            models.add(part.trainer.replica)
            return part

    with ThreadPoolExecutor(1) as pool, Counted(settings, Display(quiet=True), None) as session:
        session.connect([])
        run = session.found_run(MANIFEST)
        session.enter_run(run)
        train = tokens.Part(np.random.default_rng(1).integers(0, 4096, 30_000, np.uint16), 100_000)
        text = Text(train, tokens.Part(train.tokens[:0], 0), shipped_tokenizer, TOKENIZER_VOCABULARY)
        owner = pool.submit(command)
        session.train(run, text, None)
    owner.result(60)
    paused, held, still, resumed, again, finished = told
    assert paused["state"] == "paused" and paused["paused_until"] is None and held == {"models": 0}
    assert (
        still["state"] == "paused" and still["paused_until"] > time.time() + 3000 and still["round"] == paused["round"]
    )
    assert resumed["state"] != "paused" and resumed["round"] >= paused["round"]
    assert again["state"] == "paused" and finished == {}, "a process that ends says no more"
    journal = Journal(Home(settings.home).journal, run.run_id, verify)
    assert journal.last >= again["round"] + 2


@pytest.fixture
def swarm(tmp_path: Path) -> Iterator[Swarm]:
    # Longer than the 107 characters that the address of a socket may have.
    made = Swarm(tmp_path / ("a folder with a long name" * 4))
    made.folder.mkdir()
    yield made
    made.close()


def told(peer: Peer, *command: str, code: int = 0) -> str:
    """What a command to a peer prints."""
    done = run(*command, "--home", str(peer.home))
    assert done.returncode == code, f"{command}: {done.returncode}\n{done.stdout}{done.stderr}\n{peer.tail()}"
    return done.stdout + done.stderr


def status(peer: Peer, code: int = 0) -> dict[str, Any]:
    answer: dict[str, Any] = json.loads(told(peer, "status", "--format", "json", "--why", code=code))
    return answer


@pytest.mark.long
def test_a_peer_pauses_resumes_finishes_and_leaves_while_the_others_train_on(swarm: Swarm) -> None:
    # Journals reach back some intervals, so through the pause, however long looking at it takes.
    swarm.write_manifest(root_interval=64)
    ada = swarm.bootstrap("ada")
    address = ada.address()
    grace, linus = (swarm.join(name, address) for name in ("grace", "linus"))
    observer = swarm.watch(address)
    observer.sees(dict.fromkeys(("ada", "grace", "linus"), "training"), 90)
    assert stat.S_IMODE((grace.home / "control").stat().st_mode) == 0o600
    answer = status(grace)
    assert answer["state"] == "training" and answer["members"] == 3 and answer["decisions"]

    memory = psutil.Process(grace.process.pid).memory_info
    before_bytes = memory().rss
    assert told(grace, "pause").startswith("paused\n")
    paused_at, freed_bytes = time.time(), before_bytes - memory().rss
    observer.sees({"grace": "paused", "ada": "training", "linus": "training"}, 15)
    assert status(grace, code=1)["state"] == "paused"
    held = grace.round
    ada.reaches(held + 6)
    # None of these rounds was waited for longer than its deadlines, and none is in the paused peer's home.
    assert time.time() - paused_at < 60 and grace.round == held
    told(grace, "resume")
    observer.sees({"grace": "training"}, 40)
    after = [entry["message"] for entry in grace.entries() if entry["time"] > paused_at]
    assert not [message for message in after if "snapshot" in message], "resumed by its journal"
    # A pause with an end ends by itself.
    assert status(grace)["state"] == "training" and told(grace, "pause", "1s")
    eventually(
        lambda: (
            json.loads(run("status", "--format", "json", "--home", str(grace.home)).stdout)["round"]
            and "resumed" in grace.log.read_text().rsplit("paused at", 1)[1]
        ),
        60,
        "grace goes on by itself",
    )
    print(f"freed {freed_bytes / 1e6:.1f} of {before_bytes / 1e6:.1f} MB")

    told(linus, "leave")
    linus.ended(60)
    told(grace, "finish")
    grace.ended(60)
    assert "no peer runs" in told(grace, "status", code=17)
    logs = told(grace, "logs", "--lines", "100000")
    assert "paused at round" in logs and "resumed at round" in logs
    ada.reaches(ada.round + 2)
    told(ada, "finish")
    ada.ended(60)
