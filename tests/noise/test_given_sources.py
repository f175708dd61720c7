"""Sources of a user's own: what they fill is used, and one that does not fill is refused when it is given."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from accounting import create_accountant
from clipless_dp import ConfigurationError, ReproducibleNoise
from clipless_dp.noise import noise_source
from clipless_dp.statistics import private_moments


class Source:
    reproducible = False

    def begin_step(self, step):
        pass


class ReturnsNothing(Source):
    def standard_normal_(self, out):
        out.fill_(1.0)


class ReturnsAnother(Source):
    def standard_normal_(self, out):
        out.fill_(1.0)
        return torch.zeros(3)


class DoesNotFill(Source):
    def standard_normal_(self, out):
        return torch.randn(out.shape)


class FillsSome(Source):
    def standard_normal_(self, out):
        return out[:2].normal_()


class IsNoFunction(Source):
    standard_normal_ = 3


class TakesNothing(Source):
    def standard_normal_(self):
        pass


class DrawsElsewhere(Source):
    def standard_normal_(self, out):
        if out.device.type == "cpu":
            raise RuntimeError("the generator is on another device")


def moments(source, values):
    accountant = create_accountant("rdp")
    try:
        return private_moments(values, norm=1.0, noise_multiplier=5.0, accountant=accountant, noise=source).mean
    finally:
        assert len(accountant) == (not isinstance(source, (DoesNotFill, FillsSome, IsNoFunction, TakesNothing)))


@pytest.mark.parametrize("source", [ReturnsNothing(), ReturnsAnother()], ids=lambda source: type(source).__name__)
@pytest.mark.parametrize("columns", [3, 100_000])
def test_what_a_source_fills_is_the_noise_whatever_it_returns(source, columns):
    mean = moments(source, torch.zeros(2, columns))
    # Two records of norm 0, and one deviation of the noise; the margin is a millionth.
    torch.testing.assert_close(mean, torch.full_like(mean, 5.0 * 2.0**0.5 / 2.0), rtol=2e-6, atol=0.0)


@pytest.mark.parametrize("kind", [DoesNotFill, FillsSome, IsNoFunction, TakesNothing])
def test_a_source_that_does_not_fill_what_it_is_given_is_refused_before_anything_is_charged(kind):
    with pytest.raises(ConfigurationError, match=r"noise|fill"):
        moments(kind(), torch.zeros(2, 3))


def test_a_source_that_draws_on_another_device_only_is_taken():
    source = DrawsElsewhere()
    assert noise_source(source) is source


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda source: pickle.loads(pickle.dumps(source))])
def test_a_reproducible_source_that_was_used_is_copied_to_the_start_of_its_step(copied):
    source = ReproducibleNoise(3)
    source.begin_step(7)
    first = source.standard_normal_(torch.empty(5)).clone()
    assert torch.equal(copied(source).standard_normal_(torch.empty(5)), first)
