"""States of the generators that all code of a process shares."""
# ruff: noqa: NPY002 (what code of a user's draws from is numpy's global generator)

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def random_states(device: torch.device) -> tuple[Any, ...]:
    """States of the global generators of torch, of a device (or ``None``), of Python and of numpy."""
    own = None if device.type in ("cpu", "meta") else torch.get_device_module(device).get_rng_state(device)
    return torch.get_rng_state(), own, random.getstate(), np.random.get_state()


def set_random_states(states: tuple[Any, ...], device: torch.device) -> None:
    """Sets what :func:`random_states` returned."""
    torch.set_rng_state(states[0])
    if states[1] is not None:
        torch.get_device_module(device).set_rng_state(states[1], device)
    random.setstate(states[2])
    np.random.set_state(states[3])


@contextmanager
def left_alone() -> Iterator[None]:
    """What is drawn within from the generators of the processor is as if it had not been."""
    device = torch.device("cpu")
    states = random_states(device)
    try:
        yield
    finally:
        set_random_states(states, device)
