"""Where a run's text comes from: the package, this home, a copy of it, the swarm; and what a peer keeps for itself."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Collection
from pathlib import Path

import msgspec
import numpy as np
import pytest
from inputs import put, text

from p2ptrain.config.home import Home
from p2ptrain.config.loading import parse_manifest
from p2ptrain.config.manifest import DataConfig, FileConfig, Manifest, ModelConfig
from p2ptrain.data.building import write_part
from p2ptrain.data.corpus import load_embedded
from p2ptrain.data.obtaining import Fetch, Share, held_text, obtain_text, place, tokenizer_of
from p2ptrain.data.preparing import Given, prepare
from p2ptrain.data.text import Text
from p2ptrain.data.token_file import TokenFile
from p2ptrain.data.tokenizer import shipped_tokenizer
from p2ptrain.errors import DataError, HomeError, ManifestError
from p2ptrain.state.pieces import Partials


class Silent:
    """Hears what is done."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def work(self, what: str, done: int, total: int) -> None:
        assert 0 <= done <= total

    def say(self, text: str) -> None:
        self.said.append(text)


def made_home(path: Path) -> Home:
    home = Home(path)
    home.create()
    return home


def owner(path: Path, given: Given, *, private: bool = False) -> tuple[Home, Manifest]:
    """A home with a text as tokens, and the manifest of a run on it."""
    home = made_home(path)
    header = prepare(given, home.unfinished_tokens, Silent()).built.header
    if private:
        whole = TokenFile(home.unfinished_tokens)
        write_part(whole, home.own_tokens, train=True)
        write_part(whole, home.unfinished_tokens, train=False)
    data = DataConfig(
        name="letters",
        license="MIT",
        private=private,
        bytes=0 if private else header.train_bytes,
        heldout_bytes=header.heldout_bytes,
        tokenizer_sha256=header.tokenizer_sha256,
        tokens=place(home, Silent()),
    )
    model = ModelConfig(context=32, vocabulary=max(257, header.vocabulary))
    return home, Manifest(name="a", nonce="0" * 32, model=model, data=data)


def from_home(home: Home) -> Fetch:
    """A swarm of one peer."""

    def fetch(file: FileConfig, path: Path) -> None:
        if not path.exists():
            shutil.copy(home.tokens(file.root), path)

    return fetch


def nobody(file: FileConfig, path: Path) -> None:
    if not path.exists():
        raise AssertionError("asked the swarm")


def same(one: Text, other: Text) -> bool:
    return np.array_equal(one.train.tokens, other.train.tokens) and np.array_equal(
        one.heldout.tokens, other.heldout.tokens
    )


@pytest.fixture
def letters(tmp_path: Path) -> Given:
    return Given((put(tmp_path / "letters.txt", text(30_000)),))


def test_the_shipped_text_needs_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The whole of it would take seconds.
    short = dataclasses.replace(load_embedded(), train=load_embedded().train[:10_000])
    monkeypatch.setattr("p2ptrain.data.text.load_embedded", lambda: short)
    home, manifest = made_home(tmp_path), Manifest(name="a", nonce="0" * 32)
    got = obtain_text(home, manifest, None, nobody, Silent())
    assert got.train.bytes == 10_000 and got.vocabulary == 4096
    assert got.tokenizer().decode(got.heldout.tokens.tolist()).encode() == load_embedded().heldout
    assert tokenizer_of(home, manifest.data) is shipped_tokenizer()
    with pytest.raises(DataError, match="shipped with p2ptrain") as caught:
        obtain_text(home, manifest, Given((tmp_path,)), nobody, Silent())
    assert "--data" in caught.value.hint


def test_a_joiner_has_the_owners_text_by_fetching_by_building_and_from_a_copied_file(
    tmp_path: Path, letters: Given
) -> None:
    home, manifest = owner(tmp_path / "owner", letters)
    wanted = obtain_text(home, manifest, None, nobody, Silent())
    fetched = obtain_text(made_home(tmp_path / "a"), manifest, None, from_home(home), Silent())
    built = obtain_text(made_home(tmp_path / "b"), manifest, letters, nobody, Silent())
    assert manifest.data.token_file is not None
    copied = Given((home.tokens(manifest.data.token_file.root),))
    taken = obtain_text(made_home(tmp_path / "c"), manifest, copied, nobody, Silent())
    assert same(wanted, fetched) and same(wanted, built) and same(wanted, taken)
    assert copied.paths[0].exists()
    assert same(held_text(home, manifest.data), wanted)
    with pytest.raises(DataError, match="has no copy of the run's text"):
        held_text(made_home(tmp_path / "d"), manifest.data)


def test_a_part_of_the_text_is_held_without_the_rest(tmp_path: Path, letters: Given) -> None:
    long = Given((put(tmp_path / "long.txt", text(900_000)),))
    home, manifest = owner(tmp_path / "owner", long)
    file = manifest.data.token_file
    assert file is not None
    source = home.tokens(file.root).read_bytes()
    fetched: set[int] = set()

    def fetch(config: FileConfig, path: Path, pieces: Collection[int]) -> Path:
        partial = Partials(path.parent).path_of_file(bytes.fromhex(config.root))
        content = bytearray(partial.read_bytes() if partial.exists() else bytes(config.bytes))
        for number in pieces:
            place = slice(number * 4096, (number + 1) * 4096)
            content[place] = source[place]
        fetched.update(pieces)
        partial.write_bytes(content)
        return partial

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("p2ptrain.data.obtaining.PIECE_BYTES", 4096)
        mine = made_home(tmp_path / "mine")
        whole = obtain_text(home, manifest, None, nobody, Silent())
        for salt in (b"a", b"b"):
            got = obtain_text(mine, manifest, None, nobody, Silent(), Share(0.1, salt, fetch))
            count = len(got.train.tokens)
            assert 0.09 < count / len(whole.train.tokens) < 0.11
            start = TokenFile(home.tokens(file.root)).header.window(0.1, salt)[0]
            assert np.array_equal(got.train.tokens, whole.train.tokens[start : start + count])
            assert np.array_equal(got.heldout.tokens, whole.heldout.tokens)
            assert got.train.bytes_per_token == pytest.approx(whole.train.bytes_per_token, rel=1e-3)
        assert len(fetched) < 0.6 * len(source) / 4096
        assert np.array_equal(held_text(mine, manifest.data).heldout.tokens, whole.heldout.tokens)
        assert tokenizer_of(mine, manifest.data).sha256 == manifest.data.tokenizer_sha256


