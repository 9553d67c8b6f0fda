"""Train a tiny Llama with the `Trainer` of transformers, together with others, on sequences that are made up.

pip install 'p2ptrain[transformers]'
python docs/examples/llama.py bootstrap run.toml --home a
python docs/examples/llama.py join ADDR --home b
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator

import torch
from torch.utils.data import IterableDataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import p2ptrain

VOCABULARY, LENGTH = 64, 32


class Counting(IterableDataset):
    """Endless sequences that count on by a step of their own, modulo the vocabulary."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        while True:
            start, step = torch.randint(0, VOCABULARY, (2,), generator=self._generator).tolist()
            tokens = (start + step * torch.arange(LENGTH)) % VOCABULARY
            yield {"input_ids": tokens, "labels": tokens}


def tell(peer: p2ptrain.Peer) -> None:
    """Print where the model stands: peers of one state have the same parameters, to the bit."""
    parameters = p2ptrain.parameters_sha256(peer.model)
    loss = f"train loss {peer.status.loss}"
    print(f"round {peer.round}, {peer.status.members} members, {loss}: {peer.state_id} {parameters}")


def main() -> None:
    """Take part until the run's last round."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("command", choices=["bootstrap", "join"])
    parser.add_argument("where", help="run.toml, or a peer's address")
    parser.add_argument("--home", required=True)
    parser.add_argument("--host", default=None)
    parser.add_argument("--seed", type=int, default=0, help="of the sequences, and of the model's first values")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(options.seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
    )
    model = LlamaForCausalLM(config)

    take_part = p2ptrain.bootstrap if options.command == "bootstrap" else p2ptrain.join
    peer = take_part(options.where, model=model, home=options.home, host=options.host)
    peer.on_round(tell)
    with peer, tempfile.TemporaryDirectory() as folder:
        print(f"others join at {peer.address}", flush=True)
        # The run ends when the manifest says so: `max_steps` is only more than that.
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=8,
            gradient_accumulation_steps=2,
            max_steps=1_000_000,
            save_strategy="no",
            logging_steps=50,
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
        )
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=Counting(options.seed),
            optimizers=(peer.optimizer, None),
            callbacks=[p2ptrain.SwarmCallback(peer)],
        )
        trainer.train()

    batch = torch.stack([tokens["input_ids"] for tokens, _ in zip(Counting(12345), range(64), strict=False)])
    with torch.no_grad():
        loss = model.eval()(input_ids=batch, labels=batch).loss.item()
    print(f"loss {loss:.3f} on new sequences at {peer.state_id} {p2ptrain.parameters_sha256(model)}")


if __name__ == "__main__":
    main()
