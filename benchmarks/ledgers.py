"""Soundness grid and query times of `accounting`: writes benchmarks/results/accounting.{json,md}.

    python benchmarks/ledgers.py              # grid and times
    python benchmarks/ledgers.py --only grid --configurations 320
    python benchmarks/ledgers.py --only speed

Every configuration of the grid is answered by the "auto" accountant and checked against references:
δ at the reported ε by inverse Laplace transform (independent of all discretisation; used where its
integrand decays), by the closed form for one step, by the optimistic privacy loss distribution of
dp-accounting where that package is installed and δ is above its float64 noise, and against the
engine's own certified lower bound everywhere.
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


def pld_delta(terms: Terms, epsilon: float) -> float | None:
    """δ(ε) of the optimistic distribution of dp-accounting, a lower bound up to float64 noise."""
    try:
        from dp_accounting.pld import privacy_loss_distribution as pld
    except ImportError:
        return None
    if terms.relation != ADD_OR_REMOVE_ONE or sum(terms.poisson.values()) > 10**5:
        return None
    interval = min(1e-3, max(1e-5, epsilon / 2000.0))
    total = None
    options = {"value_discretization_interval": interval, "pessimistic_estimate": False, "use_connect_dots": False}
    if terms.mu:
        total = pld.from_gaussian_mechanism(1.0 / terms.mu, **options)
    for (sigma, q), n in terms.poisson.items():
        if sigma < 0.4 or 20.0 / sigma**2 / interval > 3e6:
            return None
        part = pld.from_gaussian_mechanism(sigma, sampling_prob=q, **options).self_compose(n)
        total = part if total is None else total.compose(part)
    return None if total is None else float(total.get_delta_for_epsilon(epsilon))


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
    references: dict[str, float] = {}
    if bound.engine != "analytic-gaussian":
        if terms.poisson and epsilon > 0.0:
            _, order = rdp_to_epsilon(terms.cumulant(), delta, max_order=terms.max_order)
            inversions = invert(terms, order - 1.0, max_points=8192, seconds=1.0)
            # Only where it has decayed and its own rounding is small against δ.
            if all(i.truncation < 1e-10 and i.noise(epsilon) < 0.1 * delta for i in inversions):
                references["inversion"] = max(i.delta(epsilon) - i.noise(epsilon) for i in inversions)
                row["reference_epsilon"] = solve(inversions, delta, epsilon)
        closed = single_step_delta(terms, epsilon)
        if closed is not None:
            references["closed form"] = closed
        if "inversion" not in references and delta > 1e-9:
            optimistic = pld_delta(terms, epsilon)
            if optimistic is not None:
                references["dp-accounting (optimistic)"] = optimistic
    row["references"] = references
    # 1e-6: relative rounding of the references; the bound itself carries its own margins.
    row["sound"] = bound.lower <= epsilon and all(v <= delta * (1.0 + 1e-6) for v in references.values())
    reference = row.get("reference_epsilon", bound.lower)
    row["tight"] = epsilon <= max(1.01 * reference, reference + 0.01)
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
    checked = [row for row in rows if row["references"] or row["engine"] == "analytic-gaussian"]
    ratios = [row["rdp"] / row["upper"] for row in rows if row["upper"] > 1e-6]
    return {
        "configurations": len(rows),
        "with an independent reference": len(checked),
        "unsound": sum(not row["sound"] for row in rows),
        "within 1 % or 0.01 of the reference, else of its own lower bound": sum(row["tight"] for row in rows)
        / len(rows),
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["grid", "speed"])
    parser.add_argument("--configurations", type=int, default=320)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    RESULTS.mkdir(exist_ok=True)
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
