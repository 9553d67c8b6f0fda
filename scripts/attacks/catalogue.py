"""The list of attacks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from attacks.chains import MadeUpMembers, OfflineChain, TipNeverDelivered
from attacks.comings import DyingNewcomers, FileCalls, ManyJoins, MemberSolo
from attacks.donors import FirstContact, HostileManifests, HostileSnapshots, HostileTexts
from attacks.floods import (
    DialElsewhere,
    FalseRecords,
    IdleAndSlow,
    Malformed,
    ReplayedSeals,
    UnfinishedFrames,
)
from attacks.hostile import Attack
from attacks.members import LyingMember
from attacks.replays import ReplayedGrants, ReplayedJoins

Newcomer = Literal["none", "one honest", "hostile alone"]


@dataclass(frozen=True)
class Spec:
    """What an attack's name means."""

    kind: type[Attack]
    what: str
    options: dict[str, int | str] = field(default_factory=dict)
    member: bool = False
    """It begins as a member that behaves: calm is measured with it."""
    attacker: str = "outsider"
    newcomer: Newcomer = "none"
    """Which addresses an honest newcomer is told that comes during the attack, if one does."""
    access: str = "open"
    rounds_before: int = 0
    """Of the run, before calm is measured: so many that a newcomer fetches a snapshot."""
    own_text: bool = False
    """The run's text is not the one that every peer has."""
    counts_messages: bool = False
    """The attack lasts until as many as `--messages` says are sent."""


ATTACKS = {
    "offline_chain": Spec(OfflineChain, "seals alone off line from the tip on, comes back with the larger total"),
    "offline_chain_from_beginning": Spec(OfflineChain, "the same from round 0 on", {"from_beginning": 1}),
    **{
        f"made_up_members_{count}": Spec(
            MadeUpMembers,
            f"forges rounds that include made-up identities, {count} of them",
            {"identities": count},
        )
        for count in (1, 50, 500)
    },
    "tip_never_delivered": Spec(TipNeverDelivered, "names a better tip and never answers for it", {"how": "silence"}),
    "tip_far_off": Spec(
        TipNeverDelivered, "says that it has nothing in common, then never answers", {"how": "nothing in common"}
    ),
    "tip_trickled": Spec(TipNeverDelivered, "names a better tip and sends its round byte by byte", {"how": "trickle"}),
    "snapshot_trickled": Spec(TipNeverDelivered, "names a tip far ahead, trickles its snapshot", {"how": "snapshot"}),
    "many_joins": Spec(ManyJoins, "50 identities ask for admission and never do anything", {"identities": 50}),
    "dying_newcomers": Spec(DyingNewcomers, "every 5 s a newcomer becomes a member and dies"),
    "withholding_member": Spec(
        LyingMember, "takes contributions, never replies", {"lie": "withhold"}, member=True, attacker="member"
    ),
    "lying_reducer": Spec(
        LyingMember, "replies with the opposite of each sum", {"lie": "wrong_sum"}, member=True, attacker="member"
    ),
    "withheld_audit": Spec(
        LyingMember,
        "does so, and shows nobody what it summed",
        {"lie": "wrong_sum_withheld"},
        member=True,
        attacker="member",
    ),
    "two_replies": Spec(
        LyingMember, "gives every other peer another reply", {"lie": "two_replies"}, member=True, attacker="member"
    ),
    "member_solo": Spec(MemberSolo, "leaves, seals alone, comes back", member=True, attacker="member"),
    "censor": Spec(
        LyingMember,
        "reduces and seals nothing that one honest member has part in",
        {"lie": "censor"},
        member=True,
        attacker="member",
    ),
    "seal_of_nothing": Spec(
        LyingMember,
        "seals rounds without any reply, each time that it may",
        {"lie": "seal_of_nothing"},
        member=True,
        attacker="member",
    ),
    "seal_out_of_turn": Spec(
        LyingMember,
        "seals each round as soon as it can",
        {"lie": "seal_out_of_turn"},
        member=True,
        attacker="member",
    ),
    "false_root": Spec(
        LyingMember,
        "names roots of a state that only its own snapshots have",
        {"lie": "false_root"},
        member=True,
        attacker="member",
    ),
    "replayed_contributions": Spec(
        LyingMember,
        "sends its contributions again and again",
        {"lie": "replay"},
        member=True,
        attacker="member",
    ),
    "replayed_seals": Spec(ReplayedSeals, "passes on the seals of all rounds again and again"),
    "file_calls": Spec(FileCalls, "asks for pieces of the text with 50 identities", {"identities": 50}, own_text=True),
    "replayed_joins": Spec(
        ReplayedJoins,
        "20 identities repeat what newcomers said to join",
        {"identities": 20},
        member=True,
        attacker="member",
        newcomer="one honest",
    ),
    "replayed_grants": Spec(
        ReplayedGrants,
        "20 identities show a guest's grant as theirs, in a run by invitation",
        {"identities": 20},
        newcomer="one honest",
        access="invite",
    ),
    "hostile_manifest": Spec(
        HostileManifests, "hands a newcomer manifests that are none, in eight ways", newcomer="one honest"
    ),
    "hostile_text": Spec(
        HostileTexts, "hands a newcomer texts that are none, in nine ways", newcomer="one honest", own_text=True
    ),
    "hostile_snapshot": Spec(
        HostileSnapshots,
        "hands a newcomer snapshots of a wrong content, in four ways",
        newcomer="one honest",
        rounds_before=80,
    ),
    **{
        name: Spec(
            FirstContact,
            f"is the only peer that a newcomer is told, with {rounds} rounds of its own",
            {"rounds": rounds},
            newcomer="hostile alone",
        )
        for name, rounds in (("hostile_first_contact", 20), ("hostile_first_contact_far", 400))
    },
    "malformed": Spec(
        Malformed,
        "malformed messages over all calls, malformed records over the DHT",
        {"identities": 8},
        counts_messages=True,
    ),
    "idle_and_slow": Spec(IdleAndSlow, "500 idle connections, slow streams on all peers", {"connections": 500}),
    "unfinished_frames": Spec(UnfinishedFrames, "200 unfinished frames of 1 MiB on each peer", {"streams": 200}),
    "forged_peers": Spec(FalseRecords, "records of 2,000 made-up peers of the run", {"what": "peers", "count": 2000}),
    "foreign_runs": Spec(FalseRecords, "500 made-up runs in the same DHT", {"what": "runs", "count": 500}),
    "dial_elsewhere": Spec(
        DialElsewhere, "records have peers dial an address of its choice", {"what": "peers", "count": 2000}
    ),
    "dht_keys": Spec(FalseRecords, "4,200 signed keys that outlive all others", {"what": "keys", "count": 4200}),
    "no_throughput": Spec(
        LyingMember, "says that it computes nothing", {"lie": "no_throughput"}, member=True, attacker="member"
    ),
    "endless_throughput": Spec(
        LyingMember, "says that it computes without end", {"lie": "endless_throughput"}, member=True, attacker="member"
    ),
    "endless_uplink": Spec(
        LyingMember, "says that it sends without end", {"lie": "endless_uplink"}, member=True, attacker="member"
    ),
}
