"""Runs whose text is private: what stays, what is handed out, and what is asked for."""

from __future__ import annotations

from pathlib import Path

import pytest

from p2ptrain.config.home import Home
from p2ptrain.config.loading import parse_manifest
from p2ptrain.data.corpus import Corpus, load_embedded, pack, unpack
from p2ptrain.data.obtaining import keep_own_text, obtain_corpus
from p2ptrain.errors import DataError, ManifestError
from p2ptrain.peer.assembly import PackedCorpus

SECRET = b"what nobody else may read. " * 1000
PUBLIC = Corpus("a text", "CC0-1.0", SECRET, b"what all are measured by. " * 100)
CONFIG = PUBLIC.config(private=True)


def home(path: Path) -> Home:
    made = Home(path)
    made.create()
    return made


def nobody() -> bytes:
    raise AssertionError("asked the swarm")


def test_the_manifest_says_nothing_of_private_text() -> None:
    assert (CONFIG.private, CONFIG.sha256, CONFIG.bytes) == (True, "", 0)
    assert CONFIG.heldout_bytes == len(PUBLIC.heldout)


def test_only_held_out_text_is_handed_out(tmp_path: Path) -> None:
    packed = PackedCorpus(home(tmp_path), CONFIG, PUBLIC).read()
    assert packed is not None
    assert unpack(packed, CONFIG) == Corpus("a text", "CC0-1.0", b"", PUBLIC.heldout)


def test_a_newcomer_brings_its_own_text_once_and_fetches_what_is_held_out(tmp_path: Path) -> None:
    mine, text = home(tmp_path / "home"), tmp_path / "mine.txt"
    text.write_text("my own words. " * 1000)
    packed = PackedCorpus(home(tmp_path / "other"), CONFIG, PUBLIC).read()
    assert packed is not None
    got = obtain_corpus(mine, CONFIG, [text], lambda: packed)
    assert got.heldout == PUBLIC.heldout
    assert got.train == text.read_bytes().strip() + b"\n\n"
    text.unlink()
    assert obtain_corpus(mine, CONFIG, None, nobody) == got


def test_who_brings_none_is_told_to(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="text of its own") as error:
        obtain_corpus(home(tmp_path), CONFIG, None, nobody)
    assert "--data" in (error.value.hint or "")


def test_damaged_text_is_named(tmp_path: Path) -> None:
    mine = home(tmp_path)
    keep_own_text(mine, SECRET)
    mine.own_text.write_bytes(mine.own_text.read_bytes()[:-9])
    with pytest.raises(DataError, match="own-text"):
        obtain_corpus(mine, CONFIG, None, nobody)


def test_held_out_text_may_be_the_shipped_one(tmp_path: Path) -> None:
    mine, embedded = home(tmp_path), load_embedded()
    keep_own_text(mine, SECRET)
    for config in (embedded.config(private=True), parse_manifest(RUN, tmp_path).data):
        got = obtain_corpus(mine, config, None, nobody)
        assert (got.train, got.heldout) == (SECRET, embedded.heldout)


def test_other_held_out_text_is_refused() -> None:
    other = Corpus("a text", "CC0-1.0", b"", b"x" * len(PUBLIC.heldout))
    with pytest.raises(DataError, match="held-out"):
        unpack(pack(other), CONFIG)


RUN = 'name = "a"\nnonce = "' + "0" * 32 + '"\n[data]\nprivate = true\n'


def test_a_run_cannot_be_private_and_name_its_text() -> None:
    with pytest.raises(ManifestError, match="private = true contradicts"):
        parse_manifest(f"{RUN}bytes = 7\n", Path("run.toml"))
