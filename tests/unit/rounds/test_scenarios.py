"""The protocol as text: what peers hear and decide in ten scenarios, compared with tests/scenarios/*.txt.

`pytest --regenerate-scenarios` writes the files anew. The docstring of a scenario is the head of its file.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from cluster import Cluster, Peer, roots

from p2ptrain.rounds import events
from p2ptrain.rounds.decisions import line

FOLDER = Path(__file__).parents[2] / "scenarios"
NAMES = ("ada", "bob", "cyd", "dan", "eve")
ROUTINE = (
    events.ContributionReady,
    events.ContributionReceived,
    events.ReplyHeld,
    events.SendContribution,
    events.Reduce,
    events.StartRound,
    events.PublishSeal,
)
"""Left out where a scenario is about something else."""
SILENT = (events.Tick, events.TipHeard, events.CameLate)
"""Events that are left out where they lead to nothing."""


class Story:
    """A cluster, and the text of what happens in it while it is told."""

    def __init__(self, **rules: float) -> None:
        self.cluster = Cluster(**rules)
        self.lines: list[str] = []
        self._began = 0.0
        self._whole = True

    def group(self, count: int) -> list[Peer]:
        """The first names, all of them members that have sent nothing for the round under way yet.

        They have had some rounds together, in which they learned when the others come.
        """
        peers = self.cluster.group(count, names=NAMES)
        self.cluster.run(6)
        self.even(peers)
        return peers

    def even(self, peers: list[Peer]) -> None:
        """Go on until all of them are in the same round and nobody has sent for it."""

        def begun() -> bool:
            return len({p.head.id for p in peers}) == 1 and all(
                p.machine.exchange_key is not None and p.machine.awaits(p.machine.exchange_key) for p in peers
            )

        self.cluster.until(begun, 60)

    def tell(self, what: str, *, whole: bool = True) -> None:
        """From here on what happens is told; what is routine only where it is to be the whole."""
        if self.cluster.listener is None and not self.lines:
            self._began = self.cluster.now
        self._whole = whole
        self.cluster.listener = self._hear
        self.say(what)

    def skip(self) -> None:
        """What happens from here on is not told."""
        self.cluster.listener = None

    def say(self, what: str) -> None:
        """A line between two empty ones."""
        self._gap()
        self.lines += [f"{self.cluster.now - self._began:6.2f}  ---- {what}", ""]

    def stand(self) -> None:
        """Where every peer stands."""
        self._gap()
        for peer in self.cluster.peers:
            head = peer.head
            members = " ".join(sorted(self.cluster.name_of(member.peer_id) for member in head.now))
            state = f"round {head.round}, total {head.total}, {head.id.hex()[:6]}, members {members}"
            self.lines.append(f"        {peer.name}: {state if peer.alive else 'gone'}")

    def _gap(self) -> None:
        if not self.lines or self.lines[-1]:
            self.lines.append("")

    def _hear(self, peer: Peer, event: events.Event, effects: list[events.Effect]) -> None:
        routine = () if self._whole else ROUTINE
        shown = [effect for effect in effects if not isinstance(effect, routine)]
        if not shown and isinstance(event, SILENT + routine):
            return
        name_of = self.cluster.name_of
        self.lines.append(f"{self.cluster.now - self._began:6.2f}  {peer.name}  {line(event, name_of)}")
        self.lines += [f"             -> {line(effect, name_of)}" for effect in shown]


def a_calm_round() -> Story:
    """Three members train one round together.

    Look at how each sends one payload per part to the member that reduces it, how each reduces its own part as soon as
    all have arrived, and how the first sealer's seal is applied by all who hold the replies that it names.
    """
    story = Story()
    ada, bob, cyd = story.group(3)
    number = ada.head.round
    story.tell("the round begins")
    story.cluster.until(lambda: min(p.head.round for p in (ada, bob, cyd)) > number, 30)
    story.say("all have applied the seal")
    story.stand()
    return story


def a_late_member() -> Story:
    """The trainer of cyd takes much longer than the others for a round.

    Look at how cyd stands in for its trainer with empty payloads of weight 0, so that it is included and stays a
    member, and how the others wait for it no longer than they have learned to.
    """
    story = Story()
    ada, bob, cyd = story.group(3)
    cyd.slowness = None
    number = ada.head.round + 1
    story.cluster.until(lambda: min(p.head.round for p in (ada, bob, cyd)) == number, 30)
    story.even([ada, bob, cyd])
    story.tell("the trainer of cyd hands nothing over")
    story.cluster.until(lambda: min(p.head.round for p in (ada, bob, cyd)) > number, 60)
    story.stand()
    return story


def a_dead_reducer() -> Story:
    """A member takes all contributions to its part, and dies before it answers.

    Look at how the others wait for its reply until their deadline, and how the seal then skips that part alone: the
    rest of the round's work is used.
    """
    story = Story()
    ada, bob, cyd = story.group(3)
    cyd.replies_left = 0
    number = ada.head.round
    story.tell("cyd will die when it is about to send its first reply")
    story.cluster.until(lambda: not cyd.alive, 30)
    story.say("cyd is dead")
    story.cluster.until(lambda: min(p.head.round for p in (ada, bob)) > number, 60)
    story.stand()
    return story


def a_lost_sealer() -> Story:
    """The member whose turn it is to seal dies after its replies have left.

    Look at how the second place waits one seal timeout longer and seals in its stead: nothing of the round is lost.
    """
    story = Story()
    peers = story.group(3)
    shape = peers[0].machine.shape
    assert shape is not None
    first = story.cluster.by_id[shape.members[shape.sealer_order[0]].peer_id]
    others = [peer for peer in peers if peer is not first]
    story.tell(f"{first.name} is to seal this round", whole=False)
    story.cluster.until(lambda: any(key.round == shape.round for key, _ in first.frozen), 30)
    story.cluster.kill(first)
    story.say(f"{first.name} is dead; its reply is on the way")
    story.cluster.until(lambda: min(p.head.round for p in others) >= shape.round, 60)
    story.stand()
    return story


def an_even_split_that_heals() -> Story:
    """Four members fall into two pairs that do not hear each other, and later hear each other again.

    Look at how both pairs go on, how the peers of one chain ask the others for theirs once the link is back, and how
    all end on the better chain, where those who left it join again.
    """
    story = Story()
    peers = story.group(4)
    story.cluster.split(peers[:2], peers[2:])
    story.cluster.run(60)
    story.tell("after a minute in two halves", whole=False)
    story.stand()
    story.cluster.heal()
    story.say("the link is back")
    story.cluster.until(lambda: story.cluster.one_chain(*peers), 80)
    story.say("one chain")
    story.skip()
    story.cluster.until(lambda: all(len(p.head.now) == 4 for p in peers), 80)
    story.say("one group")
    story.stand()
    return story


def a_joiner() -> Story:
    """A new peer comes to two that train.

    Look at how it first fetches the chain, then asks the sealers of the round to admit it, and how it becomes a member
    two rounds after the seal that admits it.
    """
    story = Story()
    story.group(2)
    story.tell("cyd comes", whole=False)
    cyd = story.cluster.add("cyd")
    story.cluster.until(lambda: cyd.machine.is_member, 60)
    story.say("cyd is a member")
    story.cluster.until(lambda: cyd.head.round > 0 and cyd.contributed[-1][1], 30)
    story.say("the first seal since cyd has contributed is applied")
    story.stand()
    return story


def two_solos_that_meet() -> Story:
    """Two members trained alone, each for itself, and find each other again.

    Look at how the one whose chain has less work in it gives its own up for the other's by a snapshot, for it is older
    than what can be rolled back, and joins again there.
    """
    story = Story()
    ada, bob = story.group(2)
    story.cluster.split([ada], [bob])
    bob.slowness = 3.0
    story.cluster.run(60)
    story.tell("after a minute alone", whole=False)
    story.stand()
    story.cluster.heal()
    bob.slowness = 1.0
    story.say("the link is back")
    story.cluster.until(lambda: len(ada.head.now) == len(bob.head.now) == 2 and story.cluster.one_chain(ada, bob), 60)
    story.say("both are members of one group")
    story.stand()
    return story


def a_rollback() -> Story:
    """One of three is cut off and seals alone a round that the others seal as well.

    Look at how, once the link is back, it rolls its own seal back and applies that of the chain with the larger total.
    """
    story = Story(alone_after_seconds=9.0)
    ada, bob, cyd = story.group(3)
    story.cluster.split([ada, bob], [cyd])
    story.cluster.until(lambda: cyd.rounds[-1].seal.solo and min(ada.head.round, bob.head.round) >= cyd.head.round, 90)
    story.tell("cyd has sealed one round alone", whole=False)
    story.stand()
    story.cluster.heal()
    story.say("the link is back")
    story.cluster.until(lambda: story.cluster.one_chain(ada, bob, cyd), 40)
    story.say("one chain")
    story.stand()
    return story


def a_root_that_differs() -> Story:
    """The replica of cyd has gone wrong, and its hash differs from that of the others.

    Look at how the seal two rounds after the hashed one carries the hash that most members sent, and how cyd, when it
    applies that seal, loads the state of a member whose hash is the sealed one.
    """
    story = Story(root_interval=4)
    peers = story.group(3)
    base = (peers[0].head.round // 4 + 1) * 4
    story.cluster.until(lambda: min(p.head.round for p in peers) >= base, 60)
    story.tell(f"round {base} is applied, and the trainers hash their replicas", whole=False)
    for peer, root in zip(peers, (b"r" * 32, b"r" * 32, b"x" * 32), strict=True):
        roots(peer, base, root)
    cyd = peers[2]
    story.cluster.until(lambda: bool(cyd.resyncs), 30)
    resynced_at = cyd.head.round
    story.cluster.until(lambda: cyd.head.round > resynced_at, 30)
    story.stand()
    return story


def a_leave() -> Story:
    """A member says goodbye and goes.

    Look at how the others close their parts without it at once, skip the part that it would have reduced after the
    deadline for replies, and have it out of the group once three seals in a row have left it out.
    """
    story = Story()
    ada, bob, cyd = story.group(3)
    story.tell("cyd leaves", whole=False)
    story.cluster.leave(cyd)
    story.say("cyd is gone")
    story.cluster.until(lambda: all(len(p.head.now) == 2 for p in (ada, bob)), 60)
    story.stand()
    return story


SCENARIOS = (
    a_calm_round,
    a_late_member,
    a_dead_reducer,
    a_lost_sealer,
    an_even_split_that_heals,
    a_joiner,
    two_solos_that_meet,
    a_rollback,
    a_root_that_differs,
    a_leave,
)


def text_of(scenario: Callable[[], Story]) -> str:
    """The file of a scenario: what to look at, then what happens."""
    assert scenario.__doc__ is not None
    head = [f"# {text.strip()}".rstrip() for text in scenario.__doc__.strip().splitlines()]
    story = scenario()
    story.cluster.check()
    return "\n".join([*head, *story.lines]) + "\n"


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_a_scenario_goes_as_its_file_says(scenario: Callable[[], Story], request: pytest.FixtureRequest) -> None:
    path = FOLDER / f"{scenario.__name__}.txt"
    text = text_of(scenario)
    if request.config.getoption("--regenerate-scenarios"):
        path.write_text(text, encoding="utf-8")
    assert path.exists(), "run pytest --regenerate-scenarios once"
    assert text == path.read_text(encoding="utf-8")


def test_every_file_is_of_a_scenario() -> None:
    assert {path.stem for path in FOLDER.glob("*.txt")} == {scenario.__name__ for scenario in SCENARIOS}
