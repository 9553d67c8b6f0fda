"""Guests come by invitation and are shut out amid faults; nobody comes in who was not let in, and no word is lost."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from histories import coverage, scenario

from p2ptrain.chain import state
from p2ptrain.chain.admission import Access
from p2ptrain.rounds.statements import Statements
from p2ptrain.simulation.faults import GUESTS
from p2ptrain.simulation.world import Report, simulate

FAULTS = ("crash", "halves", "isolate", "freeze", GUESTS, GUESTS)
"""Guests come as often as two of the others happen."""
SEEDS = range(40, 48)
Patch = pytest.MonkeyPatch


def play(seed: int) -> Report:
    """One history, in which guests come and go."""
    torch.set_num_threads(1)
    return simulate(replace(scenario(seed, FAULTS), rounds=40, adversaries=()))


# As with the other histories, many at a time outlast one test's limit on a busy machine.
@pytest.mark.timeout(1500)
def test_no_history_of_faults_loses_the_owners_word_or_lets_a_stranger_in() -> None:
    with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool:
        reports = list(pool.imap_unordered(play, SEEDS))
    assert {report.seed: report.violations for report in reports if report.violations} == {}
    seen = coverage(reports)
    for what in (
        "revoked",
        "revoked_peers_that_ended",
        "guests_in_the_end",
        "rollbacks_of_depth_one",
        "deep_rollbacks",
    ):
        assert seen[what], f"histories without {what} prove nothing"


def test_one_seed_is_one_history_with_guests_too() -> None:
    assert play(3).digest == play(3).digest


def keep_who_was_shut_out(patch: Patch) -> None:
    patch.setattr(state, "_without_those_shut_out", lambda members, access: members)


def let_in_whoever_asks(patch: Patch) -> None:
    """As where neither who seals nor who checks a seal looks at the statements."""
    patch.setattr(Access, "admits", lambda self, peer_id: True)


def forget_what_a_lost_branch_had_sealed(patch: Patch) -> None:
    patch.setattr(Statements, "keep_lost", lambda self, before, head: None)


def tell_nobody_else(patch: Patch) -> None:
    """Statements stay with who heard them, whose solo seals may be all that it ever makes."""
    patch.setattr(Statements, "choose", lambda self, head, solo=False: ())


@pytest.mark.parametrize(
    "mutation",
    [keep_who_was_shut_out, let_in_whoever_asks, forget_what_a_lost_branch_had_sealed, tell_nobody_else],
    ids=lambda mutation: mutation.__name__,
)
def test_a_deliberate_bug_is_caught(mutation: Callable[[Patch], None], monkeypatch: Patch) -> None:
    mutation(monkeypatch)
    # In these histories a branch that loses has the owner's word on it, which few have.
    seeds = SEEDS if mutation is not forget_what_a_lost_branch_had_sealed else (80, 58, 74)
    caught = next((report for seed in seeds if (report := play(seed)).violations), None)
    assert caught is not None
    print(f"{mutation.__name__}: seed {caught.seed}: {caught.violations[0][:200]}")
