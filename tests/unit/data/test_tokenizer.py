"""The shipped tokenizer, and tokens kept on disk."""

from __future__ import annotations

import hashlib
import json
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2ptrain.config.manifest import TOKENIZER_VOCABULARY
from p2ptrain.data import tokenizer
from p2ptrain.data.tokenizer import cached_tokens, decode, encode, load_tokenizer, tokenise, tokenizer_sha256
from p2ptrain.errors import DataError


def test_the_tokenizer_is_the_one_on_the_card() -> None:
    card = json.loads((resources.files("p2ptrain.data") / "embedded" / "card.json").read_text())
    assert tokenizer_sha256() == card["tokenizer"]["sha256"]
    assert load_tokenizer().get_vocab_size() == TOKENIZER_VOCABULARY


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet=st.characters(exclude_categories=["Cs"])))
def test_any_text_survives_the_round_trip(text: str) -> None:
    assert decode(encode(text)) == text


@settings(max_examples=50, deadline=None)
@given(st.lists(st.text(alphabet="a bü\n", max_size=30), max_size=8))
def test_a_text_cut_in_pieces_is_still_the_whole_text(paragraphs: list[str]) -> None:
    whole = "\n\n".join(paragraphs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer, "_PIECE_CHARACTERS", 20)
        tokens = tokenise(whole.encode())
    assert decode(tokens.tolist()) == whole
    assert tokens.dtype == np.uint16


def test_english_takes_few_tokens() -> None:
    text = "The President shall from time to time give to the Congress information of the state of the Union."
    assert len(encode(text)) < len(text) / 4


def test_numbers_that_are_no_token_do_not_stop_decoding() -> None:
    assert decode([*encode("peace"), TOKENIZER_VOCABULARY + 5]) == "peace"


def test_tokens_are_made_once_and_read_back_equal(tmp_path: Path) -> None:
    text = b"Peace and war.\n\n" * 2000
    first = cached_tokens(text, tmp_path)
    (file,) = tmp_path.iterdir()
    before = file.stat().st_mtime_ns
    second = cached_tokens(text, tmp_path)
    assert file.stat().st_mtime_ns == before
    assert np.array_equal(first, second) and np.array_equal(first, tokenise(text))
    assert file.stat().st_size == 2 * len(first)
    with pytest.raises(ValueError):
        second[0] = 1
    assert len(cached_tokens(b"Another text", tmp_path)) and len(list(tmp_path.iterdir())) == 2


def test_a_text_that_cannot_be_tokenised_leaves_nothing_behind(tmp_path: Path) -> None:
    for text in (b"", b"\xff\xfe"):
        with pytest.raises(DataError):
            cached_tokens(text, tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_tokens_of_a_text_do_not_change_between_versions() -> None:
    text = "Fellow citizens:\n\nIn 1863, $2,000 (naïve) — “liberty” 🗽\n" * 3
    digest = hashlib.sha256(tokenise(text.encode()).astype("<u2").tobytes()).hexdigest()
    assert digest == "923be3a35088ae09cd201eaaf335c9049f93df4b6c7f073997d63cfd856bcec7"


@pytest.mark.parametrize(
    "json",
    [
        b"",
        b"{}",
        b"[]",
        b"\xff",
        b'{"model": {"type": "Other"}}',
        b'{"model": {"type": "BPE", "vocab": {}, "merges": []}}',
        b'{"model": {"type": "BPE", "vocab": {}, "merges": []}, "normalizer": {"type": "Precompiled", '
        b'"precompiled_charsmap": "AAAA"}}',
        b'{"model":' + b'{"type":' * 100_000,
        b" " * (tokenizer.TOKENIZER_MAX_BYTES + 1),
    ],
    ids=lambda json: str(json[:30]),
)
def test_what_is_no_tokenizer_is_refused(json: bytes) -> None:
    with pytest.raises(DataError) as caught:
        tokenizer.TextTokenizer(json)
    assert caught.value.hint


def test_any_tokenizer_is_the_one_that_the_library_loads(tmp_path: Path) -> None:
    shipped = tokenizer.shipped_tokenizer()
    assert (shipped.vocabulary, shipped.sha256) == (TOKENIZER_VOCABULARY, tokenizer_sha256())
    text = "Peace <|endoftext|> and war, naïve 🗽"
    assert shipped.encode(text) == load_tokenizer().encode(text).ids
    assert shipped.decode([*shipped.encode(text), 2**20]) == text
    (tmp_path / "tokenizer.json").write_bytes(shipped.json)
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        assert tokenizer.read_tokenizer(path).sha256 == shipped.sha256
    with pytest.raises(DataError, match="no tokenizer at"):
        tokenizer.read_tokenizer(tmp_path / "absent")


def test_a_trained_tokenizer_is_the_same_each_time_and_gives_every_text_back() -> None:
    texts = ["Peace and war, war and peace. " * 200, "naïve 🗽 " * 50]
    one, other = (tokenizer.train_tokenizer(texts, 270) for _ in range(2))
    assert one.json == other.json and one.vocabulary == 270
    for text in (*texts, "\x00\x7f 文書 <|endoftext|>"):
        assert one.decode(one.encode(text)) == text
    end = one.separator[0]
    assert end not in one.encode("<|endoftext|>") and one.encode("<|endoftext|>", special=True) == [end]
    for size in (10, 2**20):
        with pytest.raises(DataError, match="cannot be trained"):
            tokenizer.train_tokenizer(texts, size)
