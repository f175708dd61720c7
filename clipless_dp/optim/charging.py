"""What a step is charged at, by what entered it: which draw its gradients are of, all of it and nothing else."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

from accounting import Accountant
from accounting.errors import warn_caller
from clipless_dp.errors import ConfigurationError, PrivacyError, PrivacyWarning
from clipless_dp.model import passes
from clipless_dp.sampling import draws
from clipless_dp.sampling.people import Unit
from clipless_dp.sampling.series import Draw, Rows, covered, overlapping

Sampling = Literal["announced", "poisson", "none"]

NO_PEOPLE = (
    "unit='person' is about all rows of a person, and the rows of this step are not those of a draw of people, as they "
    "were drawn: draw them with PoissonBatches(..., groups=ids), StreamedBatches or PoissonBatchSampler, whose batches "
    "go to accumulate() unchanged; change rows one by one with augment=..., or in the data set. Copies, on another "
    "device say, are known by what they hold, unless rows of other weights hold the same: give the sampler device=. "
    "A DataLoader needs the sampler's own lists, as batch_sampler with nothing around it"
)
"""What is said of rows of which nothing tells whose they are."""

Witness = Literal["announced", "vouched", "seeded", "none"]
"""What the sample rate of a step rests on."""


class Terms(NamedTuple):
    """What steps are judged by.

    Attributes:
        sampling: how batches are drawn, as the user says.
        sample_rate: each sample's probability of being in a batch, as the user says.
        since: when the optimizer was made, on the clock of all draws.
        several: whether several ranks step together.
        user: the optimizer.
        names: by which draws that were left out know the model.
        unit: what the guarantee is about.
        grouping: which rows the steps before took for one person's; ``None`` where there were none.
    """

    sampling: Sampling
    sample_rate: float
    since: int
    several: bool
    user: object
    names: frozenset[int]
    unit: Unit = "row"
    grouping: bytes | None = None


class Charge(NamedTuple):
    """What one step is charged at.

    Attributes:
        sample_rate: ``q``.
        share: what the noise multiplier counts for: a half where one sample more may move all others to other batches,
            so that one enters each and one leaves it.
        witness: what the sample rate rests on.
        draw: what the step uses up.
    """

    sample_rate: float
    share: float
    witness: Witness
    draw: Draw | None


def is_own_accountant(accountant: Accountant) -> bool:
    """Whether an accountant is one of this package's, which runs no code of others."""
    return type(accountant).__module__.startswith("accounting.") and not any(map(callable, vars(accountant).values()))


def charge(passed: Sequence[passes.Pass], terms: Terms) -> Charge:
    """The charge of a step, given the passes of private rows that its gradients consist of.

    Raises:
        PrivacyError: a row may be in several of them, or rows are not those of their draw.
    """
    draw = _witnessed_draw(passed, terms)
    _refuse_other_unit(passed, draw, terms)
    if draw is not None and draw.left_by & terms.names:
        raise PrivacyError(
            "this draw was left out, by a step on it that was refused or by skip_draw(): what its gradients were may "
            "have decided what is trained on now. Go on with the next draw"
        )
    if draw is not None and not draw.amplifies and terms.sampling == "announced":
        raise PrivacyError(
            "the rows of this step are of a draw that was handed out under torch.no_grad(), to be looked at: what is "
            "in it may have decided that it is trained on. Train on draws that are fetched with gradients on, each one"
        )
    amplified = draw is not None and not draw.used
    seeded = draw is not None and amplified and draw.seeded
    if draw is not None and not draw.used:
        over = draws.passed_over(draw, terms.user, terms.since)
        if over and terms.sampling == "announced":
            raise PrivacyError(
                f"{over} draw(s) before this one were made and not trained on: a draw that is left out for what is "
                "in it (its size, its loss) lets its samples decide what is released. Take a step for each draw, "
                "an empty one too; fetch what is only looked at under torch.no_grad(); bound a loop by the sampler's "
                "steps or by itertools.islice; or call optimizer.skip_draw() for one that is left out for another "
                "reason, as after an interruption"
            )
    if not amplified and terms.several and terms.sampling == "announced":
        raise PrivacyError(
            "no Poisson draw was announced for this step, so a sample may be in the batches of several ranks: "
            "use PoissonBatches or PoissonBatchSampler"
            + (
                ""
                if terms.unit == "person"
                else ", or vouch with sampling='poisson' or 'none' that each rank draws from samples of its own (a "
                "DistributedSampler repeats some)"
            )
        )
    rate, share = _rate_and_share(passed, draw, amplified, terms)
    if rate == 1.0:
        return Charge(rate, share, "none", draw)
    return Charge(rate, share, "seeded" if seeded else "vouched" if terms.sampling == "poisson" else "announced", draw)


