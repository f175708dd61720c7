"""Whether a row's contribution depends on its company: sums of gradients with one row more, and losses of rows.

A bound speaks of one sample. It bounds a *batch's* change by one sample only where the others contribute what they
would contribute without it, whatever it holds: a shortcut that asks about the whole batch ("is any row clipped?"), a
layer or a loss that compares rows, or a product whose last bit depends on the number of rows, breaks that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from clipless_dp.isolation import Isolated
from clipless_dp.losses import Loss
from clipless_dp.model import DPLipModel
from clipless_dp.model.valid_inputs import fields_of, limits_of
from clipless_dp.testing.attacks import TOLERANCE, BoundBroken, is_capped
from clipless_dp.testing.consistency import Inconsistent

_CROWD = 6
"""Equal rows that a newcomer joins: what it does to one of them shows this many times over."""

_LOSS_ROWS = 8
"""Rows among which a loss is evaluated."""

_NEAR, _BEYOND = 0.9e37, 1e38
"""Multiples of a radius: just below and above the largest that a gate still scales (``1e37``)."""


class Row(NamedTuple):
    """A sample and its cotangent (or target), made to flip a branch that looks at the batch.

    Attributes:
        kind: what is special about it.
        sample: ``(*input_shape,)``.
        target: ``(*output_shape,)``, its cotangent.
        generic: whether no value of it ties with another: then its sums add up to rounding, not only within bounds.
    """

    kind: str
    sample: Tensor
    target: Tensor
    generic: bool = True


def hostile_rows(model: DPLipModel, generator: torch.Generator, *, annihilated: bool = True) -> list[Row]:
    """Ordinary rows, and rows at both ends of what gates take, forwards and backwards; unknown tokens for embeddings.

    Args:
        model: in float64, whose target is the cotangent.
        generator: draws directions.
        annihilated: whether a sample joins in that the first layer maps to zero, if that is linear and has one.
    """

    def target(size: float) -> Tensor:
        values = torch.randn(model.output_shape, generator=generator, dtype=torch.float64)
        return values * (size * model.cotangent_norm / max(float(values.norm()), 1e-300))

    if model.vocabulary is not None:
        known = torch.randint(model.vocabulary, model.input_shape, generator=generator)
        unknown = known.clone()
        unknown.view(-1)[0] = model.vocabulary
        samples = {
            "random": known,
            "repeated": torch.full(model.input_shape, model.vocabulary - 1),
            "unknown": unknown,
        }
    elif not is_capped(model):
        samples = _of_any_size(model, generator)
    else:
        direction = torch.randn(model.input_shape, generator=generator, dtype=torch.float64)
        direction = direction / max(float(direction.norm()), 1e-300)
        samples = {"random": 0.7 * model.input_norm * direction}
        for kind, factor in (("huge", _NEAR), ("immense", _BEYOND), ("tiny", 1e-30), ("zero", 0.0)):
            samples[kind] = factor * model.input_norm * direction.flip(-1)
        for kind, value in (("NaN", math.nan), ("infinite", math.inf)):
            samples[kind] = samples["random"].clone()
            samples[kind].view(-1)[0] = value
        null = _annihilated(model, 1, generator) if annihilated else None
        if null is not None:
            samples["annihilated"] = null[0]
    rows = [
        Row(kind + suffix, sample, target(size), kind not in _TIES)
        for suffix, size in (("", _LARGE), (f" and {_SMALL:g} G", _SMALL))
        for kind, sample in samples.items()
    ]
    for kind, size in (("huge", _NEAR), ("immense", _BEYOND), ("tiny", 1e-30), ("zero", 0.0), ("NaN", math.nan)):
        rows.append(Row(f"random and {kind} cotangent", samples["random"], target(size)))
    return rows


def _of_any_size(model: DPLipModel, generator: torch.Generator) -> dict[str, Tensor]:
    """Samples of a model that caps no norm: of several inputs, or of integers that no table is known for."""
    known = model.random_inputs(1, generator)[0]
    fields = fields_of(model.graph, model.packing, model.input_shape)
    numbers = torch.cat([torch.full((field.entries,), field.dtype.is_floating_point) for field in fields])
    numbers = numbers.reshape(known.shape)
    limits = limits_of(model.graph, known.numel()).reshape(known.shape)
    last = torch.where(limits > 0, limits - 1, 1).to(known)
    samples = {"random": known, "repeated": torch.where(numbers, known, last)}
    if bool(numbers.any()):
        for kind, factor in (("huge", _HUGE), ("tiny", 1e-30), ("zero", 0.0)):
            samples[kind] = torch.where(numbers, factor * known, known)
        for kind, value in (("NaN", math.nan), ("infinite", math.inf)):
            samples[kind] = torch.where(numbers, value, known)
    if bool((limits > 0).any()):
        samples["unknown"] = torch.where(limits > 0, limits.to(known), known)
    if not known.is_floating_point():
        samples["padding"] = torch.full_like(known, -1)
    return samples


_HUGE = 1e6
"""Multiple of an ordinary number: networks without a cap of their samples square and exponentiate what is larger."""

_LARGE, _SMALL = 3.0, 0.05
"""Multiples of the cotangent's cap: gates around layers, whose caps are no larger, are closed by the one and not by the
other."""

_TIES = ("zero", "annihilated", "repeated")
"""Samples whose signals may tie, as ReLU's zero and a maximum's equals do: the last bit may choose which one wins."""


def _annihilated(model: DPLipModel, count: int, generator: torch.Generator) -> Tensor | None:
    """Samples that the first linear layer maps to zero, up to rounding; ``None`` where there are none."""
    entries = math.prod(model.input_shape)
    if not is_capped(model):
        return None
    for leaf in model.net.modules():
        if isinstance(leaf, nn.Linear):
            rows, columns = leaf.weight.shape
            if columns != entries or rows >= columns or entries > 1 << 11:
                return None
            free = torch.linalg.svd(leaf.weight.detach().double())[2][rows:]
            mixed: Tensor = torch.randn(count, len(free), generator=generator, dtype=torch.float64) @ free
            mixed = mixed * (model.input_norm / torch.linalg.vector_norm(mixed, dim=1, keepdim=True))
            return mixed.reshape(count, *model.input_shape)
    return None


_COUNTS = (1, 2, 3, 7, 8, 15, 16, 31, 63, 127, 191, 255)
"""Rows of a batch at which products of matrices are known to go over to another kernel."""


def check_counts(model: DPLipModel, generator: torch.Generator, *, on_pass: Callable[[], None] = lambda: None) -> None:
    """One row more among rows that the first layer maps to zero, at numbers of rows where kernels change.

    What such rows contribute hangs on the last bit of a product, as ReLU's derivative at zero does; where the number of
    rows decides that bit, one row more changes the contributions of all.

    Args:
        model: in float64 on the CPU, whose target is the cotangent.
        generator: draws the rows.
        on_pass: called before each forward and backward pass.

    Raises:
        BoundBroken: the sum of gradients changes by more than the total of the bounds.
    """
    rows = _annihilated(model, max(_COUNTS) + 1, generator)
    if rows is None:
        return
    total = model.sensitivity().total
    cotangent = torch.randn(model.output_shape, generator=generator, dtype=torch.float64)
    targets = (cotangent * (model.cotangent_norm / cotangent.norm())).expand(len(rows), *model.output_shape)
    trainable = [p for p in model.net.parameters() if p.requires_grad]

    def summed(count: int) -> list[Tensor]:
        on_pass()
        loss = model.loss(model(rows[:count]), targets[:count])
        return [g.detach() for g in torch.autograd.grad(loss, trainable, materialize_grads=True)]

    with quiet(model):
        if is_random(model, rows[:2]):
            return
        for count in _COUNTS:
            pairs = zip(summed(count), summed(count + 1), strict=True)
            change = math.hypot(*(float(torch.linalg.vector_norm(more - less)) for less, more in pairs))
            if not change <= total * (1.0 + TOLERANCE * (count + 1)):
                raise BoundBroken(
                    f"one row more beside {count}, all mapped to zero by the first layer, changes the sum of gradients "
                    f"by {change:.6g}, above the total of the bounds, {total:.6g}: the number of rows decides a product"
                )


def check_company(
    model: DPLipModel,
    rows: list[Row],
    pairs: Iterable[tuple[int, int]] | None = None,
    *,
    on_pass: Callable[[], None] = lambda: None,
) -> None:
    """Adds one row to several equal ones: the sum of gradients changes by the row's own, no more than the bounds.

    Args:
        model: in float64 on the CPU.
        rows: with targets that the model's loss takes.
        pairs: the row that is there several times, and the row that joins, as places in ``rows``; by default each joins
            the first, and the first joins each.
        on_pass: called before each forward and backward pass.

    Raises:
        BoundBroken: the sum changes by more than a bound.
        Inconsistent: it changes by something else than what the row contributes alone.
    """
    sensitivity = model.sensitivity()
    named = {name: p for name, p in model.net.named_parameters() if p.requires_grad}
    bounds = {name: sensitivity.per_parameter.get(name, 0.0) for name in named}
    known: dict[tuple[int, ...], list[Tensor]] = {}

    def summed(*which: int) -> list[Tensor]:
        if which not in known:
            on_pass()
            inputs = torch.stack([rows[i].sample for i in which])
            targets = torch.stack([rows[i].target for i in which])
            loss = model.loss(model(inputs), targets)
            known[which] = [g.detach() for g in torch.autograd.grad(loss, list(named.values()), materialize_grads=True)]
        return known[which]

    everyone = [(0, one) for one in range(len(rows))] + [(crowd, 0) for crowd in range(1, len(rows))]

    def compare() -> None:
        for crowd, newcomer in everyone if pairs is None else pairs:
            before = [crowd] * _CROWD
            without, whole = summed(*before), summed(*before, newcomer)
            story = f"one {rows[newcomer].kind} row more beside {_CROWD} {rows[crowd].kind} ones"
            exact = rows[crowd].generic and rows[newcomer].generic
            own = summed(newcomer) if exact else without
            changes = []
            for name, less, more, alone in zip(named, without, whole, own, strict=True):
                changes.append(float(torch.linalg.vector_norm(more - less)))
                # A sum over the batch rounds by (batch + 10^3)·2^-53 of its terms' norms, which the bounds cap.
                slack = TOLERANCE * (_CROWD + 1) * bounds[name]
                if not changes[-1] <= bounds[name] + slack:
                    raise BoundBroken(
                        f"{name}: {story} changes the sum of gradients by {changes[-1]:.6g}, above the bound "
                        f"{bounds[name]:.6g} of one sample"
                    )
                apart = float(torch.linalg.vector_norm(more - less - alone))
                if exact and not apart <= slack + TOLERANCE * changes[-1]:
                    raise Inconsistent(
                        f"{name}: {story} changes the others' gradients, by {apart:.3g} in all: samples interact"
                    )
            if not math.hypot(*changes) <= sensitivity.total * (1.0 + TOLERANCE * (_CROWD + 1)):
                raise BoundBroken(
                    f"{story} changes the sum of gradients by {math.hypot(*changes):.6g}, above the total of the "
                    f"bounds, {sensitivity.total:.6g}"
                )

    with quiet(model):
        try:
            compare()
        except (BoundBroken, Inconsistent):
            # Sums that draw random numbers of their own have nothing to do with each other.
            if not is_random(model, torch.stack([rows[0].sample] * 2)):
                raise


@contextmanager
def quiet(model: nn.Module) -> Iterator[None]:
    """Dropout is off within: sums with one row more have masks of their own, and say nothing about each other."""
    # Of networks of which nothing is known, any part may draw: attention does by itself.
    unknown = {id(part) for known in model.modules() if isinstance(known, Isolated) for part in known.modules()}
    random = [
        module
        for module in model.modules()
        if module.training and (isinstance(module, _DropoutNd) or id(module) in unknown)
    ]
    for module in random:
        module.training = False
    try:
        yield
    finally:
        for module in random:
            module.training = True


@torch.no_grad()
def is_random(model: DPLipModel, inputs: Tensor) -> bool:
    """Whether a model draws random numbers of its own: two passes of the same rows differ."""
    first, second = model(inputs), model(inputs)
    return not torch.equal(first.nan_to_num(), second.nan_to_num())


def varied_outputs(output_shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Outputs ``(8, *output_shape)`` of three sizes, two of them equal: near and far from one another."""
    outputs = torch.randn(_LOSS_ROWS, *output_shape, generator=generator, dtype=torch.float64)
    sizes = outputs.new_tensor([1.0, 0.1, 0.1, 10.0, 1.0, 0.1, 10.0, 1.0])
    outputs = outputs * sizes.reshape(-1, *[1] * len(output_shape))
    outputs[-1] = outputs[0]
    return outputs


