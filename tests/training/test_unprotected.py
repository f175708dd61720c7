"""Training without privacy learns, keeps constraints, leaves no gradients behind, and says what it is."""

from __future__ import annotations

import copy
import math
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from clipless_dp import constraints, layers, losses
from clipless_dp.errors import ConfigurationError, InputError, PrivacyError
from clipless_dp.model import DPLipModel
from clipless_dp.optim import CliplessDPSGD
from clipless_dp.sampling import PoissonBatches
from clipless_dp.statement import report
from clipless_dp.training import fit, fit_without_privacy
from tests.support import samples


def model_of(seed: int = 0) -> DPLipModel:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(6, 8), layers.GroupSort(2), nn.Linear(8, 3))
    return DPLipModel(
        net,
        input_shape=(6,),
        input_norm=5.0,
        loss=losses.TauCrossEntropy(8.0),
        constraint=constraints.Orthogonal(),
    )


def test_it_learns_within_the_constraints_and_says_that_it_is_not_private() -> None:
    model = model_of()
    result = fit_without_privacy(
        model, samples(400), epochs=6, batch_size=32, lr=3e-2, validation=samples(200, 1), rng_seed=0, progress=False
    )
    assert result.steps == 6 * 13
    assert result.accuracies[-1] is not None
    # Chance is a third.
    assert result.accuracies[-1] > 0.7
    assert result.losses[-1] < result.losses[0]
    assert model.lipschitz_constant() <= 1.0 + 1e-8
    assert "NOT PRIVATE" in str(result)
    assert result.epsilon == math.inf
    assert all(parameter.grad is None for parameter in model.net.parameters())


def test_the_loop_in_the_documentation_does_the_same() -> None:
    text = (Path(__file__).parents[2] / "docs" / "robustness.md").read_text("utf-8")
    (loop,) = (block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "NOT PRIVATE" in block)
    model, (inputs, labels) = model_of(), samples(400)
    before = model.net[0].weight.detach().clone()
    loader = zip(inputs.split(16), labels.split(16), strict=True)
    exec(loop, {"model": model, "torch": torch, "loader": loader})
    assert not torch.equal(model.net[0].weight, before)
    assert model.lipschitz_constant() <= 1.0 + 1e-8
    assert all(parameter.grad is None for parameter in model.net.parameters())


def test_a_seed_makes_it_reproducible() -> None:
    twins = []
    for seed in (3, 3, 4):
        model = model_of()
        fit_without_privacy(model, samples(60), epochs=1, batch_size=16, rng_seed=seed, progress=False)
        twins.append(model.net[0].weight.detach().clone())
    assert torch.equal(twins[0], twins[1])
    assert not torch.equal(twins[0], twins[2])


