"""The invariants have teeth: each of these deliberate bugs breaks one within `SEEDS` histories."""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from typer.testing import CliRunner

sys.path.insert(0, str(Path(__file__).parent))

from histories import MANIFEST, scenario

from p2ptrain import chain
from p2ptrain.chain import evidence, forks
from p2ptrain.chain import state as chain_state
from p2ptrain.cli.main import app
from p2ptrain.config.loading import render
from p2ptrain.history.catching_up import CatchingUp
from p2ptrain.optim.demo import DeMo
from p2ptrain.peer import answering, assembly, auditing
from p2ptrain.rounds import fork_choice, machine
from p2ptrain.rounds.audits import Audits
from p2ptrain.rounds.events import PublishSeal
from p2ptrain.rounds.fork_choice import ForkChoice
from p2ptrain.rounds.machine import RoundMachine
from p2ptrain.simulation import lying
from p2ptrain.simulation.faults import CORRUPT, FAULTS
from p2ptrain.simulation.loop import current_actor
from p2ptrain.simulation.peer import SimPeer
from p2ptrain.simulation.world import Scenario, simulate
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
    """Of two branches that are even, stay on the own one."""
    for module in (chain, forks):
        patch.setattr(module, "better", lambda *_: False)


def partition_from_unsealed_members(patch: Patch) -> None:
    """Who has asked to join counts before a seal admits it."""
    shape_of = chain.shape_of

    def hasty(state: chain.ChainState, chunks: int) -> chain.RoundShape:
        peers = current_actor.get().__dict__.get("peer") if current_actor.get() else None
        there = getattr(peers, "machine", None) if isinstance(peers, SimPeer) else None
        joins = there.admissions.pending if there is not None else {}
        shape = shape_of(state, chunks)
        if not joins or not shape.members:
            return shape
        new = tuple(chain.Member(peer, row, 0, True) for peer, (row, _) in sorted(joins.items()))
        members = shape.members + tuple(m for m in new if shape.index(m.peer_id) is None)
        return chain.state._shape(shape.round, shape.base, members, chunks)

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
        chain,
        "shape_of",
        lambda state, chunks: chain.state._shape(state.round + 1, state.parent, state.following, chunks),
    )


def uncapped_weight(patch: Patch) -> None:
    """For auditors, too."""
    reduce_part, uncapped = evidence.reduce_part, partial(dataclasses.replace, weight_cap_ratio=1e9)
    patch.setattr(evidence, "reduce_part", lambda sent, codec, *a: reduce_part(sent, uncapped(codec), *a))


def audit_by_another_sum(patch: Patch) -> None:
    """As a machine would whose arithmetic is not everybody's."""
    audit, uncapped = evidence.audit, partial(dataclasses.replace, weight_cap_ratio=1.0)
    patch.setattr(evidence, "audit", lambda reply, bundle, codec, *rest: audit(reply, bundle, uncapped(codec), *rest))


def name_another_weight_than_was_summed(patch: Patch) -> None:
    signed = evidence.SignedMessage

    def heavier(member: int, row: chain.Row, *rest: bytes) -> evidence.SignedMessage:
        return signed(member, msgspec.structs.replace(row, weight=row.weight + bool(row.weight)), *rest)

    patch.setattr(evidence, "SignedMessage", heavier)


def answer_for_the_members_of_another_branch(patch: Patch) -> None:
    """The contributions are attested as if the members came in another order."""
    attest = evidence.reduce_and_attest

    def mixed_up(contributions: Any, *arguments: Any, **named: Any) -> Any:
        turned = [one._replace(member=len(named["group"].peer_ids) - 1 - one.member) for one in reversed(contributions)]
        return attest(turned, *arguments, **named)

    patch.setattr(evidence, "reduce_and_attest", mixed_up)


def take_what_nobody_signed(patch: Patch) -> None:
    patch.setattr(answering.Answering, "_is_signed", lambda *_: True)


