"""How a network's code is run on one sample: under ``vmap``, with nothing unseen, and errors in the library's words."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from clipless_dp.errors import CliplessError, PrivacyError, Unsupported, UnsupportedModuleError
from clipless_dp.isolation.checkpointing import checkpointed
from clipless_dp.isolation.hidden import PACKING, nothing_unseen

KEPT = (
    "the network keeps something that it computed of its samples, in an attribute, a cache or a list, which the next "
    "batch could read: let it return what is needed, and keep nothing"
)


def mapped(
    one: Callable[..., Tensor], sample: Tensor, batch: Sequence[Tensor], axes: Sequence[int], kind: str
) -> Tensor:
    """Runs code on each sample by itself: ``one(sample, *inputs)``, where ``sample`` tells samples apart.

    Args:
        one: the code.
        sample: ``(B,)``, zeros.
        batch: the inputs of all samples.
        axes: of samples in these.
        kind: what the network is called in messages.

    Raises:
        PrivacyError: the code goes around what keeps samples apart.
        UnsupportedModuleError: it branches on values, or does what cannot be done for one sample alone.
    """
    try:
        with torch.autograd.graph.disable_saved_tensors_hooks(PACKING), nothing_unseen(checkpointed):
            return torch.func.vmap(one, in_dims=(0, *axes), randomness="different")(sample, *batch)
    except CliplessError:
        raise
    except RuntimeError as error:
        told = str(error)
        if PACKING in told:
            raise PrivacyError(PACKING) from error
        if "data-dependent control flow" in told or ".item()" in told:
            remedy = (
                "it branches on values of a sample, or of chance as layerdrop does, which no run for many samples "
                "can: use torch.where, and set layerdrop=0"
            )
        elif "vmap" in told:
            remedy = f"torch.func.vmap, which keeps samples apart, cannot run it: {told.splitlines()[0]}"
        else:
            raise
        raise UnsupportedModuleError([Unsupported("forward", kind, remedy)], isolated=True) from error


@contextmanager
def seeded_once() -> Iterator[None]:
    """Within, the CPU's generator has a seed of its own, drawn from what it was: any other one shows."""
    generator = torch.default_generator
    seed = int(torch.randint(2**63 - 1, ()))
    state = generator.get_state()
    generator.manual_seed(seed)
    try:
        yield
    finally:
        generator.set_state(state)
