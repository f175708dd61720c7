"""Losses of rows, none of which sees another row.

The bound of a sample's gradient says nothing about a loss in which samples meet: a person then enters the gradients of
all others. The losses of this package are row-wise by their formulas. Of any other function nothing is known, so it is
evaluated such that rows cannot meet where that is cheap, and held against that evaluation where it is not.
"""

from __future__ import annotations

import secrets
import warnings
from collections.abc import Callable, Set

import torch
from torch import Tensor

from clipless_dp.errors import CliplessError, ConfigurationError, InputError, LossBoundError, PrivacyError
from clipless_dp.gates.arithmetic import can_look, flat_rows
from clipless_dp.losses import (
    BinaryCrossEntropy,
    CausalCrossEntropy,
    ConvexHingeKR,
    CosineSimilarity,
    HingeKR,
    HingeMargin,
    Huber,
    KantorovichRubinstein,
    LogSumExpHKR,
    Loss,
    MeanAbsoluteError,
    MulticlassHinge,
    OffsetCrossEntropy,
    SoftHKR,
    TauCrossEntropy,
    TokenCrossEntropy,
    described,
)
from clipless_dp.losses.base import InnerProduct
from clipless_dp.model import keeping
from clipless_dp.model.description import integers_of, moved

_PROVED: dict[type[Loss], object] = {
    kind: kind.per_sample
    for kind in (
        TauCrossEntropy,
        BinaryCrossEntropy,
        MulticlassHinge,
        HingeKR,
        KantorovichRubinstein,
        HingeMargin,
        ConvexHingeKR,
        LogSumExpHKR,
        SoftHKR,
        OffsetCrossEntropy,
        CosineSimilarity,
        MeanAbsoluteError,
        Huber,
        TokenCrossEntropy,
        CausalCrossEntropy,
        InnerProduct,
    )
}
"""The losses whose formulas, in their documentation, have one sample each; with the code that this was read from."""

EVERY = 32
"""One batch in so many is looked at, in expectation."""

_SINGLE = 16
"""Rows that a look evaluates one by one where the function can be mapped over rows."""

_ROWS = 256
"""Rows that a look evaluates one by one, where the function cannot be mapped over rows: a hundredth of a second."""

_LARGE = 1 << 13
"""Bytes of what a loss reaches up to which each look asks what it has kept, and of larger ones in proportion fewer."""

_RELATIVE, _ABSOLUTE = 1e-4, 1e-5
"""What a row alone may differ by from the same row in a batch, relative to itself and to the loss's bound.

The same float32 operations in other vector widths and orders of summation: some ulp (6e-8) for each of up to a thousand
terms. Losses of float64 models may compute in float32 inside.
"""


def is_proved(loss: Loss) -> bool:
    """Whether a loss is one of this package's own, exactly: of what a subclass computes nothing is known."""
    return _PROVED.get(type(loss)) is type(loss).per_sample and "per_sample" not in vars(loss)


