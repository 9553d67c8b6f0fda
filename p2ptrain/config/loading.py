"""run.toml to a manifest and back: a commented template, and errors that name the key, the value and the limit.

The comments of the template are the strings under the fields of the manifest's classes, so that there is one place that
says what a key means.
"""

from __future__ import annotations

import ast
import difflib
import inspect
import re
import secrets
import textwrap
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, get_args, get_origin

import msgspec

from p2ptrain.config import strategies
from p2ptrain.config.manifest import Manifest, Strategy
from p2ptrain.config.sizes import SIZES, Size
from p2ptrain.errors import ManifestError, P2PTrainError

Toml = dict[str, object]

_ONLY_WRITTEN = ("task", "config", "context", "lora", "tokens", "sources", "evaluation")
"""Keys that are not set by hand: where they are not set, they are not shown."""


def load_manifest(path: Path) -> Manifest:
    """Read a run.toml.

    Raises:
        ManifestError: no such file, not TOML, an unknown key, or a value out of range.
    """
    try:
        return parse_manifest(path.read_text(encoding="utf-8-sig"), path)
    except FileNotFoundError as error:
        raise ManifestError(f"no manifest at {path}", hint=f"p2ptrain init {path}") from error
    except OSError as error:
        raise ManifestError(f"cannot read {path}: {error.strerror}", hint="p2ptrain init run.toml") from error
    except UnicodeDecodeError as error:
        raise ManifestError(f"{path} is not UTF-8 text", hint=f"save {path} as UTF-8") from error


def parse_manifest(text: str, path: Path) -> Manifest:
    """The manifest that `text`, from the run.toml at `path`, describes.

    Raises:
        ManifestError: not TOML, an unknown key, or a value out of range.
    """
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ManifestError(f"{path} is not TOML: {error}", hint=f"correct {path}") from error
    reject_unknown_keys(table, Manifest, path)
    try:
        return msgspec.convert(strategies.completed(table), Manifest)
    except msgspec.ValidationError as error:
        problem, meaning = explain(error, table)
        raise ManifestError(f"{path}: {problem}", hint=f"correct it in {path}{meaning}") from error


def reject_unknown_keys(
    table: Toml,
    kind: type[msgspec.Struct],
    path: Path,
    *,
    prefix: str = "",
    error: type[P2PTrainError] = ManifestError,
) -> None:
    """Compare the keys of `table`, and of the tables in it, with the fields of `kind`.

    Raises:
        error: naming the unknown key and the known one that it resembles most.
    """
    fields = {field.name: field.type for field in msgspec.structs.fields(kind)}
    for key, value in table.items():
        if key not in fields:
            near = _elsewhere(key, kind) or difflib.get_close_matches(key, fields, 1, 0.5)
            hint = f"did you mean {prefix}{near[0]}?" if near else f"known keys here: {', '.join(fields)}"
            raise error(f"{path}: unknown key {prefix}{key}", hint=hint)
        inner = table_of(fields[key])
        if inner is None:
            continue
        for one in value if isinstance(value, list) else [value]:
            if isinstance(one, dict):
                reject_unknown_keys(one, inner, path, prefix=f"{prefix}{key}.", error=error)


def table_of(kind: object) -> type[msgspec.Struct] | None:
    """The class of a table, or of the tables of a list, where a field of type `kind` may be one; else None."""
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        return kind
    return next((found for inner in get_args(kind) if (found := table_of(inner)) is not None), None)


def _elsewhere(key: str, kind: type[msgspec.Struct]) -> list[str]:
    """A key of this name in one of the tables below: what was left out is its table's name."""
    return [
        f"{field.name}.{key}"
        for field in msgspec.structs.fields(kind)
        if isinstance(field.type, type)
        and issubclass(field.type, msgspec.Struct)
        and key in field.type.__struct_fields__
    ][:1]


def explain(error: msgspec.ValidationError, table: Toml) -> tuple[str, str]:
    """What is wrong with which value of `table`, in the words of a TOML file; and what that key means, or ""."""
    reason, _, position = str(error).partition(" - at `$")
    key = position.rstrip("`").removeprefix(".")
    if not key:
        return reason.removeprefix("Object is "), ""
    value, kind, doc = _look_up(table, key)
    if isinstance(value, dict) and not reason.startswith("Expected"):
        # From a check across keys, whose message names them.
        return f"{key}.{reason}", ""
    return f"{key} = {toml_value(value)}: {expectation(error, kind)}", f" ({key}: {doc})" if doc else ""


def expectation(error: msgspec.ValidationError, kind: object) -> str:
    """What a value of type `kind` should have been."""
    if get_origin(kind) is Literal:
        return f"expected one of {', '.join(map(repr, get_args(kind)))}"
    reason = str(error).partition(" - at `$")[0]
    return f"{reason[0].lower()}{reason[1:]}"


