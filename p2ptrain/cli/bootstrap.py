"""`p2ptrain bootstrap`: start a run and train."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from p2ptrain.cli.options import (
    AnnounceOption,
    CheckpointEveryOption,
    DataOption,
    DeviceOption,
    DownloadLimitOption,
    FieldOption,
    ForceOption,
    GpuMemoryOption,
    HomeOption,
    HostOption,
    LogFormatOption,
    MaxDiskOption,
    MaxMemoryOption,
    MetricsOption,
    MicroBatchOption,
    ModelOption,
    MonthlyTransferOption,
    NameOption,
    NiceOption,
    PortOption,
    PrecisionOption,
    QuietOption,
    RecomputeOption,
    RoundsOption,
    ThreadsOption,
    TokenizerOption,
    UploadLimitOption,
    VerboseOption,
    VolunteerOption,
    given_text,
)
from p2ptrain.cli.peer import run_peer
from p2ptrain.config.loading import load_manifest

if TYPE_CHECKING:
    from p2ptrain.peer.assembly import Run
    from p2ptrain.peer.session import PeerSession


def bootstrap(
    manifest: Annotated[Path, typer.Argument(metavar="RUN.TOML", help="Manifest, as `p2ptrain init` writes it.")],
    initial_peers: Annotated[
        list[str] | None,
        typer.Option("--initial-peers", metavar="ADDR", help="Peer of an existing DHT to meet in; repeatable."),
    ] = None,
    data: DataOption = None,
    field: FieldOption = None,
    tokenizer: TokenizerOption = None,
    model: ModelOption = None,
    home: HomeOption = None,
    name: NameOption = None,
    port: PortOption = None,
    host: HostOption = None,
    announce: AnnounceOption = None,
    device: DeviceOption = None,
    threads: ThreadsOption = None,
    micro_batch: MicroBatchOption = None,
    precision: PrecisionOption = None,
    recompute: RecomputeOption = None,
    checkpoint_every: CheckpointEveryOption = None,
    upload_limit: UploadLimitOption = None,
    download_limit: DownloadLimitOption = None,
    monthly_transfer: MonthlyTransferOption = None,
    nice: NiceOption = None,
    max_memory: MaxMemoryOption = None,
    max_disk: MaxDiskOption = None,
    gpu_memory: GpuMemoryOption = None,
    volunteer: VolunteerOption = None,
    rounds: RoundsOption = None,
    metrics: MetricsOption = None,
    force: ForceOption = False,
    log_format: LogFormatOption = None,
    verbose: VerboseOption = 0,
    quiet: QuietOption = False,
) -> None:
    """Start the run that RUN.TOML describes, and train. If the run lives already, take part in it."""
    loaded, given = load_manifest(manifest), given_text(data, field, tokenizer)

    def find(session: PeerSession) -> Run:
        return session.found_run(loaded)

    run_peer(
        {
            "name": name,
            "port": port,
            "host": host,
            "announce": announce,
            "device": device,
            "threads": threads,
            "metrics": metrics,
            "micro_batch": micro_batch,
            "precision": precision,
            "recompute": recompute,
            "checkpoint_every": checkpoint_every,
            "upload_limit": upload_limit,
            "download_limit": download_limit,
            "monthly_transfer": monthly_transfer,
            "nice": nice,
            "max_memory": max_memory,
            "max_disk": max_disk,
            "gpu_memory": gpu_memory,
            "volunteer": volunteer,
            "log_format": log_format,
        },
        home=home,
        rounds=rounds,
        force=force,
        verbose=verbose,
        quiet=quiet,
        addresses=initial_peers or [],
        find_run=find,
        manifest=loaded,
        given=given,
        model=model,
    )
