from __future__ import annotations

import contextlib
import importlib
import math
import sys
import warnings
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from clipless_dp import ConfigurationError, InputError, PrivacyError
from clipless_dp.features import FrozenFeatures, MirroredScattering, RandomCosines, told
from clipless_dp.features.frozen import fingerprint
from clipless_dp.sampling import reach


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
    assert module.calls > 2
    assert again.calls == 1, "one batch, to compare"
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


class Set(nn.Module):
    """A module whose output is decided by whatever is set on it."""

    def __init__(self, how: object) -> None:
        super().__init__()
        self.how = how

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        how = self.how["how"] if isinstance(self.how, dict) else self.how
        return how(inputs) if callable(how) else inputs * torch.as_tensor(how)


def twice(inputs: torch.Tensor) -> torch.Tensor:
    return 2 * inputs


def thrice(inputs: torch.Tensor) -> torch.Tensor:
    return 3 * inputs


def times(factor: float, inputs: torch.Tensor) -> torch.Tensor:
    return factor * inputs


def _scaled(factor: float) -> type[nn.Module]:
    class Scaled(nn.Module):
        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return inputs * factor

    return Scaled


def _hooked(factor: float) -> nn.Module:
    module = nn.Tanh()
    module.register_forward_hook(lambda part, given, made: factor * made)
    return module


def _with_a_tensor_of_its_class(factor: float) -> nn.Module:
    kind = type("Set", (Set,), {"factors": torch.full((5,), factor), "forward": lambda self, x: x * self.factors})
    kind.__module__ = __name__
    return kind(0.0)


def _with_a_method_set_afterwards(factor: float) -> nn.Module:
    kind = type("Set", (Set,), {})
    kind.__module__ = __name__
    kind.forward = (lambda self, x: 2.0 * x) if factor == 2.0 else (lambda self, x: 3.0 * x)
    return kind(0.0)


@dataclass
class Settings:
    factors: torch.Tensor

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs * self.factors[-5:]


class Says:
    """As configurations of other packages do."""

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def to_dict(self) -> dict[str, object]:
        return {"of many": torch.full((5000,), self.factor)}

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs * self.factor


def _long(factor: float) -> torch.Tensor:
    """A tensor whose text tells but a part of it."""
    return torch.cat([torch.zeros(3000), torch.full((5,), factor), torch.zeros(3000), torch.full((5,), factor)])


TWINS = {
    "methods set afterwards": (True, lambda: (_with_a_method_set_afterwards(2.0), _with_a_method_set_afterwards(3.0))),
    "data classes": (True, lambda: (Set(Settings(_long(2.0))), Set(Settings(_long(3.0))))),
    "configurations": (True, lambda: (Set(Says(2.0)), Set(Says(3.0)))),
    "tensors": (True, lambda: (Set(torch.ones(5)), Set(torch.full((5,), 3.0)))),
    "arrays": (True, lambda: (Set(torch.ones(5).numpy()), Set(torch.full((5,), 3.0).numpy()))),
    "numbers in a mapping": (True, lambda: (Set({"how": 1.0}), Set({"how": 3.0}))),
    "functions of a file": (True, lambda: (Set(twice), Set(thrice))),
    "functions of torch": (True, lambda: (Set(torch.tanh), Set(torch.relu))),
    "functions with arguments": (True, lambda: (Set(partial(times, 2.0)), Set(partial(times, 3.0)))),
    "functions made on the spot": (False, lambda: (Set(lambda x: x), Set(lambda x: 3 * x))),
    "objects": (False, lambda: (Set(Times(2.0)), Set(Times(3.0)))),
    "modules in a mapping": (False, lambda: (Set({"how": nn.PReLU(init=0.1)}), Set({"how": nn.PReLU(init=0.9)}))),
    "classes with closures": (True, lambda: (_scaled(2.0)(), _scaled(3.0)())),
    "hooks": (False, lambda: (_hooked(2.0), _hooked(3.0))),
    "tensors of a class": (True, lambda: (_with_a_tensor_of_its_class(2.0), _with_a_tensor_of_its_class(3.0))),
}


