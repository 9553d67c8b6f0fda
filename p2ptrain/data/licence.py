"""Which licence expressions a run may state for its text.

A short list of what texts and data sets are commonly under, rather than all 600 SPDX identifiers: a wrong identifier is
caught, and what is not listed is stated as `LicenseRef-NAME`.
"""

from __future__ import annotations

import difflib
import re

from p2ptrain.errors import DataError

# Identifiers of the SPDX list 3.25.
_CREATIVE_COMMONS = frozenset(
    f"CC-BY{terms}-{version}"
    for terms in ("", "-SA", "-NC", "-ND", "-NC-SA", "-NC-ND")
    for version in ("1.0", "2.0", "2.5", "3.0", "4.0")
)
KNOWN = _CREATIVE_COMMONS | {
    "0BSD",
    "AGPL-3.0-only",
    "AGPL-3.0-or-later",
    "Apache-2.0",
    "Artistic-2.0",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "BSL-1.0",
    "C-UDA-1.0",
    "CC-PDDC",
    "CC0-1.0",
    "CDLA-Permissive-1.0",
    "CDLA-Permissive-2.0",
    "CDLA-Sharing-1.0",
    "EUPL-1.2",
    "GFDL-1.2-or-later",
    "GFDL-1.3-only",
    "GFDL-1.3-or-later",
    "GPL-2.0-only",
    "GPL-2.0-or-later",
    "GPL-3.0-only",
    "GPL-3.0-or-later",
    "ISC",
    "LGPL-2.1-only",
    "LGPL-2.1-or-later",
    "LGPL-3.0-only",
    "LGPL-3.0-or-later",
    "MIT",
    "MIT-0",
    "MPL-2.0",
    "ODC-By-1.0",
    "ODbL-1.0",
    "OGL-UK-3.0",
    "PDDL-1.0",
    "PSF-2.0",
    "Unlicense",
    "Zlib",
}
_BY_LOWER_CASE = {identifier.lower(): identifier for identifier in KNOWN}


def check_licence(expression: str) -> None:
    """Accept an SPDX identifier, a `LicenseRef-NAME`, or such joined by AND / OR.

    Raises:
        DataError: anything else; the hint names the identifier that it resembles.
    """
    for term in re.split(r" +(?:AND|OR) +", expression):
        if term in KNOWN or re.fullmatch(r"LicenseRef-[A-Za-z0-9.-]+", term):
            continue
        near = difflib.get_close_matches(term.lower(), _BY_LOWER_CASE, 1, 0.7)
        suggestion = f"did you mean {_BY_LOWER_CASE[near[0]]}? Otherwise " if near else ""
        raise DataError(
            f"{term!r} is no licence identifier known here",
            hint=f"{suggestion}use an SPDX identifier such as CC-BY-4.0, or LicenseRef-NAME for anything else",
        )


def objections(expression: str, *, commercial: bool) -> list[str]:
    """What of a licence speaks against training on the text, or against what is done with the model; [] if nothing.

    Of licences joined by OR the kindest counts, of those joined by AND all do.

    Args:
        commercial: whether the model is meant for commercial use.
    """
    choices = [
        [found for term in re.split(r" +AND +", choice) for found in _objections(term, commercial)]
        for choice in re.split(r" +OR +", expression)
    ]
    return min(choices, key=len)


def _objections(term: str, commercial: bool) -> list[str]:
    found = []
    if commercial and "-NC" in term:
        found.append(f"{term} allows no commercial use")
    if "-ND" in term:
        found.append(f"{term} allows no changed versions to be shared, and a model may be held to be one")
    return found