def believe_every_proof(patch: Patch) -> None:
    patch.setattr(evidence, "_check_named", lambda proof: None)
    patch.setattr(evidence, "_fault", lambda *_: "whatever")


def accuse_at_no_cost(patch: Patch) -> None:
    patch.setattr(chain_state, "STRIKES_TO_ACCUSE", 0)
    patch.setattr(chain_state, "may_accuse", lambda *_: True)
    patch.setattr(lying, "may_accuse", lambda *_: True)


def look_the_other_way(patch: Patch) -> None:
    for how in ("draw", "doubt"):
        patch.setattr(Audits, how, lambda *_: [])


def keep_a_proof_to_oneself(patch: Patch) -> None:
    """Neither hand it on nor seal it."""
    patch.setattr(Audits, "to_hand_on", lambda *_: [])
    patch.setattr(Audits, "expulsions", lambda *_: ((), ()))


def seal_a_proof_without_its_bytes(patch: Patch) -> None:
    expulsions = Audits.expulsions
    patch.setattr(Audits, "expulsions", lambda self, head: (expulsions(self, head)[0], ()))
    patch.setattr(Audits, "learn", lambda *_: None)


def forget_what_was_summed(patch: Patch) -> None:
    patch.setattr(auditing.Auditing, "keep", lambda *_: None)


def uncapped_uplink(patch: Patch) -> None:
    patch.setattr(chain.state, "counted_uplinks", lambda reducers: [m.row.uplink_kbit for m in reducers])


def uncapped_throughput(patch: Patch) -> None:
    def claimed(members: tuple[chain.Member, ...], ratio: float) -> float:
        return float(sum(m.row.sequences_per_kilosecond for m in members))

    patch.setattr(chain.state, "counted_throughput", claimed)


def serve_by_the_own_seal(patch: Patch) -> None:
    judge = chain.state._serving_and_failing

    def boastful(shape: chain.RoundShape, seal: chain.Seal) -> tuple[set[bytes], set[bytes]]:
        return judge(shape, msgspec.structs.replace(seal, sealer=b""))

    patch.setattr(chain.state, "_serving_and_failing", boastful)


def serve_without_every_reply(patch: Patch) -> None:
    def lenient(shape: chain.RoundShape, seal: chain.Seal) -> tuple[set[bytes], set[bytes]]:
        return {shape.members[part.reducer].peer_id for part in shape.parts} - {seal.sealer}, set()

    patch.setattr(chain.state, "_serving_and_failing", lenient)


def unbounded_weight(patch: Patch) -> None:
    """For auditors, too."""
    reduce_part, plain = evidence.reduce_part, partial(dataclasses.replace, robust="mean")
    patch.setattr(evidence, "reduce_part", lambda sent, codec, *a: reduce_part(sent, plain(codec), *a))


def count_who_has_just_come_in_full(patch: Patch) -> None:
    reduce_part = evidence.reduce_part
    patch.setattr(evidence, "reduce_part", lambda sent, codec, *part: reduce_part(sent, codec, *part[:3]))


def send_before_the_own_log_knows(patch: Patch) -> None:
    """After a crash the contribution is another one."""
    patch.setattr(OwnLog, "write", lambda self, entry: None)


def forget_outcomes_at_a_crash(patch: Patch) -> None:
    patch.setattr(Ledger, "replay", lambda self, outcome, *, in_momentum: None)


def judge_forks_by_work_alone(patch: Patch) -> None:
    def judge(common: forks.Mark, ours: forks.Branch, theirs: forks.Branch, *_: object, **__: object) -> forks.Verdict:
        head, end = (ours.marks or [common])[-1], theirs.marks[-1]
        return forks.Verdict(0, 0, chain.better(end.total, end.id, head.total, head.id))

    patch.setattr(forks, "judge", judge)


