"""DeMo as an optimizer of torch: what every such optimizer lets one do, and what is refused by its name."""

from __future__ import annotations

import copy
import io
import pickle
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from p2ptrain.optim.demo import DeMo

SHAPES = [(70, 65), (130,), (64, 64)]


def parameters(dtype: torch.dtype = torch.float32, seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]


def named(dtype: torch.dtype = torch.float32) -> list[tuple[str, nn.Parameter]]:
    return list(zip(("wide", "gain", "square"), parameters(dtype), strict=True))


def held(optimizer: DeMo) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def set_gradients(optimizer: DeMo, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in held(optimizer):
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


def steps(optimizer: DeMo, *seeds: int) -> None:
    for seed in seeds:
        set_gradients(optimizer, seed)
        optimizer.step()


def assert_same(one: DeMo, other: DeMo) -> None:
    assert all(torch.equal(a, b) for a, b in zip(held(one), held(other), strict=True))
    assert torch.equal(one.momentum, other.momentum)
    theirs = other.replicated_state()
    assert all(torch.equal(tensor, theirs[key]) for key, tensor in one.replicated_state().items())


# ---- options --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("group", "says"),
    [
        ({"transform": "dtc"}, "no transform 'dtc'; there are dct, none"),
        ({"direction": "sing"}, "no direction 'sing'; there are adam, muon, nesterov, rms, sgd, sign"),
        ({"top_k": 3}, "group 1: there is no option 'top_k'; there are .*topk"),
        ({"betas": (0.9, 0.99)}, "no option 'betas'"),
        ({"lr": -1.0}, "group 1: lr=-1.0 is out of range"),
        ({"lr": float("nan")}, "lr=nan is out of range"),
        ({"lr": "fast"}, "lr='fast' is out of range"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1 is out of range"),
        ({"topk": 0}, "group 1: topk=0 is out of range: it is a whole number from 1 to 4096"),
        ({"topk": 2.5}, "topk=2.5 is out of range"),
        ({"topk": True}, "topk=True is out of range"),
        ({"reply_topk": 4097}, "reply_topk=4097 is out of range: it is None or"),
        ({"reply_topk": 0}, "reply_topk=0 is out of range"),
        ({"learning_rate_scale": -2.0}, "learning_rate_scale=-2.0 is out of range"),
    ],
)
def test_a_group_that_asks_for_what_there_is_not_is_told_so(group: dict[str, Any], says: str) -> None:
    first, *rest = parameters()
    with pytest.raises(ValueError, match=says):
        DeMo([{"params": [first]}, {"params": rest, **group}])


@pytest.mark.parametrize(
    "setting", [{"rms_beta": 1.0}, {"rms_epsilon": -1e-8}, {"direction_momentum": 1.5}, {"beta": float("nan")}]
)
def test_a_setting_out_of_range_is_named(setting: dict[str, Any]) -> None:
    (name,) = setting
    with pytest.raises(ValueError, match=f"{name}=.* is out of range"):
        DeMo(parameters(), **setting)


# ---- parameters -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float64, torch.int32])
def test_types_that_cannot_be_stepped_are_refused_by_name(dtype: torch.dtype) -> None:
    odd = nn.Parameter(torch.zeros(3, 3, dtype=dtype), requires_grad=False)
    with pytest.raises(ValueError, match=rf"parameter 'odd' is {dtype}"):
        DeMo([*named(), ("odd", odd)])


def test_parameters_on_two_devices_are_refused_by_name() -> None:
    far = nn.Parameter(torch.zeros(3, 3, device="meta"))
    with pytest.raises(ValueError, match="'far' is on meta and parameter 'wide' on cpu"):
        DeMo([*named(), ("far", far)])


def test_muon_is_refused_for_a_vector_by_its_name() -> None:
    with pytest.raises(ValueError, match="parameter 'gain' is a vector or a scalar"):
        DeMo(named(), direction="muon")
    with pytest.raises(ValueError, match=r"parameter 1 of group 0, of shape \(130,\) is a vector"):
        DeMo(parameters(), direction="muon")


def test_a_tensor_that_is_there_twice_is_refused() -> None:
    twice = parameters()[0]
    with (
        pytest.warns(UserWarning, match="duplicate"),
        pytest.raises(ValueError, match="'other' is the same tensor as parameter 'one'"),
    ):
        DeMo([("one", twice), ("other", twice)])


def test_groups_without_parameters_are_refused_as_such() -> None:
    with pytest.raises(ValueError, match="got no parameters"):
        DeMo([{"params": []}, {"params": []}])
    with pytest.raises(ValueError, match="without any entries"):
        DeMo([torch.zeros(0, 5, requires_grad=True)])


def test_a_sparse_gradient_is_refused_by_the_parameters_name() -> None:
    optimizer = DeMo(named())
    set_gradients(optimizer, 1)
    held(optimizer)[0].grad = torch.zeros(70, 65).to_sparse()
    before = optimizer.momentum.clone()
    for call in (optimizer.step, optimizer.accumulate):
        with pytest.raises(ValueError, match=r"gradient of parameter 'wide' is torch\.sparse_coo"):
            call()
    assert torch.equal(optimizer.momentum, before)


def test_a_group_added_later_is_refused_with_the_reason() -> None:
    optimizer = DeMo(parameters())
    with pytest.raises(RuntimeError, match="takes no group after it is made: chunks are numbered"):
        optimizer.add_param_group({"params": parameters(seed=1)})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("direction", ["sign", "rms"])
def test_narrow_parameters_follow_a_master_of_float32(dtype: torch.dtype, direction: str) -> None:
    """Steps far below a parameter's own precision add up as they do in float32."""
    narrow = DeMo(parameters(dtype), lr=1e-5, direction=direction, weight_decay=0.01)
    wide = DeMo([nn.Parameter(p.detach().float()) for p in parameters(dtype)], 1e-5, direction=direction)
    wide.param_groups[0]["weight_decay"] = 0.01
    for seed in range(5):
        set_gradients(narrow, seed)
        for ours, theirs in zip(held(narrow), held(wide), strict=True):
            assert ours.grad is not None
            theirs.grad = ours.grad.float()
        narrow.step()
        wide.step()
    assert torch.equal(narrow.momentum, wide.momentum)
    assert all(torch.equal(a, b.to(dtype)) for a, b in zip(held(narrow), held(wide), strict=True))
    assert any(not torch.equal(a.float(), b) for a, b in zip(held(narrow), held(wide), strict=True))


def test_a_narrow_parameter_written_to_from_elsewhere_is_where_it_goes_on() -> None:
    optimizer = DeMo(parameters(torch.bfloat16), lr=1e-3)
    steps(optimizer, 1)
    with torch.no_grad():
        for parameter in held(optimizer):
            parameter.fill_(4.0)
    steps(optimizer, 2)
    assert all(((parameter - 4).abs() < 0.1).all() for parameter in held(optimizer))


# ---- frozen parameters ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("frozen", ["requires_grad", "grad"])
def test_a_frozen_parameter_stays_exactly_as_it_is(exact: bool, frozen: str) -> None:
    optimizer = DeMo(parameters(), lr=0.1, weight_decay=0.5, exact=exact, beta=1.0)
    steps(optimizer, 1)  # so that its momentum would move it
    before = [parameter.detach().clone() for parameter in held(optimizer)]
    set_gradients(optimizer, 2)
    segment = optimizer.layout.segments[0]
    waiting = optimizer.momentum[segment.start : segment.end].clone()
    if frozen == "requires_grad":
        held(optimizer)[0].requires_grad_(False)
    else:
        held(optimizer)[0].grad = None
    optimizer.step()
    assert torch.equal(held(optimizer)[0], before[0])
    assert all(not torch.equal(a, b) for a, b in zip(held(optimizer)[1:], before[1:], strict=True))
    torch.testing.assert_close(optimizer.momentum[segment.start : segment.end], waiting, atol=1e-5, rtol=0)


def test_without_any_gradient_a_step_changes_no_parameter() -> None:
    optimizer = DeMo(parameters(), lr=0.1, weight_decay=0.5)
    before = [parameter.detach().clone() for parameter in held(optimizer)]
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(held(optimizer), before, strict=True))


