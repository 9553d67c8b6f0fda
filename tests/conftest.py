"""Settings of all tests."""

from hypothesis import settings

# A busy machine must not fail an example for being slow, and what fails here must fail there: pytest-timeout bounds the
# first, a fixed seed gives the second.
settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.load_profile("repeatable")