def plausible_targets(
    loss: Loss, output_shape: tuple[int, ...], count: int, generator: torch.Generator, like: Tensor | None = None
) -> list[Tensor]:
    """Targets of each usual format that a loss takes: labels, numbers, shares, signs; ``(B,)`` or shaped as the output.

    Args:
        loss: which is asked.
        output_shape: of one sample.
        count: ``B``.
        generator: draws them.
        like: one sample's target: only its shape, and whether it holds integers, is looked at.

    Returns:
        ``(B, ...)`` each; none where the loss takes none of them.
    """
    classes = max(2, output_shape[-1] if output_shape else 2)
    shapes = [(count,), (count, *output_shape), (count, *output_shape[:-1])] if like is None else [(count, *like.shape)]
    outputs = torch.randn(count, *output_shape, generator=generator, dtype=torch.float64)
    found: list[Tensor] = []
    for shape in dict.fromkeys(shapes):
        integers = torch.randint(classes, shape, generator=generator)
        numbers = torch.randn(shape, generator=generator, dtype=torch.float64)
        candidates = {
            "integers": [integers, integers.clamp(max=1)],
            "numbers": [numbers, torch.sigmoid(numbers), (numbers > 0).double(), numbers.sign()],
        }
        if like is None or not (like.is_floating_point() or like.is_complex()):
            found += _taken(loss, outputs, candidates["integers"])
        if like is None or like.is_floating_point():
            found += _taken(loss, outputs, candidates["numbers"])
    return found


