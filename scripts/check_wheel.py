"""Builds the wheel, installs it in an empty virtual environment with constraints.txt, and trains two peers with it.

All that a user of the wheel does: `pip install`, `p2ptrain init`, `bootstrap` and `join`, as processes of their own on
127.0.0.1, in a folder where the sources are not. Both peers must end with one state id and the same parameters. Prints
JSON; anything that fails ends it with what was said. `--python` chooses the interpreter, by default the one that runs
this. Takes minutes, most of them pip's, and the room of one installation.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

SOURCES = Path(__file__).parents[1]
JOIN_SECONDS = 180.0
"""How long a first peer may take to print its join line; the first of an installation compiles."""
END_SECONDS = 300.0


def environment() -> dict[str, str]:
    """This one without what would lead Python to modules from elsewhere, or a peer to settings of its owner's."""
    return {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PYTHON", "P2PTRAIN_")) and name != "VIRTUAL_ENV"
    }


def run(folder: Path, *command: str | Path) -> str:
    """One command to its end, in `folder`; what it printed."""
    done = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout


def build(python: Path, folder: Path) -> Path:
    """The wheel, from a copy of what belongs in it, so that no earlier build's files get in."""
    copy = folder / "sources"
    shutil.copytree(SOURCES / "p2ptrain", copy / "p2ptrain", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(SOURCES / name, copy)
    run(folder, python, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", "dist", copy)
    shutil.rmtree(copy)
    (wheel,) = (folder / "dist").glob("p2ptrain-*.whl")
    return wheel


@contextlib.contextmanager
def peer(folder: Path, name: str, *command: str | Path) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """A peer's process and its log; ended with the block."""
    flags: list[str | Path] = [
        "--home",
        folder / name,
        "--name",
        name,
        "--host",
        "127.0.0.1",
        "--threads",
        "1",
        "--log-format",
        "json",
    ]
    log = folder / f"{name}.log"
    with log.open("w") as stderr:
        process = subprocess.Popen(
            [*command, *flags], cwd=folder, env=environment(), stdout=subprocess.PIPE, stderr=stderr, text=True
        )
        try:
            yield process, log
        finally:
            if process.poll() is None:
                process.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(30)
                process.kill()


def address(output: IO[str], log: Path) -> str:
    """What a peer printed for others to join with."""
    for line in output:
        if found := re.search(r"p2ptrain join (\S+)", line):
            return found[1]
    raise SystemExit(f"no join line:\n{log.read_text()[-3000:]}")


def last_word(process: subprocess.Popen[str], log: Path) -> tuple[str, str]:
    """State id and hash of the parameters, once the peer has ended."""
    try:
        code = process.wait(END_SECONDS)
    except subprocess.TimeoutExpired:
        code = None
    found = re.findall(r"state (\w{64}), parameters sha256 (\w{64})", log.read_text())
    if code != 0 or not found:
        raise SystemExit(f"{log.stem} ended with {code}:\n{log.read_text()[-3000:]}")
    state, sha256 = found[-1]
    return state, sha256


def most_members(log: Path) -> int:
    """Of any round in a log."""
    entries = [json.loads(line) for line in log.read_text().splitlines() if line.startswith("{")]
    return max((entry["members"] for entry in entries if "members" in entry), default=0)


def train(p2ptrain: Path, folder: Path, rounds: int) -> dict[str, Any]:
    """Two peers, from `init` to the run's last round."""
    run(folder, p2ptrain, "init", "run.toml")
    manifest = folder / "run.toml"
    text = manifest.read_text()
    if "last_round = 0\n" not in text:
        raise SystemExit("run.toml has no last_round = 0 to replace")
    manifest.write_text(text.replace("last_round = 0\n", f"last_round = {rounds}\n"))
    with peer(folder, "ada", p2ptrain, "bootstrap", "run.toml") as (first, first_log):
        assert first.stdout is not None
        with peer(folder, "grace", p2ptrain, "join", address(first.stdout, first_log)) as (second, second_log):
            words = [last_word(first, first_log), last_word(second, second_log)]
    if words[0] != words[1]:
        raise SystemExit(f"the peers ended with different replicas: {words}")
    members = most_members(first_log)
    if members != 2:
        raise SystemExit(f"a round had {members} members at most: the peers did not train together")
    return {"rounds": rounds, "members": members, "state_id": words[0][0], "parameters_sha256": words[0][1]}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--python", type=Path, default=Path(sys.executable), help="the interpreter; default: this one")
    parser.add_argument("--rounds", type=int, default=60, help="the run's last round")
    options = parser.parse_args()
    seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def timed(what: str) -> Iterator[None]:
        before = time.monotonic()
        yield
        seconds[what] = round(time.monotonic() - before, 1)

    with tempfile.TemporaryDirectory(prefix="p2ptrain-wheel-") as name:
        folder = Path(name)
        with timed("build"):
            wheel = build(options.python, folder)
        with timed("install"):
            run(folder, options.python, "-m", "venv", "venv")
            binaries = folder / "venv" / "bin"
            pip = (binaries / "python", "-m", "pip")
            run(folder, *pip, "install", "--quiet", "-c", SOURCES / "constraints.txt", wheel)
        packages = {
            entry["name"]: entry["version"] for entry in json.loads(run(folder, *pip, "list", "--format", "json"))
        }
        with timed("train"):
            trained = train(binaries / "p2ptrain", folder, options.rounds)
        version = run(folder, binaries / "python", "-c", "import platform; print(platform.python_version())").strip()
        result = {
            "python": version,
            "wheel": wheel.name,
            "wheel_bytes": wheel.stat().st_size,
            "packages": len(packages),
            "torch": packages["torch"],
            "seconds": seconds,
            **trained,
        }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
