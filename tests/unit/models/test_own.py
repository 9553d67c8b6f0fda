"""Modules of somebody's own: what of them is trained, as what, and which copies of them may take part."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from p2ptrain.config.manifest import FileConfig, ModelConfig, TaskConfig
from p2ptrain.errors import ModelError
from p2ptrain.models.gpt import GPT, kind_of
from p2ptrain.models.own import (
    Beginning,
    FixedEntry,
    Header,
    ParameterEntry,
    beginning_of,
    buffers_of,
    check_beginning,
    check_buffers,
    check_length,
    header_of,
    kinds_of,
    own_task,
    parameters_sha256,
)
from p2ptrain.state.tensors import pack_tensors


class Net(nn.Module):
    """A convolution, a vector, an embedding that the head shares, a matrix that is nobody's weight, a frozen layer."""

    def __init__(self, seed: int = 0, *, width: int = 6, frozen_seed: int = 9) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.words = nn.Embedding(10, width)
        self.conv = nn.Conv1d(width, width, 3)
        self.positions = nn.Parameter(torch.randn(5, width))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10, bias=False)
        self.head.weight = self.words.weight
        torch.manual_seed(frozen_seed)
        self.frozen = nn.Linear(width, width).requires_grad_(False)
        self.register_buffer("scale", torch.randn(()))
        self.register_buffer("scratch", torch.randn(seed + 1), persistent=False)


def names(entries: tuple[ParameterEntry, ...] | tuple[FixedEntry, ...]) -> list[str]:
    return [entry.name for entry in entries]


def bytes_of(beginning: Beginning) -> bytes:
    return b"".join(beginning.parts())


def file_of(data: bytes, path: Path, *, parameters: int) -> TaskConfig:
    """Write a file, and return what a manifest says of it; by the definition, not by the code."""
    path.write_bytes(data)
    hashes = [hashlib.sha256(data[i : i + 2**19]).digest() for i in range(0, len(data), 2**19)]
    joined = b"p2ptrain root 1\0" + len(data).to_bytes(8, "little") + b"".join(hashes)
    values = FileConfig(bytes=max(1, len(data)), root=hashlib.sha256(joined).hexdigest())
    return TaskConfig(parameters=parameters, values=values)


def test_kinds_follow_from_the_types_of_modules() -> None:
    kinds = kinds_of(Net())
    assert kinds["words.weight"] == "embedding", "a head that shares it does not count"
    assert (kinds["conv.weight"], kinds["positions"], kinds["conv.bias"]) == ("matrix", "matrix", "vector")
    plain = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    assert list(kinds_of(plain).values()) == ["matrix", "vector", "head", "vector"]


def test_the_built_in_model_gets_the_kinds_that_it_has_by_name() -> None:
    model = GPT(ModelConfig(layers=2, heads=2, embedding=16, context=8, vocabulary=4096))
    assert kinds_of(model) == {name: kind_of(name, p) for name, p in model.named_parameters()}


def test_a_model_that_says_what_its_head_is_is_believed() -> None:
    class Says(nn.Sequential):
        def get_output_embeddings(self) -> nn.Module:
            return self[0]

    assert list(kinds_of(Says(nn.Linear(4, 4), nn.Linear(4, 2))).values())[::2] == ["head", "matrix"]


def test_patterns_decide_before_types_do() -> None:
    patterns = {"words.*": "matrix", "positions": "embedding", "*": "vector"}
    kinds = kinds_of(Net(), patterns)  # type: ignore[arg-type]
    assert [kinds[n] for n in ("words.weight", "positions", "conv.weight")] == ["matrix", "embedding", "vector"]


