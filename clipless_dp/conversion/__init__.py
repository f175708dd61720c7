"""From an ordinary network, optimizer and ``DataLoader`` to private ones, for training loops that exist already."""

from clipless_dp.conversion.private import PrivateTraining, Route, make_private

__all__ = ["PrivateTraining", "Route", "make_private"]
