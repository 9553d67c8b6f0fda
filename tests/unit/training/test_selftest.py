"""A machine that computes other bits does not train, and one that trains has nothing left to compile."""

from __future__ import annotations

import hashlib
import logging
import os
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from torch import Tensor

from p2ptrain.compression import dct
from p2ptrain.compression.layout import CHUNK_SIZE, Form
from p2ptrain.errors import DivergenceError
from p2ptrain.optim import directions
from p2ptrain.optim.demo import DeMo
from p2ptrain.optim.stepping import Stepper
from p2ptrain.training import selftest
from p2ptrain.training.selftest import check, make_ready, self_test

CPU = torch.device("cpu")


def test_this_machine_computes_the_bits_the_run_requires() -> None:
    check(CPU)


def test_the_result_is_a_sha256_and_the_same_again() -> None:
    assert len(bytes.fromhex(self_test(CPU))) == hashlib.sha256().digest_size
    assert self_test(CPU) == self_test(CPU)


def test_the_number_of_threads_does_not_matter() -> None:
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            check(CPU)
    finally:
        torch.set_num_threads(threads)


def test_vector_instructions_do_not_matter() -> None:
    program = "import torch; from p2ptrain.training.selftest import check; check(torch.device('cpu'))"
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": "default"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


def by_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where nothing is made one pass: torch's operations alone."""

    def entries(form: Form, place: Tensor, value: Tensor, chunks: Tensor, scratch: Tensor) -> tuple[Tensor, Tensor]:
        chunks.zero_().view(-1)[place] = value
        return dct.decode_exact_form(form, chunks, scratch)

    monkeypatch.setattr(Stepper, "_signs_at_once", lambda self, batch: False)
    monkeypatch.setattr(directions.Rms, "step_entries", directions.Rms.step_entries_by_operations)
    monkeypatch.setattr(directions.Muon, "step_chunks", directions.Muon.step_by_operations)
    monkeypatch.setattr(dct, "decode_exact_entries", entries)


def test_torchs_operations_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    by_operations(monkeypatch)
    check(CPU)


def test_random_state_does_not_matter() -> None:
    torch.manual_seed(1)
    check(CPU)


@pytest.mark.parametrize("entry", [(0, 0), (1, 40), (63, 63)])
def test_an_altered_basis_entry_is_noticed(entry: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    altered = dct.integer_basis(CPU).clone()
    altered[entry] += 1
    monkeypatch.setattr(dct, "integer_basis", lambda device: altered)
    with pytest.raises(DivergenceError, match="does not compute the bits") as caught:
        check(CPU)
    assert "--device cpu" in caught.value.hint
    assert torch.__version__ in caught.value.hint


def test_flushing_subnormals_is_noticed() -> None:
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush subnormals")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # other threads flush nothing
    try:
        with pytest.raises(DivergenceError):
            check(CPU)
    finally:
        torch.set_flush_denormal(False)
        torch.set_num_threads(threads)


def test_no_zero_that_is_hashed_has_a_sign(monkeypatch: pytest.MonkeyPatch) -> None:
    root, seen = selftest._root, []

    def look(model: torch.nn.Module, optimizer: DeMo) -> bytes:
        for tensor in (*model.parameters(), *optimizer.replicated_state().values()):
            assert tensor.isfinite().all()
            assert not (tensor.signbit() & (tensor == 0)).any()
            seen.append(tensor)
        return root(model, optimizer)

    monkeypatch.setattr(selftest, "_root", look)
    check(CPU)
    assert seen


def test_replies_hold_the_largest_values_few_and_none_and_parts_are_skipped() -> None:
    optimizer = selftest._Toy().optimizer()
    layout, codec = optimizer.layout, optimizer.codec
    assert set(directions.DIRECTIONS) == {segment.treatment.direction for segment in layout.segments}
    assert all(len(chunks) for chunks in (layout.matrix_chunks, layout.row_chunks, layout.plain_chunks))
    skipped = 0
    for step in range(selftest._STEPS):
        for start, end, data in selftest._replies(step, codec):
            skipped += data is None
            if data is not None:
                members = selftest._MEMBERS + step
                content = selftest.wire.decode_reply(data, codec, start, end, members)
                counts = np.bincount(content.coefficients.chunk - start, minlength=end - start)
                assert counts.max() == CHUNK_SIZE
                assert counts.min() < 5
                assert {-128, 128} <= set(content.byte.tolist())
    assert skipped == selftest._STEPS - 1


def test_it_is_said_where_compiling_takes_long(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    said = threading.Event()

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.set()

    monkeypatch.setattr(selftest, "_SAY_AFTER_SECONDS", 0.01)
    monkeypatch.setattr(selftest, "_take_part", lambda optimizer: said.wait(60))
    selftest._logger.addHandler(listener := Listener())
    try:
        with caplog.at_level(logging.INFO, "p2ptrain.training.selftest"):
            make_ready(CPU)
    finally:
        selftest._logger.removeHandler(listener)
    assert "compiling the codec, once on a machine" in caplog.messages


# In a process of its own: in this one other tests have compiled what they use.
PROGRAM = """
from typing import get_args

import msgspec
import numpy as np
import torch

from p2ptrain.chain import Part
from p2ptrain.native.compiled import ALL
from p2ptrain.config import strategies
from p2ptrain.config.manifest import Manifest, Strategy
from p2ptrain.simulation.group import Group
from p2ptrain.training.selftest import make_ready

def compiled():
    return {one.py_func.__qualname__: list(one.signatures) for one in ALL}

make_ready(torch.device("cpu"))
before = compiled()
for strategy in get_args(Strategy):
    table = {
        "name": "a",
        "nonce": "07" * 16,
        "model": {"layers": 1, "heads": 1, "embedding": 64, "context": 8},
        "optimizer": {"strategy": strategy, "inner_batch": 2},
        "round": {"pace": "fixed", "sequences_per_peer": 2, "micro_batch": 2},
    }
    group = Group(msgspec.convert(strategies.completed(table), Manifest), lambda peer: np.arange(500, dtype=np.uint16))
    for members in ([b"one"], [b"one", b"another", b"a third"]):
        group.play(members, group.equal_parts(len(members)))
after = compiled()
assert after == before, {name: (after[name], before[name]) for name in after if after[name] != before[name]}
"""


def test_no_strategy_has_anything_left_to_compile() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
