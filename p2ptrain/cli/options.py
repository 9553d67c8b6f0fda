"""Flags that several commands share. None means not given: `config.node` settles the value and where it is from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from p2ptrain.errors import UsageError

if TYPE_CHECKING:
    from p2ptrain.data.preparing import Given


def path_parser(flag: str) -> Callable[[str], Path]:
    """What makes a path of a flag's value; an empty one, as of a variable that is not set, is no current folder."""

    def parse(value: str | Path) -> Path:
        text = str(value)
        if not text:
            raise UsageError(f"{flag} is empty", hint=f"{flag} PATH; is the variable set that it comes from?")
        return Path(text).expanduser()

    return parse


Device = Literal["auto", "cpu", "cuda", "mps"]
LogFormat = Literal["text", "json"]

HomeOption = Annotated[
    Path | None,
    typer.Option(
        "--home",
        parser=path_parser("--home"),
        metavar="DIR",
        help="Directory of identity, checkpoints and journal.",
        show_default="$P2PTRAIN_HOME, else the platform's",
    ),
]
NameOption = Annotated[
    str | None, typer.Option("--name", help="Name that other peers show.", show_default="the end of the peer id")
]
PortOption = Annotated[
    int | None,
    typer.Option("--port", help="TCP port; 0: a free one, remembered in the home.", show_default="that of last time"),
]
HostOption = Annotated[str | None, typer.Option("--host", help="IP address to listen on.", show_default="0.0.0.0")]
AnnounceOption = Annotated[
    list[str] | None,
    typer.Option(
        "--announce",
        metavar="ADDR",
        help="Address to hand out instead of those found; repeatable.",
        show_default="those found",
    ),
]
DeviceOption = Annotated[Device | None, typer.Option("--device", help="Where to compute.", show_default="auto")]
ThreadsOption = Annotated[
    int | None, typer.Option("--threads", help="CPU threads to compute with; 0: one a core.", show_default="0")
]
UploadLimitOption = Annotated[
    str | None,
    typer.Option(
        "--upload-limit", metavar="RATE", help="Most to send, as 1Mbit or 2MB (bytes a second).", show_default="none"
    ),
]
DownloadLimitOption = Annotated[
    str | None, typer.Option("--download-limit", metavar="RATE", help="Most to let come.", show_default="none")
]
MonthlyTransferOption = Annotated[
    str | None,
    typer.Option(
        "--monthly-transfer", metavar="AMOUNT", help="Most a month, both ways, as 200GB.", show_default="none"
    ),
]
NiceOption = Annotated[
    int | None, typer.Option("--nice", min=0, max=19, help="How far to give way to other programs.", show_default="0")
]
MaxMemoryOption = Annotated[
    str | None, typer.Option("--max-memory", metavar="AMOUNT", help="Most memory to hold, as 6GB.", show_default="none")
]
MaxDiskOption = Annotated[
    str | None,
    typer.Option("--max-disk", metavar="AMOUNT", help="Most that the home holds, as 20GB.", show_default="none"),
]
GpuMemoryOption = Annotated[
    str | None,
    typer.Option("--gpu-memory", metavar="AMOUNT", help="Most memory of a CUDA device, as 8GB.", show_default="none"),
]
VolunteerOption = Annotated[
    bool | None,
    typer.Option(
        "--volunteer", help="Train only when this machine is not wanted: [volunteer] in node.toml.", show_default=False
    ),
]
RoundsOption = Annotated[
    int | None, typer.Option("--rounds", min=1, help="Stop after this many rounds in which this peer had a part.")
]
MetricsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--metrics",
        metavar="WHERE",
        help="Where figures go: HOST:PORT (Prometheus), PATH.jsonl, tensorboard:FOLDER, wandb:PROJECT, "
        "trackio:PROJECT; repeatable.",
    ),
]
MicroBatchOption = Annotated[
    str | None,
    typer.Option(
        "--micro-batch", metavar="N|auto", help="Sequences to compute at once.", show_default="as the run says"
    ),
]
PrecisionOption = Annotated[
    Literal["auto", "float32", "bfloat16"] | None,
    typer.Option("--precision", help="What to compute gradients in.", show_default="auto: bfloat16 where it is faster"),
]
RecomputeOption = Annotated[
    bool | None,
    typer.Option("--recompute", help="Keep less in memory and compute it again.", show_default=False),
]
ForceOption = Annotated[
    bool, typer.Option("--force", help="Go on where this machine has not got what a peer of this run needs.")
]
CheckpointEveryOption = Annotated[
    int | None,
    typer.Option(
        "--checkpoint-every",
        metavar="SECONDS",
        help="Between two checkpoints; 0: as they cost, under 1 %.",
        show_default="0",
    ),
]
LogFormatOption = Annotated[
    LogFormat | None, typer.Option("--log-format", help="Form of the log on stderr.", show_default="text")
]
VerboseOption = Annotated[
    int, typer.Option("--verbose", "-v", count=True, show_default=False, help="More log; twice: all of it.")
]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="Log errors only.")]
DataOption = Annotated[
    list[Path] | None,
    typer.Option(
        "--data",
        parser=path_parser("--data"),
        metavar="PATH",
        help="Text: a file, a folder, or - for standard input; repeatable.",
    ),
]
FieldOption = Annotated[
    str | None,
    typer.Option(
        "--field",
        metavar="NAME",
        help="Field or column of records with the text.",
        show_default="text, else prompt and completion, else messages",
    ),
]
TokenizerOption = Annotated[
    str | None,
    typer.Option(
        "--tokenizer",
        metavar="PATH|train:N",
        help="tokenizer.json, a folder with it, or how many tokens to train one of.",
        show_default="the shipped one, 4096 tokens of English",
    ),
]
ModelOption = Annotated[
    Path | None,
    typer.Option(
        "--model",
        parser=path_parser("--model"),
        metavar="PATH",
        help="A copy of the weights that the run starts from, to read them here and not fetch them.",
    ),
]


def given_text(data: list[Path] | None, field: str | None, tokenizer: str | None) -> Given | None:
    """What these flags say of a text; None: nothing.

    Raises:
        UsageError: one of them makes no sense.
    """
    if not data:
        for flag, value in (("--field", field), ("--tokenizer", tokenizer)):
            if value is not None:
                raise UsageError(f"{flag} needs --data", hint=f"{flag} {value} --data PATH")
        return None
    for flag, value in (("--field", field), ("--tokenizer", tokenizer)):
        if value == "":
            raise UsageError(f"{flag} is empty", hint="leave it out, or set the variable that it comes from")
    from p2ptrain.data.preparing import Given

    return Given(tuple(data), field, tokenizer)
