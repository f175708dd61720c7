"""Between two steps nothing waits for the device, where bounds do not depend on the weights.

Tensors of torch's ``meta`` device have shapes and no numbers: whatever looks at one (``.item()``, ``bool()``,
``.tolist()``, a mask as an index, rows whose number depends on data) raises. On a real device the host would wait.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from clipless_dp import (
    CliplessDPSGD,
    ConfigurationError,
    DPLipModel,
    PoissonBatches,
    ShiftAndFlip,
    WeightAverage,
    gated,
    gradient_gated,
    losses,
)
from clipless_dp.gates import signal as gates_module
from clipless_dp.precision import full_precision
from clipless_dp.sampling import batches as batches_module

GATES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "clipping": gated,
    "normalising": partial(gated, cotangent_mode="normalize"),
    "gradient gates": gradient_gated,
}


class NoNumbers:
    """Noise for tensors that have no numbers."""

    reproducible = True

    def begin_step(self, step: int) -> None:
        pass

    def standard_normal_(self, out: Tensor) -> Tensor:
        return out.normal_()


def train(
    gate: Callable[[nn.Module], nn.Module], device: str, steps: int, warm: Callable[[], object] = lambda: None
) -> CliplessDPSGD:
    """Steps of all that ``fit`` does in its loop; ``warm`` is called after the first three."""
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3, stride=2, padding=1, bias=False),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(36, 16),
        nn.ReLU(),
        nn.Linear(16, 3),
    )
    model = DPLipModel(gate(net), input_shape=(1, 12, 12), input_norm=3.0, loss=losses.TauCrossEntropy(4.0)).to(device)
    optimizer = CliplessDPSGD(
        model,
        lr=0.1,
        momentum=0.9,
        noise_multiplier=1.0,
        sample_rate=0.2,
        dataset_size=200,
        accountant="rdp",
        noise=NoNumbers() if device == "meta" else None,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    average = WeightAverage(model, 0.9)
    data = torch.rand(200, 1, 12, 12, device=device), torch.zeros(200, dtype=torch.int64, device=device)
    for step, batch in enumerate(PoissonBatches(data, sample_rate=0.2, steps=steps)):
        if step == 3:
            warm()
        optimizer.zero_grad()
        optimizer.accumulate(batch, augment=ShiftAndFlip(1), multiplicity=2, micro_batch_size=32)
        optimizer.step()
        schedule.step()
        average.update()
    return optimizer


@pytest.fixture
def meta(monkeypatch) -> str:
    # Autocast does not know the device, and so is off there.
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *device: False)
    return "meta"


@pytest.mark.parametrize("gate", GATES)
def test_nothing_in_sampling_and_step_looks_at_a_number(meta, gate) -> None:
    optimizer = train(GATES[gate], meta, steps=2)
    assert optimizer.accountant.history == [(1.0, 0.2, 2)]


@pytest.mark.parametrize("mutant", ["a mask as an index", "rows that depend on the data", "a finite check", "a log"])
def test_what_looks_at_a_number_is_caught(meta, monkeypatch, mutant) -> None:
    honest_norms, honest_batch = gates_module.sample_norms, batches_module.padded_batch

    def norms(values: Tensor) -> Tensor:
        found = honest_norms(values)
        if mutant == "a mask as an index":
            found[~torch.isfinite(found)] = 0.0
            found[found > 1.0].sum()
        elif mutant == "a finite check":
            assert bool(torch.isfinite(found).all())
        elif mutant == "a log":
            found.max().item()
        return found

    def batch(inputs: Tensor, targets: Tensor, indices: Tensor, multiple: int) -> batches_module.Batch:
        if mutant == "rows that depend on the data":
            indices = torch.nonzero(torch.rand(len(inputs), device=inputs.device) < 0.2)[:, 0]
        return honest_batch(inputs, targets, indices, multiple)

    monkeypatch.setattr(gates_module, "sample_norms", norms)
    monkeypatch.setattr(batches_module, "padded_batch", batch)
    # NotImplementedError is a RuntimeError; what fails while the network is traced is named by this package.
    with pytest.raises((RuntimeError, ConfigurationError), match="meta"):
        train(gated, meta, steps=1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="asks CUDA itself")
@pytest.mark.parametrize("gate", GATES)
def test_a_cuda_device_is_not_waited_for(gate) -> None:
    try:
        with full_precision():
            optimizer = train(GATES[gate], "cuda", steps=6, warm=lambda: torch.cuda.set_sync_debug_mode("error"))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert optimizer.accountant.history == [(1.0, 0.2, 6)]
