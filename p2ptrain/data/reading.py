"""Documents out of files: plain text, JSON lines, parquet and arrow tables.

A document comes as passages of bounded length, cut at a paragraph, else a line, else a space, so that a file of any
length is read in bounded memory. What is no text is refused by name, with a remedy; single documents that are of no
use are left out and counted.
"""

from __future__ import annotations

import codecs
import hashlib
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import msgspec

from p2ptrain.data.listing import DataFile
from p2ptrain.data.opening import Counted, Reader, errors_named, opened
from p2ptrain.errors import DataError

PASSAGE_CHARACTERS = 1 << 16
LINE_MAX_BYTES = 32 * 2**20
_BLOCK_BYTES = 1 << 20
_ROWS = 512
_CONTROL_SHARE = 0.01
_CONTROL_BYTES = bytes([*range(9), *range(14, 32), 127])
_CONTROL = re.compile("[\x00-\x08\x0e-\x1f\x7f]")


@dataclass(frozen=True, slots=True)
class Passage:
    """A document, or a part of one."""

    text: str
    begins: bool = True
    """A document begins with it."""
    ends: bool = True
    """A document ends with it."""
    learned: bool = True
    """Whether its tokens count in the loss."""
    special: bool = False
    """Whether the names of special tokens in it are these tokens, as in what a template writes, and not text."""


@dataclass(slots=True)
class Tally:
    """What was read of one file, for people and for the record."""

    sha256: str = ""
    """Of the file as it lies on disk."""
    bytes: int = 0
    """Its length on disk."""
    documents: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    """How many documents were left out, by reason."""
    mended: int = 0
    """Documents with half characters, which were replaced."""


Chat = Callable[[list[dict[str, Any]]], list[tuple[str, bool]]]
"""Makes messages to passages: (text, whether its tokens count)."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What to take of records."""

    field: str | None = None
    """The field with the text; None: `text`, else prompt and completion, else messages."""
    chat: Chat | None = None
    """None: conversations are refused."""


def read_file(
    file: DataFile, wanted: Wanted, tally: Tally, progress: Callable[[int], None] = lambda count: None
) -> Iterator[Passage]:
    """The passages of a file.

    Args:
        tally: is filled in; complete once all was read.
        progress: hears how many more bytes were read.

    Raises:
        DataError: it cannot be read, or is not what its name or its content says.
    """
    if file.kind in ("parquet", "arrow"):
        documents = _documents(_rows(file, wanted, progress), file, wanted, tally)
        for passages in documents:
            yield from passages
        with errors_named(file), file.path.open("rb") as whole:
            tally.sha256, tally.bytes = hashlib.file_digest(whole, "sha256").hexdigest(), file.bytes
        return
    with opened(file, progress) as (reader, counted):
        begin = reader.peek(_BLOCK_BYTES)
        if begin.startswith((b"PAR1", b"ARROW1")):
            raise DataError(
                f"{file.name} is a table, and not readable as a stream",
                hint="give the file itself, unpacked, with a name that ends in .parquet or .arrow",
            )
        if file.kind == "jsonl" or (file.kind is None and _looks_like_json_lines(file, begin)):
            for passages in _documents(_records(reader, file), file, wanted, tally):
                yield from passages
        else:
            yield from _text(reader, file, tally)
        _finish(reader, counted, tally)


def _finish(reader: Reader, counted: Counted, tally: Tally) -> None:
    """Read what follows the last packed frame, so that the hash is of the whole file."""
    while reader.read(_BLOCK_BYTES):
        pass
    rest = bytearray(_BLOCK_BYTES)
    while counted.readinto(rest):
        pass
    tally.sha256, tally.bytes = counted.sha256, counted.bytes


# ---- plain text ---------------------------------------------------------------------------------------------------


