"""Write docs/cli.md: every command with its arguments, options and defaults, and what each exit code means.

Commands are read from `p2ptrain.cli.main`, so what `--help` prints and what the document says are one text. Causes and
cures of exit codes stand below. `--check` writes nothing, prints what would change, and exits with 1 if anything would.
"""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

import typer

from p2ptrain.cli.main import app
from p2ptrain.cli.service import USELESS_AGAIN

PATH = Path(__file__).resolve().parent.parent / "docs/cli.md"

HEAD = """\
# Commands, options and exit codes

This reference is made of the commands themselves by `scripts/make_cli.py`; `p2ptrain COMMAND --help` prints the same.
[quickstart.md](quickstart.md) shows how they are used.

A setting of a peer comes from the first place that has it: its flag, the environment (`P2PTRAIN_PORT=4000` for
`--port`), `node.toml` in the home (`port = 4000`), the default.
[quickstart.md](quickstart.md#flags-of-every-peer) lists these settings.
"""

EXIT_HEAD = """\
## Exit codes

A command that fails prints one message on stderr, which names the cause, and after `try:` what to do next. Its exit
code says what kind of failure it was. In the messages below, `...` stands for names and numbers.
"""


class Failure(NamedTuple):
    """One row of the table of exit codes."""

    code: int
    #: parts of messages, in which ... stands for what differs from case to case; none: nothing is printed
    said: tuple[str, ...]
    cause: str
    cure: str


