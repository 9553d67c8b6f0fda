"""How well a tokenizer fits a text: bytes a token, and how much of the text it cannot say.

A token should stand for several bytes: with one or two, sequences cover half of what they could, and training costs
twice as much a byte. What a tokenizer does not know at all, no model can learn.
"""

from __future__ import annotations

from dataclasses import dataclass

FEW_BYTES = 2.0
UNKNOWN_SHARE = 0.001


@dataclass(frozen=True, slots=True)
class Fit:
    """A text as a tokenizer sees it."""

    text_bytes: int
    tokens: int
    unknown: int = 0
    """Tokens that stand for something that the tokenizer does not know."""

    @property
    def bytes_per_token(self) -> float:
        """Bytes of text that a token stands for on average."""
        return self.text_bytes / max(self.tokens, 1)

    def __str__(self) -> str:
        unknown = f", {self.unknown:,} unknown" if self.unknown else ""
        return (
            f"{self.text_bytes:,} bytes are {self.tokens:,} tokens: {self.bytes_per_token:.2f} bytes a token{unknown}"
        )

    @property
    def warning(self) -> str:
        """What is wrong with the fit and what to do; empty: nothing."""
        if self.unknown > UNKNOWN_SHARE * self.tokens:
            return (
                f"the tokenizer does not know {self.unknown / self.tokens:.1%} of what is in the text: "
                "take another, or --tokenizer train:N"
            )
        if self.bytes_per_token < FEW_BYTES:
            return (
                f"the tokenizer fits the text badly: {self.bytes_per_token:.2f} bytes a token, where three to five are "
                "usual: take one of that language, or --tokenizer train:8192"
            )
        return ""
