"""Maps of one channel that lie channels last, which torch's CPU kernel may read beyond: rows are by themselves."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from clipless_dp import ConfigurationError, DPLipModel, constraints, fit, gated, gradient_gated, layers, losses

LAST = torch.channels_last
ROUTES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "gates": gated,
    "gradient gates": gradient_gated,
    "sample by sample": partial(gradient_gated, isolation="vmap"),
    "spectral": lambda net: net,
}
NETS: dict[str, tuple[Callable[[], list[nn.Module]], tuple[int, ...]]] = {
    "first": (lambda: [nn.Conv2d(1, 4, 3, stride=(1, 2))], (1, 9, 4)),
    "hidden": (lambda: [nn.Conv2d(3, 1, 1), nn.ReLU(), nn.Conv2d(1, 4, (1, 3), (1, 2))], (3, 6, 4)),
    "one step, two columns": (lambda: [nn.Conv2d(1, 8, (3, 2), (1, 3), padding=(2, 0))], (1, 5, 2)),
    "three axes": (lambda: [nn.Conv3d(1, 4, (1, 1, 3), (1, 1, 3))], (1, 2, 4, 4)),
}


def model_of(net: str, route: str) -> DPLipModel:
    torch.manual_seed(0)
    parts, shape = NETS[net][0](), NETS[net][1]
    size = nn.Sequential(*parts)(torch.zeros(1, *shape)).numel()
    whole = ROUTES[route](nn.Sequential(*parts, nn.ReLU(), nn.Flatten(), nn.Linear(size, 3)))
    return DPLipModel(
        whole,
        input_shape=shape,
        input_norm=None if route == "sample by sample" else 20.0,
        loss=losses.TauCrossEntropy(),
        constraint=constraints.Spectral() if route == "spectral" else None,
    )


def as_laid(values: Tensor, last: bool) -> Tensor:
    return values.contiguous(memory_format=LAST if values.dim() == 4 else torch.channels_last_3d) if last else values


@pytest.mark.parametrize("last", [(False, True), (True, False), (True, True)], ids=["rows", "weights", "both"])
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("net", NETS)
def test_outputs_and_gradients_are_the_same_in_every_layout(net: str, route: str, last: tuple[bool, bool]) -> None:
    if net == "three axes" and route in ("gates", "spectral"):
        pytest.skip("convolutions of three axes are behind gradient gates alone")
    model = model_of(net, route)
    if last[0]:
        model = model.to(memory_format=LAST if len(model.input_shape) == 3 else torch.channels_last_3d)
    for turn in range(5):
        rows = torch.randn(9, *model.input_shape, generator=torch.Generator().manual_seed(turn))
        found = []
        for reading, values in ((model, as_laid(rows, last[1])), (model_of(net, route).double(), rows.double())):
            outputs = reading(values)
            reading.loss(outputs, torch.arange(9) % 3).backward()
            held = [
                parameter.grad.double().clone() for parameter in reading.net.parameters() if parameter.grad is not None
            ]
            found.append([outputs.detach().double(), *held])
            reading.register.drop()
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_a_transposed_convolution_whose_way_back_would_read_beyond_is_refused_when_it_is_wrapped() -> None:
    for part in (nn.ConvTranspose2d(4, 1, 3, stride=(1, 2)), layers.ConvexPotentialConv2d(1, 3, stride=2, padding=0)):
        shape = (1, 9, 4) if isinstance(part, layers.ConvexPotentialConv2d) else (4, 9, 1)
        net = nn.Sequential(part, nn.Flatten())
        net.append(nn.Linear(net(torch.zeros(1, *shape)).shape[1], 3))
        with pytest.raises(ConfigurationError, match=r"turn the maps around it"):
            DPLipModel(net, input_shape=shape, input_norm=1.0, loss=losses.TauCrossEntropy())


def test_what_a_compiler_would_lay_out_is_refused_before_anything_is_spent() -> None:
    model = model_of("first", "gates")
    rows = torch.randn(40, 1, 9, 4), torch.arange(40) % 3
    with pytest.raises(ConfigurationError, match="train without compile"):
        fit(model, rows, epsilon=3.0, delta=1e-3, epochs=1, batch_size=10, compile="aot_eager", progress=False)
