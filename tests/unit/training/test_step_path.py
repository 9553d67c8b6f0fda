"""The self-test notices whatever of a CPU peer's step is wrong in the last bit.

What lies on the path of a step is recorded while replicas of every strategy begin, apply sealed rounds and make a
snapshot. Each function there is replaced by one that is wrong in one entry's last bit, or is listed as one that makes
no numbers; a new one fails the test until it is in one of the tables. What a compiled function calls is compiled into
it: its bits are seen only in what the caller gives, which is replaced.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType, FrameType, ModuleType
from typing import Any, get_args

import msgspec
import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from lone import RUN_ID, gradient, identity_of, replica, seal

from p2ptrain import chain
from p2ptrain.chain.evidence import attest
from p2ptrain.compression import decoded
from p2ptrain.compression.bits import WireError
from p2ptrain.compression.reduce import reduce_part
from p2ptrain.config import strategies
from p2ptrain.config.manifest import Manifest, Strategy
from p2ptrain.native.compiled import ALL
from p2ptrain.optim.directions import DIRECTIONS
from p2ptrain.state.snapshot import piece_hashes, root_of
from p2ptrain.training import selftest

Change = Callable[[tuple[Any, ...], Any], Any]
"""What a call gives in place of its result, from the arguments and the result."""
ROOMS = ("compression", "models.init", "native", "optim", "state.tensors", "state.snapshot", "training.replica")
ONLY_REFUSES = ("optim.groups",)
"""Modules that check what an optimizer is given, and make no numbers."""


def nudged(of: Any) -> Any:
    """`of`, wrong in the last bit of its first entry that is not zero; in place where it can be."""
    if isinstance(of, torch.Tensor):
        if of.dtype == torch.float32:
            entries = of.detach().reshape(-1) if of.is_contiguous() else of.detach()
            some = tuple(torch.nonzero(entries)[:1].T)
            entries[some] = torch.nextafter(entries[some], torch.tensor(torch.inf))
        else:
            of = of.clone()
            of.reshape(-1)[:1] += 1
        return of
    if isinstance(of, np.ndarray):
        made = of if of.flags.writeable else of.copy()
        some = tuple(np.argwhere(made)[:1].T) if made.any() else (slice(0, 1),) * made.ndim
        if made.dtype == np.bool_:
            made[some] = ~made[some]
        elif made.dtype.kind == "f":
            made[some] = np.nextafter(made[some], made.dtype.type(np.inf))
        else:
            made[some] ^= made.dtype.type(1)
        return made
    if isinstance(of, float):
        return float(np.nextafter(np.float32(of), np.float32(np.inf))) if of != np.float64(0) else of
    if isinstance(of, int):
        return of ^ 1
    if isinstance(of, bytes):
        return of[:-1] + bytes([of[-1] ^ 1])
    if isinstance(of, list):
        return [nudged(of[0]), *of[1:]]
    raise TypeError(type(of))


def result(arguments: tuple[Any, ...], of: Any) -> Any:
    return nudged(of)


def doubles(arguments: tuple[Any, ...], of: float) -> float:
    return float(np.nextafter(of, np.inf))


def item(number: int) -> Change:
    """Of a tuple."""

    def change(arguments: tuple[Any, ...], of: tuple[Any, ...]) -> tuple[Any, ...]:
        return (*of[:number], nudged(of[number]), *of[number + 1 :])

    return change


def argument(number: int) -> Change:
    """One that is written to."""

    def change(arguments: tuple[Any, ...], of: Any) -> Any:
        nudged(arguments[number])
        return of

    return change


def parameters(arguments: tuple[Any, ...], of: Any) -> Any:
    """Of an optimizer or its stepper, whose method it is."""
    with torch.no_grad():
        nudged(arguments[0]._params[0])
    return of


def targets(arguments: tuple[Any, ...], of: Any) -> Any:
    """Of a batch that was stepped."""
    batch = next(a for a in arguments if hasattr(a, "pieces"))
    nudged(arguments[0]._targets[batch.pieces[0].number])
    return of


def target(arguments: tuple[Any, ...], of: Any) -> Any:
    """Of a piece that decayed."""
    nudged(arguments[0]._targets[arguments[1].number])
    return of


def first_rate(arguments: tuple[Any, ...], of: Any) -> Any:
    return [of[0]._replace(step=nudged(of[0].step)), *of[1:]]


def first_of(of: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: nudged(tensor.clone()) if number == 0 else tensor for number, (name, tensor) in enumerate(of.items())}


def content_of(arguments: tuple[Any, ...], of: Any) -> Any:
    nudged(of.byte)
    return of


def moved(arguments: tuple[Any, ...], of: Any) -> Any:
    """A view, one entry further or with its first row in another order, is another place."""
    if of is None:
        return None
    return tuple(view.flip(0) for view in of) if isinstance(of, tuple) else of.flip(0)


# ---- what lies on the path ------------------------------------------------------------------------------------------


OTHERS: dict[str, object] = {
    "matrix": {"direction": "sign"},
    "head": {"transform": "none", "direction": "sign"},
    "embedding": {"transform": "dct", "direction": "rms"},
    "vector": {"transform": "dct", "direction": "adam"},
}
"""What no strategy suggests, but a manifest may say."""


def modules() -> list[ModuleType]:
    return [module for name, module in sorted(sys.modules.items()) if name.startswith("p2ptrain.")]


def on_path(code: CodeType) -> bool:
    within = code.co_filename.rpartition("/p2ptrain/")[2].removesuffix(".py").replace("/", ".")
    if within.endswith(".kept"):
        return False  # loads what is called, at its first call in a process
    return within not in ONLY_REFUSES and any(f"{within}.".startswith(f"{room}.") for room in ROOMS)


def begin_and_step(optimizer: dict[str, object]) -> Callable[[], None]:
    """A replica's beginning, two steps and a snapshot, from what was prepared before."""
    table: dict[str, object] = {
        "name": "a",
        "nonce": "07" * 16,
        "model": {"layers": 1, "heads": 1, "embedding": 64, "context": 8},
        "optimizer": {"inner_batch": 2, "warmup_rounds": 1, **optimizer},
    }
    manifest = msgspec.convert(strategies.completed(table), Manifest)
    one, ada = replica(manifest), identity_of("ada")
    chunks, sealed, states = one.layout.chunks, [], [one.chain]
    sealed.append(seal(states[0], ada, chunks, (), solo=True))
    states.append(chain.extend(states[0], sealed[0].id, sealed[0].seal, chunks))
    for number in range(2):
        gradient(one, number)
        (payload,) = one.optimizer.payloads(one.optimizer.select(), [(0, chunks)])
        body, shape = reduce_part([(0, 4, payload)], one.codec, 0, chunks, 1), chain.shape_of(states[-1], chunks)
        reply = attest(ada.sign, RUN_ID, chain.Key(shape.round, shape.base), 0, shape.group, body, ())
        sealed.append(seal(states[-1], ada, chunks, (reply,)))
        states.append(chain.extend(states[-1], sealed[-1].id, sealed[-1].seal, chunks))

    def run() -> None:
        decoded._kept.clear()
        other = replica(manifest)
        for of, before, after in zip(sealed, states, states[1:], strict=False):
            other.apply(of, chain.shape_of(before, chunks), after)
        data = other.snapshot()
        root_of(len(data), piece_hashes(data))
        other.parameters_sha256()

    return run


