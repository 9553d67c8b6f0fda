"""Rounds as their seals tell them: who was included and who was late, what was skipped, who sealed out of turn.

Nothing here is anybody's word but the sealer's, and of that the chain's rules hold.
"""

from __future__ import annotations

from collections import Counter

from p2ptrain import chain
from p2ptrain.chain import RoundShape, Seal
from p2ptrain.chain.admission import Grant
from p2ptrain.observe.events import MemberLine, Sealed
from p2ptrain.swarm.identity import format_peer_id

EXPELLED, ACCUSED, OWED, LATE = "expelled", "accused", "owed replies", "late"
TAKEOVER = "gave up its turn"


def sealed_event(shape: RoundShape, identifier: bytes, seal: Seal) -> Sealed:
    """Return what a seal says of its round.

    Args:
        shape: of that round, as it follows from the state before.
    """
    included = chain.bits(seal.included, len(shape.members))
    parts = Counter(part.reducer for part in shape.parts)
    owed = Counter(part.reducer for part, reply in zip(shape.parts, seal.parts, strict=True) if not reply)
    sealer = shape.index(seal.sealer)
    return Sealed(
        round=seal.round,
        state_id=identifier.hex(),
        parent=seal.parent.hex(),
        total=seal.total,
        sealer=format_peer_id(seal.sealer),
        place=shape.sealer_order.index(sealer) if sealer in shape.sealer_order else -1,
        solo=seal.solo,
        members=[
            MemberLine(
                peer_id=format_peer_id(member.peer_id),
                included=index in included,
                weight=row.weight if index in included else 0,
                parts=parts[index],
                owed=owed[index],
            )
            for index, (member, row) in enumerate(zip(shape.members, seal.rows, strict=True))
        ],
        joins=[format_peer_id(join.peer_id) for join in seal.joins],
        expelled=[format_peer_id(one.peer_id) for one in seal.expelled],
        let_in=[format_peer_id(one.guest) for one in seal.amendments if isinstance(one, Grant)],
        shut_out=[format_peer_id(one.subject) for one in seal.amendments if not isinstance(one, Grant)],
        accused=format_peer_id(seal.accused) if seal.accused else "",
        root=seal.root.hex(),
    )


def faults_of(sealed: Sealed) -> dict[str, str]:
    """Return by peer id what a seal holds against members of its round, of each the gravest; empty: nothing."""
    found: dict[str, str] = {}
    for member in sealed.members:
        # A newcomer that no seal has included yet is not waited for, so a takeover by everybody is no fault of one.
        if not member.included:
            found[member.peer_id] = LATE
        if member.owed:
            found[member.peer_id] = OWED
    if sealed.accused:
        found[sealed.accused] = ACCUSED
    for peer in sealed.expelled:
        found[peer] = EXPELLED
    return found


def skipped_parts(sealed: Sealed) -> int:
    """Count the parts of a round that were sealed without a reply."""
    return sum(member.owed for member in sealed.members)
