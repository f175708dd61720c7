"""Fusion: gates, layer and ReLU in one, which a CPU runs in place of the traced graph."""

from clipless_dp.fusion.chain import Chain
from clipless_dp.fusion.plan import FusedNet
from clipless_dp.fusion.stages import Entry, Interleaved, Stage

__all__ = ["Chain", "Entry", "FusedNet", "Interleaved", "Stage"]