@pytest.fixture(scope="module")
def path() -> set[str]:
    """Qualified names of this package's functions that a CPU peer's step calls from Python."""
    runs = [begin_and_step(settings) for settings in (*({"strategy": of} for of in get_args(Strategy)), OTHERS)]
    found: set[str] = set()
    for run in runs:
        run()  # nothing compiles what it calls while that is replaced
    for module in modules():
        for value in list(vars(module).values()):
            if hasattr(value, "cache_clear") and on_path(getattr(value, "__wrapped__", value).__code__):
                value.cache_clear()

    def profile(frame: FrameType, event: str, argument: Any) -> None:
        if event == "call" and on_path(frame.f_code):
            found.add(frame.f_code.co_qualname)

    patch = pytest.MonkeyPatch()
    for made in ALL:

        def called(*arguments: Any, made: Any = made) -> Any:
            found.add(made.py_func.__qualname__)
            return made(*arguments)

        replace(patch, made, called)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    sys.setprofile(profile)
    try:
        for run in runs:
            run()
    finally:
        sys.setprofile(None)
        torch.set_num_threads(threads)
        patch.undo()
    # What is within a function is replaced with it.
    return {name for name in found if "<" not in name and name != "path.called"}


def replace(patch: pytest.MonkeyPatch, function: Any, by: Any) -> int:
    """By whatever name a module knows it."""
    places = [(module, name) for module in modules() for name, value in vars(module).items() if value is function]
    for module, name in places:
        patch.setattr(module, name, by)
    return len(places)