def _look_up(table: Toml, key: str) -> tuple[object, object, str]:
    """Value, type and meaning of a key such as `optimizer.matrix.topk` or `access.peers[0]`."""
    value: object = table
    kind: object = Manifest
    doc = ""
    for name, index in re.findall(r"(\w+)|\[(\d+)\]", key):
        if isinstance(value, list):
            value = value[int(index)]
        elif isinstance(value, dict) and (of := table_of(kind)) is not None:
            value, doc = value.get(name), field_docs(of).get(name, "")
            kind = next(field.type for field in msgspec.structs.fields(of) if field.name == name)
    return value, kind, doc


def new_manifest(
    name: str,
    strategy: Strategy = "demo",
    width: int | None = None,
    size: Size | None = None,
) -> Manifest:
    """A manifest with the strategy's defaults and a fresh nonce.

    Args:
        width: of a model other than the built-in one, which learning rates follow.
        size: of the built-in one; None: that of the demo.
    """
    table: Toml = {
        "name": name,
        "nonce": secrets.token_hex(16),
        "optimizer": {"strategy": strategy},
        "evaluation": {},
    }
    if size is not None:
        table |= SIZES[size].table()
    table = strategies.completed(table if width is None else table | {"model": {"embedding": width, "heads": 1}})
    return msgspec.convert(table if width is None else table | {"model": {}}, Manifest)


def render(manifest: Manifest) -> str:
    """The commented run.toml of a manifest: every key with its meaning, those that are not set, or follow from others,
    as a comment; `load_manifest` gives the manifest back.

    Owner and founder are left out: `bootstrap` fills them in, with the keys of the home that signs. So is `model` where
    another one is trained.
    """
    head = (
        "# What all peers of this run agree on. Its hash is the run's id: once bootstrapped,\n"
        "# a change makes a new run. Start it with: p2ptrain bootstrap run.toml\n\n"
    )
    follows = frozenset(f"optimizer.{name}" for name in strategies.followed(manifest))
    return head + "\n".join(_render(manifest, "", follows)).strip() + "\n"


def _render(table: msgspec.Struct, prefix: str, follows: frozenset[str] = frozenset()) -> Iterator[str]:
    docs = field_docs(type(table))
    inner: list[tuple[str, msgspec.Struct]] = []
    lists: list[tuple[str, tuple[msgspec.Struct, ...]]] = []
    for name in table.__struct_fields__:
        value = getattr(table, name)
        if name == "model" and isinstance(table, Manifest) and table.task_config is not None:
            if table.task_config.kind == "gpt":
                inner.append((name, value))
        elif isinstance(value, msgspec.Struct):
            inner.append((name, value))
        elif isinstance(value, tuple) and value and isinstance(value[0], msgspec.Struct):
            lists.append((name, value))
        elif name not in ("owner", "founder") and (value is not msgspec.UNSET or name not in _ONLY_WRITTEN):
            yield from _comment(docs[name])
            choice = f"{name} = {toml_value(_means(table, name) if value is msgspec.UNSET else value)}"
            yield f"# {choice}" if value is msgspec.UNSET or f"{prefix}{name}" in follows else choice
    # In TOML, what follows a table's header belongs to it: keys first.
    for name, value in inner:
        yield ""
        yield from _comment(docs.get(name) or inspect.getdoc(type(value)) or "")
        yield f"[{prefix}{name}]"
        yield from _render(value, f"{prefix}{name}.", follows)
    for name, values in lists:
        yield ""
        yield from _comment(docs[name])
        for number, value in enumerate(values):
            yield from [""] * (number > 0) + [f"[[{prefix}{name}]]"]
            for key in value.__struct_fields__:
                yield from _comment(field_docs(type(value))[key]) if not number else ()
                yield f"{key} = {toml_value(getattr(value, key))}"


def _means(table: msgspec.Struct, name: str) -> object:
    """What a key means that is not set: the first of its choices."""
    kind = next(field.type for field in msgspec.structs.fields(table) if field.name == name)
    return get_args(get_args(kind)[0])[0]


def _comment(text: str) -> list[str]:
    return [f"# {line}" for line in textwrap.wrap(text, 100)]


def toml_value(value: object) -> str:
    """`value` as TOML writes it."""
    if isinstance(value, (tuple, list)):
        return "[" + ", ".join(toml_value(item) for item in value) + "]"
    if isinstance(value, str) and '"' in value and "'" not in value and value.isprintable():
        return f"'{value}'"
    if isinstance(value, (str, int)):
        # JSON's strings, numbers and booleans are TOML's, except that it leaves DEL as it is.
        return msgspec.json.encode(value).decode().replace("\x7f", "\\u007f")
    return str(value)


def field_docs(kind: type) -> dict[str, str]:
    """The string under each field of a class: {field: text on one line}."""
    body = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0]
    assert isinstance(body, ast.ClassDef)
    found, last = {}, ""
    for node in body.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            last = node.target.id
            continue
        if last and isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            found[last] = " ".join(str(node.value.value).split())
        last = ""
    return found
