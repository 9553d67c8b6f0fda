"""The text that ships with the package, which a run trains on unless its owner gives another."""

from __future__ import annotations

import hashlib
import lzma
from dataclasses import dataclass
from importlib import resources

from p2ptrain.config.manifest import DataConfig
from p2ptrain.data.tokenizer import tokenizer_sha256
from p2ptrain.errors import DataError


@dataclass(frozen=True, slots=True)
class Corpus:
    """Training and held-out text, UTF-8."""

    name: str
    license: str
    train: bytes
    heldout: bytes

    def config(self, *, private: bool = False) -> DataConfig:
        """What a manifest says of this corpus, or of its held-out text alone."""
        return DataConfig(
            name=self.name,
            license=self.license,
            private=private,
            sha256="" if private else hashlib.sha256(self.train).hexdigest(),
            bytes=0 if private else len(self.train),
            heldout_sha256=hashlib.sha256(self.heldout).hexdigest(),
            heldout_bytes=len(self.heldout),
            tokenizer_sha256=tokenizer_sha256(),
        )


def load_embedded() -> Corpus:
    """The State of the Union addresses shipped with the package; those from 2020 on are held out."""
    folder = resources.files("p2ptrain.data") / "embedded"
    train, heldout = (lzma.decompress((folder / f"{part}.txt.xz").read_bytes()) for part in ("train", "heldout"))
    return Corpus("state-of-the-union", "LicenseRef-Public-Domain", train, heldout)


def check_embedded(config: DataConfig, corpus: Corpus) -> None:
    """Accept a manifest that names no token file if it means the shipped corpus; an empty hash does.

    Raises:
        DataError: it means another text, or another tokenizer.
    """
    ours = corpus.config(private=config.private)
    hint = "install the p2ptrain version that the run was made with"
    for what, wanted, found in (
        ("training text", config.sha256, ours.sha256),
        ("held-out text", config.heldout_sha256, ours.heldout_sha256),
        ("tokenizer", config.tokenizer_sha256, ours.tokenizer_sha256),
    ):
        if wanted not in ("", found):
            raise DataError(
                f"the run's {what} ({config.name}) hashes to {wanted[:16]}, the one shipped here to {found[:16]}",
                hint=hint,
            )
