"""Presets: a network, how it is bounded, and the settings of ``fit`` that go with it, under one name.

Each says on which data its hyper-parameters were chosen. What was chosen on public data, or on other data than yours,
costs no privacy; what you choose by looking at results on your own data does (``docs/search.md``).
"""

from clipless_dp.presets.named import PRESETS, get, loaded_preset
from clipless_dp.presets.preset import Preset, Trained, WithoutMean, rate_at

__all__ = ["PRESETS", "Preset", "Trained", "WithoutMean", "get", "loaded_preset", "rate_at"]
