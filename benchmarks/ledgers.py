"""Soundness grid and query times of `accounting`: writes benchmarks/results/accounting.{json,md}.

    python benchmarks/ledgers.py              # grid and times
    python benchmarks/ledgers.py --only grid --configurations 320
    python benchmarks/ledgers.py --only speed
    python benchmarks/ledgers.py --only schedules                    # noise schedules: results/schedules.{json,md}

Every configuration of the grid is answered by the "auto" accountant and checked against references
that share no step with its engine:

* δ by inverse Laplace transform, where its integrand decays and its rounding noise is small against δ;
* the closed form for one step;
* where neither answers, the optimistic and pessimistic privacy loss distributions of dp-accounting, if that package
  is installed (their δ only above 1e-9: below, float64 noise shows).

Unsound: a reference's lower value of δ at the reported ε exceeds δ, or an upper one at the certified lower bound of ε
falls short of it. Tight: ε is within 1 % or 0.01 of the reference upper bound, the smallest among the inversion, the
pessimistic distribution and Rényi accounting; ledgers with neither inversion nor distribution count against the
engine's own certified lower bound, which is also reported for all.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import ndtr

import accounting
from accounting import (
    ADD_OR_REMOVE_ONE,
    REPLACE_ONE,
    GaussianStep,
    NoSampling,
    PoissonSampling,
    calibrate_noise_multiplier,
    create_accountant,
)
from accounting.inversion import invert
from accounting.rdp import rdp_to_epsilon
from accounting.terms import Terms, collect

RESULTS = Path(__file__).parent / "results"
_MAX_POINTS = 4e5
_DISTRIBUTION_NOISE = 1e-9


def configurations(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Random ledgers over the whole range, the corners of the range first."""
    rng = np.random.default_rng(seed)
    result = []
    corners = [(q, s, n) for q in (1e-5, 1e-2, 1.0) for s in (0.3, 3.0, 100.0) for n in (1, 1000, 10**6)]
    for i in range(count):
        phases = []
        for _ in range(1 if i < len(corners) else int(rng.integers(1, 4))):
            q = float(10 ** rng.uniform(-5, 0)) if rng.random() > 0.1 else 1.0
            phases.append((float(10 ** rng.uniform(math.log10(0.3), 2)), q, int(10 ** rng.uniform(0, 6))))
        if i < len(corners):
            q, s, n = corners[i]
            phases = [(s, q, n)]
        relation = ADD_OR_REMOVE_ONE if rng.random() < 0.65 else REPLACE_ONE
        result.append({"phases": phases, "delta": float(10 ** rng.uniform(-12, -3)), "relation": relation})
    return result


def ledger_of(configuration: dict[str, Any], kind: str) -> accounting.Accountant:
    accountant = create_accountant(kind, relation=configuration["relation"])
    for sigma, q, n in configuration["phases"]:
        accountant.record(GaussianStep(sigma, NoSampling() if q == 1.0 else PoissonSampling(q)), n)
    return accountant


def single_step_delta(terms: Terms, epsilon: float) -> float | None:
    """Closed form of δ(ε) for one Poisson-sampled step under add-or-remove-one."""
    if terms.relation != ADD_OR_REMOVE_ONE or terms.mu or list(terms.poisson.values()) != [1]:
        return None
    ((sigma, q),) = terms.poisson
    point = 0.5 + sigma**2 * math.log1p(math.expm1(min(epsilon, 700.0)) / q)
    g, h = float(ndtr(-point / sigma)), float(ndtr(-(point - 1.0) / sigma))
    return q * h - (math.expm1(min(epsilon, 700.0)) + q) * g


