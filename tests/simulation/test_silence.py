"""Members that are silent or boast, and newcomers in floods, cost the others little; with the manifest's defaults."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
import torch
from histories import MANIFEST

from p2ptrain.config.manifest import Manifest, RoundConfig
from p2ptrain.simulation.misbehaving import CLAIMS, Attacked, Measured
from p2ptrain.simulation.world import Scenario

DEFAULTS = msgspec.structs.replace(MANIFEST, round=RoundConfig())
ENOUGH = 0.8
"""Of the rounds that the same peers seal in calm."""


SLOW_ROUNDS = msgspec.structs.replace(DEFAULTS, round=RoundConfig(target_batch=256))
"""Rounds whose length the members' throughputs decide: some three seconds each."""


def measure(
    folder: Path,
    misbehaviour: str,
    *,
    manifest: Manifest = DEFAULTS,
    seed: int = 1,
    peers: int = 3,
    newcomer_after: float | None = None,
    attack_seconds: float = 60.0,
    **line: float,
) -> Measured:
    """A calm half of a minute, a minute of attack, and a calm half of a minute.

    Args:
        line: fields of `Scenario` about lines and chunks.
    """
    torch.set_num_threads(1)
    scenario = Scenario(manifest=manifest, seed=seed, peers=peers, faults=(), even_speeds=True, **line)  # type: ignore[arg-type]
    swarm = Attacked(
        scenario,
        folder,
        misbehaviour,
        calm_seconds=30.0,
        attack_seconds=attack_seconds,
        recovery_seconds=30.0,
        newcomer_after=newcomer_after,
    )
    assert swarm.run().violations == []
    return swarm.measured


LONG = pytest.mark.long


@pytest.mark.parametrize(
    "misbehaviour",
    [pytest.param("flood", marks=LONG), "churn", "no_replies", pytest.param("no_contributions", marks=LONG)],
)
def test_whatever_is_withheld_the_others_go_on_at_their_pace(tmp_path: Path, misbehaviour: str) -> None:
    measured = measure(tmp_path, misbehaviour)
    assert measured.share > ENOUGH
    assert min(measured.included.values()) > ENOUGH, "all honest members' work counts"
    assert measured.recovered_rounds > ENOUGH * measured.calm_rounds


@pytest.mark.long
def test_a_member_that_never_seals_is_soon_waited_for_no_more(tmp_path: Path) -> None:
    measured = measure(tmp_path, "no_seals")
    assert measured.share > 0.7, "a wait of seal_timeout_seconds each time that it is tried"
    assert measured.recovered_rounds > ENOUGH * measured.calm_rounds


@pytest.mark.long
def test_a_sealer_whose_replies_nobody_has_costs_no_more_than_replies_take(tmp_path: Path) -> None:
    rounds = RoundConfig(min_seconds=0.4, max_seconds=1.0, root_interval=32)
    manifest = msgspec.structs.replace(DEFAULTS, round=rounds)
    measured = measure(tmp_path, "hidden_replies", manifest=manifest, attack_seconds=25.0)
    assert measured.share > 0.7, "five of its turns come in so short a time"
    assert min(measured.included.values()) > ENOUGH
    assert measured.recovered_rounds > ENOUGH * measured.calm_rounds


def test_a_sealer_that_leaves_one_out_is_noticed_and_loses_its_turns(tmp_path: Path) -> None:
    measured = measure(tmp_path, "censor", peers=4)
    assert measured.share > ENOUGH
    assert min(measured.included.values()) > ENOUGH, "the one that it leaves out as well"
    assert measured.noticed_after_rounds is not None and measured.noticed_after_rounds <= 20


@pytest.mark.parametrize("seed", [1, pytest.param(2, marks=LONG)])
@pytest.mark.parametrize("misbehaviour", list(CLAIMS))
def test_whatever_a_member_claims_the_others_go_on_at_about_their_pace(
    tmp_path: Path, misbehaviour: str, seed: int
) -> None:
    """Five honest members of six: the sixth counts for nothing, or for four."""
    measured = measure(tmp_path, misbehaviour, manifest=SLOW_ROUNDS, seed=seed, peers=5, attack_seconds=45.0)
    assert ENOUGH <= measured.share < 9 / 6, "rounds neither longer nor shorter than that"
    assert min(measured.included.values()) > ENOUGH


@pytest.mark.long
def test_who_claims_more_than_its_line_loses_parts_and_stalls_nobody(tmp_path: Path) -> None:
    """Lines on which one reducer's share takes as long as a round: all of it, with an equal line, would take four."""
    measured = measure(
        tmp_path, "endless_uplink", attack_seconds=90.0, chunks=200, uplink_bytes_per_second=1.6e4, peers=3
    )
    assert measured.share > ENOUGH


def test_an_honest_newcomer_comes_in_while_peers_come_and_die(tmp_path: Path) -> None:
    measured = measure(tmp_path, "churn", newcomer_after=15.0)
    assert measured.newcomer_seconds is not None and measured.newcomer_seconds < 20


def test_a_lone_member_trains_on_beside_newcomers_that_die(tmp_path: Path) -> None:
    measured = measure(tmp_path, "churn", peers=1)
    assert measured.share > ENOUGH
