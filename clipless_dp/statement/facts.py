"""What a privacy statement states, as plain values: read from the ledger, the bounds and public settings alone."""

from __future__ import annotations

import math
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from decimal import ROUND_CEILING, Context
from typing import Any

import torch

from accounting import ADD_OR_REMOVE_ONE
from accounting.errors import MixedUnitsError
from accounting.stated import recorded, settings_beside
from clipless_dp.model import DPLipModel
from clipless_dp.model.functions import answers_of_graph, function_of
from clipless_dp.modules import digest_of
from clipless_dp.noise import ReproducibleNoise, SecureNoise, SystemNoise, source_name
from clipless_dp.optim import CliplessDPOptimizer
from clipless_dp.statement.risk import risk_of
from clipless_dp.version import __version__

STATEMENT_FORMAT = 2
STATEMENT_KIND = "clipless_dp.privacy_statement"
_STEPS = ("gaussian_step", "gaussian_vector_step")
_NOISE = {
    source_name(SystemNoise): "a generator whose whole state comes from the operating system; seeds set by user code "
    "do not reach it. It is statistically sound, not cryptographic",
    source_name(SecureNoise): "a cryptographic generator keyed by the operating system at every step, and sums rounded "
    "to a public grid, so that floating point tells nothing about what the noise hides",
    source_name(ReproducibleNoise): "REPRODUCIBLE: whoever knows the seed can remove the noise",
}
DRAWN = {
    "seeded": "Poisson, from a seed: secret only as long as the seed is",
    "unknown": "Poisson, as was recorded by hand or by an earlier version, not checked",
    "vouched": "Poisson, by a sampler of the user's, not checked",
    "announced": "Poisson: each sample joins each batch by a coin flip of its own; checked where it was charged",
    "none": "none claimed: charged as if every step read all the data",
}
"""How batches were drawn, the least trustworthy first."""

CHANGED = (
    "The model's weights are not those that the last recorded step left, or its buffers are not: something else has "
    "set or trained them since. Unless that read none of the data, as a conversion to another dtype does not, the ε "
    "shown is not that of this model."
)

_UNCOVERED = (
    "Choices made by looking at results on this data: hyper-parameters, architecture, which run to keep. Each run that "
    "looked at the data adds to ε, and only the runs in the ledger are counted.",
    "Other uses of the same data: other models, statistics (means, vocabularies, normalisation constants) computed "
    "from it outside this training, features or initial weights that were trained on it.",
    "Data sets on which features or initial weights were trained before: their subjects get no promise from this one.",
    "Training losses, training accuracies, batch sizes and counts of rejected samples: shown to whoever ran the "
    "training, not protected, not to be published.",
    "The size of the data set, which is treated as public.",
    "Inference: what users send to the finished model.",
    "Whoever holds the data or watches the training machine: memory, gradients and batches are in the clear there.",
)


