"""What a swarm does where peers are hard to reach: real processes in network namespaces, behind real NAT of nftables.

    python scripts/bench/reach.py --out docs/results/reach.json
    python scripts/bench/reach.py --only two_behind_nat --seconds 30

As root, on Linux, with `ip` and `nft`. A peer at home has a private address, and a router of its own: a namespace that
masquerades what goes out (RFC 4787's endpoint-independent filtering it is not: what comes in and answers nothing is
dropped). The network between has public addresses, which nothing outside of these namespaces sees.

- calm: three peers with public addresses;
- one_behind_nat, two_behind_nat: of three peers, one or two are at home;
- all_behind_nat: two peers are at home, and `p2ptrain meet` has a public address;
- address_changes: one of three gets another address, and after a while another one again;
- ipv6_alone: three peers that have nothing but IPv6;
- loss: for a minute, one of three loses a fifth of the packets that come.

Given are, of each: members, and those that say that nobody can dial them; of each peer, the share of its rounds that
have its contribution; rounds a minute, also as a share of those in calm; what `inspect` shows and what the peers said
of their addresses; whether a newcomer could join at each line that was printed; and what each line carried. `meet`
trains nothing, so what its line carries is relayed, but for the DHT. Each part is written once it is there. Prints one
JSON object last; exits with 1 where something does not hold.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from lab.counted import work_of
from lab.forked import Forks
from lab.lines import ip, prepare
from lab.report import Figures, finish, machine, note, write

from p2ptrain.config.home import Home
from p2ptrain.config.manifest import open_manifest
from p2ptrain.errors import P2PTrainError
from p2ptrain.peer.control import Ask, ask
from p2ptrain.state.journal import Journal
from p2ptrain.swarm.identity import verify

COUNT_SHARE = 0.95
WAIT_SECONDS = 600.0
"""For peers to start and to meet, on a machine that may be busy."""
CHANGE_SECONDS = 60.0
"""Records follow a changed address within this time."""
MANIFEST = """\
name = "reach"
nonce = "{nonce}"

[model]
layers = 1
heads = 2
embedding = 32
context = 32

