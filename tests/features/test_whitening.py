from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from clipless_dp import CheckpointError, ConfigurationError, DPLipModel, InputError, PrivacyError, losses
from clipless_dp.constraints import Spectral
from clipless_dp.features import (
    FrozenFeatures,
    JoinedFeatures,
    MirroredScattering,
    PatchDictionary,
    SyntheticWhitening,
    dead_leaves,
)
from clipless_dp.robustness import certify

SIZE = (8, 8)
SMALL = {"images": 40, "directions": 10}


def photographs(count: int, channels: int = 3, size: tuple[int, int] = SIZE) -> Tensor:
    return dead_leaves(count, size, channels, seed=77).float() / 255.0


def patches(channels: int = 3, **changes: object) -> PatchDictionary:
    return PatchDictionary(SIZE, channels, atoms=8, patch_size=3, images=20, **changes)


ASKED = {"images": 0}


class Pixels(nn.Module):
    """The pixels as they are; how often they were asked for is no setting of it, under which features are kept."""

    def forward(self, images: Tensor) -> Tensor:
        ASKED["images"] += len(images)
        return images.flatten(1)


def by_hand(features: Tensor, synthetic: Tensor, directions: int, exponent: float) -> Tensor:
    """The formula, with all eigenvectors of the covariance, in float64."""
    features, synthetic = features.double(), synthetic.double()
    mean = synthetic.mean(0)
    rows = synthetic - mean
    rows = rows / rows.norm(dim=1, keepdim=True)
    values, vectors = torch.linalg.eigh(rows.T @ rows / len(rows))
    values, vectors = values.flip(0), vectors.flip(1)
    directed = features - mean
    directed = directed / directed.norm(dim=1, keepdim=True)
    gains = torch.ones_like(values)
    gains[:directions] = (values[:directions] / values[directions]) ** -exponent
    return functional.normalize(directed @ vectors * gains @ vectors.T)


@pytest.mark.parametrize("exponent", [0.0, 0.2, 0.5])
def test_features_are_those_of_the_formula(exponent):
    images = photographs(6)
    module = SyntheticWhitening(nn.Flatten(), SIZE, images=300, directions=20, exponent=exponent)
    synthetic = dead_leaves(300, SIZE).float().div(255).flatten(1)
    expected = by_hand(images.flatten(1), synthetic, 20, exponent)
    torch.testing.assert_close(module(images).double(), expected, rtol=0.0, atol=2e-4)
    plain = by_hand(images.flatten(1), synthetic, 20, 0.0)
    assert exponent == 0.0 or float((plain - expected).norm(dim=1).min()) > 0.1


def test_a_full_exponent_makes_variances_of_synthetic_images_alike_in_all_directions_that_are_kept():
    spread = []
    for exponent in (0.0, 0.5):
        module = SyntheticWhitening(nn.Flatten(), SIZE, images=300, directions=20, exponent=exponent)
        rows = dead_leaves(300, SIZE).float().div(255).flatten(1) - module.mean
        variances = ((functional.normalize(rows) @ module.axes) * module.gains).square().mean(0)
        spread.append(float(variances.max() / variances.min()))
    assert spread[0] > 10.0
    assert spread[1] < 1.1


@settings(max_examples=8)
@given(
    st.tuples(st.integers(2, 9), st.integers(2, 9)), st.sampled_from([1, 3]), st.integers(3, 60), st.integers(1, 400)
)
def test_directions_are_orthonormal_and_none_is_stretched_whatever_the_shape(size, channels, images, directions):
    module = SyntheticWhitening(nn.Flatten(), size, channels, images=images, directions=directions)
    kept = module.axes.shape[1]
    assert kept <= min(directions, images - 1, channels * size[0] * size[1] - 1)
    torch.testing.assert_close(module.axes.T @ module.axes, torch.eye(kept), rtol=0, atol=1e-4)
    assert bool((module.gains > 0).all())
    assert float(module.gains.max()) <= 1.0
    whitened = module(photographs(3, channels, size))
    torch.testing.assert_close(whitened.norm(dim=1), torch.ones(3))


