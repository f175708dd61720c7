"""Whether a layer computes the same alone and in a batch, traced or not, in each mode, dtype and memory layout."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from clipless_dp.errors import PrivacyError
from clipless_dp.graph.dropout import DrawnDropout
from clipless_dp.model import DPLipModel
from clipless_dp.model.passes import unwitnessed
from clipless_dp.testing.attacks import TOLERANCE, Record, try_all
from clipless_dp.testing.probes import Case, Probed

_ABSOLUTE = 1e-11
"""What float64 leaves of values of size one that cancel."""

_FLOAT32 = 1e-4
"""Sums of under 10^3 products in float32 err by at most 10^3·2^-24 ≈ 6e-5 of their size; bfloat16 errs by 4e-3."""

Values = dict[str, Tensor]


class Inconsistent(AssertionError):
    """A layer does not compute what its bounds were stated for."""


def check_samples_apart(case: Case) -> None:
    """Nothing of one sample enters another's output, cotangent or gradient, and gradients add over the batch.

    Raises:
        Inconsistent: something does.
    """
    model = case.model()
    inputs, targets = case.batch(model, 3)
    inputs, neighbours = case.contrasts(inputs)
    whole = _run(model, model, inputs, targets)
    total: Values = {}
    for row in range(3):
        only = torch.arange(3) == row
        here = only.reshape(-1, *[1] * len(case.shape)), only.reshape(-1, *[1] * len(model.output_shape))
        # Cotangents of the others are zero from here on, so that the parameters' gradients are this sample's own.
        own = torch.where(here[1], targets, torch.zeros_like(targets))
        mine = _run(model, model, inputs, own)
        _compare(_rows(whole, only), _rows(mine, only), f"the cotangents of others reach sample {row}")
        passed = {name: value[~only] for name, value in mine.items() if name == "the cotangent passed back"}
        _compare(passed, {k: torch.zeros_like(v) for k, v in passed.items()}, f"sample {row} reaches others' inputs")
        others = _run(model, model, torch.where(here[0], inputs, neighbours), own)
        _compare(_rows(mine, only), _rows(others, only), f"the inputs of others reach sample {row}")
        _compare(_gradients(mine), _gradients(others), f"the inputs of others reach the gradient of sample {row}")
        if not _draws_noise(model, inputs):
            alone = _run(model, model, inputs[only], targets[only])
            _compare(_rows(mine, only), _rows(alone, only[only]), f"sample {row} alone differs from it in a batch")
            _compare(_gradients(mine), _gradients(alone), f"the gradient of sample {row} depends on the batch's size")
        total = {name: total.get(name, 0.0) + values for name, values in _gradients(mine).items()}
    _compare(_gradients(whole), total, "gradients do not add over the batch")


def check_tracing(case: Case) -> None:
    """The graph that ``torch.fx`` made, which is what runs, and the module itself agree in both modes.

    Raises:
        Inconsistent: they do not: the module's forward depends on something that tracing froze.
    """
    model = case.model()
    # The module by itself draws its masks elsewhere.
    masked = any(isinstance(part, DrawnDropout) for part in model.graph.module.modules())
    for mode in (False,) if masked else (True, False):
        model.train(mode)
        for size in (1, 4):
            inputs, targets = case.batch(model, size)
            name = "train()" if mode else "eval()"
            _compare(
                _run(model, model.graph.module, inputs, targets),
                _run(model, model.net, inputs, targets),
                f"in {name} the traced graph and the module differ",
            )


def check_eval(case: Case) -> None:
    """In ``eval()`` the bounds hold too, both those evaluated then and those of ``train()``.

    Raises:
        BoundBroken: one does not.
    """
    model = case.model()
    trained = Record(model)
    model.eval()
    record = Record(model)
    record.bounds = {name: min(bound, trained.bounds[name]) for name, bound in record.bounds.items()}
    try_all(record, case, singular=False, every=3)


def check_sizes(case: Case) -> None:
    """The bounds hold for other radii of inputs and cotangents than the case's own.

    Raises:
        BoundBroken: one does not: it was stated for signals of norm one.
    """
    for inputs, cotangents in ((4.0, 0.3), (0.2, 5.0)):
        other = replace(case, input_norm=inputs * case.input_norm, cotangent_norm=cotangents * case.cotangent_norm)
        try_all(Record(other.model()), other, singular=False, every=4)


def check_precision(case: Case) -> None:
    """Float32 and float64 agree, and nothing is computed or returned in a narrower dtype than the model's own.

    Raises:
        Inconsistent: they do not, or something is.
        BoundBroken: a bound does not hold in float32.
    """
    exact, rounded = case.model(), case.model(dtype=torch.float32)
    rounded.net.load_state_dict(exact.net.state_dict())
    exact.net.load_state_dict(rounded.net.state_dict())
    inputs, targets = (_rounded(values) for values in case.batch(exact, 3))
    with _Watch(torch.float64):
        expected = _run(exact, exact, _widened(inputs), targets.double())
    with _Watch(torch.float32):
        found = _run(rounded, rounded, inputs, targets)
    for model, dtype in ((exact, torch.float64), (rounded, torch.float32)):
        seen = _probed(model).after.seen
        if seen is None or seen.dtype != dtype:
            returned = None if seen is None else seen.dtype
            raise Inconsistent(f"the layer returns {returned} where it is given {dtype}")
    if not _draws_noise(rounded, inputs):
        _compare(expected, {k: v.double() for k, v in found.items()}, "float32 and float64 differ", _FLOAT32)
    record = Record(rounded, _FLOAT32)
    try_all(record, case, singular=False, every=3)


def check_autocast(case: Case) -> None:
    """Under autocast the model refuses to run and to be differentiated, whatever the layer does.

    Raises:
        Inconsistent: it does not.
    """
    model = case.model(dtype=torch.float32)
    inputs, targets = (_rounded(values) for values in case.batch(model, 2))
    loss = model.loss(model(inputs), targets)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for name, attempt in (("forward", lambda: model(inputs)), ("backward", loss.backward)):
            _expect_refusal(name, attempt)


def check_layouts(case: Case) -> None:
    """Channels-last and other strides of inputs, cotangents and weights change neither values nor bounds.

    Raises:
        Inconsistent: they do.
    """
    model = case.model()
    inputs, targets = case.batch(model, 3)
    expected, bounds = _run(model, model, inputs, targets), model.sensitivity().per_parameter
    row = inputs[:1].repeat(3, *[1] * len(case.shape)), targets[:1].repeat(3, *[1] * len(model.output_shape))
    found = {
        "other strides": (expected, _run(model, model, _strided(inputs), _strided(targets))),
        "an expanded batch": (
            _run(model, model, *row),
            _run(model, model, inputs[:1].expand_as(inputs), targets[:1].expand_as(targets)),
        ),
    }
    # Of maps and of volumes torch knows it by two names, neither of which goes for both.
    axes = {parameter.dim() for parameter in model.parameters()} & {4, 5}
    if axes != {4, 5}:
        order = torch.channels_last_3d if axes == {5} else torch.channels_last
        model.to(memory_format=order)  # type: ignore[call-overload]
    found["channels-last"] = expected, _run(model, model, _channels_last(inputs), _channels_last(targets))
    # Noise is drawn in the order of memory.
    if not _draws_noise(model, inputs):
        for name, (one, other) in found.items():
            _compare(one, other, f"{name}: values differ")
    for name, bound in model.sensitivity().per_parameter.items():
        # The same certificate summed in another order.
        if abs(bound - bounds[name]) > 1e-6 * bounds[name]:
            raise Inconsistent(f"channels-last gives {name} the bound {bound:.6g}, not {bounds[name]:.6g}")


def _run(model: DPLipModel, forward: Callable[[Tensor], Tensor], inputs: Tensor, targets: Tensor) -> Values:
    """Output, cotangent at the input and gradients, under one seed."""
    inputs = inputs.detach().requires_grad_(inputs.is_floating_point())
    reached = {"the cotangent passed back": inputs} if inputs.requires_grad else {}
    reached.update({f"the gradient of {name}": p for name, p in model.net.named_parameters() if p.requires_grad})
    with torch.random.fork_rng(devices=[]), model.randomness.seeded(5), torch.enable_grad(), unwitnessed():
        torch.manual_seed(5)
        output = forward(inputs)
        found = torch.autograd.grad(model.loss(output, targets), list(reached.values()), materialize_grads=True)
    return {"the output": output.detach(), **dict(zip(reached, found, strict=True))}


def _rounded(values: Tensor) -> Tensor:
    return values.float() if values.is_floating_point() else values


def _widened(values: Tensor) -> Tensor:
    return values.double() if values.is_floating_point() else values


def _gradients(values: Values) -> Values:
    return {name: value for name, value in values.items() if name.startswith("the gradient of ")}


def _rows(values: Values, rows: Tensor) -> Values:
    return {name: value[rows] for name, value in values.items() if not name.startswith("the gradient of ")}


def _compare(left: Values, right: Values, message: str, tolerance: float = TOLERANCE) -> None:
    for name, value in left.items():
        difference = float(torch.linalg.vector_norm(value - right[name]))
        size = float(torch.linalg.vector_norm(value)) + float(torch.linalg.vector_norm(right[name]))
        allowed = tolerance * size + _ABSOLUTE * (tolerance / TOLERANCE)
        if not difference <= allowed:
            raise Inconsistent(f"{message}: {name} by {difference:.3g}, of a norm of {size / 2.0:.3g}")


def _draws_noise(model: DPLipModel, inputs: Tensor) -> bool:
    """Whether two seeds give two outputs: then rows of batches of different sizes cannot be compared."""
    outputs = []
    for seed in (1, 2):
        with torch.no_grad(), model.randomness.seeded(seed):
            outputs.append(model(inputs))
    return not torch.equal(outputs[0], outputs[1])


def _probed(model: DPLipModel) -> Probed:
    assert isinstance(model.net, Probed)
    return model.net


def _strided(values: Tensor) -> Tensor:
    return values.transpose(0, -1).contiguous().transpose(0, -1)


def _channels_last(values: Tensor) -> Tensor:
    order = {4: torch.channels_last, 5: torch.channels_last_3d}.get(values.dim())
    return values if order is None else values.contiguous(memory_format=order)


def _expect_refusal(name: str, attempt: Callable[[], Any]) -> None:
    try:
        attempt()
    except PrivacyError:
        return
    raise Inconsistent(f"the {name} pass runs under autocast, which rounds more coarsely than the bounds cover")


class _Watch(TorchDispatchMode):
    """Refuses results of a narrower floating-point dtype, forwards and backwards; one number may have any."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bits = torch.finfo(dtype).bits

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for made in result if isinstance(result, (tuple, list)) else (result,):
            if not (isinstance(made, Tensor) and made.numel() > 1 and made.dtype.is_floating_point):
                continue
            if torch.finfo(made.dtype).bits < self.bits:
                raise Inconsistent(f"{func} computes in {made.dtype} inside a model of {self.bits} bits")
        return result
