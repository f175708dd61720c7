"""Networks of which nothing is known: run sample by sample, with every trainable parameter behind gradient gates."""

from clipless_dp.isolation.functions import Cap
from clipless_dp.isolation.network import Isolated, Joint, Select, is_named

__all__ = ["Cap", "Isolated", "Joint", "Select", "is_named"]
