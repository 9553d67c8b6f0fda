"""`p2ptrain dashboard`: a page in the browser that shows a swarm."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import secrets
from typing import Annotated

import typer

from p2ptrain.cli.options import HomeOption, QuietOption, VerboseOption
from p2ptrain.cli.output import set_up_logging
from p2ptrain.config.home import Home, default_home
from p2ptrain.errors import UnreachableError, UsageError

_logger = logging.getLogger(__name__)


def dashboard(
    addresses: Annotated[
        list[str] | None,
        typer.Argument(metavar="ADDR...", help="Address of any peer of the swarm; default: the peer of this home."),
    ] = None,
    listen: Annotated[
        str,
        typer.Option(
            "--listen", metavar="HOST:PORT", help="Where the page is; elsewhere than on 127.0.0.1 with a token."
        ),
    ] = "127.0.0.1:8420",
    run: Annotated[
        str | None, typer.Option("--run", metavar="NAME|ID", help="Another run than that of the peer at ADDR.")
    ] = None,
    home: HomeOption = None,
    verbose: VerboseOption = 0,
    quiet: QuietOption = False,
) -> None:
    """Show a swarm on a page in the browser, and the past of this home's peer by a slider."""
    set_up_logging(verbose, quiet)
    try:
        import sse_starlette  # noqa: F401
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise UsageError(
            f"the dashboard needs {error.name}, which is not installed", hint="pip install 'p2ptrain[dashboard]'"
        ) from error
    from p2ptrain.cli.inspect import addresses_of, until_interrupted
    from p2ptrain.swarm.addresses import parse_addresses
    from p2ptrain.swarm.thread import new_network_loop

    host, port = _host_and_port(listen)
    here = Home(home or default_home())
    given = addresses or addresses_of(here)
    parse_addresses(given)
    with asyncio.Runner(loop_factory=new_network_loop) as runner:
        past = here if not addresses and here.manifest.exists() and any(here.events.glob("*")) else None
        if not runner.run(until_interrupted(_serve(given, run, here, host, port, past))):
            raise typer.Abort


def _host_and_port(listen: str) -> tuple[str, int]:
    host, _, port = listen.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise UsageError(f"--listen {listen}: not HOST:PORT", hint="--listen 127.0.0.1:8420")
    return host.strip("[]"), int(port)


def is_this_machine(host: str) -> bool:
    """Say whether an address to listen on can be reached from this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


async def _serve(addresses: list[str], choice: str | None, home: Home, host: str, port: int, past: Home | None) -> None:
    """Show the swarm at `addresses` until cancelled; where nobody is there, what the peer of `past` has seen of it."""
    import socket

    import uvicorn

    from p2ptrain.dashboard.app import make_app
    from p2ptrain.dashboard.source import HomeSource, SwarmSource
    from p2ptrain.peer.observing import Observer

    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listening = socket.create_server((host, port), family=family)
    except OSError as error:
        raise UsageError(
            f"--listen {host}:{port}: {error.strerror or error}", hint=f"--listen {host}:0 for any free port"
        ) from error
    with listening:
        shown = f"[{host}]" if ":" in host else host
        token = "" if is_this_machine(host) else secrets.token_urlsafe(18)
        hosts = frozenset({"127.0.0.1", "localhost", "[::1]", shown}) if not token else frozenset()
        observer: Observer | None = None
        try:
            observer = await Observer.create(addresses, choice, home)
        except UnreachableError as error:
            if past is None:
                raise
            _logger.debug("%s", error)
            _logger.warning("nobody of this swarm answers: the page shows it as the peer of this home saw it last")
        try:
            source = HomeSource(home) if observer is None else SwarmSource(observer)
            name = (await source.manifest())["run"]["name"]
            config = uvicorn.Config(
                make_app(source, token=token, hosts=hosts),
                log_config=None,
                access_log=False,
                timeout_graceful_shutdown=1,
            )
            server = uvicorn.Server(config)
            # Ctrl-C is this command's, which closes the observer, too; it is no error, as uvicorn would say.
            logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
            print(
                f"Dashboard of {name}:  "
                f"http://{shown}:{listening.getsockname()[1]}/{f'#token={token}' if token else ''}",
                flush=True,
            )
            await server._serve(sockets=[listening])
        finally:
            if observer is not None:
                await observer.close()
