"""Claims about fork choice: members behind a branch, and nothing that a stranger can make up, decide."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2ptrain.chain.forks import HEARD_SEALS_MIN, PAST_MAX, Branch, Mark, Past, judge

MEMBERS = tuple(f"member {n}".encode() for n in range(5))
STRANGERS = tuple(f"stranger {n}".encode() for n in range(500))
COMMON = Mark(10, b"common", 100, b"", False, frozenset(MEMBERS))


def branch(name: str, sealers: tuple[bytes, ...], *, each: int = 1, voices: tuple[bytes, ...] = ()) -> Branch:
    """A branch after `COMMON` whose seals are by these, in order, and count `each` more."""
    marks = [
        Mark(11 + n, f"{name} {n}".encode(), COMMON.total + each * (n + 1), sealer, False, frozenset())
        for n, sealer in enumerate(sealers)
    ]
    return Branch(marks, voices)


sealers = st.lists(st.sampled_from(MEMBERS + STRANGERS[:5]), min_size=1, max_size=30).map(tuple)
voices = st.lists(st.sampled_from(MEMBERS + STRANGERS[:5]), max_size=6).map(tuple)


def test_a_strangers_chain_of_any_length_and_total_loses_to_one_member() -> None:
    ours = branch("ours", MEMBERS[:1])
    theirs = branch("theirs", STRANGERS, each=500, voices=STRANGERS)
    verdict = judge(COMMON, ours, theirs)
    assert (verdict.ours, verdict.theirs, verdict.follow) == (1, 0, False)
    assert judge(COMMON, theirs, ours).follow


def test_one_members_own_chain_at_full_speed_loses_to_those_who_say_that_they_stay() -> None:
    ours = branch("ours", MEMBERS[1:2], voices=MEMBERS[1:])
    theirs = branch("theirs", MEMBERS[:1] * 1000, each=5, voices=MEMBERS[:1])
    assert not judge(COMMON, ours, theirs).follow
    assert not judge(COMMON, ours._replace(marks=()), theirs).follow
    later = branch("later", MEMBERS[1:3])
    assert judge(COMMON, theirs, later).follow


def test_at_a_tie_more_work_wins() -> None:
    ours, theirs = branch("ours", MEMBERS[:1] * 3), branch("theirs", MEMBERS[1:2] * 4)
    assert judge(COMMON, ours, theirs).follow and not judge(COMMON, theirs, ours).follow


@pytest.mark.parametrize(("mine", "other"), [(b"a", b"b"), (b"b", b"a")])
def test_at_a_tie_of_work_too_the_smaller_id_wins_and_not_the_longer_branch(mine: bytes, other: bytes) -> None:
    """Each side would change to the other's chain, if one went by length and the other by id."""
    ours = Branch([Mark(11, mine, 101, MEMBERS[0], False, frozenset())], ())
    theirs = Branch(branch("theirs", MEMBERS[1:2] * 3, each=0).marks, ())
    theirs.marks[-1:] = [theirs.marks[-1]._replace(id=other, total=101)]  # type: ignore[index]
    assert judge(COMMON, ours, theirs).follow == (other < mine)


def test_of_two_seals_on_one_state_the_one_whose_turn_it_was_wins_whatever_the_other_claims() -> None:
    ours, theirs = branch("ours", MEMBERS[:1]), branch("theirs", MEMBERS[1:2], each=5, voices=MEMBERS)
    assert not judge(COMMON, ours, theirs._replace(place=1)).follow
    assert judge(COMMON, ours._replace(place=2), theirs._replace(place=1)).follow


def test_of_a_long_branch_only_seals_count() -> None:
    """So that those whom one side alone can hear keep no two groups apart for ever."""
    length = max(HEARD_SEALS_MIN, 2 * len(MEMBERS)) + 1
    ours = branch("ours", MEMBERS[:1] * length, voices=MEMBERS[:3])
    theirs = branch("theirs", MEMBERS[3:])
    assert judge(COMMON, ours, theirs).follow
    assert not judge(COMMON, ours._replace(marks=ours.marks[:-1]), theirs).follow


def test_who_has_sealed_on_both_branches_speaks_for_neither() -> None:
    ours = branch("ours", (*MEMBERS[:1], *MEMBERS[1:2]), voices=MEMBERS[1:2])
    theirs = branch("theirs", MEMBERS[:1] * 9, each=5, voices=MEMBERS[:1])
    verdict = judge(COMMON, ours, theirs)
    assert (verdict.ours, verdict.theirs, verdict.follow) == (1, 0, False)


def test_but_where_the_others_are_even_what_it_says_decides() -> None:
    """As when it was led astray for a round, and went back."""
    ours = branch("ours", MEMBERS[:2], each=5, voices=MEMBERS[1:2])
    theirs = branch("theirs", (*MEMBERS[:1], *MEMBERS[2:3]), voices=MEMBERS[:1] + MEMBERS[2:3])
    assert judge(COMMON, ours, theirs).follow and not judge(COMMON, theirs, ours).follow


