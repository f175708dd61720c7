"""The parts of a readable privacy statement, in words and tables."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from decimal import ROUND_FLOOR
from typing import Any

from accounting import ADD_OR_REMOVE_ONE, REPLACE_ONE
from accounting.risk import percent
from accounting.stated import UNTOLD
from clipless_dp.statement.brief import best_guess, brief_sections, found_section, protected, question, tier
from clipless_dp.statement.facts import DRAWN, noise_in_words, shown
from clipless_dp.statement.section import Section

_SHOWN_RUNS = 20
"""Lines of a noise schedule in the readable forms; the JSON holds all of them."""

_RELATIONS: dict[str, str] = {
    ADD_OR_REMOVE_ONE: "adding or removing one unit",
    REPLACE_ONE: "replacing one unit by another",
}


def sections(facts: Mapping[str, Any]) -> Iterator[Section]:
    """The parts of a readable statement, in their order."""
    yield from brief_sections(facts)
    yield Section("What is not covered", items=(*facts["not_covered"], *facts["notes"]))
    yield Section("What is promised", tuple(_promise(facts)))
    yield from found_section(facts)
    audits = facts["audits"]
    yield Section(
        "Audit",
        ("No audit was handed to this statement: the promise rests on the proofs and on the code.",) * (not audits),
        printed=tuple(f"{one['kind']}\n\n{one['text']}" for one in audits),
    )
    yield _checking(facts)
    yield from (replace(section, place="folded") for section in _technical(facts))


def _technical(facts: Mapping[str, Any]) -> Iterator[Section]:
    """What the promise rests on, for whoever checks it."""
    yield _terms(facts)
    if facts.get("risk") is not None:
        yield _risk(facts)
    yield _added_noise(facts)
    yield _ledger(facts)
    yield Section(
        "Learning rate",
        ("Of each step, as it was taken; the JSON file has all of them. A schedule must not look at the data.",),
        rows=tuple(_rates(facts["learning_rates"], facts["steps"]["taken"])),
    )
    yield _bounds(facts)
    yield Section(
        "Noise by parameter",
        header=("parameter", f"{_one(facts)} changes at most", "standard deviation of the noise"),
        rows=tuple(
            (name, shown(facts["bounds"]["per_parameter"][name]), f"{deviation:.6g}")
            for name, deviation in facts["noise"]["deviations"].items()
        ),
    )
    yield from _adaptive_caps(facts)
    yield _curve(facts)
    if "robustness" in facts:
        yield _robustness(facts["robustness"])


def _checking(facts: Mapping[str, Any]) -> Section:
    weights = facts.get("model", {}).get("weights")
    return Section(
        "How to check this",
        (
            'The JSON file holds the ledger: anyone can compute ε from it again, with "python -m accounting explain '
            'STATEMENT.json" of the package that comes with clipless_dp, or with another accountant. That the steps '
            "were what the ledger says is shown by the code of the training, which is open, and by audits.",
            "ε and the risk, the neighbouring data sets, the steps, how batches were drawn and where noise came from "
            f"follow from the ledger. {UNTOLD}",
        ),
        rows=(
            *((name, version) for name, version in facts["versions"].items()),
            *((("fingerprint of the weights (SHA-256)", weights),) if weights else ()),
            ("written", facts["created"]),
        ),
    )


_AVERAGED = (
    "people are drawn, not rows; those of a person that enter a step are averaged past all gates, so that together "
    "they change the sum by no more than one row could"
)
_PEOPLE = {False: "", True: " people"}


def _by_person(facts: Mapping[str, Any]) -> bool:
    """Whether the promise is about all rows of a person."""
    return facts.get("counted") == "person"


def _one(facts: Mapping[str, Any]) -> str:
    return "one person" if _by_person(facts) else "one sample"


def _terms(facts: Mapping[str, Any]) -> Section:
    return Section(
        "Terms",
        rows=(
            ("Setting", "central: whoever trains sees the data, whoever gets the weights does not"),
            ("Unit of privacy", protected(facts)),
            ("Neighbouring data sets", f"differ by {_relation(facts)}"),
            ("Size of the data set", f"{facts['dataset_size']}{_PEOPLE[_by_person(facts)]}, taken to be public"),
            ("What is released", "the weights after every step, and whatever is computed from them alone"),
            (
                "Uses of the data covered",
                f"the gradients of the {facts['steps']['recorded']} steps in the ledger, and its other entries",
            ),
        ),
    )


def _added_noise(facts: Mapping[str, Any]) -> Section:
    steps, sampling = facts["steps"], facts["sampling"]
    declared = {"poisson": "vouched"}.get(sampling["declared"], sampling["declared"])
    drawn = "; ".join(
        f"{DRAWN[kind]} ({count} of {steps['recorded']} steps)" for kind, count in sampling.get("drawn", {}).items()
    )
    return Section(
        "How the noise was added",
        (
            "Before each update, Gaussian noise was added to the sum of the samples' gradients. Its strength is the "
            f"noise multiplier: standard deviation over the most that {_one(facts)} can change the sum.",
        ),
        rows=(
            *((("Rows of a person", _AVERAGED),) if _by_person(facts) else ()),
            ("Sampling", drawn or DRAWN[declared]),
            ("Sample rate q", f"{sampling['sample_rate']:.6g}"),
            ("Expected batch size", f"{sampling['expected_batch_size']:.6g}; the sum is divided by this public number"),
            ("Steps", str(steps["recorded"])),
            ("Noise shared by", f"the {facts['noise']['allocation']!r} allocation"),
            *(("Source of the noise", f"{name}: {noise_in_words(name)}") for name in facts["noise"]["sources"]),
        ),
    )


def _ledger(facts: Mapping[str, Any]) -> Section:
    runs = [
        (
            entry["event"].replace("_", " "),
            "–" if entry["noise_multiplier"] is None else f"{entry['noise_multiplier']:.6g}",
            f"{entry['sample_rate']:.6g}",
            str(entry["count"]),
            entry.get("drawn", "unknown"),
            (entry.get("noise") or "unknown").rpartition(".")[2],
            (entry.get("run") or "–")[:8],
        )
        for entry in facts["steps"]["entries"]
    ]
    more = len(runs) - _SHOWN_RUNS
    return Section(
        "Ledger",
        (f"{more} further lines are in the JSON file.",) if more > 0 else (),
        header=("event", "noise multiplier", "q charged", "count", "batches", "source of the noise", "run"),
        rows=tuple(runs[:_SHOWN_RUNS]),
    )


def _bounds(facts: Mapping[str, Any]) -> Section:
    bounds = facts["bounds"]
    return Section(
        "Bounds by layer",
        (
            f"The most that {_one(facts)} can change each layer's summed gradient, whatever they are: certified from "
            f"the network, not measured. All layers together: {shown(bounds['total'])} ({bounds['relation']}). Where "
            "bounds follow from the weights they change from step to step; these are the latest, and each step was "
            "charged by its own."
            + " Replacing one unit changes it twice as much at most: the ledger's noise multipliers are relative to "
            "the bounds shown, and ε counts the factor." * (facts["relation"] == REPLACE_ONE),
        ),
        header=("layer", "type", "input at most", "cotangent at most", "gradient at most"),
        rows=tuple(
            (
                layer["path"] or "(network)",
                layer["kind"],
                shown(layer["input_norm"]),
                shown(layer["cotangent_norm"]),
                shown(layer["sensitivity"]),
            )
            for layer in bounds["layers"]
        ),
    )


def _adaptive_caps(facts: Mapping[str, Any]) -> Iterator[Section]:
    caps = facts.get("adaptive_caps")
    if caps is None:
        return
    (share, *_) = {settings["share"] for settings in caps["settings"].values()}
    yield Section(
        "Caps that adapt",
        (
            "These caps follow a quantile of the samples' gradient norms. How many norms lie above and below each was "
            "released by every step, as further coordinates of what it releases, and is in its noise multiplier: "
            f"counts take {share:g} of each step's σ⁻², gradients the rest. One sample changes all counts together by "
            f"at most {shown(caps['counts_change_at_most'])}; each has noise of standard deviation "
            f"{caps['count_deviation']:.6g}.",
        ),
        header=("gate", "cap of the next step", "share of samples below at the last step, with noise"),
        rows=tuple(
            (
                name,
                f"{gate['cap']:.6g}",
                "–" if gate["below_at_last_step"] is None else f"{gate['below_at_last_step']:.4g}",
            )
            for name, gate in caps["gates"].items()
        ),
    )


def _curve(facts: Mapping[str, Any]) -> Section:
    return Section(
        "ε at several δ",
        (
            "The same training, read at other δ. A smaller δ asks for a promise with fewer exceptions, and ε grows. "
            f"Computed by {facts['accountant']['class']} of clipless_dp {facts['versions']['clipless_dp']}; the tight "
            "value lies between the last two columns, where both are given.",
        ),
        header=("δ", "engine", "ε at least", "ε at most (the promise)"),
        rows=tuple(
            (
                f"{point['delta']:.3g}",
                point["engine"] or "–",
                shown(point["lower"], ROUND_FLOOR),
                shown(point["epsilon"]),
            )
            for point in facts["epsilon"]["curve"]
        ),
    )


def _risk(facts: Mapping[str, Any]) -> Section:
    """Error rates that no attacker escapes; upper bounds, rounded up."""
    risk = facts["risk"]
    mu = risk["gaussian_mu"]
    gaussian = f"Gaussian differential privacy with μ = {shown(mu)}" if mu is not None else "no Gaussian mechanism"
    return Section(
        "Risk",
        (
            f"What someone can achieve who tries to tell {question(facts)}, sees all that was released, and knows all "
            "other data and the training method. A false positive is a unit that was not there and that they take to "
            "have been; a true positive is one that was, and that they find. No attacker does better, whatever they "
            "do; what real ones achieve is usually far less.",
            f"With even odds beforehand they are right with probability at most "
            f"{percent(risk['success_at_even_odds'])} (guessing: 50 %). Their membership advantage, true- minus "
            f"false-positive rate, is at most {percent(risk['advantage'])}.",
            f"Where both error rates are at least {risk['gaussian_mu_from']:g} they do no better than against "
            f"{gaussian}: a summary of the curve, not a promise about rarer errors.",
        ),
        header=("false-positive rate", "true-positive rate at most", "guessing"),
        rows=tuple(
            (
                f"{100 * rates['false_positive']:g} %",
                percent(rates["true_positive"]),
                f"{100 * rates['false_positive']:g} %",
            )
            for rates in risk["true_positive_rates"]
        ),
        figure="curve",
    )


def _robustness(robustness: Mapping[str, Any]) -> Section:
    """What no perturbation of an input changes; shares rounded down, what attacks leave rounded up."""

    def rounded(value: float | None, rounding: Callable[[float], int]) -> str:
        # What is a whole number of hundredths but for rounding stays one.
        return "–" if value is None else f"{rounding(round(1e4 * value, 6)) / 100:.2f} %"

    def interval(point: Mapping[str, Any]) -> str:
        return f"{rounded(point['low'], math.floor)} to {rounded(point['high'], math.ceil)}"

    rows = [("clean", rounded(robustness["clean"]["value"], math.floor), interval(robustness["clean"]), "–")]
    for point in robustness["points"]:
        attacked = None if point["attacked"] is None else point["attacked"]["value"]
        certified = point["certified"]
        rows.append(
            (
                f"{point['radius']:.4g}",
                rounded(certified["value"], math.floor),
                interval(certified),
                rounded(attacked, math.ceil),
            )
        )
    lipschitz, average = robustness["lipschitz"], robustness["average_radius"]
    constant = "not known of the scores together" if lipschitz is None else shown(lipschitz)
    radius = "infinite" if average is None else f"{average:.4g}"
    tried = ", ".join(robustness["attacks"]) or "none"
    return Section(
        "Robustness",
        (
            "How many predictions are right and stay as they are whatever moves an input by at most a radius, in "
            f"Euclidean norm. Computed on {robustness['samples']} samples: {robustness['data']}. It is a function of "
            "the released weights and of these samples, and costs the training data nothing.",
            f"Lipschitz constant of the scores: {constant}, by {robustness['method']}. Attacks tried: {tried}. Average "
            f"certified radius: {radius}.",
        ),
        tuple(robustness["assumptions"]),
        ("radius", "certified", f"{100 * robustness['level']:g} % interval", "left by attacks"),
        tuple(rows),
    )


def _relation(facts: Mapping[str, Any]) -> str:
    return _RELATIONS.get(facts["relation"], str(facts["relation"]))


def _rates(runs: Sequence[Mapping[str, Any]], taken: int) -> Iterator[tuple[str, str]]:
    recorded = sum(run["count"] for run in runs)
    yield "Steps whose rate is recorded", f"{recorded} of {taken}"
    for name, choose in (("First", lambda rates: rates[0]), ("Largest", max), ("Last", lambda rates: rates[-1])):
        # Of each group of parameters by itself.
        groups = zip(*([-1.0 if rate is None else rate for rate in run["rates"]] for run in runs), strict=False)
        chosen = [choose(list(rates)) for rates in groups]
        if chosen:
            yield name, ", ".join("–" if rate < 0.0 else f"{rate:.6g}" for rate in chosen)


def _promise(facts: Mapping[str, Any]) -> Iterator[str]:
    summary = facts["epsilon"]
    epsilon, delta = summary["epsilon"], summary["delta"]
    if epsilon is None:
        yield f"No finite ε is certified at δ = {delta:g}."
        return
    yield (
        f"The training is (ε, δ)-differentially private with ε = {shown(epsilon)} at δ = {delta:g}, with respect to "
        f"{_relation(facts)}. The unit of privacy is {protected(facts)}."
    )
    yield (
        "In words: take any one unit, and someone who knows all other data and the training method, and who sees the "
        "weights of every step. Asked whether that unit was in the data, with even odds beforehand, they are right "
        f"with probability at most {percent(best_guess(facts))} (guessing: 50 %). This holds for every unit, however "
        "unusual, and whatever else is known or becomes known. It does not hide what is learned about everybody from "
        "everybody else's data."
    )
    yield f"By the scale of Ponomareva et al. 2023 (ε ≤ 1 strong, ε ≤ 10 reasonable) this is {tier(epsilon)}."
