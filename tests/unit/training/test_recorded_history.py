"""The sealed rounds of a swarm recorded once (`tests/recorded/`) still come to the state and the parameters of then."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from replay import replay

from p2ptrain.config.manifest import open_manifest

RECORDED = Path(__file__).parents[2] / "recorded"
LAST_ROUND = 48
STATE_ID = "f7638417d9f543d9d5c39d44f77a7e2e78bbdc49054cc5cc5520ef614a6aeea4"
PARAMETERS_SHA256 = "c76573f61d06672894bd0ee53a867057432dfa78285b19f910079f119e5b0fed"
"""What the code that recorded the history came to after these rounds; its three peers agreed at round 90."""


def test_a_recorded_history_replays_to_the_parameters_that_its_peers_had() -> None:
    manifest, run_id = open_manifest((RECORDED / "manifest.signed").read_bytes())
    replica, journal = replay(RECORDED / "journal", manifest, run_id)
    assert (journal.first, journal.last) == (1, LAST_ROUND)
    assert replica.chain.id.hex() == STATE_ID
    assert replica.parameters_sha256() == PARAMETERS_SHA256
