"""`p2ptrain status`: how the peer of a home is, as it says itself."""

from __future__ import annotations

import json
import time
from typing import Annotated, Any, Literal

import typer

from p2ptrain.cli.options import HomeOption
from p2ptrain.cli.output import printable
from p2ptrain.config.home import Home, default_home

ANSWER_SECONDS = 10.0
NOT_TRAINING = 1
"""Exit code of a peer that runs and does not train."""


def status(
    why: Annotated[bool, typer.Option("--why", help="Print the last decisions, too.")] = False,
    format: Annotated[Literal["text", "json"], typer.Option("--format", help="Form of the output.")] = "text",
    home: HomeOption = None,
) -> int:
    """Say how the peer of this home is; exit with 0 only where it trains."""
    from p2ptrain.peer.control import Ask, ask

    answer = ask(Home(home or default_home()).control, Ask(why), ANSWER_SECONDS)
    if format == "json":
        print(json.dumps(answer, indent=2))
    else:
        print(printable("\n".join(lines_of(answer))))
    return 0 if answer["state"] in ("training", "solo") else NOT_TRAINING


_GOES_ON = {
    "volunteering": "it goes on by itself once this machine is not wanted",
    "disk": "it goes on by itself once there is room",
}


def lines_of(answer: dict[str, Any]) -> list[str]:
    """What a peer answers, for people."""
    state, run = answer["state"], answer.get("run")
    of = f" of {answer['last_round']:,}" if answer.get("last_round") else ""
    said = [state if not answer["doing"] else f"{state}: {answer['doing']}"]
    if run is not None:
        said.append(f"run {run}, round {answer['round']:,}{of}")
    if state in ("training", "solo"):
        loss = "-" if answer["train_loss"] is None else f"{answer['train_loss']:.3f}"
        members = f"{answer['members']} member{'' if answer['members'] == 1 else 's'}"
        said.append(f"{members}, train loss {loss}, {answer['tokens_per_second']:,.0f} tokens/s")
    if answer["waits_for"]:
        said.append(f"waits for {answer['waits_for']}")
    if answer["paused_until"] is not None:
        said.append(f"until {time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(answer['paused_until']))}")
    if state == "paused":
        said.append(_GOES_ON.get(answer.get("paused_by") or "", "go on: p2ptrain resume"))
    said.append(f"process {answer['pid']}, for {answer['uptime_seconds']:,.0f} s, home {answer['home']}")
    refused = answer.get("refused_branch")
    if refused is not None:
        said.append(f"refused a branch up to round {refused['round']} that {refused['donor']} has: {refused['why']}")
    if "decisions" in answer and answer.get("volunteering"):
        said.append(_use_of(answer["volunteering"]))
    if "decisions" in answer:
        said.append("the last events, at seconds from now, and what each led to:")
        said += answer["decisions"]
    return said


def _use_of(seen: dict[str, Any]) -> str:
    """What a volunteer sees of its machine."""
    shown = []
    if seen["idle_seconds"] is not None:
        shown.append(f"keyboard and mouse idle for {seen['idle_seconds']:,.0f} s")
    if seen["other_load_percent"] is not None:
        shown.append(f"other programs at {seen['other_load_percent']:.0f} % of the cores")
    for key, yes, no in (("on_battery", "on battery", "not on battery"), ("on_metered", "metered", "not metered")):
        if seen[key] is not None:
            shown.append(yes if seen[key] else no)
    wanted = f"wanted: {seen['wanted']}" if seen["wanted"] else "not wanted"
    not_seen = f"; cannot see: {'; '.join(seen['not_seen'])}" if seen["not_seen"] else ""
    return f"volunteer, machine {wanted} ({', '.join(shown) or 'nothing is seen'}){not_seen}"