def _text(reader: Reader, file: DataFile, tally: Tally) -> Iterator[Passage]:
    """One document, without white space around it; line ends become `\\n`."""
    pieces = cut(_characters(reader, file), PASSAGE_CHARACTERS)
    held = next(pieces, None)
    if held is None:
        tally.left_out["empty"] += 1
        return
    tally.documents += 1
    begins = True
    for piece in pieces:
        yield Passage(held, begins, ends=False)
        held, begins = piece, False
    yield Passage(held.rstrip(), begins)


def cut(characters: Iterable[str], limit: int) -> Iterator[str]:
    """Text in pieces of at most `limit` characters, from the first one on that is no space; none is of spaces alone.

    A piece ends after a paragraph, else after a line, else before a space, each in its second half; else anywhere.
    """
    kept = ""
    begun = False
    for more in characters:
        kept += more
        if not begun:
            kept = kept.lstrip()
            begun = bool(kept)
        while len(kept) > limit:
            end = place_to_cut(kept, limit)
            if not kept[end:].strip():
                # Perhaps the end. A run of white space that is longer than a piece is shortened.
                kept = kept[: end + limit]
                break
            yield kept[:end]
            kept = kept[end:]
    while len(kept) > limit and kept.strip():
        end = place_to_cut(kept, limit)
        yield kept[:end]
        kept = kept[end:]
    if kept.strip():
        yield kept