def test_another_text_or_tokenizer_is_refused_and_leaves_nothing(tmp_path: Path, letters: Given) -> None:
    _, manifest = owner(tmp_path / "owner", letters)
    other = Given((put(tmp_path / "other.txt", text(30_000)),))
    mine = made_home(tmp_path / "mine")
    with pytest.raises(DataError, match="the text here makes tokens that hash to"):
        obtain_text(mine, manifest, other, nobody, Silent())
    trained = Given(letters.paths, tokenizer="train:300")
    with pytest.raises(DataError, match="the run's tokenizer hashes to"):
        obtain_text(mine, manifest, trained, nobody, Silent())
    assert not list(mine.data.iterdir())


def test_a_text_shorter_than_a_sequence_is_refused_before_anything_is_announced(tmp_path: Path, letters: Given) -> None:
    home, manifest = owner(tmp_path / "owner", letters)
    long = msgspec.structs.replace(manifest, model=ModelConfig(context=65_536))
    with pytest.raises(DataError, match=r"has no sequence of context \+ 1 = 65,537"):
        obtain_text(home, long, None, nobody, Silent())


def test_a_vocabulary_below_the_tokenizers_is_refused(tmp_path: Path, letters: Given) -> None:
    home, manifest = owner(tmp_path / "owner", letters)
    small = msgspec.structs.replace(manifest, model=ModelConfig(context=32, vocabulary=300))
    with pytest.raises(DataError, match="vocabulary = 300 is below the tokenizer's 4,096 tokens"):
        obtain_text(home, small, None, nobody, Silent())


def test_of_private_text_only_what_is_held_out_and_the_tokenizer_leave_the_disk(tmp_path: Path, letters: Given) -> None:
    home, manifest = owner(tmp_path / "owner", Given(letters.paths, tokenizer="train:300"), private=True)
    first = obtain_text(home, manifest, None, nobody, Silent())
    file = put(tmp_path / "mine.txt", "my own words. " * 1000)
    mine = made_home(tmp_path / "mine")
    got = obtain_text(mine, manifest, Given((file,)), from_home(home), Silent())
    assert np.array_equal(got.heldout.tokens, first.heldout.tokens)
    assert got.tokenizer().decode(got.train.tokens.tolist()).removesuffix("<|endoftext|>") == file.read_text().strip()
    file.unlink()
    assert same(obtain_text(mine, manifest, None, nobody, Silent()), got)
    with pytest.raises(DataError, match="text of its own") as caught:
        obtain_text(made_home(tmp_path / "b"), manifest, None, from_home(home), Silent())
    assert "--data" in caught.value.hint
    mine.own_tokens.write_bytes(mine.own_tokens.read_bytes()[:-9])
    with pytest.raises(DataError, match=r"own\.tokens: this token file is damaged"):
        obtain_text(mine, manifest, None, nobody, Silent())


def test_held_out_text_may_be_the_shipped_one(tmp_path: Path, letters: Given) -> None:
    manifest = parse_manifest(PRIVATE, tmp_path)
    got = obtain_text(made_home(tmp_path / "a"), manifest, letters, nobody, Silent())
    assert got.heldout.bytes == len(load_embedded().heldout)
    assert got.train.bytes == len(letters.paths[0].read_text().strip()) + 2


PRIVATE = 'name = "a"\nnonce = "' + "0" * 32 + '"\n[data]\nprivate = true\n'


def test_a_run_cannot_be_private_and_name_its_text() -> None:
    with pytest.raises(ManifestError, match="private = true contradicts"):
        parse_manifest(f"{PRIVATE}bytes = 7\n", Path("run.toml"))


def test_where_tokens_cannot_be_written_the_home_is_named(tmp_path: Path, letters: Given) -> None:
    put(tmp_path / "file", b"")
    with pytest.raises(HomeError, match="cannot write the text as tokens to") as caught:
        prepare(letters, tmp_path / "file" / "a.tokens", Silent())
    assert "make room" in caught.value.hint


def test_too_little_text_is_named(tmp_path: Path) -> None:
    for content in (b"", b" \n\t" * 8000, b"word " * 1000):
        with pytest.raises(DataError, match=r"bytes of text in .*few\.txt are too little"):
            prepare(Given((put(tmp_path / "few.txt", content),)), tmp_path / "a.tokens", Silent())


def test_what_is_done_is_said(letters: Given, tmp_path: Path) -> None:
    told = Silent()
    prepare(Given(letters.paths, tokenizer="train:300"), tmp_path / "a.tokens", told)
    assert told.said[:4] == [
        "1 file to read",
        "training a tokenizer, which may take a minute",
        "trained a tokenizer of 300 tokens",
        "read 1 document of 1 file",
    ]
    assert "bytes a token" in told.said[4]
