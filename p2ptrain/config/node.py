"""Settings of one node, which are its owner's business alone: port, name, device. The manifest has what peers agree on.

Every value comes from the first place that has it: flag, environment (`P2PTRAIN_*`), `node.toml` in the home, what the
home remembers, default. Each keeps a note of that place, for error messages and for `explain`.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from p2ptrain.config.amounts import parse_amount, parse_rate
from p2ptrain.config.home import Home, default_home
from p2ptrain.config.loading import expectation, field_docs, reject_unknown_keys, toml_value
from p2ptrain.config.volunteer import Volunteer
from p2ptrain.errors import UsageError

ENVIRONMENT_PREFIX = "P2PTRAIN_"

_Amount = Annotated[str, Meta(max_length=32)]
_AMOUNTS = {"upload_limit": parse_rate, "download_limit": parse_rate, "monthly_transfer": parse_amount} | {
    "max_memory": parse_amount,
    "max_disk": parse_amount,
    "gpu_memory": parse_amount,
}


class NodeTable(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What node.toml may hold."""

    name: Annotated[str, Meta(max_length=64, pattern=r"^[ -~]*\Z")] = ""
    """Name that other peers show, in printable ASCII; empty: the end of the peer id."""
    port: Annotated[int, Meta(ge=0, le=65535)] = 0
    """TCP port to listen on; 0: a free one, remembered in the home."""
    host: Annotated[str, Meta(min_length=1, max_length=64)] = "0.0.0.0"
    """IP address to listen on; 127.0.0.1 keeps the peer on this machine."""
    announce: tuple[Annotated[str, Meta(min_length=1, max_length=256)], ...] = ()
    """Addresses to hand out instead of those found, as multiaddr or HOST:PORT, for a port forwarded by a router."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to compute; auto: cuda, else mps, else cpu."""
    threads: Annotated[int, Meta(ge=0, le=1024)] = 0
    """CPU threads to compute with; 0: one per core."""
    metrics: tuple[Annotated[str, Meta(min_length=1, max_length=256)], ...] = ()
    """Where figures of each round go: HOST:PORT for Prometheus, PATH.jsonl, tensorboard:FOLDER, wandb:PROJECT or
    trackio:PROJECT."""
    micro_batch: Annotated[int, Meta(ge=1, le=2**20)] | Annotated[str, Meta(pattern=r"^(run|auto|[1-9]\d{0,5})\Z")] = (
        "run"
    )
    """Sequences that are computed at once: as many as the run says, halved until they fit; auto: also more, where that
    is faster; or a number."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of products in a peer's own gradients; auto: bfloat16 where that is faster."""
    recompute: bool = False
    """Keep little of a forward pass and compute the rest again in the backward pass: less memory, a third more time."""
    checkpoint_every: Annotated[int, Meta(ge=0, le=10_000_000)] = 0
    """Seconds between two checkpoints; 0: as they cost, under 1 % of the time and under 20 GB a day."""
    checkpoints_kept: Annotated[int, Meta(ge=1, le=1000)] = 1
    """Checkpoints that stay, the newest among them."""
    checkpoint_kept_every: Annotated[int, Meta(ge=0, le=1_000_000_000)] = 0
    """Rounds of each stretch of which one checkpoint more stays; 0: none."""
    upload_limit: _Amount = ""
    """Most that this peer sends, as 1Mbit or 500kbit, or 2MB for bytes a second; empty: no limit."""
    download_limit: _Amount = ""
    """Most that this peer lets come, in the units of upload_limit; empty: no limit."""
    monthly_transfer: _Amount = ""
    """Most that this peer carries in a month of UTC, both ways together, as 200GB; empty: no limit."""
    nice: Annotated[int, Meta(ge=0, le=19)] = 0
    """How far the commands' processes give way to others on this machine; 19: they take what nobody else wants."""
    max_memory: _Amount = ""
    """Most memory that the commands' process may hold, as 6GB, beside mapped files; empty: no limit."""
    max_disk: _Amount = ""
    """Most that the home may hold, as 20GB; where it is reached, old files go, and then the peer pauses; empty: any."""
    gpu_memory: _Amount = ""
    """Most memory of a CUDA device that this peer takes, as 8GB; empty: no limit."""
    log_format: Literal["text", "json"] = "text"
    """Form of the log on stderr."""
    volunteer: Volunteer = Volunteer()
    """When this machine may be used."""


class NodeSettings(NodeTable, frozen=True, kw_only=True):
    """The settings in force."""

    home: Path
    """Directory of identity, checkpoints and journal."""
    origins: dict[str, str]
    """{setting: where its value comes from}."""