@pytest.mark.parametrize(
    ("patterns", "message"),
    [({"wrods.*": "matrix"}, "no parameter is called"), ({"*": "gain"}, "kind 'gain'"), ({"*": "matrix"}, "a vector")],
)
def test_patterns_that_suit_no_parameter_are_refused(patterns: dict[str, str], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        kinds_of(Net(), patterns)  # type: ignore[arg-type]


def test_what_is_trained_is_in_the_modules_order_once_and_without_what_is_frozen() -> None:
    made = beginning_of(Net())
    expected = ["positions", "words.weight", "conv.weight", "conv.bias", "norm.weight", "norm.bias"]
    assert names(made.header.trained) == expected
    assert {*names(made.header.fixed)} == {"frozen.weight", "frozen.bias", "scale"}
    assert made.config().parameters == 30 + 60 + 6 * 6 * 3 + 6 + 6 + 6


def test_a_beginning_is_written_as_the_bytes_that_its_manifest_names(tmp_path: Path) -> None:
    net = Net()
    made, path = beginning_of(net), tmp_path / "beginning"
    config, file = made.write(path)
    expected = pack_tensors(
        msgspec.msgpack.encode(made.header),
        {entry.name: net.get_parameter(entry.name).detach().numpy() for entry in made.header.trained},
    )
    assert path.read_bytes() == expected
    assert config == made.config() == file_of(expected, tmp_path / "again", parameters=config.parameters)
    assert file.read(0) == expected and header_of(path) == made.header


def test_a_compiled_module_is_what_it_compiles() -> None:
    net = Net()
    assert bytes_of(beginning_of(torch.compile(net))) == bytes_of(beginning_of(net))  # type: ignore[arg-type]


def test_a_joiners_copy_takes_the_values_of_the_run_whatever_it_held(tmp_path: Path) -> None:
    first, copy, path = Net(0), Net(1), tmp_path / "beginning"
    config, _ = beginning_of(first).write(path)
    assert parameters_sha256(first) != parameters_sha256(copy)
    held = copy.words.weight
    task = own_task(copy, path, config)
    task.begin()
    assert parameters_sha256(first) == parameters_sha256(copy)
    assert copy.words.weight is held and copy.head.weight is held, "in place"
    with torch.no_grad():
        held.zero_()
    task.begin()
    assert bytes_of(beginning_of(copy)) == path.read_bytes()


def test_kinds_come_with_the_run_and_not_with_the_copy(tmp_path: Path) -> None:
    config, _ = beginning_of(Net(), {"positions": "embedding"}).write(tmp_path / "beginning")
    task = own_task(Net(1), tmp_path / "beginning", config)
    assert {p.name: p.kind for p in task.parameters}["positions"] == "embedding"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda net: setattr(net, "conv", nn.Conv1d(6, 6, 5)), r"conv.weight: \[6, 6, 3\] there, \[6, 6, 5\] here"),
        (lambda net: setattr(net, "norm", nn.Identity()), r"norm.weight: \[6\] there, none here; norm.bias"),
        (lambda net: setattr(net, "more", nn.Linear(1, 1)), r"more.weight: \[1, 1\] here, none there"),
        (lambda net: net.frozen.requires_grad_(), r"frozen.weight: \[6, 6\] here, none there"),
        (lambda net: net.frozen.weight.mul_(2), "holds fixed .* frozen.weight: other values"),
        (lambda net: net.scale.add_(1), "holds fixed .* scale: other values"),
    ],
)
def test_another_model_is_refused_by_the_names_of_what_differs(tmp_path: Path, change: object, message: str) -> None:
    (config, _), other = beginning_of(Net()).write(tmp_path / "beginning"), Net()
    assert callable(change)
    change(other)
    with pytest.raises(ModelError, match=message):
        own_task(other, tmp_path / "beginning", config)


def test_the_same_parameters_in_another_order_are_refused(tmp_path: Path) -> None:
    first = nn.Sequential()
    first.add_module("a", nn.Linear(2, 2, bias=False))
    first.add_module("b", nn.Linear(2, 2, bias=False))
    other = nn.Sequential()
    other.add_module("b", nn.Linear(2, 2, bias=False))
    other.add_module("a", nn.Linear(2, 2, bias=False))
    config, _ = beginning_of(first).write(tmp_path / "beginning")
    with pytest.raises(ModelError, match=r"number 0 is a.weight there, b.weight here"):
        own_task(other, tmp_path / "beginning", config)


def test_many_differences_are_counted(tmp_path: Path) -> None:
    config, _ = beginning_of(nn.Sequential(*(nn.Linear(2, 2) for _ in range(6)))).write(tmp_path / "beginning")
    other = nn.Sequential(*(nn.Linear(3, 3) for _ in range(6)))
    with pytest.raises(ModelError, match="and 8 more"):
        own_task(other, tmp_path / "beginning", config)


def test_running_statistics_are_refused_unless_they_are_held_fixed() -> None:
    for norm in (nn.BatchNorm1d(4), nn.InstanceNorm1d(4, track_running_stats=True)):
        net = nn.Sequential(nn.Linear(4, 4), norm)
        with pytest.raises(ModelError, match=r"1 .* keeps running statistics"):
            beginning_of(net)
        norm.eval()
        assert {*names(beginning_of(net).header.fixed)} == {"1.running_mean", "1.running_var", "1.num_batches_tracked"}
    beginning_of(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, track_running_stats=False)))


