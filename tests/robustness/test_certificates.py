"""Radii are exact where they can be, and no attack succeeds within one; mutants of the formulas are caught."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from clipless_dp import (
    ConfigurationError,
    DPLipModel,
    InputError,
    PrivacyError,
    constraints,
    fit,
    fit_without_privacy,
    gradient_gated,
    layers,
    losses,
)
from clipless_dp.bounds import margins
from clipless_dp.losses import class_scores
from clipless_dp.robustness import (
    Certificate,
    attack,
    attacks,
    average_certified_radius,
    certificates,
    certified_accuracy,
    certify,
    frozen,
    last_layer_constants,
    lipschitz_lower_bound,
    margin_constants,
    plain_network,
)
from clipless_dp.robustness import constants as constants_module
from tests.robustness.nets import NETWORKS, dense, points, seeded, wrapped
from tests.soundness.cases import CASES
from tests.soundness.mutation import Mutant
from tests.support import one_in_two, samples

QUICK = (attacks.PGD(steps=12, restarts=1), attacks.DeepFool(steps=8), attacks.HKRStep(steps=6))
ALL = (*QUICK, attacks.FGM(), attacks.CarliniWagner(steps=20, searches=2))
LIGHT = (attacks.PGD(steps=6, restarts=1), attacks.DeepFool(steps=4))
INSIDE = 1.0 - 1e-9
"""Attacks measure distances in float64: a sum of a few hundred squares errs by less than 1e-12."""


def linear(*rows: tuple[float, ...]) -> nn.Linear:
    layer = nn.Linear(len(rows[0]), len(rows), bias=False).double()
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(rows, dtype=torch.float64))
    return layer


def distance_of(weight: Tensor, scores: Tensor) -> Tensor:
    """Distance of each sample to the nearest boundary of a linear classifier."""
    best = scores.argmax(1)
    gaps = scores.gather(1, best[:, None]) - scores
    lengths = (weight[best][:, None] - weight[None]).norm(dim=2)
    return (gaps / lengths).masked_fill(nn.functional.one_hot(best, scores.shape[1]).bool(), math.inf).amin(1)


@given(st.integers(0, 2**16), st.integers(2, 6), st.integers(1, 7), st.floats(1e-3, 1e3))
@settings(max_examples=30, deadline=None, derandomize=True, database=None)
def test_the_radius_of_a_linear_network_is_its_distance_to_the_boundary(
    seed: int, classes: int, features: int, size: float
) -> None:
    layer = seeded(lambda: nn.Linear(features, classes), seed).double()
    model = wrapped(layer, (features,), input_norm=1e6)
    inputs = points(9, features, size=size, seed=seed)
    certificate = certify(model, inputs)
    true = distance_of(layer.weight.detach(), layer(inputs).detach())
    assert bool((certificate.radii <= true).all())
    # What rounding takes off, for inputs of up to 1e6: a relative 1e-7.
    assert torch.allclose(certificate.radii, true, rtol=1e-6, atol=1e-6)


def test_a_flip_is_found_just_beyond_the_radius_and_none_within() -> None:
    layer = linear((1.0, 0.0), (0.0, 2.0), (-1.0, 0.5))
    model = wrapped(layer, (2,), input_norm=100.0)
    inputs = points(40, 2)
    radii = certify(model, inputs).radii
    distances = attack(model, inputs, QUICK).distances
    assert bool((distances >= radii * INSIDE).all())
    # Bisection ends within 2^-30 of a way; the margin's rounding is 1e-12.
    assert torch.allclose(distances, radii, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", NETWORKS)
def test_no_attack_succeeds_within_a_radius(name: str) -> None:
    model = seeded(NETWORKS[name]).double()
    assert isinstance(model, DPLipModel)
    inputs = points(24, *model.input_shape)
    # Beyond the input ball the projection only brings points together.
    inputs[::3] *= 4.0
    certificate = certify(model, inputs)
    assert bool((certificate.radii > 0.0).all())
    found = attack(model, inputs, ALL, radii=(0.05, 0.5), bisections=20)
    assert bool((found.distances >= certificate.radii * INSIDE).all())


@pytest.mark.parametrize("private", [True, False], ids=["private", "not private"])
def test_no_attack_succeeds_within_a_radius_of_a_trained_network(private: bool) -> None:
    model = seeded(lambda: wrapped(dense(6, 8, 8), (6,), constraint=constraints.Orthogonal()))
    assert isinstance(model, DPLipModel)
    data, test = samples(300), samples(40, 1)
    if private:
        fit(model, data, epsilon=8.0, delta=1e-3, epochs=4, batch_size=100, progress=False, audit=False)
    else:
        fit_without_privacy(model, data, epochs=4, batch_size=30, lr=1e-2, progress=False)
    certificate = certify(model, test)
    right = certificate.correct
    # Chance is a third.
    assert float(right.double().mean()) > 0.4
    found = attack(model, test, ALL, radii=(0.1, 0.5), bisections=20)
    assert bool((found.distances >= certificate.radii * INSIDE)[right].all())
    assert bool((found.distances == 0.0)[~right].all())


@pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")
# Neighbours in the list share their rule.
@pytest.mark.parametrize("case", one_in_two(CASES), ids=lambda case: case.name)
def test_no_attack_succeeds_within_a_radius_behind_any_layer(case) -> None:
    def build() -> nn.Module:
        layer = case.build().eval()
        size = layer(torch.zeros(2, *case.shape)).flatten(1).shape[1]
        return nn.Sequential(layer, nn.Flatten(), nn.Linear(size, 3))

    model = wrapped(seeded(build).double(), case.shape, input_norm=case.input_norm)
    inputs = points(4, *case.shape, size=case.input_norm / math.sqrt(math.prod(case.shape)))
    radii = certify(model, inputs).radii
    found = attack(model, inputs, LIGHT, radii=(0.3,), bisections=12)
    assert bool((found.distances >= radii * INSIDE).all())


def test_a_grid_in_the_plane_holds_no_flip_within_a_radius() -> None:
    model = seeded(lambda: wrapped(dense(2, 8, 8), (2,), constraint=constraints.Orthogonal())).double()
    axis = torch.linspace(-2.0, 2.0, 81, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    predictions = certify(model, grid).predictions
    inputs = points(60, 2)
    certificate = certify(model, inputs)
    away = torch.cdist(inputs, grid)
    other = predictions[None] != certificate.predictions[:, None]
    nearest = away.masked_fill(~other, math.inf).amin(1)
    assert bool((certificate.radii <= nearest).all())
    # Differences of scores of random weights are half as steep as is certified, and a cell of the grid is 0.05 wide.
    assert float((certificate.radii / nearest).median()) > 0.3


def test_the_formulas_of_one_output_and_of_stated_constants() -> None:
    single = linear((3.0, 4.0))
    inputs = torch.tensor([[1.0, 0.5], [-2.0, 1.0]], dtype=torch.float64)
    # |f|/L with L = 5; certificates lie below by the rounding that they take off, 1e-9 at most here.
    expected = torch.tensor([5.0, 2.0], dtype=torch.float64) / 5.0
    for found in (certify(single, inputs, lipschitz=5.0), certify(wrapped(single, (2,), input_norm=10.0), inputs)):
        assert torch.allclose(found.radii, expected, rtol=1e-8)
    two = linear((2.0, 0.0), (0.0, 1.0))
    inputs = torch.tensor([[3.0, 1.0]], dtype=torch.float64)
    for lipschitz, constant in ((2.0, 2.0 * math.sqrt(2.0)), ((2.0, 1.0), 3.0)):
        found = certify(two, inputs, lipschitz=lipschitz)
        assert float(found.radii) == pytest.approx(5.0 / constant, rel=1e-8)
    found = certify(two, inputs, lipschitz=last_layer_constants(two.weight, 1.0))
    assert float(found.radii) == pytest.approx(5.0 / math.sqrt(5.0), rel=1e-8)


def test_the_minimum_is_over_all_classes_and_not_the_second_best() -> None:
    layer = linear((10.0, 0.0), (9.0, 0.0), (-10.0, 8.0))
    inputs = torch.tensor([[1.0, 1.5]], dtype=torch.float64)
    # Scores 10, 9, 2: the second best is 1/1 away, the third 8/√(20² + 8²) = 0.371.
    certificate = certify(wrapped(layer, (2,), input_norm=10.0), inputs)
    assert int(certificate.nearest) == 2
    assert float(certificate.radii) == pytest.approx(8.0 / math.hypot(20.0, 8.0), rel=1e-8)


def test_constants_of_pairs_go_back_through_affine_layers_only_and_never_pass_the_joint_one() -> None:
    for name, build in NETWORKS.items():
        model = seeded(build)
        found = model.margin_constants()
        limit = math.sqrt(2.0) * model.lipschitz_constant()
        if name == "spectral, one output":
            limit *= math.sqrt(2.0)
        assert bool((found <= limit * (1.0 + 1e-8)).all()), name
        assert torch.equal(found, found.T)
        assert torch.equal(margin_constants(model), found)
    deep = nn.Sequential(nn.Linear(4, 6), layers.CotangentGate(0.1), nn.Linear(6, 3))
    model = seeded(lambda: wrapped(copy.deepcopy(deep), (4,))).double()
    product = (model.net[2].weight @ model.net[0].weight).detach()
    # Float64 products of six terms.
    assert torch.allclose(model.margin_constants(), torch.cdist(product, product), rtol=1e-9, atol=1e-9)


def test_edge_cases_ties_constants_nan_and_what_nothing_is_known_of() -> None:
    layer = linear((1.0, 0.0), (1.0, 0.0), (0.0, 1.0))
    model = wrapped(layer, (2,))
    inputs = torch.tensor([[1.0, 0.0], [0.0, 1.0], [math.nan, 0.0], [math.inf, 1.0]], dtype=torch.float64)
    certificate = certify(model, (inputs, torch.tensor([0, 2, 0, 0])))
    assert certificate.radii[0] == 0.0, "a tie"
    assert certificate.predictions.tolist()[1:] == [2, -1, -1]
    assert certificate.dropped == 2
    assert certificate.radii[2:].tolist() == [0.0, 0.0]
    assert certified_accuracy(certificate, 0.0) == 0.25
    constant = nn.Linear(2, 2).double()
    with torch.no_grad():
        constant.weight.zero_()
        constant.bias.copy_(torch.tensor([1.0, 0.0]))
    assert certify(wrapped(constant, (2,)), inputs[:1]).radii.tolist() == [math.inf]
    assert certify(constant, inputs[:1], lipschitz=0.0).radii.tolist() == [math.inf]
    for lipschitz in (None, math.inf):
        found = certify(layer, inputs[:2], lipschitz=lipschitz)
        assert found.radii.tolist() == [0.0, 0.0]
        assert found.reason is not None
        assert "nothing is certified" in str(found)
    isolated = wrapped(gradient_gated(nn.Sequential(nn.Linear(2, 4), nn.GELU(), nn.Linear(4, 3))), (2,))
    found = certify(isolated, torch.ones(3, 2))
    assert found.radii.tolist() == [0.0] * 3
    assert found.reason is not None


def test_what_is_stated_wrongly_is_refused() -> None:
    layer = linear((1.0, 0.0), (0.0, 1.0))
    inputs = torch.ones(2, 2, dtype=torch.float64)
    for wrong in (-1.0, "L", (1.0,), (1.0, -2.0), (1.0, math.nan), torch.ones(3, 3)):
        with pytest.raises(ConfigurationError):
            certify(layer, inputs, lipschitz=wrong)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="certifies its own"):
        certify(wrapped(layer, (2,)), inputs, lipschitz=1.0)
    with pytest.raises(ConfigurationError, match="give front too"):
        certify(layer, inputs, lipschitz=1.0, front_lipschitz=2.0)
    for units in (0.0, -1.0, (1.0, 2.0, 3.0), math.nan):
        with pytest.raises(ConfigurationError):
            certify(layer, inputs, lipschitz=1.0, units=units)
    with pytest.raises(InputError, match="labels"):
        certified_accuracy(certify(layer, inputs, lipschitz=1.0), 0.0)
    with pytest.raises(InputError, match="no samples"):
        certify(layer, inputs[:0], lipschitz=1.0)
    with pytest.raises(InputError, match="integer labels"):
        certify(layer, (inputs, torch.zeros(2)), lipschitz=1.0)
    tokens = DPLipModel(
        nn.Sequential(nn.EmbeddingBag(4, 3), nn.Linear(3, 2)), input_shape=(5,), loss=losses.TauCrossEntropy()
    )
    with pytest.raises(ConfigurationError, match="tokens"):
        certify(tokens, torch.zeros(2, 5))


def test_units_take_the_smallest_deviation_and_attacks_measure_in_them() -> None:
    deviations = (0.5, 0.2)
    layer = nn.Sequential(nn.Flatten(), linear((1.0, 0.0, 0.0, 0.0), (0.0, 0.0, 1.0, 0.0), (0.0, 0.0, 0.0, 1.0)))
    inputs = points(20, 2, 2)
    model = wrapped(layer, (2, 2), input_norm=50.0)
    plain, raw = certify(model, inputs), certify(model, inputs, units=deviations)
    assert torch.allclose(raw.radii, 0.2 * plain.radii, rtol=1e-12)
    assert raw.lipschitz == pytest.approx(plain.lipschitz / 0.2)
    found = attack(model, inputs, QUICK, units=deviations)
    assert bool((found.distances >= raw.radii * INSIDE).all())
    # Some boundaries are crossed along the second channel alone, where the raw distance is as small as is certified.
    assert float((raw.radii / found.distances).max()) > 0.999
    scaled = torch.tensor(deviations, dtype=torch.float64)[:, None]
    moved = ((found.examples - inputs) * scaled).flatten(1).norm(dim=1)
    assert torch.allclose(moved, found.distances, rtol=1e-9)


def test_a_front_multiplies_the_constant_and_is_attacked_through() -> None:
    front = linear((2.0, 0.0), (0.0, 0.5))
    model = wrapped(linear((1.0, 0.0), (0.0, 1.0)), (2,), input_norm=50.0)
    inputs = points(20, 2)
    with_front = certify(model, inputs, front=front, front_lipschitz=2.0)
    assert torch.allclose(with_front.radii, certify(model, front(inputs).detach()).radii / 2.0, rtol=1e-8, atol=1e-12)
    found = attack(model, inputs, QUICK, front=front)
    assert bool((found.distances >= with_front.radii * INSIDE).all())
    unknown = certify(model, inputs, front=front)
    assert not bool(unknown.radii.any())
    assert "front_lipschitz" in str(unknown.reason)


def test_float32_models_are_certified_in_float64_below_the_exact_radius() -> None:
    layer = seeded(lambda: nn.Linear(50, 4))
    inputs = points(200, 50).float()
    true = distance_of(layer.weight.detach().double(), copy.deepcopy(layer).double()(inputs.double()).detach())
    radii = certify(wrapped(layer, (50,), input_norm=50.0), inputs).radii
    assert bool((radii <= true).all())
    assert torch.allclose(radii, true, rtol=1e-8, atol=1e-8)
    less = certify(wrapped(layer, (50,), input_norm=50.0), inputs, score_error=1e-3).radii
    assert bool((less <= true - 1e-4).logical_or(less == 0.0).all())


def test_a_prediction_that_float64_does_not_share_has_no_radius() -> None:
    class Coarse(nn.Module):
        """Its float32 arithmetic sees another class than float64 does."""

        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(1, 2)
            nn.init.zeros_(self.layer.weight)
            nn.init.zeros_(self.layer.bias)

        def forward(self, values: Tensor) -> Tensor:
            lift = 1.0 if values.dtype == torch.float64 else -1.0
            return self.layer(values) + lift * torch.tensor([1.0, 0.0]).to(values)  # type: ignore[no-any-return]

    certificate = certify(Coarse(), torch.ones(3, 1), lipschitz=1.0)
    assert certificate.radii.tolist() == [0.0] * 3
    assert certificate.predictions.tolist() == [1] * 3


def test_certified_accuracy_and_radius_of_results_by_hand() -> None:
    certificate = Certificate(
        radii=torch.tensor([0.0, 0.5, 1.0, 2.0], dtype=torch.float64),
        predictions=torch.tensor([0, 1, 2, 3]),
        labels=torch.tensor([0, 1, 2, 0]),
    )
    shares = [certified_accuracy(certificate, radius) for radius in (0.0, 0.25, 0.5, 1.0, 3.0)]
    assert shares == [0.5, 0.5, 0.25, 0.0, 0.0]
    assert average_certified_radius(certificate) == 1.5 / 4
    assert average_certified_radius(certificate, signed=True) == (1.5 - 2.0) / 4


def test_mutants_of_constants_and_radii_are_caught_by_attacks(monkeypatch: pytest.MonkeyPatch) -> None:
    opposed = linear((1.0, 0.0), (-1.0, 0.0))
    joint = math.sqrt(2.0)
    three = linear((10.0, 0.0), (9.0, 0.0), (-10.0, 8.0))
    inputs = torch.tensor([[1.0, 1.5], [0.3, -0.4], [0.5, 2.0]], dtype=torch.float64)

    def worst(model: nn.Module, **arguments: object) -> float:
        radii = certify(model, inputs, **arguments).radii  # type: ignore[arg-type]
        return float((attack(model, inputs, QUICK, radii=(0.1, 1.0)).distances / radii).min())

    cases: tuple[tuple[Mutant, nn.Module, dict[str, object]], ...] = (
        (
            Mutant("√2 → 1", frozen, "constants_of", "math.sqrt(2.0) * joint", "1.0 * joint"),
            opposed,
            {"lipschitz": joint},
        ),
        (
            Mutant(
                "one output counted once",
                frozen,
                "of_single_output",
                "2.0 * constants.joint",
                "constants.joint",
            ),
            linear((1.0, 2.0)),
            {"lipschitz": math.sqrt(5.0)},
        ),
        (
            Mutant(
                "the second best only",
                certificates,
                "_certified",
                "radii, nearest = radii.masked_fill(own, math.inf).min(1)",
                "nearest = gaps.masked_fill(own, math.inf).argmin(1); radii = radii.gather(1, nearest[:, None])[:, 0]",
            ),
            wrapped(three, (2,), input_norm=50.0),
            {},
        ),
        (
            Mutant(
                "‖w_l‖ for ‖w_l - w_j‖",
                margins,
                "margin_constants",
                "apart = row_distances(found.rows)",
                "apart = found.rows.norm(dim=1)[:, None].expand(-1, len(found.rows))",
            ),
            wrapped(opposed, (2,), input_norm=50.0),
            {},
        ),
        (
            Mutant(
                "constants of the last layer behind a steep body",
                margins,
                "margin_constants",
                "reach = sweep.reach(found.node) * FLOAT64_ROUNDING",
                "reach = 1.0",
            ),
            wrapped(nn.Sequential(linear((3.0, 0.0), (0.0, 3.0)), nn.LeakyReLU(0.5), opposed), (2,), input_norm=50.0),
            {},
        ),
    )
    for mutant, model, arguments in cases:
        assert worst(model, **arguments) >= INSIDE, mutant.name
        with monkeypatch.context() as patched:
            mutant.apply(patched)
            assert worst(model, **arguments) < 0.99, mutant.name


def test_mutants_of_accuracy_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    tied = wrapped(linear((1.0, 0.0), (1.0, 0.0)), (2,))
    certificate = certify(tied, (torch.ones(2, 2, dtype=torch.float64), torch.tensor([0, 0])))
    wrong = certify(wrapped(linear((1.0, 0.0), (0.0, 0.0)), (2,)), (torch.ones(1, 2).double(), torch.tensor([1])))
    assert certified_accuracy(certificate, 0.0) == 0.0
    assert certified_accuracy(wrong, 0.0) == 0.0
    with monkeypatch.context() as patched:
        Mutant(
            "a radius that is not strict", certificates, "certified_accuracy", "radii > radius", "radii >= radius"
        ).apply(patched)
        assert certificates.certified_accuracy(certificate, 0.0) == 1.0
    with monkeypatch.context() as patched:
        Mutant("predicted for true label", certificates, "certified_accuracy", "certificate.correct & ", "").apply(
            patched
        )
        assert certificates.certified_accuracy(wrong, 0.0) == 1.0


def test_a_mutant_without_rounding_certifies_more_than_is_true(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = linear((1.0, 0.0), (0.0, 1.0))

    class Rounded(nn.Module):
        """A forward pass that is off by less than is allowed for."""

        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, values: Tensor) -> Tensor:
            return self.layer(values) + torch.tensor([2.0**-42, -(2.0**-42)], dtype=torch.float64)

    inputs = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    true = 1.0 / math.sqrt(2.0)
    assert float(certify(Rounded(), inputs, lipschitz=1.0).radii) <= true
    monkeypatch.setattr(frozen, "UNCHECKED_ROUNDING", 0.0)
    # Stated constants are enlarged by 1e-10: what is left of the excess shows without that.
    monkeypatch.setattr(constants_module, "ROUNDING", 1.0)
    assert float(certify(Rounded(), inputs, lipschitz=1.0).radii) > true


def test_a_sample_that_is_dropped_is_right_for_no_label_and_labels_are_classes() -> None:
    layer = linear((1.0, 0.0), (0.0, 1.0))
    inputs = torch.tensor([[2.0, 0.0], [math.nan, 0.0]], dtype=torch.float64)
    for label in (-1, 2, 100):
        with pytest.raises(InputError, match="labels must be classes"):
            certify(layer, (inputs, torch.tensor([0, label])), lipschitz=1.0)
    with pytest.raises(InputError, match="labels must be classes"):
        Certificate(torch.zeros(2).double(), torch.tensor([0, -1]), torch.tensor([0, -1]))
    with pytest.raises(InputError, match="1 labels of 2 samples"):
        Certificate(torch.zeros(2).double(), torch.tensor([0, 0]), torch.tensor([0]))
    certificate = certify(layer, (inputs, torch.tensor([0, 0])), lipschitz=1.0)
    # Whatever labels become: no class is that of a sample without a prediction.
    certificate.labels[1] = -1
    assert certificate.correct.tolist() == [True, False]


def test_a_sample_without_scores_of_the_deployed_model_is_dropped() -> None:
    model = seeded(NETWORKS["orthogonal"])
    inputs = points(3, 5).float()
    inputs[1] *= 1e36
    assert bool(model(inputs)[1].isnan().all())
    for one in (model, nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 3))):
        if one is not model:
            with torch.no_grad():
                one[0].weight.mul_(1e10)
        certificate = certify(one, inputs, lipschitz=None if one is model else 1e20)
        assert certificate.predictions[1] == -1
        assert certificate.radii[1] == 0.0
        assert certificate.dropped == 1


def test_signed_radii_of_both_infinities_have_no_mean() -> None:
    certificate = Certificate(torch.tensor([math.inf, math.inf]).double(), torch.tensor([0, 1]), torch.tensor([0, 0]))
    with pytest.raises(InputError, match="no mean"):
        average_certified_radius(certificate, signed=True)
    assert average_certified_radius(certificate) == math.inf


def test_inputs_of_another_shape_are_refused() -> None:
    for model, lipschitz in ((NETWORKS["orthogonal"](), None), (nn.Linear(5, 3), 1.0)):
        for shape in ((7,), (5, 5)):
            if isinstance(model, nn.Linear) and shape == (5, 5):
                continue
            with pytest.raises(InputError, match=r"reads? inputs"):
                certify(model, points(3, *shape), lipschitz=lipschitz)
            with pytest.raises(InputError):
                attack(model, points(3, *shape))


def test_constants_of_rows_that_differ_are_never_zero() -> None:
    drawn = points(4, 5)
    for size in (1e-170, 1e-300, 1e170):
        found = last_layer_constants(size * drawn, 1.0)
        # Float64 sums of five terms, and the rounding up of 1e-10.
        assert torch.allclose(found / size, torch.cdist(drawn, drawn), rtol=1e-8)
    mixed = torch.tensor([[1e-200, 0.0], [0.0, 1e-200], [1.0, 0.0], [0.0, 1e-200]], dtype=torch.float64)
    found = last_layer_constants(mixed, 1.0)
    assert float(found[0, 1]) == pytest.approx(math.sqrt(2.0) * 1e-200, rel=1e-8)
    assert found[1, 3] == 0.0
    assert float(last_layer_constants(mixed, 1e-150)[0, 1]) > 0.0
    layer = seeded(lambda: nn.Linear(5, 3)).double()
    with torch.no_grad():
        layer.weight.mul_(1e-170)
    assert int((wrapped(layer, (5,)).margin_constants() > 0.0).sum()) == 6


def test_a_stated_constant_may_be_a_tensor_of_one_number() -> None:
    layer, inputs = linear((1.0, 0.0), (0.0, 1.0)), points(4, 2)
    found = certify(layer, inputs, lipschitz=torch.tensor(2.0))
    assert torch.equal(found.radii, certify(layer, inputs, lipschitz=2.0).radii)


class Sharpened(nn.Module):
    """Scores that are ten times as steep in ``eval`` mode, or where an attribute says so."""

    def __init__(self, evaluating: float = 1.0) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(5, 3))
        self.factor, self.evaluating = 1.0, evaluating

    def forward(self, values: Tensor) -> Tensor:
        scores = self.factor * self.body(values)
        return scores if self.training else self.evaluating * scores


def steepened(how: str) -> DPLipModel:
    net = Sharpened(10.0 if how == "mode" else 1.0)
    model = wrapped(net, (5,))
    if how == "attribute":
        net.factor = 10.0
    elif how == "hook on the root":
        net.register_forward_hook(lambda module, given, output: 10.0 * output)
    elif how == "hook on a container":
        net.body.register_forward_hook(lambda module, given, output: 10.0 * output)
    elif how == "hook on a layer":
        net.body[0].register_forward_hook(lambda module, given, output: 10.0 * output)
    elif how == "hook on the model":
        model.register_forward_hook(lambda module, given, output: 10.0 * output)
    return model


@pytest.mark.parametrize(
    "how", ["mode", "attribute", "hook on the root", "hook on a container", "hook on a layer", "hook on the model"]
)
def test_a_model_whose_code_is_not_its_graph_is_refused(how: str) -> None:
    certify(seeded(lambda: steepened("nothing")), points(3, 5))
    for ask in (certify, attack, lipschitz_lower_bound):
        with pytest.raises((ConfigurationError, PrivacyError), match="model"):
            ask(seeded(lambda: steepened(how)), points(3, 5))


def test_global_hooks_are_refused_of_every_module() -> None:
    hook = nn.modules.module.register_module_forward_hook(
        lambda module, given, output: 10.0 * output if isinstance(module, nn.Linear) else None
    )
    try:
        for model, lipschitz in ((NETWORKS["orthogonal"](), None), (nn.Linear(5, 3), 1.0)):
            with pytest.raises(PrivacyError, match="global module hook"):
                certify(model, points(3, 5), lipschitz=lipschitz)
    finally:
        hook.remove()


def test_a_network_wrapped_as_it_is_deployed_is_certified_by_its_own_constant() -> None:
    def build() -> nn.Module:
        net = Sharpened(10.0).eval()
        return wrapped(net, (5,)).double()

    model, inputs = seeded(build), points(20, 5)
    certificate = certify(model, inputs)
    assert isinstance(model, DPLipModel)
    assert torch.equal(certificate.predictions, model(inputs).argmax(1))
    found = attack(model, inputs, QUICK)
    assert bool((found.distances >= certificate.radii * INSIDE).all())
    # Ten times less without the factor; behind it constants are of the scores together, twice what is seen here.
    assert float((certificate.radii / found.distances).median()) > 0.3


@pytest.mark.parametrize("name", NETWORKS)
def test_what_is_certified_is_what_the_model_runs(name: str) -> None:
    model = seeded(NETWORKS[name]).double().eval()
    assert isinstance(model, DPLipModel)
    inputs = points(9, *model.input_shape)
    expected = class_scores(model(inputs))
    # Fused kernels round otherwise: float64 sums of a few hundred terms.
    assert torch.allclose(plain_network(model)(inputs), expected, rtol=1e-9, atol=1e-12)


def test_certifying_changes_nothing_of_the_model() -> None:
    model = seeded(NETWORKS["orthogonal"])
    model.train()
    before = {name: value.clone() for name, value in model.net.state_dict().items()}
    certify(model, points(3, 5).float())
    attack(model, points(3, 5).float(), QUICK)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.net.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.net.parameters())


def test_scores_are_not_followed_back_past_a_value_that_is_overwritten() -> None:
    class Overwritten(nn.Module):
        """``W(ReLU(h)) = ±Σ|x_i|`` of two copies of each input, ``h = Ax``, where ``WA = 0``."""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.act, self.c = nn.Linear(2, 4, bias=False), nn.ReLU(inplace=True), nn.Linear(4, 2, bias=False)
            with torch.no_grad():
                self.a.weight.copy_(torch.cat((torch.eye(2), -torch.eye(2))))
                self.c.weight.copy_(torch.tensor([[1.0], [-1.0]]).expand(2, 4))

        def forward(self, values: Tensor) -> Tensor:
            inner = self.a(values)
            self.act(inner)
            output: Tensor = self.c(inner)
            return output

    model = DPLipModel(Overwritten(), input_shape=(2,), input_norm=10.0, loss=losses.TauCrossEntropy(1.0)).double()
    rows = torch.randn(200, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        apart = model(rows) - model(torch.zeros_like(rows))
    seen = ((apart[:, 0] - apart[:, 1]).abs() / rows.norm(dim=1)).max()
    assert seen > 1.0
    assert float(seen) <= float(model.margin_constants()[0, 1])


def test_a_first_layer_that_works_in_place_is_attacked_as_any() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.ReLU(inplace=True), nn.Linear(4, 3))
    model = wrapped(net, (4,))
    data = 0.5 * torch.randn(6, 4), torch.arange(6) % 3
    found, attacked = certify(model, data), attack(model, data[0])
    assert bool(attacked.distances.isfinite().any())
    assert bool((attacked.distances >= found.radii).all())
