"""The wrapped model, and what watches over its passes, its weights and where they come from."""

from clipless_dp.model.averaging import WeightAverage
from clipless_dp.model.rescaling import rescale_
from clipless_dp.model.suggestions import GateSuggestion, GateSuggestions, suggest_gates
from clipless_dp.model.wrapped import DPLipModel

__all__ = ["DPLipModel", "GateSuggestion", "GateSuggestions", "WeightAverage", "rescale_", "suggest_gates"]
