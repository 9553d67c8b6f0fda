"""A member's turn to measure the model: at intervals, on the parameters of one round, while training goes on.

When a round is applied at which it is this peer's turn, the parameters are copied. They are measured in slices, which
come where the trainer waits for others or, at most a tenth of the time, between two micro-batches: for a slice the
model's parameters are the copy. What training computes is the same bits with and without; only its time is less.

Cost: a copy of the parameters while a measurement is under way, and at most `SHARE` of this process's time, but for one
slice. What does not fit into that is measured on fewer tokens; where that would be less than `LEAST` of them, the turn
passes, and there is more time in the next one. After the run's last round there is time for all of them. A slice is as
many sequences as two micro-batches have, which a forward pass alone takes less time for than one micro-batch takes.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import msgspec
import torch
from torch import Tensor, nn

from p2ptrain.chain import ChainState
from p2ptrain.data.text import Part
from p2ptrain.errors import P2PTrainError
from p2ptrain.models.gpt import GPT
from p2ptrain.models.task import Task
from p2ptrain.observe.evaluations import BITS, PERPLEXITY
from p2ptrain.observe.turns import Turn, turn_at
from p2ptrain.swarm.records import FIGURES_MAX, EvaluationRecord, FigureName
from p2ptrain.training.evaluation import Scoring

SHARE = 0.03
"""Of this process's time, for measuring."""
LEAST = 0.25
"""Of the tokens that the manifest sets: on fewer a figure would say little."""
PAUSE = 9.0
"""Between two slices where nobody is waited for: so many times what the last one took."""
TURNS_KEPT = 16
"""As many turns, back from the newest, are known: figures of older ones count no more."""

Evaluate = Callable[[nn.Module], Mapping[str, float]]
"""Measures a model of somebody's own."""

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Found:
    """What came of a measurement."""

    figures: dict[str, float]
    tokens: int = 0


class Method(Protocol):
    """Measures a model whose parameters are those to measure between any two yields of `slices`."""

    def slices(self, allowed_seconds: float) -> Iterator[Found | None]:
        """Measure, in about that time: yield None after each slice, and what was found after the last one."""
        ...


