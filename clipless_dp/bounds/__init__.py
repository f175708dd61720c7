"""How much one sample can change the summed gradient: the sweeps over a traced network, and how much a batch uses."""

from clipless_dp.bounds.sensitivity import LayerSensitivity, Relation, Sensitivity
from clipless_dp.bounds.tightness import LayerTightness, TightnessReport
from clipless_dp.bounds.tracker import SensitivityTracker

__all__ = ["LayerSensitivity", "LayerTightness", "Relation", "Sensitivity", "SensitivityTracker", "TightnessReport"]
