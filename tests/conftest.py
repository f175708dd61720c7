"""Settings for all tests."""

import gc
import os

import pytest
from hypothesis import settings

from clipless_dp.presets import named
from clipless_dp.sampling import draws

# A loaded machine must not fail a property; continuous integration must not fail by luck.
settings.register_profile("unhurried", deadline=None, derandomize=bool(os.environ.get("CI")))
settings.load_profile("unhurried")


def pytest_make_parametrize_id(val):
    """Names of functions in place of their addresses: processes that share the tests must call them the same."""
    return getattr(val, "__name__", None) if callable(val) else None


@pytest.hookimpl(trylast=True)
def pytest_collection_finish():
    """Modules and the tests themselves live to the end: no garbage collection need look at a million objects again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def no_draw_in_hand():
    """A draw that one test has left is not in the hands of the next."""
    draws.skip()
    draws._in_hand.clear()


@pytest.fixture(scope="session", autouse=True)
def few_synthetic_images():
    """What presets draw takes a minute or two; tests need some features only."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(named, "_SYNTHETIC", 60)
        yield


@pytest.fixture(scope="session")
def ranks():
    """Two processes that form a process group: starting them takes seconds, so all tests share them."""
    from .ranks import Ranks

    with Ranks() as both:
        yield both
