"""run.toml to a manifest and back: a commented template, and errors that name the key."""

from __future__ import annotations

import ast
import difflib
import inspect
import secrets
import textwrap
import tomllib
from pathlib import Path

import msgspec

from p2ptrain.config.manifest import Manifest
from p2ptrain.errors import ManifestError


def load_manifest(path: Path) -> Manifest:
    """Read a run.toml.

    Raises:
        ManifestError: no such file, not TOML, an unknown key, or a value out of range.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ManifestError(f"no manifest at {path}", hint=f"p2ptrain init {path}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ManifestError(f"{path} is not TOML: {error}", hint=f"correct {path}, or write a new one: p2ptrain init") from error
    _check_keys(table, Manifest, "", path)
    try:
        return msgspec.convert(table, Manifest)
    except (msgspec.ValidationError, ValueError) as error:
        raise ManifestError(f"{path}: {error}", hint=f"correct the value in {path}") from error


def _check_keys(table: dict[str, object], kind: type[msgspec.Struct], prefix: str, path: Path) -> None:
    fields = {field.name: field.type for field in msgspec.structs.fields(kind)}
    for key, value in table.items():
        if key not in fields:
            near = difflib.get_close_matches(key, fields, 1, 0.5)
            hint = f"did you mean {prefix}{near[0]}?" if near else f"known keys here: {', '.join(fields)}"
            raise ManifestError(f"{path}: unknown key {prefix}{key}", hint=hint)
        inner = fields[key]
        if isinstance(value, dict) and isinstance(inner, type) and issubclass(inner, msgspec.Struct):
            _check_keys(value, inner, f"{prefix}{key}.", path)


def new_manifest(name: str) -> Manifest:
    """A manifest with the defaults and a fresh nonce."""
    return Manifest(name=name, nonce=secrets.token_hex(16))


def render(manifest: Manifest) -> str:
    """The commented run.toml of a manifest: every key with its meaning; `load_manifest` gives the manifest back."""
    head = (
        "# What all peers of this run agree on. Its hash is the run's id: once bootstrapped, a change makes a new run.\n"
        "# Start it with: p2ptrain bootstrap run.toml\n\n"
    )
    return head + "\n".join(_render(manifest, "")).strip() + "\n"


def _render(table: msgspec.Struct, prefix: str) -> list[str]:
    docs = _field_docs(type(table))
    lines: list[str] = []
    tables: list[str] = []
    for field in msgspec.structs.fields(table):
        value = getattr(table, field.name)
        doc = textwrap.wrap(docs.get(field.name, ""), 110)
        comments = [f"# {line}" for line in doc]
        if isinstance(value, msgspec.Struct):
            inner = _render(value, f"{prefix}{field.name}.")
            tables += ["", *comments, f"[{prefix}{field.name}]", *inner]
        elif field.name == "owner":
            continue
        else:
            lines += [*comments, f"{field.name} = {_toml(value)}"]
    return lines + tables


def _toml(value: object) -> str:
    if isinstance(value, tuple):
        return "[" + ", ".join(_toml(v) for v in value) + "]"
    return msgspec.json.encode(value).decode()


def _field_docs(kind: type) -> dict[str, str]:
    """The string under each field of a class."""
    body = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0]
    assert isinstance(body, ast.ClassDef)
    found, last = {}, ""
    for node in body.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            last = node.target.id
        elif last and isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            found[last] = " ".join(str(node.value.value).split())
            last = ""
        else:
            last = ""
    return found
