"""Errors end as one message and a documented exit code; the log goes to stderr as text or JSON lines."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Iterator

import pytest
import typer

from p2ptrain import errors
from p2ptrain.cli.output import errors_reported, printable, set_up_logging
from p2ptrain.errors import P2PTrainError, UnreachableError


@pytest.fixture(autouse=True)
def _logging_as_it_was(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("P2PTRAIN_DEBUG", raising=False)
    root, ours = logging.getLogger(), logging.getLogger("p2ptrain")
    before = root.handlers[:], root.level, ours.level
    yield
    root.handlers[:] = before[0]
    root.setLevel(before[1])
    ours.setLevel(before[2])


def exit_of(error: BaseException) -> int:
    with pytest.raises(SystemExit) as caught, errors_reported():
        raise error
    assert isinstance(caught.value.code, int)
    return caught.value.code


def test_an_error_is_its_message_and_what_to_try_and_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_of(UnreachableError("nobody answers", hint="p2ptrain join ANOTHER")) == 5
    captured = capsys.readouterr()
    assert captured.err == "error: nobody answers\n  try: p2ptrain join ANOTHER\n"
    assert captured.out == ""


def test_every_kind_of_error_has_its_own_exit_code() -> None:
    kinds = [k for k in vars(errors).values() if isinstance(k, type) and issubclass(k, P2PTrainError)]
    # A kind of another kind may share its code.
    codes = [kind.exit_code for kind in kinds if "exit_code" in vars(kind)]
    assert len(set(codes)) == len(codes) == 18
    assert all(exit_of(kind("it broke")) == kind.exit_code for kind in kinds)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), typer.Abort()])
def test_an_interrupt_is_130(error: BaseException, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_of(error) == 130
    assert capsys.readouterr().err == ""


def test_the_systems_refusals_are_told_without_a_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_of(OSError(28, "No space left on device", "journal")) == 1
    assert capsys.readouterr().err.startswith("error: [Errno 28] No space left on device: 'journal'\n")


def test_a_bug_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError), errors_reported():
        _ = 1 / 0


@pytest.mark.parametrize("how", ["flags", "variable"])
def test_a_traceback_shows_when_asked_for(
    how: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if how == "flags":
        set_up_logging(verbose=2)
    else:
        monkeypatch.setenv("P2PTRAIN_DEBUG", "1")
    exit_of(UnreachableError("nobody answers"))
    assert "Traceback" in capsys.readouterr().err


def test_what_strangers_write_cannot_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    exit_of(UnreachableError("run \x1b[2Jnamed\r\x00 so"))
    assert not set("\x1b\r\x00") & set(capsys.readouterr().err)
    assert printable("a\tb\nc é") == "a\tb\nc é"


@pytest.mark.parametrize(
    ("verbose", "quiet", "seen"),
    [
        (0, False, ["ours info", "ours error", "theirs warning"]),
        (1, False, ["ours debug", "ours info", "ours error", "theirs warning"]),
        (2, False, ["ours debug", "ours info", "ours error", "theirs debug", "theirs warning"]),
        (0, True, ["ours error"]),
    ],
)
def test_verbosity(verbose: int, quiet: bool, seen: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    set_up_logging(verbose, quiet)
    set_up_logging(verbose, quiet)
    ours, theirs = logging.getLogger("p2ptrain.swarm"), logging.getLogger("theirs")
    ours.debug("ours debug")
    ours.info("ours info")
    ours.error("ours error")
    theirs.debug("theirs debug")
    theirs.warning("theirs warning")
    captured = capsys.readouterr()
    assert [line.split(": ")[-1].split(" ", 2 if verbose == 0 else 0)[-1] for line in captured.err.splitlines()] == seen
    assert captured.out == ""


def test_json_lines_hold_log_and_error_alike(capsys: pytest.CaptureFixture[str]) -> None:
    set_up_logging(log_format="json")
    try:
        raise ValueError("bad\nluck")
    except ValueError:
        logging.getLogger("p2ptrain.swarm").exception("round %d", 3)
    exit_of(UnreachableError("nobody answers", hint="wait"))
    logged, failed = map(json.loads, capsys.readouterr().err.splitlines())
    assert (logged["level"], logged["logger"], logged["message"]) == ("error", "p2ptrain.swarm", "round 3")
    assert "ValueError: bad\nluck" in logged["exception"]
    assert failed == {"level": "error", "message": "nobody answers", "hint": "wait", "exit_code": 5}


def command_line(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "p2ptrain", *arguments], capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        (["ini"], "No such command 'ini'", "try: p2ptrain --help"),
        (["init", "--nmae"], "No such option: --nmae", "try: p2ptrain init --help"),
        (["init", "a", "b"], "unexpected extra argument", "try: p2ptrain init --help"),
    ],
)
def test_a_mistyped_command_line_is_one_message(arguments: list[str], message: str, hint: str) -> None:
    result = command_line(*arguments)
    assert result.returncode == 2
    assert result.stderr.startswith("error: ")
    assert message in result.stderr and hint in result.stderr
    assert len(result.stderr.splitlines()) == 2


def test_help_and_version_load_neither_torch_nor_hivemind() -> None:
    code = "import sys, p2ptrain.cli.main; sys.exit(bool({'torch', 'hivemind', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert command_line("--version").stdout.startswith("p2ptrain ")
    assert command_line("--help").returncode == 0


def test_a_reader_of_stdout_that_left_is_no_news() -> None:
    code = (
        "import os; from p2ptrain.cli.main import run; read, write = os.pipe(); os.dup2(write, 1); os.close(write); "
        "os.close(read); run(['--version'])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (1, "")
