"""Several tensors of a sample as one row."""

from __future__ import annotations

from collections import UserDict
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from clipless_dp.errors import ConfigurationError, InputError
from clipless_dp.packing import Packing

DTYPES = (torch.int64, torch.int32, torch.uint8, torch.bool, torch.float32)


@st.composite
def batches(draw: st.DrawFn) -> Any:
    """Inputs of a few samples, by name or in order, of any dtype."""
    rows = draw(st.integers(0, 4))
    fields = draw(
        st.lists(
            st.tuples(st.lists(st.integers(1, 3), max_size=2), st.sampled_from(DTYPES)),
            min_size=1,
            max_size=4,
        )
    )
    seed = draw(st.integers(0, 2**31))
    tensors = [_random((rows, *shape), dtype, seed + place) for place, (shape, dtype) in enumerate(fields)]
    if draw(st.booleans()):
        names = draw(st.permutations([f"x{place}" for place in range(len(tensors))]))
        return dict(zip(names, tensors, strict=True))
    return tensors


def _random(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator, dtype=dtype)
    most = {torch.bool: 2, torch.uint8: 256}.get(dtype, 2**24)
    return torch.randint(most, shape, generator=generator).to(dtype)


@settings(deadline=None, max_examples=60)
@given(batches())
def test_what_is_packed_comes_out_as_it_went_in(batch: Any) -> None:
    packing = Packing.of(batch)
    rows = packing.pack(batch)
    assert rows.shape == (len(rows), packing.entries)
    assert rows.dtype.is_floating_point != packing.is_integral
    values = packing.structured(rows)
    pairs = [(values[key], batch[key]) for key in (batch if isinstance(batch, dict) else range(len(batch)))]
    for found, given_in in pairs:
        assert found.dtype == given_in.dtype
        assert torch.equal(found, given_in)
    assert torch.equal(packing.pack(values), rows)


def test_names_lie_in_their_order_whatever_that_of_the_mapping() -> None:
    batch = {"b": torch.tensor([[1, 2]]), "a": torch.tensor([[3]])}
    packing = Packing.of(batch)
    assert packing.pack(batch).tolist() == [[3, 1, 2]]
    assert packing.pack(UserDict(reversed(batch.items()))).tolist() == [[3, 1, 2]]


PACKING = Packing.of({"ids": ((3,), torch.int64), "mask": ((3,), torch.int64), "values": (2,)})
GOOD = {"ids": torch.ones(2, 3).long(), "mask": torch.ones(2, 3).long(), "values": torch.ones(2, 2)}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"mask": None}, "the input 'mask' is missing"),
        ({"token_type_ids": torch.zeros(2, 3)}, "'token_type_ids' is no input"),
        ({"mask": torch.ones(2, 4).long()}, r"the input 'mask' is \(2, 4\), expected \(2, 3\)"),
        ({"mask": torch.ones(1, 3).long()}, r"the input 'mask' is \(1, 3\)"),
        ({"mask": torch.ones(2, 3)}, "the input 'mask' is torch.float32, expected torch.int64"),
        ({"values": torch.ones(2, 2).long()}, "the input 'values' is torch.int64, expected torch.float32"),
        ({"values": torch.ones(2, 2, dtype=torch.complex64)}, "the input 'values' is torch.complex64"),
        ({"mask": [[1, 1, 1], [1, 1, 1]]}, "the input 'mask' must be a tensor"),
        ({"ids": torch.full((2, 3), 2**24 + 1)}, "the input 'ids' holds integers above 16777216"),
    ],
)
def test_what_is_not_as_it_was_told_of_is_refused_by_its_name(changes: dict[str, Any], told: str) -> None:
    batch = {name: value for name, value in {**GOOD, **changes}.items() if value is not None}
    with pytest.raises(InputError, match=told):
        PACKING.pack(batch)


def test_inputs_in_order_are_no_inputs_by_name() -> None:
    with pytest.raises(InputError, match="expected the inputs"):
        PACKING.pack(list(GOOD.values()))
    with pytest.raises(InputError, match="expected 2 inputs"):
        Packing.of([(3,), (2,)]).pack([torch.ones(1, 3)])


@pytest.mark.parametrize("shapes", [{}, [], {1: (3,)}, {"ids": "3"}, {"ids": (0,)}, {"ids": ((3,), "int64")}])
def test_shapes_that_are_none_are_refused(shapes: Any) -> None:
    with pytest.raises(ConfigurationError):
        Packing.of(shapes)
