"""Modules of somebody's own: what of them is trained, as what, and which copies of them may take part."""

from __future__ import annotations

import hashlib
import math

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from p2ptrain.config.manifest import ModelConfig, TaskConfig
from p2ptrain.errors import ModelError
from p2ptrain.models.gpt import GPT, kind_of
from p2ptrain.models.own import (
    Header,
    ParameterEntry,
    beginning_of,
    buffers_of,
    check_beginning,
    check_buffers,
    config_of,
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


def names(beginning: bytes) -> list[str]:
    return [entry.name for entry in header_of(beginning).trained]


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
    assert names(made) == ["positions", "words.weight", "conv.weight", "conv.bias", "norm.weight", "norm.bias"]
    assert {entry.name for entry in header_of(made).fixed} == {"frozen.weight", "frozen.bias", "scale"}
    assert config_of(made).parameters == 30 + 60 + 6 * 6 * 3 + 6 + 6 + 6
    assert config_of(made).sha256 == hashlib.sha256(made).hexdigest()


def test_a_compiled_module_is_what_it_compiles() -> None:
    net = Net()
    assert beginning_of(torch.compile(net)) == beginning_of(net)  # type: ignore[arg-type]


def test_a_joiners_copy_takes_the_values_of_the_run_whatever_it_held() -> None:
    first, copy = Net(0), Net(1)
    made = beginning_of(first)
    assert parameters_sha256(first) != parameters_sha256(copy)
    held = copy.words.weight
    task = own_task(copy, lambda: made, config_of(made))
    task.begin()
    assert parameters_sha256(first) == parameters_sha256(copy)
    assert copy.words.weight is held and copy.head.weight is held, "in place"
    with torch.no_grad():
        held.zero_()
    task.begin()
    assert beginning_of(copy) == made


def test_kinds_come_with_the_run_and_not_with_the_copy() -> None:
    made = beginning_of(Net(), {"positions": "embedding"})
    task = own_task(Net(1), lambda: made, config_of(made))
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
def test_another_model_is_refused_by_the_names_of_what_differs(change: object, message: str) -> None:
    made, other = beginning_of(Net()), Net()
    assert callable(change)
    change(other)
    with pytest.raises(ModelError, match=message):
        own_task(other, lambda: made, config_of(made))


def test_the_same_parameters_in_another_order_are_refused() -> None:
    first = nn.Sequential()
    first.add_module("a", nn.Linear(2, 2, bias=False))
    first.add_module("b", nn.Linear(2, 2, bias=False))
    other = nn.Sequential()
    other.add_module("b", nn.Linear(2, 2, bias=False))
    other.add_module("a", nn.Linear(2, 2, bias=False))
    made = beginning_of(first)
    with pytest.raises(ModelError, match=r"number 0 is a.weight there, b.weight here"):
        own_task(other, lambda: made, config_of(made))


def test_many_differences_are_counted() -> None:
    made = beginning_of(nn.Sequential(*(nn.Linear(2, 2) for _ in range(6))))
    other = nn.Sequential(*(nn.Linear(3, 3) for _ in range(6)))
    with pytest.raises(ModelError, match="and 8 more"):
        own_task(other, lambda: made, config_of(made))


def test_running_statistics_are_refused_unless_they_are_held_fixed() -> None:
    for norm in (nn.BatchNorm1d(4), nn.InstanceNorm1d(4, track_running_stats=True)):
        net = nn.Sequential(nn.Linear(4, 4), norm)
        with pytest.raises(ModelError, match=r"1 .* keeps running statistics"):
            beginning_of(net)
        norm.eval()
        fixed = {entry.name for entry in header_of(beginning_of(net)).fixed}
        assert fixed == {"1.running_mean", "1.running_var", "1.num_batches_tracked"}
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
def test_no_changed_byte_of_a_beginning_goes_unnoticed(data: st.DataObject) -> None:
    made = beginning_of(nn.Linear(2, 2))
    changed = bytearray(made)
    changed[data.draw(st.integers(0, len(made) - 1))] ^= data.draw(st.integers(1, 255))
    with pytest.raises(ModelError, match="hash to"):
        check_beginning(bytes(changed), config_of(made))


@given(st.binary(max_size=200))
def test_a_beginning_that_its_owner_made_up_is_refused_with_the_one_error(garbage: bytes) -> None:
    for made in (garbage, pack_tensors(garbage, {}), pack_tensors(garbage, {"a": np.zeros(3, np.float32)})):
        config = TaskConfig(parameters=3, sha256=hashlib.sha256(made).hexdigest())
        with pytest.raises(ModelError):
            check_beginning(made, config)


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
def test_a_beginning_that_contradicts_its_manifest_is_refused(entries: tuple[ParameterEntry, ...]) -> None:
    meta = msgspec.msgpack.encode(Header(entries, ()))
    made = pack_tensors(meta, {"a": np.zeros(6, np.float32)})
    with pytest.raises(ModelError):
        check_beginning(made, TaskConfig(parameters=6, sha256=hashlib.sha256(made).hexdigest()))


def test_what_is_longer_than_its_parameters_can_be_is_not_even_hashed() -> None:
    config = TaskConfig(parameters=1, sha256="0" * 64)
    with pytest.raises(ModelError, match="more than its parameters can"):
        check_beginning(bytes(5 * 2**20), config)


def test_the_hash_of_parameters_is_of_their_float32_values_in_order() -> None:
    net = nn.Linear(2, 2)
    with torch.no_grad():
        net.weight.copy_(torch.tensor([[1.0, 2.0], [3.0, math.pi]]))
        net.bias.zero_()
    expected = np.array([1, 2, 3, math.pi, 0, 0], "<f4").tobytes()
    assert parameters_sha256(net) == hashlib.sha256(expected).hexdigest()
