"""Random views of samples, each made from that sample alone."""

from __future__ import annotations

import copy
import secrets
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import partial
from itertools import islice
from types import CellType, CodeType, FunctionType
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from clipless_dp.errors import ConfigurationError, PrivacyError
from clipless_dp.noise.randomness import Randomness
from clipless_dp.noise.randomness import shared as shared_randomness
from clipless_dp.sampling import draws, memory, trained_on
from clipless_dp.sampling.adversarial import Adversarial, Beside, LabelledAugmentation
from clipless_dp.sampling.generators import random_states, set_random_states
from clipless_dp.sampling.reach import ATOMS, reachable
from clipless_dp.sampling.transforms import GaussianNoise, OfLabels, OfRows, RowAugmentation, ShiftAndFlip
from clipless_dp.tensor_types import plain

__all__ = ["Adversarial", "Augmentation", "Beside", "GaussianNoise", "LabelledAugmentation", "RowAugmentation"]
__all__ += ["ShiftAndFlip", "refuse_own_generators", "views"]

Augmentation = RowAugmentation | LabelledAugmentation | Callable[[Tensor], Tensor]


@torch.no_grad()
def views(
    augment: Augmentation,
    inputs: Tensor,
    mask: Tensor,
    source: Randomness | None = None,
    beside: Beside | None = None,
) -> Tensor:
    """One view of each sample.

    The global generators of torch, numpy and Python are seeded from the source before, and restored afterwards: what a
    user seeds reaches no view.

    Args:
        augment: a function of one sample, called once for each, so that it cannot see two of them; or a
            :class:`RowAugmentation`, or a :class:`LabelledAugmentation`.
        inputs: ``(rows, *input_shape)``.
        mask: boolean ``(rows,)``; padding is not shown to a function of one sample.
        source: of the random numbers; by default one that the operating system seeds.
        beside: targets and slopes, which labelled views are made by.

    A :class:`RowAugmentation` is looked at in the first batch of two rows and in one of :data:`EVERY` later ones: half
    of the rows are overwritten, then the other half, and under the same random numbers all other views must be the same
    bits. So is a labelled one, with targets of other rows in the rows that are overwritten; its views, which come out
    of a network, must be the same up to rounding. :class:`Adversarial` itself is row by row by its formulas.

    An augmentation must leave behind nothing that later views could read: what it reaches
    (:func:`clipless_dp.sampling.reach.reachable`) is compared around its first call and one of :data:`EVERY` later
    ones, and around each where it is small; and between views of single samples, since what two of them move forth and
    back is as it was. What it makes when it is called first (a value in place of ``None``, a flag that is set, contents
    of an empty mapping) may stay if copies that were never called make the same of other inputs, few and many. As often
    it is looked at whether it holds a batch, or draws from a generator of its own.

    Raises:
        ConfigurationError: a view has another shape than its sample, or is no tensor, or a batch is held, or there is a
            generator of its own; or labelled views are asked for where there are no labels.
        PrivacyError: a view depends on other rows, the argument was changed, or the augmentation keeps a state, or
            reaches data that is trained on (:mod:`clipless_dp.sampling.trained_on`).
    """
    memory.refuse_refused(augment, f"augment={augment!r}")
    if isinstance(augment, OfLabels) and beside is None:
        raise ConfigurationError(f"augment={augment!r} makes views by labels and slopes, which fit and accumulate give")
    source = source or shared_randomness
    near = [*_near(augment)]
    if not _is_due(augment, near):
        _refuse_data(augment, near, inputs)
        with source.visit(inputs.device):
            return _views(augment, inputs, mask, beside)
    reached = [value for value, *_ in reachable(augment)]
    _refuse_generators(augment, reached, "augment")
    _refuse_data(augment, [*near, *reached], inputs)
    _note_looked(near)
    # Whole batches are not counted: on an accelerator that would wait for it.
    look = _Look(augment, len(inputs) if isinstance(augment, OfRows) else int(mask.sum()))
    with source.visit(inputs.device):
        made = _views(augment, inputs, mask, beside, look.after_row)
    look.refuse_memory(inputs, mask, source)
    return made


def _is_due(augment: Augmentation, near: list[object]) -> bool:
    """Whether all that an augmentation reaches is looked at: where that is little, in the first call, and in some.

    A function that is made anew in each step is known by its code, if what it holds is known, too.

    Args:
        augment: the augmentation.
        near: what it holds (:func:`_near`).
    """
    known = (_looked_up(_sizes, some) for some in (_known(augment), _code(augment)) if some is not None)
    size = next((size for size in known if size is not None), 0)
    return int(size) <= SMALL or not all(map(_is_known, near)) or secrets.randbelow(EVERY) == 0


def _looked_up(mapping: Any, key: object) -> Any:
    """What a mapping of weak references holds; ``None`` of what has none, such as objects of slots."""
    try:
        return mapping.get(key)
    except TypeError:
        return None


