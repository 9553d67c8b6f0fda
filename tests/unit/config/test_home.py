"""The home: one process at a time, keys that stay, ports that are remembered."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from p2ptrain.config.home import Home, default_home
from p2ptrain.errors import HomeError

HOLD = "import sys; from p2ptrain.config.home import *; Home(Path(sys.argv[1])).lock(); print(1, flush=True); input()"


def test_looking_at_a_home_makes_nothing(tmp_path: Path) -> None:
    assert Home(tmp_path / "home").remembered_port() == 0
    assert list(tmp_path.iterdir()) == []


def test_a_home_is_readable_by_its_owner_alone(tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    home.lock()
    home.load_or_create_owner_key()
    home.unlock()
    for path in (home.path, *home.path.rglob("*")):
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path


def test_a_home_that_a_process_has_names_that_process_and_is_free_after_its_death(tmp_path: Path) -> None:
    home = Home(tmp_path)
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        with pytest.raises(HomeError, match=f"process {holder.pid}") as caught:
            home.lock()
        assert "--home" in caught.value.hint
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    home.lock()
    home.unlock()
    home.unlock()


def test_a_process_that_was_forked_meanwhile_does_not_keep_the_home(tmp_path: Path) -> None:
    home = Home(tmp_path)
    home.lock()
    assert home._lock is not None
    # What a fork has of it: another number for the same open file.
    of_the_fork = os.dup(home._lock)
    home.unlock()
    other = Home(tmp_path)
    other.lock()
    os.close(of_the_fork)
    other.unlock()


def test_a_second_lock_in_the_same_process_is_refused_too(tmp_path: Path) -> None:
    first = Home(tmp_path)
    first.lock()
    with pytest.raises(HomeError, match=f"process {os.getpid()}"):
        Home(tmp_path).lock()
    first.unlock()
    Home(tmp_path).lock()


def test_locking_clears_away_what_a_killed_process_was_writing(tmp_path: Path) -> None:
    home = Home(tmp_path)
    home.create()
    (home.checkpoints / ".tmp-abc").write_bytes(b"half")
    (home.checkpoints / "whole").write_bytes(b"whole")
    home.lock()
    assert [path.name for path in home.checkpoints.iterdir()] == ["whole"]
    home.unlock()


def test_the_owner_key_stays(tmp_path: Path) -> None:
    first = Home(tmp_path / "a").load_or_create_owner_key()
    again = Home(tmp_path / "a").load_or_create_owner_key()
    other = Home(tmp_path / "b").load_or_create_owner_key()
    assert first.private_bytes_raw() == again.private_bytes_raw() != other.private_bytes_raw()


def test_a_damaged_owner_key_is_an_error_and_not_replaced(tmp_path: Path) -> None:
    home = Home(tmp_path)
    home.owner_key.write_bytes(b"short")
    with pytest.raises(HomeError, match="not an Ed25519 key"):
        home.load_or_create_owner_key()
    assert home.owner_key.read_bytes() == b"short"


@pytest.mark.parametrize("text", ["", "x", "-1", "70000", "\N{SNOWMAN}"])
def test_a_remembered_port_that_is_none_is_forgotten(tmp_path: Path, text: str) -> None:
    home = Home(tmp_path)
    home.remember_port(40123)
    assert home.remembered_port() == 40123
    home.port.write_text(text)
    assert home.remembered_port() == 0


def test_a_path_that_cannot_be_a_home_is_an_error_with_a_way_out(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(HomeError) as caught:
        Home(tmp_path / "file").lock()
    assert "--home" in caught.value.hint
    with pytest.raises(HomeError):
        Home(tmp_path / "file" / "below").load_or_create_owner_key()


def test_the_environment_moves_the_default_home() -> None:
    assert default_home({"P2PTRAIN_HOME": "/somewhere"}) == Path("/somewhere")
    assert default_home({"P2PTRAIN_HOME": ""}).name == "p2ptrain"