# ---- state ----------------------------------------------------------------------------------------------------------


def made(dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> DeMo:
    wide, gain, square = parameters(dtype, seed)
    groups = [{"params": [wide, square], "direction": "muon"}, {"params": [gain], "direction": "adam", "topk": 9}]
    return DeMo(groups, **{"lr": 0.01, **changes})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_state_that_went_through_a_file_goes_on_to_the_bit(dtype: torch.dtype) -> None:
    one, file = made(dtype), io.BytesIO()
    steps(one, 1, 2, 3)
    torch.save(one.state_dict(), file)
    other = made(dtype, seed=9)
    with torch.no_grad():
        for ours, theirs in zip(held(other), held(one), strict=True):
            ours.copy_(theirs)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert "of" in other.state_dict()["demo"]
    for optimizer in (one, other):
        steps(optimizer, 4, 5)
    assert_same(one, other)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"transform": "none"}, "transform"),
        ({"topk": 31}, "topk"),
        ({"reply_topk": 50}, "reply_topk"),
        ({"beta": 0.5}, "beta=0.99; here it is 0.5"),
        ({"value_bits": 8}, "value_bits=2; here it is 8"),
        ({"rms_beta": 0.5}, "rms_beta"),
    ],
)
def test_the_state_of_another_layout_is_refused_whole(changes: dict[str, Any], says: str) -> None:
    one, other = made(), made(**changes)
    steps(one, 1)
    steps(other, 2)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match=says):
        other.load_state_dict(one.state_dict())
    assert torch.equal(other.momentum, before["demo"]["momentum"])
    assert other.param_groups[0]["topk"] == before["param_groups"][0]["topk"]