def _refuse_other_unit(passed: Sequence[passes.Pass], draw: Draw | None, terms: Terms) -> None:
    """Refuses rows that are drawn, or weigh, otherwise than the unit of the guarantee asks for.

    Whoever vouches for how batches are drawn says nothing of weights: those are of the sensitivity, and witnessed under
    each ``sampling``.
    """
    if terms.unit != "person":
        if draw is not None and draw.people is not None:
            raise PrivacyError(
                "the rows of this step are of a draw of people, and the optimizer's guarantee is about rows: make it "
                "with unit='person' and the public number of people as dataset_size"
            )
        return
    if draw is None and not passed:
        return
    if draw is None or draw.people is None or any(some.rows is None or some.rows.draw is not draw for some in passed):
        raise PrivacyError(NO_PEOPLE)
    if terms.grouping not in (None, draw.people.grouping):
        raise PrivacyError(
            "the people of this draw have other rows than those of the steps before, so that ε of all steps is about "
            "neither: give all samplers of one optimizer the same data and groups="
        )
    for some in passed:
        assert some.rows is not None
        for start, stop, divisor in draw.divisors(some.rows.start, min(some.rows.stop, draw.rows)):
            weighed = any(
                rows.start <= start and stop <= rows.stop and applied >= divisor for rows, applied in some.divided
            )
            # Where all of a draw's people have one row each, a refusal that they alone escape would tell.
            if draw.people.rows_per_group > 1 and start < stop and not weighed:
                raise PrivacyError(
                    "rows of people entered this step at full weight, so that a person counts as often as they have "
                    "rows: pass a draw of people by optimizer.accumulate(batch), which averages each person's rows "
                    f"past all gates. {passes.DROPPED}"
                )


def leave_out(owed: Sequence[passes.Pass], terms: Terms, *, said: bool = False) -> int:
    """Leaves out for good what a refused step was about; returns how many draws and batches were lost by that.

    What is owed of rows of no draw stays so, unless it is said that all is left out.

    Args:
        owed: the passes whose gradients were computed, in the step or not.
        terms: of the step.
        said: whether it is: then all draws in hand are meant.
    """
    if said:
        draws.forget_left_out(terms.names)
    closing = list({id(draw): draw for some in owed for draw in _drawn(some)}.values())
    beside = {id(some): some.beside for some in owed if some.rows is not None and some.rows.draw is None}
    altered = [draw for draw in beside.values() if draw is not None and _is_ones_own(draw, terms)]
    if not owed and not said:
        waiting = draws.next_for(terms.user, terms.since)
        closing += [] if waiting is None else [waiting]
    until = math.inf if said or altered else max((draw.delivered for draw in closing), default=0)
    computed = [*closing, *(draw for draw in altered if draw not in closing)]
    count = draws.skip(terms.user, since=terms.since, until=until, computed=computed, left_by=terms.names)
    left = set(map(id, computed))
    undrawn = set()
    for some in owed:
        if not some.lost:
            some.lost = bool(_drawn(some)) or id(beside.get(id(some))) in left
            if not some.lost and some.rows is not None:
                undrawn.add(some.rows.base)
    return count + (len(undrawn) if said else 0)


def _drawn(some: passes.Pass) -> list[Draw]:
    return [] if some.rows is None or some.rows.draw is None else [some.rows.draw]


def _is_ones_own(draw: Draw, terms: Terms) -> bool:
    return draw.delivered > terms.since and draw.series.source.is_for(terms.user)


def _rate_and_share(
    passed: Sequence[passes.Pass], draw: Draw | None, amplified: bool, terms: Terms
) -> tuple[float, float]:
    drawn = draw is not None or not passed
    if terms.sampling == "none" or (terms.sample_rate == 1.0 and drawn):
        return 1.0, 1.0
    if terms.sampling == "poisson":
        return terms.sample_rate, 1.0
    if draw is not None and draw.sample_rate > terms.sample_rate * (1.0 + 1e-12):
        raise PrivacyError(
            f"batches were drawn with sample rate {draw.sample_rate:.6g}, but the optimizer was told "
            f"{terms.sample_rate:.6g}: give both the same sample_rate"
        )
    if amplified:
        return terms.sample_rate, 1.0
    warn_caller(
        "no Poisson draw was announced for this step, so it is charged without amplification (q = 1)"
        + ("" if drawn else ", and for two samples, as one more shifts what is in which batch (σ/2)")
        + ": use PoissonBatches, or PoissonBatchSampler with poisson_collate, and each draw for one step; or pass "
        "sampling='poisson' if your own sampler is one, or sampling='none' if no sample has a say in which batches "
        "others are, as where each step has all of them",
        PrivacyWarning,
    )
    return 1.0, 1.0 if drawn else 0.5


