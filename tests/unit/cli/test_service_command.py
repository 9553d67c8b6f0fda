"""`p2ptrain service` writes a unit that systemd takes, after it was shown, and removes it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from p2ptrain.cli.main import run
from p2ptrain.cli.service import unit_path
from p2ptrain.config.home import Home

ADDRESS = "/ip4/192.0.2.7/tcp/4000/p2p/12D3KooWRRb1xFjnFQfm8GUv9kUdQhkatGoEYsomHYLTZfyMUAVq"


def service(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        run(["service", *arguments])
    return int(ended.value.code or 0)


def test_the_unit_is_shown_written_and_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    home = Home(tmp_path / "a home with 100% of $HOME")
    path = unit_path(home)
    flags = ["--home", str(home.path), "--no-start"]
    # Without anybody to ask nothing is written.
    assert service("install", ADDRESS, *flags) == 2 and not path.exists()
    shown = capsys.readouterr().out
    assert str(path) in shown
    assert service("install", *flags, "--yes") == 2, "this home has met nobody"
    assert service("install", ADDRESS, *flags, "--yes") == 0
    text = path.read_text()
    assert text in shown and f"{sys.executable} -m p2ptrain join {ADDRESS} --home" in text
    assert "100%% of $$HOME" in text and "WatchdogSec=" in text
    if shutil.which("systemd-analyze"):
        (tmp_path / "runtime").mkdir(mode=0o700)
        monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "runtime"))
        done = subprocess.run(["systemd-analyze", "--user", "verify", str(path)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert service("uninstall", *flags) == 0 and not path.exists()
    assert service("status", *flags) == 3
