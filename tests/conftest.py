"""Settings for all tests."""

import os

from hypothesis import settings

# A loaded machine must not fail a property; continuous integration must not fail by luck.
settings.register_profile("unhurried", deadline=None, derandomize=bool(os.environ.get("CI")))
settings.load_profile("unhurried")
