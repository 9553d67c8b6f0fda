"""Every script finds what it imports and says how it is used."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]
SCRIPTS = sorted(
    str(path.relative_to(ROOT))
    for pattern in ("*.py", "bench/*.py", "bench/lab/*_peer.py")
    for path in (ROOT / "scripts").glob(pattern)
)
LIMIT_SECONDS = 200.0
START = """\
import json, os, runpy, sys, tempfile, traceback

import hivemind, matplotlib, torch
import p2ptrain.peer.session


def start(script):
    os.dup2(sys.stderr.fileno(), 1)
    sys.path[0], sys.argv = os.path.dirname(script), [script, "--help"]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        return end.code or 0
    except BaseException:
        traceback.print_exc()
    return 1


found = {}
for script in json.loads(sys.argv[1]):
    with tempfile.TemporaryFile("w+") as said:
        child = os.fork()
        if child == 0:
            os.dup2(said.fileno(), 2)
            code = start(os.path.abspath(script))
            sys.stdout.flush()
            os._exit(code if isinstance(code, int) else 1)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        said.seek(0)
        found[script] = [code, said.read()]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def started() -> dict[str, Any]:
    """Exit code of each with --help and what it said.

    Each is a process of its own, forked from one that has loaded torch and hivemind, which takes seconds.
    """
    command = [sys.executable, "-c", START, json.dumps(SCRIPTS)]
    run = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, timeout=LIMIT_SECONDS, check=True)
    found: dict[str, Any] = json.loads(run.stdout)
    return found


@pytest.mark.parametrize("script", SCRIPTS)
def test_it_starts(script: str, started: dict[str, Any]) -> None:
    code, said = started[script]
    assert code == 0 and "usage:" in said, said
