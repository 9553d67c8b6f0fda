"""Loads of hivemind what is asked for, and not all of it, which takes torch and more than a second.

A node needs hivemind's DHT and its libp2p. Each of its packages imports everything in it, and `import hivemind.dht`
also whatever trains: whoever only looks at a swarm would wait for that, and hold it in memory. Here such a package
becomes one that imports a name when somebody asks for it; what a name means stays as hivemind's own `__init__.py` says.
A package that somebody has imported before, or whose `__init__.py` does anything but import, stays as it is.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

PACKAGES = ("hivemind", "hivemind.dht", "hivemind.utils")
"""Those that import more than a node needs."""


def load_by_parts() -> None:
    """Have hivemind's packages, once they are imported, import names when they are asked for. Idempotent."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(MetaPathFinder):
    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name not in PACKAGES:
            return None
        spec = PathFinder.find_spec(name, path)
        declared = None if spec is None or spec.origin is None else _declared(Path(spec.origin).read_text())
        if spec is None or declared is None:
            return None
        spec.loader = _ByParts(*declared)
        return spec


class _ByParts(Loader):
    def __init__(self, origins: dict[str, tuple[str, str]], constants: dict[str, Any]) -> None:
        self._origins, self._constants = origins, constants

    def exec_module(self, module: ModuleType) -> None:
        vars(module).update(self._constants)
        origins, name = self._origins, module.__name__

        def get(attribute: str) -> Any:
            if attribute in origins:
                source, original = origins[attribute]
                value = getattr(importlib.import_module(source), original)
                setattr(module, attribute, value)
                return value
            if not attribute.startswith("__"):
                # hivemind's own import would have made its submodules attributes, too.
                found = f"{name}.{attribute}"
                if importlib.util.find_spec(found) is not None:
                    return importlib.import_module(found)
            raise AttributeError(f"module {name!r} has no attribute {attribute!r}")

        vars(module)["__getattr__"] = get


def _declared(source: str) -> tuple[dict[str, tuple[str, str]], dict[str, Any]] | None:
    """What an `__init__.py` imports, {name: (module, name there)}, and its constants; None: it does something else."""
    origins: dict[str, tuple[str, str]] = {}
    constants: dict[str, Any] = {}
    for statement in ast.parse(source).body:
        match statement:
            case ast.ImportFrom(module=str(module), names=names, level=0):
                origins |= {one.asname or one.name: (module, one.name) for one in names}
            case ast.Assign(targets=[ast.Name(id=target)], value=ast.Constant(value=value)):
                constants[target] = value
            case ast.Expr(value=ast.Constant()):
                pass
            case _:
                return None
    return origins, constants