[round]
pace = "fixed"
sequences_per_peer = 4
micro_batch = 4
root_interval = 16
"""
ROUTER = """\
table ip nat {
  chain out {
    type nat hook postrouting priority srcnat; policy accept;
    oifname "wan" masquerade
  }
}
table ip filter {
  chain through {
    type filter hook forward priority filter; policy drop;
    ct state established,related accept
    iifname "lan" accept
  }
  chain here {
    type filter hook input priority filter; policy accept;
    iifname "wan" ct state new drop
  }
}
"""
LOSS = """\
table inet lossy {
  chain here {
    type filter hook input priority filter; policy accept;
    numgen random mod 100 < 20 drop
  }
}
"""
TOLD_OF_ADDRESSES = ("dial", "new address", "relay", "address changed", "addresses")


def nft(namespace: str, rules: str) -> None:
    """Load rules there."""
    subprocess.run(["ip", "netns", "exec", namespace, "nft", "-f", "/dev/stdin"], input=rules, text=True, check=True)


class World:
    """The network between, and who is on it; gone when the context is left."""

    def __init__(self, *, ipv6: bool = False) -> None:
        self._ipv6, self._prefix, self._made = ipv6, f"p2pr{os.getpid()}", list[str]()
        self._next = 10

    def __enter__(self) -> World:
        with contextlib.ExitStack() as undo:
            undo.callback(self.remove)
            self._between = self._namespace("between")
            ip("-n", self._between, "link", "add", "br0", "type", "bridge")
            ip("-n", self._between, "link", "set", "br0", "up")
            undo.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def remove(self) -> None:
        """Take all of it down."""
        for name in self._made:
            with contextlib.suppress(subprocess.CalledProcessError):
                ip("netns", "del", name)

    def _namespace(self, name: str) -> str:
        full = f"{self._prefix}-{name}"
        ip("netns", "add", full)
        self._made.append(full)
        ip("-n", full, "link", "set", "lo", "up")
        return full

    def _address(self) -> str:
        self._next += 1
        return f"2a0b:f4c0:7::{self._next:x}/64" if self._ipv6 else f"45.77.1.{self._next}/24"

    def _add_address(self, namespace: str, device: str) -> str:
        address = self._address()
        ip("-n", namespace, "addr", "add", address, "dev", device, *(["nodad"] if self._ipv6 else []))
        return address

    def _plug_in(self, namespace: str, device: str, port: str) -> None:
        ip("-n", self._between, "link", "add", port, "type", "veth", "peer", "name", device, "netns", namespace)
        ip("-n", self._between, "link", "set", port, "master", "br0", "up")
        ip("-n", namespace, "link", "set", device, "up")
        self._add_address(namespace, device)

    def public(self, name: str) -> str:
        """Return a namespace that everybody can dial."""
        namespace = self._namespace(name)
        self._plug_in(namespace, "eth0", f"to-{name}")
        return namespace

    def home(self, name: str) -> str:
        """Return a namespace with a private address, behind a router of its own."""
        router, namespace = self._namespace(f"router-{name}"), self._namespace(name)
        self._plug_in(router, "wan", f"to-{name}")
        ip("-n", router, "link", "add", "lan", "type", "veth", "peer", "name", "eth0", "netns", namespace)
        ip("-n", router, "link", "set", "lan", "up")
        ip("-n", router, "addr", "add", "192.168.1.1/24", "dev", "lan")
        ip("-n", namespace, "link", "set", "eth0", "up")
        ip("-n", namespace, "addr", "add", "192.168.1.5/24", "dev", "eth0")
        ip("-n", namespace, "route", "add", "default", "via", "192.168.1.1")
        ip("netns", "exec", router, "sysctl", "-qw", "net.ipv4.ip_forward=1")
        nft(router, ROUTER)
        return namespace

    def readdress(self, namespace: str) -> None:
        """Give one with a public address another one."""
        family = "inet6" if self._ipv6 else "inet"
        (link,) = json.loads(ip("-n", namespace, "-j", "addr", "show", "dev", "eth0"))
        for held in link["addr_info"]:
            if held["family"] == family and held["scope"] == "global":
                ip("-n", namespace, "addr", "del", f"{held['local']}/{held['prefixlen']}", "dev", "eth0")
        self._add_address(namespace, "eth0")


def carried(namespace: str) -> dict[str, int]:
    """Bytes so far."""
    (link,) = json.loads(ip("-n", namespace, "-s", "-j", "link", "show", "eth0"))
    return {"sent": link["stats64"]["tx"]["bytes"], "received": link["stats64"]["rx"]["bytes"]}


class Peer:
    """One `p2ptrain` process."""

    def __init__(self, part: Part, name: str, namespace: str, *command: str) -> None:
        self.name, self.namespace = name, namespace
        self.home, self.log, self.out = (part.folder / f"{name}{end}" for end in ("", ".log", ".out"))
        if part.tokens.exists() and command[0] != "meet":
            # Each would make the same tokens of the shipped text, for seconds of a core.
            shutil.copytree(part.tokens, self.home / "data")
        self.log.touch()
        self.out.touch()
        flags = ["--home", str(self.home), *(["--host", "::"] if part.ipv6 else [])]
        if command[0] != "meet":
            flags += ["--name", name, "--threads", "1", "-v", "--log-format", "json"]
        self.process = part.forks.start(namespace, [*command, *flags], self.out, self.log, {"TMPDIR": str(part.folder)})
        part.peers.append(self)

    def until(self, condition: Callable[[], Any], what: str, seconds: float = WAIT_SECONDS) -> Any:
        """Return what the condition returns once that is true. Raises RuntimeError."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and self.process.poll() is None:
            if value := condition():
                return value
            time.sleep(0.2)
        raise RuntimeError(f"{self.name}: not {what}:\n{self.log.read_text()[-3000:]}")

    def printed(self) -> list[str]:
        """Lines that others can join with, and an address to meet at."""
        text = self.out.read_text() + "\n".join(self.said(("others can join at a new address",)))
        return re.findall(r"(?:p2ptrain join|Meet at: ) (/\S+)", text)

    def said(self, words: Sequence[str]) -> list[str]:
        """What it has logged with one of these words in it."""
        lines = [line for line in self.log.read_text().splitlines() if line.startswith("{") and line.endswith("}")]
        entries = [json.loads(line) for line in lines]
        return [
            entry["message"]
            for entry in entries
            if "round" not in entry and entry["level"] != "debug" and any(word in entry["message"] for word in words)
        ]

    def status(self) -> dict[str, Any]:
        """What it answers; {} where it does not."""
        try:
            return ask(Home(self.home).control, Ask(), 30.0)
        except (P2PTrainError, OSError, ValueError):
            return {}

    @property
    def round(self) -> int:
        """The newest of its journal."""
        rounds = [int(path.name.split("-")[1]) for path in (self.home / "journal").glob("round-*")]
        return max(rounds, default=0)

    def is_member_of(self, count: int) -> bool:
        """Say whether it takes part in rounds of so many."""
        status = self.status()
        return status.get("state") == "training" and status.get("members") == count

    def rows(self) -> list[dict[str, Any]]:
        """What the members of its newest round say of themselves."""
        home = Home(self.home)
        journal = Journal(home.journal, open_manifest(home.manifest.read_bytes())[1], verify)
        return [{"uplink_kbit": row.uplink_kbit} for row in journal.read(journal.last).seal.rows]


