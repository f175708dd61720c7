"""Networks as graphs: traced, with the shape of every value, and gated at their layers."""

from clipless_dp.graph.gating import gated, gradient_gated
from clipless_dp.graph.tracing import TracedNet, symbolic_trace, trace

__all__ = ["TracedNet", "gated", "gradient_gated", "symbolic_trace", "trace"]