def test_features_of_one_image_do_not_depend_on_the_others_nor_on_how_many_there_are():
    front = JoinedFeatures([SyntheticWhitening(patches(), SIZE, **SMALL), nn.Flatten()], (1.0, 0.7))
    images = photographs(300)
    computed = FrozenFeatures(front, batch_size=64).compute(images)
    torch.testing.assert_close(computed, front(images), rtol=0.0, atol=1e-4)
    for count in (1, 63, 255, 257, 299):
        assert torch.equal(FrozenFeatures(front, batch_size=64).compute(images[:count]), computed[:count])
    others = 1e3 * photographs(300).flip(0)
    others[7] = images[7]
    assert torch.equal(FrozenFeatures(front, batch_size=64).compute(others)[7], computed[7])


class WhitenedByTheBatch(SyntheticWhitening):
    """A mutant: mean and covariance are those of the images that it is given."""

    def whitened(self, features: Tensor) -> Tensor:
        self.mean, self.axes, self.gains = self._directions(features.flatten(1))
        return super().whitened(features)


class CentredByTheBatch(SyntheticWhitening):
    """A mutant: the mean is that of the batch."""

    def forward(self, images: Tensor) -> Tensor:
        features = self.features(images).flatten(1)
        return functional.normalize(features - features.mean(0))


@pytest.mark.parametrize("mutant", [WhitenedByTheBatch, CentredByTheBatch])
@pytest.mark.parametrize("joined", [False, True])
def test_whitening_from_the_batch_is_refused(mutant, joined):
    module = mutant(patches(), SIZE, **SMALL)
    module = JoinedFeatures([module, nn.Flatten()]) if joined else module
    with pytest.raises(PrivacyError, match=r"other company|came first|changed while"):
        FrozenFeatures(module, batch_size=16).compute(photographs(40))


def mixed(features: Tensor) -> Tensor:
    return functional.normalize(features.flatten(1) - features.flatten(1).mean(0))


def hooked(front: JoinedFeatures) -> None:
    front.register_forward_hook(lambda module, inputs, output: mixed(output))


def hooked_within(front: JoinedFeatures) -> None:
    front.blocks[0].register_forward_hook(lambda module, inputs, output: mixed(output))


def replaced(front: JoinedFeatures) -> None:
    front.blocks[0].whitened = mixed


def replaced_whole(front: JoinedFeatures) -> None:
    front._joined = lambda parts: mixed(torch.cat(parts, 1))


@pytest.mark.parametrize("change", [hooked, hooked_within, replaced, replaced_whole])
def test_a_front_that_was_changed_to_mix_samples_is_refused(change):
    front = JoinedFeatures(
        [SyntheticWhitening(patches(), SIZE, **SMALL), SyntheticWhitening(nn.Flatten(), SIZE, **SMALL)]
    )
    images = photographs(40)
    FrozenFeatures(front, batch_size=16).compute(images)
    change(front)
    with pytest.raises(PrivacyError, match="other company"):
        FrozenFeatures(front, batch_size=16).compute(images)


def test_a_module_that_mixes_samples_is_refused_before_it_is_whitened():
    class Centred(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images.flatten(1) - images.flatten(1).mean(0)

    with pytest.raises(PrivacyError, match="other company"):
        SyntheticWhitening(Centred(), SIZE, **SMALL)
    front = JoinedFeatures([nn.Flatten(), Centred()])
    with pytest.raises(PrivacyError, match="other company"):
        FrozenFeatures(front, batch_size=16).compute(photographs(40))


def test_no_images_of_ones_own_can_enter():
    for images in (photographs(10), [photographs(10)], 10.0):
        with pytest.raises(ConfigurationError, match="images must be"):
            SyntheticWhitening(nn.Flatten(), SIZE, images=images)


def test_what_takes_long_is_kept_by_itself_and_whitened_when_it_is_read(tmp_path):
    source, images = Pixels(), photographs(20)
    whitened = SyntheticWhitening(source, SIZE, **SMALL)
    features = FrozenFeatures(JoinedFeatures([whitened, patches()]), cache_dir=tmp_path, batch_size=8).compute(images)
    assert len(list(tmp_path.glob("*.npy"))) == 2
    for exponent, weights in ((0.2, (1.0, 1.0)), (0.4, (1.0, 0.5))):
        other = SyntheticWhitening(Pixels(), SIZE, **SMALL, exponent=exponent)
        other.features = source
        front = JoinedFeatures([other, patches()], weights)
        ASKED["images"] = 0
        found = FrozenFeatures(front, cache_dir=tmp_path, batch_size=8).compute(images)
        assert ASKED["images"] == 8, "one batch, to compare"
        assert torch.equal(found, features) == (exponent == 0.2)
        torch.testing.assert_close(found, front(images), rtol=0, atol=1e-4)
    assert len(list(tmp_path.glob("*.npy"))) == 2


def test_blocks_have_the_norms_of_their_weights_and_the_whole_has_unit_norm():
    front = JoinedFeatures([nn.Flatten(), patches()], (2.0, 1.0))
    vectors = front(photographs(5))
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(5))
    first, second = vectors.split([3 * 64, 8 * 9], 1)
    torch.testing.assert_close(first.norm(dim=1), torch.full((5,), 2.0 / math.sqrt(5.0)))
    torch.testing.assert_close(second.norm(dim=1), torch.full((5,), 1.0 / math.sqrt(5.0)))
    # A block of zeros stays one, and the other takes its share.
    dull = front(torch.full((1, 3, *SIZE), 0.5))
    assert float(dull[:, 3 * 64 :].norm()) == 0.0
    torch.testing.assert_close(dull.norm(), torch.tensor(1.0))


