from __future__ import annotations

import pytest
import torch

from clipless_dp import ConfigurationError, InputError
from clipless_dp.features import (
    FrozenFeatures,
    GroupedScattering,
    MirroredScattering,
    NaturalStandardisation,
    Scattering2d,
)


def pink(count: int, size: tuple[int, int], seed: int) -> torch.Tensor:
    noise = torch.randn(count, 1, *size, generator=torch.Generator().manual_seed(seed))
    frequencies = torch.hypot(torch.fft.fftfreq(size[0])[:, None], torch.fft.fftfreq(size[1]))
    images = torch.fft.ifft2(torch.fft.fft2(noise) / frequencies.clamp(min=1 / max(size))).real
    return 0.5 + 0.25 * images / images.std()


def test_coefficients_of_other_images_of_that_spectrum_have_mean_zero_and_deviation_one():
    transform = Scattering2d((16, 24), angles=4, padding="reflect")
    standardise = NaturalStandardisation(transform)
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
    with pytest.raises(InputError, match="expected features"):
        first(torch.zeros(1, 4, 4, 4))


@pytest.mark.parametrize(
    ("front", "channels", "width"), [(GroupedScattering, 1, 81 * 9), (MirroredScattering, 3, 243 * 6)]
)
def test_vectors_have_unit_norm_and_see_each_sample_by_itself(front, channels, width):
    images = torch.rand(6, channels, 12, 12, generator=torch.Generator().manual_seed(0))
    # FrozenFeatures refuses modules that mix samples.
    features = FrozenFeatures(front((12, 12))).compute(images)
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