class RowLosses:
    """Evaluates the loss of one model so that no row's loss depends on another row.

    A loss of this package is called as it is. Any other is called on batches of one row, all at once, by
    ``torch.func.vmap``: a row cannot see another then, whatever the function does. A function that vmap cannot run
    (control flow that depends on numbers, operations without a batching rule) is called on the whole batch.

    The first batch, and one in :data:`EVERY` of the later ones, is *looked at*: the function is called on the whole
    batch and on rows alone, and twice on the same. The operating system's entropy chooses the batches after the loss
    was computed, so that a function cannot know. Values or gradients that differ by more than rounding are refused.
    What the function reaches is compared around calls of it as well: nothing of a batch may stay there, read or not.
    Looking waits for the device; nothing else here does.

    Rows that do not count (padding, samples that are not finite) are not shown to the function: it gets a copy of
    another row in their place, whose loss is dropped.

    Attributes:
        counted: names of the loss's attributes that its first calls have counted on.

    Guarantee:
        A mapped loss depends on its own row alone, in each batch. One that is called on whole batches was so in those
        that were looked at, up to rounding.
    """

    # Of pickles of former versions, too.
    _size = 0
    counted: Set[str] = frozenset()

    def __init__(self) -> None:
        self._loss: Loss | None = None
        self._mapped = False
        self._due = True

    def __call__(
        self, loss: Loss, output: Tensor, target: Tensor, mask: Tensor | None = None, *, bound: float
    ) -> Tensor:
        """The loss of each row.

        Args:
            loss: the loss.
            output: ``(B, *output_shape)``; ``B`` may be 0.
            target: ``(B, ...)``.
            mask: boolean ``(B,)``, false for rows that do not count.
            bound: ``G``, what the gradient of a row is cut to.

        Returns:
            ``(B,)``; unless the loss is proved, NaN in rows that do not count or whose output is not finite.

        Raises:
            PrivacyError: the loss of a row depends on other rows, on chance or on earlier calls.
            LossBoundError: the loss has trained parameters of its own.
            InputError: the loss does not return one real number a row.
        """
        if is_proved(loss):
            if mask is not None:
                # Padding is NaN, which anomaly detection would find on the way back.
                output = output.masked_fill(~mask.reshape(-1, *[1] * (output.dim() - 1)), 1.0)
            return loss.per_sample(output, target)
        if output.shape[0] == 0:
            return flat_rows(output).sum(1)
        usable = torch.isfinite(flat_rows(output)).all(1)
        if mask is not None:
            usable = usable & mask
        if can_look(usable):
            if not bool(usable.any()):
                sums = flat_rows(output).sum(1)
                return torch.where(usable, sums, torch.full_like(sums, torch.nan))
            if bool(usable.all()):
                return self._of(loss, output, target, usable, bound)
        output, target = _filled(output, target, usable)
        losses = self._of(loss, output, target, usable, bound)
        return torch.where(usable, losses, torch.full_like(losses, torch.nan))

    def rehearse(self, loss: Loss, output: Tensor, target: Tensor, mask: Tensor, *, bound: float) -> None:
        """Looks at made-up outputs, for code that cannot look later, until one batch had two rows that count.

        Raises:
            ConfigurationError: the loss cannot be mapped over rows.
            PrivacyError: as :meth:`__call__` does.
        """
        if is_proved(loss) or (loss is self._loss and not self._due):
            return
        require_mappable(loss, output, target)
        made_up = random_numbers(torch.rand, *output.shape).to(output).requires_grad_()
        try:
            self(loss, made_up, target, mask, bound=bound)
        except CliplessError:
            raise
        except Exception:
            # The function does not take these numbers; it is mapped whatever it does with others.
            return

    def _of(self, loss: Loss, output: Tensor, target: Tensor, usable: Tensor, bound: float) -> Tensor:
        if torch.compiler.is_compiling() or _is_captured(output):
            # A graph that is replayed cannot be looked at.
            return mapped(loss, output, target)
        if loss is not self._loss:
            self._meet(loss, output.detach(), target, bound)
        losses = mapped(loss, output, target) if self._mapped and len(output) > 1 else _together(loss, output, target)
        trains = torch.is_grad_enabled() and output.requires_grad and output.device.type != "meta"
        if trains and (self._due or secrets.randbelow(EVERY) == 0):
            self._look(loss, output.detach(), target, usable, losses.detach(), bound)
        return losses

    def _meet(self, loss: Loss, output: Tensor, target: Tensor, bound: float) -> None:
        """Finds out how a loss that was not called before is to be called.

        Raises:
            PrivacyError: it takes a state from what comes first, or gives two values for the same rows, or keeps
                something of them.
            LossBoundError: it has parameters of its own that are trained.
        """
        known = output.device.type != "meta"
        counts = integers_of(loss)
        if known:
            # On copies, so that nothing is left in a loss that is refused, where it can be copied.
            before = keeping.Before(loss)
            _refuse_beginning(loss, output, target, bound)
            self._size = keeping.refuse_memory(loss, _together, output, target, before)
        with torch.enable_grad():
            refuse_trained(loss, _together(loss, output.clone(), target.detach().clone()))
        with torch.no_grad():
            first, second = (_together(loss, output.clone(), target.clone()) for _ in range(2))
            if known and bool(_differ(first, second, _sizes(output, bound)).any()):
                raise _impure(loss)
            self._mapped = _cannot_be_mapped(loss, output, target, slowly=False) is None
        self._loss, self._due, self.counted = loss, True, moved(counts, integers_of(loss))

    def _look(self, loss: Loss, output: Tensor, target: Tensor, usable: Tensor, losses: Tensor, bound: float) -> None:
        """Compares the batch with its rows alone, and with itself.

        Raises:
            PrivacyError: they differ, or something of them is kept.
        """
        if self._size <= _LARGE or secrets.randbelow(self._size) < _LARGE:
            self._size = keeping.refuse_memory(loss, _together, output, target)
        with torch.no_grad():
            first, second = (_together(loss, output.clone(), target.clone()) for _ in range(2))
        rows = usable.nonzero().flatten()
        used = first if self._mapped and len(output) > 1 else losses
        sizes = _sizes(output, bound)
        if bool((_differ(first, second, sizes) | _differ(used, second, sizes))[rows.cpu()].any()):
            raise _impure(loss)
        with torch.enable_grad():
            refuse_trained(loss, _together(loss, output[rows], target.detach()[rows]))
        if len(rows) < 2:
            return
        if not self._mapped and len(rows) > _ROWS:
            rows = rows[random_numbers(torch.randperm, len(rows))[:_ROWS].to(rows.device)]
        differing = self._differing(loss, output, target, usable, rows, bound)
        if differing == 1:
            # At a kink one ulp decides the derivative, and beside it none does. What lies in [0, 1] stays there.
            shrunk = output * (1.0 - 1e-3 * random_numbers(torch.rand, *output.shape).to(output))
            differing = self._differing(loss, shrunk, target, usable, rows, bound)
        if differing:
            raise PrivacyError(
                f"in {loss!r} the loss of a row depends on other rows of the batch: its value or gradient is another "
                "one when the row is alone. One person would enter the gradients of others, which no bound covers; "
                "nothing was released. Usual causes: an output (B, 1) against a target (B,), which broadcast to "
                "(B, B): use output.squeeze(1); a mean, maximum, norm or count over the batch: leave axis 0 as it is; "
                "a loss that compares samples, as triplets do: make the samples that are compared one row"
            )
        self._due = False

    def _differing(self, loss: Loss, output: Tensor, target: Tensor, usable: Tensor, rows: Tensor, bound: float) -> int:
        """How many of some rows have another loss in the batch than alone, or another gradient of the summed loss."""

        def one_by_one(some: Tensor) -> Callable[[Tensor], Tensor]:
            labels = target[some].split(1)

            def losses(leaf: Tensor) -> Tensor:
                pairs = zip(leaf.split(1), labels, strict=True)
                return torch.cat([_together(loss, one, label.clone()) for one, label in pairs])

            return losses

        batch = _with_gradient(lambda leaf: _together(loss, leaf, target.clone()), output, usable)
        single = rows
        differing = torch.zeros(len(output), dtype=torch.bool)
        try:
            if self._mapped:
                alone = _with_gradient(lambda leaf: mapped(loss, leaf, target), output, usable)
                differing[rows.cpu()] |= _rows_differ(batch, alone, output, bound)[rows.cpu()]
                # An operation may have a rule for vmap of its own, in which rows meet.
                single = rows[random_numbers(torch.randperm, len(rows))[:_SINGLE].to(rows.device)]
            alone = _with_gradient(one_by_one(single), output[single], usable[single])
        except Exception as error:
            raise PrivacyError(
                f"{loss!r} takes the whole batch, but not one row of it ({type(error).__name__}: {error}), so that "
                "nothing tells whether its rows depend on one another: write it for batches of any size"
            ) from error
        together = batch[0][single], batch[1][single]
        differing[single.cpu()] |= _rows_differ(together, alone, output[single], bound)
        return int(differing.sum())


