"""What peers say they have measured of the run's model: kept, compared, and told.

A figure is the word of the peer that measured it. So it is shown with that peer's id, beside the median of what the
last few measured, and a figure that is far from that median is marked. Anyone who holds the round can measure again:
`p2ptrain eval --round N`. A peer believes nobody but whose turn it was (`observe/turns.py`), and the first figure that
it names: a liar has one figure a turn, however many it publishes.

The history is one JSON object a line, appended; of a line that a crash cut short, what is left is passed over.
"""

from __future__ import annotations

import json
import logging
import statistics
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from p2ptrain.observe.turns import Turn
from p2ptrain.swarm.identity import format_peer_id
from p2ptrain.swarm.records import ID_END, EvaluationRecord

MEASURERS = 5
"""The median is over the last figures of so many peers."""
LOOK_BACK = 64
"""No measurement before so many others counts any more."""
FAR_SHARE, FAR_DEVIATIONS = 0.1, 3.0
"""A figure is far off that differs from the median by more than this share of it, and by more than so many times what
the figures differ from it in the middle."""
SAME_SHARE = 1e-3
"""Figures of one state, on one text, that differ by no more than this share agree: devices round differently."""
TAIL_BYTES = 64 * 1024
"""As much of a history is read by a peer that starts."""

BITS, PERPLEXITY = "bits_per_byte", "perplexity"

_logger = logging.getLogger(__name__)


class Evaluation(msgspec.Struct, frozen=True, kw_only=True):
    """One measurement, as it stands in the history."""

    time: float
    """Unix seconds, when it was written down here."""
    round: int
    state_id: str
    """In hexadecimal, as ids of states always are for people."""
    by: str
    """Peer id of who says so."""
    figures: dict[str, float]
    tokens: int = 0
    seconds: float = 0.0
    tokenizer_sha256: str = ""
    """Whose tokens a perplexity is of."""

    @property
    def headline(self) -> str:
        """The name of its first figure, bits per byte before all others."""
        return BITS if BITS in self.figures else next(iter(self.figures))

    @property
    def value(self) -> float:
        """That figure."""
        return self.figures[self.headline]

    @property
    def key(self) -> tuple[int, str, str]:
        """One peer has one figure of a state."""
        return self.round, self.state_id, self.by

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        return msgspec.structs.asdict(self)


def evaluation_of(peer_id: bytes, said: EvaluationRecord, now: float, tokenizer_sha256: str = "") -> Evaluation:
    """Return what a peer says, for the history.

    Args:
        now: Unix seconds.
    """
    return Evaluation(
        time=round(now, 3),
        round=said.round,
        state_id=said.state_id.hex(),
        by=format_peer_id(peer_id),
        figures=dict(said.figures),
        tokens=said.tokens,
        seconds=round(said.seconds, 3),
        tokenizer_sha256=tokenizer_sha256 if PERPLEXITY in said.figures else "",
    )


# ---- comparing ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Summary:
    """The newest measurement, beside those before it."""

    latest: Evaluation
    median: float
    """Of its headline figure, over the newest figures of the last measurers."""
    measurers: int
    """Over how many peers the median is."""
    far_off: bool
    """Whether the newest figure is far from that median."""
    agree: int
    """Peers that measured the same state on as many tokens and found the same, the newest one's included."""
    differ: int
    """Those that found something else."""

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        return self.latest.as_json() | {
            "headline": self.latest.headline,
            "median": self.median,
            "measurers": self.measurers,
            "far_off": self.far_off,
            "agree": self.agree,
            "differ": self.differ,
        }


def summary_of(said: Iterable[Evaluation]) -> Summary | None:
    """Compare measurements of one run, in any order; None: there are none."""
    ordered = sorted(said, key=lambda one: (one.round, one.time))
    if not ordered:
        return None
    latest = ordered[-1]
    newest = _newest_of_each(ordered, latest.headline)
    values = [one.value for one in newest]
    same = {
        one.by: agrees(one.value, latest.value)
        for one in ordered
        if (one.round, one.state_id, one.tokens, one.headline)
        == (latest.round, latest.state_id, latest.tokens, latest.headline)
    }
    return Summary(
        latest,
        statistics.median(values),
        len(values),
        _far_off(latest.value, values),
        sum(same.values()),
        len(same) - sum(same.values()),
    )


def _newest_of_each(ordered: Sequence[Evaluation], headline: str) -> list[Evaluation]:
    """Return the newest measurement of each of the last measurers, of those with this headline."""
    found: dict[str, Evaluation] = {}
    for one in reversed(ordered[-LOOK_BACK:]):
        if one.headline == headline and len(found) < MEASURERS:
            found.setdefault(one.by, one)
    return list(found.values())


def _far_off(value: float, values: Sequence[float]) -> bool:
    """Say whether one of some values is far from the others; of fewer than three nobody can tell which one it is."""
    if len(values) < 3:
        return False
    median = statistics.median(values)
    spread = statistics.median(abs(one - median) for one in values)
    return abs(value - median) > max(FAR_SHARE * abs(median), FAR_DEVIATIONS * spread)


def agrees(one: float, other: float) -> bool:
    """Say whether two figures of one state, on one text, are the same but for rounding."""
    return abs(one - other) <= SAME_SHARE * max(abs(one), abs(other))


def marked(ordered: Sequence[Evaluation]) -> list[tuple[Evaluation, bool]]:
    """Return measurements in their order, each with whether it was far off when it came, by those before it."""
    return [(one, _far_off_then(ordered[max(0, n + 1 - LOOK_BACK) : n + 1])) for n, one in enumerate(ordered)]


