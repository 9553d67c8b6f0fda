"""`p2ptrain invite`: let somebody into a run that is not open to everyone."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from p2ptrain.cli.options import HomeOption, QuietOption, VerboseOption
from p2ptrain.cli.output import set_up_logging
from p2ptrain.config.home import Home, default_home
from p2ptrain.errors import AccessError, HomeError, UsageError

if TYPE_CHECKING:
    from p2ptrain.config.manifest import Manifest
    from p2ptrain.swarm.identity import Identity

_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
EXPIRES_MAX_SECONDS = 10 * 365 * 86_400


def invite(
    manifest: Annotated[
        Path | None,
        typer.Argument(metavar="[RUN.TOML]", help="Manifest of the run, as bootstrapped; default: this home's run."),
    ] = None,
    expires: Annotated[
        str, typer.Option("--expires", metavar="TIME", help="How long it is good, such as 90s, 30m, 12h or 7d.")
    ] = "7d",
    uses: Annotated[int, typer.Option("--uses", min=1, max=1024, help="How many peers may come in with it.")] = 1,
    peer: Annotated[
        str | None, typer.Option("--for", metavar="PEER_ID", help="The only peer that it is for, by its id.")
    ] = None,
    may_invite: Annotated[
        bool, typer.Option("--may-invite", help="Who comes in with it may invite others to the run.")
    ] = False,
    format: Annotated[Literal["text", "json"], typer.Option("--format", help="Form of the output.")] = "text",
    home: HomeOption = None,
    verbose: VerboseOption = 0,
    quiet: QuietOption = False,
) -> None:
    """Print an invitation, in the owner's name or this home's; whoever is given the line can come in with it."""
    set_up_logging(verbose, quiet)
    from p2ptrain.swarm.identity import parse_peer_id
    from p2ptrain.swarm.invitations import invite as make

    here = Home(home or default_home())
    until = int(time.time()) + seconds_of(expires)
    try:
        peer_id = b"" if peer is None else parse_peer_id(peer)
    except ValueError as error:
        raise UsageError(f"{peer!r} is not a peer's id", hint="the peer's owner sees it with: p2ptrain id") from error
    run, run_id = run_of(here, manifest)
    inviter = _inviter(here, run, run_id, may_invite)
    if run.access.mode == "list" and not peer_id:
        raise UsageError(
            "this run takes invitations for one peer only", hint="name it by what `p2ptrain id` prints there: --for ID"
        )
    invitation = make(inviter, run_id, expires=until, uses=uses, peer_id=peer_id, may_invite=may_invite)
    token, address = invitation.text(), _address(here)
    line = f"p2ptrain join {address} --invite {token}" if address else ""
    if format == "json":
        issued = {"run_id": run_id.hex(), "expires": until, "uses": uses, "for": peer, "may_invite": may_invite}
        print(json.dumps({"token": token, "join": line or None, **issued}))
        return
    print(token)
    if line:
        print(f"Join with:  {line}")


def seconds_of(text: str) -> int:
    """Return the length of a time such as 7d. Raises UsageError."""
    found = re.fullmatch(r"(\d{1,9})([smhd])", text)
    seconds = int(found[1]) * _SECONDS[found[2]] if found else 0
    if not 0 < seconds <= EXPIRES_MAX_SECONDS:
        raise UsageError(f"{text!r} is not a time of at most ten years", hint="a number and s, m, h or d: 90s, 12h, 7d")
    return seconds


def run_of(home: Home, manifest: Path | None) -> tuple[Manifest, bytes]:
    """Return the manifest and the id of the run of `home`, or of the run that it would bootstrap with a run.toml.

    Raises:
        ManifestError: the run.toml is none.
        HomeError: the home is in no run, or in another.
    """
    from p2ptrain.config.loading import load_manifest
    from p2ptrain.config.manifest import open_manifest, sign_manifest
    from p2ptrain.swarm.identity import format_peer_id, load_or_create_identity

    own = open_manifest(home.manifest.read_bytes()) if home.manifest.exists() else None
    if manifest is None:
        if own is None:
            raise HomeError(f"home {home.path} is in no run yet", hint="name its run.toml, or the home with --home DIR")
        return own
    loaded = load_manifest(manifest)
    home.create()
    peer_id = format_peer_id(load_or_create_identity(home.identity).peer_id)
    meant = open_manifest(sign_manifest(loaded, home.load_or_create_owner_key(), peer_id))
    if own is not None and own[1] != meant[1]:
        raise HomeError(
            f"home {home.path} is in the run {own[0].name!r} ({own[1].hex()[:16]}), not in that of {manifest}",
            hint="leave the run.toml out, or choose another home with --home DIR",
        )
    return meant


def owner_of(home: Home, manifest: Manifest) -> Identity | None:
    """Return the owner's key of a run, where this home has it. Raises HomeError."""
    from p2ptrain.swarm.identity import identity_of_key

    if not home.owner_key.exists():
        return None
    owner = identity_of_key(home.load_or_create_owner_key())
    return owner if owner.peer_id == manifest.owner_id else None


def _inviter(home: Home, manifest: Manifest, run_id: bytes, may_invite: bool) -> Identity:
    """Return who signs. Raises UsageError, AccessError."""
    from p2ptrain.swarm.identity import load_or_create_identity
    from p2ptrain.swarm.invitations import read_grant

    if manifest.access.mode == "open":
        raise UsageError("this run is open to everyone, without an invitation", hint="p2ptrain join ADDR")
    owner = owner_of(home, manifest)
    if owner is not None:
        return owner
    identity = load_or_create_identity(home.identity)
    grant = read_grant(home, identity.peer_id, run_id)
    listed = manifest.beginning(run_id).access.may_invite(identity.peer_id)
    if may_invite or not (listed or (manifest.access.mode == "invite" and grant and grant.issued.may_invite)):
        raise AccessError(
            "this home is not the run's owner, and may not invite" + (" who invites others" if may_invite else ""),
            hint="ask the owner, whose home has the file owner.key, to invite",
        )
    return identity


def _address(home: Home) -> str:
    """Return the address that this home's peer printed last; "" where it has none."""
    try:
        return home.address.read_text().strip()
    except OSError:
        return ""