@pytest.mark.parametrize("length", [3, 30])
def test_the_one_member_of_a_young_run_takes_those_who_came_after_it_nowhere(length: int) -> None:
    """With it alone at the shared state, they are all that can count, however long ago that was."""
    founder, others = MEMBERS[0], STRANGERS[:4]
    common = COMMON._replace(members=frozenset({founder}))
    ours = branch("ours", (founder, founder, *others[:1] * length), voices=others)
    theirs = branch("theirs", (founder,) * 99, each=5, voices=(founder,))
    assert not judge(common, ours, theirs).follow
    assert judge(common, theirs._replace(marks=theirs.marks[:9]), ours).follow


def test_who_says_that_it_went_over_counts_there_alone() -> None:
    ours, theirs = branch("ours", MEMBERS[:3]), branch("theirs", MEMBERS[3:], voices=MEMBERS[1:2])
    verdict = judge(COMMON, ours, theirs)
    assert (verdict.ours, verdict.theirs) == (2, 3)


@given(sealers, sealers, voices, voices)
def test_with_the_same_voices_both_sides_judge_alike(
    one: tuple[bytes, ...], other: tuple[bytes, ...], heard: tuple[bytes, ...], also: tuple[bytes, ...]
) -> None:
    if (len(one) > HEARD_SEALS_MIN) != (len(other) > HEARD_SEALS_MIN):
        heard = also = ()
    ours, theirs = branch("one", one, voices=heard), branch("other", other, voices=also)
    assert judge(COMMON, ours, theirs).follow != judge(COMMON, theirs, ours).follow


def chain_of(count: int) -> list[Mark]:
    return [Mark(n, n.to_bytes(4, "big"), n, b"", False, frozenset()) for n in range(count)]


@given(st.integers(1, 2 * PAST_MAX), st.integers(1, 20))
def test_a_locator_begins_at_the_head_and_ends_at_the_oldest(count: int, most: int) -> None:
    past = Past(chain_of(count))
    rounds = [int.from_bytes(identifier, "big") for identifier in past.locator(most)]
    back = [count - 1 - number for number in rounds]
    oldest = min(count, PAST_MAX) - 1
    steps = [step for step in (0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192) if step < oldest]
    assert back == [*steps[: most - 1], oldest]


@given(st.integers(2, 2 * PAST_MAX), st.integers(2, 16), st.data())
def test_with_ids_between_two_others_one_comes_to_the_state_where_two_chains_parted(
    count: int, most: int, data: st.DataObject
) -> None:
    past = Past(chain_of(count))
    rounds = [mark.round for mark in past.after(past.locator(PAST_MAX)[-1])]
    if not rounds:
        return
    parted = data.draw(st.sampled_from(rounds))
    older, newer, asked = min(rounds), max(rounds), 0
    while newer - older > 1:
        ids = past.between(older.to_bytes(4, "big"), newer.to_bytes(4, "big"), most)
        there = [int.from_bytes(identifier, "big") for identifier in ids]
        assert there == sorted(set(there), reverse=True) and there[-1] == older and len(there) <= most
        newest = max([n for n in there if n <= parted], default=older)
        newer = min([n for n in there if n > newest], default=newer)
        older, asked = newest, asked + 1
    assert older in (parted, max(rounds) - 1, max(rounds)) and older <= parted and asked <= 8
    assert past.between(b"gone", rounds[-1].to_bytes(4, "big"), most) == []


@given(st.integers(2, 2 * PAST_MAX), st.data())
def test_the_past_is_the_last_states_of_one_chain(count: int, data: st.DataObject) -> None:
    marks = chain_of(count)
    past = Past(marks)
    kept = marks[-PAST_MAX:]
    assert past.head == kept[-1]
    assert [mark for mark in marks if mark.id in past] == kept
    at = data.draw(st.integers(0, len(kept) - 1))
    assert past.after(kept[at].id) == kept[at + 1 :]
    assert past.last_common([b"nothing", *(mark.id for mark in kept), b"of it"]) == len(kept)
    past.cut(kept[at].id)
    assert past.head == kept[at] and past.after(kept[at].id) == []
    assert past.last_common([mark.id for mark in kept]) == at


def test_who_carried_a_run_on_when_its_members_were_silent_yields_to_the_first_that_comes_back() -> None:
    """Those who had sealed before it on its branch are silent still. Who has come back since counts there."""
    learner = STRANGERS[0]
    carried_on = branch("carried on", (*MEMBERS[:2], *(learner,) * 20), each=5)
    back = branch("back", MEMBERS[2:3] * 3)
    assert not judge(COMMON, carried_on, back).follow
    yields = carried_on._replace(before_stranger=2)
    assert judge(COMMON, yields, back).follow and not judge(COMMON, back, yields).follow
    also_back = branch("also back", (*MEMBERS[:1], learner, *MEMBERS[1:2] * 5), each=5)._replace(before_stranger=1)
    assert not judge(COMMON, also_back, back).follow


def test_who_sealed_before_that_and_left_with_a_branch_of_its_own_speaks_for_neither() -> None:
    carried_on = branch("carried on", (*MEMBERS[:1], STRANGERS[0]), each=5)._replace(before_stranger=1)
    alone = branch("alone", MEMBERS[:1] * 9, voices=MEMBERS[:1])
    assert judge(COMMON, carried_on, alone).theirs == 0
