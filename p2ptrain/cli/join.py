"""`p2ptrain join`: take part in a run with nothing but an address."""

from __future__ import annotations

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
from p2ptrain.errors import UsageError

if TYPE_CHECKING:
    from p2ptrain.peer.assembly import Run
    from p2ptrain.peer.session import PeerSession


WAIT_SECONDS = 120.0


def join(
    addresses: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="ADDR...", help="Address that a peer printed; none: the peers that this home has met before."
        ),
    ] = None,
    run: Annotated[
        str | None, typer.Option("--run", metavar="NAME|ID", help="Another run than that of the peer at ADDR.")
    ] = None,
    invite: Annotated[
        str | None, typer.Option("--invite", metavar="TOKEN", help="Invitation to a run that is not open to everyone.")
    ] = None,
    data: DataOption = None,
    field: FieldOption = None,
    tokenizer: TokenizerOption = None,
    part: Annotated[
        float | None,
        typer.Option(
            "--part", metavar="SHARE", min=0.0, max=1.0, help="Fetch this part of the text, as 0.1, and train on that."
        ),
    ] = None,
    model: ModelOption = None,
    home: HomeOption = None,
    wait: Annotated[
        float,
        typer.Option("--wait", metavar="SECONDS", min=0.0, help="Wait so long for a peer that is not there yet."),
    ] = WAIT_SECONDS,
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
    """Train with the swarm at ADDR: manifest, text and model come from it."""
    from p2ptrain.swarm.invitations import read_invitation

    given = given_text(data, field, tokenizer)
    invitation = None if invite is None else read_invitation(invite)

    def find(session: PeerSession) -> Run:
        own = session.own_run()
        if not addresses and run is None:
            if invitation is not None:
                raise UsageError("an invitation needs the address of a peer", hint="p2ptrain join ADDR --invite TOKEN")
            if own is None:
                raise UsageError(f"which swarm? Home {session.home.path} has met none yet", hint="p2ptrain join ADDR")
            return own
        return session.find_run(addresses or [], run, invitation)

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
        addresses=addresses or [],
        find_run=find,
        given=given,
        model=model,
        share=part,
        wait_seconds=wait if addresses else 0.0,
    )
