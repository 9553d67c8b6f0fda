"""The sealed rounds of a swarm recorded once (`tests/recorded/`) still come to the state and the parameters of then."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from replay import replay

from p2ptrain.config.manifest import open_manifest

RECORDED = Path(__file__).parents[2] / "recorded"
LAST_ROUND = 90
STATE_ID = "fbe1700f497f7608678c06825c44e05dedacf57a83b4da7fc39236b02b1ab772"
PARAMETERS_SHA256 = "8ebd062496771c3e2ee07367e61376d34f57ecb47906f698812121d70465842c"
"""What the code that recorded the history came to after these rounds; its three peers agreed at round 90."""


def test_a_recorded_history_replays_to_the_parameters_that_its_peers_had() -> None:
    manifest, run_id = open_manifest((RECORDED / "manifest.signed").read_bytes())
    replica, journal = replay(RECORDED / "journal", manifest, run_id)
    assert (journal.first, journal.last) == (1, LAST_ROUND)
    assert replica.chain.id.hex() == STATE_ID
    assert replica.parameters_sha256() == PARAMETERS_SHA256
