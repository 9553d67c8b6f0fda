"""Whatever donors do, each piece arrives once as long as one honest donor stays."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2ptrain.history.piece_plan import (
    ASKED_AT_ONCE,
    DONORS_MAX,
    FAILURES_MAX,
    FIRST_PATIENCE_SECONDS,
    PATIENCE_MEDIANS,
    PAUSE_SECONDS,
    PiecePlan,
)

SALT = b"us"


class Fault(Enum):
    NONE = "honest"
    LIES = "each piece is wrong"
    DIES = "every call fails"
    CRAWLS = "a hundred times slower than others"
    BUSY = "too much to do, three times out of four"
    LEAVES = "does not have it any more, after two pieces"


@dataclass
class Donor:
    name: bytes
    fault: Fault
    held: bytes
    seconds: float
    calls: int = 0


def faulty_donors(pieces: int) -> st.SearchStrategy[list[tuple[Fault, bytes, float]]]:
    bitmaps = st.binary(min_size=-(-pieces // 8), max_size=-(-pieces // 8)) | st.just(b"")
    return st.lists(st.tuples(st.sampled_from(Fault), bitmaps, st.floats(0.1, 3.0)), max_size=12)


class Simulation:
    """One download: each donor answers what it is asked, or does as its fault says."""

    def __init__(self, pieces: int, donors: list[Donor]) -> None:
        self.plan, self.donors, self.pieces = PiecePlan(pieces, SALT), {d.name: d for d in donors}, pieces
        self.now = 0.0
        self.written: list[int] = []
        #: donor -> its piece, and when it comes
        self.under_way: dict[bytes, tuple[int, float]] = {}
        self.liars_asked: dict[bytes, int] = {}
        for donor in donors:
            self.plan.holds(donor.name, donor.held)

    def run(self) -> None:
        for _ in range(200 * (self.pieces + 10)):
            if self.plan.done:
                return
            for name in self.plan.idle(self.now):
                piece = self.plan.next_for(name, self.now)
                if piece is not None:
                    donor = self.donors[name]
                    assert donor.fault is not Fault.LIES or not donor.calls, "a liar is not asked again"
                    assert not donor.held or donor.held[piece >> 3] >> (piece & 7) & 1
                    donor.calls += 1
                    slow = 100.0 if donor.fault is Fault.CRAWLS else 1.0
                    seconds = min(donor.seconds * slow, self.plan.deadline_seconds)
                    self.under_way[name] = piece, self.now + seconds
            self.check()
            if self.under_way:
                name = min(self.under_way, key=lambda n: self.under_way[n][1])
                self.now = min(self.now + 0.25, self.under_way[name][1])
                if self.under_way[name][1] <= self.now:
                    self.answer(self.donors[name])
            else:
                self.now += 0.25
        raise AssertionError(f"{self.plan.missing} pieces never came")

    def check(self) -> None:
        assert len(self.under_way) <= DONORS_MAX
        asked = [piece for piece, _ in self.under_way.values()]
        assert max(map(asked.count, asked), default=0) <= ASKED_AT_ONCE
        assert not set(asked) & set(self.written)

    def answer(self, donor: Donor) -> None:
        piece, _ = self.under_way.pop(donor.name)
        match donor.fault:
            case Fault.LIES:
                self.plan.lied(donor.name)
                self.plan.holds(donor.name, b"")
            case Fault.DIES:
                self.plan.failed(donor.name, self.now)
            case Fault.BUSY if donor.calls % 4:
                self.plan.later(donor.name, self.now)
            case Fault.LEAVES if donor.calls > 2:
                self.plan.gone(donor.name)
            case Fault.CRAWLS if self.now and donor.seconds * 100 > self.plan.deadline_seconds:
                self.plan.failed(donor.name, self.now)
            case _:
                rivals = self.plan.rivals(donor.name)
                if self.plan.arrived(donor.name, self.now):
                    self.written.append(piece)
                for rival in rivals:
                    self.plan.outrun(rival, self.now)
                    del self.under_way[rival]


@given(st.integers(1, 70), st.data(), st.integers(0, 12))
def test_every_piece_arrives_once_as_long_as_one_honest_donor_stays(pieces: int, data: st.DataObject, at: int) -> None:
    others = data.draw(faulty_donors(pieces))
    donors = [Donor(bytes([n]), fault, held, seconds) for n, (fault, held, seconds) in enumerate(others)]
    donors.insert(at, Donor(b"honest", Fault.NONE, b"", 1.0))
    simulation = Simulation(pieces, donors)
    simulation.run()
    assert sorted(simulation.written) == list(range(pieces))
    assert not simulation.plan.hopeless


def test_what_was_there_before_is_not_asked_for() -> None:
    plan = PiecePlan(3, SALT)
    plan.have(0)
    plan.have(2)
    plan.holds(b"a", b"")
    assert plan.next_for(b"a", 0.0) == 1 and plan.arrived(b"a", 1.0) and plan.done


def test_the_piece_of_a_donor_that_fails_is_asked_of_the_next_and_the_donor_left_alone_for_longer_each_time() -> None:
    plan = PiecePlan(1, SALT)
    plan.holds(b"a", b"")
    plan.holds(b"b", b"")
    now = 0.0
    for pause in PAUSE_SECONDS[:FAILURES_MAX]:
        assert plan.next_for(b"a", now) == 0
        plan.failed(b"a", now)
        assert plan.next_for(b"a", now + pause - 0.01) is None
        now += pause
    assert not plan.hopeless
    plan.gone(b"b")
    assert plan.hopeless


def test_a_donor_that_has_too_much_to_do_is_never_given_up() -> None:
    plan = PiecePlan(1, SALT)
    plan.holds(b"a", b"")
    for attempt in range(20):
        assert plan.next_for(b"a", 100.0 * attempt) == 0
        plan.later(b"a", 100.0 * attempt)
    assert not plan.hopeless


def test_a_piece_that_crawls_is_asked_of_a_second_donor_and_the_first_to_come_counts() -> None:
    plan = PiecePlan(8, SALT)
    plan.holds(b"a", b"")
    plan.holds(b"b", b"")
    slow = plan.next_for(b"a", 0.0)
    now = 0.0
    while (piece := plan.next_for(b"b", now)) != slow:
        if piece is None:
            now += 0.5
            continue
        now += 1.0
        assert plan.arrived(b"b", now)
    # Towards the end, after one median and not only after four.
    assert now >= 1.0 and plan.missing == 1
    assert plan.rivals(b"b") == [b"a"]
    assert plan.arrived(b"b", now + 1.0) and plan.done
    plan.outrun(b"a", now + 1.0)
    assert plan.idle(now + 1.0) == [b"b"]


def test_in_the_middle_only_what_takes_several_times_the_median_is_asked_twice() -> None:
    plan = PiecePlan(3, SALT)
    for donor in (b"a", b"b", b"c"):
        plan.holds(donor, b"")
    assert plan.next_for(b"a", 0.0) is not None and plan.next_for(b"b", 0.0) is not None
    assert plan.arrived(b"b", 1.0)
    plan.gone(b"b")
    only = bytes([1 << plan.next_for(b"c", 1.0)])  # type: ignore[operator]
    plan.failed(b"c", 1.0)
    plan.holds(b"c", bytes([0b111 & ~only[0]]))
    # One piece is asked of nobody, and `c` does not hold it: this is not the end yet.
    assert plan.next_for(b"c", PATIENCE_MEDIANS - 0.1) is None
    assert plan.next_for(b"c", PATIENCE_MEDIANS + 0.1) is not None


def test_before_anything_has_come_a_piece_has_a_fixed_time() -> None:
    plan = PiecePlan(1, SALT)
    plan.holds(b"a", b"")
    plan.holds(b"b", b"")
    assert plan.next_for(b"a", 0.0) == 0
    assert plan.next_for(b"b", FIRST_PATIENCE_SECONDS - 0.1) is None
    assert plan.next_for(b"b", FIRST_PATIENCE_SECONDS) == 0


def test_the_rarest_piece_goes_first_and_learners_begin_elsewhere() -> None:
    plan = PiecePlan(8, SALT)
    plan.holds(b"all", b"")
    plan.holds(b"most", bytes([0b11110111]))
    assert plan.next_for(b"all", 0.0) == 3
    first = set()
    for number in range(16):
        other = PiecePlan(64, bytes([number]))
        other.holds(b"all", b"")
        first.add(other.next_for(b"all", 0.0))
    assert len(first) > 8


@pytest.mark.parametrize("bitmap", [b"\xff", b"\xff" * 3])
def test_a_bitmap_of_another_length_says_nothing(bitmap: bytes) -> None:
    plan = PiecePlan(16, SALT)
    plan.holds(b"a", bitmap)
    assert plan.idle(0.0) == []
