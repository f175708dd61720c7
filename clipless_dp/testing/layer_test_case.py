"""The contract of a layer and its rule, as a class of tests to inherit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import ClassVar

from torch import nn

from clipless_dp.testing.attacks import attack, attack_parameters
from clipless_dp.testing.consistency import (
    check_autocast,
    check_eval,
    check_layouts,
    check_precision,
    check_samples_apart,
    check_sizes,
    check_tracing,
)
from clipless_dp.testing.probes import Case


class BoundTooLoose(AssertionError):
    """An attack stays further below a bound than was stated."""


class LipschitzLayerTestCase:
    """Every check that a layer with a rule of its own should pass; a subclass says which layer.

    Name the subclass ``Test…`` for pytest, or add ``unittest.TestCase`` to its bases. Checks run in float64 on CPU
    through the real :class:`clipless_dp.DPLipModel`, with the layer between two probes.

    Example:
        >>> class TestScale(LipschitzLayerTestCase):                       # doctest: +SKIP
        ...     shapes = ((4,), (3, 5, 5))
        ...
        ...     def build(self, shape):
        ...         return Scale(2.0)

    Attributes:
        shapes: of one sample, at least one; odd ones find more.
        input_norm: ``X₀`` of the attacks.
        cotangent_norm: ``G`` of the attacks.
        vocabulary: how many tokens there are, where the layer embeds them; 0: samples are signals.
        attained: for parameters of the layer, the share of its bound that the attack must reach on one shape at
            least: a bound that nothing comes near wastes noise.
        steps: of each gradient ascent.

    Guarantee:
        None: a wrong rule may pass. What fails is wrong.
    """

    shapes: ClassVar[Sequence[tuple[int, ...]]] = ()
    input_norm: ClassVar[float] = 1.0
    cotangent_norm: ClassVar[float] = 1.0
    vocabulary: ClassVar[int] = 0
    attained: ClassVar[Mapping[str, float]] = {}
    steps: ClassVar[int] = 8

    def build(self, shape: tuple[int, ...]) -> nn.Module:
        """Makes the layer for samples of one shape; called under a fixed seed, parameters are then overwritten."""
        raise NotImplementedError(f"{type(self).__name__} must say what to test: def build(self, shape)")

    def cases(self) -> Sequence[Case]:
        """The configurations that are checked: one for each shape."""
        if not self.shapes:
            raise NotImplementedError(f"{type(self).__name__} must say on which samples: shapes = ((4,), (3, 5, 5))")
        return [
            Case(
                str(shape),
                partial(self.build, shape),
                shape,
                self.input_norm,
                self.cotangent_norm,
                vocabulary=self.vocabulary,
            )
            for shape in self.shapes
        ]

    def test_no_signal_at_any_loss_scale_passes_a_bound(self) -> None:
        """``Y``, ``K·G`` and each ``Δ_θ`` against structured signals and gradient ascent on input and cotangent."""
        best: dict[str, float] = {}
        for case in self.cases():
            worst = attack(case, steps=self.steps)
            best = {name: max(ratio, best.get(name, 0.0)) for name, ratio in worst.items()}
            _expect_attained(worst, dict(case.attained))
        _expect_attained(best, {f"layer.{name}": share for name, share in self.attained.items()})

    def test_no_parameters_pass_a_bound(self) -> None:
        """The same on structured parameters, and with gradient ascent on parameters."""
        for case in self.cases():
            attack_parameters(case, steps=self.steps // 2)

    def test_the_bounds_hold_for_signals_of_other_sizes(self) -> None:
        """Other radii of the gates: a bound stated for unit balls does not scale."""
        for case in self.cases():
            check_sizes(case)

    def test_samples_do_not_mix(self) -> None:
        """Outputs, cotangents and gradients of a sample against batches with other, and with no, neighbours."""
        for case in self.cases():
            check_samples_apart(case)

    def test_the_traced_graph_computes_what_the_module_does(self) -> None:
        """What ``torch.fx`` recorded against the module's own forward, in ``train()`` and ``eval()``."""
        for case in self.cases():
            check_tracing(case)

    def test_the_bounds_hold_in_eval_mode(self) -> None:
        """Structured signals in ``eval()``."""
        for case in self.cases():
            check_eval(case)

    def test_float32_and_float64_agree(self) -> None:
        """Values and gradients in both dtypes; nothing inside is computed in a narrower one."""
        for case in self.cases():
            check_precision(case)

    def test_autocast_is_refused(self) -> None:
        """Forward and backward under bfloat16 autocast raise."""
        for case in self.cases():
            check_autocast(case)

    def test_memory_layouts_agree(self) -> None:
        """Channels-last, permuted strides and expanded batches."""
        for case in self.cases():
            check_layouts(case)


def _expect_attained(worst: Mapping[str, float], least: Mapping[str, float]) -> None:
    for name, share in least.items():
        if not worst[name] >= share:
            raise BoundTooLoose(f"{name} reaches only {worst[name]:.3f} of its bound, not {share:g}")