class Part:
    """One scenario: a world, its peers, and what is measured of them."""

    def __init__(self, options: argparse.Namespace, forks: Forks, folder: Path, *, ipv6: bool = False) -> None:
        self.options, self.forks, self.folder, self.ipv6 = options, forks, folder, ipv6
        self.peers: list[Peer] = []
        self.world = World(ipv6=ipv6)
        #: what the first peer of the first scenario has made of the run's text
        self.tokens = folder.parent / "tokens"

    @property
    def training(self) -> list[Peer]:
        """Those that have a part in rounds."""
        return [peer for peer in self.peers if peer.name.startswith("peer")]

    def found(self, namespace: str, *flags: str) -> tuple[Peer, str]:
        """Have the run begin there; return its first peer and the line that it prints."""
        manifest = self.folder / "run.toml"
        manifest.write_text(MANIFEST.format(nonce=secrets.token_hex(16)))
        first = Peer(self, "peer0", namespace, "bootstrap", str(manifest), *flags)
        address: str = first.until(first.printed, "started")[0]
        if not self.tokens.exists():
            shutil.copytree(first.home / "data", self.tokens)
        return first, address

    def join(self, address: str, *namespaces: str) -> None:
        """Have peers join there, and wait until all are in one group."""
        for namespace in namespaces:
            Peer(self, f"peer{len(self.training)}", namespace, "join", address)
        count = len(self.training)
        for peer in self.training:
            peer.until(lambda p=peer: p.is_member_of(count), f"one of {count}")  # type: ignore[misc]

    def measure(self, during: Callable[[], None] | None = None) -> Figures:
        """Look for a while at a swarm that trains, in which `during` happens."""
        spared = self.training[0]
        first, began = spared.round, time.monotonic()
        before = {peer.name: carried(peer.namespace) for peer in self.peers}
        if during is not None:
            during()
        time.sleep(max(0.0, began + self.options.seconds - time.monotonic()))
        last, minutes = spared.round, (time.monotonic() - began) / 60
        after = {peer.name: carried(peer.namespace) for peer in self.peers}
        rows = spared.rows()
        shares = {peer.name: work_of(peer.home, spared.home, first, last).share for peer in self.training}
        shown = self.inspect(spared)
        joined = self.newcomers()
        found: Figures = {
            "members": len(rows),
            "members_that_nobody_can_dial": sum(not row["uplink_kbit"] for row in rows),
            "seconds": round(60 * minutes, 1),
            "rounds": last - first,
            "rounds_per_minute": round((last - first) / minutes, 2),
            "share_that_counts": shares,
            "carried_bytes": {
                name: {way: after[name][way] - before[name][way] for way in ("sent", "received")} for name in after
            },
            "inspect": shown,
            "said": {peer.name: peer.said(TOLD_OF_ADDRESSES) for peer in self.training},
            "joined": joined,
        }
        held = (
            len(rows) == len(self.training)
            and min(shares.values()) >= COUNT_SHARE
            and all(one["trains"] for one in joined)
            and not any("Traceback" in peer.log.read_text() for peer in self.peers)
        )
        return {**found, "holds": held}

    def inspect(self, peer: Peer) -> list[dict[str, Any]]:
        """What somebody beside that peer sees."""
        out, log = self.folder / "inspect.out", self.folder / "inspect.log"
        address = peer.printed()[-1]
        process = self.forks.start(peer.namespace, ["inspect", address, "--format", "json"], out, log, {})
        deadline = time.monotonic() + WAIT_SECONDS
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.2)
        try:
            peers = json.loads(out.read_text())["peers"]
        except (ValueError, KeyError):
            return [{"failed": log.read_text()[-500:]}]
        return [{key: one.get(key) for key in ("name", "state", "path")} for one in peers]

    def newcomers(self) -> list[dict[str, Any]]:
        """Whether a newcomer trains that was given the newest line of each peer, all of them at the same time."""
        begun = []
        for number, (peer, address) in enumerate(
            (peer, peer.printed()[-1]) for peer in list(self.peers) if peer.printed()
        ):
            name = f"guest{number}"
            guest = Peer(self, name, self.world.public(name), "join", address)
            begun.append((peer.name, address, guest, time.monotonic()))
        told = []
        for name, address, guest, began in begun:
            trains = True
            try:
                guest.until(lambda g=guest: g.status().get("state") == "training", "in rounds")  # type: ignore[misc]
            except RuntimeError as error:
                note(str(error))
                trains = False
            through = "relay" if "/p2p-circuit/" in address else "itself"
            seconds = round(time.monotonic() - began, 1)
            told.append({"line_of": name, "through": through, "trains": trains, "after_seconds": seconds})
        return told

    def end(self) -> None:
        """End all, the first ones last."""
        for peer in reversed(self.peers):
            peer.process.end(30.0)


