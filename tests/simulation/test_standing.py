"""Many peers stand still: each carries little, none much more than others, and one that is killed is soon missed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

SCRIPT = Path(__file__).parents[2] / "scripts" / "bench" / "lab" / "many_nodes.py"


def test_of_32_peers_none_carries_much_and_a_killed_one_is_lost_within_10_seconds() -> None:
    command = [sys.executable, str(SCRIPT), "--peers", "32", "--seconds", "40", "--killed", "4"]
    found: dict[str, Any] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert found["observer_sees"] == 32 and found["wrongly_lost"] == 0
    assert found["lost_after_seconds"]["killed"] == 4 and found["lost_after_seconds"]["most"] <= 10
    sent = found["sent_bytes_per_second"]
    assert sent["most"] <= 5500 and sent["most"] < 2 * sent["median"], sent
