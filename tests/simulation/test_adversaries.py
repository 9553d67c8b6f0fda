"""Nobody takes a swarm over: not by chains of any length, nor by members that it makes up or has been one of."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from histories import coverage, scenario

from p2ptrain.simulation.adversaries import ADVERSARIES, OUTSIDERS
from p2ptrain.simulation.faults import FAULTS
from p2ptrain.simulation.world import Report, simulate


def attacked(seed: int, *adversaries: str, faults: tuple[str, ...] = FAULTS) -> Report:
    """One history; with five peers or more where one of them turns on the others."""
    torch.set_num_threads(1)
    usual = scenario(seed, faults)
    peers = usual.peers if set(adversaries) <= set(OUTSIDERS) else max(5, usual.peers)
    return simulate(replace(usual, peers=peers, adversaries=adversaries))


def test_outsiders_lead_no_member_away_whatever_befalls_the_swarm_meanwhile() -> None:
    reports = [attacked(seed, *OUTSIDERS) for seed in range(10)]
    assert {report.seed: report.violations for report in reports if report.violations} == {}
    assert all(coverage(reports)[f"attack_{kind}"] > len(reports) for kind in OUTSIDERS)


@pytest.mark.parametrize("kind", [kind for kind in ADVERSARIES if kind not in OUTSIDERS])
def test_a_member_that_leaves_with_the_chain_takes_none_of_the_others_along(kind: str) -> None:
    reports = [attacked(seed, kind, faults=()) for seed in range(8)]
    assert {report.seed: report.violations for report in reports if report.violations} == {}
    assert coverage(reports)[f"attack_{kind}"] > len(reports)


@pytest.mark.parametrize("kind", OUTSIDERS)
def test_rounds_go_on_at_their_pace_beside_an_outsider(kind: str) -> None:
    """Rounds a virtual minute, both in calm, but for the adversary."""

    def pace(*adversaries: str) -> float:
        report = attacked(5, *adversaries, faults=())
        assert report.violations == []
        return report.rounds / report.virtual_seconds

    assert pace(kind) > 0.8 * pace()
