"""Files of all kinds: read as what they are, or refused with a message that names file, reason and remedy."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zstandard
from inputs import put, sentence, text

from p2ptrain.data.gathering import Gathered, gather
from p2ptrain.data.listing import list_files
from p2ptrain.data.reading import PASSAGE_CHARACTERS, Wanted, cut
from p2ptrain.errors import DataError

PLAIN = text(20_000)


def read(*paths: Path, wanted: Wanted | None = None) -> tuple[list[str], Gathered]:
    """The documents in some paths, and what is said of them."""
    gathered = Gathered()
    found: list[str] = []
    for passage in gather(list_files(paths), wanted or Wanted(), gathered):
        if passage.begins:
            found.append("")
        found[-1] += passage.text
    return found, gathered


def records(*texts: str) -> bytes:
    return "".join(json.dumps({"id": 1, "text": one}) + "\n" for one in texts).encode()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("plain.txt", PLAIN.encode()),
        ("UPPER.TXT", PLAIN.encode()),
        ("notes.md", PLAIN.encode()),
        ("no suffix", PLAIN.encode()),
        ("bom.txt", b"\xef\xbb\xbf" + PLAIN.encode()),
        ("windows.txt", PLAIN.replace("\n", "\r\n").encode()),
        ("old mac.txt", PLAIN.replace("\n", "\r").encode()),
        ("utf16.txt", b"\xff\xfe" + PLAIN.encode("utf-16-le")),
        ("big.txt", b"\xfe\xff" + PLAIN.encode("utf-16-be")),
        ("plain.txt.gz", gzip.compress(PLAIN.encode())),
        ("two members.txt.gz", gzip.compress(PLAIN[:9000].encode()) + gzip.compress(PLAIN[9000:].encode())),
        ("plain.txt.bz2", bz2.compress(PLAIN.encode())),
        ("plain.txt.xz", lzma.compress(PLAIN.encode())),
        ("plain.txt.zst", zstandard.compress(PLAIN.encode())),
        ("two frames.zst", zstandard.compress(PLAIN[:9000].encode()) + zstandard.compress(PLAIN[9000:].encode())),
        ("文書.txt", PLAIN.encode()),
        ("docs.jsonl", records(PLAIN)),
        ("docs.ndjson", b"\xef\xbb\xbf\n" + records(PLAIN)),
        ("docs.jsonl.zst", zstandard.compress(records(PLAIN))),
        ("json lines without a name", records(PLAIN)),
    ],
)
def test_the_same_text_comes_out_of_every_form(tmp_path: Path, name: str, content: bytes) -> None:
    (found,), gathered = read(put(tmp_path / name, content))
    assert found.strip() == PLAIN.strip()
    assert gathered.documents == 1 and not gathered.left_out()


@pytest.mark.parametrize(
    ("name", "content", "reason", "remedy"),
    [
        ("latin1.txt", (PLAIN + "café").encode("latin-1"), r"latin1\.txt is not UTF-8", "iconv"),
        ("binary.txt", bytes(range(256)) * 80, r"binary\.txt is not text", "leave it out"),
        ("nul.txt", b"\0" * 20_000, r"nul\.txt holds 20,000 NUL bytes", "get it again"),
        ("ansi.txt", b"\x1b[31mred\x07\x08\n" * 500, r"ansi\.txt holds .* control characters", "sed"),
        ("cut.gz", gzip.compress(PLAIN.encode())[:-100], r"cut\.gz cannot be unpacked", "get it again"),
        ("cut.zst", zstandard.compress(PLAIN.encode())[:-100], r"cut\.zst cannot be unpacked", "get it again"),
        ("cut.xz", lzma.compress(PLAIN.encode())[:-100], r"cut\.xz cannot be unpacked", "get it again"),
        ("texts.zip", b"PK\x03\x04" + bytes(900), r"texts\.zip is a zip archive", "unzip"),
        ("fake.parquet", b"PAR1" + bytes(range(256)) * 9 + b"PAR1", r"fake\.parquet cannot be read", "get it again"),
        ("fake.arrow", bytes(range(256)) * 9, r"fake\.arrow cannot be read", "get it again"),
        ("table.bin", b"PAR1" + bytes(900), r"table\.bin is a table", r"\.parquet"),
        ("bad.jsonl", records("a") + b"{oops\n", r"bad\.jsonl, line 2 is not JSON", "remove that line"),
        ("list.jsonl", b"[1, 2]\n", r"list\.jsonl, line 1 is no JSON object", "correct or remove"),
        ("array.json", b'[{"text": "a"}]', r"array\.json is one JSON array", "jq -c"),
        ("other.jsonl", b'{"body": "a", "id": 3}\n', r"line 1 has none of the fields .* body, id", "--field"),
        ("number.jsonl", b'{"text": 7}\n', "'text' is int, not text", "--field"),
        ("blank.jsonl", records("", " "), r"blank\.jsonl holds no document", "another --field"),
        ("chat.jsonl", b'{"messages": []}\n', "is a conversation", "--tokenizer"),
        ("deep.jsonl", b'{"text":' + b"[" * 100_000 + b"\n", r"deep\.jsonl, line 1 is not JSON", "remove that line"),
    ],
)
def test_what_is_no_text_is_refused(tmp_path: Path, name: str, content: bytes, reason: str, remedy: str) -> None:
    with pytest.raises(DataError, match=reason) as caught:
        read(put(tmp_path / name, content))
    assert caught.value.hint and __import__("re").search(remedy, caught.value.hint)


def test_a_zip_that_was_made_by_zipfile_is_told_too(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "texts.zip", "w") as archive:
        archive.writestr("a.txt", PLAIN)
    with pytest.raises(DataError, match="zip archive"):
        read(tmp_path / "texts.zip")


def test_a_folder_is_read_in_name_order_without_what_is_hidden(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    for name in ("b/UPPER.TXT", "a.md", "b.d/mixed.Txt", "data.jsonl"):
        put(folder / name, records(f"begin {name}") if name.endswith("jsonl") else f"begin {name}\n")
    for name in (".git/description.txt", ".venv/lib/LICENSE.txt", ".ipynb_checkpoints/notes.md", ".hidden.txt"):
        put(folder / name, "SHOULD NOT BE READ")
    put(folder / "page.html", "<html>")
    put(folder / "empty.txt", "")
    os.symlink("/nonexistent/target.txt", folder / "broken.txt")
    os.symlink(folder / "a.md", folder / "z.md")
    found, _ = read(folder)
    assert found == ["begin a.md", "begin b/UPPER.TXT", "begin b.d/mixed.Txt", "begin data.jsonl"]
    listing = list_files([folder])
    reasons = dict(listing.left_out)
    assert reasons["page.html"] == ".html" and reasons["broken.txt"] == "broken link"
    assert reasons[".git/"] == reasons[".hidden.txt"] == "hidden"
    assert (reasons["empty.txt"], reasons["z.md"]) == ("empty", "there twice")
    assert str(listing).startswith("4 files to read; 8 left out (hidden 4, ")


@pytest.mark.parametrize("names", [["page.html"], [".git/a.txt"], []])
def test_a_folder_without_text_says_what_lies_there(tmp_path: Path, names: list[str]) -> None:
    for name in names:
        put(tmp_path / name, PLAIN)
    with pytest.raises(DataError, match="nothing to read in") as caught:
        read(tmp_path)
    assert all(name.split("/")[0] in str(caught.value) for name in names)


def test_paths_that_lead_nowhere_are_told(tmp_path: Path) -> None:
    os.symlink("/nonexistent", tmp_path / "broken")
    with pytest.raises(DataError, match="no such file"):
        list_files([tmp_path / "absent.txt"])
    with pytest.raises(DataError, match="broken link"):
        list_files([tmp_path / "broken"])


@pytest.mark.parametrize("content", [PLAIN.encode(), gzip.compress(PLAIN.encode()), records(PLAIN)])
def test_a_pipe_is_read(tmp_path: Path, content: bytes) -> None:
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=lambda: (tmp_path / "pipe").write_bytes(content))
    writer.start()
    found, gathered = read(tmp_path / "pipe")
    writer.join()
    assert [one.strip() for one in found] == [PLAIN.strip()]
    assert gathered.tallies[0][2].sha256 == __import__("hashlib").sha256(content).hexdigest()


def test_half_characters_become_replacement_marks_and_are_counted(tmp_path: Path) -> None:
    file = put(tmp_path / "a.jsonl", rb'{"text": "\ud83d broken"}' + b"\n" + rb'{"text": "\ud83d\ude80 whole"}')
    found, gathered = read(file)
    assert found == ["\N{REPLACEMENT CHARACTER} broken", "\N{ROCKET} whole"]
    assert list(gathered.lines())[1] == "in 1 document half characters were replaced by the replacement mark"


def test_single_records_of_no_use_are_left_out_and_counted(tmp_path: Path) -> None:
    lines = [{"text": "good"}, {"text": None}, {"text": ""}, {"body": "x"}, {"text": "\0" * 9}, {"text": "good too"}]
    found, gathered = read(put(tmp_path / "a.jsonl", "\n".join(map(json.dumps, lines))))
    assert found == ["good", "good too"]
    assert gathered.left_out() == {"empty": 2, "without that field": 1, "control characters": 1}


def test_a_field_is_chosen_by_name(tmp_path: Path) -> None:
    file = put(tmp_path / "a.jsonl", b'{"text": "no", "body": "yes"}\n')
    assert read(file, wanted=Wanted("body"))[0] == ["yes"]
    with pytest.raises(DataError, match=r"has no field 'tect'; it has: text, body"):
        read(file, wanted=Wanted("tect"))


def test_of_prompt_and_completion_the_completion_alone_counts(tmp_path: Path) -> None:
    file = put(tmp_path / "a.jsonl", b'{"prompt": "2 + 2 =", "completion": " 4"}\n')
    passages = list(gather(list_files([file]), Wanted(), Gathered()))
    assert [(one.text, one.learned, one.begins, one.ends) for one in passages] == [
        ("2 + 2 =", False, True, False),
        (" 4", True, False, True),
    ]


def test_tables_are_read(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet, ipc = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow.ipc")
    texts = [sentence() for _ in range(1500)]
    table = pyarrow.table({"text": [*texts, None], "id": range(1501)})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=400)
    kinds: dict[str, Callable[..., Any]] = {"stream": ipc.new_stream, "file": ipc.new_file}
    for name, make in kinds.items():
        with make(str(tmp_path / f"{name}.arrow"), table.schema) as writer:
            writer.write_table(table)
    for name in ("a.parquet", "stream.arrow", "file.arrow"):
        found, gathered = read(tmp_path / name)
        assert found == texts and gathered.left_out() == {"empty": 1}
    with pytest.raises(DataError, match="has no field 'body'; it has: text, id"):
        read(tmp_path / "a.parquet", wanted=Wanted("body"))


def test_of_a_saved_dataset_the_split_train_is_read(tmp_path: Path) -> None:
    pyarrow, ipc = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.ipc")
    put(tmp_path / "dataset_dict.json", '{"splits": ["train", "test"]}')
    for split in ("train", "test"):
        put(tmp_path / split / "dataset_info.json", "{}")
        put(tmp_path / split / "state.json", "{}")
        for name in ("data-00000-of-00001", "cache-0123"):
            table = pyarrow.table({"text": [f"{split} {name}"]})
            with ipc.new_stream(str(tmp_path / split / f"{name}.arrow"), table.schema) as writer:
                writer.write_table(table)
    assert read(tmp_path)[0] == ["train data-00000-of-00001"]
    assert dict(list_files([tmp_path]).left_out) == {
        "test/": "another split than train",
        "train/cache-0123.arrow": "cache of datasets",
    }


@pytest.mark.parametrize("mark", ["\n\n", "\n", " ", ""])
def test_a_long_text_is_cut_where_it_hurts_least_and_nothing_is_lost(mark: str) -> None:
    whole = mark.join(["word" * 5] * 900)
    pieces = list(cut([whole[i : i + 777] for i in range(0, len(whole), 777)], 1000))
    assert "".join(pieces) == whole
    assert max(map(len, pieces)) <= 1000 and len(pieces) < 2 * len(whole) // 1000 + 2
    if mark.strip(" "):
        assert all(piece.endswith(mark) for piece in pieces[:-1])
    elif mark:
        assert all(piece.startswith(mark) for piece in pieces[1:])


def test_a_run_of_white_space_costs_no_memory() -> None:
    pieces = list(cut(["begin", *[" " * PASSAGE_CHARACTERS] * 50, "end"], PASSAGE_CHARACTERS))
    assert pieces[0].startswith("begin") and pieces[-1].endswith("end")
    assert sum(map(len, pieces)) <= 4 * PASSAGE_CHARACTERS