def _is_known(value: object) -> bool:
    """Whether something needs no look, or was looked into since data was last said to be trained on.

    Tensors, arrays and containers are looked at in each call.
    """
    if type(value) in ATOMS or isinstance(value, (Tensor, np.ndarray, dict, list, tuple)):
        return True
    return bool(_looked_up(_looked, value) == trained_on.version())


def _note_looked(near: list[object]) -> None:
    for value in near:
        if type(value) not in ATOMS and not isinstance(value, (Tensor, np.ndarray)):
            with suppress(TypeError):
                _looked[value] = trained_on.version()


def _known(augment: Any) -> Any:
    # A method is another object each time.
    return getattr(augment, "__self__", augment)


def _code(augment: Any) -> CodeType | None:
    """The code of a function that calls no other which it was given: such a one, a decorator's say, is no other."""
    if not isinstance(augment, FunctionType) or any(map(callable, _held(augment))):
        return None
    return augment.__code__


class _Look:
    """What an augmentation reaches, before its views, between them and after.

    Args:
        augment: the augmentation.
        count: of the views that will be made.
    """

    def __init__(self, augment: Augmentation, count: int) -> None:
        self._augment = augment
        self._count = count
        self._before = memory.State(augment)
        self._is_first = _known(augment) not in _sizes
        is_small = self._before.size <= SMALL
        # What is made when it is called first is compared with what copies make.
        self._fresh = memory.pristine(augment) if self._is_first and is_small else None
        # What two views move forth and back shows between them.
        self._due = {*range(min(count - 1, _FOLLOWED if is_small and self._is_first else 1))}
        self._seen: list[memory.Change] = []
        self._rows = 0

    def after_row(self) -> None:
        """Compares after some of the views of single samples."""
        if self._rows in self._due:
            self._seen += self._changes(memory.State(self._augment))
        self._rows += 1

    def _changes(self, after: memory.State) -> list[memory.Change]:
        return [] if after == self._before else self._before.changes(after)

    def refuse_memory(self, inputs: Tensor, mask: Tensor, source: Randomness) -> None:
        """Refuses a state that has changed, but for what any sample makes in a first call.

        Args:
            inputs: the samples, and padding.
            mask: which are samples.
            source: of random numbers.

        Raises:
            PrivacyError: it has.
        """
        after = memory.State(self._augment)
        changes = self._changes(after)
        moved = [change for change in dict.fromkeys(self._seen) if change not in changes]
        if moved or (changes and not self._is_made_of_any(changes, inputs[mask], source)):
            memory.note_refused(self._augment)
            raise PrivacyError(
                f"augment={self._augment!r} keeps a state that changed while it made views "
                f"({memory.told(_name_of(self._augment), changes or moved)}), through which samples enter the views of "
                "others. Make each view of its sample alone and of torch's, numpy's or Python's global generators, "
                "make in the constructor what it needs, and leave out counters. Nothing was released"
            )
        if self._is_first:
            # Some make their generator when they are called first.
            refuse_own_generators(self._augment)
        if self._count or not self._is_first:
            with suppress(TypeError):
                _sizes[_known(self._augment)] = after.size
            if (code := _code(self._augment)) is not None:
                _sizes[code] = after.size

    def _is_made_of_any(self, changes: list[memory.Change], rows: Tensor, source: Randomness) -> bool:
        """Whether copies that were never called become the same, whatever they are called on, and how often, and the
        function no other."""
        if self._fresh is None or not len(rows) or not memory.is_made_once(changes):
            return False
        if isinstance(self._augment, OfLabels):
            # Nothing is kept: copies would need labels and slopes for what they are called on.
            return False
        states: list[memory.State] = []
        with source.visit(rows.device):
            noise = torch.rand(rows.shape, device=rows.device).to(rows.dtype)
        one = rows[:1]
        given = [rows, torch.zeros_like(rows), torch.ones_like(rows), noise, rows.flip(0), one, torch.cat([one, one])]
        for values, times in [*((values, 1) for values in given), (rows, 2), (one, 3)]:

            def call(own: Any, values: Tensor = values, times: int = times) -> None:
                counts = torch.ones(len(values), dtype=torch.bool, device=values.device)
                for _ in range(times):
                    with source.visit(values.device):
                        _views(own, values.clone(), counts, None)

            found = memory.state_of_copy(self._augment, self._fresh, changes, call)
            if found is None:
                return False
            states.append(found[0])
        return all(state == states[0] for state in states[1:])


def _name_of(augment: Any) -> str:
    return str(getattr(augment, "__qualname__", type(augment).__qualname__)).rpartition(">.")[2]


