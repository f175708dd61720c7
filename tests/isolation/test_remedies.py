"""Who is refused is told what to write instead, and that is accepted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from clipless_dp import DPLipModel, gradient_gated, losses
from clipless_dp.errors import CliplessError, ConfigurationError, PrivacyError, UnsupportedModuleError


class Around(nn.Module):
    """A layer, and others that no graph has rules for."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.norm, self.head = layer, nn.LayerNorm(5), nn.Linear(5, 3)

    def forward(self, values: Tensor) -> Tensor:
        return self.head(self.norm(self.layer(values)).mean(1))  # type: ignore[no-any-return]


class OfLast(nn.Module):
    """A recurrent layer's output for the last token that is not zero."""

    def __init__(self, least: int | None, *, packs: bool = False) -> None:
        super().__init__()
        self.layer, self.head = nn.GRU(5, 4, batch_first=True), nn.Linear(4, 3)
        self.least, self.packs = least, packs

    def forward(self, values: Tensor) -> Tensor:
        lengths = (values.abs().sum(-1) > 0).sum(1)
        if self.packs:
            packed = nn.utils.rnn.pack_padded_sequence(values, lengths.cpu(), batch_first=True, enforce_sorted=False)
            return self.head(self.layer(packed)[1][-1])  # type: ignore[no-any-return]
        places = (lengths - 1 if self.least is None else (lengths - 1).clamp(min=self.least)).view(-1, 1, 1)
        outputs, _ = self.layer(values)
        return self.head(outputs.gather(1, places.expand(-1, 1, 4)).squeeze(1))  # type: ignore[no-any-return]


class DropsLayers(nn.Module):
    def __init__(self, layerdrop: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(5, 5) for _ in range(2))
        self.head, self.layerdrop = nn.Linear(5, 3), layerdrop

    def forward(self, values: Tensor) -> Tensor:
        for layer in self.layers:
            if not (self.layerdrop and bool(torch.rand([]) < self.layerdrop)):
                values = torch.tanh(layer(values))
        return self.head(values.mean(1))  # type: ignore[no-any-return]


def pruned(*, removed: bool) -> nn.Module:
    layer = prune.l1_unstructured(nn.Linear(5, 5), "weight", amount=0.25)
    return Around(prune.remove(layer, "weight") if removed else layer)


def of_spectral_norm(*, frozen: bool) -> nn.Module:
    net = Around(parametrizations.spectral_norm(nn.Linear(5, 5)))
    if frozen:
        net.layer.parametrizations.eval()  # type: ignore[union-attr, operator]
    return net


CASES: dict[str, tuple[Callable[[], nn.Module], str, Callable[[], nn.Module]]] = {
    "weight_norm": (
        lambda: Around(nn.utils.weight_norm(nn.Linear(5, 5))),
        r"layer \(Linear\): .*use torch\.nn\.utils\.parametrizations\.weight_norm",
        lambda: Around(parametrizations.weight_norm(nn.Linear(5, 5))),
    ),
    "prune": (lambda: pruned(removed=False), r"prune\.remove\(layer, name\)", lambda: pruned(removed=True)),
    "spectral_norm": (
        lambda: of_spectral_norm(frozen=False),
        r"power iteration.*freeze it by eval\(\)",
        lambda: of_spectral_norm(frozen=True),
    ),
    "former spectral_norm": (
        lambda: Around(nn.utils.spectral_norm(nn.Linear(5, 5))),
        "remove_spectral_norm",
        lambda: Around(nn.utils.remove_spectral_norm(nn.utils.spectral_norm(nn.Linear(5, 5)))),
    ),
    "compiled": (
        lambda: Around(torch.compile(nn.Linear(5, 5), backend="eager")),  # type: ignore[arg-type]
        r"layer \(OptimizedModule\): it was compiled.*_orig_mod",
        lambda: Around(torch.compile(nn.Linear(5, 5), backend="eager")._orig_mod),  # type: ignore[attr-defined]
    ),
    "packed": (lambda: OfLast(None, packs=True), r"gather, at \(lengths - 1\)\.clamp\(min=0\)", lambda: OfLast(0)),
    "place": (lambda: OfLast(None), r"write \(lengths - 1\)\.clamp\(min=0\)", lambda: OfLast(0)),
    "layerdrop": (lambda: DropsLayers(0.3), "set layerdrop=0", lambda: DropsLayers(0.0)),
}


def model_of(net: nn.Module) -> DPLipModel:
    torch.manual_seed(0)
    return DPLipModel(gradient_gated(net, isolation="vmap"), input_shape=(7, 5), loss=losses.TauCrossEntropy(1.0))


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("name", CASES)
def test_what_is_refused_is_told_what_to_write_and_that_trains(name: str) -> None:
    wrong, told, right = CASES[name]
    with pytest.raises(CliplessError, match=told) as refused:
        model_of(wrong())
    assert isinstance(refused.value, (UnsupportedModuleError, ConfigurationError))
    # Behind gates already, it is not told to go there.
    assert "any layer runs as it is" not in str(refused.value)
    assert "sensitivity rule" not in str(refused.value)
    model = model_of(right()).train()
    for _ in range(2):
        model.loss(model(torch.randn(3, 7, 5)), torch.tensor([0, 1, 2])).backward()
    assert all(value.grad is not None for value in model.net.parameters() if value.requires_grad)


def test_a_frozen_power_iteration_stays_frozen() -> None:
    model = model_of(of_spectral_norm(frozen=True)).train()
    assert not any(part.training for path, part in model.net.named_modules() if path.endswith("weight.0"))


def test_what_is_trained_in_front_of_an_isolated_part_is_told_that_the_part_has_no_lipschitz_constant() -> None:
    class Front(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(5, 5)
            self.part: Any = gradient_gated(Around(nn.Linear(5, 5)), isolation="vmap")

        def forward(self, values: Tensor) -> Tensor:
            return self.part(self.first(values))  # type: ignore[no-any-return]

    settings: dict[str, Any] = {"input_shape": (7, 5), "input_norm": 1.0, "loss": losses.TauCrossEntropy(1.0)}
    with pytest.raises(PrivacyError, match=r"'first.weight' is inf.*The part 'part' .* has no Lipschitz constant"):
        DPLipModel(Front(), **settings).sensitivity()
    assert DPLipModel(gradient_gated(Front(), isolation="graph"), **settings).sensitivity().total < 10.0
