"""The sealed rounds of a swarm recorded once (`tests/recorded/`) still come to the state and the parameters of then."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from replay import replay

from p2ptrain.config.manifest import open_manifest

RECORDED = Path(__file__).parents[2] / "recorded"
LAST_ROUND = 90
STATE_ID = "0248d12933a7a2a518020b764277a9c556449ee80e387ba83465bba8a4ef77b6"
PARAMETERS_SHA256 = "d5669fa092c98f67a4980d4531812c9b68a5f9134b7ec79e1b918ba922d4ea3e"
"""What the code that recorded the history came to after these rounds; its three peers agreed at round 90."""


def test_a_recorded_history_replays_to_the_parameters_that_its_peers_had() -> None:
    manifest, run_id = open_manifest((RECORDED / "manifest.signed").read_bytes())
    replica, journal = replay(RECORDED / "journal", manifest, run_id)
    assert (journal.first, journal.last) == (1, LAST_ROUND)
    assert replica.chain.id.hex() == STATE_ID
    assert replica.parameters_sha256() == PARAMETERS_SHA256