def _witnessed_draw(passed: Sequence[passes.Pass], terms: Terms) -> Draw | None:
    """The draw that the passes are of, all of it and nothing else; ``None`` if their rows are of no draw."""
    drawn = passes.drawn_by(passed)
    if len(drawn) > 1:
        raise PrivacyError(
            f"the gradients of {len(drawn)} Poisson draws are in this step: a sample may be in several of them, "
            "and its gradient would count as often. Take one step for each draw (Batch.split cuts a draw into "
            "micro-batches)"
        )
    spans = [some.rows for some in passed if some.rows is not None]
    if overlapping(spans):
        raise PrivacyError(
            "rows entered this step twice, in two passes: their samples would count twice. Pass each row once, "
            "with one loss that adds all terms; accumulate(..., multiplicity=K) averages several views of a sample"
        )
    if not passed:
        waiting = draws.next_for(terms.user, terms.since)
        if waiting is None:
            return None
        if waiting.rows:
            raise PrivacyError(
                "a draw is in hand, and none of its rows entered this step: a batch that is left out for what is "
                "in it, as where its loss is large, lets its samples decide what is released. Take the step with "
                "what was drawn, or call skip_draw() and no step for a draw that is left out for another reason"
            )
        return waiting
    draw = drawn[0] if drawn else None
    if terms.sampling == "announced":
        _refuse_other_rows(passed, draw, spans, terms)
    return draw


def _refuse_other_rows(passed: Sequence[passes.Pass], draw: Draw | None, spans: Sequence[Rows], terms: Terms) -> None:
    vouch = "If your own code makes sure that each sample enters once, vouch with sampling='poisson' or 'none'"
    if terms.unit == "person":
        # Nobody can vouch for weights.
        vouch = "With unit='person' rows weigh as they were drawn, under each sampling="
    others = any(some.beside is not None and _is_ones_own(some.beside, terms) for some in passed)
    if others or (draw is not None and any(some.draw is not draw for some in spans)):
        raise PrivacyError(
            "rows entered this step that are not those of the draw in hand, as they were drawn: changed, mixed, "
            "reordered or repeated rows let a sample count for more than its bound. Change rows one by one with "
            "accumulate(batch, augment=...) or in the data set, leave rows out with the mask, and call skip_draw() "
            f"for a draw that is not trained on. {vouch}"
        )
    if draw is not None and not covered(list(spans), draw.rows):
        raise PrivacyError(
            "rows of the draw were left out of this step, so that whether a sample enters depends on how many "
            "others were drawn: pass the whole draw (Batch.split cuts it into micro-batches), and leave rows out "
            f"with the mask. {vouch}"
        )
    if draw is None and len({some.base for some in spans}) > 1:
        raise PrivacyError(
            "batches of unknown origin entered this step together: a sample may be in several of them. Take one "
            f"step for each, or draw them with PoissonBatches. {vouch}"
        )


def refuse_to_step_after(taker: object, terms: Terms) -> None:
    """Refuses, or where the sampler is vouched for tells, that another optimizer took the gradients of the pass.

    Each step releases, or drops, the gradients of all parameters of the model: a second optimizer's step would be
    noise alone, and charged.

    Args:
        taker: the other optimizer, if there is one.
        terms: of the step, which has no gradients.

    Raises:
        ConfigurationError: no draw is in hand that might just be an empty one.
    """
    if taker is None or draws.next_for(terms.user, terms.since) is not None:
        return
    said = (
        "this step has no gradients: another optimizer of the model has taken those of the last pass. Make one "
        "optimizer of all parameters, with parameter groups for different settings, or pass the rows of a draw of "
        "its own back before each optimizer's step"
    )
    if terms.sampling == "announced":
        raise ConfigurationError(f"{said}. Nothing was charged")
    warn_caller(f"{said}. It is noise alone, and charged, as is right only for an empty batch", PrivacyWarning)