def test_the_same_seed_makes_the_same_directions_and_torchs_own_generator_is_left_alone():
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = SyntheticWhitening(patches(), SIZE, **SMALL)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(6)
    again, other = SyntheticWhitening(patches(), SIZE, **SMALL), SyntheticWhitening(patches(), SIZE, **SMALL, seed=1)
    for name in ("mean", "axes", "gains"):
        assert torch.equal(getattr(first, name), getattr(again, name))
        assert not torch.equal(getattr(first, name), getattr(other, name))


def test_nothing_is_certified_through_divisions_by_norms():
    bounded = patches(root=False)
    images = photographs(4)
    net = nn.Linear(8 * 9, 3, bias=False)
    model = DPLipModel(
        net, input_shape=(8 * 9,), input_norm=100.0, loss=losses.TauCrossEntropy(1.0), constraint=Spectral()
    )
    assert float(certify(model, images, front=bounded).radii.max()) > 0.0, "there was something to certify"
    for front in (SyntheticWhitening(bounded, SIZE, **SMALL), JoinedFeatures([bounded])):
        assert front.lipschitz == math.inf
        found = certify(model, images, front=front)
        assert float(found.radii.max()) == 0.0
        assert "no Lipschitz constant is known" in found.reason


def test_around_the_synthetic_mean_every_direction_is_near():
    module = SyntheticWhitening(nn.Flatten(), SIZE, **SMALL).double()
    mean = module.mean.view(1, 3, *SIZE)
    step = 1e-4 * torch.randn(1, 3, *SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert float((module(mean + step) - module(mean - step)).norm()) > 1.99


def test_from_the_state_of_another_one_comes_the_same_and_nothing_is_drawn(monkeypatch):
    module, images = SyntheticWhitening(MirroredScattering(SIZE), SIZE, **SMALL), photographs(3)
    monkeypatch.setattr("clipless_dp.features.whitening.dead_leaves", lambda *_, **__: pytest.fail("images were drawn"))
    again = SyntheticWhitening(MirroredScattering(SIZE), SIZE, **SMALL, state=module.state_dict())
    assert torch.equal(again(images), module(images))
    for lacking in ("mean", "axes", "gains", "features.2.means"):
        state = {name: value for name, value in module.state_dict().items() if name != lacking}
        with pytest.raises(CheckpointError, match="does not fit"):
            SyntheticWhitening(MirroredScattering(SIZE), SIZE, **SMALL, state=state)


def test_a_state_of_another_recipe_is_refused():
    module = SyntheticWhitening(patches(), SIZE, **SMALL)
    state = module.state_dict()
    SyntheticWhitening(patches(), SIZE, **SMALL).load_state_dict(state)
    other = torch.tensor(list(b"whitening 0"), dtype=torch.uint8)
    with pytest.raises(CheckpointError, match=r"'whitening 0'.*'whitening 1, dead leaves 1'"):
        module.load_state_dict({**state, "recipe": other})
    with pytest.raises(CheckpointError, match=r"PatchDictionary.*'whitening 0'"):
        JoinedFeatures([module]).load_state_dict({
            **JoinedFeatures([module]).state_dict(), "blocks.0.features.recipe": other,
        })  # fmt: skip


def test_a_state_of_other_arguments_or_around_a_module_of_others_is_refused():
    state = SyntheticWhitening(patches(), SIZE, **SMALL).state_dict()
    for change in ({"seed": 1}, {"images": 41}, {"exponent": 0.3}, {"directions": 7}):
        with pytest.raises(CheckpointError, match="made with other arguments"):
            SyntheticWhitening(patches(), SIZE, **{**SMALL, **change}, state=state)
    for inner in ({"threshold": 0.1}, {"root": False}, {"seed": 1}):
        with pytest.raises(CheckpointError, match="made with other arguments"):
            SyntheticWhitening(patches(**inner), SIZE, **SMALL, state=state)
    with pytest.raises(CheckpointError, match="made with other arguments"):
        SyntheticWhitening(nn.Sequential(nn.Flatten(), nn.Tanh()), SIZE, **SMALL, state=state)


@pytest.mark.parametrize("name", ["mean", "axes", "gains", "features.filters"])
def test_a_state_with_numbers_that_are_not_finite_is_refused(name):
    state = {key: value.clone() for key, value in SyntheticWhitening(patches(), SIZE, **SMALL).state_dict().items()}
    state[name].view(-1)[0] = math.nan
    with pytest.raises(CheckpointError, match="not finite"):
        SyntheticWhitening(patches(), SIZE, **SMALL, state=state)


class Constant(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return torch.ones(len(images), 5)


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: SyntheticWhitening(nn.Flatten(), SIZE, exponent=0.6), "exponent"),
        (lambda: SyntheticWhitening(nn.Flatten(), SIZE, exponent=-0.1), "exponent"),
        (lambda: SyntheticWhitening(nn.Flatten(), SIZE, directions=0), "directions"),
        (lambda: SyntheticWhitening(nn.Flatten(), SIZE, images=2), "images"),
        (lambda: SyntheticWhitening(nn.Flatten(), SIZE, 2), "1 channel or 3"),
        (lambda: SyntheticWhitening(Constant(), SIZE, **SMALL), "alike"),
        (lambda: SyntheticWhitening(torch.relu, SIZE, **SMALL), "module"),
        (lambda: JoinedFeatures([]), "blocks"),
        (lambda: JoinedFeatures([torch.relu]), "blocks"),
        (lambda: JoinedFeatures([nn.Flatten()], (1.0, 2.0)), "a weight for each"),
        (lambda: JoinedFeatures([nn.Flatten()], (0.0,)), "weights"),
    ],
)
def test_arguments_out_of_range_are_refused(make, named):
    with pytest.raises(ConfigurationError, match=named):
        make()


