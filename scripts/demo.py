"""Trains a swarm of three peers on this machine, as three people would, and shows what came of it.

Everything is done by the commands that a user types, in three homes under demo-output/. Peers compute with one thread
each, so that three of them share two cores fairly. Takes under four minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, TextIO

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from rich.console import Console
from rich.table import Table

from p2ptrain.config.loading import load_manifest

OUT = Path("demo-output")
PEERS = ("ada", "grace", "linus")
ROUNDS = 220
THREADS = 1
"""Of each peer."""
LIMIT_SECONDS = 420.0
P2PTRAIN = [sys.executable, "-m", "p2ptrain"]

console = Console(highlight=False)


class Peer:
    """One peer's process, its join line and what it logged."""

    def __init__(self, name: str, *command: str) -> None:
        self.name, self.home = name, OUT / name
        self._log: TextIO = (OUT / f"{name}.log").open("w")
        flags = ["--home", str(self.home), "--name", name, "--host", "127.0.0.1", "--threads", str(THREADS)]
        self.process = subprocess.Popen(
            [*P2PTRAIN, *command, *flags, "--log-format", "json"],
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )

    def address(self) -> str:
        """What the peer printed for others to join with."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            found = re.search(r"p2ptrain join (\S+)", line)
            if found:
                return found[1]
        raise SystemExit(f"{self.name} did not start; see {self._log.name}")

    def rounds(self) -> list[dict[str, Any]]:
        """What it logged of its rounds so far."""
        lines = (OUT / f"{self.name}.log").read_text().splitlines()
        entries = [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]
        return [entry for entry in entries if "round" in entry]

    def stop(self) -> None:
        """End it if it still runs."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self._log.close()


def p2ptrain(*arguments: str) -> str:
    """Run one command to its end and return what it printed."""
    return subprocess.run([*P2PTRAIN, *arguments], check=True, stdout=subprocess.PIPE, text=True).stdout


def write_manifest() -> Path:
    """`p2ptrain init`, and what makes a run end: its last round, and the learning rate's."""
    path = OUT / "run.toml"
    p2ptrain("init", str(path))
    text = path.read_text()
    for key, before in (("last_round", 0), ("total_rounds", 2000)):
        text = text.replace(f"{key} = {before}\n", f"{key} = {ROUNDS}\n")
    path.write_text(text)
    return path


def watch(peers: list[Peer]) -> None:
    """Say how far the run is until every peer has left."""
    deadline = time.monotonic() + LIMIT_SECONDS
    shown = inspected = 0
    with console.status("training") as status:
        while any(peer.process.poll() is None for peer in peers):
            if time.monotonic() > deadline:
                raise SystemExit(f"not done after {LIMIT_SECONDS:.0f} s; see {OUT}/*.log")
            for peer in peers:
                if peer.process.poll() not in (None, 0):
                    raise SystemExit(f"{peer.name} failed; see {OUT}/{peer.name}.log")
            rounds = peers[0].rounds()
            if rounds and rounds[-1]["round"] >= shown + 10:
                shown = rounds[-1]["round"]
                status.update(rounds[-1]["message"])
                if not console.is_terminal:
                    console.print(rounds[-1]["message"], soft_wrap=True)
            if shown >= ROUNDS // 2 and not inspected:
                inspected = shown
                console.print("\nWhat an observer sees meanwhile ([bold]p2ptrain inspect[/bold]):")
                console.print(p2ptrain("inspect", "--home", str(peers[-1].home)), soft_wrap=True)
            time.sleep(0.5)


def draw(peers: list[Peer]) -> Path:
    """The loss of every peer, round by round."""
    figure, axes = pyplot.subplots(figsize=(8, 4.5))
    for peer in peers:
        points = [(entry["round"], entry["train_loss"]) for entry in peer.rounds() if entry["train_loss"] is not None]
        axes.plot(*zip(*points, strict=True), label=peer.name, linewidth=1)
    axes.set(xlabel="round", ylabel="training loss (nats a token)", title="Three peers, one model, no server")
    axes.legend()
    axes.grid(alpha=0.3)
    path = OUT / "loss.png"
    figure.savefig(path, dpi=150, bbox_inches="tight")
    return path


