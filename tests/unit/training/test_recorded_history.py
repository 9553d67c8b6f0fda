"""The sealed rounds of a swarm recorded once (`tests/recorded/`) still come to the state and the parameters of then."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from replay import replay

from p2ptrain.config.manifest import open_manifest

RECORDED = Path(__file__).parents[2] / "recorded"
LAST_ROUND = 90
STATE_ID = "bf452f60c13ce2aa889239144d493b84bd6c4682db77b68b0c152b6cb768c1f6"
PARAMETERS_SHA256 = "990053e42ceeacb20aeb041ff81c32297917cff418ad8a7eacac2c62c2e27039"
"""What the code that recorded the history came to after these rounds; its three peers agreed at round 90."""


def test_a_recorded_history_replays_to_the_parameters_that_its_peers_had() -> None:
    manifest, run_id = open_manifest((RECORDED / "manifest.signed").read_bytes())
    replica, journal = replay(RECORDED / "journal", manifest, run_id)
    assert (journal.first, journal.last) == (1, LAST_ROUND)
    assert replica.chain.id.hex() == STATE_ID
    assert replica.parameters_sha256() == PARAMETERS_SHA256