def mapped(loss: Loss, output: Tensor, target: Tensor) -> Tensor:
    """The loss of each row, called on batches of that row alone: ``(B, ...)`` to ``(B,)``."""

    def of_row(row: Tensor, label: Tensor) -> Tensor:
        return _together(loss, row.unsqueeze(0), label.unsqueeze(0)).squeeze(0)

    losses: Tensor = torch.func.vmap(of_row)(output, target)
    return losses


def require_mappable(loss: Loss, output: Tensor, target: Tensor) -> None:
    """Refuses a loss that would have to be looked at, for code that cannot look.

    Args:
        loss: the loss.
        output: ``(B, *output_shape)``, any numbers.
        target: ``(B, ...)``.

    Raises:
        ConfigurationError: the loss is none of this package's own and cannot be mapped over rows.
    """
    if is_proved(loss):
        return
    with torch.no_grad():
        reason = _cannot_be_mapped(loss, output, target, slowly=True)
    if reason is not None:
        raise ConfigurationError(
            f"{loss!r} cannot be mapped over rows by torch.func.vmap, so that in a compiled graph nothing tells "
            "whether its rows depend on one another: train with compile=False, or write it without what vmap refuses: "
            f"{reason}"
        )


def _cannot_be_mapped(loss: Loss, output: Tensor, target: Tensor, *, slowly: bool) -> str | None:
    """Why a loss cannot be mapped over rows, unless ``slowly`` without a loop over them; ``None`` where it can."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            mapped(loss, output.clone(), target.clone())
        except Exception as error:
            return f"{type(error).__name__}: {error}"
    loops = (str(warning.message) for warning in told if "batching rule" in str(warning.message))
    return None if slowly else next(loops, None)


def _together(loss: Loss, output: Tensor, target: Tensor) -> Tensor:
    losses = loss.per_sample(output, target)
    if not isinstance(losses, Tensor) or losses.shape != output.shape[:1] or not losses.is_floating_point():
        raise InputError(
            f"{loss!r} must return a tensor with one real number a row, shape {tuple(output.shape[:1])}, got "
            f"{described(losses)}; use reduction='none'"
        )
    return losses


def _filled(output: Tensor, target: Tensor, usable: Tensor) -> tuple[Tensor, Tensor]:
    """The rows, and a copy of a usable one (else zeros) that gets no gradient in place of those that do not count."""
    own = torch.arange(len(usable), device=usable.device)
    source = torch.where(usable, own, usable.to(torch.int32).argmax())
    filling = torch.nan_to_num(output.detach().index_select(0, source), nan=0.0, posinf=0.0, neginf=0.0)
    kept = usable.reshape(-1, *([1] * (output.dim() - 1)))
    return torch.where(kept, output, filling), target.index_select(0, source)


def _with_gradient(losses: Callable[[Tensor], Tensor], output: Tensor, usable: Tensor) -> tuple[Tensor, Tensor]:
    """Losses, and the gradient of the sum of the usable finite ones with respect to the output."""
    with torch.enable_grad():
        leaf = output.clone().requires_grad_()
        # A copy, since the function may work in place.
        values = losses(leaf.clone())
        total = torch.where(usable & torch.isfinite(values), values, torch.zeros_like(values)).sum()
        gradient = torch.autograd.grad(total, leaf, allow_unused=True)[0] if total.requires_grad else None
    return values.detach(), torch.zeros_like(output) if gradient is None else gradient


def _sizes(output: Tensor, bound: float) -> Tensor:
    """How large the terms may be that a row's loss is added up of, as its gradient is cut to the bound: ``(B,)``."""
    lengths: Tensor = torch.linalg.vector_norm(flat_rows(output.detach()).cpu().double(), dim=1)
    return bound * (1.0 + lengths)


