"""What a Lipschitz network certifies, and what attacks find: post-processing of public weights, which costs no ε."""

from clipless_dp.robustness import attacks
from clipless_dp.robustness.attacks import Attacked, attack
from clipless_dp.robustness.certificates import (
    Certificate,
    average_certified_radius,
    certified_accuracy,
    certify,
)
from clipless_dp.robustness.constants import last_layer_constants, margin_constants
from clipless_dp.robustness.networks import PlainNetwork, plain_network

__all__ = [
    "Attacked",
    "Certificate",
    "PlainNetwork",
    "attack",
    "attacks",
    "average_certified_radius",
    "certified_accuracy",
    "certify",
    "last_layer_constants",
    "margin_constants",
    "plain_network",
]