class HeldOut:
    """Measures the built-in model on held-out text.

    Args:
        text: held out.
        tokens: of it, at most.
        windows_at_once: sequences in a slice.
        clock: seconds, monotonic.
    """

    def __init__(
        self, model: GPT, text: Part, tokens: int, windows_at_once: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._model, self._text, self._tokens, self._at_once = model, text, tokens, windows_at_once
        self._clock = clock
        #: as last measured; None: not yet
        self._seconds_per_token: float | None = None

    def slices(self, allowed_seconds: float) -> Iterator[Found | None]:
        if self._seconds_per_token is None:
            self._timed(self._scoring(self._tokens))
            yield None
        assert self._seconds_per_token is not None
        affordable = min(self._tokens, allowed_seconds / max(self._seconds_per_token, 1e-12))
        if affordable < LEAST * self._tokens:
            _left_out(self._tokens * self._seconds_per_token, allowed_seconds)
            return
        scoring = self._scoring(max(1, int(affordable)))
        while self._timed(scoring):
            yield None
        yield Found({BITS: scoring.bits_per_byte, PERPLEXITY: scoring.perplexity}, scoring.tokens)

    def _scoring(self, tokens: int) -> Scoring:
        return Scoring(self._model, self._text, tokens, windows_at_once=self._at_once)

    def _timed(self, scoring: Scoring) -> bool:
        began, before = self._clock(), scoring.done
        if not scoring.slice():
            return False
        found = (self._clock() - began) / (scoring.done - before)
        known = self._seconds_per_token
        self._seconds_per_token = found if known is None else 0.7 * known + 0.3 * found
        return True


class Called:
    """Measures a model of somebody's own by a function of theirs, which is one slice, however long it takes.

    The function finds the module in evaluation mode, with no gradients recorded. Modes, gradients and torch's random
    numbers are afterwards what they were before. A turn that would take more time than there is for it is left out.
    """

    def __init__(self, evaluate: Evaluate, task: Task, clock: Callable[[], float] = time.monotonic) -> None:
        self._evaluate, self._task, self._clock = evaluate, task, clock
        self._seconds = 0.0

    def slices(self, allowed_seconds: float) -> Iterator[Found | None]:
        if self._seconds > allowed_seconds:
            _left_out(self._seconds, allowed_seconds)
            return
        began = self._clock()
        with _as_it_was(self._task.module):
            figures = self._evaluate(self._task.module)
        self._seconds = self._clock() - began
        yield Found(checked_figures(figures))


def _left_out(seconds: float, allowed_seconds: float) -> None:
    _logger.info(
        "this turn to measure passes: it would take %.1f s, and by now %.1f s are allowed, %.0f %% of the time",
        seconds,
        max(allowed_seconds, 0.0),
        100 * SHARE,
    )


@contextlib.contextmanager
def _as_it_was(module: nn.Module) -> Iterator[None]:
    """In evaluation mode inside; modes, gradients, what requires them, and random numbers are restored."""
    modes = [(part, part.training) for part in module.modules()]
    held = [(p, p.grad, p.requires_grad) for p in module.parameters()]
    devices = list({p.device for p, _, _ in held if p.device.type == "cuda"})
    try:
        with torch.random.fork_rng(devices), torch.no_grad():
            module.eval()
            for parameter, _, _ in held:
                # Else what the function computes of its own would be added to it.
                parameter.grad = None
            yield
    finally:
        for part, training in modes:
            part.training = training
        for parameter, gradient, requires in held:
            parameter.requires_grad_(requires)
            parameter.grad = gradient


def checked_figures(figures: object) -> dict[str, float]:
    """Return the figures that a function of somebody's own has measured, if peers may publish them.

    Raises:
        ValueError: they are no mapping of at most eight names to finite numbers.
    """
    if not isinstance(figures, Mapping) or not 1 <= len(figures) <= FIGURES_MAX:
        raise ValueError(f"evaluate(model) has to return a dict of 1 to {FIGURES_MAX} figures, by name")
    found = {}
    for name, value in figures.items():
        try:
            found[msgspec.convert(name, FigureName)] = number = float(value)
        except (msgspec.ValidationError, TypeError, ValueError) as error:
            raise ValueError(f"evaluate(model) has returned {name!r}: {value!r}, and not a name: a number") from error
        if not math.isfinite(number):
            raise ValueError(f"evaluate(model) has returned {name!r}: {number}, which is no figure")
    return found


@dataclass(slots=True)
class _Job:
    turn: Turn
    values: list[Tensor]
    """The parameters to measure."""
    slices: Iterator[Found | None]
    seconds: float = 0.0
    not_before: float = -math.inf
    """By the clock: when the next slice may come where nobody is waited for."""


class Measuring:
    """Measures the model whenever it is this peer's turn; for the trainer's thread.

    Args:
        every_rounds: between two turns, anybody's.
        method: None: this peer cannot measure, and its turns pass.
        last_round: of the run; 0: it has none.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        every_rounds: int,
        peer_id: bytes,
        task: Task,
        method: Method | None,
        *,
        last_round: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._every_rounds, self._peer_id, self._method, self._clock = every_rounds, peer_id, method, clock
        self._last_round = last_round
        self._parameters: Sequence[nn.Parameter] = [parameter.tensor for parameter in task.parameters]
        self._began = clock()
        self._job: _Job | None = None
        #: the last turns, oldest first
        self.turns: tuple[Turn, ...] = ()
        #: what this peer has measured last
        self.measured: EvaluationRecord | None = None
        #: since the process began
        self.seconds = 0.0

    @property
    def share(self) -> float:
        """Of this process's time, as far as measuring took it."""
        return self.seconds / max(self._clock() - self._began, 1e-9)

    @property
    def under_way(self) -> bool:
        """Whether there is something left to measure."""
        return self._job is not None

    def reached(self, state: ChainState, *, measures: bool = True) -> None:
        """Say that the parameters are those of `state`, which continues the chain.

        Args:
            measures: False: for the records alone, as the chain is further already.
        """
        turn = turn_at(state, self._every_rounds)
        if turn is None:
            return
        self.turns = (*self.turns, turn)[-TURNS_KEPT:]
        if not measures or turn.peer_id != self._peer_id or self._method is None:
            return
        # After the last round there is nothing else to do.
        over = bool(self._last_round) and state.round >= self._last_round
        if self._job is not None and not over:
            _logger.info("round %d is not measured: round %d still is", state.round, self._job.turn.round)
            return
        allowed_seconds = math.inf if over else SHARE * (self._clock() - self._began) - self.seconds
        values = [parameter.detach().clone() for parameter in self._parameters]
        self._job = _Job(turn, values, self._method.slices(allowed_seconds))

    def back_to(self, round: int) -> None:
        """Say that the chain has left its rounds after this one."""
        self.turns = tuple(turn for turn in self.turns if turn.round <= round)
        if self._job is not None and self._job.turn.round > round:
            self._job = None

    def slice(self, *, waiting: bool) -> bool:
        """Measure a slice of what is under way; False: there is nothing to do now.

        Args:
            waiting: whether the trainer has nothing else to do.
        """
        job, began = self._job, self._clock()
        if job is None or (not waiting and began < job.not_before):
            return False
        found: Found | None = None
        ended = False
        try:
            with self._holding(job.values):
                found = next(job.slices)
        except StopIteration:
            ended = True
        except P2PTrainError as error:
            _logger.warning("cannot measure round %d: %s", job.turn.round, error)
            ended = True
        except Exception as error:
            # It may be a function of somebody's own, and a figure less is no reason to stop training.
            _logger.warning("cannot measure round %d: %r", job.turn.round, error)
            _logger.debug("as follows", exc_info=True)
            ended = True
        now = self._clock()
        job.seconds += now - began
        self.seconds += now - began
        job.not_before = now + PAUSE * (now - began)
        if found is not None:
            self._take(job, found)
        if ended or found is not None:
            self._job = None
        return True

    def _take(self, job: _Job, found: Found) -> None:
        if all(map(math.isfinite, found.figures.values())):
            turn = job.turn
            self.measured = EvaluationRecord(
                round=turn.round,
                state_id=turn.state_id,
                figures=found.figures,
                tokens=found.tokens,
                seconds=job.seconds,
            )
        else:
            _logger.warning("round %d has a loss that is not finite on held-out text", job.turn.round)

    @contextlib.contextmanager
    def _holding(self, values: Sequence[Tensor]) -> Iterator[None]:
        """Have the model compute with these values; what changes them in here changes a copy."""
        replicated = [parameter.data for parameter in self._parameters]
        try:
            for parameter, value in zip(self._parameters, values, strict=True):
                parameter.data = value
            yield
        finally:
            for parameter, data in zip(self._parameters, replicated, strict=True):
                parameter.data = data
