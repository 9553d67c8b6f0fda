"""Licence expressions."""

from __future__ import annotations

import pytest

from p2ptrain.config.manifest import DataConfig
from p2ptrain.data.licence import check_licence
from p2ptrain.errors import DataError


@pytest.mark.parametrize(
    "expression",
    ["CC-BY-4.0", "LicenseRef-my.own-1", "MIT OR Apache-2.0", "CC0-1.0 AND LicenseRef-x", DataConfig().license],
)
def test_identifiers_and_their_combinations_are_accepted(expression: str) -> None:
    check_licence(expression)


@pytest.mark.parametrize("expression", ["", "free", "MIT OR", "LicenseRef-", "MIT, BSD", "LicenseRef-a b", "MIT\n"])
def test_anything_else_is_refused_with_a_way_out(expression: str) -> None:
    with pytest.raises(DataError) as refusal:
        check_licence(expression)
    assert "LicenseRef-NAME" in refusal.value.hint


def test_a_misspelt_identifier_is_recognised() -> None:
    with pytest.raises(DataError) as refusal:
        check_licence("cc-by-sa-4")
    assert "did you mean CC-BY-SA-4.0?" in refusal.value.hint
