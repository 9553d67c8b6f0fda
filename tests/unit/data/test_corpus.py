"""The corpus: what is shipped is what its card says, texts of one's own, and texts from strangers."""

from __future__ import annotations

import hashlib
import json
import lzma
import tracemalloc
from importlib import resources
from pathlib import Path

import msgspec
import pytest

from p2ptrain.config.manifest import DataConfig
from p2ptrain.data.corpus import HELDOUT_SHARE, Corpus, check, load_embedded, load_files, pack, unpack
from p2ptrain.errors import DataError

PARAGRAPH = "Fellow citizens, the state of the union is good. " * 4 + "\n\n"


@pytest.fixture(scope="module")
def embedded() -> Corpus:
    return load_embedded()


@pytest.fixture
def small() -> Corpus:
    return Corpus("small", "CC0-1.0", (PARAGRAPH * 60).encode(), (PARAGRAPH * 2).encode())


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


def test_what_travels_unpacks_to_the_same_corpus(small: Corpus) -> None:
    assert unpack(pack(small), small.config()) == small


def test_a_longer_text_than_stated_is_never_unpacked(small: Corpus) -> None:
    bomb = lzma.compress(bytes(64 * 2**20), preset=0)
    assert len(bomb) < 100_000
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match="more than 12,276 bytes"):
            unpack(bomb, small.config())
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_a_manifest_cannot_make_a_joiner_unpack_gigabytes(small: Corpus) -> None:
    config = msgspec.structs.replace(small.config(), bytes=2**34)
    with pytest.raises(DataError, match="at most 1,073,741,824"):
        unpack(pack(small), config)


@pytest.mark.parametrize("blob", [b"", b"not xz", b"\xfd7zXZ\x00" + bytes(40)], ids=["empty", "other", "header alone"])
def test_bytes_that_are_no_corpus_are_refused(small: Corpus, blob: bytes) -> None:
    with pytest.raises(DataError):
        unpack(blob, small.config())


def test_a_truncated_corpus_is_refused(small: Corpus) -> None:
    blob = pack(small)
    for length in range(0, len(blob) - 40, 7):
        with pytest.raises(DataError):
            unpack(blob[:length], small.config())


def test_one_changed_byte_is_noticed_in_either_part(small: Corpus) -> None:
    for part in ("train", "heldout"):
        text = bytearray(getattr(small, part))
        text[10] ^= 1
        changed = Corpus(**{**_fields(small), part: bytes(text)})
        with pytest.raises(DataError, match="training" if part == "train" else "held-out") as refusal:
            check(changed, small.config())
        assert "--data" in refusal.value.hint
        with pytest.raises(DataError) as refusal:
            unpack(pack(changed), small.config())
        assert "another peer" in refusal.value.hint


def test_moving_the_cut_between_training_and_held_out_text_is_noticed(small: Corpus) -> None:
    whole = small.train + small.heldout
    config = msgspec.structs.replace(
        small.config(), bytes=small.config().bytes - 1, heldout_bytes=len(small.heldout) + 1
    )
    assert len(whole) == config.bytes + config.heldout_bytes
    with pytest.raises(DataError):
        unpack(pack(small), config)


def test_a_corpus_that_is_not_text_or_lacks_a_part_is_refused_though_its_hash_is_right(small: Corpus) -> None:
    for corpus in (
        Corpus("bad", "MIT", b"\xff\xfe" * 9000, small.heldout),
        Corpus("bad", "MIT", small.train, b"\xc3"),
        Corpus("bad", "MIT", small.train, b""),
    ):
        with pytest.raises(DataError):
            unpack(pack(corpus), corpus.config())


def test_a_run_with_another_tokenizer_is_refused(small: Corpus) -> None:
    config = msgspec.structs.replace(small.config(), tokenizer_sha256="0" * 64)
    with pytest.raises(DataError, match="tokenizer"):
        check(small, config)


def test_no_hash_in_the_manifest_means_the_shipped_corpus(embedded: Corpus, small: Corpus) -> None:
    assert check(embedded, DataConfig()) == embedded
    with pytest.raises(DataError):
        check(small, DataConfig())


def test_a_local_copy_serves_under_the_runs_name(small: Corpus) -> None:
    local = Corpus("my-copy", small.license, small.train, small.heldout)
    assert check(local, small.config()).name == "small"


def test_files_are_read_in_name_order_and_the_end_is_held_out(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("b.txt", "a.md", "sub/c.txt"):
        (tmp_path / name).write_text(f"  begin {name}\n\n" + PARAGRAPH * 40, encoding="utf-8")
    (tmp_path / "ignored.py").write_text("import this")
    corpus = load_files([tmp_path], "mine", "CC-BY-4.0")
    whole = corpus.train + corpus.heldout
    places = [whole.index(f"begin {name}".encode()) for name in ("a.md", "b.txt", "sub/c.txt")]
    assert places == sorted(places) and places[0] == 0
    assert b"import this" not in whole
    assert corpus.train.endswith(b"\n\n") and corpus.heldout.startswith(b"Fellow")
    assert 0 <= len(corpus.heldout) - len(whole) * HELDOUT_SHARE <= len(PARAGRAPH) + 2


def test_line_ends_and_byte_order_marks_do_not_change_a_corpus(tmp_path: Path) -> None:
    text = PARAGRAPH * 60
    (tmp_path / "unix.txt").write_bytes(text.encode())
    (tmp_path / "windows.txt").write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    one, other = (load_files([tmp_path / f"{name}.txt"], "mine", "MIT") for name in ("unix", "windows"))
    assert one == other


@pytest.mark.parametrize("text", ["word " * 5000, "a line\n" * 5000, "ü" * 20_000, "€" * 20_000])
def test_a_text_without_paragraphs_is_cut_at_a_line_or_between_characters(tmp_path: Path, text: str) -> None:
    file = tmp_path / "text.txt"
    file.write_text(text, encoding="utf-8")
    corpus = load_files([file], "mine", "MIT")
    assert corpus.train.decode() + corpus.heldout.decode() == text.strip() + "\n\n"
    assert 0.019 < len(corpus.heldout) / len(corpus.train + corpus.heldout) < 0.021
    if "\n" in text:
        assert corpus.train.endswith(b"\n")


def _fields(corpus: Corpus) -> dict[str, str | bytes]:
    return {name: getattr(corpus, name) for name in ("name", "license", "train", "heldout")}


def test_what_cannot_be_trained_on_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("too short")
    (tmp_path / "latin.txt").write_bytes("café ".encode("latin-1") * 5000)
    with pytest.raises(DataError, match="too little"):
        load_files([tmp_path / "short.txt"], "mine", "MIT")
    with pytest.raises(DataError, match=r"latin\.txt is not UTF-8"):
        load_files([tmp_path / "latin.txt"], "mine", "MIT")
    with pytest.raises(DataError, match="no text at"):
        load_files([tmp_path / "absent"], "mine", "MIT")
    with pytest.raises(DataError, match="licence"):
        load_files([tmp_path / "short.txt"], "mine", "free")