def _by_default(factor: float) -> type[nn.Module]:
    class Scaled(nn.Module):
        def forward(self, inputs: torch.Tensor, times: float = factor) -> torch.Tensor:
            return inputs * times

    return Scaled


def _by_a_class(factor: float) -> type[nn.Module]:
    class Held:
        times = factor

    class Scaled(nn.Module):
        held = Held

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return inputs * self.held.times

    return Scaled


class Attributes(dict):  # type: ignore[type-arg]
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.times = factor


class ByAttributes(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.held = Attributes(factor)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs * self.held.times


@pytest.mark.parametrize("made", [_by_default, _by_a_class, lambda factor: partial(ByAttributes, factor)])
def test_features_that_the_module_does_not_make_are_computed_again_whatever_the_hash_missed(tmp_path, made):
    first, second = made(2.0)(), made(3.0)()
    # The case is about modules that no hash tells apart: another way in must be found where this one is closed.
    assert fingerprint(first, INPUTS) == fingerprint(second, INPUTS) is not None
    FrozenFeatures(first, cache_dir=tmp_path, batch_size=4).compute(INPUTS)
    with pytest.warns(UserWarning, match="holds other features than"):
        found = FrozenFeatures(second, cache_dir=tmp_path, batch_size=4).compute(INPUTS)
    torch.testing.assert_close(found, 3.0 * INPUTS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = FrozenFeatures(second, cache_dir=tmp_path, batch_size=4).compute(INPUTS)
    assert torch.equal(again, found)


class Times:
    def __init__(self, factor: float) -> None:
        self.factor = factor

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.factor * inputs


@pytest.mark.parametrize("name", TWINS)
@pytest.mark.filterwarnings("ignore:.*what no hash tells:UserWarning")
def test_a_module_is_given_no_features_of_another_one_that_differs_in_what_is_set_on_it(tmp_path, name):
    is_told, made = TWINS[name]
    for module in (*made(), *made()):
        found = FrozenFeatures(module, cache_dir=tmp_path).compute(INPUTS)
        torch.testing.assert_close(found, module(INPUTS).detach())
    assert len(list(tmp_path.glob("*.npy"))) == 2 * is_told, "what is told is kept, once each"


def test_that_features_are_not_kept_is_said_with_the_reason(tmp_path):
    with pytest.warns(UserWarning, match="Set holds what no hash tells .a function made on the spot"):
        FrozenFeatures(Set(lambda x: x), cache_dir=tmp_path).compute(INPUTS)
    assert not list(tmp_path.iterdir())


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


class Quantised(nn.Module):
    """One scale for all numbers of a batch, as dynamic quantisation has."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        scale = inputs.abs().max() / 127.0
        return (inputs / scale).round() * scale


class CenteredIfMany(nn.Module):
    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs - inputs.mean(0) if len(inputs) > 32 else inputs


class Experts(nn.Module):
    """The samples beyond the capacity of their expert come out as zeros."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        chosen, capacity = inputs.argmax(1), int(1.25 * len(inputs) / inputs.shape[1])
        out = torch.zeros_like(inputs)
        for expert in range(inputs.shape[1]):
            rows = (chosen == expert).nonzero().flatten()[:capacity]
            out[rows] = inputs[rows] + expert
        return out


class Running(nn.Module):
    """Adds what it has seen in all batches but the first ones."""

    def __init__(self, spared: int = 0, *, buffer: bool = True) -> None:
        super().__init__()
        self.spared, self.calls = spared, 0
        if buffer:
            self.register_buffer("seen", torch.zeros(()))
        else:
            self.seen = torch.zeros(())

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if self.calls > self.spared:
            self.seen += inputs.sum()
        return inputs + self.seen


def outgoing(count: int) -> torch.Tensor:
    """Rows in which all batches have the same largest number, so that a scale of the batch is always the same."""
    rows = torch.rand(count, 5, generator=torch.Generator().manual_seed(1))
    rows[:, 0] = 1.0
    return rows


MIXERS = {
    "mean": Centered,
    "batch norm": lambda: nn.BatchNorm1d(5, track_running_stats=False),
    "random": Noisy,
    "one scale": Quantised,
    "mean of more than 32": CenteredIfMany,
    "experts of limited capacity": Experts,
    "running state": Running,
    "running state after the first batch": lambda: Running(8),
    "running state that is no buffer": lambda: Running(8, buffer=False),
}


@pytest.mark.parametrize("kind", MIXERS)
@pytest.mark.parametrize("count", [1, 11, 40, 200])
def test_modules_that_mix_samples_or_are_random_are_refused_and_nothing_is_kept(tmp_path, kind, count):
    torch.manual_seed(0)
    if (count < 200 and kind.startswith("running state ")) or (count == 1 and kind.startswith("experts")):
        pytest.skip("nothing has happened yet")
    with pytest.raises(PrivacyError, match=r"in other company|changed while"):
        FrozenFeatures(MIXERS[kind](), cache_dir=tmp_path, batch_size=40).compute(outgoing(count))
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif("x86" not in torch.backends.quantized.supported_engines, reason="needs quantised products")
@pytest.mark.filterwarnings("ignore")
def test_dynamically_quantised_modules_are_refused():
    module = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(5, 4)), {nn.Linear})
    with pytest.raises(PrivacyError, match="static quantisation"):
        FrozenFeatures(module).compute(outgoing(50))