def resolve_settings(
    home: Path | None = None, flags: Mapping[str, object] | None = None, environment: Mapping[str, str] = os.environ
) -> NodeSettings:
    """Settle every setting. In `flags`, None and empty sequences mean that the flag was not given. Reads, never writes.

    Raises:
        UsageError: a value that does not fit, or an unknown key in node.toml.
    """
    origins: dict[str, str] = {}
    values: dict[str, Any] = {}
    if home is None:
        home = default_home(environment)
        origins["home"] = f"{ENVIRONMENT_PREFIX}HOME" if environment.get(f"{ENVIRONMENT_PREFIX}HOME") else "default"
    else:
        origins["home"] = "--home"
    given = {key: value for key, value in (flags or {}).items() if value is not None and value != [] and value != ()}
    from_file = _read_node_toml(Home(home).node_settings)
    remembered = {"port": port} if (port := Home(home).remembered_port()) else {}
    if remembered and from_file.get("port") == 0:
        del from_file["port"]
    for field in msgspec.structs.fields(NodeTable):
        key = field.name
        if key == "volunteer":
            origins[key], values[key] = _volunteer(given, environment, from_file, home / "node.toml")
            continue
        variable = f"{ENVIRONMENT_PREFIX}{key.upper()}"
        if key in given:
            origin, value = f"--{key.replace('_', '-')}", given[key]
        elif environment.get(variable):
            origin, value = variable, _from_text(environment[variable], field.type)
        elif key in from_file:
            origin, value = str(home / "node.toml"), from_file[key]
        elif key in remembered:
            origin, value = str(Home(home).port), remembered[key]
        else:
            origin, value = "default", field.default
        origins[key] = origin
        values[key] = _checked(key, value, field.type, origin)
    return NodeSettings(home=home, origins=origins, **values)


def explain(settings: NodeSettings) -> Iterator[tuple[str, str, str]]:
    """Rows (setting, value as TOML, where it comes from)."""
    yield "home", toml_value(str(settings.home)), settings.origins["home"]
    for key in NodeTable.__struct_fields__:
        value = getattr(settings, key)
        table = value.enabled if isinstance(value, Volunteer) else value
        yield key, toml_value(table), settings.origins[key]


def _volunteer(
    given: Mapping[str, Any], environment: Mapping[str, str], from_file: Mapping[str, object], path: Path
) -> tuple[str, Volunteer]:
    """Return where it is from that this peer is a volunteer, or not, and what `[volunteer]` says; raises UsageError."""
    try:
        wish = msgspec.convert(from_file.get("volunteer", {}), Volunteer)
    except msgspec.ValidationError as error:
        reason, _, place = str(error).partition(" - at `$")
        key = place.strip("`.")
        name, docs = key.partition("[")[0], field_docs(Volunteer)
        meaning = f" ({name}: {docs[name]})" if name in docs else ""
        said = f"volunteer.{key}: {reason}" if key else f"[volunteer] {reason}"
        raise UsageError(f"{path}: {said}", hint=f"correct it in {path}{meaning}") from error
    variable = f"{ENVIRONMENT_PREFIX}VOLUNTEER"
    if "volunteer" in given:
        return "--volunteer", msgspec.structs.replace(wish, enabled=given["volunteer"])
    if environment.get(variable):
        enabled = _checked("volunteer", environment[variable], bool, variable)
        return variable, msgspec.structs.replace(wish, enabled=enabled)
    return (str(path) if "volunteer" in from_file else "default"), wish


def _read_node_toml(path: Path) -> dict[str, object]:
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}", hint="choose another home with --home DIR") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not TOML: {error}", hint=f"correct {path}") from error
    reject_unknown_keys(table, NodeTable, path, error=UsageError)
    return table


def _from_text(text: str, kind: object) -> object:
    """Variables are text: lists are separated by commas, and what should be a number is read as one later."""
    if kind is not str and getattr(kind, "__origin__", None) is tuple:
        return [part.strip() for part in text.split(",") if part.strip()]
    return text


def _checked(key: str, value: object, kind: Any, origin: str) -> object:
    try:
        checked = msgspec.convert(value, kind, strict=not origin.startswith(ENVIRONMENT_PREFIX))
        if key in _AMOUNTS:
            _AMOUNTS[key](checked)
        return checked
    except ValueError as error:  # as msgspec's are
        place = f"{origin}: {key}" if "/" in origin else origin
        expected = expectation(error, kind) if isinstance(error, msgspec.ValidationError) else str(error)
        raise UsageError(
            f"{place} = {toml_value(value)}: {expected}",
            hint=f"correct {origin} ({key}: {field_docs(NodeTable)[key]})",
        ) from error
