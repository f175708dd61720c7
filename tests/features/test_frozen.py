from __future__ import annotations

import pytest
import torch
from torch import nn

from clipless_dp import ConfigurationError, InputError, PrivacyError
from clipless_dp.features import FrozenFeatures
from clipless_dp.features.frozen import fingerprint


class Backbone(nn.Module):
    def __init__(self, seed: int = 0, power: int = 1) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.net = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Tanh())
        self.power = power
        self.calls = 0

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        self.__dict__["calls"] += 1
        return self.net(inputs) ** self.power


INPUTS = torch.randn(11, 5, generator=torch.Generator().manual_seed(0))


def test_features_are_those_of_the_module_in_evaluation_mode_without_gradients():
    module = Backbone()
    expected = Backbone().eval()(INPUTS).detach()
    frozen = FrozenFeatures(module, batch_size=4).train()
    features = frozen.compute(INPUTS)
    torch.testing.assert_close(features, expected)
    assert not features.requires_grad
    assert not frozen(INPUTS).requires_grad
    assert not any(parameter.requires_grad for parameter in module.parameters())
    assert not module.training


def test_features_are_computed_once_and_then_read(tmp_path):
    module = Backbone()
    first = FrozenFeatures(module, cache_dir=tmp_path / "new", batch_size=4).compute(INPUTS)
    again = Backbone()
    second = FrozenFeatures(again, cache_dir=tmp_path / "new", batch_size=5).compute(INPUTS)
    assert module.calls > 0
    assert again.calls == 0
    assert torch.equal(first, second)
    assert len(list((tmp_path / "new").iterdir())) == 2, "features and their digest, no litter"
    second += 1.0
    assert torch.equal(first, FrozenFeatures(Backbone(), cache_dir=tmp_path / "new").compute(INPUTS))


def test_whatever_decides_the_features_changes_the_hash():
    other = Backbone()
    other.net[1].running_mean += 1.0
    rate = Backbone()
    rate.net[3] = nn.ReLU()
    variants = [Backbone(), Backbone(seed=1), Backbone(power=2), other, rate]
    hashes = {fingerprint(module, INPUTS) for module in variants}
    hashes |= {fingerprint(Backbone(), inputs) for inputs in (INPUTS + 1, INPUTS[:10], INPUTS.double())}
    assert len(hashes) == 8
    assert fingerprint(Backbone(), INPUTS.clone()) == fingerprint(Backbone(), INPUTS)


@pytest.mark.parametrize("damage", ["truncated", "flipped", "no digest", "empty", "foreign digest"])
def test_a_damaged_file_is_computed_again_with_a_warning(tmp_path, damage):
    expected = FrozenFeatures(Backbone(), cache_dir=tmp_path).compute(INPUTS).clone()
    (file,), (seal,) = tmp_path.glob("*.npy"), tmp_path.glob("*.json")
    content = bytearray(file.read_bytes())
    if damage == "flipped":
        content[-3] ^= 4
    file.write_bytes({"truncated": content[:-9], "empty": b""}.get(damage, content))
    if damage == "no digest":
        seal.unlink()
    if damage == "foreign digest":
        seal.write_text("[1]")
    with pytest.warns(UserWarning, match=r"damaged"):
        again = FrozenFeatures(Backbone(), cache_dir=tmp_path).compute(INPUTS)
    assert torch.equal(again, expected)
    assert torch.equal(FrozenFeatures(Backbone(), cache_dir=tmp_path).compute(INPUTS), expected)


class Centered(nn.Module):
    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs - inputs.mean(0)


class Noisy(nn.Module):
    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return nn.functional.dropout(inputs, 0.5, training=True)


@pytest.mark.parametrize(
    "module", [Centered(), nn.BatchNorm1d(5, track_running_stats=False), Noisy()], ids=["mean", "batch norm", "random"]
)
@pytest.mark.parametrize("count", [1, 11])
def test_modules_that_mix_samples_or_are_random_are_refused_and_nothing_is_kept(tmp_path, module, count):
    torch.manual_seed(0)
    with pytest.raises(PrivacyError, match="alone"):
        FrozenFeatures(module, cache_dir=tmp_path).compute(INPUTS[:count])
    assert not list(tmp_path.iterdir())


def test_a_part_in_training_mode_is_refused():
    module = Backbone()
    frozen = FrozenFeatures(module)
    module.net[1].train()
    with pytest.raises(PrivacyError, match=r"net\.1"):
        frozen.compute(INPUTS)


def test_bad_arguments_are_refused(tmp_path):
    with pytest.raises(ConfigurationError, match="Module"):
        FrozenFeatures(torch.tanh)
    with pytest.raises(ConfigurationError, match="batch_size"):
        FrozenFeatures(Backbone(), batch_size=0)
    with pytest.raises(InputError, match="at least one"):
        FrozenFeatures(Backbone()).compute(INPUTS[:0])
    with pytest.raises(InputError, match="one tensor"):
        FrozenFeatures(nn.Flatten(0)).compute(INPUTS)
