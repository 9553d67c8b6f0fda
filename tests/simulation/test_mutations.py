"""The invariants have teeth: each of these deliberate bugs breaks one within `SEEDS` histories."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

sys.path.insert(0, str(Path(__file__).parent))

from histories import MANIFEST, play

from p2ptrain import chain
from p2ptrain.chain import forks
from p2ptrain.cli.main import app
from p2ptrain.config.loading import render
from p2ptrain.history.catching_up import CatchingUp
from p2ptrain.optim.demo import DeMo
from p2ptrain.peer import answering, assembly
from p2ptrain.rounds import machine
from p2ptrain.rounds.events import PublishSeal
from p2ptrain.rounds.machine import RoundMachine
from p2ptrain.simulation.faults import CORRUPT, FAULTS
from p2ptrain.simulation.loop import current_actor
from p2ptrain.simulation.peer import SimPeer
from p2ptrain.state.own_log import OwnLog
from p2ptrain.training.ledger import Ledger

SEEDS = 200
Patch = pytest.MonkeyPatch


def apply_before_the_seal(patch: Patch) -> None:
    """Who holds every reply goes on by a seal of its own that nobody else hears of."""
    seal = RoundMachine._seal

    def alone(self: RoundMachine, *arguments: Any, **options: Any) -> bool:
        sealed = seal(self, *arguments, **options)
        self._effects = [effect for effect in self._effects if not isinstance(effect, PublishSeal)]
        return sealed

    def in_first_place(self: RoundMachine, exchange: Any) -> float:
        return float("-inf") if exchange.complete_at is not None else float("inf")

    patch.setattr(RoundMachine, "_seal", alone)
    patch.setattr(RoundMachine, "_seal_from", in_first_place)


def skip_although_the_sealer_holds_the_reply(patch: Patch) -> None:
    seal = RoundMachine._seal

    def forgetful(self: RoundMachine, exchange: Any, included: Any, now: float, *, solo: bool) -> bool:
        if len(exchange.replies) > 1:
            del exchange.replies[min(exchange.replies)]
            included = frozenset[int]().union(*(reply.included for reply in exchange.replies.values()))
        return seal(self, exchange, included, now, solo=solo)

    patch.setattr(RoundMachine, "_seal", forgetful)


def count_a_late_contribution_twice(patch: Patch) -> None:
    settle = DeMo.settle

    def twice(self: DeMo, pending: Any, replies: Any, index: int | None) -> Any:
        settled = settle(self, pending, replies, index)
        if index is None:
            self.settle_again(settled)
        return settled

    patch.setattr(DeMo, "settle", twice)


def forget_to_return_pending(patch: Patch) -> None:
    patch.setattr(DeMo, "settle_again", lambda self, settled: None)


def seal_what_one_does_not_hold(patch: Patch) -> None:
    def boastful(**fields: Any) -> chain.Seal:
        parts = fields["parts"]
        return chain.Seal(
            **{**fields, "parts": tuple(part or bytes(31) + b"1" for part in parts) if any(parts) else parts}
        )

    patch.setattr(machine, "Seal", boastful)


def ignore_the_fork_rule(patch: Patch) -> None:
    patch.setattr(chain, "better", lambda *_: False)


def partition_from_unsealed_members(patch: Patch) -> None:
    """Who has asked to join counts before a seal admits it."""
    shape_of = chain.shape_of

    def hasty(state: chain.ChainState, chunks: int) -> chain.RoundShape:
        peers = current_actor.get().__dict__.get("peer") if current_actor.get() else None
        there = getattr(peers, "machine", None) if isinstance(peers, SimPeer) else None
        joins = there._group.joins if there is not None else {}
        shape = shape_of(state, chunks)
        if not joins or not shape.members:
            return shape
        new = tuple(chain.Member(peer, row, 0, True) for peer, (row, _) in sorted(joins.items()))
        members = shape.members + tuple(m for m in new if shape.index(m.peer_id) is None)
        return chain._shape(shape.round, shape.base, members, chunks)

    start = SimPeer.start

    def marked(self: SimPeer, **options: Any) -> None:
        start(self, **options)
        self.actor.peer = self  # type: ignore[union-attr]

    patch.setattr(SimPeer, "start", marked)
    patch.setattr(SimPeer, "machine", property(lambda self: self.driver.machine if hasattr(self, "driver") else None))
    patch.setattr(chain, "shape_of", hasty)


def accept_a_snapshot_without_a_root(patch: Patch) -> None:
    """Hand out and take any, sealed or not."""
    patch.setattr(CatchingUp, "_sealed_snapshots", lambda self: self._snapshots.all())
    patch.setattr(CatchingUp, "_root_is_sealed", lambda self, snapshot, rounds: True)


def undo_consumption_but_not_returns(patch: Patch) -> None:
    patch.setattr(DeMo, "unsettle", lambda self, settled: settled.pending)


def shape_the_round_from_the_seal_before(patch: Patch) -> None:
    patch.setattr(
        chain, "shape_of", lambda state, chunks: chain._shape(state.round + 1, state.parent, state.following, chunks)
    )


def uncapped_weight(patch: Patch) -> None:
    reduce_part, uncapped = answering.reduce_part, partial(dataclasses.replace, weight_cap_ratio=1e9)
    patch.setattr(answering, "reduce_part", lambda sent, codec, *a: reduce_part(sent, uncapped(codec), *a))


def unbounded_weight(patch: Patch) -> None:
    reduce_part, plain = answering.reduce_part, partial(dataclasses.replace, robust="mean")
    patch.setattr(answering, "reduce_part", lambda sent, codec, *a: reduce_part(sent, plain(codec), *a))


def send_before_the_own_log_knows(patch: Patch) -> None:
    """After a crash the contribution is another one."""
    patch.setattr(OwnLog, "write", lambda self, entry: None)


def forget_outcomes_at_a_crash(patch: Patch) -> None:
    patch.setattr(Ledger, "replay", lambda self, outcome, *, in_momentum: None)


def judge_forks_by_work_alone(patch: Patch) -> None:
    def judge(common: forks.Mark, ours: forks.Branch, theirs: forks.Branch) -> forks.Verdict:
        head, end = (ours.marks or [common])[-1], theirs.marks[-1]
        return forks.Verdict(0, 0, chain.better(end.total, end.id, head.total, head.id))

    patch.setattr(forks, "judge", judge)


def let_strangers_seal_alone(patch: Patch) -> None:
    patch.setattr(RoundMachine, "_by_a_stranger", lambda *_: False)
    patch.setattr(forks, "HEARD_SEALS_MIN", -10_000)
    patch.setattr(machine, "Branch", lambda marks, voices, place=0: forks.Branch(marks, (), place))


def forget_through_a_restart_who_was_there(patch: Patch) -> None:
    patch.setattr(assembly, "read_company", lambda path: frozenset())
    patch.setattr(assembly, "past_of", lambda head, *rest: [forks.Mark.of(head)])


MUTATIONS = [
    judge_forks_by_work_alone,
    let_strangers_seal_alone,
    forget_through_a_restart_who_was_there,
    apply_before_the_seal,
    skip_although_the_sealer_holds_the_reply,
    count_a_late_contribution_twice,
    forget_to_return_pending,
    seal_what_one_does_not_hold,
    ignore_the_fork_rule,
    partition_from_unsealed_members,
    accept_a_snapshot_without_a_root,
    undo_consumption_but_not_returns,
    shape_the_round_from_the_seal_before,
    uncapped_weight,
    unbounded_weight,
    send_before_the_own_log_knows,
    forget_outcomes_at_a_crash,
]


#: the histories that these break are rare: begin with one of them
BEGIN_AT = {
    forget_through_a_restart_who_was_there: 136,
    ignore_the_fork_rule: 94,
    judge_forks_by_work_alone: 39,
}


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.__name__)
def test_a_deliberate_bug_is_caught(mutation: Callable[[Patch], None], monkeypatch: Patch) -> None:
    mutation(monkeypatch)
    faults = ("crash", "wipe", CORRUPT) if mutation is accept_a_snapshot_without_a_root else FAULTS
    begin = BEGIN_AT.get(mutation, 0)
    seeds = [*range(begin, SEEDS), *range(begin)]
    caught = next((report for seed in seeds if (report := play(seed, faults)).violations), None)
    assert caught is not None
    print(f"{mutation.__name__}: seed {caught.seed}: {caught.violations[0][:200]}")


def test_a_violation_exits_with_the_command_that_replays_it(tmp_path: Path, monkeypatch: Patch) -> None:
    forget_to_return_pending(monkeypatch)
    path = tmp_path / "run.toml"
    path.write_text(render(MANIFEST))
    done = CliRunner().invoke(app, ["simulate", str(path), "--seed", "1", "--format", "json"])
    assert done.exit_code == 13
    assert done.stderr.splitlines()[-1].startswith(f"p2ptrain simulate {path} --peers 5 --seed 1 ")
