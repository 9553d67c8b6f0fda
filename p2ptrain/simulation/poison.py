"""Contributions that are meant to harm, for `group.Group`: what hostile members send in place of what they selected.

All are well-formed: as many coefficients as a chunk must have, with values that are quantised. Each but `little` is 16
times as large as an honest one, where the codec has a scale for it, so that the reducer clips it to all that it lets
through. Hostile members know what every honest one sends in the same round, which is more than real ones do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from p2ptrain.compression.codec import Codec
from p2ptrain.compression.layout import CHUNK_SIZE
from p2ptrain.compression.selection import quantise
from p2ptrain.compression.wire import Coefficients
from p2ptrain.simulation.group import Forge

LARGER = 16.0
"""A power of two, as the scales of payloads are."""
LARGEST = 8.0
"""Below the codec's largest scale."""
CONCENTRATED = 32
"""One chunk in so many."""
DEVIATIONS = 1.5
"""Of the honest members' coefficients."""

Attack = Callable[[Codec, int, Sequence[Coefficients], Sequence[Coefficients]], list[Coefficients]]
"""From codec, round, what honest and what hostile members selected: what the hostile ones send."""


def forger(attack: Attack, codec: Codec, hostile: int) -> Forge:
    """Have the last `hostile` members attack."""

    def forge(number: int, selected: Sequence[Coefficients]) -> dict[int, Coefficients]:
        first = len(selected) - hostile
        return dict(enumerate(attack(codec, number, selected[:first], selected[first:]), first))

    return forge


def scaled(part: Coefficients, factor: float) -> Coefficients:
    """Multiply by a power of two: by less where a chunk's values become too large to encode."""
    largest = np.zeros(part.end - part.start)
    np.maximum.at(largest, part.chunk - part.start, np.abs(part.value))
    room = np.exp2(np.floor(np.log2(LARGEST / np.maximum(largest, 2.0**-28))))
    factors = np.minimum(factor, np.maximum(room, 1)).astype(np.float32)
    return replace(part, value=part.value * factors[part.chunk - part.start])


def flip(codec: Codec, number: int, honest: Sequence[Coefficients], own: Sequence[Coefficients]) -> list[Coefficients]:
    """Send what training gives, with its sign flipped."""
    return [scaled(replace(part, value=-part.value), LARGER) for part in own]


def noise(codec: Codec, number: int, honest: Sequence[Coefficients], own: Sequence[Coefficients]) -> list[Coefficients]:
    """Send random coefficients with random signs."""
    return [scaled(_random(part, (number, liar)), LARGER) for liar, part in enumerate(own)]


def common(
    codec: Codec, number: int, honest: Sequence[Coefficients], own: Sequence[Coefficients]
) -> list[Coefficients]:
    """Send one random direction, the same of all in all rounds."""
    return [scaled(_random(own[0], (0, 0)), LARGER)] * len(own)


def against(
    codec: Codec, number: int, honest: Sequence[Coefficients], own: Sequence[Coefficients]
) -> list[Coefficients]:
    """Send the largest coefficients of the honest members' sum, with their signs flipped (Xie et al., 2019)."""
    start, end = own[0].start, own[0].end
    total = np.zeros((end - start, CHUNK_SIZE), np.float32)
    for part in honest:
        total[part.chunk - start, part.index] += part.value / np.float32(len(honest))
    return [scaled(_largest(codec, own[0], -total), LARGER)] * len(own)


def little(
    codec: Codec, number: int, honest: Sequence[Coefficients], own: Sequence[Coefficients]
) -> list[Coefficients]:
    """Send each coefficient's mean over honest members less `DEVIATIONS` times its standard deviation, as large as an
    honest contribution (Baruch et al., "A Little Is Enough", 2019)."""
    start, end = own[0].start, own[0].end
    mean, square = (np.zeros((end - start, CHUNK_SIZE), np.float32) for _ in range(2))
    for part in honest:
        mean[part.chunk - start, part.index] += part.value / np.float32(len(honest))
        square[part.chunk - start, part.index] += part.value**2 / np.float32(len(honest))
    lie = mean - np.float32(DEVIATIONS) * np.sign(mean) * np.sqrt(np.maximum(square - mean**2, 0))
    usual = float(np.median([np.linalg.norm(part.value) for part in honest]))
    sent = _largest(codec, own[0], lie)
    factor = np.float32(usual / np.linalg.norm(sent.value))
    return [_largest(codec, own[0], lie * factor)] * len(own)


def concentrated(
    codec: Codec, number: int, honest: Sequence[Coefficients], own: Sequence[Coefficients]
) -> list[Coefficients]:
    """Flip signs, and spend nearly all of what a clip lets through on the same few chunks."""
    found = []
    for part in flip(codec, number, honest, own):
        few = part.chunk % CONCENTRATED == 0
        found.append(replace(part, value=np.where(few, scaled(part, LARGER).value, part.value / np.float32(LARGER))))
    return found


def other_task(
    codec: Codec, number: int, honest: Sequence[Coefficients], own: Sequence[Coefficients]
) -> list[Coefficients]:
    """Send what training gives, on the text that `other_text` makes."""
    return [scaled(part, LARGER) for part in own]


def other_text(tokens: NDArray[np.uint16]) -> NDArray[np.uint16]:
    """Write every token as another one, so that what follows what is as regular as before, and wrong."""
    return ((tokens.astype(np.int64) * 2731 + 17) % 4096).astype(np.uint16)


def _largest(codec: Codec, like: Coefficients, dense: NDArray[np.float32]) -> Coefficients:
    """Return the largest entries of `dense` [chunks, 4096], quantised, as many as a contribution has."""
    places, values = [], []
    for row, topk in zip(dense, codec.topk[like.start : like.end], strict=True):
        place = np.sort(np.argsort(-np.abs(row), kind="stable")[:topk])
        places.append(place)
        values.append(quantise(torch.from_numpy(row[place])[None], codec.value_bits)[0].numpy())
    return replace(like, index=np.concatenate(places), value=np.concatenate(values))


def _random(like: Coefficients, seed: tuple[int, int]) -> Coefficients:
    """Return as many coefficients of the same sizes, elsewhere and with other signs."""
    rng = np.random.default_rng(seed)
    counts = np.bincount(like.chunk - like.start, minlength=like.end - like.start)
    places = np.concatenate([np.sort(rng.choice(CHUNK_SIZE, count, replace=False)) for count in counts])
    signs = rng.choice(np.array([-1, 1], np.float32), len(like.value))
    return replace(like, index=places, value=np.abs(like.value) * signs)


ATTACKS: dict[str, Attack] = {
    attack.__name__: attack for attack in (flip, noise, common, against, little, concentrated, other_task)
}
