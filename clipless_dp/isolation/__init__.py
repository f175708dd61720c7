"""Networks of which nothing is known: run sample by sample, with every trainable parameter behind gradient gates."""

from clipless_dp.isolation.network import Isolated, Select, is_named

__all__ = ["Isolated", "Select", "is_named"]
