"""One layer made observable: between two probes, inside the real wrapped model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from clipless_dp.constraints import ConstraintSpec
from clipless_dp.losses.base import InnerProduct
from clipless_dp.model import DPLipModel
from clipless_dp.rules import LayerBounds, RuleContext, register_rule

Fill = Callable[[Tensor], object]
"""Overwrites a parameter in place."""


class Probe(nn.Module):
    """The identity, with a parameter whose per-sample gradient *is* the cotangent; it also keeps what it saw.

    Args:
        shape: of one sample.

    Shape:
        ``(B, *shape)`` to the same shape.
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(shape))
        self.seen: Tensor | None = None

    def forward(self, values: Tensor) -> Tensor:
        """Adds the shift, which is zero."""
        self.seen = values
        return values + self.shift


@register_rule(Probe)
def probe_rule(module: Probe, context: RuleContext) -> LayerBounds:
    """``Y = X``, ``K = 1``, ``Δ_shift = G``: the shift stays zero, and reaches every entry once."""
    return LayerBounds(
        output_norm=lambda: context.input_norm,
        gradients={"shift": 1.0},
        lipschitz_inf=1.0,
        output_norm_inf=lambda: context.input_norm_inf,
    )


class Probed(nn.Module):
    """A layer between two probes, which turn its Y and K into observable numbers.

    Args:
        layer: what is observed.
        input_shape: of one sample; ``None`` where samples are tokens, which have no cotangent to observe.
        output_shape: of one sample.
    """

    def __init__(self, layer: nn.Module, input_shape: tuple[int, ...] | None, output_shape: tuple[int, ...]) -> None:
        super().__init__()
        self.before = None if input_shape is None else Probe(input_shape)
        self.layer = layer
        self.after = Probe(output_shape)

    def forward(self, values: Tensor) -> Tensor:
        """Applies the layer."""
        output: Tensor = self.after(self.layer(values if self.before is None else self.before(values)))
        return output


def gaussian(parameter: Tensor) -> object:
    """Weights of an ordinary size."""
    return nn.init.normal_(parameter, std=0.7)


@dataclass(frozen=True)
class Case:
    """One configuration under attack.

    Attributes:
        name: what a report calls it.
        build: makes the layer or network; called under a fixed seed.
        shape: of one sample.
        input_norm: ``X₀``.
        cotangent_norm: ``G``.
        attained: parameters (``"layer.weight"``) whose bound an attack should come near to, and how near.
        vocabulary: how many tokens there are, where the layer embeds them; 0: samples are signals.
    """

    name: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    input_norm: float = 1.0
    cotangent_norm: float = 1.0
    attained: tuple[tuple[str, float], ...] = ()
    vocabulary: int = 0

    def model(self, fill: Fill = gaussian, dtype: torch.dtype = torch.float64) -> DPLipModel:
        """The probed, wrapped layer.

        Args:
            fill: sets each of its parameters.
            dtype: of parameters and inputs.
        """
        with torch.random.fork_rng():
            torch.manual_seed(7)
            layer = self.build()
            with torch.no_grad():
                zeros = torch.zeros(2, *self.shape, dtype=torch.int64 if self.vocabulary else torch.float32)
                output = layer.eval()(zeros)
            net = Probed(layer.train(), None if self.vocabulary else self.shape, tuple(output.shape[1:])).to(dtype)
            with torch.no_grad():
                for _, parameter in own_parameters(net):
                    fill(parameter)
        input_norm = None if self.vocabulary else self.input_norm
        return wrap(net, self.shape, input_norm=input_norm, cotangent_norm=self.cotangent_norm)

    def batch(self, model: DPLipModel, size: int) -> tuple[Tensor, Tensor]:
        """Random inputs and cotangents for a model of this case, in float64."""
        generator = torch.Generator().manual_seed(23)
        if self.vocabulary:
            inputs = torch.randint(self.vocabulary, (size, *self.shape), generator=generator)
        else:
            inputs = torch.randn(size, *self.shape, generator=generator, dtype=torch.float64) * self.input_norm
        targets = torch.randn(size, *model.output_shape, generator=generator, dtype=torch.float64)
        return inputs, targets * self.cotangent_norm

    def contrasts(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Three samples, made to differ in size, and three others to stand in their places."""
        if self.vocabulary:
            return inputs, (inputs + 1) % self.vocabulary
        sized = inputs * inputs.new_tensor([1.0, 1e6, 1e-3]).reshape(-1, *[1] * len(self.shape))
        return sized, 0.3 - 7.0 * sized.flip(-1)


def own_parameters(net: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """A probed network's parameters, without the probes'."""
    probes = {id(module.shift) for module in net.modules() if isinstance(module, Probe)}
    return ((name, parameter) for name, parameter in net.named_parameters() if id(parameter) not in probes)


def inner_product(output: Tensor, target: Tensor) -> Tensor:
    """A loss whose cotangent is the target itself."""
    products = output * target
    return products.flatten(1).sum(1) if products.dim() > 1 else products


def wrap(
    net: nn.Module,
    shape: tuple[int, ...],
    *,
    input_norm: float | None = 1.0,
    cotangent_norm: float = 1.0,
    constraint: ConstraintSpec = None,
) -> DPLipModel:
    """A model whose target is the cotangent, of any size, and which runs the rows that it is given."""
    loss = InnerProduct(cotangent_norm)
    return DPLipModel(
        net, input_shape=shape, input_norm=input_norm, loss=loss, constraint=constraint, row_invariant=False
    )
