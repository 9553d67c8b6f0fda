"""`p2ptrain inspect`: look at a swarm through the DHT, as an observer that trains nothing and is listed nowhere."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import sys
import time
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from p2ptrain.cli.options import HomeOption, QuietOption, VerboseOption
from p2ptrain.cli.output import printable, set_up_logging
from p2ptrain.config.home import Home, default_home
from p2ptrain.errors import UnreachableError, UsageError

if TYPE_CHECKING:
    from rich.console import Console

    from p2ptrain.observe.census import Inspection
    from p2ptrain.peer.observing import Observer

FILE_COLUMNS = 160
"""Width of the table where it does not go to a terminal."""
ROUNDS_SHOWN = 20
Format = Literal["table", "json", "jsonl"]
VIEW_WORDS = ("overview", "peers", "peer", "rounds", "dht", "manifest", "credit")


def inspect(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[ADDR...] [VIEW]",
            help="Address of any peer of the swarm; default: the peer of this home. Then what to show: "
            "overview, peers, peer ID, rounds, dht, manifest or credit.",
            show_default="overview",
        ),
    ] = None,
    run: Annotated[
        str | None, typer.Option("--run", metavar="NAME|ID", help="Another run than that of the peer at ADDR.")
    ] = None,
    format: Annotated[Format, typer.Option("--format", help="Form of the output; jsonl: an object a line.")] = "table",
    sort: Annotated[
        Literal["name", "state", "round", "tokens", "share", "late", "seen"],
        typer.Option("--sort", help="Order of peers."),
    ] = "name",
    watch: Annotated[bool, typer.Option("--watch", help="Look again every three seconds, until Ctrl-C.")] = False,
    home: HomeOption = None,
    verbose: VerboseOption = 0,
    quiet: QuietOption = False,
) -> None:
    """Show a swarm: its run, its peers, its rounds, its DHT."""
    set_up_logging(verbose, quiet)
    from p2ptrain.swarm.addresses import parse_addresses

    addresses, view, subject = parse_words(words or [])
    here = Home(home or default_home())
    if view == "credit" and not (addresses or watch or run) and _show_own_credit(here, format):
        return
    given = addresses or addresses_of(here)
    parse_addresses(given)
    from p2ptrain.swarm.thread import new_network_loop

    with asyncio.Runner(loop_factory=new_network_loop) as runner:
        shown = Shown(view, subject, format, sort, watch)
        if not runner.run(until_interrupted(_inspect(given, run, here, shown))):
            raise typer.Abort


def parse_words(words: list[str]) -> tuple[list[str], str, str]:
    """Return addresses, view, and the peer that view `peer` is of.

    Raises:
        UsageError: a view that there is not, or words after it.
    """
    at = next((n for n, word in enumerate(words) if word in VIEW_WORDS), len(words))
    addresses, view, rest = words[:at], words[at] if at < len(words) else "overview", words[at + 1 :]
    if view == "peer" and len(rest) != 1:
        raise UsageError(
            "which peer?", hint="p2ptrain inspect ADDR peer ID, with a name, an id, or its last characters"
        )
    if view != "peer" and rest:
        raise UsageError(f"what is {rest[0]!r}, after {view}?", hint=f"p2ptrain inspect ADDR {view}")
    for word in addresses:
        if word.isalpha():
            raise UsageError(
                f"{word!r} is neither an address nor a view", hint=f"p2ptrain inspect ADDR {'|'.join(VIEW_WORDS)}"
            )
    return addresses, view, rest[0] if rest else ""


class Shown:
    """How a view is shown."""

    def __init__(self, view: str, subject: str, format: str, sort: str, watch: bool) -> None:
        self.view, self.subject, self.format, self.sort, self.watch = view, subject, format, sort, watch


async def until_interrupted(work: Coroutine[None, None, None]) -> bool:
    """Run `work`; False when Ctrl-C or SIGTERM ended it, after it has cleaned up.

    Handlers of our own, because a shell starts background jobs with SIGINT ignored, and Python then leaves it so.
    """
    task = asyncio.ensure_future(work)
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    try:
        await task
    except asyncio.CancelledError:
        return False
    return True


def addresses_of(home: Home) -> list[str]:
    """How to reach the peer of this home, and those that it has met."""
    from p2ptrain.swarm.identity import format_peer_id, load_or_create_identity

    found: list[str] = []
    port = home.remembered_port()
    with contextlib.suppress(OSError):
        found += home.address.read_text().split()[:1]
    if home.identity.exists() and port:
        peer_id = format_peer_id(load_or_create_identity(home.identity).peer_id)
        found.append(f"/ip4/127.0.0.1/tcp/{port}/p2p/{peer_id}")
    try:
        met = json.loads(home.peers.read_text())
        found += [text for text in met if isinstance(text, str)][:16]
    except (OSError, ValueError):
        pass
    if not found:
        raise UsageError(f"home {home.path} has no peer to ask", hint="p2ptrain inspect ADDR")
    return list(dict.fromkeys(found))


async def _inspect(addresses: list[str], choice: str | None, home: Home, shown: Shown) -> None:
    from p2ptrain.peer.observing import Observer

    observer = await Observer.create(addresses, choice, home)
    try:
        while True:
            began = time.monotonic()
            await _show_view(observer, shown)
            if not shown.watch:
                return
            await asyncio.sleep(max(0.0, observer.pause_seconds - (time.monotonic() - began)))
    finally:
        await observer.close()


async def _show_view(observer: Observer, shown: Shown) -> None:
    from p2ptrain.observe.views import dht_view, manifest_view, peer_view, rounds_view, sorted_peers
    from p2ptrain.peer.observing import names_in, peer_named

    if shown.view == "manifest":
        _print(manifest_view(observer.manifest, observer.run_id), shown)
        return
    seen = await observer.look(whole_dht=shown.view == "dht")
    match shown.view:
        case "overview":
            show_overview(seen, shown.format, shown.watch)
        case "peers":
            whole = seen.as_json()
            peers = sorted_peers(seen.peers, shown.sort) if shown.sort != "name" else list(seen.peers)
            _print({"run": whole["run"], "health": whole["health"], "peers": peers}, shown, rows="peers")
        case "peer":
            peer = peer_named(seen, shown.subject)
            if peer is None:
                names = ", ".join(f"{one['name']} ({one['peer_id'][-8:]})" for one in seen.peers[:8])
                raise UsageError(
                    f"no peer, or more than one, is meant by {shown.subject!r}; there are {names or 'none'}",
                    hint="p2ptrain inspect ADDR peers",
                )
            _print(peer_view(seen, peer), shown, rows="rounds")
        case "rounds":
            _print(rounds_view(seen, ROUNDS_SHOWN if shown.format == "table" else 0), shown, rows="rounds")
        case "dht":
            _print(dht_view(seen), shown, rows="nodes")
        case "credit":
            from p2ptrain.calls.messages import CallError
            from p2ptrain.chain import SealError

            try:
                count = await observer.credit(_counting)
            except (CallError, SealError) as error:
                raise UnreachableError(str(error), hint="on a machine with a peer: p2ptrain inspect credit") from error
            _print({"run": seen.as_json()["run"]} | count.as_json(names_in(seen)), shown, rows="peers")


def _counting(done: int, of: int) -> None:
    if sys.stderr.isatty():
        print(
            f"\rcounting seals: {done:,} of {of:,} rounds", end="" if done < of else "\n", file=sys.stderr, flush=True
        )


def _show_own_credit(home: Home, format: str) -> bool:
    """Show what the seals in this home say; False: it keeps none."""
    if not home.seals.is_dir() or not home.manifest.exists():
        return False
    from p2ptrain.config.manifest import open_manifest
    from p2ptrain.observe.credit import count_in
    from p2ptrain.observe.projection import names_of

    manifest, run_id = open_manifest(home.manifest.read_bytes())
    count = count_in(home.seals, manifest)
    if not count.last:
        return False
    run = {"id": run_id.hex(), "name": manifest.name, "round": count.last}
    shown = Shown("credit", "", format, "name", False)
    _print({"run": run} | count.as_json(names_of(home.events)), shown, rows="peers")
    return True


# ---- drawing --------------------------------------------------------------------------------------------------------


def _print(value: dict[str, Any], shown: Shown, rows: str = "") -> None:
    """Print one view: for programs as it is, or line by line its `rows`; for people as tables."""
    if shown.format == "jsonl":
        for one in value[rows] if rows else [value]:
            print(json.dumps(one))
        sys.stdout.flush()
    elif shown.format == "json":
        # With --watch one object a line, for programs that read along.
        print(json.dumps(value, indent=None if shown.watch else 2), flush=True)
    else:
        console = _console(shown.watch)
        {
            "peers": _draw_peers,
            "peer": _draw_peer,
            "rounds": _draw_rounds,
            "dht": _draw_dht,
            "manifest": _draw_manifest,
            "credit": _draw_credit,
        }[shown.view](console, value)


def _console(watch: bool) -> Console:
    from rich.console import Console

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = FILE_COLUMNS
    if watch and console.is_terminal:
        console.clear()
    return console


def show_overview(seen: Inspection, format: str, watch: bool) -> None:
    """Print the overview."""
    if format != "table":
        print(json.dumps(seen.as_json(), indent=None if watch or format == "jsonl" else 2), flush=True)
        return
    from p2ptrain.cli import tables
    from p2ptrain.observe.evaluations import evaluation_lines

    console = _console(watch)
    value = seen.as_json()
    run, dht, overview = value["run"], value["dht"], value["overview"]
    of = f" of {overview['last_round']}" if overview["last_round"] else ""
    tables.line(
        console,
        f"run {run['name']} ({run['id'][:16]})  round {run['round']}{of}  state {run['state_id'][:16]}  "
        f"dht: {dht['nodes_alive']} nodes alive, {dht['nodes_dead']} dead",
    )
    style = {"ok": "green", "warn": "yellow", "fail": "bold red"}[value["health"]["level"]]
    tables.line(console, f"health: {value['health']['text']}", style)
    for text in _overview_lines(overview):
        tables.line(console, text)
    for branch in value["branches"]:
        names = ", ".join(branch["peers"])
        tables.line(console, f"branch {branch['state_id'][:16]} at round {branch['round']}: {names}", "yellow")
    columns = [
        tables.Column("name", 9, cut=True),
        tables.Column("peer", 8),
        tables.Column("state", 9),
        tables.Column("round", 9, right=True),
        tables.Column("state id", 6),
        tables.Column("tokens/s", 8, right=True),
        tables.Column("sent/round", 3, right=True),
        tables.Column("recv/round", 3, right=True),
        tables.Column("train loss", 5, right=True),
        tables.Column("device", 4),
        tables.Column("version", 2),
        tables.Column("seen", 7),
    ]
    tables.show(
        console,
        columns,
        [
            (
                peer["name"],
                peer["peer_id"][-8:],
                peer["state"],
                peer["round"],
                peer["state_id"][:8],
                f"{peer['tokens_per_second']:,.0f}",
                f"{peer['bytes_sent_per_round'] / 1000:,.1f} kB",
                f"{peer['bytes_received_per_round'] / 1000:,.1f} kB",
                _number(peer["train_loss"], 3),
                peer["device"],
                peer["version"],
                f"{peer['last_seen_seconds']:.0f} s ago",
            )
            for peer in value["peers"]
        ],
    )
    if seen.evaluation is not None:
        for text in evaluation_lines(seen.evaluation, {peer["peer_id"]: peer["name"] for peer in value["peers"]}):
            tables.line(console, text)
    for peer in value["peers"]:
        if peer["diverged"] is not None:
            told = f"{peer['name']} says that the run has diverged: {peer['diverged']}"
            tables.line(console, told, "yellow")
        refused = peer["refused_branch"]
        if refused is not None:
            branch = f"a branch up to round {refused['round']} (total {refused['total']}) that {refused['donor']} has"
            told = f"{peer['name']} refused {branch}, {refused['age_seconds']:.0f} s ago: {refused['why']}"
            tables.line(console, printable(told))


def _overview_lines(overview: dict[str, Any]) -> list[str]:
    from p2ptrain.cli.tables import count_text, seconds_text

    peers = ", ".join(f"{count} {state}" for state, count in overview["peers"].items()) or "none"
    loss = "" if overview["train_loss"] is None else f"  train loss {overview['train_loss']:.3f}"
    eta = "" if overview["eta_seconds"] is None else f"  done in {seconds_text(overview['eta_seconds'])}"
    lines = [f"peers: {peers}  {count_text(overview['tokens_per_second'])} tokens/s in all{loss}{eta}"]
    spent = overview["round_seconds"]
    if spent:
        parts = ", ".join(f"{part} {seconds:.2f} s" for part, seconds in spent.items())
        lines.append(f"a round takes {sum(spent.values()):.2f} s: {parts}")
    return lines


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.0f} %"


def _title(console: Console, value: dict[str, Any], text: str = "") -> None:
    from p2ptrain.cli import tables

    run = value["run"]
    at = f"  round {run['round']}" if "round" in run else ""
    tables.line(console, f"run {run['name']} ({run['id'][:16]}){at}{text}")


def _draw_peers(console: Console, value: dict[str, Any]) -> None:
    from p2ptrain.cli import tables

    _title(console, value)
    style = {"ok": "green", "warn": "yellow", "fail": "bold red"}[value["health"]["level"]]
    tables.line(console, f"health: {value['health']['text']}", style)
    columns = [
        tables.Column("name", 9, cut=True),
        tables.Column("peer", 8),
        tables.Column("state", 9),
        tables.Column("round", 8, right=True),
        tables.Column("path", 6),
        tables.Column("tokens/s", 7, right=True),
        tables.Column("share", 7, right=True),
        tables.Column("late", 7, right=True),
        tables.Column("parts", 3, right=True),
        tables.Column("compute", 4, right=True),
        tables.Column("exchange", 4, right=True),
        tables.Column("last fault", 6, cut=True),
        tables.Column("device", 5),
        tables.Column("version", 2),
        tables.Column("seen", 6),
    ]
    rows = []
    for peer in value["peers"]:
        spent = peer["round_seconds"] or {}
        fault = f"{peer['fault']}, round {peer['fault_round']}" if peer["fault"] else "-"
        rows.append(
            (
                peer["name"],
                peer["peer_id"][-8:],
                peer["state"],
                peer["round"],
                peer["path"],
                f"{peer['tokens_per_second']:,.0f}",
                _percent(peer["share"]),
                f"{peer['late']}/{peer['rounds']}" if peer["rounds"] else "-",
                peer["parts"] or "-",
                f"{spent['computing']:.2f} s" if spent else "-",
                f"{spent['exchange']:.2f} s" if spent else "-",
                fault,
                peer["device"],
                peer["version"],
                f"{peer['last_seen_seconds']:.0f} s ago",
            )
        )
    tables.show(console, columns, rows)


def _draw_peer(console: Console, value: dict[str, Any]) -> None:
    from p2ptrain.cli import tables
    from p2ptrain.cli.tables import bytes_text

    peer = value["peer"]
    _title(console, value)
    spent = peer["round_seconds"]
    evaluation = peer["evaluation"]
    facts = [
        ("name", peer["name"]),
        ("id", peer["peer_id"]),
        ("state", f"{peer['state']}, {peer['role']}, seen {peer['last_seen_seconds']:.0f} s ago"),
        ("stands at", f"round {peer['round']}, state {peer['state_id'][:16]}"),
        ("reached", {"client": "by nobody: it dials others"}.get(peer["path"], peer["path"])),
        ("addresses", ", ".join(peer["addresses"]) or "none"),
        ("device", f"{peer['device']}, p2ptrain {peer['version']}"),
        ("speed", f"{peer['tokens_per_second']:,.0f} tokens/s"),
        ("share of work", f"{_percent(peer['share'])} of the last rounds"),
        ("late", f"in {peer['late']} of its last {peer['rounds']} rounds"),
        ("last fault", f"{peer['fault']} in round {peer['fault_round']}" if peer["fault"] else "none"),
        ("train loss", _number(peer["train_loss"], 3)),
        (
            "last round",
            "-" if not spent else ", ".join(f"{part} {seconds:.2f} s" for part, seconds in spent.items()),
        ),
        (
            "traffic",
            f"{bytes_text(peer['bytes_sent_per_round'])} sent and "
            f"{bytes_text(peer['bytes_received_per_round'])} received a round",
        ),
        ("measured", "nothing" if evaluation is None else f"{evaluation['figures']} at round {evaluation['round']}"),
    ]
    for name, text in facts:
        tables.line(console, f"{name:<14}{text}")
    columns = [tables.Column(title, right=title != "what") for title in ("round", "sequences", "parts", "owed", "what")]
    rows = [
        (
            one["round"],
            one["sequences"] if one["included"] else "-",
            one["parts"],
            one["owed"],
            ", ".join(filter(None, ["sealed it" if one["sealed_it"] else "", one["fault"]])),
        )
        for one in value["rounds"][:ROUNDS_SHOWN]
    ]
    tables.show(console, columns, rows)


def _draw_rounds(console: Console, value: dict[str, Any]) -> None:
    from p2ptrain.cli import tables

    _title(console, value, "" if value["rounds"] else "  no peer hands out seals")
    columns = [
        tables.Column("round", 9, right=True),
        tables.Column("state id", 3),
        tables.Column("sealed by", 8, cut=True),
        tables.Column("turn", 7),
        tables.Column("included", 8, right=True),
        tables.Column("sequences", 5, right=True),
        tables.Column("skipped", 7, right=True),
        tables.Column("late", 8, cut=True),
        tables.Column("what else", 6, cut=True),
    ]
    rows = []
    for one in value["rounds"]:
        turn = "alone" if one["solo"] else f"takeover {one['place']}" if one["takeover"] else "its own"
        more = [f"{name}: {fault}" for name, fault in one["faults"].items()]
        more += [f"{name} {words}" for key, words in _ELSE.items() for name in one[key]]
        rows.append(
            (
                one["round"],
                one["state_id"][:8],
                one["sealer"],
                turn,
                f"{len(one['included'])}/{one['members']}",
                one["sequences"],
                f"{one['skipped_parts']}/{one['parts']}",
                ", ".join(one["late"]) or "-",
                "; ".join(more) or "-",
            )
        )
    tables.show(console, columns, rows)


_ELSE = {"joins": "admitted", "let_in": "let in", "shut_out": "shut out"}


def _draw_dht(console: Console, value: dict[str, Any]) -> None:
    from p2ptrain.cli import tables

    _title(console, value, f"  dht: {value['dht']['nodes_alive']} nodes alive, {value['dht']['nodes_dead']} dead")
    columns = [
        tables.Column("node", 9),
        tables.Column("answers", 8),
        tables.Column("name", 7, cut=True),
        tables.Column("record of this run", 6),
    ]
    rows = [
        (
            node["peer_id"],
            "yes" if node["alive"] else "no",
            node["name"] or "-",
            "none" if node["record_age_seconds"] is None else f"{node['record_age_seconds']:.1f} s old",
        )
        for node in value["nodes"]
    ]
    tables.show(console, columns, rows)
    listed = {node["peer_id"] for node in value["nodes"]}
    for record in value["records"]:
        if record["peer_id"] not in listed:
            age = record["last_seen_seconds"]
            text = f"record of {record['name']} ({record['peer_id'][-8:]}), {age:.1f} s old: no node of it is listed"
            tables.line(console, text)


def _draw_manifest(console: Console, value: dict[str, Any]) -> None:
    from p2ptrain.cli import tables
    from p2ptrain.observe.views import flat

    manifest = value["manifest"]
    tables.line(console, f"run {manifest['name']} ({value['run']['id']})")
    data, access = manifest["data"], manifest["access"]
    tables.line(console, f"data: {data['name']}, licence {data['license']}")
    for source in data.get("sources") or []:
        tables.line(console, f"  {source['name']}, licence {source['license']}  {source['url']}")
    who = {
        "open": "anyone",
        "list": "the founder, the peers listed, and whom the owner lets in",
        "invite": "the founder, the peers listed, and guests with an invitation",
    }[access["mode"]]
    tables.line(console, f"may come in: {who}")
    for key, text in flat(manifest):
        tables.line(console, f"  {key} = {text}")


def _draw_credit(console: Console, value: dict[str, Any]) -> None:
    from p2ptrain.cli import tables
    from p2ptrain.cli.tables import count_text

    _title(console, value)
    first, last = value["first_round"], value["last_round"]
    missing = f", of which {value['missing_rounds']} are missing" if value["missing_rounds"] else ""
    since = "all of the run" if value["complete"] else "not from its beginning on"
    tables.line(console, f"counted from the seals of rounds {first} to {last}{missing}: {since}")
    columns = [
        tables.Column("name", 9, cut=True),
        tables.Column("peer", 8),
        tables.Column("tokens", 9, right=True),
        tables.Column("share", 8, right=True),
        tables.Column("rounds", 8, right=True),
        tables.Column("uptime", 7, right=True),
        tables.Column("sealed", 5, right=True),
        tables.Column("parts", 5, right=True),
        tables.Column("owed", 5, right=True),
        tables.Column("first", 3, right=True),
        tables.Column("last", 3, right=True),
    ]
    rows = [
        (
            peer["name"] or "-",
            peer["peer_id"][-8:],
            count_text(peer["tokens"]),
            f"{100 * peer['share']:.1f} %",
            peer["rounds"],
            _percent(peer["uptime"]),
            peer["sealed"],
            peer["parts_reduced"],
            peer["parts_owed"],
            peer["first_round"],
            peer["last_round"],
        )
        for peer in value["peers"]
    ]
    tables.show(console, columns, rows)