def test_states_of_other_shapes_and_of_other_optimizers_are_refused() -> None:
    plain = torch.optim.SGD(parameters(), lr=0.1, momentum=0.9)
    with pytest.raises(ValueError, match="no state of DeMo"):
        DeMo(parameters()).load_state_dict(plain.state_dict())
    turned = [nn.Parameter(parameter.detach().T) if parameter.dim() > 1 else parameter for parameter in parameters()]
    with pytest.raises(ValueError, match=r"\[65, 70\]"):
        DeMo(parameters()).load_state_dict(DeMo(turned).state_dict())


@pytest.mark.parametrize(
    ("path", "says"),
    [
        (("param_groups",), "the state lacks param_groups"),
        (("param_groups", 1, "topk"), "the state's group 1 lacks topk"),
        (("demo", "momentum"), "the state's demo lacks momentum"),
        (("demo", "decays"), "the state's demo lacks decays"),
        (("demo", "masters"), "the state's demo lacks masters"),
        (("demo", "of", "parameters"), "the state's demo.of lacks parameters"),
        (("demo", "of", "beta"), "the state's demo.of lacks beta"),
        (("demo", "replicated", "2.second"), "the state's demo.replicated lacks 2.second"),
    ],
)
def test_what_a_state_lacks_is_named_and_nothing_of_it_is_loaded(path: tuple[Any, ...], says: str) -> None:
    one, other = made(), made()
    steps(one, 1)
    steps(other, 2)
    state, before = copy.deepcopy(one.state_dict()), copy.deepcopy(other)
    inside: Any = state
    for key in path[:-1]:
        inside = inside[key]
    del inside[path[-1]]
    with pytest.raises(ValueError, match=f"^{re.escape(says)}$"):
        other.load_state_dict(state)
    assert_same(other, before)


