"""Rates and amounts as people write them, and what is said of those that are none."""

from __future__ import annotations

from pathlib import Path

import pytest

from p2ptrain.config.amounts import format_amount, format_rate, parse_amount, parse_rate
from p2ptrain.config.node import resolve_settings
from p2ptrain.errors import UsageError


@pytest.mark.parametrize(
    ("text", "bytes_per_second"),
    [
        ("1Mbit", 125e3),
        ("500kbit", 62.5e3),
        ("500 kbit/s", 62.5e3),
        ("2MB", 2e6),
        ("1.5MiB/s", 1.5 * 2**20),
        ("80000bit", 1e4),
        ("", 0),
        ("0", 0),
    ],
)
def test_rates(text: str, bytes_per_second: float) -> None:
    assert parse_rate(text) == bytes_per_second


@pytest.mark.parametrize("text", ["1", "fast", "1Mbps", "-1Mbit", "1e9bit", "1M", "Mbit", "10kbit", "7kB"])
def test_what_is_no_rate_or_too_low_is_said(text: str) -> None:
    with pytest.raises(ValueError, match=r"1Mbit|64kbit"):
        parse_rate(text)


def test_amounts() -> None:
    assert parse_amount("200GB") == 200 * 10**9 and parse_amount("1TiB") == 2**40 and parse_amount("0") == 0
    for text in ("200Gbit", "200GB/s", "0GB", "lots", "200"):
        with pytest.raises(ValueError, match="200GB"):
            parse_amount(text)
    assert (format_amount(2e11), format_rate(125e3), format_rate(8e3)) == ("200 GB", "1 Mbit/s", "64 kbit/s")


def test_settings_take_them_from_every_place_and_name_the_place_of_a_wrong_one(tmp_path: Path) -> None:
    (tmp_path / "node.toml").write_text('upload_limit = "1Mbit"\nmonthly_transfer = "200GB"')
    settings = resolve_settings(tmp_path, {"download_limit": "2MB"}, {"P2PTRAIN_UPLOAD_LIMIT": "500kbit"})
    assert (settings.upload_limit, settings.download_limit, settings.monthly_transfer) == ("500kbit", "2MB", "200GB")
    for flags, environment, named in (
        ({"upload_limit": "fast"}, {}, "--upload-limit"),
        ({}, {"P2PTRAIN_DOWNLOAD_LIMIT": "1"}, "P2PTRAIN_DOWNLOAD_LIMIT"),
    ):
        with pytest.raises(UsageError, match=named) as error:
            resolve_settings(tmp_path, flags, environment)
        assert "1Mbit" in str(error.value)