def distribution(terms: Terms, epsilon: float, *, pessimistic: bool) -> Any:
    """Privacy loss distribution of dp-accounting, or None where it is not installed or fails."""
    try:
        from dp_accounting import NeighboringRelation
        from dp_accounting.pld import privacy_loss_distribution as pld
    except ImportError:
        return None
    relation = getattr(NeighboringRelation, terms.relation.upper())
    reach = max(20.0 / sigma**2 for sigma, _ in terms.poisson)
    options = {
        "value_discretization_interval": max(min(1e-3, epsilon / 2000.0), 1e-5, reach / _MAX_POINTS),
        "log_mass_truncation_bound": -60,
        "pessimistic_estimate": pessimistic,
        "use_connect_dots": pessimistic,
    }
    steps = [(sigma, q, n) for (sigma, q), n in terms.poisson.items()]
    parts = []
    try:
        if terms.mu:
            parts.append(pld.from_gaussian_mechanism(1.0 / terms.mu, **options))
        for sigma, q, n in steps:
            step = pld.from_gaussian_mechanism(sigma, sampling_prob=q, neighboring_relation=relation, **options)
            parts.append(step.self_compose(n))
        total = parts[0]
        for part in parts[1:]:
            total = total.compose(part)
        return total
    except (OverflowError, MemoryError, ValueError):
        return None


def check(configuration: dict[str, Any]) -> dict[str, Any]:
    accountant = ledger_of(configuration, "auto")
    delta = configuration["delta"]
    start = time.process_time()
    bound = accountant.get_epsilon(delta)
    seconds = time.process_time() - start
    rdp = float(ledger_of(configuration, "rdp").get_epsilon(delta))
    terms = collect(accountant.ledger, accountant.relation)
    row: dict[str, Any] = {
        **configuration,
        "upper": float(bound),
        "lower": bound.lower,
        "rdp": rdp,
        "engine": bound.engine,
        "seconds": seconds,
    }
    epsilon = float(bound)
    # Values of δ: below the true one at the reported ε, above it at the certified lower bound.
    below: dict[str, float] = {}
    above: dict[str, float] = {}
    uppers: dict[str, float] = {}
    if bound.engine == "analytic-gaussian":
        uppers["exact"] = epsilon
    elif terms.poisson and epsilon > 0.0:
        _, order = rdp_to_epsilon(terms.cumulant(), delta, max_order=terms.max_order)
        inversions = invert(terms, order - 1.0, max_points=8192, seconds=0.5)
        closed = single_step_delta(terms, epsilon)
        if closed is not None:
            below["closed form"] = closed
        # Only where it has decayed and its own rounding is small against δ.
        if all(i.truncation < 1e-10 and i.noise(epsilon) < 0.1 * delta for i in inversions):
            below["inversion"] = max(i.delta(epsilon) - i.noise(epsilon) for i in inversions)
            above["inversion"] = max(i.delta(bound.lower) + i.noise(bound.lower) for i in inversions)
            uppers["inversion"] = solve(inversions, delta, epsilon)
        elif (pessimistic := distribution(terms, epsilon, pessimistic=True)) is not None:
            if delta > _DISTRIBUTION_NOISE:
                optimistic = distribution(terms, epsilon, pessimistic=False)
                below["dp-accounting"] = float(optimistic.get_delta_for_epsilon(epsilon))
                above["dp-accounting"] = float(pessimistic.get_delta_for_epsilon(bound.lower))
            value = float(pessimistic.get_epsilon_for_delta(delta))
            # Its float64 noise may be larger than a small δ.
            uppers["dp-accounting" if value >= bound.lower else "contradicted dp-accounting"] = value
    usable = {name: value for name, value in uppers.items() if not name.startswith("contradicted")}
    reference = min([*usable.values(), rdp]) if usable else bound.lower
    row.update(delta_below=below, delta_above=above, reference_uppers=uppers)
    # 1e-6: relative rounding of the references; the bound itself carries its own margins.
    row["sound"] = (
        bound.lower <= epsilon
        and all(value <= delta * (1.0 + 1e-6) for value in below.values())
        and (bound.lower == 0.0 or all(value >= delta * (1.0 - 1e-6) for value in above.values()))
    )
    row["tight"] = epsilon <= max(1.01 * reference, reference + 0.01)
    row["bracketed"] = epsilon <= max(1.01 * bound.lower, bound.lower + 0.01)
    return row


def solve(inversions: list[Any], delta: float, upper: float) -> float:
    low, high = 0.9 * upper, upper
    for _ in range(40):
        middle = 0.5 * (low + high)
        if max(inversion.delta(middle) for inversion in inversions) > delta:
            low = middle
        else:
            high = middle
    return low


