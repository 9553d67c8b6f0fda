"""`p2ptrain id`: the peer id that a run's list names, the same each time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from p2ptrain.cli.main import run
from p2ptrain.swarm.identity import format_peer_id, load_or_create_identity


def printed(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    with pytest.raises(SystemExit) as caught:
        run(["id", *map(str, arguments)])
    assert not caught.value.code
    return capsys.readouterr().out


def test_it_makes_the_identity_once_and_prints_what_peers_know_it_by(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    home = tmp_path / "new" / "home"
    first = printed(capsys, "--home", home)
    assert first == printed(capsys, "--home", home)
    assert first == format_peer_id(load_or_create_identity(home / "identity.key").peer_id) + "\n"
    assert json.loads(printed(capsys, "--home", home, "--format", "json")) == {"peer_id": first.strip()}


def test_a_home_that_cannot_be_made_is_a_users_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as caught:
        run(["id", "--home", str(tmp_path / "file" / "home")])
    assert caught.value.code == 10
    assert "--home" in capsys.readouterr().err