FAILURES = (
    Failure(0, (), "The command has done what it was asked. A peer has left in order, by Ctrl-C too.", ""),
    Failure(
        1,
        (),
        "The system has refused something, such as a file or a socket.",
        "Run it again with `-v -v`. `P2PTRAIN_DEBUG=1` shows the traceback.",
    ),
    Failure(1, (), "`status`: the peer runs and does not train.", "`p2ptrain status --why` prints its last decisions."),
    Failure(1, (), "`doctor`: something that it looked at fails.", "Each such line names its cure."),
    Failure(
        2,
        ("... exists", "which swarm?", "--metrics needs ..."),
        "The command line, an environment variable or `node.toml` makes no sense.",
        "The message names flag, variable or key. `--help` lists the flags.",
    ),
    Failure(
        3,
        ("unknown key", "is below the tokenizer's", "speaks protocol"),
        "The manifest is malformed, impossible, or of another version.",
        "The message names key, value and limit. Another protocol: install the version of p2ptrain that the run has.",
    ),
    Failure(
        4,
        ("is not a peer's address", "does not say which peer it leads to", "has no host and port"),
        "What should be a peer's address is none.",
        "Copy the whole line that the peer printed, with `/p2p/` and the id at its end.",
    ),
    Failure(
        5,
        ("cannot reach ...", "no answer from ...", "none of ... peers can be reached"),
        "Nobody answers at the addresses given.",
        "Is that peer running, and its port open? Take the line of another peer of the run. `p2ptrain doctor ADDR`.",
    ),
    Failure(
        5,
        ("has no peer left that we can find",),
        "For three minutes a joiner without any round has heard nobody who has one.",
        "Start a peer whose home has the run, then join it.",
    ),
    Failure(
        5,
        ("another peer answers there",),
        "The peer at that address has a new identity.",
        "Ask its owner for the line that it prints now.",
    ),
    Failure(
        6,
        ("this machine's clock is ...",),
        "The clock of this machine is wrong by more than the DHT allows.",
        "`sudo timedatectl set-ntp true`",
    ),
    Failure(
        7,
        ("port ... is in use", "is reserved for the system"),
        "Another process listens on the port, or the system keeps it for itself.",
        "Another `--port`, or `--port 0` for any that is free.",
    ),
    Failure(
        8,
        ("there is no run in this network", "there are several runs in this network"),
        "No run, or more than one, could be meant.",
        "`p2ptrain bootstrap run.toml` starts one; `--run NAME` chooses one of those that the message lists.",
    ),
    Failure(
        8,
        ("was bootstrapped by another owner already",),
        "Somebody has started the same run.toml, and the run lives in this network.",
        "Type the line that the message ends with: `p2ptrain join ADDR`.",
    ),
    Failure(
        9,
        ("none of ... peers hands out the run's ...", "hash to", "nothing to read in ..."),
        "The text is missing, cannot be read, or is not the one that the manifest names.",
        "`--data PATH` with the run's text, or join without `--data` and fetch it.",
    ),
    Failure(
        10,
        ("is in use by ...",),
        "A peer runs in this home already.",
        "`p2ptrain status` shows it; another `--home DIR` for a second one.",
    ),
    Failure(
        10,
        ("is in the run ...", "is in no run", "has no checkpoint yet"),
        "The home belongs to another run, or lacks what the command needs.",
        "Another `--home DIR`; or train there first.",
    ),
    Failure(
        10,
        ("cannot write to home ...", "cannot use ... as home"),
        "The disk is full, or the folder is not this user's.",
        "Make room, or choose another `--home DIR`.",
    ),
    Failure(
        10,
        ("takes part as this peer already",),
        "The home was copied, and its peer runs elsewhere.",
        "Stop the other one, or remove the file that the message names to be a peer of its own.",
    ),
    Failure(
        10,
        ("this machine has no ... device",),
        "The device asked for is not there.",
        "`--device cpu`",
    ),
    Failure(
        11,
        ("does not compute the bits the run requires",),
        "The self-test came to another result than the run's other peers.",
        "`--device cpu`",
    ),
    Failure(
        12,
        ("the libp2p daemon does not start",),
        "The process that does the networking does not come up.",
        "`-v -v` shows what it says; install hivemind again.",
    ),
    Failure(
        13,
        (),
        "`simulate`: something that must hold does not.",
        "Report it with the command that it prints last.",
    ),
    Failure(
        14,
        ("is for listed peers only",),
        "The run is not open, and this peer was not let in.",
        "`p2ptrain join ADDR --invite TOKEN`; or send what `p2ptrain id` prints to the run's owner.",
    ),
    Failure(
        14,
        ("does not take this invitation",),
        "It has expired, is used up, was revoked, or is for another peer or run.",
        "Ask for another one.",
    ),
    Failure(
        14,
        ("and may not invite", "does not have the owner's key of the run ..."),
        "Only the run's owner may do this, and this home is another one.",
        "Use the home that bootstrapped the run: `--home DIR`.",
    ),
    Failure(
        15,
        ("has revoked this peer",),
        "The run's owner has shut this peer out.",
        "Ask the owner for an invitation for another home.",
    ),
    Failure(
        16,
        ("trains a model of its owner's own", "needs the package ..."),
        "The model or its weights cannot be trained here, or are not the run's.",
        "The message names the extra to install, or the difference; [own-model.md](own-model.md).",
    ),
    Failure(
        17,
        ("no peer runs in home ...",),
        "The command is for a peer that runs, and none does in this home.",
        "`p2ptrain join`; or name its home with `--home DIR`.",
    ),
    Failure(
        17,
        ("does not answer within ...", "this peer does not train yet"),
        "The peer's process is stopped, or still fetches and compiles.",
        "`p2ptrain logs`, and again later.",
    ),
    Failure(
        18,
        ("a peer of this run needs ...",),
        "The machine, or its control group, allows less memory or disk than a peer of the run takes.",
        "A smaller model, room on the disk, or `--force`.",
    ),
    Failure(
        20,
        ("too little is left to take part",),
        "The month's transfer, as `--monthly-transfer` allows it, is used up.",
        "Start again on the day that the message names, or allow more. A service waits for that day by itself.",
    ),
    Failure(
        130, (), "Ctrl-C: twice, before training, or in a command that goes on until then, as `inspect --watch`.", ""
    ),
)


def cell(text: str) -> str:
    """Return text as it may stand in a cell of a table."""
    return " ".join(text.split()).replace("|", "\\|")


def usage(name: str, command: Any) -> str:
    """Return one line that shows in which order the arguments are given."""
    words = ["p2ptrain", name]
    for parameter in command.params:
        if parameter.param_type_name == "argument":
            shown = written(parameter, "")
            words.append(shown if parameter.required or shown.startswith("[") else f"[{shown}]")
    return " ".join([*words, "[OPTIONS]"])


