"""Randomized smoothing: a classifier averaged over Gaussian noise, and radii that hold with a stated probability."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from scipy.stats import binomtest
from torch import Tensor, nn
from tqdm.auto import tqdm

from clipless_dp.arguments import choice, members, positive, shown, whole
from clipless_dp.errors import ConfigurationError, InputError
from clipless_dp.gates.arithmetic import per_sample
from clipless_dp.robustness.certificates import digest_of_samples
from clipless_dp.robustness.confidence import confidence_of
from clipless_dp.robustness.constants import Constants, Lipschitz
from clipless_dp.robustness.draws import Against, Draws, Method, SmoothedCertificate, check_method
from clipless_dp.robustness.frozen import Frozen, unchecked_rounding
from clipless_dp.robustness.maps import MAPS, Map, mapped, slope, slopes_of_pairs
from clipless_dp.robustness.networks import PlainNetwork, Units, generator_of, read, refuse_other_labels, scale_of
from clipless_dp.training import Data


class Smoothed:
    """The classifier that answers with the class of the largest mean of ``map(scores)`` under Gaussian noise.

    It is post-processing of public weights, and costs no ε. The network runs in float64, as in :func:`certify`. Each
    call copies model and front as they are then, and all that it returns is of that copy.

    Map, temperature and method are to be fixed *before* an input is looked at: the best of several, chosen from the
    draws that certify it, is certified by none of them.

    Args:
        model: a wrapped model, which certifies its own constant; or any module.
        sigma: deviation ``σ`` of the noise, in units of the input.
        map: what is averaged (:func:`clipless_dp.robustness.maps.mapped`): ``"argmax"``, shares of predictions;
            ``"softmax"``, ``"sparsemax"``, ``"margin"`` or ``"pairs"``, which have Lipschitz constants. ``"margin"`` is
            the ramp that ``"lipschitz"`` is exact for; ``"pairs"`` has one for each pair of classes, and answers with
            the class that is ahead of every other in their means: of many classes it certifies most, since noise
            raises the largest of many scores, and each pair has a constant of its own.
        temperature: ``τ``, which multiplies the scores before a soft map.
        lipschitz: ``"auto"``: of a wrapped model its own, of others none; ``None``: none; or what is stated of a module
            that is not wrapped, see :func:`margin_constants`.
        front: what runs before the model, from the inputs that noise is added to.
        front_lipschitz: its constant; by default its attribute ``lipschitz``.
        units: see :func:`certify`: radii are multiplied by the smallest of them; ``σ`` is not.

    Raises:
        ConfigurationError: an argument is out of range, or the model reads tokens.
        PrivacyError: a layer of the model was replaced or hooked, or a global module hook is registered.
    """

    def __init__(
        self,
        model: nn.Module,
        sigma: float,
        *,
        map: Map = "argmax",
        temperature: float = 1.0,
        lipschitz: Literal["auto"] | Lipschitz = "auto",
        front: nn.Module | None = None,
        front_lipschitz: float | None = None,
        units: Units = None,
    ) -> None:
        self.model, self.front, self.units = model, front, units
        self.sigma = positive("sigma", sigma)
        self.map: Map = choice("map", map, *MAPS)
        self.temperature = positive("temperature", temperature)
        # Refuses here what each call would.
        PlainNetwork(model, front=front)
        self._uses_constant = lipschitz is not None
        self._lipschitz = None if isinstance(lipschitz, str) else lipschitz
        if isinstance(lipschitz, str):
            choice("lipschitz", lipschitz, "auto")
        self._front_lipschitz = front_lipschitz

    def certify(
        self,
        data: Data | Tensor,
        n0: int = 100,
        n: int = 10_000,
        alpha: float = 1e-3,
        method: Method = "cohen",
        *,
        against: Against = "rest",
        rng_seed: int = 0,
        batch_size: int = 4096,
        progress: bool = False,
    ) -> SmoothedCertificate:
        """The radius around each sample within which the smoothed prediction stays.

        ``n0`` draws select a class ``A``; ``n`` fresh ones bound its smoothed mean from below, ``p_A``, and ``p_B``
        those of all others from above.

        * ``"cohen"`` (Cohen et al. 2019, §3.2): ``p_A`` by Clopper and Pearson; ``R = σΦ⁻¹(p_A)``.
        * ``"bernstein"``: any map, by Maurer and Pontil's bound, as Delattre et al. 2024, *The Lipschitz-variance-
          margin tradeoff for enhanced randomized smoothing*, but with the map fixed; the same radius.
        * ``"lipschitz"``: the mean of a soft map by the largest of that bound, of Chernoff's and of one by the map's
          constant (:func:`confidence.concentrated_lower`), each at ``α/3``, and the exact radius for functions of
          that constant (:mod:`clipless_dp.robustness.ramps`), above ``σΦ⁻¹(p_A)`` and above ``(p_A - ½)/L``.
        * ``"partition"``: classes grouped by what the ``n0`` draws counted (:func:`confidence.buckets`), the first and
          the others bounded at ``α/2``; ``R = σ(Φ⁻¹(p_A) - Φ⁻¹(p_B))/2``.

        For ``pairs``, ``p_A`` is against one class, bounded at ``α``, and the radius the least of them.

        Args:
            data: pairs of inputs and labels; or inputs alone, ``(N, ...)``.
            n0: draws that select a class.
            n: draws that are certified from, at least 2.
            alpha: with which probability each radius may be wrong, at least 1e-50.
            method: one of the four.
            against: ``"rest"``: ``p_B = 1 - p_A``; ``"each"``: every class has a bound of its own, at ``α/2``, which
                certifies more where the others share what ``A`` leaves.
            rng_seed: of the noise, in [0, 2³²).
            batch_size: noisy rows at once.
            progress: show a progress bar.

        Raises:
            ConfigurationError: an argument is out of range, or the method does not go with the map: ``"cohen"`` and
                ``"partition"`` count, ``"lipschitz"`` needs a constant, which argmax does not have.
            InputError: the data does not fit.
        """
        confidence_of(alpha)
        check_method(method, against, self.map, 0.0, None)
        arguments = {"rng_seed": rng_seed, "batch_size": batch_size, "progress": progress}
        return self._drawn(data, n0, n, method, **arguments).certify(alpha, method, against)

    def draw(
        self,
        data: Data | Tensor,
        n0: int = 100,
        n: int = 10_000,
        *,
        rng_seed: int = 0,
        batch_size: int = 4096,
        progress: bool = False,
    ) -> Draws:
        """The noisy passes of :meth:`certify`, kept: their certificates at any ``α`` need no more passes.

        Of two classifiers with the same ``σ``, the same seed, rows and numbers give the same noise.
        """
        return self._drawn(data, n0, n, None, rng_seed=rng_seed, batch_size=batch_size, progress=progress)

    def predict(
        self,
        inputs: Tensor,
        n: int = 1000,
        alpha: float = 1e-3,
        *,
        rng_seed: int = 0,
        batch_size: int = 4096,
        progress: bool = False,
    ) -> Tensor:
        """The smoothed classifier's answers, each right with probability at least ``1 - α``; ``(N,)``, -1: abstains.

        For ``argmax`` the most frequent class, where a two-sided binomial test tells it from the next (Cohen et al.
        2019, §3.2.1). For soft maps the class that a tenth of the draws select, where Bernstein bounds of the others
        set it apart from every class.

        Args:
            inputs: ``(N, ...)``.
            n: draws, at least 20.
            alpha: probability of an answer that is not the smoothed classifier's.
            rng_seed, batch_size, progress: see :meth:`certify`.
        """
        alpha, n = confidence_of(alpha), whole("n", n, 20)
        arguments = {"rng_seed": rng_seed, "batch_size": batch_size, "progress": progress}
        if self.map != "argmax":
            first = n // 10
            drawn = self._drawn(inputs, first, n - first, None, **arguments)
            against: Against = "rest" if self.map == "pairs" else "each"
            return drawn.certify(alpha, "bernstein", against).predictions
        drawn = self._drawn(inputs, 1, n, None, **arguments)
        top, classes = drawn.sums.topk(2, 1)
        tests = [
            binomtest(int(most), int(most + next_), 0.5).pvalue if most > next_ else 1.0 for most, next_ in top.tolist()
        ]
        sure = (torch.tensor(tests) <= alpha) & ~drawn.dropped
        return torch.where(sure, classes[:, 0], -1)

    def _drawn(self, data: Data | Tensor, n0: int, n: int, method: Method | None, **arguments: Any) -> Draws:
        return _together((self,), self._frozen(), data, n0, n, method, **arguments)[0]

    def _frozen(self) -> Frozen:
        return Frozen(self.model, self.front)

    _noise_in_words: str | None = None
    """What else the noise does than to add Gaussian numbers."""

    def _constants(self, frozen: Frozen, classes: int) -> Constants:
        return frozen.constants(self._lipschitz, self._front_lipschitz, classes, used=self._uses_constant)

    def _kept(
        self,
        frozen: Frozen,
        constants: Constants,
        inputs: Tensor,
        labels: Tensor | None,
        first: _Sums,
        second: _Sums,
        n0: int,
        n: int,
    ) -> Draws:
        scale = scale_of(self.units, inputs)
        smallest = float(scale.min())
        dropped = first.dropped | second.dropped
        origin = SmoothedCertificate(
            torch.zeros(len(inputs), dtype=torch.float64),
            torch.full((len(inputs),), -1),
            labels,
            lipschitz=constants.joint / smallest,
            method=constants.method,
            dropped=int(dropped.sum()),
            units=None if self.units is None else tuple(scale.flatten().tolist()),
            samples=digest_of_samples(inputs.split(1024)),
            n0=n0,
            n=n,
            sigma=self.sigma,
            map=self.map,
            temperature=self.temperature,
            noise=self._noise_in_words,
            **frozen.identity(inputs),
        )
        return Draws(
            first.sums,
            second.sums,
            second.squares,
            n0,
            n,
            second.errors,
            dropped,
            slope(self.map, self.temperature, constants),
            constants.reason,
            smallest,
            origin,
            slopes_of_pairs(self.temperature, constants) if self.map == "pairs" else None,
        )

    def _noisy(self, rows: Tensor, generator: torch.Generator) -> Tensor:
        """Rows with fresh noise, each by itself."""
        return rows + self.sigma * torch.randn(rows.shape, generator=generator, device=rows.device, dtype=rows.dtype)


def draw_together(
    several: Sequence[Smoothed],
    data: Data | Tensor,
    n0: int = 100,
    n: int = 10_000,
    *,
    rng_seed: int = 0,
    batch_size: int = 4096,
    progress: bool = False,
) -> list[Draws]:
    """The noisy passes of :meth:`Smoothed.draw` for several maps of one network at once, on the same noise.

    To choose among them by what is returned takes samples of its own, other than those that are then certified.

    Args:
        several: of one model and front, with the same ``σ``.
        data, n0, n, rng_seed, batch_size, progress: see :meth:`Smoothed.certify`.

    Raises:
        ConfigurationError: they are of different models or noises, or an argument is out of range.
    """
    several = members("several", several, "smoothed classifiers")
    if not several or not all(isinstance(one, Smoothed) for one in several):
        raise ConfigurationError(f"give one smoothed classifier or more, Smoothed(model, sigma), got {shown(several)}")
    first = several[0]
    for one in several:
        alike = (one.model is first.model, one.front is first.front, one.sigma == first.sigma, type(one) is type(first))
        if not all(alike):
            raise ConfigurationError("several maps share draws where the model, the front and sigma are the same")
    arguments: dict[str, Any] = {"rng_seed": rng_seed, "batch_size": batch_size, "progress": progress}
    return _together(several, first._frozen(), data, n0, n, None, **arguments)


def draw_from(smoothed: Smoothed, frozen: Frozen, data: Data | Tensor, n0: int, n: int, **arguments: Any) -> Draws:
    """The draws of one classifier, of a network that was copied before; arguments as :meth:`Smoothed.draw`."""
    return _together((smoothed,), frozen, data, n0, n, None, **arguments)[0]


def _together(
    several: Sequence[Smoothed],
    frozen: Frozen,
    data: Data | Tensor,
    n0: int,
    n: int,
    method: Method | None,
    *,
    rng_seed: int,
    batch_size: int,
    progress: bool,
) -> list[Draws]:
    n0, n, rows = whole("n0", n0), whole("n", n, 2), whole("batch_size", batch_size)
    generator_of(rng_seed)
    inputs, labels = read(data)
    if not len(inputs):
        raise InputError("there are no samples to certify")
    plain = frozen.plain
    classes = plain.classes(inputs)
    if labels is not None:
        refuse_other_labels(labels, classes)
    constants = [one._constants(frozen, classes) for one in several]
    if method is not None:
        steepest = slope(several[0].map, several[0].temperature, constants[0])
        check_method(method, "rest", several[0].map, steepest, constants[0].reason)
    generator = generator_of(rng_seed, plain.device)
    tally = _Tally(several, frozen, [one.pairs for one in constants], classes, generator, rows)
    with tqdm(total=len(inputs) * (n0 + n), disable=not progress, unit="row", dynamic_ncols=True) as bar:
        first = tally.of(inputs, n0, bar)
        second = tally.of(inputs, n, bar, [found.sums.argmax(1) for found in first])
    return [
        one._kept(frozen, known, inputs, labels, before, after, n0, n)
        for one, known, before, after in zip(several, constants, first, second, strict=True)
    ]


class _Sums:
    """Of some samples: what :class:`Draws` keeps of one of its two parts."""

    def __init__(self, samples: int, classes: int) -> None:
        self.sums = torch.zeros(samples, classes, dtype=torch.float64)
        self.squares = torch.zeros_like(self.sums)
        self.errors = torch.zeros(samples, dtype=torch.float64)
        self.dropped = torch.zeros(samples, dtype=torch.bool)


class _Tally:
    """Noisy passes in chunks of a number of rows, of several samples at once where their draws are few."""

    def __init__(
        self,
        several: Sequence[Smoothed],
        frozen: Frozen,
        pairs: Sequence[Tensor],
        classes: int,
        generator: torch.Generator,
        rows: int,
    ) -> None:
        self.several, self.plain, self.classes = several, frozen.plain, classes
        # What a pass is taken to err by grows with the constant that is stated.
        self.pairs = torch.stack([torch.where(one.isfinite(), one, 0.0) for one in pairs]).amax(0)
        self.generator, self.rows = generator, rows
        self.known = frozen.known_error or 0.0

    @torch.no_grad()
    def of(self, inputs: Tensor, draws: int, bar: tqdm[Any], selected: Sequence[Tensor] | None = None) -> list[_Sums]:
        found = [_Sums(len(inputs), self.classes) for _ in self.several]
        plain, each = self.plain, min(draws, self.rows)
        together = max(1, self.rows // each)
        for start in range(0, len(inputs), together):
            some = inputs[start : start + together].to(plain.device, plain.dtype)
            done = 0
            while done < draws:
                chunk = min(each, draws - done)
                rows = self.several[0]._noisy(some.repeat_interleave(chunk, 0), self.generator)
                scores = plain(rows)
                error = self.known + unchecked_rounding(rows, scores.cpu(), self.pairs)
                where = slice(start, start + len(some))
                for number, (sums, smoothed) in enumerate(zip(found, self.several, strict=True)):
                    chosen = None if selected is None else selected[number][where]
                    self._add(sums, where, smoothed, scores, error, chosen)
                done += chunk
                bar.update(chunk * len(some))
        return found

    def _add(
        self,
        found: _Sums,
        where: slice,
        smoothed: Smoothed,
        scores: Tensor,
        error: Tensor,
        chosen: Tensor | None,
    ) -> None:
        count = where.stop - where.start
        finite = scores.isfinite().all(1)
        known = scores.masked_fill(~per_sample(finite, scores), 0.0)
        own = None if chosen is None else chosen.to(scores.device).repeat_interleave(len(scores) // count)
        values = mapped(known, smoothed.map, smoothed.temperature, own)
        values = values.reshape(count, -1, self.classes)
        found.sums[where] += values.sum(1).cpu()
        found.squares[where] += values.square().sum(1).cpu()
        found.dropped[where] |= ~finite.reshape(count, -1).all(1).cpu()
        if smoothed.map != "argmax":
            # No map moves by more than τ times what a difference of two scores does; 2⁻⁴⁰ is for its own arithmetic.
            worst = (2.0 * smoothed.temperature * error + 2.0**-40).reshape(count, -1).amax(1)
            found.errors[where] = torch.maximum(found.errors[where], worst.nan_to_num(math.inf))
