"""`p2ptrain sample`: text from this home's checkpoint."""

from __future__ import annotations

import json
from typing import Annotated, Literal

import typer

from p2ptrain.cli.options import DeviceOption, HomeOption, QuietOption, VerboseOption
from p2ptrain.cli.output import printable, set_up_logging
from p2ptrain.config.home import Home, default_home


def sample(
    prompt: Annotated[str, typer.Option("--prompt", help="Text to continue.")] = "",
    tokens: Annotated[int, typer.Option("--tokens", min=1, max=10_000, help="Tokens to write.")] = 100,
    temperature: Annotated[
        float, typer.Option("--temperature", min=0.0, max=10.0, help="0 takes the likeliest token each time.")
    ] = 0.8,
    seed: Annotated[int, typer.Option("--seed", min=0, help="The same seed writes the same text.")] = 0,
    format: Annotated[Literal["text", "json"], typer.Option("--format", help="Form of the output.")] = "text",
    home: HomeOption = None,
    device: DeviceOption = None,
    verbose: VerboseOption = 0,
    quiet: QuietOption = False,
) -> None:
    """Continue a text with this home's checkpoint."""
    set_up_logging(verbose, quiet)
    from p2ptrain.data.obtaining import tokenizer_of
    from p2ptrain.training import evaluation
    from p2ptrain.training.reading import load_trained

    here = Home(home or default_home())
    trained = load_trained(here, device or "auto")
    tokenizer = tokenizer_of(here, trained.manifest.data)
    text = evaluation.sample(trained.model, tokenizer, prompt, tokens, temperature=temperature, seed=seed)
    if format == "json":
        state = trained.replica.chain
        print(json.dumps({"text": text, "round": state.round, "state_id": state.id.hex()}))
    else:
        print(printable(text))
