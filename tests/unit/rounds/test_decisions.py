"""What a machine remembers of its decisions: small, bounded, and readable when asked for."""

from __future__ import annotations

import gc
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))

from cluster import Cluster, Peer

from p2ptrain.chain import Row, Seal, SignedSeal
from p2ptrain.chain.sealed import Key
from p2ptrain.peer.driver import DECISIONS_MAX_CHARACTERS, RoundDriver
from p2ptrain.rounds import events
from p2ptrain.rounds.decisions import EFFECTS, RECORDS, Decisions, line, told

KEY = Key(7, b"\x2a" * 32)


def test_payloads_are_not_kept_alive() -> None:
    decisions = Decisions()
    payload = bytes(range(256)) * 4096
    ready = events.ContributionReady(KEY, Row(4, 1, 1), (payload, b""))
    decisions.hear(ready, 1.0)
    decisions.decide([events.SendContribution(KEY, 0, b"p" * 38, Row(4, 1, 1), payload, b"")])
    del ready
    assert payload not in [held for record in decisions._records for held in gc.get_referents(record.event)]
    assert sys.getrefcount(payload) <= 2
    assert f"{len(payload)} B" in decisions.lines()[0] and "empty" in decisions.lines()[0]
    assert "7@2a2a2a part 0 to 707070" in decisions.lines()[1]


def test_the_oldest_records_go_and_ticks_that_lead_to_nothing_are_one() -> None:
    decisions = Decisions()
    for second in range(2 * RECORDS):
        decisions.hear(events.PeerLeft(b"p" * 38), float(second))
        decisions.decide([events.SendJoin(b"q" * 38)] * (EFFECTS + 3))
    assert len(decisions._records) == RECORDS
    assert "and 3 more effects" in decisions.lines()[-1]
    before = len(decisions.lines(last=1))
    for second in range(1000, 2000):
        decisions.hear(events.Tick(), float(second))
    assert before > 1 and decisions.lines(last=2)[-1].split() == ["1999.00", "tick"]
    assert len(decisions._records) == RECORDS and decisions.lines(last=2)[0].endswith("says goodbye")


def test_a_line_names_peers_as_it_is_told_to() -> None:
    assert line(events.PeerLeft(b"p" * 38), lambda peer: "ada") == "ada says goodbye"


def _failing(machine: Any, path: Path) -> Any:
    return SimpleNamespace(machine=machine, _p=SimpleNamespace(decisions_log=path), _decisions_written=False)


def test_a_failure_leaves_the_decisions_in_the_home(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ada = Cluster().add("ada", founder=True)
    path = tmp_path / "decisions.log"
    RoundDriver.write_decisions(_failing(ada.machine, path), "OSError(28)")
    text = path.read_text()
    assert text.startswith("OSError(28)\n") and "-> publish solo seal" in text
    assert len(text) < DECISIONS_MAX_CHARACTERS and str(path) in caplog.text


def test_the_first_failure_is_the_one_that_is_kept(tmp_path: Path) -> None:
    failing = _failing(Cluster().add("ada", founder=True).machine, tmp_path / "decisions.log")
    RoundDriver.write_decisions(failing, "the first")
    RoundDriver.write_decisions(failing, "what followed from it")
    assert (tmp_path / "decisions.log").read_text().startswith("the first\n")


def test_news_that_changes_nothing_pushes_no_round_out() -> None:
    decisions = Decisions()
    decisions.hear(events.PeerLeft(b"p" * 38), 0.0)
    decisions.decide([])
    for number in range(2 * RECORDS):
        decisions.hear(events.TipHeard(bytes([number % 7]) * 38, 5, b"i" * 32, 9), 1.0 + number)
        decisions.decide([])
    assert "says goodbye" in decisions.lines()[0]


@given(st.binary(max_size=130), st.integers(0, 9), st.lists(st.just(b"h" * 32) | st.just(b""), max_size=3))
def test_every_seal_that_can_be_heard_can_be_told(included: bytes, rows: int, parts: list[bytes]) -> None:
    """Form and signature are all that is known of a seal when it is heard: its bitmap may fit no members."""
    heard = Seal(
        1, b"r" * 32, 1, b"p" * 32, 0, b"s" * 38, False, included, tuple(parts), (Row(4, 1, 1),) * rows, (), b""
    )
    told(events.SealHeard(b"i" * 32, heard, SignedSeal(b"", b"s" * 64), b"p" * 38)).line()


def test_a_full_disk_is_said_and_nothing_is_raised(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ada = Cluster().add("ada", founder=True)
    RoundDriver.write_decisions(_failing(ada.machine, tmp_path / "gone" / "decisions.log"), "OSError(28)")
    assert "cannot write" in caplog.text


def _two() -> tuple[Peer, Peer]:
    ada, bob = Cluster().group(2)
    return ada, bob


def test_invariants_hold_and_name_what_does_not() -> None:
    ada, bob = _two()
    ada.machine.check_invariants()
    ada.machine.group.heard[ada.id] = 1.0
    with pytest.raises(AssertionError, match="signs of life are of other members"):
        ada.machine.check_invariants()
    bob.machine.exchanges.current = ada.machine.exchanges.current
    with pytest.raises(AssertionError, match="our index in it"):
        bob.machine.check_invariants()
