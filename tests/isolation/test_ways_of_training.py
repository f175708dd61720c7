"""Networks that run sample by sample train in every way that others do, to the same weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from clipless_dp import (
    CliplessDPSGD,
    DPLipModel,
    PoissonBatches,
    ReproducibleNoise,
    distributed,
    gradient_gated,
    losses,
)
from clipless_dp.distributed import placement
from tests.ranks import Failure, Ranks, same_weights, sgd, weights

LAST = torch.channels_last


def images(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(90, 3, 8, 8, generator=generator).to(dtype), torch.arange(90) % 3


def model_of(seed: int = 0, dtype: torch.dtype = torch.float32, **options: Any) -> DPLipModel:
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1),
        nn.GroupNorm(2, 8),
        nn.SiLU(),
        nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=2), nn.GroupNorm(2, 8), nn.GELU()),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 3),
    ).to(dtype)
    gated = gradient_gated(net, isolation="vmap", **options)
    return DPLipModel(gated, input_shape=(3, 8, 8), loss=losses.TauCrossEntropy(1.0))


@pytest.mark.parametrize(
    "options",
    [pytest.param({}, marks=pytest.mark.slow), {"checkpoint": "3"}],
    ids=["plain", "checkpointed"],
)
def test_images_in_channels_last_order_give_the_same_steps(options: dict[str, Any]) -> None:
    found = []
    for order in (torch.contiguous_format, LAST):
        model = model_of(dtype=torch.float64, **options).to(memory_format=order)
        settings = {"noise_multiplier": 1.0, "sample_rate": 0.3, "dataset_size": 90, "accountant": "rdp"}
        optimizer = CliplessDPSGD(model, lr=0.5, noise=ReproducibleNoise(3), **settings)
        for batch in PoissonBatches(images(torch.float64), sample_rate=0.3, steps=3, seed=4):
            optimizer.zero_grad()
            turned = batch._replace(inputs=batch.inputs.to(memory_format=order))
            optimizer.accumulate(turned, micro_batch_size=12)
            optimizer.step()
        assert all(value.is_contiguous(memory_format=order) for value in model.parameters() if value.dim() == 4)
        found.append(weights(model))
    # Float64 sums in another order.
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-10)


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with Ranks(2) as processes:
        yield processes


def scale_(tensors: list[Tensor], deviations: object, source: object, factor: float = 1.0) -> None:
    torch._foreach_mul_(tensors, factor)


def trained(options: dict[str, Any], shard: bool = False) -> Any:
    # A seed for each rank: replicas must become those of rank 0. Shards are of one model.
    model = model_of(0 if shard else distributed.world().rank, **options)
    with pytest.MonkeyPatch.context() as patch:
        if shard:
            from tests.distributed.test_sharding import fully_shard

            fully_shard(model)
        # Of shards each has noise of its own: what is left is the arithmetic.
        patch.setattr(placement, "add_normal_", scale_)
        optimizer = sgd(model)
        for step, (inputs, targets, mask) in enumerate(PoissonBatches(images(), sample_rate=0.25, steps=3, seed=5)):
            optimizer.zero_grad()
            if step == 1:
                optimizer.accumulate((inputs, targets, mask), micro_batch_size=8)
            else:
                model.loss(model(inputs), targets, mask).backward()
            optimizer.step()
    return weights(model), optimizer.accountant.history


@pytest.mark.slow
@pytest.mark.parametrize("shard", [False, True], ids=["replicated", "sharded"])
@pytest.mark.parametrize("options", [{}, {"checkpoint": "3"}], ids=["plain", "checkpointed"])
def test_two_ranks_train_as_one_process(ranks: Ranks, options: dict[str, Any], shard: bool) -> None:
    alone, history = trained({})
    for result in ranks.run(trained, options, shard):
        assert not isinstance(result, Failure), result.message
        assert same_weights(result[0], alone)
        assert result[1] == history


def shard_parts() -> str:
    from tests.distributed.test_sharding import fully_shard

    model = model_of()
    for part in model.net.children():
        fully_shard(part)
    fully_shard(model)
    optimizer = sgd(model)
    inputs, targets, mask = next(iter(PoissonBatches(images(), sample_rate=0.25, steps=1, seed=5)))
    model.loss(model(inputs), targets, mask).backward()
    optimizer.step()
    return "trained"


@pytest.mark.slow
def test_parts_that_are_sharded_by_themselves_are_refused(ranks: Ranks) -> None:
    for result in ranks.run(shard_parts):
        assert isinstance(result, Failure)
        assert result.kind == "PrivacyError"
