"""Buffers that a pass must leave as they are: files hold them, or the next pass reads them, without any noise."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from accounting.errors import warn_caller
from clipless_dp.errors import PrivacyError, PrivacyWarning
from clipless_dp.isolation import Isolated
from clipless_dp.modules import kind_of


def _held(net: nn.Module) -> list[tuple[str, dict[str, Any], str, bool]]:
    """Where buffers are, and whether a state holds them; but for this package's, and what torch derives of weights."""
    apart = [f"{path}." if path else "" for path, part in net.named_modules() if isinstance(part, Isolated)]
    return [
        (f"{path}.{name}".lstrip("."), part._buffers, name, name not in part._non_persistent_buffers_set)
        for path, part in net.named_modules()
        if not kind_of(part).__module__.startswith(("clipless_dp.", "torch.nn.utils."))
        or ".testing" in kind_of(part).__module__
        for name in part._buffers
        # What a network that runs sample by sample keeps for its next call is refused there.
        if name not in part._non_persistent_buffers_set or not any(path.startswith(one) for one in apart)
    ]


def _parameters(net: nn.Module, *, own: bool = False) -> list[tuple[str, dict[str, Any], str, bool]]:
    """Where parameters are, as :func:`_held` tells it of buffers; or of a user's own layers alone."""
    return [
        (f"{path}.{name}".lstrip("."), part._parameters, name, True)
        for path, part in net.named_modules()
        if not own or kind_of(part).__module__.partition(".")[0] not in ("torch", "clipless_dp")
        for name in part._parameters
    ]


def _parts(value: Tensor) -> list[Tensor]:
    """The dense tensors that a tensor of any layout has its numbers in; of one without numbers, none."""
    value = value.detach()
    if value.is_meta:
        return []
    if value.is_nested:
        return [part for one in value.unbind() for part in _parts(one)]
    if value.is_quantized:
        return [value.int_repr()]
    if value.layout is torch.sparse_coo:
        return [value._indices(), value._values()]
    if value.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [value.crow_indices(), value.col_indices(), value.values()]
    if value.layout in (torch.sparse_csc, torch.sparse_bsc):
        return [value.ccol_indices(), value.row_indices(), value.values()]
    return [(value if value.layout is torch.strided else value.to_dense()).resolve_conj().resolve_neg()]


def _bits(value: Tensor) -> Tensor:
    return value.contiguous().reshape(-1).view(torch.uint8)


def _are_same(one: Tensor, other: Tensor) -> bool:
    """Whether tensors are the same bit by bit."""
    if any(getattr(one, name) != getattr(other, name) for name in ("dtype", "device", "layout")):
        return False
    if one.is_nested != other.is_nested or (not one.is_nested and one.shape != other.shape):
        return False
    parts = _parts(one), _parts(other)
    return [part.shape for part in parts[0]] == [part.shape for part in parts[1]] and all(
        torch.equal(_bits(first), _bits(second)) for first, second in zip(*parts, strict=True)
    )


class _Kept:
    """A buffer or a parameter as it was."""

    def __init__(self, value: Tensor | None) -> None:
        self._value = value
        self.copy = None if value is None else value.detach().clone()

    def is_there(self, now: Tensor | None) -> bool:
        """Whether it is as it was, bit by bit."""
        if self.copy is None or now is None:
            return now is self.copy
        return _are_same(self.copy, now)

    def restored(self) -> Tensor | None:
        """The same tensor with the numbers that it had; a copy where they cannot be written there."""
        if self._value is None or self.copy is None:
            return None
        try:
            with torch.no_grad():
                self._value.data.copy_(self.copy)
        except RuntimeError:
            # Of another size by now, or with several entries in one place, or made in inference mode.
            return self.copy
        return self._value if _are_same(self._value, self.copy) else self.copy


@contextmanager
def buffers_unwritten(net: nn.Module) -> Iterator[None]:
    """Within, what runs leaves buffers as they are, bit by bit: what it writes to those of no file is taken back.

    Else a layer whose rule is true whatever they hold might carry to the next batch what it has seen in this one. What
    is made where there was nothing, as a mask of the inputs' shape, is made anew each time; so it is after an error.

    Args:
        net: a network, or a layer of one.

    Raises:
        PrivacyError: one was written, and is as it was before.
    """
    there = [*_held(net), *_parameters(net, own=True)]
    known = {(id(where), name) for _, where, name, _ in (*there, *_parameters(net))}
    before = [(place, _Kept(place[1][place[2]])) for place in there]
    written, taken_back = [], []
    try:
        yield
    finally:
        # After an error, too: what a pass has written by then is of its samples.
        for (path, where, name, saved), kept in before:
            if kept.is_there(where.get(name)):
                continue
            if not saved:
                # Another tensor: the way back may need what was written.
                where[name] = kept.copy
                taken_back += [path] if kept.copy is not None else []
                continue
            written.append(path)
            where[name] = kept.restored()
        for path, where, name, saved in (*_held(net), *_parameters(net)):
            if (id(where), name) not in known:
                # Made by this pass; as a mask of the inputs' shape is, anew each time.
                del where[name]
                written += [path] if saved else []
    if taken_back:
        warn_caller(
            f"a pass wrote the buffer {', '.join(map(repr, taken_back))} of the network, which is as it was again: the "
            "next pass would read what follows from samples, which no noise is on. A setting that changes from step to "
            "step is set outside of passes",
            PrivacyWarning,
        )
    if written:
        raise PrivacyError(
            f"a pass wrote the buffer or parameter {', '.join(map(repr, written))} of the network, or made it: files "
            "of the model hold it, and what follows from samples is there without noise. Keep it out of them, or let "
            "it be a public constant that code outside of passes sets. It is as it was"
        )
