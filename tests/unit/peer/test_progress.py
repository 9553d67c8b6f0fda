"""What a person, or a program, sees of a peer at work."""

from __future__ import annotations

import dataclasses
import io
import json
import re
import sys
import threading

from p2ptrain.observe.evaluations import Evaluation, summary_of
from p2ptrain.observe.status import Standing, Status
from p2ptrain.peer.progress import Display, lines_of

STATUS = Status(
    state="training",
    round=12_345,
    members=16,
    loss=5.12345,
    bits_per_byte=1.7,
    tokens_per_second=12_345.6,
    bytes_sent_per_round=34_000,
    bytes_received_per_round=12_345_678,
    computing_seconds=61.5,
    waiting_seconds=10.25,
)


def test_a_round_fits_a_terminal_of_80_columns() -> None:
    assert all(len(line) < 80 for line in lines_of(STATUS))


EVALUATION = Evaluation(
    time=1.0,
    round=12_300,
    state_id="ab" * 32,
    by="12D3KooWAiWJcQBmoxF34YQZyYJqgY4F5SR9QeNq7j1YfvPq24Hg",
    figures={"bits_per_byte": 1.43, "perplexity": 45.1},
    tokens=16_384,
)


def test_what_was_measured_stands_beside_the_train_loss_with_whose_word_it_is() -> None:
    summary = summary_of([EVALUATION])
    lines = lines_of(dataclasses.replace(STATUS, evaluation=summary))
    assert lines[:2] == lines_of(STATUS) and len(lines[2]) < 80
    assert lines[2] == "held-out 1.430 bits/byte at round 12300 by fvPq24Hg"


def test_what_was_measured_is_a_line_of_its_own_in_the_log() -> None:
    text, json_lines = io.StringIO(), io.StringIO()
    Display(stream=text).evaluated(EVALUATION)
    Display(log_format="json", stream=json_lines).evaluated(EVALUATION)
    said = "fvPq24Hg says of round 12300: held-out 1.430 bits/byte, perplexity 45.1 on 16,384 tokens"
    assert re.fullmatch(rf"\d\d:\d\d:\d\d {re.escape(said)}\n", text.getvalue())
    entry = json.loads(json_lines.getvalue())
    assert entry["message"] == said and entry["evaluation"] == EVALUATION.as_json() and "round" not in entry


def test_off_a_terminal_a_round_is_one_plain_line_with_the_time() -> None:
    out = io.StringIO()
    Display(stream=out).round(STATUS)
    time, _, line = out.getvalue().partition(" ")
    assert re.fullmatch(r"\d\d:\d\d:\d\d", time) and line == "  ".join(lines_of(STATUS)) + "\n"
    assert "train loss 5.123 (1.700 bits/byte)" in out.getvalue()


def test_rounds_of_one_second_are_one_line_but_the_last_is_always_said() -> None:
    out = io.StringIO()
    display = Display(stream=out)
    for _ in range(3):
        display.round(STATUS)
    display.round(STATUS, last=True)
    assert out.getvalue().count("\n") == 2


def test_for_programs_each_line_is_an_object() -> None:
    out = io.StringIO()
    display = Display(log_format="json", stream=out)
    display.round(STATUS)
    display.say("hello")
    display.transfer("snapshot", 10, 10)
    first, second, third = map(json.loads, out.getvalue().splitlines())
    assert (first["round"], first["train_loss"], first["members"]) == (12_345, 5.12345, 16)
    assert second["message"] == "hello"
    assert third["message"] == "fetching snapshot: 10 of 10 bytes"


def test_quiet_is_quiet() -> None:
    out = io.StringIO()
    display = Display(quiet=True, stream=out)
    display.round(STATUS, last=True)
    display.transfer("data", 1, 1)
    display.say("hello")
    display.close()
    assert out.getvalue() == ""


class Terminal(io.StringIO):
    """A terminal, as far as a display can tell."""

    def isatty(self) -> bool:
        return True


def test_the_network_thread_may_show_transfers_while_the_trainers_shows_rounds() -> None:
    display, faults = Display(stream=Terminal()), []
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)

    def transfer() -> None:
        try:
            for done in range(60):
                display.transfer("snapshot", done, 100)
        except Exception as error:
            faults.append(error)

    network = threading.Thread(target=transfer)
    network.start()
    try:
        while network.is_alive():
            display.round(STATUS)
    finally:
        network.join()
        display.close()
        sys.setswitchinterval(before)
    assert faults == []


def test_a_status_says_what_the_network_thread_knows_and_keeps_the_last_group_when_the_run_is_over() -> None:
    status = Status()
    states = []
    for standing in (
        Standing(),
        Standing(syncing=True),
        Standing(member=True, members=1),
        Standing(member=True, members=3, bytes_sent_per_round=7, bytes_received_per_round=8),
    ):
        status.take(standing)
        states.append(status.state)
    assert states == ["joining", "syncing", "solo", "training"]
    assert (status.role, status.members) == ("member", 3)
    assert (status.bytes_sent_per_round, status.bytes_received_per_round) == (7, 8)
    status.finished = True
    status.take(Standing())
    assert (status.state, status.role, status.members) == ("finished", "member", 3)
    status.take(Standing(leaving=True))
    assert status.state == "leaving"
