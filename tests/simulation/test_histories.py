"""Whatever befalls peers, links and streams: no replica diverges, no work is lost, and training goes on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
import torch
from typer.testing import CliRunner

sys.path.insert(0, str(Path(__file__).parent))

from histories import MANIFEST, coverage, play, play_all, scenario

from p2ptrain.chain.relay import RELAY_ABOVE
from p2ptrain.cli.main import app, run
from p2ptrain.config.loading import new_manifest, render
from p2ptrain.rounds.events import Effect, PublishSeal
from p2ptrain.simulation import world
from p2ptrain.simulation.adversaries import OUTSIDERS
from p2ptrain.simulation.faults import CORRUPT
from p2ptrain.simulation.peer import SimPeer

SEEDS = 60
HAPPENS = (
    "takeovers",
    "skips",
    "rounds_of_skips_only",
    "even_splits",
    "solo_by_member",
    "solo_by_learner",
    "merges_of_solos",
    "rollbacks_of_depth_one",
    "deep_rollbacks",
    "forks_older_than_the_journal",
    "replayed_rounds",
    "restores_from_snapshot",
    "left_more_work_for_more_members",
    *(f"attack_{kind}" for kind in OUTSIDERS),
)


# Each history has its own limit in virtual time; so many of them outlast the limit of one test on a busy machine.
@pytest.mark.timeout(1500)
def test_no_history_of_faults_breaks_what_must_hold() -> None:
    reports = list(play_all(range(SEEDS)))
    assert {report.seed: report.violations for report in reports if report.violations} == {}
    seen = coverage(reports)
    assert [what for what in HAPPENS if not seen[what]] == [], "histories that do not get there prove nothing about it"


@pytest.mark.parametrize("seed", [230, 141])
def test_a_branch_whose_sealers_are_gone_holds_nobody_for_ever(seed: int) -> None:
    """One peer is on a branch alone, whose other sealers have left; those of the other side it cannot hear."""
    report = play(seed)
    assert report.violations == []


def test_groups_find_together_though_all_who_were_there_when_they_parted_have_gone() -> None:
    """Each came by a snapshot of its donor; the seals from before it say what both chains share."""
    assert play(342).violations == []


def test_a_replica_that_went_wrong_is_noticed_and_mended() -> None:
    reports = [play(seed, (CORRUPT, "crash", "late")) for seed in range(6)]
    assert [report.violations for report in reports if report.violations] == []
    assert coverage(reports)["fault_corrupt"] > len(reports)


@pytest.mark.long
@pytest.mark.parametrize("seed", [1, 3])
def test_a_group_that_needs_a_tree_keeps_what_must_hold(seed: int) -> None:
    torch.set_num_threads(1)
    report = world.simulate(replace(scenario(seed), peers=RELAY_ABOVE + 4, rounds=12, chunks=40))
    assert report.violations == []
    assert report.coverage["applied"] > 12 * RELAY_ABOVE


class Line(world.World):
    """A calm swarm of equal machines; the second peer's line may be another."""

    def __init__(
        self, folder: Path, *, chunks: int = 12, overlap: int = 0, second: float = 1.0, uplink: float, delay: float
    ) -> None:
        rounds = msgspec.structs.replace(MANIFEST.round, overlap=overlap)
        super().__init__(
            world.Scenario(
                manifest=msgspec.structs.replace(MANIFEST, round=rounds),
                seed=1,
                peers=4,
                rounds=15,
                faults=(),
                chunks=chunks,
                uplink_bytes_per_second=uplink,
                delay_seconds=delay,
                even_speeds=True,
            ),
            folder,
        )
        self._second = second
        self.network.jitter_seconds = 0.001
        #: when rounds were sealed [s]
        self.sealed_at: list[float] = []

    def add_peer(self, number: int, name: str = "") -> SimPeer:
        peer = super().add_peer(number, name)
        if number == 1:
            peer.line.up *= self._second
        return peer

    def saw(self, peer: SimPeer, effect: Effect) -> None:
        super().saw(peer, effect)
        if isinstance(effect, PublishSeal):
            self.sealed_at.append(self.loop.time())

    def play(self) -> None:
        torch.set_num_threads(1)
        assert self.run().violations == []


def test_a_peer_with_a_tenth_of_the_uplink_gets_about_a_tenth_of_the_reducing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What the others claim counts once they have served.
    monkeypatch.setattr(world, "SETTLED_ROUNDS", 40)
    swarm = Line(tmp_path, chunks=300, second=0.1, uplink=1.25e5, delay=0.04)
    swarm.play()
    shape = swarm.peers[0].machine.shape
    assert shape is not None
    share = Counter[bytes]()
    for part in shape.parts:
        share[shape.members[part.reducer].peer_id] += part.end - part.start
    slow = share.pop(swarm.peers[1].id)
    others = sum(share.values()) / len(share)
    assert len(share) == 3 and 0.05 < slow / others < 0.2


def test_with_overlap_most_of_the_exchange_costs_no_time(tmp_path: Path) -> None:
    seconds = []
    for overlap in (0, 1):
        swarm = Line(tmp_path / str(overlap), overlap=overlap, uplink=1.25e6, delay=0.12)
        swarm.play()
        seconds.append((swarm.sealed_at[-1] - swarm.sealed_at[-9]) / 8)
    without, overlapped = (whole - MANIFEST.round.min_seconds for whole in seconds)
    assert without > 0.4, "there is something to gain"
    assert overlapped < without / 2


def start(manifest: Path, *flags: str, hash_seed: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "p2ptrain", "simulate", str(manifest), *flags]
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment)


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(render(new_manifest("simulated")))
    return path


def test_one_seed_is_one_history_to_the_byte(manifest: Path) -> None:
    flags = ("--peers", "4", "--seed", "7", "--rounds", "10", "--format", "json")
    # Two at a time, as there are cores.
    twins = [start(manifest, *flags, hash_seed=seed) for seed in ("1", "2")]
    try:
        (one, errors), (other, _) = (twin.communicate(timeout=600) for twin in twins)
    finally:
        for twin in twins:
            twin.kill()  # which has ended, but for a failure
    assert twins[0].returncode == 0, errors
    assert one == other
    assert json.loads(one)["history_sha256"]
    another = CliRunner().invoke(app, ["simulate", str(manifest), *flags, "--seed", "8"])
    assert another.exit_code == 0, another.stderr
    assert json.loads(another.stdout)["history_sha256"] != json.loads(one)["history_sha256"]


def test_a_command_line_that_makes_no_sense_is_refused(manifest: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for flags in (("--faults", "rain"), ("--uplink", "fast"), ("--delay", "soon")):
        with pytest.raises(SystemExit) as ended:
            run(["simulate", str(manifest), *flags])
        assert ended.value.code == 2
        assert flags[1] in capsys.readouterr().err
