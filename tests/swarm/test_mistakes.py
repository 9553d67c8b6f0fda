"""What users do wrong, or find broken: one message that names the cause, the next command, and an exit code."""

from __future__ import annotations

import io
import shutil
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from peers import Swarm, run

from p2ptrain.config.node import NodeSettings
from p2ptrain.errors import UnreachableError
from p2ptrain.peer import joining
from p2ptrain.peer.progress import Display
from p2ptrain.peer.session import PeerSession

if TYPE_CHECKING:
    from conftest import PeerProcess

NOBODY = "12D3KooWRRb1xFjnFQfm8GUv9kUdQhkatGoEYsomHYLTZfyMUAVq"


def refused(code: int, *command: str) -> str:
    """The one message of a command that ends with this code."""
    done = run(*command)
    assert done.returncode == code, (done.returncode, done.stderr)
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert [line.startswith("error: ") for line in done.stderr.splitlines()].count(True) == 1
    assert "\n  try: " in done.stderr
    return done.stderr


@pytest.fixture
def swarm(tmp_path: Path) -> Iterator[Swarm]:
    made = Swarm(tmp_path)
    yield made
    made.close()


def test_an_address_where_nobody_listens(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    address = f"/ip4/127.0.0.1/tcp/{port}/p2p/{NOBODY}"
    flags = ("--home", str(tmp_path / "home"), "--host", "127.0.0.1", "--wait", "0")
    assert "connection refused" in refused(5, "join", address, *flags)
    assert "connection refused" in refused(5, "inspect", address)


@pytest.mark.parametrize("address", ["203.0.113.7:4000", "/ip4/203.0.113.7/tcp/4000", f"/ip4/203.0.113/p2p/{NOBODY}"])
def test_an_address_that_is_none(address: str, tmp_path: Path) -> None:
    refused(4, "join", address, "--home", str(tmp_path / "home"))
    assert not (tmp_path / "home" / "identity.key").exists()


def test_a_manifest_with_an_unknown_key_or_an_impossible_size(tmp_path: Path) -> None:
    manifest = tmp_path / "run.toml"
    assert run("init", str(manifest)).returncode == 0
    good = manifest.read_text()
    for bad, named in (
        (good.replace("heads = 4", "head = 4"), "model.heads"),
        (good.replace("embedding = 128", "embedding = 130"), "130"),
        (good.replace("layers = 2", "layers = 100000"), "100000"),
        (good.replace("[model]", "[model"), "TOML"),
    ):
        assert bad != good
        manifest.write_text(bad)
        assert named in refused(3, "bootstrap", str(manifest), "--home", str(tmp_path / "home"))
    refused(3, "bootstrap", str(tmp_path / "nowhere.toml"))


def test_a_port_that_is_taken(swarm: Swarm) -> None:
    swarm.write_manifest()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        flags = ("--home", str(swarm.folder / "ada"), "--host", "127.0.0.1", "--port", port)
        assert port in refused(7, "bootstrap", str(swarm.manifest), *flags)


def test_a_clock_that_is_wrong(peer_process: Callable[..., PeerProcess], tmp_path: Path) -> None:
    ahead = peer_process("--clock-ahead-seconds", "60")
    flags = ("--home", str(tmp_path / "home"), "--host", "127.0.0.1")
    assert "clock" in refused(6, "join", ahead.report["addresses"][0], *flags)


def test_a_network_without_a_run(peer_process: Callable[..., PeerProcess], tmp_path: Path) -> None:
    peer = peer_process()
    flags = ("--home", str(tmp_path / "home"), "--host", "127.0.0.1", "--wait", "0")
    assert "no run" in refused(8, "join", peer.report["addresses"][0], *flags)


@pytest.mark.long
def test_in_a_network_with_several_runs_an_address_means_the_run_of_its_peer(swarm: Swarm) -> None:
    swarm.write_manifest()
    address = swarm.bootstrap("ada").address()
    text = swarm.manifest.read_text()
    swarm.manifest.write_text(text.replace('name = "test"', 'name = "other"', 1))
    # The second run meets in the DHT of the first, and has its text from the same home.
    shutil.copytree(swarm.folder / "ada" / "data", swarm.folder / "grace" / "data")
    other = swarm.bootstrap("grace", "--initial-peers", address).address()
    flags = ("--home", str(swarm.folder / "linus"), "--host", "127.0.0.1")
    message = refused(8, "join", address, other, *flags)
    assert "test" in message and "other" in message and "--run" in message
    refused(8, "join", address, "--run", "third", *flags)
    linus = swarm.join("linus", address, "--run", "other").started()
    linus.reaches(3)
    assert run("inspect", other).stdout.startswith("run other")
    assert run("inspect", "--home", str(linus.home)).stdout.startswith("run other")


@pytest.mark.parametrize("goodbye", [True, False])
def test_the_only_peer_is_gone_before_a_newcomer_has_its_rounds(
    swarm: Swarm, sockets_in: Path, monkeypatch: pytest.MonkeyPatch, goodbye: bool
) -> None:
    monkeypatch.setattr(joining, "SILENCE_SECONDS", 4.0)
    monkeypatch.setattr(joining, "SAY_AFTER_SECONDS", 2.0)
    swarm.write_manifest()
    ada = swarm.bootstrap("ada")
    address = ada.address()
    shown = io.StringIO()
    settings = NodeSettings(home=swarm.folder / "bob", origins={}, host="127.0.0.1", threads=1)
    with (
        pytest.raises(UnreachableError, match="no answer from") as caught,
        PeerSession(settings, Display(stream=shown), None) as session,
    ):
        session.connect([address])
        run = session.find_run([address], None)
        session.enter_run(run)
        text = session.obtain_text(run, None)
        if goodbye:
            ada.process.send_signal(signal.SIGINT)
            ada.ended(30)
        else:
            ada.kill()
        session.train(run, text, session.obtain_values(run))
    assert "p2ptrain join ADDR" in caught.value.hint
    assert "waiting for the run's rounds: no answer for" in shown.getvalue()


def test_a_home_that_is_in_use_or_in_another_run(swarm: Swarm) -> None:
    swarm.write_manifest()
    ada = swarm.bootstrap("ada").started()
    home = ("--home", str(ada.home), "--host", "127.0.0.1")
    assert str(ada.process.pid) in refused(10, "bootstrap", str(swarm.manifest), *home)
    ada.kill()
    text = swarm.manifest.read_text()
    swarm.manifest.write_text(text.replace('name = "test"', 'name = "other"', 1))
    assert "test" in refused(10, "bootstrap", str(swarm.manifest), *home)


def test_commands_of_a_home_without_a_checkpoint(tmp_path: Path) -> None:
    home = ("--home", str(tmp_path))
    refused(10, "sample", *home)
    refused(10, "eval", *home)
    refused(2, "inspect", *home)
    refused(2, "join", *home)