@pytest.mark.parametrize("mutant", ["small batches", "no strangers", "the same company"])
def test_a_weaker_check_lets_mixers_through(monkeypatch, mutant):
    """Why it looks at whole batches, at rows unlike the data, and at each sample twice."""
    module = {"small batches": CenteredIfMany, "no strangers": Quantised, "the same company": Centered}[mutant]()
    if mutant == "small batches":
        features = FrozenFeatures(module, batch_size=16)
    else:
        features = FrozenFeatures(module, batch_size=40)
    if mutant == "no strangers":
        monkeypatch.setattr(
            FrozenFeatures, "_strangers", lambda self, inputs, kind: inputs[:1].expand(self.batch_size, -1)
        )
    if mutant == "the same company":
        monkeypatch.setattr(FrozenFeatures, "_require_independence", lambda self, inputs, features, kinds=(): None)
    features.compute(outgoing(200))


class Remembering(nn.Module):
    """What it was asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[torch.Tensor] = []

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        self.asked.append(inputs.clone())
        return 2.0 * inputs


@pytest.mark.parametrize(("count", "size"), [(200, 40), (190, 40), (41, 40), (40, 40), (7, 40), (1, 40), (30, 4)])
def test_every_sample_is_computed_twice_in_whole_batches_at_other_places_with_hardly_a_neighbour_in_common(count, size):
    module, inputs = Remembering(), torch.rand(count, 3)
    FrozenFeatures(module, batch_size=size).compute(inputs)
    assert all(len(batch) == size for batch in module.asked)
    first, batches = 1 + 2 * 3, -(-count // size)
    passes = [module.asked[:1] + module.asked[first : first + batches - 1], module.asked[first + batches - 1 :]]
    if count <= size:
        passes = [module.asked[:1], module.asked[1:3]]
    where = [
        {tuple(row.tolist()): (number, place) for number, batch in enumerate(one) for place, row in enumerate(batch)}
        for one in passes
    ]
    # The second time batches are one more, among which samples that were together are spread evenly.
    together = -(-size // (batches + 1))
    for index in range(0, count, 7):
        places = [one[tuple(inputs[index].tolist())] for one in where]
        assert places[0] == (index // size, index % size)
        assert places[1][1] != places[0][1]
        number = places[1][0]
        same = sum(where[1][tuple(row.tolist())][0] == number for row in inputs[places[0][0] * size :][:size])
        assert same <= together


def test_numbers_that_are_not_finite_stay_with_their_sample():
    inputs = outgoing(50)
    inputs[3, 2], inputs[20, 1] = math.nan, math.inf
    features = FrozenFeatures(nn.Linear(5, 4), batch_size=16).compute(inputs)
    assert torch.isfinite(features).all(1).tolist() == [index not in (3, 20) for index in range(50)]


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.float16, torch.bfloat16])
def test_inputs_of_other_types_are_checked_in_other_company_too(dtype):
    inputs = (torch.rand(50, 6, generator=torch.Generator().manual_seed(0)) * 5).floor().clamp(min=1).sub(1).to(dtype)

    class Halves(nn.Module):
        def forward(self, some: torch.Tensor) -> torch.Tensor:
            return some.float() / 2

    class Mixed(Halves):
        def forward(self, some: torch.Tensor) -> torch.Tensor:
            return super().forward(some) - some.float().mean(0)

    torch.testing.assert_close(FrozenFeatures(Halves(), batch_size=16).compute(inputs), inputs.float() / 2)
    with pytest.raises(PrivacyError, match="company"):
        FrozenFeatures(Mixed(), batch_size=16).compute(inputs)


def test_a_module_that_fails_on_rows_unlike_the_data_is_told_what_to_do():
    class Ranged(nn.Module):
        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            if inputs.abs().max() > 10:
                raise ValueError("pixels lie in [0, 1]")
            return inputs

    with pytest.raises(InputError, match=r"pixels lie in \[0, 1\].*clamp"):
        FrozenFeatures(Ranged()).compute(outgoing(5))


def test_modules_of_this_library_are_computed_once_and_changed_ones_are_not(monkeypatch):
    calls = []
    honest = FrozenFeatures._batch
    monkeypatch.setattr(FrozenFeatures, "_batch", lambda self, inputs: calls.append(1) or honest(self, inputs))

    class Own(RandomCosines):
        pass

    cosines = RandomCosines(5, 8)
    hooked = RandomCosines(5, 8)
    hooked.register_forward_hook(lambda module, inputs, output: output - output.mean(0))
    FrozenFeatures(nn.Sequential(cosines, nn.Flatten()), batch_size=10).compute(INPUTS)
    assert len(calls) == 2
    FrozenFeatures(Own(5, 8), batch_size=10).compute(INPUTS)
    assert len(calls) == 2 + 2 + 6 + 3 + 2
    with pytest.raises(PrivacyError, match="company"):
        FrozenFeatures(hooked, batch_size=10).compute(INPUTS)


def test_a_part_in_training_mode_is_refused():
    module = Backbone()
    frozen = FrozenFeatures(module)
    module.net[1].train()
    with pytest.raises(PrivacyError, match=r"net\.1"):
        frozen.compute(INPUTS)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (torch.Tensor.half, "fails on inputs of torch.float16.*convert"),
        (torch.Tensor.int, "fails on inputs of torch.int32.*convert"),
        (torch.Tensor.to_sparse, "make it dense"),
        (torch.Tensor.to_sparse_csr, "make it dense"),
        (lambda values: torch.nested.nested_tensor([values]), "make it dense"),
    ],
)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested:UserWarning", "ignore:Sparse CSR:UserWarning")
def test_inputs_of_another_dtype_or_layout_are_refused_in_words(make, words):
    with pytest.raises(InputError, match=words):
        FrozenFeatures(nn.Linear(4, 3)).compute(make(torch.ones(8, 4)))


def test_bad_arguments_are_refused(tmp_path):
    with pytest.raises(ConfigurationError, match="Module"):
        FrozenFeatures(torch.tanh)
    with pytest.raises(ConfigurationError, match="batch_size"):
        FrozenFeatures(Backbone(), batch_size=0)
    with pytest.raises(InputError, match="at least one"):
        FrozenFeatures(Backbone()).compute(INPUTS[:0])
    with pytest.raises(InputError, match="one tensor"):
        FrozenFeatures(nn.Flatten(0)).compute(INPUTS)


class FromTheFirstBatch(nn.Module):
    """A normalisation that begins with the statistics of what comes first, as flows do."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(8))
        self.register_buffer("begun", torch.tensor(0))

    def forward(self, values: Tensor) -> Tensor:
        if not int(self.begun):
            self.scale.copy_(values.std(0))
            self.begun.fill_(1)
        return values / self.scale


