from __future__ import annotations

import itertools

import pytest
import torch
from torch.nn import functional

from clipless_dp import ConfigurationError, InputError
from clipless_dp.features import MirroredScattering, Scattering2d, scattering

SHAPES = (
    ((8, 10), 2, 4, "zeros"),
    ((7, 9), 1, 3, "zeros"),
    ((9, 6), 1, 2, "reflect"),
    ((5, 4), 3, 2, "zeros"),
)


def norm(values: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(values))


def kernel(transform: Scattering2d, axis: str, level: int = 0) -> torch.Tensor:
    """The average's kernel along an axis: a row of its matrix is the kernel read backwards from a position."""
    return getattr(transform, f"{axis}_{level}")[0].double().flip(0).roll(1 + (1 << (transform.scales - level)))


def sums(transform: Scattering2d) -> list[float]:
    """Largest value of the Littlewood-Paley sum on each grid."""
    largest = []
    for level in range(transform.scales):
        rows, columns = (torch.fft.fft(kernel(transform, name, level)).abs() for name in ("rows", "columns"))
        bands = getattr(transform, f"wavelets_{level}").double()
        largest.append(float(scattering.littlewood_paley((rows, columns), bands).max()))
    return largest


def ascended(transform: Scattering2d, images: torch.Tensor, difference: torch.Tensor) -> float:
    """The largest stretch of a difference of two images that gradient ascent finds."""
    for _ in range(4):
        difference = difference.detach().requires_grad_()
        stretch = (transform(images + difference) - transform(images)).norm() / difference.norm()
        (slope,) = torch.autograd.grad(stretch, difference)
        difference = difference + 0.3 * difference.norm() * slope / slope.norm()
    return float(stretch.detach())


@pytest.mark.parametrize(("size", "scales", "angles", "padding"), SHAPES)
def test_no_pair_of_images_is_moved_apart_by_more_than_the_constant(size, scales, angles, padding):
    transform = Scattering2d(size, scales, angles, padding)
    torch.manual_seed(0)
    image = torch.rand(1, 2, *size, dtype=torch.float64)
    bright = torch.zeros_like(image)
    bright[..., 0, 0] = 1.0
    near_a_corner = torch.zeros_like(image)
    near_a_corner[..., 1, 1] = 1.0
    differences = {
        "constant": torch.ones_like(image),
        "corner": bright,
        "near a corner": near_a_corner,
        "noise": torch.randn_like(image),
        "stripes": torch.cos(0.75 * torch.pi * torch.arange(size[1], dtype=torch.float64)).expand_as(image),
    }
    for start in (torch.zeros_like(image), 1e3 * image):
        for name, difference in differences.items():
            moved = transform(start + difference) - transform(start)
            # Differences of numbers a thousand times larger keep 13 of their digits.
            assert norm(moved) <= transform.lipschitz * norm(difference) * (1 + 1e-9), name
    assert ascended(transform, torch.zeros_like(image), differences["constant"]) <= transform.lipschitz


@pytest.mark.parametrize(("size", "scales", "angles", "padding"), SHAPES)
def test_the_littlewood_paley_sum_is_at_most_one_on_every_grid_and_attains_it(size, scales, angles, padding):
    largest = max(sums(Scattering2d(size, scales, angles, padding)))
    assert largest <= 1.0
    assert largest > 1.0 - 1e-4, "the normalisation wastes something"


def test_no_pixel_enters_the_padded_image_more_often_than_the_constant_says_and_one_as_often():
    transform = Scattering2d((9, 6), 1, 1, "reflect")
    pixels = torch.eye(54, dtype=torch.float64).reshape(54, 1, 9, 6)
    entered = functional.pad(pixels, transform._frame, mode="reflect").flatten(1).sum(1)
    assert float(entered.max()) == pytest.approx(transform.lipschitz**2)
    assert transform.lipschitz > 1.0


def test_the_littlewood_paley_sum_bounds_what_the_filters_do_to_real_images():
    generator = torch.Generator().manual_seed(0)
    rows, columns = (torch.rand(n, generator=generator, dtype=torch.float64) for n in (6, 8))
    rows, columns = ((v + v.flip(0).roll(1)) / 2 for v in (rows, columns))
    bands = torch.rand(3, 6, 8, generator=generator, dtype=torch.float64)
    bound = float(scattering.littlewood_paley((rows, columns), bands).max())
    best = 0.0
    for down, right, phase in itertools.product(range(6), range(8), (0.0, 0.7)):
        grid = 2 * torch.pi * (torch.arange(6)[:, None] * down / 6 + torch.arange(8) * right / 8)
        image = torch.cos(grid.double() + phase)
        spectra = torch.fft.fft2(image) * torch.cat([torch.outer(rows, columns)[None], bands])
        best = max(best, norm(torch.view_as_real(torch.fft.ifft2(spectra))) ** 2 / norm(image) ** 2)
    # Every real wave is either an eigenvector of the sum, or a pair of frequencies with equal values.
    assert best == pytest.approx(bound, rel=1e-9)


