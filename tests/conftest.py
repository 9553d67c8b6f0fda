"""Settings of all tests."""

import pytest
from hypothesis import settings

# A busy machine must not fail an example for being slow, and what fails here must fail there: pytest-timeout bounds the
# first, a fixed seed gives the second.
settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.load_profile("repeatable")


def pytest_addoption(parser: pytest.Parser) -> None:
    text = "write the scenarios in tests/scenarios anew instead of comparing with them"
    parser.addoption("--regenerate-scenarios", action="store_true", help=text)