def _views(
    augment: Augmentation,
    inputs: Tensor,
    mask: Tensor,
    beside: Beside | None,
    after_row: Callable[[], None] | None = None,
) -> Tensor:
    if isinstance(augment, OfRows):
        return _views_of_rows(augment, inputs, mask, beside)
    rows = []
    for row, counts in zip(inputs, mask.tolist(), strict=True):
        # A copy, since what is changed in place would change the sample's other views.
        view = augment(row.clone()) if counts else row
        if not isinstance(view, Tensor) or view.shape != row.shape:
            raise _misshapen(augment, view, row.shape)
        rows.append(plain(view, "a view"))
        if counts and after_row is not None:
            after_row()
    return torch.stack(rows) if rows else inputs


EVERY = 32
"""One batch in so many is looked at, in expectation."""

SMALL = 1 << 10
"""Bytes of what an augmentation reaches up to which it is compared around each call: 0.3 ms, as of a closure."""

_FOLLOWED = 64
"""Views of single samples in a first call, between which is compared where little is reached."""

_sizes: Any = WeakIdKeyDictionary()
"""Of what the augmentations reach that were called, and of the code of those that are functions."""

_looked: Any = WeakIdKeyDictionary()
"""What augmentations hold that was looked into, and the version of the data that is trained on at that time."""

_passed: Any = WeakIdKeyDictionary()
"""The augmentations that were looked at."""


def _views_of_rows(augment: OfRows, inputs: Tensor, mask: Tensor, beside: Beside | None) -> Tensor:
    due = inputs.device.type != "meta" and (augment not in _passed or secrets.randbelow(EVERY) == 0)
    due = due and not _is_proved(augment)
    rows = mask.nonzero().flatten() if due else mask[:0]
    looks = len(rows) > 1
    before = random_states(inputs.device) if looks else None
    kept = inputs.clone() if looks else None
    # Each look starts from the attributes that this call starts from.
    copies = [_copied(augment) for _ in range(3)] if looks else []
    version = inputs._version
    made = _made(augment, inputs, mask, beside)
    if not isinstance(made, Tensor) or made.shape != inputs.shape:
        raise _misshapen(augment, made, inputs.shape)
    made = plain(made, "a view")
    if inputs._version != version or (kept is not None and not bool(_same(inputs, kept).all())):
        raise PrivacyError(
            f"augment={augment!r} changes its argument in place, which other views and other passes read: return a new "
            "tensor. Nothing was released"
        )
    if kept is None or before is None:
        return made
    after = random_states(inputs.device)
    alike = partial(_close, moved=made - kept) if isinstance(augment, OfLabels) else _same
    strangers: Beside | None = None
    try:
        halves = rows[torch.randperm(len(rows), device=rows.device)].tensor_split(2)
        for copy_, changed, other in zip(copies, halves, halves[::-1], strict=False):
            strange = kept.clone()
            strange[changed] = 0
            strange[changed] += (kept[changed].flatten(1) == 0).all(1).reshape(-1, *[1] * (kept.dim() - 1)).to(kept)
            if beside is not None:
                targets = beside.targets.clone()
                targets[changed] = beside.targets[
                    other[torch.randint(len(other), (len(changed),), device=other.device)]
                ]
                strangers = beside._replace(targets=targets)
            if bool(alike(_repeated(copy_, strange, mask, strangers, before), made)[other].all()):
                continue
            if not bool(alike(_repeated(copies[2], kept, mask, beside, before), made)[other].all()):
                raise PrivacyError(
                    f"augment={augment!r} gives two views of the same rows under the same random numbers: it keeps a "
                    "state outside of its own attributes, through which rows may meet, or draws from elsewhere. Draw "
                    "from torch's, numpy's or Python's global generators. Nothing was released"
                )
            raise PrivacyError(
                f"in augment={augment!r} the view of a row depends on other rows of the batch (mixup, statistics of "
                "the batch), so that one sample would enter the gradients of others, which no bound covers. Make each "
                "view from its row alone, or give a function of one sample. Nothing was released"
            )
    finally:
        set_random_states(after, inputs.device)
    _passed[augment] = True
    return made


def _is_proved(augment: object) -> bool:
    """Whether views are this package's own, whose formulas have one row each; a subclass may do anything."""
    return type(augment) is Adversarial and _methods() == _ADVERSARIAL and vars(augment).keys() == _SETTINGS


def _methods() -> dict[str, Any]:
    return {name: value for name, value in vars(Adversarial).items() if isinstance(value, FunctionType)}


_ADVERSARIAL = _methods()
_SETTINGS = vars(Adversarial(1.0)).keys()


def _made(augment: Any, inputs: Tensor, mask: Tensor, beside: Beside | None) -> Any:
    if not isinstance(augment, OfLabels):
        return augment(inputs)
    assert beside is not None
    targets, slopes = beside
    return cast(Any, augment)(inputs, targets.clone(), lambda values: slopes(values, targets, mask))