def _rows_differ(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor], output: Tensor, bound: float) -> Tensor:
    """Which rows have other values, or other gradients once these are cut to the bound: ``(B,)``."""

    def cut(gradients: Tensor) -> Tensor:
        rows = flat_rows(gradients.detach()).cpu().double()
        lengths: Tensor = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
        return rows * (bound / lengths.clamp(min=bound))

    values = _differ(first[0], second[0], _sizes(output, bound))
    return values | _differ(cut(first[1]), cut(second[1]), bound)


def _differ(first: Tensor, second: Tensor, size: Tensor | float) -> Tensor:
    """Which rows of two tensors differ by more than rounding, given the size of the terms that were added: ``(B,)``.

    Of a row's own numbers only: what others are must not decide how far this one may be off.
    """
    first, second = (flat_rows(part.detach().cpu().double()) for part in (first, second))
    lengths = torch.linalg.vector_norm(first, dim=1) + torch.linalg.vector_norm(second, dim=1)
    unequal = torch.linalg.vector_norm(first - second, dim=1) > _RELATIVE * lengths + _ABSOLUTE * size
    finite = [torch.isfinite(part).all(1) for part in (first, second)]
    return torch.where(finite[0] & finite[1], unequal, finite[0] != finite[1])


def refuse_trained(loss: Loss, values: Tensor) -> None:
    """Refuses a loss whose values, of outputs without a gradient, have one.

    Raises:
        LossBoundError: it has trained parameters of its own.
    """
    if values.requires_grad:
        raise LossBoundError(
            f"{loss!r} has parameters of its own that are trained: their gradients are neither bounded nor made "
            "private. Let them be a layer of the network (prototypes are the weight of an nn.Linear), or freeze them "
            "with requires_grad_(False)"
        )


