"""`p2ptrain` as it is, but for the model, whose computing is modelled: see synthetic_gpt.py.

python scripts/synthetic_peer.py SECONDS_PER_SEQUENCE join ADDRESS --home DIR
"""

from __future__ import annotations

import functools
import sys

from synthetic_gpt import SyntheticGPT

from p2ptrain.cli.main import run
from p2ptrain.training import replica

if __name__ == "__main__":
    replica.GPT = functools.partial(SyntheticGPT, seconds_per_sequence=float(sys.argv[1]))  # type: ignore[misc, assignment]
    run(sys.argv[2:])
