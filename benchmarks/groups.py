"""Ledgers of groups of rows: certified bounds against dp-accounting's mixtures of Gaussians.

python benchmarks/groups.py                 # checks benchmarks/results/groups.json, prints a summary
python benchmarks/groups.py --reference     # writes the reference into it; needs dp-accounting (0.6.0), nothing else
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "groups.json"
_POINTS = 2e3
"""Points of the reference's grid, each of which takes it about a millisecond."""


def configurations(count: int = 72, seed: int = 0) -> list[dict[str, Any]]:
    """Random ledgers (σ, q, steps, k, δ), the noise such that a person's signal is worth accounting for."""
    draw = random.Random(seed)
    result = []
    for number in range(count):
        k = (2, 3, 5, 10, 20, 50, 100)[number % 7]
        q = round(10 ** draw.uniform(-4, -0.1), 6)
        steps = int(10 ** draw.uniform(0, 4))
        sigma = k * q * math.sqrt(steps) / draw.uniform(0.3, 3.0)
        delta = 10.0 ** -draw.randint(4, 9)
        result.append({"sigma": round(max(sigma, 0.5), 3), "q": q, "steps": steps, "k": k, "delta": delta})
    return result


def reference(ledger: dict[str, Any]) -> dict[str, Any]:
    """Pessimistic and optimistic ε of dp-accounting."""
    from dp_accounting.pld import privacy_loss_distribution as pld

    k, q, sigma = ledger["k"], ledger["q"], ledger["sigma"]
    log_weights = [
        math.lgamma(k + 1) - math.lgamma(j + 1) - math.lgamma(k - j + 1) + j * math.log(q) + (k - j) * math.log1p(-q)
        for j in range(k + 1)
    ]
    weights = [math.exp(w) for w in log_weights]
    weights[0] += 1.0 - math.fsum(weights)
    # Numbers of rows that occur with less than e^−45 only widen the grid.
    kept = [j for j in range(k + 1) if log_weights[j] > -45.0]
    probabilities = [weights[j] for j in kept]
    probabilities[0] += 1.0 - math.fsum(probabilities)
    reach = kept[-1] * (kept[-1] + 16.0 * sigma) / (2.0 * sigma**2)
    wanted = 0.05 * k * q / sigma
    width = max(wanted, reach / _POINTS)
    # Both estimates are valid bounds at every width; where the grid is coarse they are far apart.
    answers: dict[str, Any] = {"coarse": width > wanted}
    for name, pessimistic in (("pessimistic", True), ("optimistic", False)):
        step = pld.from_mixture_gaussian_mechanism(
            sigma,
            [float(j) for j in kept],
            probabilities,
            pessimistic_estimate=pessimistic,
            value_discretization_interval=width,
            log_mass_truncation_bound=-50,
            use_connect_dots=pessimistic,
        )
        answers[name] = float(step.self_compose(ledger["steps"]).get_epsilon_for_delta(ledger["delta"]))
    return answers


def check(ledger: dict[str, Any]) -> dict[str, Any]:
    """The certified bounds of a ledger, and the rule of thumb k·ε."""
    from accounting import PRVAccountant

    accountant = PRVAccountant()
    accountant.step(noise_multiplier=ledger["sigma"], sample_rate=ledger["q"], steps=ledger["steps"])
    start = time.perf_counter()
    bound = accountant.get_epsilon(ledger["delta"], group_size=ledger["k"])
    seconds = time.perf_counter() - start
    thumb = ledger["k"] * float(accountant.get_epsilon(ledger["delta"]))
    return {"upper": bound.upper, "lower": bound.lower, "thumb": thumb, "engine": bound.engine, "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference", action="store_true", help="compute the reference instead of reading it")
    if parser.parse_args().reference:
        rows = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
        for ledger in configurations()[len(rows) :]:
            rows.append({**ledger, **reference(ledger)})
            print(rows[-1], flush=True)
            RESULTS.parent.mkdir(exist_ok=True)
            RESULTS.write_text("[\n" + ",\n".join(" " + json.dumps(row) for row in rows) + "\n]\n")
        return
    rows = [{**row, **check(row)} for row in json.loads(RESULTS.read_text())]
    for row in rows:
        print(
            "σ {sigma:<8} q {q:<9} steps {steps:<5} k {k:<3} δ {delta:.0e}  dp-accounting {optimistic:.5f} … "
            "{pessimistic:.5f}  here {lower:.5f} … {upper:.5f}  k·ε {thumb:.3f}  {seconds:.2f} s".format(**row)
        )
    print("ledgers", len(rows))
    print("within 1 % of the certified lower bound", sum(r["upper"] <= 1.01 * r["lower"] for r in rows))
    print("below dp-accounting's optimistic epsilon", sum(r["upper"] < r["optimistic"] * (1 - 1e-9) for r in rows))
    print("lower bound above the pessimistic one", sum(r["lower"] > r["pessimistic"] * (1 + 1e-9) for r in rows))
    print("largest seconds", max(r["seconds"] for r in rows))


if __name__ == "__main__":
    main()