@torch.no_grad()
def _refuse_beginning(loss: Loss, output: Tensor, target: Tensor, bound: float) -> None:
    """Refuses a loss that takes something from the first batch that comes: another one comes to a copy of it.

    Raises:
        PrivacyError: copies that saw other rows first give other values.
    """
    copies = [keeping.copied(loss) for _ in range(2)]
    if copies[0] is None or copies[1] is None:
        return
    label = target[:1].expand_as(target).clone()
    try:
        values, second = (_together(copies[0], output.clone(), target.clone()) for _ in range(2))
        # What lies in [0, 1] stays there.
        _together(copies[1], 0.5 * output[:1].expand_as(output), label)
        again = _together(copies[1], output.clone(), target.clone())
    except Exception:
        return
    sizes = _sizes(output, bound)
    if bool(_differ(values, second, sizes).any()):
        raise _impure(loss)
    if bool(_differ(values, again, sizes).any()):
        raise PrivacyError(
            f"{loss!r} depends on the batch that came first: it takes a centre, a scale or another state from it, so "
            "that one sample changes the gradients of all. Compute the state from public data, or privately "
            "(clipless_dp.statistics), before training; nothing was released"
        )


def random_numbers(draw: Callable[..., Tensor], *size: int) -> Tensor:
    """Numbers that a function of torch draws, of a seed that nobody knows; torch's own generator stays as it is."""
    return draw(*size, generator=torch.Generator().manual_seed(secrets.randbits(63)))


def _impure(loss: Loss) -> PrivacyError:
    return PrivacyError(
        f"{loss!r} gives two values for the same rows: it draws random numbers, or keeps a state, through which rows "
        "meet. Make it a function of output and target alone: random numbers belong into the network (dropout) or the "
        "augmentation, a sample's weight into its target"
    )


def _is_captured(output: Tensor) -> bool:
    return output.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
