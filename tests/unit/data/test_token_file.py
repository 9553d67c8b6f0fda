"""Documents to tokens on disk and back: nothing is lost, a part is held out, and no stranger's file is believed."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from inputs import put, sentence, text

from p2ptrain.data.building import HELDOUT_MAX_BYTES, Builder, write_part
from p2ptrain.data.reading import Passage
from p2ptrain.data.text import Part, text_of
from p2ptrain.data.token_file import HEADER_BYTES, Header, TokenFile, decode_header, is_token_file
from p2ptrain.data.tokenizer import TextTokenizer, shipped_tokenizer, train_tokenizer
from p2ptrain.errors import DataError


@pytest.fixture(scope="module")
def trained() -> TextTokenizer:
    """A tokenizer with a token between documents."""
    return train_tokenizer([text(20_000)], 300)


def build(path: Path, documents: Iterable[str], tokenizer: TextTokenizer) -> TokenFile:
    """A token file of some documents."""
    Builder(path, tokenizer).build(Passage(one) for one in documents)
    return TokenFile(path)


def texts_of(file: TokenFile) -> tuple[str, str]:
    """Training and held-out text."""
    return file.tokenizer.decode(file.train.tolist()), file.tokenizer.decode(file.heldout.tolist())


@pytest.mark.parametrize(
    "whole", [text(30_000).strip(), "word " * 5000 + "end", "a line\n" * 5000 + "end", "ü" * 20_000, "€" * 20_000]
)
def test_of_one_long_text_the_end_is_held_out(tmp_path: Path, whole: str) -> None:
    file = build(tmp_path / "a.tokens", [whole], shipped_tokenizer())
    train, heldout = texts_of(file)
    assert train + heldout == whole + "\n\n"
    header = file.header
    assert (len(train.encode()), len(heldout.encode())) == (header.train_bytes, header.heldout_bytes)
    assert 0.019 < header.heldout_bytes / (header.train_bytes + header.heldout_bytes) < 0.06
    if "\n\n" in whole:
        assert train.endswith("\n\n")
    elif "\n" in whole:
        assert train.endswith("\n")


def test_what_is_held_out_of_a_long_text_comes_from_everywhere_too(
    tmp_path: Path, trained: TextTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("p2ptrain.data.building.HELDOUT_MAX_DOCUMENTS", 20)
    monkeypatch.setattr("p2ptrain.data.building.DRAWN_SHARE", (0.0, 1.0))
    documents = [f"{number} {sentence()}" for number in range(3000)]
    train, heldout = texts_of(build(tmp_path / "a.tokens", documents, trained))
    found = heldout.split("<|endoftext|>")[:-1]
    assert sorted(documents) == sorted([*train.split("<|endoftext|>")[:-1], *found])
    numbers = [int(one.split()[0]) for one in found]
    assert len(numbers) == 20 and numbers == sorted(numbers)
    assert numbers[4] < 1500 < numbers[15]


def test_of_many_documents_those_held_out_come_from_everywhere(tmp_path: Path, trained: TextTokenizer) -> None:
    documents = [f"{number} {sentence()}" for number in range(3000)]
    train, heldout = texts_of(build(tmp_path / "a.tokens", documents, trained))
    end = "<|endoftext|>"
    assert sorted(documents) == sorted([*train.split(end)[:-1], *heldout.split(end)[:-1]])
    numbers = [int(one.split()[0]) for one in heldout.split(end)[:-1]]
    assert 30 < len(numbers) < 90
    assert min(numbers) < 300 and max(numbers) > 2700


def test_copies_of_a_document_are_on_one_side(tmp_path: Path, trained: TextTokenizer) -> None:
    documents = [f"{number} {sentence()}" for number in range(1000)]
    train, heldout = texts_of(build(tmp_path / "a.tokens", [*documents, *reversed(documents)], trained))
    both = set(train.split("<|endoftext|>")) & set(heldout.split("<|endoftext|>"))
    assert both == {""}


def test_no_more_is_held_out_than_is_of_use(
    tmp_path: Path, trained: TextTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert HELDOUT_MAX_BYTES == 16 * 2**20
    monkeypatch.setattr("p2ptrain.data.building.HELDOUT_MAX_BYTES", 2000)
    header = build(tmp_path / "a.tokens", [sentence() * 9 for _ in range(900)], trained).header
    assert 1000 < header.heldout_bytes <= 2000


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.text(min_size=1, max_size=40), st.booleans()), min_size=1, max_size=8))
def test_bits_say_which_tokens_count(
    tmp_path_factory: pytest.TempPathFactory, trained: TextTokenizer, parts: list[tuple[str, bool]]
) -> None:
    path = tmp_path_factory.mktemp("built") / "a.tokens"
    clean = [(one.encode("utf-8", "replace").decode() or "x", learned) for one, learned in parts]
    passages = [
        Passage(one, number == 0, number == len(clean) - 1, learned) for number, (one, learned) in enumerate(clean)
    ]
    filler = [Passage(text(12_000))]
    Builder(path, trained).build([*passages, *filler])
    file = TokenFile(path)
    whole = text_of(file)
    wanted: list[bool] = []
    for one, learned in clean:
        wanted += [learned] * len(trained.encode(one))
    wanted.append(clean[-1][1])
    if all(learned for _, learned in clean):
        assert whole.train.mask is None and not file.header.masked
        return
    parts_of = (whole.train, whole.heldout)
    found = np.concatenate([part.counted([0], len(part.tokens))[0] for part in parts_of])  # type: ignore[index]
    tokens = np.concatenate([part.tokens for part in parts_of]).tolist()
    at = tokens.index(trained.separator[0]) - len(wanted) + 1
    if at != 0:  # drawn to be held out: behind the filler
        at = len(tokens) - len(wanted)
    assert found[at : at + len(wanted)].tolist() == wanted
    assert found.sum() == len(found) - wanted.count(False)


def test_special_tokens_are_themselves_where_a_template_wrote_them(tmp_path: Path, trained: TextTokenizer) -> None:
    end = "<|endoftext|>"
    for special in (False, True):
        filler = Passage(text(12_000))
        Builder(tmp_path / "a.tokens", trained).build([Passage(end, special=special), filler])
        file = TokenFile(tmp_path / "a.tokens")
        found = [*file.train.tolist(), *file.heldout.tolist()]
        assert found.count(trained.separator[0]) == 2 + special


def test_what_was_read_is_given_back_and_reads_the_same_again(tmp_path: Path) -> None:
    path = tmp_path / "numbers"
    np.arange(2**23, dtype=np.uint16).tofile(path)

    def resident() -> int:
        return int(re.findall(r"RssFile:\s+(\d+) kB", Path("/proc/self/status").read_text())[0]) * 1024

    part = Part(np.memmap(path, np.uint16, "r")[8:])
    before = resident()
    first = part.batch([*range(0, 2**23 - 100, 1000)], 10)
    read = resident() - before
    part.let_go()
    assert read > 2**23 and resident() - before < read / 4
    assert np.array_equal(part.batch([*range(0, 2**23 - 100, 1000)], 10), first)


def test_large_vocabularies_take_four_bytes(tmp_path: Path) -> None:
    words = {f"w{number}": number for number in range(70_000)}
    json = {"version": "1.0", "added_tokens": [], "model": {"type": "WordLevel", "vocab": words, "unk_token": "w0"}}
    json |= {"pre_tokenizer": {"type": "WhitespaceSplit"}, "normalizer": None, "post_processor": None, "decoder": None}
    json |= {"truncation": None, "padding": None}
    tokenizer = TextTokenizer(__import__("json").dumps(json).encode())
    document = " ".join(f"w{number}" for number in range(69_990, 70_010)) + " "
    file = build(tmp_path / "a.tokens", [document * 100], tokenizer)
    assert file.train.dtype == np.uint32 and file.train.max() == 69_999
    said: list[str] = []
    built = Builder(tmp_path / "b.tokens", tokenizer, said.append).build([Passage(document * 100)])
    assert built.fit.unknown == 1000 and "does not know 50.0%" in said[0]


def test_a_bad_fit_is_said_early(tmp_path: Path) -> None:
    said: list[str] = []
    Builder(tmp_path / "a.tokens", shipped_tokenizer(), said.append).build([Passage("河川磨坊 🚀 " * 2000)])
    assert len(said) == 1 and "1.00 bytes a token" in said[0] and "train:8192" in said[0]


def test_too_little_text_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="9,002 bytes of text are too little"):
        build(tmp_path / "a.tokens", ["a" * 9000], shipped_tokenizer())
    assert not list(tmp_path.iterdir())


def test_a_part_of_a_file_is_a_file(tmp_path: Path, trained: TextTokenizer) -> None:
    whole = build(tmp_path / "a.tokens", [sentence() * 9 for _ in range(200)], trained)
    for train in (True, False):
        write_part(whole, tmp_path / "b.tokens", train=train)
        part = TokenFile(tmp_path / "b.tokens")
        assert np.array_equal(part.train, whole.train if train else [])
        assert np.array_equal(part.heldout, [] if train else whole.heldout)
        assert part.tokenizer_json() == trained.json
    assert {path.name for path in tmp_path.iterdir()} == {"a.tokens", "b.tokens"}


@given(st.integers(1, 5000), st.integers(0, 300), st.floats(0.001, 1), st.booleans(), st.binary(max_size=4))
def test_a_window_and_its_bytes_lie_in_the_file(
    train: int, heldout: int, share: float, masked: bool, salt: bytes
) -> None:
    header = dataclasses.replace(HEADER, train_tokens=train, heldout_tokens=heldout, masked=masked)
    start, end = header.window(share, salt)
    assert 0 <= start <= end <= train and start % 8 == 0 and end - start >= min(train, train * share) - 1
    assert all(0 <= first <= last <= header.length for first, last in header.ranges(start, end))
    # All that is read of such a file: its beginning, the tokens, and a bit for each of them.
    read = {*range(header.tokens_start), *range(header.tokens_start + 2 * start, header.tokens_start + 2 * end)}
    read |= {*range(header.tokens_start + 2 * train, header.mask_start)}
    if masked:
        read |= {header.mask_start + one // 8 for one in range(start, end)}
        read |= {*range(header.mask_start + -(-train // 8), header.length)}
    assert read <= {place for first, last in header.ranges(start, end) for place in range(first, last)}


HEADER = Header(300, 1000, "0" * 64, 5000, 100, 20_000, 400, 7)


def test_a_header_comes_back(tmp_path: Path) -> None:
    for header in (HEADER, dataclasses.replace(HEADER, vocabulary=70_000, masked=True)):
        assert decode_header(header.encode(), header.length) == header
    assert not is_token_file(put(tmp_path / "a", b"p2ptrain")) and not is_token_file(tmp_path / "absent")


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.integers(0, HEADER_BYTES - 1), st.integers(0, 255)), min_size=1, max_size=8))
def test_no_file_is_mapped_whose_lengths_do_not_add_up(changes: list[tuple[int, int]]) -> None:
    block = bytearray(HEADER.encode())
    for place, value in changes:
        block[place] = value
    try:
        found = decode_header(bytes(block), HEADER.length)
    except DataError:
        return
    assert found.length == HEADER.length and found.encode() == block


@pytest.mark.parametrize("length", [0, 100, HEADER_BYTES, HEADER.length - 1, HEADER.length + 1])
def test_a_file_of_another_length_is_refused(tmp_path: Path, length: int) -> None:
    path = put(tmp_path / "a.tokens", HEADER.encode()[:length].ljust(length, b"\0"))
    with pytest.raises(DataError, match=r"a\.tokens: this (is no token file|token file is damaged)"):
        TokenFile(path)


def test_a_damaged_tokenizer_is_refused(tmp_path: Path) -> None:
    file = TokenFile(put(tmp_path / "a.tokens", HEADER.encode().ljust(HEADER.length, b"\0")))
    with pytest.raises(DataError, match=r"tokenizer .* is damaged"):
        file.tokenizer  # noqa: B018
