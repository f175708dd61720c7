from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from clipless_dp import CheckpointError, ConfigurationError, DPLipModel, InputError, PrivacyError, losses
from clipless_dp.constraints import Spectral
from clipless_dp.features import FrozenFeatures, PatchDictionary, dead_leaves, frozen, patches
from clipless_dp.robustness import certify

SMALL = {"atoms": 12, "patch_size": 3, "images": 20}


def photographs(count: int, size: tuple[int, int], channels: int = 3) -> Tensor:
    return dead_leaves(count, size, channels, seed=77).float() / 255.0


def by_hand(images: Tensor, size: tuple[int, int], channels: int, *, atoms: int, patch_size: int, drawn: int) -> Tensor:
    """The formula of the class, patch by patch in float64, without a convolution and without filters."""
    height, width = size[0] - patch_size + 1, size[1] - patch_size + 1
    contrast, entries = 10 / 255, channels * patch_size**2

    def standardised(patches: Tensor) -> Tensor:
        rows = patches.flatten(1).double()
        rows = rows - rows.mean(1, keepdim=True)
        return rows / (rows.square().sum(1, keepdim=True) / (entries - 1) + contrast**2).sqrt()

    source = dead_leaves(drawn, size, channels).float() / 255.0
    generator = torch.Generator().manual_seed(0)
    number, down, right = (torch.randint(n, (25 * drawn,), generator=generator) for n in (drawn, height, width))
    patches = torch.stack(
        [
            source[n, :, y : y + patch_size, x : x + patch_size]
            for n, y, x in zip(number.tolist(), down.tolist(), right.tolist(), strict=True)
        ]
    )
    both = standardised(torch.cat([patches, patches.flip(-1)]))
    mean = both.mean(0)
    covariance = (both - mean).T @ (both - mean) / len(both)
    values, vectors = torch.linalg.eigh(covariance + 0.1 * torch.eye(entries, dtype=torch.float64))
    whitening = vectors @ torch.diag(values.rsqrt()) @ vectors.T
    candidates = (both[: len(patches)] - mean) @ whitening
    lengths = candidates.norm(dim=1)
    chosen = candidates[lengths > 0.5 * lengths.median()][: atoms // 2]
    dictionary = chosen / chosen.norm(dim=1, keepdim=True)

    def averages(image: Tensor) -> Tensor:
        sides = torch.zeros(2, atoms // 2, height, width, dtype=torch.float64)
        for y in range(height):
            for x in range(width):
                patch = image[None, :, y : y + patch_size, x : x + patch_size]
                z = (standardised(patch) - mean) @ whitening @ dictionary.T
                sides[0, :, y, x], sides[1, :, y, x] = (z - 0.6).clamp(min=0)[0], (-z - 0.6).clamp(min=0)[0]
        windows = torch.zeros(2, atoms // 2, 3, 3, dtype=torch.float64)
        for i in range(3):
            for j in range(3):
                rows = slice(i * height // 3, -(-(i + 1) * height // 3))
                columns = slice(j * width // 3, -(-(j + 1) * width // 3))
                windows[:, :, i, j] = sides[:, :, rows, columns].mean((2, 3))
        return windows

    return torch.stack([(averages(image) + averages(image.flip(-1))).sqrt().flatten() for image in images])


@pytest.mark.parametrize(("size", "channels"), [((8, 8), 3), ((9, 7), 1)])
def test_features_are_those_of_the_formula(size, channels):
    images = photographs(3, size, channels)
    expected = by_hand(images, size, channels, atoms=12, patch_size=3, drawn=20)
    features = PatchDictionary(size, channels, **SMALL)(images)
    assert float(expected.std()) > 0.1
    torch.testing.assert_close(features.double(), expected, rtol=0.0, atol=2e-3)
    torch.testing.assert_close(features.double().square(), expected.square(), rtol=1e-4, atol=1e-5)


@settings(max_examples=8)
@given(
    st.tuples(st.integers(7, 12), st.integers(7, 12)),
    st.sampled_from([1, 3]),
    st.integers(1, 4),
    st.integers(2, 4),
    st.integers(1, 3),
    st.integers(0, 3),
)
def test_each_shape_gets_its_features_and_its_mirror_image_the_same(size, channels, pairs, patch, windows, count):
    module = PatchDictionary(size, channels, atoms=2 * pairs, patch_size=patch, windows=windows, images=10, root=False)
    images = photographs(3, size, channels)[:count]
    features = module(images)
    assert features.shape == (count, 2 * pairs * windows**2)
    assert bool((features >= 0).all())
    torch.testing.assert_close(module(images.flip(-1)), features, rtol=1e-4, atol=1e-5)
    assert torch.equal(module(images), features)


def test_features_of_one_image_do_not_depend_on_the_others():
    module = PatchDictionary((10, 10), **SMALL)
    images = photographs(20, (10, 10))
    together = module(images)
    for index in (0, 7, 19):
        torch.testing.assert_close(module(images[index : index + 1])[0], together[index], rtol=1e-4, atol=1e-4)
        # Of one number of rows, to the last bit, whatever the others are.
        for stranger in (0.0, 1e4, -1e4, math.nan, math.inf):
            others = torch.full_like(images, stranger)
            others[index] = images[index]
            assert torch.equal(module(others)[index], together[index])


def test_what_computes_features_finds_nothing_that_mixes_samples(monkeypatch):
    # As if it were another's module: those that mix samples are refused.
    monkeypatch.setattr(frozen, "_is_known", lambda module: False)
    images = photographs(7, (10, 10))
    module = PatchDictionary((10, 10), **SMALL)
    torch.testing.assert_close(FrozenFeatures(module, batch_size=4).compute(images), module(images), atol=1e-4, rtol=0)


class ThresholdOfTheBatch(PatchDictionary):
    """A mutant: what is alike enough is decided by the batch."""

    def forward(self, images: Tensor) -> Tensor:
        features = super().forward(images)
        return (features - features.median(0).values).clamp(min=0)


class ContrastOfTheBatch(PatchDictionary):
    """A mutant: contrast is normalised by the whole batch's."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images / images.std())


@pytest.mark.parametrize("mutant", [ThresholdOfTheBatch, ContrastOfTheBatch])
def test_a_dictionary_that_looks_at_other_rows_of_the_batch_is_refused(mutant):
    with pytest.raises(PrivacyError, match="other company"):
        FrozenFeatures(mutant((10, 10), **SMALL), batch_size=4).compute(photographs(7, (10, 10)))


def test_the_same_seed_makes_the_same_dictionary_and_another_one_another():
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first = PatchDictionary((10, 10), **SMALL)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(4)
    again, other = PatchDictionary((10, 10), **SMALL), PatchDictionary((10, 10), **SMALL, seed=1)
    assert torch.equal(first.filters, again.filters)
    assert torch.equal(first.offsets, again.offsets)
    assert float((first.filters - other.filters).norm()) > 0.1


@pytest.mark.parametrize("threshold", [0.0, 0.6])
@pytest.mark.parametrize(("size", "channels"), [((8, 8), 1), ((8, 9), 3)])
def test_without_the_root_no_distance_grows_by_more_than_is_stated(size, channels, threshold):
    module = PatchDictionary(size, channels, **SMALL, threshold=threshold, root=False).double()
    assert 0.0 < module.lipschitz < math.inf
    generator = torch.Generator().manual_seed(1)
    steepest = 0.0
    # Where contrast is least, slopes are largest.
    for spread in (0.0, 1e-3, 0.03, 0.3):
        image = 0.5 + spread * torch.randn(channels, *size, generator=generator, dtype=torch.float64)
        slopes = torch.autograd.functional.jacobian(lambda pixels: module(pixels[None])[0], image).flatten(1)
        steepest = max(steepest, float(torch.linalg.matrix_norm(slopes, 2)))
    for _ in range(50):
        images = 0.5 + 0.1 * torch.randn(2, channels, *size, generator=generator, dtype=torch.float64)
        first, second = module(images)
        steepest = max(steepest, float((first - second).norm() / (images[0] - images[1]).norm()))
    assert steepest <= module.lipschitz
    if threshold == 0.0:
        assert steepest > 0.1 * module.lipschitz, "the constant says nothing"


def test_with_the_root_slopes_have_no_bound_and_none_is_stated():
    module = PatchDictionary((8, 8), **SMALL).double()
    assert module.lipschitz == math.inf
    # Between an image that is like no atom and one that is hardly more so, the root is as steep as one likes.
    dull, lively = torch.full((1, 3, 8, 8), 0.5, dtype=torch.float64), photographs(1, (8, 8)).double()
    assert float(module(dull).norm()) == 0.0
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if float(module(torch.lerp(dull, lively, middle)).norm()) == 0.0 else (low, middle)
    ratios = []
    for step in (1e-4, 1e-6, 1e-8):
        near = [torch.lerp(dull, lively, at) for at in (low, high + step)]
        ratios.append(float((module(near[0]) - module(near[1])).norm() / (near[0] - near[1]).norm()))
    assert ratios[0] * 5 < ratios[1]
    assert ratios[1] * 5 < ratios[2]


def wrapped(columns: int) -> DPLipModel:
    net = nn.Linear(columns, 3, bias=False)
    return DPLipModel(
        net, input_shape=(columns,), input_norm=100.0, loss=losses.TauCrossEntropy(1.0), constraint=Spectral()
    )


def test_certificates_pass_through_what_has_a_constant_and_through_nothing_else():
    images = photographs(4, (8, 8))
    bounded, rooted = PatchDictionary((8, 8), **SMALL, root=False), PatchDictionary((8, 8), **SMALL)
    model = wrapped(12 * 9)
    found = certify(model, images, front=bounded)
    assert float(found.radii.max()) > 0.0
    refused = certify(model, images, front=rooted)
    assert float(refused.radii.max()) == 0.0
    assert "no Lipschitz constant is known" in refused.reason
    # A container states none for what is in it.
    assert float(certify(model, images, front=nn.Sequential(bounded)).radii.max()) == 0.0


def test_the_constant_is_that_of_the_filters_as_they_are_now():
    module = PatchDictionary((8, 8), **SMALL, root=False)
    stated = module.lipschitz
    state = module.state_dict()
    module.load_state_dict({**state, "filters": 3.0 * state["filters"]})
    assert module.lipschitz == pytest.approx(3.0 * stated)


def test_from_the_state_of_another_one_comes_the_same_and_nothing_is_drawn(monkeypatch):
    module, images = PatchDictionary((8, 8), **SMALL), photographs(3, (8, 8))
    monkeypatch.setattr("clipless_dp.features.patches.dead_leaves", lambda *_, **__: pytest.fail("images were drawn"))
    again = PatchDictionary((8, 8), **SMALL, state=module.state_dict())
    assert torch.equal(again(images), module(images))
    assert frozen.fingerprint(again, images) == frozen.fingerprint(module, images)
    lacking = {name: value for name, value in module.state_dict().items() if name != "offsets"}
    with pytest.raises(CheckpointError, match="does not fit"):
        PatchDictionary((8, 8), **SMALL, state=lacking)


OTHERS = {
    "atoms": 14, "patch_size": 4, "channels": 1, "windows": 2, "threshold": 0.1, "contrast": 0.1,
    "regularisation": 0.5, "images": 41, "seed": 1, "root": False,
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_a_state_of_other_arguments_is_refused(name):
    state = PatchDictionary((8, 8), **SMALL).state_dict()
    assert {**SMALL, name: OTHERS[name]} != SMALL
    with pytest.raises(CheckpointError, match="made with other arguments"):
        PatchDictionary((8, 8), **{**SMALL, name: OTHERS[name]}, state=state)
    with pytest.raises(CheckpointError, match="made with other arguments"):
        PatchDictionary((9, 8), **SMALL, state=state)


@pytest.mark.parametrize("number", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["filters", "offsets"])
def test_a_state_with_numbers_that_are_not_finite_is_refused(name, number):
    module = PatchDictionary((8, 8), **SMALL)
    state = {key: value.clone() for key, value in module.state_dict().items()}
    state[name].view(-1)[3] = number
    with pytest.raises(CheckpointError, match=f"{name} .* not finite"):
        PatchDictionary((8, 8), **SMALL, state=state)
    with pytest.raises(CheckpointError, match=f"{name} .* not finite"):
        module.load_state_dict(state)


def test_a_state_that_tells_its_version_alone_is_read_with_a_warning():
    module, images = PatchDictionary((8, 8), **SMALL), photographs(3, (8, 8))
    former = {**module.state_dict(), "recipe": torch.tensor(list(b"patches 1, dead leaves 1"), dtype=torch.uint8)}
    with pytest.warns(UserWarning, match="did not write down its arguments"):
        again = PatchDictionary((8, 8), **SMALL, state=former)
    assert torch.equal(again(images), module(images))
    assert torch.equal(again.recipe, module.recipe)


def test_a_state_of_another_recipe_or_of_none_is_refused():
    module = PatchDictionary((8, 8), **SMALL)
    state = module.state_dict()
    PatchDictionary((8, 8), **SMALL).load_state_dict(state)
    for recipe in (b"patches 0", b""):
        other = {**state, "recipe": torch.tensor(list(recipe), dtype=torch.uint8)}
        with pytest.raises(CheckpointError, match=r"recipe '.*'.*this package has 'patches 1, dead leaves 1'"):
            module.load_state_dict(other)
    with pytest.raises(CheckpointError, match="of no recipe"):
        module.load_state_dict({name: value for name, value in state.items() if name != "recipe"})


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"atoms": 5}, "atoms must be even"),
        ({"atoms": 0}, "atoms"),
        ({"patch_size": 1}, "patch_size"),
        ({"patch_size": 7}, "too few patches"),
        ({"threshold": -0.1}, "threshold"),
        ({"contrast": 0.0}, "contrast"),
        ({"regularisation": 0.0}, "regularisation"),
        ({"channels": 2}, "1 channel or 3"),
        ({"atoms": 4000}, "ask for fewer"),
        ({"images": torch.rand(4, 3, 8, 8)}, "images"),
    ],
)
def test_arguments_out_of_range_and_images_of_ones_own_are_refused(arguments, named):
    with pytest.raises(ConfigurationError, match=named):
        PatchDictionary((8, 8), **{**SMALL, **arguments})


@pytest.mark.parametrize(
    "images", [torch.zeros(2, 3, 8, 9), torch.zeros(2, 1, 8, 8), torch.zeros(3, 8, 8), torch.zeros(2, 3, 8, 8).byte()]
)
def test_images_of_another_shape_or_type_are_refused(images):
    with pytest.raises(InputError, match="expected floating-point images"):
        PatchDictionary((8, 8), **SMALL)(images)


def test_many_atoms_are_computed_some_at_once_and_are_the_first_ones_of_fewer(monkeypatch):
    module, images = PatchDictionary((9, 8), **{**SMALL, "atoms": 24}), photographs(5, (9, 8))
    expected = module(images)
    few = PatchDictionary((9, 8), **SMALL)(images)
    both = expected.unflatten(1, (2, 12, 9))[:, :, :6].flatten(1)
    torch.testing.assert_close(both, few, rtol=1e-4, atol=1e-4)
    # Fewer than all of them, and a number that does not divide theirs; images one by one.
    monkeypatch.setattr(patches, "_ATOMS_AT_ONCE", 7)
    monkeypatch.setattr(patches, "_PLACES_AT_ONCE", 1)
    torch.testing.assert_close(module(images), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("side", "channels"), [(64, 3), (28, 1)])
def test_large_and_grey_images_have_features_of_the_default_size(side, channels):
    module = PatchDictionary((side, side), channels)
    images = photographs(8, (side, side), channels)
    features = module(images)
    assert features.shape == (8, 4608)
    torch.testing.assert_close(module(images.flip(-1)), features, rtol=0, atol=1e-2)
    apart = torch.pdist(features)
    assert float(apart.min()) > 0.05 * float(features.norm(dim=1).mean())
