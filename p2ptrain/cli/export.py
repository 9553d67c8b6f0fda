"""`p2ptrain export`: the model of a home as a folder that other programs load."""

from __future__ import annotations

import json as json_library
from pathlib import Path
from typing import Annotated, Literal

import typer

from p2ptrain.cli.options import DeviceOption, HomeOption, QuietOption, VerboseOption
from p2ptrain.cli.output import printable, set_up_logging
from p2ptrain.config.home import Home, default_home


def export(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Directory to write.")],
    format: Annotated[
        Literal["hf", "safetensors", "gguf"],
        typer.Option(
            "--format",
            help="hf: what transformers loads; safetensors: parameters by the model's own names; gguf: for llama.cpp.",
        ),
    ] = "hf",
    round: Annotated[
        int | None, typer.Option("--round", min=1, help="Round to export.", show_default="the newest in the home")
    ] = None,
    evaluate: Annotated[
        bool, typer.Option("--evaluate", help="Measure bits per byte on held-out text, for the model card.")
    ] = False,
    merge: Annotated[
        bool,
        typer.Option(
            "--merge", help="Add small matrices (LoRA) to the model that they belong to, and write all of it."
        ),
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace OUT if an export has written it.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print what was written as JSON.")] = False,
    home: HomeOption = None,
    device: DeviceOption = None,
    verbose: VerboseOption = 0,
    quiet: QuietOption = False,
) -> None:
    """Write this home's model as a directory that other programs load, with a card that says where it comes from."""
    set_up_logging(verbose, quiet)
    from p2ptrain.data.obtaining import held_text
    from p2ptrain.errors import ModelError
    from p2ptrain.export import writing
    from p2ptrain.export.held import load_held
    from p2ptrain.peer.progress import Display
    from p2ptrain.training import evaluation

    here, target = Home(home or default_home()), out.expanduser().absolute()
    writing.check_target(target, force)
    held = load_held(here, round, device or ("auto" if evaluate else "cpu"))
    writing.check_export(held.manifest, format, merge)
    display = Display(quiet=quiet)
    bits = None
    try:
        if evaluate:
            if held.manifest.own_model is not None:
                raise ModelError(
                    "a model of somebody's own cannot be measured without its code", hint="leave out --evaluate"
                )
            heldout = held_text(here, held.manifest.data).heldout
            bits = evaluation.bits_per_byte(
                held.replica.model,  # type: ignore[arg-type]
                heldout.tokens,
                heldout.bytes,
                mask=heldout.mask,
                progress=lambda done, of: display.work("evaluating", done, of),
            )
        made = writing.export(held, here, target, format, display, merge=merge, force=force, bits=bits)
    finally:
        display.close()
    result = {
        "out": str(target),
        "format": format,
        "run_id": held.run_id.hex(),
        "round": held.chain.round,
        "state_id": held.chain.id.hex(),
        "root": held.root.hex(),
        "parameters_sha256": made.parameters_sha256,
        "files": made.files,
        "tokenizer": made.has_tokenizer,
        "bits_per_byte": bits,
    }
    if json:
        print(json_library.dumps(result))
        return
    lines = [
        f"Wrote {out}: round {held.chain.round:,} of {held.manifest.name}, state {held.chain.id.hex()[:16]}",
        f"root {held.root.hex()}, parameters sha256 {made.parameters_sha256}",
    ]
    if bits is not None:
        lines.append(f"{bits:.4f} bits per byte on held-out text")
    if not made.has_tokenizer and held.manifest.own_model is None:
        lines.append(
            "llama.cpp does not cut text as this tokenizer does, so it gets none and takes token numbers alone"
        )
    lines += [
        "Load it with:",
        *(f"  {line}" for line in writing.how_to_load(held.manifest, format, out, merge).text.splitlines()),
    ]
    print(printable("\n".join(lines)))
