"""What an attacker can achieve against the training, as plain values of a statement."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from accounting import FALSE_POSITIVE_RATES, Accountant, TradeOff, trade_off
from accounting.errors import AccountingError

RAREST = 1e-5
"""The smallest error rate that the statement's μ and its figure are about."""

_DRAWN = 41


def risk_of(accountant: object) -> dict[str, Any] | None:
    """Certified limits of membership inference from all that a ledger holds, with the curve that they are read from.

    Returns:
        ``None`` where no curve is certified: a ledger about rows and people, or another library's accountant.
    """
    if not isinstance(accountant, Accountant):
        return None
    try:
        curve = trade_off(accountant)
    except AccountingError:
        return None
    mu = curve.gaussian_mu(RAREST)
    return {
        "success_at_even_odds": curve.success,
        "advantage": curve.advantage,
        "true_positive_rates": _rates(curve, np.array(FALSE_POSITIVE_RATES)),
        "gaussian_mu": mu if np.isfinite(mu) else None,
        "gaussian_mu_from": RAREST,
        "curve": _rates(curve, np.geomspace(RAREST, 1.0, _DRAWN)),
        "profile": [{"epsilon": bound.delta, "delta": bound.upper} for bound in curve.bounds],
    }


def _rates(curve: TradeOff, rates: np.ndarray[Any, np.dtype[np.float64]]) -> list[Mapping[str, float]]:
    return [
        {"false_positive": false, "true_positive": true}
        for false, true in zip(rates.tolist(), curve.true_positive_rate(rates).tolist(), strict=True)
    ]
