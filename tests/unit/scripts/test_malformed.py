"""Whatever strangers send is refused as its decoder says, or is harmless; the script feeds a million."""

from __future__ import annotations

import random
import sys
from collections import Counter
from pathlib import Path

import msgspec
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "scripts"))
sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "scripts/bench"))

from attacks.malformed import Decoders, Spoiler, feed

from p2ptrain.calls import messages

MESSAGES = 6000


@pytest.mark.parametrize("seed", [1, 2])
def test_no_decoder_does_anything_but_refuse_or_return(seed: int) -> None:
    taken, faults = feed(seed, MESSAGES)
    assert faults == []
    assert sum(taken.values()) < MESSAGES / 2, "most of it is malformed"


def test_every_message_that_peers_exchange_is_among_them() -> None:
    kinds = {
        name
        for name, kind in vars(messages).items()
        if isinstance(kind, type) and issubclass(kind, messages._Message) and not name.startswith("_")
    }
    assert Decoders(random.Random(1)).messages.keys() == kinds


def test_one_seed_makes_the_same_bytes() -> None:
    message = msgspec.msgpack.encode(("text", 5, [b"bytes", {"a": 1.5}]))
    spoilers = [Spoiler(random.Random(seed)) for seed in (1, 1, 2)]
    first, same, other = ([spoiler.spoiled(message) for _ in range(500)] for spoiler in spoilers)
    assert first == same != other
    assert Counter(first)[message] < 25, "hardly any is as it was"
