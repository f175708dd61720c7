"""What a Lipschitz network certifies, and what attacks find: post-processing of public weights, which costs no ε."""

from clipless_dp.robustness import attacks, metrics
from clipless_dp.robustness.attacks import Attacked, attack
from clipless_dp.robustness.certificates import (
    Certificate,
    average_certified_radius,
    certified_accuracy,
    certify,
)
from clipless_dp.robustness.constants import last_layer_constants, margin_constants
from clipless_dp.robustness.counterfactuals import Counterfactuals, counterfactual
from clipless_dp.robustness.curves import Abstaining, Curve, Front, abstain, curve, pareto
from clipless_dp.robustness.explanations import saliency, score_gradients, smooth_grad
from clipless_dp.robustness.networks import PlainNetwork, plain_network
from clipless_dp.robustness.quality import Quality, picture, quality
from clipless_dp.robustness.slopes import lipschitz_lower_bound

__all__ = [
    "Abstaining",
    "Attacked",
    "Certificate",
    "Counterfactuals",
    "Curve",
    "Front",
    "PlainNetwork",
    "Quality",
    "abstain",
    "attack",
    "attacks",
    "average_certified_radius",
    "certified_accuracy",
    "certify",
    "counterfactual",
    "curve",
    "last_layer_constants",
    "lipschitz_lower_bound",
    "margin_constants",
    "metrics",
    "pareto",
    "picture",
    "plain_network",
    "quality",
    "saliency",
    "score_gradients",
    "smooth_grad",
]
