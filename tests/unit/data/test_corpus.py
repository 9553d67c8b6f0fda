"""The corpus that is shipped is what its card says, and what a manifest means that names no other."""

from __future__ import annotations

import hashlib
import json
from importlib import resources

import msgspec
import pytest

from p2ptrain.config.manifest import DataConfig
from p2ptrain.data.corpus import Corpus, check_embedded, load_embedded
from p2ptrain.errors import DataError


@pytest.fixture(scope="module")
def embedded() -> Corpus:
    return load_embedded()


def test_the_embedded_corpus_is_the_one_that_its_card_describes(embedded: Corpus) -> None:
    folder = resources.files("p2ptrain.data") / "embedded"
    text = (folder / "DATA_CARD.md").read_text()
    card = json.loads((folder / "card.json").read_text())
    for part in ("train", "heldout"):
        data: bytes = getattr(embedded, part)
        assert card[part]["bytes"] == len(data)
        assert card[part]["sha256"] == hashlib.sha256(data).hexdigest()
        assert f"{len(data):,} bytes" in text
        assert card[part]["sha256"] in text
    assert card["tokenizer"]["sha256"] in text
    assert embedded.license in text


def test_speeches_from_2020_on_are_held_out_of_training(embedded: Corpus) -> None:
    assert embedded.train.startswith(b"Fellow-Citizens of the Senate and House of Representatives:")
    assert b"Three years ago, we launched the great American comeback" in embedded.heldout
    assert b"COVID-19" in embedded.heldout and b"COVID-19" not in embedded.train
    longest = max(embedded.heldout.split(b"\n\n"), key=len)
    assert longest not in embedded.train


def test_no_hash_in_the_manifest_means_the_shipped_corpus(embedded: Corpus) -> None:
    for config in (DataConfig(), DataConfig(private=True), embedded.config(), embedded.config(private=True)):
        check_embedded(config, embedded)


@pytest.mark.parametrize("field", ["sha256", "heldout_sha256", "tokenizer_sha256"])
def test_a_run_on_another_text_or_tokenizer_is_refused(embedded: Corpus, field: str) -> None:
    config = msgspec.structs.replace(embedded.config(), **{field: "0" * 64})
    with pytest.raises(DataError, match="hashes to 0000000000000000"):
        check_embedded(config, embedded)
