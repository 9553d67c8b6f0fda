"""Members that lie: a false sum expels its reducer, whatever else they do costs the others little, and nobody honest is
ever convicted."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from histories import MANIFEST, coverage, play

from p2ptrain.chain import evidence
from p2ptrain.chain.state import STRIKES_BORNE
from p2ptrain.peer import assembly
from p2ptrain.rounds.audits import Audits
from p2ptrain.simulation.lying import Lying, Outcome
from p2ptrain.simulation.world import Scenario

WITHIN_ROUNDS = 20
EVERYTHING_IS_AUDITED = 1e9
AUDITS_BY_DEFAULT = 0.089
"""Of each part, with the default strategy's payloads; those of the toy are of plain floats, and long."""


def lied(folder: Path, kind: str, *, seed: int = 1, peers: int = 4, liars: int = 1, rounds: int = 40) -> Outcome:
    """What comes of it; that nobody honest is convicted is checked at each event."""
    torch.set_num_threads(1)
    scenario = Scenario(manifest=MANIFEST, seed=seed, peers=peers, faults=(), even_speeds=True)
    swarm = Lying(scenario, folder, kind, liars=liars, rounds=rounds)
    report = swarm.run()
    assert report.violations == []
    if kind in ("wrong_sum", "withheld", "false_prover"):
        assert report.coverage["lies"] > 0
    return swarm.outcome


def test_a_lying_reducer_is_expelled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of five; with one part to lie about in each round, which is the fewest."""
    monkeypatch.setattr(assembly, "audits_a_part", lambda codec: AUDITS_BY_DEFAULT)
    for seed in range(8):
        found = lied(tmp_path / f"{seed}", "wrong_sum", seed=seed).rounds_until_expelled
        assert found is not None and found <= WITHIN_ROUNDS


def test_a_reducer_whose_lies_look_right_is_expelled_by_lot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same, where nobody notices that replies point the other way."""
    monkeypatch.setattr(assembly, "audits_a_part", lambda codec: AUDITS_BY_DEFAULT)
    monkeypatch.setattr(Audits, "doubt", lambda *_: [])
    outcomes = [lied(tmp_path / f"{seed}", "wrong_sum", seed=seed, rounds=80) for seed in range(8)]
    found = [outcome.rounds_until_expelled for outcome in outcomes]
    assert None not in found, "each is, in the end"
    assert sum(rounds is not None and rounds <= WITHIN_ROUNDS for rounds in found) >= len(found) / 2


def test_where_everything_is_audited_each_lie_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in rounds of many parts: the more a reducer lies about, the sooner."""
    monkeypatch.setattr(evidence, "AUDITED_SHARE", EVERYTHING_IS_AUDITED)
    for seed in range(3):
        found = lied(tmp_path / f"{seed}", "wrong_sum", seed=seed).rounds_until_expelled
        assert found is not None and found <= 6, "a round to find it, and the sealers' turns"


def test_several_liars_are_expelled_one_after_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evidence, "AUDITED_SHARE", EVERYTHING_IS_AUDITED)
    assert lied(tmp_path, "wrong_sum", peers=3, liars=2).rounds_until_expelled is not None


def test_a_reducer_that_shows_nothing_soon_reduces_little(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evidence, "AUDITED_SHARE", EVERYTHING_IS_AUDITED)
    outcome = lied(tmp_path, "withheld")
    assert outcome.rounds_until_expelled is None, "which proves nothing against it"
    assert outcome.liars_reduced["liar0"] < 0.35
    assert min(outcome.reduced.values()) == 1.0
    assert outcome.liars_included["liar0"] > 0.9, "its own work counts all the same"


def test_a_reducer_that_replies_differently_to_different_peers_soon_reduces_little(tmp_path: Path) -> None:
    outcome = lied(tmp_path, "two_replies")
    assert outcome.rounds_until_expelled is None, "a crash may look like it"
    assert outcome.liars_reduced["liar0"] < 0.35
    assert min(outcome.reduced.values()) == 1.0


def test_a_member_that_signs_nothing_harms_itself_alone(tmp_path: Path) -> None:
    outcome = lied(tmp_path, "unsigned")
    assert outcome.rounds_until_expelled is None
    assert outcome.rounds == 40 - 1


@pytest.mark.parametrize("seed", [1, 3])
def test_a_member_that_signs_nothing_takes_no_turn_from_anybody(tmp_path: Path, seed: int) -> None:
    """Not from those either that begin to reduce beside it, and know not yet how long the others wait."""
    assert min(lied(tmp_path, "unsigned", seed=seed).reduced.values()) == 1.0


def test_one_lying_auditor_takes_no_turn_from_anybody(tmp_path: Path) -> None:
    outcome = lied(tmp_path, "false_accuser")
    assert outcome.rounds_until_expelled is None
    assert min(outcome.reduced.values()) == 1.0
    assert outcome.strikes[0] == STRIKES_BORNE, "it did accuse"


def test_two_lying_auditors_cost_one_member_a_few_of_its_turns(tmp_path: Path) -> None:
    outcome = lied(tmp_path, "false_accuser", liars=2, rounds=80)
    assert sorted(outcome.reduced.values())[1:] == [1.0] * 3
    assert min(outcome.reduced.values()) > 0.75


def test_proofs_that_convict_nobody_are_not_heard(tmp_path: Path) -> None:
    outcome = lied(tmp_path, "false_prover")
    assert outcome.rounds_until_expelled is None
    assert min(outcome.reduced.values()) == 1.0


@pytest.mark.timeout(1500)
def test_whatever_befalls_them_no_honest_peer_is_convicted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Histories of crashes, forks and broken streams, in which all that is reduced is audited."""
    monkeypatch.setattr(evidence, "AUDITED_SHARE", EVERYTHING_IS_AUDITED)
    reports = [play(seed) for seed in range(24)]
    assert {report.seed: report.violations for report in reports if report.violations} == {}
    seen = coverage(reports)
    assert seen["audits_right"] > 300
    assert not seen["audits_wrong"]
    # Of a reducer that has crashed since, or that cannot be reached: as few as those are.
    assert seen["audits_withheld"] < 0.02 * seen["audits_right"]