# ---- the scenarios ---------------------------------------------------------------------------------------------


def calm(part: Part) -> Figures:
    world = part.world
    _, address = part.found(world.public("a"))
    part.join(address, world.public("b"), world.public("c"))
    return part.measure()


def one_behind_nat(part: Part) -> Figures:
    world = part.world
    _, address = part.found(world.public("a"))
    part.join(address, world.public("b"), world.home("c"))
    return part.measure()


def two_behind_nat(part: Part) -> Figures:
    world = part.world
    _, address = part.found(world.public("a"))
    part.join(address, world.home("b"), world.home("c"))
    return part.measure()


def all_behind_nat(part: Part) -> Figures:
    world = part.world
    meeting = Peer(part, "meet", world.public("m"), "meet")
    where = meeting.until(meeting.printed, "started")[0]
    first, _ = part.found(world.home("a"), "--initial-peers", where)
    first.until(lambda: any("/p2p-circuit/" in line for line in first.printed()), "reached through a relay")
    part.join(first.printed()[-1], world.home("b"))
    found = part.measure()
    bytes_ = found["carried_bytes"]["meet"]
    found["relayed_bytes_per_round"] = round(bytes_["sent"] / max(1, found["rounds"]))
    return found


def address_changes(part: Part) -> Figures:
    world = part.world
    _, address = part.found(world.public("a"))
    moving = world.public("c")
    part.join(address, world.public("b"), moving)
    peer, followed = part.training[-1], list[float]()

    def move() -> None:
        for _ in range(2):
            lines = len(peer.printed())
            world.readdress(moving)
            began = time.monotonic()
            peer.until(lambda n=lines: len(peer.printed()) > n, "at its new address")  # type: ignore[misc]
            followed.append(round(time.monotonic() - began, 1))
            time.sleep(part.options.seconds / 3)

    found = part.measure(move)
    found["new_line_after_seconds"] = followed
    found["holds"] = found["holds"] and max(followed) <= CHANGE_SECONDS
    return found


def ipv6_alone(part: Part) -> Figures:
    return calm(part)


def loss(part: Part) -> Figures:
    world = part.world
    _, address = part.found(world.public("a"))
    lossy = world.public("c")
    part.join(address, world.public("b"), lossy)

    def lose() -> None:
        nft(lossy, LOSS)
        time.sleep(60.0)
        nft(lossy, "delete table inet lossy\n")

    return part.measure(lose)


PARTS = {
    part.__name__: part
    for part in (calm, one_behind_nat, two_behind_nat, all_behind_nat, address_changes, ipv6_alone, loss)
}


@contextlib.contextmanager
def played(options: argparse.Namespace, forks: Forks, name: str) -> Iterator[Part]:
    """A scenario whose peers have ended when the context is left."""
    with tempfile.TemporaryDirectory(prefix=f"reach-{name}-", dir=options.scratch) as folder:
        part = Part(options, forks, Path(folder), ipv6=name == "ipv6_alone")
        with part.world:
            try:
                yield part
            finally:
                part.end()


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60.0, help="of each part (default: 60)")
    parser.add_argument("--only", choices=list(PARTS), action="append")
    parser.add_argument("--scratch", type=Path, help="folder for homes and logs")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    prepare(parser)
    found: Figures = {**machine()}
    with tempfile.TemporaryDirectory(prefix="reach-", dir=options.scratch) as scratch, Forks() as forks:
        options.scratch = Path(scratch)
        for name in options.only or PARTS:
            note(name)
            with played(options, forks, name) as part:
                found[name] = PARTS[name](part)
            if "calm" in found:
                calm_rate = found["calm"]["rounds_per_minute"]
                found[name]["of_calm"] = round(found[name]["rounds_per_minute"] / max(calm_rate, 1e-9), 3)
            note(json.dumps(found[name]))
            write(options.out, found)
    finish(options.out, found)
    return int(not all(found[name]["holds"] for name in options.only or PARTS))


if __name__ == "__main__":
    sys.exit(main())
