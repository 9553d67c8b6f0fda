"""Hostile contributions are well-formed, as large as they are meant to be, and go where honest ones would."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
from test_group import MEMBERS, TEXTS, manifest

from p2ptrain.compression import wire
from p2ptrain.compression.wire import Coefficients
from p2ptrain.simulation.group import Group
from p2ptrain.simulation.poison import ATTACKS, LARGER, forger, other_text
from p2ptrain.training.replica import build_optimizer


def group_under(attack: str, seen: list[tuple[Coefficients, Coefficients]]) -> Group:
    config = manifest("demo")
    plain = Group(config, dict(zip(MEMBERS, TEXTS, strict=True)).__getitem__)
    forge = forger(ATTACKS[attack], build_optimizer(plain.model, config).codec, 1)

    def spying(number: int, selected: list[Coefficients]) -> dict[int, Coefficients]:
        sent = dict(forge(number, selected))
        assert sent.keys() == {2}
        seen.append((selected[2], sent[2]))
        return sent

    return Group(config, dict(zip(MEMBERS, TEXTS, strict=True)).__getitem__, forge=spying)  # type: ignore[arg-type]


@pytest.mark.parametrize("attack", ATTACKS)
def test_what_is_sent_decodes_to_itself_and_is_as_large_as_it_is_meant_to_be(attack: str) -> None:
    seen: list[tuple[Coefficients, Coefficients]] = []
    group = group_under(attack, seen)
    for _ in range(2):
        group.play(MEMBERS, group.equal_parts(3))
    for own, sent in seen:
        there = wire.decode_contribution(wire.encode_contribution(sent, group.codec), group.codec, sent.start, sent.end)
        assert np.array_equal(there.value, sent.value)
        assert np.array_equal(there.index, sent.index)
        # By less than `LARGER` where a toy's values come near the largest scale.
        larger = np.linalg.norm(sent.value) / np.linalg.norm(own.value)
        assert 0.5 < larger < 2 if attack == "little" else larger > 2


def test_flipped_signs_are_those_of_training() -> None:
    seen: list[tuple[Coefficients, Coefficients]] = []
    group = group_under("flip", seen)
    group.play(MEMBERS, group.equal_parts(3))
    ((own, sent),) = seen
    assert np.array_equal(sent.value, -own.value * np.float32(LARGER))


def test_a_forged_round_is_not_that_of_honest_members() -> None:
    seen: list[tuple[Coefficients, Coefficients]] = []
    forged, honest = group_under("flip", seen), Group(manifest("demo"), dict(zip(MEMBERS, TEXTS, strict=True)).get)  # type: ignore[arg-type]
    parts = honest.equal_parts(3)
    assert forged.play(MEMBERS, parts).replies != honest.play(MEMBERS, parts).replies


def test_the_other_text_writes_every_token_as_one_other() -> None:
    tokens = np.arange(4096, dtype=np.uint16)
    assert np.array_equal(np.sort(other_text(tokens)), tokens)


def test_the_manifest_decides_how_a_group_sums() -> None:
    config = manifest("demo")
    trimming = msgspec.structs.replace(config, round=msgspec.structs.replace(config.round, robust="trimmed"))
    assert Group(config, dict(zip(MEMBERS, TEXTS, strict=True)).__getitem__).codec.robust == "bounded"
    assert Group(trimming, dict(zip(MEMBERS, TEXTS, strict=True)).__getitem__).codec.robust == "trimmed"