def grid(count: int) -> dict[str, Any]:
    rows = []
    for number, configuration in enumerate(configurations(count)):
        rows.append(check(configuration))
        if not rows[-1]["sound"]:
            print("UNSOUND", rows[-1], flush=True)
        if number % 20 == 19:
            print(f"{number + 1} of {count}", flush=True)
    return summary(rows)


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    ratios = [row["rdp"] / row["upper"] for row in rows if row["upper"] > 1e-6]
    kinds = sorted({name for row in rows for name in row["reference_uppers"]})
    return {
        "configurations": len(rows),
        "with a reference that can show unsoundness": sum(
            bool(row["delta_below"]) or row["engine"] == "analytic-gaussian" for row in rows
        ),
        "unsound": sum(not row["sound"] for row in rows),
        "within 1 % or 0.01 of the reference upper bound": sum(row["tight"] for row in rows) / len(rows),
        **{f"reference upper bound: {name}": sum(name in row["reference_uppers"] for row in rows) for name in kinds},
        "no reference upper bound": sum(not row["reference_uppers"] for row in rows),
        "within 1 % or 0.01 of its own certified lower bound": sum(row["bracketed"] for row in rows) / len(rows),
        "rdp / auto quantiles 0, 25, 50, 75, 95, 100 %": [
            round(float(v), 3) for v in np.quantile(ratios, [0, 0.25, 0.5, 0.75, 0.95, 1])
        ],
        "seconds per query, median": float(np.median([row["seconds"] for row in rows])),
        "seconds per query, largest": max(row["seconds"] for row in rows),
        "rows": rows,
    }


def timed(action: Any, repeats: int = 5) -> float:
    """Best processor time of a cold query: every call gets a ledger that was never seen before."""
    best = math.inf
    for number in range(repeats):
        start = time.process_time()
        action(number)
        best = min(best, time.process_time() - start)
    return best


def speed() -> dict[str, float]:
    def steps(kind: str, phases: int, count: int) -> Any:
        def action(number: int) -> None:
            accountant = create_accountant(kind)
            for i in range(phases):
                sigma = 1.0 + 1e-3 * number + i / max(phases, 1)
                accountant.step(noise_multiplier=sigma, sample_rate=0.01, steps=count)
            accountant.get_epsilon(1e-5)

        return action

    def epochs(number: int) -> None:
        accountant = create_accountant("prv")
        for _ in range(100):
            accountant.step(noise_multiplier=1.0 + 1e-3 * number, sample_rate=0.01, steps=100)
            accountant.get_epsilon(1e-5)

    def calibration(kind: str) -> Any:
        return lambda number: calibrate_noise_multiplier(
            target_epsilon=3.0 + 1e-3 * number, delta=1e-5, sample_rate=0.034, steps=900, accountant=kind
        )

    return {
        "rdp, 10 000 equal steps": timed(steps("rdp", 1, 10_000)),
        "prv, 10 000 equal steps": timed(steps("prv", 1, 10_000)),
        "prv, 1 000 000 equal steps": timed(steps("prv", 1, 10**6)),
        "rdp, 100 phases": timed(steps("rdp", 100, 100), 3),
        "prv, 100 phases": timed(steps("prv", 100, 100), 3),
        "rdp, 10 000 distinct sigma": timed(steps("rdp", 10_000, 1), 2),
        "prv, 10 000 distinct sigma": timed(steps("prv", 10_000, 1), 2),
        "rdp, calibration": timed(calibration("rdp"), 3),
        "prv, calibration": timed(calibration("prv"), 3),
        "prv, one query after each of 100 epochs, per query": timed(epochs, 2) / 100.0,
    }


