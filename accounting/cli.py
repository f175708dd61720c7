"""Command line: ε, noise, steps, privacy curves, what attackers can achieve, and stored ledgers."""

from __future__ import annotations

import argparse
import importlib
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from scipy.special import ndtr, ndtri

from .accountants import Accountant, create_accountant
from .bounds import PrivacyBound, rounded_down, rounded_up
from .calibration import calibrate_noise_multiplier, calibrate_steps
from .errors import AccountingError, InvalidParameterError
from .events import ADD_OR_REMOVE_ONE, REPLACE_ONE
from .ledger import Ledger
from .risk import FALSE_POSITIVE_RATES, TradeOff, trade_off
from .second_opinion import second_opinion
from .stated import UNTOLD, compared, facts_stated, settings_beside

__all__ = ["main"]

_MOST_STEPS = 10**6
"""Up to which a number of steps is sought: the numerical engine takes seconds for each of dozens of larger ones."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit status: 0, or 2 with the reason on standard error."""
    options = _parser().parse_args(arguments)
    try:
        print(options.run(options))
    except (AccountingError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m accounting", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    epsilon = commands.add_parser("epsilon", help="the epsilon of a run")
    _schedule(epsilon, noise=True, steps=True)
    _common(epsilon)
    epsilon.set_defaults(run=_answer)

    noise = commands.add_parser("noise", help="the noise multiplier that meets a target epsilon")
    _target(noise)
    _schedule(noise, noise=False, steps=True)
    _common(noise)
    noise.set_defaults(run=_noise)

    steps = commands.add_parser("steps", help="the number of steps that a target epsilon allows")
    _target(steps)
    _schedule(steps, noise=True, steps=False)
    _common(steps)
    steps.set_defaults(run=_steps)

    epochs = commands.add_parser("epochs", help="the passes over the data that a target epsilon allows")
    _target(epochs)
    _noise_multiplier(epochs, required=True)
    epochs.add_argument("--batch-size", type=float, required=True, help="expected size of Poisson-sampled batches")
    epochs.add_argument("--dataset-size", type=float, required=True, help="public number of samples")
    _common(epochs)
    epochs.set_defaults(run=_epochs)

    batch = commands.add_parser("batch", help="the largest batches that a target epsilon allows")
    _target(batch)
    _noise_multiplier(batch, required=True)
    batch.add_argument("--steps", type=int, help="number of steps; or give --epochs")
    batch.add_argument("--epochs", type=float, help="passes over the data in expectation; or give --steps")
    batch.add_argument("--dataset-size", type=int, required=True, help="public number of samples")
    _common(batch)
    batch.set_defaults(run=_batch)

    curve = commands.add_parser("curve", help="epsilon against delta")
    _schedule(curve, noise=True, steps=True)
    _common(curve, delta=False)
    _ledger(curve)
    curve.add_argument("--deltas", type=float, nargs="+", default=[10.0**-k for k in range(3, 13)])
    curve.add_argument("--plot", metavar="FILE", help="also draw the curve (needs matplotlib)")
    curve.set_defaults(run=_curve)

    risk = commands.add_parser("risk", help="what an attacker can achieve: true-positive rates, advantage, f-DP curve")
    _schedule(risk, noise=True, steps=True)
    _common(risk, delta=False)
    _ledger(risk)
    risk.add_argument("--false-positive-rates", type=float, nargs="+", default=FALSE_POSITIVE_RATES, metavar="RATE")
    risk.add_argument("--plot", metavar="FILE", help="also draw the trade-off curve (needs matplotlib)")
    risk.set_defaults(run=_risk)

    explain = commands.add_parser(
        "explain", help="what stored ledgers, or those in statements, about one data set hold and cost together"
    )
    explain.add_argument(
        "ledger", metavar="LEDGER.json", nargs="+", help="or STATEMENT.json; what several hold of one run counts once"
    )
    explain.add_argument("--accountant", default="auto", choices=["auto", "prv", "rdp"])
    explain.add_argument(
        "--delta", type=float, nargs="+", help="default: 1e-5 1e-6 1e-8, and first those that statements state"
    )
    explain.add_argument(
        "--second-opinion", action="store_true", help="also ask opacus and prv-accountant, at the first delta"
    )
    _group(explain)
    explain.set_defaults(run=_explain)
    return parser


def _target(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--epsilon", type=float, required=True, help="target epsilon")


def _noise_multiplier(parser: argparse.ArgumentParser, *, required: bool = False) -> None:
    parser.add_argument(
        "--noise-multiplier", type=float, required=required, help="noise standard deviation over sensitivity"
    )


def _schedule(parser: argparse.ArgumentParser, *, noise: bool, steps: bool) -> None:
    if noise:
        _noise_multiplier(parser)
    parser.add_argument(
        "--sample-rate",
        type=float,
        help="probability that a record joins a batch (Poisson sampling); 1 for any other way of batching",
    )
    if steps:
        parser.add_argument("--steps", type=int, help="number of steps")


def _common(parser: argparse.ArgumentParser, *, delta: bool = True) -> None:
    if delta:
        parser.add_argument("--delta", type=float, required=True, help="in (0, 1), well below 1 / dataset size")
    parser.add_argument("--accountant", default="auto", choices=["auto", "prv", "rdp"])
    # No default, so that one that is given beside a ledger shows; see _relation.
    parser.add_argument("--relation", choices=[ADD_OR_REMOVE_ONE, REPLACE_ONE], help=f"default: {ADD_OR_REMOVE_ONE}")
    _group(parser)


def _group(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--group-size",
        type=int,
        default=1,
        metavar="K",
        help="for a person with up to K rows; of a ledger about people, for K people",
    )


def _ledger(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ledger", metavar="FILE", help="a stored ledger instead of a schedule")


def _required(options: argparse.Namespace, *names: str) -> None:
    missing = ["--" + name.replace("_", "-") for name in names if getattr(options, name) is None]
    if missing:
        raise AccountingError(f"missing {', '.join(missing)}")


def _accountant(options: argparse.Namespace) -> Accountant:
    _required(options, "noise_multiplier", "sample_rate", "steps")
    accountant = create_accountant(options.accountant, relation=_relation(options))
    accountant.step(noise_multiplier=options.noise_multiplier, sample_rate=options.sample_rate, steps=options.steps)
    return accountant


def _relation(options: argparse.Namespace) -> Any:
    return options.relation or ADD_OR_REMOVE_ONE


def _line(bound: PrivacyBound) -> str:
    lower = f"{bound.lower:.6g}" if bound.lower > 0.0 or bound.upper == 0.0 else "unknown"
    whom = f"for {bound.whom}: " if bound.group_size > 1 else ""
    return (
        f"{whom}epsilon = {rounded_up(bound.upper)} at delta = {bound.delta:g}  "
        f"(at least {lower}; {bound.relation}, sampling {bound.sampling}, engine {bound.engine})"
    )


def _bound(options: argparse.Namespace) -> PrivacyBound:
    return _accountant(options).get_epsilon(options.delta, group_size=options.group_size)


def _answer(options: argparse.Namespace) -> str:
    return _line(_bound(options))


def _wanted(options: argparse.Namespace) -> dict[str, Any]:
    """The privacy that is wanted, of which sampling, by which accountant."""
    return {
        "target_epsilon": options.epsilon,
        "delta": options.delta,
        "sample_rate": options.sample_rate,
        "accountant": options.accountant,
        "relation": _relation(options),
        "group_size": options.group_size,
    }


def _noise(options: argparse.Namespace) -> str:
    _required(options, "sample_rate", "steps")
    sigma = calibrate_noise_multiplier(steps=options.steps, **_wanted(options))
    options.noise_multiplier = float(rounded_up(sigma))
    return f"noise multiplier = {rounded_up(sigma)}\n" + _answer(options)


def _steps(options: argparse.Namespace) -> str:
    _required(options, "noise_multiplier", "sample_rate")
    options.steps = _MOST_STEPS
    if _bound(options) <= options.epsilon < math.inf:
        return f"steps = {options.steps} (more would fit, of which none are sought: use less noise)\n" + _answer(
            options
        )
    options.steps = calibrate_steps(noise_multiplier=options.noise_multiplier, **_wanted(options))
    return f"steps = {options.steps}\n" + _answer(options)


def _epochs(options: argparse.Namespace) -> str:
    if not 0.0 < options.batch_size <= options.dataset_size < math.inf:
        raise AccountingError("--batch-size must be positive, and at most --dataset-size, which must be finite")
    options.sample_rate = options.batch_size / options.dataset_size
    steps = _steps(options)
    return f"epochs = {rounded_down(options.steps * options.sample_rate)}\n{steps}"


def _batch(options: argparse.Namespace) -> str:
    """The largest batch: for so many steps by calibration, for so many epochs by bisection over whole batch sizes."""
    size = options.dataset_size
    if size < 1 or (options.steps is None) == (options.epochs is None):
        raise AccountingError("give a positive --dataset-size, and one of --steps and --epochs")
    if options.epochs is not None and not 0.0 < options.epochs < float("inf"):
        raise AccountingError("--epochs must be positive")
    if not options.epsilon > 0.0:
        raise AccountingError(f"--epsilon must be positive, got {options.epsilon}")

    def bound(batch: int) -> PrivacyBound:
        options.sample_rate = batch / size
        if options.epochs is not None:
            # More steps than any accountant takes are refused there, in words.
            options.steps = math.ceil(min(options.epochs * size / batch, 1e18) - 1e-9)
        return _bound(options)

    # For fixed epochs too larger batches cost more: fewer steps, each of which costs as the square of its rate.
    low, high = 0, size + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if bound(middle).upper <= options.epsilon else (low, middle)
    if low == 0:
        raise AccountingError(
            f"not even batches of one meet epsilon = {options.epsilon:g}: use more noise or fewer steps"
        )
    line = _line(bound(low))
    return f"batch size = {low} (sample rate {options.sample_rate:.6g}, {options.steps} steps)\n{line}"


def _stored(options: argparse.Namespace) -> Accountant:
    """The accountant of a stored ledger, or of a schedule where none is named."""
    if options.ledger is None:
        return _accountant(options)
    schedule = ("noise_multiplier", "sample_rate", "steps", "relation")
    if given := ["--" + name.replace("_", "-") for name in schedule if getattr(options, name) is not None]:
        raise InvalidParameterError(f"a stored ledger tells its own: leave out {', '.join(given)}, or --ledger")
    ledger = Ledger.load(options.ledger)
    accountant = create_accountant(options.accountant, relation=ledger.relation)
    accountant.ledger = ledger
    return accountant


def _curve(options: argparse.Namespace) -> str:
    accountant = _stored(options)
    bounds = accountant.epsilon_curve(options.deltas, group_size=options.group_size)
    if options.plot:
        _plot(bounds, options.plot)
    return "\n".join(_line(bound) for bound in bounds)


def _risk(options: argparse.Namespace) -> str:
    curve = trade_off(_stored(options), group_size=options.group_size)
    if options.plot:
        _plot_risk(curve, options.plot)
    return curve.table(options.false_positive_rates)


@contextmanager
def _axes(path: str) -> Iterator[Any]:
    """Axes to draw on; what was drawn is then saved."""
    try:
        matplotlib = importlib.import_module("matplotlib")
        matplotlib.use("Agg")
        pyplot = importlib.import_module("matplotlib.pyplot")
    except ImportError as error:
        raise AccountingError("drawing needs matplotlib: pip install matplotlib, or leave out --plot") from error
    figure, axes = pyplot.subplots(figsize=(5, 3.5), layout="constrained")
    try:
        yield axes
        figure.savefig(path)
    except ValueError as error:
        raise AccountingError(f"{path} cannot be drawn: {error}") from error
    finally:
        pyplot.close(figure)


def _plot(bounds: list[PrivacyBound], path: str) -> None:
    with _axes(path) as axes:
        deltas = [bound.delta for bound in bounds]
        lower, upper = [bound.lower for bound in bounds], [bound.upper for bound in bounds]
        if min(lower) > 0.0:
            axes.fill_between(deltas, lower, upper, alpha=0.3, label="between the bounds")
        axes.plot(deltas, upper, marker=".", label="certified upper bound")
        axes.set(xscale="log", xlabel="δ", ylabel="ε", title=_title(bounds[0]))
        axes.legend()


def _plot_risk(curve: TradeOff, path: str) -> None:
    """True-positive against false-positive rates, on logarithmic axes: what matters are rare false alarms."""
    rates = np.geomspace(1e-5, 1.0, 201)
    mu = curve.gaussian_mu()
    with _axes(path) as axes:
        axes.plot(rates, curve.true_positive_rate(rates), label="at most (certified)")
        if mu < math.inf:
            axes.plot(rates, ndtr(mu + ndtri(rates)), linestyle="--", label=f"μ-GDP, μ = {mu:.3g}")
        axes.plot(rates, rates, color="gray", linewidth=0.8, label="guessing")
        axes.set(
            xscale="log",
            yscale="log",
            xlabel="false-positive rate",
            ylabel="true-positive rate",
        )
        axes.set_title(_title(curve.bounds[0]), fontsize="small")
        axes.legend()


def _title(bound: PrivacyBound) -> str:
    group = f", {bound.whom}" if bound.group_size > 1 else ""
    return f"{bound.relation}{group}, sampling {bound.sampling}"


_DELTAS = [1e-5, 1e-6, 1e-8]


def _explain(options: argparse.Namespace) -> str:
    ledgers = [Ledger.load(path) for path in options.ledger]
    stated = {path: facts for path in options.ledger if (facts := facts_stated(path)) is not None}
    compared_with = {
        path: compared(path, stated[path], _of(own, options))
        for path, own in zip(options.ledger, ledgers, strict=True)
        if path in stated
    }
    ledger, *others = ledgers
    for other in others:
        ledger = ledger.merge(other)
    own_deltas = [facts["epsilon"]["delta"] for facts in stated.values() if facts["epsilon"]["epsilon"] is not None]
    deltas = options.delta or list(dict.fromkeys([*own_deltas, *_DELTAS]))
    bounds = _of(ledger, options).epsilon_curve(deltas, group_size=options.group_size)
    shown = [ledger.table(), "", *map(_line, bounds)]
    for path, found in compared_with.items():
        shown += ["", str(found)]
        if "sampling" in stated[path]:
            shown += [*settings_beside(stated[path]), UNTOLD]
    if options.second_opinion:
        if options.group_size != 1:
            raise InvalidParameterError("others know no groups: ask for a second opinion without --group-size")
        shown += ["", str(second_opinion(ledger, deltas[0]))]
    return "\n".join(shown)


def _of(ledger: Ledger, options: argparse.Namespace) -> Accountant:
    accountant = create_accountant(options.accountant, relation=ledger.relation)
    accountant.ledger = ledger
    return accountant
