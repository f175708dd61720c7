"""Smoothing of tables: Gaussian noise on numbers, random replacement of categories, and radii for changes of both.

A category of ``V`` values stays with probability ``1 - β``, and else becomes one of the others, each with ``β/(V -
1)``. An adversary moves the numbers by ``r`` and changes ``d`` categories. A changed category is seen as what it was
with probabilities ``(p, p') = (1 - β, β/(V-1))`` before and after, as what it becomes with ``(β/(V-1), 1 - β)``, and as
any other value with the same on both sides. These atoms multiply over categories, and with the Gaussian: by the lemma
of Neyman and Pearson the least that a mean ``p_A`` can fall to is that of the region where the likelihood ratio is
small. docs/robustness.md has the proof.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from scipy.optimize import brentq
from scipy.special import ndtr
from torch import Tensor, nn

from clipless_dp.arguments import members, not_negative, positive, share, whole
from clipless_dp.errors import ConfigurationError, InputError
from clipless_dp.robustness.confidence import Array
from clipless_dp.robustness.draws import SmoothedCertificate
from clipless_dp.robustness.networks import read
from clipless_dp.robustness.smoothing import Smoothed
from clipless_dp.training import Data

_NEAREST = 1e-6
"""Radii below so many deviations count as so many, where likelihood ratios can be told apart in float64."""

_ROUNDING = 2.0**-40
"""Covers what sums of some thousand normal probabilities err by."""


def _atoms(beta: float, sizes: Sequence[int]) -> tuple[Array, Array]:
    """``p`` and ``p'`` of what changed categories of these sizes are seen as."""
    before, after = np.ones(1), np.ones(1)
    for size in sizes:
        other = beta / (size - 1)
        kept, rest = 1.0 - beta, (size - 2) * other
        before = np.outer(before, [kept, other, rest]).ravel()
        after = np.outer(after, [other, kept, rest]).ravel()
    return before, after


def lower_bound(mean: float, radius: float, *, sigma: float, beta: float, sizes: Sequence[int]) -> float:
    """The least smoothed mean after a move by ``r`` and a change of categories of these sizes.

    ``Σ p'_k Φ(u_k - r/σ)`` with ``u_k = (r²/2 + σ²(ln t - ln(p'_k/p_k)))/(σr)`` and ``t`` such that ``Σ p_k Φ(u_k) =
    p_A``; what is never seen before the change counts as 0.

    Args:
        mean: ``p_A``, of a function within [0, 1] before the change.
        radius: ``r``, at least 0, of the numbers.
        sigma: deviation of the noise on numbers.
        beta: ``β`` in [0, 1), probability that a category is replaced.
        sizes: numbers of values of the categories that change, at least 2 each; none: Cohen's bound.

    Returns:
        Rounded down.

    Raises:
        ConfigurationError: an argument is out of range.
    """
    mean = share("mean", mean, "[0, 1]")
    sigma, beta = positive("sigma", sigma), share("beta", beta, "[0, 1)")
    sizes = [whole("sizes", size, 2) for size in sizes]
    ratio = max(not_negative("radius", radius) / sigma, _NEAREST)
    before, after = _atoms(beta, sizes)
    seen = before > 0.0
    before, after = before[seen], after[seen]
    with np.errstate(divide="ignore"):
        logs = np.log(after) - np.log(before)

    def mass(level: float) -> float:
        return float(before @ ndtr(0.5 * ratio + (level - logs) / ratio))

    finite = logs[np.isfinite(logs)]
    if not len(finite):
        return 0.0
    low, high = float(finite.min()) - 40.0 * ratio - ratio**2, float(finite.max()) + 40.0 * ratio + ratio**2
    wanted = min(mean, 1.0) - _ROUNDING
    if mass(low) >= wanted:
        return 0.0
    level = high
    if mass(high) > wanted:
        level = float(brentq(lambda level: mass(level) - wanted, low, high, xtol=1e-15 * (high - low)))
    step = 1e-15 * (high - low)
    while mass(level) > wanted:
        level, step = level - step, 2.0 * step
    found = float(after @ ndtr((level - logs) / ratio - 0.5 * ratio))
    return max(0.0, found - _ROUNDING)


def radius(mean: float, *, sigma: float, beta: float, sizes: Sequence[int]) -> float:
    """How far numbers may move while categories of these sizes change and the mean stays above ½; rounded down.

    Arguments as :func:`lower_bound`. 0 where the change of the categories alone may be enough.
    """

    def ahead(found: float) -> float:
        return lower_bound(mean, found, sigma=sigma, beta=beta, sizes=sizes) - 0.5

    if ahead(0.0) <= 0.0:
        return 0.0
    # Categories only help whoever attacks: Cohen's radius is the most.
    low, high = 0.0, 10.0 * sigma
    if ahead(high) > 0.0:
        return high
    found = float(brentq(ahead, low, high, xtol=1e-12 * sigma))
    step = 1e-11 * sigma
    while found > 0.0 and ahead(found) <= 0.0:
        found, step = found - step, 2.0 * step
    return max(found, 0.0)