def schedules(steps: int = 250, stages: int = 400) -> dict[str, float]:
    """Processor time of what a noise schedule asks of accounting: budgets, the same question again, and `fit`."""
    import torch
    from torch import nn

    from clipless_dp import DPLipModel, fit, gated, losses
    from clipless_dp.optim.budget import Budget
    from clipless_dp.training import noise_stages

    def sigmas(count: int) -> list[float]:
        return [1.5 * (0.7 / 1.5) ** (i / count) for i in range(count)]

    result: dict[str, float] = {}
    accountant = create_accountant("prv")
    for sigma in sigmas(steps):
        accountant.step(noise_multiplier=sigma, sample_rate=0.01)
    start = time.process_time()
    target = float(accountant.get_epsilon(1e-5))
    result[f"a query at {steps} distinct sigma"] = time.process_time() - start
    start = time.process_time()
    for _ in range(3):
        accountant.get_epsilon(1e-5)
    result["the same query again"] = (time.process_time() - start) / 3

    # The whole of a budget is used, so that the last steps are near it.
    budget, accountant, times = Budget((1.0005 * target, 1e-5)), create_accountant("prv"), []
    for sigma in sigmas(steps):
        start = time.process_time()
        budget.require(accountant, sigma, 0.01)
        times.append(time.process_time() - start)
        accountant.step(noise_multiplier=sigma, sample_rate=0.01)
    result[f"a budget of {steps} steps with a new sigma each, a step: mean"] = sum(times) / len(times)
    result["the same: median"] = float(np.median(times))
    result["the same: largest"] = max(times)

    torch.manual_seed(0)
    inputs = torch.randn(4000, 20)
    data = inputs, (inputs[:, 0] > 0).long()
    seconds = []
    for schedule in (None, noise_stages(1.5, 0.7, stages)):
        net = gated(nn.Sequential(nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 2)))
        model = DPLipModel(net, input_shape=(20,), input_norm=5.0, loss=losses.TauCrossEntropy(4.0))
        start = time.process_time()
        fit(
            model,
            data,
            epsilon=2.0,
            delta=1e-5,
            epochs=stages / 40,
            batch_size=100,
            lr=0.1,
            noise_schedule=schedule,
            progress=False,
        )
        seconds.append(time.process_time() - start)
    result["fit of 400 steps"] = seconds[0]
    result[f"fit of 400 steps and {stages} stages of noise"] = seconds[1]
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["grid", "speed", "schedules"])
    parser.add_argument("--configurations", type=int, default=320)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    RESULTS.mkdir(exist_ok=True)
    if options.only == "schedules":
        figures = schedules()
        (RESULTS / "schedules.json").write_text(json.dumps(figures, indent=1) + "\n")
        table = ["# What noise schedules ask of accounting", ""]
        table += [f"Python {platform.python_version()}, NumPy {np.__version__}, one core, processor time.", ""]
        table += ["| question | processor time |", "| --- | --- |"]
        table += [f"| {name} | {1e3 * value:.3g} ms |" for name, value in figures.items()]
        (RESULTS / "schedules.md").write_text("\n".join([*table, ""]))
        print("\n".join(table))
        return
    path = RESULTS / "accounting.json"
    results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    results["python"], results["numpy"] = platform.python_version(), np.__version__
    if options.only != "grid":
        results["speed"] = speed()
    if options.only != "speed":
        results["grid"] = grid(options.configurations)
    path.write_text(json.dumps(results, indent=1) + "\n")
    lines = ["# Accounting: soundness grid and query times", ""]
    lines += [f"Python {results['python']}, NumPy {results['numpy']}, one core.", ""]
    if "grid" in results:
        lines += ["| grid | value |", "| --- | --- |"]
        lines += [f"| {k} | {v} |" for k, v in results["grid"].items() if k != "rows"] + [""]
        lines += ["| smallest q in the ledger | ledgers | median rdp / auto |", "| --- | --- | --- |"]
        rows = [row for row in results["grid"]["rows"] if row["upper"] > 1e-6]
        for low, high in ((0.0, 1e-4), (1e-4, 1e-3), (1e-3, 1e-2), (1e-2, 1e-1), (1e-1, 1.1)):
            part = [r["rdp"] / r["upper"] for r in rows if low <= min(q for _, q, _ in r["phases"]) < high]
            lines.append(f"| {low:g} to {min(high, 1.0):g} | {len(part)} | {np.median(part):.3f} |")
        lines.append("")
    if "speed" in results:
        lines += ["| query | processor time |", "| --- | --- |"]
        lines += [f"| {name} | {1e3 * value:.1f} ms |" for name, value in results["speed"].items()] + [""]
    (RESULTS / "accounting.md").write_text("\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
