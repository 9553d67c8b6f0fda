"""Members that are silent, and newcomers that come in floods, cost the others little; with the manifest's defaults."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
import torch
from histories import MANIFEST

from p2ptrain.config.manifest import RoundConfig
from p2ptrain.simulation.misbehaving import Attacked, Measured
from p2ptrain.simulation.world import Scenario

DEFAULTS = msgspec.structs.replace(MANIFEST, round=RoundConfig())
ENOUGH = 0.8
"""Of the rounds that the same peers seal in calm."""


def measure(folder: Path, misbehaviour: str, *, peers: int = 3, newcomer_after: float | None = None) -> Measured:
    """A calm half of a minute, a minute of attack, and a calm half of a minute."""
    torch.set_num_threads(1)
    scenario = Scenario(manifest=DEFAULTS, seed=1, peers=peers, faults=(), even_speeds=True)
    swarm = Attacked(
        scenario,
        folder,
        misbehaviour,
        calm_seconds=30.0,
        attack_seconds=60.0,
        recovery_seconds=30.0,
        newcomer_after=newcomer_after,
    )
    assert swarm.run().violations == []
    return swarm.measured


@pytest.mark.parametrize("misbehaviour", ["flood", "churn", "no_replies", "no_contributions"])
def test_whatever_is_withheld_the_others_go_on_at_their_pace(tmp_path: Path, misbehaviour: str) -> None:
    measured = measure(tmp_path, misbehaviour)
    assert measured.share > ENOUGH
    assert min(measured.included.values()) > ENOUGH, "all honest members' work counts"
    assert measured.recovered_rounds > ENOUGH * measured.calm_rounds


def test_a_member_that_never_seals_is_soon_waited_for_no_more(tmp_path: Path) -> None:
    measured = measure(tmp_path, "no_seals")
    assert measured.share > 0.7, "a wait of seal_timeout_seconds each time that it is tried"
    assert measured.recovered_rounds > ENOUGH * measured.calm_rounds


def test_an_honest_newcomer_comes_in_while_peers_come_and_die(tmp_path: Path) -> None:
    measured = measure(tmp_path, "churn", newcomer_after=15.0)
    assert measured.newcomer_seconds is not None and measured.newcomer_seconds < 20


def test_a_lone_member_trains_on_beside_newcomers_that_die(tmp_path: Path) -> None:
    measured = measure(tmp_path, "churn", peers=1)
    assert measured.share > ENOUGH