def place_to_cut(text: str, limit: int) -> int:
    """Where a text that is longer than `limit` is cut: see `cut`."""
    for mark, behind in (("\n\n", 2), ("\n", 1), (" ", 0)):
        found = text.rfind(mark, limit // 2, limit)
        if found > 0:
            return min(found + behind, limit)
    return limit


def _characters(reader: Reader, file: DataFile) -> Iterator[str]:
    begin = reader.peek(4)
    encoding, name = "utf-8", "UTF-8"
    if begin.startswith(codecs.BOM_UTF8):
        reader.read(len(codecs.BOM_UTF8))
    elif begin.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        encoding, name = "utf-16", "UTF-16"
    decoder = codecs.getincrementaldecoder(encoding)("strict")
    lines = io.IncrementalNewlineDecoder(decoder, translate=True)
    position = 0
    while True:
        block = reader.read(_BLOCK_BYTES)
        try:
            text = lines.decode(block, final=not block)
        except UnicodeDecodeError as error:
            _refuse_control(block, file)
            raise DataError(
                f"{file.name} is not {name} text: {error.reason} near byte {position + error.start:,}",
                hint=f"convert it, as with: iconv -f LATIN1 -t UTF-8 '{file.name}' > text.txt   or leave it out",
            ) from error
        _refuse_control(text.encode() if encoding != "utf-8" else block, file)
        position += len(block)
        if text:
            yield text
        if not block:
            return


def _refuse_control(block: bytes, file: DataFile) -> None:
    printable = len(block.translate(None, _CONTROL_BYTES))
    if len(block) - printable <= _CONTROL_SHARE * len(block):
        return
    nothing = block.count(0)
    if nothing * 2 > len(block) - printable:
        raise DataError(
            f"{file.name} holds {nothing:,} NUL bytes, as a download that was cut off does",
            hint="get it again, or leave it out",
        )
    try:
        block[: len(block) // 2].decode()
    except UnicodeDecodeError as error:
        if error.end < len(block) // 2:
            raise DataError(f"{file.name} is not text but binary", hint="leave it out") from error
    raise DataError(
        f"{file.name} holds {len(block) - printable:,} control characters in {len(block):,} bytes, as what a terminal "
        "shows does",
        hint=rf"take them out, as with: sed 's/\x1b\[[0-9;]*[A-Za-z]//g' '{file.name}' | tr -d '\000-\010\016-\037'",
    )


# ---- records ------------------------------------------------------------------------------------------------------


def _looks_like_json_lines(file: DataFile, begin: bytes) -> bool:
    start = begin.removeprefix(codecs.BOM_UTF8).lstrip()
    if start.startswith(b"[") and file.path.suffix == ".json":
        raise DataError(
            f"{file.name} is one JSON array, which would have to be read whole",
            hint=f"make lines of it: jq -c '.[]' '{file.name}' > data.jsonl",
        )
    if not start.startswith(b"{"):
        return False
    line, _, more = start.partition(b"\n")
    if not more and len(start) >= _BLOCK_BYTES // 2:
        return True
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def _records(reader: Reader, file: DataFile) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, record) of each line."""
    number = 0
    while line := reader.readline(LINE_MAX_BYTES + 1):
        number += 1
        where = f"{file.name}, line {number:,}"
        if len(line) > LINE_MAX_BYTES:
            raise DataError(
                f"{where}: longer than {LINE_MAX_BYTES:,} bytes",
                hint="JSON lines have one document a line: jq -c '.[]' makes them of an array",
            )
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        if not line.strip():
            continue
        yield where, _record(line, where)


def _record(line: bytes, where: str) -> dict[str, Any]:
    try:
        record = msgspec.json.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        try:
            # It takes half characters, too, which are mended later.
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where} is not JSON: {error}", hint="correct or remove that line") from error
    if not isinstance(record, dict):
        raise DataError(
            f"{where} is no JSON object", hint='each line is an object such as {"text": "..."}: correct or remove it'
        )
    return record


def _rows(file: DataFile, wanted: Wanted, progress: Callable[[int], None]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, row) of a table, some hundred rows in memory at a time."""
    try:
        import pyarrow
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(
            f"{file.name} is a table, which pyarrow reads, and it is not installed",
            hint="pip install 'p2ptrain[data]'",
        ) from error
    try:
        with errors_named(file):
            number, told = 0, 0
            if file.kind == "parquet":
                with pyarrow.parquet.ParquetFile(file.path, memory_map=False, pre_buffer=False) as table:
                    columns = _columns(table.schema_arrow.names, file, wanted)
                    total = max(table.metadata.num_rows, 1)
                    batches = table.iter_batches(batch_size=_ROWS, columns=columns)
                    for batch in batches:
                        yield from _numbered(batch, number, file)
                        number += batch.num_rows
                        progress(file.bytes * number // total - told)
                        told = file.bytes * number // total
                return
            with pyarrow.memory_map(str(file.path)) as mapped, _ArrowBatches(pyarrow, mapped) as (schema, batches):
                columns = _columns(schema.names, file, wanted)
                for large in batches:
                    for start in range(0, large.num_rows, _ROWS):
                        yield from _numbered(large.slice(start, _ROWS).select(columns), number + start, file)
                    number += large.num_rows
                    progress(mapped.tell() - told)
                    told = mapped.tell()
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(
            f"{file.name} cannot be read as {file.kind}: {reason}",
            hint="it is damaged or something else: get it again, or leave it out",
        ) from error


class _ArrowBatches:
    """The schema and batches of an arrow file, whichever of its two forms it has."""

    def __init__(self, pyarrow: Any, mapped: Any) -> None:
        try:
            self._reader = pyarrow.ipc.open_stream(mapped)
        except pyarrow.ArrowInvalid:
            mapped.seek(0)
            self._reader = pyarrow.ipc.open_file(mapped)

    def __enter__(self) -> tuple[Any, Iterator[Any]]:
        reader = self._reader
        if hasattr(reader, "get_batch"):
            return reader.schema, (reader.get_batch(i) for i in range(reader.num_record_batches))
        return reader.schema, iter(reader)

    def __exit__(self, *_: object) -> None:
        self._reader.__exit__(*_)


def _columns(names: list[str], file: DataFile, wanted: Wanted) -> list[str]:
    """The columns to read, so that others cost nothing."""
    record = dict.fromkeys(names)
    if wanted.field is not None and wanted.field in record:
        return [wanted.field]
    for few in (["text"], ["prompt", "completion"], ["messages"]):
        if wanted.field is None and all(name in record for name in few):
            return few
    raise _no_field(file.name, names, wanted)


def _numbered(batch: Any, before: int, file: DataFile) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, row in enumerate(batch.to_pylist(), before + 1):
        yield f"{file.name}, row {number:,}", row


def _no_field(where: str, names: Iterable[str], wanted: Wanted) -> DataError:
    listed = ", ".join(list(names)[:20])
    if wanted.field is not None:
        return DataError(
            f"{where} has no field {wanted.field!r}; it has: {listed}", hint="--field NAME with one of these"
        )
    return DataError(
        f"{where} has none of the fields text, prompt and completion, messages; it has: {listed}",
        hint="--field NAME says which one is the text",
    )


def _documents(
    records: Iterator[tuple[str, dict[str, Any]]], file: DataFile, wanted: Wanted, tally: Tally
) -> Iterator[Iterable[Passage]]:
    for where, record in records:
        texts = _texts(where, record, wanted)
        if texts is None:
            if not tally.documents and not tally.left_out:
                raise _no_field(where, record, wanted)
            tally.left_out["without that field"] += 1
            continue
        mended = [(_mended(text), learned) for text, learned in texts]
        if not any(text.strip() for text, _ in mended):
            tally.left_out["empty"] += 1
        elif any(_too_much_control(text) for text, _ in mended):
            tally.left_out["control characters"] += 1
        else:
            tally.documents += 1
            tally.mended += any(text is not new for (text, _), (new, _) in zip(texts, mended, strict=True))
            special = wanted.field is None and _is_conversation(record)
            yield _passages([(_with_newlines(text), learned) for text, learned in mended if text], special)
    if not tally.documents and tally.left_out:
        why = ", ".join(f"{reason} {count:,}" for reason, count in tally.left_out.items())
        raise DataError(
            f"{file.name} holds no document with text ({why})", hint="leave it out, or choose another --field"
        )


def _texts(where: str, record: dict[str, Any], wanted: Wanted) -> list[tuple[str, bool]] | None:
    """(text, whether it counts) of a record; None: it has not got the field."""
    if wanted.field is not None:
        return _one(where, wanted.field, record[wanted.field]) if wanted.field in record else None
    if "text" in record:
        return _one(where, "text", record["text"])
    if "prompt" in record and "completion" in record:
        prompt, completion = (_one(where, name, record[name]) for name in ("prompt", "completion"))
        return [*((text, False) for text, _ in prompt), *completion]
    if _is_conversation(record):
        return _conversation(where, record["messages"], wanted)
    return None


def _is_conversation(record: dict[str, Any]) -> bool:
    return "messages" in record and "text" not in record and not ("prompt" in record and "completion" in record)


def _one(where: str, name: str, value: object) -> list[tuple[str, bool]]:
    if value is None:
        return []
    if not isinstance(value, str):
        raise DataError(
            f"{where}: field {name!r} is {type(value).__name__}, not text",
            hint="--field NAME says which one is the text",
        )
    return [(value, True)]


def _conversation(where: str, messages: object, wanted: Wanted) -> list[tuple[str, bool]]:
    if wanted.chat is None:
        raise DataError(
            f"{where} is a conversation, and the tokenizer has no template for one",
            hint="--tokenizer FOLDER with tokenizer.json and a chat_template, or --field NAME",
        )
    if not isinstance(messages, list) or not all(isinstance(one, dict) for one in messages):
        raise DataError(f"{where}: messages is no list of objects", hint="correct or remove it")
    try:
        return wanted.chat(messages)
    except ValueError as error:
        raise DataError(f"{where}: {error}", hint="correct or remove it") from error


def _passages(texts: list[tuple[str, bool]], special: bool) -> Iterator[Passage]:
    pieces = [
        (text[start : start + PASSAGE_CHARACTERS], learned)
        for text, learned in texts
        for start in range(0, len(text), PASSAGE_CHARACTERS)
    ]
    for number, (text, learned) in enumerate(pieces):
        yield Passage(text, number == 0, number == len(pieces) - 1, learned, special)


def _mended(text: str) -> str:
    """The same text, or one with marks in place of halves of surrogate pairs."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _too_much_control(text: str) -> bool:
    return _CONTROL.search(text) is not None and len(_CONTROL.findall(text)) > _CONTROL_SHARE * len(text)


def _with_newlines(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text