# ---- the tables -----------------------------------------------------------------------------------------------------

WRONG: dict[str, Change] = {
    # Beginning and rates.
    "_splitmix64": result,
    "unit_normal_integers": result,
    "fill_normal": lambda arguments, of: nudged(arguments[0].data),
    "initialise": lambda arguments, of: nudged(next(arguments[0].parameters()).data),
    "learning_rate": doubles,
    "_cosine": doubles,
    # Replies.
    "scale_table": result,
    "read_flags": argument(3),
    "read_symbols": argument(3),
    "_read": argument(4),
    "BitReader.flags": result,
    "BitReader.symbols": result,
    "read_indices": result,
    "read_scales": result,
    "unpack": lambda arguments, of: of ^ {0},
    "reply_members": lambda arguments, of: of ^ {0},
    "reply_content": content_of,
    "decode_reply": content_of,
    # From replies to what directions get.
    "DeMo.apply": parameters,
    "DeMo._rates": first_rate,
    "Stepper.apply": parameters,
    "Stepper._step": parameters,
    "Stepper._target": result,
    "Stepper._step_batch": targets,
    "Stepper._step_entries": targets,
    "Stepper._subtract_signs": targets,
    "Stepper._decay": target,
    "_entries": argument(5),
    "_subtract_at": argument(3),
    "integer_basis": result,
    "decode_exact_entries": item(0),
    "decode_exact_form": item(0),
    "_decode_exact": item(0),
    "subtract_signs": argument(2),
    "_rows": argument(3),
    "_squares": argument(3),
    "_signs": argument(3),
    # Directions.
    "Sign.step_chunks": result,
    "Sgd.step_chunks": result,
    "Nesterov.step_chunks": result,
    "Rms.step_chunks": result,
    "Rms.step_entries": result,
    "Adam.step_chunks": result,
    "Muon.step_chunks": result,
    "_Moment.piece": item(0),
    "_Moment.decay": item(0),
    "_Moment.corrected_by": result,
    "_alive": result,
    "_rms": argument(7),
    "_muon": argument(0),
    "correctly_rounded_root": result,
    # Where entries lie.
    "Piece.views": moved,
    "Piece.entries": moved,
    "Piece.blocks": moved,
    "Piece.as_blocks": moved,
    "Piece.flat": lambda arguments, of: (of[0].flip(0), of[1]),
    "Piece.first": result,
    "Piece._rectangle": lambda arguments, of: (of[0], of[1], of[3], of[2]),
    "Segment.bands": lambda arguments, of: of + 1,
    "Segment.wide": lambda arguments, of: of + 1,
    "Segment.dealt": lambda arguments, of: not of,
    "Segment.form": lambda arguments, of: {"both": "none", "none": "rows", "rows": "none"}[of],
    # As bytes.
    "DeMo.replicated_state": lambda arguments, of: first_of(of),
    "Direction.state": lambda arguments, of: first_of(of),
    "pack_tensors": result,
    "pack_head": result,
    "_layout_hash": result,
    "piece_hashes": result,
    "root_of": result,
}
"""By qualified name, what is one that is wrong in the last bit."""