def test_an_optimizer_of_ones_own_is_used_and_samples_that_are_not_finite_count_for_nothing() -> None:
    made = []

    def build(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        made.append(parameters)
        return torch.optim.SGD(parameters, 0.1)

    inputs, labels = samples(40)
    inputs[3] = math.nan
    model = model_of()
    fit_without_privacy(model, (inputs, labels), epochs=1, batch_size=8, optimizer=build, progress=False)
    assert len(made) == 1
    assert all(bool(parameter.isfinite().all()) for parameter in model.net.parameters())


def test_fit_itself_cannot_be_switched_to_no_privacy() -> None:
    for epsilon in (None, math.inf, "none"):
        with pytest.raises(ConfigurationError):
            fit(model_of(), samples(40), epsilon=epsilon, delta=1e-3, epochs=1, batch_size=8)  # type: ignore[arg-type]


def findings_of_a_private_run(model: DPLipModel) -> str:
    data = samples(60)
    optimizer = CliplessDPSGD(model, lr=0.1, noise_multiplier=2.0, sample_rate=0.2, dataset_size=60)
    for inputs, labels, mask in PoissonBatches(data, sample_rate=0.2, steps=1):
        optimizer.zero_grad()
        model.loss(model(inputs), labels, mask).backward()
        optimizer.step()
    return "\n".join(report(optimizer, delta=1e-3).facts["findings"])


FOUND = "something else had set or trained them"


def test_a_private_run_that_goes_on_from_there_says_so() -> None:
    model = model_of()
    assert FOUND not in findings_of_a_private_run(model_of())
    fit_without_privacy(model, samples(60), epochs=1, batch_size=16, rng_seed=0, progress=False)
    assert FOUND in findings_of_a_private_run(copy.deepcopy(model))
    assert FOUND in findings_of_a_private_run(model)


def test_a_private_run_says_so_of_training_that_was_interrupted() -> None:
    class Interrupts:
        def step(self) -> None:
            raise KeyboardInterrupt

    model = model_of()
    before = model.net[0].weight.detach().clone()
    with pytest.raises(KeyboardInterrupt):
        fit_without_privacy(
            model, samples(60), epochs=1, batch_size=16, progress=False, scheduler=lambda base, steps: Interrupts()
        )
    assert not torch.equal(model.net[0].weight, before)
    assert FOUND in findings_of_a_private_run(model)


def test_validation_data_that_does_not_fit_is_refused_before_the_first_step() -> None:
    inputs, labels = samples(40)
    model = model_of()
    before = {name: value.clone() for name, value in model.net.state_dict().items()}
    with pytest.raises(InputError):
        fit_without_privacy(
            model, (inputs, labels), epochs=1, batch_size=8, validation=(inputs[:, :3], labels), progress=False
        )
    assert all(torch.equal(value, before[name]) for name, value in model.net.state_dict().items())
    assert FOUND not in findings_of_a_private_run(model)


class Sharpened(nn.Module):
    """Depends on an attribute that is no setting of a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.factor = nn.Linear(6, 3), 1.0

    def forward(self, values: Tensor) -> Tensor:
        return self.factor * self.body(values)


def test_what_is_trained_is_the_graph_that_the_model_runs() -> None:
    nets = []
    for factor in (1.0, 1e3):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            net = Sharpened()
        model = DPLipModel(net, input_shape=(6,), input_norm=5.0, loss=losses.TauCrossEntropy(8.0))
        net.factor = factor
        fit_without_privacy(model, samples(40), epochs=1, batch_size=16, rng_seed=0, progress=False)
        nets.append(net.body.weight.detach())
    assert torch.equal(*nets)
    model = model_of()
    hook = nn.modules.module.register_module_forward_hook(lambda module, given, output: None)
    try:
        with pytest.raises(PrivacyError, match="global module hook"):
            fit_without_privacy(model, samples(40), epochs=1, batch_size=16, progress=False)
    finally:
        hook.remove()


def test_networks_with_dropout_train_too() -> None:
    net = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), layers.GroupSort(2), nn.Linear(8, 3))
    model = DPLipModel(net, input_shape=(6,), input_norm=5.0, loss=losses.TauCrossEntropy(8.0))
    before = net[0].weight.detach().clone()
    fit_without_privacy(model, samples(40), epochs=1, batch_size=16, progress=False)
    assert not torch.equal(net[0].weight, before)
    assert bool(net[0].weight.isfinite().all())


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ConfigurationError):
        fit_without_privacy(model_of(), samples(40), epochs=0, batch_size=8)
    with pytest.raises(ConfigurationError):
        fit_without_privacy(nn.Linear(6, 3), samples(40), epochs=1, batch_size=8)  # type: ignore[arg-type]
    with pytest.raises(InputError):
        fit_without_privacy(model_of(), (torch.zeros(4, 5), torch.zeros(4, dtype=torch.int64)), epochs=1, batch_size=2)
    frozen = model_of()
    frozen.net.requires_grad_(False)
    with pytest.raises(ConfigurationError, match="no parameters"):
        fit_without_privacy(frozen, samples(40), epochs=1, batch_size=8)
    bags = DPLipModel(nn.Sequential(nn.EmbeddingBag(4, 2)), input_shape=(3,), loss=losses.Huber())
    with pytest.raises(ConfigurationError, match="loop of your own"):
        fit_without_privacy(bags, (torch.zeros(4, 3, dtype=torch.int64), torch.zeros(4, 2)), epochs=1, batch_size=2)