def _far_off_then(ordered: Sequence[Evaluation]) -> bool:
    latest = ordered[-1]
    return _far_off(latest.value, [one.value for one in _newest_of_each(ordered, latest.headline)])


# ---- in words -------------------------------------------------------------------------------------------------------


def figure_text(name: str, value: float) -> str:
    """Return one figure with its name or unit."""
    return f"{value:.3f} bits/byte" if name == BITS else f"{name} {value:.4g}"


def figures_text(figures: Mapping[str, float]) -> str:
    """Return all figures, bits per byte first."""
    return ", ".join(figure_text(name, figures[name]) for name in sorted(figures, key=lambda name: name != BITS))


def kind_text(evaluation: Evaluation) -> str:
    """Return what was measured on: what a model's owner measures may be of any data."""
    return "held-out" if evaluation.tokens else "evaluated"


def said_text(evaluation: Evaluation) -> str:
    """Return what a peer says, in one line."""
    on = f" on {evaluation.tokens:,} tokens" if evaluation.tokens else ""
    return (
        f"{evaluation.by[-ID_END:]} says of round {evaluation.round}: {kind_text(evaluation)} "
        f"{figures_text(evaluation.figures)}{on}"
    )


def live_text(summary: Summary) -> str:
    """Return one line of less than 80 columns, where names of figures are short."""
    latest = summary.latest
    name, who = latest.headline, latest.by[-ID_END:]
    value, median = figure_text(name, latest.value), figure_text(name, summary.median)
    if summary.far_off:
        return f"{kind_text(latest)} {median}, median of {summary.measurers}; {who} says {value}: far off"
    beside = f", median of {summary.measurers}: {summary.median:.4g}" if summary.measurers > 1 else ""
    return f"{kind_text(latest)} {value} at round {latest.round} by {who}{beside}"


def evaluation_lines(summary: Summary, names: Mapping[str, str]) -> list[str]:
    """Return what is known of the model, for people.

    Args:
        names: of peers, by their ids.
    """
    latest = summary.latest
    name = latest.headline
    who = f"{names.get(latest.by, 'a peer')} ({latest.by[-ID_END:]})"
    tokens = f" on {latest.tokens:,} tokens" if latest.tokens else ""
    of = f" of tokenizer {latest.tokenizer_sha256[:8]}" if latest.tokenizer_sha256 and tokens else ""
    lines = [f"{kind_text(latest)}: {figures_text(latest.figures)}{tokens}{of} at round {latest.round}, says {who}"]
    if summary.agree + summary.differ > 1:
        lines.append(f"  of those that measured that round, {summary.agree} agree and {summary.differ} differ")
    if summary.measurers > 1:
        median = figure_text(name, summary.median)
        far = f": {who} IS FAR OFF" if summary.far_off else ""
        lines.append(f"  median of the newest figures of {summary.measurers} peers: {median}{far}")
    # A model of somebody's own is nowhere but in its peers' programs.
    how = f"; a home that holds the round can: p2ptrain eval --round {latest.round}" if latest.tokens else ""
    lines.append(f"  nobody has checked it{how}")
    return lines


# ---- keeping --------------------------------------------------------------------------------------------------------

_decoder = msgspec.json.Decoder(Evaluation)


def read_history(path: Path, most_bytes: int | None = None) -> list[Evaluation]:
    """Return the measurements in a history, oldest first, as far as its lines are whole; none where there is no file.

    Args:
        most_bytes: read no more than so much of its end.
    """
    try:
        with path.open("rb") as file:
            if most_bytes is not None:
                length = file.seek(0, 2)
                file.seek(max(0, length - most_bytes))
            lines = file.read().splitlines()
    except FileNotFoundError:
        return []
    found = []
    for line in lines:
        try:
            one = _decoder.decode(line)
        except (msgspec.MsgspecError, ValueError):
            continue
        if one.figures:
            found.append(one)
    return found


class History:
    """The measurements that a home knows of, its own and those of others, on disk; for one thread.

    Args:
        path: of the file, which need not exist.
        tokenizer_sha256: of the run's tokenizer; empty: it has none.
    """

    def __init__(self, path: Path, tokenizer_sha256: str = "") -> None:
        self._path, self._tokenizer_sha256 = path, tokenizer_sha256
        self._recent = read_history(path, TAIL_BYTES)
        self._known = {one.key for one in self._recent}

    def hear(self, said: Iterable[tuple[bytes, EvaluationRecord]]) -> list[Evaluation]:
        """Keep what is new of what peers say; returns that.

        A disk that is full costs the line and not the training; a warning says so.
        """
        new = []
        for peer_id, record in said:
            one = evaluation_of(peer_id, record, time.time(), self._tokenizer_sha256)
            if one.key not in self._known:
                self._known.add(one.key)
                new.append(one)
        if new:
            self._recent = [*self._recent, *new][-256:]
            try:
                self._append(new)
            except OSError as error:
                _logger.warning("cannot write to %s: %s", self._path, error.strerror)
        return new

    def summary(self, turns: Collection[Turn]) -> Summary | None:
        """Compare what is known, but for states that the chain has left since.

        Args:
            turns: the last ones on the chain.
        """
        states = {turn.round: turn.state_id.hex() for turn in turns}
        return summary_of(one for one in self._recent if states.get(one.round, one.state_id) == one.state_id)

    def _append(self, new: Iterable[Evaluation]) -> None:
        text = b"".join(json.dumps(one.as_json()).encode() + b"\n" for one in new)
        with self._path.open("a+b") as file:
            if file.tell():
                file.seek(-1, 2)
                if file.read(1) != b"\n":
                    text = b"\n" + text
            file.write(text)
