"""The sealed rounds of a swarm recorded once (`tests/recorded/`) still come to the state and the parameters of then."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from replay import replay

from p2ptrain.config.manifest import open_manifest

RECORDED = Path(__file__).parents[2] / "recorded"
LAST_ROUND = 90
STATE_ID = "1fd98f671af12267fc7bc1c8ec054e13b4c06129fb14d0534fdcee8ad2353c82"
PARAMETERS_SHA256 = "dc9b067b68be0a0d8f04f83863374cdc0c2a7a61fb52a623d0017fef26e8a44c"
"""What the code that recorded the history came to after these rounds; its three peers agreed at round 90."""


def test_a_recorded_history_replays_to_the_parameters_that_its_peers_had() -> None:
    manifest, run_id = open_manifest((RECORDED / "manifest.signed").read_bytes())
    replica, journal = replay(RECORDED / "journal", manifest, run_id)
    assert (journal.first, journal.last) == (1, LAST_ROUND)
    assert replica.chain.id.hex() == STATE_ID
    assert replica.parameters_sha256() == PARAMETERS_SHA256