def written(parameter: Any, record: str) -> str:
    """Return how a parameter is written: `--port N`, or `ADDR...` for an argument."""
    if parameter.param_type_name == "argument":
        choices = getattr(parameter.type_descriptor.annotation, "__args__", ())
        return str(parameter.metavar or ("|".join(choices) if choices else parameter.name.upper()))
    kinds = {"int": "N", "int range": "N", "float range": "X", "float": "X", "str": "TEXT", "list[str]": "TEXT"}
    return re.sub(r" <(.*)>$", lambda kind: " " + kinds.get(kind[1], kind[1]), record)


def row(parameter: Any, context: Any) -> tuple[str, str, str]:
    """Return how a parameter is written, what it means, and its default with the bounds that it has."""
    record, said = parameter.get_help_record(context)
    meaning, _, extra = said.partition("  [")
    default = "off" if getattr(parameter, "is_flag", False) or getattr(parameter, "count", False) else "none"
    bounds = []
    for part in extra.removesuffix("]").split("; ") if extra else []:
        if part.startswith("default: "):
            # In brackets it is words about a value, else the value.
            shown = part.removeprefix("default: ")
            default = shown[1:-1] if shown.startswith("(") else f"`{shown}`"
        elif part == "required":
            default = "must be given"
        else:
            bounds.append(bounds_in_words(part))
    return f"`{written(parameter, record)}`", meaning, "; ".join([default, *bounds])


def bounds_in_words(text: str) -> str:
    """Return `from 0 to 8` for `0<=x<=8`, and `from 1` for `x>=1`."""
    found = re.fullmatch(r"(?:(?P<least>\S+)<=)?x(?:<=(?P<most>\S+)|>=(?P<alone>\S+))?", text)
    if found is None:
        raise SystemExit(f"bounds that make_cli.py cannot read: {text}")
    least = found["least"] or found["alone"]
    said = (("from", least), ("to", found["most"]))
    return " ".join(f"{word} {float(number):,g}" for word, number in said if number)


def section(name: str, command: Any, parent: Any) -> str:
    """Return what there is to say of one command."""
    context = typer.Context(command, info_name=name, parent=parent)
    lines = [f"## {name}", "", *command.help.split("\n"), "", "```", usage(name, command), "```", ""]
    lines += ["| Argument or option | What it means | Default |", "| --- | --- | --- |"]
    lines += ["| " + " | ".join(map(cell, row(p, context))) + " |" for p in command.params]
    return "\n".join(lines) + "\n"


def exit_codes() -> str:
    """Return the table of exit codes."""
    lines = ["| Code | The message says | Cause | What to do |", "| --- | --- | --- | --- |"]
    before = None
    for code, said, cause, cure in FAILURES:
        shown = "" if code == before else f"{code}"
        lines.append(f"| {shown} | {', '.join(f'`{part}`' for part in said)} | {cell(cause)} | {cell(cure)} |")
        before = code
    useless = ", ".join(map(str, USELESS_AGAIN))
    after = (
        f"A peer that `p2ptrain service` runs is started again after a failure, but not after {useless}:\n"
        "a restart would not mend those. `service status` exits with what `systemctl status` exits with, and with 3\n"
        "where no service is installed."
    )
    return re.sub(r" {2,}", " ", "\n".join(lines)) + f"\n\n{after}\n"


def document() -> str:
    """Return docs/cli.md."""
    group: Any = typer.main.get_command(app)
    parent = typer.Context(group, info_name="p2ptrain")
    lines = ["| Command | What it does |", "| --- | --- |"]
    lines += [f"| [`{name}`](#{name}) | {cell(command.help)} |" for name, command in group.commands.items()]
    lines += ["| `p2ptrain --version` | Print the version and exit. |"]
    sections = [section(name, command, parent) for name, command in group.commands.items()]
    return "\n".join([HEAD, *lines, "", *sections, EXIT_HEAD, exit_codes()])


def main() -> None:
    """Write or check the document."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if it is out of date")
    check = parser.parse_args().check
    made, text = document(), PATH.read_text() if PATH.exists() else ""
    if made == text:
        return
    if check:
        name = "docs/cli.md"
        sys.stdout.writelines(difflib.unified_diff(text.splitlines(True), made.splitlines(True), name, name))
        print("run scripts/make_cli.py")
        sys.exit(1)
    PATH.write_text(made)
    print("wrote docs/cli.md")


if __name__ == "__main__":
    main()
