"""The gradients of a draw, passed in micro-batches and as several views of each sample."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import repeat
from typing import Any

import torch
from torch import Tensor

from clipless_dp.arguments import function, shown, whole
from clipless_dp.distributed.placement import Placement, agree
from clipless_dp.errors import ConfigurationError, PrivacyError
from clipless_dp.gates import weights_from
from clipless_dp.model import DPLipModel, passes
from clipless_dp.model.register import Register
from clipless_dp.model.slopes import beside as beside_rows
from clipless_dp.optim.charging import NO_PEOPLE
from clipless_dp.packing import Structure
from clipless_dp.sampling.augmentation import Augmentation, views
from clipless_dp.sampling.people import Unit
from clipless_dp.sampling.series import Rows, overlapping
from clipless_dp.tensor_types import plain

BatchLoss = Callable[[Tensor, Tensor, Tensor], Tensor]


def accumulate(
    model: DPLipModel,
    here: Placement,
    batch: tuple[Tensor | Structure, Tensor, Tensor] | tuple[Tensor | Structure, Tensor],
    *,
    augment: Augmentation | None,
    multiplicity: int,
    micro_batch_size: int | None,
    loss: BatchLoss | None,
    unit: Unit = "row",
) -> Tensor:
    """See :meth:`clipless_dp.CliplessDPOptimizer.accumulate`; ``unit`` is what the guarantee is about."""
    multiplicity = whole("multiplicity", multiplicity)
    if multiplicity > 1 and augment is None:
        raise ConfigurationError(f"multiplicity={multiplicity} without augment would repeat one view: give augment")
    if micro_batch_size is not None:
        micro_batch_size = whole("micro_batch_size", micro_batch_size)
    if augment is not None:
        function("augment", augment, "one sample")
    inputs, targets, mask = _parts(model, batch)
    register = model.register
    rows, beside = passes.origin(inputs, register.names())
    register.reconcile()
    entered = [some.rows for some in register.passes if some.rows is not None]
    if overlapping([*entered, rows]):
        raise PrivacyError(
            "rows of this batch have entered the gradients of this step already, and would count twice: "
            "accumulate each draw once, with multiplicity=K for several views of its samples, then step()"
        )
    spans = _spans(rows, len(inputs), unit, here)
    size = max(1, len(inputs)) if micro_batch_size is None else micro_batch_size
    here.reshard_()
    unseen = loss is None and augment is None

    def passed(classes: Sequence[tuple[int, int, int]]) -> Tensor:
        """The loss of the rows of consecutive classes: of one, or of several that gates weigh row by row."""
        start, stop, divisor = classes[0][0], classes[-1][1], classes[0][2]
        weights: Tensor | None = None
        divided: list[tuple[Rows, int]] = []
        if len(classes) > 1:
            dtype = torch.promote_types(model.device_and_dtype()[1], torch.float32)
            weights = weights_from([(end - begin, by) for begin, end, by in classes], dtype).to(inputs.device)
            divisor, divided = 1, [(rows.part(begin, end), by) for begin, end, by in classes]
        total = torch.zeros((), device=inputs.device)
        parts = [part[start:stop].split(size) for part in (inputs, targets, mask)]
        weighed = repeat(None, len(parts[0])) if weights is None else weights.split(size)
        pieces = list(zip(*parts, weighed, strict=True))
        own = rows.part(start, stop)
        with (
            here.passing(len(pieces)) as count,
            register.apart(own, beside, views=multiplicity, divisor=divisor, divided=divided, unseen=unseen),
        ):
            pieces += [(inputs[:0], targets[:0], mask[:0], None)] * (count - len(pieces))
            for _ in range(multiplicity):
                for some, wanted, counts, weighs in pieces:
                    seen = some
                    if augment is not None and len(some):
                        seen = views(augment, some, counts, model.randomness, beside_rows(model, wanted))
                    with _one_pass(register, seen, counts, weighs):
                        value = model.loss(model(seen), wanted, counts) if loss is None else loss(seen, wanted, counts)
                        value.backward()
                    total += value.detach()
        return total / multiplicity

    # What is called is to be the model itself, and not something that stands for it.
    weighs = loss is None and isinstance(model, DPLipModel) and model.takes_row_weights
    if len(spans) == 1 or (weighs and spans and spans[0][0] < spans[-1][1]):
        return passed(spans)
    # One batch to whoever asks: after an error in a later class nothing of an earlier one stays.
    with register.apart(rows, beside, unseen=unseen):
        return torch.stack([passed([span]) for span in spans]).sum()


def _parts(model: DPLipModel, batch: Sequence[Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs as rows, targets, and the mask of a batch."""
    _require_gradients()
    if not isinstance(batch, (tuple, list)) or len(batch) not in (2, 3):
        raise ConfigurationError(
            f"a batch is inputs, targets and a mask of rows that count, or the first two, got {shown(batch)}: of a "
            'mapping, as data collators return it, write accumulate((batch, batch["labels"]))'
        )
    inputs, targets = model.rows(batch[0]), plain(batch[1], "the target")
    if len(batch) == 3:
        return inputs, targets, plain(batch[2], "the mask")
    return inputs, targets, torch.ones(len(inputs), dtype=torch.bool, device=inputs.device)