def _taken(loss: Loss, outputs: Tensor, candidates: list[Tensor]) -> list[Tensor]:
    """The first that the loss takes."""
    for targets in candidates:
        # What a loss of the user's raises at a format that is not its own may be anything.
        with suppress(Exception), torch.no_grad():
            losses = loss.per_sample(outputs, targets)
            if losses.shape == outputs.shape[:1] and bool(torch.isfinite(losses).all()):
                return [targets]
    return []


def check_loss_rows_apart(loss: Loss, outputs: Tensor, targets: Tensor, *, singles: int = 16) -> None:
    """The loss of each row, and its gradient, is the same alone, in the batch, and beside other rows.

    A loss that draws random numbers is not looked at.

    Args:
        loss: which is asked for the losses ``(B,)``.
        outputs: ``(B, *output_shape)``.
        targets: ``(B, ...)``.
        singles: about so many rows are evaluated alone, and the halves of the batch.

    Raises:
        Inconsistent: it is not: the loss compares rows.
    """

    def evaluate(outputs: Tensor, targets: Tensor, seed: int = 5) -> tuple[Tensor, Tensor]:
        outputs = outputs.detach().requires_grad_()
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            # The seed of the CPU alone: seeding every device takes longer than the loss.
            torch.default_generator.manual_seed(seed)
            losses = loss.per_sample(outputs, targets)
            finite = torch.isfinite(losses)
            total = torch.where(finite, losses, torch.zeros_like(losses)).sum()
            if not total.requires_grad:
                return losses.detach(), torch.zeros_like(outputs)
            (slopes,) = torch.autograd.grad(total, outputs, allow_unused=True)
        return losses.detach(), torch.zeros_like(outputs) if slopes is None else slopes

    whole = evaluate(outputs, targets)
    again = evaluate(outputs, targets, 6)
    if not all(torch.equal(one.nan_to_num(), other.nan_to_num()) for one, other in zip(whole, again, strict=True)):
        return
    half = len(outputs) // 2
    first, last = slice(0, half), slice(half, len(outputs))
    places = range(0, len(outputs), max(1, len(outputs) // singles))
    for part in (first, last, *(slice(row, row + 1) for row in places)):
        alone = evaluate(outputs[part], targets[part])
        for what, together, single in zip(("loss", "cotangent"), whole, alone, strict=True):
            together, single = together[part].nan_to_num(), single.nan_to_num()
            # Per-sample losses reduce in the same order at any batch size, up to the rounding of a product.
            size = 1e-6 + float(together.norm()) + float(single.norm())
            apart = float((together - single).norm())
            if not apart <= TOLERANCE * size:
                raise Inconsistent(
                    f"the {what} of a sample depends on the other samples of its batch ({apart:.3g} of {size:.3g}): "
                    "the loss compares rows, or broadcasts targets against outputs of another shape, and one sample "
                    "more changes all others' gradients. Compare samples with public rows, or give targets the shape "
                    "of outputs"
                )