def median(values: list[float]) -> float:
    """The middle one."""
    return sorted(values)[len(values) // 2] if values else 0.0


def report(peers: list[Peer], parameters: int, seconds: float) -> dict[str, Any]:
    """Compare the three checkpoints, and the last of them with what else there is."""
    results = [
        json.loads(p2ptrain("eval", "--home", str(p.home), "--max-tokens", "1024", "--format", "json"))
        for p in peers[:-1]
    ]
    results.append(json.loads(p2ptrain("eval", "--home", str(peers[-1].home), "--format", "json")))
    last = results[-1]
    together = [entry for peer in peers for entry in peer.rounds() if entry["members"] == len(peers)]
    dense = 2 * 2 * parameters * (len(peers) - 1) / len(peers)
    return {
        "peers": len(peers),
        "cores": os.cpu_count(),
        "threads_per_peer": THREADS,
        "parameters": parameters,
        "seconds": round(seconds, 1),
        "rounds": last["round"],
        "loss": peers[0].rounds()[-1]["train_loss"],
        "heldout_loss": last["loss"],
        "heldout_bits_per_byte": last["bits_per_byte"],
        "compressors_bits_per_byte": last["compressors_bits_per_byte"],
        "bytes_sent_per_peer_per_round": median([entry["bytes_sent_per_round"] for entry in together]),
        "bytes_received_per_peer_per_round": median([entry["bytes_received_per_round"] for entry in together]),
        "bytes_of_fp16_ring_all_reduce": round(dense),
        "state_ids": [result["state_id"] for result in results],
        "parameters_sha256": [result["parameters_sha256"] for result in results],
    }


def show(summary: dict[str, Any], peers: list[Peer]) -> None:
    """The summary, for people."""
    console.print(f"\ntraining loss {summary['loss']:.3f}, held-out loss {summary['heldout_loss']:.3f} nats a token")
    table = Table("held-out text", "bits/byte", box=None, pad_edge=False)
    table.add_row("this swarm's model", f"{summary['heldout_bits_per_byte']:.3f}")
    for name, bits in summary["compressors_bits_per_byte"].items():
        table.add_row(name, f"{bits:.3f}")
    console.print(table)
    sent, received = summary["bytes_sent_per_peer_per_round"], summary["bytes_received_per_peer_per_round"]
    dense = summary["bytes_of_fp16_ring_all_reduce"]
    table = Table("bytes per peer per round", "sent", "received", box=None, pad_edge=False)
    table.add_row("p2ptrain", f"{sent:,.0f}", f"{received:,.0f}")
    table.add_row("fp16 all-reduce (ring)", f"{dense:,.0f}", f"{dense:,.0f}")
    table.add_row("ratio", f"1 : {dense / max(sent, 1):.0f}", f"1 : {dense / max(received, 1):.0f}")
    console.print(table)
    console.print("replica  state id          sha256 of the parameters")
    for peer, state, sha in zip(peers, summary["state_ids"], summary["parameters_sha256"], strict=True):
        console.print(f"{peer.name:<8} {state[:16]}  {sha}", soft_wrap=True)


def main() -> None:
    """The demo."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the figures there too")
    out = parser.parse_args().out
    began = time.monotonic()
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir()
    manifest = write_manifest()
    parameters = load_manifest(manifest).model.parameters
    peers: list[Peer] = []
    try:
        console.print(f"[bold]{PEERS[0]}[/bold]: p2ptrain bootstrap {manifest}")
        peers.append(Peer(PEERS[0], "bootstrap", str(manifest)))
        address = peers[0].address()
        for name in PEERS[1:]:
            console.print(f"[bold]{name}[/bold]: p2ptrain join {address}", soft_wrap=True)
            peers.append(Peer(name, "join", address))
        watch(peers)
    finally:
        for peer in peers:
            peer.stop()
    summary = report(peers, parameters, time.monotonic() - began)
    show(summary, peers)
    console.print("\n[bold]p2ptrain sample --prompt 'Fellow citizens'[/bold]")
    console.print(p2ptrain("sample", "--home", str(peers[0].home), "--prompt", "Fellow citizens"), markup=False)
    console.print(f"loss picture: {draw(peers)}   figures: {OUT / 'summary.json'}   {summary['seconds']:.0f} s")
    for path in (OUT / "summary.json", *([out] if out else [])):
        path.write_text(json.dumps(summary, indent=2) + "\n")
    if len(set(summary["state_ids"])) != 1 or len(set(summary["parameters_sha256"])) != 1:
        raise SystemExit("the replicas differ: this is a bug")
    # As it can be typed here, whether or not the environment is active.
    program = os.path.relpath(Path(sys.executable).with_name("p2ptrain"))
    console.print(f"look at it:  {program} dashboard --home {peers[0].home}", soft_wrap=True)


if __name__ == "__main__":
    main()