def _require_gradients() -> None:
    if not torch.is_grad_enabled():
        raise ConfigurationError(
            "gradients, which accumulate() computes, are turned off (torch.no_grad(), torch.inference_mode()): call it "
            "outside of that. Nothing was added"
        )


@contextmanager
def _one_pass(register: Register, seen: Tensor, counts: Tensor, weights: Tensor | None) -> Iterator[None]:
    """Within ``register.apart``, one pass of this tensor and nothing else, forth and back.

    Args:
        register: of the model's passes.
        seen: the rows.
        counts: boolean, which of them count; a loss may leave a piece out of which none does.
        weights: of the rows, ``(B,)``, which gates multiply by.

    Raises:
        PrivacyError: the model was passed other rows, or these more than once or not at all, or without their weights.
    """
    register.unhook()
    before = len(register.passes)
    with passes.announcing(seen, weights):
        yield
    register.unhook()
    made = register.passes[before:]
    if len(made) > 1 or not all(some.declared for some in made):
        raise PrivacyError(
            "the loss passed the model other rows than those that it was given, or passed them more than once, "
            "so that they would count twice: call the model once, on the very tensor that comes in"
        )
    if weights is not None and not all(some.weighed for some in made):
        raise PrivacyError(
            "rows of people came back at full weight, as a compiled graph, or code around the model's pass, has left "
            "their weights out: pass them with accumulate(batch, loss=lambda x, y, mask: model.loss(model(x), y, mask))"
        )
    if not made and bool(counts.any()):
        raise PrivacyError(
            "the loss left rows out that it was given: whether a sample enters may then depend on others. Pass the "
            "model the very tensor that comes in, and leave rows out with the mask"
        )


def _spans(rows: Rows, count: int, unit: Unit, here: Placement) -> list[tuple[int, int, int]]:
    """Of a batch's rows from where to where gradients are divided by what, past all gates.

    As the mean over views, the weight of a person's row is applied to the gradients of the parameters: the cotangent of
    a row passes the gates at full scale, of which one that normalises would undo a weight.

    Args:
        rows: what the batch is.
        count: of its rows.
        unit: what the guarantee is about.
        here: where the model is.

    Raises:
        PrivacyError: people are the unit, and nothing tells whose the rows are.
        RankError: processes that each hold a part of the model would divide the parts by different numbers.
    """
    draw = rows.draw
    if draw is None or draw.people is None:
        if unit == "person" and count:
            raise PrivacyError(f"{NO_PEOPLE}. Nothing was added")
        spans = [(0, count, 1)]
    else:
        # Draws of people vary more in size, and no shape is static where each class is a pass: padding is left out.
        samples = min(count, draw.rows - rows.start)
        spans = [
            (start - rows.start, stop - rows.start, divisor)
            for start, stop, divisor in draw.divisors(rows.start, rows.start + (samples if samples > 0 else count))
        ]
        if not here.is_whole:
            spans = _of_all_classes(spans, draw.people.divisors)
    if not here.is_whole and unit == "person":
        # A pass sums the rows of all processes into the parts that each of them holds and divides.
        agree(
            {"what the gradients of people's rows are divided by": [divisor for *_, divisor in spans]},
            remedy="Let each rank accumulate its own part of one draw of people, an empty part too",
        )
    return spans


def _of_all_classes(spans: Sequence[tuple[int, int, int]], divisors: Sequence[int]) -> list[tuple[int, int, int]]:
    """The spans of all classes that any process may have, in order, those without rows here among them."""
    known = {divisor: (start, stop) for start, stop, divisor in spans}
    found, reached = [], 0
    for divisor in divisors:
        start, stop = known.get(divisor, (reached, reached))
        found.append((start, stop, divisor))
        reached = stop
    return found


def accumulate_public(
    model: DPLipModel, batch: tuple[Tensor | Structure, Tensor], loss: Callable[[Tensor, Tensor], Tensor] | None
) -> Tensor:
    """See :meth:`clipless_dp.CliplessDPOptimizer.accumulate_public`."""
    _require_gradients()
    inputs, targets = model.rows(batch[0]), plain(batch[1], "the target")
    with model.register.apart(None, None, public=True):
        value = model.loss(model(inputs), targets) if loss is None else loss(inputs, targets)
        value.backward()
    return value.detach()
