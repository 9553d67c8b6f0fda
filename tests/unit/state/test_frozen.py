"""What a thread writes is what was there when it was frozen, whatever became of it since."""

from __future__ import annotations

import numpy as np
import pytest

from p2ptrain.state.frozen import PIECE_BYTES, Frozen

ENTRIES = PIECE_BYTES // 4


def arrays() -> dict[str, np.ndarray[tuple[int], np.dtype[np.float32]]]:
    chance = np.random.default_rng(1)
    sizes = {"momentum": 3 * ENTRIES, "p.a": 5, "p.b": ENTRIES + 1, "r.empty": 0}
    return {name: chance.random(size, np.float32) for name, size in sizes.items()}


@pytest.mark.parametrize("written", [0, 1, 2, 4, 6])
def test_an_array_that_changes_after_a_word_is_written_as_it_was(written: int) -> None:
    live = arrays()
    expected = b"".join(array.tobytes() for array in live.values())
    frozen = Frozen(live)
    parts = frozen.parts()
    found = [bytes(part) for _, part in zip(range(written), parts, strict=False)]
    left = frozen.keep(("p.b",)) + frozen.keep(("momentum",))
    for name in ("p.b", "momentum"):
        live[name].fill(0)
    assert left <= len(expected) - len(b"".join(found)), "what is written already is not copied"
    assert frozen.keep(("momentum",)) == 0, "nothing is copied twice"
    assert b"".join([*found, *map(bytes, parts)]) == expected
    assert frozen.done


def test_an_array_that_lies_elsewhere_from_now_on_is_not_copied() -> None:
    live = arrays()
    expected = b"".join(array.tobytes() for array in live.values())
    frozen = Frozen(live)
    copies = {name: live[name].copy() for name in ("p.a", "p.b")}
    frozen.moved(copies)
    for name in copies:
        live[name].fill(0)
    assert b"".join(map(bytes, frozen.parts())) == expected