def test_features_of_another_length_are_refused():
    with pytest.raises(InputError, match="192 numbers"):
        SyntheticWhitening(nn.Flatten(), SIZE, **SMALL).whitened(torch.zeros(2, 7))


@pytest.mark.slow
def test_at_true_size_whitening_brings_classes_of_photographs_like_images_apart():
    size = (32, 32)
    scattering = MirroredScattering(size, 3)
    module = SyntheticWhitening(scattering, size, images=1000)
    images = photographs(200, size=size)
    vectors = module(images)
    assert vectors.shape == (200, 5208)
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(200))
    plain = functional.normalize(scattering(images) - module.mean)
    shares = [
        float((torch.linalg.svdvals(some) ** 2 / len(some)).square().sum().reciprocal()) for some in (plain, vectors)
    ]
    # Directions that take part: whitening spreads unit vectors over more of them.
    assert shares[1] > 1.5 * shares[0]


class Activated(nn.Module):
    def __init__(self, activation: object, settings: object) -> None:
        super().__init__()
        self.activation, self.settings, self.pool = activation, settings, nn.AvgPool2d(4)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.activation(self.pool(images) - 0.5)  # type: ignore[operator]


@pytest.mark.parametrize(
    ("activation", "settings"),
    [(torch.tanh, ({"a": 1},)), (torch.relu, ({"a": 2},)), (torch.relu, (torch.ones(1),))],
    ids=["a function", "a mapping within", "a tensor"],
)
def test_the_state_of_a_module_with_another_function_or_container_is_refused(activation, settings):
    def made(module: nn.Module, state: object = None) -> SyntheticWhitening:
        return SyntheticWhitening(module, (8, 8), 3, directions=4, images=16, progress=False, state=state)

    state = made(Activated(torch.relu, ({"a": 1},))).state_dict()
    made(Activated(torch.relu, ({"a": 1},)), state)
    with pytest.raises(CheckpointError, match="other arguments"):
        made(Activated(activation, settings), state)
