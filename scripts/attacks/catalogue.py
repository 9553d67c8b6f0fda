"""The list of attacks."""

from __future__ import annotations

from dataclasses import dataclass, field

from attacks.chains import MadeUpMembers, OfflineChain, TipNeverDelivered
from attacks.comings import DyingNewcomers, ManyJoins, MemberSolo
from attacks.hostile import Attack


@dataclass(frozen=True)
class Spec:
    """What an attack's name means."""

    kind: type[Attack]
    what: str
    options: dict[str, int | str] = field(default_factory=dict)
    member: bool = False
    """It begins as a member that behaves: calm is measured with it."""
    attacker: str = "outsider"


ATTACKS = {
    "offline_chain": Spec(OfflineChain, "seals alone off line from the tip on, comes back with the larger total"),
    "offline_chain_from_beginning": Spec(OfflineChain, "the same from round 0 on", {"from_beginning": 1}),
    **{
        f"made_up_members_{count}": Spec(
            MadeUpMembers,
            f"admits {count} made-up identities, includes them in forged rounds",
            {"identities": count},
        )
        for count in (1, 50, 500)
    },
    "tip_never_delivered": Spec(TipNeverDelivered, "names a better tip and never answers for it", {"how": "silence"}),
    "tip_trickled": Spec(TipNeverDelivered, "names a better tip and sends its round byte by byte", {"how": "trickle"}),
    "snapshot_trickled": Spec(TipNeverDelivered, "names a tip far ahead, trickles its snapshot", {"how": "snapshot"}),
    "many_joins": Spec(ManyJoins, "50 identities ask for admission and never do anything", {"identities": 50}),
    "dying_newcomers": Spec(DyingNewcomers, "every 5 s a newcomer becomes a member and dies"),
    "member_solo": Spec(MemberSolo, "leaves, seals alone, comes back", member=True, attacker="member"),
}
