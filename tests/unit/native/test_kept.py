"""Compiled loops on disk: never run when a source has changed, nor from a file that is broken."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from p2ptrain.native import kept
from p2ptrain.native.kept import FOLDERS, PACKAGE

CALLER = """
from p2ptrain.compression.callee import added
from p2ptrain.native.compiled import compiled

@compiled
def called(number):
    return added(number) * 10
"""
CALLEE = """
from p2ptrain.native.compiled import compiled

@compiled
def added(number):
    return number + {}
"""
CALL = """
import logging
logging.basicConfig(format="%(levelname)s %(name)s %(message)s")
from p2ptrain.compression.caller import called
print(called(1), len(called.stats.cache_hits))
"""
TRUNCATE = """
import importlib, logging, pathlib, sys
from p2ptrain.compression import caller
warnings = []
logging.getLogger().addHandler(type("Heard", (logging.Handler,), {"emit": lambda self, of: warnings.append(of)})())
assert caller.called(1) == 30
for path in pathlib.Path(sys.argv[1]).rglob("caller*.loop"):
    whole = path.read_bytes()
    cut = [0, 1, 31, 32, 33, 40, *range(50, len(whole), len(whole) // 8), len(whole) - 1]
    changed = [whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :] for at in (0, 31, 32, 500, len(whole) - 1)]
    for broken in (*(whole[:length] for length in cut), *changed, b"garbage" * 100, whole + b"0", bytes(len(whole))):
        path.write_bytes(broken)
        for loads in (0, 1):
            made = importlib.reload(caller).called
            assert made(1) == 30
            assert len(made.stats.cache_hits) == loads, (len(broken), loads)
        [warning] = warnings
        assert str(path) in warning.getMessage() and warning.levelno == logging.WARNING and not warning.exc_info
        warnings.clear()
    print("passed")
"""


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A package with two loops, one of which calls the other in another file."""
    package = tmp_path / "p2ptrain"
    (package / "native").mkdir(parents=True)
    (package / "compression").mkdir()
    for name in ("", "compression", "native"):
        (package / name / "__init__.py").touch()
    for path in Path(kept.__file__).parent.glob("*.py"):
        if path.stem in ("compiled", "kept"):
            shutil.copy(path, package / "native")
    (package / "compression/caller.py").write_text(CALLER)
    write_callee(package, 2)
    return package


def write_callee(package: Path, number: int) -> None:
    (package / "compression/callee.py").write_text(CALLEE.format(number))


def start(package: Path, program: str, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    """In a process of its own, which compiles no modules to bytecode: as much is written in one second here."""
    inherited = {name: value for name, value in os.environ.items() if name != "NUMBA_CACHE_DIR"}
    environment = {**inherited, "PYTHONPATH": str(package.parent), "PYTHONDONTWRITEBYTECODE": "1", **environment}
    command = [sys.executable, "-c", program, *arguments]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment, cwd=package.parent)


def result(process: subprocess.Popen[str]) -> str:
    said, errors = process.communicate()
    assert process.returncode == 0, errors
    assert not errors
    return said.strip()


def run(package: Path, program: str = CALL, *arguments: str, **environment: str) -> str:
    return result(start(package, program, *arguments, **environment))


def folders(package: Path) -> list[Path]:
    return list((package / "__pycache__/loops").iterdir())


def test_what_is_kept_is_loaded_and_made_anew_where_only_what_it_calls_has_changed(copy: Path) -> None:
    assert run(copy) == "30 0"
    assert run(copy) == "30 1"
    write_callee(copy, 3)
    assert run(copy) == "40 0"
    assert run(copy) == "40 1"
    write_callee(copy, 2)
    assert run(copy) == "30 1"


def test_a_few_versions_are_kept(copy: Path) -> None:
    for number in range(FOLDERS + 2):
        write_callee(copy, number)
        assert run(copy) == f"{10 * (1 + number)} 0"
        assert len(folders(copy)) == min(number + 1, FOLDERS)
    assert run(copy) == f"{10 * (FOLDERS + 2)} 1"


def test_a_broken_file_is_compiled_anew_with_one_warning_that_names_it(copy: Path) -> None:
    assert run(copy) == "30 0"
    assert run(copy, TRUNCATE, str(copy / "__pycache__")) == "passed"


def test_processes_that_start_together_do_not_disturb_each_other(copy: Path) -> None:
    together = [start(copy, CALL) for _ in range(4)]
    assert {result(process) for process in together} <= {"30 0", "30 1"}
    assert run(copy) == "30 1"
    [folder] = folders(copy)
    assert {path.suffix for path in folder.iterdir()} == {".loop"}


def test_a_source_that_changes_while_a_process_runs_leaves_nothing_stale(copy: Path) -> None:
    program = f"""
from pathlib import Path
from p2ptrain.compression import callee
Path(callee.__file__).write_text({CALLEE.format(3)!r})
{CALL}
"""
    assert run(copy, program) == "30 0"
    assert not list(copy.rglob("*.loop"))
    assert run(copy) == "40 0"


def test_what_cannot_be_written_is_compiled_at_each_start(copy: Path, tmp_path: Path) -> None:
    (copy / "__pycache__").write_text("in the way")
    (tmp_path / "cache").write_text("in the way")
    for _ in range(2):
        assert run(copy, XDG_CACHE_HOME=str(tmp_path / "cache")) == "30 0"


def test_the_users_cache_and_numbas_setting_are_where_it_is_kept(copy: Path, tmp_path: Path) -> None:
    (copy / "__pycache__").write_text("in the way")
    for place in ({"XDG_CACHE_HOME": str(tmp_path / "cache")}, {"NUMBA_CACHE_DIR": str(tmp_path / "asked")}):
        assert run(copy, **place) == "30 0"
        assert run(copy, **place) == "30 1"
        assert list(Path(*place.values()).glob("p2ptrain/loops/*/*.loop"))


def test_where_others_can_write_nothing_is_loaded(copy: Path, tmp_path: Path) -> None:
    """What is loaded is run, and its name can be computed by anybody."""
    (copy / "__pycache__").write_text("in the way")
    places = {"NUMBA_CACHE_DIR": str(tmp_path / "asked"), "XDG_CACHE_HOME": "/dev/null"}
    assert run(copy, **places) == "30 0"
    (found,) = tmp_path.glob("asked/p2ptrain/loops/*")
    assert found.stat().st_mode & 0o777 == 0o700
    for folder in (found, found.parent):
        folder.chmod(0o777)
        assert run(copy, **places) == "30 0"
        folder.chmod(0o700)
    assert run(copy, **places) == "30 1"


def test_a_source_that_changed_since_the_start_has_nothing_loaded(copy: Path) -> None:
    """A module that is imported late may be another one than that which the folder was named for."""
    assert run(copy) == "30 0"
    late = """
from p2ptrain.native import kept
callee = kept.PACKAGE / "compression/callee.py"
callee.write_text(callee.read_text().replace("+ 2", "+ 3"))
"""
    assert run(copy, late + CALL) == "40 0"


def test_numba_may_be_told_not_to_compile(copy: Path) -> None:
    program = "from p2ptrain.compression.caller import called; print(called(1))"
    assert run(copy, program, NUMBA_DISABLE_JIT="1") == "30"


def test_sources_import_nothing_of_the_package_that_is_not_hashed() -> None:
    paths = [path for name in kept.SOURCES for path in (PACKAGE / name).rglob("*.py")]
    assert len(paths) > 20
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text())):
            imported = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            imported += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for name in imported:
                assert not name.startswith("p2ptrain") or name.split(".")[1] in kept.SOURCES, path


def test_every_loop_of_the_package_is_kept() -> None:
    import p2ptrain.optim.demo  # noqa: F401
    from p2ptrain.native.compiled import ALL

    assert len(ALL) > 30
    ours = [loop for loop in ALL if loop.py_func.__module__.startswith("p2ptrain.")]
    assert all(isinstance(loop._cache, kept.Kept) for loop in ours)
