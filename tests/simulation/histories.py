"""The scenario of each seed in these tests, and how to play many."""

from __future__ import annotations

import multiprocessing
import os
from collections import Counter
from collections.abc import Iterable, Iterator

import msgspec
import torch

from p2ptrain.config.manifest import Manifest, RoundConfig
from p2ptrain.simulation.adversaries import OUTSIDERS
from p2ptrain.simulation.faults import FAULTS
from p2ptrain.simulation.world import Report, Scenario, simulate

MANIFEST = Manifest(
    name="simulated",
    nonce="0123456789abcdef" * 2,
    round=RoundConfig(
        micro_batch=4,
        target_batch=16,
        min_seconds=1.0,
        max_seconds=3.0,
        round_max_seconds=6.0,
        grace_seconds=1.0,
        reply_timeout_seconds=2.0,
        seal_timeout_seconds=1.0,
        alone_after_seconds=4.0,
        root_interval=8,
    ),
)


SHORT_JOURNALS = msgspec.structs.replace(MANIFEST, round=msgspec.structs.replace(MANIFEST.round, root_interval=2))
"""Journals of about six rounds, so that many forks are older than they are."""


def scenario(seed: int, faults: tuple[str, ...] = FAULTS) -> Scenario:
    """Three to six peers; every other history with short journals; eight with overlap after eight without.

    In one of four an outsider makes up chains all the while.
    """
    adversaries = (OUTSIDERS[seed // 4 % len(OUTSIDERS)],) if seed % 4 == 3 else ()
    manifest = MANIFEST if seed % 2 else SHORT_JOURNALS
    manifest = msgspec.structs.replace(manifest, round=msgspec.structs.replace(manifest.round, overlap=seed // 8 % 2))
    return Scenario(
        manifest=manifest,
        seed=seed,
        peers=3 + seed // 2 % 4,
        rounds=20,
        faults=faults,
        adversaries=adversaries,
    )


def play(seed: int, faults: tuple[str, ...] = FAULTS) -> Report:
    """One history."""
    torch.set_num_threads(1)
    return simulate(scenario(seed, faults))


def play_all(seeds: Iterable[int]) -> Iterator[Report]:
    """As many at a time as there are cores; in no particular order."""
    with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool:
        yield from pool.imap_unordered(play, seeds)


def coverage(reports: Iterable[Report]) -> Counter[str]:
    """What happened in all of them together."""
    total: Counter[str] = Counter()
    for report in reports:
        total.update(report.coverage)
    return total
