"""`p2ptrain eval`: how well this home's checkpoint predicts the held-out text."""

from __future__ import annotations

import json
import math
from typing import Annotated, Literal

import typer

from p2ptrain.cli.options import DeviceOption, HomeOption, QuietOption, VerboseOption
from p2ptrain.cli.output import set_up_logging
from p2ptrain.config.home import Home, default_home


def evaluate(
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", min=0, help="Score about this many tokens; 0: the whole held-out text.")
    ] = 0,
    format: Annotated[Literal["text", "json"], typer.Option("--format", help="Form of the output.")] = "text",
    home: HomeOption = None,
    device: DeviceOption = None,
    verbose: VerboseOption = 0,
    quiet: QuietOption = False,
) -> None:
    """Bits per byte on held-out text, beside what gzip, xz and zstd need for it."""
    set_up_logging(verbose, quiet)
    from p2ptrain.data.obtaining import held_text
    from p2ptrain.peer.progress import Display
    from p2ptrain.training import evaluation
    from p2ptrain.training.reading import load_trained

    here = Home(home or default_home())
    trained = load_trained(here, device or "auto")
    text = held_text(here, trained.manifest.data)
    heldout = text.heldout
    display = Display(quiet=quiet)
    bits = evaluation.bits_per_byte(
        trained.model,
        heldout.tokens,
        heldout.bytes,
        max_tokens=max_tokens or None,
        mask=heldout.mask,
        progress=lambda done, of: display.work("evaluating", done, of),
    )
    display.close()
    loss = bits * math.log(2) * heldout.bytes_per_token
    compressors = evaluation.compressors_bits_per_byte(evaluation.beginning_of(heldout.tokens, text.tokenizer()))
    state = trained.replica.chain
    result = {
        "round": state.round,
        "state_id": state.id.hex(),
        "parameters_sha256": trained.replica.parameters_sha256(),
        "heldout_bytes": heldout.bytes,
        "loss": loss,
        "bits_per_byte": bits,
        "compressors_bits_per_byte": compressors,
    }
    if format == "json":
        print(json.dumps(result))
        return
    print(f"round {state.round}, state {state.id.hex()[:16]}, parameters sha256 {result['parameters_sha256']}")
    print(f"held-out text, {heldout.bytes:,} bytes:")
    rows = [("this checkpoint", bits), *compressors.items()]
    for name, value in rows:
        print(f"  {name:<16} {value:.3f} bits/byte")
