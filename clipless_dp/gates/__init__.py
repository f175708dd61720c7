"""Gates: what caps a sample's signal, forwards or backwards, or its gradients of a layer's parameters."""

from clipless_dp.gates.adaptive import Adapting, AdaptiveLimit, adapting, adapting_in, checked_state, counts_of
from clipless_dp.gates.arithmetic import rounding_slack, sample_norms
from clipless_dp.gates.gradient_layers import (
    GradientGated,
    GradientGatedConv1d,
    GradientGatedConv2d,
    GradientGatedConvTranspose1d,
    GradientGatedConvTranspose2d,
    GradientGatedLinear,
    can_be_gradient_gated,
    gradient_gated_layer,
    takes_row_weights,
)
from clipless_dp.gates.row_weights import weighing, weights_from, weights_of
from clipless_dp.gates.signal import (
    BallProjection,
    CotangentGate,
    GateMode,
    SphereScaling,
    cotangent_gate,
    cotangent_gate_l1,
    input_gate,
    presence_gate,
    table_gate,
    token_gate,
)

__all__ = [
    "Adapting",
    "AdaptiveLimit",
    "BallProjection",
    "CotangentGate",
    "GateMode",
    "GradientGated",
    "GradientGatedConv1d",
    "GradientGatedConv2d",
    "GradientGatedConvTranspose1d",
    "GradientGatedConvTranspose2d",
    "GradientGatedLinear",
    "SphereScaling",
    "adapting",
    "adapting_in",
    "can_be_gradient_gated",
    "checked_state",
    "cotangent_gate",
    "cotangent_gate_l1",
    "counts_of",
    "gradient_gated_layer",
    "input_gate",
    "presence_gate",
    "rounding_slack",
    "sample_norms",
    "table_gate",
    "takes_row_weights",
    "token_gate",
    "weighing",
    "weights_from",
    "weights_of",
]