_HANDS_ON = "hands on what others compute"
_SIZE = "a bound on lengths: bytes that are longer are refused, others are read alike"
_ROOM = "makes objects and room, whose values those who use them write"
NO_NUMBERS: dict[str, str] = {
    "BitReader.__init__": _ROOM,
    "BitReader.advance": "takes over where a compiled function came to",
    "BitReader.close": "only refuses",
    "get": "from Python only for `BitReader.number`; elsewhere compiled into what calls it",
    "BitReader.number": "here reads the padding alone, of which `close` asks whether it is zero",
    "reply_max_bytes": _SIZE,
    "symbols_max_bits": _SIZE,
    "indices_max_bits": _SIZE,
    "reply": "keeps what `decode_reply` gave",
    "_arrays": "for `reply`: names the arrays",
    "_bytes": "for `reply`: how much it keeps",
    "Codec.__hash__": "for `reply`: what it looks up by",
    "Codec._hash": "for `reply`: what it looks up by",
    "_shared": "for `reply`: forbids writing",
    "ChunkLayout.__init__": _ROOM,
    "ChunkLayout._of_form": "for tests and tools; no step asks for it",
    "ChunkLayout._per_chunk": "settings, chunk by chunk",
    "ChunkLayout.batches": "which chunks are taken together; their bits do not depend on it",
    "_rectangles": "which chunks are taken together; their bits do not depend on it",
    "Segment.is_vector": "a question about a shape, which `Segment.form` and `Segment.dealt` answer with",
    "DeMo.__init__": _ROOM,
    "DeMo.add_param_group": "takes settings over",
    "Gatherer.__init__": _ROOM,
    "Stepper.__init__": _ROOM,
    "Workers.__init__": _ROOM,
    "Workers.for_each": _HANDS_ON,
    "Workers.scratch": _ROOM,
    "Workers.host_entries": _ROOM,
    "Stepper._signs_at_once": "chooses between two ways to the same bits",
    "Direction.__init__": _ROOM,
    "Muon.__init__": _ROOM,
    "Direction.begin": _HANDS_ON,
    "_Moment.__init__": _ROOM,
    "_Moment.begin": "swaps two tensors",
    "to_device": "copies",
    "strides_of": "where a parameter lies; what is written there goes through `_signs` and `_subtract_at`",
    "entries_of": "a view of memory as it lies; what is written there goes through `_signs` and `_subtract_at`",
    "for_each": _HANDS_ON,
    "usable": "how many threads",
    "optimizer_of": "the manifest's settings",
    "Replica.__init__": _ROOM,
    "Replica.beginning": "the chain before its first seal",
    "Replica.apply": _HANDS_ON,
    "Replica._keep_before": "copies, for `Replica.undo`",
    "_on_cpu": "a view",
    "Replica.rate_at": _HANDS_ON,
    "Replica.codec": _HANDS_ON,
    "Replica.arrays": "views",
    "Replica._replicated": "names",
    "Replica.snapshot": _HANDS_ON,
    "Replica.parameters_sha256": "for display and tests: no peer is told",
}
"""By qualified name, why one makes no number that could be wrong in the last bit."""


def test_all_of_the_path_is_in_one_table(path: set[str]) -> None:
    assert not WRONG.keys() & NO_NUMBERS.keys()
    assert sorted(path - WRONG.keys() - NO_NUMBERS.keys()) == [], "new on the path: one of the tables has to name it"
    assert sorted((WRONG.keys() | NO_NUMBERS.keys()) - path) == [], "not on the path any more"


def test_every_direction_is_stepped_by_and_made_wrong() -> None:
    settings: list[Any] = [strategies.completed({"optimizer": {"strategy": of}}) for of in get_args(Strategy)]
    kinds = [kind for of in (*settings, {"optimizer": OTHERS}) for kind in of["optimizer"].values()]
    stepped_by = {kind["direction"] for kind in kinds if isinstance(kind, dict)}
    assert set(DIRECTIONS) - stepped_by == set(), "OTHERS has to name these directions"
    steps = {of.step_chunks.__qualname__ for of in DIRECTIONS.values()}
    assert steps - WRONG.keys() == set(), "WRONG has to name these functions"


def found_by(name: str) -> Iterator[tuple[Any, str, Any]]:
    """Where to set, and what is there now: in modules and, for methods, classes."""
    owner, _, method = name.rpartition(".")
    for module in modules():
        for key, value in vars(module).items():
            if method and not owner and key == name and named(value, name):
                yield module, key, value
            elif owner and key == owner and isinstance(value, type) and value.__module__ == module.__name__:
                yield value, method, vars(value)[method]


def named(value: Any, name: str) -> bool:
    of = getattr(value, "py_func", getattr(value, "__wrapped__", value))
    return callable(value) and getattr(of, "__qualname__", "") == name and on_path(of.__code__)


def broken(function: Any, change: Change) -> Any:
    """Also of a property; what is kept is not kept, so that what is changed in place is not changed twice."""
    if isinstance(function, property):
        return property(broken(function.fget, change))
    of = getattr(function, "__wrapped__", function)

    @functools.wraps(getattr(of, "py_func", of))
    def wrong(*arguments: Any, **named: Any) -> Any:
        return change((*arguments, *named.values()), of(*arguments, **named))

    return wrong


@pytest.mark.parametrize("name", WRONG)
def test_the_self_test_notices_a_wrong_last_bit(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    places = list(found_by(name))
    assert places, name
    for owner, key, value in places:
        if owner.__name__ != "p2ptrain.compression.kernels.cpu":
            monkeypatch.setattr(owner, key, broken(value, WRONG[name]))
    try:
        noticed = selftest.self_test(torch.device("cpu")) != selftest.EXPECTED
    except (WireError, IndexError, RuntimeError):  # no peer gets past these either
        noticed = True
    assert noticed
