"""Optimise by DeMo: decoupled momentum, whose largest DCT coefficients are all that peers exchange.

Peng et al., arXiv 2411.19870. The momentum lives in the DCT domain, [chunks, 64 * 64] for all parameters at once: the
transform is linear and orthonormal, so taking out what is sent means subtracting entries, and a step needs two
transforms, not three (the gradient in, the reply out).

In a swarm a round is `accumulate` (once or more), `select`, exchange, `apply`, `settle`: what they do is in
`gathering.py`, `stepping.py` and `settling.py`. Alone, `step()` does all of it with a group of one. With
`value_bits=32, exact=False, reply_topk=None` a lone step is the paper's rule; the learning rate multiplies the step,
not the gradient, which is the same under a constant rate, because the sign drops scale.

As an optimizer of torch it keeps torch's conventions: closures, hooks, schedulers, named parameters, copies, and a
state that goes through `torch.save`. Two things are its own.

- A frozen parameter, one that does not require a gradient, stays exactly as it is: no step, no decay. It adds nothing
  to its momentum and sends nothing of it: what the momentum holds decays and waits. A lone step leaves a parameter
  without a gradient alone, too; in a swarm it follows what the others found. As all replicas are to be alike, the peers
  of a swarm freeze the same parameters, from the same round on. Else their replicas differ, and where most members send
  zeros for a part, the norms of the others are clipped to nothing.
- Groups are those that the optimizer is made with: chunks are numbered through all parameters, and every peer, every
  contribution under way and every saved state counts on these numbers.

Cost: one momentum plus a few batches of chunks beyond the gradient. Whatever is as large as the model (gradient,
momentum, parameters) is passed through once a phase, in batches of chunks that a cache holds from the gradient to the
momentum, and from the reply to the parameters; threads take whole batches (`threads.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor

from p2ptrain.compression import wire
from p2ptrain.compression.codec import Codec
from p2ptrain.compression.layout import CHUNK_SIZE, ChunkLayout, ParameterSpec, Treatment
from p2ptrain.compression.reduce import reply_to_one
from p2ptrain.compression.wire import Coefficients, ReplyContent
from p2ptrain.optim import groups, settling, threads
from p2ptrain.optim.directions import DIRECTIONS, MOMENTUM
from p2ptrain.optim.gathering import Gatherer, gradient_of
from p2ptrain.optim.settling import PartReply, Pending, Settled
from p2ptrain.optim.stepping import Rate, Stepper
from p2ptrain.optim.threads import Workers

_COPIED = frozenset(
    {
        "_settings",
        "beta",
        "_params",
        "_group_of",
        "_names",
        "layout",
        "codec",
        "momentum",
        "_gatherer",
        "_stepper",
        "_decays",
    }
)
"""Attributes that copies of an optimizer take along, beside torch's."""