def facts_of(
    optimizer: CliplessDPOptimizer,
    delta: float | None,
    unit: str,
    title: str,
    notes: Sequence[str],
    audit: object,
    robustness: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """What :func:`clipless_dp.report` states, its findings included; arguments as there."""
    size = optimizer.dataset_size
    if delta is None:
        delta = 10.0 ** min(-1, math.floor(-math.log10(size))) if optimizer.budget is None else optimizer.budget[1]
    curve = [_bound_at(optimizer, delta * 10.0**-index) for index in range(7)]
    held = recorded(optimizer.accountant.ledger)
    accountant = type(optimizer.accountant)
    audits = [] if audit is None else list(audit) if isinstance(audit, (list, tuple)) else [audit]
    facts: dict[str, Any] = {
        "format": STATEMENT_KIND,
        "version": STATEMENT_FORMAT,
        "title": title,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "unit": unit,
        "counted": getattr(optimizer, "unit", "row"),
        "relation": str(getattr(optimizer.accountant, "relation", ADD_OR_REMOVE_ONE)),
        "epsilon": {**curve[0], "curve": curve},
        "risk": risk_of(optimizer.accountant),
        "dataset_size": size,
        "sampling": {
            "declared": optimizer.sampling,
            "sample_rate": optimizer.sample_rate,
            "expected_batch_size": optimizer.expected_batch_size,
            "drawn": {kind: held.drawn[kind] for kind in DRAWN if kind in held.drawn},
        },
        "steps": {
            "recorded": held.steps,
            "taken": optimizer.steps_taken,
            "entries": held.entries,
        },
        "learning_rates": [
            {"rates": [None if rate is None else _number(rate) for rate in rates], "count": count}
            for rates, count in optimizer.learning_rates
        ],
        "noise": {
            "allocation": optimizer.allocation,
            "sources": list(optimizer.noise_sources),
            "deviations": optimizer.noise_deviations(),
        },
        "weights": {
            "as_counted": optimizer.weights_are_counted(),
            "uncounted_changes": optimizer.uncounted_changes,
            "changed_settings": optimizer.changed_settings(),
            "changed_bounds": optimizer.changed_bounds(),
        },
        "model": _model(optimizer.model),
        "bounds": _bounds(optimizer),
        **({"adaptive_caps": _adaptive_caps(optimizer)} if optimizer.caps else {}),
        "accountant": {"class": f"{accountant.__module__}.{accountant.__qualname__}", "engine": curve[0]["engine"]},
        "versions": {
            "clipless_dp": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "ledger": optimizer.accountant.state_dict(),
        "not_covered": list(_UNCOVERED),
        "notes": [str(note) for note in notes],
        "audits": [{"kind": type(one).__name__, "passed": _passed(one), "text": str(one)} for one in audits],
    }
    if robustness is not None:
        facts["robustness"] = dict(robustness)
    facts["findings"] = [*findings_of(facts), *_weak_optimizer(optimizer, facts)]
    return facts


def findings_of(facts: Mapping[str, Any]) -> Iterator[str]:
    """What the facts themselves say against the promise; some of former statements are not there, and say nothing."""
    yield from _weak_promises(facts)
    yield from _weak_records(facts)
    yield from _weak_weights(facts)
    for one in facts["audits"]:
        if one["passed"] is not True and one["passed"] is not None:
            yield f"An audit failed ({one['kind']}): do not rely on the promise until it is explained."


def _passed(audit: object) -> bool | None:
    passed = getattr(audit, "passed", None)
    return None if passed is None else bool(passed)


def _bound_at(optimizer: CliplessDPOptimizer, delta: float) -> dict[str, Any]:
    """A point of the curve."""
    try:
        # Read before the conversion to a plain float: accountants of this package also say how tight they are.
        bound = optimizer.accountant.get_epsilon(delta)
    except MixedUnitsError:
        # The findings tell of it.
        return {"delta": delta, "epsilon": None, "lower": None, "engine": None}
    lower = getattr(bound, "lower", None)
    return {
        "delta": delta,
        "epsilon": _number(float(bound)),
        "lower": None if lower is None else _number(float(lower)),
        "engine": getattr(bound, "engine", None),
    }


def _model(model: DPLipModel) -> dict[str, Any]:
    """What tells this model from others: public settings, and a hash of the weights, which are released."""
    sizes = {True: 0, False: 0}
    for parameter in model.net.parameters():
        sizes[parameter.requires_grad] += parameter.numel()
    return {
        "kind": type(model.net).__name__,
        "trained": sizes[True],
        "frozen": sizes[False],
        # A process of several that holds a part of them knows no hash of all.
        "weights": digest_of(model.net) if model.placement.is_whole else None,
    }


def _bounds(optimizer: CliplessDPOptimizer) -> dict[str, Any]:
    sensitivity = optimizer.model.sensitivity()
    return {
        "relation": sensitivity.relation,
        "total": sensitivity.total,
        "per_parameter": dict(sensitivity.per_parameter),
        "layers": [
            {name: _number(value) if isinstance(value, float) else value for name, value in vars(layer).items()}
            for layer in sensitivity.layers
        ],
    }


def _adaptive_caps(optimizer: CliplessDPOptimizer) -> dict[str, Any]:
    """What the steps have released of caps that adapt, which is private."""
    last = optimizer.cap_history[-1].below if optimizer.cap_history else {}
    return {
        "settings": {place: asdict(limit) for place, limit in optimizer.cap_settings.items()},
        "count_deviation": optimizer.count_deviation(),
        "counts_change_at_most": optimizer.model.sensitivity().of_counts,
        "gates": {
            name: {"cap": cap, "below_at_last_step": None if name not in last else _number(last[name])}
            for name, cap in optimizer.caps.items()
        },
    }


def _steps_of(entries: Sequence[Mapping[str, Any]], name: str, value: object) -> int:
    """How many steps have this property."""
    return sum(entry["count"] for entry in entries if entry["event"] in _STEPS and entry.get(name) == value)


def _number(value: float) -> float | None:
    """JSON knows no infinity: ``None`` is no bound."""
    return value if math.isfinite(value) else None


def _weak_promises(facts: Mapping[str, Any]) -> Iterator[str]:
    """What the numbers themselves say against the promise."""
    summary, size = facts["epsilon"], facts["dataset_size"]
    if facts["steps"]["recorded"] == 0:
        yield "No step is recorded: nothing was trained, or another optimizer holds the ledger."
    if summary["epsilon"] is None:
        yield "No finite ε is certified at this δ: there is no promise."
    elif summary["epsilon"] > 10.0:
        yield (
            f"ε = {shown(summary['epsilon'])} is above 10, where the number alone promises little: what protection "
            "there is must be argued otherwise, for instance by audits."
        )
    if summary["delta"] > 1.0 / size:
        yield f"δ = {summary['delta']:g} exceeds 1/{size}: publishing one whole record at random would satisfy it."


def _weak_records(facts: Mapping[str, Any]) -> Iterator[str]:
    """Where what was recorded says little, or something else than a release should."""
    steps, about = facts["steps"], facts.get("counted", "row")
    for name in facts["noise"]["sources"]:
        if name == source_name(ReproducibleNoise):
            yield (
                "The noise was reproducible: it is a function of a seed. Whoever learns the seed can subtract the "
                "noise, and the promise is void for them. Such a run is for experiments."
            )
        elif name not in _NOISE:
            yield f"The noise came from {name}, which is not a source of this package and was not checked."
    entries = steps["entries"]
    if others := sum(entry["count"] for entry in entries if entry.get("unit", "row") != about):
        counted, other = ("people", "rows") if about == "person" else ("rows", "people")
        yield (
            f"{others} of {sum(entry['count'] for entry in entries)} entries of the ledger are about {other}, and this "
            f"statement is about {counted}: their ε do not add up, and there is no promise. Take them apart, or, where "
            "each person has one row only, say so by Ledger.about."
        )
    unnamed = sum(entry["count"] for entry in entries if entry.get("noise") is None)
    if unnamed:
        yield (
            f"The records of {unnamed} of {sum(entry['count'] for entry in entries)} entries do not say where their "
            "noise came from: they were made by hand or by an earlier version, and were not checked."
        )
    yield from settings_beside(facts)
    drawn = facts["sampling"].get("drawn", {})
    if "seeded" in drawn:
        yield (
            f"The batches of {drawn['seeded']} of {steps['recorded']} steps are a function of a seed: whoever learns "
            "the seed knows who was in which batch, and sampling amplifies nothing for them. Such a run is for "
            "experiments."
        )
    if "vouched" in drawn:
        yield (
            "Whoever ran the training vouches for Poisson sampling by a sampler of their own in "
            f"{drawn['vouched']} of {steps['recorded']} steps; it was not checked."
        )
    if "unknown" in drawn:
        yield (
            f"The records of {drawn['unknown']} of {steps['recorded']} steps do not say how batches were drawn: they "
            "were made by hand or by an earlier version, and were not checked."
        )
    if masks := _steps_of(entries, "seeded_masks", True):
        yield (
            f"Dropout masks and random views of {masks} of {steps['recorded']} steps, if there were any, are a "
            "function of a seed: for whoever learns it they depend on who else is in a batch, and a sample may change "
            "those of all others. Such a run is for experiments."
        )


def _weak_weights(facts: Mapping[str, Any]) -> Iterator[str]:
    """Where the weights may hold more than the ledger counts."""
    weights = facts.get("weights")
    if weights is None:
        yield (
            "It is not said whether the model's weights are those that the last recorded step left: a former version "
            "wrote this statement, or it was altered."
        )
        return
    if weights["as_counted"] is not True:
        yield CHANGED
    if weights["uncounted_changes"]:
        yield (
            f"Before {weights['uncounted_changes']} of the steps the weights were not those that a step had left, or "
            "the buffers were not: something else had set or trained them. Unless that read none of the data, the ε "
            "shown is too small."
        )
    if weights["changed_settings"]:
        yield (
            "Earlier steps were taken under other settings of the model ("
            + "; ".join(weights["changed_settings"])
            + "): "
            "each was charged by its own bounds, and the bounds shown here are the latest."
        )
    if weights["changed_bounds"]:
        yield (
            "Earlier steps had larger bounds than those shown here, which no change of the weights explains ("
            + "; ".join(weights["changed_bounds"])
            + "): each was charged by its own, of other layers, another loss, or parameters that were frozen since."
        )


def _weak_optimizer(optimizer: CliplessDPOptimizer, facts: Mapping[str, Any]) -> Iterator[str]:
    """What only the optimizer and the model tell."""
    if optimizer.ledger_is_incomplete():
        yield (
            "Another optimizer took private steps on this model that this ledger does not hold: the ε shown is too "
            "small. Compose the two ledgers."
        )
    if optimizer.skipped_draws:
        yield (
            f"{optimizer.skipped_draws} draws were skipped by hand (skip_draw), or with refused steps: the promise "
            "holds if what was in them did not decide that, and nothing of their gradients was used."
        )
    if "robustness" in facts:
        yield from _weak_certificates(optimizer.model, facts["robustness"])


def _weak_certificates(model: DPLipModel, robustness: Mapping[str, Any]) -> Iterator[str]:
    """Where a certificate is of another network than the one that is stated about."""
    of_the_weights = robustness["weights"] == digest_of(model.net)
    if not of_the_weights:
        yield (
            "The robustness certificate is of other weights than those that the model holds now: certify these, "
            "and hand that to the statement."
        )
    # The model as it is wrapped, or its network by itself, with constants that were stated.
    of_the_function = robustness.get("function") in (function_of(model.graph), function_of(model.net))
    if not of_the_function or (of_the_weights and _answers_otherwise(model, robustness)):
        yield (
            "The robustness certificate is of another function of the weights than the model computes: its layers, "
            "their settings or what is between them differ, and so do predictions. Certify this model, and hand that "
            "to the statement."
        )
    norm = model.input_norm
    if robustness["input_norm"] != (norm if math.isfinite(norm) else None):
        yield (
            "The robustness certificate is of another input norm than the model's, and so of other predictions: "
            "certify this model, and hand that to the statement."
        )


def _answers_otherwise(model: DPLipModel, robustness: Mapping[str, Any]) -> bool:
    """Whether the model answers fixed inputs otherwise than what was certified; former certificates do not tell."""
    told, norm = robustness.get("answers"), robustness["input_norm"]
    if told is None or not model.placement.is_whole:
        return False
    found = answers_of_graph(model.graph, model.input_shape, math.inf if norm is None else norm)
    return bool(told != found)


def noise_in_words(name: str) -> str:
    """What a source of noise is, by its name in the ledger."""
    return _NOISE.get(name, "not a source of this package, not checked")


def shown(value: float | None, rounding: str = ROUND_CEILING) -> str:
    """Four digits, rounded so that a rounded bound is still one: upper bounds up."""
    if value is None:
        return "–"
    return f"{float(Context(prec=4, rounding=rounding).create_decimal(repr(value))):.4g}"