class _Mixed(Smoothed):
    """Gaussian noise on numbers, and categories replaced at random."""

    def __init__(self, model: nn.Module, sigma: float, beta: float, fields: Sequence[Sequence[int]]) -> None:
        super().__init__(model, sigma, lipschitz=None)
        self.beta, self.fields = beta, fields
        columns = "; ".join(",".join(map(str, field)) for field in fields)
        # It is part of the digest: no number is rounded.
        self._noise_in_words = f"categories in columns {columns} replaced with probability {beta!r}"

    def _noisy(self, rows: Tensor, generator: torch.Generator) -> Tensor:
        noisy = super()._noisy(rows, generator)
        for field in self.fields:
            columns, size = torch.tensor(field, device=rows.device), len(field)
            chances = torch.rand(len(rows), generator=generator, device=rows.device, dtype=rows.dtype)
            moved = torch.randint(1, size, (len(rows),), generator=generator, device=rows.device)
            value = (rows[:, columns].argmax(1) + moved * (chances < self.beta)) % size
            noisy[:, columns] = nn.functional.one_hot(value, size).to(rows)
        return noisy


def certify(
    model: nn.Module,
    data: Data | Tensor,
    sigma: float,
    *,
    beta: float,
    fields: Sequence[Sequence[int]],
    changed: int,
    n0: int = 100,
    n: int = 10_000,
    alpha: float = 1e-3,
    rng_seed: int = 0,
    batch_size: int = 4096,
    progress: bool = False,
) -> SmoothedCertificate:
    """How far numbers of a row may move while up to so many categories change, and the smoothed answer stays.

    Args:
        model: a classifier of rows ``(B, columns)``, wrapped or not; no Lipschitz constant is used.
        data: pairs of rows and labels; or rows alone.
        sigma: deviation of the noise on every column that is in no field.
        beta: probability that a category is replaced by another of its values.
        fields: the columns of each category, of which one is 1 and the others are 0.
        changed: ``d``, how many categories an adversary may change, whichever they are; 0: none.
        n0, n, alpha, rng_seed, batch_size, progress: see :meth:`Smoothed.certify`, whose method is ``"cohen"`` here.

    Returns:
        Radii of the numbers; -1 as prediction where the change of categories alone may turn the answer.

    Raises:
        ConfigurationError: an argument is out of range.
        InputError: the data does not fit, or a field is not encoded so.
    """
    sigma, beta = positive("sigma", sigma), share("beta", beta, "[0, 1)")
    inputs, _ = read(data)
    groups = _checked(inputs, fields)
    changed = whole("changed", changed, 0, len(groups))
    draws = _Mixed(model, sigma, beta, groups).draw(
        data, n0, n, rng_seed=rng_seed, batch_size=batch_size, progress=progress
    )
    found = draws.certify(alpha, "cohen")
    if changed == 0:
        return found
    # Fewer changes are no worse for the answer; which sizes are worst is not known beforehand.
    choices = sorted(set(itertools.combinations(sorted(len(group) for group in groups), changed)))
    assert found.lower is not None
    known: dict[float, float] = {}
    for mean in set(found.lower.tolist()):
        known[mean] = min(radius(mean, sigma=sigma, beta=beta, sizes=sizes) for sizes in choices)
    radii = torch.tensor([known[mean] for mean in found.lower.tolist()], dtype=torch.float64)
    radii = torch.minimum(radii, found.radii)
    told = f"{found.noise}, of which an adversary changes up to {changed}"
    return replace(found, radii=radii, predictions=found.predictions.masked_fill(radii == 0.0, -1), noise=told)


def _checked(inputs: Tensor, fields: Sequence[Sequence[int]]) -> list[list[int]]:
    if inputs.dim() != 2:
        raise InputError(f"expected rows (batch, columns), got {tuple(inputs.shape)}")
    groups = [
        [whole("fields", column, 0, inputs.shape[1] - 1) for column in members("fields", field, "lists of columns")]
        for field in members("fields", fields, "lists of columns")
    ]
    columns = [column for group in groups for column in group]
    if len(set(columns)) != len(columns) or any(len(group) < 2 for group in groups):
        raise ConfigurationError("fields must be two columns or more each, and no column may be in two of them")
    for group in groups:
        values = inputs[:, group]
        if not bool((((values == 0) | (values == 1)).all(1) & (values.sum(1) == 1)).all()):
            raise InputError(f"in columns {group} one must be 1 and the others 0, in every row")
    return groups