def let_strangers_seal_alone(patch: Patch) -> None:
    patch.setattr(ForkChoice, "_by_a_stranger", lambda *_: False)
    patch.setattr(forks, "HEARD_SEALS_MIN", -10_000)
    patch.setattr(fork_choice, "Branch", lambda marks, voices, *_: forks.Branch(marks, ()))


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
    uncapped_uplink,
    uncapped_throughput,
    serve_by_the_own_seal,
    serve_without_every_reply,
    unbounded_weight,
    count_who_has_just_come_in_full,
    send_before_the_own_log_knows,
    forget_outcomes_at_a_crash,
    audit_by_another_sum,
    name_another_weight_than_was_summed,
    answer_for_the_members_of_another_branch,
]
#: mutation -> the liars that it lets have their way
OF_LIES = {
    take_what_nobody_signed: "unsigned",
    believe_every_proof: "false_prover",
    accuse_at_no_cost: "false_accuser",
    look_the_other_way: "wrong_sum",
    keep_a_proof_to_oneself: "wrong_sum",
    seal_a_proof_without_its_bytes: "wrong_sum",
    forget_what_was_summed: "wrong_sum",
}


#: the histories that these break are rare: begin with one of them
BEGIN_AT = {
    forget_through_a_restart_who_was_there: 180,
    ignore_the_fork_rule: 94,
    judge_forks_by_work_alone: 159,
    let_strangers_seal_alone: 63,
}


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.__name__)
def test_a_deliberate_bug_is_caught(mutation: Callable[[Patch], None], monkeypatch: Patch) -> None:
    mutation(monkeypatch)
    faults = ("crash", "wipe", CORRUPT) if mutation is accept_a_snapshot_without_a_root else FAULTS
    begin = BEGIN_AT.get(mutation, 0)
    seeds = [*range(begin, SEEDS), *range(begin)]
    # Lines are measured by messages of some thousands of bytes.
    chunks = 400 if mutation is uncapped_uplink else 12
    # A bounded sum holds weight times norm to the middle one's, so that a weight alone hardly matters.
    robust = "mean" if mutation is uncapped_weight else msgspec.UNSET
    manifest = msgspec.structs.replace(MANIFEST, round=msgspec.structs.replace(MANIFEST.round, robust=robust))
    torch.set_num_threads(1)
    changes = {"chunks": chunks, "manifest": manifest}
    histories = (simulate(dataclasses.replace(scenario(seed, faults), **changes)) for seed in seeds)
    caught = next((report for report in histories if report.violations), None)
    assert caught is not None
    assert not re.search("(Attribute|Type|Name)Error", caught.violations[0]), "the bug itself is broken"
    print(f"{mutation.__name__}: seed {caught.seed}: {caught.violations[0][:200]}")


@pytest.mark.parametrize("mutation", OF_LIES, ids=lambda mutation: mutation.__name__)
def test_a_deliberate_bug_gives_liars_their_way(
    mutation: Callable[[Patch], None], tmp_path: Path, monkeypatch: Patch
) -> None:
    """What `test_lying.py` claims of them does not hold."""
    monkeypatch.setattr(evidence, "AUDITED_SHARE", 1e9)
    mutation(monkeypatch)
    torch.set_num_threads(1)
    scenario = Scenario(manifest=MANIFEST, seed=1, peers=4, faults=(), even_speeds=True)
    swarm = lying.Lying(scenario, tmp_path, OF_LIES[mutation])
    report, outcome = swarm.run(), swarm.outcome
    honest_reduce_less = min(outcome.reduced.values(), default=1.0) < 1.0
    at_large = OF_LIES[mutation] == "wrong_sum" and outcome.rounds_until_expelled is None
    assert report.violations or honest_reduce_less or at_large


def test_a_violation_exits_with_the_command_that_replays_it(tmp_path: Path, monkeypatch: Patch) -> None:
    forget_to_return_pending(monkeypatch)
    path = tmp_path / "run.toml"
    path.write_text(render(MANIFEST))
    done = CliRunner().invoke(app, ["simulate", str(path), "--seed", "1", "--format", "json"])
    assert done.exit_code == 13
    assert done.stderr.splitlines()[-1].startswith(f"p2ptrain simulate {path} --peers 5 --seed 1 ")