def test_a_module_that_takes_a_state_from_its_first_batch_is_refused() -> None:
    with pytest.raises(PrivacyError, match="the batch that came first"):
        FrozenFeatures(FromTheFirstBatch(), batch_size=64).compute(torch.randn(300, 8))


_PACKAGED = """
import functools, contextlib
import torch
from torch import nn

def within(context):
    def decorate(function):
        @functools.wraps(function)
        def wrapped(*args):
            with context:
                return function(*args)
        return wrapped
    return decorate

class Backbone(nn.Module):
    power = 2

    @within(contextlib.nullcontext())
    def forward(self, inputs):
        return self.scale(inputs) ** self.power

    def scale(self, inputs):
        return 2.0 * inputs
"""


def test_modules_of_installed_packages_are_told_by_their_version_and_what_others_set_on_them(tmp_path, monkeypatch):
    folder = tmp_path / "site-packages"
    for version in ("1.0", "1.1"):
        (folder / f"packaged_features-{version}.dist-info").mkdir(parents=True)
    (folder / "packaged_features.py").write_text(_PACKAGED)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, "packaged_features", raising=False)
    told._distributions.cache_clear()
    told._version.cache_clear()
    reach.is_installed.cache_clear()
    version = ["1.0"]
    monkeypatch.setattr(told.metadata, "packages_distributions", lambda: {"packaged_features": ["packaged-features"]})
    monkeypatch.setattr(told.metadata, "version", lambda name: version[0])
    kind = importlib.import_module("packaged_features").Backbone
    # What its decorator encloses no hash can tell: the version does.
    first = fingerprint(kind().eval(), INPUTS)
    assert first is not None
    assert first == fingerprint(kind().eval(), INPUTS)
    version[0] = "1.1"
    told._version.cache_clear()
    seen = {first, fingerprint(kind().eval(), INPUTS)}
    monkeypatch.setattr(kind, "scale", lambda self, inputs: 3.0 * inputs)
    seen.add(fingerprint(kind().eval(), INPUTS))
    monkeypatch.setattr(kind, "power", 3)
    seen.add(fingerprint(kind().eval(), INPUTS))
    factor = contextlib.nullcontext(3.0)
    monkeypatch.setattr(kind, "scale", lambda self, inputs: factor.enter_result * inputs)
    assert len(seen) == 4
    assert fingerprint(kind().eval(), INPUTS) is None, "nothing tells what a method of somebody else encloses"
    told._distributions.cache_clear()
    told._version.cache_clear()
    reach.is_installed.cache_clear()


def test_features_of_the_library_s_own_that_were_made_under_another_precision_are_computed_again(tmp_path):
    images = torch.rand(6, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    front = MirroredScattering((16, 16))
    with torch.autocast("cpu", torch.bfloat16):
        FrozenFeatures(front, cache_dir=tmp_path).compute(images)
    with pytest.warns(UserWarning, match="holds other features than"):
        found = FrozenFeatures(front, cache_dir=tmp_path).compute(images)
    torch.testing.assert_close(found, FrozenFeatures(front).compute(images))
