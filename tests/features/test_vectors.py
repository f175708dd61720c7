from __future__ import annotations

import math

import pytest
import torch

from clipless_dp import ConfigurationError, InputError
from clipless_dp.features import (
    FrozenFeatures,
    GroupedScattering,
    MirroredScattering,
    NaturalStandardisation,
    OpponentColours,
    Scattering2d,
    frozen,
)


def pink(count: int, size: tuple[int, int], seed: int) -> torch.Tensor:
    noise = torch.randn(count, 1, *size, generator=torch.Generator().manual_seed(seed))
    frequencies = torch.hypot(torch.fft.fftfreq(size[0])[:, None], torch.fft.fftfreq(size[1]))
    images = torch.fft.ifft2(torch.fft.fft2(noise) / frequencies.clamp(min=1 / max(size))).real
    return 0.5 + 0.25 * images / images.std()


@pytest.mark.parametrize("offset", [None, 0.01])
def test_coefficients_of_other_images_of_that_spectrum_have_mean_zero_and_deviation_one(offset):
    transform = Scattering2d((16, 24), angles=4, padding="reflect")
    standardise = NaturalStandardisation(transform, offset=offset)
    features = standardise(transform(pink(200, (16, 24), seed=9).expand(-1, 2, -1, -1)))
    assert features.shape == (200, 2 * transform.coefficients, 4, 6)
    deviations, means = torch.std_mean(features, dim=(0, 2, 3))
    # 200 images of 24 places, a few of which are independent: errors of a few hundredths.
    assert float(means.abs().max()) < 0.2
    assert float((deviations - 1).abs().max()) < 0.2
    raw = transform(pink(200, (16, 24), seed=9)).std(dim=(0, 2, 3))
    assert float(raw.max() / raw.min()) > 20, "there was little to standardise"


def test_standardisation_is_the_same_each_time_and_refuses_what_it_does_not_fit():
    transform = Scattering2d((8, 8), 1, 2)
    first, second = NaturalStandardisation(transform, images=4), NaturalStandardisation(transform, images=4)
    assert torch.equal(first.means, second.means)
    assert torch.equal(first.deviations, second.deviations)
    with pytest.raises(ConfigurationError, match="at least 2"):
        NaturalStandardisation(transform, images=1)
    for offset in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ConfigurationError, match="offset must be a positive number"):
            NaturalStandardisation(transform, offset=offset)
    with pytest.raises(InputError, match="expected features"):
        first(torch.zeros(1, 4, 4, 4))


def test_with_an_offset_contrast_moves_all_logarithms_of_moduli_alike_and_brightness_none():
    transform = Scattering2d((16, 16), padding="reflect")
    standardise = NaturalStandardisation(transform, offset=1e-6)
    images = pink(4, (16, 16), seed=2)
    features = standardise(transform(images))
    moved = standardise(transform(0.5 * images + 0.3)) - features
    expected = math.log(0.5) / standardise.deviations[1:]
    torch.testing.assert_close(moved[:, 1:], expected.expand(4, -1, 4, 4), atol=0.02, rtol=0)
    # The average of order 0 stays as it is: no logarithm.
    average = transform(images)[:, :1]
    torch.testing.assert_close(features[:, :1] * standardise.deviations[0] + standardise.means[0], average)


def test_opponent_colours_follow_the_formula_and_leave_other_images_alone():
    images = torch.rand(5, 3, 4, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    red, green, blue = images.unbind(1)
    expected = torch.stack(
        [
            (red + green + blue) / 3,
            0.5 + 2.0 * (red - blue) / math.sqrt(2),
            0.5 + 2.0 * (red - 2 * green + blue) / math.sqrt(6),
        ],
        1,
    )
    torch.testing.assert_close(OpponentColours(2.0)(images), expected, atol=1e-6, rtol=0)
    for channels in (1, 2, 4):
        other = torch.rand(2, channels, 4, 4)
        assert OpponentColours()(other) is other


def test_of_grey_photographs_the_colour_part_of_a_vector_tells_nothing():
    front = MirroredScattering((16, 16))
    grey = pink(6, (16, 16), seed=4)
    vectors = front(grey.expand(-1, 3, -1, -1)).unflatten(1, (3, -1))
    colour = torch.nn.functional.normalize(vectors[:, 1:].flatten(1))
    torch.testing.assert_close(colour, colour[:1].expand_as(colour), atol=1e-4, rtol=0)
    lightness = torch.nn.functional.normalize(vectors[:, 0])
    assert float((lightness - lightness.roll(1, 0)).norm(dim=1).min()) > 0.1
    # It is what the image has without colours.
    torch.testing.assert_close(lightness, front(grey), atol=1e-4, rtol=0)


def test_colour_differences_weigh_double_in_averages_and_half_in_moduli():
    front = MirroredScattering((16, 16))
    colours, transform, standardise = front
    images = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(5))
    plain = standardise(transform(colours(images)))
    both = (plain + transform.mirrored(plain))[..., :2].unflatten(1, (3, 81))
    vectors = front(images).unflatten(1, (3, 81, 4, 2))
    ratios = vectors / both
    for channel, coefficients, weight in ((1, slice(0, 1), 2.0), (1, slice(1, 81), 0.5), (2, slice(0, 1), 2.0)):
        ratio = ratios[:, channel, coefficients] / ratios[:, 0, :1]
        torch.testing.assert_close(ratio, torch.full_like(ratio, weight), atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    ("front", "channels", "width"), [(GroupedScattering, 1, 81 * 9), (MirroredScattering, 3, 243 * 6)]
)
def test_vectors_have_unit_norm_and_see_each_sample_by_itself(front, channels, width, monkeypatch):
    # As if it were another's module: those that mix samples are refused.
    monkeypatch.setattr(frozen, "_is_known", lambda module: False)
    images = torch.rand(6, channels, 12, 12, generator=torch.Generator().manual_seed(0))
    features = FrozenFeatures(front((12, 12)), batch_size=4).compute(images)
    assert features.shape == (6, width)
    torch.testing.assert_close(features.norm(dim=1), torch.ones(6))


def test_an_image_and_its_mirror_image_have_nearly_one_vector():
    front, images = MirroredScattering((16, 16)), pink(8, (16, 16), seed=1)
    vectors = front(images)
    apart = (vectors - front(images.flip(-1))).norm(dim=1)
    others = (vectors - vectors.roll(1, 0)).norm(dim=1)
    assert float(apart.max()) < 0.1 * float(others.min()), "only aliasing tells them apart"
    with pytest.raises(ConfigurationError, match="multiple of 4"):
        MirroredScattering((16, 18))


def test_more_scales_make_more_coefficients_at_fewer_places_and_need_as_even_a_width():
    images = pink(4, (20, 24), seed=6).expand(-1, 3, -1, -1)
    front = MirroredScattering((20, 24), 3)
    vectors = front(images)
    assert vectors.shape == (4, 3 * 217 * 3 * 2)
    assert float((vectors - front(images.flip(-1))).norm(dim=1).max()) < 0.2
    with pytest.raises(ConfigurationError, match="multiple of 8"):
        MirroredScattering((20, 28), 3)
    with pytest.raises(ConfigurationError, match="too small"):
        MirroredScattering((8, 8), 3)
