"""Figures reach the tools that people look at, as those tools read them."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import re
import time
import urllib.request
from pathlib import Path

import pytest

from p2ptrain.errors import UsageError
from p2ptrain.observe.events import Event, EventLog, Measured, MemberLine, Sealed, Started, Worked
from p2ptrain.observe.metrics import TRACKERS, Metrics, Prometheus, figures_of, sinks_of

ROOT = Path(__file__).parents[3]
ME = "12D3KooWada"


def told() -> list[Event]:
    started = Started(
        run_id="ab", run="verse", peer_id=ME, name="ada", device="cpu", version="1", protocol=10, round=0, state_id="ab"
    )
    lines = [MemberLine(peer_id=ME, included=True, weight=12, parts=2, owed=0)]
    lines.append(MemberLine(peer_id="bo", included=False, weight=0, parts=2, owed=1))
    sealed = Sealed(
        round=7, state_id="cd", parent="ab", total=9, sealer="bo", place=1, solo=False, members=lines, joins=[]
    )
    worked = Worked(
        round=7,
        loss=2.5,
        bits_per_byte=None,
        tokens_per_second=100.0,
        computing_seconds=1.0,
        exchange_seconds=0.5,
        disk_seconds=0.0,
        waiting_seconds=0.25,
        bytes_sent=1000,
        bytes_received=2000,
        consumed_share=0.75,
    )
    return [started, sealed, worked, Measured(round=7, state_id="cd", by=ME, figures={"bits_per_byte": 1.5}, tokens=9)]


def test_prometheus_tensorboard_and_a_file_say_what_the_events_do(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="pip install 'p2ptrain[metrics]'")
    parser = pytest.importorskip("prometheus_client.parser", reason="pip install 'p2ptrain[metrics]'")
    sinks = sinks_of(["127.0.0.1:0", str(tmp_path / "m.jsonl"), f"tensorboard:{tmp_path / 'tb'}"], lambda: 5.0)
    metrics = Metrics(sinks)
    log = EventLog(tmp_path / "events")
    log.listeners.append(metrics)
    for event in told():
        log.write(event)
    expected: dict[str, float] = {}
    for event in told():
        expected |= figures_of(event, ME)
    assert expected["train_loss"] == 2.5 and expected["heldout_bits_per_byte"] == 1.5
    assert (expected["members"], expected["members_included"], expected["parts_skipped"]) == (2, 1, 1)
    assert expected["takeover"] == 1.0 and expected["included"] == 1.0

    assert isinstance(sinks[0], Prometheus)
    text = urllib.request.urlopen(f"http://127.0.0.1:{sinks[0].port}/metrics", timeout=10).read().decode()
    samples = {
        sample.name: sample
        for family in parser.text_string_to_metric_families(text)
        for sample in family.samples
        if sample.labels.get("peer") == "ada"
    }
    assert {name.removeprefix("p2ptrain_"): samples[name].value for name in samples if name[9:] in expected} == expected
    assert samples["p2ptrain_rounds_total"].value == 1 and samples["p2ptrain_round"].value == 7
    # The board asks for nothing that is not there.
    asked = set(re.findall(r"p2ptrain_[a-z_]+", (ROOT / "docs/grafana.json").read_text()))
    assert asked <= samples.keys()
    metrics.close()

    lines = [json.loads(line) for line in (tmp_path / "m.jsonl").read_text().splitlines()]
    found: dict[str, float] = {}
    for line in lines[1:]:
        assert (line.pop("time"), line.pop("round")) == (5.0, 7)
        found |= line
    assert lines[0]["started"]["name"] == "ada" and found == expected

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(tmp_path / "tb" / "verse-ada"))
    read.Reload()
    assert {tag: read.Scalars(tag)[0].value for tag in read.Tags()["scalars"]} == pytest.approx(expected)


def test_what_is_no_place_for_figures_is_refused_and_what_breaks_stops_nobody(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="neither HOST:PORT"):
        sinks_of(["9464"], lambda: 0.0)
    metrics = Metrics(sinks_of([str(tmp_path / "none" / "m.jsonl")], lambda: 0.0))
    for event in told():
        metrics(event)
    metrics.close()


@pytest.mark.parametrize("library", TRACKERS)
def test_a_tracker_takes_figures_without_a_network(
    library: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Not imported before it is told where to write.
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"pip install {library}")
    monkeypatch.chdir(tmp_path)
    for name, value in {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "TRACKIO_DIR": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    metrics = Metrics(sinks_of([f"{library}:verses"], lambda: 5.0))
    for event in told():
        metrics(event)
    # A sink that failed would be gone by now.
    assert len(metrics._sinks) == 1
    metrics.close()
    # A process of the library's own writes the file, and on a busy machine is not done when the library is.
    until = time.monotonic() + 60
    while not all(word in written_in(tmp_path) for word in (b"verses", b"heldout_bits_per_byte")):
        assert time.monotonic() < until, sorted((path.name, path.stat().st_size) for path in tmp_path.rglob("*"))
        time.sleep(0.05)


def written_in(folder: Path) -> bytes:
    """All names and contents of files in a folder, which others may change meanwhile."""
    found = []
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):
            found.append(bytes(path) + (path.read_bytes() if path.is_file() else b""))
    return b"".join(found)