def test_a_saved_buffer_that_a_forward_pass_changes_is_refused_by_name() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4)))
    before = buffers_of(net)
    check_buffers(net, before)
    net(torch.ones(2, 4))
    with pytest.raises(ModelError, match=r"1.parametrizations.weight.0._u changes in training"):
        check_buffers(net, before)
    own = Net()
    before = buffers_of(own)
    own.scratch.add_(1)
    check_buffers(own, before)


@pytest.mark.parametrize(
    ("net", "message"),
    [
        (nn.Linear(2, 2).requires_grad_(False), "no parameter that requires a gradient"),
        (nn.Linear(2, 2).bfloat16(), "weight is of torch.bfloat16"),
        (nn.LazyLinear(2), "weight has no shape yet"),
        (nn.Identity(), "no parameter"),
    ],
)
def test_what_cannot_be_trained_is_refused(net: nn.Module, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        beginning_of(net)


# ---- from anyone ----------------------------------------------------------------------------------------------------


@given(st.data())
def test_no_changed_byte_of_a_beginning_goes_unnoticed(tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    path = tmp_path_factory.mktemp("home") / "beginning"
    config, _ = beginning_of(nn.Linear(2, 2)).write(path)
    changed = bytearray(path.read_bytes())
    changed[data.draw(st.integers(0, len(changed) - 1))] ^= data.draw(st.integers(1, 255))
    path.write_bytes(changed)
    with pytest.raises(ModelError, match="hash to"):
        check_beginning(path, config)


@given(st.binary(max_size=200))
def test_a_beginning_that_its_owner_made_up_is_refused_with_the_one_error(
    tmp_path_factory: pytest.TempPathFactory, garbage: bytes
) -> None:
    path = tmp_path_factory.mktemp("home") / "beginning"
    for made in (garbage, pack_tensors(garbage, {}), pack_tensors(garbage, {"a": np.zeros(3, np.float32)})):
        config = file_of(made, path, parameters=3)
        with pytest.raises(ModelError):
            check_beginning(path, config)


@pytest.mark.parametrize(
    "entries",
    [
        (ParameterEntry("a", (3,), "vector"), ParameterEntry("a", (3,), "vector")),
        (ParameterEntry("a", (2**31, 2**31), "matrix"),),
        (ParameterEntry("a", (6,), "matrix"),),
        (ParameterEntry("a", (5,), "vector"),),
        (),
    ],
    ids=["one name twice", "too many entries", "a vector as a matrix", "fewer values", "none"],
)
def test_a_beginning_that_contradicts_its_manifest_is_refused(
    tmp_path: Path, entries: tuple[ParameterEntry, ...]
) -> None:
    made = pack_tensors(msgspec.msgpack.encode(Header(entries, ())), {"a": np.zeros(6, np.float32)})
    config = file_of(made, tmp_path / "beginning", parameters=6)
    with pytest.raises(ModelError):
        check_beginning(tmp_path / "beginning", config)


def test_what_is_longer_than_its_parameters_can_be_is_neither_fetched_nor_hashed(tmp_path: Path) -> None:
    config = TaskConfig(parameters=1, values=FileConfig(bytes=5 * 2**20, root="0" * 64))
    for check in (lambda: check_length(config), lambda: check_beginning(tmp_path / "not there", config)):
        with pytest.raises(ModelError, match="more than its parameters can"):
            check()


@pytest.mark.parametrize("change", [lambda data: data[:-4], lambda data: data + bytes(4)], ids=["short", "long"])
def test_a_beginning_of_another_length_is_refused(tmp_path: Path, change: Callable[[bytes], bytes]) -> None:
    path = tmp_path / "beginning"
    config, _ = beginning_of(nn.Linear(2, 2)).write(path)
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ModelError, match="take"):
        check_beginning(path, config)


def test_the_hash_of_parameters_is_of_their_float32_values_in_order() -> None:
    net = nn.Linear(2, 2)
    with torch.no_grad():
        net.weight.copy_(torch.tensor([[1.0, 2.0], [3.0, math.pi]]))
        net.bias.zero_()
    expected = np.array([1, 2, 3, math.pi, 0, 0], "<f4").tobytes()
    assert parameters_sha256(net) == hashlib.sha256(expected).hexdigest()
