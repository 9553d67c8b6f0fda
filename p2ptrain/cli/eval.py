"""`p2ptrain eval`: how well this home's model predicts the held-out text, and what was measured while it trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from p2ptrain.cli.options import DeviceOption, HomeOption, QuietOption, VerboseOption
from p2ptrain.cli.output import printable, set_up_logging
from p2ptrain.config.home import Home, default_home
from p2ptrain.errors import HomeError, UsageError

if TYPE_CHECKING:
    from p2ptrain.observe.evaluations import Evaluation

FILE_COLUMNS = 120
"""Width of the history's table where it does not go to a terminal."""


def evaluate(
    max_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-tokens",
            min=0,
            help="Score about this many tokens; 0: the whole held-out text.",
            show_default="0, but with --round as many as the member that measured it",
        ),
    ] = None,
    round: Annotated[
        int | None,
        typer.Option("--round", min=0, metavar="N", help="Measure round N, as far as this home holds it."),
    ] = None,
    history: Annotated[
        bool, typer.Option("--history", help="Show what members have measured while the run trained.")
    ] = False,
    format: Annotated[Literal["text", "json"], typer.Option("--format", help="Form of the output.")] = "text",
    home: HomeOption = None,
    device: DeviceOption = None,
    verbose: VerboseOption = 0,
    quiet: QuietOption = False,
) -> None:
    """Bits per byte on held-out text, beside what gzip, xz and zstd need for it; or what members have measured."""
    set_up_logging(verbose, quiet)
    here = Home(home or default_home())
    if not history:
        _measure(here, device or "auto", max_tokens, round, format, quiet=quiet)
    elif round is not None or max_tokens is not None:
        raise UsageError("--history measures nothing, so it takes no --round and no --max-tokens")
    else:
        _show_history(here, format)


def _measure(
    here: Home, device: str, max_tokens: int | None, round_number: int | None, format: str, *, quiet: bool
) -> None:
    from p2ptrain.data.obtaining import held_text
    from p2ptrain.observe.evaluations import agrees, read_history
    from p2ptrain.peer.progress import Display
    from p2ptrain.training import evaluation
    from p2ptrain.training.reading import load_round, load_trained

    display = Display(quiet=quiet)
    if round_number is None:
        trained = load_trained(here, device)
    else:
        trained = load_round(here, device, round_number, lambda done, of: display.work("replaying rounds", done, of))
    state = trained.replica.chain
    said = [
        one
        for one in read_history(here.evaluations)
        if (one.round, one.state_id) == (state.round, state.id.hex()) and one.tokens
    ]
    if max_tokens is None:
        max_tokens = said[-1].tokens if said and round_number is not None else 0
    text = held_text(here, trained.manifest.data)
    heldout = text.heldout
    score = evaluation.score(
        trained.model, heldout, max_tokens or None, lambda done, of: display.work("evaluating", done, of)
    )
    display.close()
    bits, tokenizer = score.bits_per_byte, text.tokenizer()
    compressors = evaluation.compressors_bits_per_byte(evaluation.beginning_of(heldout.tokens, tokenizer))
    # Figures on other tokens are of another text.
    comparable = [one for one in said if one.tokens == score.tokens]
    members = [{"by": one.by, "figures": one.figures, "agrees": agrees(one.value, bits)} for one in comparable]
    result = {
        "round": state.round,
        "state_id": state.id.hex(),
        "parameters_sha256": trained.replica.parameters_sha256(),
        "heldout_bytes": heldout.bytes,
        "tokens": score.tokens,
        "loss": score.nats_per_token,
        "bits_per_byte": bits,
        "perplexity": score.perplexity,
        "tokenizer_sha256": tokenizer.sha256,
        "compressors_bits_per_byte": compressors,
        "members": members,
    }
    if format == "json":
        print(json.dumps(result))
        return
    print(f"round {state.round}, state {state.id.hex()[:16]}, parameters sha256 {result['parameters_sha256']}")
    print(f"held-out text, {heldout.bytes:,} bytes, {score.tokens:,} of {len(heldout.tokens) - 1:,} tokens scored:")
    rows = [("this model", bits), *compressors.items()]
    for name, value in rows:
        print(f"  {name:<16} {value:.3f} bits/byte")
    print(f"  perplexity {score.perplexity:.4g} a token of tokenizer {tokenizer.sha256[:8]} ({tokenizer.vocabulary:,})")
    for one in comparable:
        verdict = "agrees" if agrees(one.value, bits) else "DIFFERS"
        print(f"  {one.by[-8:]} said {one.value:.3f} bits/byte of this round: {verdict}")


def _show_history(here: Home, format: str) -> None:
    from p2ptrain.observe.evaluations import marked, read_history

    if not here.manifest.exists():
        raise HomeError(f"home {here.path} is in no run", hint=f"train first: p2ptrain join ADDR --home {here.path}")
    found = marked(sorted(read_history(here.evaluations), key=lambda one: (one.round, one.time)))
    if format == "json":
        for one, far_off in found:
            print(json.dumps(one.as_json() | {"far_off": far_off}))
    elif not found:
        print(_nothing_yet(here.manifest))
    else:
        _print_table(found)


def _nothing_yet(manifest: Path) -> str:
    from p2ptrain.config.manifest import open_manifest

    evaluated = open_manifest(manifest.read_bytes())[0].evaluated
    if evaluated is None:
        return "Members of this run measure nothing: its manifest sets no [evaluation] every_rounds."
    return f"Nobody has measured anything yet; a member does every {evaluated.every_rounds} rounds."


def _print_table(found: list[tuple[Evaluation, bool]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from p2ptrain.observe.evaluations import figures_text

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = FILE_COLUMNS
    table = Table(box=None, pad_edge=False)
    for title in ("round", "state", "by", "figures", "tokens", "seconds", ""):
        table.add_column(title, justify="right" if title in ("round", "tokens", "seconds") else "left")
    for one, far_off in found:
        tokens = f"{one.tokens:,}" if one.tokens else "-"
        cells = (one.round, one.state_id[:8], one.by[-8:], figures_text(one.figures), tokens, f"{one.seconds:.1f}")
        table.add_row(*(Text(printable(str(cell))) for cell in cells), "far off" if far_off else "")
    console.print(table)
    tokenizers = sorted({one.tokenizer_sha256[:8] for one, _ in found if one.tokenizer_sha256})
    if tokenizers:
        console.print(Text(f"perplexity is a token of tokenizer {', '.join(tokenizers)}"))
    console.print(Text("Each figure is what its member says. A round that this home holds can be measured: --round N"))
