"""DeMo: decoupled momentum, whose largest DCT coefficients are all that peers exchange.

Peng et al., arXiv 2411.19870. The momentum lives in the DCT domain, [chunks, 64 * 64] for all parameters at once: the
transform is linear and orthonormal, so taking out what is sent means subtracting entries, and a step needs two
transforms, not three (the gradient in, the reply out).

In a swarm a round is `accumulate` (once or more), `select`, exchange, `apply`, `settle`. Alone, `step()` does all of it
with a group of one. With `value_bits=32, exact=False, reply_topk=None` a lone step is the paper's rule; the learning
rate multiplies the step, not the gradient, which is the same under a constant rate, because the sign drops scale.

Cost: one momentum plus one batch of chunks beyond the gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from p2ptrain.averaging.reduce import reduce_part
from p2ptrain.compression import dct, wire
from p2ptrain.compression.layout import CHUNK_SIZE, ChunkLayout, ParameterSpec, Treatment
from p2ptrain.compression.wire import Coefficients, ReplyContent
from p2ptrain.optim.directions import DIRECTIONS, Direction


@dataclass(slots=True)
class Pending:
    """What left the momentum with a contribution and is not settled yet."""

    sent: Coefficients
    #: how many decays this momentum had been through when it was sent
    decays: int


@dataclass(frozen=True, slots=True)
class Settled:
    """What `settle` did, so that `unsettle` can undo it."""

    pending: Pending
    #: [n] whether a coefficient was consumed
    kept: NDArray[np.bool_]
    #: (first, end, factor in 256ths) of coefficients that were clipped before they were consumed
    clips: tuple[tuple[int, int, int], ...]

    @property
    def consumed(self) -> NDArray[np.float32]:
        """[n] what the group used."""
        used = np.where(self.kept, self.pending.sent.value, np.float32(0))
        for first, end, factor in self.clips:
            used[first:end] *= np.float32(factor / 256)
        return used

    @property
    def returned(self) -> NDArray[np.float32]:
        """[n] what went back into the momentum, before decay."""
        value: NDArray[np.float32] = self.pending.sent.value - self.consumed
        return value

    @property
    def consumed_share(self) -> float:
        """Share of the sent norm that was consumed, for display."""
        whole = float(np.abs(self.pending.sent.value).sum())
        return float(np.abs(self.consumed).sum()) / whole if whole else 0.0


PartReply = tuple[int, int, ReplyContent | None]
"""First chunk, end chunk, reply or None for a SKIP."""


class DeMo(torch.optim.Optimizer):
    """See the module docstring.

    Args:
        params: parameters or groups; a group may override `lr`, `weight_decay`, `transform`, `direction`, `topk` and
            `reply_topk`, and set a `learning_rate_scale` (default 1).
        lr: size of a step of direction `sign`.
        beta: momentum decay a round. One value for all groups: the momentum is one tensor.
        weight_decay: decoupled, times lr.
        transform: "dct" or "none".
        direction: see `directions.DIRECTIONS`.
        topk: coefficients sent per chunk of 4096.
        reply_topk: coefficients kept per chunk of a reply; None: all. A lone step that is not exact keeps all.
        value_bits: 1, 2, or 32 for unquantised values.
        exact: integer decode (the same bits on every device), else float.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
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
    ) -> None:
        if not 0 <= beta <= 1 or lr < 0 or not 0 < topk <= CHUNK_SIZE or value_bits not in (1, 2, 32):
            raise ValueError(f"lr={lr}, beta={beta}, topk={topk} or value_bits={value_bits} is out of range")
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
        self.beta, self.value_bits, self.exact = beta, value_bits, exact
        specs: list[ParameterSpec] = []
        treatments: dict[str, Treatment] = {}
        self._params: list[Tensor] = []
        #: by parameter: the number of its group; the groups themselves are replaced by `load_state_dict`
        self._group_of: list[int] = []
        for number, group in enumerate(self.param_groups):
            treatments[f"group{number}"] = Treatment(
                transform=group["transform"],
                direction=group["direction"],
                learning_rate_scale=group["learning_rate_scale"],
                topk=group["topk"],
                reply_topk=group["reply_topk"] or CHUNK_SIZE,
            )
            for parameter in group["params"]:
                name = f"{len(specs)}"
                specs.append(ParameterSpec(name, tuple(parameter.shape), f"group{number}"))  # type: ignore[arg-type]
                self._params.append(parameter)
                self._group_of.append(number)
        self.layout = ChunkLayout(specs, treatments)
        device = self._params[0].device
        self.momentum = torch.zeros(self.layout.chunks, CHUNK_SIZE, device=device)
        self._buffer = torch.zeros_like(self.momentum)
        self._directions: list[Direction] = [
            DIRECTIONS[segment.treatment.direction](self.layout, segment, rms_beta, rms_epsilon, device)
            for segment in self.layout.segments
        ]
        self._decays = 0

    @property
    def is_exact(self) -> bool:
        """Whether every device takes the same step to the bit."""
        return self.exact and all(direction.exact for direction in self._directions)

    # ---- a round, in order ------------------------------------------------------------------------------------

    @torch.no_grad()
    def accumulate(self) -> None:
        """Add the gradients (means over the sequences computed) to the momentum, after one decay of it."""
        self.layout.gather([parameter.grad for parameter in self._params], self._buffer)
        dct.encode(self.layout, self._buffer)
        self.momentum.mul_(self.beta).add_(self._buffer)
        self._decays += 1

    @torch.no_grad()
    def select(self) -> Pending:
        """Move the top-k of every chunk, as quantised, out of the momentum."""
        index = self._top_indices()
        chunk = np.repeat(np.arange(self.layout.chunks), self.layout.topk)
        rows, columns = torch.from_numpy(chunk), torch.from_numpy(index)
        value = self.momentum[rows, columns].cpu().numpy()
        quantised = wire.quantise(chunk, value, self.value_bits)
        sent = Coefficients(0, self.layout.chunks, chunk, index, quantised)
        self._add(sent, -quantised)
        return Pending(sent, self._decays)

    def payload(self, pending: Pending, start: int, end: int) -> bytes:
        """The contribution for chunks [start, end)."""
        return wire.encode_contribution(pending.sent.cut(start, end), self.layout.topk, self.value_bits)

    @torch.no_grad()
    def apply(self, replies: Sequence[PartReply], learning_rate: float | None = None) -> None:
        """Take the step that the replies decide: decode, direction, decay, step.

        Args:
            replies: covering all chunks; None where the seal says SKIP, which leaves those chunks where they are.
            learning_rate: before each group's scale; default: each group's own `lr`.
        """
        values = self._buffer.zero_()
        scale = torch.zeros(self.layout.chunks, dtype=torch.float32)
        live = torch.zeros(self.layout.chunks, dtype=torch.bool)
        for start, end, content in replies:
            if content is None:
                continue
            rows = torch.from_numpy(content.coefficients.chunk).to(values.device)
            columns = torch.from_numpy(content.coefficients.index).to(values.device)
            numbers = content.byte if self.exact else content.coefficients.value
            values[rows, columns] = torch.from_numpy(numbers.astype(np.float32)).to(values.device)
            scale[start:end] = torch.from_numpy(content.scale.copy())
            live[start:end] = True
        self._step(values, scale.to(values.device), live.to(values.device), learning_rate)

    def _step(self, values: Tensor, scale: Tensor, live: Tensor, learning_rate: float | None) -> None:
        if self.exact:
            integers, unit = dct.decode_exact(self.layout, values)
            update = integers.mul_((unit * scale).unsqueeze(1))
        else:
            update = dct.decode_float(self.layout, values)
        all_live = bool(live.all())
        for segment, parameter, number, direction in zip(
            self.layout.segments, self._params, self._group_of, self._directions, strict=True
        ):
            group = self.param_groups[number]
            rate = group["lr"] if learning_rate is None else learning_rate
            rate *= group["learning_rate_scale"]
            piece = slice(segment.start, segment.end)
            step = direction.step(update[piece], live[piece])
            # Decay and step apart, each rounded on its own: a fused multiply-add would differ between devices.
            decay = 1 - rate * group["weight_decay"]
            if all_live:
                parameter.mul_(decay)
            else:
                by_chunk = torch.where(live, decay, 1.0).unsqueeze(1).expand(-1, CHUNK_SIZE)
                parameter.mul_(self.layout.extract(segment, by_chunk))
            update[piece] = step
            shaped = self.layout.extract(segment, update)
            parameter.sub_(shaped.mul_(rate))

    @torch.no_grad()
    def settle(self, pending: Pending, replies: Sequence[PartReply], index: int | None) -> Settled:
        """Consume what the sealed replies used of a contribution; everything else returns to the momentum.

        Args:
            index: our place among that round's members; None: we were none, all returns.
        """
        sent = pending.sent
        kept = np.zeros(len(sent.value), bool)
        clips = []
        for start, end, content in replies:
            if content is None or index is None or index not in content.included:
                continue
            low, high = np.searchsorted(sent.chunk, (start, end))
            ours = sent.chunk[low:high] * CHUNK_SIZE + sent.index[low:high]
            kept[low:high] = np.isin(ours, content.coefficients.chunk * CHUNK_SIZE + content.coefficients.index)
            if index in content.clips:
                clips.append((int(low), int(high), content.clips[index]))
        settled = Settled(pending, kept, tuple(clips))
        self.settle_again(settled)
        return settled

    @torch.no_grad()
    def settle_again(self, settled: Settled) -> None:
        """What a settle returned goes into the momentum."""
        decays = self._decays - settled.pending.decays
        self._add(settled.pending.sent, settled.returned * np.float32(self.beta**decays))

    @torch.no_grad()
    def unsettle(self, settled: Settled) -> Pending:
        """Undo a settle: what it returned leaves the momentum again, and the contribution is pending as before."""
        decays = self._decays - settled.pending.decays
        self._add(settled.pending.sent, -settled.returned * np.float32(self.beta**decays))
        return settled.pending

    @torch.no_grad()
    def restore_sent(self, sent: Coefficients, decays: int) -> Pending:
        """After a crash: account for what was sent after the momentum at hand was saved.

        Of an entry that was sent only the rounding stayed behind: it is zeroed. What was gathered in between is lost.

        Args:
            decays: of the momentum, at the time of sending.
        """
        self.momentum.mul_(self.beta ** max(0, decays - self._decays))
        self._decays = max(decays, self._decays)
        self.momentum[torch.from_numpy(sent.chunk), torch.from_numpy(sent.index)] = 0
        return Pending(sent, decays)

    @property
    def decays(self) -> int:
        """How many decays the momentum has been through."""
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
        """One round of a group of one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.accumulate()
        pending = self.select()
        if not self.exact:
            values = self._buffer.zero_()
            sent = pending.sent
            values[torch.from_numpy(sent.chunk), torch.from_numpy(sent.index)] = torch.from_numpy(sent.value).to(
                values.device
            )
            live = torch.ones(self.layout.chunks, dtype=torch.bool, device=values.device)
            self._step(values, torch.ones(self.layout.chunks, device=values.device), live, None)
            return loss
        end = self.layout.chunks
        data = reduce_part(
            [(0, 1, self.payload(pending, 0, end))],
            topk=self.layout.topk,
            reply_topk=self.layout.reply_topk,
            start=0,
            end=end,
            members=1,
            value_bits=self.value_bits,
            clip_ratio=1.0,
            weight_cap_ratio=1.0,
        )
        replies = [(0, end, wire.decode_reply(data, self.layout.reply_topk, 0, end, 1))]
        self.apply(replies)
        self.settle(pending, replies, 0)
        return loss

    # ---- state ------------------------------------------------------------------------------------------------

    def replicated_state(self) -> dict[str, Tensor]:
        """What every replica holds alike beside the parameters: the directions' state, by parameter number."""
        return {
            f"{number}.{key}": tensor
            for number, direction in enumerate(self._directions)
            for key, tensor in direction.state().items()
        }

    def load_replicated_state(self, state: dict[str, Tensor]) -> None:
        """Inverse of `replicated_state`."""
        for number, direction in enumerate(self._directions):
            direction.load_state({key: state[f"{number}.{key}"] for key in direction.state()})

    def state_dict(self) -> dict[str, Any]:
        """As torch's, with the momentum (own) and the directions' state (replicated)."""
        own = {"momentum": self.momentum, "decays": self._decays, "replicated": self.replicated_state()}
        return {**super().state_dict(), "demo": own}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Inverse of `state_dict`."""
        own = state_dict["demo"]
        super().load_state_dict({k: v for k, v in state_dict.items() if k != "demo"})
        self.momentum.copy_(own["momentum"])
        self._decays = own["decays"]
        self.load_replicated_state(own["replicated"])

    # ---- parts ------------------------------------------------------------------------------------------------

    def _top_indices(self) -> NDArray[np.int64]:
        """Indices of the largest magnitudes, ascending inside each chunk, chunk after chunk [sum of topk]."""
        found, start = [], 0
        counts = self.layout.topk
        while start < len(counts):
            end = start
            while end < len(counts) and counts[end] == counts[start]:
                end += 1
            top = self.momentum[start:end].abs().topk(counts[start], dim=1, sorted=False).indices
            found.append(top.sort(dim=1).values.flatten().cpu().numpy())
            start = end
        return np.concatenate(found)

    def _add(self, at: Coefficients, values: NDArray[np.float32]) -> None:
        rows = torch.from_numpy(at.chunk).to(self.momentum.device)
        columns = torch.from_numpy(at.index).to(self.momentum.device)
        self.momentum[rows, columns] += torch.from_numpy(values).to(self.momentum.device)