@pytest.mark.parametrize(("size", "scales", "angles"), [((12, 9), 1, 3), ((16, 12), 2, 3), ((17, 24), 3, 2)])
def test_the_coefficients_are_those_of_the_definition(size, scales, angles):
    transform = Scattering2d(size, scales, angles)
    step = 1 << scales
    torch.manual_seed(1)
    image = torch.rand(size, dtype=torch.float64)
    padded = torch.zeros([step * (-(-n // step) + 2) for n in size], dtype=torch.float64)
    padded[step : step + size[0], step : step + size[1]] = image
    average = torch.outer(*(torch.fft.fft(kernel(transform, axis)) for axis in ("rows", "columns")))

    def convolved(pixels, spectrum):
        return torch.fft.ifft2(torch.fft.fft2(pixels) * spectrum)

    def smoothed(pixels):
        return convolved(pixels, average).real[step::step, step::step][: -(-size[0] // step), : -(-size[1] // step)]

    bands = transform.wavelets_0.double()
    first = [(scale, convolved(padded, band).abs()) for scale in range(scales) for band in bands[scale]]
    second = []
    for coarse in range(scales):
        second += [
            ((fine, position, coarse), convolved(pixels, band).abs())
            for position, (fine, pixels) in enumerate(first)
            if fine < coarse
            for band in bands[coarse]
        ]
    second.sort(key=lambda entry: (entry[0][0], entry[0][2], entry[0][1]))
    expected = torch.stack([smoothed(pixels) for pixels in [padded, *(p for _, p in first), *(p for _, p in second)]])
    actual = transform(image[None, None])[0]
    assert actual.shape == expected.shape == (transform.coefficients, *transform.output_size)
    # What is sampled as coarsely as its scale aliases a little; order 0 and finest order 1 are not sampled at all.
    torch.testing.assert_close(actual[: 1 + angles], expected[: 1 + angles], rtol=1e-5, atol=1e-6)
    assert norm(actual - expected) < 0.06 * norm(expected)
    for index in range(1 + angles, transform.coefficients):
        nearest = min(range(1, transform.coefficients), key=lambda k: norm(actual[index] - expected[k]))
        assert nearest == index


@pytest.mark.parametrize(("scales", "angles", "padding"), [(1, 4, "zeros"), (2, 8, "reflect"), (3, 2, "zeros")])
def test_a_mirror_image_has_mirrored_features_up_to_aliasing(scales, angles, padding):
    transform = Scattering2d((16, 32), scales, angles, padding)
    images = torch.rand(2, 3, 16, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    features, turned = transform(images.flip(-1)), transform.mirrored(transform(images))
    difference = (features - turned).reshape(2, 3, transform.coefficients, -1).flatten(3)
    # Order 0 and the finest of order 1 are sampled once, with the average.
    assert norm(difference[:, :, : 1 + angles]) < 1e-6 * norm(features)
    assert norm(difference) < 0.02 * norm(features)
    assert norm(features - transform(images)) > 0.05 * norm(features), "images are not far from their mirror images"
    with pytest.raises(InputError, match="expected features"):
        transform.mirrored(features[:, 1:])


def test_each_sample_and_channel_is_transformed_by_itself_on_any_dtype():
    transform = Scattering2d((12, 16), scales=2, angles=4)
    images = torch.rand(3, 2, 12, 16, generator=torch.Generator().manual_seed(0))
    whole = transform(images)
    assert whole.shape == (3, 2 * transform.coefficients, 3, 4)
    alone = torch.cat([transform(images[i : i + 1, c : c + 1]) for i in range(3) for c in range(2)])
    torch.testing.assert_close(whole.reshape(alone.shape), alone, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(transform(images.double()).float(), whole, rtol=1e-4, atol=1e-6)
    assert transform(images[:0]).shape == (0, 2 * transform.coefficients, 3, 4)


def test_a_small_shift_moves_the_coefficients_less_than_the_image():
    transform = Scattering2d((32, 32), scales=2, angles=4)
    image = functional.pad(torch.rand(1, 1, 16, 16, generator=torch.Generator().manual_seed(0)), (8, 8, 8, 8))
    shifted = image.roll(1, 3)
    moved = norm(transform(image) - transform(shifted)) / norm(transform(image))
    assert moved < 0.5 * norm(image - shifted) / norm(image)


def test_it_has_nothing_to_train_and_nothing_to_save():
    transform = Scattering2d((8, 8))
    assert not list(transform.parameters())
    assert not transform.state_dict()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image_size": (0, 8)}, "positive"),
        ({"image_size": (8, 8), "scales": 0}, "positive"),
        ({"image_size": (8, 8), "angles": 0}, "positive"),
        ({"image_size": (8, 8), "padding": "circular"}, "padding"),
        ({"image_size": (4, 32), "padding": "reflect"}, "too small"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments, message):
    with pytest.raises(ConfigurationError, match=message):
        Scattering2d(**arguments)


@pytest.mark.parametrize(
    "images", [torch.zeros(1, 1, 8, 9), torch.zeros(8, 8), torch.zeros(1, 1, 8, 8, dtype=torch.uint8)]
)
def test_images_that_do_not_fit_are_refused(images):
    with pytest.raises(InputError, match="8, 8"):
        Scattering2d((8, 8))(images)


def test_filters_without_normalisation_are_caught(monkeypatch):
    honest = scattering.littlewood_paley
    monkeypatch.setattr(scattering, "littlewood_paley", lambda *filters: honest(*filters) / 1.01)
    transform = Scattering2d((8, 10), 2, 4)
    monkeypatch.undo()
    assert max(sums(transform)) > 1.0


def test_copies_that_are_not_counted_are_caught(monkeypatch):
    monkeypatch.setattr(Scattering2d, "_copies", lambda self, size: 1)
    with pytest.raises(AssertionError):
        test_no_pixel_enters_the_padded_image_more_often_than_the_constant_says_and_one_as_often()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_images_of_half_precision_are_refused_with_what_to_do(dtype):
    for module in (Scattering2d((8, 8)), MirroredScattering((8, 8))):
        with pytest.raises(InputError, match=r"no Fourier transform: hand in images\.float\(\)"):
            module(torch.rand(2, 3, 8, 8).to(dtype))