@pytest.mark.parametrize(
    ("path", "bad", "says"),
    [
        (("of",), None, "this is no state of DeMo"),
        (("momentum",), None, "the state's momentum is no tensor"),
        (("decays",), "3", "the state's demo has decays='3', which is no integer"),
        (("masters",), None, "the state's demo has masters=None, which is no dictionary"),
        (("masters", "0"), torch.ones(1), "the state's masters 0 is [1], not [70, 65]"),
        (("replicated", "2.second"), 7, "the state's replicated 2.second is no tensor"),
    ],
)
def test_a_malformed_state_is_refused_whole(path: tuple[str, ...], bad: Any, says: str) -> None:
    one, other = made(torch.bfloat16), made(torch.bfloat16)
    steps(one, 1)
    steps(other, 2)
    state, before = copy.deepcopy(one.state_dict()), copy.deepcopy(other)
    inside: Any = state["demo"]
    for key in path[:-1]:
        inside = inside[key]
    inside[path[-1]] = bad
    with pytest.raises(ValueError, match=f"^{re.escape(says)}$"):
        other.load_state_dict(state)
    assert_same(other, before)


def test_a_state_that_was_cast_is_cast_back() -> None:
    one, other = made(), made()
    steps(one, 1)
    state = copy.deepcopy(one.state_dict())
    state["demo"]["replicated"] = {key: tensor.double() for key, tensor in state["demo"]["replicated"].items()}
    other.load_state_dict(state)
    assert all(tensor.dtype == torch.float32 for tensor in other.replicated_state().values())


def _deep(of: Any) -> Any:
    return copy.deepcopy(of)


def _pickled(of: Any) -> Any:
    return pickle.loads(pickle.dumps(of))


@pytest.mark.parametrize("copied", [_deep, _pickled])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_copy_goes_on_alike_and_apart(copied: Callable[[Any], Any], dtype: torch.dtype) -> None:
    one = made(dtype)
    torch.optim.lr_scheduler.ExponentialLR(one, 0.5)  # which wraps `step`
    steps(one, 1, 2)
    other = copied(one)
    assert_same(one, other)
    steps(one, 3)
    assert not torch.equal(held(one)[0], held(other)[0])
    steps(other, 3)
    assert_same(one, other)


def test_a_copy_made_with_its_model_steps_the_copied_model() -> None:
    model = nn.Linear(70, 65)
    optimizer = DeMo(model.parameters())
    copied, of_copy = copy.deepcopy((model, optimizer))
    before = model.weight.detach().clone()
    steps(of_copy, 1)
    assert torch.equal(model.weight, before)
    assert not torch.equal(copied.weight, before)


# ---- training loops -------------------------------------------------------------------------------------------------


def test_a_rate_may_be_a_tensor() -> None:
    one, other = (DeMo(parameters(), lr, weight_decay=0.1) for lr in (torch.tensor(0.25), 0.25))
    for optimizer in (one, other):
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1))
        for seed in range(3):
            steps(optimizer, seed)
            scheduler.step()
    assert isinstance(one.param_groups[0]["lr"], Tensor)
    assert_same(one, other)
    refused = torch.tensor(-0.25)
    with pytest.raises(ValueError, match=r"lr=.* is out of range"):
        DeMo(parameters(), refused)


def test_a_compiled_model_under_one_cycle_with_hooks_and_a_closure_learns() -> None:
    model = torch.compile(nn.Sequential(nn.Linear(70, 65), nn.ReLU(), nn.Linear(65, 3)), backend="eager")
    optimizer = DeMo(model.named_parameters(), lr=0.02, topk=200)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.02, total_steps=30, cycle_momentum=False)
    generator, calls = torch.Generator().manual_seed(0), []
    inputs, targets = torch.randn(50, 70, generator=generator), torch.randn(50, 3, generator=generator)
    optimizer.register_step_post_hook(lambda *_: calls.append(1))

    def closure() -> float:
        optimizer.zero_grad()
        loss = (model(inputs) - targets).square().mean()
        loss.backward()
        return float(loss.detach())

    losses = []
    for _ in range(30):
        losses.append(optimizer.step(closure))
        scheduler.step()
    assert len(calls) == 30
    assert losses[-1] < 0.5 * losses[0]
    assert optimizer.state_dict()["param_groups"][0]["param_names"][0].endswith("0.weight")
