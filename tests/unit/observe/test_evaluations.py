"""What peers say of the model: compared, marked where it is far off, kept across crashes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from lone import identity_of

from p2ptrain.observe.evaluations import (
    Evaluation,
    History,
    Summary,
    evaluation_lines,
    figures_text,
    live_text,
    marked,
    read_history,
    summary_of,
)
from p2ptrain.observe.turns import Turn
from p2ptrain.swarm.identity import format_peer_id
from p2ptrain.swarm.records import EvaluationRecord

A, B = bytes([1]) * 32, bytes([2]) * 32


def said(by: str, round: int, bits: float, *, tokens: int = 1000, state_id: bytes = A) -> Evaluation:
    return Evaluation(
        time=float(round),
        round=round,
        state_id=state_id.hex(),
        by=format_peer_id(identity_of(by).peer_id),
        figures={"perplexity": 9.0, "bits_per_byte": bits},
        tokens=tokens,
    )


def summary(*evaluations: Evaluation) -> Summary:
    found = summary_of(evaluations)
    assert found is not None
    return found


def test_the_newest_figure_stands_beside_the_median_of_each_peers_newest() -> None:
    found = summary(said("grace", 20, 2.0), said("linus", 30, 1.9), said("ada", 10, 9.0), said("ada", 40, 1.8))
    assert found.latest.round == 40 and found.latest.headline == "bits_per_byte"
    assert (found.median, found.measurers, found.far_off) == (1.9, 3, False)
    assert summary_of([]) is None


@pytest.mark.parametrize("lie", [0.5, 1.2, 4.0])
def test_a_figure_far_from_those_of_others_is_marked_and_the_median_shown_before_it(lie: float) -> None:
    found = summary(said("ada", 10, 1.62), said("grace", 20, 1.60), said("linus", 30, 1.58), said("edsger", 40, lie))
    assert found.far_off
    text = live_text(found)
    assert text.startswith(f"held-out {found.median:.3f} bits/byte, median of 4")
    assert text.endswith(f"{found.latest.by[-8:]} says {lie:.3f} bits/byte: far off") and len(text) < 80
    assert "FAR OFF" in "\n".join(evaluation_lines(found, {}))


def test_honest_figures_of_a_model_that_learns_fast_are_not_marked() -> None:
    names = ("ada", "grace", "linus", "edsger", "barbara")
    falling = [said(names[n % 5], 10 * n, 1.2 + 3.0 * 0.6**n) for n in range(20)]
    assert not any(far_off for _, far_off in marked(falling))
    with_lie = [*falling[:12], said("mallory", 115, 0.4), *falling[12:]]
    assert [one.by for one, far_off in marked(with_lie) if far_off] == [with_lie[12].by]


def test_of_two_peers_nobody_can_tell_which_is_wrong() -> None:
    assert not summary(said("ada", 10, 1.6), said("grace", 20, 0.2)).far_off


def test_those_that_measured_one_round_agree_or_differ() -> None:
    found = summary(
        said("ada", 10, 1.6),
        said("grace", 10, 1.6000001),
        said("linus", 10, 1.5),
        said("edsger", 10, 1.5, tokens=10),
        said("barbara", 10, 1.5, state_id=B),
    )
    assert found.agree + found.differ == 1, "another state, or other tokens, cannot be compared"
    found = summary(said("ada", 10, 1.6), said("grace", 10, 1.6000001), said("linus", 10, 1.5))
    assert (found.agree, found.differ) == (1, 2)
    assert "  of those that measured that round, 1 agree and 2 differ" in evaluation_lines(found, {})


def test_the_lines_name_who_says_so_and_what_can_be_done_about_it() -> None:
    one = said("ada", 200, 1.4321)
    first, *_, last = evaluation_lines(summary(one), {one.by: "ada"})
    assert first == f"held-out: 1.432 bits/byte, perplexity 9 on 1,000 tokens at round 200, says ada ({one.by[-8:]})"
    assert last.endswith("p2ptrain eval --round 200")
    assert figures_text({"top-5": 0.98765, "accuracy": 0.5}) == "top-5 0.9877, accuracy 0.5"


def record(round: int, bits: float, state_id: bytes = A) -> EvaluationRecord:
    return EvaluationRecord(round=round, state_id=state_id, figures={"bits_per_byte": bits}, tokens=5, seconds=0.1)


def test_a_history_outlives_a_crash_within_a_line_and_has_each_figure_once(tmp_path: Path) -> None:
    path, ada, grace = tmp_path / "evaluations.jsonl", identity_of("ada").peer_id, identity_of("grace").peer_id
    history = History(path, "ab" * 32)
    assert history.summary(()) is None
    assert [one.round for one in history.hear([(ada, record(10, 2.0)), (grace, record(20, 1.9))])] == [10, 20]
    assert history.hear([(ada, record(10, 1.0))]) == [], "the first that a peer says of a state"
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"time": 1.0, "rou')
    again = History(path)
    assert again.hear([(grace, record(20, 1.9)), (ada, record(30, 1.8))])[0].round == 30
    assert [one.round for one in read_history(path)] == [10, 20, 30]
    assert path.read_bytes().startswith(whole)
    first = json.loads(path.read_text().splitlines()[0])
    assert first["by"] == format_peer_id(ada) and first["figures"] == {"bits_per_byte": 2.0}
    assert first["state_id"] == A.hex() and first["tokenizer_sha256"] == ""


def test_figures_of_a_branch_that_was_left_count_no_more(tmp_path: Path) -> None:
    ada, grace = identity_of("ada").peer_id, identity_of("grace").peer_id
    history = History(tmp_path / "evaluations.jsonl")
    history.hear([(ada, record(10, 2.0)), (grace, record(20, 1.9, B))])
    found = history.summary([Turn(20, A, ada)])
    assert found is not None and found.latest.round == 10


def test_a_full_disk_costs_a_line_and_not_the_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    history = History(tmp_path / "no such folder" / "evaluations.jsonl")
    assert len(history.hear([(identity_of("ada").peer_id, record(10, 2.0))])) == 1
    assert "cannot write to" in caplog.text
