"""What every command shares of its output: errors with exit codes, and the log.

stdout carries what was asked for, and nothing else; the log and errors go to stderr. A failure that a user can act on
is one message and what to try next; its traceback shows with `-v -v` or P2PTRAIN_DEBUG=1.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any, TextIO

import typer
from typer.exceptions import TyperException

from p2ptrain.errors import P2PTrainError

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it."""


LOG_BYTES, LOGS_BEFORE = 4_000_000, 3
"""Of a peer's log in its home, and how many older ones are kept."""
SHOWN = "p2ptrain-shown"
"""The logger of what a peer shows and does not log otherwise: its rounds and transfers."""


class _CurrentStderr(logging.StreamHandler[TextIO]):
    """Writes to what sys.stderr is at that moment: a live display replaces it for a while to keep its lines whole."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:
        return sys.stderr

    @stream.setter
    def stream(self, stream: TextIO) -> None:
        raise AttributeError("the stream is always sys.stderr")


class JsonLines(logging.Formatter):
    """One JSON object a line: time (Unix seconds), level, logger, message, and exception where there is one."""

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, object] = {
            "time": round(record.created, 3),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry)


class _Text(logging.Formatter):
    def __init__(self, with_logger: bool) -> None:
        super().__init__(f"%(asctime)s %(levelname)s {'%(name)s: ' if with_logger else ''}%(message)s", "%H:%M:%S")

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


class _Dated(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def set_up_logging(verbose: int = 0, quiet: bool = False, log_format: str = "text") -> None:
    """Send the log to stderr: our INFO and others' WARNING; -v our DEBUG; -v -v everybody's; -q errors only."""
    handler = _CurrentStderr()
    handler.setFormatter(JsonLines() if log_format == "json" else _Text(with_logger=verbose > 0))
    root = logging.getLogger()
    for old in [h for h in root.handlers if isinstance(h, _CurrentStderr)]:
        root.removeHandler(old)
    root.addHandler(handler)
    if quiet:
        ours = others = logging.ERROR
    else:
        ours = logging.DEBUG if verbose else logging.INFO
        others = logging.DEBUG if verbose > 1 else logging.WARNING
    root.setLevel(others)
    logging.getLogger("p2ptrain").setLevel(ours)


@contextmanager
def log_kept(path: Path) -> Iterator[None]:
    """Have what is logged and shown meanwhile also go to a file, which is replaced before it is long.

    Where the file cannot be written the peer goes on: it is for reading later.
    """
    try:
        handler = RotatingFileHandler(path, maxBytes=LOG_BYTES, backupCount=LOGS_BEFORE, encoding="utf-8", delay=False)
    except OSError as error:
        logging.getLogger(__name__).warning("no log is kept in %s: %s", path, error.strerror)
        yield
        return
    handler.setFormatter(_Dated("%(asctime)s %(levelname)s %(message)s"))
    # A full disk is the business of what has to be written.
    handler.handleError = lambda record: None  # type: ignore[method-assign]
    shown = logging.getLogger(SHOWN)
    shown.propagate, shown.level = False, logging.INFO
    loggers = logging.getLogger(), shown
    for logger in loggers:
        logger.addHandler(handler)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
        handler.close()


class _Lasting:
    """A stream that outlives its reader: what a closed terminal or pipe would have shown is dropped."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except (OSError, ValueError):
            self._give_up()
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except (OSError, ValueError):
            self._give_up()

    def _give_up(self) -> None:
        # What the stream still holds must go somewhere when the interpreter ends.
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def outlive_readers() -> None:
    """Have this process go on when whoever reads its output has gone, as a peer in the background does."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        # There is none where a shell has closed it: `>&-`.
        if stream is not None and not isinstance(stream, _Lasting):
            setattr(sys, name, _Lasting(stream))


@contextmanager
def errors_reported() -> Iterator[None]:
    """Turn what a command raises into one message on stderr and an exit code.

    Raises:
        SystemExit: with the error's exit code. What is neither ours nor the system's is a bug, and passes with its
            traceback.
    """
    try:
        yield
    except P2PTrainError as error:
        code = _report(error, str(error), error.hint, error.exit_code)
    except TyperException as error:
        context = getattr(error, "ctx", None)
        # Without a message it is the help of a command called without arguments, which has been printed.
        code = error.exit_code
        if error.format_message():
            _report(error, error.format_message(), f"{context.command_path} --help" if context else "", code)
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except BrokenPipeError:
        # Whoever read our stdout has gone (`| head`); the interpreter must not try to flush it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except OSError as error:
        code = _report(error, str(error), "again with -v -v for the details", 1)
    else:
        return
    sys.exit(code)


def _report(error: Exception, message: str, hint: str, code: int) -> int:
    if any(isinstance(handler.formatter, JsonLines) for handler in logging.getLogger().handlers):
        line = json.dumps({"level": "error", "message": message, "hint": hint, "exit_code": code})
    else:
        line = printable(f"error: {message}" + (f"\n  try: {hint}" if hint else ""))
    if os.environ.get("P2PTRAIN_DEBUG") == "1" or logging.getLogger().isEnabledFor(logging.DEBUG):
        sys.stderr.write(printable("".join(traceback.format_exception(error))))
    print(line, file=sys.stderr, flush=True)
    return code


def printable(text: str) -> str:
    """`text` without control characters but line breaks and tabs: parts of it may come from strangers."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)
