"""A swarm's peer in the `Trainer` of `transformers`: `optimizers=(peer.optimizer, None)` and one callback.

The `Trainer` computes, clips and accumulates gradients; its optimizer's step is the peer's. What it schedules, and what
it saves of the optimizer, has no meaning here: rates are the manifest's, and the home keeps the state.
"""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from p2ptrain.api.peer import Peer
from p2ptrain.errors import UsageError


class SwarmCallback(TrainerCallback):
    """Says how many samples a step counts for, and ends training with the peer's part in the run.

    Args:
        peer: entered; its optimizer is the trainer's.
    """

    def __init__(self, peer: Peer) -> None:
        self._peer = peer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any
    ) -> TrainerControl:
        if args.world_size > 1:
            raise UsageError(
                f"this trainer is one of {args.world_size} processes, and a peer is one",
                hint="start each as a peer with a home of its own, without torchrun",
            )
        self._peer.optimizer.samples_per_step = args.train_batch_size * args.gradient_accumulation_steps
        control.should_training_stop = self._peer.ended
        return control

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **others: Any,
    ) -> None:
        if logs is not None and isinstance(logs.get("loss"), float):
            self._peer.optimizer.loss_to_show = logs["loss"]

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any
    ) -> TrainerControl:
        control.should_training_stop = control.should_training_stop or self._peer.ended
        return control
