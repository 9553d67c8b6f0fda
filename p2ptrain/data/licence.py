"""Which licence expressions a run may state for its text.

A short list of what texts and data sets are commonly under, rather than all 600 SPDX identifiers: a wrong identifier is
caught, and what is not listed is stated as `LicenseRef-NAME`.
"""

from __future__ import annotations

import difflib
import re

from p2ptrain.errors import DataError

# Identifiers of the SPDX list 3.25.
KNOWN = frozenset(
    {
        "0BSD",
        "Apache-2.0",
        "BSD-2-Clause",
        "BSD-3-Clause",
        "CC-BY-2.0",
        "CC-BY-3.0",
        "CC-BY-4.0",
        "CC-BY-NC-4.0",
        "CC-BY-NC-ND-4.0",
        "CC-BY-NC-SA-4.0",
        "CC-BY-ND-4.0",
        "CC-BY-SA-3.0",
        "CC-BY-SA-4.0",
        "CC-PDDC",
        "CC0-1.0",
        "CDLA-Permissive-2.0",
        "GFDL-1.3-or-later",
        "GPL-2.0-only",
        "GPL-2.0-or-later",
        "GPL-3.0-only",
        "GPL-3.0-or-later",
        "ISC",
        "LGPL-3.0-only",
        "LGPL-3.0-or-later",
        "MIT",
        "MPL-2.0",
        "ODbL-1.0",
        "ODC-By-1.0",
        "PDDL-1.0",
        "Unlicense",
    }
)
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
