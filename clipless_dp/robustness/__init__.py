"""What a Lipschitz network certifies, and what attacks find: post-processing of public weights, which costs no ε."""

from clipless_dp.robustness import attacks, hybrid, metrics, several
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
from clipless_dp.robustness.draws import Draws, SmoothedCertificate
from clipless_dp.robustness.explanations import saliency, score_gradients, smooth_grad
from clipless_dp.robustness.maximum_norm import AttackedInf, attack_inf
from clipless_dp.robustness.networks import PlainNetwork, plain_network
from clipless_dp.robustness.quality import Quality, picture, quality
from clipless_dp.robustness.ranking import certified_auroc
from clipless_dp.robustness.results import read_radii
from clipless_dp.robustness.slopes import lipschitz_lower_bound
from clipless_dp.robustness.smoothing import Smoothed, draw_together

__all__ = [
    "Abstaining",
    "Attacked",
    "AttackedInf",
    "Certificate",
    "Counterfactuals",
    "Curve",
    "Draws",
    "Front",
    "PlainNetwork",
    "Quality",
    "Smoothed",
    "SmoothedCertificate",
    "abstain",
    "attack",
    "attack_inf",
    "attacks",
    "average_certified_radius",
    "certified_accuracy",
    "certified_auroc",
    "certify",
    "counterfactual",
    "curve",
    "draw_together",
    "hybrid",
    "last_layer_constants",
    "lipschitz_lower_bound",
    "margin_constants",
    "metrics",
    "pareto",
    "picture",
    "plain_network",
    "quality",
    "read_radii",
    "saliency",
    "score_gradients",
    "several",
    "smooth_grad",
]