class DeMo(torch.optim.Optimizer):
    """See the module docstring.

    Args:
        params: parameters of float32, bfloat16 or float16 (of the last two a float32 master is what is stepped), pairs
            of name and parameter, or groups of either. A group may override `lr`, `weight_decay`, `transform`,
            `direction`, `topk` and `reply_topk`, and set a `learning_rate_scale` (default 1).
        lr: size of a step of direction `sign`; a number, or a tensor of one.
        beta: momentum decay a round. One value for all groups: the momentum is one tensor.
        weight_decay: decoupled, times lr.
        transform: "dct" or "none".
        direction: see `directions.DIRECTIONS`.
        topk: coefficients sent per chunk of 4096.
        reply_topk: coefficients kept per chunk of a reply; None: all. A lone step that is not exact keeps all.
        value_bits: 1, 2, 8, or 32 for unquantised values.
        exact: integer decode (the same bits on every device), else float.

    Raises:
        ValueError: a parameter, an option or a setting that there is not, or that is out of range, by its name.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        *,
        beta: float = 0.99,
        weight_decay: float = 0.0,
        transform: str = "dct",
        direction: str = "sign",
        topk: int = 32,
        reply_topk: int | None = None,
        value_bits: int = 2,
        exact: bool = True,
        rms_beta: float = 0.95,
        rms_epsilon: float = 1e-8,
        direction_momentum: float = MOMENTUM,
    ) -> None:
        self._settings: dict[str, Any] = {
            "beta": beta,
            "value_bits": value_bits,
            "exact": exact,
            "rms_beta": rms_beta,
            "rms_epsilon": rms_epsilon,
            "direction_momentum": direction_momentum,
        }
        groups.check_settings(self._settings)
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "transform": transform,
            "direction": direction,
            "topk": topk,
            "reply_topk": reply_topk,
            "learning_rate_scale": 1.0,
        }
        super().__init__(params, defaults)
        self.beta = beta
        self._params: list[Tensor] = [parameter for group in self.param_groups for parameter in group["params"]]
        #: by parameter: the number of its group; the groups themselves are replaced by `load_state_dict`
        self._group_of = [number for number, group in enumerate(self.param_groups) for _ in group["params"]]
        #: what each parameter is called in errors
        self._names = groups.names_of(self.param_groups)
        named = [self.param_groups[number]["direction"] for number in self._group_of]
        groups.check_parameters(self._names, self._params, named)
        treatments = {
            f"group{number}": Treatment(
                transform=group["transform"],
                direction=group["direction"],
                learning_rate_scale=float(group["learning_rate_scale"]),
                topk=int(group["topk"]),
                reply_topk=int(group["reply_topk"] or CHUNK_SIZE),
            )
            for number, group in enumerate(self.param_groups)
        }
        specs = [
            ParameterSpec(name, tuple(parameter.shape), f"group{number}")  # type: ignore[arg-type]
            for name, parameter, number in zip(self._names, self._params, self._group_of, strict=True)
        ]
        self.layout = ChunkLayout(specs, treatments)
        #: what is sent, and what comes back
        self.codec = Codec(self.layout.topk, self.layout.reply_topk, value_bits)
        device = self._params[0].device
        self.momentum = torch.zeros(self.layout.chunks, CHUNK_SIZE, device=device)
        directions = [
            DIRECTIONS[segment.treatment.direction](
                self.layout, segment, rms_beta, rms_epsilon, device, direction_momentum
            )
            for segment in self.layout.segments
        ]
        workers = Workers(self.layout, device)
        self._gatherer = Gatherer(self.layout, self._params, workers)
        self._stepper = Stepper(self.layout, self._params, directions, workers, exact=exact)
        self._decays = 0

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as the constructor does for each that it is given.

        Raises:
            RuntimeError: the optimizer is made already.
        """
        if "layout" in self.__dict__:
            raise RuntimeError(
                "DeMo takes no group after it is made: chunks are numbered through all parameters, and peers, "
                "contributions under way and saved states count on these numbers. Make a new DeMo of all groups, or "
                "hold the parameters from the beginning and freeze them (requires_grad=False) until their time."
            )
        super().add_param_group(param_group)
        groups.check_group(len(self.param_groups) - 1, self.param_groups[-1], self.defaults)

    # ---- a round, in order ------------------------------------------------------------------------------------

    @torch.no_grad()
    def accumulate(self) -> None:
        """Add the gradients (means over the sequences computed) to the momentum, after one decay of it."""
        groups.check_gradients(self._names, self._params)
        self._gatherer.accumulate(self.momentum, self.beta)
        self._decays += 1

    @torch.no_grad()
    def select(self) -> Pending:
        """Move the top-k of every chunk, as quantised, out of the momentum."""
        return Pending(self._gatherer.select(self.momentum, self.codec.value_bits), self._decays)

    @torch.no_grad()
    def accumulate_and_select(self) -> Pending:
        """Do one after the other, in a single pass over the momentum."""
        groups.check_gradients(self._names, self._params)
        self._decays += 1
        sent = self._gatherer.accumulate_and_select(self.momentum, self.beta, self.codec.value_bits)
        return Pending(sent, self._decays)

    def payloads(self, pending: Pending, ranges: Sequence[tuple[int, int]]) -> tuple[bytes, ...]:
        """Encode the contributions for chunks [start, end), of each of `ranges`."""
        payloads = [b""] * len(ranges)

        def encode(_: int, number: int) -> None:
            payloads[number] = wire.encode_contribution(pending.sent.cut(*ranges[number]), self.codec)

        threads.for_each(range(len(ranges)), encode, min(threads.usable(), len(ranges)))
        return tuple(payloads)

    @torch.no_grad()
    def apply(self, replies: Sequence[PartReply], learning_rate: float | None = None) -> None:
        """Take the step that the replies decide: decode, direction, decay, step.

        Args:
            replies: covering all chunks; None where the seal says SKIP, which leaves those chunks where they are.
            learning_rate: before each group's scale; default: each group's own `lr`.
        """
        self._stepper.apply(replies, self._rates(learning_rate))

    def _rates(self, learning_rate: float | None) -> list[Rate]:
        """Return the rate of each parameter."""
        by_group = []
        for group in self.param_groups:
            rate = float(group["lr"] if learning_rate is None else learning_rate) * float(group["learning_rate_scale"])
            by_group.append(Rate(rate, 1 - rate * float(group["weight_decay"])))
        return [by_group[number] for number in self._group_of]

    @torch.no_grad()
    def settle(self, pending: Pending, replies: Sequence[PartReply], index: int | None) -> Settled:
        """Consume what the sealed replies used of a contribution; everything else returns to the momentum.

        Args:
            index: our place among that round's members; None: we were none, all returns.
        """
        settled = settling.consumed_of(pending, replies, index)
        self.settle_again(settled)
        return settled

    @torch.no_grad()
    def settle_again(self, settled: Settled) -> None:
        """Add to the momentum what a settle returned."""
        self._add_returned(settled, 1.0)

    @torch.no_grad()
    def unsettle(self, settled: Settled) -> Pending:
        """Undo a settle: what it returned leaves the momentum again, and the contribution is pending as before."""
        self._add_returned(settled, -1.0)
        return settled.pending

    def _add_returned(self, settled: Settled, sign: float) -> None:
        factor = sign * self.beta ** (self._decays - settled.pending.decays)
        chunk_there = self._gatherer.chunk_there(settled.pending.sent.chunk)
        settling.add_returned(self.momentum, settled, factor, chunk_there)

    @torch.no_grad()
    def restore_sent(self, sent: Coefficients, decays: int) -> Pending:
        """Account, after a crash, for what was sent after the momentum at hand was saved.

        Of an entry that was sent only the rounding stayed behind: it is zeroed. What was gathered in between is lost.

        Args:
            decays: of the momentum, at the time of sending.
        """
        self.momentum.mul_(self.beta ** max(0, decays - self._decays))
        self._decays = max(decays, self._decays)
        settling.forget_sent(self.momentum, sent)
        return Pending(sent, decays)

    @property
    def decays(self) -> int:
        """Return how many decays the momentum has been through."""
        return self._decays

    @decays.setter
    def decays(self, decays: int) -> None:
        self._decays = decays

    def give_back(self, pending: Pending) -> None:
        """Return all of a contribution that no seal can include any more."""
        self.settle(pending, (), None)

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one round of a group of one, which needs no bytes for it."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        pending = self.accumulate_and_select()
        moving = self._moving()
        if self._stepper.exact:
            replies: list[PartReply] = [(start, end, self._reply_to_one(pending, start, end)) for start, end in moving]
            self.apply(replies)
            self.settle(pending, replies, 0)
            return loss
        live = np.zeros(self.layout.chunks, bool)
        for start, end in moving:
            live[start:end] = True
        self._stepper.apply_sent(pending.sent, live, self._rates(None))
        if not live.all():
            self.settle_again(Settled(pending, live[pending.sent.chunk], ()))
        return loss

    def _moving(self) -> list[tuple[int, int]]:
        """Return the ranges of chunks that take a lone step: those of parameters that are not frozen."""
        ranges: list[tuple[int, int]] = []
        for number, segment in enumerate(self.layout.segments):
            if gradient_of(self._params[number]) is None:
                continue
            if ranges and ranges[-1][1] == segment.start:
                ranges[-1] = ranges[-1][0], segment.end
            else:
                ranges.append((segment.start, segment.end))
        return ranges

    def _reply_to_one(self, pending: Pending, start: int, end: int) -> ReplyContent:
        sent = pending.sent if end - start == self.layout.chunks else pending.sent.cut(start, end)
        return reply_to_one(sent, self.codec)

    # ---- state ------------------------------------------------------------------------------------------------

    def replicated_state(self) -> dict[str, Tensor]:
        """Return what every replica holds alike beside the parameters: the directions' state, by parameter number."""
        return {
            f"{number}.{key}": tensor
            for number, direction in enumerate(self._stepper.directions)
            for key, tensor in direction.state().items()
        }

    def load_replicated_state(self, state: dict[str, Tensor]) -> None:
        """Load what `replicated_state` returned."""
        for number, direction in enumerate(self._stepper.directions):
            direction.load_state({key: state[f"{number}.{key}"] for key in direction.state()})

    def _shape_of_state(self) -> dict[str, Any]:
        """Return what must be alike where a state is saved and where it is loaded, in plain types."""
        treated = ("transform", "direction", "topk", "reply_topk")
        return {
            "parameters": [
                [list(segment.spec.shape), *(getattr(segment.treatment, key) for key in treated)]
                for segment in self.layout.segments
            ],
            **self._settings,
            "value_bits": self.codec.value_bits,
        }

    def state_dict(self) -> dict[str, Any]:
        """Return torch's, the momentum (own), the directions' state (replicated) and the masters, in plain types."""
        own = {
            "of": self._shape_of_state(),
            "momentum": self.momentum,
            "decays": self._decays,
            "replicated": self.replicated_state(),
            "masters": {str(number): master for number, master in self._stepper.masters.items()},
        }
        return {**super().state_dict(), "demo": own}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned. Nothing is loaded of a state that is refused.

        Raises:
            ValueError: the state of another optimizer, or of other parameters, treatments or settings.
        """
        own = state_dict.get("demo")
        if not isinstance(own, dict) or not isinstance(own.get("of"), dict):
            raise ValueError("this is no state of DeMo")
        self._check_loaded(own, state_dict)
        super().load_state_dict({k: v for k, v in state_dict.items() if k != "demo"})
        self.momentum.copy_(own["momentum"])
        self._decays = own["decays"]
        self.load_replicated_state(own["replicated"])
        for number, master in self._stepper.masters.items():
            # Of a parameter of float32 the value itself is its master.
            master.copy_(own["masters"].get(str(number), self._params[number].detach()))

    def _check_loaded(self, own: dict[str, Any], state_dict: dict[str, Any]) -> None:
        ours, theirs = self._shape_of_state(), own["of"]
        _check_there("", state_dict, ("state", "param_groups"))
        _check_there("'s demo", own, ("momentum", "decays", "replicated", "masters"))
        _check_there("'s demo.of", theirs, ours)
        if len(ours["parameters"]) != len(theirs["parameters"]):
            raise ValueError(f"the state is of {len(theirs['parameters'])} parameters, not {len(ours['parameters'])}")
        what = "shape, transform, direction, topk, reply_topk"
        for name, one, other in zip(self._names, ours["parameters"], theirs["parameters"], strict=True):
            if one != other:
                raise ValueError(f"the state has for {name} {what} = {other}; here they are {one}")
        for key in self._settings:
            if ours[key] != theirs[key]:
                raise ValueError(f"the state is of {key}={theirs[key]!r}; here it is {ours[key]!r}")
        _check_tensor("momentum", own["momentum"], self.momentum)
        if not isinstance(own["decays"], int):
            raise ValueError(f"the state's demo has decays={own['decays']!r}, which is no integer")
        for where in ("replicated", "masters"):
            if not isinstance(own[where], dict):
                raise ValueError(f"the state's demo has {where}={own[where]!r}, which is no dictionary")
        replicated = self.replicated_state()
        _check_there("'s demo.replicated", own["replicated"], replicated)
        for key, tensor in replicated.items():
            _check_tensor(f"replicated {key}", own["replicated"][key], tensor)
        for number, master in self._stepper.masters.items():
            if str(number) in own["masters"]:
                _check_tensor(f"masters {number}", own["masters"][str(number)], master)
        for number, group in enumerate(state_dict["param_groups"]):
            _check_there(f"'s group {number}", group, ("params", *self.defaults))
            groups.check_group(number, group, self.defaults)

    def __getstate__(self) -> dict[str, Any]:
        """Return all that a copy needs; like torch's own, without hooks and what schedulers put around `step`."""
        held = {key: value for key, value in self.__dict__.items() if key in _COPIED}
        return {**super().__getstate__(), **held}


def _check_there(where: str, held: Collection[str], needed: Iterable[str]) -> None:
    """Refuse a state of which something is missing. Raises ValueError."""
    missing = [key for key in needed if key not in held]
    if missing:
        raise ValueError(f"the state{where} lacks {', '.join(missing)}")


def _check_tensor(name: str, held: object, like: Tensor) -> None:
    """Refuse what cannot be loaded into a tensor like this one. Raises ValueError."""
    if not isinstance(held, Tensor):
        raise ValueError(f"the state's {name} is no tensor")
    if held.shape != like.shape:
        raise ValueError(f"the state's {name} is {list(held.shape)}, not {list(like.shape)}")