def _repeated(augment: OfRows, inputs: Tensor, mask: Tensor, beside: Beside | None, states: tuple[Any, ...]) -> Tensor:
    set_random_states(states, inputs.device)
    return cast(Tensor, _made(augment, inputs.clone(), mask, beside))


def _copied(augment: OfRows) -> OfRows:
    try:
        return copy.deepcopy(augment)
    except Exception:
        return augment


def _same(first: Tensor, second: Tensor) -> Tensor:
    """Which rows are the same, ``(rows,)``; a NaN is the same as another."""
    return ((first == second) | ((first != first) & (second != second))).flatten(1).all(1)


def _close(first: Tensor, second: Tensor, moved: Tensor) -> Tensor:
    """Which rows are the same up to the rounding of a network's passes, relative to how far views move, ``(rows,)``."""
    error = 1e-3 * float(moved.abs().nan_to_num(0.0, 0.0, 0.0).max())
    return torch.isclose(first, second, rtol=1e-6, atol=error, equal_nan=True).flatten(1).all(1)


def _refuse_data(augment: Augmentation, values: Iterable[object], inputs: Tensor) -> None:
    """Refuses an augmentation that holds a batch that was handed out, whose rows would enter the views of others, or
    data that is trained on, as what these inputs are views of."""
    values = [*values]
    for value in values:
        if isinstance(value, Tensor) and draws.is_delivered(value):
            raise ConfigurationError(
                f"augment={augment!r} holds a batch of samples (in a closure, a default, an attribute or a global), "
                "through which rows enter the views of others: make each view from its row alone"
            )
    trained_on.refuse(augment, "augment", values, inputs)


_FEW = 64
"""Parts of a container that are looked at in each call: of more, some."""


def _near(augment: Any) -> Iterator[object]:
    """What an augmentation holds, and small containers of it: few things, however much it reaches."""
    function = getattr(augment, "__func__", augment)
    if isinstance(augment, OfRows):
        function = type(augment).__call__
    code, named = getattr(function, "__code__", None), getattr(function, "__globals__", {})
    waiting = [*_held(augment), *(_held(function) if function is not augment else ())]
    waiting += [named[name] for name in (() if code is None else code.co_names) if name in named]
    for _ in range(3):
        yield from waiting
        waiting = [part for value in waiting if isinstance(value, (dict, list, tuple)) for part in _some_of(value)]


def _some_of(value: dict[Any, Any] | list[Any] | tuple[Any, ...]) -> Iterable[Any]:
    if len(value) > _FEW:
        if isinstance(value, dict):
            return islice(dict.values(value), _FEW)
        step = len(value) // _FEW
        return value[secrets.randbelow(step + 1) :: step]
    return dict.values(value) if isinstance(value, dict) else value


def _held(augment: Any) -> list[object]:
    """Attributes, contents of a closure, arguments of a ``partial``, and defaults."""
    function = getattr(augment, "__func__", augment)
    held: list[object] = [*getattr(augment, "__dict__", {}).values(), getattr(augment, "__self__", None)]
    held += [cell.cell_contents for cell in getattr(function, "__closure__", None) or () if _is_filled(cell)]
    held += [*getattr(augment, "args", ()), *getattr(augment, "keywords", {}).values()]
    held += [
        *(getattr(function, "__defaults__", None) or ()),
        *(getattr(function, "__kwdefaults__", None) or {}).values(),
    ]
    return held


def refuse_own_generators(augment: Callable[..., Any], argument: str = "augment") -> None:
    """Refuses an augmentation, or another function of a sample, that holds a generator of random numbers of its own.

    Its draws would follow from a seed and a sample's place in the batch, so that one more sample changes the views of
    all others.

    Raises:
        ConfigurationError: one is within reach (:func:`clipless_dp.sampling.reach.reachable`): an attribute, in a
            closure, an argument of a ``partial``, or a global that the code names, in containers of these, too.
    """
    _refuse_generators(augment, (value for value, *_ in reachable(augment)), argument)


def _refuse_generators(augment: Callable[..., Any], reached: Iterable[object], argument: str) -> None:
    for value in memory.own_generators(reached):
        raise ConfigurationError(
            f"{argument}={augment!r} draws from a generator of its own ({type(value).__name__}), so that one more "
            "sample changes what is made of all others: draw from torch's, numpy's or Python's global generators, "
            "which follow a secret source of randomness while it is called"
        )


def _is_filled(cell: CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True


def _misshapen(augment: object, made: object, wanted: torch.Size) -> ConfigurationError:
    found = f"one of shape {tuple(made.shape)}" if isinstance(made, Tensor) else f"a {type(made).__name__}"
    return ConfigurationError(
        f"augment={augment!r} must return a tensor of the shape {tuple(wanted)} that it was given, got {found}"
    )
