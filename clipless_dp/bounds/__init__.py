"""How much one sample can change the summed gradient: the sweeps over a traced network, and how much a batch uses."""

from clipless_dp.bounds.tightness import LayerTightness, TightnessReport
from clipless_dp.bounds.tracker import LayerSensitivity, Relation, Sensitivity, SensitivityTracker

__all__ = ["LayerSensitivity", "LayerTightness", "Relation", "Sensitivity", "SensitivityTracker", "TightnessReport"]
