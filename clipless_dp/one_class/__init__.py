"""One-class networks: the signed distance of a data set, learned from its rows alone and from public made-up ones."""

from clipless_dp.one_class.box import BoxProjection
from clipless_dp.one_class.fitting import HALF_DIAGONALS, fit_one_class, one_class_loss
from clipless_dp.one_class.front import FixedFeatures
from clipless_dp.one_class.model import OneClassModel, loaded_one_class
from clipless_dp.one_class.networks import convolutional_distance, dense_distance, linear_distance
from clipless_dp.one_class.sampler import BoundarySampler, PublicNegatives, newton_walk

__all__ = [
    "HALF_DIAGONALS",
    "BoundarySampler",
    "BoxProjection",
    "FixedFeatures",
    "OneClassModel",
    "PublicNegatives",
    "convolutional_distance",
    "dense_distance",
    "fit_one_class",
    "linear_distance",
    "loaded_one_class",
    "newton_walk",
    "one_class_loss",
]
